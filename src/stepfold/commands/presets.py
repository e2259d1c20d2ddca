"""`stepfold presets`: the presets, and what each is for."""

from typing import Annotated, Any

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


def different(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The entries of nested settings that are not the same in `base`."""
    own: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = different(value, base[key])
            if not value:
                continue
        elif value == base.get(key):
            continue
        own[key] = value
    return own


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
    import yaml

    from stepfold.config import load_config, preset_names, preset_purpose

    if name is not None:
        chosen = load_config(name).model_dump(mode="json")
        own = different(chosen, load_config("default").model_dump(mode="json"))
        write_json(json_file, own)
        purpose = preset_purpose(name) if name in preset_names() else "a file of yours"
        typer.echo(f"{name}: {purpose}\n\nDifferences from the preset `default`:\n")
        typer.echo(
            yaml.safe_dump(own, sort_keys=False, default_flow_style=None, width=100) if own else "none\n", nl=False
        )
        return
    purposes = {name: preset_purpose(name) for name in preset_names()}
    width = max(map(len, purposes))
    write_json(json_file, purposes)
    parts = []
    for group, heading in GROUPS.items():
        rows = [f"  {name:{width}}  {purpose}" for name, purpose in purposes.items() if group_of(name) == group]
        parts.append("\n".join([heading, *rows]))
    typer.echo("\n\n".join(parts))
