"""An evaluation as Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(evaluation: dict[str, Any]) -> str:
    """The whole report, without a title: the caller's document has one."""
    requests, ensemble = evaluation["requests"], evaluation["ensemble"]
    bins = [f"{size:g}" for size in evaluation["bins"]]
    cells = requests["classes"] * requests["rotations"]
    tables = ", ".join(f"{count} {name}" for name, count in ensemble["tables"].items())
    parts = [
        f"{requests['rotations']} rotations x {requests['classes']} classes x {requests['seeds']} seeds = "
        f"{cells * requests['seeds']} requests a setting, guidance {requests['guidance_scale']:g}; intervals are 95%, "
        f"from resampling the {cells} cells (a class in a rotation). Regime {ensemble['regime']}; tables: {tables}, "
        f"and {ensemble['producers']} producers that are not members. A setting is "
        "estimator@branch+rollout/steps:tables:guidance:M:g.",
    ]
    if (draws := evaluation["draws_by_bin"]) is not None:
        numbers = ", ".join(f"{size}: {count:.0f}" for size, count in draws.items())
        parts.append(f"Draws per row of the producer, by bin: {numbers}.")
    parts += ["### Class level: classes with few images", *_class_parts(evaluation, bins)]
    parts += ["### Request level: the error of a producer that is not a member", *_request_parts(evaluation, bins)]
    parts += ["### Image level: the image is not of the class asked for", *_image_parts(evaluation)]
    parts += ["### False alarms", *_alarm_parts(evaluation)]
    return "\n\n".join(parts) + "\n"


def _head(entry: dict[str, Any]) -> list[str]:
    """The first columns of a row: the setting, marked if the profile has it, and its cost."""
    name = f"`{entry['name']}`" if "@" in entry["name"] else entry["name"]
    return [f"**{entry['measurement']}** {name}" if entry["measurement"] else name, str(entry["rows"])]


def _class_parts(evaluation: dict[str, Any], bins: Sequence[str]) -> list[str]:
    if not evaluation["class_level"]:
        return ["Not measured: all classes have equally many images."]
    largest = bins[-1]
    header = ["score", "rows", *(f"AUROC {size} v {largest}" for size in bins[:-1])]
    header += [f"same class, {bins[-2]} v {largest}", f"AUPRC {bins[-2]}", f"TPR at 1% FPR {bins[-2]}", "rho"]
    header += ["mean by bin " + " / ".join(bins), "spread between seeds"]
    rows = []
    for e in evaluation["class_level"]:
        against = e["against_largest"]
        nearest = against[bins[-2]]
        same = "-"  # without rotations no class is in two bins
        if nearest["classes"]:
            same = f"{_number(nearest['auroc_same_class'])} ({nearest['classes_at_99']} of {nearest['classes']})"
        means = " / ".join(f"{e['mean_by_bin'][size]['value']:.3g}" for size in bins)
        rows.append(
            [
                *_head(e),
                *(_interval(against[size]["auroc"]) for size in bins[:-1]),
                same,
                _number(nearest["auprc"]),
                _number(nearest["tpr_at_1pct_fpr"]),
                _number(e["rho_log_bin"]),
                means,
                _number(e["variation_within_class"]),
            ]
        )
    return [_table(header, rows)]


def _request_parts(evaluation: dict[str, Any], bins: Sequence[str]) -> list[str]:
    level = evaluation["request_level"]
    if level is None:
        return ["Not measured: the tables file lacks the tensor producers or reference."]
    means = ", ".join(f"{size}: {value:.3g}" for size, value in level["mean_error_by_bin"].items())
    steps = evaluation["requests"]["error_steps"]
    text = (
        f"Spearman's rho of score and error within class and bin, averaged over cells and producers. The error is the "
        f"squared distance of a producer's final latent (S = {steps}) from the one under the backbone's own table. "
        f"Mean error by bin: {means}. The last column holds the score against the mean error of the very tables whose "
        "spread it is: part of that correlation is of their own making."
    )
    header = ["score", "rows", "within class and bin", "share of the ceiling", "by bin " + " / ".join(bins), "overall"]
    header.append("with the members' own error")
    ceiling = level["ceiling"]
    rows = []
    for e in [*([] if ceiling is None else [ceiling]), *level["settings"]]:
        by_bin = " / ".join(_number(e["within_by_bin"][size]) for size in bins)
        value, most = e["within"]["value"], None if ceiling is None else ceiling["within"]["value"]
        share = "-" if value is None or not most else f"{value / most:.2f}"
        own = e.get("within_members_own_error")
        rows.append(
            [*_head(e), _interval(e["within"]), share, by_bin, _number(e["overall"]), _interval(own) if own else "-"]
        )
    return [text, _table(header, rows)]


def _image_parts(evaluation: dict[str, Any]) -> list[str]:
    level = evaluation["image_level"]
    if level is None:
        return ["Not measured: it takes the tensors producers and reference, and a truth (--truth or --data)."]
    shares = ", ".join(f"{size}: {value:.2f}" for size, value in level["wrong_by_bin"].items())
    text = (
        f"Of {level['images']} images of the producers, {level['wrong']:.3f} are wrong (by bin {shares}), as another "
        f"classifier says ({level['truth']})."
    )
    header = ["score", "rows", "AUROC pooled", "AUPRC", "TPR at 5% FPR", "AUROC within class and bin", "cells"]
    rows = [
        [
            *_head(e),
            _interval(e["auroc"]),
            _number(e["auprc"]),
            _number(e["tpr_at_5pct_fpr"]),
            _interval(e["within"]),
            str(e["cells"]),
        ]
        for e in level["settings"]
    ]
    return [text, _table(header, rows)]


def _alarm_parts(evaluation: dict[str, Any]) -> list[str]:
    entries = evaluation["false_alarms"]
    if not entries:
        return ["Not measured."]
    text = (
        "Thresholds by class from one half of further requests of the first manifest, alarms among the other half; in "
        "brackets the range that holds 95% of such counts if nothing changed."
    )
    header = ["measurement", "wanted", "all classes", "classes out of their range", "by class"]
    rows = []
    for e in entries:
        classes = e["classes"].values()
        out = sum(not rate["low"] <= rate["alarms"] <= rate["high"] for rate in classes)
        shares = [rate["alarms"] / rate["scores"] for rate in classes]
        spread = f"{min(shares):.1%} to {max(shares):.1%}" if shares else "-"
        rows.append([e["measurement"], f"{e['rate']:.0%}", _alarms(e["all"]), f"{out} of {len(shares)}", spread])
    return [text, _table(header, rows)]


def _alarms(rate: dict[str, int]) -> str:
    if not rate["scores"]:
        return "too few scores for this rate"
    share, low, high = (rate[name] / rate["scores"] for name in ("alarms", "low", "high"))
    return f"{rate['alarms']} of {rate['scores']} = {share:.1%} [{low:.1%}, {high:.1%}]"


def _number(value: float | None) -> str:
    """Three digits; a dash for what has no value, such as the correlation of scores that are all alike."""
    return "-" if value is None or value != value else f"{value:.3f}"


def _interval(estimate: dict[str, float | None]) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if low is None or high is None or low != low:
        return _number(value)
    return f"{_number(value)} [{low:.3f}, {high:.3f}]"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])
