"""Timesteps of every step count against the installed diffusers; what cannot be sampled is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from decuwatch_training.backbone import Backbone
from decuwatch_training.diffusion import NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import export_ensemble
from decuwatch_training.profile import FORMAT_1_PROFILE, check_profile
from decuwatch_training.sweeps import (
    SPACINGS,
    alpha_cases,
    alpha_table,
    compvis_timesteps,
    diffusers_timesteps,
    noise_table,
    timestep_cases,
    timestep_table,
    trajectory_table,
)
from decuwatch_training.tiny import tiny_run

SWEEPS = Path(__file__).parents[2] / "scoring" / "testdata" / "sweeps.json"
SEED = 7


@pytest.fixture(scope="module")
def sweeps() -> dict[str, Any]:
    return json.loads(SWEEPS.read_text())


def schedule_of(train: int, spacing: str, offset: int) -> NoiseSchedule:
    return NoiseSchedule(train_timesteps=train, timestep_spacing=spacing, steps_offset=offset)


def test_the_committed_tables_are_those_of_the_installed_libraries(sweeps: dict[str, Any]) -> None:
    assert sweeps["timesteps"] == [timestep_table(*case) for case in timestep_cases()]
    assert [table | {"alphas": ""} for table in sweeps["alphas"]] == [
        alpha_table(*case) | {"alphas": ""} for case in alpha_cases()
    ]
    some = sorted(int(steps) for steps in np.random.default_rng(SEED).integers(1, 120, 12))
    print(
        f"seed {SEED}: trajectories of {some} steps, "
        f"{sum(len(table['digests']) // 8 for table in sweeps['timesteps'])} step counts"
    )
    for table, spacing in zip(sweeps["trajectories"], SPACINGS, strict=True):
        for steps, found in zip(some, trajectory_table(spacing, some)["finals"], strict=True):
            wanted = table["finals"][steps - 1]
            assert (found is None) == (wanted is None)
            if found is not None:
                np.testing.assert_allclose(
                    found, wanted, rtol=1e-4, atol=1e-5
                )  # the CPU's vectors round linspace their own way
    for found, wanted in zip(noise_table(), sweeps["noise"], strict=True):
        assert (found["seed"], found["sizes"]) == (wanted["seed"], wanted["sizes"])
        np.testing.assert_allclose(found["first_last_sum"], wanted["first_last_sum"], atol=2e-3, rtol=1e-5)


def test_every_step_count_is_taken_as_the_reference_takes_it_or_refused() -> None:
    taken = refused = 0
    for train, spacing, offset in [
        (1000, "leading", 1),
        (1000, "trailing", 0),
        (1000, "linspace", 0),
        (1000, "compvis", 1),
        (50, "trailing", 0),
    ]:
        schedule = schedule_of(train, spacing, offset)
        for steps in range(1, train + 1):
            wanted = (
                compvis_timesteps(train, steps)
                if spacing == "compvis"
                else diffusers_timesteps(train, spacing, offset, steps)
            )
            if wanted.min() < 0 or wanted.max() >= train:
                refused += 1
                with pytest.raises(TrainingError, match=f"steps {steps}: {spacing} spacing has timestep"):
                    schedule.scheduler(steps)
            else:
                taken += 1
                assert schedule.scheduler(steps).timesteps.tolist() == wanted.tolist()
                assert Sampler(schedule, steps, 1.0).count == len(wanted)
    print(f"{taken} step counts taken, {refused} refused")
    assert refused > 600


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_bounds(steps: int) -> None:
    with pytest.raises(TrainingError, match=f"steps {steps}: expected 1 to 1000"):
        Sampler(NoiseSchedule(), steps, 1.0)


def test_a_compvis_step_is_that_of_the_ddim_paper() -> None:
    """Thirty steps asked, thirty-one taken, each from t to t - 33 and the last one to the first alpha."""
    schedule = NoiseSchedule(timestep_spacing="compvis")
    sampler = Sampler(schedule, 30, 1.0)
    assert sampler.count == 31
    alphas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195).alphas_cumprod.double()
    latent = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def denoise(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return 0.3 * x + torch.sin(timestep.double() / 50)[:, None, None, None]

    found = sampler.roll(denoise, 0, sampler.count, latent, latent, latent)
    for timestep in range(991, 0, -33):
        a, before = alphas[timestep], alphas[timestep - 33] if timestep > 33 else alphas[0]
        eps = denoise(latent, torch.tensor([timestep]), latent)
        latent = before.sqrt() * (latent - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    torch.testing.assert_close(found, latent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "profile.steps 0: expected an integer from 1 to 1000"),
        ({"steps": 20.0}, "profile.steps 20.0: expected an integer"),
        ({"steps": 61}, "steps 61: trailing spacing has timestep -1 there"),
        ({"guidance_scale": "2"}, "profile.guidance_scale '2': expected a number from 0 to 30"),
        ({"eta": float("nan")}, "profile.eta nan: expected a number from 0 to 1"),
        ({"sampler": "ddim"}, "profile: expected an object with the fields"),
        (
            {"class_gap": {"branch_step": 20, "rollout_steps": 1, "estimator": "mean-w2"}},
            "profile.class_gap.branch_step 20: expected an integer from 0 to 19",
        ),
        (
            {"request_risk": {"branch_step": 1, "rollout_steps": 20, "estimator": "mean-w2"}},
            "profile.request_risk.rollout_steps 20: expected",
        ),
        (
            {"request_risk": {"branch_step": 1, "rollout_steps": 2, "estimator": "w2"}},
            "profile.request_risk.estimator 'w2': expected one of",
        ),
        ({"request_risk": None}, "profile.request_risk: expected an object"),
    ],
)
def test_profiles_that_no_reader_takes(change: dict[str, Any], message: str) -> None:
    schedule = NoiseSchedule(timestep_spacing="trailing")
    check_profile(FORMAT_1_PROFILE, schedule)
    with pytest.raises(TrainingError, match=message):
        check_profile(FORMAT_1_PROFILE | change, schedule)


def test_reference_scores_need_eta_zero(random_backbone: Backbone, tmp_path: Path) -> None:
    run = tiny_run(random_backbone, 3, 1)
    with pytest.raises(TrainingError, match=r"profile\.eta 0\.5: reference scores are computed at eta 0"):
        export_ensemble(
            random_backbone, run, tmp_path / "out", "tiny", "fp32", "torch-cpu", FORMAT_1_PROFILE | {"eta": 0.5}, 5, {}
        )
    assert not (tmp_path / "out").exists()


def test_an_ensemble_of_compvis_spacing_is_exported_and_checked(random_backbone: Backbone, tmp_path: Path) -> None:
    random_backbone.schedule = NoiseSchedule(timestep_spacing="compvis")
    profile = FORMAT_1_PROFILE | {
        "steps": 30,
        "request_risk": {"branch_step": 30, "rollout_steps": 1, "estimator": "mean-w2"},
    }
    export_ensemble(
        random_backbone, tiny_run(random_backbone, 3, 1), tmp_path / "out", "tiny", "fp32", "torch-cpu", profile, 2, {}
    )
    manifest = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    assert manifest["diffusion"]["timestep_spacing"] == "compvis"
    assert manifest["reference"]["request_risk"]["n"] > 0
