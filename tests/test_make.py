"""The Makefile: both ends of the dependencies' ranges, and an audit that cannot be taken for one that found nothing."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from forms import in_part
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PART", "VERSIONS", "TORCH", "STEPFOLD_TORCH", "PYTHON")


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in OURS}
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={sys.executable}", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert [f">={lowest.pop(requirement.name)}"] == [str(s) for s in requirement.specifier if s.operator == ">="]
    assert not lowest


@pytest.mark.parametrize(
    ("versions", "environment", "files", "torch"),
    [
        ("", ".venv/", "constraints.txt", "torch==2.13.0"),
        ("lowest", ".venv-lowest/", "constraints-lowest.txt", "torch==2.10"),
        ("newest", ".venv-newest/", "", "torch"),
    ],
)
def test_each_end_of_the_ranges_has_an_environment(versions: str, environment: str, files: str, torch: str) -> None:
    done = make("-n", "-W", "pyproject.toml", "test", f"VERSIONS={versions}")
    assert f"sed '/^torch==/d' {files} /dev/null > {environment}constraints.txt" in done.stdout, done.stderr
    assert f"pip install --no-compile -c {environment}constraints.txt {torch}\n" in done.stdout
    assert f"{environment}bin/python -m pytest" in done.stdout


def test_every_test_is_of_one_of_the_two_sets_and_a_change_must_pass_both() -> None:
    for target, sets in (("test", ["'not long'"]), ("test-long", ["long"]), ("check", ["'not long'", "long"])):
        commands = [line for line in make("-n", target).stdout.splitlines() if "-m pytest" in line]
        assert [command.partition(" -m pytest ")[2].partition(" -m ")[2] for command in commands] == sets, target
    assert {"make test", "make test-long PART=$((commits % 8 + 1))/8"} <= set(
        (ROOT / ".ci" / "run").read_text().splitlines()
    )


def test_python_keeps_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in make("--eval", "show: ; @env", "show").stdout


def test_the_demo_goes_on_where_it_was(tmp_path: Path) -> None:
    """A finished run was an error, at which the next one never began."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()

    def runs() -> list[str]:
        lines = make("-n", "demo", cwd=tmp_path).stdout.splitlines()
        return [line.partition(" distill ")[2] for line in lines if " distill " in line]

    both = [f"--preset {name} --out runs/{name}" for name in ("demo-4step", "demo")]
    assert runs() == both
    (tmp_path / "runs" / "demo-4step").mkdir(parents=True)
    (tmp_path / "runs" / "demo-4step" / "config.yaml").touch()
    assert runs() == [f"{both[0]} --resume", both[1]]
    (tmp_path / "runs" / "demo-4step" / "student").mkdir()
    assert runs() == both[1:]


def test_other_ends_are_refused() -> None:
    done = make("-n", "test", "VERSIONS=oldest")
    assert done.returncode and "VERSIONS=oldest is not known; give lowest or newest" in done.stderr


def fake(folder: Path, name: str, lines: str) -> None:
    program = folder / ".venv" / "bin" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("audit", "fails", "fails_strictly", "says"),
    [
        ("echo ERROR:pip_audit._cli:absl: not found >&2; exit 1", False, True, "not audited: absl: not found\n"),
        ("echo Error: no such host >&2; exit 1", False, True, "not audited: Error: no such host\n"),
        ('for out; do :; done; echo pillow 1.0 PYSEC-1 > "$out"; exit 1', True, True, "pillow 1.0 PYSEC-1\n"),
        ("echo No known vulnerabilities found >&2", False, False, "no known vulnerabilities\n"),
    ],
)
def test_an_audit_without_an_answer_says_so(
    tmp_path: Path, audit: str, fails: bool, fails_strictly: bool, says: str
) -> None:
    """`make check` goes on then, and `make audit` does not; what is found fails both."""
    fake(tmp_path, "pip", "echo pillow==1.0")
    fake(tmp_path, "pip-audit", audit)
    (tmp_path / ".venv" / "found.txt").write_text("of the last time")
    done = make("-o", ".venv/.installed-audit", "audit-if-online", cwd=tmp_path)
    assert (bool(done.returncode), done.stdout) == (fails, says)
    assert bool(make("-o", ".venv/.installed-audit", "audit", cwd=tmp_path).returncode) == fails_strictly
    assert "pip-audit --strict" in make("-n", "check").stdout


def test_each_long_form_is_in_one_part_with_those_that_share_its_parameter() -> None:
    forms = [
        ("test_a.py", f"test_{i}[{family}-{i}]") for i in range(3) for family in ("sana", "flux dev", "wan", "dit")
    ]
    forms += [(f"test_{i}.py", f"test_{i}") for i in range(60)]
    parts = [[form for form in forms if in_part(*form, f"{k}/3")] for k in (1, 2, 3)]
    assert sorted(form for part in parts for form in part) == sorted(forms) and all(len(part) > 10 for part in parts)
    for family in ("sana", "flux dev", "wan", "dit"):
        assert {sum(f"[{family}-" in name for _, name in part) for part in parts} == {0, 3}
    with pytest.raises(ValueError, match="no K/N"):
        in_part("test_a.py", "test_a", "4/3")


def test_a_part_of_the_long_tests_is_asked_for_by_name() -> None:
    assert make("-n", "test-long", "PART=2/3").stdout.rstrip().endswith("-m long --part 2/3")
    assert make("-n", "test-long").stdout.rstrip().endswith("-m long")


def test_a_release_is_checked_in_an_environment_of_its_own() -> None:
    """The wheel is built out of the sdist, so nothing but the two goals' own files counts."""
    lines = make("-n", "release-check").stdout.splitlines()
    tools = [line for line in lines if line.startswith(".venv-release/bin/") and "pip install" not in line]
    assert tools == [
        ".venv-release/bin/pyproject-build", ".venv-release/bin/twine check --strict dist/*",
        ".venv-release/bin/check-wheel-contents dist/*.whl",
    ]  # fmt: skip
    assert lines.index("rm -rf dist") < lines.index(tools[0]) and not any(" .venv/" in line for line in lines)
