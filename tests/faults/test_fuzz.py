"""Mutated input of every kind: each case ends in an error class of ours or works.

Never another exception, thirty seconds of processor time or a minute of waiting, half a GiB of memory, a write outside
the output folder (by a link too), a process, a connection or a pickle. A few seconds here; the long form is
`STEPFOLD_FUZZ=10000` (cases a test, at random) in the environment. What it found is in `test_found.py`.
"""

import copy
import csv
import gzip
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file
from torch import nn

from stepfold.commands import prompts as prompt_commands
from stepfold.config import TeacherSettings, from_yaml, load_config, setting_names, to_yaml
from stepfold.display import quiet_libraries
from stepfold.errors import NonFiniteError, UserError
from stepfold.evaluation.curves import curves_from_rows
from stepfold.prompts.cache import encode_prompts, open_conditions
from stepfold.prompts.reading import open_prompts
from stepfold.students.loading import load_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_teacher
from stepfold.training.latents import cached_blacks
from stepfold.training.memory import peak_memory_gib, reset_peak_memory
from stepfold.training.opening import Source, check_run, open_run, remember
from stepfold.training.runs import (
    CHECKSUMS,
    append_metrics,
    checkpoints,
    checksum,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
    set_aside_damaged,
)
from stepfold.web.runs import compared, find_runs, preview_at, read_run, report_of, scores_of

CASES = int(os.environ.get("STEPFOLD_FUZZ", "0"))
CPU_SEC, WAIT_SEC, MEMORY_GIB = 30, 60.0, 0.5
MOST_GIB = 4  # more than that no case gets, so that a finding does not take the machine along
OUTCOMES: Counter[str] = Counter()
FINDINGS: dict[str, list[str]] = {}
CPU = torch.device("cpu")


