"""What the documentation shows is run: its commands are parsed, its Python and its notebook executed."""

import doctest
import importlib
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import tiny
import torch
import typer.main
from diffusers import AuraFlowPipeline
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.config import Config, load_config, setting_names
from stepfold.display import Display
from stepfold.jobs.distilling import run_distill
from stepfold.methods import METHODS
from stepfold.settings import ObjectiveName
from stepfold.teachers import loading
from stepfold.teachers.contract import Condition
from stepfold.training import terms
from stepfold.training.runs import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
MEASURED_IN_GUIDE = "[Choosing settings](../settings.md)"
GROUP: Any = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shown_commands() -> list[str]:
    """Every command line of ours in a bash block, and every one in backquotes that has an option."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                line[line.index("stepfold ") :] for line in lines if re.match(r"(stepfold|.* -m stepfold) ", line)
            ]
        if page.name != "lab-log.md":  # it tells what was run, with the options of its day
            found += re.findall(r"`(stepfold [^`\n]* --[^`\n]*)`", page.read_text(encoding="utf-8"))
    return sorted({line for line in found if not re.search(r"\.\.\.|COMMAND|KEY=VALUE", line)})  # those are patterns


def leaf_help() -> dict[str, str]:
    """command -> the text of its help, where its examples are."""
    texts = {}
    for name, command in GROUP.commands.items():
        for below, sub in getattr(command, "commands", {"": command}).items():
            texts[f"{name} {below}".strip()] = sub.help or ""
    return texts


def parse(line: str) -> None:
    """Parses a command line without running it.

    Raises:
        click.UsageError: (typer's own copy of it) no such command or option.
    """
    words = shlex.split(line, comments=True)[1:]
    command, context = GROUP, None
    while hasattr(command, "commands"):
        context = command.make_context("stepfold", [], parent=context, resilient_parsing=True)
        _, command, words = command.resolve_command(context, words)
    parsed = command.make_context("command", words, parent=context)
    for change in parsed.params.get("changes") or []:
        assert change.partition("=")[0] in setting_names(), change


@pytest.mark.parametrize("line", shown_commands())
def test_commands_in_the_docs_are_commands(line: str) -> None:
    parse(line)


def test_every_command_has_two_examples_that_parse() -> None:
    for name, text in leaf_help().items():
        examples = re.findall(r"^ *(stepfold .*)$", text, re.MULTILINE)
        assert len({example for example in examples if example.startswith(f"stepfold {name}")}) >= 2, name
        for example in examples:
            parse(example)


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match=r"No such option.* '?--stepz"):
        parse("stepfold sample runs/mine/student fox --stepz 2")
    with pytest.raises(AssertionError):
        parse("stepfold distill --set training.stepz=2")


def test_the_student_loads_as_the_first_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "docs" / "index.md", "python")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "emoji-student", "--to", "pipeline", "--out", "runs/demo/student"])
    assert result.exit_code == 0, result.output
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["image"].size == (64, 64) and len(names["image"].getcolors(4096) or "x" * 4096) > 100


def test_the_method_that_the_docs_add_is_the_packages_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sana: Path, prompts_file: Path
) -> None:
    """The page's objective, its preset and its proof run under a name that is new; a run has the numbers of ours."""
    page = ROOT / "docs" / "add-a-method.md"
    monkeypatch.setitem(terms.OBJECTIVES, "mine", terms.OBJECTIVES["velocity"])
    monkeypatch.setitem(METHODS, "mine", METHODS["auto"])
    field = Config.model_fields["objective"]
    names: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(re.sub(r'(METHODS|OBJECTIVES)\["velocity"\]', r'\1["mine"]', code), names)
    assert terms.OBJECTIVES["mine"] is names["velocity_loss"] is not terms.OBJECTIVES["velocity"]
    assert METHODS["mine"] == METHODS["velocity"] and METHODS["mine"] is not METHODS["velocity"]
    assert (
        set(METHODS) - {"auto", "mine"}
        == {*get_args(ObjectiveName)}
        == set(terms.OBJECTIVES) - {"adversarial", "reward", "mine"}
    )
    assert set(names["ROWS"]) <= set(runpy.run_path(str(ROOT / "tests" / "objectives" / "test_terms.py"))["ROWS"])
    (preset,) = blocks(page, "yaml")
    small = ("training.steps=2", "training.preview_every=9", "space.route_steps=3", "training.prompts_per_step=1")
    rows, file = [], tmp_path / "reflow.yaml"
    with monkeypatch.context() as patch:
        patch.setattr(field, "annotation", Literal[ObjectiveName, "auto", "mine"])  # the name in settings.py
        Config.model_rebuild(force=True)
        for name in ("mine", "velocity"):
            file.write_text(preset.replace("objective: velocity", f"objective: {name}"))
            config = load_config(str(file), small, teacher__source=str(tiny_sana), prompts=str(prompts_file))
            run_distill(config, tmp_path / name, resume=False, display=Display(quiet=True), command="test")
            rows.append(read_metrics(tmp_path / name))
    Config.model_rebuild(force=True)
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert "velocity matching" in (tmp_path / "mine" / "student" / "README.md").read_text()


def test_the_family_that_the_docs_add_is_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts_file: Path
) -> None:
    """Its blocks run on a tiny pipeline of the real classes, which is distilled; plain diffusers loads the student."""
    tiny.make_auraflow().save_pretrained(tmp_path / "aura", safe_serialization=True)
    monkeypatch.setattr(loading, "FAMILIES", dict(loading.FAMILIES))
    names: dict[str, Any] = {"folder": str(tmp_path / "aura")}
    for code in blocks(ROOT / "docs" / "add-a-family.md", "python"):
        exec(code, names)
    assert loading.FAMILIES["AuraFlowPipeline"] is names["AuraFlowTeacher"]
    small = ("training.steps=2", "training.preview_every=9", "space.route_steps=3", "training.precision=no")
    more = ("training.walk_precision=no", "space.filter_rule=off", "optimiser.name=adamw", "teacher.max_tokens=16")
    config = load_config("default", [*small, *more], teacher__source=str(tmp_path / "aura"), prompts=str(prompts_file))
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    pipe = AuraFlowPipeline.from_pretrained(tmp_path / "run" / "student", use_safetensors=True)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


