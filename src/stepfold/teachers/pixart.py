"""PixArt-Sigma: noise prediction, classifier-free guidance."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import PixArtSigmaPipeline
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.contract import Condition
from stepfold.teachers.vp import Raw, VPTeacher

NO_SIZES = {"resolution": None, "aspect_ratio": None}


def pixart_network(transformer: Any, x_unit: Tensor, step: Tensor, condition: Condition) -> Tensor:
    """Noise, and a learned variance, [B, 2 C, H, W] of a PixArtTransformer2DModel."""
    return transformer(
        x_unit,
        encoder_hidden_states=condition.embeds,
        encoder_attention_mask=condition.mask,
        timestep=step,
        added_cond_kwargs=NO_SIZES,
        return_dict=False,
    )[0]


class PixArtTeacher(VPTeacher):
    """PixArtSigmaPipeline; the student is one too."""

    pipelines = (PixArtSigmaPipeline,)
    loads_lora = False
    lowers = True
    outputs = (1, 2)
    fixed_options: ClassVar[Any] = {"use_resolution_binning": False}
    fields: ClassVar[Any] = {
        "use_additional_conditions": ((False,), "it reads the picture's size beside the text, as PixArt-Alpha does")
    }

    @override
    def raw(self) -> Raw:
        return pixart_network

    @override
    def time_part(self, network: Any) -> str | None:
        return "adaln_single.emb.timestep_embedder"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        side = config.sample_size * factor
        return config.in_channels, factor * config.patch_size, side, side

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Captions are cleaned as the pipeline does by default."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_tokens,
            clean_caption=inspect.signature(self.pipe.__call__).parameters["clean_caption"].default,
        )  # fmt: skip
        return Condition(embeds.to(self.work_dtype), mask)
