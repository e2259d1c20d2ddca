"""Preview grids: the teacher beside the student at equal noise."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from stepfold.evaluation.measure import Sampler, student_sampler, teacher_sampler
from stepfold.evaluation.metrics import relative_error
from stepfold.evaluation.protocol import counted
from stepfold.prompts.reading import Prompts
from stepfold.randomness import normal
from stepfold.sampling.recipe import Recipe
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

LABEL_WIDTH = 132
LEAST_CELL, MOST_CELL = 128, 192  # pixels of a picture in a grid
FONT, PROMPT_LINES = 14, 3
NOTES = "stepfold"  # the text of a PNG that holds what a grid shows
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


def cell_height(height: int) -> int:
    """Pixels at which an image of this height stands in a grid: its own, or a whole multiple or less of it."""
    return min(MOST_CELL, height * max(1, -(-LEAST_CELL // height)))


def wrapped(text: str, width: int, size: int, lines: int) -> list[str]:
    """A text in at most so many lines of a width in pixels; what does not fit ends in three dots."""
    font = ImageFont.load_default(size)
    found: list[str] = []
    words = text.split()
    while words:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        last = len(found) == lines - 1
        if (last and words) or font.getlength(line) > width:
            while line and font.getlength(f"{line}…") > width:
                line = line[:-1]
            line = f"{line.rstrip()}…"
        found.append(line)
        if last:
            break
    return found


def save_grid(
    rows: dict[str, Tensor],
    path: Path,
    cell: int | None = None,
    prompts: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> None:
    """One row of pictures a sampler, its name on the left, the prompts above.

    Args:
        rows: name -> pictures [B, 3, H, W] in [0, 1].
        path: of the PNG.
        cell: height of a picture in pixels, its width follows; None for `cell_height`.
        prompts: B strings, or none.
        notes: kept in the PNG, for `notes_of`.
    """
    count = max(len(pictures) for pictures in rows.values())
    height, width = next(iter(rows.values())).shape[2:]
    cell = cell or cell_height(height)
    wide = round(cell * width / height)
    longest = max(rows, key=len)
    left = max(LABEL_WIDTH, 16 + int(ImageFont.load_default(FONT).getlength(longest)))
    heads = [wrapped(prompt, wide - 10, FONT - 1, PROMPT_LINES) for prompt in prompts]
    top = max((len(head) for head in heads), default=0) * (FONT + 4) + 8 * bool(heads)
    grid = Image.new("RGB", (left + wide * count, top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for x, head in enumerate(heads):
        for y, line in enumerate(head):
            pen.text((left + x * wide + 5, 2 + y * (FONT + 4)), line, fill="#444444", font_size=FONT - 1)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, top + y * cell + cell // 2 - 7), name, fill="black", font_size=FONT)
        for x, picture in enumerate(pictures):
            shown = to_image(picture).resize((wide, cell), Image.Resampling.LANCZOS)
            grid.paste(shown, (left + x * wide, top + y * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = PngInfo()
    if notes:
        kept.add_itxt(NOTES, json.dumps(notes))
    with writing(path) as part:
        grid.save(part, format="PNG", pnginfo=kept)


def notes_of(path: Path) -> dict[str, Any]:
    """What `save_grid` kept in a PNG: {"prompts": [...], "latent_error": {steps: value}}; {} of an unreadable one."""
    try:
        with Image.open(path) as grid:
            notes = json.loads(getattr(grid, "text", {}).get(NOTES, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def make_preview(
    folder: Path,
    teacher: PipelineTeacher,
    conditions: Callable[[Sequence[int]], Condition],
    prompts: Prompts,
    recipe: Recipe,
    seed: int,
    note: Callable[[str], None],
    *,
    writes: bool = True,
    saved: Callable[[Path, int], None] = lambda path, step: None,
) -> Callable[[Student, int], None]:
    """Draws the teacher at 20 steps and the student at 1, 2 and 4, from the same prompts and noise, into previews/.

    A student that was trained for other numbers of steps is drawn at those.

    One that is there already is not drawn again. Without `writes` nothing is written: a process that only helps another
    one to draw. `saved` is called with each new PNG and its step.
    """
    count = NUM_PREVIEWS if teacher.frames == 1 else NUM_VIDEO_PREVIEWS
    shown = [i * len(prompts) // count for i in range(min(count, len(prompts)))]
    texts = [prompts.prompt(i) for i in shown]
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
        ours = {k: student_sampler(student, recipe, k, seed) for k in shown_steps}
        found = sample_rows({f"student {counted(k)}": sampler for k, sampler in ours.items()}, noise, condition,
                            recipe.guidance)  # fmt: skip
        if not writes:
            return
        rows = {
            name: thinned(teacher.decode(x0), teacher.frames, NUM_FRAMES) for name, x0 in (reference | found).items()
        }
        end = reference["teacher 20 steps"]
        errors = {str(k): relative_error(x0, end).mean().item() for k, x0 in zip(ours, found.values(), strict=True)}
        save_grid(rows, path, prompts=texts, notes={"prompts": texts, "latent_error": errors})
        saved(path, step)
        teacher.release_decoder()
        fewest = counted(shown_steps[0]).replace("1 step", "one step")
        error = errors[str(shown_steps[0])]
        note(f"step {step}: preview written, latent error of {fewest} against the teacher's 20: {error:.3f}")

    return preview


def errors_over_steps(folder: Path) -> list[list[float]]:
    """[step, latent error of one step] of every preview of a run that has it, rising."""
    points = []
    for path in sorted((folder / "previews").glob("step_*.png")):
        errors = notes_of(path).get("latent_error")
        value = errors.get("1") if isinstance(errors, dict) else None
        digits = path.stem.removeprefix("step_")
        if isinstance(value, int | float) and digits.isascii() and digits.isdigit():
            points.append([int(digits), float(value)])
    return points
