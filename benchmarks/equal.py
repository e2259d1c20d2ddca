"""The proof that a refactor changed no number: short runs of two versions of the source, compared to the bit.

    python benchmarks/equal.py --against DIR           this checkout against another one: records both, compares
    python benchmarks/equal.py --against FILE          the same, where the other one is recorded in FILE already
    python benchmarks/equal.py record --source DIR --out FILE
    python benchmarks/equal.py compare OLDER NEWER     two records

A case is one `stepfold distill` of 40 steps (12 with the tiny pipelines) on one thread, in a process of its own. Its
record holds every row of the metrics, a sha256 of every tensor of the last checkpoint and of the student, and one of
the last preview's pixels. `equal_cases.py` has the cases, and the names that changed between versions.
Only the command line is used, so that any two versions can be compared. A case is run again where its settings or the
source have changed, or with --force; so a stopped recording goes on.
Exit code 1: something differs.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import console, open_record
from equal_cases import CASES, EXTRA_KEYS, SAME_KEYS, TIMES, note_of
from equal_runs import Place, tree_sha

ROOT = Path(__file__).parents[1]
SHOWN = 3  # differences of a case


def row_differences(older: list[dict[str, Any]], newer: list[dict[str, Any]], extra: set[str]) -> Iterator[str]:
    """Each key that differs somewhere: the first step where it does, with both values, and in how many it does."""
    if len(older) != len(newer):
        yield f"{len(older)} and {len(newer)} rows"
    first: dict[str, str] = {}
    steps = Counter[str]()
    for number, (ours, theirs) in enumerate(zip(older, newer, strict=False)):
        a = {SAME_KEYS.get(key, key): value for key, value in ours.items()}
        b = {SAME_KEYS.get(key, key): value for key, value in theirs.items()}
        for key in dict.fromkeys([*a, *b]):
            one_sided = (key in a) != (key in b)
            if TIMES.search(key) or (key in extra and one_sided) or (not one_sided and same(a[key], b[key])):
                continue
            what = (
                f"is only in the {'older' if key in a else 'newer'} one" if one_sided else f"{a[key]!r} and {b[key]!r}"
            )
            first.setdefault(key, f"step {number}: {key} {what}")
            steps[key] += 1
    for key, line in first.items():
        yield line + (f" (in {steps[key]} steps)" if steps[key] > 1 else "")


def same(a: Any, b: Any) -> bool:
    """Whether two values of a row are equal; a number that is none equals itself."""
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def tensor_differences(older: dict[str, str], newer: dict[str, str]) -> tuple[list[str], int]:
    """What differs, and how many tensors are equal but have another name.

    A name that is on one side only is no difference where the other side has the same bytes under a name of its own.
    """
    found = [
        f"{name}: other bytes" if a.split(" ", 1)[1] == b.split(" ", 1)[1] else f"{name}: {a} and {b}"
        for name, a in older.items()
        if (b := newer.get(name)) and a != b
    ]
    gone = {name: note for name, note in older.items() if name not in newer}
    new = {name: note for name, note in newer.items() if name not in older}
    in_both = Counter(gone.values()) & Counter(new.values())
    for side, notes in (("older", gone), ("newer", new)):
        left = Counter(in_both)
        for name, note in notes.items():
            if not left[note]:
                found.append(f"{name} is only in the {side} one")
            left[note] -= left[note] > 0
    return found, in_both.total()


def verdict(older: dict[str, Any] | None, newer: dict[str, Any] | None, extra: set[str]) -> tuple[bool, str]:
    """Whether two records of a case are equal, and a line on it."""
    for side, record in (("older", older), ("newer", newer)):
        if record is None:
            return False, f"not recorded in the {side} one"
        if "failed" in record:
            return False, f"failed in the {side} one: {record['failed']}"
    assert older and newer
    if older["case"] != newer["case"]:
        return False, "recorded with other settings; record it again with one version of this script"
    if older.get("weights") != newer.get("weights"):
        return False, "recorded with other weights, since tests/tiny.py has changed; record both with --force"
    found = [*row_differences(older["rows"], newer["rows"], extra)]
    others, renamed = tensor_differences(older["tensors"], newer["tensors"])
    found += others
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return False, f"{len(found)} differences: {'; '.join(found[:SHOWN])}{more}"
    named = f", {renamed} of them under other names" if renamed else ""
    return True, f"equal: {len(newer['rows'])} rows, {len(newer['tensors'])} tensors{named}"


def compare(older: dict[str, Any], newer: dict[str, Any], cases: Sequence[str], extra: set[str]) -> bool:
    """Prints a line a case; whether all are equal."""
    good = True
    for name in cases:
        equal, line = verdict(older.get(name), newer.get(name), extra)
        other = CASES[name].equals
        if equal and other and other in newer:
            twin = newer[other] | {"case": newer[name]["case"]}
            equal, line = verdict(twin, newer[name], extra)
            line = f"{line}, as {other}" if equal else f"not as {other}: {line}"
        good &= equal
        console.print(f"{name:24}{line}", style=None if equal else "bold red", soft_wrap=True, markup=False)
    return good


def record(source: Path, out: Path, cases: Sequence[str], force: bool, argv: Sequence[str]) -> dict[str, Any]:
    """Runs what is not recorded yet, and writes after each case; returns name -> record."""
    kept = json.loads(out.read_text())["cases"] if out.exists() else {}
    whole = open_record("equal", argv, torch.device("cpu")) | {"source": str(source.resolve()), "cases": kept}
    code = tree_sha(source / "src")

    def is_done(name: str) -> bool:
        there = kept.get(name, {})
        return (there.get("code"), there.get("case")) == (code, note_of(CASES[name]))

    todo = [name for name in cases if force or not is_done(name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), source)
        for number, name in enumerate(todo, 1):
            kept[name] = place.record(name)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(whole, indent=1) + "\n")
            left = (time.monotonic() - began) / number * (len(todo) - number)
            result = kept[name].get("failed") or f"{kept[name]['sec']:.0f} s"
            console.print(f"{number} of {len(todo)} {name}: {result}, about {left / 60:.0f} min left", markup=False)
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "equal.json", help="json file (runs/equal.json)")
    parser.add_argument("task", nargs="?", choices=["check", "record", "compare"], default="check")
    parser.add_argument("records", nargs="*", type=Path, help="compare: two files")
    parser.add_argument("--source", type=Path, default=ROOT, help="record: the checkout to run (this one)")
    parser.add_argument("--against", type=Path, help="check: the older checkout, or its record")
    parser.add_argument("--cases", type=lambda text: text.split(","), help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--force", action="store_true", help="run what is recorded already, too")
    parser.add_argument("--extra", action="append", default=[], help="a key of the metrics that one side may lack")
    options = parser.parse_args(argv)
    cases = options.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no such cases: {', '.join(sorted(unknown))}")
    if options.task == "compare":
        if len(options.records) != 2:
            parser.error("compare needs two records")
        older, newer = (json.loads(path.read_text())["cases"] for path in options.records)
    elif options.task == "record":
        record(options.source, options.out, cases, options.force, argv)
        return
    else:
        if options.against is None or not options.against.exists():
            parser.error("check needs --against, an older checkout or its record")
        if options.against.is_dir():
            out = options.out.with_stem(f"{options.out.stem}-against")
            older = record(options.against, out, cases, options.force, argv)
        else:
            older = json.loads(options.against.read_text())["cases"]
        newer = record(options.source, options.out, cases, options.force, argv)
    if not compare(older, newer, cases, {*EXTRA_KEYS, *options.extra}):
        sys.exit("something differs")


if __name__ == "__main__":
    main()
