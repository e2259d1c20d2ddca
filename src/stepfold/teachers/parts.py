"""The parts of a teacher's pipeline beside its network: read when they are needed, moved, and written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.calls import parts_of, set_parts
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Family
from stepfold.teachers.folders import load_network
from stepfold.teachers.quantised import Quantised, quantise
from stepfold.teachers.safety import is_part

ENCODER_BLOCKS = ("block", "layer")
"""Parts of the names of the blocks of text encoders."""


class PipelineParts(Family):
    """Abstract: text encoders and autoencoder of a pipeline, which may be out of memory.

    Attributes:
        variant: of the weights' files.
        encoders_quantised: how the text encoders' weights are kept; files and students have the plain ones.
    """

    variant: str | None
    encoders_quantised: Quantised

    @property
    def reads_images(self) -> bool:
        """Whether a condition may hold an image beside the text, as its second text."""
        return False

    def take_images(self) -> bool:
        """Gets ready for an image with each prompt; returns whether the pipeline reads any."""
        return self.reads_images

    def with_images(self, texts: Condition, images: Sequence[Tensor] | None) -> Condition:
        """Texts with an image [3, height, width] in [0, 1] each, of the teacher's own size; None for none."""
        return replace(texts, second=self.encode_images(torch.stack(list(images)))) if images else texts

    def encode_images(self, images: Tensor) -> Condition:
        """Images [B, 3, height, width] in [0, 1], of families with `reads_images` -> a condition's second text."""
        raise NotImplementedError

    def _text_encoders(self) -> list[str]:
        return [part for part, spec in self.index.items() if is_part(spec) and spec[0] and part[:12] == "text_encoder"]

    def _read_text_encoders(self) -> None:
        for name in self._text_encoders():
            if getattr(self.pipe, name) is None:
                setattr(self.pipe, name, self._read_network(name))

    def _read_network(self, part: str) -> Any:
        return load_network(self.source, part, self.index[part], self.dtype, self.variant)

    def _load_text_encoders(self) -> None:
        self._read_text_encoders()
        for name in self._text_encoders():
            encoder = quantise(getattr(self.pipe, name), self.encoders_quantised, ENCODER_BLOCKS, self.device)
            encoder.to(self.device).eval().requires_grad_(False)

    @override
    def park_text_encoder(self) -> None:
        for name in self._text_encoders():
            if (encoder := getattr(self.pipe, name)) is not None:
                encoder.to("cpu")

    def _read_vae(self) -> Any:
        if self.pipe.vae is None:
            self.pipe.vae = self._read_network("vae")
        return self.pipe.vae

    def _vae(self) -> Any:
        return self._read_vae().to(self.device).eval().requires_grad_(False)

    def autoencoder_scale(self) -> tuple[Any, Any]:
        """`latent_scale` of the pipeline's own autoencoder."""
        return self.latent_scale(self._read_vae())

    @override
    def release_decoder(self) -> None:
        self.pipe.vae = None

    def save_retimed(self, network: Any, folder: Path) -> None:
        """Writes this teacher with a network that reads times of [0, 1] in the place of its own."""
        self.write_pipeline(type(self.pipe), lambda: parts_of(self.pipe) | self.retimed_parts(network), folder)

    def write_pipeline(self, kind: Any, parts: Callable[[], dict[str, Any]], folder: Path) -> None:
        """Writes a pipeline folder.

        Args:
            kind: the pipeline's class.
            parts: called when text encoders and autoencoder have been read.
            folder: made if it does not exist.
        """
        self._read_vae()
        self._read_text_encoders()
        rounded = self._text_encoders() if self.encoders_quantised != "none" else []
        old = set_parts(self.pipe, {name: self._read_network(name) for name in rounded})
        try:
            kind(**parts()).save_pretrained(folder, safe_serialization=True)
        finally:
            set_parts(self.pipe, old)
        if extras := self.index_extras():
            index = folder / "model_index.json"
            index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | extras, indent=2) + "\n")
