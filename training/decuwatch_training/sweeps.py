"""The tables that the Go sampler's schedules and noise are held against, for every step count and not for a chosen few.

Timesteps, alphas and trajectories are diffusers', noise is PyTorch's. The timesteps and trajectories of ``compvis``
spacing come from the few lines here, which follow the DDIM sampler of CompVis' latent diffusion and share nothing with
diffusers.
"""

import base64
import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler

SPACINGS = ("leading", "trailing", "linspace", "compvis")
SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
BETAS = ((0.0015, 0.0195), (0.0001, 0.02), (0.00085, 0.012))
TRAIN_TIMESTEPS = (1, 2, 3, 7, 10, 50, 100, 250, 500, 999, 1000, 1024)
OFFSETS = (0, 1, 2, 7)
NOISE_SEED = 20240711


def sweeps() -> dict[str, Any]:
    """Everything, as golden.py writes it."""
    return {
        "reference": f"torch {torch.__version__}, diffusers {diffusers.__version__}, numpy {np.__version__}",
        "timesteps": [timestep_table(*case) for case in timestep_cases()],
        "alphas": [alpha_table(*case) for case in alpha_cases()],
        "trajectories": [trajectory_table(spacing, range(1, 1001)) for spacing in SPACINGS],
        "noise": noise_table(),
    }


def timestep_cases() -> Iterator[tuple[int, str, int]]:
    """T, spacing and steps_offset of every table; diffusers reads the offset for leading spacing only."""
    for train, spacing in itertools.product(TRAIN_TIMESTEPS, SPACINGS):
        for offset in {"leading": OFFSETS, "compvis": (1,)}.get(spacing, (0,)):
            if offset < train:
                yield train, spacing, offset


def timestep_table(train: int, spacing: str, offset: int) -> dict[str, Any]:
    """Eight hexadecimal digits for each of the step counts 1 to T, and the step counts that cannot be taken.

    The digits begin the SHA-256 of the timesteps as int64, little-endian. A step count cannot be taken if the reference
    leaves 0 to T - 1, or takes another number of steps than it promises.
    """
    digests, refused = [], []
    for steps in range(1, train + 1):
        timesteps = (
            compvis_timesteps(train, steps)
            if spacing == "compvis"
            else diffusers_timesteps(train, spacing, offset, steps)
        )
        whole = spacing == "compvis" or len(timesteps) == steps
        if not whole or timesteps.min() < 0 or timesteps.max() >= train or len(np.unique(timesteps)) != len(timesteps):
            refused.append(steps)
            digests.append("-" * 8)
        else:
            digests.append(hashlib.sha256(timesteps.astype("<i8").tobytes()).hexdigest()[:8])
    return {
        "train_timesteps": train,
        "spacing": spacing,
        "steps_offset": offset,
        "refused": refused,
        "digests": "".join(digests),
    }


def diffusers_timesteps(train: int, spacing: str, offset: int, steps: int) -> np.ndarray:
    """What ``set_timesteps`` gives, checked by nothing."""
    scheduler = DDIMScheduler(num_train_timesteps=train, timestep_spacing=cast(Any, spacing), steps_offset=offset)
    scheduler.set_timesteps(steps)
    return np.asarray(scheduler.timesteps)


