"""Preview grids: the teacher beside the student at equal noise."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepfold.evaluation.measure import Sampler
from stepfold.teachers.contract import Condition
from stepfold.training.runs import writing

LABEL_WIDTH = 132


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
