"""The command line: the commands put together, and what becomes of their errors."""

import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer

from stepfold import __version__
from stepfold.commands.bank import app as bank
from stepfold.commands.combine import combine
from stepfold.commands.compare import compare
from stepfold.commands.convert import convert
from stepfold.commands.demo import demo
from stepfold.commands.distill import distill
from stepfold.commands.doctor import doctor
from stepfold.commands.evaluate import evaluate
from stepfold.commands.export import export
from stepfold.commands.launching import other_process
from stepfold.commands.options import Command
from stepfold.commands.plan import plan
from stepfold.commands.presets import presets
from stepfold.commands.prompts import app as prompts
from stepfold.commands.push import push
from stepfold.commands.quantise import quantise
from stepfold.commands.reproduce import reproduce
from stepfold.commands.retime import retime
from stepfold.commands.runs import runs
from stepfold.commands.sample import sample
from stepfold.commands.schedule import schedule
from stepfold.errors import Caution, NonFiniteError, UserError, first_line, out_of_memory

ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # type: ignore[assignment] # typer's own, or click's
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Distil a diffusion or flow model into a few-step student, from prompts alone.

    stepfold distill --preset demo --out runs/demo

    stepfold demo runs/demo/student
    """,
)


def show_version(asked: bool) -> None:
    """Prints the version, and ends."""
    if asked:
        typer.echo(f"stepfold {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What `stepfold` takes before a command."""


KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("`torch.jit.script` is deprecated", FutureWarning),  # diffusers, with torch 2.15
    ("The `local_dir_use_symlinks` argument is deprecated", UserWarning),  # diffusers, with huggingface_hub 2
)
"""How warnings of the libraries begin that tell the user nothing, and their kinds."""
GROUPS = {
    "Distil": (distill, plan, schedule, combine),
    "Look": (sample, demo, evaluate, runs, compare, reproduce),
    "Use": (export, quantise, push),
    "Prepare": (doctor, presets, retime, convert),
}
"""The commands by what people do with them; `stepfold --help` shows them so."""
for group, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)
for command in (*app.registered_commands, *prompts.registered_commands, *bank.registered_commands):
    command.cls = Command
app.add_typer(prompts, name="prompts", rich_help_panel="Prepare")
app.add_typer(bank, name="bank", rich_help_panel="Prepare")


LESS_IN_TRAINING = (
    "in this order: --set training.micro_batch=1, --lora 64 --dtype bfloat16, prompts encoded before (stepfold prompts "
    "encode), --set teacher.quantise=int8, a smaller --size"
)
LESS_MEMORY = {
    "distill": LESS_IN_TRAINING,
    "plan": LESS_IN_TRAINING,
    "doctor": "in this order: --lora 64 --dtype bfloat16, --quantise int8, a smaller --size; else --device cpu",
    "retime": "in this order: --set training.micro_batch=1, --set training.checkpointing=true, prompts encoded before "
    "(stepfold prompts encode, then --set conditions=FOLDER); it trains all weights in float32",
}
"""Command -> what to try where memory ran out."""
LESS_ELSEWHERE = "a smaller --batch, --n or --size, or --dtype bfloat16, where the command has them; else --device cpu"


AS_PYTHON = warnings.formatwarning


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What we warn of is one line; the rest is as Python shows it."""
    if issubclass(category, Caution):
        return f"note: {message}\n"
    return AS_PYTHON(message, category, filename, lineno, line)


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for text, kind in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", text, kind)
    warnings.formatwarning = format_warning
    try:
        sys.exit(app(prog_name="stepfold", standalone_mode=False) or 0)
    except ClickException as error:
        context = getattr(error, "ctx", None)
        if "NoArgsIsHelp" in type(error).__name__:
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        said: str = error.format_message()  # type: ignore[attr-defined]
        said = said.rstrip(".").replace("Possible options: --help, ", "Possible options: ")
        fail(f"{said}; {context.command_path if context else 'stepfold'} --help says what it takes", 2)
    except UserError as error:
        fail(error, 2)
    except NonFiniteError as error:
        fail(error, 3)
    except BrokenPipeError:
        sys.exit(1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}); {LESS_MEMORY.get(sys.argv[1], LESS_ELSEWHERE)}", 2)
    except OSError as error:  # a path that no file can have, a full disk behind standard output
        with suppress(OSError):
            fail(f"{error.strerror or error}{f': {str(error.filename)[:200]}' if error.filename else ''}", 2)
        os._exit(2)


def fail(error: Any, code: int) -> None:
    """Prints an error as one line and exits."""
    rank = other_process()
    print((f"process {rank}: error: " if rank else "error: ") + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
