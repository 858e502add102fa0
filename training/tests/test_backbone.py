"""A backbone is carried out exactly or refused by name: what was once misread."""

import json
import math
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from decuwatch_training import supported
from decuwatch_training.backbone import REFERENCE_FILE, load_backbone, read_schedule
from decuwatch_training.cli import main
from decuwatch_training.configuration import AUTOENCODERS, DENOISERS, SCHEDULERS
from decuwatch_training.errors import TrainingError
from decuwatch_training.train import check_labels
from tests.test_formats import FIRST_STAGE, UNET, LatentDiffusionNames, compvis_configuration
from tests.test_sweep import STEM, diffusers_directory, edit

SD21_BASE_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.8.0", "act_fn": "silu", "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "in_channels": 1, "latent_channels": 2,
    "layers_per_block": 1, "norm_num_groups": 4, "out_channels": 1, "sample_size": 768,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
}  # fmt: skip
"""The VAE configuration of stable-diffusion-2-1-base, at the size of the tests: it has no scaling_factor."""
SD21_BASE_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A U-Net, a KL autoencoder and a DDIM scheduler that load."""
    return diffusers_directory(tmp_path, "unet", "kl", "ddim")


def refused(path: Path, *parts: str, config: Path | None = None, ema: str | None = None) -> None:
    """The backbone is refused with a message of one line that has all the parts."""
    with pytest.raises(TrainingError) as caught:
        load_backbone(path, config, ema)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_missing_scaling_factor_is_the_librarys_default(backbone: Path) -> None:
    (backbone / "vae" / "config.json").write_text(json.dumps(SD21_BASE_VAE))
    (backbone / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD21_BASE_SCHEDULER))
    loaded = load_backbone(backbone)
    assert (loaded.scale, loaded.shift) == (0.18215, 0.0)
    assert loaded.schedule.beta_end == 0.012


@pytest.mark.parametrize("field", ["clip_sample", "set_alpha_to_one"])
def test_a_field_whose_default_depends_on_the_reader_must_be_stated(backbone: Path, field: str) -> None:
    """PNDMScheduler does not clip and ends below 1; diffusers' DDIMScheduler of the same file clips and ends at 1."""
    stated = {key: value for key, value in SD21_BASE_SCHEDULER.items() if key != field}
    (backbone / "scheduler" / "scheduler_config.json").write_text(json.dumps(stated))
    refused(backbone, f"scheduler_config.json: {field} is missing")


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002},
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000},
        {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0},
        {"_class_name": "EulerDiscreteScheduler"},
        {"num_train_timesteps": 1000},
        {"_class_name": ["DDIMScheduler"]},
        [],
    ],
)
def test_another_scheduler_is_refused_by_its_class(backbone: Path, config: Any) -> None:
    (backbone / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    refused(backbone, "scheduler_config.json: ", "_class_name", *(["DDIMScheduler"] if config else []))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("scheduler/scheduler_config.json", "timestep_spacing", "traling"),
        ("scheduler/scheduler_config.json", "steps_offset", -1),
        ("scheduler/scheduler_config.json", "steps_offset", 1000),
        ("scheduler/scheduler_config.json", "clip_sample", True),
        ("scheduler/scheduler_config.json", "thresholding", True),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2]),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow_prediction"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 1000.5),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
        ("unet/config.json", "addition_embed_type", "text_time"),
        ("unet/config.json", "num_class_embeds", 10),
        ("unet/config.json", "class_embed_type", "timestep"),
        ("unet/config.json", "encoder_hid_dim_type", "text_proj"),
        ("unet/config.json", "time_cond_proj_dim", 8),
        ("unet/config.json", "attention_type", "gated"),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "sample_size", [4, 8]),
        ("unet/config.json", "in_channels", 9),
        ("unet/config.json", "out_channels", 8),
        ("unet/config.json", "num_attention_heads", 2),
        ("unet/config.json", "_use_default_values", ["cross_attention_dim"]),
        ("unet/config.json", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("unet/config.json", "_class_name", "UNet2DModel"),
        ("unet/config.json", "_class_name", "UNetMotionModel"),
        ("vae/config.json", "_class_name", "AutoencoderTiny"),
        ("vae/config.json", "_class_name", "AsymmetricAutoencoderKL"),
        ("vae/config.json", "latents_mean", [0.0, 0.0]),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "shift_factor", "0.1"),
    ],
)
def test_a_value_that_is_not_supported_is_refused_at_load(backbone: Path, file: str, field: str, value: Any) -> None:
    edit(backbone / file, lambda config: config.update({field: value}))
    refused(backbone, str(backbone / file), field)


