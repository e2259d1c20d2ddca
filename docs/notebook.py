# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3}
# ---

# %% [markdown]
# # From a teacher to a student
#
# This notebook distils the bundled teacher from top to bottom, on one CPU core or on any GPU. It trains for a few steps
# only, so its student is far from done; the last cells sample with the student that two hours of training made.
#
# First install stepfold in a clone of its repository, then start Jupyter there:
#
# ```bash
# pip install . jupyterlab jupytext
# jupytext --to ipynb docs/notebook.py    # this notebook
# ```

# %%
import shlex
import tempfile
from pathlib import Path

import torch
from IPython.display import Image, display

from stepfold.cli import app

RUN = Path(tempfile.mkdtemp()) / "run"


def stepfold(line: str) -> None:
    """Runs a command as a shell would: `stepfold LINE`."""
    assert not app(shlex.split(line), standalone_mode=False)


# %% [markdown]
# ## Is the teacher read correctly?
#
# `doctor` checks a teacher before a run. Each finding has a number, its range and a verdict. Give it your own folder or
# hub id instead of `emoji`.

# %%
stepfold("doctor emoji")

# %% [markdown]
# ## What will a run cost?
#
# `plan` takes a few steps of the real run, then counts the rest.

# %%
CHEAP = "--set training.prompts_per_step=2 --set space.route_steps=5 --set teacher.max_tokens=16 --set evaluation.n=0"
stepfold(f"plan --preset demo {CHEAP} --timed-steps 3 --quiet")

# %% [markdown]
# ## Distil
#
# The run trains a one-step student from prompts alone. `make demo` takes 500 steps of four times as many prompts.

# %%
STEPS = 12
stepfold(
    f"distill --preset demo {CHEAP} --train-steps {STEPS} --set training.preview_every={STEPS} --out {RUN} --quiet"
)

# %% [markdown]
# ## Look
#
# The preview grid has the teacher at 20 steps and at one, and the student at one, two and four, from the same noise.

# %%
display(Image(RUN / "previews" / f"step_{STEPS:06d}.png"))

# %% [markdown]
# After so few steps the student still resembles the teacher's one step. The bundled student had 6,000 steps. It samples
# these images with one call of its network each.

# %%
PROMPTS = ["red heart on blue background", "fox on green background", "pizza on white background"]
SAMPLE = RUN.parent / "sample.png"
stepfold(f"sample emoji-student {shlex.join(PROMPTS)} --steps 1 --out {SAMPLE}")
display(Image(SAMPLE, width=576))

# %% [markdown]
# ## Export
#
# A student becomes a folder that diffusers loads without stepfold.

# %%
FOLDER = RUN.parent / "pipeline"
stepfold(f"export emoji-student --to pipeline --out {FOLDER}")

# %%
from diffusers import SanaSprintPipeline  # noqa: E402

pipe = SanaSprintPipeline.from_pretrained(FOLDER)
pipe.set_progress_bar_config(disable=True)
images = pipe(
    PROMPTS[0], height=64, width=64, num_inference_steps=1, intermediate_timesteps=None, guidance_scale=3.0,
    max_sequence_length=16, use_resolution_binning=False, generator=torch.Generator().manual_seed(0),
).images  # fmt: skip
display(images[0].resize((192, 192)))

# %% [markdown]
# The README in the folder has this call too. [A four-step LoRA of your model](four-step-lora.md) goes the same way with
# a published model.
