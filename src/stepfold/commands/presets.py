"""`stepfold presets`: the presets, and what each is for."""

import typer

from stepfold.commands.options import JsonOption, write_json

ALL_WEIGHTS = ("default", "paper", "released")
DEMOS = ("demo", "demo-4step", "emoji-long")
GROUPS = {
    "lora": "your model: LoRA in four steps",
    "whole": "your model: all weights",
    "demo": "bundled model: demo",
    "method": "bundled model: methods (for a teacher of your own, set teacher, training.steps and optimiser.lr)",
}
"""Groups of presets, in the order in which they are listed -> their headings."""


def group_of(name: str) -> str:
    """The group of a preset, in `GROUPS`."""
    if name.endswith("lora-4step"):
        return "lora"
    return "whole" if name in ALL_WEIGHTS else "demo" if name in DEMOS else "method"


def presets(json_file: JsonOption = None) -> None:
    """List the presets, and what each is for; `stepfold distill --preset NAME --dry-run` prints one whole.

    stepfold presets

    stepfold presets --json presets.json
    """
    from stepfold.config import preset_names, preset_purpose

    purposes = {name: preset_purpose(name) for name in preset_names()}
    width = max(map(len, purposes))
    write_json(json_file, purposes)
    parts = []
    for group, heading in GROUPS.items():
        rows = [f"  {name:{width}}  {purpose}" for name, purpose in purposes.items() if group_of(name) == group]
        parts.append("\n".join([heading, *rows]))
    typer.echo("\n\n".join(parts))
