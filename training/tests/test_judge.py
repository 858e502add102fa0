"""The judge: what it learns, what its one graph computes, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from decuwatch_training.classifier import ClassifierSettings, train_classifier
from decuwatch_training.cli import main
from decuwatch_training.data import DataSet, Images
from decuwatch_training.errors import TrainingError
from decuwatch_training.imagerisk import class_probabilities, most_likely
from decuwatch_training.judge import calibration_error, fit_head, measure_judge
from tests.conftest import LABELS, pattern, patterns

FIELDS = {
    "input", "output", "channels", "height", "width", "range", "resize", "outputs", "accuracy", "held_out",
    "least_accuracy", "measured",
}  # fmt: skip
SMALL = ["--size", "8", "--image-channels", "1", "--held-out", "0.25"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a class, 40 PNG files each; the seventh class looks like the sixth."""
    root = tmp_path_factory.mktemp("judged")
    generator = np.random.default_rng(5)
    for index, label in enumerate((*LABELS, "slope again")):
        (root / label).mkdir()
        for position in range(40):
            Image.fromarray(pattern(min(index, 5), generator)).save(root / label / f"{position:02}.png")
    return root


def run(images: Path, out: Path, *words: str) -> dict[str, Any]:
    assert main(["judge", "--data", str(images), "--out", str(out), *SMALL, *words]) == 0
    return json.loads((out / "judge.json").read_text())


def logits(out: Path, pictures: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(out / "judge.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": pictures.numpy()})[0])


