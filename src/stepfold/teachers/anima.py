"""Anima: flow prediction of a Cosmos network whose time is in [0, 1]; a modular pipeline, guided by a guider."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers.loaders import AnimaLoraLoaderMixin
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.guiders import GuiderTeacher
from stepfold.teachers.modular import ModularParts
from stepfold.teachers.qwen_image import QwenAutoencoder

USUAL_SIDE = 128
"""Latents along a side, where the call says nothing."""


class AnimaModularPipeline(AnimaLoraLoaderMixin, ModularParts):
    """The parts of diffusers' pipeline of that name."""

    def __init__(
        self, transformer: Any, text_conditioner: Any, text_encoder: Any, tokenizer: Any, t5_tokenizer: Any, vae: Any,
        scheduler: Any, guider: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            transformer=transformer, text_conditioner=text_conditioner, text_encoder=text_encoder, tokenizer=tokenizer,
            t5_tokenizer=t5_tokenizer, vae=vae, scheduler=scheduler, guider=guider,
        )  # fmt: skip

    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 50,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """See `AnimaAutoBlocks`, the text-to-image workflow."""
        call = {"num_inference_steps": num_inference_steps, "max_sequence_length": max_sequence_length}
        return self.run(output_type, return_dict, {"prompt": prompt} | call | kwargs)

    @classmethod
    def save_lora_weights(  # type: ignore[override]
        cls, save_directory: Any, transformer_lora_layers: Any, weight_name: str | None = None
    ) -> None:
        """As of other pipelines; diffusers has none for Anima, though it loads such a file."""
        state = cls.pack_weights(transformer_lora_layers, cls.transformer_name)
        cls.write_lora_layers(state, save_directory, True, weight_name, None, True)  # type: ignore[arg-type]


def anima_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, tokens: int
) -> Tensor:
    """F [B, C, H, W] of a CosmosTransformer3DModel, whose time is in [0, 1]; it embeds no guidance.

    It attends to padding, which is zero up to `tokens` positions. Latents are a video's of one frame to it.
    """
    real = condition.embeds * condition.mask[..., None].to(condition.embeds.dtype)
    text = nn.functional.pad(real, (0, 0, 0, tokens - real.shape[1]))

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=x_flow.unsqueeze(2),
            timestep=t_flow,
            encoder_hidden_states=text,
            padding_mask=x_flow.new_zeros(1, 1, *x_flow.shape[-2:]),
            return_dict=False,
        )[0].squeeze(2)

    return flow_prediction(x_unit, t, velocity)


class AnimaTeacher(GuiderTeacher, QwenAutoencoder):
    """AnimaModularPipeline; the student is one too, with a guider at scale 1."""

    pipelines = (AnimaModularPipeline,)
    even_ladder = True
    prompt_argument = "prompt"
    fields: ClassVar[Any] = {
        "img_context_dim_in": ((None, 0), "it reads an image beside the text"),
        "patch_size": (([1, 2, 2], (1, 2, 2)), "the pipeline's sizes are of patches of two by two"),
    }

    @override
    def check_index(self) -> None:
        """Refuses parts that the pipeline does not read, and one too few."""
        AnimaModularPipeline.check(self.source, self.index)

    @classmethod
    @override
    def time_scale_of(cls, network: Any, schedule: Any) -> float:
        """The pipeline divides by what its scheduler counts to."""
        return 1.0

    @override
    def predictor(self) -> Predict:
        return partial(anima_network, tokens=self.pipe.text_conditioner.config.min_sequence_length)

    @override
    def check_network(self, latent_channels: int) -> None:
        super().check_network(latent_channels)
        self.check_tokens(self.pipe.text_conditioner.config.min_sequence_length)
        if self.transformer.config.concat_padding_mask and not is_torchvision_available():
            raise UserError("this CosmosTransformer3DModel needs torchvision for its padding mask; install torchvision")

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        side = USUAL_SIDE * factor
        return self.transformer.config.in_channels, 2 * factor, side, side

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """No larger than the network's positions reach."""
        shape = super().shape_at(height, width)
        if any(side > most for side, most in zip(shape[-2:], self.transformer.config.max_size[1:], strict=True)):
            rows, columns = (self.factor * most for most in self.transformer.config.max_size[1:])
            raise UserError(
                f"{height} x {width} pixels are more than this network's {rows} x {columns}; give a smaller"
            )
        return shape

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """States of the text encoder, read at a second tokenizer's tokens; past a prompt's end there are zeros."""
        read = AnimaTextEncoderStep.encode_prompt(
            self.pipe, list(prompts), prepare_unconditional_embeds=False, max_sequence_length=self.max_tokens,
            device=self.device,
        )  # fmt: skip
        mask = read["t5_attention_mask"]
        assert mask is not None
        embeds = self.pipe.text_conditioner.to(self.device)(
            source_hidden_states=read["qwen_prompt_embeds"],
            target_input_ids=read["t5_input_ids"],
            target_attention_mask=mask,
            source_attention_mask=read["qwen_attention_mask"],
        )
        return Condition(embeds[:, : mask.shape[1]].to(self.work_dtype), mask.long())

    @classmethod
    @override
    def after_loading(cls, lora: bool) -> list[str]:
        """A teacher's guider is not that of a student."""
        return ["pipe.load_components()", *["pipe.guider = pipe.guider.new(guidance_scale=1.0)"] * lora]

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        return latents.squeeze(2)
