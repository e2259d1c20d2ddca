"""A policy student in plain diffusers: for one step a stock network, for more our scheduler beside a wide one."""

from pathlib import Path

from stepfold.errors import UserError
from stepfold.export.pipeline import use_of, write_cards
from stepfold.students.card import Card
from stepfold.students.loading import load_merged
from stepfold.students.policy import head_of, narrow
from stepfold.students.saving import save_whole
from stepfold.training.runs import writing


def export_collapsed(folder: Path, card: Card, out: Path, num_steps: int) -> None:
    """A policy student for one step as a plain velocity network: one Euler step of it is the whole policy.

    Exact: the policy's end is linear in the velocities, and they are linear in the last layer.

    Args:
        folder: the student's.
        card: its own.
        out: the folder to write.
        num_steps: 1.

    Raises:
        UserError: it is for more steps, each of which has another mean.
    """
    policy, steps = card.recipe.policy, min(card.recipe.times)
    assert policy is not None, "the caller checks"
    if steps > 1:
        raise UserError(
            f"each of this student's {steps} steps has its own mean of the velocities, and a stock network one; "
            "leave --steps out of --to pipeline, which keeps them all for our PolicyScheduler, or train with "
            "policy.steps=1"
        )
    time = card.recipe.times_for(num_steps)[0]
    teacher, student, card = load_merged(folder, "cpu")
    narrow(student.get_submodule("transformer"), head_of(teacher), policy.path(time, 0.0).means[-1])
    student.policy = None
    recipe = card.recipe.model_copy(update={"sampler": "flow", "policy": None})
    with writing(out) as part:
        save_whole(teacher, student, part, recipe)
        changes = {"recipe": recipe, "folded_steps": 1, "merged": card.lora_rank > 0}
        write_cards(part, card.model_copy(update=changes | use_of(teacher, recipe, lora=False)))
