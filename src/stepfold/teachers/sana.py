"""The Sana family: SanaPipeline teachers and SanaSprintPipeline students."""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers import SanaPipeline, SanaSprintPipeline, SCMScheduler
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, GuidanceKind, SamplerName
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import Schedule, read_trigflow


def trigflow_network(
    transformer: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    time_scale: float,
) -> Tensor:
    """F of a flow-predicting transformer (arXiv:2511.20410, Eq. 5-7).

    Args:
        transformer: predicts v = z - x_0 from x_FM at t_FM.
        x_unit: x / sigma_data [B, C, H, W].
        t: [B], in [0, pi/2].
        condition: B rows.
        guidance: scales [B] for a network that embeds them; others do without.
        time_scale: what the transformer's own time counts to: 1 or 1000.

    Returns:
        F [B, C, H, W].
    """
    embeds = guidance is not None and transformer.config.guidance_embeds
    embedded = guidance * transformer.config.guidance_embeds_scale if embeds else None

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            x_flow,
            encoder_hidden_states=condition.embeds,
            encoder_attention_mask=condition.mask,
            timestep=t_flow * time_scale,
            guidance=embedded,
            return_dict=False,
        )[0]

    return flow_prediction(x_unit, t, velocity, clamp=time_scale != 1)


class GemmaTexts(PipelineTeacher):
    """Abstract: pipelines that encode a prompt behind an instruction, with Gemma 2, as Sana's.

    Attributes:
        text_options: arguments of `encode_prompt` beside the usual ones.
    """

    lowers = True
    text_options: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False}
    fixed_options: ClassVar[Any] = {"use_resolution_binning": False}

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Encodes behind the pipeline's default instruction."""
        return self._encode(
            prompts, inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        )

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        """The instruction; but for two of its tokens it does not count."""
        lines = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        before = "\n".join(lines)
        return before, len(pipe.tokenizer.encode(before)) - 2

    @override
    def encode_nothing(self) -> Condition:
        """Encodes the empty prompt, without an instruction."""
        return self._encode([""], None)

    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Condition:
        encode_prompt: Any = self.pipe.encode_prompt
        embeds, mask, *_ = encode_prompt(
            list(prompts),
            device=self.device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=instruction,
            **self.text_options,
        )
        return Condition(embeds.to(self.work_dtype), mask)

    @override
    def of_the_prompt_alone(self) -> list[nn.Module]:
        parts = [self.transformer.caption_projection, self.transformer.caption_norm]
        for block in self.transformer.transformer_blocks:
            attention = block.attn2
            parts += [part for part in (attention.to_k, attention.to_v, attention.norm_k) if part is not None]
        return parts


