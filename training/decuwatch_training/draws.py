"""Numbers of ``torch.randn`` that the Go generators are held against: batches, number types, rounding.

float16 and bfloat16 are not drawn: on a CPU, what PyTorch draws in these depends on its version.
"""

import base64
import itertools
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SIZES = (1, 3, 15, 16, 17, 100, 256, 1000)
IMAGES = (1, 2, 3, 8)


def draws() -> dict[str, Any]:
    """Everything, as golden.py writes it."""
    cases = itertools.product(DTYPES, SIZES, IMAGES)
    return {
        "reference": f"torch {torch.__version__}",
        "draws": [_draw(dtype, size, images, 1000 * size + images) for dtype, size, images in cases],
        "rounding": _rounding(),
    }


def _draw(dtype: str, size: int, images: int, seed: int) -> dict[str, Any]:
    """Three draws of one generator: first number, last number and sum of each image."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(3):
        batch = torch.randn((images, size), generator=generator, dtype=DTYPES[dtype]).double()
        parts.append([[image[0].item(), image[-1].item(), image.sum().item()] for image in batch])
    return {"dtype": dtype, "seed": str(seed), "size": size, "images": images, "first_last_sum": parts}


def _rounding() -> dict[str, str]:
    """Numbers of every magnitude, and ties between neighbors, as PyTorch rounds them."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(2000, generator=generator) * 2.0 ** torch.randint(-30, 15, (2000,), generator=generator)
    halves = torch.arange(-1024, 1024) / 1024 + 1 / 2048
    bfloats = torch.arange(-128, 128) / 128 + 1 / 256
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-14, 2.0**-15])
    numbers = torch.cat([spread, halves, bfloats, edges])
    return {
        "float32": _bytes(numbers),
        "float16": _bytes(numbers.to(torch.float16)),
        "bfloat16": _bytes(numbers.to(torch.bfloat16)),
    }


def _bytes(numbers: Tensor) -> str:
    return base64.b64encode(numbers.view(torch.uint8).numpy().tobytes()).decode()
