"""What a user may have meant by a name that is not ours: `training.stpes`, or `batch_size` as other trainers say."""

import difflib
from typing import Any

RENAMED = {"training.rollout_precision": "training.walk_precision"}
"""Settings under the names of earlier versions -> their names now; run folders and students of those are read."""
ELSEWHERE = {
    "batch_size": "training.prompts_per_step",
    "train_batch_size": "training.prompts_per_step",
    "learning_rate": "optimiser.lr",
    "max_train_steps": "training.steps",
    "num_train_steps": "training.steps",
    "rank": "student.lora",
    "lora_rank": "student.lora",
    "network_dim": "student.lora",
    "mixed_precision": "training.precision",
    "cfg": "space.guidance",
    "cfg_scale": "space.guidance",
    "guidance_scale": "space.guidance",
    "num_inference_steps": "evaluation.steps",
    "sampling_steps": "evaluation.steps",
    "resolution": "teacher.height teacher.width",
    "size": "teacher.height teacher.width",
    "gradient_checkpointing": "training.checkpointing",
    "model": "teacher.source",
    "pretrained_model_name_or_path": "teacher.source",
}
"""Names of other trainers, or of our options, without their section -> our settings."""
OPTIONS = {"preset": "--preset", "device": "--device", "out": "--out", "output_dir": "--out", "hours": "--hours"}
"""What is an option of the commands and no setting."""


def nearest(given: str, known: list[str]) -> str:
    """The end of an error's line: the names that may be meant, or all that there are.

    Args:
        given: the unknown name.
        known: the settings or presets that there are.
    """
    if given in RENAMED:
        return f"; it is called {RENAMED[given]} now"
    last_part = given.rsplit(".", 1)[-1]
    if given in OPTIONS and given not in known:
        return f"; give {OPTIONS[given]}, which is no setting"
    if (same := ELSEWHERE.get(last_part)) and set(same.split()) <= set(known):
        return f"; did you mean {' and '.join(repr(name) for name in same.split())}?"
    if same_end := [repr(name) for name in known if name.rsplit(".", 1)[-1] == last_part]:
        return f"; did you mean {' or '.join(same_end)}?"
    if longer := [repr(name) for name in known if name.startswith(f"{given}-")]:
        return f"; did you mean {' or '.join(longer[:3])}?"
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    close = close or [last[n] for n in difflib.get_close_matches(last_part, list(last), n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def renamed(values: Any) -> Any:
    """Settings that an earlier version wrote, under the names of this one; changed in place."""
    for old, new in RENAMED.items():
        section, name = old.split(".")
        inner = values.get(section) if isinstance(values, dict) else None
        if isinstance(inner, dict) and name in inner:
            inner[new.split(".")[1]] = inner.pop(name)
    return values
