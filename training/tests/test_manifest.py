"""An ensemble that is not as its manifest says is refused by file and field, in one line, by every verb."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decuwatch_training import graphs
from decuwatch_training.check import check_directory
from decuwatch_training.cli import main
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import export_ensemble
from decuwatch_training.files import sha256_file
from decuwatch_training.golden import write_golden
from decuwatch_training.manifest import read_manifest, read_tables
from decuwatch_training.measure import subjects_of
from decuwatch_training.profile import FORMAT_1_PROFILE
from decuwatch_training.sample import draw_grid
from decuwatch_training.settings import parse
from decuwatch_training.tiny import tiny_backbone, tiny_run
from tests.test_sweep import replacements

REPOSITORY = Path(__file__).parents[2]
FREE = ("provenance", "diagnostics", "reference", "reason")
"""Parts of a manifest that this reader only hands on."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = tiny_backbone(4, 1, 1)
    out = tmp_path_factory.mktemp("exported") / "ensemble"
    profile = {
        **FORMAT_1_PROFILE,
        "steps": 4,
        "request_risk": {"branch_step": 2, "rollout_steps": 1, "estimator": "mean-w2"},
    }
    export_ensemble(backbone, tiny_run(backbone, 3, 1), out, "tiny", "fp32", "torch-cpu", profile, 0, {})
    return out


@pytest.fixture
def ensemble(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "ensemble"))


