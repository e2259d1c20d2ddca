"""A flow-map student for one number of steps: a network told one time, which plain diffusers takes Euler steps with."""

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.comfyui import Keys
from stepfold.export.lora import write_lora, write_peft
from stepfold.export.lora_keys import renamed
from stepfold.export.pipeline import SCHEDULER_LINE, how_to_use, use_of, write_cards
from stepfold.export.policy import export_collapsed
from stepfold.sampling.recipe import Recipe
from stepfold.students.card import Card, read_card, student_folder
from stepfold.students.folding import fold, fold_targets
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import LORA_WEIGHTS
from stepfold.students.sana import SanaStudent
from stepfold.students.saving import save_whole
from stepfold.teachers.conventions import FLOWS, in_words, levels_name, sigmas_of
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import TrigFlowSchedule
from stepfold.training.runs import writing

OTHER_NAMES = "For plain diffusers export it under its names: `--keys diffusers`.\n"


def export_folded(folder: Path, out: Path, num_steps: int) -> None:
    """A flow-map student as a whole pipeline folder for exactly `num_steps` deterministic steps; a policy for one.

    A network that reads times in [0, 1] counts them to 1000 from then on, where its pipeline can say so.

    Raises:
        UserError: the student is no flow map, its card does not list that many steps, or its pipeline cannot take them.
    """
    if (card := read_card(folder)).recipe.policy:
        export_collapsed(folder, card, out, num_steps)
        return
    recipe = folded_recipe(card, num_steps)
    teacher, student, card = load_merged(folder, "cpu")
    times = recipe.times[num_steps]
    check_times(teacher, times)
    predict, scale = counting_to_thousand(teacher, student)
    fold(student, *change_of(teacher, student, predict, card, times))
    with writing(out) as part:
        save_whole(teacher, student, part, recipe, scale)
        config = card.config | {"student": card.config["student"] | {"times": "one"}}
        changes = {"recipe": recipe, "config": config, "folded_steps": num_steps, "merged": card.lora_rank > 0}
        use = use_of(teacher, recipe, lora=False)
        use["conventions"] |= conventions_of_fold(teacher, times)
        write_cards(part, card.model_copy(update=changes | use))


def conventions_of_fold(teacher: PipelineTeacher, times: Sequence[float]) -> dict[str, str]:
    """What the card says of a folded network where that differs from its teacher's, whose class may be another one."""
    said = {"timesteps of the network": f"in [0, 1000], {teacher.rises_to} at 1000"}
    if not isinstance(teacher.schedule, TrigFlowSchedule):
        return said
    return said | {
        "guidance scale s and weight w": "guidance is in the weights; guidance_scale=1 turns the pipeline's own off",
        "output of the network": FLOWS[teacher.rises_to],
        levels_name(len(times)): in_words(sigmas_of(times)),
    }


def check_times(teacher: PipelineTeacher, times: Sequence[float]) -> None:
    """Refuses times that the student's pipeline would not take: one that is given no noise levels has its own.

    Raises:
        UserError: see above.
    """
    if "sigmas" in teacher.student_call(times, 1.0, "flow"):
        return
    own = teacher.student_times(len(times), "flow")
    if any(abs(a - b) > 1e-6 for a, b in zip(own, times, strict=True)):
        raise UserError(
            f"{type(teacher.pipe).__name__} takes no noise levels, and its scheduler's own are not this student's; "
            "use stepfold sample, or train a LoRA, which goes with the teacher's scheduler"
        )


def counting_to_thousand(teacher: PipelineTeacher, student: Any) -> tuple[Predict, float]:
    """How the network is called once it is folded, and what its time then counts to; changes the teacher's scheduler.

    With times in [0, 1] the inputs of the last layer are nearly the same at all times: the fold of eight steps would
    ask for a change 10,000 times the weight.
    """
    predict = student.predict
    scale = getattr(predict, "keywords", {}).get("time_scale", 1000.0)
    if scale == 1.0 and teacher.time_field:
        student.transformer.register_to_config(**{teacher.time_field: 1000.0})
    elif scale == 1.0 and not isinstance(student, SanaStudent):  # re-timed: its scheduler said so
        scheduler = teacher.pipe.scheduler
        teacher.pipe.scheduler = type(scheduler).from_config(scheduler.config, num_train_timesteps=1000)
    if scale == 1.0:
        predict = partial(predict.func, *predict.args, **predict.keywords | {"time_scale": 1000.0})
    return predict, 1000.0


