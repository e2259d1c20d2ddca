"""What a pipeline folder may hold: no code, no pickle, no name that leaves the folder. Checked before it is loaded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers

from stepfold.errors import UserError

MODULAR_INDEX, MODULAR_CODE = "modular_model_index.json", "modular_config.json"
"""Of a modular pipeline: its parts, and its own code if it has some."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
CONVERT = (
    "convert it once with save_pretrained(..., safe_serialization=True) where you trust it, "
    "or delete it if its safetensors are there too"
)
LARGEST_JSON = 2**24
"""Bytes of a config; the largest published ones, tokenizers' added tokens, take a few million."""
LARGEST_NUMBER, LARGEST_COUNT = 2**24, 1024
"""Of a network's config: any whole number, and the number of layers."""


def check_files(folder: Path) -> None:
    """Refuses pickles, code, links that leave the folder, files that are none, and configs that name any of these.

    Links into the blobs of the hub's own cache are what a snapshot consists of, so they pass.

    Raises:
        UserError: naming the file and what to do.
    """
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        end = Path(os.path.realpath(path))  # of a link to itself that itself, where resolve() raises
        if not any(end.is_relative_to(root) for root in roots):
            raise UserError(
                f"teacher folder holds a link that leaves it, {name}; copy what it points to into the folder"
            )
        if not path.is_file() and not path.is_dir():
            raise UserError(f"teacher folder holds {name}, which is no regular file; delete it")
        if path.suffix.lower() in PICKLES:
            raise UserError(f"teacher folder holds a pickle, {name}, which could run code; {CONVERT}")
        if path.suffix == ".py" and len(name.parts) > 1:
            raise UserError(f"teacher folder holds code, {name}; only classes of diffusers and transformers are loaded")
        if path.name.endswith("config.json") and len(name.parts) > 1:
            check_config(path, str(name))
        if path.name.endswith(".index.json"):
            check_weight_map(path, str(name))