def measure(paths: list[Path], work: Path) -> list[np.ndarray]:
    """Scores of two requests of each class, kept in ``work``."""
    subjects = subjects_of(paths, 2, work)
    setting = parse("mean-w2@0+1/2:members:own", subjects[0].tables, 2.0, subjects[0].schedule)
    return [subject.scores(setting) for subject in subjects]


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field and entry of a document that the reader looks at."""
    if at and at[-1] in FREE:
        return
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from paths_in(inner, (*at, name))


def refusal(file: Path) -> str | None:
    try:
        read_tables(file.parent, read_manifest(file))
    except TrainingError as err:
        return str(err)
    return None


def inside(document: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        document = document[name]
    return document


def test_the_committed_manifests_are_read() -> None:
    for path in sorted((REPOSITORY / "ensembles" / "fashion-mnist").glob("*.json")):
        if path.name != "golden.json":
            assert read_tables(path.parent, read_manifest(path)).members.shape == (4, 11, 1, 64)


def test_every_field_of_a_manifest_is_in_its_bounds_or_refused(ensemble: Path) -> None:
    """Drop each field, replace it by every kind of value, and add one that does not exist."""
    file = ensemble / "ensemble.json"
    sound = json.loads(file.read_text())
    cases, accepted = 0, set()

    def refused(document: Any, name: str, required: bool) -> None:
        nonlocal cases
        cases += 1
        file.write_text(json.dumps(document))
        message = refusal(file)
        if message is None:
            assert not required, f"{name} was accepted"
            accepted.add(name)
            return
        assert "\n" not in message
        assert str(ensemble) in message
        assert not required or name in message, (name, message)

    for path in paths_in(sound):
        name = str(next(part for part in reversed(path) if isinstance(part, str)))
        if isinstance(path[-1], str):
            without = copy.deepcopy(sound)
            del inside(without, path[:-1])[path[-1]]
            refused(without, name, required=path[-1] != "reference")
        for value in replacements(inside(sound, path)):
            if json.dumps(value) == json.dumps(inside(sound, path)):
                continue
            changed = copy.deepcopy(sound)
            inside(changed, path[:-1])[path[-1]] = value
            refused(changed, name, required=False)
        if isinstance(inside(sound, path), dict):
            added = copy.deepcopy(sound)
            inside(added, path)["extra"] = 1
            refused(added, "profile" if "profile" in path else "extra", required=True)
    print(f"{cases} manifests; other values are possible for {', '.join(sorted(accepted))}")
    assert cases > 1000
    assert not accepted & {"format", "files", "path", "size", "sha256", "components", "tokens", "dim", "graph"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "unet.onnx").write_bytes(b"another graph"), r"unet\.onnx: size or SHA-256"),
        (
            lambda path: (path / "decoder.onnx").unlink(),
            r"decoder\.onnx: no such file; ensemble\.json names it as files\.decoder",
        ),
        (lambda path: (path / "ensemble.json").write_text("[]"), r"ensemble\.json: expected a JSON object"),
        (lambda path: (path / "ensemble.json").write_text("{}"), r"ensemble\.json: format None"),
        (lambda path: (path / "ensemble.json").write_bytes(b"\xff\xfe"), r"ensemble\.json: expected a JSON document"),
        (lambda path: (path / "ensemble.json").unlink(), r"ensemble\.json: no such"),
    ],
)
def test_every_reader_of_an_ensemble_refuses_it(
    ensemble: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(ensemble)
    file, backbone = ensemble / "ensemble.json", tiny_backbone(4, 1, 1)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: check_directory(ensemble, backbone),
        lambda: write_golden(ensemble, backbone.denoiser, "PyTorch"),
        lambda: measure([file], tmp_path / "work"),
        lambda: draw_grid(file, tmp_path / "grid.png", 1, 2, 1.0, False, None),
    )
    for reader in readers:
        with pytest.raises(TrainingError, match=message):
            reader()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda found: {"reference": found["reference"]}, "expected a tensor 'tables'"),
        (lambda found: {**found, "tables": found["tables"].half()}, "tables of torch.float16"),
        (lambda found: {**found, "tables": found["tables"][:2]}, "tables of shape"),
        (lambda found: {**found, "tables": found["tables"] * float("nan")}, "tables holds a value that is not finite"),
        (lambda found: {**found, "reference": found["reference"][1:]}, "reference of shape"),
        (
            lambda found: {**found, "reference": found["reference"] * float("inf")},
            "reference holds a value that is not finite",
        ),
        (lambda found: {**found, "start": found["tables"]}, "start"),
    ],
)
def test_the_tables_are_checked(
    ensemble: Path, tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    file = ensemble / "tables.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors(load_file(file)).items()}, file)
    manifest = json.loads((ensemble / "ensemble.json").read_text())
    manifest["files"]["tables"] |= {"size": file.stat().st_size, "sha256": sha256_file(file)}
    (ensemble / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=message):
        read_tables(ensemble, read_manifest(ensemble / "ensemble.json"))


def test_weights_beside_a_graph_are_named_with_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As scoring/ensemble reads them: ``external`` belongs to the graph's own entry."""
    monkeypatch.setattr(graphs, "SINGLE_FILE_LIMIT", 20_000)
    backbone = tiny_backbone(4, 1, 1)
    out = tmp_path / "ensemble"
    profile = {
        **FORMAT_1_PROFILE,
        "steps": 4,
        "request_risk": {"branch_step": 2, "rollout_steps": 1, "estimator": "mean-w2"},
    }
    export_ensemble(backbone, tiny_run(backbone, 3, 1), out, "tiny", "fp32", "torch-cpu", profile, 0, {})
    files = json.loads((out / "ensemble.json").read_text())["files"]
    assert sorted(files) == ["decoder", "tables", "unet"]
    assert [entry["path"] for entry in files["unet"]["external"]] == ["unet.onnx.data"]
    assert max(check_directory(out, backbone).values()) < 1e-4
    (out / "unet.onnx.data").write_bytes(b"other weights")
    with pytest.raises(TrainingError, match=r"unet\.onnx\.data: size or SHA-256"):
        read_manifest(out / "ensemble.json")


