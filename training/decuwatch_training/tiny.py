"""Write a small ensemble with random weights, for tests of readers of the format: real graphs, meaningless images."""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from decuwatch_training.backbone import Autoencoder, Backbone, ContextDiT, ContextUNet
from decuwatch_training.conditioned import add_conditioning
from decuwatch_training.diffusion import FlowSchedule, NoiseSchedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import ENSEMBLE_FILES, Verdicts, export_ensemble
from decuwatch_training.files import check_replaceable
from decuwatch_training.graphs import export_classifier
from decuwatch_training.posterior import Laplace, posterior_tables
from decuwatch_training.pretrain import PretrainSettings, build_autoencoder, build_unet
from decuwatch_training.profile import DEFAULT_PROFILE, FORMAT_1_PROFILE
from decuwatch_training.train import Run

OLDER_PROFILE = FORMAT_1_PROFILE | {
    "steps": 10,
    "request_risk": {"branch_step": 5, "rollout_steps": 2, "estimator": "mean-w2"},
    "reason": "random weights: any profile will do",
}
PROFILE = DEFAULT_PROFILE | {
    "request_risk": DEFAULT_PROFILE["request_risk"] | {"steps": 3, "rollout_steps": 2},
    "image_risk": DEFAULT_PROFILE["image_risk"] | {"steps": 4, "rollout_steps": 3},
    "reason": OLDER_PROFILE["reason"],
}
"""Not the recommended steps: three different trajectories test more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train tiny``."""
    parser.add_argument("--out", type=Path, required=True, help="the ensemble's directory")
    parser.add_argument("--name", default="tiny", help="the model's name in events")
    parser.add_argument("--context-tokens", type=int, default=1, help="tokens of a class embedding")
    parser.add_argument("--components", type=int, default=3, help="M")
    parser.add_argument("--classes", type=int, default=4, help="K")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the graphs' weights")
    parser.add_argument("--seed", type=int, default=1, help="of the weights")
    parser.add_argument("--flow", action="store_true", help="a transformer of flow matching, not a U-Net")
    parser.add_argument("--format", type=int, choices=(1, 2), default=2, help="of the manifest")
    parser.add_argument(
        "--conditioning", action="store_true", help="give the backbone further inputs, with rows in the tables"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the ensemble and check it."""
    if arguments.conditioning and (arguments.format == 1 or arguments.context_tokens != 1 or arguments.flow):
        raise TrainingError("--conditioning: needs --format 2 and --context-tokens 1, and no --flow")
    check_replaceable(arguments.out, ENSEMBLE_FILES)
    backbone = tiny_backbone(arguments.classes, arguments.context_tokens, arguments.seed)
    if arguments.flow:
        backbone = tiny_flow(backbone, arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        older = arguments.format == 1
        trained = tiny_run(backbone, arguments.components, arguments.seed)
        export_ensemble(
            backbone,
            trained if older else with_format_2(trained, arguments.seed),
            arguments.out,
            arguments.name,
            arguments.precision,
            "torch-cpu",
            OLDER_PROFILE if older else PROFILE,
            20,
            {"source": "random weights"},
            golden=True,
            judge=None if older else tiny_judge(arguments.classes, Path(scratch), arguments.seed),
        )
    if arguments.conditioning:
        add_conditioning(arguments.out, backbone, arguments.seed)
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


def tiny_flow(backbone: Backbone, seed: int) -> Backbone:
    """The backbone with a transformer for its U-Net, which predicts a velocity: 4 tokens of 2x2, 2 heads of 4."""
    assert backbone.reference is not None
    torch.manual_seed(seed)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=backbone.latent_shape[0],
        num_layers=1,
        sample_size=backbone.latent_shape[1],
        patch_size=2,
        num_embeds_ada_norm=len(backbone.reference) - 1,
        norm_num_groups=2,
    )
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():  # what begins at zero would make all contexts alike
                parameter.normal_(0, 0.3)
    schedule = FlowSchedule(shift=3.0, image_seq_len=4)
    return dataclasses.replace(backbone, denoiser=ContextDiT(dit), schedule=schedule).freeze()


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


def with_format_2(trained: Run, seed: int) -> Run:
    """The run with what only format 2 has: a producer, two more for evaluation, three posterior tables, class data.

    The last class has no data, as if no card had been made of it.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    counts = trained.images[0, 0]
    width = torch.cat([counts.float(), counts.max()[None].float()]).rsqrt()[:, None, None]
    members = trained.tables[0]
    producer, *producers = (
        members.mean(0) + width * torch.randn(members.shape[1:], generator=generator) for _ in range(3)
    )
    size = producer[0].numel()
    laplace = Laplace(torch.linspace(0.5, 2.0, size), None, temperature=1.0, variance=1.0)
    data = [
        {
            "images": count,
            "distinct": count,
            "n_eff": round(count**0.5, 2),
            "near_duplicates": count // 2,
            "near_duplicate_groups": count // 10,
            "neighbor_label_share": 0.75 if count > 10 else None,
            "likely_mislabeled": count // 20,
            "outliers": count // 50,
        }
        for count in counts.tolist()
    ]
    return dataclasses.replace(
        trained,
        producer=producer[None],
        producers=torch.stack(producers)[None],
        posterior=posterior_tables(producer, laplace, counts, 3, seed)[None],
        draws=(20 * counts)[None],
        laplace=laplace,
        worth=counts[None],
        data=[[*data[:-1], {}]],
    )


def tiny_judge(classes: int, directory: Path, seed: int) -> Verdicts:
    """A random network that looks at images of 12 x 12; it knows class 1 not at all and class 2 badly."""
    torch.manual_seed(seed + 2)
    outputs = [0, 2, -1, 3, *range(3, classes)][: classes + 1]
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 25, len(outputs)))
    with torch.no_grad():
        network[3].weight.mul_(4.0)  # type: ignore[operator]
    export_classifier(network, (1, 12, 12), directory / "judge.onnx")
    accuracy = [0.9 if label in outputs else None for label in range(classes)]
    accuracy[2] = 0.5
    fields = {
        "input": "image",
        "output": "logits",
        "channels": 1,
        "height": 12,
        "width": 12,
        "range": [0, 1],
        "resize": "bilinear",
        "outputs": outputs,
        "accuracy": accuracy,
        "held_out": [0 if share is None else 100 for share in accuracy],
        "least_accuracy": 0.6,
        "measured": "random weights: on nothing",
    }
    return Verdicts(directory / "judge.onnx", fields)
