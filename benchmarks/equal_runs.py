"""Runs a case of `equal.py` with the source of one version, and notes what it leaves."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from equal_cases import BASE, CASES, KILL_AFTER, PROMPTS, TINY_PROMPTS, Case, note_of, spelt
from PIL import Image
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1] / "tests"


class Place:
    """A folder with the data that the cases share, and the source that runs there."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source.resolve()
        self.environment = os.environ | {
            "PYTHONPATH": str(self.source / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"),
            "COLUMNS": "1000",  # a message in one line
        }  # fmt: skip
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        (folder / "tiny.txt").write_text("\n".join(TINY_PROMPTS) + "\n")
        (folder / "images").mkdir()
        lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(PROMPTS)]
        (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for i in range(len(PROMPTS)):
            pixels = bytes((x * (i + 1) + 3 * y * c) % 256 for y in range(64) for x in range(64) for c in range(3))
            Image.frombytes("RGB", (64, 64), pixels).save(folder / "images" / f"{i}.png")
        there = self.run("-c", "import stepfold; print(stepfold.__file__)")
        assert Path(there.stdout.strip()).is_relative_to(self.source), there
        settings = self.run("-m", "stepfold", "distill", "--dry-run")
        assert settings.returncode == 0, settings.stderr
        self.settings = flat(yaml.safe_load(settings.stdout))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with arguments, to its end."""
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def make_teacher(self, name: str) -> str:
        """Saves a tiny pipeline, unless it is there; returns a sha256 of its weights."""
        out = self.folder / "teachers" / name
        if not out.exists():
            code = f"import pathlib, tiny; tiny.save(tiny.make_{name}, pathlib.Path({str(out)!r}))"
            environment = self.environment | {"PYTHONPATH": str(TESTS)}
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        return tree_sha(out, ".safetensors")

    def encode(self) -> None:
        """Encodes the prompts of the bundled teacher, unless they are."""
        if not (self.folder / "encoded").exists():
            options = ["--max-tokens", str(BASE["teacher.max_tokens"]), "--out", "encoded", "--quiet"]
            self.run("-m", "stepfold", "prompts", "encode", "prompts.txt", *options)

    def command(self, case: Case, out: Path) -> list[str]:
        """What Python is given."""
        changes = BASE | case.changes
        if case.teacher:
            changes |= {"teacher.source": f"teachers/{case.teacher}", "prompts": "tiny.txt"}
        elif case.data == "images":
            changes["space.images"] = "images"
        elif case.data != "bundled":
            changes["prompts"] = "prompts.txt"
        if case.data == "encoded":
            changes["conditions"] = "encoded"
        words = [f"{spelt(name, self.settings)}={json.dumps(value)}" for name, value in changes.items()]
        sets = [word for change in words for word in ("--set", change)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
        return [
            *(launcher if case.processes > 1 else []),
            *("-m", "stepfold", "distill", "--preset", case.preset, "--out", str(out), "--quiet", *sets),
        ]

    def record(self, name: str) -> dict[str, Any]:
        """Runs a case."""
        code = tree_sha(self.source / "src")
        case, out, began = CASES[name], self.folder / "runs" / name, time.monotonic()
        weights = self.make_teacher(case.teacher) if case.teacher else None
        if case.data == "encoded":
            self.encode()
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
        shutil.rmtree(out)
        return {
            "case": note_of(case),
            "code": code,
            "weights": weights,
            "sec": round(time.monotonic() - began, 1),
            **found,
        }


def flat(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names."""
    parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k} for k, v in values.items()]
    return set[str]().union(*parts)


def num_rows(out: Path) -> int:
    """How many steps a run has logged."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def tree_sha(root: Path, suffix: str = "") -> str:
    """Of all files of a folder whose names end so, but for compiled ones."""
    files = [p for p in sorted(root.rglob(f"*{suffix}")) if p.is_file() and p.suffix != ".pyc"]
    notes = [f"{p.relative_to(root)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files]
    return hashlib.sha256("".join(notes).encode()).hexdigest()


def tensor_note(tensor: torch.Tensor) -> str:
    """A tensor in a line: its bytes' sha256, dtype and shape."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{hashlib.sha256(raw).hexdigest()} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_run(folder: Path) -> dict[str, Any]:
    """The rows and the tensors' notes of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows += [scores] if (scores := report_scores(folder)) else []
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


def report_scores(folder: Path) -> dict[str, float]:
    """The table of the report as one more row; nothing where there is none."""
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    groups = {who: report.get(who) or {} for who in ("teacher", "student")}
    return {
        f"{who} {steps} {key}": value
        for who, by_steps in groups.items()
        for steps, scores in by_steps.items()
        for key, value in scores.items()
    }
