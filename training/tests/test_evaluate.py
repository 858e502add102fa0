"""The evaluation: against a truth that a test can compute by other means, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from decuwatch_training.branch import profile_scores
from decuwatch_training.cli import main
from decuwatch_training.diffusion import NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.evaluate import request_level
from decuwatch_training.manifest import read_manifest
from decuwatch_training.measure import Errors, Subject
from decuwatch_training.quality import Cells
from decuwatch_training.settings import comparison, parse, settings_of_profile

TABLES = {"members": 5, "posterior": 3, "producer": 1}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "ensemble"
    assert main(["tiny", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def truth(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random network with the judge's fields."""
    out = tmp_path_factory.mktemp("truth")
    other = out / "ensemble"
    assert main(["tiny", "--out", str(other), "--seed", "9"]) == 0
    shutil.copy(other / "judge.onnx", out / "judge.onnx")
    (out / "judge.json").write_text(json.dumps(read_manifest(ensemble / "ensemble.json")["judge"]))
    return out


def evaluated(ensemble: Path, out: Path, *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(ensemble), "--out", str(out), "--seeds", "4", *words]) == 0
    document: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return document


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in entries}


def test_the_profile_and_a_handful_are_evaluated_at_every_level(ensemble: Path, truth: Path, tmp_path: Path) -> None:
    document = evaluated(ensemble, tmp_path, "--truth", str(truth), "--alarm-seeds", "40")
    assert document["bins"] == [1, 10, 100, 1000]
    assert document["draws_by_bin"] == {"1": 20, "10": 200, "100": 2000, "1000": 20000}
    manifest = read_manifest(ensemble / "ensemble.json")
    assert document["profile"].keys() == {"class_gap", "request_risk", "image_risk"}
    assert manifest["components"] == 3
    for level in (document["class_level"], document["request_level"]["settings"], document["image_level"]["settings"]):
        entries = by_name(level)
        assert {"random scores", "mean-w2@0+3/4:members:shared:2:g=2"} <= entries.keys()
        assert {entry["measurement"] for entry in level} == {None, *document["profile"]}
    rows = {name: entry["rows"] for name, entry in by_name(document["class_level"]).items()}
    assert rows["mean-w2@0+2/3:members:shared:3:g=2"] == 2 * (3 + 1)
    assert rows["mean-w2@0+2/3:members:own:3:g=2"] == 2 * 2 * 3
    assert rows["judge@0+3/4:producer:own:1:g=2"] == 2 * 3
    assert rows["count table"] == rows["random scores"] == 0
    assert by_name(document["class_level"])["count table"]["against_largest"]["100"]["auroc"]["value"] == 1
    assert "count table" not in by_name(document["request_level"]["settings"])  # it says nothing within a class
    assert document["request_level"]["ceiling"]["within"]["value"] is not None
    assert "judge on the producer's own image" in by_name(document["image_level"]["settings"])
    (gap, risk, image) = document["false_alarms"]
    assert [each["measurement"] for each in (gap, risk, image)] == list(document["profile"])
    assert risk["all"]["scores"] == 4 * 20
    text = (tmp_path / "evaluation.md").read_text()
    for heading in ("Class level", "Request level", "Image level", "False alarms"):
        assert f"### {heading}" in text
    assert text.count("**request_risk** `") == 3
    assert (tmp_path / "scores-by-bin.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_measures_nothing_and_says_the_same(ensemble: Path, tmp_path: Path) -> None:
    words = ["--settings", "mean-w2@0+2/3:members:shared:2", "--alarm-seeds", "0"]
    document = evaluated(ensemble, tmp_path, *words)
    kept = {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "shards").iterdir()}
    assert evaluated(ensemble, tmp_path, *words) == document
    assert {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "shards").iterdir()} == kept
    assert document["image_level"] is None
    assert "Not measured: it takes" in (tmp_path / "evaluation.md").read_text()


def test_scores_are_those_of_the_profile(ensemble: Path, tmp_path: Path) -> None:
    subject = Subject(ensemble / "ensemble.json", 3, tmp_path)
    profile = subject.manifest["profile"]
    wanted = profile_scores(
        subject.graphs["unet"], subject.schedule, subject.sets.measured(), subject.requests, subject.latents, profile
    )
    for name, setting in settings_of_profile(profile, subject.tables).items():
        if name in wanted:
            np.testing.assert_allclose(subject.scores(setting), wanted[name].numpy(), rtol=1e-4, atol=1e-7)


def test_errors_are_of_producers_that_are_not_members(ensemble: Path, tmp_path: Path) -> None:
    subject = Subject(ensemble / "ensemble.json", 2, tmp_path)
    errors = subject.errors(4, 2.0)
    assert errors is not None
    sets = subject.sets
    assert sets.producers is not None
    assert sets.reference is not None
    sampler = Sampler(NoiseSchedule(**subject.manifest["diffusion"]), 4, 2.0)

    def final(table: torch.Tensor, row: int) -> torch.Tensor:
        label, start = int(subject.requests.classes[row]), subject.latents[row][None]
        return sampler.roll(subject.graphs["unet"], 0, 4, start, table[label][None], table[-1][None])

    for row in (0, 5):
        wanted = final(sets.reference, row)
        for found, tables in ((errors.producers, sets.producers), (errors.members, sets.members)):
            expected = [float((final(table, row) - wanted).double().square().sum()) for table in tables]
            np.testing.assert_allclose(found[:, row], expected, rtol=1e-3)


