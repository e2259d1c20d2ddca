"""Qwen-Image: flow prediction on latents packed two by two, guidance that keeps the length of each token."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers import QwenImagePipeline
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.flux import PackedTeacher, keep_precision, packed_prediction
from stepfold.teachers.guidance import guided_at_length, token_length
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.video import channel_scale

NOTHING = " "
"""The prompt of the unconditional branch, which the pipeline's own page uses; it has none by default."""
MOST_TOKENS = 1024
"""Of a prompt; the pipeline refuses more."""


def qwen_image_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a QwenImageTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance.

    It multiplies the time that it is given by 1000 itself.
    """

    def velocity(tokens: Tensor, t_flow: Tensor) -> Tensor:
        height, width = x_unit.shape[-2:]
        return transformer(
            hidden_states=tokens,
            timestep=time_scale / 1000 * t_flow,
            encoder_hidden_states=condition.embeds,
            encoder_hidden_states_mask=condition.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(tokens),
            return_dict=False,
        )[0]

    return packed_prediction(x_unit, t, velocity)


class QwenAutoencoder(PipelineTeacher):
    """Abstract: what the families share that draw with Qwen-Image's autoencoder, which is one of videos."""

    video_autoencoder = True

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 ** len(vae["temperal_downsample"])

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        return channel_scale(vae, self.device, 3)


class QwenLatents(QwenAutoencoder, PackedTeacher):
    """Abstract: of these families those that pack latents two by two."""


class QwenImageTeacher(QwenLatents):
    """QwenImagePipeline; the student is one too, without guidance."""

    pipelines = (QwenImagePipeline,)
    time_module = "time_text_embed"
    scale_argument = "true_cfg_scale"
    negative_prompt = NOTHING
    fields: ClassVar[Any] = {
        "guidance_embeds": ((False, None), "the pipeline cannot call a network that embeds guidance"),
        "zero_cond_t": ((False, None), "it edits images"),
        "use_additional_t_cond": ((False, None), "it takes images apart"),
        "use_layer3d_rope": ((False, None), "it takes images apart"),
    }

    @override
    def check_network(self, latent_channels: int) -> None:
        self.check_tokens(MOST_TOKENS)
        super().check_network(latent_channels)

    @override
    def network_channels(self) -> tuple[int, int]:
        """Of tokens."""
        config = self.transformer.config
        return config.in_channels, config.patch_size**2 * (config.out_channels or config.in_channels)

    @override
    def predictor(self) -> Predict:
        self.transformer.img_in.register_forward_hook(keep_precision)  # a student's copy has it too
        return partial(qwen_image_network, time_scale=self.time_scale)

    @override
    def guided(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, weight: Tensor) -> Tensor:
        """Each token of the flow velocity keeps the length that it has with the prompt."""
        return guided_at_length(x_unit, t, without, with_prompt, weight, token_length)

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        return pipe.prompt_template_encode.split("{}")[0], pipe.prompt_template_encode_start_idx

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Encodes inside of the pipeline's template; what comes after the prompt counts towards its length."""
        embeds, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.max_tokens)
        embeds = embeds.to(self.work_dtype)
        return Condition.whole(embeds) if mask is None else Condition(embeds, mask)

    @override
    def encode_nothing(self) -> Condition:
        return self.encode_texts([NOTHING])

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """The last block's part of the text's stream, which ends there."""
        last = f".transformer_blocks.{self.transformer.config.num_layers - 1}."
        return tuple(last + part for part in ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp."))
