"""Train M class-embedding tables on a frozen backbone, all of them together.

Writes a run directory (tables.safetensors, run.json) that ``export``, ``sample`` and ``evaluate`` read. With --bins and
--rotations the classes are under-sampled on purpose, each class once in every bin; without, every image is used. A run
that was broken off goes on from its last checkpoint when the same command is given again.
"""

import argparse
import hashlib
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from decuwatch_training.backbone import INDEX_FILE, Backbone, add_backbone_arguments, backbone_of
from decuwatch_training.checkpoint import CHECKPOINT_FILE
from decuwatch_training.contactsheet import write_card
from decuwatch_training.data import DataSet, Images, add_data_arguments, read_data
from decuwatch_training.datacard import DataCard, class_data, data_card
from decuwatch_training.diagnostics import diagnose, draws_table, draws_warnings
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import check_replaceable, read_json, staged_directory, write_file, write_json
from decuwatch_training.loop import pick_device
from decuwatch_training.posterior import Laplace, fit_posterior, read_posterior
from decuwatch_training.tables import TableSettings, production_images, train_producers, train_tables

DRAWS, PRODUCER_DRAWS = 500, 4000
"""Draws of each class's row. A producer's row cannot know more images than it was drawn."""
LATENTS_IN_MEMORY = 1_000_000
RECORD = {"labels", "data", "settings", "backbone_sha256", "training", "diagnostics", "findings"}
"""What readers of a run.json need."""
PRODUCERS_FILE = "producers.pt"
RUN_FILES = ("run.json", "tables.safetensors", "datacard.json", "datacard.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train train``."""
    defaults = TableSettings()
    add_backbone_arguments(parser, "the frozen model")
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the run's directory; its checkpoint stands beside it")
    parser.add_argument("--components", type=int, default=defaults.components, help="M, the tables of one ensemble")
    parser.add_argument(
        "--bins",
        type=int,
        nargs="+",
        default=[],
        help="images of a class by bin, for example 1 10 100 5000; none: all there are",
    )
    parser.add_argument(
        "--rotations", type=int, default=defaults.rotations, help="ensembles in which the classes change their bins"
    )
    parser.add_argument(
        "--regime",
        choices=("disagreement", "exposure"),
        default=defaults.regime,
        help="draw classes equally often, or as often as they occur: then members disagree by exposure, not by data",
    )
    parser.add_argument(
        "--subset",
        choices=("bootstrap", "own", "shared"),
        default=defaults.subset,
        help="which images each member sees: draws from production's, its own from the whole class, or production's",
    )
    parser.add_argument(
        "--start",
        choices=("mean", "normal"),
        help="rows start around the backbone's mean row, or around zero; defaults to mean for disagreement if the "
        "backbone has a table, else normal",
    )
    parser.add_argument(
        "--start-spread", type=float, help="standard deviation of the start; defaults to 0.3 for mean, 1 for normal"
    )
    parser.add_argument(
        "--anchor",
        type=float,
        default=defaults.anchor,
        help="images that the prior around each row's start is worth; 0: no prior",
    )
    parser.add_argument(
        "--context-tokens", type=int, help="tokens of a class embedding; defaults to the backbone's own table's, else 1"
    )
    parser.add_argument("--steps", type=int, help=f"steps of training the members; defaults to {DRAWS} draws a row")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="rows of each member in a step")
    parser.add_argument(
        "--producer",
        choices=("stand-in", "reference"),
        help="what stands for the production model: a table trained on production's images, or the backbone's own; "
        "defaults to reference if there is one and no --bins",
    )
    parser.add_argument(
        "--producers",
        type=int,
        default=defaults.producers,
        help="further tables like the stand-in, for evaluation only",
    )
    parser.add_argument(
        "--producer-steps",
        type=int,
        help=f"steps of training each producer; defaults to {PRODUCER_DRAWS} draws a row",
    )
    parser.add_argument(
        "--producer-batch", type=int, default=defaults.producer_batch, help="rows of each producer in a step"
    )
    parser.add_argument("--posterior", type=int, default=3, help="P, tables drawn around the producer's; 0: none")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="Adam's peak learning rate")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of starts, images, order and noise")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of a folder's images that no table sees")
    parser.add_argument(
        "--no-data-card", action="store_true", help="do not compare the training images with each other"
    )
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints")