class Drift(nn.Module):
    """A network of one's own that does next to nothing."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.net = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        return self.net(x)


def test_a_network_of_ones_own_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = blocks(ROOT / "docs" / "teachers.md", "python")
    plain, scheduled, free = (block for block in page if "ModuleTeacher(" in block)
    numbers, images = (block for block in page if "def encode" in block)
    (tmp_path / "prompts.txt").write_text("a red heart\na fox\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "network": Drift(), "encode": lambda prompts: Condition.whole(torch.ones(len(prompts), 1, 1)),
    }  # fmt: skip
    exec(plain.replace("training.steps=2000", "training.steps=1"), names)
    assert names["samples"].shape == (1, 4, 32, 32) and bool(names["samples"].isfinite().all())
    exec(scheduled, names)
    assert math.tan(names["teacher"].start_time) == pytest.approx(math.sqrt(math.expm1(10)) / 0.8, rel=1e-6)
    names["network"] = Drift(1)
    exec(free.replace("training.steps=2000", "training.steps=1"), names)
    assert names["samples"].shape == (16, 1, 32, 32) and bool(names["samples"].isfinite().all())
    exec(numbers, names)
    assert names["encode"](["0.5 -1.25", "2 8"]).embeds.tolist() == [[[0.5, -1.25]], [[2.0, 8.0]]]
    Image.new("RGB", (6, 4), (0, 51, 255)).save(tmp_path / "a.png")
    exec(images, names)
    shown = names["encode"](["a.png", "a.png"]).embeds
    assert shown.shape == (2, 3, 4, 6) and shown[1, :, 3, 5].tolist() == pytest.approx([0.0, 0.2, 1.0])


class SmallSiT(nn.Module):
    """Takes what SiT takes: latents, times, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.labels, self.seen = nn.Conv2d(4, 4, 1), nn.Embedding(1001, 4), set()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen |= set(y.tolist())
        return self.net(x) + (self.labels(y) * t[:, None])[..., None, None]


