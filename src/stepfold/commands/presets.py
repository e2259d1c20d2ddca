"""`stepfold presets`: the presets, and what each is for."""

import typer

from stepfold.commands.options import JsonOption, write_json


def presets(json_file: JsonOption = None) -> None:
    """List the presets, and what each is for; `stepfold distill --preset NAME --dry-run` prints one whole.

    stepfold presets

    stepfold presets --json presets.json
    """
    from stepfold.config import preset_names, preset_purpose

    purposes = {name: preset_purpose(name) for name in preset_names()}
    width = max(map(len, purposes))
    write_json(json_file, purposes)
    typer.echo("\n".join(f"{name:{width}}  {purpose}" for name, purpose in purposes.items()))