def settings_from(arguments: argparse.Namespace, reference: Tensor | None, classes: int) -> TableSettings:
    """The settings that were given, and the defaults that depend on others and on the backbone's own table.

    Raises TrainingError for one that is out of bounds.
    """
    start = arguments.start or ("mean" if arguments.regime == "disagreement" and reference is not None else "normal")
    spread = arguments.start_spread
    settings = TableSettings(
        components=arguments.components,
        rotations=arguments.rotations,
        bins=tuple(arguments.bins),
        subset=arguments.subset,
        regime=arguments.regime,
        start=start,
        start_spread={"mean": 0.3, "normal": 1.0}[start] if spread is None else spread,
        anchor=arguments.anchor,
        steps=_steps(arguments.steps, DRAWS, classes, arguments.batch),
        batch=arguments.batch,
        rate=arguments.rate,
        seed=arguments.seed,
        producer=arguments.producer or ("stand-in" if arguments.bins or reference is None else "reference"),
        producers=arguments.producers,
        producer_steps=_steps(arguments.producer_steps, PRODUCER_DRAWS, classes, arguments.producer_batch),
        producer_batch=arguments.producer_batch,
    )
    settings.validate(reference)
    return settings


def _steps(given: int | None, draws: int, classes: int, batch: int) -> int:
    """Steps after which each class's row was drawn ``draws`` times, if classes are drawn equally."""
    conditional = max(1, batch) * (1 - TableSettings().condition_dropout)
    return math.ceil(draws * classes / conditional) if given is None else given


def run(arguments: argparse.Namespace) -> None:
    """Train, diagnose, and write the run's directory."""
    check_replaceable(arguments.out, RUN_FILES)
    if arguments.posterior not in (0, *range(2, 65)):
        raise TrainingError(f"--posterior {arguments.posterior}: expected 0, or 2 to 64")
    device = pick_device()
    backbone = backbone_of(arguments).to(device)
    settings_from(arguments, backbone.reference, 1)
    data = _read(arguments, backbone)
    labels = data.train.labels
    settings = settings_from(arguments, backbone.reference, len(labels))
    tokens = arguments.context_tokens or (1 if backbone.reference is None else backbone.reference.shape[1])
    each = (len(labels) + 1) * tokens * backbone.context_dim
    tables = settings.components * settings.rotations
    print(
        f"trained: {tables} tables of {len(labels) + 1} x {tokens * backbone.context_dim} = {each:,} parameters a "
        f"component, {tables * each:,} in all"
    )
    print(f"frozen:  {backbone.parameter_count():,} parameters of the backbone")
    before = backbone.digest()
    latents = kept_latents(backbone, before, data.train, arguments.backbone)
    cards = [] if arguments.no_data_card else _cards(data.train, latents, settings, before)
    checkpoints = arguments.out.with_name(f"{arguments.out.name}.checkpoints")
    common = (backbone, latents, data.train.classes, labels, settings, tokens)
    kept = (arguments.checkpoint_every, device)
    trained = train_tables(*common, checkpoints / CHECKPOINT_FILE, *kept)
    produced = train_producers(*common, checkpoints / PRODUCERS_FILE, *kept)
    if backbone.digest() != before:
        raise RuntimeError("the frozen backbone changed while the tables were trained")
    picked = torch.cat([data.held_out.of_class(label)[:24] for label in range(len(labels))])
    held_out = backbone.encode(data.held_out.scaled(picked))
    diagnosis = diagnose(backbone, trained, held_out, data.held_out.classes[picked], settings)
    print(diagnosis.table(labels))
    for finding in diagnosis.findings:
        print(f"WARNING: {finding}", file=sys.stderr)
    images = production_images(data.train.classes, labels, settings)
    counts = torch.tensor([[len(part) for part in rotation] for rotation in images])
    worth = counts.float()
    if cards:
        worth = torch.tensor([[entry.n_eff for entry in card.classes] for card in cards])
    print(draws_table(labels, counts, worth, trained.updates, produced.draws))
    for line in draws_warnings(worth, produced.draws[:, 0, :-1]):
        print(f"WARNING: {line}", file=sys.stderr)
    posterior = None
    if arguments.posterior:
        posterior = fit_posterior(
            backbone, latents, data.train.classes, produced, counts, worth, arguments.posterior, settings.seed
        )
        print(posterior.describe())
    record = {
        "labels": list(labels),
        "folders": list(data.folders),
        "data": data.train.source,
        "settings": asdict(settings),
        "backbone_sha256": before,
        "training": trained.seconds,
        "producers_training": produced.seconds,
        "trained_parameters_per_component": each,
        "frozen_parameters": backbone.parameter_count(),
        "diagnostics": diagnosis.classes,
        "findings": diagnosis.findings,
        "posterior": None if posterior is None else posterior.record(),
        "data_cards": [card.numbers() for card in cards],
    }
    with staged_directory(arguments.out, RUN_FILES) as staged:
        tensors = {
            "tables": trained.tables,
            "start": trained.start,
            "images": trained.images,
            "updates": trained.updates,
            "producer": produced.producer,
            "draws": produced.draws,
        }
        if settings.producers:
            tensors["producers"] = produced.producers
        if posterior is not None:
            tensors |= posterior.tensors()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / "tables.safetensors")
        write_json(staged / "run.json", record)
        if cards:
            write_card(cards[0], staged)
    print(
        f"{arguments.out}: {tables} members in {trained.seconds['wall_seconds']:.0f} s, "
        f"{settings.rotations * (1 + settings.producers)} producers in {produced.seconds['wall_seconds']:.0f} s"
    )


