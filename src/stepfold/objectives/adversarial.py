"""The adversarial term of Sana-Sprint (LADD): small heads on a frozen teacher's features tell pictures from fakes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stepfold.config import Config
from stepfold.maths.formulations import interpolate, unsqueeze_like
from stepfold.maths.routes import half_pi, logit_normal_times
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.records import Pairs

NAME = "discriminator"
"""Of the critic among `Networks.critics`."""


class Discriminator(nn.Module):
    """One head a feature map: high where a re-noised latent looks like the teacher's data, low where like a student's.

    Every layer has spectral norm 1, so that no head runs away from the student.

    Reference: arXiv:2403.12015, Sec. 4 (heads on the features of a frozen generator); arXiv:2503.09641, Sec. 3.3.
    Deviation: the heads look at each token by itself; the public ones have a convolution over tokens inside.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),
                spectral_norm(nn.Linear(width, width)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Linear(width, width)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Linear(width, 1)),
            )
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [M, tokens, width] each -> logits [M, all tokens of all maps], float32."""
        logits = [head(feature.float()).flatten(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()


def generator_loss(fake: Tensor) -> Tensor:
    """Logits of the student's pictures [M, K] -> what the student minimises [M].

    Reference: arXiv:2503.09641, Sec. 3.3.
    """
    return -fake.mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits [M, K] of both kinds -> the hinge loss that the heads minimise [M]: 2 for heads that know nothing.

    Reference: arXiv:2503.09641, Sec. 3.3.
    """
    return nn.functional.relu(1 - real).mean(1) + nn.functional.relu(1 + fake).mean(1)


@dataclass(frozen=True)
class JudgedDraws:
    """What the adversarial term draws for every pair.

    Attributes:
        start: [M, ...], pure noise of standard deviation sigma_data.
        at_start: bool [M], whether the judged picture is made from `start` instead of the pair's own state.
        t: [M], times that pictures are re-noised to.
        noise: [M, 2, ...], that they are re-noised with: the student's, and the real ones.
    """

    start: Tensor
    at_start: Tensor
    t: Tensor
    noise: Tensor


def judged_draws(pairs: Pairs, draws: Draws, config: Config, sigma_data: float) -> JudgedDraws:
    """See `JudgedDraws`; of each pair the same numbers, whatever micro-batch it is in."""
    part, shape = config.adversarial, tuple(pairs.x.shape[1:])
    count = pairs.num_drawn // len(draws.samples)
    noise = sigma_data * draws.normal("judged noise", (count, 3, *shape)).flatten(0, 1)[pairs.number]
    times = draws.normal("judged times", (count,)).flatten()[pairs.number]
    picks = draws.uniform("judged starts", (count,)).flatten()[pairs.number]
    return JudgedDraws(
        start=noise[:, 0],
        at_start=picks < part.max_time,
        t=logit_normal_times(times, sigma_data, part.logit_mean, part.logit_std),
        noise=noise[:, 1:],
    )


def adversarial_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Sana-Sprint's adversarial term of each pair, for the student and for the discriminator; see `Objective`.

    The student's picture, made from the pair's state or from pure noise, and the pair's clean latent are re-noised to
    one time, and heads on the frozen teacher's features tell them apart.
    """
    teacher, discriminator = networks.teacher, networks.critics[NAME]
    judged = judged_draws(pairs, draws, config, teacher.sigma_data)
    x = torch.where(unsqueeze_like(judged.at_start, pairs.x), judged.start, pairs.x)
    t = torch.where(judged.at_start, min(half_pi(pairs.t.dtype), teacher.start_time), pairs.t)

    def features(picture: Tensor, noise: Tensor) -> list[Tensor]:
        return teacher.features(interpolate(picture, noise, judged.t), judged.t, pairs.condition, pairs.guidance)

    with networks.precision():
        fake = predict_data(networks.student, x, t, pairs.condition, pairs.guidance, teacher.sigma_data)
        fake_features = features(fake, judged.noise[:, 0])
        for_student = generator_loss(discriminator(fake_features))
        with torch.no_grad():
            real_features = features(pairs.x0, judged.noise[:, 1])
        real_logits = discriminator(real_features)
        fake_logits = discriminator([feature.detach() for feature in fake_features])
    of_critic = discriminator_loss(real_logits, fake_logits)
    metrics = {"generator_loss": for_student.detach(), "discriminator_loss": of_critic.detach()}
    return Loss(for_student, metrics, of_critic)
