"""The ways of scoring that an evaluation compares: those of the profile, and a handful beside them.

A setting is written as in a settings key, optionally with the number of tables and the guidance scale:

    estimator@branch+rollout/steps:tables:guidance[:M][:g=2]      mean-w2@0+2/3:members:shared:5
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from decuwatch_training.diffusion import Schedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.paide import ESTIMATORS
from decuwatch_training.profile import GUIDANCE, JUDGE, TABLES, Measure, measures_of

FORM = re.compile(
    r"(?P<estimator>[a-z0-9-]+)@(?P<branch>\d+)\+(?P<rollout>\d+)/(?P<steps>\d+)"
    r":(?P<tables>[a-z]+):(?P<guidance>[a-z]+)"
    r"(:(?P<count>\d+))?(:g=(?P<scale>\d+(\.\d+)?))?"
)
EXPECTED = "estimator@branch+rollout/steps:tables:guidance[:M][:g=2]"


@dataclass(frozen=True, order=True)
class Setting:
    """One way to score a request with the first ``count`` tables of a set."""

    measure: Measure
    count: int
    scale: float

    @property
    def name(self) -> str:
        """One word, which ``parse`` reads."""
        m = self.measure
        path = f"{m.estimator}@{m.branch_step}+{m.rollout_steps}/{m.steps}"
        return f"{path}:{m.tables}:{m.guidance}:{self.count}:g={self.scale:g}"

    @property
    def path(self) -> "Setting":
        """The setting without its estimator: what one run of the sampler measures for every estimator."""
        judged = JUDGE if self.measure.estimator == JUDGE else "mean-w2"
        return replace(self, measure=replace(self.measure, estimator=judged))

    @property
    def rows(self) -> int:
        """Rows of U-Net work for one request."""
        m, guided = self.measure, self.scale != 1
        if m.guidance == "shared":
            return m.rollout_steps * (self.count + guided)
        return (1 + guided) * (m.branch_step + m.rollout_steps * self.count)


def parse(text: str, tables: Mapping[str, int], scale: float, schedule: Schedule) -> Setting:
    """The setting that ``text`` names. ``tables`` has the number of tables by set.

    Raises TrainingError for what the sampler or the ensemble cannot do.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise TrainingError(f"setting {text!r}: expected {EXPECTED}")
    numbers = {name: int(found[name]) for name in ("steps", "branch", "rollout")}
    measure = Measure(
        numbers["steps"], found["tables"], found["guidance"], numbers["branch"], numbers["rollout"], found["estimator"]
    )
    if not 1 <= measure.steps <= 1000:
        raise TrainingError(f"setting {text!r}: {measure.steps} steps, expected 1 to 1000")
    count = schedule.step_count(measure.steps)
    allowed = ESTIMATORS if measure.tables != "producer" else (JUDGE,)
    for value, known in ((measure.tables, TABLES), (measure.guidance, GUIDANCE), (measure.estimator, allowed)):
        if value not in known:
            raise TrainingError(f"setting {text!r}: {value!r}, expected one of {', '.join(known)}")
    if not 1 <= measure.rollout_steps <= count - measure.branch_step:
        raise TrainingError(f"setting {text!r}: more than the {count} steps that the sampler takes, or no step")
    if measure.guidance == "shared" and measure.branch_step:
        raise TrainingError(f"setting {text!r}: branch {measure.branch_step}, expected 0 with guidance shared")
    if measure.estimator == JUDGE and (measure.branch_step, measure.guidance) != (0, "own"):
        raise TrainingError(f"setting {text!r}: expected branch 0 and guidance own for the judge")
    available = tables.get(measure.tables, 0)
    least = 1 if measure.estimator == JUDGE else 2
    chosen = int(found["count"] or available)
    if not least <= chosen <= available:
        raise TrainingError(
            f"setting {text!r}: {chosen} tables, the ensemble has {available} {measure.tables}, and at least {least} "
            "are needed"
        )
    return Setting(measure, chosen, float(found["scale"] or scale))


def settings_of_profile(profile: Mapping[str, Any], tables: Mapping[str, int]) -> dict[str, Setting]:
    """The profile's measurements as settings."""
    scale = float(profile["guidance_scale"])
    return {name: Setting(m, tables[m.tables], scale) for name, m in measures_of(profile).items()}


def comparison(tables: Mapping[str, int], judged: bool) -> Iterable[str]:
    """The settings beside the profile's that an evaluation measures by default, as far as the ensemble has tables."""
    members = tables["members"]
    for count in range(2, members + 1):
        yield f"mean-w2@0+3/4:members:shared:{count}"
    yield from (
        "paide-w2@0+3/4:members:shared",
        "mean-w2@0+2/3:members:shared",
        "mean-w2@0+2/3:members:own",
        "mean-w2@0+8/10:members:own",
        "paide-w2@0+1/3:members:shared",
        "mean-w2@0+1/3:members:shared",
    )
    if tables.get("posterior"):
        yield from ("paide-w2@0+1/3:posterior:shared", "mean-w2@0+1/3:posterior:shared")
        yield "mean-w2@0+2/3:posterior:shared"
    if tables.get("producer") and judged:
        yield from ("judge@0+1/3:producer:own", "judge@0+2/3:producer:own", "judge@0+3/4:producer:own")
