"""What all sections of settings have in common, and the teacher's: its source, its LoRAs, how it is called."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST = 1e9
Beta = Annotated[float, Field(ge=0, lt=1)]


CARD = "stepfold.json"
"""The card in a student's folder; see `students.card`."""


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

    source: str = Field(min_length=1, description="safetensors file, folder or hub id; emoji-fluent is bundled")
    scale: float = Field(default=1.0, description="of the change that it makes; 1: as its file says")

    @field_validator("scale")
    @classmethod
    def _does_something(cls, scale: float) -> float:
        if not scale:
            raise ValueError("a LoRA with scale 0 changes nothing; leave it out")
        return scale

    def __str__(self) -> str:
        return self.source if self.scale == 1 else f"{self.source}:{self.scale!r}"


def list_of(setting: str) -> Callable[[Any], Any]:
    """Refuses a single number or name in the place of a list, with the way to give it."""

    def check(given: Any) -> Any:
        if isinstance(given, int | float | str):
            shown = given if isinstance(given, str) else f"{given:g}"
            raise ValueError(f"a single value is no list; give --set '{setting}=[{shown}]'")
        return given

    return check


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


Pixels = Annotated[int, Field(gt=0, le=65536)]
NoiseLevel = Annotated[float, Field(ge=0, le=1)]


class TeacherSettings(Section):
    """Which teacher, and how it is called."""

    source: str = Field(default="emoji", description="'emoji' (bundled), a diffusers pipeline folder, or a hub id")
    revision: str | None = Field(
        default=None, description="of a hub id: branch, tag or commit; default: its main branch"
    )
    variant: str | None = Field(
        default=None,
        description="of the weights' files, for example fp16 (model.fp16.safetensors); default: the plain ones",
    )
    lora: tuple[LoraSettings, ...] = Field(
        default=(),
        description="LoRAs merged into the teacher's weights, one after the other: safetensors files, folders or hub "
        "ids, each with a scale where it is not 1: `[style.safetensors:0.8, OWNER/NAME]`",
    )
    guidance: Literal["auto", "classifier_free", "embedded", "none"] = Field(
        default="auto", description="how the teacher takes guidance; auto reads it from the network's config"
    )
    guidance_interval: tuple[NoiseLevel, NoiseLevel] | None = Field(
        default=None,
        description="flow-matching noise levels, [lowest, highest] in [0, 1], between which classifier-free guidance "
        "acts; elsewhere the teacher follows its prompt alone, at half the cost, for more diverse images",
    )
    guidance_rule: Literal["pipeline", "zero_star"] = Field(
        default="pipeline",
        description="`pipeline`, classifier-free guidance as the teacher's pipeline has it; `zero_star`, with the "
        "branch without a prompt scaled towards the other (CFG-Zero*)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the teacher's weights; bfloat16 halves them, and calls to them run under autocast. A student's "
        "own weights stay in float32; text encoders and autoencoder in its folder have the teacher's",
    )
    quantise: Literal["none", "int8", "fp8", "nf4"] = Field(
        default="none", description="of the weights beneath a LoRA: int8 and fp8 take a byte each, nf4 half a byte"
    )
    quantise_encoders: Literal["none", "int8", "fp8", "nf4"] = Field(
        default="none",
        description="of the text encoders' weights, in the same ways; students have the plain ones",
    )
    null_mask: Literal["own", "prompt"] = Field(
        default="own",
        description="mask of the unconditional branch: its own (diffusers) or the prompt's (public training code)",
    )
    height: Pixels | None = Field(default=None, description="pixels; default: what the transformer was trained on")
    width: Pixels | None = Field(default=None, description="pixels")
    sizes: tuple[tuple[Pixels, Pixels], ...] | None = Field(
        default=None,
        min_length=1,
        description="sizes to train at, [height, width] in pixels, one drawn per step; previews and samples are still "
        "of height and width. Default: those alone",
    )
    frames: int | None = Field(
        default=None, ge=1, le=65536, description="of a video; default: the pipeline's own; for pictures leave it out"
    )
    max_tokens: int | None = Field(
        default=None, ge=2, le=4096, description="longest prompt, in tokens; default: the pipeline's own"
    )
    image_column: str | None = Field(
        default=None,
        description="the column of the prompts' table with the path of each prompt's image: of FLUX.2 a reference, of "
        "Wan 2.2 TI2V-5B the first frame; default: no images",
    )

    def plain(self) -> "TeacherSettings":
        """The same with the weights of its files."""
        return self.model_copy(update={"quantise": "none", "quantise_encoders": "none"})

    @field_validator("guidance_interval")
    @classmethod
    def _rises(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given and given[0] >= given[1]:
            raise ValueError(f"{list(given)} is no interval; give the lower level first, for example [0.1, 0.8]")
        return given

    @field_validator("lora", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        """Takes one, as settings of earlier versions have it, and none."""
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        return [lora_of(each) for each in several]


def check_quantised(config: Any) -> None:
    """Refuses what needs the plain weights of a quantised teacher; `config` is `config.Config`.

    Raises:
        ValueError: which, and the way out.
    """
    encoders = config.teacher.quantise_encoders
    if encoders != "none" and config.teacher.lora and not config.student.lora:
        raise ValueError(
            f"a student of all weights is saved with plain text encoders, and teacher.quantise_encoders={encoders} "
            "leaves none with teacher.lora merged in; give student.lora=64, or teacher.quantise_encoders=none"
        )
    way_out = f"but teacher.quantise={config.teacher.quantise} leaves no weights to train"
    if config.teacher.quantise != "none" and not config.student.lora:
        raise ValueError(f"student.lora is 0, {way_out}; give student.lora=64, or teacher.quantise=none")
    if config.teacher.quantise != "none" and config.training.compile:
        raise ValueError(
            f"training.compile is not tested with teacher.quantise={config.teacher.quantise}; give "
            "training.compile=false, or teacher.quantise=none"
        )
    if config.teacher.quantise != "none" and config.fake.updates and config.fake.kind == "whole":
        raise ValueError(f"fake.kind is whole, {way_out}; give fake.kind=lora, or teacher.quantise=none")
