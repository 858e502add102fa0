"""Print the list in docs/training.md of what is supported by class and field, from the tables that the readers use.

python -m decuwatch_training.supported
"""

import textwrap
from collections.abc import Iterator, Mapping

from decuwatch_training import compvis, configuration
from decuwatch_training.configuration import Known, Rule

COLUMNS = 118


def supported() -> str:
    """The list in Markdown: for each class, its fields by what is allowed of them."""
    parts = []
    for group in (*configuration.DENOISERS.values(), configuration.AUTOENCODERS, configuration.SCHEDULERS):
        for name, known in group.items():
            parts.append("\n".join([f"### `{name}`", "", *_class_lines(known)]))
    for name, rules in {
        "keys of the file": compvis.FILE_KEYS,
        "`model`": compvis.MODEL_KEYS,
        "`model.params`": compvis.PARAMETERS,
        "`target` of the parts": compvis.PARTS,
        "`unet_config.params`": compvis.UNET_PARAMETERS,
        "`first_stage_config.params` of `AutoencoderKL`": compvis.FIRST_STAGE_PARAMETERS,
        "`first_stage_config.params` of `VQModelInterface`": compvis.VQ_PARAMETERS,
        "`ddconfig` of both": compvis.DDCONFIG,
        "`cond_stage_config.params`": compvis.CLASS_EMBEDDER,
    }.items():
        parts.append("\n".join([f"### CompVis: {name}", "", *_lines(rules)]))
    return "\n\n".join(parts) + "\n"


def _class_lines(known: Known) -> Iterator[str]:
    yield from _lines(known.fields)
    if known.older:
        yield ""
        yield "Also in files of other versions and of diffusers' `EMAModel`:"
        yield ""
        yield from _lines(known.older)


def _lines(rules: Mapping[str, Rule]) -> Iterator[str]:
    """One item for each kind of value, the fields that share it together."""
    fields: dict[str, list[str]] = {}
    for name, rule in rules.items():
        fields.setdefault(f"{rule.says}{' (required)' if rule.required else ''}", []).append(f"`{name}`")
    for says, names in fields.items():
        yield textwrap.fill(
            f"- {', '.join(names)}: {says}",
            COLUMNS,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


if __name__ == "__main__":
    print(supported(), end="")
