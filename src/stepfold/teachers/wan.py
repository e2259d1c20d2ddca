"""Wan 2.1 and 2.2, to videos from a text, and from a first frame: flow prediction; latents [B, C, F, H, W]."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.calls import OwnLevels, by_equal_factors
from stepfold.teachers.contract import Condition
from stepfold.teachers.experts import Experts, ExpertsTeacher
from stepfold.teachers.family import Predict
from stepfold.teachers.first_frames import FirstFrameTeacher, after_first_frame


def wan_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, tokens: int
) -> Tensor:
    """F [B, C, F, H, W] of a WanTransformer3DModel, whose time counts to 1000; it embeds no guidance.

    It attends to padding, which is zero up to `tokens` positions. It is told one time a sample; Wan 2.2's pipeline of
    text and images tells it to every token, and without an image they are all that one. The condition's second text is
    a first frame.
    """
    real = condition.embeds * condition.mask[..., None].to(condition.embeds.dtype)

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=x_flow,
            timestep=1000 * t_flow,
            encoder_hidden_states=nn.functional.pad(real, (0, 0, 0, tokens - real.shape[1])),
            return_dict=False,
        )[0]

    first = condition.second
    return flow_prediction(x_unit, t, velocity if first is None else after_first_frame(velocity, first.embeds))


class WanTeacher(OwnLevels, ExpertsTeacher, FirstFrameTeacher):
    """WanPipeline; the student is one too, of as many networks, without guidance. Pictures of it are filmstrips.

    With first frames it is WanImageToVideoPipeline, which takes the parts of Wan 2.2 TI2V-5B.
    """

    pipelines = (WanPipeline, WanImageToVideoPipeline)
    with_first_frames = WanImageToVideoPipeline
    fields: ClassVar[Any] = {
        "image_dim": ((None,), "it reads an image beside the text"),
        "added_kv_proj_dim": ((None,), "it reads an image beside the text"),
    }

    @override
    def check_index(self) -> None:
        """Refuses a second network without a boundary, which its pipeline never calls, too."""
        super().check_index()
        second, _ = self.index.get("transformer_2") or (None, None)
        if bool(second) != (self.index.get("boundary_ratio") is not None):
            raise UserError(
                f"teacher {self.source!r} has one of transformer_2 and boundary_ratio in its model_index.json, and "
                "they go together; copy that file again, or take both out for a Wan of one network"
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
    def fresh_scheduler(self) -> Any:
        return by_equal_factors()
