"""A LoRA's file, in any of the layouts that trainers write, as the change of each layer that it stands for."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import safe_open
from torch import Tensor

from stepfold import assets
from stepfold.errors import UserError
from stepfold.teachers.safety import PICKLES, read_json

NETWORK, ENCODERS = ("unet", "transformer"), ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of pipelines that LoRAs are for."""
KINDS = {
    r"\.lora_down\.weight|[._]lora\.down\.weight|(?<=_lora\d)\.down\.weight|\.lora_linear_layer\.down\.weight": "down",
    r"\.lora_up\.weight|[._]lora\.up\.weight|(?<=_lora\d)\.up\.weight|\.lora_linear_layer\.up\.weight": "up",
    r"\.lora_A(\.\w+)?\.weight": "down",
    r"\.lora_B(\.\w+)?\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
    r"\.dora_scale": "magnitude",
    r"\.lora_magnitude_vector(\.\w+)?(\.weight)?": "magnitude",
    r"\.diff|\.w_norm": "diff",
    r"\.diff_b|\.b_norm": "diff_b",
}
"""How the name of a tensor ends -> what it is of its layer."""
ENDS = [(re.compile(f"(?:{end})$"), kind) for end, kind in KINDS.items()]
METHODS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "boft_": "BOFT", "ia3_": "IA3", "on_input": "IA3"}
METHODS |= {"vera_": "VeRA", "lora_embedding_": "LoRA of an embedding", "glora": "GLoRA", "bundle_emb": "an embedding"}
"""Parts of the names of tensors -> other methods, which are refused by name."""
ELSEWHERE = "merge it with the tool that made it, and give the merged pipeline as the teacher"
LORA = re.compile(r"[._]lora_(A|B|up|down)\.|[._]lora\.(up|down)\.|lora_linear_layer")
"""Part of a name of each pair of matrices in a LoRA."""
ADDED = re.compile(r"lora|lycoris|hada|lokr|oft|ia3|glora|\.diff(_b)?$|\.alpha$|scale", re.IGNORECASE)
"""Part of a name of anything that is added to a network's weights."""
PATTERN = re.compile(r"[*+?()\[\]{}|$\\]")
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""PEFT's `init_lora_weights` that leave the weights under the LoRA as they are."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What a file says of one layer.

    Attributes:
        name: in the file.
        keys: of its tensors in the file, by kind.
        tensors: kind -> tensor: down [R, I, ...], up [O, R, ...], mid [R, R, ...], alpha [], magnitude, diff, diff_b.
    """

    name: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @property
    def out(self) -> int:
        """Rows of the weight that it changes, or length of the bias."""
        first = next(self.tensors[kind] for kind in ("up", "diff", "diff_b") if kind in self.tensors)
        return len(first)

    @property
    def rank(self) -> int:
        """R."""
        return len(self.tensors["down"])

    @property
    def changes(self) -> list[str]:
        """Which parameters it changes: weight, bias."""
        return ["weight"] * ("down" in self.tensors or "diff" in self.tensors) + ["bias"] * ("diff_b" in self.tensors)

    @property
    def idle(self) -> bool:
        """Whether it holds differences alone, and all of them zero, as some trainers write them of every norm."""
        return "down" not in self.tensors and not any(value.any() for value in self.tensors.values())

    def gain(self, scaling: float, dtype: torch.dtype) -> Tensor:
        """What is added to the weight, before DoRA's magnitude: scaling x up x down, and the whole difference [O, N].

        Args:
            scaling: alpha / R.
            dtype: to compute in.

        Raises:
            ValueError: the shapes do not go together.
        """
        parts = {kind: value.to(dtype) for kind, value in self.tensors.items()}
        total = parts["diff"].reshape(self.out, -1) if "diff" in parts else torch.zeros((), dtype=dtype)
        if "down" not in parts:
            return total
        down, up = parts["down"], parts["up"]
        if up.numel() != len(up) * self.rank:
            raise ValueError(f"up {list(up.shape)} does not go with down {list(down.shape)}; copy the file again")
        if "mid" in parts:  # LoCon's form of Tucker's decomposition
            down = torch.einsum("pq...,qi->pi...", parts["mid"], down.flatten(1))
        return total + scaling * (up.flatten(1) @ down.flatten(1))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's layers, and what is said beside them.

    Attributes:
        layers: in the file's order.
        said: of the header and of adapter_config.json, what bears on alpha: dotted name -> value.
        peft: whether something is said that diffusers does not read, as it is of PEFT's own folders.
    """

    layers: list[Layer]
    said: Mapping[str, Any]
    peft: bool = False

    @property
    def in_diffusers(self) -> bool:
        """Whether plain diffusers merges it as the file says: matrices alone, all with an alpha or none."""
        with_alpha = sum("alpha" in layer.tensors for layer in self.layers)
        plain = all(layer.tensors.keys() <= {"down", "up", "alpha"} for layer in self.layers)
        own = any(layer.name.startswith(("base_model.", "lycoris_")) for layer in self.layers)
        return plain and with_alpha in (0, len(self.layers)) and not own and not self.peft

    def scaling(self, layer: Layer, part: str, module: str) -> float:
        """Alpha / rank of a layer; alpha stands beside its matrices, or in the file's metadata, or is the rank.

        Args:
            layer: with a pair of matrices.
            part: of the pipeline that it belongs to, such as `unet`.
            module: the name in there.

        Raises:
            ValueError: what the file says of alpha contradicts itself, or is not understood.
        """
        own = layer.tensors.get("alpha")
        stated = self.stated(part, "lora_alpha")
        patterns = self.stated(part, "alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            literal = pattern.replace(r"\.", ".").lstrip("^")
            if PATTERN.search(literal):
                raise ValueError(f"its alpha_pattern {pattern!r} is an expression; give each layer its alpha by name")
            if module == literal or ("^" not in pattern and module.endswith(f".{literal}")):
                stated = value
        if own is not None and stated is not None and float(own) != float(stated):
            raise ValueError(f"alpha is {float(own):g} beside its matrices and {stated} in the metadata; delete one")
        if own is None and stated is None:
            self.check_alphas(layer)
        alpha = float(own if own is not None else layer.rank if stated is None else stated)
        stabilised = str(self.stated(part, "use_rslora")).lower() == "true"
        return alpha / (layer.rank**0.5 if stabilised else layer.rank)

    def stated(self, part: str, name: str) -> Any:
        """What is said of all layers of a part."""
        return self.said.get(f"{part}.{name}", self.said.get(name))

    def check_alphas(self, layer: Layer) -> None:
        """Refuses an alpha under a name that is not understood, of a layer that has none of its own."""
        for name, value in self.said.items():
            understood = name.endswith((".lora_alpha", ".alpha_pattern")) and name.split(".")[0] in (
                *NETWORK,
                *ENCODERS,
            )
            if understood or "alpha" not in name or isinstance(value, dict):
                continue
            if number(value) not in (None, float(layer.rank)):
                raise ValueError(
                    f"its metadata says {name} {value} and its rank is {layer.rank}, but it has no alpha; save it "
                    "again with an `alpha` beside each pair of matrices"
                )


def read_lora(source: str) -> LoraFile:
    """A LoRA from a file, a folder or the hub (OWNER/NAME or OWNER/NAME/FILE); safetensors only.

    Raises:
        UserError: there is none, or it is a pickle, of another method, or damaged.
    """
    path = file_of(source)
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # it is no mapping
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors has kinds of its own
        raise unreadable(source, error) from None
    config = path.with_name("adapter_config.json")
    said = dict(of_metadata(metadata))
    # kohya's scripts note their settings as ss_*, and put an alpha beside each pair, which diffusers reads
    peft = any(not name.startswith("ss_") for name in said) and "lora_adapter_metadata" not in metadata
    if config.is_file() and path.name.startswith("adapter_model"):
        values, peft = read_json(config, str(config)), True
        said |= dict(flat(values)) if isinstance(values, dict) else {}
    check_method(source, state, said)
    return LoraFile(layers_of(source, state), said, peft)


def check_no_lora(file: Path, names: Iterable[str]) -> None:
    """Refuses a LoRA in the place of a network, by the names of its tensors.

    Raises:
        UserError: it is one.
    """
    if any(LORA.search(name) for name in names):
        raise UserError(
            f"{file} is a LoRA and not a network; give it beside its teacher, to stepfold distill --teacher TEACHER or "
            f"stepfold doctor TEACHER as --teacher-lora {file}"
        )


def names_of(file: Path) -> list[str]:
    """The names of a safetensors file's tensors; none where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except Exception:  # safetensors has kinds of its own
        return []


def unreadable(source: str, error: Exception) -> UserError:
    """What is said of a file that cannot be fetched or read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"LoRA {source!r} does not load ({reason}); give a safetensors file, its folder, or a hub id")


