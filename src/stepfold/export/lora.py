"""A LoRA student as one file for other programs, or as a folder for PEFT."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.beside import is_retimed, write_file
from stepfold.export.carried import ENDS, with_loras
from stepfold.export.casting import Half, rounded_file
from stepfold.export.comfyui import Keys
from stepfold.export.lora_keys import of_text_encoders, renamed
from stepfold.export.pipeline import metrics_beside, write_cards
from stepfold.students.card import Card, read_card
from stepfold.students.loading import load_student
from stepfold.students.lora import LORA_WEIGHTS, check_file
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

ADAPTER = "adapter_model.safetensors"


def export_lora(
    folder: Path, out: Path, keys: Keys = "diffusers", *, whole: bool = False, dtype: Half | None = None
) -> None:
    """A LoRA student as one file for its teacher's pipeline or other programs, or as a folder for PEFT.

    Args:
        folder: the student's.
        out: the file, or the folder for PEFT.
        keys: whose names.
        whole: whether the file carries the teacher's own LoRAs too, and is for the base model alone.
        dtype: that the matrices are rounded to; None keeps theirs.

    Raises:
        UserError: the student has all weights of its own, or its network has no names of that tool's; or the teacher's
            own LoRAs cannot be carried.
    """
    card = read_card(folder)
    if not card.lora_rank:
        raise UserError(
            f"{folder} has all weights of its own and no LoRA; use --to pipeline, or train a LoRA (--lora 64) where "
            "the family has them"
        )
    if more := card.lora_parts:
        raise UserError(f"{folder} has another LoRA for {', '.join(more)}; use the folder, as its README says")
    check_file(file := folder / LORA_WEIGHTS)
    if not card.digests and not whole and keys in ("diffusers", "peft"):
        load_student(folder, "cpu", quantise="none")  # of an early card, which does not say what the file should hold
    if whole:
        export_whole(folder, out, keys, dtype)
    elif keys == "peft":
        write_scheduler = partial(shutil.copytree, folder / "scheduler")
        write_peft(out, rounded_file(load_file(file), dtype), card, write_scheduler, metrics_beside(folder))
    elif keys == "diffusers":  # the teacher, which may be large, is not needed
        scheduler = folder / "scheduler" / "scheduler_config.json"
        retimed = scheduler.is_file() and json.loads(scheduler.read_text()).get("num_train_timesteps") == 1
        save = partial(save_file, rounded_file(load_file(file), dtype), metadata={"format": "pt"})
        write_file(out, save if dtype else partial(shutil.copyfile, file), card, keys=keys, retimed=retimed)
    else:
        teacher, _, card = load_student(folder, "cpu", quantise="none")
        weights = renamed(load_file(file), teacher.transformer, teacher.network_part, keys)
        write_lora(out, rounded_file(weights, dtype), card, keys, teacher)


def export_whole(folder: Path, out: Path, keys: Keys, dtype: Half | None = None) -> None:
    """As `export_lora` with `whole`, of a LoRA student.

    Raises:
        UserError: as of `export_lora`.
    """
    card = read_card(folder)
    if not (loras := card.teacher_settings().lora):
        raise UserError(f"{folder}: its teacher had no LoRA to carry; leave --with-loras out")
    teacher, _, card = load_student(folder, "cpu", quantise="none")
    weights = with_loras(load_file(folder / LORA_WEIGHTS), loras, teacher)
    network = {name: value for name, value in weights.items() if name.startswith(f"{teacher.network_part}.")}
    encoders = {name: value for name, value in weights.items() if name not in network}
    if encoders and keys == "peft":
        raise UserError(
            f"{folder}: a LoRA of its teacher changes text encoders, and PEFT's folder is of the network alone; leave "
            "--keys out, or load that LoRA beside the student"
        )
    theirs = card.config | {"teacher": card.config["teacher"] | {"lora": []}}
    card = card.model_copy(update={"config": theirs, "base": "", "loras_in_diffusers": True})
    if keys == "peft":
        write_peft(out, rounded_file(weights, dtype), card, partial(shutil.copytree, folder / "scheduler"))
        return
    if keys != "diffusers":
        encoders = of_text_encoders(encoders, teacher.pipe, keys)
    weights = rounded_file(renamed(network, teacher.transformer, teacher.network_part, keys) | encoders, dtype)
    write_lora(out, weights, card, keys, teacher, of_text=bool(encoders), carried=[str(lora) for lora in loras])


def write_lora(
    out: Path,
    weights: dict[str, Tensor],
    card: Card,
    keys: Keys,
    teacher: PipelineTeacher,
    *,
    of_text: bool = False,
    carried: Sequence[str] = (),
    diffusers: str = "",
    **notes: str,
) -> None:
    """A LoRA's file, its card and its workflow.

    Args:
        out: the file.
        weights: under the names of `keys`.
        card: the student's, as it is sampled from this file.
        keys: whose names.
        teacher: the student's.
        of_text: whether it changes text encoders too.
        carried: the teacher's own LoRAs that are in it.
        diffusers: as of `beside.write_file`.
        notes: what the file says beside the weights.
    """
    save = partial(save_file, weights, metadata={"format": "pt"} | notes)
    per_token = bool(teacher.index.get("expand_timesteps"))
    retimed = is_retimed(teacher)
    write_file(
        out, save, card,
        keys=keys, retimed=retimed, per_token=per_token, of_text=of_text, carried=carried, diffusers=diffusers,
    )  # fmt: skip


def write_peft(
    out: Path,
    weights: Mapping[str, Tensor],
    card: Card,
    write_scheduler: Callable[[Path], object],
    metrics: dict[str, Any] | None = None,
) -> None:
    """A folder that `PeftModel.from_pretrained` reads, with the card and the scheduler.

    Args:
        out: the folder.
        weights: PART.LAYER.lora_A.weight [R, I, ...] and PART.LAYER.lora_B.weight [O, R, ...], at scale 1.
        card: the student's, as it is sampled with this adapter.
        write_scheduler: writes the scheduler's folder.
        metrics: the run's report.json.
    """
    from peft import LoraConfig

    part, _, _ = next(iter(weights)).partition(".")
    layers = sorted(
        {name.removeprefix(f"{part}.").removesuffix(end) for name in weights for end in ENDS if name.endswith(end)}
    )
    (rank,) = {len(value) for name, value in weights.items() if name.endswith(ENDS[0])}
    adapter_config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=layers, base_model_name_or_path=card.teacher, inference_mode=True
    )
    with writing(out) as folder:
        folder.mkdir()
        adapter_config.save_pretrained(str(folder))
        path = folder / "adapter_config.json"  # its layers are a set, in any order
        settings = json.loads(path.read_text(encoding="utf-8")) | {"target_modules": layers}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        state = {f"base_model.model.{name.removeprefix(f'{part}.')}": value for name, value in weights.items()}
        save_file(state, folder / ADAPTER, {"format": "pt"})
        write_scheduler(folder / "scheduler")
        write_cards(folder, card, metrics, adapted=part)
