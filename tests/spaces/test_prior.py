"""Prior space."""

import math

import torch
from gaussians import SIGMA_DATA, gaussian, nothing

from stepfold.spaces.prior import prior_states


def test_every_prompt_stands_at_its_noise_where_the_flow_map_ends_in_the_teachers_law() -> None:
    noise = SIGMA_DATA * torch.randn(4000, 3).double()
    states = prior_states(noise, math.pi / 2, nothing(4000), torch.arange(4000.0).double())
    assert states.x is noise and states.num_drawn == len(states) == 4000
    assert torch.equal(states.prompt, torch.arange(4000)) and torch.equal(states.guidance, states.prompt.double())
    assert states.t.dtype == torch.float64 and (states.t == math.pi / 2).all()
    ends = gaussian(0.4, 0.2).consistency(states.x, states.t)
    assert abs(ends.mean() - 0.4) < 0.01 and abs(ends.std() - 0.2) < 0.01
    early = gaussian(0.4, 0.2).consistency(states.x, states.t - 0.6)  # noise that is taken for a later state
    assert abs(early.std() - 0.2) > 0.01


def test_a_teacher_that_starts_below_half_pi_says_where() -> None:
    assert (prior_states(torch.zeros(2, 3), 1.5, nothing(2), torch.ones(2)).t == 1.5).all()
