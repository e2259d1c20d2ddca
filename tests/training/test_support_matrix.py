"""Every tangent backend with everything that is put around a student: the numbers agree, or it refuses.

docs/tangents.md shows the matrix to people. Started as a program, this file is one of the two processes that the
columns DDP and FSDP2 share.
"""

import datetime
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import SanaTransformer2DModel
from forked import Forked
from forms import cases
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.maths.blocks import compiled_blocks
from stepfold.maths.tangent import BACKENDS, total_derivative
from stepfold.objectives.consistency import ConsistencyOptions, consistency_terms, tangent_direction
from stepfold.students.sana import SanaStudent, student_transformer
from stepfold.teachers.contract import Condition
from stepfold.teachers.pipeline import SIGMA_DATA
from stepfold.training.processes import SHARDS_SINCE, Processes, local, shard

PAGE = Path(__file__).parents[2] / "docs" / "tangents.md"
COLUMNS = ("checkpointing", "torch.compile", "bf16 autocast", "DDP", "FSDP2", "LoRA")
MATRIX = {
    "two_pass": ("yes", "yes", "yes", "yes", "yes", "yes"),
    "one_pass": ("yes", "yes", "yes", "yes", "yes", "yes"),
    "block": ("yes", "yes", "yes", "yes", "yes", "yes"),
    "finite_difference": ("yes", "yes", "refused", "yes", "yes", "yes"),
}
SOON = "one_pass"
"""The backend whose two processes are looked at more closely."""
COMPILED = tuple((backend, "torch.compile") for backend in ("two_pass", "one_pass", "block", "finite_difference"))
"""Tracing takes them 10 to 20 seconds each; test_blocks.py has a smaller student traced."""
CELLS = {(backend, column): cell for backend in MATRIX for column, cell in zip(COLUMNS, MATRIX[backend], strict=True)}

REFUSALS = {
    "bf16 autocast": r"finite_difference .*rounding in bfloat16 .*training.precision=no, or training.tangent=two_pass",
}
SETTINGS = {
    "bf16 autocast": ("training.precision=bf16", "leave tangent at auto, or precision at no"),
}

# Largest relative differences of (tangent, loss, gradient of any parameter) from the reference; what was measured.
EXACT = (1e-4, 1e-4, 1e-4)  # 2e-7, 3e-7, 1e-6
DIFFERENCED = (5e-3, 1e-3, 5e-3)  # 1e-3, 5e-5, 8e-4: the step crosses kinks of ReLU
BFLOAT16 = (0.02, 0.01, 0.15)  # 5e-3, 1e-3, 5e-2: one rounding is up to 4e-3, and small gradients collect many
STEP = 1e-3  # of the finite difference; the default's error is four times as large here
ROWS = 4
ALL = slice(0, ROWS)

Call = Callable[..., Tensor]


