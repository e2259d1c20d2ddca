"""Two networks of one pipeline as one: a sample's time picks the network that it is given to."""

from typing import Any

import torch
from torch import Tensor, nn

from stepfold.teachers.contract import PartlyCalled


class Experts(PartlyCalled):
    """The networks of a pipeline with a boundary, under the pipeline's names for them.

    Attributes:
        transformer: for timesteps from the boundary up.
        transformer_2: for those below.
        boundary: a timestep; one that is 1e-6 of it below counts as on it, for times that were rounded on their way.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Any:
        """Of either network."""
        return self.transformer.config

    def enable_gradient_checkpointing(self) -> None:
        """Of both networks."""
        for network in self.children():
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    def shares(self, timestep: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """The networks that timesteps [B] pick, each with the numbers of its samples."""
        high = [time >= self.boundary * (1 - 1e-6) for time in timestep.detach().tolist()]
        rows = [[i for i, picked in enumerate(high) if picked is first] for first in (True, False)]
        return [
            (network, torch.tensor(numbers, device=timestep.device))
            for network, numbers in zip(self.children(), rows, strict=True)
            if numbers
        ]

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        """See WanTransformer3DModel; every row has one time."""
        shares = self.shares(timestep)
        if len(shares) == 1:
            return shares[0][0](hidden_states, timestep, encoder_hidden_states, **options)
        made = [
            network(
                *(value.index_select(0, rows) for value in (hidden_states, timestep, encoder_hidden_states)), **options
            )[0]
            for network, rows in shares
        ]
        return (torch.cat(made).index_select(0, torch.cat([rows for _, rows in shares]).argsort()),)
