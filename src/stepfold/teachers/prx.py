"""PRX: flow prediction, classifier-free guidance, one masked text; the pipeline takes timesteps, not noise levels."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

from diffusers import PRXPipeline
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from typing_extensions import override

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, SamplerName
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher


def prx_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a PRXTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance."""
    factor, mask = time_scale / transformer.time_factor, condition.mask.bool()

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(x_flow, factor * t_flow, condition.embeds, mask, return_dict=False)[0]

    return flow_prediction(x_unit, t, velocity)


def one_time_a_row(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pre-hook: under guidance the pipeline tells two times, whatever the number of prompts."""
    if "timestep" in named and len(named["timestep"]) not in (1, len(named["hidden_states"])):
        named = named | {"timestep": named["timestep"][:1]}
    return args, named


class PRXTeacher(PipelineTeacher):
    """PRXPipeline; the student is one too, without guidance."""

    pipelines = (PRXPipeline,)
    loads_lora = False
    lowers = True
    time_field = "time_factor"
    length_argument = "tokenizer_max_length"
    fixed_options: ClassVar[Any] = {"use_resolution_binning": False}

    @override
    def predictor(self) -> Predict:
        self.transformer.register_forward_pre_hook(one_time_a_row, with_kwargs=True)
        return partial(prx_network, time_scale=self.time_scale)

    @override
    def time_embedder(self, network: Any) -> Any:
        waves = partial(
            get_timestep_embedding, embedding_dim=256, max_period=network.time_max_period, flip_sin_to_cos=True,
            downscale_freq_shift=0.0,
        )  # fmt: skip
        return SimpleNamespace(time_proj=waves, timestep_embedder=network.time_in)

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_in"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config, side = self.transformer.config, self.pipe.get_default_resolution()
        return config.in_channels, factor * config.patch_size, side, side

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Prompts are cleaned as the pipeline does by default."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), self.device, False, tokenizer_max_length=self.max_tokens
        )
        return Condition(embeds.to(self.work_dtype), mask.long())

    @override
    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        call = super().student_call(times, guidance, sampler)
        return call | {"timesteps": [self.num_train_timesteps * level for level in call.pop("sigmas")]}

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"blocks": "depth"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        return [(block, self.transformer.config.hidden_size) for block in self.transformer.blocks]
