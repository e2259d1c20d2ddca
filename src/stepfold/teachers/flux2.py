"""FLUX.2: flow prediction on latents of two-by-two patches; klein is guided by two calls, dev embeds its scale."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, GuidanceKind, SamplerName
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import flow_shift
from stepfold.teachers.tokens import chat_opening, tokenizer_in

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where a prompt stands in a template."""


REFERENCE_FRAME = 10
"""Where the frame of a reference image stands among the positions."""
SMALLEST_SIDE, LONGEST_RATIO, LARGEST_REFERENCE = 64, 8, 1024 * 1024
"""Of a reference image, in pixels; the pipeline refuses others, and makes larger ones smaller."""


def places(*sides: int, device: torch.device, first: int = 0) -> Tensor:
    """Position ids [product of the sides, 4] of frame, row, column and token of the text; frames begin at `first`."""
    ids = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))
    return ids + torch.tensor([first, 0, 0, 0], device=device)


def flux2_network(
    transformer: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    *,
    time_scale: float,
    reference: tuple[int, int],
) -> Tensor:
    """F [B, C, H, W] of a Flux2Transformer2DModel, whose time counts to `time_scale`; it multiplies it by 1000.

    The condition's second text is a reference image: clean latents of height and width `reference` behind the noisy
    ones.
    """
    height, width = x_unit.shape[-2:]
    ids, image = places(1, height, width, 1, device=x_unit.device), condition.second
    if image is not None:
        ids = torch.cat([ids, places(1, *reference, 1, device=x_unit.device, first=REFERENCE_FRAME)])

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        noisy = x_flow.flatten(2).mT
        tokens = transformer(
            hidden_states=noisy if image is None else torch.cat([noisy, image.embeds.to(noisy.dtype)], 1),
            timestep=time_scale / 1000 * t_flow,
            guidance=guidance,
            encoder_hidden_states=condition.embeds,
            txt_ids=places(1, 1, 1, condition.embeds.shape[1], device=x_flow.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return tokens[:, : height * width].mT.unflatten(2, (height, width))

    return flow_prediction(x_unit, t, velocity)


class PatchedLatents(PipelineTeacher):
    """Abstract: latents [B, C, H / 16, W / 16] are patches of two by two, normalised by running statistics."""

    autoencoder_layout = "once its channels, four by four, are squares of two by two"

    @override
    def autoencoder_channels(self, vae: dict[str, Any]) -> int:
        return 4 * vae["latent_channels"]

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 * super().pixels_a_latent(vae)

    def variance_floor(self, vae: Any) -> float:
        """What the pipeline adds to the autoencoder's running variance."""
        return vae.config.batch_norm_eps

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        mean, variance = (values.to(self.device)[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
        return (variance + self.variance_floor(vae)).rsqrt(), mean

    @override
    def to_autoencoder(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, 2)

    @override
    def from_autoencoder(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(latents, 2)


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
