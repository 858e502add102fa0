"""Time the authors' way of computing a profile's scores in PyTorch: components one after another, one class at a time.

For each number of seconds that comes on a line of standard input, score requests for that time and print scores a
second, by the clock and by the process's CPU time. Cost does not depend on the weights: without --backbone the network
has random ones and the sizes that ``pretrain`` defaults to.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from decuwatch_training.backbone import ContextUNet, add_backbone_arguments, backbone_of
from decuwatch_training.diffusion import Denoiser, NoiseSchedule, Sampler, first_latent
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.paide import estimate
from decuwatch_training.paper import paper_backbone
from decuwatch_training.pretrain import PretrainSettings, build_unet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train bench``."""
    parser.add_argument("ensemble", type=Path, help="the ensemble's directory")
    add_backbone_arguments(parser, "the backbone that it was exported from", required=False)
    parser.add_argument("--seeds", type=int, default=1, help="requests of one class that share a batch")
    parser.add_argument("--paper", action="store_true", help="the network is the paper's, with random weights")
    parser.add_argument("--device", default="cpu", help="of the network: cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--threads", type=int, help="of PyTorch; defaults to its own choice")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """Print what is timed, then a rate for each line of standard input."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    manifest = read_manifest(arguments.ensemble / "ensemble.json")
    tables, _ = read_tables(arguments.ensemble, manifest)
    shape = tuple(manifest["latent"][side] for side in ("channels", "height", "width"))
    if arguments.backbone:
        network = backbone_of(arguments).denoiser
    elif arguments.paper:
        network = paper_backbone().denoiser
    else:
        settings = PretrainSettings(
            context_tokens=manifest["context"]["tokens"], context_dim=manifest["context"]["dim"]
        )
        network = ContextUNet(build_unet(shape, settings))
    network.eval().to(arguments.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {parameters} parameters", flush=True)
    called: Any = torch.compile(network) if arguments.compile else network

    def denoise(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, called(*(tensor.to(arguments.device) for tensor in (latent, timestep, context))).cpu())

    request = 0
    for line in sys.stdin:
        seconds, scored, began = float(line), 0, time.monotonic()
        spent = time.process_time()
        while time.monotonic() - began < seconds:
            seeds = range(request, request + arguments.seeds)
            _scores(denoise, manifest, tables, request % len(manifest["classes"]), list(seeds), shape)
            request += 1
            scored += arguments.seeds
        print(f"{scored / (time.monotonic() - began):.4f} {scored / (time.process_time() - spent):.4f}", flush=True)


def _scores(
    denoise: Denoiser, manifest: dict[str, Any], tables: Tensor, label: int, seeds: list[int], shape: tuple[int, ...]
) -> list[Tensor]:
    """Both measurements of requests of one class."""
    profile = manifest["profile"]
    sampler = Sampler(NoiseSchedule(**manifest["diffusion"]), profile["steps"], float(profile["guidance_scale"]))
    components = [
        (table[label].expand(len(seeds), *table.shape[1:]), table[-1].expand(len(seeds), *table.shape[1:]))
        for table in tables
    ]
    carrier = components[seeds[0] % len(components)]
    shared = torch.stack([first_latent(seed, shape) for seed in seeds])
    scores, done = [], 0
    for name in sorted(("class_gap", "request_risk"), key=lambda name: profile[name]["branch_step"]):
        branch, length = profile[name]["branch_step"], profile[name]["rollout_steps"]
        shared, done = sampler.roll(denoise, done, branch, shared, *carrier), branch
        means = torch.stack(
            [sampler.roll(denoise, branch, branch + length, shared, *component) for component in components], 1
        )
        scores.append(estimate(profile[name]["estimator"], means, 1.0))
    return scores
