"""What all sections of settings have in common, and the smallest of them: a LoRA and its scale."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST = 1e9
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the settings: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reason(cls, value: Any, info: ValidationInfo) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if info.field_name != "seed" and any(isinstance(n, int | float) and abs(n) > LARGEST for n in numbers):
            raise ValueError(f"no setting is larger than {LARGEST:g}; give a smaller number")
        return value


SCALE = re.compile(r"(?P<source>.+):(?P<scale>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE | re.DOTALL)
"""FILE:0.8; a colon before anything but a number is part of the name."""


class LoraSettings(Section):
    """A LoRA, and how much of its change the teacher gets."""

    source: str = Field(min_length=1, description="safetensors file, folder or hub id")
    scale: float = Field(default=1.0, description="of the change that it makes; 1: as its file says")

    @field_validator("scale")
    @classmethod
    def _does_something(cls, scale: float) -> float:
        if not scale:
            raise ValueError("a LoRA with scale 0 changes nothing; leave it out")
        return scale

    def __str__(self) -> str:
        return self.source if self.scale == 1 else f"{self.source}:{self.scale!r}"


def lora_of(given: Any) -> Any:
    """FILE or FILE:SCALE as the fields of `LoraSettings`; a file that has such a name is meant as a whole."""
    if not isinstance(given, str):
        return given
    found = SCALE.fullmatch(given)
    try:
        whole = not found or Path(given).exists()
    except (OSError, ValueError):  # a path that no file can have
        whole = False
    return {"source": given} if whole or not found else found.groupdict()


def check_quantised(config: Any) -> None:
    """Refuses networks with all weights of their own beside a quantised teacher; `config` is `config.Config`.

    Raises:
        ValueError: which, and the way out.
    """
    way_out = f"but teacher.quantise={config.teacher.quantise} leaves no weights to train;"
    if config.teacher.quantise != "none" and not config.student.lora:
        raise ValueError(f"student.lora is 0, {way_out} give student.lora=64, or teacher.quantise=none")
    if config.teacher.quantise != "none" and config.training.compile:
        raise ValueError(
            f"training.compile is not tested with teacher.quantise={config.teacher.quantise}; give "
            "training.compile=false, or teacher.quantise=none"
        )
    if config.teacher.quantise != "none" and config.fake.updates and config.fake.kind == "whole":
        raise ValueError(f"fake.kind is whole, {way_out} give fake.kind=lora, or teacher.quantise=none")
