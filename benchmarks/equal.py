"""The proof that a refactor changed no number: short runs of two versions of the source, compared to the bit.

    python benchmarks/equal.py --against DIR           this checkout against another one: records both, compares
    python benchmarks/equal.py --against FILE          the same, where the other one is recorded in FILE already
    python benchmarks/equal.py record --source DIR --out FILE
    python benchmarks/equal.py compare OLDER NEWER     two records

A case is `stepfold distill` for 40 steps on one thread, in a process of its own. Its record holds every row of the
metrics and a sha256 of every tensor of the last checkpoint and of the student, and of the last preview's pixels. A case
is run again only where the source or the case itself has changed (or with --force), so a stopped recording goes on.
Only the command line of the two versions is used; what they call differently stands in
equal_cases.py, with the cases.
Exit code 1: something differs.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import console, open_record
from equal_cases import BASE, CASES, EXTRA_KEYS, KILL_AFTER, PROMPTS, SAME_KEYS, SAME_SETTINGS, TIMES, Case
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SHOWN = 3  # differences of a case


# What a run leaves


def file_sha(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_note(tensor: torch.Tensor) -> str:
    """A tensor in a line: its bytes' sha256, dtype and shape."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{hashlib.sha256(raw).hexdigest()} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_run(folder: Path) -> dict[str, Any]:
    """The rows and the tensors' notes of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max((folder / "checkpoints").glob("[0-9]*"))
    tensors = {}
    for kind, root in (("checkpoint", last), ("student", folder / "student")):
        for path in sorted(root.rglob("*.safetensors")):
            place = f"{kind}/{path.relative_to(root).with_suffix('')}"
            tensors |= {f"{place}:{name}": tensor_note(value) for name, value in sorted(load_file(path).items())}
    for path in sorted((folder / "previews").glob("*.png"))[-1:]:
        with Image.open(path) as image:
            tensors["preview"] = f"{hashlib.sha256(image.tobytes()).hexdigest()} {image.mode} {list(image.size)}"
    return {"rows": rows, "tensors": tensors}


# The comparison


def row_differences(older: list[dict[str, Any]], newer: list[dict[str, Any]], extra: set[str]) -> Iterator[str]:
    """Each key of a step that differs, with both values."""
    if len(older) != len(newer):
        yield f"{len(older)} and {len(newer)} rows"
    for number, (ours, theirs) in enumerate(zip(older, newer, strict=False)):
        a = {SAME_KEYS.get(key, key): value for key, value in ours.items()}
        b = {SAME_KEYS.get(key, key): value for key, value in theirs.items()}
        for key in dict.fromkeys([*a, *b]):
            if TIMES.search(key) or (key in extra and (key in a) != (key in b)):
                continue
            if key not in a or key not in b:
                yield f"step {number}: {key} is only in the {'older' if key in a else 'newer'} one"
            elif not same(a[key], b[key]):
                yield f"step {number}: {key} {a[key]!r} and {b[key]!r}"


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


# The recording


class Place:
    """A folder with the data that the cases share, and the source that runs there."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source.resolve()
        self.environment = os.environ | {
            "PYTHONPATH": str(self.source / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"),
        }  # fmt: skip
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        (folder / "images").mkdir()
        lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(PROMPTS)]
        (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for i in range(len(PROMPTS)):
            pixels = bytes((x * (i + 1) + 3 * y * c) % 256 for y in range(64) for x in range(64) for c in range(3))
            Image.frombytes("RGB", (64, 64), pixels).save(folder / "images" / f"{i}.png")
        there = self.run("-c", "import stepfold; print(stepfold.__file__)")
        assert Path(there.stdout.strip()).is_relative_to(self.source), there
        self.settings = flat(yaml.safe_load(self.run("-m", "stepfold", "distill", "--dry-run").stdout))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with arguments, to its end."""
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def command(self, case: Case, out: Path) -> list[str]:
        """What `stepfold` is given."""
        changes = BASE | case.changes
        changes |= {"few": {"prompts": "prompts.txt"}, "images": {"space.images": "images"}, "bundled": {}}[case.data]
        words = [f"{spelt(name, self.settings)}={json.dumps(value)}" for name, value in changes.items()]
        sets = [word for change in words for word in ("--set", change)]
        return ["-m", "stepfold", "distill", "--preset", case.preset, "--out", str(out), "--quiet", *sets]

    def record(self, name: str) -> dict[str, Any]:
        """Runs a case."""
        case, out, began = CASES[name], self.folder / name, time.monotonic()
        command = self.command(case, out)
        if case.killed:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, env=self.environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while process.poll() is None and num_rows(out) < KILL_AFTER:
                time.sleep(0.02)
            process.kill()
            if process.wait() == 0:
                return {"failed": "it ended before it was killed"}
            command.append("--resume")
        done = self.run(*command)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        found = read_run(out)
        return {"case": note_of(name), "sec": round(time.monotonic() - began, 1), **found}


def note_of(name: str) -> str:
    """All that a case's numbers depend on but for the source."""
    return repr((BASE, PROMPTS, CASES[name]))


def spelt(name: str, known: set[str]) -> str:
    """The name under which a source knows a setting."""
    names = next((names for names in SAME_SETTINGS if name in names), (name,))
    return next((other for other in names if other in known), name)


def flat(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names."""
    parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k} for k, v in values.items()]
    return set[str]().union(*parts)


def num_rows(out: Path) -> int:
    """How many steps a run has logged."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def source_sha(source: Path) -> str:
    """Of every file of the package."""
    files = [p for p in sorted((source / "src").rglob("*")) if p.is_file() and p.suffix != ".pyc"]
    return hashlib.sha256("".join(f"{p.relative_to(source)} {file_sha(p)}\n" for p in files).encode()).hexdigest()


def record(source: Path, out: Path, cases: Sequence[str], force: bool, argv: Sequence[str]) -> dict[str, Any]:
    """Runs what is not recorded yet, and writes after each case; returns name -> record."""
    kept = json.loads(out.read_text())["cases"] if out.exists() else {}
    whole = open_record("equal", argv, torch.device("cpu")) | {"source": str(source.resolve()), "cases": kept}
    code = source_sha(source)

    def is_done(name: str) -> bool:
        there = kept.get(name, {})
        return (there.get("code"), there.get("case")) == (code, note_of(name))

    todo = [name for name in cases if force or not is_done(name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), source)
        for number, name in enumerate(todo, 1):
            kept[name] = place.record(name) | {"code": code}
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