class SanaTeacher(GemmaTexts):
    """SanaPipeline.

    A student is a SanaSprintPipeline where the network reads time on [0, 1], as that pipeline passes it. The student of
    a network that counts to 1000 is a SanaPipeline, which has no place for embedded guidance.
    """

    pipelines = (SanaPipeline,)
    head = "proj_out"
    fields: ClassVar[Any] = {"guidance_embeds": ((False, None), "SanaPipeline does not tell it the guidance")}

    @classmethod
    @override
    def time_scale_of(cls, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        """The pipeline multiplies 0 to 1000 by timestep_scale."""
        return 1000.0 * network.get("timestep_scale", 1.0)

    @property
    def student_is_sprint(self) -> bool:
        """Whether a student of it, with weights of its own, is a SanaSprintPipeline."""
        return math.isclose(self.time_scale, 1.0)

    @override
    def predictor(self) -> Predict:
        return partial(trigflow_network, time_scale=self.time_scale)

    @override
    def time_embedder(self, network: Any) -> Any:
        return None if network.config.guidance_embeds else network.time_embed.emb

    @override
    def time_part(self, network: Any) -> str | None:
        return f"time_embed{'' if network.config.guidance_embeds else '.emb'}.timestep_embedder"

    @override
    def retimed_parts(self, network: Any) -> dict[str, Any]:
        """The network's own config says what its time counts to."""
        network.register_to_config(timestep_scale=self.transformer.config.timestep_scale / self.time_scale)
        return {self.network_part: network}

    @classmethod
    @override
    def guidance_kinds(cls, network: Mapping[str, Any], pipeline: Mapping[str, Any]) -> tuple[GuidanceKind, ...]:
        return ("embedded",) if network["guidance_embeds"] else ("classifier_free", "none")

    @property
    @override
    def student_reads_guidance(self) -> bool:
        """A SanaSprintPipeline's embedder starts neutral."""
        return self.student_is_sprint

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipelines themselves insist on multiples of 32."""
        config = self.transformer.config
        side = config.sample_size * factor
        return config.in_channels, math.lcm(factor, 32), side, side

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """Behind a zeroed layer there is a gradient from the second step on."""
        starts_neutral = self.student_is_sprint and not self.transformer.config.guidance_embeds
        return (".guidance_embedder.linear_1.",) if starts_neutral else ()

    @override
    def student_class(self, sampler: SamplerName) -> type:
        """SanaSprintPipeline only adds fresh noise at each step, so a flow student is a SanaPipeline."""
        return SanaSprintPipeline if self.student_is_sprint and sampler == "consistency" else SanaPipeline

    @override
    def student_scheduler(self, sampler: SamplerName) -> Any:
        """SanaSprintPipeline's own, or the usual one."""
        if self.student_class(sampler) is SanaPipeline:
            return super().student_scheduler(sampler)
        return SCMScheduler(prediction_type="trigflow", sigma_data=self.sigma_data)

    @override
    def student_parts(self, sampler: SamplerName) -> dict[str, Any]:
        """Both pipelines have the same parts."""
        parts = {name: getattr(self.pipe, name) for name in ("tokenizer", "text_encoder", "vae")}
        return parts | {"scheduler": self.student_scheduler(sampler)}

    @override
    def lora_scheduler(self, sampler: SamplerName) -> Any:
        """The usual one: the pipeline's class stays."""
        return super().student_scheduler(sampler)

    @override
    def lora_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """The usual one: the pipeline's class stays."""
        return super().student_call(times, guidance, sampler)

    @override
    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """SanaSprintPipeline has a time between only where there are two steps."""
        if self.student_class(sampler) is SanaPipeline:
            return super().student_call(times, guidance, sampler) | {"guidance_scale": 1.0}
        return {
            "num_inference_steps": len(times),
            "intermediate_timesteps": times[1] if len(times) == 2 else None,
            "guidance_scale": guidance,
            **self.usual_call(),
        }


class SprintTeacher(SanaTeacher):
    """SanaSprintPipeline: TrigFlow, time on [0, 1], guidance embedded; the student is one too."""

    pipelines = (SanaSprintPipeline,)
    head = ""
    fields: ClassVar[Any] = {"guidance_embeds": ((True,), "SanaSprintPipeline tells it the guidance")}
    text_options: ClassVar[dict[str, Any]] = {}

    @classmethod
    @override
    def time_scale_of(cls, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        """The pipeline passes 0 to 1 as it is."""
        return 1.0

    @override
    def read_schedule(self) -> Schedule:
        return read_trigflow(self.pipe.scheduler)

    @override
    def own_steps(self, num_steps: int) -> dict[str, Any]:
        """The pipeline's time between is for two steps."""
        between = {} if num_steps == 2 else {"intermediate_timesteps": None}
        return super().own_steps(num_steps) | between

    @override
    def lora_scheduler(self, sampler: SamplerName) -> Any:
        if sampler == "flow":
            raise UserError(
                "SanaSprintPipeline adds fresh noise at each step, so it cannot sample a LoRA that is a velocity; "
                "train all weights (leave student.lora at 0)"
            )
        return self.student_scheduler(sampler)

    @override
    def lora_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        return self.student_call(times, guidance, sampler)
