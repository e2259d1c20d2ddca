"""A bank of couplings on disk: the ends of the teacher's trajectories, each with the noise that it began with.

A folder holds index.json (what the ends depend on) and shards of SHARD ends. The noise is not stored: it is a named
random stream of a seed and a sample number, and a shard has its checksum. Beside each shard lies a json with the file's
sha256; a shard counts only with it, so that a bank that was stopped anywhere goes on.
"""

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.randomness import normal
from stepfold.training.runs import holds_files, make_folder, writing

SHARD, INDEX = 512, "index.json"
LARGEST = 6e4  # of an end in float16
SPREAD = 5.0  # of the noise's standard deviation: seven of its own
TENSORS = ("x0", "guidance", "sample", "noise_crc")


@dataclass(frozen=True)
class Rows:
    """Couplings of a bank.

    Attributes:
        x0: ends [B, ...], float32, of standard deviation sigma_data.
        noise: that their trajectories began with [B, ...], of standard deviation sigma_data.
        guidance: scales [B].
        prompt: B numbers of prompts in their file.
    """

    x0: Tensor
    noise: Tensor
    guidance: Tensor
    prompt: list[int]


@dataclass(frozen=True, eq=False)
class Bank:
    """An open bank.

    Attributes:
        folder: where it lies.
        index: what index.json says.
        shards: open safetensors files.
    """

    folder: Path
    index: dict[str, Any]
    shards: list[Any]

    def __len__(self) -> int:
        return int(self.index["count"])

    def fingerprint(self) -> str:
        """Tells banks apart: by the sums of their shards."""
        files = [shard_path(self.folder, number).with_suffix(".json") for number in range(len(self.shards))]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def rows(self, samples: Sequence[int]) -> Rows:
        """The couplings of these sample numbers; ends are read from the disk, noise is drawn again."""
        places = [divmod(sample, SHARD) for sample in samples]
        slices = [(self.shards[shard], row) for shard, row in places]
        return Rows(
            torch.cat([shard.get_slice("x0")[row : row + 1] for shard, row in slices]).float(),
            noise_of(self.index, samples),
            torch.cat([shard.get_slice("guidance")[row : row + 1] for shard, row in slices]),
            [sample % int(self.index["prompts"]) for sample in samples],
        )


def noise_of(index: dict[str, Any], samples: Sequence[int]) -> Tensor:
    """The noise of samples [B, ...], of standard deviation sigma_data."""
    shape, seed = tuple(index["latent_shape"]), index["seed"]
    return index["sigma_data"] * torch.stack([normal(shape, seed, "bank noise", sample) for sample in samples])


def checksum(noise: Tensor) -> int:
    """CRC32 of one sample's noise, float32."""
    return zlib.crc32(noise.contiguous().numpy().tobytes())


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is; its json has the same name."""
    return folder / f"couplings_{number:05d}.safetensors"


def make_bank(
    folder: Path,
    index: dict[str, Any],
    end_of: Callable[[Sequence[int], Tensor], Tensor],
    *,
    batch: int,
    part: tuple[int, int] = (1, 1),
    note: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the shards that are missing.

    Args:
        folder: new, or of a bank with the same index.
        index: what the ends depend on; among it `count`, `prompts`, `latent_shape`, `sigma_data`, `guidance`, `seed`.
        end_of: (B sample numbers, noise [B, ...]) -> x_0 [B, ...].
        batch: samples at once.
        part: (K, W): the K-th of W processes, each of which takes every W-th shard.
        note: told the size before it starts.
        tick: called with the number of ends made or found.

    Raises:
        UserError: the folder holds something else, the disk is too small, or an end is not finite.
    """
    check_folder(folder, index)
    make_folder(folder)
    numbers = range(part[0] - 1, shards_of(index), part[1])
    missing = [number for number in numbers if not is_whole(folder, number)]
    size = 2 * SHARD * len(missing) * int(torch.tensor(index["latent_shape"]).prod())
    free = shutil.disk_usage(folder).free
    note(f"{index['count']:,} couplings, about {size / 2**30:.3g} GiB to write to {folder}")
    if size > free:
        raise UserError(
            f"the disk of {folder} has {free / 2**30:.3g} GiB left, about {size / 2**30:.3g} are needed; "
            "give a smaller --count, or name a larger disk in --out"
        )
    with writing(folder / INDEX) as file:
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for number in numbers:
        members = members_of(index, number)
        if number not in missing:
            tick(len(members))
            continue
        ends, sums = [], []
        for start in range(members.start, members.stop, batch):
            samples = range(start, min(start + batch, members.stop))
            noise = noise_of(index, samples)
            x0 = end_of(samples, noise).float().cpu()
            if not bool(x0.isfinite().all()) or x0.abs().max() > LARGEST:
                raise UserError(
                    f"an end of samples {samples.start} to {samples.stop - 1} is not finite or beyond float16; check "
                    "the teacher (stepfold doctor), or give --dtype float32"
                )
            ends.append(x0.half())
            sums += [checksum(each) for each in noise]
            tick(len(samples))
        write_shard(folder, number, torch.cat(ends), members, sums, index)


