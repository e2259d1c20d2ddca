"""The hub's cache as it would be after downloads, and no network: hub ids load from it."""

import os
import shutil
from pathlib import Path

import pytest


def offline_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on the libraries find hub ids in the folder `hub`, and nowhere else."""
    for module in ("huggingface_hub.constants", "diffusers.utils.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


def cached(folder: Path, hub: Path, revision: str = "main", commit: str = "1") -> Path:
    """A folder as the cache keeps it of the id some/where: a snapshot of links into blobs. Returns the snapshot."""
    repo = hub / "models--some--where"
    snapshot = repo / "snapshots" / commit
    for name in ("blobs", "refs"):
        (repo / name).mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link, blob = snapshot / file.relative_to(folder), repo / "blobs" / f"{commit}-{number}"
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
