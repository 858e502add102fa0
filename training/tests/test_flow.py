"""Flow matching: the schedule, training it, and an ensemble of a transformer whose scores agree with diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from decuwatch_training.backbone import Backbone, read_schedule
from decuwatch_training.diffusion import FlowSchedule, NoiseSchedule, Sampler, schedule_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.graphs import Graph, export_unet
from decuwatch_training.manifest import read_manifest
from decuwatch_training.tiny import tiny_backbone, tiny_flow

TINY = Path(__file__).parents[2] / "scoring" / "testdata" / "tiny-flow"


def exact(clean: torch.Tensor, noise: torch.Tensor) -> Any:
    """A network that knows image and noise, and predicts the velocity between them."""
    return lambda latent, timestep, context: (noise - clean).expand_as(latent)


@pytest.mark.parametrize("fields", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "timestep_spacing": "trailing"}])
def test_the_exact_velocity_leads_to_the_image(fields: dict[str, Any]) -> None:
    schedule = FlowSchedule(**fields)
    clean, noise = torch.randn(2, 1, 2, 4, 4).unbind()
    sampler = Sampler(schedule, 7, 1.0)
    context = torch.zeros(1, 1, 8)
    final = sampler.roll(exact(clean, noise), 0, sampler.count, noise, context, context)
    assert torch.allclose(final, clean, atol=1e-5)
    for index in (0, 3, 6):
        sigma = schedule.scheduler(7).sigmas[index]
        latent = (1 - sigma) * clean + sigma * noise
        assert torch.allclose(sampler.predicted(exact(clean, noise), index, latent, context, context), clean, atol=1e-5)


def test_training_mixes_image_and_noise_as_the_scheduler_does() -> None:
    schedule = FlowSchedule(shift=3.0)
    index = torch.tensor([0, 500, 999])
    timestep = schedule.times(index)
    clean, noise = torch.randn(2, 3, 2, 4, 4).unbind()
    wanted = FlowMatchEulerDiscreteScheduler(shift=3.0).scale_noise(clean, timestep, noise)
    assert torch.allclose(schedule.noisy(clean, noise, timestep), wanted, atol=1e-6)
    assert torch.equal(schedule.target(clean, noise, timestep), noise - clean)


def test_the_variance_is_that_of_the_bridge() -> None:
    """Simulated: noise leads from s to sigma; the variance of x at s given x at sigma, by regression."""
    schedule = FlowSchedule()
    sigma, after = schedule.scheduler(4).sigmas[1:3].double().tolist()
    ratio = (1 - sigma) / (1 - after)
    generator = torch.Generator().manual_seed(1)
    early = after * torch.randn(400_000, generator=generator, dtype=torch.float64)  # x0 = 0
    late = ratio * early + (sigma**2 - (ratio * after) ** 2) ** 0.5 * torch.randn(
        400_000, generator=generator, dtype=torch.float64
    )
    slope = (early * late).mean() / late.square().mean()
    assert schedule.variance(4, 1) == pytest.approx(float((early - slope * late).var()), rel=0.02)
    assert schedule.variance(4, 3) == 0


def test_manifests_tell_the_kinds_apart() -> None:
    for schedule in (FlowSchedule(shift=2.0), NoiseSchedule()):
        assert schedule_of(schedule.manifest()) == schedule
    assert "kind" not in NoiseSchedule().manifest()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("time_shift_type", "cosine"),
        ("shift", 0),
        ("shift_terminal", 1.0),
        ("base_image_seq_len", 5000),
        ("prediction_type", "epsilon"),
    ],
)
def test_what_a_flow_cannot_honor_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    schedule = read_schedule(file)
    assert isinstance(schedule, FlowSchedule)
    assert (schedule.shift, schedule.shift_terminal) == (3.0, 0.0)
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {field: value}))
    with pytest.raises(TrainingError, match=field):
        read_schedule(file)


def test_steps_whose_sigmas_do_not_descend_are_refused() -> None:
    with pytest.raises(TrainingError, match="steps 1: the sigmas"):
        FlowSchedule(shift_terminal=0.1).scheduler(1)
    with pytest.raises(TrainingError, match="steps 0"):
        FlowSchedule().scheduler(0)


@pytest.fixture(scope="module")
def flow() -> Backbone:
    return tiny_flow(tiny_backbone(4, 1, 1), 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_exported_transformer_takes_timesteps_that_are_not_whole(
    flow: Backbone, tmp_path: Path, precision: str
) -> None:
    """In half precision too, the timestep keeps its digits: 981.3 would become 981.5."""
    latent, context = torch.randn(3, *flow.latent_shape), torch.randn(3, 1, flow.context_dim)
    timestep = torch.tensor([981.3, 500.25, 3.1])
    wanted = flow.denoiser(latent, timestep, context)
    assert not torch.allclose(wanted, flow.denoiser(latent, timestep.round(), context), atol=1e-4)
    path = tmp_path / "unet.onnx"
    export_unet(tiny_flow(tiny_backbone(4, 1, 1), 1), 1, path, precision)
    names = {"latent": "latent", "timestep": "timestep", "context": "context", "output": "prediction"}
    found = Graph(path, names)(latent, timestep, context)
    assert torch.allclose(found, wanted, atol=1e-5 if precision == "fp32" else 1e-2)


def test_the_tiny_ensemble_is_what_its_manifest_says() -> None:
    manifest = read_manifest(TINY / "ensemble.json")
    assert manifest["diffusion"]["kind"] == "flow_match"
