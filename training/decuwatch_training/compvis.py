"""CompVis latent-diffusion checkpoints (Rombach et al. 2022) and their YAML configuration, such as cin256-v2.

Every key of the configuration is listed here with what is allowed of it, as configuration.py does for diffusers; keys
that are missing have the defaults of CompVis' code. Weights are renamed by diffusers' own converter and must all
arrive.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from decuwatch_training.configuration import (
    FLAG,
    NOT_IN_TRAINING,
    PROBABILITY,
    WIDTHS,
    Rule,
    check_fields,
    each,
    either,
    given,
    no_effect,
    number,
    only,
    shorten,
    whole,
)
from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.weights import load_exactly, read_state_dict

UNET_PREFIX, FIRST_STAGE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."
ANYTHING = Rule("a mapping", lambda found: isinstance(found, Mapping))
OF_TRAINING = no_effect(NOT_IN_TRAINING)
OF_LOGGING = no_effect("only for reading data and logging")

FILE_KEYS = {"model": given(ANYTHING), "data": OF_LOGGING, "lightning": OF_TRAINING}
MODEL_KEYS = {
    "target": only(None, "ldm.models.diffusion.ddpm.LatentDiffusion"),
    "params": given(ANYTHING),
    "base_learning_rate": OF_TRAINING,
}
PARTS = {
    "unet_config": only(None, "ldm.modules.diffusionmodules.openaimodel.UNetModel"),
    "first_stage_config": only("ldm.models.autoencoder.VQModelInterface", "ldm.models.autoencoder.AutoencoderKL"),
    "cond_stage_config": only("ldm.modules.encoders.modules.ClassEmbedder"),
}
"""The class of each part, its ``target``."""
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
"""CompVis' names to diffusers'. Its ``linear`` is linear in the square root; its cosine has s = 0.008 and a cap."""
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

PARAMETERS = {
    "unet_config": given(ANYTHING),
    "first_stage_config": given(ANYTHING),
    "cond_stage_config": either(only(None), ANYTHING),
    "timesteps": whole(1, 100_000),
    "beta_schedule": only(*BETA_SCHEDULES),
    "linear_start": number(0, 1, beyond=True),
    "linear_end": number(0, 0.999999, beyond=True),
    "cosine_s": only(0.008),
    "given_betas": only(None),
    "parameterization": only(*PREDICTIONS),
    "image_size": given(whole(1, 1024)),
    "channels": whole(1, 1024),
    "conditioning_key": only(None, "crossattn"),
    "scale_factor": number(0, 1e6, beyond=True),
    "scale_by_std": FLAG,
    "num_timesteps_cond": only(None, 1),
    "cond_stage_key": OF_LOGGING,
    "first_stage_key": OF_LOGGING,
    "cond_stage_forward": only(None),
    "concat_mode": no_effect("only with conditioning_key concat", FLAG),
    "cond_stage_trainable": OF_TRAINING,
    "use_positional_encodings": only(False),
    "clip_denoised": no_effect("only for ancestral sampling; CompVis' DDIM does not clip", FLAG),
    "v_posterior": no_effect("only for ancestral sampling", PROBABILITY),
    "use_ema": no_effect("the checkpoint says whether it holds averaged weights", FLAG),
    "log_every_t": OF_LOGGING,
    "monitor": OF_LOGGING,
    "loss_type": OF_TRAINING,
    "original_elbo_weight": OF_TRAINING,
    "l_simple_weight": OF_TRAINING,
    "learn_logvar": OF_TRAINING,
    "logvar_init": OF_TRAINING,
    "scheduler_config": OF_TRAINING,
    "ckpt_path": no_effect("the weights come from --backbone"),
    "ignore_keys": no_effect("the weights come from --backbone"),
    "load_only_unet": no_effect("the weights come from --backbone"),
}
DEFAULTS: dict[str, Any] = {
    "cond_stage_config": None,
    "timesteps": 1000,
    "beta_schedule": "linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "cosine_s": 0.008,
    "parameterization": "eps",
    "scale_factor": 1.0,
    "scale_by_std": False,
}
"""Defaults of CompVis' code."""

