"""Images of a student, from its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepfold.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from PIL import Image


def run_sample(
    folder: Path,
    prompts: str | Sequence[str],
    *,
    steps: int | None,
    seed: int,
    guidance: float | None,
    device: str,
    sampler: str | None = None,
    gamma: float = 0.0,
    image: "Path | Image.Image | None" = None,
    first_step: str = "student",
) -> "list[Image.Image]":
    """Pictures of a student, one a prompt; the same as its pipeline's with the same noise.

    Args:
        folder: of the student.
        prompts: B strings, or one.
        steps: network calls per picture; None for what the student was made for, the first of its run's
            `evaluation.steps`, or 1.
        seed: of the noise.
        guidance: scale that the student is told; None for its usual one.
        device: of torch.
        sampler: its name; None for the student's own.
        gamma: share of fresh noise in a flow map's steps, in [0, 1].
        image: reference image of all prompts, for a student that was trained with images; a file or a picture.
        first_step: `student`, or `teacher`, which is loaded too then.

    Raises:
        UserError: there are no prompts, the folder is no student, or it was not trained for this scale, sampler, gamma,
            number of steps, or with an image, or with none.
        NonFiniteError: it samples NaN or infinity.
    """
    import torch

    from stepfold.evaluation.measure import hybrid_sampler, student_sampler
    from stepfold.evaluation.preview import to_image
    from stepfold.images.files import read_picture
    from stepfold.randomness import normal
    from stepfold.students.card import read_card
    from stepfold.students.loading import load_student
    from stepfold.teachers.loading import load_teacher

    prompts = as_texts(prompts)
    check_asked(steps, first_step, gamma)
    card = read_card(folder)
    card.check_image(image is not None)
    asked = card.recipe.sampled_by(sampler)
    asked.gamma_for(gamma)  # refused before anything is loaded
    scale = asked.scale_for(guidance)
    pipeline, student, card = load_student(folder, device)
    recipe = card.recipe.sampled_by(sampler)
    pictures = None if image is None else [read_picture(image, pipeline.height, pipeline.width)] * len(prompts)
    condition = pipeline.encode(prompts, pictures)
    shape = pipeline.latent_shape
    noise = torch.stack([normal(shape, seed, "sample", i) for i in range(len(prompts))])
    count = steps or card.usual_steps
    if first_step == "teacher":
        teacher = load_teacher(card.teacher_settings(), device)
        drawn_by = hybrid_sampler(teacher, student, recipe, count, seed)
    else:
        drawn_by = student_sampler(student, recipe, count, seed, gamma)
    x0 = drawn_by(
        pipeline.sigma_data * noise.to(device),
        condition,
        torch.full((len(prompts),), scale, device=device),
        range(len(prompts)),
    )
    if not bool(x0.isfinite().all()):
        raise NonFiniteError(
            f"the student {folder} samples numbers that are not finite, so there is no image; its weights are damaged, "
            "or its run went wrong: copy the student folder again, or look at the run's report"
        )
    return [to_image(picture) for picture in pipeline.decode(x0)]


def as_texts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list; a single text is one prompt.

    Raises:
        UserError: there are none, or one is no text.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not texts:
        raise UserError("there are no prompts; give a text, or a list of them")
    if others := [each for each in texts if not isinstance(each, str)]:
        raise UserError(f"prompts holds {others[0]!r}, which is no text; give texts alone")
    return texts


def check_asked(steps: int | None, first_step: str, gamma: float) -> None:
    """Refuses arguments of `run_sample` that are none, or do not go together.

    Raises:
        UserError: naming the first.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}, and a picture takes one or more; leave it out for the student's own number")
    if first_step not in ("student", "teacher"):
        raise UserError(f"first_step is {first_step!r}; give 'student' or 'teacher'")
    if first_step == "teacher" and gamma:
        raise UserError("--gamma adds fresh noise to the student's own steps alone; leave it or --first-step out")
