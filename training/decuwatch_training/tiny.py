"""Write a small ensemble with random weights, for tests of readers of the format: real graphs, meaningless images."""

import argparse
from pathlib import Path

import torch

from decuwatch_training.backbone import Autoencoder, Backbone, ContextUNet
from decuwatch_training.branch import DEFAULT_PROFILE
from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.export import ENSEMBLE_FILES, export_ensemble
from decuwatch_training.files import check_replaceable
from decuwatch_training.pretrain import PretrainSettings, build_autoencoder, build_unet
from decuwatch_training.train import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train tiny``."""
    parser.add_argument("--out", type=Path, required=True, help="the ensemble's directory")
    parser.add_argument("--name", default="tiny", help="the model's name in events")
    parser.add_argument("--context-tokens", type=int, default=1, help="tokens of a class embedding")
    parser.add_argument("--components", type=int, default=3, help="M")
    parser.add_argument("--classes", type=int, default=4, help="K")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the graphs' weights")
    parser.add_argument("--seed", type=int, default=1, help="of the weights")


def run(arguments: argparse.Namespace) -> None:
    """Write the ensemble and check it."""
    check_replaceable(arguments.out, ENSEMBLE_FILES)
    backbone = tiny_backbone(arguments.classes, arguments.context_tokens, arguments.seed)
    trained = tiny_run(backbone, arguments.components, arguments.seed)
    profile = DEFAULT_PROFILE | {
        "steps": 10,
        "request_risk": {"branch_step": 5, "rollout_steps": 2, "estimator": "mean-w2"},
        "reason": "random weights: any profile will do",
    }
    export_ensemble(
        backbone,
        trained,
        arguments.out,
        arguments.name,
        arguments.precision,
        "torch-cpu",
        profile,
        20,
        {"source": "random weights"},
        golden=True,
    )
    print(f"{arguments.out}: {sum(entry.stat().st_size for entry in arguments.out.iterdir()) / 1000:.0f} kB")


def tiny_backbone(classes: int, tokens: int, seed: int) -> Backbone:
    """Latents 2x4x4, images 1x8x8, D = 8, random weights."""
    torch.manual_seed(seed)
    settings = PretrainSettings(
        channels=(8, 8), autoencoder_channels=(8, 8), latent_channels=2, context_tokens=tokens, context_dim=8
    )
    unet = build_unet((2, 4, 4), settings)
    autoencoder = Autoencoder(build_autoencoder((1, 8, 8), settings))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name:  # so that contexts matter as much as they do in a trained backbone
                parameter.mul_(4.0)
    reference = torch.randn(classes + 1, tokens, 8)
    return Backbone(ContextUNet(unet), autoencoder, NoiseSchedule(), (2, 4, 4), 8, 1.5, 0.25, reference).freeze()


def tiny_run(backbone: Backbone, components: int, seed: int) -> Run:
    """Tables whose components part by as much as a class is rare: 1, 10, 100, 1000 images in turn."""
    assert backbone.reference is not None
    rows = len(backbone.reference)
    counts = torch.tensor([10 ** (index % 4) for index in range(rows - 1)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, components, *backbone.reference.shape, generator=generator)
    width = torch.cat([counts.float(), counts.max()[None].float()]).rsqrt()[None, None, :, None, None]
    record = {
        "settings": {"regime": "exposure", "seed": seed},
        "backbone_sha256": backbone.digest(),
        "data": "none",
        "training": {},
        "diagnostics": [[{"class": index, "images": [int(count)] * components} for index, count in enumerate(counts)]],
        "findings": [],
    }
    labels = tuple(f"class-{index}" for index in range(rows - 1))
    images = counts.expand(1, components, -1).contiguous()
    return Run(backbone.reference + width * noise, images, labels, record, Path())
