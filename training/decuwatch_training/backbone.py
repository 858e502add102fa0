"""The frozen backbone in the field's formats: a denoiser that is conditioned on a context, an autoencoder, a schedule.

Read from a diffusers directory (``unet/`` or ``transformer/``, ``vae/`` or ``vqvae/``, ``scheduler/``) or from a CompVis
latent-diffusion checkpoint with its YAML configuration. Nothing is ever unpickled: ``.ckpt`` files go through torch's
``weights_only`` reader.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, create_unet_diffusers_config_from_ldm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json

REFERENCE_FILE = "class_embeddings.safetensors"


class ContextUNet(nn.Module):
    """A UNet2DConditionModel as (latent [N,C,H,W], timestep [N], context [N,T,D]) -> prediction [N,C,H,W]."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, self.unet(latent, timestep, encoder_hidden_states=context, return_dict=False)[0])


class GivenEmbedding(nn.Module):
    """Stands where a DiT looks a class label up, and hands on the embedding that came in the label's place."""

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
    """Images in [-1, 1] to unscaled latents and back; the mean where the encoder gives a distribution."""

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
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]
    context_dim: int
    scale: float
    shift: float
    reference: Tensor | None = None
    """[K + 1, T, D]: the backbone's own fully trained table, the last row unconditional; None where it has none."""

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
        return torch.cat([self.autoencoder((part / self.scale + self.shift).to(device)).cpu() for part in latents.split(batch)])

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


def load_backbone(path: Path, config: Path | None = None) -> Backbone:
    """Read a frozen backbone from a diffusers directory, or from a CompVis ``.ckpt``/``.safetensors`` with ``config``.

    Raises TrainingError that names the file and what was expected of it.
    """
    if path.is_dir():
        return _load_diffusers(path).freeze()
    if not path.exists():
        raise TrainingError(f"{path}: no such backbone; expected a diffusers directory or a CompVis checkpoint")
    if config is None:
        raise TrainingError(f"{path}: a CompVis checkpoint needs its YAML configuration (--backbone-config)")
    return load_compvis(path, config).freeze()