def test_the_request_level_tells_a_member_from_a_stranger() -> None:
    """Scores made of the members' own errors correlate with those alone; scores of the producers' with those."""
    generator = np.random.default_rng(1)
    cells = Cells(np.ones(400), np.repeat(np.arange(10), 40), np.repeat(np.arange(10), 40))
    common, members = generator.random((2, 400)), generator.random((5, 400))
    producers = np.stack([common[0], common[0] + 0.5 * generator.random(400)])
    errors = [Errors(producers, members, np.zeros(0))]

    def head(name: str) -> dict[str, Any]:
        return {"name": name, "measurement": None, "rows": 0, "tables": 0}

    every = [(head("members"), members.mean(0)), (head("producers"), common[0]), (head("class"), cells.classes + 0.0)]
    level = request_level(every, errors, cells)
    found = by_name(level["settings"])
    assert found.keys() == {"members", "producers"}
    assert found["members"]["within_members_own_error"]["value"] == pytest.approx(1)
    assert abs(found["members"]["within"]["value"]) < 0.1
    expected = [spearmanr(producers[0][:40], producers[1][:40]).statistic]
    assert found["producers"]["within"]["value"] > 0.9
    assert level["ceiling"]["within"]["value"] == pytest.approx(expected[0], abs=0.1)


def test_an_ensemble_without_producers_says_what_is_missing(tmp_path: Path) -> None:
    assert main(["tiny", "--out", str(tmp_path / "older"), "--format", "1"]) == 0
    settings = ["--settings", "mean-w2@0+1/4:members:own"]
    document = evaluated(tmp_path / "older", tmp_path / "out", *settings, "--alarm-seeds", "0")
    assert document["request_level"] is None
    assert document["image_level"] is None
    assert document["draws_by_bin"] is None
    assert "lacks the tensor producers or reference" in (tmp_path / "out" / "evaluation.md").read_text()


def test_the_ensembles_own_judge_is_no_truth(
    ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ensemble / "judge.onnx", tmp_path / "judge.onnx")
    (tmp_path / "judge.json").write_text(json.dumps(read_manifest(ensemble / "ensemble.json")["judge"]))
    assert main(["evaluate", str(ensemble), "--out", str(tmp_path / "out"), "--truth", str(tmp_path)]) == 1
    assert "the ensemble's own judge cannot say how good it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "judge.json").write_text("[]"), "judge.json: expected an object"),
        (lambda path: (path / "judge.json").unlink(), "judge.json: no such file"),
        (lambda path: (path / "judge.onnx").unlink(), "judge.onnx: no such file"),
        (lambda path: (path / "judge.onnx").write_bytes(b"no graph"), "judge.onnx: "),
        (lambda path: (path / "judge.json").write_text('{"input": "image"}'), "judge.json: output"),
    ],
)
def test_a_broken_truth_is_refused(
    ensemble: Path,
    truth: Path,
    tmp_path: Path,
    change: Callable[[Path], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("judge.json", "judge.onnx"):
        shutil.copy(truth / name, tmp_path / name)
    change(tmp_path)
    assert main(["evaluate", str(ensemble), "--out", str(tmp_path / "out"), "--truth", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean-w2", "expected estimator@branch"),
        ("mean-w2@0+2/3:members", "expected estimator@branch"),
        ("median@0+2/3:members:shared", "'median', expected one of paide-w2"),
        ("mean-w2@0+2/3:tables:shared", "'tables', expected one of members"),
        ("mean-w2@0+2/3:members:none", "'none', expected one of own, shared"),
        ("mean-w2@0+4/3:members:own", "more than the 3 steps"),
        ("mean-w2@0+0/3:members:own", "or no step"),
        ("mean-w2@0+1/0:members:own", "0 steps, expected 1 to 1000"),
        ("mean-w2@1+1/3:members:shared", "branch 1, expected 0 with guidance shared"),
        ("mean-w2@0+1/3:members:own:6", "6 tables, the ensemble has 5 members"),
        ("mean-w2@0+1/3:members:own:1", "1 tables, the ensemble has 5 members, and at least 2"),
        ("mean-w2@0+1/3:producer:own", "'mean-w2', expected one of judge"),
        ("judge@0+1/3:members:own", "'judge', expected one of paide-w2"),
        ("judge@1+1/3:producer:own", "expected branch 0 and guidance own for the judge"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(text: str, message: str) -> None:
    with pytest.raises(TrainingError, match=r"setting '.*") as raised:
        parse(text, TABLES, 2.0, NoiseSchedule())
    assert message in str(raised.value)


def test_a_setting_is_what_its_name_says() -> None:
    for text in comparison(TABLES, judged=True):
        setting = parse(text, TABLES, 2.0, NoiseSchedule())
        assert parse(setting.name, TABLES, 1.0, NoiseSchedule()) == setting
        assert setting.name.startswith(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "--seeds 1: expected at least 2"),
        (["--error-steps", "0"], "--error-steps 0: expected at least 1"),
        (["--alarm-seeds", "-1"], "--alarm-seeds -1: expected at least 0"),
        (["--settings", "nonsense"], "setting 'nonsense'"),
    ],
)
def test_arguments_out_of_bounds(
    ensemble: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(ensemble), "--out", str(tmp_path), *words]) == 1
    assert message in capsys.readouterr().err