def read_json(path: Path, what: str) -> Any:
    """A small json file.

    Raises:
        UserError: it is no JSON, or too long for what it should be.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(
                f"{what} has more than {LARGEST_JSON:,} bytes; save the pipeline again with save_pretrained"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{what} does not load: not valid JSON ({error}); save the pipeline again with save_pretrained"
        ) from None


def check_config(path: Path, what: str) -> None:
    """Refuses a part's config that asks for code of its own, for files elsewhere or for a network beyond all reason.

    Raises:
        UserError: naming the entry.
    """
    config = read_json(path, what)
    if not isinstance(config, dict):
        raise UserError(f"{what} does not load: it holds no settings; save the pipeline again with save_pretrained")
    if config.get("auto_map"):
        raise UserError(f"{what} has an auto_map, which names code that would be run; it is not loaded")
    for key, value in config.items():
        elsewhere = isinstance(value, str) and key.endswith("_file") and leaves(value)
        if elsewhere and os.path.exists(path.parent / value):  # what is not there is a trace of the machine it is from
            raise UserError(f"{what} names a file outside the folder, {key} {value!r}; delete that entry")
    if path.name == "config.json":
        check_numbers(config, what)


def check_numbers(config: Any, what: str, key: str = "", depth: int = 0) -> None:
    """Refuses a network whose mere construction would take all memory or forever.

    Raises:
        UserError: naming the number.
    """
    if depth > 32:
        raise UserError(f"{what} is nested deeper than any config; save the pipeline again with save_pretrained")
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_numbers(value, what, str(name), depth + 1)
    elif isinstance(config, list):
        for value in config:
            check_numbers(value, what, key, depth + 1)
    elif isinstance(config, int):
        largest = LARGEST_COUNT if "layers" in key or "blocks" in key else LARGEST_NUMBER
        if abs(config) > largest:
            raise UserError(f"{what}: {key} is {config:.3g}, more than {largest:,}; is the file damaged?")


def check_weight_map(path: Path, what: str) -> None:
    """Refuses an index of sharded weights that names anything but safetensors files beside itself.

    Raises:
        UserError: naming the first such file.
    """
    index = read_json(path, what)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{what} has no weight_map; save the pipeline again with save_pretrained")
    for name in names.values():
        if not isinstance(name, str) or not name or os.path.basename(name) != name or leaves(name):
            raise UserError(f"{what} names a file outside its folder, {name!r}; its weights must lie beside it")
        if not name.endswith(".safetensors"):
            raise UserError(f"{what} names {name!r}, which is no safetensors file and could run code; {CONVERT}")


def leaves(name: str) -> bool:
    """Whether a file name leads out of the folder that it is read from."""
    return os.path.isabs(name) or ".." in Path(name).parts or "\\" in name or "\0" in name


def check_index(source: str, index: Mapping[str, Any]) -> None:
    """Refuses a model_index.json that names a pipeline or a part from anywhere but diffusers and transformers.

    Raises:
        UserError: naming the part.
    """
    if isinstance(index.get("_class_name"), list):
        raise UserError(
            f"teacher {source!r} is a pipeline with code of its own, {index['_class_name']}, which is not loaded; "
            f"its _class_name must be a pipeline of diffusers {diffusers.__version__}"
        )
    for part, spec in index.items():
        if part.startswith("_") or not is_part(spec) or spec == [None, None]:
            continue
        if not part.isidentifier():
            raise UserError(f"teacher {source!r}: {part!r} is no name of a part; save the pipeline again")
        library, name = spec
        if not isinstance(library, str) or not (library in OWNERS or is_diffusers_own(library)):
            raise UserError(
                f"teacher {source!r} does not load: part {part!r} comes from {library!r}, whose code would be run; "
                f"allowed are {' and '.join(OWNERS)}"
            )
        if library in OWNERS and not is_class_of(library, name):
            raise UserError(
                f"teacher {source!r} does not load: part {part!r} is a {name!r}, which is no class of {library} "
                f"{OWNERS[library].__version__}; a newer one may have it"
            )


def modular_index(folder: Path) -> dict[str, Any]:
    """What a modular pipeline's index says of its parts, in the words of a model_index.json; nothing of it is run.

    Raises:
        UserError: it has code of its own, or a part that does not lie in a subfolder of the part's name.
    """
    code = folder / MODULAR_CODE
    if code.is_file() and "auto_map" in (read_json(code, str(code)) or {}):
        raise UserError(
            f"teacher {str(folder)!r} is a modular pipeline with code of its own, {MODULAR_CODE}, which is not run; "
            "give one of diffusers' own blocks"
        )
    found = read_json(folder / MODULAR_INDEX, str(folder / MODULAR_INDEX))
    if not isinstance(found, dict):
        raise UserError(f"{folder / MODULAR_INDEX} describes no pipeline; save the pipeline again")
    index: dict[str, Any] = {name: value for name, value in found.items() if name.startswith("_")}
    for part, spec in found.items():
        if part in index or not isinstance(spec, list):
            continue
        said = spec[2] if len(spec) == 3 and isinstance(spec[2], dict) else {}
        hint: Any = said.get("type_hint")
        if not is_part(hint) or hint[0] is None or said.get("subfolder") != part:
            raise UserError(
                f"{folder / MODULAR_INDEX} says of {part!r} no class with subfolder {part!r}; save the pipeline again "
                "with save_pretrained"
            )
        index[part] = hint
    return index


OWNERS: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
"""The libraries whose classes are loaded."""


LENT = {"T5GemmaEncoder": ("diffusers",)}
"""Classes that a library has from another one."""


def is_part(spec: Any) -> bool:
    """Whether an entry of model_index.json stands for a part (library, class) and not for a setting."""
    return isinstance(spec, list) and len(spec) == 2 and all(value is None or isinstance(value, str) for value in spec)


def is_class_of(library: str, name: Any) -> bool:
    """Whether a name is that of a class of the library's own: neither a function, a module nor a class on loan.

    A name that the library does not have passes: diffusers knows the new names of some old classes, and refuses others.
    """
    if not isinstance(name, str) or not name.isidentifier():
        return False
    kind = getattr(OWNERS[library], name, None)
    return kind is None or (isinstance(kind, type) and kind.__module__.split(".")[0] in (library, *LENT.get(name, ())))


def is_diffusers_own(library: str) -> bool:
    """Whether a part's library is one of diffusers' own pipeline modules, as Stable Diffusion's safety checker's is."""
    return library.isidentifier() and (Path(diffusers.__file__).parent / "pipelines" / library).is_dir()
