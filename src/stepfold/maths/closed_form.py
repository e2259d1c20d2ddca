"""Teachers whose velocity is known in closed form. They judge everything else.

Both are finite on the whole of [0, pi/2], ends included, and differentiable in x and t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import unsqueeze_like


@dataclass(frozen=True)
class GaussianTeacher:
    """Data N(mean, std^2), independent elements. Its flow map, and so its perfect student, is known exactly.

    Examples:
        >>> teacher = GaussianTeacher(mean=torch.tensor([1.0]), std=torch.tensor([0.25]), sigma_data=0.5)
        >>> noise, t = torch.tensor([[0.5]]), torch.tensor([torch.pi / 2])
        >>> round(teacher.consistency(noise, t).item(), 4)  # one deviation of noise is one of the data
        1.25

    At time t a state is N(cos t mean, s^2) with s^2 = cos^2 t std^2 + sin^2 t sigma_data^2, and the ODE keeps the
    number of standard deviations from the mean.

    Attributes:
        mean: broadcasts to a sample [...].
        std: the same, > 0.
        sigma_data: standard deviation of the noise, > 0; the data's need not equal it.
    """

    mean: Tensor
    std: Tensor
    sigma_data: float

    def __post_init__(self) -> None:
        _check_positive(self.std, self.sigma_data)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dxdt of the probability-flow ODE. x: [B, ...], t: [B] in [0, pi/2]."""
        return _gaussian_velocity(x, unsqueeze_like(t, x), self.mean, self.std, self.sigma_data)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The state at time s of the trajectory through (x, t). x: [B, ...]; t, s: [B] in [0, pi/2]."""
        t, s = unsqueeze_like(t, x), unsqueeze_like(s, x)
        ratio = _marginal_std(s, self.std, self.sigma_data) / _marginal_std(t, self.std, self.sigma_data)
        return torch.cos(s) * self.mean + ratio * (x - torch.cos(t) * self.mean)

    def consistency(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t): the clean end of the trajectory through (x, t)."""
        return self.flow_map(x, t, torch.zeros_like(t))

    def F_of_consistency(self, x: Tensor, t: Tensor) -> Tensor:
        """The perfect consistency student's F: cos t x - sin t sigma_data F = consistency(x, t)."""
        return self.F_of_flow_map(x, t, torch.zeros_like(t))

    def F_of_flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The perfect two-time student's F: cos D x - sin D sigma_data F = flow_map(x, t, s), D = t - s.

        sin D is divided out by hand, so that at s = t it is the velocity, dxdt / sigma_data.

        Args:
            x: [B, ...]. t: [B], in [0, pi/2]. s: [B], in [0, t].
        """
        t, s = unsqueeze_like(t, x), unsqueeze_like(s, x)
        std, sd, D = self.std, self.sigma_data, t - s
        at_t, at_s = _marginal_std(t, std, sd), _marginal_std(s, std, sd)
        of_x = (sd**2 - std**2) * torch.sin(2 * t) * torch.cos(D)
        of_x = of_x - torch.sin(D) * ((torch.sin(t) * std) ** 2 + (torch.cos(t) * sd) ** 2)
        of_x = of_x / (at_t * (torch.cos(D) * at_t + at_s))
        of_mean = sd**2 * torch.sin(t + s) / (at_t * (torch.cos(s) * at_t + at_s * torch.cos(t)))
        return (of_x * x - of_mean * self.mean) / sd


@dataclass(frozen=True)
class MixtureTeacher:
    """Data from a mixture of K isotropic Gaussians; each of L labels has a mixture of its own.

    Attributes:
        means: [K, L, ...] for samples [...].
        stds: [K, L], > 0.
        weights: [K, L], >= 0; normalised over K.
        sigma_data: standard deviation of the noise, > 0.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    sigma_data: float

    def __post_init__(self) -> None:
        _check_positive(self.stds, self.sigma_data)
        assert self.stds.shape == self.weights.shape == self.means.shape[:2], (
            "means [K, L, ...], stds and weights [K, L]"
        )

    def velocity(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """dxdt of the probability-flow ODE given the label.

        Args:
            x: [B, ...]. t: [B], in [0, pi/2]. label: [B], whole numbers below L.
        """
        t = unsqueeze_like(t, x)
        means, stds, _ = self._components(x, label)
        per_component = _gaussian_velocity(x, t, means, stds, self.sigma_data)
        return (self._responsibilities(x, t, label) * per_component).sum(dim=0)

    def posterior_mean(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """E[x_0 | x, t, label]: the data prediction. Arguments as in `velocity`."""
        t = unsqueeze_like(t, x)
        means, stds, _ = self._components(x, label)
        gain = torch.cos(t) * stds**2 / _marginal_std(t, stds, self.sigma_data) ** 2
        per_component = means + gain * (x - torch.cos(t) * means)
        return (self._responsibilities(x, t, label) * per_component).sum(dim=0)

    def sample(self, label: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Clean samples x_0 from draws of the caller's.

        Args:
            label: [B], whole numbers below L.
            uniform: draws of U[0, 1) [B], which pick the component.
            normal: draws of N(0, 1) [B, ...].

        Returns:
            [B, ...].
        """
        means, stds, weights = self._components(normal, label)
        edges = weights.flatten(1).cumsum(dim=0)[:-1]
        chosen = (uniform >= edges).sum(dim=0), torch.arange(len(label), device=label.device)
        return means[chosen] + stds[chosen] * normal

    def _components(self, like: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means [K, B, ...], standard deviations and normalised weights [K, B, 1, ..., 1] of each sample's mixture."""
        shape = (len(self.stds), len(label)) + (1,) * (like.ndim - 1)
        weights = self.weights / self.weights.sum(dim=0)
        return self.means[:, label], self.stds[:, label].reshape(shape), weights[:, label].reshape(shape)

    def _responsibilities(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Probability of each component given the state, [K, B, 1, ..., 1]; t as [B, 1, ..., 1]."""
        means, stds, weights = self._components(x, label)
        s = _marginal_std(t, stds, self.sigma_data)
        distance = ((x - torch.cos(t) * means) / s).square().flatten(2).sum(dim=2).reshape(s.shape)
        return torch.softmax(torch.log(weights) - distance / 2 - x[0].numel() * torch.log(s), dim=0)


def _marginal_std(t: Tensor, std: Tensor, sigma_data: float) -> Tensor:
    """Standard deviation at time t of data N(., std^2)."""
    return torch.sqrt((torch.cos(t) * std) ** 2 + (torch.sin(t) * sigma_data) ** 2)


def _gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, std: Tensor, sigma_data: float) -> Tensor:
    """dxdt for data N(mean, std^2): the mean moves by -sin t mean, deviations grow at the rate (ds/dt) / s."""
    variance_rate = torch.cos(t) * torch.sin(t) * (sigma_data**2 - std**2)
    rate = variance_rate / _marginal_std(t, std, sigma_data) ** 2
    return rate * (x - torch.cos(t) * mean) - torch.sin(t) * mean


def _check_positive(std: Tensor, sigma_data: float) -> None:
    if not (bool((std > 0).all()) and sigma_data > 0):
        raise UserError(
            "a closed-form teacher needs std > 0 and sigma_data > 0; use a small std such as 1e-3 for points"
        )