def test_sit_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks(ROOT / "docs" / "families.md", "python") if "ModuleTeacher" in block)
    (tmp_path / "classes.txt").write_text("207\n360\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"sit": SmallSiT()}
    exec(code.replace("training.steps=2000", "training.steps=1"), names)
    assert names["latents"].shape == (1, 4, 32, 32) and bool(names["latents"].isfinite().all())
    assert {207, 360, 1000} >= names["sit"].seen > {1000}


@pytest.mark.long
def test_the_notebook_runs_and_its_student_finds_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib as mpl

    mpl.use("agg", force=True)
    names = runpy.run_path(str(ROOT / "docs" / "mixture.py"))
    assert names["distance"](names["one_step"]) < 0.35  # 0.21 was seen
    assert names["distance"](names["blur"]) > 1.5


@pytest.mark.long
def test_the_notebook_goes_from_a_teacher_to_a_student(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython", reason="the notebook needs IPython, as Jupyter has it")
    names = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    assert len(read_metrics(names["RUN"])) == names["STEPS"]
    assert (names["RUN"] / "student" / "README.md").is_file()
    assert names["images"][0].size == (64, 64)
    said = capsys.readouterr().out
    assert "LOOK" not in said and "peak memory" in said


@pytest.mark.parametrize(
    ("module", "at_least"),
    [
        ("maths.formulations", 2), ("maths.routes", 1), ("maths.schedules", 1), ("maths.filters", 1),
        ("maths.closed_form", 1), ("maths.noise_schedules", 1), ("config", 1),
    ],
)  # fmt: skip
def test_examples_in_docstrings_run(module: str, at_least: int) -> None:
    found = importlib.import_module(f"stepfold.{module}")
    result = doctest.testmod(found, extraglobs={"torch": torch})
    assert result.failed == 0 and result.attempted >= at_least


@pytest.fixture(scope="module")
def reference_code() -> dict[str, Any]:
    """The functions of `make reference`."""
    return runpy.run_path(str(ROOT / "docs" / "reference" / "make.py"))


@pytest.fixture(scope="module")
def reference(reference_code: dict[str, Any]) -> dict[str, str]:
    """What the reference pages should hold."""
    return reference_code["pages"]()


@pytest.mark.skipif(
    sys.version_info >= (3, 14) or f"typer=={typer.__version__}" not in (ROOT / "constraints.txt").read_text(),
    reason="other versions print signatures and help in other ways",
)
@pytest.mark.parametrize("name", ["commands.md", "settings.md", "messages.md", "api.md"])
def test_reference_pages_are_those_of_the_code(name: str, reference: dict[str, str]) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == reference[name], "run make reference"


def test_reference_pages_are_whole(reference: dict[str, str]) -> None:
    assert all(f"| `{name}` |" in reference["settings.md"] for name in setting_names())
    rows = re.findall(r"^\| (.+) \| (.*) \|$", reference["messages.md"], re.MULTILINE)
    assert len(rows) > 250
    assert [what for what, fix in rows if not fix] == []  # nothing is said to be wrong without what to do about it
    assert any(what == "no protocol {protocol}" for what, _ in rows)
    assert "prompt {prompt} is no class of this teacher" in dict(rows)
    guide = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in setting_names():
        (said,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| ([^|]*) \|$", reference["settings.md"], re.MULTILINE)
        assert said != MEASURED_IN_GUIDE or f"`{name}`" in guide
    spans = re.findall(r"`[^`\n]+`", reference["settings.md"])
    assert "`inverse_tangent`" in spans and not [span for span in spans if re.search(r"\\[^|]", span)]
    assert all(f"`stepfold {name}`" in reference["commands.md"] for name in leaf_help())
    assert "#### `distill_module`" in reference["api.md"] and "**Raises**" in reference["api.md"]


def test_the_table_of_conventions_is_that_of_the_code(reference_code: dict[str, Any]) -> None:
    """Of every family, made without weights."""
    page = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    assert page == reference_code["teachers_page"](), "run make reference"
    rows = {row.split("`")[1]: row for row in page.splitlines() if re.match(r"\| `\w+Pipeline` \|.* \| in \[0, ", row)}
    assert rows.keys() == loading.FAMILIES.keys()
    assert "| `guidance_scale` 5 | s + 1 | 0 | in [0, 1000], data at 1000 | velocity x_0 - z" in rows["ZImagePipeline"]
    assert "| the network is told s | never |" in rows["FluxPipeline"]
    assert rows["Flux2KleinPipeline"].endswith("| by size and number of steps |")


def test_settings_in_the_docs_are_settings() -> None:
    """Every `section.name` in backquotes whose section is one of the settings'."""
    names = set(setting_names())
    sections = {name.split(".")[0] for name in names if "." in name}
    for page in PAGES:
        if page.name in ("lab-log.md", "architecture.md"):  # the log has names of its day; files are called teachers.py
            continue
        for section, name in re.findall(r"`(\w+)\.(\w+)[`=]", page.read_text(encoding="utf-8")):
            assert section not in sections or f"{section}.{name}" in names, f"{page.name}: {section}.{name}"


def test_the_presets_that_the_docs_name_load() -> None:
    for page in PAGES:
        for preset in re.findall(r"--preset ([a-z][a-z0-9-]*)\b(?!\.yaml)", page.read_text(encoding="utf-8")):
            load_config(preset, ["space.images=x"] if preset in ("scm", "sana-sprint") else [])


def anchors(text: str) -> set[str]:
    """What links into a page may name: its headings as mkdocs and GitHub write them, and its named places."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "results").glob("*-discussion.md"))]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_index_of_the_lab_log_has_every_entry_once() -> None:
    index, log = (ROOT / "docs" / "lab-log.md").read_text(encoding="utf-8").split("<!-- Entries below", 1)
    entries = re.findall(r"^## (.+)$", log, re.MULTILINE)
    linked = [anchor for _, anchor in re.findall(r"\[([\d-]+)\]\(#([^)]+)\)", index)]
    assert len(linked) == len(set(linked)) == len(entries) > 60
    assert set(linked) == anchors("\n".join(f"## {entry}" for entry in entries))


def test_the_memory_of_families_is_the_counted_one() -> None:
    """Each number of the page's table, to its digits, and no row without a record."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())["rows"]
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.partition("| network | parameters |")[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == list(rows)
    for row, networks in rows.items():
        (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", page, re.MULTILINE)
        for cell, key, unit in zip(cells.split(" | "), ("parameters", "all_gib", "lora_gib"), (1e9, 1, 1), strict=True):
            said = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
            counted = [each[key] / unit for each in networks.values() if each[key] is not None]
            assert said == pytest.approx(counted, rel=5e-3, abs=0.06 if unit == 1 else 0.006), (row, cell)


PAIR = r"(\d+\.\d%(?: ± \d+\.\d)?), (\d\.\d{4}(?: ± \d\.\d{4})?)"
CELLS = r"\| (\d+\.\d(?: ± \d+\.\d)?) \|(?:[^|]*\|)? (\d\.\d{4}(?: ± \d\.\d{4})?) \|"


def test_the_discussion_of_methods_has_the_numbers_of_their_tables() -> None:
    """Each pair of accuracy and FD that the hand-written page gives is one of the generated page's."""
    results = ROOT / "docs" / "results"
    tables = (results / "methods.md").read_text(encoding="utf-8")
    given = re.findall(PAIR, (results / "methods-discussion.md").read_text(encoding="utf-8"))
    measured = set(re.findall(CELLS, tables))
    given = [(accuracy.replace("%", ""), fd) for accuracy, fd in given]
    assert len(given) > 20 and set(given) <= measured, set(given) - measured
    assert ("95.6", "0.0108") not in measured