class Network(nn.Module):
    """Features of images [N, C, 12, 12]: a convolution and a mean."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = nn.Conv2d(channels, outputs, 5, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).relu().mean((2, 3))


def export(network: nn.Module, path: Path, shape: tuple[int, ...], free: tuple[int, ...] = (0,), **more: Any) -> Path:
    names = {"input_names": ["pixels"], "output_names": ["out"]}
    axes = {"pixels": {axis: f"axis{axis}" for axis in free}, "out": {0: "axis0"}} if free else {}
    options: dict[str, Any] = {"dynamo": False, "dynamic_axes": axes, **names, **more}
    torch.onnx.export(network, (torch.zeros(shape),), str(path), **options)
    return path


def test_a_small_network_is_trained_measured_and_marked(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(images, tmp_path / "judge", "--steps", "120", "--width", "8", "--least-accuracy", "0.8")
    printed = capsys.readouterr()
    assert document.keys() == FIELDS
    assert {name: document[name] for name in ("channels", "height", "width", "range", "resize", "outputs")} == {
        "channels": 1,
        "height": 8,
        "width": 8,
        "range": [-1, 1],
        "resize": "none",
        "outputs": list(range(7)),
    }
    assert document["held_out"] == [10] * 7
    assert min(document["accuracy"][:5]) > 0.9
    assert min(document["accuracy"][5:]) < 0.8  # nobody can tell the two apart
    marked = [label for label, value in zip((*LABELS, "slope again"), document["accuracy"], strict=True) if value < 0.8]
    for label in (*LABELS, "slope again"):
        assert (f"WARNING: the judge cannot tell {label} (accuracy" in printed.err) == (label in marked)
    assert printed.out.count("cannot tell") == len(marked)
    assert "on 70 held-out images" in document["measured"]
    assert "expected calibration error" in document["measured"]


def test_the_graph_has_a_free_number_of_images_and_normalizes_inside(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "--steps", "20", "--width", "4")
    model = onnx.load(tmp_path / "judge.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [17]
    shapes = {
        value.name: [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["N", 1, 8, 8], "logits": ["N", 7]}
    pictures = patterns(2, 9).scaled()
    together = logits(tmp_path, pictures)
    assert together.shape == (12, 7)
    torch.testing.assert_close(
        torch.cat([logits(tmp_path, picture[None]) for picture in pictures]), together, rtol=1e-4, atol=1e-4
    )


def test_accuracies_are_those_of_the_written_graph(images: Path, tmp_path: Path) -> None:
    document = run(images, tmp_path, "--steps", "120", "--width", "8")
    right = 0
    for index, label in enumerate((*LABELS, "slope again")):
        files = sorted((images / label).iterdir())[3::4]
        pictures = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
        found = logits(tmp_path, torch.from_numpy(pictures).float() / 127.5 - 1).argmax(1)
        assert document["accuracy"][index] == pytest.approx(float((found == index).float().mean()), abs=1e-3)
        right += int((found == index).sum())
    assert f"where {right / 70:.3f} are right" in document["measured"]


@pytest.mark.parametrize("side", [12, 3])
def test_a_head_on_pretrained_features_is_one_graph(images: Path, tmp_path: Path, side: int) -> None:
    """Repeated to three channels, averaged down if it is halved, scaled bilinearly, normalized: as torch does it."""
    network = Network(3, 32) if side > 5 else nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten())
    file = export(network, tmp_path / "features.onnx", (1, 3, side, side))
    document = run(images, tmp_path / "judge", "--features", str(file))
    assert np.mean(document["accuracy"][:5]) > 0.8
    assert "features.onnx" in document["measured"]
    model = onnx.load(tmp_path / "judge" / "judge.onnx")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pictures = patterns(1, 9).scaled()
    scaled = pictures if side > 4 else nn.functional.avg_pool2d(pictures, 2)
    scaled = nn.functional.interpolate(scaled, (side, side), mode="bilinear", align_corners=False)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    taken = ((scaled.repeat(1, 3, 1, 1) + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        expected = network(taken) @ torch.tensor(tensors["weight"]).T + torch.tensor(tensors["bias"])
    torch.testing.assert_close(logits(tmp_path / "judge", pictures), expected, rtol=1e-3, atol=1e-3)


def test_a_graph_that_fixes_one_image_is_freed(images: Path, tmp_path: Path) -> None:
    file = export(Network(1, 32), tmp_path / "features.onnx", (1, 1, 12, 12), free=())
    run(images, tmp_path / "judge", "--features", str(file), "--mean", "0.5", "--std", "0.5")
    assert logits(tmp_path / "judge", patterns(2, 9).scaled()).shape == (12, 7)


@pytest.mark.parametrize("opset", [12, 18])
def test_a_graph_of_another_opset_is_converted(images: Path, tmp_path: Path, opset: int) -> None:
    network = Network(3, 7)
    file = export(network, tmp_path / "network.onnx", (1, 3, 8, 8), opset_version=opset)
    run(images, tmp_path / "judge", "--judge", str(file), "--mean", "0.5", "--std", "0.5")
    model = onnx.load(tmp_path / "judge" / "judge.onnx")
    assert [entry.version for entry in model.opset_import] == [17]
    pictures = patterns(1, 9).scaled()
    with torch.no_grad():
        expected = network(pictures.repeat(1, 3, 1, 1))
    torch.testing.assert_close(logits(tmp_path / "judge", pictures), expected, rtol=1e-3, atol=1e-4)


def test_colors_become_gray_for_a_network_of_one_channel(images: Path, tmp_path: Path) -> None:
    network = Network(1, 7)
    file = export(network, tmp_path / "finished.onnx", (1, 1, 8, 8))
    words = ["--judge", str(file), "--mean", "0.5", "--std", "0.5", "--image-channels", "3"]
    run(images, tmp_path / "judge", *words)
    pictures = torch.rand(3, 3, 8, 8) * 2 - 1
    gray = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "judge", pictures), network(gray), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_head_is_logistic_regression(classes: int) -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(3, [1, 10, 0.1], (60, 3)).astype(np.float32)
    labels = np.arange(60) % classes
    features[:, 0] += labels
    features = np.concatenate([features, np.full((60, 1), 2.0, np.float32)], 1)  # one feature says nothing
    weight, bias = fit_head(torch.from_numpy(features), torch.from_numpy(labels), classes)
    found = (torch.from_numpy(features) @ weight.T + bias).softmax(1)
    standardized = (features - features.mean(0)) / np.where(features.std(0) > 0, features.std(0), 1)
    model = LogisticRegression(C=100 / 60, class_weight="balanced", max_iter=1000).fit(standardized, labels)
    np.testing.assert_allclose(found, model.predict_proba(standardized), atol=1e-3)


def test_a_finished_judge_is_measured_by_its_label_map(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(images, tmp_path / "trained", "--steps", "120", "--width", "8")
    model = onnx.load(tmp_path / "trained" / "judge.onnx")
    finished = tmp_path / "finished.onnx"
    onnx.save(model, finished)
    names = [*LABELS[:5], "slope", "slope"]  # its two outputs for slopes stand for one class
    (tmp_path / "map.txt").write_text("\n".join(names) + "\n")
    capsys.readouterr()
    words = ["--judge", str(finished), "--outputs", str(tmp_path / "map.txt"), "--mean", "0.5", "--std", "0.5"]
    document = run(images, tmp_path / "judge", *words)
    assert document["outputs"] == [0, 1, 2, 3, 4, 5, 5]
    assert document["accuracy"][:5] == trained["accuracy"][:5]
    assert document["accuracy"][5] > 0.9 > max(trained["accuracy"][5:])
    assert document["accuracy"][6] is None
    assert "the judge cannot tell slope again (no output stands for it)" in capsys.readouterr().err
    pictures = patterns(2, 9).scaled()
    torch.testing.assert_close(
        logits(tmp_path / "judge", pictures), logits(tmp_path / "trained", pictures), rtol=1e-4, atol=1e-4
    )
    names[0] = "-"  # the output still competes, but stands for no class
    (tmp_path / "map.txt").write_text("\n".join(names))
    assert run(images, tmp_path / "judge", *words)["accuracy"][0] is None


def test_probabilities_of_several_outputs_add_up() -> None:
    found = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    probabilities = class_probabilities(found, [1, 0, 1, -1], 3)
    torch.testing.assert_close(probabilities, torch.tensor([[0.2, 0.4, 0.0]], dtype=torch.float64))


def test_the_most_likely_class_is_that_of_the_go_evaluation() -> None:
    """The cases of TestMostLikely in scoring/evaluation."""
    taken, confidence = most_likely(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0, 0.2], [0.3, 0, 0.3]], dtype=torch.float64))
    assert taken.tolist() == [1, 0, -1]
    assert confidence.tolist() == pytest.approx([0.5, 0.4, 0.4])


def test_an_output_for_no_class_competes() -> None:
    one = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), "made")
    found = torch.tensor([[0.4, 0.1, 0.5], [0.2, 0.5, 0.3]]).log()
    measured = measure_judge(found, [0, 1, -1], one)
    assert measured.accuracy == [0, 1]
    assert measured.confidence == pytest.approx(0.5)
    # Several of them compete together: 0.3 + 0.25 is more than 0.45.
    found = torch.tensor([[0.45, 0, 0.3, 0.25], [0.2, 0.6, 0.1, 0.1]]).log()
    measured = measure_judge(found, [0, 1, -1, -1], one)
    assert measured.accuracy == [0, 1]
    assert measured.confidence == pytest.approx((0.55 + 0.6) / 2)


def test_the_calibration_error_is_the_gap_by_bin() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], dtype=torch.float64)
    right = torch.tensor([True, True, True, False, False, False])
    assert calibration_error(confidence, right) == pytest.approx((4 * 0.2 + 2 * 0.55) / 6)
    assert calibration_error(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)) == 0


def test_classes_that_cannot_be_learned_are_refused(data: DataSet) -> None:
    train = data.train
    alone = Images(train.pixels[:10], torch.zeros(10, dtype=torch.int64), ("bars",), "made")
    with pytest.raises(TrainingError, match="1 class, expected at least 2"):
        train_classifier(alone, ClassifierSettings(steps=1))
    kept = train.classes != 3
    without = Images(train.pixels[kept], train.classes[kept], train.labels, "made")
    with pytest.raises(TrainingError, match=r"class 3 \(frame\) has no training images"):
        train_classifier(without, ClassifierSettings(steps=1))


class Wrong(nn.Module):
    """Networks that no judge can be made of, by what is wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        mean = x.mean((1, 2, 3))[:, None] * self.weight
        if self.what == "batch":
            return mean + x.mean()  # what an image gives depends on the others
        if self.what == "two outputs":
            return mean, mean
        if self.what == "four dimensions":
            return mean[:, :, None, None]
        return mean / 0 if self.what == "not finite" else mean


