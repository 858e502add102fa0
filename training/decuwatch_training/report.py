"""An evaluation as Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from decuwatch_training.figures import pareto, request_quality


def markdown(evaluation: dict[str, Any]) -> str:
    """The whole report, without a title: the caller's document has one."""
    entries: list[dict[str, Any]] = evaluation["settings"]
    bins = [f"{size:g}" for size in evaluation["bins"]]
    requests = evaluation["requests"]
    most = max(e["components"] for e in entries)
    full = [e for e in entries if e["components"] == most]
    cells = requests["classes"] * requests["rotations"]
    parts = [
        f"{requests['rotations']} rotations x {requests['classes']} classes x {requests['seeds']} seeds = "
        f"{cells * requests['seeds']} requests a setting; "
        f"intervals are 95%, from resampling the {cells} cells (a class in a rotation).",
        "### Recommendation",
        *evaluation["recommendation"]["sentences"],
        "### Class level: PaiDE with squared Wasserstein distances, at the first branched step",
        _class_table(
            [e for e in full if e["estimator"] == "paide-w2" and e["branches"][0][1] == 1], bins, evaluation["control"]
        ),
        "### Class level: estimators",
        _estimator_table(full, bins),
        *_request_parts(evaluation, full, bins),
        "### The frontier: quality against rows",
        "Settings that no cheaper one equals.",
        _frontier_table(entries, bins),
    ]
    return "\n\n".join(parts) + "\n"


def _class_table(entries: Sequence[dict[str, Any]], bins: Sequence[str], control: dict[str, Any]) -> str:
    largest = bins[-1]
    header = ["S", "g", "branch at", "rows"]
    for size in bins[:-1]:
        header.append(f"AUROC {size} v {largest}")
    header += [f"same class, {size} v {largest}" for size in bins[:-1]]
    header += [
        f"AUPRC {bins[-2]}",
        f"TPR at 1% FPR {bins[-2]}",
        "rho",
        "mean by bin",
        "spread between seeds",
        "saturated",
    ]
    rows = [
        _class_row(e, bins, [e["steps"], f"{e['guidance']:g}", e["point"], e["rows"]])
        for e in sorted(entries, key=lambda e: (e["steps"], e["guidance"], e["rows"]))
    ]
    rows.append(_class_row(control, bins, ["-", "-", control["name"], 0]))
    return _table(header, rows)


def _class_row(entry: dict[str, Any], bins: Sequence[str], head: list[Any]) -> list[Any]:
    against = entry["against_largest"]
    row = [*head, *(_interval(against[size]["auroc"]) for size in bins[:-1])]
    for size in bins[:-1]:
        own = against[size]  # without rotations no class is in two bins
        row.append(
            f"{own['auroc_same_class']:.3f} ({own['classes_at_99']} of {own['classes']})" if own["classes"] else "-"
        )
    nearest = against[bins[-2]]
    means = " / ".join(f"{entry['mean_by_bin'][size]['value']:.3g}" for size in bins)
    saturated = f"{entry['saturated']:.0%}" if "saturated" in entry else "-"
    return [
        *row,
        f"{nearest['auprc']:.3f}",
        f"{nearest['tpr_at_1pct_fpr']:.2f}",
        _number(entry["rho_log_bin"]),
        means,
        _number(entry["variation_within_class"]),
        saturated,
    ]


def _estimator_table(entries: Sequence[dict[str, Any]], bins: Sequence[str]) -> str:
    pairs = {(e["steps"], e["guidance"]) for e in entries}
    wanted = [pair for pair in ((20, 2.0), (200, 5.0)) if pair in pairs] or sorted(pairs)[:1]
    rows = []
    for pair in wanted:
        for e in entries:
            if (
                (e["steps"], e["guidance"]) == pair
                and len(e["branches"]) == 1
                and e["branches"][0][1] == 1
                and e["point"] in ("first", "50%", "last")
            ):
                aurocs = [f"{e['against_largest'][size]['auroc']['value']:.3f}" for size in bins[:-1]]
                rows.append(
                    [
                        pair[0],
                        f"{pair[1]:g}",
                        e["point"],
                        e["estimator"],
                        e["rows"],
                        *aurocs,
                        f"{e.get('saturated', 0):.0%}" if "saturated" in e else "-",
                    ]
                )
    return _table(
        [
            "S",
            "g",
            "branch at",
            "estimator",
            "rows",
            *(f"AUROC {size} v {bins[-1]}" for size in bins[:-1]),
            "saturated",
        ],
        rows,
    )


