"""Wan 2.1 and 2.2, to videos from a text, and from a first frame: flow prediction; latents [B, C, F, H, W]."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction, flow_time, unsqueeze_like
from stepfold.teachers.calls import OwnLevels, by_equal_factors, parts_of
from stepfold.teachers.contract import Condition
from stepfold.teachers.experts import Experts
from stepfold.teachers.family import Predict
from stepfold.teachers.video import VideoTeacher

LEAST_LEVEL = 1e-6
"""Noise level below which a velocity to a first frame is not divided further."""


def wan_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, tokens: int
) -> Tensor:
    """F [B, C, F, H, W] of a WanTransformer3DModel, whose time counts to 1000; it embeds no guidance.

    It attends to padding, which is zero up to `tokens` positions. It is told one time a sample; Wan 2.2's pipeline of
    text and images tells it to every token, and without an image they are all that one.

    The condition's second text is a first frame: its clean latents take the place of the state's, at time 0, and the
    velocity there leads to them.
    """
    real = condition.embeds * condition.mask[..., None].to(condition.embeds.dtype)
    frames, height, width = x_unit.shape[2:]
    first = None
    if condition.second is not None:
        first = condition.second.embeds.to(x_unit.dtype).mT.unflatten(2, (1, height, width))

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        seen, times = x_flow, 1000 * t_flow
        if first is not None:
            seen = torch.cat([first, x_flow[:, :, 1:]], 2)
            later = torch.arange(frames, device=t_flow.device).clamp(max=1).repeat_interleave(height * width // 4)
            times = times[:, None] * later
        made = transformer(
            hidden_states=seen,
            timestep=times,
            encoder_hidden_states=nn.functional.pad(real, (0, 0, 0, tokens - real.shape[1])),
            return_dict=False,
        )[0]
        if first is None:
            return made
        to_first = (x_flow[:, :, :1] - first) / unsqueeze_like(t_flow, x_flow).clamp(min=LEAST_LEVEL)
        return torch.cat([to_first, made[:, :, 1:]], 2)

    return flow_prediction(x_unit, t, velocity)


def timesteps(t: Tensor) -> Tensor:
    """What the network is told of times t [B], as it counts them: to 1000."""
    return 1000 * flow_time(t)


def anyflow_classes() -> tuple[Any, Any, Any]:
    """Pipeline, network and scheduler of diffusers for networks of Wan's kind that are told both times."""
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    return AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler


