# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3}
# ---

# %% [markdown]
# # A teacher known exactly, in one step
#
# A mixture of Gaussians in the plane has a velocity in closed form, so its ODE can be solved as exactly as we like,
# and what a one-step student ought to say is known. This notebook distils it with the functions that `stepfold
# distill` uses, on one CPU core in about half a minute. Read it beside [How it works](how-it-works.md).

# %%
import math

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import data_prediction, interpolate
from stepfold.maths.routes import reference_route
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.consistency import ConsistencyOptions, consistency_terms, tangent_direction
from stepfold.spaces.generation import walk

torch.manual_seed(0)
torch.set_num_threads(1)  # the network is tiny
SIGMA_DATA = 0.5
PETALS = 5
angles = torch.arange(PETALS) * 2 * math.pi / PETALS
teacher = MixtureTeacher(
    means=torch.stack([angles.cos(), angles.sin()], 1)[:, None],  # [component, label, axis]; there is one label
    stds=torch.full((PETALS, 1), 0.12),
    weights=torch.ones(PETALS, 1),
    sigma_data=SIGMA_DATA,
)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return teacher.velocity(x, t, torch.zeros(len(x), dtype=torch.long))


# %% [markdown]
# ## The teacher's walk
#
# `walk` takes first-order steps from noise (t = pi/2) to a sample (t = 0) down a route. It keeps every state and the
# velocity that the step was taken with: these are the training pairs. Real teachers also take a condition and a
# guidance scale; here both are nothing. With 200 steps instead of 16 the end is the exact one to the eye.


# %%
def walked(noise: Tensor, num_steps: int):
    uniform = torch.rand(len(noise), num_steps)
    return walk(lambda x, t, *_: velocity(x, t), noise, reference_route(uniform, shift=1.0), None, None)  # type: ignore[arg-type]


noise = SIGMA_DATA * torch.randn(1000, 2)
exact = walked(noise, 200).x0
path = walked(noise[:60], 16)
start = torch.full((len(noise),), math.pi / 2)
blur = data_prediction(noise, start, velocity(noise, start))

# %%
colours = torch.atan2(noise[:, 1], noise[:, 0])


def show(axes, points: Tensor, title: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], c=colours[: len(points)], cmap="hsv", s=4)
    axes.set(title=title, xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")


figure, plots = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
show(plots[0], noise, "noise, coloured by its angle")
plots[1].plot(*torch.cat([path.x, path.x0[None]]).unbind(-1), "k-", linewidth=0.3)
show(plots[1], path.x0, "60 walks of 16 steps")
show(plots[2], exact, "200 steps: where noise belongs")
show(plots[3], blur, "the teacher in one step")
plt.show()

# %% [markdown]
# In one step the teacher answers with the mean of all that it might be: one point in the middle (on pictures, a
# blur). A student has to learn the third picture: the same colour at the same place.
#
# ## A student that begins as its teacher
#
# Distillation starts from the teacher's weights. Ours has none, so a small network is first fitted to its velocity.


# %%
class Student(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_unit: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x_unit, t.cos()[:, None], t.sin()[:, None]], 1))


def training(student: nn.Module, steps: int, lr: float):
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)

    def update(loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()

    return update


student = Student()
update = training(student, 800, 4e-3)
for _ in range(800):
    t = math.pi / 2 * torch.rand(1024)
    clean = teacher.sample(torch.zeros(1024, dtype=torch.long), torch.rand(1024), torch.randn(1024, 2))
    x = interpolate(clean, SIGMA_DATA * torch.randn_like(clean), t)
    update((SIGMA_DATA * student(x / SIGMA_DATA, t) - velocity(x, t)).square().mean())

# %% [markdown]
# ## Distilling it
#
# One step of training is five lines: walk, tangent, loss, and the update. `r` warms up, so that the student first
# follows the teacher's velocity and then, more and more, its own consistency.

# %%
options = ConsistencyOptions(prior_weight="none", adaptive_weight=False)
STEPS, WARMUP = 700, 100
update, norms = training(student, STEPS, 3e-3), []
for step in range(STEPS):
    path = walked(SIGMA_DATA * torch.randn(64, 2), 16)
    x, dxdt, t = path.x.flatten(0, 1), path.dxdt.flatten(0, 1), path.t.flatten()
    direction = tangent_direction(x, t, dxdt, SIGMA_DATA)
    tangent = total_derivative(student, x / SIGMA_DATA, t, *direction)
    r = min(1.0, step / WARMUP)
    terms = consistency_terms(
        tangent.F, tangent.dF, x, t, dxdt, torch.zeros_like(t), r=r, sigma_data=SIGMA_DATA, options=options
    )
    update(terms.loss.mean())
    norms.append(terms.tangent_norm.mean().item())

# %% [markdown]
# ## What it learned

# %%
with torch.no_grad():
    one_step = data_prediction(noise, start, SIGMA_DATA * student(noise / SIGMA_DATA, start))


def distance(points: Tensor) -> float:
    """Root mean square distance to where the noise belongs, in units of sigma_data."""
    return ((points - exact).square().sum(1).mean().sqrt() / SIGMA_DATA).item()


figure, plots = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
show(plots[0], exact, "where noise belongs")
show(plots[1], one_step, f"the student in one step: {distance(one_step):.2f} off")
show(plots[2], blur, f"the teacher in one step: {distance(blur):.2f} off")
plots[3].plot(norms, linewidth=0.7)
plots[3].set(title="size of the tangent", xlabel="step", yscale="log")
plt.show()

# %% [markdown]
# The student is not exact: it has to tear the plane between petals, where neighbouring noises go to different places,
# and a smooth network tears it with a seam. On pictures that seam is the faint mixture of two pictures that one-step
# students show now and then. The size of the tangent rises while `r` does, and falls once the student becomes
# consistent.
