"""What the documentation takes from the code: settings, error messages, commands; mkdocs calls `on_page_markdown`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from stepfold.cli import app
from stepfold.config import Config

SOURCE = Path(__file__).parents[2] / "src" / "stepfold"
ERRORS = {"UserError", "NonFiniteError"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts what was generated in place of its marker, such as `<!-- settings -->`."""
    for name, make in {"settings": settings, "errors": errors, "commands": commands}.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def settings(section: type[BaseModel] = Config, prefix: str = "") -> str:
    """A table of the section's settings, then those of the sections in it."""
    title = (section.__doc__ or "").strip().splitlines()[0]
    lines = [f"### `{prefix.removesuffix('.')}`" if prefix else "### Top level", "", title, ""]
    lines += ["| setting | default | what it is |", "|---|---|---|"]
    below = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append(settings(field.annotation, f"{prefix}{name}."))
        else:
            default = "" if field.default is None else f"`{cell(str(field.default))}`"
            lines.append(f"| `{prefix}{name}` | {default} | {cell(field.description or '')} |")
    return "\n\n".join(["\n".join(lines), *below])


def errors() -> str:
    """Every message that the package raises, file by file; `{...}` is what the message fills in."""
    parts = []
    for file in sorted(SOURCE.rglob("*.py")):
        found = dict.fromkeys(messages(ast.parse(file.read_text(encoding="utf-8"))))
        if found:
            parts.append("\n".join([f"### `{file.relative_to(SOURCE)}`", "", *(f"- {cell(text)}" for text in found)]))
    return "\n\n".join(parts)


def messages(tree: ast.AST) -> Iterator[str]:
    """The messages of a module's errors, and of the checks of settings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            message = template(node.args[0]) if node.func.id in ERRORS | {"ValueError"} else None
            if message and " " in message:
                yield message


def template(node: ast.expr) -> str | None:
    """The text of a string, `{...}` where it fills something in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            v.value if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}" for v in node.values
        )  # type: ignore[attr-defined]
    return None


def commands() -> str:
    """All commands with their options."""
    command = typer.main.get_command(app)
    with command.make_context("stepfold", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="stepfold")
    return re.sub(r"^#", "##", text, flags=re.MULTILINE)


def cell(text: str) -> str:
    """A text that neither markdown nor a table takes apart."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text.replace("\n", " "))
