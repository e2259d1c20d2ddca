"""DiT: noise prediction for a class instead of a text, classifier-free guidance with the class of nothing."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiTPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition
from stepfold.teachers.vp import Raw, VPTeacher


def dit_network(transformer: Any, x_unit: Tensor, step: Tensor, condition: Condition) -> Tensor:
    """Noise, and a learned variance, [B, 2 C, H, W] of a DiTTransformer2DModel; the condition is a class, one-hot."""
    return transformer(x_unit, timestep=step, class_labels=condition.embeds[:, 0].argmax(-1), return_dict=False)[0]


def class_names(labels: dict[str, str]) -> dict[str, int]:
    """Names in lower case -> class: each label as a whole, and each of the synonyms between its commas."""
    return {
        name.strip().lower(): int(number)
        for number, label in labels.items()
        for name in (*label.split(","), label)
    }  # fmt: skip


class DiTTeacher(VPTeacher):
    """DiTPipeline; the student is one too. A prompt is a class: its number, or its name.

    Its conditions hold the class one-hot, [B, 1, classes + 1], exact in bfloat16; the last one is the class of nothing.
    """

    pipelines = (DiTPipeline,)
    readers = ()
    loads_lora = False
    outputs = (1, 2)
    fields: ClassVar[Any] = {"num_embeds_ada_norm": ((1000,), "DiTPipeline takes class 1000 for no class")}

    @override
    def raw(self) -> Raw:
        """Checks that pictures are of the one size that the network draws.

        Raises:
            UserError: another size is asked for.
        """
        side = self.transformer.config.sample_size
        wrong = [shape for shape in (self.latent_shape, *self.latent_shapes) if shape[1:] != (side, side)]
        if wrong:
            height, width = (self.factor * latents for latents in wrong[0][1:])
            raise UserError(
                f"the picture is to be {height} x {width} pixels, but this network draws at one size only; "
                "leave teacher.height, teacher.width and teacher.sizes out"
            )
        return dit_network

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        side = self.transformer.config.sample_size * factor
        return self.transformer.config.in_channels, factor, side, side

    @property
    @override
    def examples(self) -> tuple[str, ...]:
        return tuple(map(str, range(min(8, self.num_classes))))

    @property
    def num_classes(self) -> int:
        """Without the class of nothing."""
        return self.transformer.config.num_embeds_ada_norm

    @override
    def usual_tokens(self) -> int:
        return 1

    def class_of(self, prompt: str) -> int:
        """The class that a prompt names.

        Raises:
            UserError: it names none.
        """
        text, names = prompt.strip().lower(), class_names(self.index.get("id2label") or {})
        found = int(text) if text.isdecimal() else names.get(text, self.num_classes)
        if found >= self.num_classes:
            near = difflib.get_close_matches(text, names, n=1, cutoff=0) or ["207"]
            raise UserError(
                f"prompt {prompt!r} is no class of this teacher; give a number from 0 to {self.num_classes - 1}"
                + (f", or a name of its id2label, such as {near[0]!r}" if names else "")
            )
        return found

    @override
    def check_prompts(self, prompts: Iterable[str]) -> None:
        for prompt in prompts:
            self.class_of(prompt)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        return self._one_hot([self.class_of(prompt) for prompt in prompts])

    @override
    def encode_nothing(self) -> Condition:
        return self._one_hot([self.num_classes])

    def _one_hot(self, classes: list[int]) -> Condition:
        numbers = torch.tensor(classes, device=self.device)[:, None]
        return Condition.whole(nn.functional.one_hot(numbers, self.num_classes + 1).to(self.work_dtype))

    @override
    def usual_call(self) -> dict[str, Any]:
        """This pipeline takes no sizes."""
        return {}

    @override
    def in_call(self, prompt: str) -> Any:
        return [self.class_of(prompt)]

    @override
    def inputs(self, prompts: Sequence[str], draws: Sequence[torch.Generator]) -> dict[str, Any]:
        """This pipeline draws its noise itself."""
        return {"class_labels": [self.class_of(prompt) for prompt in prompts], "generator": list(draws)}

    @override
    def latents_of(self, pipe: Any, prompts: Sequence[str], draws: Sequence[torch.Generator], **call: Any) -> Tensor:
        """This pipeline gives pictures only, so its autoencoder is watched for the latents."""
        given: list[Tensor] = []
        first: nn.Module = pipe.vae.decoder if pipe.vae.post_quant_conv is None else pipe.vae.post_quant_conv
        handle = first.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        try:
            pipe(**self.inputs(prompts, draws), output_type="pt", **call)
        finally:
            handle.remove()
        return torch.cat(given) * pipe.vae.config.scaling_factor

    def index_extras(self) -> dict[str, Any]:
        """The names of the classes."""
        return {"id2label": self.index.get("id2label")}
