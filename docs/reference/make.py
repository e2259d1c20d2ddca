"""Writes the reference pages beside it, and a table of ../teachers.md, from the code (`make reference`)."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer.main
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.configuration_utils import FrozenDict
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from stepfold.cli import app
from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.reproduction.experiments import load_experiments
from stepfold.teachers.conventions import levels_seen, output_meaning, time_range
from stepfold.teachers.family import Family
from stepfold.teachers.loading import FAMILIES
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import FlowSchedule, VPSchedule

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src" / "stepfold"
ERRORS = {"UserError", "NonFiniteError"}
NOTE = "<!-- Written by `make reference` from the code. Change the code, not this page. -->"


def pages() -> dict[str, str]:
    """Name of each page -> its text."""
    guide = (HERE.parent / "settings.md").read_text(encoding="utf-8")
    made = {
        "commands.md": ("Commands", "Every command with its options, from `--help`.", commands()),
        "settings.md": (
            "All settings",
            "Every setting, its default, and where its effect was measured. "
            "[Choosing settings](../settings.md) says what to change first.",
            settings(page=guide),
        ),
        "messages.md": (
            "All messages",
            "Every error message, file by file, and what to do. `{...}` stands for what the message fills in. "
            "[Troubleshooting](../errors.md) starts from what you see.",
            errors(),
        ),
        "api.md": (
            "API",
            "The first section is public, and changes only with a note in the changelog. The other sections are "
            "internal: they are documented for readers and may change without notice. "
            "[Use it from Python](../python.md) and [your own network](../teachers.md#a-network-of-your-own) show how "
            "to use `stepfold.api`.",
            api(),
        ),
    }
    return {name: f"{NOTE}\n\n# {title}\n\n{lead}\n\n{text.strip()}\n" for name, (title, lead, text) in made.items()}


NOT_MEASURED = "not measured"
ELSEWHERE = {
    "teacher.max_tokens": "[log](../lab-log.md)",
    "consistency.r_warmup": NOT_MEASURED,
    "training.shard": "same student: [log](../lab-log.md); speed and memory not measured",
    "training.background_checkpoints": "[Speed](../speed.md#checkpoints)",
    "training.ema": "[log](../lab-log.md)",
    "optimiser.warmup": "[log](../lab-log.md)",
    "discrete.huber_constant": "[log](../lab-log.md)",
    "evaluation.n": "[log](../lab-log.md)",
    "adversarial.weight": "[the paper, run again](../results/paper.md): T2",
    "optimiser.name": "[Choosing settings](../settings.md); CAME and AdamW: [log](../lab-log.md)",
    "discrete.jump_power": "[log](../lab-log.md)",
    "student.lora_convolutions": "[log](../lab-log.md)",
    "student.times": "[log](../lab-log.md)",
    "teacher.guidance_interval": "[log](../lab-log.md)",
    "teacher.quantise": "[Speed](../speed.md#large-models-on-one-card)",
    "teacher.quantise_encoders": "[Speed](../speed.md#text-encoders-in-few-bits): weights; quality not measured",
    "teacher.guidance_rule": NOT_MEASURED,
    "teacher.null_mask": NOT_MEASURED,
    "policy.steps": "[log](../lab-log.md)",
    "policy.states": "[log](../lab-log.md)",
    "target.rule": "[log](../lab-log.md)",
    "target.segments": "[log](../lab-log.md)",
    "target.draws": "[log](../lab-log.md)",
    "space.kind": "[the paper, run again](../results/paper.md): T2",
}
"""Where a setting was measured, if that is not seen from the page's own tables and the rows of `stepfold reproduce`."""
NO_MATTER = re.compile(
    r"seed|prompts|teacher\.(?!dtype)\w+|evaluation\.(guidance|steps)|space\.images"
    r"|training\.(checkpoint_every|keep_checkpoints|preview_every|look_every|time_stages|skip_nonfinite)"
)
"""Settings that say what to do, not how well."""


def settings(section: type[BaseModel] = Config, prefix: str = "", page: str = "") -> str:
    """A table of the section's settings, then those of the sections in it; `page` is what stands above them."""
    title = (section.__doc__ or "").strip().splitlines()[0]
    lines = [f"## `{prefix.removesuffix('.')}`" if prefix else "## Top level", "", title, ""]
    lines += ["| setting | default | what it is | measured |", "|---|---|---|---|"]
    below = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append(settings(field.annotation, f"{prefix}{name}.", page))
        else:
            full, default = f"{prefix}{name}", "" if field.default is None else cell(f"`{field.default}`")
            lines.append(f"| `{full}` | {default} | {cell(field.description or '')} | {measured(full, page)} |")
    return "\n\n".join(["\n".join(lines), *below])


