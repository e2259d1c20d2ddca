"""Z-Image: flow prediction towards the data, texts without padding, a guidance scale that counts from 0."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, Scale
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.tokens import chat_opening

MULTIPLE = 32
"""The network fills its texts and its pictures up to multiples of it."""


def z_image_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a ZImageTransformer2DModel, which takes lists; it embeds no guidance.

    Its time runs from noise at 0 to data at `time_scale`, and its velocity with it.
    """
    factor, texts = time_scale / transformer.t_scale, condition.texts()

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        pictures, time = list(x_flow.unsqueeze(2).unbind()), factor * (1 - t_flow)
        return -torch.stack(transformer(pictures, time, texts, return_dict=False)[0]).squeeze(2)

    return flow_prediction(x_unit, t, velocity)


class ZImageTeacher(PipelineTeacher):
    """ZImagePipeline; the student is one too, without guidance."""

    pipelines = (ZImagePipeline,)
    even_ladder = True
    lora_blocks = ("layers.", "refiner.")
    no_guidance = 0.0
    time_field = "t_scale"
    rises_to = "data"
    fields: ClassVar[Any] = {
        "siglip_feat_dim": ((None,), "it reads images beside the text (Omni)"),
        "all_patch_size": (((2,), [2]), "the pipeline calls for patches of 2"),
        "all_f_patch_size": (((1,), [1]), "the pipeline calls for patches of one frame"),
    }

    @override
    def guidance_weight(self, scale: Scale) -> Scale:
        return scale + 1

    @override
    def predictor(self) -> Predict:
        """The network keeps its table of positions from its first call on; that call must not be inside a tangent."""
        self.transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.int32, device=self.device))
        return partial(z_image_network, time_scale=self.time_scale)

    @override
    def time_embedder(self, network: Any) -> Any:
        embedder = network.t_embedder
        waves = partial(embedder.timestep_embedding, dim=embedder.frequency_embedding_size)
        return SimpleNamespace(time_proj=waves, timestep_embedder=embedder.mlp)

    @override
    def time_part(self, network: Any) -> str | None:
        return "t_embedder"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        return self.transformer.config.in_channels, 2 * factor, 1024, 1024

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """The network has a table of positions."""
        sides = [most * 2 * self.factor for most in self.transformer.config.axes_lens[1:]]
        if height > sides[0] or width > sides[1]:
            raise UserError(
                f"the picture is to be {height} x {width} pixels, but this network draws at most {sides[0]} x "
                f"{sides[1]}; give a smaller height and width"
            )
        return super().shape_at(height, width)

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        return chat_opening(pipe.tokenizer, enable_thinking=True), 0

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Encodes inside the pipeline's chat, whose words count towards the prompt's length."""
        before = len(self.pipe.tokenizer(self.before_prompts(self.pipe)[0]).input_ids)
        longest = (self.transformer.config.axes_lens[0] - 2) // MULTIPLE * MULTIPLE
        if not before < self.max_tokens <= longest:
            raise UserError(
                f"max_tokens is {self.max_tokens}, but this pipeline puts {before} tokens before each prompt and the "
                f"network reads {longest}; choose one between, or leave it out"
            )
        texts, _ = self.pipe.encode_prompt(list(prompts), self.device, False, max_sequence_length=self.max_tokens)
        return Condition.ragged([text.to(self.work_dtype) for text in texts])

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """What fills a picture up, if every picture's tokens are a multiple already."""
        tokens = [(height // 2) * (width // 2) for *_, height, width in self.latent_shapes]
        return () if any(count % MULTIPLE for count in tokens) else (".x_pad_token",)

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"layers": "n_layers"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Blocks of the main stack; their outputs hold the prompt's tokens too."""
        return [(block, self.transformer.config.dim) for block in self.transformer.layers]
