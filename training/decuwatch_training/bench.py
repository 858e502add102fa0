"""Time the authors' way of computing a profile's scores in PyTorch: components one after another, one class at a time.

For each number of seconds that comes on a line of standard input, score requests for that time and print scores a
second, by the clock and by the process's CPU time. Cost does not depend on the weights: without --backbone the network
has random ones and the sizes that ``pretrain`` defaults to.

With --raw, time runs of the network alone instead. A line is then SECONDS MODE ROWS; the modes are eager, compile (by
torch.compile) and graphs (a captured CUDA graph of the eager network). The answer is rows a second.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from decuwatch_training.backbone import ContextUNet, add_backbone_arguments, backbone_of
from decuwatch_training.branch import Requests, shared_means
from decuwatch_training.diffusion import Denoiser, Sampler, first_latent, schedule_of
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.paide import estimate
from decuwatch_training.paper import paper_backbone
from decuwatch_training.pretrain import PretrainSettings, build_unet
from decuwatch_training.profile import measures_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train bench``."""
    parser.add_argument("ensemble", type=Path, help="the ensemble's directory")
    add_backbone_arguments(parser, "the backbone that it was exported from", required=False)
    parser.add_argument("--seeds", type=int, default=1, help="requests of one class that share a batch")
    parser.add_argument("--paper", action="store_true", help="the network is the paper's, with random weights")
    parser.add_argument("--device", default="cpu", help="of the network: cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--threads", type=int, help="of PyTorch; defaults to its own choice")
    parser.add_argument("--raw", action="store_true", help="time runs of the network alone")
    parser.add_argument("--channels", type=int, default=192, help="width of the paper's network")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the network, with --raw")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """Print what is timed, then a rate for each line of standard input."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    manifest = read_manifest(arguments.ensemble / "ensemble.json")
    sets = read_tables(arguments.ensemble, manifest).measured()
    shape = tuple(manifest["latent"][side] for side in ("channels", "height", "width"))
    if arguments.backbone:
        network = backbone_of(arguments).denoiser
    elif arguments.paper:
        network = paper_backbone(arguments.channels, len(manifest["classes"])).denoiser
    else:
        settings = PretrainSettings(
            context_tokens=manifest["context"]["tokens"], context_dim=manifest["context"]["dim"]
        )
        network = ContextUNet(build_unet(shape, settings))
    network.eval().to(arguments.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {parameters} parameters", flush=True)
    if arguments.raw:
        _answer_raw(Raw(network, arguments.device, arguments.precision, shape, manifest["context"]))
        return
    called: Any = torch.compile(network) if arguments.compile else network

    def denoise(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, called(*(tensor.to(arguments.device) for tensor in (latent, timestep, context))).cpu())

    request = 0
    for line in sys.stdin:
        seconds, scored, began = float(line), 0, time.monotonic()
        spent = time.process_time()
        while time.monotonic() - began < seconds:
            seeds = range(request, request + arguments.seeds)
            _scores(denoise, manifest, sets, request % len(manifest["classes"]), list(seeds), shape)
            request += 1
            scored += arguments.seeds
        print(f"{scored / (time.monotonic() - began):.4f} {scored / (time.process_time() - spent):.4f}", flush=True)


class Raw:
    """Runs of the network alone on random rows, channels last, from and to the host's memory as the sampler's are."""

    def __init__(
        self, network: nn.Module, device: str, precision: str, shape: tuple[int, ...], context: dict[str, int]
    ) -> None:
        """Take over the network."""
        torch.backends.cudnn.benchmark = True
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        moved: Any = network.to(dtype=self.dtype)
        self.network: Any = moved.to(memory_format=torch.channels_last)
        self.device, self.shape, self.context = device, shape, context
        self.runs: dict[tuple[str, int], Callable[[], Tensor]] = {}

    def run(self, mode: str, rows: int) -> Callable[[], Tensor]:
        """What runs that many rows in that mode, warm."""
        if (mode, rows) not in self.runs:
            self.runs[mode, rows] = self._warmed(mode, rows)
        return self.runs[mode, rows]

    def _warmed(self, mode: str, rows: int) -> Callable[[], Tensor]:
        host = [
            torch.randn(rows, *self.shape),
            torch.randint(1000, (rows,)),
            torch.randn(rows, self.context["tokens"], self.context["dim"]),
        ]
        called = torch.compile(self.network, dynamic=False) if mode == "compile" else self.network

        def moved(tensor: Tensor) -> Tensor:
            there = tensor.to(self.device)
            if there.dim() == 4:
                there = there.to(self.dtype, memory_format=torch.channels_last)
            return there.to(self.dtype) if there.is_floating_point() else there

        def once() -> Tensor:
            return cast(Tensor, called(*map(moved, host)).float().cpu())

        for _ in range(3):
            once()
        if mode != "graphs":
            return once
        inputs = [moved(tensor) for tensor in host]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = called(*inputs)

        def replay() -> Tensor:
            for there, tensor in zip(inputs, host, strict=True):
                there.copy_(tensor)
            graph.replay()
            return cast(Tensor, output.float().cpu())

        return replay


def _answer_raw(raw: Raw) -> None:
    for line in sys.stdin:
        seconds, mode, rows = line.split()
        run = raw.run(mode, int(rows))
        done, began, spent = 0, time.monotonic(), time.process_time()
        while time.monotonic() - began < float(seconds):
            run()
            done += int(rows)
        print(f"{done / (time.monotonic() - began):.4f} {done / (time.process_time() - spent):.4f}", flush=True)


def _scores(
    denoise: Denoiser,
    manifest: dict[str, Any],
    sets: dict[str, Tensor],
    label: int,
    seeds: list[int],
    shape: tuple[int, ...],
) -> list[Tensor]:
    """All measurements of requests of one class, table by table; an image is neither decoded nor judged."""
    profile, schedule = manifest["profile"], schedule_of(manifest["diffusion"])
    first = torch.stack([first_latent(seed, shape) for seed in seeds])
    requests = Requests(
        torch.full((len(seeds),), label), torch.tensor(seeds), torch.zeros(len(seeds), dtype=torch.int64)
    )
    scores, shared, done = [], first, 0
    measures = measures_of(profile)
    for name in sorted(measures, key=lambda name: measures[name].branch_step):
        measure = measures[name]
        sampler = Sampler(schedule, measure.steps, float(profile["guidance_scale"]))
        tables = sets[measure.tables]
        if measure.guidance == "shared":
            means = shared_means(denoise, sampler, tables, requests, first, measure.rollout_steps)
            scores.append(estimate(measure.estimator, means, 1.0))
            continue
        branch, length = measure.branch_step, measure.rollout_steps
        rows = [[row.expand(len(seeds), *row.shape) for row in (table[label], table[-1])] for table in tables]
        if branch:
            shared, done = sampler.roll(denoise, done, branch, shared, *rows[seeds[0] % len(rows)]), branch
        means = torch.stack([sampler.roll(denoise, branch, branch + length, shared, *each) for each in rows], 1)
        scores.append(means[:, 0] if name == "image_risk" else estimate(measure.estimator, means, 1.0))
    return scores
