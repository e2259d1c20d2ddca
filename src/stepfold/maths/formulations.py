"""TrigFlow, and every other formulation converted to it and back.

Symbols: `x` is a TrigFlow state [B, ...] whose data and noise have standard deviation `sigma_data`, `t` its time [B] in
[0, pi/2], `dxdt` = sigma_data F(x / sigma_data, t) the velocity of the probability-flow ODE, `x_unit` = x / sigma_data.
Results follow torch's type promotion, except where a docstring says otherwise.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def unsqueeze_like(t: Tensor, like: Tensor) -> Tensor:
    """Gives a per-sample tensor trailing axes of length 1, so that it broadcasts against a batch.

    Args:
        t: [B], or a scalar tensor.
        like: [B, ...], only its number of dimensions matters.

    Returns:
        `t` as [B, 1, ..., 1] with `like.ndim` dimensions.
    """
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


# TrigFlow itself


def in_float32(values: Tensor) -> Tensor:
    """Values of half precision in float32, others as they are: losses are computed in no less."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def interpolate(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The noised sample x_t = cos t x_0 + sin t z.

    Args:
        x0: clean latents [B, ...], standard deviation sigma_data.
        z: Gaussian noise [B, ...], standard deviation sigma_data.
        t: [B], in [0, pi/2].

    Reference: arXiv:2410.11081.
    """
    t = unsqueeze_like(t, x0)
    return torch.cos(t) * x0 + torch.sin(t) * z


def interpolate_velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The time derivative of `interpolate` with x_0 and z held: cos t z - sin t x_0. Arguments as there."""
    t = unsqueeze_like(t, x0)
    return torch.cos(t) * z - torch.sin(t) * x0


def data_prediction(x: Tensor, t: Tensor, dxdt: Tensor) -> Tensor:
    """The clean sample that a velocity points at: cos t x - sin t dxdt. For a student, its one-step output.

    Args:
        x: [B, ...]. t: [B], in [0, pi/2]. dxdt: [B, ...].

    Reference: arXiv:2511.20410, Table 1.
    """
    t = unsqueeze_like(t, x)
    return torch.cos(t) * x - torch.sin(t) * dxdt


def noise_prediction(x: Tensor, t: Tensor, dxdt: Tensor) -> Tensor:
    """The noise (standard deviation sigma_data) that a velocity points away from: sin t x + cos t dxdt.

    Args:
        x: [B, ...]. t: [B], in [0, pi/2]. dxdt: [B, ...].
    """
    t = unsqueeze_like(t, x)
    return torch.sin(t) * x + torch.cos(t) * dxdt


