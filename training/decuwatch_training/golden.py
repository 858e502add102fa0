"""Write the numbers that the Go sampler is held against, from PyTorch's generator and diffusers' DDIMScheduler.

Three files: one for the arithmetic alone (--arithmetic FILE: noise, timesteps, whole trajectories of a made-up network
in every convention, estimators of given means), one for the schedules at every step count (--sweeps FILE), and one for
an ensemble (golden.json in its directory: first latents, means of all components at a branch, distances, estimators,
final latents), which ``export`` writes as well.
"""

import argparse
import base64
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from torch import Tensor

from decuwatch_training.backbone import add_backbone_arguments, backbone_of
from decuwatch_training.branch import shared_row
from decuwatch_training.diffusion import (
    Denoiser,
    FlowSchedule,
    NoiseSchedule,
    Schedule,
    predict_guided,
    predict_shared,
    schedule_of,
)
from decuwatch_training.draws import draws
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import sha256_file, write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.imagerisk import TOP, Judge, image_risk
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.paide import ESTIMATORS, NEED_VARIANCE, estimate, squared_distances
from decuwatch_training.profile import FORMAT_1, settings_key
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
SETS: list[dict[str, Any]] = [
    {"class": 0, "seed": 3, "guidance_scale": 2.0, "eta": 0.0, "tables": "posterior", "steps": 3, "rollout_steps": 1},
    {"class": 1, "seed": 4, "guidance_scale": 2.0, "eta": 0.0, "tables": "members", "steps": 3, "rollout_steps": 2},
    {"class": 2, "seed": 5, "guidance_scale": 1.0, "eta": 0.0, "tables": "members", "steps": 7, "rollout_steps": 7},
    {"class": 3, "seed": 6, "guidance_scale": 3.5, "eta": 0.6, "tables": "members", "steps": 5, "rollout_steps": 3},
    {"class": 0, "seed": 7, "guidance_scale": 5.0, "eta": 0.6, "tables": "posterior", "steps": 4, "rollout_steps": 4},
]
"""Further cases of an ensemble of format 2: every set of tables with shared guidance."""
JUDGED: list[dict[str, Any]] = [
    {"seed": 11, "guidance_scale": 2.0, "eta": 0.0, "steps": 4, "rollout_steps": 3},
    {"seed": 12, "guidance_scale": 1.0, "eta": 0.0, "steps": 3, "rollout_steps": 1},
    {"seed": 13, "guidance_scale": 3.5, "eta": 0.6, "steps": 6, "rollout_steps": 6},
]
"""Ways of the producer's table, each for the first four classes, that a judge looks at."""


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
    parser.add_argument("--flow", type=Path, help="also write the file of flow matching")
    parser.add_argument("--draws", type=Path, help="also write the file of noise in batches and of rounding")


def run(arguments: argparse.Namespace) -> None:
    """Write the files and print their names."""
    if arguments.arithmetic:
        _write(arguments.arithmetic, arithmetic())
        print(arguments.arithmetic)
    if arguments.sweeps:
        _write(arguments.sweeps, sweeps())
        print(arguments.sweeps)
    if arguments.flow:
        _write(arguments.flow, flow())
        print(arguments.flow)
    if arguments.draws:
        _write(arguments.draws, draws())
        print(arguments.draws)
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
    sets = read_tables(directory, manifest)
    schedule = schedule_of(manifest["diffusion"])
    shape = tuple(manifest["latent"][side] for side in ("channels", "height", "width"))
    cases = [
        _case(case | {"class": case["class"] % len(manifest["classes"])}, denoise, sets.members, schedule, shape)
        for case in CASES
        if case["steps"] <= schedule.train_timesteps and _can_run(case, schedule)
    ]
    document: dict[str, Any] = {
        "manifest_sha256": sha256_file(directory / "ensemble.json"),
        "reference": f"torch {torch.__version__}, diffusers {diffusers.__version__}, network in {network}",
    }
    if manifest["format"] == FORMAT_1:
        _write(directory / FILE, document | {"cases": cases})
        return
    cases = [case | {"tables": "members", "guidance": "own"} for case in cases]
    tables = sets.measured()
    cases += [
        _shared_case(case | {"class": case["class"] % len(manifest["classes"])}, denoise, tables, schedule, shape)
        for case in SETS
        if case["tables"] in tables and _can_run(case, schedule)
    ]
    judged = _judged_cases(directory, manifest, denoise, tables["producer"][0]) if "judge" in manifest else []
    settings = settings_key(manifest["profile"], schedule.kind)
    _write(directory / FILE, document | {"settings": settings, "cases": cases, "judged": judged})


