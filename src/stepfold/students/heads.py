"""The adaptive weight's own small network, and the features of times that it reads."""

import torch
from torch import Tensor, nn

NUM_WAVES = 8


def waves(t: Tensor) -> Tensor:
    """Features of a time t [B]: cos k t and sin k t for k = 1 ... NUM_WAVES, [B, 2 NUM_WAVES]."""
    angles = t[:, None] * torch.arange(1, NUM_WAVES + 1, dtype=t.dtype, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], 1)


def target_waves(s: Tensor) -> Tensor:
    """Features of a target time s [B] that vanish at s = 0: cos k s - 1 and sin k s, [B, 2 NUM_WAVES]."""
    return waves(s) - waves(torch.zeros_like(s))


class TimeHead(nn.Module):
    """-w_phi(t, s), linear in a few waves of the times; s = 0 and no s are the same."""

    def __init__(self, start: float, *, two_times: bool = False) -> None:
        """Starts at `start` for all times; with `two_times` it reads s too."""
        super().__init__()
        self.linear = nn.Linear(2 * NUM_WAVES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, start)
        self.target = nn.Linear(2 * NUM_WAVES, 1, bias=False) if two_times else None
        if self.target:
            nn.init.zeros_(self.target.weight)

    def forward(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        """t [B], s [B] -> [B]."""
        dtype = self.linear.weight.dtype
        found = self.linear(waves(t).to(dtype))
        if self.target and s is not None:
            found = found + self.target(target_waves(s).to(dtype))
        return found.squeeze(-1)
