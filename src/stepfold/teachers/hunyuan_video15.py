"""HunyuanVideo 1.5: flow prediction, guidance by a guider, two texts; latents [B, C, F, H, W]."""

from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideo15Pipeline
from torch import Tensor
from typing_extensions import override

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.guiders import GuiderTeacher, QuotedTexts
from stepfold.teachers.tokens import TextReader
from stepfold.teachers.video import VideoTeacher


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


class HunyuanVideo15Teacher(QuotedTexts, GuiderTeacher, VideoTeacher):
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

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        """Tokens of the template before a prompt are cut off; those behind it count."""
        empty = [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": ""}]
        around = pipe.tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=True)["input_ids"]
        behind = max(0, len(around) - pipe.prompt_template_encode_start_idx)
        return TextReader(pipe.tokenizer, (max_tokens or cls.most_tokens) - behind, "", 0)

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        return vae.config.scaling_factor, 0.0

    @override
    def decode(self, x0: Tensor, batch: int | None = None, *, with_gradient: bool = False) -> Tensor:
        """One video at once: diffusers' autoencoder takes no more."""
        return super().decode(x0, 1, with_gradient=with_gradient)

    @override
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """One video at once, as `decode`."""
        return torch.cat([super(HunyuanVideo15Teacher, self).encode_pictures(part) for part in pictures.split(1)])