@dataclass(frozen=True)
class _Way:
    """One request's way through diffusers' scheduler, with the noise of eta > 0 from the request's own generator."""

    schedule: Schedule
    steps: int
    eta: float
    first: Tensor
    noise: list[Tensor]

    @classmethod
    def of(cls, case: Mapping[str, Any], schedule: Schedule, shape: tuple[int, ...]) -> "_Way":
        generator = torch.Generator().manual_seed(case["seed"])
        first = torch.randn(shape, generator=generator)
        noise = [
            torch.randn(shape, generator=generator) if case["eta"] > 0 else torch.zeros(shape)
            for _ in range(schedule.step_count(case["steps"]))
        ]
        return cls(schedule, case["steps"], case["eta"], first, noise)

    def timestep(self, index: int) -> float:
        return cast(float, self.schedule.scheduler(self.steps).timesteps[index].item())

    def step(self, index: int, latent: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means of the step, the latents after its noise, and the predicted x0, one row a table."""
        if isinstance(self.schedule, FlowSchedule):
            after, clean = self.schedule.ends(self.steps, index, prediction, latent)
            return after, after, clean
        scheduler = self.schedule.scheduler(self.steps)
        mean, after = (
            scheduler.step(
                cast(Any, prediction),
                int(self.timestep(index)),
                cast(Any, latent),
                eta=self.eta,
                variance_noise=cast(Any, added),
            )
            for added in (torch.zeros_like(latent), self.noise[index].expand_as(latent))
        )
        return mean.prev_sample, after.prev_sample, mean.pred_original_sample

    def variance(self, index: int) -> float:
        variance = self.schedule.variance(self.steps, index)
        return variance * self.eta**2 if self.eta > 0 else variance


def _can_run(case: Mapping[str, Any], schedule: Schedule) -> bool:
    """A flow has no noise to add."""
    return case["eta"] == 0 or not isinstance(schedule, FlowSchedule)


def _case(
    case: dict[str, Any], denoise: Denoiser, tables: Tensor, schedule: Schedule, shape: tuple[int, ...]
) -> dict[str, Any]:
    key = f"golden\n{case['seed']}"
    chosen = carrier(key, len(tables))
    way = _Way.of(case, schedule, shape)

    def step(index: int, latent: Tensor, components: list[int]) -> tuple[Tensor, Tensor]:
        prediction = predict_guided(
            denoise,
            latent,
            way.timestep(index),
            tables[components, case["class"]],
            tables[components, -1],
            case["guidance_scale"],
        )
        return way.step(index, latent, prediction)[:2]

    shared = way.first.unsqueeze(0)
    for index in range(case["branch_step"]):
        shared = step(index, shared, [chosen])[1]
    every = shared.expand(len(tables), *shape)
    for index in range(case["branch_step"], case["branch_step"] + case["rollout_steps"]):
        means, every = step(index, every, list(range(len(tables))))
    final = way.first.unsqueeze(0)
    for index in range(schedule.step_count(case["steps"])):
        mean, final = step(index, final, [chosen])
    spread = _spread(means, way.variance(case["branch_step"] + case["rollout_steps"] - 1))
    return case | {"key": key, "carrier": chosen, "first": _numbers(way.first)} | spread | {"final": _numbers(mean)}


def _shared_case(
    case: dict[str, Any],
    denoise: Denoiser,
    sets: Mapping[str, Tensor],
    schedule: Schedule,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """All tables of a set from the first step, under shared guidance."""
    tables = sets[case["tables"]]
    way = _Way.of(case, schedule, shape)
    paths = way.first.expand(1, len(tables), *shape)
    for index in range(case["rollout_steps"]):
        prediction = predict_shared(
            denoise,
            paths,
            way.timestep(index),
            tables[None, :, case["class"]],
            shared_row(tables),
            case["guidance_scale"],
        )
        means, paths, _ = way.step(index, paths, prediction)
    key = f"golden\n{case['seed']}"
    more = {"guidance": "shared", "branch_step": 0, "key": key, "first": _numbers(way.first)}
    return case | more | _spread(means[0], way.variance(case["rollout_steps"] - 1))


def _spread(means: Tensor, variance: float) -> dict[str, Any]:
    return {
        "means": [_numbers(mean, digits=9) for mean in means],
        "distances": squared_distances(means.flatten(1)).tolist(),
        "values": {
            name: float(estimate(name, means.unsqueeze(0), variance))
            for name in ESTIMATORS
            if variance > 0 or name not in NEED_VARIANCE
        },
    }


def _judged_cases(
    directory: Path, manifest: Mapping[str, Any], denoise: Denoiser, table: Tensor
) -> list[dict[str, Any]]:
    """The producer's way of every class; ``value`` is null if the judge cannot tell the class."""
    schedule, latent = schedule_of(manifest["diffusion"]), manifest["latent"]
    shape = tuple(latent[side] for side in ("channels", "height", "width"))
    decoder = Graph(directory / manifest["files"]["decoder"]["path"], manifest["graph"]["decoder"])
    judge = Judge.open(directory, manifest)
    cases = []
    forms = [form for form in JUDGED if _can_run(form, schedule)]
    for form, label in itertools.product(forms, range(min(4, len(manifest["classes"])))):
        way = _Way.of(form, schedule, shape)
        after = way.first.unsqueeze(0)
        for index in range(form["rollout_steps"]):
            prediction = predict_guided(
                denoise, after, way.timestep(index), table[None, label], table[None, -1], form["guidance_scale"]
            )
            _, after, clean = way.step(index, after, prediction)
        image = decoder(clean / latent["scale"] + latent["shift"])
        probabilities = judge.probabilities(image)
        value = float(image_risk(probabilities, torch.tensor([label])))
        top = probabilities[0].topk(min(TOP, len(probabilities[0])))
        cases.append(
            {"class": label, **form, "tables": "producer", "guidance": "own", "branch_step": 0}
            | {"key": f"golden\n{form['seed']}", "x0": _numbers(clean), "image": _numbers(image)}
            | {
                "probabilities": probabilities[0].tolist(),
                "top": [list(pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
                "value": value if judge.can_tell(label) else None,
            }
        )
    return cases


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


def made_up_network(latent: Tensor, timestep: float) -> Tensor:
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


FLOWS: tuple[dict[str, Any], ...] = (
    {},
    {"timestep_spacing": "trailing"},
    {"shift": 3.0},
    {"shift": 3.0, "timestep_spacing": "trailing"},
    {"shift": 0.5, "shift_terminal": 0.1},
    {"shift": 12.0, "train_timesteps": 250},
    {"use_dynamic_shifting": True, "image_seq_len": 4096},
    {"use_dynamic_shifting": True, "image_seq_len": 1024, "timestep_spacing": "trailing"},
    {"use_dynamic_shifting": True, "image_seq_len": 7, "shift": 9.0},
    {"use_dynamic_shifting": True, "image_seq_len": 6400, "time_shift_type": "linear", "base_shift": 0.95},
    {"use_dynamic_shifting": True, "image_seq_len": 1600, "time_shift_type": "linear", "timestep_spacing": "trailing"},
    {
        "use_dynamic_shifting": True,
        "image_seq_len": 1024,
        "base_image_seq_len": 1024,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "shift_terminal": 0.1,
    },
    {"use_dynamic_shifting": True, "shift_terminal": 0.02, "timestep_spacing": "trailing", "max_shift": 0.9},
)
"""Schedules of SD3 (shift 3), FLUX (dynamic, trailing), LTX (dynamic, terminal 0.1), Qwen-Image, and around them."""


def flow() -> dict[str, Any]:
    """Sigmas and timesteps of flow-matching schedules, exactly, and a trajectory of a made-up network.

    ``sigmas`` is null if no sampler of diffusers can take the steps: it divides by zero, or its sigmas do not descend.
    """
    cases = []
    for fields, steps in itertools.product(FLOWS, (1, 2, 3, 4, 7, 20, 28, 50, 100, 249)):
        schedule = FlowSchedule(**fields)
        case: dict[str, Any] = {"diffusion": schedule.manifest(), "steps": steps}
        try:
            scheduler = schedule.scheduler(steps)
        except TrainingError:
            cases.append(case | {"sigmas": None})
            continue
        latent = 1.0 - 0.5 * torch.arange(4, dtype=torch.float64)
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            output = made_up_network(latent, timestep)
            scheduler.set_begin_index(index)
            latent = scheduler.step(
                cast(Any, output), cast(Any, scheduler.timesteps[index]), cast(Any, latent), return_dict=False
            )[0].double()
        cases.append(
            case
            | {
                "sigmas": _base64(scheduler.sigmas),
                "timesteps": _base64(scheduler.timesteps),
                "variances": [schedule.variance(steps, index) for index in (0, steps // 2)],
                "final": latent.tolist(),
            }
        )
    return {"reference": f"diffusers {diffusers.__version__}, numpy {np.__version__}", "flow": cases}


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.float().numpy().astype("<f4").tobytes()).decode()


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
