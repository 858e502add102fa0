"""Format 2: tables, steps and guidance of each measurement, shared guidance, image risk, and the settings' key."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decuwatch_training.branch import Requests, make_requests, profile_scores, shared_means, shared_row
from decuwatch_training.check import check_directory, class_gap_ratios
from decuwatch_training.cli import main
from decuwatch_training.diffusion import NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.golden import write_golden
from decuwatch_training.graphs import Graph
from decuwatch_training.imagerisk import Judge, image_risk
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.profile import (
    DEFAULT_PROFILE,
    FORMAT_1_PROFILE,
    check_profile,
    measures_of,
    rows_of,
    settings_key,
)
from decuwatch_training.tiny import tiny_backbone, tiny_run, with_format_2

TINY = Path(__file__).parents[2] / "scoring" / "testdata" / "tiny-2"


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**DEFAULT_PROFILE, name: {**DEFAULT_PROFILE[name], **fields}}


def test_settings_keys_are_those_of_the_contract_with_the_monitor() -> None:
    assert settings_key(FORMAT_1_PROFILE) == "ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@10+1"
    key = (
        "ddim g=2 eta=0 class_gap=paide-w2@0+1/3:posterior:shared request_risk=mean-w2@0+3/4:members:shared"
        " image_risk=judge@0+2/3:producer:own"
    )
    assert settings_key(DEFAULT_PROFILE) == key
    without = {name: value for name, value in DEFAULT_PROFILE.items() if name != "image_risk"}
    assert settings_key(without) == key.partition(" image_risk")[0]
    # Members alone, all with the same steps and their own guidance: the series of format 1 goes on.
    same = without | {
        name: {"tables": "members", "steps": 20, "guidance": "own", **FORMAT_1_PROFILE[name]}
        for name in ("class_gap", "request_risk")
    }
    assert settings_key(same) == settings_key(FORMAT_1_PROFILE)
    assert settings_key({**same, "guidance_scale": 7.25, "eta": 0.1}).startswith("ddim s=20 g=7.25 eta=0.1 ")


def test_rows_of_the_recommended_profile() -> None:
    tables = {"members": 4, "posterior": 3, "producer": 1}
    assert rows_of(DEFAULT_PROFILE, tables) == 4 + 15 + 4
    assert rows_of({**DEFAULT_PROFILE, "guidance_scale": 1}, tables) == 3 + 12 + 2
    assert rows_of(FORMAT_1_PROFILE, {"members": 5}) == 2 * 5 + 2 * 15


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (changed("class_gap", tables="producer"), "profile.class_gap.tables 'producer': expected one of members"),
        (changed("request_risk", guidance="both"), "profile.request_risk.guidance 'both': expected one of own, shared"),
        (changed("request_risk", branch_step=1, rollout_steps=1), "branch_step 1: expected 0 with guidance 'shared'"),
        (changed("request_risk", steps=0), "profile.request_risk.steps 0: expected an integer from 1"),
        (changed("request_risk", rollout_steps=5), "profile.request_risk.rollout_steps 5"),
        (changed("request_risk", estimator="judge"), "profile.request_risk.estimator 'judge'"),
        (changed("image_risk", tables="members"), "profile.image_risk.tables 'members': expected 'producer'"),
        (changed("image_risk", guidance="shared"), "profile.image_risk.guidance 'shared': expected 'own'"),
        (changed("image_risk", branch_step=1, rollout_steps=1), "profile.image_risk.branch_step 1: expected 0"),
        (changed("image_risk", estimator="mean-w2"), "profile.image_risk.estimator 'mean-w2': expected one of judge"),
        ({**DEFAULT_PROFILE, "extra": 1}, "profile: expected an object with the fields"),
        ({**DEFAULT_PROFILE, "cascade": {"cut": 1}}, "profile.cascade: expected an object with the fields cut, share"),
        ({**DEFAULT_PROFILE, "cascade": {"cut": 0, "share": 0.5}}, "profile.cascade.cut 0: expected a positive"),
        ({**DEFAULT_PROFILE, "cascade": {"cut": -1, "share": 0.5}}, "profile.cascade.cut -1: expected a number"),
        ({**DEFAULT_PROFILE, "cascade": {"cut": math.inf, "share": 0.5}}, "profile.cascade.cut inf: expected a number"),
        ({**DEFAULT_PROFILE, "cascade": {"cut": 1, "share": 1.5}}, "profile.cascade.share 1.5: expected a number"),
        ([], "profile: expected an object"),
    ],
)
def test_profiles_that_are_refused(profile: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message.replace("(", r"\(").replace(".", r"\.")):
        check_profile(profile, NoiseSchedule(), posterior=3, judge=True)


def test_a_profile_needs_the_tables_and_the_judge_that_it_names() -> None:
    check_profile(DEFAULT_PROFILE, NoiseSchedule(), posterior=3, judge=True)
    cascade = {**DEFAULT_PROFILE, "cascade": {"cut": 0.25, "share": 0.05}}
    check_profile(cascade, NoiseSchedule(), posterior=3, judge=True)
    assert settings_key(cascade) == settings_key(DEFAULT_PROFILE)
    with pytest.raises(TrainingError, match="has no judge"):
        check_profile(DEFAULT_PROFILE, NoiseSchedule(), posterior=3, judge=False)
    with pytest.raises(TrainingError, match="has no posterior tables"):
        check_profile(DEFAULT_PROFILE, NoiseSchedule(), posterior=0, judge=True)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_shared_guidance_is_a_plain_loop_with_one_unconditional_row(guidance: float) -> None:
    backbone = tiny_backbone(4, 2, 1)
    tables = tiny_run(backbone, 3, 1).tables[0]
    requests = make_requests([0, 3], 2, 3)
    latents = requests.latents(backbone.latent_shape)
    rows = 0

    def counted(latent: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows += len(latent)
        return backbone.denoiser(latent, timestep, context)

    found = shared_means(counted, Sampler(NoiseSchedule(), 3, guidance), tables, requests, latents, 2)
    assert rows == 4 * 2 * (3 + (guidance != 1))
    scheduler = NoiseSchedule().scheduler(3)
    shared = shared_row(tables)
    torch.testing.assert_close(shared, tables[:, -1].mean(0))
    with torch.no_grad():
        for row in range(len(requests)):
            paths = [latents[row : row + 1] for _ in tables]
            for step in range(2):
                t = scheduler.timesteps[step : step + 1]
                u = backbone.denoiser(torch.stack(paths).mean(0), t, shared[None])
                eps = [
                    backbone.denoiser(x, t, table[None, requests.classes[row]])
                    for x, table in zip(paths, tables, strict=True)
                ]
                paths = [
                    scheduler.step(u + guidance * (e - u), int(t), x).prev_sample
                    for e, x in zip(eps, paths, strict=True)
                ]
            torch.testing.assert_close(found[row], torch.cat(paths), rtol=1e-4, atol=1e-4)


def test_the_judge_sees_the_image_in_its_range_and_size() -> None:
    seen = []

    def logits(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).expand(len(images), 4)

    fields = {"range": [0, 1], "resize": "bilinear", "height": 4, "width": 4, "outputs": [1, -1, 0, 1]}
    fields |= {"accuracy": [0.9, 0.5, None], "least_accuracy": 0.6}
    judge = Judge(logits, fields)
    images = torch.tensor([[[[-3.0, 3.0], [-1.0, 1.0]]]])
    probabilities = judge.probabilities(images)
    np.testing.assert_allclose(probabilities.numpy(), [[0.3, 0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(seen[0][0, 0, 0].numpy(), [0, 0.25, 0.75, 1])  # half-pixel centers, clipped
    np.testing.assert_allclose(image_risk(probabilities, torch.tensor([1])).numpy(), [0.5], rtol=1e-6)
    assert [judge.can_tell(label) for label in range(3)] == [True, False, False]


def test_the_committed_tiny_ensemble_gives_its_golden_numbers(tmp_path: Path) -> None:
    manifest = read_manifest(TINY / "ensemble.json")
    sets = read_tables(TINY, manifest)
    assert sets.posterior is not None
    assert sets.producers is not None
    assert sets.producer is not None
    assert torch.equal(sets.posterior[:, -1], sets.producer[-1].expand_as(sets.posterior[:, -1]))
    copy = tmp_path / "tiny-2"
    copy.mkdir()
    for file in TINY.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    graph = Graph(copy / "unet.onnx", manifest["graph"]["unet"], threads=1)
    write_golden(copy, graph, "ONNX Runtime")
    was, now = (json.loads((place / "golden.json").read_text()) for place in (TINY, copy))
    assert now["settings"] == was["settings"] == settings_key(manifest["profile"])
    assert len(now["cases"]) == len(was["cases"])
    for old, new in zip(was["cases"] + was["judged"], now["cases"] + now["judged"], strict=True):
        assert {name: old[name] for name in ("class", "seed", "tables", "guidance", "steps")}.items() <= new.items()
        for name in ("means", "x0", "image"):
            if name in old:
                a, b = (np.array(each[name]) for each in (old, new))
                assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a), (name, old["class"], old["seed"])
    values = [entry["value"] for entry in was["judged"] if entry["class"] in (1, 2)]
    assert values == [None] * len(values)
    np.testing.assert_allclose(
        [entry["value"] for entry in now["judged"] if entry["value"] is not None],
        [entry["value"] for entry in was["judged"] if entry["value"] is not None],
        atol=1e-4,
    )


def test_tiny_writes_both_formats_and_the_class_gap_is_as_expected(tmp_path: Path) -> None:
    for form in (1, 2):
        out = tmp_path / str(form)
        assert main(["tiny", "--format", str(form), "--out", str(out)]) == 0
        manifest = json.loads((out / "ensemble.json").read_text())
        assert manifest["format"] == f"decuwatch-ensemble/{form}"
        assert ("judge" in manifest) == ("image_risk" in manifest["profile"]) == (form == 2)
        assert set(load_file(out / "tables.safetensors")) == {"tables", "reference"} | (
            {"posterior", "producer", "producers"} if form == 2 else set()
        )
    assert [entry["draws"] for entry in manifest["classes"]] == [20, 200, 2000, 20000]
    assert ["data" in entry for entry in manifest["classes"]] == [True, True, True, False]
    assert set(manifest["reference"]) == {"class_gap", "request_risk", "image_risk"}
    graph = Graph(out / "unet.onnx", manifest["graph"]["unet"], threads=1)
    ratios = class_gap_ratios(graph, manifest, read_tables(out, manifest))
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    manifest["classes"][3]["class_gap"] *= 10
    (out / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="class 'class-3': the measured class gap is 0"):
        check_directory(out, tiny_backbone(4, 1, 1))


def test_scores_by_profile_use_the_sets_that_it_names() -> None:
    backbone = tiny_backbone(4, 1, 1)
    run = with_format_2(tiny_run(backbone, 3, 1), 1)
    assert run.posterior is not None
    sets = {"members": run.tables[0], "posterior": run.posterior[0]}
    requests = Requests(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0, 1]))
    latents = requests.latents(backbone.latent_shape)
    scores = profile_scores(backbone.denoiser, backbone.schedule, sets, requests, latents, DEFAULT_PROFILE)
    assert set(scores) == {"class_gap", "request_risk"}
    measure = measures_of(DEFAULT_PROFILE)["class_gap"]
    swapped = {**DEFAULT_PROFILE, "class_gap": {**DEFAULT_PROFILE["class_gap"], "tables": "members"}}
    other = profile_scores(backbone.denoiser, backbone.schedule, sets, requests, latents, swapped)
    assert measure.tables == "posterior"
    assert not torch.allclose(scores["class_gap"], other["class_gap"])
    assert torch.equal(scores["request_risk"], other["request_risk"])
