"""The directory that decuwatch reads: graphs that do what PyTorch does, manifests within their bounds."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from decuwatch_training import export as export_module
from decuwatch_training.backbone import Backbone
from decuwatch_training.branch import Branch, branched_means, contexts_of, make_requests
from decuwatch_training.check import check_directory
from decuwatch_training.cli import main
from decuwatch_training.diffusion import NoiseSchedule, Sampler, predict_guided
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import chosen_members, export_ensemble
from decuwatch_training.files import sha256_file
from decuwatch_training.graphs import UNET_NAMES, Graph
from decuwatch_training.manifest import manifests_of
from decuwatch_training.profile import FORMAT_1_PROFILE
from decuwatch_training.tiny import tiny_backbone, tiny_run, with_format_2
from decuwatch_training.train import Run

PROFILE = {
    **FORMAT_1_PROFILE,
    "steps": 10,
    "request_risk": {"branch_step": 5, "rollout_steps": 2, "estimator": "mean-w2"},
}


def export(backbone: Backbone, run: Run, out: Path, precision: str = "fp32") -> Path:
    export_ensemble(backbone, run, out, "tiny", precision, "torch-cpu", PROFILE, 5, {"source": "random weights"})
    return out


def test_inputs_are_found_by_the_names_of_the_manifest(tmp_path: Path) -> None:
    backbone = tiny_backbone(4, 1, 1)
    out = export(backbone, tiny_run(backbone, 3, 1), tmp_path / "ensemble")
    latent, timestep, context = torch.randn(2, 2, 4, 4), torch.tensor([3, 700]), torch.randn(2, 1, 8)
    expected = Graph(out / "unet.onnx", UNET_NAMES)(latent, timestep, context)
    model = onnx.load(out / "unet.onnx")
    inputs = list(model.graph.input)
    del model.graph.input[:]
    model.graph.input.extend(reversed(inputs))
    onnx.save(model, out / "unet.onnx")
    torch.testing.assert_close(Graph(out / "unet.onnx", UNET_NAMES)(latent, timestep, context), expected)
    for role in UNET_NAMES:
        with pytest.raises(TrainingError, match="manifest's graph names"):
            Graph(out / "unet.onnx", {**UNET_NAMES, role: "another"})


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_manifest_says_what_the_files_are(tmp_path: Path, tokens: int) -> None:
    backbone = tiny_backbone(4, tokens, 1)
    out = export(backbone, tiny_run(backbone, 3, 1), tmp_path / "ensemble")
    assert sorted(entry.name for entry in out.iterdir()) == [
        "decoder.onnx",
        "ensemble.json",
        "tables.safetensors",
        "unet.onnx",
    ]
    manifest = json.loads((out / "ensemble.json").read_text())
    assert list(manifest) == [
        "format", "name", "files", "precision", "opset", "latent", "image", "context", "graph", "diffusion",
        "components", "classes", "regime", "noise", "profile", "reference", "provenance", "diagnostics",
    ]  # fmt: skip
    for entry in manifest["files"].values():
        assert (entry["size"], entry["sha256"]) == (
            (out / entry["path"]).stat().st_size,
            sha256_file(out / entry["path"]),
        )
    assert manifest["latent"] == {"channels": 2, "height": 4, "width": 4, "scale": 1.5, "shift": 0.25}
    assert manifest["image"] == {"channels": 1, "height": 8, "width": 8}
    assert manifest["context"] == {"tokens": tokens, "dim": 8}
    assert [entry["images"] for entry in manifest["classes"]] == [[1] * 3, [10] * 3, [100] * 3, [1000] * 3]
    tensors = load_file(out / "tables.safetensors")
    shape = (3, 5, 8) if tokens == 1 else (3, 5, tokens, 8)
    assert tensors["tables"].shape == shape
    assert tensors["reference"].shape == shape[1:]
    quantiles = manifest["reference"]["class_gap"]["quantiles"]
    assert manifest["reference"]["class_gap"]["n"] == 5  # one class has the most images
    assert 0 <= quantiles["0.5"] <= quantiles["0.9"] <= quantiles["0.999"] <= math.log(3)


def test_the_graphs_have_a_free_row_count_and_a_timestep_and_context_for_every_row(tmp_path: Path) -> None:
    backbone = tiny_backbone(4, 2, 1)
    out = export(backbone, tiny_run(backbone, 3, 1), tmp_path / "ensemble")
    model = onnx.load(out / "unet.onnx")
    assert [
        (value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in model.graph.input
    ] == [
        ("latent", ["N", 2, 4, 4]),
        ("timestep", ["N"]),
        ("context", ["N", 2, 8]),
    ]
    assert model.opset_import[0].version == 17
    graph = Graph(out / "unet.onnx", UNET_NAMES, threads=1)
    latent, timestep, context = torch.randn(7, 2, 4, 4), torch.randint(1000, (7,)), torch.randn(7, 2, 8)
    together = graph(latent, timestep, context)
    for row in range(7):
        alone = graph(latent[row : row + 1], timestep[row : row + 1], context[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(graph(latent, timestep, context.roll(1, 0)), together, atol=1e-3)
    assert not torch.allclose(graph(latent, timestep.roll(1, 0), context), together, atol=1e-3)


def test_half_precision(tmp_path: Path) -> None:
    backbone = tiny_backbone(4, 1, 1)
    run = tiny_run(backbone, 3, 1)
    digest = backbone.digest()
    full, half = export(backbone, run, tmp_path / "full"), export(backbone, run, tmp_path / "half", "fp16")
    assert backbone.denoiser.unet.dtype == torch.float32  # type: ignore[union-attr]
    assert (half / "unet.onnx").stat().st_size < (full / "unet.onnx").stat().st_size
    weights = {
        tensor.data_type for tensor in onnx.load(half / "unet.onnx").graph.initializer if np.prod(tensor.dims) > 64
    }
    assert weights == {onnx.TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in onnx.load(half / "unet.onnx").graph.output} == {
        onnx.TensorProto.FLOAT
    }
    assert json.loads((half / "ensemble.json").read_text())["precision"] == "fp16"
    assert digest != backbone.digest()  # the weights in memory were rounded: the caller exports last


def test_check_refuses_what_does_not_agree(tmp_path: Path) -> None:
    backbone = tiny_backbone(4, 1, 1)
    out = export(backbone, tiny_run(backbone, 3, 1), tmp_path / "ensemble")
    assert max(check_directory(out, backbone).values()) < 1e-4
    with torch.no_grad():
        for parameter in backbone.autoencoder.parameters():
            parameter.mul_(1.01)
    with pytest.raises(TrainingError, match="decoder: relative error"):
        check_directory(out, backbone)
    manifest = json.loads((out / "ensemble.json").read_text())
    manifest["files"]["tables"]["sha256"] = "0" * 64
    (out / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=r"tables\.safetensors: size or SHA-256"):
        check_directory(out, backbone)


def test_an_export_that_fails_its_check_leaves_the_former_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(4, 1, 1)
    run = tiny_run(backbone, 3, 1)
    out = export(backbone, run, tmp_path / "ensemble")
    before = {entry.name: sha256_file(entry) for entry in out.iterdir()}
    honest = export_module.export_unet

    def another(backbone: Backbone, *arguments: Any) -> list[Path]:
        """Export a U-Net that is a little off."""
        return honest(tiny_backbone(4, 1, 2), *arguments)

    monkeypatch.setattr(export_module, "export_unet", another)
    with pytest.raises(TrainingError, match="relative error"):
        export(backbone, run, out)
    assert {entry.name: sha256_file(entry) for entry in out.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["ensemble"]


def test_unsound_tables_are_not_exported(
    tmp_path: Path, trained_directory: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "ensemble"
    words = ["train", "--backbone", trained_directory, "--data", folder, "--out", run, "--steps", "1", "--rate", "1e-6"]
    words += ["--producer-steps", "1"]
    assert main([str(word) for word in words]) == 0
    assert "WARNING: rotation 0: the best-sampled classes still disagree" in capsys.readouterr().err
    words = ["export", "--backbone", trained_directory, "--run", run, "--out", out, "--name", "unsound"]
    assert main([str(word) for word in words]) == 1
    assert "findings say that the tables are unsound" in capsys.readouterr().err
    assert not out.exists()
    # The latents were kept beside the backbone, for the next run on the same images.
    kept = list(trained_directory.with_name(f"{trained_directory.name}.latents").iterdir())
    assert [entry.suffix for entry in kept] == [".safetensors"]
    assert main([str(word) for word in [*words, "--force"]]) == 0
    assert json.loads((out / "ensemble.json").read_text())["diagnostics"]["findings"]
    assert main([str(word) for word in ["check", out, "--backbone", trained_directory]]) == 0


def test_a_roll_out_is_ddim_for_every_component() -> None:
    """Against diffusers' own scheduler and a plain loop, one component at a time."""
    backbone = tiny_backbone(4, 1, 1)
    tables = tiny_run(backbone, 3, 1).tables[0]
    requests = make_requests([0, 3], 2, 3)
    latents = requests.latents(backbone.latent_shape)
    sampler = Sampler(NoiseSchedule(), 6, 2.0)
    found = dict(
        branched_means(
            backbone.denoiser, sampler, tables, requests, latents, [Branch(0, 1), Branch(2, 3), Branch(2, 1)]
        )
    )
    assert set(found) == {Branch(0, 1), Branch(2, 3), Branch(2, 1)}
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(6)
    conditional, unconditional = contexts_of(tables, requests.classes)
    with torch.no_grad():
        for row in range(len(requests)):
            carrier = int(requests.carriers[row])
            for component in range(3):
                x = latents[row : row + 1]
                for step in range(5):
                    who = carrier if step < 2 else component
                    t = int(scheduler.timesteps[step])
                    eps = predict_guided(
                        backbone.denoiser, x, t, conditional[row : row + 1, who], unconditional[row : row + 1, who], 2.0
                    )
                    x = scheduler.step(eps, t, x).prev_sample
                torch.testing.assert_close(found[Branch(2, 3)][row, component], x[0], rtol=1e-4, atol=1e-4)
    assert Branch(2, 3).rows(6, 3, 2.0) == 2 * (2 + 9)
    assert Branch(2, 3).rows(6, 3, 1.0) == 2 + 9


