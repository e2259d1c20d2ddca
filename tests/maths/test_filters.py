import math

import pytest
import torch

from stepfold.errors import UserError
from stepfold.maths.filters import darkness, keep_mask, keep_probability


def test_darkness_is_the_mean_square_distance_to_black():
    black = torch.tensor([1.0, -2.0])[:, None, None].expand(2, 3, 3)
    x0 = 0.5 * torch.stack([black, black + 2, black + torch.tensor([2.0, 0.0])[:, None, None]])
    for latent in (black, black[None]):
        torch.testing.assert_close(darkness(x0, latent, 0.5), torch.tensor([0.0, 4.0, 2.0]))


def test_keep_probability():
    m = torch.tensor([0.0, 0.5, 2.0, 9.0])
    torch.testing.assert_close(keep_probability(m, 2.0), torch.tensor([0.0, 0.25, 1.0, 1.0]))


def test_random_rule_keeps_at_the_stated_rate():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for m, rate in [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (5.0, 1.0)]:
        kept = keep_mask(torch.full_like(uniform, m), 1.0, uniform, "random").double().mean().item()
        assert kept == pytest.approx(rate, abs=0.006 if 0 < rate < 1 else 0)


def test_hard_rule_drops_everything_below_the_threshold():
    m = torch.tensor([0.0, 0.99, 1.0, 3.0])
    for uniform in (torch.zeros(4), torch.full((4,), 0.999)):
        assert keep_mask(m, 1.0, uniform, "hard").tolist() == [False, False, True, True]


@pytest.mark.parametrize("rule", ["random", "hard"])
def test_a_nan_is_not_swept_under_the_filter(rule):
    assert keep_mask(torch.tensor([math.nan]), 1.0, torch.tensor([0.5]), rule).item() is True


def test_impossible_values_are_refused():
    m = torch.ones(1)
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(UserError):
            keep_probability(m, threshold)
    with pytest.raises(UserError):
        keep_mask(m, 1.0, m, "soft")  # pyright: ignore[reportArgumentType]
