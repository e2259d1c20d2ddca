"""`stepfold sample`: images of a student."""

import os.path
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal

import typer

from stepfold.commands.options import DeviceOption, StudentArgument
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device
from stepfold.jobs.sampling import run_sample


def sample(
    student: StudentArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One image each.", show_default=False)],
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sampling steps, a network call each. Default: what it was made for.", show_default=False
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="consistency, flow, flow_map or policy. Default: what it was trained for.", show_default=False
        ),
    ] = None,
    gamma: Annotated[
        float, typer.Option(min=0, max=1, help="Share of fresh noise in a flow map's steps; 0 is deterministic.")
    ] = 0.0,
    first_step: Annotated[
        Literal["student", "teacher"],
        typer.Option(help="Who takes the first step. The teacher's is slower, and keeps more of its diversity."),
    ] = "student",
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Guidance scale. Default: the usual one of the student's run.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Reference image of all prompts, for a student trained with images.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG to write; an older one is replaced. Several prompts go side by side. Default: sample.png, or "
            "sample-2.png and so on where that is taken.",
            show_default=False,
        ),
    ] = None,
    race: Annotated[
        Path | None,
        typer.Option(
            help="Let student and teacher sample one prompt side by side, and write it here with the measured times. "
            "Give FILE.gif, or FILE.png for the moment in which the student is done.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Sample images with a student.

    stepfold sample runs/demo "red heart on blue background"

    stepfold sample emoji-student "pizza" "fox" --steps 2 --seed 3 --out two.png

    stepfold sample emoji-student "pizza on white background" --race race.gif

    stepfold sample runs/mine "a fox in snow" --steps 4 --first-step teacher
    """
    from PIL import Image

    from stepfold.display import quiet_libraries
    from stepfold.training.runs import writing

    if out and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is no PNG; give a name that ends in .png")
    if files := [prompt for prompt in prompts if os.path.splitext(prompt)[1] and os.path.isfile(prompt)]:
        raise UserError(f"{files[0]} is a file, and a prompt is a text; give the prompts themselves, each in quotes")
    quiet_libraries()
    if race:
        if image:
            raise UserError("--race samples from text alone; leave out --image")
        if sampler:
            raise UserError("--race uses the student's own sampler; leave out --sampler")
        if first_step == "teacher":
            raise UserError("--race is between student and teacher; leave out --first-step")
        run_race(student, prompts, race, steps=steps, seed=seed, guidance=guidance, device=usable_device(device))
        typer.echo(race)
        return
    pictures = run_sample(
        student, prompts, steps=steps, seed=seed, guidance=guidance, sampler=sampler, gamma=gamma, image=image,
        first_step=first_step, device=usable_device(device),
    )  # fmt: skip
    strip = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    out = out or free_name()
    with writing(out) as part:
        strip.save(part, format="PNG")
    typer.echo(out)


def free_name() -> Path:
    """`sample.png`, or the first of `sample-2.png`, `sample-3.png`, ... that is not there."""
    names = chain(["sample.png"], (f"sample-{number}.png" for number in count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def run_race(
    folder: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    steps: int | None,
    seed: int,
    guidance: float | None,
    device: str,
) -> None:
    """Student and teacher draw nine small images of one prompt, or one large one, and their race is written.

    Args:
        folder: of the student.
        prompts: one string.
        out: a GIF or a PNG.
        steps: of the student; None as in `run_sample`.
        seed: of the first image.
        guidance: scale of both; None for the student's usual one.
        device: of torch.

    Raises:
        UserError: several prompts, another ending, or what the student or its teacher is not fit for.
    """
    from stepfold.display import Display
    from stepfold.students.card import read_card
    from stepfold.web import race
    from stepfold.web.drawing import TEACHER_STEPS, Request, load_models, warm_up

    race.check_name(out)
    if len(prompts) != 1:
        raise UserError(f"--race draws one prompt, and {len(prompts)} are given; give one")
    card = read_card(folder)
    card.check_texts()
    steps = steps or card.usual_steps
    card.recipe.times_for(steps)
    scale = card.recipe.scale_for(guidance)
    models = load_models(folder, None, device)
    request = Request(prompts[0], steps, scale, seed, models.usual_count)
    Display().note(
        f"racing: {request.count} images, {race.REPEATS} times {steps} network calls of "
        f"the student and {TEACHER_STEPS * models.branches} of the teacher, fewer where the teacher is slow"
    )
    warm_up(models)
    race.save_race(race.run_race(models, request), out)