def test_sample_runs_on_an_exported_directory(tmp_path: Path) -> None:
    backbone = tiny_backbone(4, 1, 1)
    out = export(backbone, tiny_run(backbone, 5, 1), tmp_path / "ensemble")
    assert main(["sample", str(out), "--out", str(tmp_path / "grids"), "--steps", "4", "--reference"]) == 0
    assert (tmp_path / "grids" / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    assert manifests_of(out) == [out / "ensemble.json"]


def test_the_producer_can_be_the_last_member() -> None:
    backbone = tiny_backbone(4, 1, 1)
    run = with_format_2(tiny_run(backbone, 3, 1), 1)
    assert run.producer is not None
    chosen = chosen_members(run, 2, producer=True)
    assert chosen.tables.shape[1] == chosen.images.shape[1] == 3
    assert torch.equal(chosen.tables[:, :2], run.tables[:, :2])
    assert torch.equal(chosen.tables[:, 2], run.producer)
    assert torch.equal(chosen.images[:, 2], run.images[:, 0])
    assert chosen.record["members"] == {"of_the_run": 2, "producer": True}
    every = chosen_members(run, None, producer=False)
    assert torch.equal(every.tables, run.tables)


@pytest.mark.parametrize(
    ("count", "producer", "message"),
    [
        (1, False, "--members 1: expected 2 to 3"),
        (0, True, "--members 0: expected 1 to 3"),
        (4, False, "--members 4: expected 2 to 3"),
        (2, True, "--producer-member: .* has no producer table"),
    ],
)
def test_members_that_the_run_lacks_are_refused(count: int, producer: bool, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        chosen_members(tiny_run(tiny_backbone(4, 1, 1), 3, 1), count, producer)
