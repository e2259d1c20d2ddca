"""Kandinsky 5, images: the pipeline makes them in a list of sizes."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from diffusers import Kandinsky5T2IPipeline
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.kandinsky5 import Kandinsky5Teacher


def as_they_are(height: int, width: int) -> tuple[float, float, float]:
    """`spread` of images."""
    return 1.0, 1.0, 1.0


class Kandinsky5ImageTeacher(Kandinsky5Teacher):
    """Kandinsky5T2IPipeline."""

    pipelines = (Kandinsky5T2IPipeline,)
    output = "image"
    fields: ClassVar[Any] = {
        **Kandinsky5Teacher.fields,
        "visual_cond": ((False,), "it edits images"),
    }

    @override
    def spread(self) -> Callable[[int, int], Sequence[float]]:
        return as_they_are

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """The pipeline has a list of sizes; of another one it makes the nearest of them."""
        if (width, height) not in self.pipe.resolutions:
            sizes = ", ".join(f"{high} x {wide}" for wide, high in self.pipe.resolutions)
            raise UserError(
                f"the image is to be {height} x {width} pixels, but Kandinsky5T2IPipeline makes {sizes} (height x "
                "width) alone; give one of them"
            )
        return super().shape_at(height, width)
