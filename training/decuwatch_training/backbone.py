"""The frozen backbone in the field's formats: a denoiser that is conditioned on a context, an autoencoder, a schedule.

Read from a diffusers directory (``unet/`` or ``transformer/``, ``vae/`` or ``vqvae/``, ``scheduler/``) or from a
CompVis latent-diffusion checkpoint with its YAML configuration. It is carried out exactly as the library that it comes
from would, or refused by name: every field of its configuration (configuration.py, compvis.py) and every tensor
(weights.py).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    VQModel,
)
from torch import Tensor, nn

from decuwatch_training.compvis import build_compvis_autoencoder as build_compvis_autoencoder
from decuwatch_training.compvis import build_compvis_unet as build_compvis_unet
from decuwatch_training.compvis import read_compvis
from decuwatch_training.configuration import (
    AUTOENCODERS,
    DENOISERS,
    SCHEDULERS,
    Configuration,
    Known,
    read_configuration,
    shorten,
)
from decuwatch_training.diffusion import FlowSchedule, NoiseSchedule, Schedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json
from decuwatch_training.weights import FLOATS, check_all_finite, load_exactly, read_folder, read_state_dict

REFERENCE_FILE = "class_embeddings.safetensors"
INDEX_FILE = "model_index.json"


class ContextUNet(nn.Module):
    """A UNet2DConditionModel as (latent [N,C,H,W], timestep [N], context [N,T,D]) -> prediction [N,C,H,W]."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, self.unet(latent, timestep, encoder_hidden_states=context, return_dict=False)[0])


class GivenEmbedding(nn.Module):
    """Replaces a DiT's class lookup: returns the embedding that was given instead of a label."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding


class ContextDiT(nn.Module):
    """A DiT (Peebles, Xie 2023) whose label embedder is replaced by the context; same call as ContextUNet, with T = 1.

    A DiT that also predicts its variance has twice the output channels; the second half is dropped.
    """

    def __init__(self, dit: DiTTransformer2DModel) -> None:
        super().__init__()
        for block in dit.transformer_blocks:
            cast(Any, block).norm1.emb.class_embedder = GivenEmbedding()
        self.dit = dit
        self.channels = int(cast(Any, dit.config).in_channels)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        prediction = self.dit(latent, timestep=timestep, class_labels=cast(Any, context[:, 0]), return_dict=False)[0]
        return cast(Tensor, prediction[:, : self.channels])


class Autoencoder(nn.Module):
    """Images in [-1, 1] to unscaled latents and back; the mean if the encoder gives a distribution."""

    def __init__(self, model: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.model = model

    def encode(self, images: Tensor) -> Tensor:
        encoded = self.model.encode(images, return_dict=False)[0]
        return cast(Tensor, encoded.mode() if isinstance(self.model, AutoencoderKL) else encoded)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode. A VQModel quantizes first, as latent diffusion's own decoder does."""
        return cast(Tensor, self.model.decode(latent, return_dict=False)[0])


@dataclass
class Backbone:
    """A frozen diffusion model. Latents outside ``autoencoder`` are scaled: (z - shift) * scale."""

    denoiser: ContextUNet | ContextDiT
    autoencoder: Autoencoder
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    context_dim: int
    scale: float
    shift: float
    reference: Tensor | None = None
    """[K + 1, T, D]: the backbone's own fully trained table, the last row unconditional; None without one."""

    def freeze(self) -> "Backbone":
        """Evaluation mode, and no parameter takes a gradient."""
        for module in (self.denoiser, self.autoencoder):
            module.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device) -> "Backbone":
        """Move the networks; the reference table stays on the CPU."""
        self.denoiser.to(device)
        self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 512) -> Tensor:
        """Images [n,C,H,W] in [-1, 1] to scaled latents, on the CPU."""
        device = next(self.autoencoder.parameters()).device
        parts = [self.autoencoder.encode(part.to(device)).cpu() for part in images.split(batch)]
        return (torch.cat(parts) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 256) -> Tensor:
        """Scaled latents to images [n,C',H',W'], on the CPU."""
        device = next(self.autoencoder.parameters()).device
        return torch.cat(
            [self.autoencoder((part / self.scale + self.shift).to(device)).cpu() for part in latents.split(batch)]
        )

    def parameter_count(self) -> int:
        """Parameters of the denoiser, all of them frozen."""
        return sum(parameter.numel() for parameter in self.denoiser.parameters())

    def digest(self) -> str:
        """SHA-256 over every parameter and buffer of denoiser and autoencoder, by name."""
        digest = hashlib.sha256()
        for prefix, module in (("denoiser", self.denoiser), ("autoencoder", self.autoencoder)):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{prefix}.{name}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def add_backbone_arguments(parser: argparse.ArgumentParser, which: str, required: bool = True) -> None:
    """The arguments that name a backbone; ``backbone_of`` reads it."""
    parser.add_argument(
        "--backbone",
        type=Path,
        required=required,
        help=f"{which}: a diffusers directory, or a CompVis .ckpt or .safetensors file",
    )
    parser.add_argument("--backbone-config", type=Path, help="the CompVis checkpoint's YAML configuration")
    parser.add_argument(
        "--backbone-ema",
        choices=("use", "ignore"),
        help="the moving average of a CompVis checkpoint's weights; needed if it has one",
    )


