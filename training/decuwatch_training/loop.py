"""What every training loop shares: the device, mixed precision on GPUs, a progress bar, the learning rate's decay."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.errors import TrainingError


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast on a GPU; float32 throughout on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def cosine_rate(step: int, steps: int, peak: float, warm_up: int = 0) -> float:
    """Linear warm-up to ``peak``, then half a cosine to zero at ``steps``."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


@dataclass
class Clock:
    """Wall-clock and processor seconds spent on something, over all its resumed runs."""

    wall: float = 0.0
    processor: float = 0.0
    _since: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    def read(self) -> dict[str, float]:
        """Seconds so far, former runs included."""
        return {
            "wall_seconds": round(self.wall + time.monotonic() - self._since[0], 1),
            "processor_seconds": round(self.processor + time.process_time() - self._since[1], 1),
        }


class Progress:
    """Counts steps from ``first`` to ``steps`` on a bar with a smoothed loss and the time left."""

    def __init__(self, name: str, first: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=1.0, dynamic_ncols=True)
        self.first, self.steps = first, steps
        self.mean_loss = math.nan

    def __iter__(self) -> Iterator[int]:
        with self.bar:
            for step in range(self.first, self.steps):
                yield step
                self.bar.update()

    def loss(self, value: Tensor | float) -> None:
        """Show an exponentially smoothed loss. Raises TrainingError if it is not finite."""
        number = float(value)
        if not math.isfinite(number):
            raise TrainingError(
                f"the loss is {number} at step {self.bar.n}: expected a finite one; a lower --rate may keep it so"
            )
        self.mean_loss = number if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * number
        self.bar.set_postfix(loss=f"{self.mean_loss:.4f}", refresh=False)