def new_student(folder: Path, backend: str) -> SanaStudent:
    """The same in every process: the tiny teacher's weights, with noise on what starts at zero."""
    torch.manual_seed(0)
    student = SanaStudent(student_transformer(SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if backend == "block":
        student.recompute_blocks()
    return student


def step(student: SanaStudent, backend: str, rows: slice = ALL, call: Call | None = None) -> dict[str, Tensor]:
    """A training step's tangent and loss of some rows of the batch, and the gradient of their mean loss.

    Args:
        student: what is trained.
        backend: of the tangent.
        rows: of the batch.
        call: how the student is called; by default itself.
    """
    generator = torch.Generator().manual_seed(1)
    x, dxdt = SIGMA_DATA * torch.randn(2, ROWS, 4, 8, 8, generator=generator)[:, rows]
    embeds = torch.randn(ROWS, 6, 32, generator=generator)[rows]
    mask = (torch.arange(6) < torch.tensor([3, 6, 5, 2])[:, None]).long()[rows]
    t, guidance = torch.tensor([0.3, 0.7, 1.0, 1.4])[rows], torch.tensor([4.0, 4.5, 5.0, 4.5])[rows]
    condition = Condition(embeds, mask)

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return (call or student)(x_unit, t, condition, guidance)

    direction = tangent_direction(x, t, dxdt, SIGMA_DATA)
    tangent = total_derivative(network, x / SIGMA_DATA, t, *direction, backend, STEP)
    options = ConsistencyOptions(normalise="none")  # so that the loss sees the tangent's length
    log_variance = student.log_variance(t, guidance).float()
    terms = consistency_terms(
        tangent.F, tangent.dF, x, t, dxdt, log_variance, r=1.0, sigma_data=SIGMA_DATA, options=options
    )
    terms.loss.mean().backward()
    gradients = {
        f"gradient of {name}": parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return {"tangent": tangent.dF.float(), "loss": terms.loss.detach(), **gradients}


def with_lora(folder: Path, backend: str) -> SanaStudent:
    """As diffusers has it. The head of the adaptive weight is trained too."""
    peft = pytest.importorskip("peft")
    student = new_student(folder, backend).requires_grad_(False)
    student.variance_head.requires_grad_(True)
    adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(2)
    student.transformer.add_adapter(adapter)
    return student


def checkpointed(folder: Path, backend: str) -> dict[str, Tensor]:
    student = new_student(folder, backend)
    student.recompute_blocks()
    return step(student, backend)


def compiled(folder: Path, backend: str) -> dict[str, Tensor]:
    """As graphs. test_distill.py generates code of them too, which takes a minute."""
    student = new_student(folder, "two_pass")
    blocks = student.transformer.transformer_blocks
    with compiled_blocks(blocks, recompute=backend == "block", backend="aot_eager_decomp_partition"):
        return step(student, backend)


def in_bfloat16(folder: Path, backend: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return step(new_student(folder, backend), backend)


def data_parallel(folder: Path, backend: str, rows: slice) -> dict[str, Tensor]:
    """All passes go through the wrapper. `log_variance` is the student's own: its gradients are averaged as well."""
    student = new_student(folder, backend)
    return step(student, backend, rows, call=DistributedDataParallel(student))


def sharded(folder: Path, backend: str, rows: slice) -> dict[str, Tensor]:
    student = new_student(folder, backend)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in student.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "log_variance")
    return step(student, backend, rows)


SINGLE: dict[str, Callable[[Path, str], dict[str, Tensor]]] = {
    "checkpointing": checkpointed,
    "torch.compile": compiled,
    "bf16 autocast": in_bfloat16,
    "LoRA": lambda folder, backend: step(with_lora(folder, backend), backend),
}
DISTRIBUTED: dict[str, Callable[[Path, str, slice], dict[str, Tensor]]] = {"DDP": data_parallel}
if torch.__version__ >= SHARDS_SINCE:  # `shard` refuses older ones
    DISTRIBUTED["FSDP2"] = sharded


def share_held(teacher: Path, rank: int) -> Tensor:
    """What one of two processes has of a sharded student's weights, and of AdamW's states."""
    student = new_student(teacher, "two_pass")
    count = sum(parameter.numel() for parameter in student.parameters())
    shard(student, Processes(2, rank), "log_variance")
    optimiser = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [sum(local(value).numel() for value in values) for values in (student.parameters(), states)]
    return torch.tensor([held[0] / count, held[1] / (2 * count)])


def process(rank: int, teacher: Path, folder: Path, backends: list[str]) -> None:
    """One of two processes, with half of the batch each."""
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {
        f"{backend} {column}: {name}": value.contiguous().clone()
        for column, run in DISTRIBUTED.items()
        for backend in backends
        for name, value in run(teacher, backend, half).items()
    }
    if "FSDP2" in DISTRIBUTED:
        found["held"] = share_held(teacher, rank)
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves_of(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Tensor]]]:
    """What two processes found with a backend: two have the one of `make test`, two more have the others."""
    found = cache(lambda backends: in_processes(tiny_sana, tmp_path_factory.mktemp("processes"), backends))
    others = tuple(backend for backend in MATRIX if backend != SOON)
    return lambda backend: found((SOON,) if backend == SOON else others)


def in_processes(teacher: Path, folder: Path, backends: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Runs both; one that hangs or fails fails the test with both their last words."""
    run = Forked([str(teacher), str(folder), *backends], folder / "log", count=2, program=[__file__])
    code, words = run.finish(120)
    assert code == 0, words[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture(scope="module")
def reference(tiny_sana: Path) -> dict[str, Tensor]:
    """two_pass in float32, in one process, with nothing around the student."""
    return step(new_student(tiny_sana, "two_pass"), "two_pass")


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float, float]:
    """Relative differences of the tangent, of the loss, and of the gradient of the parameter where it is largest."""
    assert set(found) == set(wanted)
    of = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}
    tangent, loss = of.pop("tangent"), of.pop("loss")
    return tangent, loss, max(of.values())


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], backend: str, column: str) -> None:
    limits = BFLOAT16 if column == "bf16 autocast" else DIFFERENCED if backend == "finite_difference" else EXACT
    result = differences(found, wanted)
    assert all(value <= limit for value, limit in zip(result, limits, strict=True)), (result, limits)


@pytest.mark.parametrize(
    ("backend", "column"),
    cases(
        [cell for cell in CELLS if cell[1] in SINGLE and CELLS[cell] == "yes"],
        short=[cell for cell in CELLS if cell[1] in SINGLE and CELLS[cell] == "yes" and cell not in COMPILED],
    ),
)
def test_in_one_process(backend: str, column: str, tiny_sana: Path, reference: dict[str, Tensor]) -> None:
    if column == "LoRA":
        reference = step(with_lora(tiny_sana, "two_pass"), "two_pass")
        assert 30 < len(reference) < 40  # two matrices for each of 16 layers, and the head
    check(SINGLE[column](tiny_sana, backend), reference, backend, column)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "column"), [cell for cell in CELLS if cell[1] in DISTRIBUTED])
def test_in_two_processes(
    backend: str, column: str, halves_of: Callable[[str], list[dict[str, Tensor]]], reference: dict[str, Tensor]
) -> None:
    """Either process has half of the tangents and of the losses, and the whole batch's gradient."""
    mark, halves = f"{backend} {column}: ", halves_of(backend)
    own = [{key.removeprefix(mark): value for key, value in half.items() if key.startswith(mark)} for half in halves]
    for found in own:
        rows = {name: torch.cat([half[name] for half in own]) for name in ("tangent", "loss")}
        check(found | rows, reference, backend, column)


@pytest.mark.skipif("FSDP2" not in DISTRIBUTED, reason=f"sharding needs torch {SHARDS_SINCE}")
@pytest.mark.long
def test_a_sharded_student_is_held_in_halves(halves_of: Callable[[str], list[dict[str, Tensor]]]) -> None:
    for half in halves_of(SOON):
        assert half["held"].sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize(("backend", "column"), [cell for cell in CELLS if CELLS[cell] == "refused"])
def test_what_is_refused(backend: str, column: str, tiny_sana: Path) -> None:
    """With a reason and a way out, in the settings and at the call."""
    with pytest.raises(UserError, match=REFUSALS[column]):
        SINGLE[column](tiny_sana, backend)
    setting, way_out = SETTINGS[column]
    with pytest.raises(UserError, match=way_out):
        load_config("default", [setting, f"training.tangent={backend}"])


def test_the_page_shows_the_matrix() -> None:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().split("## Supported combinations", 1)[1].splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["", *COLUMNS]
    assert {name: tuple(cells) for name, *cells in rows[2:]} == MATRIX
    assert tuple(MATRIX) == BACKENDS


if __name__ == "__main__":
    process(int(os.environ["RANK"]), Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
