"""Kandinsky 5, images and videos: flow prediction, classifier-free guidance, latents with their channels last."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5T2VPipeline
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.calls import OwnLevels, by_equal_factors
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.tokens import TextReader
from stepfold.teachers.video import VideoTeacher

MOST_TOKENS = 1023
"""Of a prompt and what the pipeline puts behind it; the network has no position for more."""
NO_VIDEO = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
"""The negative prompt of the pipeline of videos, where its call is given none."""


def channels_last(latents: Tensor) -> Tensor:
    """[B, C, F, H, W], or [B, C, H, W] of pictures, which are one frame -> [B, F, H, W, C]."""
    return (latents if latents.ndim == 5 else latents.unsqueeze(2)).movedim(1, -1)


def without_image(latents: Tensor) -> Tensor:
    """Latents [B, F, H, W, C], with those of an image to begin with and their mask: there is none."""
    none = torch.zeros_like(latents)
    return torch.cat([latents, none, none[..., :1]], -1)


def kandinsky5_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *,
    time_scale: float, spread: Callable[[int, int], Sequence[float]],
) -> Tensor:  # fmt: skip
    """F [B, C, ...] of a Kandinsky5Transformer3DModel, whose time counts to `time_scale`; it embeds no guidance.

    Args:
        transformer, x_unit, t, condition, guidance: see `Predict`; padding has the position -1.
        time_scale: see there.
        spread: (height, width) of the latents -> by how much positions are divided, along frames, rows and columns.
    """
    height, width = x_unit.shape[-2:]
    sides = (1 if x_unit.ndim == 4 else x_unit.shape[2], height // 2, width // 2)
    count = torch.arange(condition.mask.shape[1], device=x_unit.device)

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        x = channels_last(x_flow)
        v = transformer(
            hidden_states=without_image(x) if transformer.visual_cond else x,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            timestep=time_scale * t_flow,
            visual_rope_pos=[torch.arange(side, device=x.device) for side in sides],
            text_rope_pos=torch.where(condition.mask.bool(), count, -1),
            scale_factor=spread(height, width),
            return_dict=False,
        )
        return v.movedim(-1, 1).reshape(x_flow.shape)

    return flow_prediction(x_unit, t, velocity)


def marked(rotation: Tensor) -> Tensor:
    """Whether a text's token is padding, bool [B or 1, L], of rotations [1, (B), L, 1, D/2, 2, 2] by its position."""
    return rotation[..., 0, 0, 0, 0].isnan().flatten(0, -2)


def mark(block: nn.Module, args: tuple[Tensor, ...], text: Tensor) -> Tensor:
    """A forward hook of the last block that reads the text alone: in its output [B, L, D] padding is no number."""
    return text.masked_fill(marked(args[2])[..., None], math.nan)


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, L, heads, D] turned by `marked`'s rotations, to the precision of the class: bfloat16."""
    return (rotation * x.float().unflatten(-1, (-1, 1, 2))).sum(-1).to(torch.bfloat16).reshape(x.shape).type_as(x)


class TextAttention(Kandinsky5AttnProcessor):
    """Attention of a text to itself or of latents to it, as the class's own but for padding, which it leaves out."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None, sparse_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """[B, N, D] -> [B, N, D]; arguments of diffusers' processor."""
        if encoder_hidden_states is not None:
            padding = encoder_hidden_states[..., 0].isnan()
            text = encoder_hidden_states.masked_fill(padding[..., None], 0)
        else:
            assert rotary_emb is not None
            text, padding = hidden_states, marked(rotary_emb)
        query, key, value = (
            layer(values).unflatten(-1, (attn.num_heads, -1))
            for layer, values in ((attn.to_query, hidden_states), (attn.to_key, text), (attn.to_value, text))
        )
        query, key = (
            norm(values.float()).type_as(values) for norm, values in ((attn.query_norm, query), (attn.key_norm, key))
        )
        if rotary_emb is not None:
            query, key = (turned(values, rotary_emb.masked_fill(rotary_emb.isnan(), 0)) for values in (query, key))
        query, key, value = (values.transpose(1, 2) for values in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=~padding[:, None, None])
        return attn.out_layer(found.transpose(1, 2).flatten(2))


def leave_out_padding(transformer: Any) -> None:
    """Has a network attend to no padding, whose position is -1: its class attends to it, and takes no mask.

    The mark goes from position to attention within the network's own values, so that blocks may be computed again.
    """
    positions = transformer.text_rope_embeddings
    positions.args = torch.cat([positions.args, torch.full_like(positions.args[:1], math.nan)])
    for block in transformer.text_transformer_blocks:
        block.self_attention.set_processor(TextAttention())
    for block in transformer.visual_transformer_blocks:
        block.cross_attention.set_processor(TextAttention())
    transformer.text_transformer_blocks[-1].register_forward_hook(mark)


