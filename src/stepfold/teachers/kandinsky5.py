"""Kandinsky 5, what images and videos share: flow prediction, classifier-free guidance, latents channels last."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from stepfold.teachers.calls import OwnLevels, by_equal_factors
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.kandinsky5_network import channels_last, kandinsky5_network, leave_out_padding
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.tokens import TextReader

MOST_TOKENS = 1023
"""Of a prompt and what the pipeline puts behind it; the network has no position for more."""


class Kandinsky5Teacher(OwnLevels, PipelineTeacher):
    """Abstract: what the pipelines of images and videos share; the student is one too, without guidance."""

    one_by_one = True
    rounds = True
    fields: ClassVar[Any] = {"patch_size": (((1, 2, 2), [1, 2, 2]), "the pipeline calls for patches of 1 x 2 x 2")}

    def spread(self) -> Callable[[int, int], Sequence[float]]:
        """See `kandinsky5_network`; a plain function, or a partial of one."""
        raise NotImplementedError

    @override
    def predictor(self) -> Predict:
        leave_out_padding(self.transformer)
        return partial(kandinsky5_network, time_scale=self.time_scale, spread=self.spread())

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embeddings"

    @override
    def network_channels(self) -> tuple[int, int]:
        config = self.transformer.config
        return config.in_visual_dim, config.out_visual_dim

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipeline's call has a default size."""
        call = inspect.signature(self.pipe.__call__).parameters
        return self.network_channels()[0], 2 * factor, call["height"].default, call["width"].default

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """The pipelines read no shift."""
        return vae.config.scaling_factor, 0.0

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return channels_last(latents)

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        videos = latents.movedim(-1, 1)
        return videos if len(self.latent_shape) == 4 else videos.squeeze(2)

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        return pipe.prompt_template.split("{}")[0], pipe.prompt_template_encode_start_idx

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        """What stands behind a prompt counts."""
        reader = super().reader_in(pipe, max_tokens)
        assert reader is not None
        behind = reader.tokenizer(pipe.prompt_template.split("{}")[1]).input_ids
        return replace(reader, most=reader.most - len(behind))

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """One prompt at once: among longer ones the pipeline has padding attended to, and cuts too much."""
        self.check_tokens(MOST_TOKENS)
        encoded = [
            self.pipe.encode_prompt(prompt, device=self.device, max_sequence_length=self.max_tokens)
            for prompt in prompts
        ]
        texts = Condition.ragged([embeds[0].to(self.work_dtype) for embeds, *_ in encoded])
        return replace(texts, pooled=torch.cat([pooled.to(self.work_dtype) for _, pooled, _ in encoded]))

    @override
    def fresh_scheduler(self) -> Any:
        return by_equal_factors()

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"visual_transformer_blocks": "num_visual_blocks"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        return [(block, self.transformer.config.model_dim) for block in self.transformer.visual_transformer_blocks]
