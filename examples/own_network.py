"""A network of one's own, distilled to one step in half a minute: a flow over points on two rings, by name."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from stepfold.api import Condition, ModuleTeacher, distill_module, draw

RINGS = {"small ring": 0.6, "large ring": 1.9}


class Flow(nn.Module):
    """The velocity z - x_0 at x = (1 - t) x_0 + t z."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.net(torch.cat([x, t[:, None], condition.embeds[:, 0]], 1))


def encode(prompts: list[str]) -> Condition:
    names = torch.tensor([list(RINGS).index(prompt) for prompt in prompts])
    return Condition.whole(nn.functional.one_hot(names, len(RINGS)).float()[:, None])


def train_teacher(steps: int = 1500) -> Flow:
    flow = Flow()
    optimiser = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    for _ in range(steps):
        prompts = [list(RINGS)[i] for i in torch.randint(len(RINGS), (256,)).tolist()]
        angle, t, z = 6.2832 * torch.rand(256), torch.rand(256), torch.randn(256, 2)
        x0 = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([RINGS[p] for p in prompts])[:, None]
        error = flow((1 - t[:, None]) * x0 + t[:, None] * z, t, encode(prompts)) - (z - x0)
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
    return flow


def main(folder: Path, steps: int = 400) -> float:
    """Returns the mean distance of one-step samples from their ring."""
    torch.manual_seed(0)
    teacher = ModuleTeacher(train_teacher(), encode, latent_shape=(2,))
    (folder / "prompts.txt").write_text("\n".join(RINGS) + "\n")
    student = distill_module(
        teacher, folder / "prompts.txt", folder / "run",
        ["objective=discrete", "space.keep_first=true", "space.route_shift=1", "optimiser.name=adamw",
         "optimiser.lr=2e-3", "optimiser.decay=0.5", f"training.steps={steps}", "training.prompts_per_step=64",
         "training.ema=0.95"],
    )  # fmt: skip
    prompts = list(RINGS) * 200
    radius = torch.tensor([RINGS[prompt] for prompt in prompts])
    return float((draw(teacher, student, prompts).cpu().norm(dim=1) - radius).abs().mean())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"mean distance of one-step samples from their ring: {main(Path(folder)):.3f}")