def test_an_autoencoder_of_other_latents(backbone: Path) -> None:
    AutoencoderKL(**{**FIRST_STAGE, "latent_channels": 4}).save_pretrained(backbone / "vae")
    refused(backbone, "unet/config.json: in_channels 2", "vae/config.json", "4")


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel", None])
def test_another_architecture_is_no_dit(tmp_path: Path, name: str | None) -> None:
    path = diffusers_directory(tmp_path, "transformer", "kl", "ddim")
    edit(path / "transformer" / "config.json", lambda config: config.update(_class_name=name))
    refused(path, "transformer/config.json: _class_name", "DiTTransformer2DModel")


def test_an_older_dit_is_read_and_another_transformer_is_not(tmp_path: Path) -> None:
    """Transformer2DModel stood for several architectures; norm_type says which, and its default is not a DiT."""
    path = diffusers_directory(tmp_path, "transformer2d", "kl", "ddim")
    assert load_backbone(path).context_dim == 16
    edit(path / "transformer" / "config.json", lambda config: config.pop("norm_type"))
    refused(path, "transformer/config.json: norm_type 'layer_norm' (the default of a missing field)", "ada_norm_zero")


def pipeline(path: Path, **changes: Any) -> None:
    """What diffusers' own pipeline writes beside the parts."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.8.0",
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index | changes))


def test_a_pipelines_index_agrees_with_its_parts(backbone: Path) -> None:
    pipeline(backbone)
    load_backbone(backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scheduler": ["diffusers", "PNDMScheduler"]},
            "model_index.json: scheduler ['diffusers', 'PNDMScheduler']: expected the class of",
        ),
        ({"unet": ["diffusers", "UNet2DModel"]}, "model_index.json: unet"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "model_index.json: vae"),
        ({"vae": [None, None]}, "model_index.json: vae"),
        ({"unet": "UNet2DConditionModel"}, "model_index.json: unet"),
        (
            {"transformer": ["diffusers", "DiTTransformer2DModel"]},
            "transformer/config.json: no such file; model_index.json has transformer",
        ),
        ({"_class_name": None}, "model_index.json: _class_name None"),
        ({"id2label": ["tench"]}, "model_index.json: id2label"),
        ({"id2label": {"0": "tench", "2": "shark"}}, "model_index.json: id2label"),
    ],
)
def test_a_pipelines_index_that_contradicts_its_parts(backbone: Path, changes: dict[str, Any], message: str) -> None:
    pipeline(backbone, **changes)
    refused(backbone, message)


def test_a_dit_pipelines_labels(tmp_path: Path) -> None:
    path = diffusers_directory(tmp_path, "transformer2d", "kl", "ddim")
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "hen", "drake", "crane, machine"]
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}

    def write(labels: list[str]) -> None:
        (path / "model_index.json").write_text(
            json.dumps({**index, "id2label": {str(row): label for row, label in enumerate(labels)}})
        )

    write(names)
    load_backbone(path)
    check_labels(("Tench", "goldfish", "n02", "hen", "drake", "Crane"), path)
    with pytest.raises(TrainingError, match="id2label has 'hen' at 3, the data at 2"):
        check_labels(("tench", "goldfish", "hen", "crane", "drake", "other"), path)
    with pytest.raises(TrainingError, match="id2label has 6 classes, the data 2"):
        check_labels(("tench", "goldfish"), path)
    write(names[:5])
    refused(path, "id2label: expected a label for each of 6 classes (num_embeds_ada_norm)")


def test_what_torch_only_warns_of_is_refused(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = UNet2DConditionModel.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        warnings.warn("a target size that is different to the input size", UserWarning, stacklevel=1)
        return honest(self, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    refused(backbone, "a library warns:", "a target size that is different")


def test_two_denoisers_or_two_autoencoders_are_ambiguous(backbone: Path) -> None:
    shutil.copytree(backbone / "vae", backbone / "vqvae")
    refused(backbone, "found vae and vqvae")


def test_a_key_that_comes_twice(backbone: Path) -> None:
    file = backbone / "vae" / "config.json"
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "scaling_factor": 1.0}')
    refused(backbone, str(file), "scaling_factor", "twice")


def test_only_a_variant_is_there(backbone: Path) -> None:
    plain = load_backbone(backbone)
    file = backbone / "unet" / STEM
    save_file(
        {name: tensor.half() for name, tensor in load_file(file).items()},
        file.with_name(STEM.replace(".safe", ".fp16.safe")),
    )
    file.unlink()
    loaded = load_backbone(backbone)
    assert next(loaded.denoiser.parameters()).dtype == torch.float32
    for found, wanted in zip(loaded.denoiser.parameters(), plain.denoiser.parameters(), strict=True):
        assert torch.equal(found, wanted.half().float())
    file.with_name(STEM.replace(".safe", ".fp16.safe")).rename(file.with_name(STEM.replace(".safe", ".non_ema.safe")))
    refused(
        backbone,
        "unet: expected diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "rename",
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"reference": torch.full((7, 1, 8), math.nan)}, "reference holds 56 values that are not finite"),
        (
            {"reference": torch.zeros(7, 8)},
            "expected a tensor 'reference' of shape [classes + 1, tokens, 8], found [7, 8]",
        ),
        ({"reference": torch.zeros(7, 1, 8, dtype=torch.int64)}, "reference is torch.int64"),
        ({"reference": torch.zeros(7, 1, 8), "other": torch.zeros(1)}, "expected the tensor 'reference' alone"),
        ({"table": torch.zeros(7, 1, 8)}, "found none"),
    ],
)
def test_the_reference_is_checked_at_load(backbone: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, backbone / REFERENCE_FILE)
    refused(backbone, REFERENCE_FILE, message)
    (backbone / REFERENCE_FILE).write_bytes(b"broken")
    refused(backbone, REFERENCE_FILE)


def test_a_network_that_cannot_run_fails_at_load(backbone: Path) -> None:
    """Weights that fit and are finite, but whose values overflow: seen in the one pass at load."""
    file = backbone / "vae" / STEM
    weights = load_file(file)
    weights["decoder.conv_out.weight"].fill_(3e38)
    save_file(weights, file)
    refused(backbone, "the decoder gives values that are not finite")


def test_the_command_line_ends_with_one_line_and_exit_code_1(
    backbone: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(backbone / "scheduler" / "scheduler_config.json", lambda config: config.update(timestep_spacing="traling"))
    words = ["train", "--backbone", backbone, "--data", folder, "--out", backbone / "run"]
    assert main([str(word) for word in words]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].endswith("timestep_spacing 'traling': expected 'leading', 'trailing' or 'linspace'")


def test_every_field_of_the_installed_diffusers_is_listed() -> None:
    for group in (*DENOISERS.values(), AUTOENCODERS, SCHEDULERS):
        for name, known in group.items():
            assert known.library_defaults().keys() == known.fields.keys(), name


def test_a_field_that_a_newer_diffusers_adds_is_refused(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = SCHEDULERS["DDIMScheduler"]
    monkeypatch.setattr(type(known), "library_defaults", lambda self: {**dict.fromkeys(self.fields), "snr_shift": 1.0})
    with pytest.raises(TrainingError, match="snr_shift: diffusers' DDIMScheduler has this field"):
        read_schedule(backbone / "scheduler" / "scheduler_config.json")


def test_the_documentation_lists_what_is_supported() -> None:
    """Renew with: python -m decuwatch_training.supported."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    begin, end = "<!-- supported -->\n", "<!-- /supported -->"
    assert text[text.index(begin) + len(begin) : text.index(end)].strip() == supported.supported().strip()


