"""Commands of stepfold and its examples in this process, without loading all libraries again."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stepfold.cli import main


def in_this_process(command: list[str], **rest: Any) -> subprocess.CompletedProcess[bytes]:
    """As `subprocess.run` of a stepfold command."""
    argv = ["stepfold", *command[command.index("stepfold") + 1 :]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(command, int(ended.value.code or 0))


def example(name: str) -> Any:
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
