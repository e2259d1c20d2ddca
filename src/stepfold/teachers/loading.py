"""From the settings to a teacher; from a folder to a student."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from stepfold import assets
from stepfold.config import Config, TeacherSettings
from stepfold.errors import NonFiniteError, UserError, first_line
from stepfold.teachers.anima import AnimaTeacher
from stepfold.teachers.chroma import ChromaTeacher
from stepfold.teachers.contract import Condition
from stepfold.teachers.dit import DiTTeacher
from stepfold.teachers.ernie_image import ErnieImageTeacher
from stepfold.teachers.flux import FluxTeacher
from stepfold.teachers.flux2 import Flux2Teacher
from stepfold.teachers.flux2_klein import Flux2KleinTeacher
from stepfold.teachers.folders import (
    DEVICE_ERRORS,
    check_folder,
    check_teaches,
    fix_for,
    hub_is_away,
    load_index,
    load_networks,
    load_pipeline,
    part_config,
    unloadable,
)
from stepfold.teachers.hunyuan_image import HunyuanImageTeacher
from stepfold.teachers.hunyuan_video15 import HunyuanVideo15Teacher
from stepfold.teachers.kandinsky5_image import Kandinsky5ImageTeacher
from stepfold.teachers.kandinsky5_video import Kandinsky5VideoTeacher
from stepfold.teachers.krea2 import Krea2Teacher
from stepfold.teachers.live import is_live
from stepfold.teachers.longcat_image import LongCatImageTeacher
from stepfold.teachers.lumina2 import Lumina2Teacher
from stepfold.teachers.modular import ModularParts
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.pixart import PixArtTeacher
from stepfold.teachers.prx import PRXTeacher
from stepfold.teachers.quantised_files import check_plain
from stepfold.teachers.qwen_image import QwenImageTeacher
from stepfold.teachers.sana import SanaTeacher, SprintTeacher
from stepfold.teachers.sana_video import SanaVideoTeacher
from stepfold.teachers.sd3 import SD3Teacher
from stepfold.teachers.stable_diffusion import StableDiffusionTeacher, StableDiffusionXLTeacher
from stepfold.teachers.tokens import TextReader
from stepfold.teachers.wan import WanTeacher
from stepfold.teachers.z_image import ZImageTeacher

FAMILIES: dict[str, type[PipelineTeacher]] = {
    pipeline.__name__: family
    for family in (
        SanaTeacher,
        SprintTeacher,
        SD3Teacher,
        FluxTeacher,
        Flux2KleinTeacher,
        Flux2Teacher,
        PixArtTeacher,
        StableDiffusionTeacher,
        StableDiffusionXLTeacher,
        Lumina2Teacher,
        DiTTeacher,
        WanTeacher,
        QwenImageTeacher,
        ChromaTeacher,
        LongCatImageTeacher,
        Krea2Teacher,
        ZImageTeacher,
        ErnieImageTeacher,
        PRXTeacher,
        SanaVideoTeacher,
        HunyuanVideo15Teacher,
        Kandinsky5ImageTeacher,
        Kandinsky5VideoTeacher,
        HunyuanImageTeacher,
        AnimaTeacher,
    )
    for pipeline in family.pipelines
}
"""Class of a pipeline -> the family that wraps it. A new family is one file and its name here."""


def retimable() -> list[str]:
    """Classes of the pipelines whose networks `stepfold retime` trains: their time embedder is known by itself."""
    return [name for name, family in FAMILIES.items() if family.time_module or "time_embedder" in vars(family)]


NOT_FROM_TEXT = {
    "Inpaint": "it fills a part of an image; give the text-to-image pipeline of its network",
    "Fill": "it fills a part of an image; give the text-to-image pipeline of its network",
    "ControlNet": "it reads a control image beside the text; give the pipeline without the ControlNet",
    "Control": "it reads a control image beside the text; give the text-to-image pipeline",
    "Img2Img": "it starts from an image; load the folder as the text-to-image pipeline and save it again",
    "Edit": "it edits an image; give the text-to-image model",
    "Kontext": "it edits an image; give the text-to-image model",
    "Layered": "it takes an image apart; give the text-to-image model",
    "Redux": "it varies an image; give the text-to-image model",
    "ImageToVideo": "it starts from an image; give the text-to-video model",
    "I2I": "it edits an image; give the text-to-image model",
    "I2V": "it starts from an image; give the text-to-video model",
    "KV": "it caches the keys of images that it edits; load the folder as the pipeline without KV and save it again",
    "Refiner": "it refines an image; give the pipeline that makes it",
    "Upsample": "it enlarges latents; give the pipeline that makes them",
    "ZImageOmni": "it reads images beside the text; give the text-to-image model",
    "Pixel": "it makes pixels, not latents; give the pipeline with an autoencoder",
    "LTX2": "each step moves video and sound together, and a teacher has one of them; give a model of videos alone",
    "Modular": "it is in modular parts that are not known; give a folder with a model_index.json",
}
"""Part of the name of a pipeline's class -> why it is no teacher, and what is."""