UNET_PARAMETERS = {
    "image_size": no_effect("CompVis' U-Net does not read it"),
    "in_channels": given(whole(1, 1024)),
    "out_channels": given(whole(1, 1024)),
    "model_channels": given(whole(1, 65_536)),
    "num_res_blocks": given(whole(1, 64)),
    "attention_resolutions": given(each(whole(1, 1024))),
    "channel_mult": WIDTHS,
    "num_heads": either(only(-1), whole(1, 1024)),
    "num_head_channels": either(only(-1), whole(1, 8192)),
    "num_heads_upsample": only(-1),
    "use_spatial_transformer": given(only(True)),
    "transformer_depth": whole(1, 64),
    "context_dim": given(whole(1, 8192)),
    "dropout": no_effect(NOT_IN_TRAINING, PROBABILITY),
    "use_checkpoint": OF_TRAINING,
    "conv_resample": only(True),
    "dims": only(2),
    "num_classes": only(None),
    "use_fp16": only(False),
    "use_scale_shift_norm": only(False),
    "resblock_updown": only(False),
    "use_new_attention_order": no_effect("only without a spatial transformer", FLAG),
    "n_embed": only(None),
    "legacy": FLAG,
    "use_linear_in_transformer": FLAG,
}
UNET_DEFAULTS: dict[str, Any] = {
    "channel_mult": [1, 2, 4, 8],
    "num_heads": -1,
    "num_head_channels": -1,
    "transformer_depth": 1,
    "legacy": True,
    "use_linear_in_transformer": False,
}

FIRST_STAGE_PARAMETERS = {
    "ddconfig": given(ANYTHING),
    "embed_dim": given(whole(1, 1024)),
    "lossconfig": OF_TRAINING,
    "ckpt_path": no_effect("the weights come from --backbone"),
    "ignore_keys": no_effect("the weights come from --backbone"),
    "image_key": OF_LOGGING,
    "colorize_nlabels": OF_LOGGING,
    "monitor": OF_LOGGING,
}
VQ_PARAMETERS = FIRST_STAGE_PARAMETERS | {
    "n_embed": given(whole(1, 10_000_000)),
    "remap": only(None),
    "sane_index_shape": no_effect("only for the indices, which are not used", FLAG),
    "batch_resize_range": OF_TRAINING,
    "scheduler_config": OF_TRAINING,
    "lr_g_factor": OF_TRAINING,
    "use_ema": only(False),
}
DDCONFIG = {
    "double_z": FLAG,
    "z_channels": given(whole(1, 1024)),
    "resolution": no_effect("only with attn_resolutions", whole(1, 65_536)),
    "in_channels": given(only(1, 3)),
    "out_ch": given(only(1, 3)),
    "ch": given(whole(1, 65_536)),
    "ch_mult": given(WIDTHS),
    "num_res_blocks": given(whole(1, 64)),
    "attn_resolutions": only([]),
    "attn_type": only("vanilla"),
    "use_linear_attn": only(False),
    "resamp_with_conv": only(True),
    "give_pre_end": only(False),
    "tanh_out": only(False),
    "dropout": no_effect(NOT_IN_TRAINING, PROBABILITY),
}
CLASS_EMBEDDER = {"embed_dim": given(whole(1, 8192)), "n_classes": whole(2, 100_001), "key": OF_LOGGING}

