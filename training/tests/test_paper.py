"""The paper-size backbone is the paper's."""

import torch

from decuwatch_training.backbone import build_compvis_unet
from decuwatch_training.paper import paper_configuration


def test_the_unet_has_the_papers_size() -> None:
    with torch.device("meta"):  # shapes without memory
        unet = build_compvis_unet(paper_configuration())
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert round(parameters / 1e6, 1) == 400.9
