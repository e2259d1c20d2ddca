"""Conditions encoded once and kept on disk, so that neither text encoder nor autoencoder is in memory while training.

A folder holds index.json (what was encoded, with what), extras.safetensors (the unconditional branch's condition, the
black latent) and shards of SHARD prompts: the embeddings of their real tokens one after the other, in bfloat16, and
where those of each prompt begin, and a pooled vector a prompt where the teacher takes one; the same of a second text
where it reads one. Shards are memory-mapped and read row by row.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.prompts.reading import Prompts
from stepfold.teachers.contract import Condition, concatenate
from stepfold.training.runs import holds_files, make_folder, writing

SHARD = 4096
INDEX, EXTRAS = "index.json", "extras.safetensors"
SECOND = "second_"
"""What the names of a second text's tensors begin with."""


@dataclass(frozen=True, eq=False)
class ConditionCache:
    """An encoded file of prompts.

    Attributes:
        shards: open safetensors files, SHARD prompts each.
        starts: of each text and shard, int64 [k + 1]: the first token of every prompt, and the end. One text has the
            name "", a second one SECOND.
        null: the unconditional branch's condition, one row, for teachers that have such a branch.
        black: unit-variance latent of a black picture, for the brightness filter.
    """

    shards: list[Any]
    starts: dict[str, list[Tensor]]
    null: Condition | None
    black: Tensor

    def rows(self, index: Sequence[int]) -> Condition:
        """The conditions of the prompts of these numbers, padded to the longest of them; bfloat16, on the CPU."""
        return concatenate([self._row(*divmod(i, SHARD)) for i in index])

    def _row(self, shard: int, row: int, text: str = "") -> Condition:
        first, end = self.starts[text][shard][row : row + 2].tolist()
        names, slices = set(self.shards[shard].keys()), self.shards[shard].get_slice
        pooled = slices(f"{text}pooled")[row : row + 1] if f"{text}pooled" in names else None
        whole = Condition.whole(slices(f"{text}embeds")[first:end][None], pooled)
        return whole if text or SECOND not in self.starts else replace(whole, second=self._row(shard, row, SECOND))


