"""Time of the student's part of a step on this CPU: float32 against bfloat16, plain against compiled.

python benchmarks/student_step.py    (bundled teacher, 32 pairs of 4 prompts; two minutes, most of them compiling)
"""

import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import TeacherSettings
from stepfold.maths.tangent import total_derivative
from stepfold.teachers.loading import load_teacher

PAIRS, PROMPTS = 32, 4


def milliseconds(run: Callable[[], None], repeats: int = 7) -> float:
    run()
    run()
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return 1e3 * min(took)


teacher = load_teacher(TeacherSettings(source="emoji", max_tokens=16), "cpu")
student = teacher.new_student()
condition = teacher.encode([f"red heart {i}" for i in range(PROMPTS)]).padded(16).repeat_interleave(PAIRS // PROMPTS)
guidance = torch.full((PAIRS,), 4.5)
x, dx = torch.randn(2, PAIRS, *teacher.latent_shape)
t = 1.5 * torch.rand(PAIRS)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return student(x, t, condition, guidance)


print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, best of 7")
forwards: dict[bool, float] = {}
for bf16 in (False, True):
    for compiled in (False, True):
        derivative = torch.compile(total_derivative, dynamic=False) if compiled else total_derivative

        def forward(bf16: bool = bf16) -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                network(x, t)

        def step(bf16: bool = bf16, derivative: Callable = derivative) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
                tangent = derivative(network, x, t, dx, t.cos() * t.sin())
            tangent.F.float().square().sum().backward()

        if not compiled:
            forwards[bf16] = milliseconds(forward)
        took = milliseconds(step)
        print(
            f"{'bf16' if bf16 else 'fp32'} {'compiled' if compiled else 'plain   '}: tangent, forward and backward "
            f"{took:6.1f} = {took / forwards[bf16]:4.1f} plain forwards of {forwards[bf16]:.1f}"
        )
