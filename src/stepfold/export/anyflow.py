"""A flow-map student of Wan as diffusers' AnyFlowPipeline, whose network is told both times: one folder for all steps.

That network embeds a target time as it embeds a state's, and mixes both embeddings by a gate. So the student's own
second embedder is fitted at the target times of the listed numbers of steps.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.pipeline import write_cards
from stepfold.sampling.recipe import Recipe
from stepfold.students.card import ANYFLOW, Card, read_card
from stepfold.students.folding import MOST_ERROR
from stepfold.students.loading import load_merged
from stepfold.students.two_times import EMBEDDER
from stepfold.teachers.anyflow import anyflow_classes, timesteps
from stepfold.teachers.calls import scheduler_times
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.wan import WanTeacher
from stepfold.training.runs import writing

KEPT = ("tokenizer", "text_encoder", "vae")
GATE = 0.5
"""Share of the target's embedding; a power of two, so that undoing it rounds nothing."""
SPREAD = 3.0
"""Size of the first layer's random weights: large enough to tell the target times apart."""


def export_anyflow(folder: Path, out: Path) -> None:
    """A flow-map student of Wan as an AnyFlowPipeline folder; a LoRA student is merged into its teacher's network.

    Raises:
        UserError: the student is none that jumps anywhere, or not of Wan 2.1.
    """
    card = read_card(folder)
    if not (card.recipe.sampler == "flow_map" and card.recipe.jumps_anywhere):
        raise UserError(
            "--to anyflow is for flow maps that jump from any time to any other; train with student.times=two and, for "
            "example, --preset ayf, or use --to pipeline"
        )
    teacher, student, card = load_merged(folder, "cpu")
    if not isinstance(teacher, WanTeacher):
        raise UserError(
            f"--to anyflow is for students of Wan, and this one's is a {type(teacher.pipe).__name__}; use --to "
            "pipeline --steps 4, for example"
        )
    if teacher.index.get("expand_timesteps"):
        raise UserError(
            "--to anyflow is for students of Wan 2.1: this one's network is told a time for each token, and that of "
            "AnyFlowPipeline one for each frame; use stepfold sample"
        )
    kind, network_kind, scheduler_kind = anyflow_classes()
    scheduler = scheduler_kind(shift=teacher.shift)
    times = {steps: tuple(scheduler_times(scheduler, num_inference_steps=steps)) for steps in card.recipe.times}
    network = told_both(student, network_kind, target_times(times))
    recipe = card.recipe.model_copy(update={"times": times})
    with writing(out) as part:
        parts = {"transformer": network, "scheduler": scheduler}
        teacher.write_pipeline(kind, lambda: {name: teacher.pipe.components[name] for name in KEPT} | parts, part)
        write_cards(part, card.model_copy(update=use_of(teacher, recipe, card)))


def use_of(teacher: PipelineTeacher, recipe: Recipe, card: Card) -> dict[str, Any]:
    """The fields of the card that differ from the student's."""
    calls = {n: teacher.usual_call() | {"num_inference_steps": n, "guidance_scale": 1.0} for n in recipe.times}
    scheduler = "FlowMapEulerDiscreteScheduler"
    merged = card.merged or card.lora_rank > 0
    return {
        "recipe": recipe,
        "pipeline": ANYFLOW,
        "scheduler": scheduler,
        "calls": calls,
        "merged": merged,
        "conventions": {},
    }


def target_times(times: Mapping[int, Sequence[float]]) -> Tensor:
    """All times that a step of some list leads to, rising from 0, in float64."""
    return torch.tensor(sorted({0.0, *(time for listed in times.values() for time in listed[1:])})).double()


@torch.no_grad()
def told_both(student: Any, kind: Any, targets: Tensor) -> Any:
    """The student's network as one of diffusers' that is told both times.

    Args:
        student: a flow map of Wan.
        kind: `AnyFlowTransformer3DModel`, whose parts have the names of Wan's.
        targets: target times s [n] at which the second embedding is the student's.

    Raises:
        UserError: the network is so narrow that float32 cannot tell these times apart.
    """
    wan = student.get_submodule("transformer")
    named = inspect.signature(kind.__init__).parameters
    network = kind(**{name: value for name, value in wan.config.items() if name in named}, gate_value=GATE)
    loaded = network.load_state_dict(wan.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all("delta_embedder" in name for name in loaded.missing_keys)
    embedder = network.condition_embedder
    first, last, time = (
        embedder.delta_embedder.linear_1,
        embedder.delta_embedder.linear_2,
        embedder.time_embedder.linear_2,
    )
    noise = torch.randn(first.out_features, first.in_features + 1, generator=torch.Generator().manual_seed(0))
    first.weight.copy_(SPREAD * noise[:, :-1] / first.in_features**0.5)
    first.bias.copy_(noise[:, -1])
    features = embedder.timesteps_proj(timesteps(targets)).to(first.weight.dtype)
    hidden = embedder.delta_embedder.act(first(features))
    wanted = student.get_submodule(EMBEDDER)(targets.float())
    last.weight.copy_(fitted(hidden, wanted) / GATE)
    last.bias.zero_()
    time.weight.div_(1 - GATE)
    time.bias.div_(1 - GATE)
    return network.eval()


def fitted(hidden: Tensor, wanted: Tensor) -> Tensor:
    """The least weight W [D, H] with W h_i = e_i for all i, in float64.

    Args:
        hidden: h [n, H].
        wanted: e [n, D]; some may be 0.

    Raises:
        UserError: float32 cannot hold it.
    """
    h, e = hidden.double(), wanted.double()
    weight = (torch.linalg.pinv(h, rtol=1e-14) @ e).T
    rounding = torch.finfo(torch.float32).eps * weight.norm() * h.norm(dim=1).max()
    error = float(((h @ weight.T - e).norm(dim=1).max() + rounding) / e.norm(dim=1).max().clamp(min=1e-12))
    if error > MOST_ERROR:
        raise UserError(
            f"the network's embedding is too narrow for {len(h)} target times (error {error:.0e} in float32); use --to "
            "pipeline --steps 4, for example"
        )
    return weight