def encode_prompts(
    folder: Path,
    key: dict[str, Any],
    prompts: Prompts,
    encode: Callable[[Sequence[int]], Condition],
    null: Condition | None,
    black: Tensor,
    *,
    batch: int,
    precision: str = "",
    note: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the folder. Whole shards that are there already stay, so a run that was stopped goes on.

    Args:
        folder: new, or of a run that was stopped.
        key: what the result depends on: teacher, encoder, prompts; json values.
        prompts: the prompts.
        encode: numbers of prompts -> their conditions.
        null, black: see `ConditionCache`.
        batch: prompts a call of `encode`.
        precision: of the encoders; a folder is of one. A run may read it at any.
        note: told the size before it starts.
        tick: called with the number of prompts done.

    Raises:
        UserError: the folder holds something else, or the disk is too small.
    """
    index = {**key, "count": len(prompts), "shard": SHARD}
    if (folder / INDEX).exists():
        there = read_index(folder)
        check_key(folder, there, index)
        if (before := there.get("precision", precision)) != precision:
            raise UserError(
                f"{folder} was begun with --dtype {before}, and this is {precision}; give --dtype {before}, or encode "
                "into another folder"
            )
    elif folder.exists() and holds_files(folder):
        raise UserError(f"{folder} is not empty and holds no encoded prompts; choose another --out")
    make_folder(folder)
    first = encode(range(min(batch, len(prompts))))
    each = [text.embeds.shape[2] * float(text.mask.sum()) / len(first) for text in texts_of(first).values()]
    size = 2 * sum(each) * len(prompts)
    note(f"{len(prompts)} prompts, about {size / 2**30:.3g} GiB in {folder}")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the disk of {folder} has {free / 2**30:.3g} GiB left, about {size / 2**30:.3g} are needed; "
            "name a larger disk in --out"
        )
    with writing(folder / INDEX) as part:
        part.write_text(json.dumps(index | {"precision": precision}, indent=2) + "\n")
    extras = {"black": black.cpu().contiguous()}
    if null is not None:
        for text, of in texts_of(null).items():
            tensors = {"embeds": of.embeds, "mask": of.mask} | ({} if of.pooled is None else {"pooled": of.pooled})
            extras |= {f"null_{text}{name}": values.cpu().contiguous() for name, values in tensors.items()}
    with writing(folder / EXTRAS) as part:
        save_file(extras, part)
    for number, begin in enumerate(range(0, len(prompts), SHARD)):
        members = range(begin, min(begin + SHARD, len(prompts)))
        if not (path := shard_path(folder, number)).exists():
            shard = Shard()
            for start in range(members.start, members.stop, batch):
                these = range(start, min(start + batch, members.stop))
                shard.add(encode(these))
                tick(len(these))
            with writing(path) as part:
                save_file(shard.tensors(), part)
        else:
            tick(len(members))


def texts_of(condition: Condition) -> dict[str, Condition]:
    """A condition's texts by what the names of their tensors begin with."""
    return {"": condition} | ({} if condition.second is None else {SECOND: condition.second})


class Shard:
    """The conditions of a shard's prompts, batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, condition: Condition) -> None:
        """Appends a batch."""
        for text, of in texts_of(condition).items():
            real = of.mask.bool()
            self._keep(f"{text}embeds", of.embeds[real].to(torch.bfloat16))
            self._keep(f"{text}starts", real.sum(1))
            if of.pooled is not None:
                self._keep(f"{text}pooled", of.pooled.to(torch.bfloat16))

    def _keep(self, name: str, values: Tensor) -> None:
        self.parts.setdefault(name, []).append(values.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        whole = {name: torch.cat(parts) for name, parts in self.parts.items()}
        return {
            name: torch.cat([values.new_zeros(1), values.cumsum(0)]) if name.endswith("starts") else values
            for name, values in whole.items()
        }


def open_conditions(folder: Path, key: dict[str, Any], count: int | None = None) -> ConditionCache:
    """Opens what `encode_prompts` wrote, for so many prompts if `count` is given.

    Raises:
        UserError: there is none, it is not whole, or it was made with another teacher or from other prompts.
    """
    index = read_index(folder)
    check_key(folder, index, {**key, "count": index.get("count") if count is None else count, "shard": SHARD})
    whole = index.get("count")
    if type(whole) is not int or whole < 1:
        raise UserError(f"{folder / INDEX} is damaged (count is {whole!r}); delete the folder and encode again")
    needed, there = -(-whole // SHARD), len(list(folder.glob("conditions_*.safetensors")))
    if there < needed:
        raise UserError(f"{folder} lacks {needed - there} of {needed} shards; finish it with stepfold prompts encode")
    try:
        shards = [safe_open(shard_path(folder, number), framework="pt") for number in range(needed)]
        names, starts = set(shards[0].keys()), dict[str, list[Tensor]]()
        extras = load_file(folder / EXTRAS)
        for text in [text for text in ("", SECOND) if not text or f"{text}embeds" in names]:
            starts[text] = [shard.get_tensor(f"{text}starts") for shard in shards]
            for number, shard in enumerate(shards):
                count_here, pooled = min(SHARD, whole - number * SHARD), f"{text}pooled" in names
                check_shard(shard, starts[text][number], count_here, pooled, text)
            check_extras(extras, text)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and encode again") from None
    null = null_of(extras, SECOND if SECOND in starts else "")
    return ConditionCache(shards, starts, null, extras["black"])


def null_of(extras: dict[str, Tensor], second: str = "", text: str = "") -> Condition | None:
    """The unconditional branch's condition, if there is one, with its second text where that has a name."""
    if f"null_{text}embeds" not in extras:
        return None
    parts = (extras[f"null_{text}embeds"], extras[f"null_{text}mask"], extras.get(f"null_{text}pooled"))
    return Condition(*parts, null_of(extras, text=second) if second else None)


def check_shard(shard: Any, starts: Tensor, count: int, pooled: bool, text: str = "") -> None:
    """Holds a text of `count` prompts in a shard to what `encode_prompts` writes; the embeddings are not read.

    Raises:
        ValueError: what is wrong with it.
    """
    embeds = shard.get_slice(f"{text}embeds")
    if embeds.get_dtype() != "BF16" or len(embeds.get_shape()) != 2:
        raise ValueError(f"embeds are {embeds.get_dtype()} {embeds.get_shape()}, not BF16 [tokens, width]")
    if starts.dtype != torch.long or starts.shape != (count + 1,):
        raise ValueError(f"starts are {starts.dtype} {list(starts.shape)}, not int64 [{count + 1}]")
    if starts[0] != 0 or starts[-1] != embeds.get_shape()[0] or (starts.diff() < 0).any():
        raise ValueError("starts do not divide the tokens among the prompts")
    if pooled and (shape := shard.get_slice(f"{text}pooled").get_shape())[:1] != [count]:
        raise ValueError(f"pooled vectors are {shape}, not one a prompt")


def check_extras(extras: dict[str, Tensor], text: str = "") -> None:
    """Holds the file of extras to what `encode_prompts` writes of a text.

    Raises:
        ValueError: what is wrong with it.
    """
    if not ("black" in extras and extras["black"].is_floating_point() and extras["black"].isfinite().all()):
        raise ValueError("there is no black picture's latent")
    if f"null_{text}embeds" in extras:
        embeds, mask = extras[f"null_{text}embeds"], extras.get(f"null_{text}mask")
        if embeds.ndim != 3 or len(embeds) != 1 or mask is None or mask.shape != embeds.shape[:2]:
            raise ValueError("the unconditional condition is not one row of embeddings and its mask")
        if not (embeds.is_floating_point() and embeds.isfinite().all()):
            raise ValueError("the unconditional condition is not made of finite numbers")


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder says about itself.

    Raises:
        UserError: it is no folder of encoded prompts.
    """
    for path in sorted(folder.glob("*")):
        if not (path.is_file() or path.is_dir()):  # whoever opens a pipe waits
            raise UserError(f"{path} is no regular file; delete it, then encode again")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} holds no encoded prompts ({error}); make it with stepfold prompts encode") from None
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX} is damaged; delete the folder and encode again")
    return index


def check_key(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a folder that was made from something else.

    Raises:
        UserError: naming what differs.
    """
    differing = [name for name in wanted if there.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        what = {"prompts": "other prompts", "encoder": "another text encoder"}.get(name)
        values = f"another {name} ({there.get(name)!r} there, {wanted[name]!r} now)"
        raise UserError(f"{folder} was encoded with {what or values}; encode again into another folder")


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"conditions_{number:05d}.safetensors"