# CompVis


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """A latent-diffusion checkpoint and its configuration, which load."""
    names = LatentDiffusionNames()
    names.unet()
    names.first_stage()
    names.state["cond_stage_model.embedding.weight"] = names.random(7, 16)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.yaml"
    save_file(names.state, path)
    config.write_text(yaml.safe_dump(compvis_configuration()))
    return path, config


def configure(config: Path, keys: str, value: Any) -> None:
    """Set one key below model.params, named with dots."""
    content = yaml.safe_load(config.read_text())
    *above, last = keys.split(".")
    place = content["model"]["params"]
    for key in above:
        place = place[key]
    place[last] = value
    config.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("beta_schedule", "sqrt"),
        ("cosine_s", 0.01),
        ("given_betas", [0.1]),
        ("parameterization", "edm"),
        ("image_size", [4, 4]),
        ("image_size", None),
        ("channels", 3),
        ("timesteps", "1000"),
        ("conditioning_key", "concat"),
        ("scale_by_std", True),
        ("linear_start", 0.5),
        ("unknown", 1),
        ("unet_config.target", "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel"),
        ("unet_config.params.in_channels", 9),
        ("unet_config.params.out_channels", 4),
        ("unet_config.params.use_scale_shift_norm", True),
        ("unet_config.params.resblock_updown", True),
        ("unet_config.params.num_classes", 10),
        ("unet_config.params.use_spatial_transformer", False),
        ("unet_config.params.num_heads", 3),
        ("unet_config.params.model_channels", 24),
        ("unet_config.params.adm_in_channels", 8),
        ("first_stage_config.target", "ldm.models.autoencoder.IdentityFirstStage"),
        ("first_stage_config.target", "ldm.models.autoencoder.VQModel"),
        ("first_stage_config.params.embed_dim", 4),
        ("first_stage_config.params.remap", "indices.npy"),
        ("first_stage_config.params.ddconfig.attn_resolutions", [4]),
        ("first_stage_config.params.ddconfig.tanh_out", True),
        ("first_stage_config.params.ddconfig.resamp_with_conv", False),
        ("first_stage_config.params.ddconfig.double_z", True),
        ("cond_stage_config", {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {}}),
        ("cond_stage_config", {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8}}),
    ],
)
def test_a_compvis_value_that_is_not_supported(checkpoint: tuple[Path, Path], keys: str, value: Any) -> None:
    path, config = checkpoint
    configure(config, keys, value)
    refused(path, keys.rpartition(".")[2], config=config)


