"""Give a tiny ensemble further inputs of the backbone: a pooled vector, and a number as FLUX takes its guidance.

``decuwatch-train tiny --conditioning`` calls it. Nothing here trains such rows: the format carries them, and the tests
of the Go sampler need an ensemble that has them. The trajectories beside it are PyTorch's.
"""

import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decuwatch_training.backbone import Backbone
from decuwatch_training.diffusion import Denoiser, NoiseSchedule, Sampler, first_latent
from decuwatch_training.files import sha256_file
from decuwatch_training.graphs import export_conditioned

POOLED = 6
CONDITIONING = [
    {"name": "pooled", "input": "pooled_projections", "shape": [POOLED]},
    {"name": "guidance", "input": "guidance", "shape": []},
]
FILE = "conditioned.json"
SETS = ("tables", "producer", "producers", "posterior", "reference")


class Conditioned(nn.Module):
    """A denoiser whose latent is shifted by the pooled vector, and whose prediction is scaled by the guidance."""

    def __init__(self, denoiser: nn.Module, channels: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.project = nn.Linear(POOLED, channels)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        """Prediction [N,C,H,W] for pooled [N,P] and guidance [N] beside the usual inputs."""
        moved = latent + self.project(pooled)[:, :, None, None]
        return cast(Tensor, self.denoiser(moved, timestep, context)) * (1 + 0.1 * guidance[:, None, None, None])

    def packed(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The same for contexts [N,1,D+P+1] that have the pooled vector and the guidance at their end."""
        return self(latent, timestep, context[..., : -POOLED - 1], context[:, 0, -POOLED - 1 : -1], context[:, 0, -1])


@torch.no_grad()
def add_conditioning(directory: Path, backbone: Backbone, seed: int) -> None:
    """Rewrite the directory's ensemble with the further inputs, and write trajectories of its members."""
    generator = torch.Generator().manual_seed(seed + 3)
    torch.manual_seed(seed + 4)
    network = Conditioned(cast(nn.Module, backbone.denoiser), backbone.latent_shape[0]).eval()
    export_conditioned(network, backbone, POOLED, directory / "unet.onnx")
    tables = load_file(directory / "tables.safetensors")
    for name in [name for name in SETS if name in tables]:
        rows = tables[name].shape[:-1]
        tables[f"{name}.pooled"] = torch.randn(*rows, POOLED, generator=generator)
        tables[f"{name}.guidance"] = 1 + torch.rand(*rows, generator=generator)
    for part in ("pooled", "guidance"):  # the unconditional row of posterior tables is the producer's
        tables[f"posterior.{part}"][:, -1] = tables[f"producer.{part}"][-1]
    save_file(tables, directory / "tables.safetensors")
    manifest = json.loads((directory / "ensemble.json").read_text())
    for part in ("unet", "tables"):
        path = directory / manifest["files"][part]["path"]
        manifest["files"][part] |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    manifest["conditioning"] = CONDITIONING
    (directory / "ensemble.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (directory / "golden.json").unlink()
    cases = [
        _trajectories(network, NoiseSchedule(**manifest["diffusion"]), backbone.latent_shape, tables, *case)
        for case in ((0, 5, 7, 3.0), (3, 2**40 + 1, 4, 1.0), (2, 9, 12, 2.0))
    ]
    text = json.dumps({"reference": f"torch {torch.__version__}", "cases": cases})
    (directory / FILE).write_text(text + "\n")


def _trajectories(
    network: Conditioned,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    tables: dict[str, Tensor],
    index: int,
    seed: int,
    steps: int,
    guidance: float,
) -> dict[str, object]:
    """Each member's final latent, from the seed's first latent."""
    packed = torch.cat([tables["tables"], tables["tables.pooled"], tables["tables.guidance"][..., None]], dim=-1)
    sampler = Sampler(schedule, steps, guidance)
    denoise = cast(Denoiser, network.packed)
    finals = []
    for table in packed:
        context, unconditional = table[index][None, None], table[-1][None, None]
        latent = first_latent(seed, shape)[None]
        finals.append(sampler.roll(denoise, 0, sampler.count, latent, context, unconditional).flatten().tolist())
    return {"class": index, "seed": str(seed), "steps": steps, "guidance_scale": guidance, "finals": finals}
