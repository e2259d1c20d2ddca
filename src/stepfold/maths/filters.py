"""The brightness filter: trajectories that end close to black are dropped."""

from typing import Literal

from torch import Tensor

from stepfold.errors import UserError

FilterRule = Literal["random", "hard"]


def darkness(x0: Tensor, black: Tensor, sigma_data: float) -> Tensor:
    """Mean squared distance of a clean sample to the all-black image's latent, m; small means dark.

    Args:
        x0: the teacher's samples [B, ...], standard deviation sigma_data.
        black: latent of an all-black image, [...] or [1, ...], at the scale of x0 / sigma_data.
        sigma_data: > 0.

    Returns:
        m [B], >= 0.

    Reference: arXiv:2511.20410, Appendix D.
    """
    return (x0 / sigma_data - black).square().flatten(1).mean(dim=1)


def keep_probability(m: Tensor, threshold: float) -> Tensor:
    """min(1, m / threshold), elementwise: the chance that a trajectory stays under the `random` rule.

    Raises:
        UserError: threshold is not positive.

    Examples:
        >>> keep_probability(torch.tensor([0.25, 3.0]), threshold=1.0).tolist()
        [0.25, 1.0]
    """
    if not threshold > 0:
        raise UserError(f"the brightness threshold is {threshold}, but it must be positive; 1.0 is usual")
    return (m / threshold).clamp(max=1)


def keep_mask(m: Tensor, threshold: float, uniform: Tensor, rule: FilterRule = "random") -> Tensor:
    """Which trajectories stay.

    Args:
        m: `darkness` [B].
        threshold: > 0. Released code: 1.0.
        uniform: draws of U[0, 1) [B]; `hard` ignores them.
        rule: `random` drops with probability 1 - m / threshold where m < threshold; `hard` drops all of those.

    Returns:
        bool [B]. A NaN in m counts as kept, so that it reaches the loss and stops the run.

    Raises:
        UserError: unknown rule, or a threshold that is not positive.

    Reference: arXiv:2511.20410, Appendix D (`hard`).
    Deviation: the released code uses `random`, the default here.
    """
    probability = keep_probability(m, threshold)
    if rule == "random":
        return ~(uniform >= probability)
    if rule == "hard":
        return ~(probability < 1)
    raise UserError(f"unknown brightness filter rule {rule!r}; use random or hard")