def family_of(source: str) -> type[PipelineTeacher]:
    """The family of a pipeline folder or hub id, as its model_index.json says.

    Raises:
        UserError: there is no such pipeline, or no family for it.
    """
    name = load_index(source).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = next((f" ({why})" for kind, why in NOT_FROM_TEXT.items() if kind in str(name)), "")
        raise UserError(f"teacher {source!r} is a {name}{reason}; this version distils {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load_teacher(
    settings: TeacherSettings,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    network_only: bool = False,
    encodes_only: bool = False,
    null: Condition | None = None,
) -> PipelineTeacher:
    """The teacher of a run; `emoji` is the bundled one, loaded like any other.

    `dtype` is the settings' if None; the last three as in `PipelineTeacher`.
    """
    check_plain(source := place_of(settings), family_of(source).network_part)
    teacher = make_teacher(
        source,
        variant=settings.variant,
        device=device,
        dtype=dtype or getattr(torch, settings.dtype),
        height=settings.height,
        width=settings.width,
        sizes=settings.sizes,
        frames=settings.frames,
        max_tokens=settings.max_tokens,
        null_mask=settings.null_mask,
        guidance_kind=settings.guidance,
        network_only=network_only,
        encodes_only=encodes_only,
        null=null,
        loras=[(lora.source, lora.scale) for lora in settings.lora],
        quantised="none" if encodes_only else settings.quantise,
        encoders_quantised=settings.quantise_encoders,
    )
    if settings.guidance_interval:
        teacher.guide_between(*settings.guidance_interval)
    if settings.guidance_rule == "zero_star":
        teacher.guide_from_zero_star()
    if settings.image_column and not teacher.take_images():
        raise UserError(
            f"teacher.image_column is {settings.image_column!r}, but {type(teacher.pipe).__name__} reads no images "
            "here; leave it out"
        )
    return teacher


def load_text_reader(settings: TeacherSettings) -> TextReader | None:
    """What reads the prompts of a teacher, without loading its networks; None where they are classes.

    Raises:
        UserError: as `load_teacher`.
    """
    source = place_of(settings)
    family, index = family_of(source), load_index(source)
    pipe = load_pipeline(
        source,
        index,
        family.pipelines,
        torch.float32,
        False,
        tokenizers_only=True,
        unread=family.unread,
        stand_ins=family.stand_ins,
    )
    return family.reader_in(pipe, settings.max_tokens)


def make_teacher(source: str, **options: Any) -> PipelineTeacher:
    """The teacher of a pipeline folder or hub id; its family's `__init__` says the options.

    Raises:
        UserError: it does not load, or its configs are not what its family takes them for.
    """
    try:
        return family_of(source)(source, **options)
    except (UserError, NonFiniteError, *DEVICE_ERRORS):
        raise
    except Exception as error:  # configs are read in many places here, and each of their numbers may be anything
        raise unloadable(source, error) from error


def choose_objective(config: Config) -> Config:
    """`auto` becomes continuous for a teacher whose time is on [0, 1], discrete for one whose time counts to 1000.

    The continuous objective's tangent contains dF/dt, which sinusoids of 1000 t make large.

    Raises:
        UserError: there is no such teacher, or its network does not load.
    """
    if config.objective != "auto":
        return config
    return config.model_copy(update={"objective": "discrete" if counts_to_thousand(config) else "continuous"})


def counts_to_thousand(config: Config) -> bool:
    """Whether the teacher's network reads a time of 0 to 1000, not of 0 to 1.

    Raises:
        UserError: there is no such teacher, or its network does not load.
    """
    source = place_of(config.teacher)
    family, index = family_of(source), load_index(source)
    try:
        configs = (part_config(source, index, part) for part in (family.network_part, "scheduler"))
        return family.time_scale_of(*configs) >= 10
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise unloadable(source, error) from None


def folder_of(source: str) -> str:
    """The bundled teacher's folder for `emoji`, else the source itself."""
    return str(assets.TEACHER) if source == "emoji" else source


def place_of(settings: TeacherSettings) -> str:
    """Where a teacher is loaded from: its folder or hub id; of a revision or a variant of a hub id, the folder fetched.

    Raises:
        UserError: the hub has no such revision or variant, a folder was to have one, or it or a LoRA is a student's.
    """
    source = folder_of(settings.source)
    for lora in settings.lora:
        place = Path(lora.source)
        check_teaches(place.parent if place.is_file() else place, lora.source)
    if is_live(source):
        return source
    check_teaches(Path(source))
    local = Path(source).exists()
    if local and settings.revision:
        raise UserError(f"teacher.revision is for hub ids, but {source!r} is a folder; leave it out")
    if local or not (settings.revision or settings.variant):
        return source
    hub_is_away()
    try:
        return diffusers.DiffusionPipeline.download(  # type: ignore[arg-type]
            source, revision=settings.revision, variant=settings.variant, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        of = ", ".join(f"{name} {value}" for name in ("revision", "variant") if (value := getattr(settings, name)))
        raise UserError(
            f"teacher {source!r} cannot be fetched in {of} ({first_line(error)}); is there such a one?"
        ) from None


def load_any_pipeline(folder: Path, device: torch.device | str) -> Any:
    """A diffusers text-to-image pipeline of any class, from a folder; safetensors only, no code of its own.

    Raises:
        UserError: the folder is no pipeline, names a class outside diffusers and transformers, or does not load.
    """
    index = check_folder(folder)
    name = index.get("_class_name")
    if not isinstance(name, str) or not isinstance(getattr(diffusers, name, None), type):
        raise UserError(
            f"{folder} is a {name}, which is no pipeline of diffusers {diffusers.__version__}; "
            "a newer diffusers may have it"
        )
    family = FAMILIES.get(name)
    own = [kind for kind in (family.pipelines if family else ()) if issubclass(kind, ModularParts)]
    try:
        networks = load_networks(str(folder), index, torch.float32)
        kind: Any = own[0] if own else diffusers.DiffusionPipeline
        pipe = kind.from_pretrained(folder, use_safetensors=True, **networks)
    except UserError:
        raise
    except Exception as error:  # as in folders.load_pipeline
        raise UserError(f"{folder} does not load: {first_line(error)}; {fix_for(error, folder)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