class WanTeacher(OwnLevels, VideoTeacher):
    """WanPipeline; the student is one too, of as many networks, without guidance. Pictures of it are filmstrips.

    With first frames it is WanImageToVideoPipeline, which takes the parts of Wan 2.2 TI2V-5B.
    """

    pipelines = (WanPipeline, WanImageToVideoPipeline)
    fields: ClassVar[Any] = {
        "image_dim": ((None,), "it reads an image beside the text"),
        "added_kv_proj_dim": ((None,), "it reads an image beside the text"),
    }

    @override
    def check_index(self) -> None:
        """Refuses a second network without a boundary, which its pipeline never calls, and images in more channels."""
        if self.index.get("_class_name") == WanImageToVideoPipeline.__name__ and not self.index.get("expand_timesteps"):
            raise UserError(
                f"teacher {self.source!r} is a WanImageToVideoPipeline whose network reads images in channels of their "
                "own; give a WanPipeline, or Wan 2.2 TI2V-5B"
            )
        second, _ = self.index.get("transformer_2") or (None, None)
        if bool(second) != (self.index.get("boundary_ratio") is not None):
            raise UserError(
                f"teacher {self.source!r} has one of transformer_2 and boundary_ratio in its model_index.json, and "
                "they go together; copy that file again, or take both out for a Wan of one network"
            )

    @override
    def whole_network(self) -> nn.Module:
        """Of a pipeline with a boundary, both networks."""
        first, second = self.pipe.transformer, self.pipe.transformer_2
        if second is None:
            return super().whole_network()
        ours, theirs = (
            {k: v for k, v in network.config.items() if k[0] != "_" and k not in self.block_stacks().values()}
            for network in (first, second)
        )
        if other := [name for name, value in ours.items() if theirs[name] != value]:
            raise UserError(
                f"the two networks of teacher {self.source!r} differ in {other[0]} ({ours[other[0]]!r}, "
                f"{theirs[other[0]]!r}); copy the folder again"
            )
        return Experts(first, second, self.index["boundary_ratio"] * self.num_train_timesteps)

    @override
    def network_parts(self, network: Any) -> dict[str, Any]:
        return dict(network.named_children()) if isinstance(network, Experts) else super().network_parts(network)

    @override
    def check_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        if loras and self.pipe.transformer_2 is not None:
            raise UserError(
                "teacher.lora is for a pipeline of one network, and this WanPipeline has two; merge the LoRAs of each "
                "with diffusers, save the pipeline and give that folder"
            )

    @override
    def check_network(self, latent_channels: int) -> None:
        """The pipeline counts squares of two by two latents where it tells each token its time."""
        super().check_network(latent_channels)
        if self.index.get("expand_timesteps") and (patch := tuple(self.transformer.config.patch_size)) != (1, 2, 2):
            raise UserError(
                f"this {type(self.transformer).__name__} has patch_size={patch}, but with expand_timesteps WanPipeline "
                "tells a time to patches of (1, 2, 2); set expand_timesteps to false in model_index.json"
            )

    @override
    def predictor(self) -> Predict:
        return partial(wan_network, tokens=self.max_tokens)

    @override
    def time_part(self, network: Any) -> str | None:
        """None where there are several times: of two networks, and of a first frame's tokens."""
        several = isinstance(network, Experts) or self.reads_images
        return None if several else "condition_embedder.time_embedder"

    @property
    @override
    def reads_images(self) -> bool:
        return isinstance(self.pipe, WanImageToVideoPipeline)

    @override
    def take_images(self) -> bool:
        """Puts the parts of a pipeline that tells each token its time into the class that is shown first frames.

        Raises:
            UserError: it is trained at other sizes than theirs.
        """
        if not (self.reads_images or self.index.get("expand_timesteps")):
            return False
        if other := [shape for shape in self.latent_shapes if shape != self.latent_shape]:
            height, width = (self.factor * side for side in other[0][-2:])
            raise UserError(
                f"first frames are {self.height} x {self.width}, and teacher.sizes has {height} x {width}; leave out "
                "teacher.sizes"
            )
        if not self.reads_images:
            self.pipe = WanImageToVideoPipeline(**parts_of(self.pipe))
            self.pipe.set_progress_bar_config(disable=True)
        return True

    @override
    def encode_images(self, images: Tensor) -> Condition:
        """Tokens of the clean latents of a video of one frame."""
        latents = super(VideoTeacher, self).encode_pictures(images.unsqueeze(2)) / self.sigma_data
        return Condition.whole(latents.flatten(2).mT)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Keeps a prompt's own tokens; past its end there are zeros."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.to(self.work_dtype), embeds.abs().amax(-1).gt(0).long())

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"blocks": "num_layers"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Of two networks, those of the first; see `features`."""
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        first = next(iter(self.network_parts(self.transformer).values()))
        return [(block, width) for block in first.blocks]

    @override
    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """Of two networks each sample has those of the network that its time picks, in the same places."""
        network = self.transformer
        if not isinstance(network, Experts):
            return super().features(x, t, condition, guidance)
        first: Any = network.transformer
        blocks = list(first.blocks)
        shares: list[tuple[Any, Tensor]] = network.shares(self.num_train_timesteps * flow_time(t))
        made = []
        for expert, rows in shares:
            own = [expert.blocks[min(blocks.index(block), len(expert.blocks) - 1)] for block in self.feature_blocks]
            x_own, t_own, scale = (values.index_select(0, rows) for values in (x, t, guidance))
            made.append(self.maps_of(own, x_own, t_own, condition.rows(rows), scale))
        back = torch.cat([rows for _, rows in shares]).argsort()
        return [torch.cat(maps).index_select(0, back) for maps in zip(*made, strict=True)]

    @override
    def fresh_scheduler(self) -> Any:
        return by_equal_factors()