def _request_parts(evaluation: dict[str, Any], entries: Sequence[dict[str, Any]], bins: Sequence[str]) -> list[str]:
    """The request level, if roll-outs were measured."""
    measured = [e for e in entries if e["estimator"] == "mean-w2" and "request_level" in e]
    if not measured:
        return []
    title = "### Request level: Spearman of score and epistemic error within class and bin"
    return [title, _error_sentence(evaluation), _request_table(measured, bins)]


def _error_sentence(evaluation: dict[str, Any]) -> str:
    sentences = []
    for guidance, truth in evaluation["error"].items():
        means = ", ".join(f"{size}: {estimate['value']:.1f}" for size, estimate in truth["mean_by_bin"].items())
        sentences.append(f"g = {guidance}, S = {truth['steps']}: {means}")
    return (
        "The error of a request is the squared distance of the final latent from the one that the backbone's own fully "
        "trained table gives, "
        'averaged over the components ("carrier": of the carrying component alone). Every score is held against the '
        "error at "
        f'g = {evaluation["production_guidance"]:g}, whatever its own guidance; the column "own g" is against the '
        "error at its own. Mean error by bin: " + "; ".join(sentences) + "."
    )


def _request_table(entries: Sequence[dict[str, Any]], bins: Sequence[str]) -> str:
    rows = []
    for e in sorted(entries, key=lambda e: (e["guidance"], e["steps"], e["rows"])):
        level = e["request_level"]
        by_bin = " / ".join(
            "-" if level["within_by_bin"][size] is None else f"{level['within_by_bin'][size]:.2f}" for size in bins
        )
        what = e["point"] if e["estimator"] == "mean-w2" else f"{e['point']} (logs)"
        rows.append(
            [
                f"{e['guidance']:g}",
                e["steps"],
                what,
                e["rows"],
                _interval(level["within"], 2),
                "-" if level["within_carrier"]["value"] is None else f"{level['within_carrier']['value']:.2f}",
                "-" if (own := level["within_at_guidance"].get(f"{e['guidance']:g}")) is None else f"{own:.2f}",
                by_bin,
                _number(level["overall"]),
            ]
        )
    return _table(
        [
            "g",
            "S",
            "branch",
            "rows",
            "within class and bin",
            "carrier",
            "own g",
            "by bin " + " / ".join(bins),
            "overall",
        ],
        rows,
    )


def _frontier_table(entries: Sequence[dict[str, Any]], bins: Sequence[str]) -> str:
    def hardest(entry: dict[str, Any]) -> float:
        return min(float(value["auroc"]["value"]) for value in entry["against_largest"].values())

    def request_level(entry: dict[str, Any]) -> float:
        return request_quality(entry)

    rows: list[list[Any]] = []
    for name, quality in ((f"hardest AUROC v {bins[-1]}", hardest), ("Spearman within class and bin", request_level)):
        rows += [[name, e["rows"], e["name"], f"{quality(e):.3f}"] for e in pareto(entries, quality)]
    return _table(["what", "rows", "setting", "quality"], rows)


def _number(value: float | None) -> str:
    """Two digits; a dash for what has no value, such as the correlation of scores that are all alike."""
    return "-" if value is None else f"{value:.2f}"


def _interval(estimate: dict[str, float | None], digits: int = 3) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "-"
    return (
        f"{value:.{digits}f}"
        if low is None or high is None or low != low
        else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])
