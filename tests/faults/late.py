"""`stepfold`, one of several processes; each but the first looks at the run folder only when a run is in it.

torchrun ... tests/faults/late.py distill ...
"""

import os
import time
from pathlib import Path
from typing import Any

from stepfold.cli import main
from stepfold.training import opening

if __name__ == "__main__":
    check = opening.check_run

    def check_late(folder: Path, *args: Any) -> None:
        """`check_run`, once the first process has made the folder."""
        until = time.monotonic() + 100
        while not (folder / opening.CONFIG).exists() and time.monotonic() < until:
            time.sleep(0.05)
        check(folder, *args)

    if os.environ["RANK"] != "0":
        opening.check_run = check_late
    main()