def file_of(source: str) -> Path:
    """The one safetensors file that is meant.

    Raises:
        UserError: it is or stands beside a pickle, there is none, or there are several.
    """
    place = Path(assets.lora_place(source))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", source) and not re.fullmatch(
        r"[^/]+/[^/]+\.safetensors", source
    )
    if not place.exists() and (place.is_absolute() or not on_hub):
        scaled = re.fullmatch(r"(.+\.safetensors):(.*)", source, re.DOTALL)
        if scaled and Path(scaled[1]).is_file():
            raise UserError(f"LoRA {scaled[1]!r} has the scale {scaled[2]!r}, which is no number; give {scaled[1]}:0.8")
        raise UserError(f"LoRA {source!r} does not load (there is no such file); give a safetensors file or its folder")
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    for file in files:
        if file.suffix.lower() in PICKLES:
            raise UserError(
                f"LoRA {source!r} is or holds a pickle, {file.name}, which could run code; save it as safetensors with "
                "save_lora_weights(..., safe_serialization=True) where you trust it"
            )
    if place.is_file():
        return place
    if place.is_dir():
        return place / the_one(source, [file.name for file in files if file.suffix == ".safetensors"])
    try:
        return fetched(source)
    except UserError:
        raise
    except Exception as error:  # the hub's client has kinds of its own
        raise unreadable(source, error) from None