def fuzz(cases: int) -> Callable[[Any], Any]:
    """So many cases, the same ones each time; in the long form as many as asked for, at random."""
    options = settings(
        max_examples=CASES or cases, derandomize=not CASES, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    return lambda test: pytest.mark.timeout(0 if CASES else 300)(options(test))


# What is watched.


class Hang(BaseException):
    """A case took all its time; not to be caught as an Exception."""


class Watch:
    """What happens while a case runs that must not."""

    inside: ClassVar[Path | None] = None
    seen: ClassVar[list[str]] = []
    earlier: ClassVar[set[Path]] = set()
    """What was `inside` in other cases, which may leave a temporary file to the garbage collector."""


FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FOLLOWS = ("open", "os.truncate", "os.chmod")


def changed_paths(event: str, args: tuple[Any, ...]) -> Iterator[Path]:
    """What an event changes: links on the way are followed, one in its place only by what follows those."""
    names: list[tuple[Any, int]] = []  # a path, and the open folder that it is relative to; -1 is where we are
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        names = [(args[0], -1)]
    elif event in ("os.rename", "os.link"):
        names = [(args[0], args[2]), (args[1], args[3])]
    elif event in CHANGES:
        names = [(args[1], args[2]) if event == "os.symlink" else (args[0], -1 if event == "os.truncate" else args[-1])]
    for name, below in names:
        if isinstance(name, str | bytes | os.PathLike):
            path = Path(f"/proc/self/fd/{below}" if below >= 0 else ".", os.fsdecode(name))
            follows = event in FOLLOWS and not (event == "open" and args[2] & os.O_NOFOLLOW)
            yield Path(
                os.path.realpath(path) if follows else os.path.realpath(path.parent), "" if follows else path.name
            )


def audit(event: str, args: tuple[Any, ...]) -> None:
    if Watch.inside is None:
        return
    if event in FORBIDDEN:
        Watch.seen.append(f"{event} {args}")
    for where in changed_paths(event, args):
        if event == "os.remove" and where.parent in Watch.earlier and where.name.startswith("stepfold-"):
            continue
        if not where.is_relative_to(Watch.inside) and str(where) != "/dev/null":
            Watch.seen.append(f"{event} {where}")


sys.addaudithook(audit)
sys.dont_write_bytecode = True


def out_of_time(number: int, frame: Any) -> None:
    raise Hang(f"still busy after {CPU_SEC} s, or waiting for more than {WAIT_SEC:.0f} s")


def stop_waiting(folder: Path) -> None:
    """Interrupts the case, and opens the pipes in its folder: native code that waits at one hears no signal."""
    Watch.seen.append(f"waited for more than {WAIT_SEC:.0f} s")
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGPROF)
    for path in folder.parent.rglob("*"):
        if path.is_fifo():
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def memory_held() -> int:
    """Bytes of what RLIMIT_DATA counts."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])


@contextmanager
def watched(inside: Path, kind: str) -> Iterator[None]:
    """The block may end well or in an error of ours, and in nothing else; it may write below `inside` only."""
    old = signal.signal(signal.SIGPROF, out_of_time)
    reset_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    Watch.seen, Watch.inside = [], Path(os.path.realpath(inside))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_held() + MOST_GIB * 2**30, limits[1]))
    waiting = threading.Timer(WAIT_SEC, stop_waiting, [inside])
    waiting.start()
    signal.setitimer(signal.ITIMER_PROF, CPU_SEC)
    outcome, said = "worked", ""
    try:
        yield
    except (UserError, NonFiniteError) as error:
        outcome, said = "refused", str(error)
    except (Exception, Hang) as error:
        if not CASES:
            raise
        outcome = "FAILED"
        note(kind, error)
    finally:
        waiting.cancel()
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        Watch.earlier.add(Watch.inside)
        Watch.inside = None
    OUTCOMES[f"{kind}: {outcome}"] += 1
    grown = peak_memory_gib(CPU) - before
    problem = f"did {Watch.seen}" if Watch.seen else f"took memory: {grown:.2f} GiB" if grown > MEMORY_GIB else ""
    if len(said) > 5000:
        problem = f"an error of {len(said)} characters"
    if problem and CASES:
        note(kind, AssertionError(problem))
    assert CASES or not problem, problem


def note(kind: str, error: BaseException) -> None:
    """In the long form a failure is kept, and the next case tried; there is one example of each kind."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/stepfold/" in f.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "-"
    text = "".join(traceback.format_exception(error))
    FINDINGS.setdefault(f"{kind}: {type(error).__name__} at {where}", []).append(text[-1500:])


@pytest.fixture(scope="module", autouse=True)
def _say_the_outcomes() -> Iterator[None]:
    quiet_libraries()
    yield
    print("\n" + "\n".join(f"{name:32} {count}" for name, count in sorted(OUTCOMES.items())))
    for name, examples in FINDINGS.items():
        print(f"\n{len(examples)} x {name}\n{examples[0]}")
    assert not FINDINGS, f"{len(FINDINGS)} kinds of failure"


