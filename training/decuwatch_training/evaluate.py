"""Measure how good the scores of an exported ensemble are, and at what cost in rows of U-Net work.

- Class level: does a score find requests of classes with few images? Needs bins and, best, rotations.
- Request level: within one class and bin, does it rank requests by the error of a producer that is not a member of the
  ensemble? The error is the squared distance of the producer's final latent from the one that the backbone's own table
  gives. Needs the tensors producers and reference.
- Image level: does it find images that are not of the class asked for, as a classifier says that is not the ensemble's
  judge? Needs producers, and --truth or --data.
- False alarms: thresholds from one half of the seeds, alarms on the other.

Controls stand in every table. Writes evaluation.json, evaluation.md and scores-by-bin.png. An evaluation that was
broken off goes on.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from decuwatch_training.classifier import ClassifierSettings
from decuwatch_training.data import read_data
from decuwatch_training.errors import TrainingError
from decuwatch_training.figures import draw_densities
from decuwatch_training.files import read_json, sha256_file, write_file, write_json
from decuwatch_training.imagerisk import Judge, most_likely
from decuwatch_training.judge import write_judge
from decuwatch_training.manifest import check_judge, manifests_of
from decuwatch_training.measure import Errors, Subject, subjects_of
from decuwatch_training.profile import JUDGE
from decuwatch_training.quality import (
    Cells,
    auroc_by_bin,
    auroc_same_class,
    average_precision,
    detection,
    false_alarms,
    mean_by_bin,
    rank_correlation,
    true_positive_rate,
    variation_within_cells,
    within_cells,
)
from decuwatch_training.report import markdown
from decuwatch_training.settings import Setting, comparison, parse, settings_of_profile

REPLICATES = 1000
TRUTH = ClassifierSettings(steps=4000, width=32, seed=1001)
"""Of the classifier that is trained with --data; a judge has other settings and another seed."""
FIRST_ALARM_SEED = 500_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train evaluate``."""
    parser.add_argument("ensemble", type=Path, help="an exported ensemble's directory, all of its rotations")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument(
        "--work",
        type=Path,
        help="directory of what was measured, from which a broken run goes on; defaults to OUT/shards",
    )
    parser.add_argument("--seeds", type=int, default=16, help="requests of each class in each rotation")
    parser.add_argument(
        "--settings",
        nargs="*",
        help="settings to compare with the profile's, estimator@branch+rollout/steps:tables:guidance[:M][:g=2]; "
        "defaults to a handful",
    )
    parser.add_argument("--error-steps", type=int, default=10, help="DDIM steps of the images whose errors are known")
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument(
        "--truth", type=Path, help="a directory of judge.onnx and judge.json that says which images are wrong"
    )
    truth.add_argument("--data", type=Path, help="images to train such a classifier on; it is kept in WORK/truth")
    parser.add_argument(
        "--alarm-seeds", type=int, default=100, help="requests of each class behind the false alarms; 0: none"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, compare, write."""
    for name, least in (("seeds", 2), ("error_steps", 1), ("alarm_seeds", 0)):
        if getattr(arguments, name) < least:
            raise TrainingError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least {least}")
    work = arguments.work or arguments.out / "shards"
    subjects = subjects_of(manifests_of(arguments.ensemble), arguments.seeds, work)
    truth = _truth(arguments, subjects[0], work)
    evaluation = evaluate(subjects, arguments.settings, arguments.error_steps, truth, arguments.alarm_seeds)
    write_json(arguments.out / "evaluation.json", _without_nan(evaluation.document))
    text = markdown(evaluation.document)
    write_file(arguments.out / "evaluation.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    draw_densities(evaluation.panels, arguments.out / "scores-by-bin.png")
    print(text)


def _truth(arguments: argparse.Namespace, subject: Subject, work: Path) -> Judge | None:
    """The classifier that says which images are wrong; None if there is no way to know."""
    if arguments.truth is None and arguments.data is None:
        return None
    directory = arguments.truth or work / "truth"
    manifest = subject.manifest
    if arguments.data is not None and not (directory / "judge.json").exists():
        image = manifest["image"]
        write_judge(read_data(arguments.data, image["height"], image["channels"]), directory, TRUTH)
    fields, file = read_json(directory / "judge.json"), directory / "judge.onnx"
    if not isinstance(fields, dict):
        raise TrainingError(f"{directory / 'judge.json'}: expected an object")
    check_judge(fields, len(manifest["classes"]), manifest["image"], str(directory / "judge.json"))
    if not file.is_file():
        raise TrainingError(f"{file}: no such file")
    if "judge" in manifest and sha256_file(file) == manifest["files"]["judge"]["sha256"]:
        raise TrainingError(f"{file}: the ensemble's own judge cannot say how good it is; expected another classifier")
    return Judge.open(directory, {"judge": fields, "files": {"judge": {"path": file.name}}})


@dataclass(frozen=True)
class Evaluation:
    """The document, and a panel of scores for each measurement of the profile."""

    document: dict[str, Any]
    panels: list[tuple[str, np.ndarray, Cells]]


def evaluate(
    subjects: Sequence[Subject], texts: Sequence[str] | None, steps: int, truth: Judge | None, alarm_seeds: int
) -> Evaluation:
    """All levels of all manifests together."""
    first = subjects[0]
    profile = first.manifest["profile"]
    own = settings_of_profile(profile, first.tables)
    scale = float(profile["guidance_scale"])
    chosen = comparison(first.tables, first.judge is not None) if texts is None else texts
    parsed = [parse(text, first.tables, scale, first.schedule) for text in chosen]
    settings = list(dict.fromkeys([*own.values(), *parsed]))
    if any(setting.measure.estimator == JUDGE for setting in settings) and first.judge is None:
        raise TrainingError(f"{first.path}: a setting with the judge, but the ensemble has none")
    cells = cells_of(subjects)
    bar = tqdm(total=len(settings) * len(subjects), desc="evaluate", unit="shard", mininterval=1.0)
    scores: dict[Setting, np.ndarray] = {}
    for setting in settings:
        parts = []
        for subject in subjects:
            parts.append(subject.scores(setting))
            bar.update()
        scores[setting] = np.concatenate(parts)
    bar.close()
    errors = [subject.errors(steps, scale) for subject in subjects]
    known = None if any(each is None for each in errors) else [each for each in errors if each is not None]
    names = {setting: name for name, setting in own.items()}
    controls = control_scores(subjects, cells)
    document: dict[str, Any] = {
        "ensemble": {
            "name": first.manifest["name"],
            "regime": first.manifest["regime"],
            "manifests": [subject.path.name for subject in subjects],
            "tables": first.tables,
            "producers": 0 if first.sets.producers is None else len(first.sets.producers),
        },
        "requests": {
            "seeds": first.seeds,
            "classes": len(first.manifest["classes"]),
            "rotations": len(subjects),
            "guidance_scale": scale,
            "error_steps": steps,
        },
        "profile": {name: setting.name for name, setting in own.items()},
        "bins": cells.sizes,
        "draws_by_bin": draws_by_bin(subjects, cells),
        "class_level": [],
        "request_level": None,
        "image_level": None,
        "false_alarms": [],
    }

    def entry(setting: Setting) -> dict[str, Any]:
        return {"name": setting.name, "measurement": names.get(setting), "rows": setting.rows, "tables": setting.count}

    def control(name: str) -> dict[str, Any]:
        return {"name": name, "measurement": None, "rows": 0, "tables": 0}

    every = [(entry(setting), values) for setting, values in scores.items()]
    every += [(control(name), values) for name, values in controls.items()]
    if len(cells.sizes) > 1:
        document["class_level"] = [{**head, **class_level(values, cells)} for head, values in every]
    if known is not None:
        document["request_level"] = request_level(every, known, cells)
        if truth is not None:
            document["image_level"] = image_level(subjects, every, known, cells, truth)
    if alarm_seeds:
        document["false_alarms"] = alarms_of(first, own, alarm_seeds)
    panels = [(f"{name}\n{setting.rows} rows", scores[setting], cells) for name, setting in own.items()]
    return Evaluation(document, panels)


def cells_of(subjects: Sequence[Subject]) -> Cells:
    """Bin, class and cell of every request, one manifest after another."""
    bins, classes, cells = [], [], []
    for rotation, subject in enumerate(subjects):
        images = torch.tensor([entry["images"] for entry in subject.manifest["classes"]]).double().mean(1)
        chosen = subject.requests.classes
        bins.append(images[chosen].numpy())
        classes.append(chosen.numpy())
        cells.append(rotation * 100_000 + chosen.numpy())
    return Cells(np.concatenate(bins), np.concatenate(classes), np.concatenate(cells))


def _by_class(subjects: Sequence[Subject], value: Callable[[dict[str, Any]], float | None]) -> np.ndarray:
    """A number of each request's class; NaN if the manifest does not say."""
    parts = []
    for subject in subjects:
        numbers = [value(entry) for entry in subject.manifest["classes"]]
        table = np.array([np.nan if number is None else number for number in numbers], float)
        parts.append(table[subject.requests.classes.numpy()])
    return np.concatenate(parts)


def control_scores(subjects: Sequence[Subject], cells: Cells) -> dict[str, np.ndarray]:
    """What needs no rows: random numbers, and tables of what is known of the class."""
    controls = {"random scores": np.random.default_rng(0).random(len(cells.bins)), "count table": -cells.bins}
    n_eff = _by_class(subjects, lambda entry: entry.get("data", {}).get("n_eff"))
    gap = _by_class(subjects, lambda entry: entry.get("class_gap"))
    for name, values in (("n_eff table", -n_eff), ("closed form of the class gap", gap)):
        if np.isfinite(values).all():
            controls[name] = values
    return controls


def draws_by_bin(subjects: Sequence[Subject], cells: Cells) -> dict[str, float] | None:
    """Mean number of examples that a row of the producer was drawn for; None in format 1."""
    draws = _by_class(subjects, lambda entry: entry.get("draws"))
    if not np.isfinite(draws).all():
        return None
    return {f"{size:g}": float(draws[cells.bins == size].mean()) for size in cells.sizes}


def class_level(scores: np.ndarray, cells: Cells) -> dict[str, Any]:
    """Each bin against the largest one."""
    largest = cells.sizes[-1]
    well = scores[cells.bins == largest]
    by_bin = {}
    for size in cells.sizes[:-1]:
        rare = scores[cells.bins == size]
        same, at_99, classes = auroc_same_class(scores, cells, size)
        by_bin[f"{size:g}"] = {
            "auroc": asdict(auroc_by_bin(scores, cells, size, REPLICATES)),
            "auprc": average_precision(rare, well),
            "tpr_at_1pct_fpr": true_positive_rate(rare, well),
            "auroc_same_class": same,
            "classes_at_99": at_99,
            "classes": classes,
        }
    return {
        "against_largest": by_bin,
        "rho_log_bin": rank_correlation(scores, np.log(cells.bins + 1e-9)),
        "mean_by_bin": {size: asdict(each) for size, each in mean_by_bin(scores, cells, REPLICATES).items()},
        "variation_within_class": variation_within_cells(scores, cells),
    }


def request_level(
    every: Sequence[tuple[dict[str, Any], np.ndarray]], errors: Sequence[Errors], cells: Cells
) -> dict[str, Any]:
    """Spearman's rho with the producers' errors, the ceiling, and rho with the members' own mean error."""
    producers = np.concatenate([each.producers for each in errors], axis=1)
    members = np.concatenate([each.members for each in errors], axis=1).mean(0)

    def entry(head: dict[str, Any], values: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        bins = {f"{size:g}": within_cells(values, truth, cells, size).value for size in cells.sizes}
        return {
            **head,
            "within": asdict(within_cells(values, truth, cells, replicates=REPLICATES)),
            "within_by_bin": bins,
            "overall": float(np.mean([rank_correlation(one, other) for one, other in _pairs(values, truth)])),
        }

    result: dict[str, Any] = {
        "mean_error_by_bin": {size: each.value for size, each in mean_by_bin(producers.mean(0), cells).items()},
        "ceiling": None,
        "settings": [],
    }
    if len(producers) > 1:
        which = [(q, other) for q in range(len(producers)) for other in range(q)]
        one, other = (np.stack([producers[index] for index in side]) for side in zip(*which, strict=True))
        head = {"name": "ceiling: another producer's error", "measurement": None, "rows": 0, "tables": 0}
        result["ceiling"] = entry(head, one, other)
    for head, values in every:
        if len(np.unique(values[cells.cells == cells.cells[0]])) == 1:
            continue  # a table by class cannot rank the requests of one class
        flattered = within_cells(values, members, cells, replicates=REPLICATES)
        result["settings"].append({**entry(head, values, producers), "within_members_own_error": asdict(flattered)})
    return result


def _pairs(scores: np.ndarray, errors: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.broadcast_to(scores, errors.shape), errors, strict=True))


def image_level(
    subjects: Sequence[Subject],
    every: Sequence[tuple[dict[str, Any], np.ndarray]],
    errors: Sequence[Errors],
    cells: Cells,
    truth: Judge,
) -> dict[str, Any]:
    """How well each score finds the producers' images that ``truth`` takes for another class than the one asked for."""
    wrong_parts, seen_parts = [], []
    for subject, each in zip(subjects, errors, strict=True):
        images = [subject.decode(torch.from_numpy(latents)) for latents in each.latents]
        verdicts = [most_likely(truth.probabilities(image))[0] != subject.requests.classes for image in images]
        wrong_parts.append(torch.stack(verdicts).numpy())
        if subject.judge is not None:
            seen_parts.append(torch.stack([subject.risk(subject.judge, image) for image in images]).numpy())
    wrong = np.concatenate(wrong_parts, axis=1)  # [Q, n]
    repeated = Cells(*(np.tile(values, len(wrong)) for values in (cells.bins, cells.classes, cells.cells)))

    def entry(head: dict[str, Any], values: np.ndarray) -> dict[str, Any]:
        flat = np.broadcast_to(values, wrong.shape).reshape(-1)
        return {**head, **asdict(detection(flat, wrong.reshape(-1), repeated, REPLICATES))}

    settings = [entry(head, values) for head, values in every]
    if seen_parts:
        head = {"name": "judge on the producer's own image", "measurement": None, "rows": 0, "tables": 0}
        settings.append(entry(head, np.concatenate(seen_parts, axis=1)))
    return {
        "truth": truth.fields["measured"],
        "images": int(wrong.size),
        "wrong": float(wrong.mean()),
        "wrong_by_bin": {f"{size:g}": float(wrong[:, cells.bins == size].mean()) for size in cells.sizes},
        "settings": settings,
    }


def alarms_of(first: Subject, own: dict[str, Setting], seeds: int) -> list[dict[str, Any]]:
    """False alarms of each measurement of the profile, with further requests of the first manifest."""
    subject = Subject(first.path, seeds, first.work, FIRST_ALARM_SEED)
    labels = [entry["label"] for entry in subject.manifest["classes"]]
    result = []
    for name, setting in own.items():
        total, by_class = false_alarms(subject.scores(setting), subject.requests.classes.numpy())
        classes = {labels[label]: asdict(rate) for label, rate in by_class.items()}
        result.append({"measurement": name, "rate": 0.05, "all": asdict(total), "classes": classes})
    return result


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what was not computed becomes null."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
