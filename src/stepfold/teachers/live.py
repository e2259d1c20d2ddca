"""A pipeline object of diffusers as a teacher, in the place of a folder: no file of it is read."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepfold.errors import UserError
from stepfold.fingerprints import sampled_sha256
from stepfold.teachers.once import compute_afresh

PREFIX = "live:"
"""How the source of such a teacher begins in settings and cards; the pipeline's class follows."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Precisions of a teacher's network -> `teacher.dtype`."""
SAMPLED = 2**20
"""Of a larger weight so many numbers are read for a fingerprint, at even distances."""
UNTOLD = ("_", "architectures", "dtype", "torch_dtype", "transformers_version")
"""How the names in a config begin that saving changes, or that the weights say too."""

_lent: ContextVar[dict[str, Any] | None] = ContextVar("lent", default=None)


def is_live(source: str) -> bool:
    """Whether a teacher's source stands for a pipeline object."""
    return source.startswith(PREFIX)


def pipeline_at(source: str) -> Any:
    """The pipeline object that a source stands for here; None for a folder or a hub id.

    Raises:
        UserError: it stands for one that is not lent here.
    """
    if not is_live(source):
        return None
    if (pipe := (_lent.get() or {}).get(source)) is None:
        kind = source.removeprefix(PREFIX)
        raise UserError(
            f"teacher {source!r} was a {kind} object in Python and lies in no folder; give stepfold.api the object as "
            "`teacher`"
        )
    return pipe


def source_of(pipe: Any) -> str:
    """What stands for a pipeline object in settings and cards."""
    return f"{PREFIX}{type(pipe).__name__}"


@contextmanager
def lent(pipe: Any) -> Iterator[str]:
    """Around all that uses a pipeline object as a teacher; afterwards it is as before.

    Yields:
        The source that stands for it in settings.

    Raises:
        UserError: see `check_object`.
    """
    check_object(pipe)
    source = source_of(pipe)
    modules = [module for part in networks(pipe).values() for module in part.modules()]
    training = [module.training for module in modules]
    parameters = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(False)]
    devices = {part: next(part.parameters(), torch.empty(0)).device for part in networks(pipe).values()}
    token = _lent.set({**(_lent.get() or {}), source: copy.copy(pipe)})
    try:
        yield source
    finally:
        _lent.reset(token)
        compute_afresh(modules)
        for part, device in devices.items():
            part.to(device)
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)


@contextmanager
def copied(source: str) -> Iterator[None]:
    """Within it a source that stands for an object stands for a float32 copy of it on the CPU, to be changed."""
    if (pipe := pipeline_at(source)) is None:
        yield
        return
    own = copy.copy(pipe)
    for name, network in networks(pipe).items():
        setattr(own, name, on_cpu(network).float())
    compute_afresh([module for network in networks(own).values() for module in network.modules()])
    token = _lent.set({**(_lent.get() or {}), source: own})
    try:
        yield
    finally:
        _lent.reset(token)


def on_cpu(network: nn.Module) -> nn.Module:
    """A copy of a network on the CPU, which takes no memory of its device."""
    memo: dict[int, Any] = {id(buffer): buffer.to("cpu", copy=True) for buffer in network.buffers()}
    for weight in network.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(network, memo)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The networks among a pipeline's parts, by their names."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def check_object(pipe: Any) -> None:
    """Refuses an object that is no pipeline, or whose networks are not plain weights in memory.

    Raises:
        UserError: naming the part, and the usual fix.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(
            f"the teacher is a {type(pipe).__name__}; give a DiffusionPipeline of diffusers, its folder or its hub id"
        )
    for name, network in networks(pipe).items():
        what, weights = f"part {name!r} of this {type(pipe).__name__}", network.state_dict(keep_vars=True)
        parts = {part for weight in weights for part in weight.split(".")}
        if "base_layer" in parts:
            raise UserError(
                f"{what} has LoRAs that are not merged; call pipe.fuse_lora() and pipe.unload_lora_weights() first"
            )
        if "_orig_mod" in parts:
            raise UserError(f"{what} is compiled; give the pipeline as it was before torch.compile")
        if "quantization_config" in config_of(network):
            raise UserError(f"{what} is quantised; load it in bfloat16, and give its folder for teacher.quantise")
        if any(value.is_meta for value in weights.values() if isinstance(value, Tensor)):
            raise UserError(f"{what} is not in memory; call pipe.remove_all_hooks() and pipe.to('cpu') first")
        if any("_hf_hook" in vars(module) for module in network.modules()):
            raise UserError(f"{what} is offloaded; call pipe.remove_all_hooks() first")


def dtype_of(pipe: Any, part: str) -> str:
    """`teacher.dtype` of a pipeline object: the precision of its network.

    Raises:
        UserError: it is another one, such as float16; or the object lacks a part that every teacher needs.
    """
    if lacking := [name for name in (part, "vae", "scheduler") if pipe.components.get(name) is None]:
        raise UserError(f"this {type(pipe).__name__} has no {lacking[0]!r}; load it with all its parts")
    dtype = next(networks(pipe)[part].parameters()).dtype
    if dtype not in DTYPES:
        said = str(dtype).removeprefix("torch.")
        raise UserError(
            f"part {part!r} of this {type(pipe).__name__} is in {said}; call pipe.to(torch.bfloat16) or "
            "pipe.to(torch.float32)"
        )
    return DTYPES[dtype]


def index_of(pipe: Any) -> dict[str, Any]:
    """What model_index.json would say of a pipeline object."""
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in pipe.config.items()}
    return config | {"_class_name": type(pipe).__name__}


def copy_without(pipe: Any, absent: Sequence[str]) -> Any:
    """A pipeline of the same parts, without some of them, and with a scheduler of its own."""
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for part in absent:
        setattr(made, part, None)
    return made


def config_of(part: Any) -> dict[str, Any]:
    """The config of a network or a scheduler, as its folder would have it."""
    return part.config.to_diff_dict() if isinstance(part, PreTrainedModel) else dict(part.config)


def object_fingerprint(pipe: Any, parts: tuple[str, ...]) -> str:
    """Tells pipeline objects apart by the parts whose names begin so: by their weights, and by what others save.

    Of a weight of more than SAMPLED numbers so many are read.
    """
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if part is None or not name.startswith(parts):
            continue
        digest.update(f"{name} {type(part).__name__}\n".encode())
        if isinstance(part, nn.Module):
            config = {key: value for key, value in config_of(part).items() if not key.startswith(UNTOLD)}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for key, value in sorted(part.state_dict().items()):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(sampled(value).contiguous().view(torch.uint8).numpy().tobytes())
            continue
        with tempfile.TemporaryDirectory() as folder:
            part.save_pretrained(folder, safe_serialization=True)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            digest.update(sampled_sha256(files, Path(folder)).encode())
    return digest.hexdigest()


def sampled(weight: Tensor) -> Tensor:
    """Numbers of a weight [min(N, SAMPLED)] on the CPU, the first and the last among them."""
    flat = weight.detach().reshape(-1)
    if len(flat) > SAMPLED:
        flat = flat[torch.arange(SAMPLED, device=flat.device) * (len(flat) - 1) // (SAMPLED - 1)]
    return flat.cpu()


def origin_of_object(part: Any) -> str:
    """The folder or hub id that a pipeline or a text encoder says it was loaded from; empty where it says none."""
    name = part.name_or_path if isinstance(part, DiffusionPipeline | PreTrainedModel) else ""
    return str(name or "")
