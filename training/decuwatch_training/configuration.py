"""What a backbone's configuration may say: every field of every supported class, what is allowed of it, and one
checker.

A foreign configuration is never read by the fields that we happen to know. Its class must be listed here, and so must
each of its fields. Whatever is not listed is refused by name, also a field that a newer library has added. A field that
the file lacks has the library's own default.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    VQModel,
)

from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json

PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash")
"""Keys beginning with an underscore that diffusers writes and that change nothing."""
WIDEST = 65_536
Problem = tuple[str, str]
"""A field, and what was expected of it in view of the other fields."""


@dataclass(frozen=True)
class Rule:
    """What a field may hold; ``says`` completes "expected ..." and is the text of the table in docs/training.md."""

    says: str
    allows: Callable[[Any], bool]
    required: bool = False
    """Whether a field without a default must be given; other such fields may be missing."""


def _spell(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def only(*values: Any) -> Rule:
    """One of these values, with their types: ``True`` is not 1."""
    *others, last = (_spell(value) for value in values)
    says = f"{', '.join(others)} or {last}" if others else last
    return Rule(says, lambda found: any(type(found) is type(value) and found == value for value in values))


def whole(low: int, high: int) -> Rule:
    """A whole number in bounds."""
    return Rule(f"a whole number from {low} to {high}", lambda found: type(found) is int and low <= found <= high)


def number(low: float, high: float, beyond: bool = False) -> Rule:
    """A finite number in bounds; ``beyond`` excludes the lower bound."""
    says = f"a number above {low:g}, at most {high:g}" if beyond else f"a number from {low:g} to {high:g}"
    return Rule(
        says,
        lambda found: (
            type(found) in (int, float)
            and math.isfinite(found)
            and (low < found if beyond else low <= found)
            and found <= high
        ),
    )


def each(rule: Rule) -> Rule:
    """A list of at least one value."""
    return Rule(
        f"a list, each {rule.says}",
        lambda found: isinstance(found, list | tuple) and len(found) > 0 and all(rule.allows(entry) for entry in found),
    )


def either(*rules: Rule) -> Rule:
    """Whatever one of the rules allows."""
    return Rule(", or ".join(rule.says for rule in rules), lambda found: any(rule.allows(found) for rule in rules))


def no_effect(why: str, rule: Rule | None = None) -> Rule:
    """A field that cannot change a score, and why. ``rule`` gives the values that diffusers can build."""
    return Rule(
        f"{'anything' if rule is None else rule.says} (no effect: {why})",
        (lambda found: True) if rule is None else rule.allows,
    )


def given(rule: Rule) -> Rule:
    """The same rule for a field that must be given."""
    return replace(rule, required=True)


FLAG = Rule("true or false", lambda found: type(found) is bool)
SQUARE = Rule(
    "a whole number from 1 to 1024, or a list of two equal ones",
    lambda found: (
        all(type(side) is int and 1 <= side <= 1024 for side in _sides(found)) and len(set(_sides(found))) == 1
    ),
)
WIDTHS = each(whole(1, WIDEST))
ACTIVATION = only("silu", "swish", "mish", "gelu", "relu")
PROBABILITY = number(0, 1)
EPSILON = number(0, 1, beyond=True)
TILING = no_effect("only for tiling", either(whole(1, WIDEST), WIDTHS))
NOT_IN_TRAINING = "only while the backbone trains"


def _sides(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, list | tuple) and len(found) == 2 else (found,)


@dataclass(frozen=True)
class Known:
    """A supported class: the rule of each field, of keys that only older files carry, and of fields taken together."""

    kind: Any
    fields: Mapping[str, Rule]
    older: Mapping[str, Rule] = field(default_factory=dict)
    together: Callable[[Mapping[str, Any]], Iterator[Problem]] = lambda config: iter(())
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that differ from those of ``kind``."""

    def library_defaults(self) -> dict[str, Any]:
        """Every field of the installed diffusers' class with its default."""
        parameters = list(inspect.signature(self.kind.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters} | dict(self.defaults)


def _same_length(config: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Problem]:
    levels = len(config["down_block_types"])
    for name in names:
        if isinstance(config[name], list | tuple) and len(config[name]) != levels:
            yield name, f"as many entries as down_block_types, {levels}"


def _groups(config: Mapping[str, Any]) -> Iterator[Problem]:
    if any(width % config["norm_num_groups"] for width in config["block_out_channels"]):
        yield "norm_num_groups", f"a divisor of all block_out_channels {list(config['block_out_channels'])}"


def _unet_together(config: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _same_length(
        config,
        (
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
            "attention_head_dim",
            "transformer_layers_per_block",
            "only_cross_attention",
        ),
    )
    yield from _groups(config)
    widths, heads = config["block_out_channels"], config["attention_head_dim"]
    for width, count in zip(widths, [heads] * len(widths) if isinstance(heads, int) else heads, strict=False):
        if width % count:
            yield "attention_head_dim", f"divisors of block_out_channels {list(widths)} (it is the number of heads)"
    if config["out_channels"] != config["in_channels"]:
        yield "out_channels", f"in_channels, {config['in_channels']}"


def _dit_together(config: Mapping[str, Any]) -> Iterator[Problem]:
    if config["out_channels"] not in (None, config["in_channels"], 2 * config["in_channels"]):
        yield (
            "out_channels",
            "null, in_channels or twice that (a predicted variance is dropped), in_channels being "
            f"{config['in_channels']}",
        )
    if _sides(config["sample_size"])[0] % config["patch_size"]:
        yield "patch_size", f"a divisor of sample_size, {config['sample_size']}"
    if config["num_attention_heads"] * config["attention_head_dim"] % 4:
        yield "attention_head_dim", "a width (times num_attention_heads) that four divides"


def _autoencoder_together(config: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _same_length(config, ("up_block_types", "block_out_channels"))
    yield from _groups(config)
    if config["out_channels"] != config["in_channels"]:
        yield "out_channels", f"in_channels, {config['in_channels']}"
    if config.get("norm_type") == "spatial" and any(width % 32 for width in config["block_out_channels"]):
        yield (
            "norm_type",
            "'group', since 'spatial' has groups of 32 and block_out_channels are "
            f"{list(config['block_out_channels'])}",
        )


def _schedule_together(config: Mapping[str, Any]) -> Iterator[Problem]:
    if not config["beta_start"] < config["beta_end"]:
        yield "beta_start", f"less than beta_end, {config['beta_end']}"
    if not config["steps_offset"] < config["num_train_timesteps"]:
        yield "steps_offset", f"less than num_train_timesteps, {config['num_train_timesteps']}"


def _flow_together(config: Mapping[str, Any]) -> Iterator[Problem]:
    if not config["base_image_seq_len"] < config["max_image_seq_len"]:
        yield "base_image_seq_len", f"less than max_image_seq_len, {config['max_image_seq_len']}"


EMA_RECORD = {
    name: no_effect("what diffusers' EMAModel notes; the weights beside it are what is read")
    for name in (
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
        "min_value",
    )
}

UNET = Known(
    UNet2DConditionModel,
    {
        "sample_size": SQUARE,
        "in_channels": whole(1, 1024),
        "out_channels": whole(1, 1024),
        "center_input_sample": FLAG,
        "flip_sin_to_cos": FLAG,
        "freq_shift": number(0, 1),
        "down_block_types": each(only("DownBlock2D", "CrossAttnDownBlock2D")),
        "mid_block_type": only("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "up_block_types": each(only("UpBlock2D", "CrossAttnUpBlock2D")),
        "only_cross_attention": either(FLAG, each(FLAG)),
        "block_out_channels": WIDTHS,
        "layers_per_block": either(whole(1, 64), each(whole(1, 64))),
        "downsample_padding": only(0, 1),
        "mid_block_scale_factor": number(0, 1000, beyond=True),
        "dropout": no_effect(NOT_IN_TRAINING, PROBABILITY),
        "act_fn": ACTIVATION,
        "norm_num_groups": whole(1, WIDEST),
        "norm_eps": EPSILON,
        "cross_attention_dim": whole(1, 8192),
        "transformer_layers_per_block": either(whole(1, 64), each(whole(1, 64))),
        "reverse_transformer_layers_per_block": only(None),
        "encoder_hid_dim": only(None),
        "encoder_hid_dim_type": only(None),
        "attention_head_dim": either(whole(1, WIDEST), WIDTHS),
        "num_attention_heads": only(None),
        "dual_cross_attention": only(False),
        "use_linear_projection": FLAG,
        "class_embed_type": only(None),
        "addition_embed_type": only(None),
        "addition_time_embed_dim": no_effect("only with addition_embed_type", either(only(None), whole(1, WIDEST))),
        "num_class_embeds": only(None),
        "upcast_attention": FLAG,
        "resnet_time_scale_shift": only("default", "scale_shift"),
        "resnet_skip_time_act": FLAG,
        "resnet_out_scale_factor": number(0, 1000, beyond=True),
        "time_embedding_type": only("positional"),
        "time_embedding_dim": either(only(None), whole(1, WIDEST)),
        "time_embedding_act_fn": either(only(None), ACTIVATION),
        "timestep_post_act": either(only(None), ACTIVATION),
        "time_cond_proj_dim": only(None),
        "conv_in_kernel": only(1, 3, 5, 7),
        "conv_out_kernel": only(1, 3, 5, 7),
        "projection_class_embeddings_input_dim": no_effect(
            "only with class_embed_type", either(only(None), whole(1, WIDEST))
        ),
        "attention_type": only("default"),
        "class_embeddings_concat": only(False),
        "mid_block_only_cross_attention": no_effect(
            "only with UNetMidBlock2DSimpleCrossAttn", either(only(None), FLAG)
        ),
        "cross_attention_norm": only(None),
        "addition_embed_type_num_heads": no_effect("only with addition_embed_type", whole(1, WIDEST)),
    },
    EMA_RECORD,
    _unet_together,
)

DIT_FIELDS = {
    "num_attention_heads": whole(1, 1024),
    "attention_head_dim": whole(1, 8192),
    "in_channels": whole(1, 1024),
    "out_channels": either(only(None), whole(1, 2048)),
    "num_layers": whole(1, 1024),
    "dropout": no_effect(NOT_IN_TRAINING, PROBABILITY),
    "norm_num_groups": no_effect("a DiT has no group normalization", whole(1, WIDEST)),
    "attention_bias": FLAG,
    "sample_size": whole(1, 1024),
    "patch_size": whole(1, 1024),
    "activation_fn": only("gelu-approximate", "gelu", "geglu", "geglu-approximate"),
    "num_embeds_ada_norm": whole(1, 100_000),
    "upcast_attention": FLAG,
    "norm_type": only("ada_norm_zero"),
    "norm_elementwise_affine": FLAG,
    "norm_eps": EPSILON,
}
DIT = Known(DiTTransformer2DModel, DIT_FIELDS, EMA_RECORD, _dit_together)
TRANSFORMER_2D = Known(
    DiTTransformer2DModel,
    DIT_FIELDS,
    EMA_RECORD
    | {
        "cross_attention_dim": only(None),
        "num_vector_embeds": only(None),
        "use_linear_projection": only(False),
        "only_cross_attention": only(False),
        "double_self_attention": only(False),
        "attention_type": only("default"),
        "caption_channels": only(None),
        "interpolation_scale": only(None),
        "use_additional_conditions": only(None),
    },
    _dit_together,
    {"norm_type": "layer_norm"},
)
"""How DiTs were written before DiTTransformer2DModel existed, facebook/DiT-XL-2-256 for one. diffusers reads those with
this ``norm_type``, and only those, as a DiTTransformer2DModel with its defaults; so do we.
"""

AUTOENCODER_FIELDS = {
    "in_channels": only(1, 3),
    "out_channels": only(1, 3),
    "down_block_types": each(only("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
    "up_block_types": each(only("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
    "block_out_channels": WIDTHS,
    "layers_per_block": whole(1, 64),
    "act_fn": ACTIVATION,
    "latent_channels": whole(1, 1024),
    "norm_num_groups": whole(1, WIDEST),
    "sample_size": TILING,
    "scaling_factor": number(0, 1e6, beyond=True),
    "force_upcast": no_effect("encoding and decoding run in float32", FLAG),
    "mid_block_add_attention": FLAG,
}
AUTOENCODER_KL = Known(
    AutoencoderKL,
    AUTOENCODER_FIELDS
    | {
        "shift_factor": either(only(None), number(-1e6, 1e6)),
        "latents_mean": only(None),
        "latents_std": only(None),
        "use_quant_conv": FLAG,
        "use_post_quant_conv": FLAG,
    },
    EMA_RECORD,
    _autoencoder_together,
)
VQ_MODEL = Known(
    VQModel,
    AUTOENCODER_FIELDS
    | {
        "num_vq_embeddings": whole(1, 10_000_000),
        "vq_embed_dim": either(only(None), whole(1, 1024)),
        "norm_type": only("group", "spatial"),
        "lookup_from_codebook": no_effect("only if decoding does not quantize", FLAG),
    },
    EMA_RECORD,
    _autoencoder_together,
)

NOT_OUR_SAMPLER = "decuwatch samples with DDIM"
SCHEDULE_FIELDS = {
    "num_train_timesteps": whole(1, 100_000),
    "beta_start": number(0, 1, beyond=True),
    "beta_end": number(0, 0.999999, beyond=True),
    "beta_schedule": only("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": only(None),
    "prediction_type": only("epsilon", "sample", "v_prediction"),
    "timestep_spacing": only("leading", "trailing", "linspace"),
    "steps_offset": whole(0, 99_999),
}
CLIPPING = {
    "clip_sample": only(False),
    "clip_sample_range": no_effect("only with clip_sample", number(0, 1e6)),
    "thresholding": only(False),
    "dynamic_thresholding_ratio": no_effect("only with thresholding", PROBABILITY),
    "sample_max_value": no_effect("only with thresholding", number(0, 1e6)),
    "rescale_betas_zero_snr": only(False),
}
TO_ONE = {"set_alpha_to_one": FLAG}
FLOW_FIELDS = {
    "num_train_timesteps": whole(1, 100_000),
    "shift": number(0, 1000, beyond=True),
    "use_dynamic_shifting": FLAG,
    "base_shift": number(-1000, 1000),
    "max_shift": number(-1000, 1000),
    "base_image_seq_len": whole(1, 2**31),
    "max_image_seq_len": whole(1, 2**31),
    "invert_sigmas": only(False),
    "shift_terminal": either(only(None), number(0, 0.999999)),
    "use_karras_sigmas": only(False),
    "use_exponential_sigmas": only(False),
    "use_beta_sigmas": only(False),
    "time_shift_type": only("exponential", "linear"),
    "stochastic_sampling": only(False),
}
PNDM_ONLY = {"skip_prk_steps": no_effect(NOT_OUR_SAMPLER, FLAG)}
DDPM_ONLY = {
    "variance_type": no_effect(
        "decuwatch samples with DDIM, which has its own variance",
        only(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    )
}
OLDER_SCHEDULE = {
    "timestep_values": only(None),
    "tensor_format": no_effect("the library of the arrays", only("pt", "np")),
}
SCHEDULERS = {
    "DDIMScheduler": Known(
        DDIMScheduler, SCHEDULE_FIELDS | CLIPPING | TO_ONE, OLDER_SCHEDULE | PNDM_ONLY | DDPM_ONLY, _schedule_together
    ),
    "DDPMScheduler": Known(
        DDPMScheduler, SCHEDULE_FIELDS | CLIPPING | DDPM_ONLY, OLDER_SCHEDULE | TO_ONE | PNDM_ONLY, _schedule_together
    ),
    "PNDMScheduler": Known(
        PNDMScheduler,
        SCHEDULE_FIELDS | {"set_alpha_to_one": given(FLAG)} | PNDM_ONLY,
        OLDER_SCHEDULE | CLIPPING | {"clip_sample": given(only(False))} | DDPM_ONLY,
        _schedule_together,
    ),
    "FlowMatchEulerDiscreteScheduler": Known(FlowMatchEulerDiscreteScheduler, FLOW_FIELDS, {}, _flow_together),
}
"""The discrete noise schedules whose model DDIM samples, and the flow that Euler samples. Another scheduler's model may
be sampled with DDIM too, but that is for its owner to say, by saving a DDIMScheduler. A PNDMScheduler and the
DDIMScheduler that diffusers makes of its file have other defaults, so the file must state those fields.
"""

DENOISERS = {
    "unet": {"UNet2DConditionModel": UNET},
    "transformer": {"DiTTransformer2DModel": DIT, "Transformer2DModel": TRANSFORMER_2D},
}
AUTOENCODERS = {"AutoencoderKL": AUTOENCODER_KL, "VQModel": VQ_MODEL}


@dataclass(frozen=True)
class Configuration:
    """A configuration that passed: its class, each field with the library's default filled in, and the file."""

    kind: Any
    values: dict[str, Any]
    file: Path


def read_configuration(file: Path, known: Mapping[str, Known]) -> Configuration:
    """Read a diffusers ``config.json`` of one of the ``known`` classes.

    Raises TrainingError that names the file, the field, what was found and what is allowed.
    """
    config = read_json(file)
    if not isinstance(config, dict):
        raise TrainingError(f"{file}: expected a JSON object with _class_name, found {shorten(config)}")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in known:
        hint = (
            "; DDIMScheduler.from_config(scheduler.config).save_pretrained(...) saves another as DDIM, if DDIM may "
            "sample it"
            if known is SCHEDULERS
            else ""
        )
        raise TrainingError(f"{file}: _class_name {shorten(name)}: expected {' or '.join(known)}{hint}")
    chosen = known[name]
    defaults = chosen.library_defaults()
    for unlisted in defaults.keys() - chosen.fields.keys():
        raise TrainingError(
            f"{file}: {unlisted}: diffusers' {chosen.kind.__name__} has this field, and decuwatch-train does not know "
            "what it means"
        )
    older = {key: rule for key, rule in chosen.older.items() if key in config or rule.required}
    rules = {key: rule for key, rule in chosen.fields.items() if key in defaults} | older
    defaults = {key: value for key, value in defaults.items() if not rules[key].required}
    stated = {key: value for key, value in config.items() if key not in PRIVATE}
    values = check_fields(stated, rules, defaults, str(file))
    for key, expected in chosen.together(values | {"steps_offset": values.get("steps_offset", 0)}):
        raise TrainingError(f"{file}: {key} {shorten(values[key])}: expected {expected}")
    return Configuration(chosen.kind, values, file)


def check_fields(
    stated: Mapping[str, Any], rules: Mapping[str, Rule], defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The fields of a file, and the default of each that is missing.

    Raises TrainingError for a key without a rule, a value that its rule does not allow, and a required field that is
    missing.
    """
    for key in stated:
        if key not in rules:
            raise TrainingError(f"{where}: {key} {shorten(stated[key])}: a field that decuwatch-train does not know")
    values = {}
    for key, rule in rules.items():
        if key not in stated and key not in defaults:
            if rule.required:
                raise TrainingError(f"{where}: {key} is missing: expected {rule.says}")
            continue
        value = stated[key] if key in stated else defaults[key]
        if not rule.allows(value):
            missing = "" if key in stated else " (the default of a missing field)"
            raise TrainingError(f"{where}: {key} {shorten(value)}{missing}: expected {rule.says}")
        values[key] = value
    return values


def shorten(value: Any) -> str:
    """The value for a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
