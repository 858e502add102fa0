"""A small classifier of images, trained from scratch: the judge of those who have no pretrained network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decuwatch_training.data import Images
from decuwatch_training.errors import TrainingError
from decuwatch_training.loop import Progress, cosine_rate, mixed_precision, pick_device

LARGEST_SIDE = 64
"""Larger images are averaged down inside the network."""


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that decides the classifier but the images."""

    steps: int = 2500
    batch: int = 128
    rate: float = 4e-3
    width: int = 24
    """Channels of the first of four stages; the others have 2, 4 and 4 times as many."""
    seed: int = 1

    def validate(self) -> None:
        """Raise TrainingError that names the argument and its bounds."""
        for name in ("steps", "batch", "width"):
            if getattr(self, name) < 1:
                raise TrainingError(f"--{name} {getattr(self, name)}: expected at least 1")
        if not self.rate > 0:
            raise TrainingError(f"--rate {self.rate}: expected more than 0")


class Classifier(nn.Module):
    """Images [N, C, H, W] in [-1, 1] -> logits [N, K]; normalized inside by the training images' mean and deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        channels, height, across = shape
        factor = math.ceil(max(height, across) / LARGEST_SIDE)
        side = min(height, across) // factor
        layers: list[nn.Module] = [nn.AvgPool2d(factor)] if factor > 1 else []
        before = channels
        for stage, after in enumerate((width, 2 * width, 4 * width, 4 * width)):
            kernel, stride = (5, 2) if stage == 0 and side >= 16 else (3, 1)
            layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
            before, side = after, side // stride
            if stage in (1, 2) and side >= 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, classes)
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("deviation", deviation.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features((images - self.mean) / self.deviation))


def train_classifier(images: Images, settings: ClassifierSettings, name: str = "judge") -> Classifier:
    """Train on all images with cross-entropy; classes are drawn equally often, and images are shifted a little.

    Raises TrainingError for fewer than two classes, or a class without images.
    """
    settings.validate()
    check_classes(images)
    device = pick_device()
    sample = images.scaled(torch.linspace(0, len(images) - 1, min(len(images), 5000)).long())
    deviation, mean = torch.std_mean(sample, dim=(0, 2, 3))
    torch.manual_seed(settings.seed)
    model = Classifier(images.shape, len(images.labels), settings.width, mean, deviation.clamp(min=1e-3))
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(settings.seed)
    positions = [images.of_class(label) for label in range(len(images.labels))]
    counts, pool = torch.tensor([len(each) for each in positions]), torch.cat(positions)
    offsets = counts.cumsum(0) - counts
    progress = Progress(name, 0, settings.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings.steps, settings.rate, warm_up=min(100, settings.steps // 10))
        label = torch.randint(len(counts), (settings.batch,), generator=generator)
        chosen = pool[offsets[label] + (torch.rand(settings.batch, generator=generator) * counts[label]).long()]
        batch = _shifted(images.scaled(chosen), generator).to(device, memory_format=torch.channels_last)
        with mixed_precision(device):
            loss = nn.functional.cross_entropy(model(batch).float(), label.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.loss(loss.detach())
    return model.cpu().eval().requires_grad_(False)


def check_classes(images: Images) -> None:
    """Raise TrainingError for fewer than two classes, and for the first class without training images."""
    if len(images.labels) < 2:
        raise TrainingError(f"{images.source}: {len(images.labels)} class, expected at least 2 to tell apart")
    for index, count in enumerate(torch.bincount(images.classes, minlength=len(images.labels)).tolist()):
        if not count:
            raise TrainingError(f"{images.source}: class {index} ({images.labels[index]}) has no training images")


def _shifted(batch: Tensor, generator: torch.Generator) -> Tensor:
    """The whole batch moved by up to a sixteenth of its sides, what enters repeats the edge."""
    height, width = batch.shape[-2:]
    most = min(height, width) // 16
    if not most:
        return batch
    padded = nn.functional.pad(batch, (most, most, most, most), mode="replicate")
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    return padded[..., down : down + height, right : right + width]
