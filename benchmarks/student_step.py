"""Time of the student's part of a step on this CPU: tangent backends, float32 against bfloat16, plain against compiled.

python benchmarks/student_step.py    (bundled teacher, 32 pairs of 4 prompts; some minutes, most of them compiling)

The variants take turns, so that a busy moment of the machine meets all of them. Each row is a median and its ratios to
the plain forward of its own precision and to the two-pass step in float32.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import TeacherSettings
from stepfold.maths.tangent import total_derivative
from stepfold.teachers.loading import load_teacher

PAIRS, PROMPTS, ROUNDS = 32, 4, 9

teacher = load_teacher(TeacherSettings(source="emoji", max_tokens=16), "cpu")
student = teacher.new_student()
condition = teacher.encode([f"red heart {i}" for i in range(PROMPTS)]).padded(16).repeat_interleave(PAIRS // PROMPTS)
guidance = torch.full((PAIRS,), 4.5)
x, dx = torch.randn(2, PAIRS, *teacher.latent_shape)
t = 1.5 * torch.rand(PAIRS)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return student(x, t, condition, guidance)


def forward(bf16: bool) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(x, t)


def step(bf16: bool, backend: str, derivative: Callable) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        tangent = derivative(network, x, t, dx, t.cos() * t.sin(), backend)
    tangent.F.float().square().sum().backward()


runs: dict[str, Callable[[], None]] = {}
for bf16 in (False, True):
    precision = "bf16" if bf16 else "fp32"
    runs[f"{precision} forward"] = partial(forward, bf16)
    for backend in ("two_pass", "one_pass") if bf16 else ("two_pass", "one_pass", "finite_difference"):
        runs[f"{precision} {backend}"] = partial(step, bf16, backend, total_derivative)
    runs[f"{precision} two_pass compiled"] = partial(
        step, bf16, "two_pass", torch.compile(total_derivative, dynamic=False)
    )

seconds: dict[str, list[float]] = {name: [] for name in runs}
for turn in range(ROUNDS + 2):
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        if turn >= 2:
            seconds[name].append(time.perf_counter() - start)

print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; tangent, forward and backward of {PAIRS} pairs")
print(f"{'':26} milliseconds  in plain forwards  against fp32 two_pass")
median = {name: 1e3 * statistics.median(of) for name, of in seconds.items()}
for name, took in median.items():
    unit = median[f"{name[:4]} forward"]
    print(f"{name:26} {took:12.1f}  {took / unit:17.2f}  {took / median['fp32 two_pass']:21.2f}")