SCHEDULE_TENSORS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "cond_ids",
)  # fmt: skip
"""What CompVis computes from the schedule and saves along; ``alphas_cumprod`` is compared with ours."""
ALPHAS_TOLERANCE = 1e-4
EMA_COUNTERS = ("decay", "num_updates")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as OmegaConf reads it: ``1e-4`` is a number, and a key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice; plain YAML readers keep the last one."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} comes twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class CompVis:
    """A checkpoint that was read: networks, schedule, latents and the checkpoint's own table [K + 1, 1, D]."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL | VQModel
    schedule: NoiseSchedule
    size: int
    scale: float
    reference: Tensor | None


def read_compvis(path: Path, config: Path, ema: str | None) -> CompVis:
    """Read a checkpoint with its configuration; ``ema`` is ``use`` or ``ignore`` and needed if there are averaged
    weights.

    Raises TrainingError that names the file and the field or tensor.
    """
    parameters = _read_yaml(config)
    where = f"{config}: model.params"
    checked = check_parameters(parameters, where)
    unet = build_compvis_unet(parameters, where)
    autoencoder = build_compvis_autoencoder(parameters["first_stage_config"], where)
    state = read_state_dict(path)
    parts = _split(state, path)
    unet_weights = _averaged(parts, path, ema)
    _load_converted(unet, unet_weights, convert_ldm_unet_checkpoint(dict(unet_weights), unet.config), path, "U-Net")
    first_stage = {
        name: tensor
        for name, tensor in parts[FIRST_STAGE_PREFIX].items()
        if not name.startswith(f"{FIRST_STAGE_PREFIX}loss.")
    }
    converted = convert_ldm_vae_checkpoint(dict(first_stage), autoencoder.config)
    codebook = first_stage.get(f"{FIRST_STAGE_PREFIX}quantize.embedding.weight")
    if isinstance(autoencoder, VQModel) and codebook is not None:
        converted["quantize.embedding.weight"] = codebook
    _load_converted(autoencoder, first_stage, converted, path, "first stage")
    schedule = NoiseSchedule(
        train_timesteps=checked["timesteps"],
        beta_schedule=BETA_SCHEDULES[checked["beta_schedule"]],
        beta_start=float(checked["linear_start"]),
        beta_end=float(checked["linear_end"]),
        prediction=PREDICTIONS[checked["parameterization"]],
        timestep_spacing="compvis",
    )
    _check_schedule(parts[""], schedule, path)
    scale = _scale(parts[""], checked, path, where)
    return CompVis(
        unet, autoencoder, schedule, checked["image_size"], scale, _reference(parts[""], checked, path, where)
    )


def _read_yaml(config: Path) -> dict[str, Any]:
    """``model.params``, the keys around it checked."""
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), Loader=_Loader)
    except (
        OSError,
        ValueError,
        AttributeError,
        TypeError,
        RecursionError,
        yaml.YAMLError,
    ) as err:  # PyYAML lets most through
        raise TrainingError(
            f"{config}: expected a latent-diffusion configuration in YAML: {shorten(str(err))}"
        ) from err
    if not isinstance(content, dict):
        raise TrainingError(
            f"{config}: expected a latent-diffusion configuration with model.params, found {shorten(content)}"
        )
    model = _checked(content, FILE_KEYS, {}, str(config))["model"]
    return cast(dict[str, Any], _checked(model, MODEL_KEYS, {"target": None}, f"{config}: model")["params"])


def check_parameters(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``model.params`` with CompVis' defaults. Raises TrainingError for a key or value that is not supported."""
    checked = _checked(parameters, PARAMETERS, DEFAULTS, where)
    _inside(checked, "unet_config", where)
    _inside(checked, "first_stage_config", where)
    unet, first_stage = checked["unet_config"]["params"], checked["first_stage_config"]["params"]
    channels = unet.get("in_channels")
    for key, found in (
        ("channels", checked.get("channels", channels)),
        ("first_stage_config.params.embed_dim", first_stage.get("embed_dim")),
        ("unet_config.params.out_channels", unet.get("out_channels")),
    ):
        if found != channels:
            raise TrainingError(
                f"{where}.{key} {shorten(found)}: expected unet_config.params.in_channels, {shorten(channels)}"
            )
    if not checked["linear_start"] < checked["linear_end"]:
        raise TrainingError(
            f"{where}.linear_start {checked['linear_start']}: expected less than linear_end, {checked['linear_end']}"
        )
    if checked["cond_stage_config"] is not None:
        embedder = _inside(checked, "cond_stage_config", where)
        inner = _checked(embedder["params"], CLASS_EMBEDDER, {"n_classes": 1000}, f"{where}.cond_stage_config.params")
        if inner["embed_dim"] != unet.get("context_dim"):
            raise TrainingError(
                f"{where}.cond_stage_config.params.embed_dim {inner['embed_dim']}: expected context_dim, "
                f"{unet.get('context_dim')}"
            )
        checked["n_classes"] = inner["n_classes"]
    return checked


