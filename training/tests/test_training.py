"""Only the tables train; every table trains as it would alone; a broken run goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from decuwatch_training.backbone import Autoencoder, Backbone, ContextUNet
from decuwatch_training.cli import main
from decuwatch_training.data import DataSet, read_data
from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.pretrain import PretrainSettings, build_autoencoder, pretrain, save_backbone
from decuwatch_training.tables import TableSettings, bin_of, choose_images, overlap_of, train_tables

SMALL = TableSettings(components=3, rotations=2, bins=(1, 4, 8), steps=6, batch=4, seed=3)


def test_the_backbone_is_frozen(random_backbone: Backbone, folder_data: DataSet) -> None:
    before = random_backbone.digest()
    latents = random_backbone.encode(folder_data.train.scaled())
    trained = train_tables(random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL)
    assert random_backbone.digest() == before
    assert not torch.equal(trained.tables, trained.start)
    assert all(not parameter.requires_grad for parameter in random_backbone.denoiser.parameters())


def test_the_digest_sees_every_parameter(random_backbone: Backbone) -> None:
    before = random_backbone.digest()
    parameters = [*random_backbone.denoiser.parameters(), *random_backbone.autoencoder.parameters()]
    for parameter in parameters[:: len(parameters) // 10]:
        with torch.no_grad():
            kept = parameter.view(-1)[0].item()
            parameter.view(-1)[0] = kept + 1
            assert random_backbone.digest() != before
            parameter.view(-1)[0] = kept
    assert random_backbone.digest() == before


def test_a_table_trains_beside_others_as_it_does_alone(random_backbone: Backbone, folder_data: DataSet) -> None:
    latents = random_backbone.encode(folder_data.train.scaled())
    together = train_tables(random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL)
    alone = train_tables(
        random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL, only=(1, 2)
    )
    torch.testing.assert_close(together.tables[1, 2], alone.tables[1, 2], rtol=1e-3, atol=1e-3)
    assert torch.equal(together.updates[1, 2], alone.updates[1, 2])
    assert torch.equal(alone.tables[0], alone.start[0])
    assert not torch.allclose(together.tables[1, 2], together.start[1, 2], atol=1e-3)


def test_components_differ_in_start_images_and_order(random_backbone: Backbone, folder_data: DataSet) -> None:
    latents = random_backbone.encode(folder_data.train.scaled())
    trained = train_tables(random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL)
    flat = trained.start.flatten(0, 1).flatten(1)
    assert torch.pdist(flat).min() > 1
    chosen = choose_images(folder_data.train.classes, folder_data.train.labels, SMALL)
    # Some of six classes has bin 4 of 9 images in rotation 0: three components that all drew the same four are one in
    # 15,876.
    drawn = {
        tuple(sorted(component[index].tolist()))
        for component in chosen[0]
        for index in range(6)
        if len(component[index]) == 4
    }
    assert len(drawn) > 2


def test_a_broken_run_goes_on_from_its_checkpoint(
    random_backbone: Backbone, folder_data: DataSet, tmp_path: Path
) -> None:
    latents = random_backbone.encode(folder_data.train.scaled())
    whole = train_tables(random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    hook = random_backbone.denoiser.register_forward_pre_hook(interrupt)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train_tables(
            random_backbone,
            latents,
            folder_data.train.classes,
            folder_data.train.labels,
            SMALL,
            checkpoint=checkpoint,
            checkpoint_every=3,
        )
    hook.remove()
    assert torch.load(checkpoint, weights_only=True)["step"] == 3
    resumed = train_tables(
        random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL, checkpoint=checkpoint
    )
    torch.testing.assert_close(resumed.tables, whole.tables, rtol=1e-3, atol=1e-3)
    assert torch.equal(resumed.updates, whole.updates)


def test_a_checkpoint_of_other_settings_is_refused(
    random_backbone: Backbone, folder_data: DataSet, tmp_path: Path
) -> None:
    latents = random_backbone.encode(folder_data.train.scaled())
    checkpoint = tmp_path / "checkpoint.pt"
    train_tables(
        random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL, checkpoint=checkpoint
    )
    other = TableSettings(components=3, rotations=2, bins=(1, 4, 8), steps=6, batch=4, seed=4)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: this run was begun with seed = '3', not '4'"):
        train_tables(
            random_backbone, latents, folder_data.train.classes, folder_data.train.labels, other, checkpoint=checkpoint
        )
    checkpoint.write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: not a checkpoint"):
        train_tables(
            random_backbone, latents, folder_data.train.classes, folder_data.train.labels, SMALL, checkpoint=checkpoint
        )


def test_every_class_visits_every_bin_once() -> None:
    bins = (1, 10, 100, 5000)
    for index in range(10):
        assert sorted(bin_of(index, rotation, bins) for rotation in range(4)) == sorted(bins)


@pytest.mark.parametrize(("subset", "low", "high"), [("shared", 1.0, 1.0), ("bootstrap", 0.3, 0.9), ("own", 0.0, 0.9)])
def test_overlap_of_the_components_images(folder_data: DataSet, subset: str, low: float, high: float) -> None:
    settings = TableSettings(components=4, bins=(4,), subset=subset)
    overlap = overlap_of(choose_images(folder_data.train.classes, folder_data.train.labels, settings))
    assert low <= overlap.mean() <= high


def test_pretraining_goes_on_and_its_result_is_a_diffusers_directory(folder_data: DataSet, tmp_path: Path) -> None:
    settings = PretrainSettings(
        autoencoder_steps=4,
        autoencoder_batch=4,
        autoencoder_channels=(8, 8),
        latent_channels=2,
        steps=4,
        batch=4,
        channels=(8, 8),
        context_dim=8,
    )
    out = tmp_path / "backbone"
    first, _ = pretrain(folder_data.train, folder_data.held_out, settings, out, 2)
    again, record = pretrain(folder_data.train, folder_data.held_out, settings, out, 2)
    assert first.digest() == again.digest()
    save_backbone(again, folder_data.train.labels, record, out)
    assert UNet2DConditionModel.from_pretrained(out / "unet").config.cross_attention_dim == 8
    assert json.loads((out / "backbone.json").read_text())["labels"] == list(folder_data.train.labels)


def test_train_prints_the_papers_parameter_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1000 classes and the unconditional row of 512 numbers each: 512,512 a component."""
    images = tmp_path / "images"
    for index in range(1000):
        (images / f"{index:04}").mkdir(parents=True)
        for position in range(2):
            Image.fromarray(np.full((8, 8), index % 256, np.uint8)).save(images / f"{index:04}" / f"{position}.png")
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=512,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    autoencoder = build_autoencoder((1, 8, 8), PretrainSettings(autoencoder_channels=(8, 8), latent_channels=2))
    backbone = Backbone(
        ContextUNet(unet),
        Autoencoder(autoencoder),
        NoiseSchedule(),
        (2, 4, 4),
        512,
        1.0,
        0.0,
        torch.randn(1001, 1, 512),
    )
    save_backbone(backbone, read_data(images, 8, 1, 0.5).train.labels, {}, tmp_path / "backbone")
    words = [
        "train",
        "--backbone",
        tmp_path / "backbone",
        "--data",
        images,
        "--held-out",
        "0.5",
        "--out",
        tmp_path / "run",
        "--steps",
        "1",
        "--components",
        "2",
        "--producers",
        "0",
    ]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "= 512,512 parameters a component" in printed
    assert f"frozen:  {sum(p.numel() for p in unet.parameters()):,} parameters" in printed