def _read(arguments: argparse.Namespace, backbone: Backbone) -> DataSet:
    """The images, of the size that the backbone takes. Raises TrainingError if they do not fit it."""
    size, channels = image_shape_of(backbone)
    data = read_data(arguments.data, size, channels, arguments.held_out, arguments.classes, arguments.background)
    for line in data.describe():
        print(line, file=sys.stderr if line.startswith("WARNING") else sys.stdout)
    check_labels(data.train.labels, arguments.backbone)
    if data.train.shape != (channels, size, size):
        raise TrainingError(
            f"{arguments.data}: images of shape {list(data.train.shape)}, the backbone's autoencoder takes "
            f"{[channels, size, size]}"
        )
    if len(data.train) > LATENTS_IN_MEMORY:
        raise TrainingError(
            f"{arguments.data}: {len(data.train):,} images; at most {LATENTS_IN_MEMORY:,} latents are held in memory: "
            "give fewer images a class"
        )
    return data


def _cards(images: Images, latents: Tensor, settings: TableSettings, digest: str) -> list[DataCard]:
    """The card of production's images in each rotation; the first one is printed."""
    cards = []
    for rotation in production_images(images.classes, images.labels, settings):
        index = torch.cat(rotation).sort().values
        files = tuple(images.files[position] for position in index.tolist()) if images.files else ()
        part = Images(images.pixels[index], images.classes[index], images.labels, images.source, files)
        described = {"kind": "latents", "backbone_sha256": digest}
        cards.append(data_card(part, latents[index], described, settings.seed, progress=True))
    print(cards[0].table())
    return cards


