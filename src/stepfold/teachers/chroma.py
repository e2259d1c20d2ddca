"""Chroma: FLUX.1 without guidance embedded and without a pooled text; flow prediction, classifier-free guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.flux import PackedTeacher, keep_precision, packed_prediction, places


@contextmanager
def recomputed_with(transformer: Any, mask: Tensor) -> Iterator[None]:
    """Blocks that the backward pass computes again get the mask; diffusers leaves it out for those of one stream."""
    if not transformer.gradient_checkpointing:
        yield
        return
    own = transformer._gradient_checkpointing_func

    def with_mask(block: Any, *inputs: Any) -> Any:
        return own(block, *inputs, mask) if len(inputs) == 3 else own(block, *inputs)

    transformer._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = own


def chroma_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a ChromaTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance.

    It multiplies the time that it is given by 1000 itself. The last channel of the embeddings is the pipeline's mask.
    """
    embeds, mask = condition.embeds[..., :-1], condition.embeds[..., -1]

    def velocity(tokens: Tensor, t_flow: Tensor) -> Tensor:
        whole = torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1)
        with recomputed_with(transformer, whole):
            return transformer(
                hidden_states=tokens,
                timestep=time_scale / 1000 * t_flow,
                encoder_hidden_states=embeds,
                txt_ids=embeds.new_zeros(embeds.shape[1], 3),
                img_ids=places(x_unit, embeds),
                attention_mask=whole,
                return_dict=False,
            )[0]

    return packed_prediction(x_unit, t, velocity)


class ChromaTeacher(PackedTeacher):
    """ChromaPipeline; the student is one too, without guidance."""

    pipelines = (ChromaPipeline,)
    fields: ClassVar[Any] = {"patch_size": ((1,), "the pipeline packs four latents into a token itself")}

    @override
    def predictor(self) -> Predict:
        self.transformer.x_embedder.register_forward_hook(keep_precision)  # a student's copy has it too
        return partial(chroma_network, time_scale=self.time_scale)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Keeps the padding, and the pipeline's mask of it as the last channel.

        That mask is 1 up to the first token of padding and 0 after it, and no token is left out by it: the pipeline
        adds it to the scores of attention.
        """
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return Condition.whole(torch.cat([embeds, mask[..., None]], -1).to(self.work_dtype))

    @override
    def block_stacks(self) -> dict[str, str]:
        """None: one layer makes the modulations of all blocks, and counts them."""
        return {}
