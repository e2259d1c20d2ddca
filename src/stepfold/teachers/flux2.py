"""FLUX.2 dev, which embeds its guidance: flow prediction on latents of two-by-two patches."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition, GuidanceKind
from stepfold.teachers.family import Predict
from stepfold.teachers.flux2_network import flux2_network
from stepfold.teachers.patched import PatchedLatents
from stepfold.teachers.schedules import flow_shift
from stepfold.teachers.tokens import tokenizer_in

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where a prompt stands in a template."""
SMALLEST_SIDE, LONGEST_RATIO, LARGEST_REFERENCE = 64, 8, 1024 * 1024
"""Of a reference image, in pixels; the pipeline refuses others, and makes larger ones smaller."""


class Flux2Teacher(PatchedLatents):
    """Flux2Pipeline; the student is one too, with guidance embedded as in its teacher."""

    pipelines = (Flux2Pipeline,)
    time_module = "time_guidance_embed"
    even_ladder = True
    prompt_argument = "prompt"
    fields: ClassVar[Any] = {"patch_size": ((1,), "the pipeline makes patches of the latents itself")}

    @property
    @override
    def reads_images(self) -> bool:
        return True

    @override
    def predictor(self) -> Predict:
        height, width = self.latent_shape[1:]
        return partial(flux2_network, time_scale=self.time_scale, reference=(height, width))

    @override
    def of_the_prompt_alone(self) -> list[nn.Module]:
        return [self.transformer.context_embedder]

    @classmethod
    @override
    def guidance_kinds(cls, network: Mapping[str, Any], pipeline: Mapping[str, Any]) -> tuple[GuidanceKind, ...]:
        return ("embedded" if network["guidance_embeds"] else "none",)

    @override
    def shift_at(self, num_steps: int) -> float:
        _, height, width = self.latent_shape
        return flow_shift(self.pipe.scheduler, 0, compute_empirical_mu(height * width, num_steps))

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        side = self.pipe.default_sample_size * factor // 2
        return self.transformer.config.in_channels, factor, side, side

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        """The system message; the template begins with the token that a tokenizer would put there, so it is free."""
        said = [("system", pipe.system_message), ("user", MARK)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        before = pipe.tokenizer.apply_chat_template(messages, tokenize=False).split(MARK)[0]
        ids = [tokenizer_in(pipe.tokenizer).encode(before, add_special_tokens=special) for special in (True, False)]
        return before, len(ids[0]) - len(ids[1])

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Layers of the text encoder, joined; the padding is attended to, as in use."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.max_tokens)
        return Condition.whole(embeds.to(self.work_dtype))

    @override
    def encode_images(self, images: Tensor) -> Condition:
        """Tokens of the clean latents."""
        short, long = sorted((self.height, self.width))
        if short < SMALLEST_SIDE or long > LONGEST_RATIO * short or short * long > LARGEST_REFERENCE:
            raise UserError(
                f"reference images are {self.height} x {self.width}, as teacher.height and width say; this pipeline "
                f"reads sides of at least {SMALLEST_SIDE}, up to {LONGEST_RATIO} to 1, of {LARGEST_REFERENCE:,} pixels"
            )
        return Condition.whole((self.encode_pictures(images) / self.sigma_data).flatten(2).mT)

    @override
    def block_stacks(self) -> dict[str, str]:
        return super().block_stacks() | {"single_transformer_blocks": "num_single_layers"}

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).mT

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        return latents.mT.unflatten(2, self.latent_shape[1:])

    @override
    def given(self, noise: Tensor) -> Tensor:
        """The pipeline packs it itself."""
        return noise
