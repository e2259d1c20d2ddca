"""The adversarial term of Sana-Sprint (LADD): small heads on a frozen teacher's features tell pictures from fakes.

The heads learn on the student's own passes, or in updates of their own before each of the student's (alternating).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached

from stepfold.config import Config
from stepfold.maths.formulations import interpolate, unsqueeze_like
from stepfold.maths.routes import half_pi, logit_normal_times
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.records import Pairs

NAME = "discriminator"
"""Of the critic among `Networks.critics`."""
AROUND = 9
"""Tokens that a head with `neighbours` sees around each, itself among them."""


class Around(nn.Module):
    """Each token sees the `AROUND` nearest of its row, channel by channel, beside itself: [M, tokens, width], same out.

    Its gain is one at most: the kernel's spectral norm is 1, and a channel's gain is below sqrt(AROUND) of that.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = spectral_norm(
            nn.Conv1d(width, width, AROUND, padding=AROUND // 2, padding_mode="circular", groups=width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """As the class says."""
        return (tokens + self.across(tokens.mT).mT / math.sqrt(AROUND)) / 2


class Discriminator(nn.Module):
    """One head a feature map: high where a re-noised latent looks like the teacher's data, low where like a student's.

    Every layer has spectral norm 1, so that no head runs away from the student.

    Reference: arXiv:2403.12015, Sec. 4 (heads on the features of a frozen generator); arXiv:2503.09641, Sec. 3.3.
    Deviation: without `neighbours` the heads look at each token by itself; with them the convolution over tokens is
        one of each channel, where the public heads have one of all channels.
    """

    def __init__(self, widths: Sequence[int], neighbours: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),
                *([Around(width)] if neighbours else []),
                spectral_norm(nn.Linear(width, width)),
                nn.LeakyReLU(0.2),
                *([Around(width)] if neighbours else []),
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
        beside: [M, ...], the small noise of `roughness`; None where it has no weight.
    """

    start: Tensor
    at_start: Tensor
    t: Tensor
    noise: Tensor
    beside: Tensor | None = None


def judged_draws(pairs: Pairs, draws: Draws, config: Config, sigma_data: float) -> JudgedDraws:
    """See `JudgedDraws`; of each pair the same numbers, whatever micro-batch it is in."""
    part, shape = config.adversarial, tuple(pairs.x.shape[1:])
    count = pairs.num_drawn // len(draws.samples)
    noise = sigma_data * draws.normal("judged noise", (count, 3, *shape)).flatten(0, 1)[pairs.number]
    times = draws.normal("judged times", (count,)).flatten()[pairs.number]
    picks = draws.uniform("judged starts", (count,)).flatten()[pairs.number]
    beside = None
    if part.r1_weight:
        small = draws.normal("judged roughness", (count, *shape)).flatten(0, 1)[pairs.number]
        beside = part.r1_noise * sigma_data * small
    return JudgedDraws(
        start=noise[:, 0],
        at_start=picks < part.max_time,
        t=logit_normal_times(times, sigma_data, part.logit_mean, part.logit_std),
        noise=noise[:, 1:],
        beside=beside,
    )


def judged_pictures(networks: Networks, pairs: Pairs, judged: JudgedDraws) -> Tensor:
    """The student's pictures [M, ...], from the pairs' states or from pure noise."""
    teacher = networks.teacher
    x = torch.where(unsqueeze_like(judged.at_start, pairs.x), judged.start, pairs.x)
    t = torch.where(judged.at_start, min(half_pi(pairs.t.dtype), teacher.start_time), pairs.t)
    return predict_data(networks.student, x, t, pairs.condition, pairs.guidance, teacher.sigma_data)


def judged_features(
    networks: Networks, pairs: Pairs, judged: JudgedDraws, picture: Tensor, noise: Tensor
) -> list[Tensor]:
    """The teacher's features of pictures [M, ...] that are noised to the times of the draws."""
    x = interpolate(picture, noise, judged.t)
    return networks.teacher.features(x, judged.t, pairs.condition, pairs.guidance)


def roughness(logits: Tensor, beside: Tensor) -> Tensor:
    """Logits [M, K] of real latents, and of those with a small noise -> their mean squared difference [M].

    It takes the place of R1's squared gradient, of which noise of deviation d has d^2 times, to first order.

    Reference: arXiv:2501.08316 (APT).
    """
    return (logits - beside).square().mean(1)


def heads_loss(
    networks: Networks, pairs: Pairs, judged: JudgedDraws, fake: Sequence[Tensor], config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the heads minimise [M], with a graph to them alone, and its metrics; `fake`: features of the student's."""
    heads, near = networks.critics[NAME], None
    with torch.no_grad():
        real = judged_features(networks, pairs, judged, pairs.x0, judged.noise[:, 1])
        if judged.beside is not None:
            near = judged_features(networks, pairs, judged, pairs.x0 + judged.beside, judged.noise[:, 1])
    with cached() if near else nullcontext():  # one estimate of the spectral norms for what is subtracted
        real_logits = heads(real)
        rough = roughness(real_logits, heads(near)) if near else None
    loss = discriminator_loss(real_logits, heads([feature.detach() for feature in fake]))
    metrics = {"discriminator_loss": loss.detach()}
    if rough is not None:
        loss, metrics["roughness"] = loss + config.adversarial.r1_weight * rough, rough.detach()
    return loss, metrics


def adversarial_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Sana-Sprint's adversarial term of each pair, for the student and for the discriminator; see `Objective`.

    The student's picture, made from the pair's state or from pure noise, and the pair's clean latent are re-noised to
    one time, and heads on the frozen teacher's features tell them apart. Heads with updates of their own learn in
    `heads_update` alone.
    """
    judged, of_critic = judged_draws(pairs, draws, config, networks.teacher.sigma_data), None
    with networks.precision():
        picture = judged_pictures(networks, pairs, judged)
        features = judged_features(networks, pairs, judged, picture, judged.noise[:, 0])
        for_student = generator_loss(networks.critics[NAME](features))
        metrics = {"generator_loss": for_student.detach()}
        if not config.adversarial.updates:
            of_critic, own = heads_loss(networks, pairs, judged, features, config)
            metrics |= own
    return Loss(for_student, metrics, of_critic)


def heads_update(networks: Networks, pairs: Pairs, draws: Draws, config: Config) -> Loss:
    """The heads' loss of an update of their own, on the student's pictures without a graph to it.

    Reference: arXiv:2403.12015 (LADD), whose updates alternate.
    """
    judged = judged_draws(pairs, draws, config, networks.teacher.sigma_data)
    with networks.precision():
        with torch.no_grad():
            picture = judged_pictures(networks, pairs, judged)
            fake = judged_features(networks, pairs, judged, picture, judged.noise[:, 0])
        loss, metrics = heads_loss(networks, pairs, judged, fake, config)
    return Loss(loss, metrics | {"loss": loss.detach()})
