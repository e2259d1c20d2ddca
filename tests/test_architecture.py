"""The source keeps to the table in docs/architecture.md and to a few rules that no linter knows."""

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import stepfold

SOURCE = Path(stepfold.__file__).parent
DOCS = Path(__file__).parents[1] / "docs" / "architecture.md"
FILES = sorted(p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py"))

EXTERNAL = {
    "accelerate": ("training/", "teachers/quantised_files.py", "jobs/distilling.py", "jobs/finishing.py"),
    "diffusers": (
        "teachers/",
        "students/",
        "export/converting.py",
        "api.py",
        "levels/",
        "display.py",
        "training/doctor.py",
        "evaluation/",
    ),
    "transformers": ("evaluation/judge.py", "evaluation/mjhq.py", "teachers/", "display.py"),
    "huggingface_hub": ("teachers/", "export/hub.py"),
    "torch_fidelity": ("evaluation/mjhq.py",),
    "typer": ("cli.py", "commands/"),
    "rich": ("commands/", "display.py"),
    "pydantic": (
        "sections.py",
        "settings.py",
        "jumps.py",
        "scores.py",
        "config.py",
        "reproduction/experiments.py",
        "comparison/rows.py",
        "sampling/recipe.py",
        "students/card.py",
    ),
    "yaml": ("config.py", "reproduction/experiments.py", "comparison/rows.py"),
    "datasets": ("images/reading.py",),
    "matplotlib": ("evaluation/curves.py", "reproduction/figures.py", "comparison/figures.py"),
    "peft": ("export/lora.py", "students/lora.py"),
    "pyarrow": ("prompts/tables.py",),
    "py3langid": ("prompts/cleaning.py",),
    "rensa": ("prompts/cleaning.py",),
    "sklearn": ("reproduction/figures.py",),
    "jinja2": ("evaluation/report.py",),
    "gradio": ("web/page.py", "web/training_tab.py"),
    "starlette": ("web/page.py",),
    "openvino": ("export/openvino.py", "export/runtimes.py"),
}
"""Libraries that few files may touch."""


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text())


@cache
def imports(file: str) -> tuple[str, ...]:
    """Full names of what a file imports anywhere, `from a import b` as `a.b`."""
    names = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def own_imports(file: str) -> set[str]:
    """The files of stepfold that a file imports."""
    found = set()
    for name in imports(file):
        parts = name.split(".")
        if parts[0] != "stepfold":
            continue
        for end in (len(parts), len(parts) - 1):
            path = "/".join(parts[1:end])
            found |= {c for c in (f"{path}.py", f"{path}/__init__.py") if c in FILES and c != "/__init__.py"}
    return found - {file}


@cache
def table() -> dict[str, set[str] | None]:
    """Row -> rows it may import, None for all above, in the order of the page."""
    section = DOCS.read_text().split("## Modules", 1)[1].split("\n## ", 1)[0]
    rows: dict[str, set[str] | None] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) != 3 or not cells[0].startswith("`"):
            continue
        name = cells[0].strip("`")
        if cells[2].startswith("as `"):
            continue
        allowed = set(re.findall(r"`([^`]+)`", cells[2]))
        assert allowed or cells[2] in ("nothing", "all above"), line
        rows[name] = None if cells[2] == "all above" else allowed
    return rows


def row_of(file: str) -> str:
    matching = [row for row in table() if file == row or (row.endswith("/") and file.startswith(row))]
    assert matching, f"{file} is not in the table of docs/architecture.md"
    return max(matching, key=len)


MODULES = [file for file in FILES if file not in ("__init__.py", "__main__.py")]


def test_table_reads_from_the_bottom_up() -> None:
    rows = list(table())
    assert len(rows) > 12
    for position, (row, allowed) in enumerate(table().items()):
        assert (allowed or set()) <= set(rows[:position]), f"{row} names rows below it"


def test_every_file_on_the_page_exists() -> None:
    section = DOCS.read_text().split("## Modules", 1)[1].split("\n## ", 1)[0]
    for name in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE):
        assert (SOURCE / name).exists(), name


