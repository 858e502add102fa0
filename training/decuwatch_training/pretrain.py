"""Train an autoencoder and a class-conditional latent diffusion backbone, for those who have none.

Writes a diffusers directory (unet/, vae/, scheduler/) and class_embeddings.safetensors with the backbone's own fully
trained table. A run that was broken off goes on from its last checkpoint when the same command is given again.
"""

import argparse
import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from decuwatch_training.backbone import REFERENCE_FILE, Autoencoder, Backbone, ContextUNet
from decuwatch_training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from decuwatch_training.data import Images, add_data_arguments, read_data
from decuwatch_training.diffusion import FlowSchedule, NoiseSchedule, Schedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import check_replaceable, staged_directory, write_json
from decuwatch_training.loop import Clock, Progress, cosine_rate, mixed_precision, pick_device

BACKBONE_FILES = (
    "backbone.json",
    REFERENCE_FILE,
    "unet/config.json",
    "unet/diffusion_pytorch_model*",
    "vae/config.json",
    "vae/diffusion_pytorch_model*",
    "scheduler/scheduler_config.json",
)


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the backbone but the images."""

    autoencoder_steps: int = 940
    autoencoder_batch: int = 128
    autoencoder_rate: float = 2e-3
    autoencoder_channels: tuple[int, ...] = (16, 32, 48)
    latent_channels: int = 4
    steps: int = 4000
    batch: int = 96
    rate: float = 1.5e-3
    channels: tuple[int, ...] = (48, 64)
    context_tokens: int = 1
    context_dim: int = 64
    condition_dropout: float = 0.1
    average: float = 0.998
    seed: int = 1
    prediction: str = "epsilon"
    """What the U-Net learns: epsilon, the noise of DDIM's process, or flow, the velocity of flow matching."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train pretrain``."""
    defaults = PretrainSettings()
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the backbone's directory; checkpoints stand beside it")
    parser.add_argument("--size", type=int, default=32, help="height and width of images from folders, in pixels")
    parser.add_argument("--image-channels", type=int, default=3, choices=(1, 3), help="of images from folders")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=defaults.autoencoder_steps, help="steps of training the autoencoder"
    )
    parser.add_argument(
        "--autoencoder-channels",
        type=int,
        nargs="+",
        default=list(defaults.autoencoder_channels),
        help="one level of resolution each",
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps of training the U-Net")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="rows a step of training the U-Net")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="Adam's peak learning rate for the U-Net")
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=list(defaults.channels),
        help="the U-Net's channels at each level of resolution",
    )
    parser.add_argument(
        "--context-tokens", type=int, default=defaults.context_tokens, help="context tokens of a class embedding"
    )
    parser.add_argument("--context-dim", type=int, default=defaults.context_dim, help="width of a context token")
    parser.add_argument(
        "--prediction",
        choices=("epsilon", "flow"),
        default=defaults.prediction,
        help="what the U-Net learns: the noise of DDIM's process, or the velocity of flow matching",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of weights, order and noise")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")


def run(arguments: argparse.Namespace) -> None:
    """Train both networks and write the backbone's directory."""
    check_replaceable(arguments.out, BACKBONE_FILES)
    settings = PretrainSettings(
        autoencoder_steps=arguments.autoencoder_steps,
        autoencoder_channels=tuple(arguments.autoencoder_channels),
        steps=arguments.steps,
        batch=arguments.batch,
        rate=arguments.rate,
        channels=tuple(arguments.channels),
        context_tokens=arguments.context_tokens,
        context_dim=arguments.context_dim,
        seed=arguments.seed,
        prediction=arguments.prediction,
    )
    data = read_data(
        arguments.data,
        arguments.size,
        arguments.image_channels,
        listing=arguments.classes,
        background=arguments.background,
    )
    for line in data.describe():
        print(line, file=sys.stderr if line.startswith("WARNING") else sys.stdout)
    backbone, record = pretrain(data.train, data.held_out, settings, arguments.out, arguments.checkpoint_every)
    save_backbone(backbone, data.train.labels, record, arguments.out)
    print(
        f"{arguments.out}: {backbone.parameter_count():,} parameters, held-out image error "
        f"{record['autoencoder']['held_out_mse']:.4f}"
    )


