"""Producers, posterior tables, and the closed form of the class gap."""

import json
from pathlib import Path

import pytest
import torch

from decuwatch_training.backbone import Backbone
from decuwatch_training.branch import make_requests, shared_means
from decuwatch_training.cli import main
from decuwatch_training.data import DataSet
from decuwatch_training.diagnostics import draws_warnings
from decuwatch_training.diffusion import Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.paide import estimate
from decuwatch_training.posterior import (
    Laplace,
    curvature,
    expected_gap,
    fit_temperature,
    posterior_tables,
    squared_distance,
)
from decuwatch_training.profile import DEFAULT_PROFILE, measures_of
from decuwatch_training.tables import (
    TableSettings,
    TrainedProducers,
    choose_images,
    production_images,
    train_producers,
)
from decuwatch_training.train import load_run

SMALL = TableSettings(
    components=3, rotations=2, bins=(1, 4, 8), steps=6, batch=4, seed=3, producer_steps=9, producer_batch=4
)


def producers(
    backbone: Backbone, data: DataSet, settings: TableSettings, checkpoint: Path | None = None
) -> TrainedProducers:
    latents = backbone.encode(data.train.scaled())
    return train_producers(
        backbone, latents, data.train.classes, data.train.labels, settings, checkpoint=checkpoint, checkpoint_every=4
    )


def test_producers_see_all_of_productions_images_and_members_draw_from_them(folder_data: DataSet) -> None:
    data = folder_data.train
    production = production_images(data.classes, data.labels, SMALL)
    assert [[len(images) for images in rotation] for rotation in production] == [[1, 4, 8, 1, 4, 8], [4, 8, 1, 4, 8, 1]]
    for rotation, members in zip(production, choose_images(data.classes, data.labels, SMALL), strict=True):
        for member in members:
            for whole, part in zip(rotation, member, strict=True):
                assert len(part) == len(whole)
                assert set(part.tolist()) <= set(whole.tolist())


def test_further_producers_differ_by_seed_and_by_start(random_backbone: Backbone, folder_data: DataSet) -> None:
    found = producers(random_backbone, folder_data, SMALL)
    assert found.producer.shape == (2, 7, 1, 8)
    assert found.producers.shape == (2, 2, 7, 1, 8)
    assert (found.draws.sum(-1) == 9 * 4).all()  # every row of every step, the unconditional ones too
    near = (found.producers[:, 0] - found.producer).norm()
    far = (found.producers[:, 1] - found.producer).norm()
    assert 0 < near < far
    again = producers(random_backbone, folder_data, SMALL)
    assert torch.equal(again.producers, found.producers)


def test_the_backbones_own_table_can_be_the_producer(random_backbone: Backbone, folder_data: DataSet) -> None:
    settings = TableSettings(**{**SMALL.__dict__, "producer": "reference", "producers": 1})
    found = producers(random_backbone, folder_data, settings)
    assert random_backbone.reference is not None
    assert all(torch.equal(table, random_backbone.reference) for table in found.producer)
    assert (found.draws[:, 0] == 0).all()
    assert (found.draws[:, 1].sum(-1) == 36).all()
    none = producers(random_backbone, folder_data, TableSettings(**{**settings.__dict__, "producers": 0}))
    assert none.producers.shape == (2, 0, 7, 1, 8)
    random_backbone.reference = None
    with pytest.raises(TrainingError, match="--producer reference: expected stand-in"):
        producers(random_backbone, folder_data, TableSettings(**{**settings.__dict__, "start": "normal"}))


def test_producers_go_on_from_their_checkpoint(random_backbone: Backbone, folder_data: DataSet, tmp_path: Path) -> None:
    whole = producers(random_backbone, folder_data, SMALL)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    hook = random_backbone.denoiser.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        producers(random_backbone, folder_data, SMALL, tmp_path / "producers.pt")
    hook.remove()
    resumed = producers(random_backbone, folder_data, SMALL, tmp_path / "producers.pt")
    torch.testing.assert_close(resumed.producers, whole.producers, rtol=1e-3, atol=1e-3)
    assert torch.equal(resumed.draws, whole.draws)


