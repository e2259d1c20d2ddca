"""The adversarial term of Sana-Sprint (LADD): small heads on a frozen teacher's features tell pictures from fakes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


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
