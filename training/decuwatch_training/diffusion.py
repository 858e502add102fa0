"""The forward process and DDIM (Song, Meng, Ermon 2021), with the conventions of diffusers' DDIMScheduler."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from decuwatch_training.errors import TrainingError

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latent [N,C,H,W], timestep int64 [N], context [N,T,D]) -> prediction [N,C,H,W]."""


@dataclass(frozen=True)
class NoiseSchedule:
    """The manifest's ``diffusion`` object: T, the betas, what the network predicts, how DDIM picks timesteps."""

    train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction: str = "epsilon"
    timestep_spacing: str = "leading"
    """diffusers' ``leading``, ``trailing`` or ``linspace``; or ``compvis``, which takes range(0, T, T // S) + 1."""
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def scheduler(self, steps: int | None = None) -> DDIMScheduler:
        """diffusers' scheduler with these settings, x0 never clipped, and ``steps`` inference steps if given.

        Raises TrainingError for a number of steps that the sampler cannot take.
        """
        compvis = self.timestep_spacing == "compvis"
        scheduler = DDIMScheduler(
            num_train_timesteps=self.train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=self.prediction,
            timestep_spacing=cast(Any, "leading" if compvis else self.timestep_spacing),
            steps_offset=self.steps_offset,
            set_alpha_to_one=self.set_alpha_to_one,
            clip_sample=False,
        )
        if steps is not None:
            if not 1 <= steps <= self.train_timesteps:
                raise TrainingError(f"steps {steps}: expected 1 to {self.train_timesteps}")
            scheduler.set_timesteps(steps)
            if compvis:  # a step still goes T // S timesteps back, and from the last one to the first alpha
                scheduler.timesteps = torch.arange(0, self.train_timesteps, self.train_timesteps // steps).flip(0) + 1
            wrong = [t for t in scheduler.timesteps.tolist() if not 0 <= t < self.train_timesteps]
            if wrong:
                raise TrainingError(
                    f"steps {steps}: {self.timestep_spacing} spacing has timestep {wrong[0]} there, expected 0 to "
                    f"{self.train_timesteps - 1}"
                )
        return scheduler

    def step_count(self, steps: int) -> int:
        """Steps a sampler takes if asked for ``steps``: the same number, except with ``compvis`` spacing."""
        return len(self.scheduler(steps).timesteps)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is trained to predict for these rows: eps, v or x0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        return self.scheduler().get_velocity(clean, noise, timestep)

    def manifest(self) -> dict[str, Any]:
        """The manifest's ``diffusion`` object."""
        return asdict(self)


def predict_guided(
    denoise: Denoiser, latent: Tensor, timestep: int, context: Tensor, unconditional: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance: eps_uncond + g (eps_cond - eps_uncond); at g = 1 the unconditional rows are not
    computed.

    latent [N,C,H,W], context and unconditional [N,T,D]; returns [N,C,H,W] at 2N rows of U-Net work (N at g = 1).
    """
    rows = latent.shape[0]
    if guidance == 1.0:
        return denoise(latent, torch.full((rows,), timestep, dtype=torch.int64, device=latent.device), context)
    both = denoise(
        torch.cat([latent, latent]),
        torch.full((2 * rows,), timestep, dtype=torch.int64, device=latent.device),
        torch.cat([unconditional, context]),
    )
    without, conditional = both.chunk(2)
    return without + guidance * (conditional - without)


def predict_shared(
    denoise: Denoiser, latents: Tensor, timestep: int, context: Tensor, unconditional: Tensor, guidance: float
) -> Tensor:
    """Guidance of M tables by one unconditional prediction u at the mean of their latents: u + g (eps_m - u).

    latents [n,M,C,H,W], context [n,M,T,D], unconditional [T,D]; returns [n,M,C,H,W] at n (M + 1) rows of U-Net work
    (n M at g = 1).
    """
    requests, tables = latents.shape[:2]
    rows, contexts = latents.flatten(0, 1), context.flatten(0, 1)
    if guidance != 1.0:
        rows = torch.cat([latents.double().mean(1).to(latents.dtype), rows])
        contexts = torch.cat([unconditional.expand(requests, *unconditional.shape), contexts])
    output = denoise(rows, torch.full((len(rows),), timestep, dtype=torch.int64, device=rows.device), contexts)
    conditional = output[-requests * tables :].view_as(latents)
    if guidance == 1.0:
        return conditional
    without = output[:requests].unsqueeze(1)
    return without + guidance * (conditional - without)


@dataclass(frozen=True)
class Sampler:
    """DDIM with eta = 0, S steps, guidance g. ``step(i, ...)`` maps the latent before step i to the mean mu after."""

    schedule: NoiseSchedule
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        self.schedule.scheduler(self.steps)

    @property
    def count(self) -> int:
        """Steps that are taken; ``steps`` are asked for."""
        return self.schedule.step_count(self.steps)

    def step(self, denoise: Denoiser, index: int, latent: Tensor, context: Tensor, unconditional: Tensor) -> Tensor:
        """mu = sqrt(a_prev) x0 + sqrt(1 - a_prev) eps of DDIM step ``index`` (0 is the first, noisiest one)."""
        timestep = self._timestep(index)
        prediction = predict_guided(denoise, latent, timestep, context, unconditional, self.guidance)
        return self._outcome(prediction, timestep, latent).prev_sample

    def predicted(
        self, denoise: Denoiser, index: int, latent: Tensor, context: Tensor, unconditional: Tensor
    ) -> Tensor:
        """x0 = (x - sqrt(1 - a_t) eps) / sqrt(a_t): the clean latent as DDIM step ``index`` predicts it."""
        timestep = self._timestep(index)
        prediction = predict_guided(denoise, latent, timestep, context, unconditional, self.guidance)
        return self._outcome(prediction, timestep, latent).pred_original_sample

    def shared_step(
        self, denoise: Denoiser, index: int, latents: Tensor, context: Tensor, unconditional: Tensor
    ) -> Tensor:
        """``step`` of M tables with one unconditional row; latents [n,M,C,H,W], context [n,M,T,D], that row [T,D]."""
        timestep = self._timestep(index)
        prediction = predict_shared(denoise, latents, timestep, context, unconditional, self.guidance)
        return self._outcome(prediction, timestep, latents).prev_sample

    def _timestep(self, index: int) -> int:
        return int(self.schedule.scheduler(self.steps).timesteps[index])

    def _outcome(self, prediction: Tensor, timestep: int, latent: Tensor) -> Any:
        return self.schedule.scheduler(self.steps).step(cast(Any, prediction), timestep, cast(Any, latent), eta=0.0)

    def roll(
        self, denoise: Denoiser, first: int, last: int, latent: Tensor, context: Tensor, unconditional: Tensor
    ) -> Tensor:
        """Steps ``first`` to ``last - 1``; with 0 and ``count`` that is the whole trajectory."""
        for index in range(first, last):
            latent = self.step(denoise, index, latent, context, unconditional)
        return latent


def first_latent(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The first latent of a request as noise ``torch-cpu`` defines it: one generator a request, drawn on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Regime = Literal["exposure", "disagreement"]
