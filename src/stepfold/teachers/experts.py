"""Two networks of one pipeline as one: a sample's time picks the network that it is given to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_time
from stepfold.teachers.contract import Condition, PartlyCalled
from stepfold.teachers.pipeline import PipelineTeacher


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


class ExpertsTeacher(PipelineTeacher):
    """Abstract: pipelines that may have a second network, `transformer_2`, for times below a boundary."""

    @override
    def whole_network(self) -> nn.Module:
        """Of a pipeline with a boundary, both networks."""
        first, second = self.pipe.transformer, self.pipe.transformer_2
        if second is None:
            return super().whole_network()
        ours, theirs = (
            {k: v for k, v in network.config.items() if k[0] != "_" and k not in self.block_stacks().values()}
            for network in (first, second)
        )
        if other := [name for name, value in ours.items() if theirs[name] != value]:
            raise UserError(
                f"the two networks of teacher {self.source!r} differ in {other[0]} ({ours[other[0]]!r}, "
                f"{theirs[other[0]]!r}); copy the folder again"
            )
        return Experts(first, second, self.index["boundary_ratio"] * self.num_train_timesteps)

    @override
    def network_parts(self, network: Any) -> dict[str, Any]:
        return dict(network.named_children()) if isinstance(network, Experts) else super().network_parts(network)

    @override
    def check_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        if loras and self.pipe.transformer_2 is not None:
            raise UserError(
                "teacher.lora is for a pipeline of one network, and this WanPipeline has two; merge the LoRAs of each "
                "with diffusers, save the pipeline and give that folder"
            )

    @override
    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """Of two networks each sample has those of the network that its time picks, in the same places."""
        network = self.transformer
        if not isinstance(network, Experts):
            return super().features(x, t, condition, guidance)
        first: Any = network.transformer
        blocks = list(first.blocks)
        shares: list[tuple[Any, Tensor]] = network.shares(self.num_train_timesteps * flow_time(t))
        made = []
        for expert, rows in shares:
            own = [expert.blocks[min(blocks.index(block), len(expert.blocks) - 1)] for block in self.feature_blocks]
            x_own, t_own, scale = (values.index_select(0, rows) for values in (x, t, guidance))
            made.append(self.maps_of(own, x_own, t_own, condition.rows(rows), scale))
        back = torch.cat([rows for _, rows in shares]).argsort()
        return [torch.cat(maps).index_select(0, back) for maps in zip(*made, strict=True)]