def export_folded_lora(folder: Path, out: Path, num_steps: int, keys: Keys = "diffusers") -> None:
    """A flow-map LoRA student as one file for exactly `num_steps` deterministic steps.

    The time embedder's last layer gets matrices too, of the others' rank, filled up with zeros: diffusers scales all
    by one number.

    Raises:
        UserError: the student is no flow map or no LoRA, its card does not list that many steps, or its rank is too
            small for them; or its network has no names of `keys`.
    """
    recipe = folded_recipe(read_card(folder), num_steps)
    teacher, student, card = load_student(folder, "cpu", quantise="none")
    if not card.lora_rank:
        raise UserError(f"{folder} has all weights of its own and no LoRA; use --to pipeline --steps {num_steps}")
    predict: Any = student.predict
    name, change = change_of(teacher, student, predict, card, recipe.times[num_steps])
    rank = num_steps - 1
    if rank > card.lora_rank:
        raise UserError(
            f"{num_steps} steps need a LoRA of rank {rank} or more, and this one has {card.lora_rank}; "
            "export for fewer steps, or use --to pipeline"
        )
    down, up = matrices(change, card.lora_rank)
    prefix = f"{teacher.network_part}.{name}"
    weights = load_file(student_folder(folder) / LORA_WEIGHTS)
    weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    use = use_of(teacher, recipe, lora=True)
    card = card.model_copy(update={"recipe": recipe, "folded_steps": num_steps, **use})
    if keys == "peft":
        write_peft(out, weights, card, teacher.lora_scheduler(recipe.sampler).save_config)
        return
    how = {"scheduler": use["scheduler"], "call": use["calls"][num_steps], "times": recipe.times[num_steps]}
    weights = renamed(weights, teacher.transformer, teacher.network_part, keys)
    use_it = OTHER_NAMES if keys != "diffusers" else call_of_file(card, out, teacher, recipe)
    write_lora(out, weights, card, keys, teacher, diffusers=use_it, stepfold=json.dumps(how))


def call_of_file(card: Card, out: Path, teacher: PipelineTeacher, recipe: Recipe) -> str:
    """How plain diffusers samples with a folded LoRA's file, beside which there is no scheduler."""
    own, scheduler = teacher.pipe.scheduler.config, teacher.lora_scheduler(recipe.sampler)
    parameters = inspect.signature(type(scheduler).__init__).parameters
    changes = {
        name: value
        for name, value in scheduler.config.items()
        if name in parameters and value != own.get(name, parameters[name].default)
    }
    arguments = "".join(f", {name}={value!r}" for name, value in changes.items())
    loaded = SCHEDULER_LINE.format(scheduler=card.scheduler, name=json.dumps(str(out)))
    made = f"pipe.scheduler = {card.scheduler}.from_config(pipe.scheduler.config{arguments})"
    return f"{how_to_use(card, str(out)).replace(loaded, made)}\n"


def folded_recipe(card: Card, num_steps: int) -> Recipe:
    """How a student for `num_steps` alone is sampled.

    Raises:
        UserError: the student is no flow map, or its card does not list that many steps.
    """
    if card.recipe.policy:
        raise UserError("a policy student's last layer has no place in a LoRA file; use --to pipeline")
    if card.recipe.sampler != "flow_map":
        raise UserError(
            f"--steps is for flow maps, and this student is for {card.recipe.sampler} sampling"
            + (f", folded for {card.folded_steps} steps; fold the run's own student" if card.folded_steps else "")
            + "; leave --steps out"
        )
    return card.recipe.model_copy(update={"sampler": "flow", "times": {num_steps: card.recipe.times_for(num_steps)}})


def change_of(
    teacher: PipelineTeacher, student: Any, predict: Predict, card: Card, times: tuple[float, ...]
) -> tuple[str, Tensor]:
    """See `fold_targets`."""
    condition = teacher.encode([str(card.example)]).expand(len(times))
    return fold_targets(student, predict, times, condition, teacher.latent_shape)


def matrices(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A LoRA's matrices down [rank, H] and up [D, rank], whose product is the change [D, H]."""
    u, size, v = torch.linalg.svd(change, full_matrices=False)
    count = min(rank, len(size))
    root = size[:count].sqrt()
    down, up = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    down[:count], up[:, :count] = root[:, None] * v[:count], u[:, :count] * root
    return down.float().contiguous(), up.float().contiguous()
