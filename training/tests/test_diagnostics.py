"""What silently breaks an ensemble, reproduced small: the sound training passes, each broken one is named."""

import pytest
import torch

from decuwatch_training.backbone import Backbone
from decuwatch_training.data import DataSet
from decuwatch_training.diagnostics import Diagnosis, diagnose
from decuwatch_training.tables import TableSettings, train_tables

BINS = (1, 250)


def trained(backbone: Backbone, data: DataSet, **settings: object) -> Diagnosis:
    own = {"regime": "exposure", "subset": "own", "start": "normal", "start_spread": 1.0}
    chosen = TableSettings(
        **{"components": 4, "rotations": 2, "bins": BINS, "steps": 120, "batch": 8, "rate": 5e-2, **own, **settings}
    )  # type: ignore[arg-type]
    latents = backbone.encode(data.train.scaled())
    held_out = backbone.encode(data.held_out.scaled())
    tables = train_tables(backbone, latents, data.train.classes, data.train.labels, chosen)
    return diagnose(backbone, tables, held_out, data.held_out.classes, chosen)


def ratio(diagnosis: Diagnosis) -> float:
    """Disagreement on classes of one image over that on well-sampled ones, each class compared with itself."""
    values = []
    for first, second in zip(*diagnosis.classes, strict=True):
        rare, common = (first, second) if first["images"][0] == 1 else (second, first)
        values.append(rare["disagreement"] / common["disagreement"])
    return float(torch.tensor(values).log().mean().exp())


def test_natural_frequency_is_sound(trained_backbone: Backbone, data: DataSet) -> None:
    diagnosis = trained(trained_backbone, data)
    assert diagnosis.findings == []
    assert ratio(diagnosis) > 5
    for rows in diagnosis.classes:
        for row in rows:
            assert (row["updates"] > 20) == (row["images"][0] == 250)


def test_natural_frequency_with_shared_images_is_sound(trained_backbone: Backbone, data: DataSet) -> None:
    diagnosis = trained(trained_backbone, data, subset="shared")
    assert diagnosis.findings == []
    assert ratio(diagnosis) > 5


def test_shared_images_drawn_equally_lose_the_signal_and_a_prior_brings_it_back(
    trained_backbone: Backbone, data: DataSet
) -> None:
    plain = trained(trained_backbone, data, subset="shared", regime="disagreement")
    assert any("saw the same images" in finding for finding in plain.findings)
    anchored = trained(trained_backbone, data, subset="shared", regime="disagreement", anchor=0.3)
    assert anchored.findings == []
    assert ratio(anchored) > 2 * ratio(plain)


def test_a_narrow_start_is_found(trained_backbone: Backbone, data: DataSet) -> None:
    """Rows that nothing ever moves from their common start agree on what they have never seen."""
    diagnosis = trained(trained_backbone, data, bins=(0, 250), start="mean", start_spread=0.01)
    assert any("began too close together" in finding for finding in diagnosis.findings)


@pytest.mark.parametrize("settings", [{"rate": 1e-4}, {"steps": 3}])
def test_too_few_updates_are_found(trained_backbone: Backbone, data: DataSet, settings: dict[str, object]) -> None:
    diagnosis = trained(trained_backbone, data, regime="disagreement", **settings)
    assert any("too few updates" in finding for finding in diagnosis.findings)