def test_the_watch_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forbidden is found, so that its absence means something."""
    monkeypatch.setitem(globals(), "CASES", 0)
    inside = tmp_path / "inside"
    (inside / "folder" / "in it").mkdir(parents=True)
    (inside / "way out").symlink_to(tmp_path)
    (inside / "link").symlink_to(tmp_path / "outside")
    with watched(inside, "watch"):
        (inside / "a").write_text("x")
        shutil.rmtree(inside / "folder")
        (inside / "way out").rename(inside / "way")
        raise UserError("fine")
    for wrong in (
        lambda: (tmp_path / "outside").write_text("x"),
        lambda: (tmp_path / "outside").unlink(),
        lambda: (inside / "link").write_text("x"),
        lambda: (inside / "way" / "outside").unlink(),
        lambda: (inside / "way" / "folder").mkdir(),
        lambda: os.system("true"),
    ):
        with pytest.raises(AssertionError, match=r"open|os\."), watched(inside, "watch"):
            wrong()
    with pytest.raises(AssertionError, match="memory"), watched(inside, "watch"):
        torch.ones(2**28).sum()
    with pytest.raises(KeyError), watched(inside, "watch"):
        raise KeyError("not ours")
    monkeypatch.setitem(globals(), "WAIT_SEC", 0.2)
    os.mkfifo(inside / "pipe")
    with pytest.raises(Hang, match="waiting"), watched(inside, "watch"):
        (inside / "pipe").read_text()
    OUTCOMES.clear()


# What cases are made of.

TEXT = st.text(st.characters(), max_size=60)  # lone surrogates too: json can say them
ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**18, 10**30, 0.5, -0.0, 1e308, float("inf"),
            float("nan"), "", "..", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "a" * 5000, "no", "<script>",
            [], {}, [[]], [None, None], {"": ""}, [0] * 50, ["diffusers", "AutoencoderDC"], ["os", "path"],
        ]
    ),
    st.integers(-(10**6), 10**6),
    st.floats(),
    TEXT,
    st.recursive(st.none() | TEXT | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is in a json value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        found += places(inner, (*path, key))
    return found


@st.composite
def changed(draw: Any, value: Any, most: int = 3) -> Any:
    """A json value with some of its entries replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        where = places(value)
        if not where:
            return copy.deepcopy(draw(ODD))
        path = draw(st.sampled_from(where))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
        if kind == "replace":
            holder[path[-1]] = copy.deepcopy(draw(ODD))
        elif kind == "remove":
            del holder[path[-1]]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(TEXT)] = copy.deepcopy(draw(ODD))
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(TEXT)] = holder.pop(path[-1])
    return draw(st.sampled_from([value] * 20 + [[], 1, None, "text"]))


@st.composite
def spoilt(draw: Any, data: bytes) -> bytes:
    """Bytes cut short, with bits flipped, pieces doubled, or noise put in."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "flip", "flip", "noise", "double", "zero"]))
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "noise":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
        else:
            content[at : at + 8] = bytes(len(content[at : at + 8]))
    return bytes(content)


@st.composite
def mistreated(draw: Any, data: bytes) -> bytes:
    """A safetensors file whose header lies, or whose bytes are spoilt, or whose numbers are not finite."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw(st.sampled_from(["header", "header", "entry", "entry", "length", "spoilt", "numbers"]))
    if kind == "spoilt":
        return draw(spoilt(data))
    if kind == "length":
        claimed = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**62, 2**63, 2**64 - 1]))
        return claimed.to_bytes(8, "little") + data[8:]
    if kind == "numbers":
        return data[: 8 + length] + draw(st.sampled_from([b"\xff", b"\0\0\x80\x7f", b"\x80"])) * len(body)
    if kind == "header":
        header = draw(changed(header))
    else:
        entry = header[draw(st.sampled_from([name for name in header if name != "__metadata__"]))]
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if what == "dtype":
            entry[what] = draw(
                st.sampled_from(["F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", 3])
            )
        elif what == "shape":
            entry[what] = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 64, 2**31, 2**40, 2**63, -1]), max_size=5))
        else:
            entry[what] = draw(st.lists(st.integers(-8, 2 * len(body)) | st.just(2**64), min_size=1, max_size=3))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


THINGS = ("moved", "file outside", "folder outside", "nothing", "itself", "its folder", "pipe", "folder", "file")


