"""The steps that `step.py` times: ours with each tangent backend, and practice's, on one model and the same draws."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from common import (
    Run,
)
from models import Place, as_cached, open_teacher
from practice import practice_gradient, without_shortcuts

from stepfold.config import Config
from stepfold.maths.blocks import compiled_blocks
from stepfold.objectives.contract import Networks
from stepfold.prompts.cache import ConditionCache
from stepfold.prompts.reading import PromptFile
from stepfold.spaces.records import Pairs
from stepfold.students.sana import SanaStudent
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.choices import keep_freed_memory
from stepfold.training.draws import draw
from stepfold.training.optimisers import make_optimiser
from stepfold.training.precision import student_precision, walk_precision
from stepfold.training.processes import blocks_of
from stepfold.training.stages import Stages
from stepfold.training.states import collect
from stepfold.training.step import move_average
from stepfold.training.terms import add_gradients, terms_of

Side = Literal["practice", "ours"]
TEACHER_UNITS, STUDENT_UNITS, RECOMPUTED_UNITS = 2, 4, 5


@dataclass(frozen=True)
class Work:
    """What all rows have in common."""

    place: Place
    prompts: int
    states: int
    micro_batch: int


@dataclass(frozen=True)
class Row:
    """One way to take the step; `backend` is empty for practice. `walks`: a backward pass for each walk."""

    dtype: str
    backend: str = ""
    compiled: bool = False
    walks: bool = False

    @property
    def name(self) -> str:
        """For people, and the key in the json file."""
        extras = ", compiled" * self.compiled + ", walk by walk" * self.walks
        return f"ours, {self.backend}{extras}, {self.dtype}" if self.backend else self.practice

    @property
    def side(self) -> Side:
        """Whose it is."""
        return "ours" if self.backend else "practice"

    @property
    def practice(self) -> str:
        """The name of practice in the same dtype."""
        return f"practice, {self.dtype}"

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes the blocks' forward again."""
        return self.backend in ("", "block")

    @property
    def floor(self) -> int:
        """In forward units."""
        return TEACHER_UNITS + (RECOMPUTED_UNITS if self.recomputes else STUDENT_UNITS)


@dataclass(frozen=True)
class Bench:
    """What the steps work on; `plain` is the teacher's transformer as practice has it."""

    work: Work
    teacher: SanaTeacher
    plain: Any
    student: SanaStudent
    average: SanaStudent
    optimiser: torch.optim.Optimizer
    prompts: PromptFile
    cache: ConditionCache

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return torch.device(self.work.place.device)


class Precision:
    """The part of accelerate's Accelerator that `update` calls; unlike it, two precisions fit into one process."""

    def __init__(self, device: torch.device, bf16: bool, cached: bool = True) -> None:
        """`cached`: whether autocast keeps its copies of weights until a pass is over; see `distill`."""
        self.device, self.bf16, self.cached = device, bf16, cached

    def autocast(self) -> torch.autocast:
        """As accelerate's."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=self.cached)

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """As accelerate's."""
        loss.backward(**options)


def settings(work: Work, dtype: str) -> Config:
    """Of a step: every state but the first is trained on, no filter, r = 1, so that both sides have all to do."""
    precision = "bf16" if dtype == "bfloat16" else "no"
    return work.place.config(
        "demo",
        [
            f"space.route_steps={work.states}",
            f"training.prompts_per_step={work.prompts}",
            f"training.micro_batch={work.micro_batch}",
            f"training.precision={precision}",
            f"training.walk_precision={precision}",
            "objective=continuous",
            "space.keep_first=false",
            "consistency.r_schedule=none",
            "optimiser.lr=1e-6",
        ],
    )


def open_bench(work: Work, sides: tuple[Side, ...]) -> Bench:
    """Models and inputs; the text encoder and the autoencoder only for practice."""
    keep_freed_memory(torch.device(work.place.device))
    teacher = open_teacher(work.place, with_encoders="practice" in sides)
    plain = None
    if "practice" in sides:
        # practice's filter needs it: the autoencoder has run and is on the device
        teacher.black_latent(teacher.latent_shape)
        plain = without_shortcuts(copy.deepcopy(teacher.transformer) if "ours" in sides else teacher.transformer)
    torch.manual_seed(0)
    student = new_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():  # off the teacher, so that every parameter has a gradient
            parameter += 0.01 * torch.randn_like(parameter) * parameter.square().mean().sqrt().clamp(min=0.01)
    optimiser = make_optimiser(student.parameters(), settings(work, "float32").optimiser)
    average = copy.deepcopy(student).requires_grad_(False)
    return Bench(work, teacher, plain, student, average, optimiser, work.place.prompts, work.place.cache)


