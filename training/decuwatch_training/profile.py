"""The scoring profile of a manifest: which tables, steps, guidance and estimator each measurement uses.

A profile of format 1 has ``steps`` and two measurements of the members with guidance ``own``. In format 2 each
measurement has its own tables, steps and guidance, and there may be a third one, ``image_risk``.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decuwatch_training.diffusion import Schedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.paide import ESTIMATORS

FORMAT_1 = "decuwatch-ensemble/1"
FORMAT_2 = "decuwatch-ensemble/2"
SPREADS = ("class_gap", "request_risk")
"""Measurements of how far tables differ; the third one, ``image_risk``, judges one table's image."""
TABLES = ("members", "posterior", "producer")
GUIDANCE = ("own", "shared")
JUDGE = "judge"

DEFAULT_PROFILE: dict[str, Any] = {
    "guidance_scale": 2.0,
    "eta": 0.0,
    "class_gap": {
        "tables": "posterior",
        "steps": 3,
        "guidance": "shared",
        "branch_step": 0,
        "rollout_steps": 1,
        "estimator": "paide-w2",
    },
    "request_risk": {
        "tables": "members",
        "steps": 4,
        "guidance": "shared",
        "branch_step": 0,
        "rollout_steps": 3,
        "estimator": "mean-w2",
    },
    "image_risk": {
        "tables": "producer",
        "steps": 3,
        "guidance": "own",
        "branch_step": 0,
        "rollout_steps": 2,
        "estimator": JUDGE,
    },
    "reason": "the recommended profile, before any evaluation of this ensemble",
}
FORMAT_1_PROFILE: dict[str, Any] = {
    "steps": 20,
    "guidance_scale": 2.0,
    "eta": 0.0,
    "class_gap": {"branch_step": 0, "rollout_steps": 1, "estimator": "paide-w2"},
    "request_risk": {"branch_step": 10, "rollout_steps": 1, "estimator": "mean-w2"},
    "reason": "a first guess, before any evaluation of this ensemble",
}
MEASURE_1 = ("branch_step", "rollout_steps", "estimator")
MEASURE_2 = ("tables", "steps", "guidance", *MEASURE_1)


@dataclass(frozen=True)
class Measure:
    """One measurement's way through the sampler: ``rollout_steps`` of ``steps`` steps from ``branch_step``."""

    steps: int
    tables: str
    guidance: str
    branch_step: int
    rollout_steps: int
    estimator: str


def format_of(profile: Mapping[str, Any]) -> str:
    """The format of the ensembles that such a profile belongs to."""
    return FORMAT_1 if "steps" in profile else FORMAT_2


def measures_of(profile: Mapping[str, Any]) -> dict[str, Measure]:
    """The measurements of a checked profile of either format, in the order in which they are stored."""
    names = [name for name in (*SPREADS, "image_risk") if name in profile]
    if format_of(profile) == FORMAT_1:
        common = {"steps": profile["steps"], "tables": "members", "guidance": "own"}
        return {name: Measure(**common, **profile[name]) for name in names}
    return {name: Measure(**profile[name]) for name in names}


def settings_key(profile: Mapping[str, Any], sampler: str = "ddim") -> str:
    """The series that scores under this profile belong to; thresholds are kept by it.

    ``sampler`` is the schedule's ``kind``.
    """
    measures = measures_of(profile)
    spreads = [measures[name] for name in SPREADS]
    start = f"g={_spell(profile['guidance_scale'])} eta={_spell(profile['eta'])}"
    same = len({measure.steps for measure in spreads}) == 1
    if "image_risk" not in measures and same and {(m.tables, m.guidance) for m in spreads} == {("members", "own")}:
        parts = [f"{name}={m.estimator}@{m.branch_step}+{m.rollout_steps}" for name, m in measures.items()]
        return f"{sampler} s={spreads[0].steps} {start} {' '.join(parts)}"
    parts = [
        f"{name}={m.estimator}@{m.branch_step}+{m.rollout_steps}/{m.steps}:{m.tables}:{m.guidance}"
        for name, m in measures.items()
    ]
    return f"{sampler} {start} {' '.join(parts)}"


def _spell(value: float) -> str:
    """The shortest text of a number, as Go's strconv.FormatFloat(v, 'g', -1, 64) has it."""
    return repr(float(value)).removesuffix(".0")


