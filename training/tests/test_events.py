"""The line of docs/events.md that makes a latent's object of a torch tensor."""

import struct
from pathlib import Path

import pytest
import torch

EVENTS = Path(__file__).parents[2] / "docs" / "events.md"


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, "e"), (torch.float32, "f")])
def test_the_bytes_of_a_tensor(dtype: torch.dtype, code: str) -> None:
    line = next(line for line in EVENTS.read_text().splitlines() if line.startswith("raw = latent."))
    latent = torch.arange(24, dtype=dtype).reshape(2, 4, 3).transpose(1, 2) / 8
    names = {"torch": torch, "latent": latent}
    exec(line, names)
    numbers = latent.flatten().tolist()
    assert names["raw"] == struct.pack(f"<{len(numbers)}{code}", *numbers)
