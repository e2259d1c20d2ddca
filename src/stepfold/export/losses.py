"""What a card says of rounded weights: how they are loaded, and what they cost."""

from collections.abc import Mapping
from typing import Any

from stepfold.evaluation.protocol import fd_title
from stepfold.evaluation.verdict import number
from stepfold.students.card import Card
from stepfold.teachers.quantised_files import PACKAGES

LOAD = """# pip install "{package}"
pipe = {{pipeline}}.from_pretrained({{name}}{{dtype}}){{parts}}{device}"""
ON_A_GPU = '\npipe.to("cuda")  # diffusers loads bitsandbytes\' weights on a GPU alone'
SECTION = """
## Quantised

The linear layers of the network's blocks are {kind}, the other weights {dtype}. `stepfold sample` needs no further
package.{measured}
"""
MEASURED = """ The loss was measured on {prompts}.

{table}
Latent error is the distance from the teacher's {steps} steps. Change is the distance from the student before it was
quantised, from the same noise. The network's files have {before} MB before and {after} MB after."""
COLUMNS = {"latent_error": "latent error", "change": "change", "accuracy": "accuracy", "fd": "FD"}
DIGITS = {"latent_error": 3, "change": 3, "accuracy": 3, "fd": 4}


def loading_of(card: Card) -> str:
    """The line that loads a quantised folder in plain diffusers, to be formatted; empty for plain weights."""
    if not card.quantised:
        return ""
    kind = card.quantised.kind
    device = ON_A_GPU if kind == "nf4" else ""
    return LOAD.format(package=PACKAGES[kind], device=device)


def quantised_section(card: Card) -> str:
    """The card's section about rounded weights; empty for plain ones."""
    if not card.quantised:
        return ""
    return SECTION.format(
        kind=card.quantised.kind, dtype=card.quantised.dtype, measured=measured_loss(card.quantised.loss)
    )


def measured_loss(loss: Mapping[str, Any]) -> str:
    """What was measured, with a table; empty where nothing was."""
    if not loss:
        return ""
    before, after = (f"{size / 1e6:,.1f}" for size in loss["bytes"])
    return MEASURED.format(
        prompts=loss["prompts"], table=loss_table(loss), steps=loss["protocol"]["teacher_steps"], before=before,
        after=after,
    )  # fmt: skip


def loss_table(loss: Mapping[str, Any]) -> str:
    """Steps and form of the student -> scores, in Markdown."""
    forms = loss["forms"]
    keys = [key for key in COLUMNS if any(key in row for rows in forms.values() for row in rows.values())]
    heads = [fd_title(loss["images"]) if key == "fd" else COLUMNS[key] for key in keys]
    table = f"| steps | weights | {' | '.join(heads)} |\n|---|---|{'---|' * len(keys)}\n"
    for steps in next(iter(forms.values())):
        for form, rows in forms.items():
            cells = " | ".join(number(rows[steps].get(key), DIGITS[key]) for key in keys)
            table += f"| {steps} | {form} | {cells} |\n"
    return table
