"""Preview grids: the teacher beside the student at equal noise."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepfold.evaluation.measure import Sampler, student_sampler, teacher_sampler
from stepfold.evaluation.protocol import counted
from stepfold.randomness import normal
from stepfold.sampling.recipe import Recipe
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

LABEL_WIDTH = 132
NUM_PREVIEWS = 8
NUM_VIDEO_PREVIEWS, NUM_FRAMES = 2, 6


def sample_rows(
    samplers: dict[str, Sampler], noise: Tensor, condition: Condition, guidance: float
) -> dict[str, Tensor]:
    """x_0 [B, ...] of every sampler, from the same noise."""
    scale = torch.full((len(noise),), guidance, device=noise.device)
    return {name: sampler(noise, condition, scale, range(len(noise))) for name, sampler in samplers.items()}


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as 8-bit RGB."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def thinned(filmstrips: Tensor, frames: int, most: int) -> Tensor:
    """Filmstrips [B, 3, H, frames W] with `most` of their frames at even distances, or all of fewer."""
    shown = torch.linspace(0, frames - 1, min(most, frames)).round().long()
    return filmstrips.unflatten(3, (frames, -1))[:, :, :, shown].flatten(3)


def save_grid(rows: dict[str, Tensor], path: Path, cell: int = 96) -> None:
    """One row of pictures a sampler, its name on the left.

    Args:
        rows: name -> pictures [B, 3, H, W] in [0, 1].
        path: of the PNG.
        cell: height of a picture in pixels; its width follows.
    """
    count = max(len(pictures) for pictures in rows.values())
    height, width = next(iter(rows.values())).shape[2:]
    wide = round(cell * width / height)
    longest = max(rows, key=len)
    left = max(LABEL_WIDTH, 16 + int(ImageFont.load_default(13).getlength(longest)))
    grid = Image.new("RGB", (left + wide * count, cell * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, y * cell + cell // 2 - 6), name, fill="black", font_size=13)
        for x, picture in enumerate(pictures):
            grid.paste(to_image(picture).resize((wide, cell), Image.Resampling.LANCZOS), (left + x * wide, y * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as part:
        grid.save(part, format="PNG")


def make_preview(
    folder: Path,
    teacher: PipelineTeacher,
    conditions: Callable[[Sequence[int]], Condition],
    num_prompts: int,
    recipe: Recipe,
    seed: int,
    note: Callable[[str], None],
    *,
    writes: bool = True,
) -> Callable[[Student, int], None]:
    """Draws the teacher at 20 steps and the student at 1, 2 and 4, from the same prompts and noise, into previews/.

    A student that was trained for other numbers of steps is drawn at those.

    One that is there already is not drawn again. Without `writes` nothing is written: a process that only helps another
    one to draw.
    """
    count = NUM_PREVIEWS if teacher.frames == 1 else NUM_VIDEO_PREVIEWS
    shown = [i * num_prompts // count for i in range(min(count, num_prompts))]
    condition = conditions(shown)
    noise = teacher.sigma_data * torch.stack(
        [normal(teacher.latent_shape, seed, "preview noise", i) for i in range(len(shown))]
    ).to(teacher.device)
    reference: dict[str, Tensor] = {}
    shown_steps = [k for k in (1, 2, 4) if k in recipe.times] or sorted(recipe.times)[:1]

    def preview(student: Student, step: int) -> None:
        path = folder / "previews" / f"step_{step:06d}.png"
        if path.exists():  # of before the run was stopped
            return
        if not reference:
            samplers: dict[str, Sampler] = {f"teacher {counted(k)}": teacher_sampler(teacher, k) for k in (20, 1)}
            reference.update(sample_rows(samplers, noise, condition, recipe.guidance))
        ours = {f"student {counted(k)}": student_sampler(student, recipe, k, seed) for k in shown_steps}
        latents = reference | sample_rows(ours, noise, condition, recipe.guidance)
        if not writes:
            return
        rows = {name: thinned(teacher.decode(x0), teacher.frames, NUM_FRAMES) for name, x0 in latents.items()}
        save_grid(rows, path)
        teacher.release_decoder()
        fewest = counted(shown_steps[0]).replace("1 step", "one step")
        error = (latents[f"student {counted(shown_steps[0])}"] - latents["teacher 20 steps"]).square().mean()
        error = error / teacher.sigma_data**2
        note(f"step {step}: preview written, error of {fewest} against the teacher's 20: {error:.3f}")

    return preview
