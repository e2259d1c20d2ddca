"""The form that plans, starts, stops and resumes runs, above the runs; it is there with `--allow-training` alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from stepfold.config import preset_names
from stepfold.web import markup
from stepfold.web.training import BUNDLED, Training, plan, resume, start, states, stop, wishes_of

PLANNING = "Planning: some steps of this run in a folder that is thrown away. It takes a minute or more."
NUMBERS = ("Optimiser steps", "LoRA rank, 0: all weights", "Size in pixels", "Learning rate")


def training_form(training: Training, run: Any, timer: Any, in_words: Callable[[], Any], private: Any) -> None:
    """Builds it.

    Args:
        training: what it may start.
        run: the control that chooses the run to stop or resume.
        timer: ticks while the tab is seen.
        in_words: as of the page.
        private: as of the page.
    """
    with gr.Accordion("Start a run", open=False, elem_id="start-a-run"):
        with gr.Row():
            name = gr.Textbox("", label="Name of the run", max_length=64, min_width=150)
            teacher = gr.Dropdown(list(training.teachers), value=training.teachers[0], label="Teacher", min_width=150)
            named = [(path or "bundled", path) for path in training.prompts]
            prompts = gr.Dropdown(named, value=BUNDLED, label="Prompts", min_width=150)
            preset = gr.Dropdown(preset_names(), value="demo", label="Preset", min_width=150)
        with gr.Row():
            numbers = [gr.Textbox("", label=label, min_width=150, placeholder="the preset's") for label in NUMBERS]
        with gr.Row(elem_id="training-buttons"):
            to_plan, to_start = (gr.Button(text, size="sm", min_width=80) for text in ("Plan", "Start"))
            to_stop, to_resume = (
                gr.Button(text, size="sm", min_width=80) for text in ("Stop the chosen run", "Resume the chosen run")
            )
        said = gr.HTML(markup.note("Plan a run first; then start it."), elem_id="training-said")
        state = gr.HTML(elem_id="training-state")
    wishes = [name, teacher, prompts, preset, *numbers]
    handlers = Handlers(training, in_words)
    alone = {"concurrency_id": "training", "concurrency_limit": 1, **private}
    to_plan.click(handlers.plan, wishes, said, **alone)
    to_start.click(handlers.start, wishes, [said, state], **alone)
    to_resume.click(partial(handlers.of_run, resume, "resumes"), run, [said, state], **alone)
    at_once = {"concurrency_id": "stopping", "concurrency_limit": 1, **private}
    to_stop.click(partial(handlers.of_run, stop, "stops after its step, and leaves a checkpoint"), run, [said, state],
                  **at_once)  # fmt: skip
    timer.tick(handlers.state, None, state, **at_once)


class Handlers:
    """What the buttons do; each returns what the page shows."""

    def __init__(self, training: Training, in_words: Callable[[], Any]) -> None:
        self.training, self.in_words = training, in_words

    def state(self) -> str:
        """The runs that the page started."""
        return markup.started(states(self.training))

    def plan(self, *values: Any) -> Iterator[str]:
        """Says that it takes a while, then what `stepfold plan` says."""
        with self.in_words() as said:
            wishes = wishes_of(self.training, *values)
            yield markup.note(PLANNING)
            yield markup.plan_view(wishes.name, plan(self.training, wishes))
        if said.text:
            yield markup.note(said.text)

    def start(self, *values: Any) -> tuple[str, str]:
        """Starts what was planned."""
        with self.in_words() as said:
            wishes = wishes_of(self.training, *values)
            start(self.training, wishes)
            return markup.note(f"{wishes.name} starts; choose it above once it is in the list."), self.state()
        return markup.note(said.text), self.state()

    def of_run(self, act: Callable[[Training, Any], None], done: str, name: Any) -> tuple[str, str]:
        """Stops or resumes the chosen run."""
        with self.in_words() as said:
            act(self.training, name)
            return markup.note(f"{name} {done}."), self.state()
        return markup.note(said.text), self.state()
