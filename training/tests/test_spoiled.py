"""The evaluation on spoiled classes: counts see nothing, the data card does."""

import sys
from pathlib import Path

from decuwatch_training.datacard import pixel_features
from tests.conftest import patterns

sys.path.insert(0, str(Path(__file__).parents[1]))
import spoiled


def test_counts_see_nothing_and_the_data_card_does() -> None:
    result = spoiled.evaluate(patterns(200, 4), pixel_features, count=100)
    assert result.keys() == spoiled.SPOILERS.keys()
    for kind in result.values():
        assert kind["class"]["count"] == [0.5, 0.5, 0.5]
    for kind in ("exact duplicates", "near duplicates"):
        assert result[kind]["class"]["n_eff"][0] > 0.9
        assert result[kind]["image"] is None
    assert result["exact duplicates"]["n_eff"][1] <= 10
    for kind in ("30% mislabeled", "hidden 1% mode"):
        value, low, high = result[kind]["image"]
        assert low <= value <= high
        assert value > 0.9
    assert result["30% mislabeled"]["class"]["own label"][0] == 1
    text = spoiled.table(result)
    assert text.count("\n") == 1 + len(spoiled.SCORES) + 2
    assert "0.50 [0.50, 0.50]" in text
