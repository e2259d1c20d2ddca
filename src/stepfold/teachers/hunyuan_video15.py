"""HunyuanVideo 1.5: flow prediction, guidance by a guider, two texts; latents [B, C, F, H, W]."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15Pipeline
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, SamplerName
from stepfold.teachers.family import Predict
from stepfold.teachers.tokens import TextReader
from stepfold.teachers.video import VideoTeacher

MOST_TOKENS = 1000


def hunyuan_video15_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None
) -> Tensor:
    """F [B, C, F, H, W] of a HunyuanVideo15Transformer3DModel, whose time counts to 1000; it embeds no guidance.

    Beside its latents it gets those of an image, and their mask: zeros, as of text to video. Of the image's own tokens,
    which nothing attends to then, it gets one.
    """
    glyphs = condition.second
    assert glyphs is not None

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        none = torch.zeros_like(x_flow)
        return transformer(
            hidden_states=torch.cat([x_flow, none, none[:, :1]], 1),
            timestep=1000 * t_flow,
            encoder_hidden_states=condition.embeds,
            encoder_attention_mask=condition.mask,
            encoder_hidden_states_2=glyphs.embeds,
            encoder_attention_mask_2=glyphs.mask,
            image_embeds=condition.embeds.new_zeros(len(t), 1, transformer.config.image_embed_dim),
            return_dict=False,
        )[0]

    return flow_prediction(x_unit, t, velocity)


class HunyuanVideo15Teacher(VideoTeacher):
    """HunyuanVideo15Pipeline; the student is one too, with a guider at scale 1. Pictures of it are filmstrips."""

    pipelines = (HunyuanVideo15Pipeline,)
    loads_lora = False
    even_ladder = True
    stand_ins = ("vae",)
    second_tokens = 256
    picture_output = 0
    fields: ClassVar[Any] = {
        "use_meanflow": ((False, None), "it is told two times"),
        "patch_size_t": ((1,), "its tokens are of several frames"),
    }

    @override
    def predictor(self) -> Predict:
        return hunyuan_video15_network

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embed"

    @override
    def check_network(self, latent_channels: int) -> None:
        """The guider's kind and options are part of what the pipeline predicts."""
        super().check_network(latent_channels)
        guider = self.pipe.guider
        plain = dict(guidance_rescale=0.0, use_original_formulation=False, start=0.0, stop=1.0, enabled=True)
        other = [name for name, value in plain.items() if guider.config.get(name, value) != value]
        if type(guider) is not ClassifierFreeGuidance or other:
            raise UserError(
                f"teacher {self.source!r} has a {type(guider).__name__} with {other[0] if other else 'its own rule'}; "
                "give it a ClassifierFreeGuidance with guidance_scale alone"
            )

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """No image is read, few prompts have a second text, and the first ends in the last block."""
        last = f".transformer_blocks.{self.transformer.config.num_layers - 1}."
        ends = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "ff_context.")
        return (".image_embedder.", ".context_embedder_2.", *(f"{last}{part}" for part in ends))

    @override
    def network_channels(self) -> tuple[int, int]:
        """Of the channels in, half are an image's and one is a mask."""
        config = self.transformer.config
        return (config.in_channels - 1) // 2, config.out_channels

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The usual size is that of 16 by 9 with the network's number of pixels."""
        config, (width, height) = self.transformer.config, self.pipe.default_aspect_ratio
        usual = self.pipe.video_processor.calculate_default_height_width(height, width, self.pipe.target_size)
        return self.network_channels()[0], factor * config.patch_size, *usual

    @override
    def usual_guidance(self) -> float:
        return float(self.pipe.guider.config.guidance_scale)

    @override
    def usual_tokens(self) -> int:
        return MOST_TOKENS

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        """Tokens of the template before a prompt are cut off; those behind it count."""
        empty = [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": ""}]
        around = pipe.tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=True)["input_ids"]
        behind = max(0, len(around) - pipe.prompt_template_encode_start_idx)
        return TextReader(pipe.tokenizer, (max_tokens or MOST_TOKENS) - behind, "", 0)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """The second text is what stands in quotes in a prompt; most have none."""
        if self.max_tokens > MOST_TOKENS:
            raise UserError(
                f"max_tokens is {self.max_tokens}, but this pipeline reads {MOST_TOKENS} tokens of a prompt; "
                "leave it out"
            )
        self.pipe.tokenizer_max_length = self.max_tokens
        embeds, mask, glyphs, glyph_mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, batch_size=len(prompts)
        )
        second = Condition(glyphs.to(self.work_dtype), glyph_mask.long())
        return Condition(embeds.to(self.work_dtype), mask.long(), second=second)

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        return vae.config.scaling_factor, 0.0

    @override
    def decode(self, x0: Tensor, batch: int = 1) -> Tensor:
        """One video at once: diffusers' autoencoder takes no more."""
        return super().decode(x0, 1)

    @override
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """One video at once, as `decode`."""
        return torch.cat([super(HunyuanVideo15Teacher, self).encode_pictures(part) for part in pictures.split(1)])

    @override
    def own_parts(self, guidance: float) -> dict[str, Any]:
        return {"guider": ClassifierFreeGuidance(guidance_scale=guidance)}

    @override
    def own_guidance(self, guidance: float) -> dict[str, Any]:
        return {}

    @override
    def student_parts(self, sampler: SamplerName) -> dict[str, Any]:
        return super().student_parts(sampler) | self.own_parts(self.no_guidance)

    @override
    def student_guidance(self, guidance: float) -> dict[str, Any]:
        return {}
