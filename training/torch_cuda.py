"""Write what PyTorch draws on a GPU, for the test of ``torch-cuda`` in scoring/diffusion: python torch_cuda.py FILE.

It needs PyTorch and a CUDA device, and nothing else. Sizes lie around every boundary of the kernel: of a block, of the
threads that the GPU holds (T), and of the four normals that a thread makes at a time. For each draw, the file has some
elements, the SHA-256 of all bytes (to compare GPUs with each other), and the generator's offset before and after it.
"""

import hashlib
import json
import sys
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SEEDS = (0, 42, 2**32 + 7, 2**63 - 1)


def threads(device: torch.device) -> int:
    """T: the most threads that one of PyTorch's kernels for distributions has on the device."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256) * 256


def sizes(most: int) -> list[int]:
    """Sizes around every boundary, and those of latents of known pipelines."""
    around = [256, 32768, most, 2 * most, 3 * most, 4 * most, 8 * most]
    latents = [1, 4 * 64 * 64, 4 * 128 * 128, 16 * 128 * 128, 3 * 16 * 128 * 128, 8 * 16 * 128 * 128]
    return sorted({size + shift for size in around for shift in (-1, 0, 1)} | set(latents))


def draws(device: torch.device, dtype: str, seed: int, offset: int, drawn: list[int]) -> dict[str, Any]:
    """Draws of the given sizes, one after the other, by a generator that begins at the offset."""
    generator = torch.Generator(device).manual_seed(seed)
    if offset:
        generator.set_offset(offset)
    results = []
    for size in drawn:
        before = generator.get_offset()
        values = torch.randn(size, generator=generator, device=device, dtype=DTYPES[dtype])
        whole = values.cpu()
        results.append(
            {
                "size": size,
                "offset": before,
                "offset_after": generator.get_offset(),
                "elements": {str(i): float(whole[i]) for i in chosen(size, threads(device))},
                "sha256": hashlib.sha256(whole.view(torch.uint8).numpy().tobytes()).hexdigest(),
            }
        )
    return {"dtype": dtype, "seed": str(seed), "draws": results}


def chosen(size: int, most: int) -> list[int]:
    """Elements around the boundaries inside a draw, its first and its last."""
    around = [0, 255, 256, 32767, 32768, size // 2, size - 1] + [k * most for k in range(1, 9)]
    return sorted({i + shift for i in around for shift in (-1, 0, 1) if 0 <= i + shift < size})


def main() -> None:
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    cases = []
    for dtype in DTYPES:
        for index, size in enumerate(sizes(threads(device))):
            if dtype != "float32" and size > threads(device) + 1:
                continue  # the order is the same for all types, and large draws take time in the tests
            cases.append(draws(device, dtype, SEEDS[index % len(SEEDS)], 0, [size]))
        cases.append(draws(device, dtype, 7, 0, [100, threads(device) * 4 + 1, 3, 4 * 64 * 64, 4 * 64 * 64]))
        cases.append(draws(device, dtype, 9, 4 * (2**32 - 1), [4 * 64 * 64, threads(device) * 9, 5]))
    document = {
        "reference": f"torch {torch.__version__}, CUDA {torch.version.cuda}, {properties.name}",
        "sms": properties.multi_processor_count,
        "threads_per_sm": properties.max_threads_per_multi_processor,
        "cases": cases,
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.write("\n")
    print(f"{len(cases)} cases of {document['reference']}")


if __name__ == "__main__":
    main()