def for_each(files: Iterable[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Checks all files in one test, which names those that fail: a form for each file took longer than its check."""

    def of_all(check: Callable[[Any], None]) -> Callable[[], None]:
        def test() -> None:
            broken = {}
            for file in files:
                try:
                    check(file)
                except AssertionError as error:
                    broken[str(file)] = str(error)
            assert broken == {}

        test.__doc__ = check.__doc__
        return test

    return of_all


@for_each(MODULES)
def test_imports_go_downward(file: str) -> None:
    row, rows = row_of(file), list(table())
    allowed = table()[row]
    if allowed is None:
        allowed = set(rows[: rows.index(row)])
    used = {row_of(other) for other in own_imports(file)} - {row}
    assert used <= allowed, f"{file} imports from {sorted(used - allowed)}"


def test_table_allows_nothing_that_is_not_used() -> None:
    for row, allowed in table().items():
        used = {row_of(other) for file in MODULES if row_of(file) == row for other in own_imports(file)}
        assert (allowed or set()) <= used, f"{row} never imports {sorted((allowed or set()) - used)}"


@for_each(MODULES)
def test_no_file_needs_a_library_of_one_system(file: str) -> None:
    """Modules that Python has on Unix alone may be imported where they are used, behind a question, but not above."""
    of_unix = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
    above = [node for node in tree(file).body if isinstance(node, ast.Import)]
    assert not of_unix & {alias.name for node in above for alias in node.names}


def test_no_circle() -> None:
    order = list(graphlib.TopologicalSorter({file: own_imports(file) for file in FILES}).static_order())
    assert set(order) == set(FILES)
    assert order.index("errors.py") < order.index("maths/routes.py") < order.index("training/distill.py")


@for_each([f for f in MODULES if f.startswith(("maths/", "objectives/"))])
def test_maths_is_torch_only(file: str) -> None:
    libraries = {name.split(".")[0] for name in imports(file)}
    assert libraries <= sys.stdlib_module_names | {"torch", "stepfold"}
    assert not libraries & {"os", "pathlib", "json", "io", "random", "time"}


WITHOUT_WEIGHTS = ("adapter_config", "PreTrainedTokenizerFast", "AutoTokenizer", "Tokenizer", "CLIPImageProcessorPil")


@pytest.mark.parametrize("library", EXTERNAL)
def test_libraries_stay_where_they_belong(library: str) -> None:
    users = {file for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    assert users, f"nothing imports {library}"
    assert {file for file in users if not file.startswith(EXTERNAL[library])} == set()


@for_each(FILES)
def test_nothing_runs_code_from_a_file_or_guesses(file: str) -> None:
    names = set(imports(file)) - {"pickle.UnpicklingError"}  # what torch raises when it refuses
    assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "joblib", "cloudpickle", "marshal"}
    calls = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    forbidden = {"eval", "exec", "compile", "hasattr", "torch.load", "torch.save", "np.load", "torch.nan_to_num"}
    if file == "evaluation/mjhq.py":
        forbidden -= {"torch.save"}  # into memory, for a library that reads its own weights as a pickle
    if file in ("export/converting.py", "evaluation/imagenet.py"):  # others' checkpoints: tensors, nothing that runs
        forbidden -= {"torch.load"}
        text = (SOURCE / file).read_text()
        assert text.count("torch.load(") == text.count("weights_only=True")
    assert not forbidden & set(calls)
    assert not [call for call in calls if call.endswith((".nan_to_num", ".unsafe_load", ".full_load"))]
    assert "trust_remote_code" not in (SOURCE / file).read_text()


def test_weights_load_from_safetensors_only() -> None:
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if node.func.attr == "from_pretrained" and ast.unparse(node.func.value) not in WITHOUT_WEIGHTS:
                    assert options.get("use_safetensors") == "True", f"{file}:{node.lineno}"
                if node.func.attr == "save_pretrained" and ast.unparse(node.func.value) not in WITHOUT_WEIGHTS:
                    assert options.get("safe_serialization") == "True", f"{file}:{node.lineno}"


@for_each(FILES)
def test_everything_public_says_what_it_is(file: str) -> None:
    """A method that overrides one with a docstring may leave it at that."""
    assert ast.get_docstring(tree(file))
    nodes: list[ast.AST] = [tree(file)]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                overrides = "override" in {ast.unparse(decorator) for decorator in node.decorator_list}
                assert ast.get_docstring(node) or overrides, f"{file}: {node.name}"
                if isinstance(node, ast.ClassDef):
                    nodes.append(node)


LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 80
ROOT = Path(__file__).parents[1]
OURS = sorted(p for folder in ("src", "benchmarks", "recipes", "examples") for p in (ROOT / folder).rglob("*.py"))


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function; of a command, those below its options."""
    declares_options = "typer.Option" in ast.unparse(function.args)
    first = function.body[0].lineno if declares_options else function.lineno
    assert function.end_lineno
    return function.end_lineno - first + 1


@for_each(OURS)
def test_files_and_functions_are_read_in_one_go(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: lines_of(node) for node in functions if lines_of(node) > LINES_OF_A_FUNCTION} == {}


LINES_OF_A_FAMILY = 90
OLDER = ("teachers/sana.py", "teachers/dit.py")
"""Families of the first edition, of two pipelines and of classes in place of prompts."""


def is_family(file: str) -> bool:
    """Whether a class in it names its pipelines."""
    bodies = [node.body for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef)]
    assigned = [node for body in bodies for node in body if isinstance(node, ast.Assign)]
    return file.startswith("teachers/") and "pipelines" in {ast.unparse(node.targets[0]) for node in assigned}


def code_lines(file: str) -> int:
    """Lines of a file that are neither blank, nor a comment, nor of a docstring."""
    texts = [
        node
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    silent = {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate((SOURCE / file).read_text().splitlines(), 1)
    return sum(bool(line.split("#")[0].strip()) and number not in silent for number, line in lines)


def test_a_family_is_a_file_of_few_lines() -> None:
    families = {file: code_lines(file) for file in FILES if is_family(file)}
    assert len(families) > 20 and "teachers/wan.py" in families
    assert {file for file, lines in families.items() if lines > LINES_OF_A_FAMILY} == set(OLDER)
