"""Write the numbers that the Go sampler is held against, from PyTorch's generator and diffusers' DDIMScheduler.

Three files: one for the arithmetic alone (--arithmetic FILE: noise, timesteps, whole trajectories of a made-up network
in every convention, estimators of given means), one for the schedules at every step count (--sweeps FILE), and one for
an ensemble (golden.json in its directory: first latents, means of all components at a branch, distances, estimators,
final latents), which ``export`` writes as well.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor

from decuwatch_training.backbone import add_backbone_arguments, backbone_of
from decuwatch_training.diffusion import Denoiser, NoiseSchedule, predict_guided
from decuwatch_training.files import sha256_file, write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.paide import ESTIMATORS, estimate, squared_distances
from decuwatch_training.sweeps import sweeps

FILE = "golden.json"

CASES: list[dict[str, Any]] = [
    {"class": 0, "seed": 0, "steps": 20, "guidance_scale": 2.0, "eta": 0.0, "branch_step": 0, "rollout_steps": 1},
    {"class": 1, "seed": 42, "steps": 20, "guidance_scale": 2.0, "eta": 0.0, "branch_step": 10, "rollout_steps": 1},
    {
        "class": 2,
        "seed": 2**64 - 1,
        "steps": 20,
        "guidance_scale": 2.0,
        "eta": 0.0,
        "branch_step": 19,
        "rollout_steps": 1,
    },
    {
        "class": 3,
        "seed": 2**32 + 7,
        "steps": 7,
        "guidance_scale": 5.0,
        "eta": 0.0,
        "branch_step": 2,
        "rollout_steps": 5,
    },
    {"class": 0, "seed": 12345, "steps": 10, "guidance_scale": 1.0, "eta": 0.0, "branch_step": 5, "rollout_steps": 3},
    {"class": 2, "seed": 99, "steps": 12, "guidance_scale": 3.5, "eta": 0.6, "branch_step": 4, "rollout_steps": 2},
]
"""One case a way through the sampler: every branch, guidance on and off, long and short seeds, eta > 0 with its noise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train golden``."""
    parser.add_argument(
        "ensembles", type=Path, nargs="*", help="directories of ensembles, each of which gets a golden.json"
    )
    add_backbone_arguments(
        parser, "run the network in PyTorch, not the exported graph in ONNX Runtime, from this backbone", required=False
    )
    parser.add_argument("--arithmetic", type=Path, help="also write the file of the arithmetic alone")
    parser.add_argument(
        "--sweeps", type=Path, help="also write the file of the schedules at every step count; takes minutes"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the files and print their names."""
    if arguments.arithmetic:
        _write(arguments.arithmetic, arithmetic())
        print(arguments.arithmetic)
    if arguments.sweeps:
        _write(arguments.sweeps, sweeps())
        print(arguments.sweeps)
    for directory in arguments.ensembles:
        if arguments.backbone:
            denoise, network = cast(Denoiser, backbone_of(arguments).denoiser), "PyTorch"
        else:
            manifest = read_manifest(directory / "ensemble.json")
            graph = Graph(directory / manifest["files"]["unet"]["path"], manifest["graph"]["unet"])
            denoise, network = cast(Denoiser, graph), "ONNX Runtime"
        write_golden(directory, denoise, network)
        print(directory / FILE)


def carrier(key: str, components: int) -> int:
    """The component that carries the shared path: the first eight bytes of the key's SHA-256, big-endian, modulo M."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % components


@torch.no_grad()
def write_golden(directory: Path, denoise: Denoiser, network: str) -> None:
    """Write golden.json of the directory's ``ensemble.json``; ``network`` says what computed the predictions."""
    manifest = read_manifest(directory / "ensemble.json")
    tables, _ = read_tables(directory, manifest)
    schedule = NoiseSchedule(**manifest["diffusion"])
    shape = tuple(manifest["latent"][side] for side in ("channels", "height", "width"))
    document = {
        "manifest_sha256": sha256_file(directory / "ensemble.json"),
        "reference": f"torch {torch.__version__}, diffusers {diffusers.__version__}, network in {network}",
        "cases": [
            _case(case | {"class": case["class"] % len(manifest["classes"])}, denoise, tables, schedule, shape)
            for case in CASES
            if case["steps"] <= schedule.train_timesteps
        ],
    }
    _write(directory / FILE, document)


