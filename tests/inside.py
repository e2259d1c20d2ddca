"""Commands of stepfold in this process, without loading all libraries again."""

import subprocess
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