def test_curvature_is_the_mean_of_the_jacobians_product(random_backbone: Backbone, folder_data: DataSet) -> None:
    table = random_backbone.reference
    assert table is not None
    latents = random_backbone.encode(folder_data.train.scaled())
    values, vectors = curvature(random_backbone, table, latents, folder_data.train.classes, draws=4)
    assert vectors is not None
    found = vectors @ torch.diag(values) @ vectors.T
    generator = torch.Generator().manual_seed(3)  # as curvature draws
    picked = torch.randint(len(latents), (4,), generator=generator)
    timestep = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(latents[picked].shape, generator=generator)
    noisy = random_backbone.schedule.scheduler().add_noise(latents[picked], noise, timestep)  # type: ignore[arg-type]
    total = torch.zeros(8, 8)
    for x, t, label in zip(noisy, timestep, folder_data.train.classes[picked], strict=True):

        def predict(row: torch.Tensor, x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:
            return random_backbone.denoiser(x[None], t[None], row.view(1, 1, 8)).flatten()

        jacobian = torch.autograd.functional.jacobian(predict, table[label].flatten())
        total += 2 / 32 * jacobian.T @ jacobian / 4
    torch.testing.assert_close(found, total, rtol=0.1, atol=0.02 * float(total.abs().max()))


def test_wide_rows_have_a_diagonal_curvature(
    random_backbone: Backbone, folder_data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_backbone.reference
    assert table is not None
    latents, classes = random_backbone.encode(folder_data.train.scaled()), folder_data.train.classes
    values, vectors = curvature(random_backbone, table, latents, classes, draws=8)
    assert vectors is not None
    full = (vectors.square() * values).sum(1)
    monkeypatch.setattr("decuwatch_training.posterior.LARGEST_FULL", 4)
    monkeypatch.setattr("decuwatch_training.posterior.SKETCHES", 400)
    diagonal, none = curvature(random_backbone, table, latents, classes, draws=8)
    assert none is None
    torch.testing.assert_close(diagonal, full, rtol=0.3, atol=0.05 * float(full.max()))
    laplace = Laplace(diagonal, None, 1.0, 1.0)
    drawn = posterior_tables(table, laplace, torch.full((6,), 3.0), 2, 1)
    assert drawn.shape == (2, 7, 1, 8)
    assert torch.equal(drawn[:, -1], table[-1].expand(2, 1, 8))


def test_the_temperature_gives_the_trace_that_is_wanted() -> None:
    values, counts = torch.tensor([3.0, 0.5, 0.0]), torch.tensor([10.0, 200.0])
    temperature = fit_temperature(values, 0.4, counts, 0.05)
    traces = [(values * (count * values / temperature + 1 / 0.4).reciprocal()).sum() for count in counts]
    assert float(sum(traces)) / 2 == pytest.approx(0.05, rel=1e-4)
    assert fit_temperature(values, 0.4, counts, 1e6) == pytest.approx(1e9)


def test_draws_are_orthogonal_and_have_the_covariance_they_should() -> None:
    producer = torch.randn(3, 1, 12)
    vectors = torch.linalg.qr(torch.randn(12, 12)).Q
    laplace = Laplace(torch.linspace(0.1, 3, 12), vectors, 0.5, 0.8)
    offsets = torch.stack(
        [posterior_tables(producer, laplace, torch.tensor([2.0, 50.0]), 3, seed) - producer for seed in range(400)]
    )
    assert (offsets[:, :, -1] == 0).all()
    for label, count in ((0, 2.0), (1, 50.0)):
        root = laplace.root(count)
        flat = offsets[:, :, label, 0]
        found = torch.einsum("spi,spj->ij", flat, flat) / (400 * 3)
        torch.testing.assert_close(found, root @ root.T, rtol=0.3, atol=0.1 * float((root @ root.T).max()))
        whitened = torch.linalg.solve(root, flat[0].T).T
        torch.testing.assert_close(whitened @ whitened.T, 12 * torch.eye(3), rtol=1e-3, atol=1e-2)


def test_the_closed_form_is_the_mean_of_measured_gaps(random_backbone: Backbone) -> None:
    table = random_backbone.reference
    assert table is not None
    laplace = Laplace(torch.ones(8), None, 1.0, 1.0)
    counts = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10_000.0, 1e5])
    measure = measures_of(DEFAULT_PROFILE)["class_gap"]
    sampler = Sampler(random_backbone.schedule, measure.steps, 2.0)
    requests = make_requests([3, 4, 5], 32, 1)
    measured = torch.stack(
        [
            estimate(
                "mean-w2",
                shared_means(
                    random_backbone.denoiser,
                    sampler,
                    posterior_tables(table, laplace, counts, 4, seed),
                    requests,
                    requests.latents(random_backbone.latent_shape),
                    1,
                ),
                1.0,
            )
            for seed in range(12)
        ]
    ).mean(0)
    for position, label in enumerate((3, 4, 5)):
        expected = expected_gap(random_backbone, measure, 2.0, table[label], laplace.root(float(counts[label])))
        assert float(measured[32 * position : 32 * position + 32].mean()) == pytest.approx(expected, rel=0.35)