def the_one(source: str, names: list[str]) -> str:
    """The one name.

    Raises:
        UserError: there are none, or several.
    """
    if not names:
        raise UserError(f"LoRA {source!r} does not load (no safetensors file is in it); give the file itself")
    if len(names) > 1:
        raise UserError(f"LoRA {source!r} holds {len(names)} files: {', '.join(names[:20])}; name one, {source}/FILE")
    return names[0]


def fetched(source: str) -> Path:
    """A LoRA of the hub: OWNER/NAME with one file, or OWNER/NAME/FILE; what was fetched before needs no network."""
    owner, name, *inside = source.split("/")
    repository = f"{owner}/{name}"
    if inside:
        file = "/".join(inside)
    else:
        names = names_in(repository)
        file = the_one(source, sorted(n for n in names if n.endswith(".safetensors") and "/" not in n))
        if file.startswith("adapter_model") and "adapter_config.json" in names:
            hf_hub_download(repository, "adapter_config.json")
    return Path(hf_hub_download(repository, file))


def names_in(repository: str) -> list[str]:
    """The files of a repository of the hub; without a network, those that were fetched before."""
    try:
        return HfApi().list_repo_files(repository)
    except Exception as error:  # the client's own kinds, and those of its own client
        try:
            return [path.name for path in Path(snapshot_download(repository, local_files_only=True)).iterdir()]
        except Exception:  # what went wrong at first says more
            raise error from None


def of_metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """What a header says, flat or as nested json, that bears on alpha."""
    for key, value in metadata.items():
        values: Any = value
        if value.startswith("{") and "lora_alpha" in value:
            try:
                values = json.loads(value)
            except (ValueError, RecursionError):
                continue
            yield from flat(values)
        elif re.search(r"alpha|use_rslora|peft_type|init_lora_weights", key):
            yield key, values


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted names; an `alpha_pattern` stays whole."""
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("_pattern") and above.count(".") < 4:
            yield from flat(value, f"{above}{key}.")
        elif value is not None:
            yield above + key, value


def number(value: Any) -> float | None:
    """A number that may be written as text; None for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def check_method(source: str, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Refuses other methods than LoRA, and starts of a LoRA that change the weights under it."""
    for fragment, method in METHODS.items():
        if found := next((key for key in state if fragment in key), None):
            raise UserError(f"LoRA {source!r} is or holds {method} ({found}), which is not merged here; {ELSEWHERE}")
    for name, value in said.items():
        last = name.rsplit(".", 1)[-1]
        if last == "peft_type" and str(value).rsplit(".", 1)[-1].upper() != "LORA":
            raise UserError(f"LoRA {source!r} is a {value} by its config, which is not merged here; {ELSEWHERE}")
        if last == "init_lora_weights" and value not in STARTS and str(value) not in ("True", "False"):
            raise UserError(
                f"LoRA {source!r} began as {value}, which changes the weights under it; save it again as a plain LoRA "
                "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
            )


def layers_of(source: str, state: Mapping[str, Tensor]) -> list[Layer]:
    """The tensors of a file by their layers.

    Raises:
        UserError: there is a tensor that no rule here knows, or half a pair.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    for key, value in state.items():
        found = next(((match, kind) for end, kind in ENDS if (match := end.search(key))), None)
        if not found or not key[: found[0].start()]:
            if not any(map(ADDED.search, state)):
                raise UserError(
                    f"LoRA {source!r} holds {key} and no part of a LoRA; a whole network becomes a teacher with "
                    f"stepfold convert {source} --base PIPELINE --out FOLDER"
                )
            raise UserError(f"LoRA {source!r} holds {key}, which is nothing of a LoRA that is known here; {ELSEWHERE}")
        match, kind = found
        name = key[: match.start()]
        if kind in tensors.setdefault(name, {}):
            raise UserError(f"LoRA {source!r} holds {name} twice, as {keys[name].get(kind, kind)} and {key}; keep one")
        if not value.is_floating_point() or value.dtype.itemsize == 1:
            value = value.float()
        if not value.float().isfinite().all():
            raise UserError(f"LoRA {source!r} is damaged: {key} is not finite; copy it again")
        tensors[name][kind] = value if value.ndim or kind == "alpha" else value[None]
        keys.setdefault(name, {})[kind] = key
    if not tensors:
        raise UserError(f"LoRA {source!r} holds no weights; give another file")
    layers = []
    for name, parts in tensors.items():
        if ("down" in parts) != ("up" in parts) or not parts.keys() & {"down", "diff", "diff_b"}:
            there = ", ".join(keys[name].values())
            raise UserError(f"LoRA {source!r} lacks a part of {name}: it has {there} alone; copy the whole file")
        matrices = [parts[kind] for kind in ("down", "up", "mid") if kind in parts]
        if any(value.ndim < 2 or not value.numel() for value in matrices) or not all(v.numel() for v in parts.values()):
            raise UserError(f"LoRA {source!r} is damaged: {name} has a matrix without rows or columns; copy it again")
        layers.append(Layer(name, keys[name], parts))
    return layers
