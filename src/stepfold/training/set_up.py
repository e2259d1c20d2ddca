"""What a run needs before its first step: networks, critics, optimiser, phases."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from accelerate import Accelerator, AutocastKwargs
from torch import nn

from stepfold.config import Config, phases_of
from stepfold.maths.blocks import compiled_blocks
from stepfold.objectives.contract import Networks, Reward
from stepfold.teachers.contract import Condition, Student, Teacher, deepcopy_sharing
from stepfold.training.choices import TangentChoice, choose_tangent
from stepfold.training.critics import critic_betas, critics_of, new_critics
from stepfold.training.draws import guidance_scales
from stepfold.training.optimisers import add_group, make_optimiser
from stepfold.training.precision import student_precision, walk_precision
from stepfold.training.processes import Processes, blocks_of, shard
from stepfold.training.stages import Stages
from stepfold.training.step import Phase, Run
from stepfold.training.terms import terms_of


@dataclass(frozen=True)
class Made:
    """What `set_up` makes.

    Attributes:
        run: see `Run`.
        modules: what a checkpoint holds, by name.
        shared: name of a module -> names of its tensors that are another's own: frozen, and not saved.
        compiling: a context in which the blocks of all networks are compiled; one that does nothing without.
        sharded: whether the weights are spread over the processes.
        unsharded: a student whose weights are whole, for the result; None where `run`'s are.
    """

    run: Run
    modules: dict[str, nn.Module]
    shared: dict[str, frozenset[str]]
    compiling: AbstractContextManager[None]
    sharded: bool
    unsharded: Student | None


def set_up(
    config: Config,
    teacher: Teacher,
    student: Student,
    condition: Condition,
    accelerator: Accelerator,
    processes: Processes,
    stages: Stages,
    note_tangent: Callable[[str], None],
    make_fake: Callable[[], Student] | None,
    reward: Reward | None = None,
) -> Made:
    """All networks of a run, its optimiser and its phases; arguments as of `distill`, `condition` of any prompt."""
    training, phases = config.training, phases_of(config)
    sharded = training.shard != "none" and processes.count > 1
    critics = new_critics([each for _, each in phases], teacher, accelerator.device, make_fake)
    choices = choose_tangents([each for _, each in phases], teacher, student, condition, processes, critics.values())
    recompute = any(choice.recompute for choice in choices)
    note_tangent("; then ".join(dict.fromkeys(f"{choice.backend} ({choice.reason})" for choice in choices)))
    networks = [student, *(module for module in critics.values() if isinstance(module, Student))]
    if recompute:  # autocast would keep copies of all weights until a pass is over
        cast(Any, accelerator).autocast_handler = AutocastKwargs(cache_enabled=False)
        if not training.compile:
            for network in networks:
                network.recompute_blocks()
    if len(set(guidance_scales(config, teacher))) == 1:
        for network in networks:
            network.freeze_guidance()
    still = [p for p in student.parameters() if not p.requires_grad]
    still += [value for name, value in student.named_buffers() if name in student.shared]  # a quantised teacher's
    average = deepcopy_sharing(student, still).requires_grad_(False)
    unsharded = deepcopy_sharing(student, ()).cpu() if sharded and processes.first else None
    if sharded:
        for network in (student, average):
            shard(network, processes, "log_variance")
        if training.shard == "all":
            shard(teacher.network, processes)
    optimiser = make_optimiser([p for p in student.parameters() if p.requires_grad], config.optimiser)
    for name, module in critics.items():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        add_group(optimiser, name, trained, critic_betas(name, config))
    calls = Networks(
        student,
        teacher,
        critics,
        precision=partial(student_precision, accelerator, training.precision),
        walk_precision=partial(walk_precision, training.walk_precision, accelerator.device, teacher.network),
        average=average,
        reward=reward,
    )
    made_phases = [
        Phase(first, each, terms_of(each), critics_of(each, critics), replace(calls, tangent=choice.backend))
        for (first, each), choice in zip(phases, choices, strict=True)
    ]
    run = Run(config, student, average, optimiser, accelerator, processes, made_phases, stages)
    compiling: AbstractContextManager[None] = nullcontext()
    if training.compile:
        blocks = [block for each in (teacher.network, *networks) for block in blocks_of(each) or [each]]
        compiling = compiled_blocks(blocks, recompute=recompute)
    modules: dict[str, nn.Module] = {"student": student, "average": average, **critics}
    shared = {name: module.shared for name, module in modules.items() if isinstance(module, Student)}
    return Made(run, modules, shared, compiling, sharded, unsharded)


def choose_tangents(
    configs: Sequence[Config],
    teacher: Teacher,
    student: Student,
    condition: Condition,
    processes: Processes,
    critics: Iterable[nn.Module],
) -> list[TangentChoice]:
    """The tangent's backend in each phase; equal settings are tried once."""
    largest = max(teacher.latent_shapes, key=math.prod)
    found: dict[tuple[Any, ...], TangentChoice] = {}
    keys = [(config.objective, config.training) for config in configs]
    for key, config in zip(keys, configs, strict=True):
        if key not in found:
            share = processes.largest_share(config.training.prompts_per_step)
            found[key] = choose_tangent(config, student, condition, largest, share, critics)
    return [found[key] for key in keys]