def _checked(stated: Any, rules: Mapping[str, Rule], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(stated, Mapping):
        raise TrainingError(f"{where}: expected a mapping, found {shorten(stated)}")
    return check_fields(stated, rules, defaults, where)


def _inside(parameters: Mapping[str, Any], part: str, where: str) -> Mapping[str, Any]:
    """``target`` and ``params`` of one part."""
    return _checked(
        parameters[part], {"target": PARTS[part], "params": given(ANYTHING)}, {"target": None}, f"{where}.{part}"
    )


def build_compvis_unet(parameters: Mapping[str, Any], where: str = "model.params") -> UNet2DConditionModel:
    """The U-Net that a latent-diffusion configuration describes, with random weights."""
    where = f"{where}.unet_config.params"
    settings = _checked(parameters["unet_config"]["params"], UNET_PARAMETERS, UNET_DEFAULTS, where)
    widths = [settings["model_channels"] * factor for factor in settings["channel_mult"]]
    attended = [2**level in settings["attention_resolutions"] for level in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=parameters["image_size"],
        in_channels=settings["in_channels"],
        out_channels=settings["out_channels"],
        block_out_channels=tuple(widths),
        layers_per_block=settings["num_res_blocks"],
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        cross_attention_dim=settings["context_dim"],
        attention_head_dim=_heads(settings, widths, where),
        transformer_layers_per_block=settings["transformer_depth"],
        use_linear_projection=settings["use_linear_in_transformer"],
    )


def _heads(settings: Mapping[str, Any], widths: list[int], where: str) -> tuple[int, ...]:
    """Heads of each level: a fixed number, or the width by ``num_head_channels``, which wins as in CompVis' code."""
    heads, width_of_head = settings["num_heads"], settings["num_head_channels"]
    name, divisor = ("num_heads", heads) if width_of_head == -1 else ("num_head_channels", width_of_head)
    if divisor == -1:
        raise TrainingError(f"{where}: num_heads -1: expected num_heads or num_head_channels")
    if any(width % 32 for width in widths):
        raise TrainingError(
            f"{where}: model_channels {settings['model_channels']}: expected 32 to divide the widths {widths}"
        )
    if any(width % divisor for width in widths):
        raise TrainingError(f"{where}: {name} {divisor}: expected a divisor of the widths {widths}")
    return tuple(heads if width_of_head == -1 else width // width_of_head for width in widths)


def build_compvis_autoencoder(first_stage: Mapping[str, Any], where: str = "model.params") -> AutoencoderKL | VQModel:
    """The first stage that a latent-diffusion configuration describes, with random weights: VQ or KL by its target."""
    target = _inside({"first_stage_config": first_stage}, "first_stage_config", where)["target"]
    where = f"{where}.first_stage_config"
    quantized = target.endswith("VQModelInterface")
    settings = _checked(
        first_stage["params"], VQ_PARAMETERS if quantized else FIRST_STAGE_PARAMETERS, {}, f"{where}.params"
    )
    inner = _checked(
        settings["ddconfig"], DDCONFIG, {"double_z": True, "attn_resolutions": []}, f"{where}.params.ddconfig"
    )
    if inner["double_z"] == quantized and ("double_z" in settings["ddconfig"] or not quantized):
        raise TrainingError(
            f"{where}.params.ddconfig: double_z {inner['double_z']}: expected {not quantized} for "
            f"{target.rpartition('.')[2]}"
        )
    if inner["out_ch"] != inner["in_channels"]:
        raise TrainingError(
            f"{where}.params.ddconfig: out_ch {inner['out_ch']}: expected in_channels, {inner['in_channels']}"
        )
    if not quantized and settings["embed_dim"] != inner["z_channels"]:
        raise TrainingError(
            f"{where}.params: embed_dim {settings['embed_dim']}: expected ddconfig.z_channels, {inner['z_channels']}"
        )
    channels = [inner["ch"] * factor for factor in inner["ch_mult"]]
    if any(width % 32 for width in channels):
        raise TrainingError(f"{where}.params.ddconfig: ch {inner['ch']}: expected 32 to divide the widths {channels}")
    shared: dict[str, Any] = {
        "in_channels": inner["in_channels"],
        "out_channels": inner["out_ch"],
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": tuple(channels),
        "layers_per_block": inner["num_res_blocks"],
        "latent_channels": inner["z_channels"],
    }
    if quantized:
        return VQModel(**shared, num_vq_embeddings=settings["n_embed"], vq_embed_dim=settings["embed_dim"])
    return AutoencoderKL(**shared)


def _split(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's tensors by prefix. Raises TrainingError for one that belongs nowhere."""
    parts: dict[str, dict[str, Tensor]] = {UNET_PREFIX: {}, FIRST_STAGE_PREFIX: {}, EMA_PREFIX: {}, "": {}}
    for name, tensor in state.items():
        prefix = next(
            (prefix for prefix in (UNET_PREFIX, FIRST_STAGE_PREFIX, EMA_PREFIX) if name.startswith(prefix)), ""
        )
        if not prefix and name not in (*SCHEDULE_TENSORS, "scale_factor", "cond_stage_model.embedding.weight"):
            raise TrainingError(
                f"{path}: {name}: a tensor that belongs to no part of a class-conditional latent-diffusion model"
            )
        parts[prefix][name] = tensor
    return parts


def _averaged(parts: Mapping[str, Mapping[str, Tensor]], path: Path, ema: str | None) -> dict[str, Tensor]:
    """The U-Net's weights as trained, or their moving average under the same names."""
    trained, averaged = parts[UNET_PREFIX], dict(parts[EMA_PREFIX])
    weights = {name: tensor for name, tensor in averaged.items() if name.removeprefix(EMA_PREFIX) not in EMA_COUNTERS}
    if ema is None and weights:
        raise TrainingError(
            f"{path}: holds trained weights and their moving average ({EMA_PREFIX}...); say which production uses: "
            "--backbone-ema use or ignore"
        )
    if ema != "use":
        return dict(trained)
    # CompVis drops the dots from the names of averaged weights.
    names = {EMA_PREFIX + name.removeprefix("model.").replace(".", ""): name for name in trained}
    for name in weights:
        if name not in names:
            raise TrainingError(f"{path}: {name}: an average without its trained weight")
    for flat, name in names.items():
        if flat not in weights:
            raise TrainingError(f"{path}: --backbone-ema use: {name} has no average, expected {flat}")
    return {names[flat]: tensor for flat, tensor in weights.items()}


def _load_converted(
    model: Any, given: Mapping[str, Tensor], converted: dict[str, Tensor], path: Path, part: str
) -> None:
    """Load what diffusers' converter made of ``given``, which skips the names that it does not know."""
    load_exactly(model, converted, path, part)
    arrived = {tensor.data_ptr() for tensor in converted.values()}
    left = [name for name, tensor in given.items() if tensor.data_ptr() not in arrived]
    if left or len(given) != len(converted):
        raise TrainingError(
            f"{path}: the {part} has besides {len(given) - len(converted)} tensors, the first: "
            f"{(left or sorted(given))[0]}"
        )


def _check_schedule(rest: Mapping[str, Tensor], schedule: NoiseSchedule, path: Path) -> None:
    """Hold the checkpoint's own ``alphas_cumprod`` against the configuration's."""
    own = rest.get("alphas_cumprod")
    if own is None:
        return
    wanted = schedule.scheduler().alphas_cumprod
    if own.shape != wanted.shape or not torch.allclose(own.float(), wanted, rtol=1e-2, atol=ALPHAS_TOLERANCE):
        raise TrainingError(
            f"{path}: alphas_cumprod: expected the configuration's schedule ({schedule.beta_schedule}, {len(wanted)} "
            "timesteps)"
        )


def _scale(rest: Mapping[str, Tensor], checked: Mapping[str, Any], path: Path, where: str) -> float:
    """The factor of the latents: the configuration's, or with ``scale_by_std`` the one that was measured and saved."""
    own = rest.get("scale_factor")
    if own is None:
        if checked["scale_by_std"]:
            raise TrainingError(
                f"{path}: scale_factor is missing: expected the one that scale_by_std measured ({where}.scale_by_std "
                "is true)"
            )
        return float(checked["scale_factor"])
    if own.numel() != 1 or not bool(torch.isfinite(own.float()).all()) or float(own) <= 0:
        raise TrainingError(f"{path}: scale_factor {shorten(own.flatten()[:3].tolist())}: expected one number above 0")
    if not checked["scale_by_std"] and float(own) != checked["scale_factor"]:
        raise TrainingError(
            f"{path}: scale_factor {float(own):g}: expected {where}.scale_factor, {checked['scale_factor']:g}, since "
            "scale_by_std is false"
        )
    return float(own)


def _reference(rest: Mapping[str, Tensor], checked: Mapping[str, Any], path: Path, where: str) -> Tensor | None:
    """The class embedder's table; its last row is the unconditional one."""
    own = rest.get("cond_stage_model.embedding.weight")
    if own is None:
        if "n_classes" in checked:
            raise TrainingError(
                f"{path}: cond_stage_model.embedding.weight is missing: expected the table of {where}.cond_stage_config"
            )
        return None
    if "n_classes" in checked and len(own) != checked["n_classes"]:
        raise TrainingError(
            f"{path}: cond_stage_model.embedding.weight has {len(own)} rows: expected n_classes, {checked['n_classes']}"
        )
    return own.detach().float().clone()[:, None]
