"""Anima's parts and their call, which is that of its modular pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import AnimaLoraLoaderMixin
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from torch import Tensor

from stepfold.teachers.modular import ModularParts


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

    def read(self, prompts: Sequence[str], max_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """States [B, L, D] of the text encoder at a second tokenizer's tokens, zero past a prompt's end, and mask."""
        components: Any = self
        read = AnimaTextEncoderStep.encode_prompt(
            components, list(prompts), prepare_unconditional_embeds=False, max_sequence_length=max_tokens, device=device
        )
        mask = read["t5_attention_mask"]
        assert mask is not None
        embeds = self.text_conditioner.to(device)(
            source_hidden_states=read["qwen_prompt_embeds"],
            target_input_ids=read["t5_input_ids"],
            target_attention_mask=mask,
            source_attention_mask=read["qwen_attention_mask"],
        )
        return embeds[:, : mask.shape[1]], mask
