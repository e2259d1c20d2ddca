"""Networks of every output on every schedule are one teacher: the Gaussian whose velocity is known in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import vp_step, vp_times
from stepfold.maths.noise_schedules import (
    FLOW,
    TRIGFLOW,
    NoiseSchedule,
    Output,
    exploding,
    invert,
    own_prediction,
    own_time,
    vp_sde,
    vp_steps,
)
from stepfold.maths.tangent import total_derivative
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher

OUTPUTS: tuple[Output, ...] = get_args(Output)
MEAN = torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64)
STD = torch.tensor([0.9, 0.2, 1.7], dtype=torch.float64)
"""Of the data, in units of `data_std`."""

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Own times -> alpha, sigma and their rates, by hand."""


def sqrt_of_rest(alpha: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and its rate where alpha^2 + sigma^2 = 1."""
    sigma = (1 - alpha**2).sqrt()
    return sigma, -alpha * rate / sigma


def of_vp_sde(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha = torch.exp(-(0.1 * t + 9.95 * t**2) / 2)
    rate = -(0.1 + 19.9 * t) / 2 * alpha
    sigma, sigma_rate = sqrt_of_rest(alpha, rate)
    return alpha, sigma, rate, sigma_rate


def of_galaxies(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha = torch.exp(-t / 2)
    sigma, sigma_rate = sqrt_of_rest(alpha, -alpha / 2)
    return alpha, sigma, -alpha / 2, sigma_rate


def of_cosine(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nichol and Dhariwal's with time to 1000, without its offset."""
    turn = math.pi / 2000
    return torch.cos(turn * t), torch.sin(turn * t), -turn * torch.sin(turn * t), turn * torch.cos(turn * t)


def of_geometric(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The variance-exploding SDE's of NCSN++."""
    one, sigma = torch.ones_like(t), 0.01 * 30000**t
    return one, sigma, 0 * one, math.log(30000) * sigma


@dataclass(frozen=True)
class Case:
    schedule: NoiseSchedule
    by_hand: Coefficients


def ones(t: Tensor) -> Tensor:
    return torch.ones_like(t)


SCHEDULES = {
    "flow": Case(FLOW, lambda t: (1 - t, t, -ones(t), ones(t))),
    "flow from noise to data": Case(
        NoiseSchedule(lambda t: t, lambda t: 1 - t, 0.0, 1.0), lambda t: (t, 1 - t, ones(t), -ones(t))
    ),
    "trigflow": Case(TRIGFLOW, lambda t: (t.cos(), t.sin(), -t.sin(), t.cos())),
    "exploding": Case(exploding(160.0), lambda t: (ones(t), t, 0 * t, ones(t))),
    "geometric": Case(NoiseSchedule(lambda t: 1, lambda t: 0.01 * 30000**t, 0.0, 1.0), of_geometric),
    "vp sde": Case(vp_sde(), of_vp_sde),
    "galaxies": Case(
        NoiseSchedule(lambda t: torch.exp(-t / 2), lambda t: torch.sqrt(-torch.expm1(-t)), 0.0, 10.0), of_galaxies
    ),
    "cosine": Case(
        NoiseSchedule(lambda t: torch.cos(math.pi / 2000 * t), lambda t: torch.sin(math.pi / 2000 * t), 1000.0, 0.0),
        of_cosine,
    ),
}


def exact_output(output: str, by_hand: Coefficients, data_std: float, x: Tensor, time: Tensor) -> Tensor:
    """What a perfect network returns: of X_0 ~ N(data_std MEAN, (data_std STD)^2), expected given x."""
    alpha, sigma, alpha_rate, sigma_rate = (each[:, None] for each in by_hand(time))
    mean, variance = data_std * MEAN, (data_std * STD) ** 2
    off, total = x - alpha * mean, alpha**2 * variance + sigma**2
    x0, n = mean + alpha * variance / total * off, sigma / total * off
    return {
        "velocity": alpha_rate * x0 + sigma_rate * n, "noise": n, "score": -off / total, "v": alpha * n - sigma * x0,
        "data": x0,
        "minus velocity": -alpha_rate * x0 - sigma_rate * n, "flow's velocity": n - x0, "minus noise": -n,
        "score of noise": -n, "minus score": off / total, "minus v": sigma * x0 - alpha * n, "unit data": x0 / data_std,
        "x": x,
    }[output]  # fmt: skip


class Exact(nn.Module):
    def __init__(self, output: str, by_hand: Coefficients, data_std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.output, self.by_hand, self.data_std = output, by_hand, data_std

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * exact_output(self.output, self.by_hand, self.data_std, x, t)


def teacher_of(output: Output, case: Case, data_std: float, returned: str | None = None) -> ModuleTeacher:
    """A teacher that takes its network for one of `output`, whatever that returns; some ranges end before noise."""
    schedule = case.schedule
    if output in ("noise", "score") and invert(schedule, data_std).highest > 1.57:
        inwards = 5e-3 * (schedule.first - schedule.last)
        if case.by_hand(torch.tensor([float(schedule.last)]))[0] < 0.1:
            schedule = replace(schedule, last=schedule.last + inwards)
        else:
            schedule = replace(schedule, first=schedule.first - inwards)
    network = Exact(returned or output, case.by_hand, data_std)
    return ModuleTeacher(network, None, (3,), output, schedule=schedule, data_std=data_std)


def states(teacher: ModuleTeacher) -> tuple[Tensor, Tensor, Condition]:
    t = torch.tensor([0.03, 0.1, 0.3, 0.8, 1.2, 1.5, teacher.start_time], dtype=torch.float64)
    x = 0.5 * torch.randn(len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, t, teacher.encode([""] * len(t))


EXACT = GaussianTeacher(0.5 * MEAN, 0.5 * STD, 0.5)


@pytest.mark.parametrize("data_std", [1.0, 0.4])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_on_every_schedule_is_the_closed_form(output: Output, name: str, data_std: float) -> None:
    teacher = teacher_of(output, SCHEDULES[name], data_std)
    x, t, condition = states(teacher)
    error = (teacher.velocity(x, t, condition, None) - EXACT.velocity(x, t)).abs().amax(1)
    assert error.max() < 1e-10


@pytest.mark.parametrize(
    ("output", "returned", "name", "data_std"),
    [
        ("velocity", "minus velocity", "flow", 1.0),
        ("velocity", "flow's velocity", "vp sde", 1.0),
        ("noise", "minus noise", "flow", 1.0),
        ("score", "score of noise", "galaxies", 1.0),
        ("score", "minus score", "galaxies", 1.0),
        ("v", "minus v", "trigflow", 1.0),
        ("data", "unit data", "exploding", 0.4),
        ("data", "x", "exploding", 1.0),
    ],
)
def test_a_network_of_another_output_is_not_the_closed_form(
    output: Output, returned: str, name: str, data_std: float
) -> None:
    teacher = teacher_of(output, SCHEDULES[name], data_std, returned)
    x, t, condition = states(teacher)
    assert (teacher.velocity(x, t, condition, None) - EXACT.velocity(x, t))[2:5].abs().max() > 1e-2


@pytest.mark.parametrize("output", OUTPUTS)
def test_another_data_std_or_schedule_is_not_the_closed_form(output: Output) -> None:
    case = SCHEDULES["galaxies"]
    right = teacher_of(output, case, 0.4)
    x, t, condition = states(right)
    for wrong in (
        ModuleTeacher(right.network, None, (3,), output, schedule=case.schedule),
        ModuleTeacher(right.network, None, (3,), output, schedule=vp_sde(), data_std=0.4),
    ):
        assert (wrong.velocity(x, t, condition, None) - EXACT.velocity(x, t))[2:5].abs().max() > 1e-2


@pytest.mark.parametrize(("prediction", "sigma_max"), [("flow", math.inf), ("trigflow", math.inf), ("edm", 64.0)])
def test_the_ready_ones_are_three_of_these(prediction: Any, sigma_max: float) -> None:
    name, output = {"flow": ("flow", "velocity"), "trigflow": ("trigflow", "v"), "edm": ("exploding", "data")}[
        prediction
    ]
    for data_std in (1.0, 0.4):
        network = Exact(output, SCHEDULES[name].by_hand, data_std)
        teacher = ModuleTeacher(network, None, (3,), prediction, data_std=data_std, sigma_max=data_std * sigma_max)
        assert teacher.start_time == pytest.approx(math.atan(sigma_max), abs=1e-12)
        x, t, condition = states(teacher)
        if prediction == "edm":
            t = t.clamp(max=teacher.start_time)
        velocity = teacher.velocity(x, t, condition, None)
        torch.testing.assert_close(velocity, EXACT.velocity(x, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_own_time_has_the_same_signal_to_noise(name: str) -> None:
    case = SCHEDULES[name]
    inverted = invert(case.schedule, 0.4)
    t = torch.linspace(0, math.pi / 2, 1001, dtype=torch.float64)
    inside, time = own_time(inverted, t)
    alpha, sigma, *_ = case.by_hand(time)
    torch.testing.assert_close(torch.atan2(sigma, 0.4 * alpha), inside, rtol=0, atol=1e-12)
    assert torch.equal(inside, t.clamp(inverted.lowest, inverted.highest))


def test_steps_of_a_discrete_schedule_are_those_of_the_families() -> None:
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = torch.linspace(0, math.pi / 2, 999, dtype=torch.float64)
    ours, theirs = own_time(invert(vp_steps(alphas_cumprod)), t), vp_step(t, vp_times(alphas_cumprod))
    torch.testing.assert_close(ours[1], theirs[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(ours[0], theirs[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["flow from noise to data", "vp sde", "geometric"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_tangents_are_those_of_the_closed_form(output: Output, name: str) -> None:
    """Along a direction that moves state and time; the time moves the network's own, and all coefficients."""
    teacher = teacher_of(output, SCHEDULES[name], 0.4)
    t = torch.tensor([0.2, 0.8, 1.3], dtype=torch.float64)
    x, dx = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dt = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
    condition = teacher.encode([""] * 3)
    exact = torch.func.jvp(lambda x, t: 2 * EXACT.velocity(0.5 * x, t), (x, t), (dx, dt))[1]

    def network(x: Tensor, t: Tensor) -> Tensor:
        return teacher.predict(teacher.network, x, t, condition, None)

    for backend in ("two_pass", "one_pass"):
        found = total_derivative(network, x, t, dx, dt, backend)
        torch.testing.assert_close(found.dF, exact, rtol=0, atol=1e-9)
    asked = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(x, asked).sum(), asked)
    only_t = torch.func.jvp(lambda t: 2 * EXACT.velocity(0.5 * x, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(slope, only_t.sum(1), rtol=0, atol=1e-9)


def test_nothing_is_infinite_at_clean_data_where_a_root_begins() -> None:
    """sigma of a variance-preserving SDE has no slope at 0: Newton's method would leave the range."""
    inverted = invert(vp_sde())
    t = torch.cat([torch.zeros(1), torch.logspace(-9, -2, 200)]).double().requires_grad_()
    _, time = own_time(inverted, t)
    assert bool((time >= 0).all())
    exact = (-0.1 + (0.01 - 8 * 9.95 * torch.log(torch.cos(t.detach()))).sqrt()) / 19.9
    torch.testing.assert_close(time.detach(), exact, rtol=0, atol=1e-6)
    F = own_prediction(torch.randn(201, 3).double(), t, lambda x, _: x, inverted, "v")
    assert F.isfinite().all() and torch.autograd.grad(F.sum(), t)[0].isfinite().all()


def test_states_in_float32_stay_so() -> None:
    seen = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x.dtype, time.dtype))
        return x

    F = own_prediction(torch.randn(2, 3), torch.tensor([0.3, 1.2]), network, invert(vp_sde()), "noise")
    assert F.dtype == torch.float32 and seen == [(torch.float32, torch.float32)]


def bad(**changes: Any) -> NoiseSchedule:
    return replace(FLOW, **changes)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (bad(last=math.inf), r"range is 0 to inf; give two finite times"),
        (bad(first=1.0), r"range is 1 to 1; give two finite times"),
        (bad(last=2.0), r"alpha\(t\) is -\S+ at t = 1\.\d+; it should be one number >= 0"),
        (bad(sigma=lambda t: torch.log(t)), r"sigma\(t\) is -inf at t = 0; it should be one number >= 0"),
        (bad(alpha=lambda t: torch.ones(3)), r"alpha\(t\) fails on a tensor of times \(RuntimeError: .*torch\.exp"),
        (bad(alpha=lambda t: math.exp(-t)), r"alpha\(t\) fails on a tensor of times \(.*torch\.exp\(-t / 2\)"),
        (bad(alpha=lambda t: torch.ones(2, 1)), r"alpha\(t\) is shape \(2, \d+\); it should be one number"),
        (bad(sigma=lambda t: t * (1.4 - t), alpha=lambda t: 0.01), r"turns back or stands still near t = 0\.[67]"),
        (bad(first=0.5), r"goes from 1 to \S+, but a teacher knows states from nearly clean \(at most 0\.2\)"),
        (bad(last=0.5), r"goes from 0 to 1, but .* to nearly noise \(at least 5\); give the whole range"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_in_a_line(schedule: NoiseSchedule, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        invert(schedule)
    assert "\n" not in str(refused.value)


def test_what_does_not_go_together_is_refused_in_a_line() -> None:
    network = Exact("noise", of_vp_sde, 1.0)
    for arguments, said in (
        ({"prediction": "epsilon"}, r"prediction is 'epsilon', but a network predicts one of flow, trigflow, edm, vel"),
        (
            {"prediction": "noise"},
            r"prediction='noise' needs the noise schedule .* NoiseSchedule\(alpha, sigma, 0, 1\)",
        ),
        ({"prediction": "flow", "schedule": FLOW}, r"has a noise schedule of its own; leave schedule out, or say what"),
        (
            {"prediction": "score", "schedule": FLOW},
            r"ends in pure noise, where a score .*; end its range at t = 0\.99",
        ),
        ({"prediction": "v", "schedule": FLOW, "data_std": 0.0}, r"data_std is 0; give the standard deviation"),
        ({"nothing": Condition.whole(torch.zeros(1, 1, 1))}, r"`nothing` is for a network that takes conditions"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            ModuleTeacher(network, None, (3,), **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
    end = 0.9988
    ModuleTeacher(network, None, (3,), "score", schedule=replace(FLOW, last=end))  # as it says


def test_steps_of_ddpm_fall_and_may_be_an_array() -> None:
    falling = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)
    ours = vp_steps(falling)
    for given in (falling.numpy(), falling.tolist()):
        assert torch.equal(vp_steps(given).alpha(torch.arange(9.0)), ours.alpha(torch.arange(9.0)))  # type: ignore[arg-type]
    for wrong in (falling.flip(0), falling[:1], falling[None], 2 * falling, falling - 0.5):
        with pytest.raises(UserError, match=r"alphas_cumprod does not fall within \(0, 1\]"):
            vp_steps(wrong)
