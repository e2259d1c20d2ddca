"""FLUX.2 klein, which is guided by two calls, or distilled: FLUX.2's network behind another text encoder."""

from collections.abc import Mapping
from typing import Any

from diffusers import Flux2KleinPipeline
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.contract import GuidanceKind, SamplerName
from stepfold.teachers.flux2 import Flux2Teacher
from stepfold.teachers.tokens import chat_opening


class Flux2KleinTeacher(Flux2Teacher):
    """Flux2KleinPipeline; the student is one too, saved as distilled: it goes without guidance at any scale."""

    pipelines = (Flux2KleinPipeline,)

    @classmethod
    @override
    def guidance_kinds(cls, network: Mapping[str, Any], pipeline: Mapping[str, Any]) -> tuple[GuidanceKind, ...]:
        return ("none",) if pipeline.get("is_distilled") else ("classifier_free", "none")

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        """The beginning of the user's turn."""
        return chat_opening(pipe.tokenizer, enable_thinking=False), 0

    @override
    def made(self, latents: Tensor) -> Tensor:
        """The pipeline returns the autoencoder's."""
        return self.unit_latents(latents)

    @override
    def student_parts(self, sampler: SamplerName) -> dict[str, Any]:
        return super().student_parts(sampler) | {"is_distilled": True}

    @override
    def retimed_parts(self, network: Any) -> dict[str, Any]:
        return super().retimed_parts(network) | {"is_distilled": self.pipe.config.is_distilled}