def measured(name: str, page: str) -> str:
    """Where a setting was measured."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if f"`{name}`" in page:
        return "[Choosing settings](../settings.md)"
    if table := tables_of_settings().get(name):
        return f"[the paper, run again](../results/paper.md): {table}"
    return "" if NO_MATTER.fullmatch(name) else NOT_MEASURED


@cache
def tables_of_settings() -> dict[str, str]:
    """Setting -> the tables of `stepfold reproduce` in which it varies."""
    found: dict[str, dict[str, None]] = {}
    for table, experiment in load_experiments().tables.items():
        for changes in experiment.rows.values():
            for change in changes:
                found.setdefault(change.split("=")[0], {})[table] = None
    return {name: ", ".join(tables) for name, tables in found.items()}


FIXES = {
    "unknown setting": "the name that it proposes; [all settings](settings.md)",
    "setting {key}": "as the message says; [all settings](settings.md)",
    "training.prompts_per_step": "a prompt for each process, or fewer processes",
    "--protocol": "give what it takes",
    "student.lora": "as the message says",
    "adversarial.weight": "as the message says",
    "fake.updates": "as the message says",
    "in a phase": "as the message says",
    "optimiser.name=": "as the message says",
    "training.compile": "as the message says",
    "the checkpoint has": "a checkpoint of Sana or Sana-Sprint; `--base` of the same size",
    "a name that": "delete the json beside the page; finished runs in `--out` count again",
    "its step is": "nothing: the checkpoint before is used",
    "Type a prompt.": "type one",
    "{name} must be a number": "a number in that range",
}
"""What to do, for messages that do not say it in a part of their own; by their first words."""
DAMAGED = "part of a longer message: delete the folder and encode again"
LOOK = "the page shows what it can; the file is in the run's folder"
FILES = {"prompts/cache.py": DAMAGED, "web/runs.py": LOOK}
"""The same, for all such messages of a file."""


def errors() -> str:
    """Every message that the package raises, file by file, and what to do; `{...}` is what the message fills in."""
    parts = []
    for file in sorted(SOURCE.rglob("*.py")):
        tree, name = ast.parse(file.read_text(encoding="utf-8")), file.relative_to(SOURCE).as_posix()
        found = dict.fromkeys(messages(tree))
        if found:
            title = (ast.get_docstring(tree) or "").splitlines()[0]
            rows = [f"| {cell(what)} | {fix} |" for what, fix in (what_and_fix(text, name) for text in found)]
            parts.append(
                "\n".join([f"## `{name}`", "", cell(title), "", "| message | what to do |", "|---|---|", *rows])
            )
    return "\n\n".join(parts)


def what_and_fix(message: str, file: str) -> tuple[str, str]:
    """A message in two: what is wrong, and what to do, which is empty where nobody said it."""
    what, semicolon, fix = message.rpartition("; ")
    if semicolon:
        return what, cell(fix)
    what, needs, install = message.partition(": pip install ")
    if needs:
        return what, f"`pip install {install}`"
    known = next((fix for start, fix in FIXES.items() if message.startswith(start)), FILES.get(file, ""))
    return message, known


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
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "{...}") + (template(node.right) or "{...}")
    return None


def commands() -> str:
    """All commands with their options."""
    command = typer.main.get_command(app)
    with command.make_context("stepfold", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="stepfold")
    return re.sub(r"^# .*\n", "", text)


API = {
    "Distil from Python": ("api", "modules", "teachers.module", "teachers.contract"),
    "Students": ("students.whole", "students.lora", "students.two_times"),
    "Mathematics": (
        "maths.formulations", "maths.noise_schedules", "maths.routes", "maths.tangent", "maths.schedules",
        "maths.filters", "maths.closed_form",
    ),
    "Spaces": ("spaces.records", "spaces.generation", "spaces.diffusion"),
    "Objectives": ("objectives.consistency", "objectives.discrete", "objectives.velocity", "objectives.adversarial"),
    "Sampling": ("sampling.samplers", "sampling.recipe", "sampling.consistency", "sampling.flow", "sampling.flow_map"),
    "Settings": ("config",),
}  # fmt: skip
"""Chapters of the API page, and the modules of each."""
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples):")


def api() -> str:
    """The public functions and classes of the modules in `API`."""
    parts = []
    for chapter, modules in API.items():
        parts.append(f"## {chapter}")
        for name in modules:
            module = importlib.import_module(f"stepfold.{name}")
            parts += [f"### `stepfold.{name}`", described(inspect.getdoc(module) or "")]
            public = getattr(module, "__all__", ())
            if public:
                parts.append(f"Public: {', '.join(f'`{each}`' for each in public)}.")
            for each, value in vars(module).items():
                own = getattr(value, "__module__", None) == module.__name__ and not each.startswith("_")
                if own and (inspect.isfunction(value) or inspect.isclass(value)) and inspect.getdoc(value):
                    parts += [f"#### `{each}`", signature(each, value), described(inspect.getdoc(value) or "")]
                    parts += [described(making(value))]
    return "\n\n".join(part for part in parts if part)


def making(value: Any) -> str:
    """What a class says of the making of one, in a docstring of its own `__init__`."""
    start = vars(value).get("__init__") if inspect.isclass(value) else None
    return inspect.cleandoc(start.__doc__ or "") if inspect.isfunction(start) else ""


def signature(name: str, value: Any) -> str:
    """The signature as a block of code; of a class, that of making one. Empty for settings and protocols."""
    if inspect.isclass(value) and (issubclass(value, BaseModel) or getattr(value, "_is_protocol", False)):
        return ""
    text = str(inspect.signature(value)).replace("'", "")
    text = re.sub(r"\b(?:stepfold|torch|collections|typing|diffusers|pathlib)(?:\.\w+)*\.(\w+)", r"\1", text)
    text = re.sub(r"<factory>|<(?:function|object|class)[^>]*>", "...", text)
    return f"```python\n{name}{text}\n```"


def described(docstring: str) -> str:
    """A docstring in Google style as Markdown: its sections become lists."""
    lines, section = [], ""
    for line in docstring.splitlines():
        heading, depth = SECTION.fullmatch(line.strip()), len(line) - len(line.lstrip())
        if heading and depth == 0:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section.startswith("Example") or line.strip().startswith(">>>"):
            lines.append(f"    {line.strip()}" if line.strip() else "")
        elif section and depth == 4 and line.strip():
            name, colon, rest = line.strip().partition(": ")
            named = colon and section not in ("Returns", "Yields")
            lines.append(f"- `{name}`: {rest}" if named else f"- {line.strip()}")
        elif section and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            section = section if line.strip() == "" else ""
            lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


def cell(text: str) -> str:
    """A text that neither markdown nor a table takes apart; in code spans, a backslash would be shown."""
    parts = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(
        part.replace("|", r"\|") if part.startswith("`") else re.sub(r"([|<>*_\[\]])", r"\\\1", part) for part in parts
    )


CONVENTIONS = ("<!-- conventions: written by `make reference` -->\n", "<!-- end of the conventions -->\n")
"""What stands before and after the table of conventions in docs/teachers.md."""
SCHEDULERS = (
    FlowMatchEulerDiscreteScheduler(),
    DDIMScheduler(),
    SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
)
HEAD = ("pipeline", "guidance scale s, default", "weight w", "off at", "timesteps", "output", "four steps at", "shift")


def teachers_page() -> str:
    """docs/teachers.md with the table of conventions as the code has it."""
    page = (HERE.parent / "teachers.md").read_text(encoding="utf-8")
    before, rest = page.split(CONVENTIONS[0])
    _, after = rest.split(CONVENTIONS[1])
    rows = [HEAD, ("---",) * len(HEAD), *(convention_row(name, family) for name, family in FAMILIES.items())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return before + CONVENTIONS[0] + "\n" + table + "\n" + CONVENTIONS[1] + after


def convention_row(name: str, family: type[PipelineTeacher]) -> tuple[str, ...]:
    """A family's row: what its class and those of diffusers say, without any weights."""
    teacher = without_networks(name, family)
    kind = teacher.guidance_kinds(teacher.transformer.config, teacher.pipe.config)[0]
    noisy = isinstance(teacher.schedule, VPSchedule)
    own = "by size and number of steps" if family.shift_at is not Family.shift_at else "the scheduler's"
    scale = inspect.signature(teacher.pipe.__call__).parameters.get(family.scale_argument)
    plus = teacher.guidance_weight(0.0)
    return (
        f"`{name}`",
        f"`{family.scale_argument}` {scale.default:g}" if scale else "in the guider",
        {"classifier_free": "s" + f" + {plus:g}" * (plus > 0), "embedded": "the network is told s"}[kind],
        f"{teacher.no_guidance:g}" if kind == "classifier_free" else "never",
        time_range(teacher),
        "noise, or v" if noisy else output_meaning(teacher).split(",")[0],
        levels_seen(teacher, teacher.student_times(4, "consistency"), "consistency"),
        own if isinstance(teacher.schedule, FlowSchedule) else "none",
    )


def without_networks(name: str, family: type[PipelineTeacher]) -> PipelineTeacher:
    """A family's teacher without networks: its pipeline's class, with the first scheduler that it understands."""
    teacher, pipe = (
        object.__new__(family),
        object.__new__(next(kind for kind in family.pipelines if kind.__name__ == name)),
    )
    taken = family.fields.get("guidance_embeds", ((True,), ""))[0]
    teacher.transformer = SimpleNamespace(config=FrozenDict(guidance_embeds=taken[0]))
    teacher.pipe = pipe
    pipe._internal_dict = FrozenDict(is_distilled=False)
    for scheduler in SCHEDULERS:
        pipe.scheduler = scheduler
        with suppress(UserError):
            teacher.schedule = teacher.read_schedule()
            break
    teacher.times = getattr(teacher.schedule, "times", None)
    return teacher


def main() -> None:
    """Writes all pages."""
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
    (HERE.parent / "teachers.md").write_text(teachers_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
