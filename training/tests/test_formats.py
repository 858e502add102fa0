"""Backbones in the field's formats: small, randomly initialised models of the same architectures."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors.torch import save_file

from decuwatch_training.backbone import Backbone, ContextDiT, load_backbone
from decuwatch_training.data import DataSet
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import export_ensemble
from decuwatch_training.profile import FORMAT_1_PROFILE
from decuwatch_training.tables import TableSettings, train_tables
from decuwatch_training.train import Run, load_run
from tests.runs import save_run
from tests.test_input import patterns

UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
FIRST_STAGE = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 2,
}


def train_and_export(backbone: Backbone, data: DataSet, out: Path) -> None:
    """Two steps of three tables, then an export that checks itself."""
    before = backbone.digest()
    images = patterns(6, 4)
    latents = backbone.encode(images.scaled())
    settings = TableSettings(components=3, bins=(1, 5), steps=2, batch=2, start="normal")
    trained = train_tables(
        backbone,
        latents,
        images.classes,
        images.labels,
        settings,
        1 if backbone.reference is None else backbone.reference.shape[1],
    )
    assert backbone.digest() == before
    record = {
        "settings": {"regime": "exposure"},
        "backbone_sha256": before,
        "data": "",
        "training": {},
        "diagnostics": [[]],
        "findings": [],
    }
    run = Run(trained.tables, trained.images, images.labels, record, out)
    save_run(run, out.with_name("run"))
    run = load_run(out.with_name("run"), backbone)
    profile = {
        **FORMAT_1_PROFILE,
        "steps": 10,
        "request_risk": {"branch_step": 5, "rollout_steps": 1, "estimator": "mean-w2"},
    }
    export_ensemble(backbone, run, out, "small", "fp32", "torch-cpu", profile, 2, {})
    assert (out / "ensemble.json").exists()


@pytest.mark.parametrize(("folder", "model"), [("vae", AutoencoderKL), ("vqvae", VQModel)])
def test_a_diffusers_directory(tmp_path: Path, data: DataSet, folder: str, model: Any) -> None:
    source = tmp_path / "backbone"
    UNet2DConditionModel(**UNET).save_pretrained(source / "unet")
    extra = {"scaling_factor": 0.7} | ({"num_vq_embeddings": 16} if model is VQModel else {"shift_factor": 0.1})
    autoencoder = model(**FIRST_STAGE, **extra)
    autoencoder.save_pretrained(source / folder)
    DDIMScheduler(
        beta_schedule="linear", steps_offset=1, prediction_type="v_prediction", clip_sample=False
    ).save_pretrained(source / "scheduler")
    backbone = load_backbone(source)
    assert (backbone.scale, backbone.shift) == (0.7, 0.1 if model is AutoencoderKL else 0.0)
    assert (backbone.schedule.prediction, backbone.schedule.set_alpha_to_one) == ("v_prediction", True)
    latent = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.decode(latent), autoencoder.eval().decode(latent / backbone.scale + backbone.shift).sample
        )
    train_and_export(backbone, data, tmp_path / "ensemble")


def test_a_dit_takes_the_context_in_place_of_its_label(tmp_path: Path, data: DataSet) -> None:
    torch.manual_seed(1)
    source = tmp_path / "backbone"
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=4,
        num_embeds_ada_norm=6,
    )
    embedding = dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.detach()
    with torch.no_grad():
        for block in dit.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.copy_(embedding)
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # zero at birth, which would hide the condition
    dit.save_pretrained(source / "transformer")
    AutoencoderKL(**FIRST_STAGE).save_pretrained(source / "vae")
    DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(source / "scheduler")
    backbone = load_backbone(source)
    assert isinstance(backbone.denoiser, ContextDiT)
    assert backbone.reference is not None
    assert backbone.reference.shape == (7, 1, 16)
    latent, timestep, label = torch.randn(4, 2, 4, 4), torch.tensor([1, 1, 900, 500]), torch.tensor([0, 5, 3, 6])
    with torch.no_grad():
        wanted = dit.eval()(latent, timestep=timestep, class_labels=label).sample[:, :2]
        found = backbone.denoiser(latent, timestep, backbone.reference[label])
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(
            backbone.denoiser(latent, timestep, backbone.reference[label.flip(0)]), wanted, atol=1e-3
        )
    train_and_export(backbone, data, tmp_path / "ensemble")


def compvis_configuration() -> dict[str, Any]:
    """The shape of cin256-v2's configuration at a hundredth of its size."""
    ddconfig = {
        "in_channels": 1,
        "out_ch": 1,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "z_channels": 2,
        "resolution": 8,
    }
    unet = {
        "in_channels": 2,
        "out_channels": 2,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 1,
    }
    return {
        "model": {
            "params": {
                "image_size": 4,
                "timesteps": 1000,
                "linear_start": 0.0015,
                "linear_end": 0.0195,
                "unet_config": {
                    "params": {**unet, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16}
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.VQModelInterface",
                    "params": {"embed_dim": 2, "n_embed": 16, "ddconfig": ddconfig},
                },
            }
        }
    }


