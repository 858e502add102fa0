"""Measure how well the scores of an exported ensemble find gaps, and at what cost in rows of U-Net work.

Two ways: at the class level (AUROC and others of "this request's class is under-sampled") and at the request level
(within one class and bin, does the score rank requests by their squared distance from the image that the fully trained
table gives?). Writes evaluation.json, evaluation.md, profile.json and plots. An evaluation that was broken off goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decuwatch_training.errors import TrainingError
from decuwatch_training.figures import draw_densities, draw_frontier
from decuwatch_training.files import write_file, write_json
from decuwatch_training.manifest import manifests_of, read_manifest
from decuwatch_training.measure import Plan, Shard, measure
from decuwatch_training.quality import (
    Cells,
    auroc_by_bin,
    auroc_same_class,
    average_precision,
    mean_by_bin,
    rank_correlation,
    true_positive_rate,
    variation_within_cells,
    within_cells,
)
from decuwatch_training.report import markdown
from decuwatch_training.settings import Setting, cells_of, saturated_share, scores_of, settings_of

REPLICATES = 400

Truths = dict[float, tuple[np.ndarray, np.ndarray]]
"""By guidance: each request's error averaged over the components, and that of the component that carried it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train evaluate``."""
    parser.add_argument("ensemble", type=Path, help="an exported ensemble's directory, all of its rotations")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument(
        "--work",
        type=Path,
        help="directory of the measurements, from which a broken run goes on; defaults to OUT/shards",
    )
    parser.add_argument("--seeds", type=int, default=12, help="requests of each class in each rotation")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 200], help="DDIM steps S")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 5.0], help="classifier-free guidance g")
    parser.add_argument(
        "--production-guidance",
        type=float,
        default=2.0,
        help="guidance of the images whose errors the scores are held against",
    )
    parser.add_argument("--rollouts-up-to", type=int, default=50, help="the largest S whose roll-outs are measured")


