"""image_risk: the risk that the image is not what was asked for, as a judge sees it.

One table, the producer's, takes the request's first steps. The x0 that the last of them predicts is decoded, and a
judge, a classifier, looks at the image:

    image_risk = 1 - p(class),   p = sum over the judge's outputs that stand for the class
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.diffusion import Denoiser, Sampler
from decuwatch_training.graphs import Graph

TOP = 3
"""The judge's most likely classes that a score keeps."""


@torch.no_grad()
def predicted_latents(
    denoise: Denoiser, sampler: Sampler, table: Tensor, classes: Tensor, latents: Tensor, steps: int
) -> Tensor:
    """x0 [n, C, H, W] as the last of ``steps`` steps predicts it, under one table [K + 1, T, D]."""
    context = table[classes]
    unconditional = table[-1].expand_as(context)
    latent = sampler.roll(denoise, 0, steps - 1, latents, context, unconditional)
    return sampler.predicted(denoise, steps - 1, latent, context, unconditional)


@dataclass(frozen=True)
class Judge:
    """A classifier of images with its part of the manifest."""

    logits: Callable[[Tensor], Tensor]
    """[N, C, H, W] in the judge's range and size -> [N, outputs]."""
    fields: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path, manifest: Mapping[str, Any]) -> "Judge":
        """The judge of an ensemble. Raises TrainingError if its graph is not as the manifest says."""
        fields = manifest["judge"]
        names = {"image": fields["input"], "output": fields["output"]}
        return cls(Graph(directory / manifest["files"]["judge"]["path"], names), fields)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, float64 [n, K], of decoded images [n, C, H, W].

        Images are clipped to [-1, 1] first. The classes' probabilities add up to less than 1 if some outputs stand for
        no class.
        """
        low, high = self.fields["range"]
        scaled = low + (images.clamp(-1, 1) + 1) / 2 * (high - low)
        if self.fields["resize"] == "bilinear":
            size = (self.fields["height"], self.fields["width"])
            scaled = torch.nn.functional.interpolate(scaled, size, mode="bilinear", align_corners=False)
        return class_probabilities(self.logits(scaled), self.fields["outputs"], len(self.fields["accuracy"]))

    def can_tell(self, label: int) -> bool:
        """Whether the judge knows this class well enough on held-out data."""
        accuracy = self.fields["accuracy"][label]
        return accuracy is not None and accuracy >= self.fields["least_accuracy"]


def class_probabilities(logits: Tensor, outputs: Sequence[int], classes: int) -> Tensor:
    """Probabilities of the classes, float64 [n, K]: the softmax over all logits, summed over each class's outputs."""
    shares = logits.double().softmax(1)
    stands = torch.tensor(list(outputs))
    named = stands >= 0
    return torch.zeros(len(logits), classes, dtype=torch.float64).index_add_(1, stands[named], shares[:, named])


def most_likely(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely class [n] and its probability [n], of probabilities of the classes [n, K].

    The class is -1 if it is more likely that the image is of no class: if the outputs that stand for none have more
    together.
    """
    top = probabilities.max(1)
    nothing = 1 - probabilities.sum(1)
    return torch.where(top.values < nothing, -1, top.indices), torch.maximum(top.values, nothing)


def image_risk(probabilities: Tensor, classes: Tensor) -> Tensor:
    """1 - p(class) in [0, 1], of probabilities [n, K] and classes [n]."""
    return (1 - probabilities.gather(1, classes[:, None])[:, 0]).clamp(0, 1)
