import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepfold.errors import UserError
from stepfold.maths import routes
from stepfold.maths.formulations import flow_time

# The ladder for 16 steps and shift 2.5, to four places
LADDER_16 = "1.5708 1.5423 1.5095 1.4714 1.4268 1.3741 1.3112 1.2356 1.1440 1.0331 .8997 .7425 .5642 .3734 .1832 .0063"


def draws(dtype: torch.dtype, num_steps: int = 16, batch: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(batch, num_steps, generator=generator, dtype=dtype)
    return uniform, torch.randn(batch, num_steps, generator=generator, dtype=dtype)


def is_route(times: torch.Tensor) -> bool:
    """Descends, and stays where the tangent of the time is positive."""
    inside = (times > 0) & (times.double() <= math.pi / 2) & (times.tan() > 0)
    return bool(inside.all()) and bool((times.diff(dim=1) <= 0).all())


def all_routes(dtype: torch.dtype, num_steps: int = 16) -> dict[str, torch.Tensor]:
    uniform, normal = draws(dtype, num_steps)
    return {
        "random": routes.random_route(uniform),
        "logit_normal": routes.logit_normal_route(normal, 0.5),
        "reference": routes.reference_route(uniform),
    }


@pytest.mark.parametrize("num_steps", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_route_descends_from_half_pi_and_stays_inside(dtype, num_steps):
    for name, route in all_routes(dtype, num_steps).items():
        assert (route.dtype, route.shape) == (dtype, (2000, num_steps)), name
        assert (route[:, 0] == routes.half_pi(dtype)).all(), name
        assert is_route(route), name


def test_half_pi_is_the_last_float_below():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        top = torch.tensor(routes.half_pi(dtype), dtype=dtype)
        assert top.item() <= math.pi / 2 <= torch.nextafter(top, torch.full_like(top, 4)).item() + 1e-16
    assert torch.tensor(math.pi / 2).item() > math.pi / 2  # why it is needed


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_inside(edge):
    uniform = torch.full((1, 16), edge)
    for route in (routes.random_route(uniform), routes.reference_route(uniform)):
        assert is_route(route)
    assert is_route(routes.logit_normal_route(torch.tensor([[-9.0, 9.0, 30.0]]), 0.5))


def test_u_shaped_times_have_the_density_of_their_formula():
    """Of the flow time u, e^{4 u} + e^{4 (1 - u)}: its share below each of some levels, by the integral."""
    even = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    u = flow_time(routes.u_shaped_times(even))
    for level in (0.05, 0.2, 0.5, 0.9):
        wanted = (math.expm1(4 * level) + math.exp(4) * -math.expm1(-4 * level)) / (2 * math.expm1(4))
        assert (u < level).double().mean().item() == pytest.approx(wanted, abs=1e-4)
    ends = routes.u_shaped_times(torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert is_route(ends.sort(descending=True).values[None])
    assert routes.u_shaped_times(even, 1.2).max() == 1.2


def test_random_route_is_uniform():
    t = all_routes(torch.float64, num_steps=2)["random"][:, 1]  # the smaller of two draws of U(0, pi/2)
    assert t.mean().item() == pytest.approx(math.pi / 6, abs=0.03)


def test_logit_normal_route_has_the_stated_distribution():
    _, normal = draws(torch.float64)
    route = routes.logit_normal_route(normal, 0.5, mean=0.2, std=1.6)
    tau = torch.log(0.5 * torch.tan(route[:, 1:])).flatten()
    rest = normal.sort(dim=1, descending=True).values[:, 1:].flatten()
    torch.testing.assert_close(tau, 0.2 + 1.6 * rest, rtol=1e-9, atol=1e-9)


def test_reference_times_for_sixteen_steps():
    expected = torch.tensor([float(v) for v in LADDER_16.split()], dtype=torch.float64)
    torch.testing.assert_close(routes.reference_times(16, 2.5), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 16, 50])
def test_times_equal_the_diffusers_scheduler(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)  # float32 in the scheduler, hence the tolerance
    expected = torch.atan2(sigmas, 1 - sigmas)
    torch.testing.assert_close(routes.flow_euler_times(num_steps, shift), expected, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(routes.reference_times(num_steps, shift), expected[:-1], rtol=1e-6, atol=2e-7)


def test_reference_route_draws_uniformly_within_its_cells():
    uniform, _ = draws(torch.float64)
    ladder, route = routes.reference_times(16), routes.reference_route(uniform)
    position = (route[:, 1:] - ladder[1:]) / (ladder[:-1] - ladder[1:])
    torch.testing.assert_close(position, uniform[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [1.5025, 1.2, 0.1])
def test_routes_below_half_pi_begin_at_the_start_and_never_stand_still(dtype: torch.dtype, start: float):
    """As of a teacher whose schedule ends before pure noise: clamped, several of its first times would be the same."""
    uniform, normal = draws(dtype)
    found = {
        "random": routes.random_route(uniform, start),
        "logit_normal": routes.logit_normal_route(normal, 0.5, start_time=start),
        "reference": routes.reference_route(uniform, start_time=start),
    }
    for name, route in found.items():
        first = routes.at_most(start, dtype)
        assert (route[:, 0] == first).all() and first == pytest.approx(start, rel=1e-6), name
        assert (route.diff(dim=1) < 0).all() and (route > 0).all(), name
    ladder, route = routes.reference_times(16, start_time=start), found["reference"].double()
    assert ladder[0] == start and (ladder.diff() < 0).all()
    position = (route[:, 1:] - ladder[1:]) / (ladder[:-1] - ladder[1:])
    torch.testing.assert_close(position, uniform[:, 1:].double(), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_the_ladder_below_half_pi_is_even_in_unshifted_noise_levels():
    """From the level that the shift moves to the start down to today's last one."""
    levels = flow_time(routes.reference_times(9, 2.5, 1.3))
    even = levels / (2.5 - 1.5 * levels)  # the shift undone
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(8), rtol=1e-9, atol=0)
    assert routes.reference_times(9, 2.5, 1.3)[-1].item() == pytest.approx(routes.reference_times(9, 2.5)[-1].item())


def test_random_and_logit_normal_times_below_half_pi_are_those_distributions_on_what_is_left():
    uniform, normal = draws(torch.float64)
    torch.testing.assert_close(routes.random_times(uniform, 1.2), 1.2 * (1 - uniform))
    tau = torch.log(0.5 * torch.tan(routes.logit_normal_times(normal, 0.5, 0.2, 1.6, start_time=1.2)))
    highest = (math.log(0.5 * math.tan(1.2)) - 0.2) / 1.6
    share = torch.special.ndtr((tau - 0.2) / 1.6) / torch.special.ndtr(torch.tensor(highest).double())
    torch.testing.assert_close(share, torch.special.ndtr(normal))  # uniform, as the draws' own is


def test_a_start_below_the_last_time_of_a_route_is_refused():
    with pytest.raises(UserError, match=r"starts at time 0\.005, but a route with shift 2\.5 ends at 0\.00626; give"):
        routes.reference_route(torch.zeros(1, 4), 2.5, 0.005)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 2.5), (4, 0.0), (4, -1.0), (4, math.nan), (4, math.inf)])
def test_impossible_values_are_refused(num_steps, shift):
    with pytest.raises(UserError):
        routes.reference_times(num_steps, shift)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 20])
def test_even_times_are_even_noise_levels_shifted_once(num_steps: int, shift: float):
    times = routes.even_flow_times(num_steps, shift)
    sigma = flow_time(times)
    even = sigma / (shift - (shift - 1) * sigma)  # the shift undone
    wanted = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    assert torch.allclose(even, wanted, atol=1e-12)