class Kandinsky5Teacher(OwnLevels, PipelineTeacher):
    """Abstract: what the pipelines of images and videos share; the student is one too, without guidance."""

    one_by_one = True
    rounds = True
    fields: ClassVar[Any] = {"patch_size": (((1, 2, 2), [1, 2, 2]), "the pipeline calls for patches of 1 x 2 x 2")}

    def spread(self) -> Callable[[int, int], Sequence[float]]:
        """See `kandinsky5_network`; a plain function, or a partial of one."""
        raise NotImplementedError

    @override
    def predictor(self) -> Predict:
        leave_out_padding(self.transformer)
        return partial(kandinsky5_network, time_scale=self.time_scale, spread=self.spread())

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embeddings"

    @override
    def network_channels(self) -> tuple[int, int]:
        config = self.transformer.config
        return config.in_visual_dim, config.out_visual_dim

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipeline's call has a default size."""
        call = inspect.signature(self.pipe.__call__).parameters
        return self.network_channels()[0], 2 * factor, call["height"].default, call["width"].default

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """The pipelines read no shift."""
        return vae.config.scaling_factor, 0.0

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return channels_last(latents)

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        videos = latents.movedim(-1, 1)
        return videos if len(self.latent_shape) == 4 else videos.squeeze(2)

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        return pipe.prompt_template.split("{}")[0], pipe.prompt_template_encode_start_idx

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader | None:
        """What stands behind a prompt counts."""
        reader = super().reader_in(pipe, max_tokens)
        assert reader is not None
        behind = reader.tokenizer(pipe.prompt_template.split("{}")[1]).input_ids
        return replace(reader, most=reader.most - len(behind))

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """One prompt at once: among longer ones the pipeline has padding attended to, and cuts too much."""
        self.check_tokens(MOST_TOKENS)
        encoded = [
            self.pipe.encode_prompt(prompt, device=self.device, max_sequence_length=self.max_tokens)
            for prompt in prompts
        ]
        texts = Condition.ragged([embeds[0].to(self.work_dtype) for embeds, *_ in encoded])
        return replace(texts, pooled=torch.cat([pooled.to(self.work_dtype) for _, pooled, _ in encoded]))

    @override
    def fresh_scheduler(self) -> Any:
        return by_equal_factors()

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"visual_transformer_blocks": "num_visual_blocks"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        return [(block, self.transformer.config.model_dim) for block in self.transformer.visual_transformer_blocks]


def as_they_are(height: int, width: int) -> tuple[float, float, float]:
    """`spread` of images."""
    return 1.0, 1.0, 1.0


class Kandinsky5ImageTeacher(Kandinsky5Teacher):
    """Kandinsky5T2IPipeline."""

    pipelines = (Kandinsky5T2IPipeline,)
    output = "image"
    fields: ClassVar[Any] = {
        **Kandinsky5Teacher.fields,
        "visual_cond": ((False,), "it edits images"),
    }

    @override
    def spread(self) -> Callable[[int, int], Sequence[float]]:
        return as_they_are

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """The pipeline has a list of sizes; of another one it makes the nearest of them."""
        if (width, height) not in self.pipe.resolutions:
            sizes = ", ".join(f"{high} x {wide}" for wide, high in self.pipe.resolutions)
            raise UserError(
                f"the image is to be {height} x {width} pixels, but Kandinsky5T2IPipeline makes {sizes} (height x "
                "width) alone; give one of them"
            )
        return super().shape_at(height, width)


def spread_of_video(height: int, width: int, *, factor: int) -> Sequence[float]:
    """`spread` of videos, as the pipeline has it for sides in pixels, which are `factor` a latent."""
    pipeline: Any = Kandinsky5T2VPipeline
    return pipeline._get_scale_factor(None, factor * height, factor * width)


class Kandinsky5VideoTeacher(Kandinsky5Teacher, VideoTeacher):
    """Kandinsky5T2VPipeline. Pictures of it are filmstrips."""

    pipelines = (Kandinsky5T2VPipeline,)
    stand_ins = ("vae",)

    @override
    def check_network(self, latent_channels: int) -> None:
        """Of sparse attention it is the latents that say who is attended to."""
        if self.transformer.config.attention_type == "nabla":
            raise UserError(
                f"the network of teacher {self.source!r} has attention_type='nabla': sparse attention, as in videos of "
                "10 s; give a Kandinsky 5 of regular attention, such as one for 5 s"
            )
        super().check_network(latent_channels)

    @override
    def spread(self) -> Callable[[int, int], Sequence[float]]:
        return partial(spread_of_video, factor=self.factor)

    @override
    def encode_nothing(self) -> Condition:
        return self.encode_texts([NO_VIDEO])

    @override
    def given(self, noise: Tensor) -> Tensor:
        """Where the network reads an image too, with none."""
        latents = self.pack(noise)
        return without_image(latents) if self.transformer.visual_cond else latents