def test_squared_distance_is_in_the_metric() -> None:
    left, right = torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)
    vectors, values = torch.linalg.qr(torch.randn(4, 4)).Q, torch.tensor([0.0, 1.0, 2.0, 5.0])
    matrix = (vectors * values) @ vectors.T
    difference = (left - right).flatten(-2)
    expected = torch.einsum("...i,ij,...j->...", difference, matrix, difference)
    torch.testing.assert_close(squared_distance(values, vectors, left, right).float(), expected, rtol=1e-4, atol=1e-5)


def test_draws_that_cannot_tell_are_named() -> None:
    worth = torch.tensor([[1.0, 900.0, 5000.0]])
    assert draws_warnings(worth, torch.tensor([[4000, 4000, 5000]])) == []
    assert draws_warnings(worth, torch.tensor([[0, 0, 0]])) == []  # the backbone's own rows: not known
    (line,) = draws_warnings(worth, torch.tensor([[400, 400, 400]]))
    assert line.startswith("2 rows of the producer had fewer draws than their class has different images, such as 400")


def test_train_writes_what_export_needs(
    trained_directory: Path,
    trained_backbone: Backbone,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--backbone", trained_directory, "--data", folder, "--out", tmp_path / "run"]
    words += ["--bins", "1", "4", "--rotations", "2", "--components", "2", "--steps", "3", "--batch", "2"]
    words += ["--producer-steps", "4", "--producer-batch", "2", "--producers", "1", "--posterior", "2"]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    assert "posterior: s^2" in printed.out
    assert "producer draws" in printed.out
    assert "rows of the producer had fewer draws" in printed.err
    run = load_run(tmp_path / "run", trained_backbone)
    assert run.posterior is not None
    assert run.posterior.shape == (2, 2, 7, 1, 16)
    assert run.data is not None
    assert [entry["images"] for entry in run.data[1]] == [4, 1, 4, 1, 4, 1]
    out = tmp_path / "ensemble"
    words = [
        "export",
        "--backbone",
        trained_directory,
        "--run",
        tmp_path / "run",
        "--out",
        out,
        "--name",
        "x",
        "--force",
    ]
    assert main([str(word) for word in [*words, "--reference-seeds", "2"]]) == 0
    manifest = json.loads((out / "rotation-1.json").read_text())
    assert manifest["format"] == "decuwatch-ensemble/2"
    assert manifest["posterior"] == 2
    assert "image_risk" not in manifest["profile"]
    assert [entry["data"]["images"] for entry in manifest["classes"]] == [4, 1, 4, 1, 4, 1]
    assert all(entry["class_gap"] > 0 for entry in manifest["classes"])
    assert main(["train", "--backbone", "b", "--data", "d", "--out", str(tmp_path / "r"), "--posterior", "1"]) == 1
    assert "--posterior 1: expected 0, or 2 to 64" in capsys.readouterr().err