def _case(
    case: dict[str, Any], denoise: Denoiser, tables: Tensor, schedule: NoiseSchedule, shape: tuple[int, ...]
) -> dict[str, Any]:
    key = f"golden\n{case['seed']}"
    chosen = carrier(key, len(tables))
    generator = torch.Generator().manual_seed(case["seed"])
    first = torch.randn(shape, generator=generator)
    noise = [
        torch.randn(shape, generator=generator) if case["eta"] > 0 else torch.zeros(shape)
        for _ in range(schedule.step_count(case["steps"]))
    ]
    scheduler = schedule.scheduler(case["steps"])

    def step(index: int, latent: Tensor, components: list[int]) -> tuple[Tensor, Tensor]:
        """Means of the step and the latents after its noise, one row a component."""
        timestep = int(scheduler.timesteps[index])
        prediction = predict_guided(
            denoise, latent, timestep, tables[components, case["class"]], tables[components, -1], case["guidance_scale"]
        )
        both = [
            scheduler.step(
                cast(Any, prediction),
                timestep,
                cast(Any, latent),
                eta=case["eta"],
                variance_noise=cast(Any, added),
                return_dict=False,
            )[0]
            for added in (torch.zeros_like(latent), noise[index].expand_as(latent))
        ]
        return both[0], both[1]

    shared = first.unsqueeze(0)
    for index in range(case["branch_step"]):
        shared = step(index, shared, [chosen])[1]
    every = shared.expand(len(tables), *shape)
    for index in range(case["branch_step"], case["branch_step"] + case["rollout_steps"]):
        means, every = step(index, every, list(range(len(tables))))
    final = first.unsqueeze(0)
    for index in range(schedule.step_count(case["steps"])):
        mean, final = step(index, final, [chosen])
    last = case["branch_step"] + case["rollout_steps"] - 1
    timestep = int(scheduler.timesteps[last])
    variance = float(scheduler._get_variance(timestep, timestep - schedule.train_timesteps // case["steps"]))
    if case["eta"] > 0:
        variance *= case["eta"] ** 2
    return case | {
        "key": key,
        "carrier": chosen,
        "first": _numbers(first),
        "means": [_numbers(mean, digits=9) for mean in means],
        "distances": squared_distances(means.flatten(1)).tolist(),
        "values": {name: float(estimate(name, means.unsqueeze(0), variance)) for name in ESTIMATORS},
        "final": _numbers(mean),
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    """One line a case: the files are committed."""

    def text(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"

    content = "{\n" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in document.items()) + "\n}\n"
    write_file(path, lambda aside: aside.write_text(content, encoding="utf-8"))


def _numbers(tensor: Tensor, digits: int = 7) -> list[float]:
    """Seven significant digits are float32 to a unit in the last place or so; nine are float32 exactly."""
    return [float(f"{value:.{digits}g}") for value in tensor.flatten().tolist()]


def arithmetic() -> dict[str, Any]:
    """Noise, timesteps, trajectories and estimators that need no ensemble."""
    return {
        "reference": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "torch_cpu": _torch_cpu(),
        "trajectories": _trajectories(),
        "estimators": _estimators(),
    }


def _torch_cpu() -> list[dict[str, Any]]:
    """Two draws of one generator: the first and the last numbers of each, and their sum."""
    seeds = [0, 1, 42, 67280421310721, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63, 2**64 - 1]
    sizes = [1, 2, 7, 15, 16, 17, 31, 32, 33, 256, 1000, 16384]
    cases = []
    for seed, size in [*itertools.product(seeds, sizes), *((seed, 256) for seed in range(100, 164))]:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(size, generator=generator) for _ in range(2)]
        cases.append(
            {
                "seed": str(seed),
                "size": size,
                "draws": [
                    {"first": _numbers(draw[:3]), "last": _numbers(draw[-3:]), "sum": float(draw.double().sum())}
                    for draw in draws
                ],
            }
        )
    return cases


def made_up_network(latent: Tensor, timestep: int) -> Tensor:
    """A prediction that any language can compute: 0.3 x + sin(t / 50 + element)."""
    return 0.3 * latent + torch.sin(timestep / 50 + torch.arange(latent.numel(), dtype=torch.float64))


def _trajectories() -> list[dict[str, Any]]:
    """Whole DDIM trajectories in double precision of four elements; eta > 0 adds noise cos(step + element)."""
    cases = []
    elements = torch.arange(4, dtype=torch.float64)
    for betas, spacing, prediction, steps, eta in itertools.product(
        ("scaled_linear", "linear", "squaredcos_cap_v2"),
        ("leading", "trailing", "linspace"),
        ("epsilon", "v_prediction", "sample"),
        (1, 7, 20, 50),
        (0.0, 0.4, 1.0),
    ):
        if steps == 1 and eta > 0:
            continue  # the reference takes the root of a rounding error below zero there
        to_one = steps == 7
        schedule = NoiseSchedule(
            beta_schedule=betas,
            timestep_spacing=spacing,
            prediction=prediction,
            steps_offset=1 if spacing == "leading" else 0,
            set_alpha_to_one=to_one,
        )
        scheduler = schedule.scheduler(steps)
        latent = 1.0 - 0.5 * elements
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            output = made_up_network(latent, timestep)
            noise = torch.cos(index + elements)
            latent = scheduler.step(
                cast(Any, output),
                timestep,
                cast(Any, latent),
                eta=eta,
                variance_noise=cast(Any, noise),
                return_dict=False,
            )[0]
        cases.append(
            {
                "beta_schedule": betas,
                "timestep_spacing": spacing,
                "prediction": prediction,
                "steps": steps,
                "eta": eta,
                "steps_offset": schedule.steps_offset,
                "set_alpha_to_one": to_one,
                "timesteps": scheduler.timesteps.tolist()
                if prediction == "epsilon" and eta == 0 and betas == "linear"
                else None,
                "final": latent.tolist(),
            }
        )
    return cases


def _estimators() -> list[dict[str, Any]]:
    """Every estimator of given means [M, C, H, W], from far below saturation to beyond it."""
    cases = []
    for index, (components, scale) in enumerate(itertools.product((2, 3, 5, 10), (1e-3, 0.03, 0.2, 1.0, 30.0))):
        means = (scale * torch.randn(components, 3, 2, 2, generator=torch.Generator().manual_seed(index))).float()
        means = torch.tensor([_numbers(mean) for mean in means]).view_as(means)
        sigma = 0.25
        cases.append(
            {
                "sigma": sigma,
                "means": [_numbers(mean) for mean in means],
                "values": {name: float(estimate(name, means.unsqueeze(0), sigma**2)) for name in ESTIMATORS},
            }
        )
    return cases
