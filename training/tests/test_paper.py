"""The paper-size backbone is the paper's."""

import torch
from torch import Tensor, nn

from decuwatch_training.backbone import build_compvis_unet
from decuwatch_training.bench import Raw
from decuwatch_training.paper import paper_configuration


def test_the_unet_has_the_papers_size() -> None:
    with torch.device("meta"):  # shapes without memory
        unet = build_compvis_unet(paper_configuration())
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert round(parameters / 1e6, 1) == 400.9


def test_raw_runs_take_the_rows_they_are_asked_for() -> None:
    class Network(nn.Module):
        def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            assert latent.is_contiguous(memory_format=torch.channels_last)
            return latent * timestep[:, None, None, None] + context.mean()

    raw = Raw(Network(), "cpu", "fp32", (2, 4, 4), {"tokens": 1, "dim": 8})
    assert raw.run("eager", 3)().shape == (3, 2, 4, 4)
    assert raw.run("eager", 3) is raw.run("eager", 3)
