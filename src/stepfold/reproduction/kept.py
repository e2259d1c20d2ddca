"""The numbers of a sweep in one json file beside its page, from which another machine goes on with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepfold.errors import UserError
from stepfold.reproduction.experiments import Run
from stepfold.reproduction.records import SCORES
from stepfold.reproduction.runs import EQUAL_TIME, FIGURES
from stepfold.training.runs import writing

NOTES = (FIGURES, EQUAL_TIME, "solvers_*.json")
"""What a sweep's folder holds besides runs. The teacher's rows stay: they stand for pictures, which are not kept."""


def keep(runs: list[Run], root: Path, path: Path, command: str, patterns: Sequence[str] = NOTES) -> None:
    """Writes what the sweep in `root` has found so far into `path`; what is there of other runs stays.

    The file holds `command`, that of the command line which wrote it; `runs`, name -> record; `tables`, table -> row ->
    names of runs; `teacher`, the rows that records share which have none of their own; `notes`, the other numbers in
    `root`, whose files have these `patterns`.
    """
    found: dict[str, Any] = {"command": command, "teacher": None, "tables": {}, "runs": {}, "notes": {}}
    for run in runs:
        scores = root / run.name / SCORES
        if not scores.exists():
            continue
        record = json.loads(scores.read_text(encoding="utf-8"))
        found["teacher"] = record.pop("teacher", found["teacher"])
        found["runs"][run.name] = record
        found["tables"].setdefault(run.table, {}).setdefault(run.row, []).append(run.name)
    for pattern in patterns:
        found["notes"] |= {
            note.name: json.loads(note.read_text(encoding="utf-8")) for note in sorted(root.glob(pattern))
        }
    if path.exists():
        add_others(found, json.loads(path.read_text(encoding="utf-8")))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")


def add_others(found: dict[str, Any], before: dict[str, Any]) -> None:
    """Adds runs that a file held `before` to what is `found`, such as rows that nobody asked for this time."""
    others = {name: record for name, record in before["runs"].items() if name not in found["runs"]}
    found["teacher"] = found["teacher"] or before["teacher"]
    if before["teacher"] != found["teacher"]:  # of other pictures
        own = {"teacher": before["teacher"]}
        others = {name: (own if "student" in record else {}) | record for name, record in others.items()}
    found["runs"] |= others
    found["notes"] = before["notes"] | found["notes"]
    for table, rows in before["tables"].items():
        for row, names in rows.items():
            if left := [name for name in names if name in others]:
                found["tables"].setdefault(table, {}).setdefault(row, []).extend(left)


def recall(path: Path, root: Path, patterns: Sequence[str] = NOTES) -> int:
    """Puts what `keep` wrote into `root`, but for what is there already; returns how many runs.

    Raises:
        UserError: the file was not written by `keep`.
    """
    if not path.exists():
        return 0
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs, notes, teacher = dict(found["runs"]), dict(found["notes"]), found["teacher"]
        named = {name for rows in found["tables"].values() for names in rows.values() for name in names}
        files: dict[Path, Any] = {
            root / name / SCORES: ({"teacher": teacher} if "student" in record else {}) | record
            for name, record in runs.items()
        }
        if not (named <= {*runs} and all(name.isalnum() for name in runs)) or not all(
            _is_note(name, patterns) for name in notes
        ):
            raise ValueError("a name that a sweep does not give")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no numbers of a sweep ({error}); move it away, or give another --page") from None
    missing = {file: content for file, content in files.items() if not file.exists()}
    for file, content in (missing | {root / name: content for name, content in notes.items()}).items():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with writing(file) as part:
                part.write_text(json.dumps(content, indent=2) + "\n")
    return len(missing)


def _is_note(name: str, patterns: Sequence[str]) -> bool:
    return Path(name).name == name and any(Path(name).match(pattern) for pattern in patterns)
