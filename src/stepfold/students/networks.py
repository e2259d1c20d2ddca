"""Students whose adaptive weight has a head of its own: of a diffusers network, and of any module."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from stepfold.students.heads import TimeHead
from stepfold.students.two_times import TargetEmbedder, told
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.family import Predict


class ModuleStudent(Student):
    """A copy of a module of one's own, called as its teacher calls it. Its blocks, if any, are not known."""

    def __init__(
        self, transformer: Any, predict: Predict, weight_start: float = 0.0, time_part: str | None = None
    ) -> None:
        """Wraps a network.

        Args:
            transformer: the network, of whatever kind; weights on disk carry this name.
            predict: a plain function or a partial of one, since a student is copied whole.
            weight_start: initial -w_phi, the same at every time.
            time_part: name of the network's part that embeds its time, for a student told two times.
        """
        super().__init__()
        self.transformer, self.predict = transformer, predict
        self.variance_head = TimeHead(weight_start, two_times=time_part is not None)
        self.target_embedder = TargetEmbedder(transformer, time_part) if time_part is not None else None
        self.reads_target = time_part is not None

    @override
    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        network, embedder = self.transformer, self.target_embedder
        return told(network, embedder, target, lambda: self.predict(network, x_unit, t, condition, guidance))

    @override
    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return self.variance_head(t, target)


class NetworkStudent(ModuleStudent):
    """A diffusers network, called as the teacher calls its own. One that embeds no guidance ignores the scale."""

    can_recompute = True

    @override
    def recompute_blocks(self) -> None:
        self.transformer.enable_gradient_checkpointing()
