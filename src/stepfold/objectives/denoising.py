"""The fake score's own loss: a network learns the velocity of noised pictures, here the student's."""

from collections.abc import Callable

from torch import Tensor

from stepfold.maths.formulations import interpolate, interpolate_velocity
from stepfold.objectives.velocity import velocity_error
from stepfold.teachers.contract import Condition

FAKE = "fake"
"""Of the fake score among `Networks.critics`."""
Score = Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
"""(x / sigma_data [M, ...], t [M], condition, guidance scales [M]) -> F [M, ...]: a student, or one that is guided."""


def denoising_error(
    score: Score, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, guidance: Tensor, sigma_data: float
) -> Tensor:
    """||F(x_t, t) - (cos t z - sin t x_0) / sigma_data||^2 / D per sample [M], at x_t = cos t x_0 + sin t z.

    Its minimiser is the velocity of the law of x_0, and so holds that law's score.

    Args:
        score: the network that learns, with gradient.
        x0: pictures [M, ...], of standard deviation sigma_data; no gradient reaches them.
        noise: z [M, ...], of standard deviation sigma_data.
        t: times [M], in (0, pi/2].
        condition: M rows.
        guidance: scales [M] that the network is told.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2405.14867 (DMD2), Sec. 3; arXiv:2510.08431 (rCM), which takes F's loss as well.
    """
    x0 = x0.detach()
    F = score(interpolate(x0, noise, t) / sigma_data, t, condition, guidance)
    return velocity_error(F, interpolate_velocity(x0, noise, t), sigma_data)
