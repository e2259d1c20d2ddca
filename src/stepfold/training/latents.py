"""Latents that a run makes once and keeps: of black pictures, for the brightness filter, and of its images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.images.reading import ImageFolder
from stepfold.randomness import send
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing


def cached_blacks(folder: Path, teacher: PipelineTeacher) -> list[Tensor]:
    """The black latents of the brightness filter, one a shape, made once and kept with the run."""
    path = folder / "blacks.safetensors"
    if not path.exists():
        with writing(path) as part:
            made = [teacher.black_latent(shape).cpu().contiguous() for shape in teacher.latent_shapes]
            save_file({str(i): black for i, black in enumerate(made)}, part)
    kept = load_kept(path, {str(i): tuple(shape) for i, shape in enumerate(teacher.latent_shapes)})
    return [kept[str(i)].to(teacher.device) for i in range(len(kept))]


def load_kept(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors that a run has made once and kept, of the names and shapes that they must have.

    Raises:
        UserError: the file is damaged.
    """
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, it is made again") from None
    found = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    if found != shapes or not all(t.is_floating_point() and bool(t.isfinite().all()) for t in kept.values()):
        raise UserError(f"{path} is damaged (it holds {found}, not finite {shapes}); delete it, it is made again")
    return kept


def image_latents(
    folder: Path, teacher: PipelineTeacher, images: ImageFolder, cache: bool, display: Display
) -> Callable[[list[int]], Tensor]:
    """A function from numbers of images to their clean latents [B, ...], encoded when asked for, or all at once now."""

    def encode(index: Sequence[int]) -> Tensor:
        return teacher.encode_pictures(torch.stack([images.picture(i, teacher.height, teacher.width) for i in index]))

    if not cache:
        return encode
    path = folder / "latents.safetensors"
    if not path.exists():
        display.note(f"encoding {len(images)} images once")
        with display.measuring({"images": len(images)}) as tick, writing(path) as part:
            parts = []
            for start in range(0, len(images), 50):
                index = range(start, min(start + 50, len(images)))
                parts.append(encode(index).cpu())
                tick("images", len(index))
            save_file({"x0": torch.cat(parts)}, part)
    kept = load_kept(path, {"x0": (len(images), *teacher.latent_shape)})["x0"]
    return lambda index: send(kept[index], teacher.device)
