"""Write an ensemble of the paper's size with random weights, to measure speed: cost does not depend on the weights.

The backbone of Berry, Brando and Meger (2024): latent diffusion on ImageNet at 256x256 (Rombach et al. 2022,
cin256-v2), VQ-f4 latents 3x64x64, a U-Net of 400.9 M parameters, 1000 classes, 5 components.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decuwatch_training.backbone import (
    Autoencoder,
    Backbone,
    ContextUNet,
    build_compvis_autoencoder,
    build_compvis_unet,
)
from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.export import export_ensemble
from decuwatch_training.loop import pick_device
from decuwatch_training.profile import FORMAT_1_PROFILE
from decuwatch_training.tiny import tiny_run

CONTEXT_DIM = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train paper``."""
    parser.add_argument("--out", type=Path, required=True, help="the ensemble's directory")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp16", help="of the graphs' weights")
    parser.add_argument("--channels", type=int, default=192, help="width of the U-Net; the paper's is 192")
    parser.add_argument("--classes", type=int, default=1000, help="K")
    parser.add_argument(
        "--golden", action="store_true", help="add golden.json, the numbers that the Go sampler is held against"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the ensemble; its golden.json, not this export, holds its graphs against PyTorch."""
    backbone = paper_backbone(arguments.channels, arguments.classes).to(pick_device())
    trained = tiny_run(backbone, 5, 1)
    profile = FORMAT_1_PROFILE | {"reason": "random weights: any profile will do"}
    export_ensemble(
        backbone,
        trained,
        arguments.out,
        "paper-size",
        arguments.precision,
        "torch-cuda",
        profile,
        0,
        {"source": "random weights"},
        golden=arguments.golden,
        checked=False,
    )
    print(f"{arguments.out}: {backbone.parameter_count() / 1e6:.1f} M parameters")


def paper_configuration(channels: int = 192) -> dict[str, Any]:
    """The parts of cin256-v2's configuration that say its shape."""
    return {
        "image_size": 64,
        "channels": 3,
        "unet_config": {
            "params": {
                "image_size": 64,
                "in_channels": 3,
                "out_channels": 3,
                "model_channels": channels,
                "attention_resolutions": [8, 4, 2],
                "num_res_blocks": 2,
                "channel_mult": [1, 2, 3, 5],
                "num_heads": 1,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": CONTEXT_DIM,
            }
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.VQModelInterface",
            "params": {
                "embed_dim": 3,
                "n_embed": 8192,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": 3,
                    "resolution": 256,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 128,
                    "ch_mult": [1, 2, 4],
                    "num_res_blocks": 2,
                    "attn_resolutions": [],
                },
            },
        },
    }


def paper_backbone(channels: int = 192, classes: int = 1000) -> Backbone:
    """The backbone with random weights."""
    torch.manual_seed(1)
    configuration = paper_configuration(channels)
    unet = build_compvis_unet(configuration)
    for name, parameter in unet.named_parameters():
        if "norm" in name:  # scales of 1 and shifts of 0 would be left out of the graph, with their cost
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    autoencoder = build_compvis_autoencoder(configuration["first_stage_config"])
    reference = torch.randn(classes + 1, 1, CONTEXT_DIM)
    return Backbone(
        ContextUNet(unet), Autoencoder(autoencoder), NoiseSchedule(), (3, 64, 64), CONTEXT_DIM, 1.0, 0.0, reference
    ).freeze()
