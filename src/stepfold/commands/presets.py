"""`stepfold presets`: the presets, and what each is for."""

from typing import Annotated

import typer

from stepfold.commands.options import JsonOption, write_json

ALL_WEIGHTS = ("default", "paper", "released")
DEMOS = ("demo", "demo-4step", "emoji-long")
GROUPS = {
    "lora": "your model: LoRA in four steps",
    "whole": "your model: all weights",
    "demo": "bundled model: demo",
    "method": "bundled model: methods (for your own teacher, set its max_tokens, training.steps and optimiser.lr)",
}
"""Groups of presets, in the order in which they are listed -> their headings."""


def group_of(name: str) -> str:
    """The group of a preset, in `GROUPS`."""
    if name.endswith("lora-4step"):
        return "lora"
    return "whole" if name in ALL_WEIGHTS else "demo" if name in DEMOS else "method"


def presets(
    name: Annotated[str | None, typer.Argument(help="One preset, to show its settings.", show_default=False)] = None,
    json_file: JsonOption = None,
) -> None:
    """List the presets, and what each is for; or show what one sets.

    `stepfold distill --preset NAME --dry-run` prints all settings of a run.

        stepfold presets

        stepfold presets sdxl-lora-4step

        stepfold presets --json presets.json
    """
    from stepfold.config import differences, load_config, preset_names, preset_purpose, yaml_of

    if name is not None:
        own = differences(load_config(name), load_config("default"))
        write_json(json_file, own)
        purpose = preset_purpose(name) if name in preset_names() else "a file of yours"
        typer.echo(f"{name}: {purpose}\n\nDifferences from the preset `default`:\n")
        typer.echo(yaml_of(own) if own else "none\n", nl=False)
        return
    purposes = {name: preset_purpose(name) for name in preset_names()}
    width = max(map(len, purposes))
    write_json(json_file, purposes)
    parts = []
    for group, heading in GROUPS.items():
        rows = [f"  {name:{width}}  {purpose}" for name, purpose in purposes.items() if group_of(name) == group]
        parts.append("\n".join([heading, *rows]))
    typer.echo("\n\n".join(parts))