@st.composite
def misplaced(draw: Any, folder: Path, new: Sequence[str], things: Sequence[str] = THINGS) -> dict[str, bytes]:
    """Something else in the place of a file or a folder, or in a new one's: a link, a pipe, a folder or a file.

    Returns:
        What then lies outside, in `elsewhere` beside the folder: name -> content.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    path, outside = folder / draw(st.sampled_from([*names, *new])), folder.parent / "elsewhere"
    (outside / "folder" / "000003").mkdir(parents=True)
    (outside / "file").write_text("thesis")
    (outside / "folder" / "000003" / "state.json").write_text("{}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.move(path, outside / "moved")
    thing = draw(st.sampled_from(things))
    if thing == "pipe":
        os.mkfifo(path)
    elif thing == "folder":
        (path / "in it").mkdir(parents=True)
    elif thing == "file":
        path.write_bytes(draw(st.binary(max_size=20)))
    else:
        goals = {"file outside": outside / "file", "folder outside": outside / "folder", "itself": path}
        path.symlink_to(goals.get(thing, path.parent if thing == "its folder" else outside / thing))
    return contents(outside)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


# Prompts.

LINES = [
    "a cat",
    "dög 🐶",
    "<script>alert(1)</script>",
    "$(touch x); rm -rf /",
    "../../etc/passwd",
    "x" * 2500,
    '"quoted, twice"',
]


def written(lines: Sequence[str], suffix: str) -> bytes:
    """A file of prompts."""
    if suffix.endswith(".gz"):
        return gzip.compress(written(lines, suffix.removesuffix(".gz")), compresslevel=1, mtime=0)
    if suffix == ".txt":
        return "\r\n".join(lines).encode()
    if suffix == ".jsonl":
        return b"".join(json_bytes({"id": i, "prompt": line}) + b"\n" for i, line in enumerate(lines))
    if suffix == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.table({"prompt": list(lines), "id": list(range(len(lines)))}), sink)
        return sink.getvalue()
    table = io.StringIO()
    rows = csv.writer(table, delimiter="," if suffix == ".csv" else "\t")
    rows.writerows([["id", "prompt"], *([i, line] for i, line in enumerate(lines))])
    return table.getvalue().encode()


SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")
VALID = {suffix: written(LINES, suffix) for suffix in (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES), ".parquet")}


@st.composite
def repeated(draw: Any, suffix: str) -> bytes:
    """A few words over and over: in a line, in lines that are equal or nearly so, in the nested columns of parquet."""
    words = draw(st.sampled_from(["cat", "a", "\U0001f436", "x" * 50, "the red cat sat", "\u3000", ",", '"', "\\"]))
    count, rows = draw(st.sampled_from([(1, 20_000), (3, 5_000), (400, 300), (2_000, 20), (60_000, 3), (5_000_000, 1)]))
    line = draw(st.sampled_from([" ", "", "\t", ", "])).join([words] * count)[: 2**24 - 100]
    if suffix != ".parquet":
        numbered = draw(st.booleans())
        return written([f"{i} {line}" if numbered else line for i in range(rows)], suffix)
    rows = draw(st.sampled_from([rows, min(50_000, 2**29 // len(line.encode()))]))  # half a GiB of text at most
    one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([line]))
    kinds: dict[str, Callable[[], pa.Array]] = {
        "words": lambda: one,
        "list": lambda: pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), one),
        "struct": lambda: pa.StructArray.from_arrays([one], ["text"]),
        "list of lists": lambda: pa.ListArray.from_arrays(
            pa.array([0, 1], pa.int32()), pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), one)
        ),
    }
    column, sink = kinds[draw(st.sampled_from(sorted(kinds)))](), io.BytesIO()
    parquet.write_table(
        pa.table({"prompt": column}), sink, store_schema=draw(st.booleans()), compression="zstd",
        row_group_size=draw(st.sampled_from([2**30, 1000])),
    )  # fmt: skip
    return sink.getvalue()


ROWS = st.lists(
    st.one_of(ODD, st.dictionaries(st.sampled_from(["prompt", "text", "", "id"]), ODD, max_size=3)), max_size=6
)
CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.lists(TEXT, max_size=8).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
    st.tuples(TEXT, st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-7", "cp037"])).map(
        lambda pair: pair[0].encode(pair[1], "ignore")
    ),
    ROWS.map(lambda rows: b"\n".join(json_bytes(row) for row in rows)),
    st.lists(st.lists(TEXT, max_size=3), max_size=5).map(
        lambda rows: "\n".join(["prompt,prompt", *(",".join(row) for row in rows)]).encode("utf-8", "replace")
    ),
    st.builds(lambda piece, count: (piece or b"\0") * count, st.binary(max_size=2), st.integers(10**4, 10**5)),
    st.sampled_from([b"[" * 10**5, b'{"prompt": ' * 10**5, b"1" * 10**4, b'{"prompt": "\\ud800"}', b"prompt\n\xff"]),
)


@pytest.mark.long
@fuzz(60)
@given(data=st.data())
def test_files_of_prompts(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    suffix, near = data.draw(st.sampled_from([*sorted(VALID), *[".parquet"] * 3])), data.draw(st.booleans())
    folder = tmp_path_factory.mktemp("prompts")
    content = data.draw(data.draw(st.sampled_from([spoilt(VALID[suffix]), CONTENTS, CONTENTS, repeated(suffix)])))
    if suffix.endswith(".gz") and data.draw(st.booleans()):
        content = gzip.compress(content, mtime=0)
    file = folder / f"prompts{suffix}"
    file.write_bytes(content)
    out = folder / "out"
    out.mkdir()
    with watched(out, "prompts, clean"):
        prompt_commands.clean(file, out=out / "clean.txt", near=0.8 if near else None)
    if (out / "clean.txt").exists():
        opened = open_prompts(out / "clean.txt")  # what it wrote, it reads
        assert len([opened.prompt(i) for i in range(len(opened))])
    with watched(out, "prompts, stats"):
        prompt_commands.stats(file, languages=False, json_file=out / "stats.json")
    with watched(out, "prompts, split"):
        prompt_commands.split(file, out=out / "split", test=0.5)
    text = folder / "text.txt"
    text.write_bytes(content)
    with watched(out, "prompts, open"), patch.object(tempfile, "tempdir", str(out)):
        opened = open_prompts(text)  # a table, where its content says so
        assert all(isinstance(opened.prompt(i), str) for i in range(len(opened)))
    with watched(out, "prompts, open a table"), patch.object(tempfile, "tempdir", str(out)):
        opened = open_prompts(file)
        assert all(isinstance(opened.prompt(i), str) for i in range(len(opened)))
    shutil.rmtree(folder)


# Settings.

LAUGHS = "a: &a [x]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9))
"""Nine times nine times ... lists, in a few lines."""
YAML_KEYS = st.sampled_from(
    ["seed", "training", "steps", "space", "guidance", "preset", "<<", "<<", '"<<"', "!!merge x", "*a ", "&b c", "? x"]
)
ODD_YAML = [
    "2024-99-99", "seed: 2024-13-45", "a: &a [*a]", "&a {training: *a}", "? [1, 2]\n: 3", "!!python/object:os.x {}",
    "!!python/object/apply:os.system ['touch ran']", "- " * 500, "[" * 500, "{" * 500, "seed: 0x", "seed: 0b",
    "seed: 1:99:99", "<<: 3", "<<: [1]", "a: *b", "%YAML 9.9\n---\na", "--- a\n--- b", "\x00", "\ufeff{}", "seed: .inf",
    "preset: demo", "preset: [demo]", "preset: " + "x" * 5000, "preset: a\\0b", 'preset: "a\\0b"', "1: 2", "null: 3",
    LAUGHS, LAUGHS + "seed: *b8\n", LAUGHS + "training: {steps: *b8}\n", LAUGHS + "space: {guidance: *b8}\n",
    "seed: " + "9" * 5000, "training: {steps: " + "1" * 5000 + "}", "training: 3", "training: [steps]", "prompts: [a]",
]  # fmt: skip


NAMES = st.sampled_from(["a", "b", "c"])
NODES = st.recursive(
    st.sampled_from(["1", "demo", "x", "[]", "{}"]) | NAMES.map("*{}".format),
    lambda inner: st.one_of(
        st.tuples(NAMES, inner).map(lambda pair: f"&{pair[0]} {pair[1]}"),
        st.lists(inner, max_size=9).map(lambda nodes: f"[{', '.join(nodes)}]"),
        st.lists(st.tuples(YAML_KEYS, inner), max_size=5).map(
            lambda pairs: "{" + ", ".join(f"{key}: {node}" for key, node in pairs) + "}"
        ),
    ),
    max_leaves=12,
)
"""Nodes of yaml that are named, used again, put into others with << and into themselves."""


def multiplied(depth: int, width: int, merged: bool, place: str) -> str:
    """A few lines whose last node holds all those before, again and again."""
    rows = ["x0: &x0 {k0: 1}"]
    for i in range(1, depth):
        before = ", ".join([f"*x{i - 1}"] * width)
        rows.append(f"x{i}: &x{i} {{<<: [{before}], k{i}: 1}}" if merged else f"x{i}: &x{i} [{before}]")
    return "\n".join([*rows, place.format(f"*x{depth - 1}")])


YAML_PLACES = st.sampled_from(
    ["seed: {}", "training: {}", "training: {{<<: {}}}", "<<: {}", "preset: {}", "space: {{guidance: {}}}", "{}: 1"]
)


@st.composite
def settings_text(draw: Any) -> str:
    kind = draw(st.sampled_from(["changed", "changed", "spoilt", "odd", "text", "nodes", "nodes", "multiplied"]))
    if kind == "nodes":
        pairs = draw(st.lists(st.tuples(YAML_KEYS, NODES), min_size=1, max_size=6))
        return "\n".join(f"{key}: {node}" for key, node in pairs)
    if kind == "multiplied":
        return multiplied(draw(st.integers(2, 9)), draw(st.integers(2, 9)), draw(st.booleans()), draw(YAML_PLACES))
    whole = yaml.safe_load(to_yaml(load_config("demo")))
    if kind == "changed":
        return yaml.safe_dump(json.loads(json.dumps(draw(changed(whole)), ensure_ascii=False)), allow_unicode=True)
    if kind == "spoilt":
        return draw(spoilt(to_yaml(load_config("demo")).encode())).decode("utf-8", "surrogateescape")
    if kind == "odd":
        return draw(st.sampled_from(ODD_YAML))
    return draw(TEXT)


@pytest.mark.long
@fuzz(60)
@given(data=st.data())
def test_settings(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    text, key = data.draw(settings_text()), data.draw(st.sampled_from(setting_names()) | TEXT)
    value = data.draw(TEXT | NODES | st.sampled_from(["2024-99-99", "[" * 500]))
    folder = tmp_path_factory.mktemp("settings")
    file = folder / "settings.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape") if "\ud800" not in text else b"\xed\xa0\x80")
    for kind, read in (
        ("preset", lambda: load_config(str(file))),
        ("config.yaml", lambda: from_yaml(file)),
        ("--set", lambda: load_config("demo", [f"{key}={value}"])),
        ("--preset", lambda: load_config(text)),
        ("--dry-run", lambda: to_yaml(load_config(str(file), [f"seed={value}"]))),
    ):
        with watched(folder / "out", f"settings, {kind}"):
            read()
    shutil.rmtree(folder)


# Encoded prompts.

KEY = {"teacher": "t", "encoder": "e", "prompts": "p"}


class Numbered:
    """Five prompts."""

    def __len__(self) -> int:
        return 5

    def prompt(self, index: int) -> str:
        return "x" * (index + 1)


def fake_encode(index: Sequence[int]) -> Condition:
    texts = [Numbered().prompt(i) for i in index]
    mask = torch.tensor([[i < len(text) for i in range(6)] for text in texts]).long()
    return Condition(torch.randn(len(texts), 6, 4), mask, torch.randn(len(texts), 3))


def make_conditions(folder: Path) -> Path:
    null = Condition(torch.randn(1, 6, 4), torch.ones(1, 6).long(), torch.randn(1, 3))
    encode_prompts(folder, KEY, Numbered(), fake_encode, null, torch.randn(4, 2, 2), batch=2)
    return folder


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conditions(tmp_path_factory.mktemp("whole") / "conditions")


@pytest.mark.long
@fuzz(80)
@given(data=st.data())
def test_encoded_prompts(conditions: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("conditions") / "copy"
    shutil.copytree(conditions, folder)
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content, outside = file.read_bytes(), None
    if data.draw(st.integers(0, 3)) == 0:
        outside = data.draw(misplaced(folder, (".index.json.part", ".extras.safetensors.part")))
    elif file.suffix == ".json":
        file.write_bytes(data.draw(changed(json.loads(content)).map(json_bytes) | spoilt(content)))
    else:
        file.write_bytes(data.draw(mistreated(content)))
    with watched(folder, "conditions, read"):
        cache = open_conditions(folder, KEY)
        rows = cache.rows([0, 4, 2])
        assert rows.embeds.is_floating_point() and len(rows) == 3
    with watched(folder, "conditions, write"):
        encode_prompts(folder, KEY, Numbered(), fake_encode, None, torch.randn(4, 2, 2), batch=2)
    assert outside is None or contents(folder.parent / "elsewhere") == outside
    shutil.rmtree(folder.parent)


# Run folders.


def modules() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    student, average = nn.Linear(3, 2), nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {"student": student, "average": average}, optimiser


def make_run(folder: Path) -> Path:
    open_run(folder, load_config("demo"), resume=False).release()
    remember(folder, Source("prompts", "prompts.txt", "abc", 3))
    for step in (1, 2):
        save_checkpoint(folder, step, *modules(), keep=2)
        append_metrics(folder, {"step": step - 1, "loss": 0.5, "kept": 1.0})
    save_file({"0": torch.randn(4, 2, 2)}, folder / "blacks.safetensors")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run")


def resume(folder: Path) -> None:
    """What `stepfold distill --resume` reads, in its order."""
    config = load_config("demo")
    check_run(folder, config, resume=True)
    lock = open_run(folder, config, resume=True)
    try:
        remember(folder, Source("prompts", "prompts.txt", "abc", 3))
        set_aside_damaged(folder)
        cached_blacks(folder, SimpleNamespace(device="cpu", latent_shapes=[(4, 2, 2)]))  # type: ignore[arg-type]
        saved = checkpoints(folder)
        start = load_checkpoint(saved[-1], *modules()) if saved else 0
        rewind_metrics(folder, start)
        append_metrics(folder, {"step": start, "loss": 1.0})
        curves_from_rows(read_metrics(folder))
    finally:
        lock.release(force=True)


def look_at(folder: Path) -> None:
    """What `stepfold runs` and the page of `stepfold demo` read, but for drawing curves."""
    for name in find_runs(folder.parent):
        run = read_run(folder.parent, name)
        scores_of(run)
        compared(run, run)
        for show in (lambda run=run: preview_at(run, 3), lambda run=run: report_of(run)):
            with suppress(UserError):
                show()


NEW_IN_A_RUN = (
    ".config.yaml.part", ".metrics.jsonl.part", ".blacks.safetensors.part", ".student.part", ".student.aside.part",
    "checkpoints/.000003.part", "checkpoints/.000002.aside.part", "checkpoints/000003", "checkpoints/damaged_000002",
    "student", "previews", "previews/step_000002.png", "report.json", "report.html", "tensorboard",
)  # fmt: skip


@pytest.mark.long
@fuzz(80)
@given(data=st.data())
def test_run_folders(run_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    hidden = data.draw(st.booleans())  # the checksums are those of the changed files, as somebody with intent would do
    folder = tmp_path_factory.mktemp("run") / "copy"
    shutil.copytree(run_folder, folder)
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )
    file = folder / data.draw(st.sampled_from(names))
    content, outside = file.read_bytes(), None
    if data.draw(st.integers(0, 3)) == 0:
        outside = data.draw(misplaced(folder, NEW_IN_A_RUN))
    elif file.suffix == ".json":
        content = data.draw(changed(json.loads(content)).map(json_bytes) | spoilt(content))
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        lines = changed(rows).map(lambda rows: b"\n".join(map(json_bytes, rows if isinstance(rows, list) else [rows])))
        content = data.draw(lines | spoilt(content) | st.binary(max_size=50))
    elif file.suffix == ".yaml":
        content = data.draw(settings_text().map(lambda text: text.encode("utf-8", "replace")))
    else:
        content = data.draw(mistreated(content))
    if outside is None:
        file.write_bytes(content)
    if outside is None and hidden and file.name != CHECKSUMS and (sums := file.parent / CHECKSUMS).exists():
        sums.write_text(json.dumps(json.loads(sums.read_text()) | {file.name: checksum(file)}))
    with watched(folder, "run folder, listed"):
        look_at(folder)
    with watched(folder, "run folder"):
        resume(folder)
    assert outside is None or contents(folder.parent / "elsewhere") == outside
    shutil.rmtree(folder.parent)


# Pipeline folders.

PARTS = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "stepfold.json")


@pytest.mark.long
@fuzz(40)
@given(data=st.data())
def test_pipeline_folders(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    part, student = data.draw(st.sampled_from(PARTS)), data.draw(st.booleans())
    folder = tmp_path_factory.mktemp("pipeline") / "copy"
    shutil.copytree(tiny_sana, folder)
    card = {"teacher": "emoji", "height": 32, "width": 32, "max_tokens": 16, "guidance": 4.5, "config": {}}
    (folder / "stepfold.json").write_text(json.dumps(card))
    place = folder / part
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    file = data.draw(st.sampled_from(files))
    content, outside = file.read_bytes(), None
    if data.draw(st.integers(0, 3)) == 0:
        outside = data.draw(misplaced(folder, ("vae/pytorch_model.bin", "vae/more.json", "README.md")))
    elif file.suffix == ".json" and len(content) < 20_000:
        file.write_bytes(data.draw(changed(json.loads(content)).map(json_bytes) | spoilt(content)))
    elif file.suffix == ".safetensors":
        file.write_bytes(data.draw(mistreated(content)))
    else:
        file.write_bytes(data.draw(spoilt(content)))
    with watched(folder / "out", "student folder" if student else "pipeline folder"):
        if student:
            teacher = load_student(folder, "cpu")[0]
        else:
            teacher = load_teacher(TeacherSettings(source=str(folder), max_tokens=16), "cpu")
        condition = teacher.encode(["a cat", "pizza on a white plate"])
        x = torch.randn(2, *teacher.latent_shape)
        teacher.velocity(x, torch.tensor([0.3, 1.2]), condition, torch.tensor([4.5, 1.0]))
    assert outside is None or contents(folder.parent / "elsewhere") == outside
    shutil.rmtree(folder.parent)


def test_templates_are_whole(conditions: Path, run_folder: Path, tmp_path: Path) -> None:
    """Untouched, each of them works: a case that is refused is refused for its change."""
    assert len(open_conditions(conditions, KEY).rows([0, 1])) == 2
    shutil.copytree(run_folder, tmp_path / "run")
    resume(tmp_path / "run")
    for suffix, content in VALID.items():
        (tmp_path / f"p{suffix}").write_bytes(content)
        prompt_commands.clean(tmp_path / f"p{suffix}", out=tmp_path / "clean.txt", force=True)
        assert len(open_prompts(tmp_path / "clean.txt")) == len(LINES) - 1