class LatentDiffusionNames:
    """The tensors of a latent-diffusion checkpoint by its own names, for a U-Net and a VQ first stage of two levels."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(9)
        self.random = lambda *shape: torch.randn(*shape, generator=generator) * 0.1

    def layer(self, name: str, out: int, *inner: int, bias: bool = True) -> None:
        self.state[f"{name}.weight"] = self.random(out, *inner)
        if bias:
            self.state[f"{name}.bias"] = self.random(out)

    def unet_block(self, name: str, into: int, out: int) -> None:
        self.layer(f"{name}.in_layers.0", into)
        self.layer(f"{name}.in_layers.2", out, into, 3, 3)
        self.layer(f"{name}.emb_layers.1", out, 128)
        self.layer(f"{name}.out_layers.0", out)
        self.layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            self.layer(f"{name}.skip_connection", out, into, 1, 1)

    def attention(self, name: str, width: int) -> None:
        self.layer(f"{name}.norm", width)
        self.layer(f"{name}.proj_in", width, width, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for part, keys in (("attn1", width), ("attn2", 16)):
            self.layer(f"{inner}.{part}.to_q", width, width, bias=False)
            self.layer(f"{inner}.{part}.to_k", width, keys, bias=False)
            self.layer(f"{inner}.{part}.to_v", width, keys, bias=False)
            self.layer(f"{inner}.{part}.to_out.0", width, width)
        self.layer(f"{inner}.ff.net.0.proj", 8 * width, width)
        self.layer(f"{inner}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            self.layer(f"{inner}.{norm}", width)
        self.layer(f"{name}.proj_out", width, width, 1, 1)

    def unet(self) -> None:
        root = "model.diffusion_model"
        self.layer(f"{root}.time_embed.0", 128, 32)
        self.layer(f"{root}.time_embed.2", 128, 128)
        self.layer(f"{root}.input_blocks.0.0", 32, 2, 3, 3)
        self.unet_block(f"{root}.input_blocks.1.0", 32, 32)
        self.layer(f"{root}.input_blocks.2.0.op", 32, 32, 3, 3)
        self.unet_block(f"{root}.input_blocks.3.0", 32, 64)
        self.attention(f"{root}.input_blocks.3.1", 64)
        self.unet_block(f"{root}.middle_block.0", 64, 64)
        self.attention(f"{root}.middle_block.1", 64)
        self.unet_block(f"{root}.middle_block.2", 64, 64)
        for index, (into, out) in enumerate(((128, 64), (96, 64), (96, 32), (64, 32))):
            self.unet_block(f"{root}.output_blocks.{index}.0", into, out)
            if index < 2:
                self.attention(f"{root}.output_blocks.{index}.1", 64)
        self.layer(f"{root}.output_blocks.1.2.conv", 64, 64, 3, 3)
        self.layer(f"{root}.out.0", 32)
        self.layer(f"{root}.out.2", 2, 32, 3, 3)

    def stage_block(self, name: str, into: int, out: int) -> None:
        self.layer(f"{name}.norm1", into)
        self.layer(f"{name}.conv1", out, into, 3, 3)
        self.layer(f"{name}.norm2", out)
        self.layer(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            self.layer(f"{name}.nin_shortcut", out, into, 1, 1)

    def stage_middle(self, name: str) -> None:
        self.stage_block(f"{name}.block_1", 64, 64)
        self.layer(f"{name}.attn_1.norm", 64)
        for part in ("q", "k", "v", "proj_out"):
            self.layer(f"{name}.attn_1.{part}", 64, 64, 1, 1)
        self.stage_block(f"{name}.block_2", 64, 64)

    def first_stage(self) -> None:
        root = "first_stage_model"
        self.layer(f"{root}.encoder.conv_in", 32, 1, 3, 3)
        self.stage_block(f"{root}.encoder.down.0.block.0", 32, 32)
        self.layer(f"{root}.encoder.down.0.downsample.conv", 32, 32, 3, 3)
        self.stage_block(f"{root}.encoder.down.1.block.0", 32, 64)
        self.stage_middle(f"{root}.encoder.mid")
        self.layer(f"{root}.encoder.norm_out", 64)
        self.layer(f"{root}.encoder.conv_out", 2, 64, 3, 3)
        self.layer(f"{root}.decoder.conv_in", 64, 2, 3, 3)
        self.stage_middle(f"{root}.decoder.mid")
        for index in range(2):
            self.stage_block(f"{root}.decoder.up.1.block.{index}", 64, 64)
            self.stage_block(f"{root}.decoder.up.0.block.{index}", 64 if index == 0 else 32, 32)
        self.layer(f"{root}.decoder.up.1.upsample.conv", 64, 64, 3, 3)
        self.layer(f"{root}.decoder.norm_out", 32)
        self.layer(f"{root}.decoder.conv_out", 1, 32, 3, 3)
        self.layer(f"{root}.quant_conv", 2, 2, 1, 1)
        self.layer(f"{root}.post_quant_conv", 2, 2, 1, 1)
        self.state[f"{root}.quantize.embedding.weight"] = self.random(16, 2)


@pytest.fixture
def compvis(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    names = LatentDiffusionNames()
    names.unet()
    names.first_stage()
    names.state["cond_stage_model.embedding.weight"] = names.random(7, 16)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(compvis_configuration()))
    return config, names.state


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_compvis_checkpoint(
    tmp_path: Path, data: DataSet, compvis: tuple[Path, dict[str, torch.Tensor]], suffix: str
) -> None:
    config, state = compvis
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 5}, path)
    else:
        save_file(state, path)
    backbone = load_backbone(path, config)
    assert (backbone.latent_shape, backbone.context_dim, backbone.scale) == ((2, 4, 4), 16, 1.0)
    assert (backbone.schedule.beta_schedule, backbone.schedule.beta_start, backbone.schedule.steps_offset) == (
        "scaled_linear",
        0.0015,
        1,
    )
    assert backbone.reference is not None
    assert torch.equal(backbone.reference[:, 0], state["cond_stage_model.embedding.weight"])
    # Every number of the checkpoint arrived somewhere, once.
    for prefix, module in (("model.diffusion_model.", backbone.denoiser), ("first_stage_model.", backbone.autoencoder)):
        given = sorted(float(tensor.double().sum()) for name, tensor in state.items() if name.startswith(prefix))
        arrived = sorted(float(tensor.double().sum()) for tensor in module.state_dict().values())
        assert arrived == pytest.approx(given)
    train_and_export(backbone, data, tmp_path / "ensemble")


def test_a_compvis_checkpoint_of_another_shape(tmp_path: Path, compvis: tuple[Path, dict[str, torch.Tensor]]) -> None:
    config, state = compvis
    path = tmp_path / "model.safetensors"
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({**state, name: torch.zeros(64, 32, 3, 3)}, path)
    with pytest.raises(
        TrainingError,
        match=r"model\.safetensors: the U-Net has in another shape 1 tensors, the first: "
        r".* \[64, 32, 3, 3\], expected \[64, 64, 3, 3\]",
    ):
        load_backbone(path, config)
    with pytest.raises(TrainingError, match="needs its YAML configuration"):
        load_backbone(path)


class Payload:
    """Code that an unpickler would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('the checkpoint ran its code')",))


def test_a_checkpoint_with_code_is_never_run(tmp_path: Path, compvis: tuple[Path, dict[str, torch.Tensor]]) -> None:
    config, _ = compvis
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Payload()}, path)
    with pytest.raises(TrainingError, match=r"model\.ckpt: expected a checkpoint that holds tensors only"):
        load_backbone(path, config)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(TrainingError, match="tensors only"):
        load_backbone(path, config)


def test_directories_that_are_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"expected unet/config\.json"):
        load_backbone(tmp_path)
    UNet2DConditionModel(**UNET).save_pretrained(tmp_path / "unet")
    with pytest.raises(TrainingError, match=r"expected vae/config\.json"):
        load_backbone(tmp_path)
    AutoencoderKL(**FIRST_STAGE).save_pretrained(tmp_path / "vae")
    with pytest.raises(TrainingError, match=r"scheduler_config\.json: no such file"):
        load_backbone(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(TrainingError, match="expected weights of a UNet2DConditionModel"):
        load_backbone(tmp_path)