def equivalent_noise(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """The noise that `interpolate` would need to come from x_0 to x at t: (x - cos t x_0) / sin t.

    Args:
        x: [B, ...]. t: [B], in (0, pi/2]. x0: [B, ...].

    Reference: arXiv:2511.20410, Eq. 8.
    """
    t = unsqueeze_like(t, x)
    return (x - torch.cos(t) * x0) / torch.sin(t)


def euler_step(x: Tensor, t: Tensor, t_next: Tensor, dxdt: Tensor) -> Tensor:
    """One first-order step of the ODE from `t` to `t_next`: cos D x - sin D dxdt with D = t - t_next.

    Exact where the data and noise predictions do not change on the way; otherwise of first order.

    Args:
        x: [B, ...]. t, t_next: [B], in [0, pi/2], either direction. dxdt: [B, ...], the velocity at (x, t).

    Examples:
        >>> x0, z = torch.tensor([[1.0]]), torch.tensor([[-0.5]])
        >>> t, t_next = torch.tensor([1.2]), torch.tensor([0.4])
        >>> ahead = euler_step(interpolate(x0, z, t), t, t_next, interpolate_velocity(x0, z, t))
        >>> torch.allclose(ahead, interpolate(x0, z, t_next))  # on the forward process it is exact
        True

    Reference: arXiv:2511.20410, Eq. (9).
    Deviation: dxdt already holds sigma_data, so the step does not multiply by it again (in print both are mixed).
    """
    return data_prediction(x, t - t_next, dxdt)


def guide(velocity_uncond: Tensor, velocity_cond: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: v_u + w (v_c - v_u).

    Linear in the velocities, so it may be applied to F, to dxdt or to a flow-matching velocity alike.

    Args:
        velocity_uncond: v_u [B, ...].
        velocity_cond: v_c [B, ...].
        scale: w, [B] or one number; 1 is no guidance.

    Returns:
        [B, ...] in the dtype of `velocity_cond`: a float64 scale does not promote.
    """
    w = torch.as_tensor(scale, dtype=velocity_cond.dtype, device=velocity_cond.device)
    return velocity_uncond + unsqueeze_like(w, velocity_cond) * (velocity_cond - velocity_uncond)


# Flow matching: x_flow = (1 - t_flow) x_0 + t_flow n over unit-variance data and noise, velocity = n - x_0


def flow_time(t: Tensor) -> Tensor:
    """TrigFlow time in [0, pi/2] -> flow-matching time in [0, 1], elementwise.

    Examples:
        >>> flow_time(torch.tensor([0.0, torch.pi / 4])).tolist()
        [0.0, 0.5]

    Reference: arXiv:2511.20410, Eq. (5).
    """
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def trigflow_time(t_flow: Tensor) -> Tensor:
    """Flow-matching time in [0, 1] -> TrigFlow time in [0, pi/2], elementwise; finite (pi/2) at t_flow = 1."""
    return torch.atan2(t_flow, 1 - t_flow)


def _flow_scale(t_flow: Tensor) -> Tensor:
    """k = sqrt(t_flow^2 + (1 - t_flow)^2), the norm of flow matching's two coefficients."""
    return torch.sqrt(t_flow**2 + (1 - t_flow) ** 2)


def flow_input(x: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow state -> the flow-matching state at the same signal-to-noise ratio, x_flow = k x / sigma_data.

    Args:
        x: [B, ...], standard deviation sigma_data. t: [B], in [0, pi/2]. sigma_data: > 0.

    Reference: arXiv:2511.20410, Eq. (6).
    """
    return x / sigma_data * unsqueeze_like(_flow_scale(flow_time(t)), x)


def trigflow_input(x_flow: Tensor, t_flow: Tensor, sigma_data: float) -> Tensor:
    """Inverse of `flow_input`: x = sigma_data x_flow / k. t_flow: [B], in [0, 1]."""
    return x_flow * sigma_data / unsqueeze_like(_flow_scale(t_flow), x_flow)


def trigflow_output(x_flow: Tensor, t_flow: Tensor, velocity: Tensor) -> Tensor:
    """Flow-matching velocity -> F = [(1 - 2 t) x + (1 - 2 t + 2 t^2) v] / k at t = t_flow, x = x_flow.

    Args:
        x_flow: [B, ...]. t_flow: [B], in [0, 1]. velocity: [B, ...], the model's prediction of n - x_0.

    Returns:
        F [B, ...]; dxdt = sigma_data F.

    Reference: arXiv:2511.20410, Eq. (7).
    """
    s = unsqueeze_like(t_flow, x_flow)
    return ((1 - 2 * s) * x_flow + (1 - 2 * s + 2 * s**2) * velocity) / _flow_scale(s)


def flow_velocity(x_flow: Tensor, t_flow: Tensor, F: Tensor) -> Tensor:
    """Inverse of `trigflow_output`: F -> the flow-matching velocity at (x_flow, t_flow)."""
    s = unsqueeze_like(t_flow, x_flow)
    return (_flow_scale(s) * F - (1 - 2 * s) * x_flow) / (1 - 2 * s + 2 * s**2)


def flow_state(x_unit: Tensor, t: Tensor, *, clamp: bool = True) -> tuple[Tensor, Tensor]:
    """TrigFlow state and time -> (x_flow [B, ...], t_flow [B]).

    Args:
        x_unit: x / sigma_data [B, ...].
        t: [B], in [0, pi/2].
        clamp: whether t_flow is held to 1; samplers in float32 start a hair above pi/2.
    """
    t_flow = flow_time(t)
    return flow_input(x_unit, t, 1.0), t_flow.clamp(max=1.0) if clamp else t_flow


def flow_prediction(
    x_unit: Tensor, t: Tensor, velocity: Callable[[Tensor, Tensor], Tensor], *, clamp: bool = True
) -> Tensor:
    """F [B, ...] of a network that predicts flow matching's velocity.

    Args:
        x_unit: x / sigma_data [B, ...].
        t: [B], in [0, pi/2].
        velocity: calls the network: (x_flow [B, C, ...], t_flow [B]) -> n - x_0 [B, C, ...]; or N of them along the
            channels, [B, N C, ...], which become as many F.
        clamp: see `flow_state`.

    Reference: arXiv:2511.20410, Eq. (5-7).
    """
    x_flow, t_flow = flow_state(x_unit, t, clamp=clamp)
    v = velocity(x_flow, t_flow)
    if (count := v.shape[1] // x_flow.shape[1]) > 1:
        x_flow = torch.cat([x_flow] * count, 1)
    return trigflow_output(x_flow, t_flow, v)


# EDM: x_edm = x_0 + sigma n, the model predicts the denoised x_0


def edm_sigma(t: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow time -> EDM's noise level sigma = sigma_data tan t in [0, inf), elementwise."""
    return sigma_data * torch.tan(t)


def edm_time(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's noise level in [0, inf] -> TrigFlow time in [0, pi/2], elementwise."""
    return torch.atan(sigma / sigma_data)


def edm_c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's input scaling 1 / sqrt(sigma_data^2 + sigma^2), elementwise; c_in x_edm = x / sigma_data.

    Reference: arXiv:2206.00364, Table 1.
    """
    return torch.rsqrt(sigma**2 + sigma_data**2)


def edm_input(x: Tensor, t: Tensor) -> Tensor:
    """TrigFlow state -> EDM state x / cos t. EDM has no finite state at t = pi/2. x: [B, ...], t: [B]."""
    return x / torch.cos(unsqueeze_like(t, x))


def trigflow_input_from_edm(x_edm: Tensor, t: Tensor) -> Tensor:
    """Inverse of `edm_input`: cos t x_edm."""
    return x_edm * torch.cos(unsqueeze_like(t, x_edm))


def dxdt_from_denoised(x: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
    """The velocity whose data prediction is `denoised`: (cos t x - denoised) / sin t; inverse of `data_prediction`.

    Args:
        x: [B, ...]. t: [B], in (0, pi/2]; a denoiser does not determine the velocity at 0. denoised: [B, ...].
    """
    t = unsqueeze_like(t, x)
    return (torch.cos(t) * x - denoised) / torch.sin(t)


# Variance preserving: x_unit = alpha x_0 + sigma n over unit-variance data, the model predicts n (epsilon) or v


def vp_time(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Coefficients of a variance-preserving process (alpha^2 + sigma^2 = 1) -> TrigFlow time, elementwise."""
    return torch.atan2(sigma, alpha)


def vp_times(alphas_cumprod: Tensor) -> Tensor:
    """TrigFlow times, rising, of a discrete variance-preserving schedule's steps: equal signal-to-noise.

    Args:
        alphas_cumprod: [T], falling: alpha^2 at each training step.
    """
    squared = alphas_cumprod.double()
    return vp_time(squared.sqrt(), (1 - squared).sqrt())


def vp_step(t: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The training step, with a fraction, that stands at TrigFlow time t, linear between two steps' times.

    Args:
        t: [B].
        times: [T], of `vp_times`.

    Returns:
        step: [B], in [0, T - 1].
        t: [B], moved into [times[0], times[-1]]: the network knows no others.
    """
    times = times.to(t)
    inside = t.clamp(times[0], times[-1])
    above = (times < inside.detach()[:, None]).sum(-1).clamp(1, len(times) - 1)  # onnx knows no search
    low, high = times[above - 1], times[above]
    return above - 1 + (inside - low) / (high - low), inside


def F_from_epsilon(x_unit: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
    """Predicted unit noise -> F = (epsilon - sin t x_unit) / cos t.

    Args:
        x_unit: x / sigma_data [B, ...]. epsilon: [B, ...].
        t: [B], in [0, pi/2); at pi/2 a noise prediction says nothing about the data.
    """
    t = unsqueeze_like(t, x_unit)
    return (epsilon - torch.sin(t) * x_unit) / torch.cos(t)


def epsilon_from_F(x_unit: Tensor, t: Tensor, F: Tensor) -> Tensor:
    """Inverse of `F_from_epsilon`: sin t x_unit + cos t F, in unit-variance coordinates."""
    return noise_prediction(x_unit, t, F)


def F_from_v(v: Tensor) -> Tensor:
    """v-prediction, v = alpha n - sigma x_0, is F itself. Reference: arXiv:2202.00512, Appendix D."""
    return v


def v_from_F(F: Tensor) -> Tensor:
    """Inverse of `F_from_v`."""
    return F
