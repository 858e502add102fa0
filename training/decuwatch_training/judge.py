"""Train a judge, a classifier of images, and measure by class how well it can tell them: judge.onnx and judge.json.

image_risk is 1 - p(class), as the judge sees the image. By default a small network is trained from scratch on the
images. --features puts a linear head on a pretrained network, --judge measures a finished classifier; both are ONNX
files with one input, float32 images [N, C, H, W], and one output of two dimensions. Images reach them as (v - mean) /
std by channel, for v in [0, 1], scaled to the size of their input.

Accuracy is measured on held-out images. The judge cannot tell classes whose accuracy is below --least-accuracy: they
get no image_risk.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from decuwatch_training.classifier import ClassifierSettings, check_classes, train_classifier
from decuwatch_training.data import DataSet, Images, add_data_arguments, read_data
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import check_replaceable, staged_directory, write_json
from decuwatch_training.graphs import export_classifier
from decuwatch_training.imagerisk import class_probabilities, most_likely
from decuwatch_training.picture import shown
from decuwatch_training.pretrained import (
    Normalization,
    outputs_of,
    read_network,
    session_of,
    with_head,
    with_names,
)

JUDGE_FILES = ("judge.json", "judge.onnx")
BINS = 15
"""Of the expected calibration error."""
NO_CLASS = -1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train judge``."""
    defaults = ClassifierSettings()
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="directory of judge.onnx and judge.json")
    parser.add_argument(
        "--size", type=int, default=32, help="side of the images that the ensemble's decoder makes; scales folders'"
    )
    parser.add_argument("--image-channels", type=int, default=3, choices=(1, 3), help="of images from folders")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of each folder's images to measure with")
    parser.add_argument(
        "--least-accuracy", type=float, default=0.6, help="accuracy below which the judge cannot tell a class"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps of training the small network")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="images a step")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="AdamW's peak learning rate")
    parser.add_argument("--width", type=int, default=defaults.width, help="channels of the network's first stage")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of weights and order")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--features", type=Path, metavar="ONNX", help="a pretrained network; trains a head on it")
    given.add_argument("--judge", type=Path, metavar="ONNX", help="a finished classifier; trains nothing")
    parser.add_argument(
        "--outputs",
        type=Path,
        help="for --judge: a text file with the class of each of its outputs on a line, - for no class; none: output k "
        "is class k",
    )
    parser.add_argument(
        "--input-size", type=int, help="side of the input of --features or --judge, if the graph leaves it free"
    )
    parser.add_argument(
        "--mean", type=float, nargs="+", help="by channel, for --features or --judge; defaults to ImageNet's for three"
    )
    parser.add_argument(
        "--std", type=float, nargs="+", help="by channel, for --features or --judge; defaults to ImageNet's for three"
    )
    parser.add_argument(
        "--head-images", type=int, default=1000, help="most images of a class that the head of --features is fitted to"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train or read, measure what was written, print and mark."""
    check_replaceable(arguments.out, JUDGE_FILES)
    _check(arguments)
    data = read_data(
        arguments.data,
        arguments.size,
        arguments.image_channels,
        arguments.held_out,
        arguments.classes,
        arguments.background,
    )
    for line in data.describe():
        print(line, file=sys.stderr if line.startswith("WARNING") else sys.stdout)
    check_classes(data.train)
    if arguments.judge:
        model = with_names(_network(arguments, data))
        outputs = read_outputs(arguments.outputs, data, _width(model, data.train.shape))
        document = _write(data, arguments, model, outputs, f"{arguments.judge.name}, trained elsewhere")
    elif arguments.features:
        model, outputs = with_names(_fit_head(arguments, data)), list(range(len(data.train.labels)))
        document = _write(data, arguments, model, outputs, f"a linear head on {arguments.features.name}")
    else:
        settings = ClassifierSettings(arguments.steps, arguments.batch, arguments.rate, arguments.width, arguments.seed)
        document = write_judge(data, arguments.out, settings, arguments.least_accuracy)
    size = (arguments.out / "judge.onnx").stat().st_size
    print(_table(data, document))
    print(f"{arguments.out}: {size / 1e6:.2f} MB; {document['measured']}")
    for line in _findings(data, document):
        print(f"WARNING: {line}", file=sys.stderr)


def write_judge(data: DataSet, out: Path, settings: ClassifierSettings, least_accuracy: float = 0.6) -> dict[str, Any]:
    """Train a small network, measure it and write it. Returns what judge.json holds."""
    outputs = list(range(len(data.train.labels)))
    with staged_directory(out, JUDGE_FILES) as staged:
        export_classifier(train_classifier(data.train, settings), data.train.shape, staged / "judge.onnx")
        return _measured(data, staged, outputs, least_accuracy, "a small network")


def _write(
    data: DataSet, arguments: argparse.Namespace, model: onnx.ModelProto, outputs: list[int], trained: str
) -> dict[str, Any]:
    with staged_directory(arguments.out, JUDGE_FILES) as staged:
        onnx.save(model, str(staged / "judge.onnx"))
        return _measured(data, staged, outputs, arguments.least_accuracy, trained)


def _measured(
    data: DataSet, directory: Path, outputs: list[int], least_accuracy: float, trained: str
) -> dict[str, Any]:
    """Measure the graph that was written to ``directory``, and write judge.json beside it."""
    graph = directory / "judge.onnx"
    session = session_of(onnx.load(str(graph)), graph)
    measured = measure_judge(outputs_of(session, data.held_out, name="held-out"), outputs, data.held_out)
    document = judge_document(data, outputs, measured, least_accuracy, trained)
    write_json(directory / "judge.json", document)
    return document


def _check(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.least_accuracy <= 1:
        raise TrainingError(f"--least-accuracy {arguments.least_accuracy}: expected 0 to 1")
    for name in ("size", "input_size", "head_images"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise TrainingError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.outputs and not arguments.judge:
        raise TrainingError("--outputs: expected --judge; a judge that is trained here has an output for each class")
    if not arguments.features and not arguments.judge:
        for name in ("input_size", "mean", "std"):
            if getattr(arguments, name) is not None:
                raise TrainingError(f"--{name.replace('_', '-')}: expected --features or --judge")
    if (arguments.mean is None) != (arguments.std is None):
        raise TrainingError("--mean and --std: expected both or neither")


def _network(arguments: argparse.Namespace, data: DataSet) -> onnx.ModelProto:
    taken = None
    if arguments.mean is not None:
        taken = Normalization(tuple(arguments.mean), tuple(arguments.std))
    path = arguments.judge or arguments.features
    return read_network(path, data.train.shape, arguments.input_size, taken)


def _width(model: onnx.ModelProto, shape: tuple[int, int, int]) -> int:
    """The number of the graph's outputs, which a graph need not say."""
    session = session_of(model, Path("the network"))
    return int(session.run(None, {"image": np.zeros((1, *shape), np.float32)})[0].shape[1])


def _fit_head(arguments: argparse.Namespace, data: DataSet) -> onnx.ModelProto:
    """Multinomial logistic regression on the frozen network's features, classes weighted equally."""
    network = _network(arguments, data)
    images = data.train
    generator = torch.Generator().manual_seed(arguments.seed)
    positions = [images.of_class(label) for label in range(len(images.labels))]
    chosen = torch.cat(
        [each[torch.randperm(len(each), generator=generator)[: arguments.head_images]] for each in positions]
    ).sort()
    part = Images(images.pixels[chosen.values], images.classes[chosen.values], images.labels, images.source)
    features = outputs_of(session_of(network, arguments.features), part, name="features")
    return with_head(network, *fit_head(features, part.classes, len(images.labels)))


def fit_head(features: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weight [K, F] and bias [K] of logistic regression on features [n, F]; standardization is folded into them."""
    deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    standardized = ((features.double() - mean) / deviation).numpy()
    model = LogisticRegression(C=100 / len(features), class_weight="balanced", max_iter=1000)
    model.fit(standardized, classes.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if count == 2:  # one row, of the second class against the first
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    weight = weight / deviation
    return weight.float(), (bias - weight @ mean).float()


def read_outputs(path: Path | None, data: DataSet, outputs: int) -> list[int]:
    """The class of each output, -1 for no class. A line has a class's label, or its folder's name, or ``-``.

    Raises TrainingError that names the line.
    """
    labels = data.train.labels
    if path is None:
        if outputs != len(labels):
            raise TrainingError(f"the judge has {outputs} outputs, the data {len(labels)} classes; give --outputs")
        return list(range(outputs))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as err:
        raise TrainingError(f"{shown(path)}: expected UTF-8 text: {err.reason} at byte {err.start}") from err
    known = {name: index for index, name in enumerate(data.folders)} | {
        label: index for index, label in enumerate(labels)
    }
    result = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name != "-" and name not in known:
            raise TrainingError(f"{shown(path)}: line {number}: {name!r}: expected a class of the data, or -")
        result.append(NO_CLASS if name == "-" else known[name])
    if len(result) != outputs:
        raise TrainingError(
            f"{shown(path)}: {len(result)} lines, expected one for each of the judge's {outputs} outputs"
        )
    if len(set(result) - {NO_CLASS}) < 2:
        raise TrainingError(f"{shown(path)}: expected outputs for at least two classes")
    return result


@dataclass(frozen=True)
class Measured:
    """How well a judge tells the classes of images with known labels."""

    accuracy: list[float | None]
    held_out: list[int]
    confidence: float
    """Mean probability of what it takes the images for."""
    calibration_error: float
    right: float
    """Share of all images that it takes for what they are."""

    @property
    def balanced(self) -> float:
        """Mean accuracy over the classes that were measured."""
        known = [value for value in self.accuracy if value is not None]
        return sum(known) / len(known) if known else float("nan")


def measure_judge(logits: Tensor, outputs: list[int], images: Images) -> Measured:
    """Accuracy by class and the expected calibration error (Naeini et al. 2015; 15 bins of equal width).

    The judge takes an image for the class with the largest probability, unless the outputs that stand for no class have
    more together.
    """
    classes = len(images.labels)
    counts = torch.bincount(images.classes, minlength=classes).tolist()
    if not len(images):
        return Measured([None] * classes, counts, float("nan"), float("nan"), float("nan"))
    taken, confidence = most_likely(class_probabilities(logits, outputs, classes))
    right = taken == images.classes
    accuracy = [
        float(right[images.classes == label].double().mean()) if count and label in outputs else None
        for label, count in enumerate(counts)
    ]
    calibration = calibration_error(confidence, right)
    return Measured(accuracy, counts, float(confidence.mean()), calibration, float(right.double().mean()))


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """sum over bins of |accuracy - mean confidence|, weighted by the bins' shares."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


def judge_document(
    data: DataSet, outputs: list[int], measured: Measured, least_accuracy: float, trained: str
) -> dict[str, Any]:
    """The manifest's ``judge`` object, as docs/ensemble-format.md has it."""
    channels, height, width = data.train.shape
    total = sum(measured.held_out)
    sentence = f"{trained}; no held-out images"
    if total:
        sentence = (
            f"{trained}; on {total} held-out images of {data.held_out.source}, not on generated ones: balanced "
            f"accuracy {measured.balanced:.3f}, mean confidence {measured.confidence:.3f} where {measured.right:.3f} "
            "are right, "
            f"expected calibration error {measured.calibration_error:.3f} ({BINS} bins)"
        )
    return {
        "input": "image",
        "output": "logits",
        "channels": channels,
        "height": height,
        "width": width,
        "range": [-1, 1],
        "resize": "none",
        "outputs": outputs,
        "accuracy": [None if value is None else round(value, 4) for value in measured.accuracy],
        "held_out": measured.held_out,
        "least_accuracy": least_accuracy,
        "measured": sentence,
    }


def _table(data: DataSet, document: dict[str, Any]) -> str:
    lines = [f"{'class':<20}{'images':>8}{'held out':>10}{'accuracy':>10}"]
    for index, (label, count) in enumerate(zip(data.train.labels, data.counts(), strict=True)):
        accuracy = document["accuracy"][index]
        number = "-" if accuracy is None else f"{accuracy:.3f}"
        mark = "" if can_tell(document, index) else "  cannot tell"
        lines.append(f"{label:<20}{count:>8}{document['held_out'][index]:>10}{number:>10}{mark}")
    return "\n".join(lines)


def can_tell(document: dict[str, Any], index: int) -> bool:
    """Whether image_risk is measured for a class."""
    accuracy = document["accuracy"][index]
    return accuracy is not None and accuracy >= document["least_accuracy"]


def _findings(data: DataSet, document: dict[str, Any]) -> list[str]:
    findings = []
    for index, label in enumerate(data.train.labels):
        if can_tell(document, index):
            continue
        accuracy = document["accuracy"][index]
        if index not in document["outputs"]:
            reason = "no output stands for it"
        elif accuracy is None:
            reason = "it has no held-out images"
        else:
            reason = f"accuracy {accuracy:.3f}, below {document['least_accuracy']:g}"
        findings.append(f"the judge cannot tell {label} ({reason}): its requests get no image_risk")
    return findings