def build_unet(latent_shape: tuple[int, int, int], settings: PretrainSettings) -> UNet2DConditionModel:
    """A small U-Net: no attention at the first resolution, self- and cross-attention everywhere else."""
    lower = len(settings.channels) - 1
    return UNet2DConditionModel(
        sample_size=cast(Any, latent_shape[1:]),
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        layers_per_block=1,
        block_out_channels=settings.channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        cross_attention_dim=settings.context_dim,
        attention_head_dim=4,
        norm_num_groups=16 if all(width % 16 == 0 for width in settings.channels) else 4,
    )


def build_autoencoder(shape: tuple[int, int, int], settings: PretrainSettings) -> AutoencoderKL:
    """A small KL autoencoder that halves the resolution once for every level but the first."""
    levels = len(settings.autoencoder_channels)
    return AutoencoderKL(
        in_channels=shape[0],
        out_channels=shape[0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.autoencoder_channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=8 if all(width % 8 == 0 for width in settings.autoencoder_channels) else 4,
        sample_size=shape[1],
    )


def pretrain(
    train: Images, held_out: Images, settings: PretrainSettings, out: Path, checkpoint_every: int
) -> tuple[Backbone, dict[str, Any]]:
    """Both stages, each resumed from its own checkpoint. Returns the backbone and the record for its provenance."""
    device = pick_device()
    beside = out.with_name(f"{out.name}.checkpoints")
    autoencoder, autoencoder_record = _train_autoencoder(
        train, held_out, settings, beside / f"autoencoder-{CHECKPOINT_FILE}", checkpoint_every, device
    )
    wrapped = Autoencoder(autoencoder).eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat(
            [wrapped.encode(train.scaled(index).to(device)).cpu() for index in torch.arange(len(train)).split(512)]
        )
    shift, scale = float(latents.mean()), 1.0 / float(latents.std())
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift)
    latents = (latents - shift) * scale
    flow = settings.prediction == "flow"
    sides = latents.shape[2] * latents.shape[3]
    schedule = FlowSchedule(image_seq_len=sides) if flow else NoiseSchedule()
    unet, table, record = _train_unet(
        latents, train, settings, schedule, beside / f"unet-{CHECKPOINT_FILE}", checkpoint_every, device
    )
    channels, height, width = latents.shape[1:]
    backbone = Backbone(
        ContextUNet(unet), wrapped, schedule, (channels, height, width), settings.context_dim, scale, shift, table
    ).freeze()
    record = {
        "data": train.source,
        "images": len(train),
        "settings": asdict(settings),
        "autoencoder": autoencoder_record,
        "unet": record,
    }
    return backbone, record


