"""Pipelines with a guider: a part that holds the guidance scale, which the call has no argument for."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition, SamplerName
from stepfold.teachers.pipeline import PipelineTeacher

PLAIN = dict(guidance_rescale=0.0, use_original_formulation=False, start=0.0, stop=1.0, enabled=True)
"""Options of a guider -> the value of plain classifier-free guidance."""
NOT_PROJECTED = "adaptive_projected_guidance_scale"
"""Option of AdaptiveProjectedMixGuidance that at 1 leaves plain guidance at every step."""


class GuiderTeacher(PipelineTeacher):
    """Abstract: the teacher is guided by the scale of its guider; a student's guider has scale 1.

    Attributes:
        guiders: names of the pipeline's parts that guide; those after the first are optional, for some prompts.
    """

    guiders: ClassVar[tuple[str, ...]] = ("guider",)

    @override
    def check_network(self, latent_channels: int) -> None:
        """The guider's kind and options are part of what the pipeline predicts."""
        super().check_network(latent_channels)
        there = {name: getattr(self.pipe, name) for name in self.guiders}
        there = {name: guider for name, guider in there.items() if guider is not None}
        for name, guider in there.items():
            self.check_guider(name, guider)
        scales = [guider.config.guidance_scale for guider in there.values()]
        if len(set(scales)) > 1:
            raise UserError(
                f"teacher {self.source!r} has guiders of scales {' and '.join(map(str, scales))}; write one "
                "guidance_scale into both guider_config.json"
            )

    def check_guider(self, name: str, guider: Any) -> None:
        """Refuses a guider whose rule is another one than v_u + s (v_c - v_u).

        Raises:
            UserError: what it has, and what to change.
        """
        kind, options = type(guider), guider.config
        if kind is AdaptiveProjectedMixGuidance and options[NOT_PROJECTED] != 1:
            raise UserError(
                f"teacher {self.source!r}: the late steps of its {name} depend on the steps before; write "
                f'"{NOT_PROJECTED}": 1 into {name}/guider_config.json, for guidance of its guidance_scale alone'
            )
        other = [field for field, value in PLAIN.items() if options.get(field, value) != value]
        if kind not in (ClassifierFreeGuidance, AdaptiveProjectedMixGuidance) or other:
            raise UserError(
                f"teacher {self.source!r} has a {kind.__name__} with {other[0] if other else 'its own rule'}; "
                "give it a ClassifierFreeGuidance with guidance_scale alone"
            )

    @override
    def usual_guidance(self) -> float:
        if (guider := getattr(self.pipe, self.guiders[0])) is None:
            raise UserError(
                f"teacher {self.source!r} has no {self.guiders[0]}, as pipelines of distilled networks; give the model "
                "that is not distilled, or save the pipeline with a ClassifierFreeGuidance"
            )
        return float(guider.config.guidance_scale)

    @override
    def own_parts(self, guidance: float) -> dict[str, Any]:
        """One guider for all prompts, of the teacher's kind."""
        first, *others = self.guiders
        return {first: getattr(self.pipe, first).new(guidance_scale=guidance)} | dict.fromkeys(others)

    @override
    def own_guidance(self, guidance: float) -> dict[str, Any]:
        return {}

    @override
    def student_parts(self, sampler: SamplerName) -> dict[str, Any]:
        return super().student_parts(sampler) | self.own_parts(self.no_guidance)

    @override
    def student_guidance(self, guidance: float) -> dict[str, Any]:
        return {}


class QuotedTexts(PipelineTeacher):
    """Abstract: texts of the pipelines by Hunyuan, whose second text is what stands in quotes in a prompt.

    Attributes:
        most_tokens: of a prompt that the pipeline reads.
    """

    most_tokens: ClassVar[int] = 1000

    @override
    def usual_tokens(self) -> int:
        return self.most_tokens

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Most prompts have no second text."""
        self.check_tokens(self.most_tokens)
        self.pipe.tokenizer_max_length = self.max_tokens
        embeds, mask, quoted, quoted_mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, batch_size=len(prompts)
        )
        second = Condition(quoted.to(self.work_dtype), quoted_mask.long())
        return Condition(embeds.to(self.work_dtype), mask.long(), second=second)