@pytest.mark.parametrize(
    ("what", "shape", "words", "message"),
    [
        ("batch", (1, 3, 8, 8), [], "two images give other outputs than each alone"),
        ("two outputs", (1, 3, 8, 8), [], "expected one, "),
        ("four dimensions", (1, 3, 8, 8), [], "expected float32 of two dimensions"),
        ("not finite", (1, 3, 8, 8), [], "the network gives values that are not finite"),
        ("flat input", (1, 3), [], r"expected float32 images \[N, C, H, W\]"),
        ("two channels", (1, 2, 8, 8), [], "an input of 2 channels, expected 1 or 3"),
        ("free size", (1, 3, 8, 8), [], "give --input-size"),
        ("other size", (1, 3, 8, 8), ["--input-size", "9"], "--input-size 9: the input of .* has sides 8 and 8"),
        ("one channel", (1, 1, 8, 8), [], "give --mean and --std"),
        ("mean", (1, 3, 8, 8), ["--mean", "1", "2", "--std", "1"], "--mean: 2 numbers, expected 1 or 3"),
        ("std", (1, 3, 8, 8), ["--mean", "1", "--std", "0"], "std above 0"),
    ],
)
@pytest.mark.parametrize("option", ["--judge", "--features"])
def test_networks_that_do_not_fit_are_refused(
    images: Path,
    tmp_path: Path,
    what: str,
    shape: tuple[int, ...],
    words: list[str],
    message: str,
    option: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = (0, 2, 3) if what == "free size" else (0,)
    network = nn.Linear(3, 7) if what == "flat input" else Wrong(what)
    more = {"output_names": ["a", "b"]} if what == "two outputs" else {}
    file = export(network, tmp_path / "network.onnx", shape, free, **more)
    code = main(["judge", "--data", str(images), "--out", str(tmp_path / "out"), *SMALL, option, str(file), *words])
    printed = capsys.readouterr().err.splitlines()[-1]
    assert code == 1, printed
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bars\nchecks\n", "2 lines, expected one for each of the judge's 7 outputs"),
        ("bars\nnothing\n", "line 2: 'nothing': expected a class of the data, or -"),
        ("bars\n\nframe", "line 2: ''"),
        ("-\n" * 6 + "bars", "expected outputs for at least two classes"),
        (None, "6 outputs, the data 7 classes; give --outputs"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(
    images: Path, tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export(Network(3, 6 if text is None else 7), tmp_path / "network.onnx", (1, 3, 8, 8))
    words = ["--judge", str(file)]
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
        words += ["--outputs", str(tmp_path / "map.txt")]
    assert main(["judge", "--data", str(images), "--out", str(tmp_path / "out"), *SMALL, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--least-accuracy", "1.5"], "--least-accuracy 1.5: expected 0 to 1"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--rate", "0"], "--rate 0.0: expected more than 0"),
        (["--outputs", "map.txt"], "--outputs: expected --judge"),
        (["--input-size", "8"], "--input-size: expected --features or --judge"),
        (["--mean", "0.5"], "--mean: expected --features or --judge"),
        (["--features", "a.onnx", "--mean", "0.5"], "--mean and --std: expected both or neither"),
        (["--features", "a.onnx", "--head-images", "0"], "--head-images 0: expected at least 1"),
        (["--features", "missing.onnx"], "missing.onnx: no such file"),
    ],
)
def test_arguments_out_of_bounds(
    images: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "--data", str(images), "--out", str(tmp_path / "out"), *SMALL, *words]) == 1
    assert message in capsys.readouterr().err