def check_labels(labels: tuple[str, ...], backbone: Path) -> None:
    """Raise TrainingError if the backbone was pretrained on other classes, or on the same ones in another order."""
    _check_pipeline_labels(labels, backbone / INDEX_FILE)
    file = backbone / "backbone.json"
    record = read_json(file) if file.exists() else {}
    if not isinstance(record, dict):
        raise TrainingError(f"{file}: expected an object, as pretrain writes it")
    known = record.get("labels")
    if known is not None and (not isinstance(known, list) or not all(isinstance(label, str) for label in known)):
        raise TrainingError(f"{file}: labels: expected a list of texts, as pretrain writes it")
    if known is None or list(labels) == known:
        return
    index = next(
        (index for index, pair in enumerate(zip(labels, known, strict=False)) if pair[0] != pair[1]),
        min(len(labels), len(known)),
    )
    found, expected = (f"{names[index]!r}" if index < len(names) else "no class" for names in (labels, known))
    raise TrainingError(
        f"{file}: class {index} of the backbone is {expected}, of the data {found}; --classes can fix the order"
    )


def _check_pipeline_labels(labels: tuple[str, ...], file: Path) -> None:
    """Hold the data's classes against a DiT pipeline's ``id2label``, whose labels are synonyms with commas between
    them.

    Folders may have names of their own; a label that the pipeline has must have the pipeline's index.
    """
    if not file.exists():
        return
    known = read_json(file).get("id2label")
    if known is None:
        return
    if len(labels) != len(known):
        raise TrainingError(f"{file}: id2label has {len(known)} classes, the data {len(labels)}")
    places: dict[str, set[int]] = {}
    for index, names in known.items():
        for name in (names, *names.split(",")):
            places.setdefault(name.strip().casefold(), set()).add(int(index))
    for index, label in enumerate(labels):
        expected = places.get(label.casefold())
        if expected is not None and index not in expected:
            raise TrainingError(
                f"{file}: id2label has {label!r} at {min(expected)}, the data at {index}; --classes can fix the order"
            )


def image_shape_of(backbone: Backbone) -> tuple[int, int]:
    """Height (= width) and channels of the images that the autoencoder takes."""
    device = next(backbone.autoencoder.parameters()).device
    with torch.no_grad():
        image = backbone.autoencoder(torch.zeros(1, *backbone.latent_shape, device=device))
    return image.shape[2], image.shape[1]


def kept_latents(backbone: Backbone, digest: str, images: Images, beside: Path) -> Tensor:
    """The images' scaled latents, from a file beside the backbone if an earlier run has left it.

    The file's name holds a digest of backbone and images, so that a change of either encodes anew.
    """
    key = hashlib.sha256(digest.encode() + images.pixels.numpy().tobytes()).hexdigest()[:16]
    file = beside.with_name(f"{beside.name}.latents") / f"{key}.safetensors"
    if file.exists():
        try:
            latents = load_file(file)["latents"]
        except (SafetensorError, KeyError) as err:
            raise TrainingError(
                f"{file}: expected the latents of {len(images):,} images; delete it to encode them anew: {err}"
            ) from err
        if (
            latents.shape != (len(images), *backbone.latent_shape)
            or latents.dtype != torch.float32
            or not bool(torch.isfinite(latents).all())
        ):
            raise TrainingError(
                f"{file}: expected {len(images):,} finite latents of shape {list(backbone.latent_shape)}; delete it to "
                "encode them anew"
            )
        return latents
    latents = torch.cat([backbone.encode(images.scaled(index)) for index in torch.arange(len(images)).split(1024)])
    if not bool(torch.isfinite(latents).all()):
        raise TrainingError(
            f"{beside}: the autoencoder gives latents that are not finite for images of {images.source}"
        )
    content = save({"latents": latents.contiguous()})
    write_file(file, lambda aside: aside.write_bytes(content))
    return latents


@dataclass(frozen=True)
class Run:
    """A run directory: tables [R, M, K + 1, T, D], images [R, M, K], its record."""

    tables: Tensor
    images: Tensor
    labels: tuple[str, ...]
    record: dict[str, Any]
    path: Path
    producer: Tensor | None = None
    """[R, K + 1, T, D]: the table that stands for the production model."""
    producers: Tensor | None = None
    """[R, Q, K + 1, T, D]: more trainings of its kind, for evaluation only."""
    posterior: Tensor | None = None
    """[R, P, K + 1, T, D]."""
    draws: Tensor | None = None
    """[R, K]: training examples that each row of the producer was drawn for."""
    laplace: Laplace | None = None
    worth: Tensor | None = None
    """[R, K]: the images that each class is worth, as the posterior counts them."""
    data: list[list[dict[str, Any]]] | None = None
    """[R][K]: the manifest's ``data`` of each class."""