def compvis_betas(schedule: str, steps: int, start: float, end: float) -> np.ndarray:
    """make_beta_schedule of CompVis' ldm/modules/diffusionmodules/util.py, in double precision."""
    if schedule == "linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(start, end, steps)
    alphas = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)


@pytest.mark.parametrize("schedule", ["linear", "sqrt_linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 100])
def test_compvis_beta_schedules(checkpoint: tuple[Path, Path], schedule: str, steps: int) -> None:
    path, config = checkpoint
    configure(config, "beta_schedule", schedule)
    configure(config, "timesteps", steps)
    wanted = np.cumprod(1 - compvis_betas(schedule, steps, 0.0015, 0.0195))
    found = load_backbone(path, config).schedule.scheduler().alphas_cumprod.numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-7)
    # The checkpoint holds its schedule as well, and another one is noticed.
    save_file({**load_file(path), "alphas_cumprod": torch.from_numpy(wanted).float()}, path)
    load_backbone(path, config)
    configure(config, "timesteps", steps - 1)
    refused(path, "alphas_cumprod", config=config)


def test_the_default_beta_schedule_is_compvis_own(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    content = yaml.safe_load(config.read_text())
    for key in ("linear_start", "linear_end", "timesteps"):
        del content["model"]["params"][key]
    config.write_text(yaml.safe_dump(content) + "# as OmegaConf reads it\n")
    schedule = load_backbone(path, config).schedule
    assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end, schedule.train_timesteps) == (
        "scaled_linear",
        1e-4,
        2e-2,
        1000,
    )
    # CompVis' own sampler: range(0, 1000, 1000 // 30) + 1, and the first alpha after the last step.
    assert schedule.scheduler(30).timesteps.tolist() == [t + 1 for t in range(0, 1000, 1000 // 30)][::-1]
    assert not schedule.set_alpha_to_one


def test_yaml_is_read_as_omegaconf_reads_it(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    text = config.read_text()
    config.write_text(text.replace("linear_start: 0.0015", "linear_start: 15e-4"))
    assert load_backbone(path, config).schedule.beta_start == 0.0015
    config.write_text(text.replace("linear_start: 0.0015", "linear_start: 0.0015\n    linear_start: 0.002"))
    refused(path, "'linear_start' comes twice", config=config)
    config.write_text("- a list")
    refused(path, "config.yaml", config=config)


@pytest.mark.parametrize(
    "value", ["2020-13-45", "!!int x", "!!timestamp x", "[" * 3000, "!!float x", "*unknown", "!!python/name:os.system"]
)
def test_yaml_that_the_reader_cannot_take(checkpoint: tuple[Path, Path], value: str) -> None:
    path, config = checkpoint
    config.write_text(f"model: {value}\n")
    refused(path, "config.yaml: expected a latent-diffusion configuration in YAML", config=config)


def test_heads_by_their_width_are_carried_out(checkpoint: tuple[Path, Path]) -> None:
    """cin-ldm-vq-f8.yaml says num_head_channels: 32; with both, CompVis' code takes the width."""
    path, config = checkpoint
    configure(config, "unet_config.params.num_head_channels", 32)
    unet: Any = load_backbone(path, config).denoiser
    assert unet.unet.config.attention_head_dim == (1, 2)


def test_scale_factor(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    state = load_file(path)
    save_file({**state, "scale_factor": torch.tensor(0.5)}, path)
    refused(path, "scale_factor 0.5", "scale_by_std is false", config=config)
    configure(config, "scale_by_std", True)
    assert load_backbone(path, config).scale == 0.5
    save_file({**state, "scale_factor": torch.tensor(float("nan"))}, path)
    refused(path, "scale_factor [nan]", config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update({"first_stage_model.decoder.extra.weight": torch.zeros(1)}),
            "first_stage_model.decoder.extra.weight",
        ),
        (
            lambda state: state.update({"model.diffusion_model.extra.weight": torch.zeros(1)}),
            "model.diffusion_model.extra.weight",
        ),
        (lambda state: state.update({"model.diffusion_model.label_emb.weight": torch.zeros(1)}), "label_emb"),
        (lambda state: state.update({"control_model.x": torch.zeros(1)}), "control_model.x"),
        (lambda state: state.pop("first_stage_model.quantize.embedding.weight"), "quantize.embedding.weight"),
        (lambda state: state["first_stage_model.post_quant_conv.bias"].fill_(math.nan), "post_quant_conv.bias holds"),
        (
            lambda state: state.update({"model.diffusion_model.out.2.bias": torch.zeros(2, dtype=torch.float64)}),
            "float64",
        ),
        (
            lambda state: state["cond_stage_model.embedding.weight"].fill_(math.inf),
            "cond_stage_model.embedding.weight holds",
        ),
        (
            lambda state: state.update({"cond_stage_model.embedding.weight": torch.zeros(7, 8)}),
            "cond_stage_model.embedding.weight",
        ),
    ],
)
def test_every_tensor_of_a_compvis_checkpoint_has_its_place(
    checkpoint: tuple[Path, Path], change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    path, config = checkpoint
    state = load_file(path)
    change(state)
    save_file(state, path)
    refused(path, str(path), message, config=config)


def test_the_class_embedder_has_the_rows_that_its_configuration_says(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 16, "n_classes": 7}}
    configure(config, "cond_stage_config", embedder)
    load_backbone(path, config)
    configure(config, "cond_stage_config", {**embedder, "params": {"embed_dim": 16}})
    refused(path, "cond_stage_model.embedding.weight has 7 rows: expected n_classes, 1000", config=config)


def test_averaged_weights_are_chosen(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    state = load_file(path)
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int32)}
    save_file({**state, **averages, **counters}, path)
    refused(path, "--backbone-ema use or ignore", config=config)
    trained, averaged = load_backbone(path, config, "ignore"), load_backbone(path, config, "use")
    for one, other in zip(trained.denoiser.parameters(), averaged.denoiser.parameters(), strict=True):
        torch.testing.assert_close(other, one + 1)
    name = next(iter(averages))
    save_file({**state, **averages, **counters, "model_ema.more": torch.zeros(1)}, path)
    refused(path, "model_ema.more", config=config, ema="use")
    averages.pop(name)
    save_file({**state, **averages, **counters}, path)
    refused(path, "has no average", config=config, ema="use")


class ModelCheckpoint:
    """Stands for the class of pytorch_lightning whose objects are in published checkpoints."""


class AttributeDict(dict[str, Any]):
    """Lightning's dictionary of hyper-parameters."""


class Armed:
    """Code that an unpickler would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('the checkpoint ran its code')",))


def test_a_lightning_checkpoint_is_converted_without_running_it(
    checkpoint: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = checkpoint
    state = load_file(path)
    path.unlink()
    lightning = path.with_suffix(".ckpt")
    held = {
        "state_dict": state,
        "epoch": 1,
        "callbacks": {ModelCheckpoint: {"best": Armed()}},
        "hyper_parameters": AttributeDict(rate=1),
        "x": ModelCheckpoint(),
    }
    torch.save(held, lightning)
    with pytest.raises(TrainingError) as caught:
        load_backbone(lightning, config)
    message = str(caught.value)
    assert "weights_only" not in message
    assert f"convert it to safetensors: decuwatch-train convert {lightning} {path}" in message
    # The command that the message gives.
    assert main(message.partition("decuwatch-train ")[2].split()) == 0
    assert "ModelCheckpoint" in capsys.readouterr().out
    converted = load_file(path)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)
    load_backbone(path, config)


def test_what_cannot_be_converted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.ckpt"
    for content in (b"", b"PK\x03\x04", pickle.dumps(Armed())):
        path.write_bytes(content)
        assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    torch.save({"state_dict": {"weight": Armed()}}, path)
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 1
    assert "'weight' is a exec, expected a tensor" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out.safetensors")]) == 1
    assert main(["convert", str(path), str(tmp_path / "out.ckpt")]) == 1


def test_tensors_beside_the_state_dict_are_not_passed_over(checkpoint: tuple[Path, Path]) -> None:
    path, config = checkpoint
    state = load_file(path)
    other = path.with_suffix(".ckpt")
    torch.save({"state_dict": state, "ema": {"weight": torch.zeros(1)}}, other)
    refused(other, "holds tensors under 'ema' beside 'state_dict'", config=config)
    torch.save({**state, "epoch": 3}, other)
    refused(other, "'epoch' is a int", config=config)


def test_a_sound_directory_stays_as_it_is(backbone: Path) -> None:
    """What diffusers saves with its defaults, apart from the clipping, loads as before."""
    UNet2DConditionModel(**UNET).save_pretrained(backbone / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(backbone / "scheduler")
    schedule = load_backbone(backbone).schedule
    assert (schedule.beta_schedule, schedule.steps_offset, schedule.set_alpha_to_one, schedule.timestep_spacing) == (
        "linear",
        0,
        True,
        "leading",
    )