def backbone_of(arguments: argparse.Namespace) -> Backbone:
    """The backbone that the arguments name."""
    return load_backbone(arguments.backbone, arguments.backbone_config, arguments.backbone_ema)


def load_backbone(path: Path, config: Path | None = None, ema: str | None = None) -> Backbone:
    """Read a frozen backbone from a diffusers directory, or from a CompVis ``.ckpt``/``.safetensors`` with ``config``.

    ``ema`` says whether a CompVis checkpoint's averaged weights are used (``use``) or not (``ignore``). Images and
    latents have gone through all networks once when this returns. Raises TrainingError that names the file and what was
    expected of it.
    """
    if path.is_dir():
        if config is not None or ema is not None:
            raise TrainingError(
                f"{path}: --backbone-config and --backbone-ema are for CompVis checkpoints, this is a directory"
            )
        backbone = _load_diffusers(path).freeze()
    else:
        if not path.exists():
            raise TrainingError(f"{path}: no such backbone; expected a diffusers directory or a CompVis checkpoint")
        if config is None:
            raise TrainingError(f"{path}: a CompVis checkpoint needs its YAML configuration (--backbone-config)")
        backbone = _load_compvis(path, config, ema).freeze()
    with _warnings_refused(path):
        _try_out(backbone, path)
    return backbone


