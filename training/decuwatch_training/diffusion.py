"""The forward process and its sampler, with the conventions of diffusers.

DDIM (Song, Meng, Ermon 2021) as in DDIMScheduler, or flow matching (Lipman et al. 2023) as in
FlowMatchEulerDiscreteScheduler.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from decuwatch_training.errors import TrainingError

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latent [N,C,H,W], timestep [N], context [N,T,D]) -> prediction [N,C,H,W].

The timestep is int64, or float32 of a flow.
"""

VELOCITY = "velocity"


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
    kind: str = "ddim"

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

    def times(self, index: Tensor) -> Tensor:
        """The timesteps int64 [n] of training indices 0 to T - 1."""
        return index

    def noisy(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The forward process: latents of these timesteps."""
        return self.scheduler().add_noise(clean, noise, cast(Any, timestep))

    def ends(self, steps: int, index: int, prediction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of step ``index`` with eta 0, and the predicted clean latent."""
        scheduler = self.scheduler(steps)
        timestep = int(scheduler.timesteps[index])
        out: Any = scheduler.step(cast(Any, prediction), timestep, cast(Any, latent), eta=0.0)
        return out.prev_sample, out.pred_original_sample

    def variance(self, steps: int, index: int) -> float:
        """Variance of step ``index`` with eta 1."""
        scheduler = self.scheduler(steps)
        timestep = int(scheduler.timesteps[index])
        return float(scheduler._get_variance(timestep, timestep - self.train_timesteps // steps))

    def manifest(self) -> dict[str, Any]:
        """The manifest's ``diffusion`` object. ``ddim`` is what a manifest without a kind means."""
        return {name: value for name, value in asdict(self).items() if name != "kind"}


@dataclass(frozen=True)
class FlowSchedule:
    """The manifest's ``diffusion`` object of flow matching: x = (1 - sigma) x0 + sigma noise, timestep sigma T."""

    train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    image_seq_len: int = 4096
    """Tokens of a latent; only dynamic shifting looks at it."""
    time_shift_type: str = "exponential"
    shift_terminal: float = 0.0
    """The last sigma after a stretch; 0 stretches nothing, like diffusers' None."""
    prediction: str = VELOCITY
    timestep_spacing: str = "linspace"
    """``linspace`` is the scheduler's own; ``trailing`` is 1, 1 - 1/S, ..., 1/S, as the pipelines of FLUX pass it."""
    kind: str = "flow_match"

    @property
    def mu(self) -> float:
        """The dynamic shift, on the line that diffusers' pipelines draw through the two image sizes."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.image_seq_len * slope + (self.base_shift - slope * self.base_image_seq_len)

    def scheduler(self, steps: int | None = None) -> FlowMatchEulerDiscreteScheduler:
        """diffusers' scheduler with these settings, and ``steps`` inference steps if given.

        Raises TrainingError for a number of steps that the sampler cannot take.
        """
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=self.train_timesteps,
            shift=self.shift,
            use_dynamic_shifting=self.use_dynamic_shifting,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
            base_image_seq_len=self.base_image_seq_len,
            max_image_seq_len=self.max_image_seq_len,
            time_shift_type=cast(Any, self.time_shift_type),
            shift_terminal=cast(Any, self.shift_terminal or None),
        )
        if steps is not None:
            if not 1 <= steps <= self.train_timesteps:
                raise TrainingError(f"steps {steps}: expected 1 to {self.train_timesteps}")
            trailing = np.linspace(1.0, 1 / steps, steps).tolist() if self.timestep_spacing == "trailing" else None
            mu = self.mu if self.use_dynamic_shifting else None
            with np.errstate(all="ignore"):  # what divides by zero is refused below
                scheduler.set_timesteps(None if trailing else steps, sigmas=trailing, mu=mu)
            sigmas = scheduler.sigmas
            if not (bool((sigmas[1:] < sigmas[:-1]).all()) and 0 <= float(sigmas.min()) <= float(sigmas.max()) <= 1):
                raise TrainingError(f"steps {steps}: the sigmas of the schedule do not descend from at most 1 to 0")
        return scheduler

    def step_count(self, steps: int) -> int:
        """Steps a sampler takes if asked for ``steps``: the same number."""
        return len(self.scheduler(steps).timesteps)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is trained to predict for these rows: the velocity noise - x0."""
        return noise - clean

    def times(self, index: Tensor) -> Tensor:
        """The timesteps float32 [n] of training indices 0 to T - 1, shifted statically as in diffusers."""
        return self.scheduler().timesteps[index]

    def noisy(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The forward process: latents of these timesteps."""
        sigma = (timestep / self.train_timesteps).view(-1, *[1] * (clean.ndim - 1)).to(clean)
        return (1 - sigma) * clean + sigma * noise

    def ends(self, steps: int, index: int, prediction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent after Euler step ``index``, and the predicted clean latent x - sigma v."""
        scheduler = self.scheduler(steps)
        scheduler.set_begin_index(index)
        timestep = cast(Any, scheduler.timesteps[index])
        after: Any = scheduler.step(cast(Any, prediction), timestep, cast(Any, latent))
        return after.prev_sample, latent - float(scheduler.sigmas[index]) * prediction

    def variance(self, steps: int, index: int) -> float:
        """Variance of x' given x and x0 in the Markov process with the same marginals (Kingma et al. 2021)."""
        sigma, after = self.scheduler(steps).sigmas[index : index + 2].double().tolist()
        ratio = (1 - sigma) / (1 - after)
        return (after / sigma) ** 2 * max(0.0, sigma**2 - (ratio * after) ** 2)

    def manifest(self) -> dict[str, Any]:
        """The manifest's ``diffusion`` object."""
        return asdict(self)


Schedule = NoiseSchedule | FlowSchedule


def schedule_of(diffusion: dict[str, Any]) -> Schedule:
    """The schedule of a checked manifest's ``diffusion`` object."""
    return FlowSchedule(**diffusion) if diffusion.get("kind") == "flow_match" else NoiseSchedule(**diffusion)


def _times(timestep: float, rows: int, like: Tensor) -> Tensor:
    """One timestep for all rows: int64, or float32 of a flow."""
    kind = torch.float32 if isinstance(timestep, float) else torch.int64
    return torch.full((rows,), timestep, dtype=kind, device=like.device)


def predict_guided(
    denoise: Denoiser, latent: Tensor, timestep: float, context: Tensor, unconditional: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance: eps_uncond + g (eps_cond - eps_uncond); at g = 1 the unconditional rows are not
    computed.

    latent [N,C,H,W], context and unconditional [N,T,D]; returns [N,C,H,W] at 2N rows of U-Net work (N at g = 1).
    """
    rows = latent.shape[0]
    if guidance == 1.0:
        return denoise(latent, _times(timestep, rows, latent), context)
    both = denoise(
        torch.cat([latent, latent]),
        _times(timestep, 2 * rows, latent),
        torch.cat([unconditional, context]),
    )
    without, conditional = both.chunk(2)
    return without + guidance * (conditional - without)


def predict_shared(
    denoise: Denoiser, latents: Tensor, timestep: float, context: Tensor, unconditional: Tensor, guidance: float
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
    output = denoise(rows, _times(timestep, len(rows), rows), contexts)
    conditional = output[-requests * tables :].view_as(latents)
    if guidance == 1.0:
        return conditional
    without = output[:requests].unsqueeze(1)
    return without + guidance * (conditional - without)


@dataclass(frozen=True)
class Sampler:
    """DDIM with eta = 0, or Euler of a flow: S steps, guidance g.

    ``step(i, ...)`` maps the latent before step i to the mean mu after it.
    """

    schedule: Schedule
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
        return self.schedule.ends(self.steps, index, prediction, latent)[0]

    def predicted(
        self, denoise: Denoiser, index: int, latent: Tensor, context: Tensor, unconditional: Tensor
    ) -> Tensor:
        """x0 = (x - sqrt(1 - a_t) eps) / sqrt(a_t): the clean latent as DDIM step ``index`` predicts it."""
        timestep = self._timestep(index)
        prediction = predict_guided(denoise, latent, timestep, context, unconditional, self.guidance)
        return self.schedule.ends(self.steps, index, prediction, latent)[1]

    def shared_step(
        self, denoise: Denoiser, index: int, latents: Tensor, context: Tensor, unconditional: Tensor
    ) -> Tensor:
        """``step`` of M tables with one unconditional row; latents [n,M,C,H,W], context [n,M,T,D], that row [T,D]."""
        timestep = self._timestep(index)
        prediction = predict_shared(denoise, latents, timestep, context, unconditional, self.guidance)
        return self.schedule.ends(self.steps, index, prediction, latents)[0]

    def _timestep(self, index: int) -> float:
        """The timestep that the network is given: an int, or a float of a flow."""
        return cast(float, self.schedule.scheduler(self.steps).timesteps[index].item())

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