def rows_of(profile: Mapping[str, Any], tables: Mapping[str, int]) -> int:
    """Rows of U-Net work for one request; ``tables`` has the number of tables by set."""
    total = 0
    guided = profile["guidance_scale"] != 1
    for measure in measures_of(profile).values():
        count = tables[measure.tables]
        if measure.guidance == "shared":
            total += measure.rollout_steps * (count + guided)
        else:
            total += (1 + guided) * (measure.branch_step + measure.rollout_steps * count)
    return total


def check_profile(
    profile: Any, schedule: Schedule, posterior: int = 0, judge: bool = False, form: str | None = None
) -> None:
    """Raise TrainingError that names the first profile field that a reader of the manifest would refuse.

    ``posterior`` is the number of posterior tables of the ensemble; ``judge`` says whether it has a judge. ``form`` is
    the manifest's format; None takes the profile's own.
    """
    if not isinstance(profile, dict):
        raise TrainingError("profile: expected an object")
    older = (form or format_of(profile)) == FORMAT_1
    names = {"guidance_scale", "eta", *SPREADS, "reason"}
    optional = set() if older else {"image_risk", "cascade"}
    _known("profile", profile, names | {"steps"} if older else names, optional)
    if older:
        _within("profile.steps", profile["steps"], 1, 1000, whole=True)
    _within("profile.guidance_scale", profile["guidance_scale"], 0, 30, whole=False)
    _within("profile.eta", profile["eta"], 0, 1, whole=False)
    if not isinstance(profile["reason"], str):
        raise TrainingError(f"profile.reason {profile['reason']!r}: expected a text")
    for name in (*SPREADS, "image_risk"):
        if name not in profile:
            continue
        _known(f"profile.{name}", profile[name], set(MEASURE_1 if older else MEASURE_2), set())
        measure = profile[name]
        steps = profile["steps"] if older else measure["steps"]
        if not older:
            _within(f"profile.{name}.steps", steps, 1, 1000, whole=True)
            _one_of(f"profile.{name}.guidance", measure["guidance"], GUIDANCE)
        count = schedule.step_count(steps)
        _within(f"profile.{name}.branch_step", measure["branch_step"], 0, count - 1, whole=True)
        _within(
            f"profile.{name}.rollout_steps", measure["rollout_steps"], 1, count - measure["branch_step"], whole=True
        )
        _one_of(f"profile.{name}.estimator", measure["estimator"], (JUDGE,) if name == "image_risk" else ESTIMATORS)
    if not older:
        _check_tables(profile, posterior, judge)
    if "cascade" in profile:
        _check_cascade(profile["cascade"])


def _check_tables(profile: Mapping[str, Any], posterior: int, judge: bool) -> None:
    for name in SPREADS:
        measure = profile[name]
        _one_of(f"profile.{name}.tables", measure["tables"], ("members", "posterior"))
        if measure["tables"] == "posterior" and not posterior:
            raise TrainingError(f"profile.{name}.tables 'posterior': the ensemble has no posterior tables")
        if measure["guidance"] == "shared" and measure["branch_step"] != 0:
            raise TrainingError(
                f"profile.{name}.branch_step {measure['branch_step']}: expected 0 with guidance 'shared'"
            )
    if "image_risk" not in profile:
        return
    for field, expected in (("tables", "producer"), ("guidance", "own"), ("branch_step", 0)):
        if profile["image_risk"][field] != expected:
            raise TrainingError(f"profile.image_risk.{field} {profile['image_risk'][field]!r}: expected {expected!r}")
    if not judge:
        raise TrainingError("profile.image_risk: the ensemble has no judge")


def _check_cascade(cascade: Any) -> None:
    """The cascade spares the request risk below a cut of the class gap, but for a share of the requests."""
    _known("profile.cascade", cascade, {"cut", "share"}, set())
    _within("profile.cascade.cut", cascade["cut"], 0, sys.float_info.max, whole=False)
    if cascade["cut"] == 0:
        raise TrainingError("profile.cascade.cut 0: expected a positive number")
    _within("profile.cascade.share", cascade["share"], 0, 1, whole=False)


def _known(name: str, value: Any, fields: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict) or not fields <= set(value) <= fields | optional:
        raise TrainingError(f"{name}: expected an object with the fields {', '.join(sorted(fields))}")


def _within(name: str, value: Any, low: float, high: float, whole: bool) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise TrainingError(f"{name} {value!r}: expected {'an integer' if whole else 'a number'} from {low} to {high}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainingError(f"{name} {value!r}: expected one of {', '.join(allowed)}")