def test_a_shard_that_was_kept_is_checked(ensemble: Path, tmp_path: Path) -> None:
    file, work = ensemble / "ensemble.json", tmp_path / "work"
    measure([file], work)
    (shard,) = work.iterdir()
    sound, content = dict(np.load(shard)), shard.read_bytes()
    for broken in (
        b"",
        b"garbage",
        content[:-20],
        content[: len(content) // 2],
        content.replace(b"mean-w2.npy", b"mean-w3.npy"),
    ):
        shard.write_bytes(broken)
        with pytest.raises(TrainingError, match="delete it to measure it anew"):
            measure([file], work)
    changes: list[dict[str, np.ndarray]] = []
    for name, array in sound.items():
        changes += [{key: value for key, value in sound.items() if key != name}, {**sound, name: array[None]}]
        changes += [{**sound, name: array.astype(str)}]
        changes += [{**sound, name: np.full(array.shape, np.nan)}, {**sound, "extra": array}]
    for arrays in changes:
        with shard.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
        with pytest.raises(TrainingError, match="delete it to measure it anew"):
            measure([file], work)


def test_shards_of_another_network_are_not_taken(ensemble: Path, tmp_path: Path) -> None:
    """The same tables over another graph, or another schedule: other numbers."""
    file, work = ensemble / "ensemble.json", tmp_path / "work"
    measure([file], work)
    manifest = json.loads(file.read_text())
    manifest["diffusion"]["prediction"] = "v_prediction"
    file.write_text(json.dumps(manifest))
    measure([file], work)
    assert len(list(work.iterdir())) == 2


def test_rotations_that_do_not_belong_together(ensemble: Path, tmp_path: Path) -> None:
    file = ensemble / "ensemble.json"
    manifest = json.loads(file.read_text())
    manifest["classes"][0]["label"] = "another"
    (ensemble / "rotation-1.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=r"rotation-1\.json: classes: expected the labels of ensemble\.json"):
        measure([file, ensemble / "rotation-1.json"], tmp_path / "work")


VERBS: dict[str, list[str]] = {
    "pretrain": ["pretrain", "--data", "{}", "--out", "{out}"],
    "convert": ["convert", "{}", "{out}.safetensors"],
    "train": ["train", "--backbone", "{}", "--data", "{data}", "--out", "{out}"],
    "train with a YAML": [
        "train",
        "--backbone",
        "{file}",
        "--backbone-config",
        "{}",
        "--data",
        "{data}",
        "--out",
        "{out}",
    ],
    "train on": ["train", "--backbone", "{backbone}", "--data", "{}", "--out", "{out}"],
    "train in order": ["train", "--backbone", "{backbone}", "--data", "{data}", "--classes", "{}", "--out", "{out}"],
    "judge": ["judge", "--data", "{}", "--out", "{out}"],
    "judge by features": ["judge", "--data", "{data}", "--out", "{out}", "--features", "{}"],
    "judge by a judge": ["judge", "--data", "{data}", "--out", "{out}", "--judge", "{}"],
    "export": ["export", "--backbone", "{backbone}", "--run", "{}", "--out", "{out}", "--name", "a"],
    "check": ["check", "{}", "--backbone", "{backbone}"],
    "golden": ["golden", "{}"],
    "evaluate": ["evaluate", "{}", "--out", "{out}"],
    "sample": ["sample", "{}", "--out", "{out}"],
    "bench": ["bench", "{}"],
    "tiny": ["tiny", "--out", "{}/ensemble"],
}


def places(root: Path) -> Iterator[Path]:
    """Paths at which nothing is that a verb could read."""
    yield root / "missing"
    (root / "empty").mkdir()
    yield root / "empty"
    for name, content in {
        "void": b"",
        "garbage": b"\x80\x04garbage\n\xff",
        "text": b"a: [1, 2\n",
        "null": b"null",
        "zip": b"PK\x03\x04",
    }.items():
        (root / name).write_bytes(content)
        (root / f"{name}.safetensors").write_bytes(content)
        (root / f"{name}.ckpt").write_bytes(content)
        yield from (root / name, root / f"{name}.safetensors", root / f"{name}.ckpt")
        yield root / name / "beneath"
        folder = root / f"folder-{name}"
        for inner in (
            "ensemble.json",
            "run.json",
            "tables.safetensors",
            "unet/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
            "a/x.png",
        ):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            (folder / inner).write_bytes(content)
        yield folder
    for inner in ("ensemble.json", "run.json", "unet/config.json"):
        (root / "folders" / inner).mkdir(parents=True)
    yield root / "folders"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_what_it_cannot_read_in_one_line(
    tmp_path: Path, trained_directory: Path, folder: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in places(tmp_path):
        if verb == "tiny" and place.suffix == "" and not place.is_file():
            continue  # a directory to write to
        named = {"out": tmp_path / "out", "data": folder, "backbone": trained_directory, "file": tmp_path / "text.ckpt"}
        words = [word.format(place, **named) for word in VERBS[verb]]
        code, printed = main(words), capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line and not line.startswith(("WARNING", "\r"))]
        assert (code, len(lines)) == (1, 1), (words, code, printed)
        assert lines[0].startswith(f"decuwatch-train {words[0]}: "), printed


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    assert main(["tiny", "--out", str(tmp_path / "model.ckpt")]) == 1
    assert "model.ckpt: a file, expected a directory to write" in capsys.readouterr().err
    assert (tmp_path / "model.ckpt").read_bytes() == b"weights"