def load_run(path: Path, backbone: Backbone) -> Run:
    """Read a run and hold it against the backbone that it was trained on.

    Raises TrainingError that names the file for another backbone, another shape, a NaN or an infinity.
    """
    record = read_json(path / "run.json")
    missing = RECORD - record.keys() if isinstance(record, dict) else RECORD
    if missing:
        raise TrainingError(f"{path / 'run.json'}: {min(missing)} is missing: expected the record that train writes")
    file = path / "tables.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as err:
        raise TrainingError(f"{file}: expected the tables of a run: {err}") from err
    tables, images = tensors.get("tables"), tensors.get("images")
    labels = tuple(record["labels"])
    if (
        tables is None
        or images is None
        or tables.dim() != 5
        or tables.shape[2] != len(labels) + 1
        or tables.shape[-1] != backbone.context_dim
    ):
        found = None if tables is None else list(tables.shape)
        raise TrainingError(
            f"{file}: tables of shape {found}, expected [rotations, components, {len(labels) + 1}, tokens, "
            f"{backbone.context_dim}]"
        )
    if images.shape != (*tables.shape[:2], len(labels)):
        raise TrainingError(
            f"{file}: image counts of shape {list(images.shape)}, expected {[*tables.shape[:2], len(labels)]}"
        )
    if tables.dtype != torch.float32 or images.dtype != torch.int64:
        raise TrainingError(
            f"{file}: tables of {tables.dtype} and image counts of {images.dtype}, expected float32 and int64"
        )
    check_finite(tables, file)
    if record["backbone_sha256"] != backbone.digest():
        raise TrainingError(
            f"{path}: trained on another backbone (SHA-256 {record['backbone_sha256'][:12]}, this one is "
            f"{backbone.digest()[:12]})"
        )
    return Run(tables, images, labels, record, path, **_extras(tensors, record, tables, file))


def _extras(tensors: dict[str, Tensor], record: dict[str, Any], tables: Tensor, file: Path) -> dict[str, Any]:
    """What a run has beside its members; nothing for a run of an older version."""
    if "producer" not in tensors:
        return {}
    rotations, rows = len(tables), tables.shape[2]
    result: dict[str, Any] = {}
    for name, lead in (("producer", 0), ("producers", 1), ("posterior", 1)):
        if name in tensors:
            found = tensors[name]
            if found.dtype != torch.float32 or found.dim() != 4 + lead or found.shape[1 + lead :] != tables.shape[2:]:
                raise TrainingError(f"{file}: {name} of {found.dtype} and shape {list(found.shape)}")
            if len(found) != rotations:
                raise TrainingError(f"{file}: {name} of {len(found)} rotations, expected {rotations}")
            check_finite(found, file)
            result[name] = found
    draws = tensors.get("draws")
    if draws is None or draws.dim() != 3 or draws.shape[0] != rotations or draws.shape[2] != rows:
        raise TrainingError(f"{file}: draws: expected a number for each row of each producer")
    result["draws"] = draws[:, 0, :-1]
    if "posterior" in result:
        result |= read_posterior(tensors, record, file)
    cards = record.get("data_cards") or []
    if cards:
        result["data"] = [[class_data(entry) for entry in card["classes"]] for card in cards]
    return result


def check_finite(tables: Tensor, file: Path) -> None:
    """Raise TrainingError that names the first value that is not finite."""
    wrong = torch.nonzero(~torch.isfinite(tables))
    if len(wrong):
        position = tuple(int(value) for value in wrong[0])
        raise TrainingError(
            f"{file}: {len(wrong)} values are not finite, the first at {list(position)}: {tables[position]}"
        )
