"""Reward: the student raises a differentiable score of its decoded pictures, beside what keeps them the teacher's.

A noisy divergence is a weak anchor, so the weight is small and the score comes last: `reward.from_step`.
"""

from stepfold.config import Config
from stepfold.maths.formulations import in_float32
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.records import States


def reward_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """Minus the score of the student's picture of each state; see `Objective`.

    Reference: arXiv:2304.05977 (ReFL); arXiv:2511.13649 (DMDR), beside distribution matching.
    """
    assert networks.reward is not None and states.prompt_on_host is not None
    with networks.precision():
        x0 = predict_data(
            networks.student, states.x, states.t, states.condition, states.guidance, networks.teacher.sigma_data
        )
    samples = [draws.samples[i] for i in states.prompt_on_host.tolist()]
    score = in_float32(networks.reward(x0, samples))
    assert score.shape == states.t.shape, f"a reward gives one score a picture, not {tuple(score.shape)}"
    return Loss(-score, {"|x0|": x0.detach().flatten(1).norm(dim=1), "reward": score.detach()})
