"""The data card tells spoiled classes from clean ones, names the files, and equals what a plain computation gives."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from decuwatch_training import datacard
from decuwatch_training.cli import main
from decuwatch_training.contactsheet import contact_sheet, write_card
from decuwatch_training.data import Images, read_data
from decuwatch_training.datacard import DataCard, data_card, n_effective, pixel_features
from decuwatch_training.files import read_json
from decuwatch_training.neighbors import search
from tests.conftest import LABELS, pattern

KIND = {"kind": "pixels"}


def made(counts: list[int], seed: int = 1) -> Images:
    """``counts[c]`` noisy patterns of class c."""
    generator = np.random.default_rng(seed)
    pixels = [pattern(index, generator) for index, count in enumerate(counts) for _ in range(count)]
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    stacked = np.stack(pixels) if pixels else np.empty((0, 8, 8), np.uint8)
    return Images(torch.from_numpy(stacked)[:, None], classes, LABELS[: len(counts)], "patterns")


def card_of(images: Images, **options: object) -> DataCard:
    return data_card(images, pixel_features(images), KIND, **options)  # type: ignore[arg-type]


def test_n_eff_by_hand() -> None:
    assert n_effective(1000, 0.0) == pytest.approx(1000)
    assert n_effective(1000, 1.0) == 1
    assert n_effective(2, 1.0) == 1
    assert n_effective(0, 0.0) == 0
    # Points 0, 1, 3, 10 and 10 again on a line: of ten pairs, nearer than 2.5 are 0-1, 1-3 and the copies.
    points = torch.tensor([[0.0], [1.0], [3.0], [10.0], [10.0]])
    pixels = torch.tensor([0, 1, 3, 10, 10], dtype=torch.uint8).view(5, 1, 1, 1)
    images = Images(pixels, torch.zeros(5, dtype=torch.int64), ("line",), "line")
    (row,) = data_card(images, points, KIND, tau=2.5).classes
    assert row.close_pairs == pytest.approx(0.3)
    assert row.n_eff == pytest.approx(1 / (1 / 5 + 3 / 10))
    assert (row.n, row.distinct, row.near_duplicate_groups, row.images_in_groups) == (5, 4, 2, 5)
    assert row.median_nearest == pytest.approx(1)  # of 1, 1, 2 and 7, the lower of the middle two


def test_n_eff_recomputed_with_another_code() -> None:
    images = made([7, 12, 5])
    images.pixels[1:4] = images.pixels[0]
    features = pixel_features(images).numpy().astype(float)
    card = card_of(images)
    for label, row in enumerate(card.classes):
        mine = [at for at in range(len(images)) if int(images.classes[at]) == label]
        pairs = [(a, b) for a in mine for b in mine if a < b]
        close = sum(float(((features[a] - features[b]) ** 2).sum()) ** 0.5 < card.tau for a, b in pairs)
        assert row.n_eff == pytest.approx(max(1, 1 / (1 / len(mine) + close / len(pairs))), abs=0.01)
    assert card.classes[0].distinct == 4
    assert card.classes[0].close_pairs >= 6 / 21


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_blocks_find_what_brute_force_finds(block: int) -> None:
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(150, 6, generator=generator)
    points[100:120] = points[:20] + 0.01 * torch.randn(20, 6, generator=generator)
    points[120:130] = points[:10]
    contents = torch.arange(150)
    contents[120:130] = torch.arange(10)
    found = search(points, contents, 5, 0.5, block)
    exact = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    joined = (exact < 0.5) | (contents[:, None] == contents)
    for _ in range(8):
        joined = (joined.double() @ joined.double()) > 0
    assert torch.equal(found.groups[:, None] == found.groups, joined)
    exact[contents[:, None] == contents] = torch.inf
    wanted = exact.sort(dim=1, stable=True)
    torch.testing.assert_close(found.distance, wanted.values[:, :5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.gather(1, found.index), found.distance, rtol=1e-9, atol=1e-9)


def test_many_near_duplicates_join_without_a_list_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decuwatch_training.neighbors.PAIRS_AT_ONCE", 10)
    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)) * 1e-3
    assert len(search(points, torch.arange(300), 3, 0.5, 64).groups.unique()) == 1


def test_spoiled_classes_are_found() -> None:
    clean = made([200] * 6)
    before = card_of(clean)
    assert all(row.n_eff > 190 for row in before.classes)
    assert all(row.neighbor_label_share is not None and row.neighbor_label_share > 0.95 for row in before.classes)
    generator = np.random.default_rng(9)
    spoiled = made([200] * 6)
    pixels = spoiled.pixels.numpy()
    pixels[:200] = pixels[np.arange(200) % 3]  # class 0: exact copies of three images
    for at in range(200, 400):  # class 1: noisy copies of one image
        pixels[at] = np.clip(pixels[200] + generator.normal(0, 1, (1, 8, 8)), 0, 255)
    other = made([0, 0, 0, 60, 60, 0], seed=3)
    pixels[400:460] = other.pixels.numpy()[::2].repeat(1, 0)[:60]  # class 2: 30% are of classes 3 and 4
    pixels[1000:1002] = made([0, 0, 0, 2, 0, 0], seed=5).pixels.numpy()  # class 5: a hidden mode of 1%
    card = card_of(spoiled)
    exact, near, wrong, clean3, _, hidden = card.classes
    assert (exact.distinct, exact.near_duplicate_groups, exact.images_in_groups) == (3, 3, 200)
    assert exact.n_eff < 4
    assert near.distinct > 100
    assert near.n_eff < 3
    assert clean3.n_eff > 190
    assert wrong.n_eff > 190
    assert hidden.n_eff > 190
    assert wrong.neighbor_label_share is not None
    assert wrong.neighbor_label_share < 0.8
    truth = np.zeros(1200, bool)
    truth[400:460] = truth[1000:1002] = True
    assert roc_auc_score(truth[400:600], -card.own_share[400:600].numpy()) > 0.95
    assert roc_auc_score(truth[1000:], -card.own_share[1000:].numpy()) > 0.95
    found = {suspect.position for suspect in card.suspects}
    assert len(found & set(np.flatnonzero(truth).tolist())) > 40
    assert len(found - set(np.flatnonzero(truth).tolist())) < 10
    assert {suspect.other for suspect in card.suspects if 400 <= suspect.position < 460} == {3, 4}


def test_near_duplicates_do_not_make_the_rest_of_their_class_outliers() -> None:
    images = made([100, 100])
    images.pixels[:70] = images.pixels[0]
    images.pixels[:70, 0, 0, 0] = torch.arange(70, dtype=torch.uint8) // 10
    assert card_of(images).classes[0].outliers < 10


def test_an_outlier_comes_first() -> None:
    images = made([60, 60])
    images.pixels[17] = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert card_of(images).outliers[0].position == 17


def test_one_picture_under_two_labels_is_a_group() -> None:
    images = made([30, 30])
    images.pixels[40] = images.pixels[3]
    card = card_of(images)
    assert card.groups == [[3, 40]]
    assert card.document()["near_duplicates"][0]["labels"] == {LABELS[0]: 1, LABELS[1]: 1}
    assert [row.near_duplicate_groups for row in card.classes] == [0, 0]


@pytest.mark.parametrize("counts", [[1], [0, 1], [0, 0], [1, 1], [3, 0, 2], [20, 0], [3, 90]])
def test_few_images(counts: list[int]) -> None:
    card = card_of(made(counts))
    assert [row.n for row in card.classes] == counts
    assert [row.n_eff for row in card.classes] == [pytest.approx(count, rel=0.01) for count in counts]
    assert all((row.neighbor_label_share is None) == (row.n <= 10) for row in card.classes)
    assert all(row.likely_mislabeled == 0 for row in card.classes if row.n <= 10)
    json.dumps(card.document(), allow_nan=False)
    assert contact_sheet(card).endswith("</html>\n")
    assert len(card.table().splitlines()) == len(counts) + 2


def test_all_images_are_identical() -> None:
    images = made([40, 10])
    images.pixels[:] = images.pixels[0]
    card = card_of(images)
    assert [(row.distinct, row.n_eff, row.neighbor_label_share) for row in card.classes] == [
        (1, 1.0, None),
        (1, 1.0, None),
    ]
    assert card.tau == 0
    assert len(card.groups) == 1
    json.dumps(card.document(), allow_nan=False)


def test_a_class_above_the_sample_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datacard, "SAMPLE", 100)
    images = made([400, 100])
    images.pixels[:400] = images.pixels[torch.arange(400) % 8]
    card = card_of(images)
    assert 5 < card.classes[0].n_eff < 12
    assert card.classes[0].distinct == 8
    assert card.numbers() == card_of(images).numbers()
    assert card.numbers() != card_of(images, seed=2).numbers()


def test_hostile_names_are_escaped() -> None:
    images = made([2, 2])
    name = '"><script>alert(1)</script><img src=http://x.invalid/'
    hostile = Images(
        images.pixels[[0, 0, 1, 1]], images.classes, (name, "b&<b>"), name, tuple(f"{name}{at}.png" for at in range(4))
    )
    page = contact_sheet(card_of(hostile))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert len(re.findall("<img", page)) == len(re.findall("<figure>", page)) > 0


def test_inspect_reads_every_image_and_writes_the_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), "--size", "8", "--out", str(tmp_path / "card")]) == 0
    printed = capsys.readouterr().out
    assert "seed 1" in printed
    document = read_json(tmp_path / "card" / "datacard.json")
    assert document["format"] == "decuwatch-data-card/1"
    assert [row["n"] for row in document["classes"]] == [10] * 6
    assert [row["label"] for row in document["classes"]] == list(LABELS)
    assert "<script" not in (tmp_path / "card" / "datacard.html").read_text()


def test_files_are_named_as_they_are_in_the_data(tmp_path: Path) -> None:
    for label, name in (("a", "x<1>.png"), ("a", "y\n2.png"), ("b", "z.png")):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(pattern(0, np.random.default_rng(1))).save(tmp_path / label / name)
    images = read_data(tmp_path, 8, 1, None).together()
    assert images.files == ("a/x<1>.png", "a/y\\n2.png", "b/z.png")
    card = card_of(images)
    assert card.document()["near_duplicates"][0]["files"] == list(images.files)
    write_card(card, tmp_path / "out")
    assert "a/x&lt;1&gt;.png" in (tmp_path / "out" / "datacard.html").read_text()


@pytest.mark.parametrize(
    "option", [["--size", "0"], ["--neighbors", "0"], ["--show", "0"], ["--tau", "-1"], ["--tau", "nan"]]
)
def test_numbers_out_of_range(folder: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), *option]) == 1
    assert f"{option[0]} {'nan' if option[1] == 'nan' else option[1]}" in capsys.readouterr().err


def test_inspect_and_train_compare_latents(trained_directory: Path, folder: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(folder), "--backbone", str(trained_directory), "--out", str(tmp_path / "card")]) == 0
    assert read_json(tmp_path / "card" / "datacard.json")["features"]["kind"] == "latents"
    train = [
        "train",
        "--backbone",
        str(trained_directory),
        "--data",
        str(folder),
        "--components",
        "2",
        "--producers",
        "0",
        "--steps",
        "2",
        "--batch",
        "2",
    ]
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    card = read_json(tmp_path / "run" / "run.json")["data_cards"][0]
    assert [row["n"] for row in card["classes"]] == [9] * 6
    whole = read_json(tmp_path / "run" / "datacard.json")
    assert {name: whole[name] for name in card} == card
    assert (tmp_path / "run" / "datacard.html").exists()
    assert main([*train, "--out", str(tmp_path / "without"), "--no-data-card"]) == 0
    assert read_json(tmp_path / "without" / "run.json")["data_cards"] == []
    assert not (tmp_path / "without" / "datacard.html").exists()