def compvis_timesteps(train: int, steps: int) -> np.ndarray:
    """``make_ddim_timesteps`` of latent diffusion (Rombach et al. 2022), method ``uniform``, from noise to image."""
    return np.flip(np.asarray(list(range(0, train, train // steps))) + 1)


def alpha_cases() -> Iterator[tuple[int, str, float, float]]:
    """T, schedule and betas of every table."""
    for schedule, (start, end) in itertools.product(SCHEDULES, BETAS):
        if schedule != "squaredcos_cap_v2" or (start, end) == BETAS[0]:
            yield 1000, schedule, start, end
    for train, schedule in itertools.product(TRAIN_TIMESTEPS, SCHEDULES):
        if train != 1000:
            yield train, schedule, *BETAS[0]


def alpha_table(train: int, schedule: str, start: float, end: float) -> dict[str, Any]:
    """alphas_cumprod as float32, little-endian, in base64."""
    scheduler = DDIMScheduler(
        num_train_timesteps=train, beta_schedule=cast(Any, schedule), beta_start=start, beta_end=end
    )
    content = np.asarray(scheduler.alphas_cumprod, dtype="<f4").tobytes()
    return {
        "train_timesteps": train,
        "beta_schedule": schedule,
        "beta_start": start,
        "beta_end": end,
        "alphas": base64.b64encode(content).decode(),
    }


def trajectory_conventions(spacing: str, steps: int) -> tuple[str, str, float, int, bool]:
    """Schedule, prediction, eta, steps_offset and set_alpha_to_one of a step count: all combinations take turns."""
    schedule = SCHEDULES[steps % 3]
    prediction = ("epsilon", "v_prediction", "sample")[steps // 3 % 3]
    eta = (0.0, 0.4, 1.0)[steps // 9 % 3]
    if spacing == "compvis":
        return "scaled_linear", "epsilon", eta, 1, False
    return schedule, prediction, eta, int(spacing == "leading"), steps // 27 % 2 == 0


def trajectory_table(spacing: str, step_counts: range | list[int]) -> dict[str, Any]:
    """The end of a trajectory of two elements by step count; null if it cannot be taken or the reference has none."""
    finals: list[list[float] | None] = []
    for steps in step_counts:
        schedule, prediction, eta, offset, to_one = trajectory_conventions(spacing, steps)
        if spacing == "compvis":
            final = _compvis_trajectory(steps, eta)
        else:
            final = _diffusers_trajectory(spacing, schedule, prediction, steps, eta, offset, to_one)
        finals.append(
            None if final is None or not np.isfinite(final).all() else [float(f"{value:.8g}") for value in final]
        )
    return {"spacing": spacing, "finals": finals}


def made_up_network(latent: np.ndarray, timestep: int) -> np.ndarray:
    """A prediction that any language can compute: 0.3 x + sin(t / 50 + element)."""
    return 0.3 * latent + np.sin(timestep / 50 + np.arange(len(latent)))


def _diffusers_trajectory(
    spacing: str, schedule: str, prediction: str, steps: int, eta: float, offset: int, to_one: bool
) -> np.ndarray | None:
    scheduler = DDIMScheduler(
        beta_schedule=cast(Any, schedule),
        beta_start=BETAS[0][0],
        beta_end=BETAS[0][1],
        prediction_type=cast(Any, prediction),
        timestep_spacing=cast(Any, spacing),
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    if min(timesteps) < 0 or max(timesteps) >= 1000:
        return None
    latent = np.array([1.0, 0.5])
    for index, timestep in enumerate(timesteps):
        output, noise = made_up_network(latent, timestep), np.cos(index + np.arange(2))
        given: list[Any] = [torch.from_numpy(value) for value in (output, latent, noise)]
        latent = scheduler.step(given[0], timestep, given[1], eta=eta, variance_noise=given[2], return_dict=False)[
            0
        ].numpy()
    return latent


def _compvis_trajectory(steps: int, eta: float) -> np.ndarray | None:
    """``p_sample_ddim`` of latent diffusion, in double precision throughout, alphas included."""
    timesteps = np.flip(compvis_timesteps(1000, steps))
    if timesteps.max() >= 1000:
        return None
    betas = np.linspace(BETAS[0][0] ** 0.5, BETAS[0][1] ** 0.5, 1000, dtype=np.float64) ** 2
    cumulative = np.cumprod(1.0 - betas)
    alphas = cumulative[timesteps]
    alphas_prev = np.asarray([cumulative[0], *cumulative[timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    latent = np.array([1.0, 0.5])
    for position, timestep in enumerate(np.flip(timesteps)):
        index = len(timesteps) - position - 1
        prediction = made_up_network(latent, int(timestep))
        clean = (latent - math.sqrt(1 - alphas[index]) * prediction) / math.sqrt(alphas[index])
        direction = math.sqrt(1 - alphas_prev[index] - sigmas[index] ** 2) * prediction
        latent = math.sqrt(alphas_prev[index]) * clean + direction + sigmas[index] * np.cos(position + np.arange(2))
    return latent


def noise_table() -> list[dict[str, Any]]:
    """Draws of one generator in turn: every size up to 80, sizes in any order, random 64-bit seeds."""
    choose = np.random.default_rng(NOISE_SEED)
    sequences = [[size] * 3 for size in range(1, 81)]
    sequences += [choose.integers(1, 41, 6).tolist() for _ in range(60)]
    sequences += [[int(size)] for size in choose.integers(81, 20_000, 20)]
    table = []
    for sequence in sequences:
        seed = int(choose.integers(0, 2**64, dtype=np.uint64))
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(size, generator=generator) for size in sequence]
        numbers = [[float(f"{value:.7g}") for value in (draw[0], draw[-1], draw.double().sum())] for draw in draws]
        table.append({"seed": str(seed), "sizes": sequence, "first_last_sum": numbers})
    return table
