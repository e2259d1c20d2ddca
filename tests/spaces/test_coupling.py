"""Couplings of a Gaussian, whose walks end where the exact flow map says."""

import math

import torch
from gaussians import SIGMA_DATA, gaussian, nothing

from stepfold.maths.formulations import data_prediction, noise_prediction
from stepfold.spaces.coupling import coupled_pairs


def pairs(count: int = 5):
    law, noise = gaussian(0.4, 0.2), SIGMA_DATA * torch.randn(6, 3).double()
    x0 = law.consistency(noise, torch.full((6,), math.pi / 2).double())
    times = torch.rand(6, count).double().sort(dim=1, descending=True).values * math.pi / 2
    times[:, 0] = math.pi / 2
    keep = torch.tensor([True, False, True, True, True, True])
    return coupled_pairs(x0, noise, times, nothing(6), torch.arange(6.0).double(), keep), x0, noise


def test_each_pair_lies_on_the_line_from_its_own_noise_to_its_own_end() -> None:
    found, x0, noise = pairs()
    assert (len(found), found.num_drawn) == (25, 30) and found.prompt.tolist() == [
        i for i in (0, 2, 3, 4, 5) for _ in range(5)
    ]
    assert torch.equal(found.guidance, found.prompt.double())
    torch.testing.assert_close(data_prediction(found.x, found.t, found.dxdt), x0[found.prompt], rtol=0, atol=1e-12)
    torch.testing.assert_close(noise_prediction(found.x, found.t, found.dxdt), noise[found.prompt], rtol=0, atol=1e-12)
    start = found.t == math.pi / 2
    torch.testing.assert_close(found.x[start], noise[found.prompt[start]], rtol=0, atol=1e-15)
    assert (
        torch.equal(found.t_next.view(5, 5)[:, :-1], found.t.view(5, 5)[:, 1:])
        and (found.t_next.view(5, 5)[:, -1] == 0).all()
    )


def test_a_walks_own_noise_leaves_nothing_to_average_and_another_walks_does() -> None:
    """x_t determines the velocity: a straight fit of dxdt on x at one time is exact. With fresh noise it is not."""
    law, noise = gaussian(0.4, 0.2), SIGMA_DATA * torch.randn(200, 3).double()
    x0 = law.consistency(noise, torch.full((200,), math.pi / 2).double())
    times = torch.full((200, 1), 0.9).double()

    def left_over(z: torch.Tensor) -> float:
        found = coupled_pairs(x0, z, times, nothing(200), torch.ones(200).double(), None)
        x, v = found.x - found.x.mean(0), found.dxdt - found.dxdt.mean(0)
        slope = (x * v).sum(0) / (x * x).sum(0)
        return float((v - slope * x).norm() / v.norm())

    assert left_over(noise) < 1e-12
    assert left_over(noise.roll(1, 0)) > 0.1
