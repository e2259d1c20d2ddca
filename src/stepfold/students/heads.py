"""The adaptive weight's own small network."""

import torch
from torch import Tensor, nn


class TimeHead(nn.Module):
    """-w_phi(t), linear in a few waves of t."""

    WAVES = 8

    def __init__(self, start: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * self.WAVES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, start)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B]."""
        angles = t[:, None] * torch.arange(1, self.WAVES + 1, dtype=t.dtype, device=t.device)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear(waves.to(self.linear.weight.dtype)).squeeze(-1)