def _load_diffusers(path: Path) -> Backbone:
    folder, configuration = _part(path, DENOISERS)
    _check_index(path, folder.name, configuration)
    model = _build(configuration, folder)
    values, dit = configuration.values, configuration.kind is DiTTransformer2DModel
    context_dim = (
        values["num_attention_heads"] * values["attention_head_dim"]
        if dit
        else unet_context_dim(model, configuration.file)
    )
    reference = dit_reference(model, folder) if dit else None
    denoiser = ContextDiT(model) if dit else ContextUNet(model)
    folder, vae = _part(path, dict.fromkeys(("vae", "vqvae", "movq"), AUTOENCODERS))
    autoencoder = _build(vae, folder)
    latent_channels = vae.values.get("vq_embed_dim") or vae.values["latent_channels"]
    if values["in_channels"] != latent_channels:
        raise TrainingError(
            f"{configuration.file}: in_channels {values['in_channels']}: expected the latent channels of {vae.file}, "
            f"{latent_channels}"
        )
    schedule = read_schedule(path / "scheduler" / "scheduler_config.json")
    size = values["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(schedule, FlowSchedule):
        patch = values["patch_size"] if dit else 1
        schedule = dataclasses.replace(schedule, image_seq_len=(height // patch) * (width // patch))
    own = read_reference(path / REFERENCE_FILE, context_dim)
    scale, shift = float(vae.values["scaling_factor"]), float(vae.values.get("shift_factor") or 0.0)
    latent_shape = (values["in_channels"], height, width)
    return Backbone(
        denoiser,
        Autoencoder(autoencoder),
        schedule,
        latent_shape,
        context_dim,
        scale,
        shift,
        reference if own is None else own,
    )


def _check_index(path: Path, denoiser: str, configuration: Configuration) -> None:
    """Hold a pipeline's ``model_index.json``, if there is one, against the parts: a part that another was exchanged
    for.

    A DiT's ``id2label`` must have one label for each class. Raises TrainingError that names the field.
    """
    file = path / INDEX_FILE
    if not file.exists():
        return
    index = read_json(file)
    if not isinstance(index, dict):
        raise TrainingError(f"{file}: expected a JSON object with _class_name, found {shorten(index)}")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise TrainingError(f"{file}: _class_name {shorten(name)}: expected the class of a pipeline")
    for part in ("unet", "transformer", "vae", "vqvae", "movq", "scheduler"):
        config = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        stated = index.get(part)
        if stated in (None, [None, None]):
            if config.exists() and part != "scheduler":
                raise TrainingError(
                    f"{file}: {part} {shorten(stated)}: expected the class of {config}, or no such file"
                )
            continue
        if not config.exists():
            raise TrainingError(f"{config}: no such file; {INDEX_FILE} has {part} {shorten(stated)}")
        own = read_json(config)
        own = own.get("_class_name") if isinstance(own, dict) else None
        same = {own, "Transformer2DModel"} if own == "DiTTransformer2DModel" else {own}
        same |= {"DiTTransformer2DModel"} if own == "Transformer2DModel" else set()
        if not isinstance(stated, list) or len(stated) != 2 or stated[1] not in same:
            raise TrainingError(f"{file}: {part} {shorten(stated)}: expected the class of {config}, {shorten(own)}")
    if "id2label" in index:
        classes = configuration.values.get("num_embeds_ada_norm")
        _check_names(file, index["id2label"], None if denoiser == "unet" else classes)


def _check_names(file: Path, names: Any, classes: int | None) -> None:
    rows = range(len(names) if classes is None else classes) if isinstance(names, dict) else ()
    if (
        not isinstance(names, dict)
        or set(names) != {str(row) for row in rows}
        or not all(isinstance(label, str) for label in names.values())
    ):
        count = "the classes" if classes is None else f"{classes} classes (num_embeds_ada_norm)"
        raise TrainingError(f"{file}: id2label: expected a label for each of {count}, by index from 0")


def _part(path: Path, known: Mapping[str, Mapping[str, Known]]) -> tuple[Path, Configuration]:
    """The one folder of these names that the directory has, and its configuration."""
    found = [path / name for name in known if (path / name / "config.json").exists()]
    if len(found) != 1:
        expected = " or ".join(f"{name}/config.json ({' or '.join(known[name])})" for name in known)
        raise TrainingError(
            f"{path}: expected {expected}{', found ' + ' and '.join(folder.name for folder in found) if found else ''}"
        )
    return found[0], read_configuration(found[0] / "config.json", known[found[0].name])


def read_schedule(file: Path) -> Schedule:
    """The schedule of a ``scheduler_config.json``. DDIM samples all but a flow, whichever supported class wrote it.

    The tokens that the denoiser makes of a latent are not in the file.
    """
    configuration = read_configuration(file, SCHEDULERS)
    values = configuration.values
    if configuration.kind is FlowMatchEulerDiscreteScheduler:
        return FlowSchedule(
            train_timesteps=values["num_train_timesteps"],
            shift=float(values["shift"]),
            use_dynamic_shifting=values["use_dynamic_shifting"],
            base_shift=float(values["base_shift"]),
            max_shift=float(values["max_shift"]),
            base_image_seq_len=values["base_image_seq_len"],
            max_image_seq_len=values["max_image_seq_len"],
            time_shift_type=values["time_shift_type"],
            shift_terminal=float(values["shift_terminal"] or 0),
        )
    return NoiseSchedule(
        train_timesteps=values["num_train_timesteps"],
        beta_schedule=values["beta_schedule"],
        beta_start=float(values["beta_start"]),
        beta_end=float(values["beta_end"]),
        prediction=values["prediction_type"],
        timestep_spacing=values["timestep_spacing"],
        steps_offset=values["steps_offset"],
        set_alpha_to_one=values.get("set_alpha_to_one", True),
    )


def _build(configuration: Configuration, folder: Path) -> Any:
    """The model of a configuration with the weights of its folder, each in its place."""
    name = configuration.kind.__name__
    fields = {
        key: value
        for key, value in configuration.values.items()
        if key in Known(configuration.kind, {}).library_defaults()
    }
    with _warnings_refused(configuration.file):
        try:
            model = configuration.kind(**fields)
        except Exception as err:  # diffusers and torch raise whatever their constructors run into
            raise TrainingError(
                f"{configuration.file}: diffusers cannot build a {name} of these fields: {shorten(str(err))}"
            ) from err
        weights, file = read_folder(folder, f"weights of a {name}")
        # Attention of older VAEs has other names; diffusers renames it, over a tensor that is there under both.
        renamed = model._fix_state_dict_keys_on_load(dict(weights))
    if len(renamed) != len(weights):
        twice = next(key for key in weights if key not in renamed)
        raise TrainingError(f"{file}: {twice} is there under its newer name as well, expected one of them")
    load_exactly(model, renamed, file, name)
    return model


LATER = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)


@contextlib.contextmanager
def _warnings_refused(file: Path) -> Iterator[None]:
    """Refuse what diffusers and torch only warn of: fields and weights they do not use, shapes they stretch."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield
    finally:
        logger.removeHandler(handler)
    # A deprecation says what a later library does, not what this one did.
    warned += [
        str(entry.message)
        for entry in caught
        if not issubclass(entry.category, (*LATER, ImportWarning, ResourceWarning))
    ]
    if warned:
        raise TrainingError(f"{file}: a library warns: {shorten(warned[0])}")


def unet_context_dim(unet: UNet2DConditionModel, where: Path) -> int:
    """D of the U-Net's context. Raises TrainingError for one that takes none."""
    dim = cast(Any, unet.config).cross_attention_dim
    if not isinstance(dim, int) or not any("attn2.to_k" in name for name, _ in unet.named_parameters()):
        raise TrainingError(
            f"{where}: down_block_types: expected a U-Net with cross-attention of one width, found cross_attention_dim "
            f"{dim!r}"
        )
    return dim


def dit_reference(dit: DiTTransformer2DModel, where: Path) -> Tensor:
    """The DiT's own label table [K + 1, 1, D] (its last row is the unconditional class), read before it is replaced.

    Raises TrainingError if the blocks' tables differ: one context could not stand for them all.
    """
    tables = [
        cast(Tensor, cast(Any, block).norm1.emb.class_embedder.embedding_table.weight)
        for block in dit.transformer_blocks
    ]
    if any(not torch.equal(tables[0], table) for table in tables[1:]):
        raise TrainingError(
            f"{where}: class_embedder: every block has a label table of its own, expected one that they share"
        )
    return tables[0].detach().clone()[:, None]


def read_reference(path: Path, dim: int) -> Tensor | None:
    """The backbone's own table, None without a file. Raises TrainingError for a wrong shape or type, or a NaN."""
    if not path.exists():
        return None
    tensors = read_state_dict(path, "the backbone's own table")
    reference = tensors.get("reference")
    if (
        reference is None
        or reference.dim() != 3
        or reference.shape[0] < 2
        or reference.shape[1] < 1
        or reference.shape[-1] != dim
    ):
        found = "none" if reference is None else list(reference.shape)
        raise TrainingError(
            f"{path}: expected a tensor 'reference' of shape [classes + 1, tokens, {dim}], found {found}"
        )
    if len(tensors) > 1:
        raise TrainingError(f"{path}: expected the tensor 'reference' alone, found {', '.join(sorted(tensors))}")
    if reference.dtype not in FLOATS:
        raise TrainingError(f"{path}: reference is {reference.dtype}, expected float32, float16 or bfloat16")
    check_all_finite(tensors, path)
    return reference.float()


def _load_compvis(path: Path, config: Path, ema: str | None) -> Backbone:
    read = read_compvis(path, config, ema)
    context_dim = unet_context_dim(read.unet, path)
    reference = read.reference
    if reference is not None:
        if reference.shape[-1] != context_dim or len(reference) < 2:
            raise TrainingError(
                f"{path}: cond_stage_model.embedding.weight {list(reference[:, 0].shape)}: expected [classes + 1, "
                f"{context_dim}]"
            )
        check_all_finite({"cond_stage_model.embedding.weight": reference}, path)
    channels = int(cast(Any, read.unet.config).in_channels)
    shape = (channels, read.size, read.size)
    return Backbone(
        ContextUNet(read.unet),
        Autoencoder(read.autoencoder),
        read.schedule,
        shape,
        context_dim,
        read.scale,
        0.0,
        reference,
    )


@torch.no_grad()
def _try_out(backbone: Backbone, path: Path) -> None:
    """One pass of each network, so that what cannot run fails here and not after hours of training."""
    latent = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    tokens = 1 if backbone.reference is None else backbone.reference.shape[1]
    context, timestep = (
        torch.zeros(1, tokens, backbone.context_dim),
        backbone.schedule.times(torch.tensor([backbone.schedule.train_timesteps - 1])),
    )
    prediction = _passed(lambda: backbone.denoiser(latent, timestep, context), path, "the denoiser", latent.shape)
    image = _passed(lambda: backbone.autoencoder(latent), path, "the decoder", None)
    if image.shape[1] not in (1, 3) or image.shape[2] != image.shape[3]:
        raise TrainingError(
            f"{path}: the decoder makes images of shape {list(image.shape[1:])}, expected squares of 1 or 3 channels"
        )
    _passed(lambda: backbone.autoencoder.encode(image), path, "the encoder", prediction.shape)


def _passed(run: Callable[[], Tensor], path: Path, part: str, shape: torch.Size | None) -> Tensor:
    try:
        found = run()
    except Exception as err:  # whatever torch runs into in a network that was built from another's configuration
        raise TrainingError(f"{path}: {part} cannot run: {shorten(str(err))}") from err
    if shape is not None and found.shape != shape:
        raise TrainingError(
            f"{path}: {part} gives {list(found.shape)}, expected {list(shape)} (sample_size, in_channels and the "
            "autoencoder's levels)"
        )
    if not bool(torch.isfinite(found).all()):
        raise TrainingError(f"{path}: {part} gives values that are not finite")
    return found