def _load_diffusers(path: Path) -> Backbone:
    denoiser: ContextUNet | ContextDiT
    context_dim: int
    reference: Tensor | None
    if (path / "unet" / "config.json").exists():
        unet = _from_pretrained(UNet2DConditionModel, path / "unet")
        denoiser, context_dim = ContextUNet(unet), unet_context_dim(unet, path / "unet")
        model: Any = unet
    elif (path / "transformer" / "config.json").exists():
        model = _from_pretrained(DiTTransformer2DModel, path / "transformer")
        context_dim = model.config.num_attention_heads * model.config.attention_head_dim
        reference = dit_reference(model)
        denoiser = ContextDiT(model)
    else:
        raise TrainingError(f"{path}: expected unet/config.json (UNet2DConditionModel) or transformer/config.json (DiTTransformer2DModel)")
    autoencoder, scale, shift = _load_autoencoder(path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    schedule = NoiseSchedule.from_diffusers(read_json(scheduler))
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(denoiser, ContextUNet) or (path / REFERENCE_FILE).exists():
        reference = _read_reference(path / REFERENCE_FILE, context_dim)
    return Backbone(denoiser, autoencoder, schedule, (model.config.in_channels, height, width), context_dim, scale, shift, reference)


def _from_pretrained(kind: Any, path: Path) -> Any:
    try:
        return kind.from_pretrained(str(path), local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as err:
        raise TrainingError(f"{path}: expected weights of a {kind.__name__} that fit its config.json: {err}") from err


def _load_autoencoder(path: Path) -> tuple[Autoencoder, float, float]:
    for folder in ("vae", "vqvae", "movq"):
        config_file = path / folder / "config.json"
        if config_file.exists():
            config = read_json(config_file)
            kinds = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
            kind = kinds.get(config.get("_class_name", ""))
            if kind is None:
                raise TrainingError(f"{config_file}: _class_name {config.get('_class_name')!r}: expected AutoencoderKL or VQModel")
            model = _from_pretrained(kind, path / folder)
            return Autoencoder(model), float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    raise TrainingError(f"{path}: expected vae/config.json (AutoencoderKL) or vqvae/config.json (VQModel)")


def unet_context_dim(unet: UNet2DConditionModel, where: Path) -> int:
    """D of the U-Net's context. Raises TrainingError for one whose blocks differ or that takes none."""
    dim = cast(Any, unet.config).cross_attention_dim
    if not isinstance(dim, int) or not any("attn2.to_k" in name for name, _ in unet.named_parameters()):
        raise TrainingError(f"{where}: expected a U-Net with cross-attention of one width, found cross_attention_dim {dim!r}")
    return dim


def dit_reference(dit: DiTTransformer2DModel) -> Tensor:
    """The DiT's own label table [K + 1, 1, D] (its last row is the unconditional class), read before it is replaced.

    Raises TrainingError where the blocks' tables differ: one context could not stand for them all.
    """
    tables = [cast(Tensor, cast(Any, block).norm1.emb.class_embedder.embedding_table.weight) for block in dit.transformer_blocks]
    if any(not torch.equal(tables[0], table) for table in tables[1:]):
        raise TrainingError("transformer: every block has a label table of its own, expected one that they share")
    return tables[0].detach().clone()[:, None]


def _read_reference(path: Path, dim: int) -> Tensor | None:
    if not path.exists():
        return None
    reference = load_file(path).get("reference")
    if reference is None or reference.dim() != 3 or reference.shape[-1] != dim:
        raise TrainingError(f"{path}: expected a tensor 'reference' of shape [classes + 1, tokens, {dim}]")
    return reference


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.ckpt`` file; the latter is read with torch's weights-only unpickler."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as err:
            raise TrainingError(f"{path}: not a safetensors file: {err}") from err
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # torch raises UnpicklingError, RuntimeError, EOFError and others for a broken file
        raise TrainingError(f"{path}: expected a checkpoint that holds tensors only (it is never unpickled freely): {err}") from err
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state:
        raise TrainingError(f"{path}: expected a dictionary of tensors, or one under 'state_dict'")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def load_compvis(path: Path, config: Path) -> Backbone:
    """A latent-diffusion checkpoint (Rombach et al. 2022), for example cin256-v2 with its configuration file."""
    try:
        parameters = yaml.safe_load(config.read_text())["model"]["params"]
        parameters["unet_config"]["params"].setdefault("transformer_depth", 1)
        first_stage = parameters["first_stage_config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as err:
        raise TrainingError(f"{config}: expected a latent-diffusion configuration with model.params.unet_config and first_stage_config: {err!r}") from err
    state = read_state_dict(path)
    latent_size = int(parameters["image_size"])
    unet = build_compvis_unet(parameters)
    _load_exactly(unet, convert_ldm_unet_checkpoint(dict(state), unet.config), path, "U-Net")
    model = build_compvis_autoencoder(first_stage)
    prefix = "first_stage_model."
    inner = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    converted = convert_ldm_vae_checkpoint(inner, model.config)
    if isinstance(model, VQModel):
        converted["quantize.embedding.weight"] = inner.get(f"{prefix}quantize.embedding.weight")
    _load_exactly(model, converted, path, "first stage")
    scale = float(state["scale_factor"]) if "scale_factor" in state else float(parameters.get("scale_factor", 1.0))
    schedule = NoiseSchedule(
        train_timesteps=int(parameters.get("timesteps", 1000)),
        beta_schedule="scaled_linear",
        beta_start=float(parameters.get("linear_start", 1e-4)),
        beta_end=float(parameters.get("linear_end", 2e-2)),
        prediction={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[str(parameters.get("parameterization", "eps"))],
    )
    own = state.get("cond_stage_model.embedding.weight")
    reference = None if own is None else own.detach().float().clone()[:, None]
    context_dim = unet_context_dim(unet, path)
    channels = int(cast(Any, unet.config).in_channels)
    return Backbone(ContextUNet(unet), Autoencoder(model), schedule, (channels, latent_size, latent_size), context_dim, scale, 0.0, reference)


def build_compvis_unet(parameters: Mapping[str, Any]) -> UNet2DConditionModel:
    """The U-Net that a latent-diffusion configuration describes, with random weights."""
    settings = dict(parameters["unet_config"]["params"])
    settings.setdefault("transformer_depth", 1)
    settings.setdefault("context_dim", None)
    size = int(parameters["image_size"])
    down_sampling = 2 ** (len(parameters["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
    whole = {"model": {"params": {**parameters, "unet_config": {"params": settings}}}}
    built = create_unet_diffusers_config_from_ldm(whole, {}, image_size=size * down_sampling)
    built["sample_size"] = size
    return UNet2DConditionModel(**built)


def build_compvis_autoencoder(first_stage: Mapping[str, Any]) -> AutoencoderKL | VQModel:
    """The first stage that a latent-diffusion configuration describes, with random weights: VQ or KL by its target's name."""
    settings = first_stage["params"]
    inner = settings["ddconfig"]
    channels = [inner["ch"] * factor for factor in inner["ch_mult"]]
    if inner.get("attn_resolutions"):
        raise TrainingError(f"first_stage_config: attn_resolutions {inner['attn_resolutions']}: expected none (attention in the middle block only)")
    shared = {
        "in_channels": inner["in_channels"],
        "out_channels": inner["out_ch"],
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": tuple(channels),
        "layers_per_block": inner["num_res_blocks"],
        "latent_channels": inner["z_channels"],
        "sample_size": inner["resolution"],
    }
    if "VQ" in str(first_stage.get("target", "")):
        return VQModel(**shared, num_vq_embeddings=settings["n_embed"], vq_embed_dim=settings["embed_dim"])
    return AutoencoderKL(**shared)


def _load_exactly(model: nn.Module, weights: Mapping[str, Tensor | None], path: Path, part: str) -> None:
    """Load every weight, and refuse what is missing, left over or of another shape."""
    expected = model.state_dict()
    missing = [name for name in expected if weights.get(name) is None]
    extra = [name for name in weights if name not in expected]
    wrong = [
        f"{name} {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if tensor is not None and name in expected and tensor.shape != expected[name].shape
    ]
    for problem, names in (("lacks", missing), ("has besides", extra), ("has in another shape", wrong)):
        if names:
            raise TrainingError(f"{path}: the {part} {problem} {len(names)} tensors, the first: {names[0]}")
    model.load_state_dict(dict(weights))