def run(arguments: argparse.Namespace) -> None:
    """Measure, compare, recommend, write."""
    paths = manifests_of(arguments.ensemble)
    manifest = read_manifest(paths[0])
    plan = Plan(arguments.seeds, tuple(arguments.steps), tuple(arguments.guidance), arguments.rollouts_up_to)
    shards = measure(paths, plan, arguments.work or arguments.out / "shards")
    evaluation = compare(shards, manifest["components"], arguments.production_guidance)
    evaluation["ensemble"] = {
        "name": manifest["name"],
        "regime": manifest["regime"],
        "manifests": [path.name for path in paths],
        "tables": manifest["provenance"].get("tables"),
    }
    evaluation["requests"] = {"seeds": plan.seeds, "classes": len(manifest["classes"]), "rotations": len(paths)}
    evaluation["recommendation"] = recommend(evaluation["settings"])
    evaluation = _without_nan(evaluation)
    write_json(arguments.out / "evaluation.json", evaluation)
    if evaluation["recommendation"]["profile"] is not None:
        write_json(arguments.out / "profile.json", evaluation["recommendation"]["profile"])
    text = markdown(evaluation)
    write_file(arguments.out / "evaluation.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    by_name = {setting.name: setting for shard in shards for setting in settings_of(shard, manifest["components"])}
    shown = [
        evaluation["recommendation"][name]["name"]
        for name in ("class_gap", "request_risk")
        if evaluation["recommendation"][name] is not None
    ]
    if (papers := evaluation["papers_setting"]) is not None:
        shown.insert(0, papers)
    panels = []
    for name in shown:
        chosen = [
            shard for shard in shards if (shard.steps, shard.guidance) == (by_name[name].steps, by_name[name].guidance)
        ]
        panels.append(
            (
                f"{name}\n{by_name[name].rows} rows",
                scores_of(chosen, by_name[name], manifest["components"]),
                cells_of(chosen),
            )
        )
    draw_densities(panels, arguments.out / "scores-by-bin.png")
    draw_frontier(evaluation["settings"], arguments.out / "quality-against-rows.png")
    print(text)


def compare(shards: Sequence[Shard], components: int, production: float) -> dict[str, Any]:
    """Both ways of judging, for every setting. Errors are those at guidance ``production``, if it was measured."""
    shards = sorted(shards, key=lambda shard: shard.rotation)
    entries: list[dict[str, Any]] = []
    pairs = sorted({(shard.steps, shard.guidance) for shard in shards})
    longest = {
        guidance: max((s.steps for s in shards if s.guidance == guidance and not np.isnan(s.error).any()), default=0)
        for _, guidance in pairs
    }
    truths: Truths = {}
    for guidance, steps in longest.items():
        own = [shard for shard in shards if (shard.steps, shard.guidance) == (steps, guidance)]
        if own:
            truths[guidance] = (
                np.concatenate([s.error.mean(1) for s in own]),
                np.concatenate([s.carrier_error for s in own]),
            )
    for steps, guidance in pairs:
        own = [shard for shard in shards if (shard.steps, shard.guidance) == (steps, guidance)]
        cells = cells_of(own)
        for setting in settings_of(own[0], components):
            scores = scores_of(own, setting, components)
            entries.append(_entry(setting, scores, cells, truths, production, components))
    cells = cells_of([shard for shard in shards if (shard.steps, shard.guidance) == pairs[0]])
    control = np.random.default_rng(0).random(len(cells.bins))
    papers = next(
        (
            e["name"]
            for e in entries
            if (e["steps"], e["guidance"], e["point"], e["estimator"]) == (200, 5.0, "last", "paide-w2")
        ),
        None,
    )
    truth = {
        f"{guidance:g}": {
            "steps": longest[guidance],
            "mean_by_bin": {
                size: vars(e) for size, e in mean_by_bin(errors[0], _cells_for(shards, guidance), REPLICATES).items()
            },
        }
        for guidance, errors in truths.items()
    }
    return {
        "bins": cells.sizes,
        "control": {**_class_level(control, cells, REPLICATES), "name": "random scores"},
        "papers_setting": papers,
        "error": truth,
        "production_guidance": production,
        "settings": entries,
    }


def _cells_for(shards: Sequence[Shard], guidance: float) -> Cells:
    steps = min(shard.steps for shard in shards if shard.guidance == guidance)
    return cells_of([shard for shard in shards if (shard.steps, shard.guidance) == (steps, guidance)])


def _entry(
    setting: Setting, scores: np.ndarray, cells: Cells, truths: Truths, production: float, components: int
) -> dict[str, Any]:
    main = setting.estimator in ("paide-w2", "mean-w2") and setting.components == components
    replicates = REPLICATES if main else 0
    entry: dict[str, Any] = {
        "name": setting.name,
        "steps": setting.steps,
        "guidance": setting.guidance,
        "point": setting.point,
        "branches": [[branch.step, branch.rollout] for branch in setting.branches],
        "estimator": setting.estimator,
        "components": setting.components,
        "rows": setting.rows,
        **_class_level(scores, cells, replicates),
    }
    if setting.estimator.startswith("paide"):
        entry["saturated"] = saturated_share(scores, setting.components)
    guidance = production if production in truths else setting.guidance
    if guidance in truths:
        mean_error, carrier_error = truths[guidance]
        entry["request_level"] = {
            "overall": rank_correlation(scores, mean_error),
            "within": vars(within_cells(scores, mean_error, cells, replicates=replicates)),
            "within_carrier": vars(within_cells(scores, carrier_error, cells, replicates=replicates)),
            "within_by_bin": {f"{size:g}": within_cells(scores, mean_error, cells, size).value for size in cells.sizes},
            "within_at_guidance": {
                f"{other:g}": within_cells(scores, errors, cells).value for other, (errors, _) in truths.items()
            },
        }
    return entry


def _class_level(scores: np.ndarray, cells: Cells, replicates: int) -> dict[str, Any]:
    largest = cells.sizes[-1]
    well = scores[cells.bins == largest]
    by_bin = {}
    for size in cells.sizes[:-1]:
        rare = scores[cells.bins == size]
        same, at_99, classes = auroc_same_class(scores, cells, size)
        by_bin[f"{size:g}"] = {
            "auroc": vars(auroc_by_bin(scores, cells, size, replicates)),
            "auprc": average_precision(rare, well),
            "tpr_at_1pct_fpr": true_positive_rate(rare, well),
            "auroc_same_class": same,
            "classes_at_99": at_99,
            "classes": classes,
        }
    return {
        "against_largest": by_bin,
        "rho_log_bin": rank_correlation(scores, np.log(cells.bins + 1e-9)),
        "mean_by_bin": {size: vars(estimate) for size, estimate in mean_by_bin(scores, cells, replicates).items()},
        "variation_within_class": variation_within_cells(scores, cells),
    }


def recommend(entries: list[dict[str, Any]], slack: float = 0.01, most_rows: int = 120) -> dict[str, Any]:
    """The cheapest class-level setting whose hardest AUROC is within ``slack`` of the best, and the cheapest
    request-level one within 0.05 of the best Spearman that ``most_rows`` rows buy; both under one sampler, as a profile
    has it.
    """
    single = [
        e
        for e in entries
        if len(e["branches"]) == 1
        and e["components"] == max(x["components"] for x in entries)
        and e["estimator"] in ("paide-w2", "mean-w2")
    ]
    if not single:
        raise TrainingError("no setting to recommend: the evaluation has no single branch")
    hardest = {id(e): min(value["auroc"]["value"] for value in e["against_largest"].values()) for e in single}
    best = max(hardest.values())
    gap = min(
        (e for e in single if hardest[id(e)] >= best - slack),
        key=lambda e: (e["rows"], -hardest[id(e)], e["rho_log_bin"], e["estimator"] != "paide-w2"),
    )
    ranked = [e for e in single if "request_level" in e and e["rows"] <= most_rows and e["estimator"] == "mean-w2"]
    sentence_gap = (
        f"Cheapest setting for finding under-sampled classes: {gap['name']}: {gap['rows']} rows, AUROC of the hardest "
        f"bin {hardest[id(gap)]:.3f} "
        f"(the best of all settings: {best:.3f})."
    )
    if not ranked:  # without roll-outs no request's error is known
        return {"class_gap": gap, "request_risk": None, "sentences": [sentence_gap], "profile": None}
    top = max(e["request_level"]["within"]["value"] for e in ranked)
    risk = min(
        (e for e in ranked if e["request_level"]["within"]["value"] >= top - 0.05),
        key=lambda e: (e["rows"], -e["request_level"]["within"]["value"]),
    )
    # One profile has one sampler: the class gap is read under the request risk's, at the first step of the same path.
    wanted = (risk["steps"], risk["guidance"], "first", "paide-w2")
    under = next(e for e in single if (e["steps"], e["guidance"], e["point"], e["estimator"]) == wanted)
    sentence_risk = (
        f"Cheapest setting for ranking requests: {risk['name']}: {risk['rows']} rows, Spearman within class and bin "
        f"{risk['request_level']['within']['value']:.2f} (the best within {most_rows} rows: {top:.2f})."
    )
    reason = (
        f"request_risk: Spearman {risk['request_level']['within']['value']:.2f} with the error within class and bin, "
        f"within 0.05 of the best that {most_rows} rows buy; "
        f"class_gap: AUROC {hardest[id(under)]:.3f} for the hardest bin at the first step of the same path"
    )
    profile = {
        "steps": risk["steps"],
        "guidance_scale": risk["guidance"],
        "eta": 0.0,
        "class_gap": {"branch_step": 0, "rollout_steps": 1, "estimator": "paide-w2"},
        "request_risk": {
            "branch_step": risk["branches"][0][0],
            "rollout_steps": risk["branches"][0][1],
            "estimator": "mean-w2",
        },
        "reason": reason,
    }
    return {"class_gap": gap, "request_risk": risk, "sentences": [sentence_gap, sentence_risk], "profile": profile}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what was not computed becomes null."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
