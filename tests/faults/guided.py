"""The tests of `test_fuzz.py` under atheris: what reaches new lines of ours is kept and changed further.

    pip install '.[dev,fuzz]'
    python tests/faults/guided.py run_folders FOLDER -max_total_time=600

The first word is one of the tests there, without its `test_`; the rest goes to libFuzzer: the folder keeps what was
found to reach new lines, so that a later call goes on. The first failure ends it and is kept as `crash-...`;
`python tests/faults/guided.py run_folders crash-...` repeats it.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import atheris
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["stepfold"]):
    import test_fuzz
    from tiny import make_sana

    from stepfold.display import quiet_libraries


LENGTH = 8192  # bytes that hypothesis may draw a case from


class Folders:
    """What pytest's `tmp_path_factory` does, below one folder."""

    def __init__(self, below: Path) -> None:
        self.below = below

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=self.below))


def main() -> None:
    tests = {name.removeprefix("test_"): test for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")}
    if len(sys.argv) < 2 or sys.argv[1] not in tests:
        raise SystemExit(f"usage: python {sys.argv[0]} {{{','.join(tests)}}} [FOLDER] [-max_total_time=SECONDS]")
    name = sys.argv.pop(1)
    for word in sys.argv[1:]:
        if not word.startswith("-") and not Path(word).exists():
            Path(word).mkdir(parents=True)  # libFuzzer does not
    below = Path(tempfile.gettempdir()) / f"stepfold-guided-{name}"
    shutil.rmtree(below, ignore_errors=True)  # an earlier call's: atheris leaves the process without a word
    below.mkdir()
    fixtures: dict[str, Any] = {"tmp_path_factory": Folders(below)}
    if name == "encoded_prompts":
        fixtures["conditions"] = test_fuzz.make_conditions(below / "conditions")
    elif name == "run_folders":
        fixtures["run_folder"] = test_fuzz.make_run(below / "run")
    elif name == "pipeline_folders":
        make_sana().save_pretrained(below / "tiny_sana", safe_serialization=True)
        fixtures["tiny_sana"] = below / "tiny_sana"

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def case(data: Any) -> None:
        tests[name].hypothesis.inner_test(**fixtures, data=data)

    counts = Counter[bool]()

    def one(data: bytes) -> None:
        """What hypothesis needs beyond the given bytes follows from them, so that short ones make whole cases too."""
        counts[case.hypothesis.fuzz_one_input(data + random.Random(data).randbytes(LENGTH)) is not None] += 1
        if sum(counts.values()) % 500 == 0:
            print(counts[True], "whole cases;", dict(sorted(test_fuzz.OUTCOMES.items())), file=sys.stderr, flush=True)

    quiet_libraries()
    atheris.Setup([sys.argv[0], f"-max_len={LENGTH}", "-timeout=120", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