def write_shard(
    folder: Path, number: int, x0: Tensor, members: range, sums: Sequence[int], index: dict[str, Any]
) -> None:
    """A shard, and then the json that makes it count."""
    path = shard_path(folder, number)
    tensors = {
        "x0": x0.contiguous(),
        "guidance": torch.full((len(members),), float(index["guidance"])),
        "sample": torch.tensor(list(members)),
        "noise_crc": torch.tensor(list(sums)),
    }
    with writing(path) as file:
        save_file(tensors, file)
    values = x0.float()
    facts = {"sha256": sha256_of(path), "n": len(members), "mean": values.mean().item(), "std": values.std().item()}
    with writing(path.with_suffix(".json")) as file:
        file.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def check_folder(folder: Path, index: dict[str, Any]) -> None:
    """A folder that is new, empty, or a bank with this index.

    Raises:
        UserError: it is another bank, or something else.
    """
    if (folder / INDEX).exists():
        there = read_index(folder)
        if changed := [name for name in index if there.get(name) != index[name]]:
            name = changed[0]
            raise UserError(
                f"{folder} is a bank with {name}={there.get(name)!r}, not {index[name]!r}; choose another --out"
            )
    elif folder.exists() and holds_files(folder):
        raise UserError(f"{folder} is not empty and holds no bank; choose another --out")


def shards_of(index: dict[str, Any]) -> int:
    """How many shards a bank has."""
    return -(-int(index["count"]) // SHARD)


def members_of(index: dict[str, Any], number: int) -> range:
    """Sample numbers of a shard."""
    return range(number * SHARD, min((number + 1) * SHARD, int(index["count"])))


def is_whole(folder: Path, number: int) -> bool:
    """Whether a shard counts: it and its json are there."""
    path = shard_path(folder, number)
    return path.is_file() and path.with_suffix(".json").is_file()


def sha256_of(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """What a bank says about itself.

    Raises:
        UserError: there is none.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = [index[name] for name in ("count", "prompts", "seed")]
        assert all(type(number) is int for number in whole) and whole[0] > 0 and whole[1] > 0
        assert all(type(length) is int and length > 0 for length in index["latent_shape"])
        assert float(index["sigma_data"]) > 0
        float(index["guidance"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AssertionError) as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error!r})"
        raise UserError(f"{folder} holds no bank{why}; make one with stepfold bank make") from None
    return index


def open_bank(folder: Path, wanted: dict[str, Any]) -> Bank:
    """A bank whose shards are all there; their data is not read.

    Args:
        folder: where it lies.
        wanted: names of the index and the values that they must have.

    Raises:
        UserError: there is none, it is not finished, damaged, or of another teacher or other prompts.
    """
    index = read_index(folder)
    if changed := [name for name in wanted if index.get(name) != wanted[name]]:
        name = changed[0]
        raise UserError(
            f"{folder} was made with another {name} ({index.get(name)!r} there, {wanted[name]!r} now); make a bank of "
            "this run's teacher and prompts"
        )
    lacking = [number for number in range(shards_of(index)) if not is_whole(folder, number)]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} of {shards_of(index)} shards; finish it with stepfold bank make"
        )
    try:
        shards = [safe_open(shard_path(folder, number), framework="pt") for number in range(shards_of(index))]
        wrong = [number for number, shard in enumerate(shards) if not fits(shard, index, number)]
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete that shard and make it again") from None
    if wrong:
        raise UserError(
            f"{shard_path(folder, wrong[0])} is damaged; delete it and finish the bank (stepfold bank make)"
        )
    return Bank(folder, index, shards)


def fits(shard: Any, index: dict[str, Any], number: int) -> bool:
    """Whether an open shard has the tensors that its place in the bank asks for."""
    found = [len(members_of(index, number)), *index["latent_shape"]]
    return set(shard.keys()) == set(TENSORS) and shard.get_slice("x0").get_shape() == found


def flaws_of(
    folder: Path,
    remade: Callable[[Sequence[int], Tensor], Tensor] | None = None,
    again: int = 8,
    tick: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What is wrong with a bank: every byte is read.

    Args:
        folder: of the bank.
        remade: (B sample numbers, noise) -> x_0, to make the first `again` ends of each shard again; None not to.
        again: how many.
        tick: called with the number of couplings after each shard.

    Returns:
        A line for each flaw; none where all is well.
    """
    index, flaws = read_index(folder), []
    for number in range(shards_of(index)):
        path, members = shard_path(folder, number), members_of(index, number)
        if not is_whole(folder, number):
            flaws.append(f"{path.name} is missing")
            continue
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if sha256_of(path) != facts.get("sha256"):
            flaws.append(f"{path.name} has other bytes than were written")
            continue
        tensors = load_file(path)
        noise = noise_of(index, members)
        if tensors["noise_crc"].tolist() != [checksum(each) for each in noise]:
            flaws.append(f"{path.name}: its noise is another one on this machine")
        if abs(noise.std().item() / index["sigma_data"] - 1) > SPREAD / math.sqrt(noise.numel()):
            flaws.append(f"{path.name}: its noise has a standard deviation of {noise.std().item():.3g}")
        if remade:
            some = members[:again]
            wanted = tensors["x0"][: len(some)].float()
            error = (remade(some, noise[: len(some)]).float().cpu() - wanted).norm() / wanted.norm()
            if not error < 0.01:
                flaws.append(f"{path.name}: the teacher's ends differ by {error:.2%}")
        tick(len(members))
    return flaws