def _train_autoencoder(
    train: Images,
    held_out: Images,
    settings: PretrainSettings,
    checkpoint: Path,
    checkpoint_every: int,
    device: torch.device,
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """L2 + 0.5 L1 + 2e-4 KL to the standard normal; Adam with cosine decay."""
    torch.manual_seed(settings.seed)
    model = build_autoencoder(train.shape, settings).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.autoencoder_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    # The later stage's settings are no part of this one: they may change without training it anew.
    own = {
        name: str(value)
        for name, value in asdict(settings).items()
        if name.startswith(("autoencoder", "latent", "seed"))
    } | {"images": str(len(train))}
    first, clock = 0, Clock()
    if state := load_checkpoint(checkpoint, own):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        first, clock = state["step"], Clock(state["clock"]["wall_seconds"], state["clock"]["processor_seconds"])

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        save_checkpoint(checkpoint, {"settings": own, "step": step, "clock": clock.read(), **state})

    progress = Progress("autoencoder", first, settings.autoencoder_steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings.autoencoder_steps, settings.autoencoder_rate, warm_up=20)
        images = train.scaled(torch.randint(len(train), (settings.autoencoder_batch,), generator=generator)).to(device)
        with mixed_precision(device):
            posterior = cast(Any, model.encode(images)).latent_dist
            decoded = cast(Any, model.decode(posterior.sample())).sample
            difference = (decoded - images).float()
            loss = (
                difference.square().mean()
                + 0.5 * difference.abs().mean()
                + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.loss(loss.detach())
        if (step + 1) % checkpoint_every == 0:
            save(step + 1)
    if first < settings.autoencoder_steps:
        save(settings.autoencoder_steps)
    model.eval()
    wrapped = Autoencoder(model)
    with torch.no_grad():
        errors = [
            (wrapped(wrapped.encode(part)) - part).square().mean(dim=(1, 2, 3)).cpu()
            for part in (
                held_out.scaled(index).to(device) for index in torch.arange(min(len(held_out), 2000)).split(250)
            )
        ]
    return model, {"held_out_mse": float(torch.cat(errors).mean()), **clock.read()}


def _train_unet(
    latents: Tensor,
    train: Images,
    settings: PretrainSettings,
    schedule: Schedule,
    checkpoint: Path,
    checkpoint_every: int,
    device: torch.device,
) -> tuple[UNet2DConditionModel, Tensor, dict[str, Any]]:
    """Noise prediction, or velocity of a flow, with condition dropout; the weights' moving average is what is kept."""
    torch.manual_seed(settings.seed + 1)
    channels, height, width = latents.shape[1:]
    unet = build_unet((channels, height, width), settings)
    classes = len(train.labels)
    table = nn.Parameter(torch.randn(classes + 1, settings.context_tokens, settings.context_dim))
    module = nn.ParameterDict({"table": table})
    networks = nn.ModuleDict({"unet": unet, "table": module}).to(device)
    averaged = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.Adam(networks.parameters(), lr=settings.rate)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    own = {name: str(value) for name, value in asdict(settings).items()} | {"images": str(len(train))}
    first, clock = 0, Clock()
    if state := load_checkpoint(checkpoint, own):
        networks.load_state_dict(state["networks"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first, clock = state["step"], Clock(state["clock"]["wall_seconds"], state["clock"]["processor_seconds"])

    def save(step: int) -> None:
        state = {
            "networks": networks.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_checkpoint(
            checkpoint,
            {"settings": own, "step": step, "clock": clock.read(), "generator": generator.get_state(), **state},
        )

    progress = Progress("backbone", first, settings.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings.steps, settings.rate, warm_up=50)
        picked = torch.randint(len(train), (settings.batch,), generator=generator)
        clean = latents[picked]
        noise = torch.randn(clean.shape, generator=generator)
        timestep = schedule.times(torch.randint(schedule.train_timesteps, (settings.batch,), generator=generator))
        dropped = torch.rand(settings.batch, generator=generator) < settings.condition_dropout
        label = torch.where(dropped, classes, train.classes[picked]).to(device)
        noisy = schedule.noisy(clean, noise, timestep).to(device)
        with mixed_precision(device):
            prediction = unet(
                noisy, timestep.to(device), encoder_hidden_states=module["table"][label], return_dict=False
            )[0]
            loss = (prediction.float() - schedule.target(clean, noise, timestep).to(device)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(networks.parameters()), 1 - decay)
        progress.loss(loss.detach())
        if (step + 1) % checkpoint_every == 0:
            save(step + 1)
    if first < settings.steps:
        save(settings.steps)
    kept = cast(UNet2DConditionModel, averaged["unet"])
    reference = cast(nn.ParameterDict, averaged["table"])["table"].detach().cpu().clone()
    loss_now = progress.mean_loss if first < settings.steps else None
    return (
        kept,
        reference,
        {"training_loss": loss_now, "parameters": sum(p.numel() for p in kept.parameters()), **clock.read()},
    )


def save_backbone(backbone: Backbone, labels: tuple[str, ...], record: dict[str, Any], out: Path) -> None:
    """Write a diffusers directory that ``load_backbone`` and diffusers itself read back."""
    if not isinstance(backbone.denoiser, ContextUNet) or backbone.reference is None:
        raise TrainingError("a pretrained backbone has a U-Net and its own table")
    reference = backbone.reference
    with staged_directory(out, BACKBONE_FILES) as staged:
        backbone.denoiser.unet.save_pretrained(staged / "unet")
        backbone.autoencoder.model.save_pretrained(staged / "vae")
        backbone.schedule.scheduler().save_pretrained(staged / "scheduler")
        save_file({"reference": reference.contiguous()}, staged / REFERENCE_FILE)
        write_json(staged / "backbone.json", {"labels": list(labels), "provenance": record})
