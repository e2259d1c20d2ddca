"""Modular pipelines of diffusers: their index is data, their blocks are diffusers' own."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import PreTrainedTokenizerBase

from stepfold.errors import UserError
from stepfold.teachers.folders import is_network, load_index, load_network
from stepfold.teachers.safety import MODULAR_INDEX, OWNERS, is_part


def read_part(folder: str, name: str, spec: Sequence[str], dtype: torch.dtype, variant: str | None) -> Any:
    """A part from its subfolder: a network, something that a config says all of, or a tokenizer.

    Raises:
        UserError: it is none of these.
    """
    if is_network(spec):
        return load_network(folder, name, spec, dtype, variant)
    library, kind = spec
    part: Any = getattr(OWNERS[library], kind)
    if issubclass(part, ConfigMixin):
        config: Any = part.load_config(folder, subfolder=name)
        return part.from_config(config)
    if not issubclass(part, PreTrainedTokenizerBase):
        raise UserError(
            f"teacher {folder!r}: its part {name!r} is a {kind}, which is no tokenizer; copy its index again"
        )
    Tokenizer: Any = part
    return Tokenizer.from_pretrained(folder, subfolder=name)


class ModularParts(DiffusionPipeline):
    """Abstract: a modular pipeline's parts, called as other pipelines are, through its own blocks.

    A subclass has the name of the modular pipeline's class in diffusers, and its parts as arguments of `__init__`.
    """

    @classmethod
    def modular(cls) -> Any:
        """The class in diffusers."""
        return getattr(diffusers, cls.__name__)

    def run(self, output_type: str, return_dict: bool, call: dict[str, Any]) -> Any:
        """What the pipeline's own blocks make of a call; latents as its loop leaves them.

        Args:
            output_type: "latent", or what the blocks call an output.
            return_dict: whether the result has a name, `images`.
            call: the blocks' other inputs.
        """
        kind = self.modular()
        blocks = getattr(diffusers, kind.default_blocks_name)()
        latent = output_type == "latent"
        if latent:
            blocks.sub_blocks.pop("decode")
        pipe = kind(blocks)
        pipe.register_components(**{name: part for name, part in self.components.items() if part is not None})
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        if not latent:
            call = call | {"output_type": output_type}
        made = pipe(**call, output="latents" if latent else "images")
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    @classmethod
    def check(cls, source: str, index: Mapping[str, Any]) -> None:
        """Refuses an index of other parts; a guider may be left out.

        Raises:
            UserError: naming the part.
        """
        there, known = {name for name, spec in index.items() if is_part(spec)}, cls.parts()
        if wrong := sorted(there.difference(known) or {*known} - there - {"guider"}):
            what = "has a part" if wrong[0] in there else "lacks the part"
            raise UserError(
                f"teacher {source!r} {what} {wrong[0]!r}; {cls.__name__} reads {', '.join(known)}; save the pipeline "
                "again with these"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, variant: str | None = None, **given: Any
    ) -> Any:
        """Reads the parts that are not given; None for one leaves it out. A guider of no folder is diffusers' own."""
        given.pop("use_safetensors", None)
        of_class = cls.modular()().components.items()
        own = {name: part for name, part in of_class if part is not None and name in cls.parts()}
        for name, spec in load_index(str(folder)).items():
            if name not in given and is_part(spec):
                given[name] = read_part(str(folder), name, spec, dtype, variant)
        return cls(**own | given)

    @classmethod
    def parts(cls) -> list[str]:
        """Names of the parts."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True) -> None:  # type: ignore[override]
        """Writes a folder that `ModularPipeline.from_pretrained` reads, with all parts, the guider too."""
        assert safe_serialization
        super().save_pretrained(save_directory, safe_serialization=True)
        index = Path(save_directory) / self.config_name
        parts = json.loads(index.read_text(encoding="utf-8"))
        whole: dict[str, Any] = {name: parts[name] for name in ("_class_name", "_diffusers_version")}
        whole["_blocks_class_name"] = self.modular().default_blocks_name
        for name, spec in parts.items():
            if is_part(spec) and spec[0] is not None:
                place = dict(pretrained_model_name_or_path=None, subfolder=name, variant=None, revision=None)
                whole[name] = [*spec, {"type_hint": spec} | place]
        (index.parent / MODULAR_INDEX).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        index.unlink()
