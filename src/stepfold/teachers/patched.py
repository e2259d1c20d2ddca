"""Latents of two-by-two patches, normalised by running statistics, as FLUX.2's autoencoder has them."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from stepfold.teachers.pipeline import PipelineTeacher


class PatchedLatents(PipelineTeacher):
    """Abstract: latents [B, C, H / 16, W / 16] are patches of two by two, normalised by running statistics."""

    autoencoder_layout = "once its channels, four by four, are squares of two by two"

    @override
    def autoencoder_channels(self, vae: dict[str, Any]) -> int:
        return 4 * vae["latent_channels"]

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 * super().pixels_a_latent(vae)

    def variance_floor(self, vae: Any) -> float:
        """What the pipeline adds to the autoencoder's running variance."""
        return vae.config.batch_norm_eps

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        mean, variance = (values.to(self.device)[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
        return (variance + self.variance_floor(vae)).rsqrt(), mean

    @override
    def to_autoencoder(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, 2)

    @override
    def from_autoencoder(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(latents, 2)
