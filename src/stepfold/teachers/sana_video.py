"""SANA-Video: flow prediction, classifier-free guidance, Sana's texts, latents [B, C, F, H, W]."""

from functools import partial
from typing import Any, ClassVar

from diffusers import SanaVideoPipeline
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.family import Predict
from stepfold.teachers.sana import GemmaTexts, trigflow_network
from stepfold.teachers.video import VideoTeacher


class SanaVideoTeacher(VideoTeacher, GemmaTexts):
    """SanaVideoPipeline; the student is one too, without guidance. Pictures of it are filmstrips."""

    pipelines = (SanaVideoPipeline,)
    frames_argument = "frames"
    side = 32
    fields: ClassVar[Any] = {"guidance_embeds": ((False, None), "SanaVideoPipeline does not tell it the guidance")}

    @override
    def check_index(self) -> None:
        """Refuses other autoencoders than Wan's."""
        if (kind := self.index["vae"][1]) != "AutoencoderKLWan":
            raise UserError(
                f"teacher {self.source!r} has an {kind}, and this version reads a SANA-Video with an AutoencoderKLWan; "
                "give one of 480p, such as Efficient-Large-Model/SANA-Video_2B_480p_diffusers"
            )

    @override
    def predictor(self) -> Predict:
        return partial(trigflow_network, time_scale=self.time_scale)

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embed.emb.timestep_embedder"
