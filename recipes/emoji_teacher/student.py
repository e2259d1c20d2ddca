"""Makes the bundled student of a run's: what it has of its own, the network, in float16; all else is its teacher's.

stepfold distill --preset emoji-long --out runs/emoji-long
python recipes/emoji_teacher/student.py runs/emoji-long/student
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stepfold import assets
from stepfold.students.card import read_card, write_card
from stepfold.students.saving import NETWORK_WEIGHTS


def ship(student: Path, out: Path) -> None:
    """Writes weights and card of a student into `out`; its README is written by hand."""
    weights = load_file(student / "transformer" / NETWORK_WEIGHTS)
    halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    lost = max(float((value.float() - weights[name]).norm() / weights[name].norm().clamp(min=1e-30))
               for name, value in halves.items())  # fmt: skip
    (out / "transformer").mkdir(parents=True, exist_ok=True)
    save_file(halves, out / "transformer" / NETWORK_WEIGHTS, metadata={"format": "pt"})
    alone = {"network_only": True, "pipeline": "", "scheduler": "", "calls": {}}  # no pipeline by itself
    write_card(out, read_card(student).model_copy(update=alone))
    print(f"{out}: {len(halves)} tensors; float16 moves none by more than {lost:.1e} of its norm")


if __name__ == "__main__":
    ship(Path(sys.argv[1]), assets.STUDENT)
