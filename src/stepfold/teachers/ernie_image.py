"""ERNIE-Image: flow prediction, classifier-free guidance, texts with their lengths; latents as FLUX.2 has them."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from typing_extensions import override

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.calls import OwnLevels
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.patched import PatchedLatents
from stepfold.teachers.tokens import TextReader

LONGEST = 1024
"""Tokens of a prompt where neither settings nor tokenizer say less: the pipeline itself has no limit."""


def ernie_image_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of an ErnieImageTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance."""
    lengths = condition.mask.sum(1)

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(x_flow, time_scale * t_flow, condition.embeds, lengths, return_dict=False)[0]

    return flow_prediction(x_unit, t, velocity)


class ErnieImageTeacher(OwnLevels, PatchedLatents):
    """ErnieImagePipeline without its prompt enhancer; the student is one too, without guidance."""

    pipelines = (ErnieImagePipeline,)
    unread = ("pe", "pe_tokenizer")
    even_ladder = True
    lora_blocks = ("layers.",)
    fixed_options: ClassVar[Any] = {"use_pe": False}

    @override
    def predictor(self) -> Predict:
        return partial(ernie_image_network, time_scale=self.time_scale)

    @override
    def time_embedder(self, network: Any) -> Any:
        return SimpleNamespace(time_proj=network.time_proj, timestep_embedder=network.time_embedding)

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embedding"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return config.in_channels, factor * config.patch_size, 1024, 1024

    @override
    def variance_floor(self, vae: Any) -> float:
        """The pipeline's own number, whatever the autoencoder's config says."""
        return 1e-5

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        return TextReader(pipe.tokenizer, max_tokens or min(pipe.tokenizer.model_max_length, LONGEST))

    @override
    def usual_tokens(self) -> int:
        return min(super().usual_tokens(), LONGEST)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """The tokenizer is told where to cut, since the pipeline's call takes no length; a student's is, too."""
        self.pipe.tokenizer.model_max_length = self.max_tokens
        texts = self.pipe.encode_prompt(list(prompts), self.device)
        return Condition.ragged([text.to(self.work_dtype) for text in texts])

    @override
    def fresh_scheduler(self) -> Any:
        """Two steps are at 1 and 2/3, four at 1, 6/7, 2/3 and 2/5."""
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=2.0, stochastic_sampling=True)

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"layers": "num_layers"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Their outputs hold the prompt's tokens too, behind the picture's."""
        return [(block, self.transformer.config.hidden_size) for block in self.transformer.layers]

    @override
    def feature_map(self, output: Any) -> Tensor:
        """Blocks have the tokens first."""
        return output.transpose(0, 1)