def gradient_of(bench: Bench, row: Row) -> Run:
    """Adds the gradient of one step, ours or practice's."""
    device, teacher, student = bench.device, bench.teacher, bench.student
    work = replace(bench.work, micro_batch=bench.work.states - 1) if row.walks else bench.work
    config = settings(work, row.dtype)
    precision: Any = Precision(device, row.dtype == "bfloat16", cached=not row.recomputes)

    def practice(turn: int, stages: Stages) -> None:
        with stages("data"):
            batch = draw(turn, bench.prompts, teacher, config, device)
        with stages("text"):
            condition = as_cached(teacher.encode(batch.prompts))
        practice_gradient(teacher, bench.plain, student, batch, condition, config, stages)

    def ours(turn: int, stages: Stages) -> None:
        with stages("data"):
            batch = draw(turn, bench.prompts, teacher, config, device)
        with stages("text"):
            condition = bench.cache.rows(batch.index).to(device, teacher.dtype)
            if row.compiled:
                condition = condition.padded(teacher.max_tokens)
        networks = Networks(
            student, teacher, tangent=row.backend,
            precision=partial(student_precision, precision, config.training.precision),
            walk_precision=partial(walk_precision, config.training.walk_precision, device, teacher.network),
        )  # fmt: skip
        with stages("teacher"):
            states = collect(["generation"], batch, condition, networks, config)
            teacher.clear_prompt_cache()
        add_gradients(terms_of(config), networks, states, batch.draws, config, turn, precision, stages=stages)

    def run(turn: int, stages: Stages) -> None:
        set_recompute(student, row.recomputes and not row.compiled)
        blocks = [*blocks_of(teacher.network), *blocks_of(student)] if row.compiled else []
        with compiled_blocks(blocks, recompute=row.recomputes):
            ours(turn, stages) if row.backend else practice(turn, stages)

    return run


def step_of(bench: Bench, row: Row) -> Run:
    """A whole step: gradient, clipping, optimiser, moving average; the last three are the same for both sides."""
    gradient, clip = gradient_of(bench, row), settings(bench.work, row.dtype).optimiser.clip

    def run(turn: int, stages: Stages) -> None:
        gradient(turn, stages)
        with stages("optimiser"):
            torch.nn.utils.clip_grad_norm_(bench.student.parameters(), clip)
            bench.optimiser.step()
            bench.optimiser.zero_grad(set_to_none=True)
            move_average(bench.average, bench.student, 0.98)

    return run


def set_recompute(student: SanaStudent, on: bool) -> None:
    """Whether the blocks are checkpointed."""
    if on:
        student.recompute_blocks()
    else:
        cast(Any, student.transformer).disable_gradient_checkpointing()


def example_pairs(bench: Bench) -> Pairs:
    """Pairs of the size of a step's."""
    device, config = bench.device, settings(bench.work, "float32")
    batch = draw(0, bench.prompts, bench.teacher, config, device)
    condition = bench.cache.rows(batch.index).to(device, bench.teacher.dtype)
    networks = Networks(bench.student, bench.teacher)
    return cast(Pairs, collect(["generation"], batch, condition, networks, config)["generation"])


def forward_of(bench: Bench, pairs: Pairs, dtype: str) -> Run:
    """The unit: a plain forward pass of a step's pairs, without a graph."""

    def run(turn: int, stages: Stages) -> None:
        with torch.no_grad(), Precision(pairs.x.device, dtype == "bfloat16").autocast():
            bench.student(pairs.x / bench.teacher.sigma_data, pairs.t, pairs.condition, pairs.guidance)

    return run


def unit_name(dtype: str) -> str:
    """Of the plain forward pass."""
    return f"plain forward, {dtype}"
