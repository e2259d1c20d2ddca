"""The training loop shared by the recipe's three networks: resumable, time-limited, with its progress on disk."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix, by five Newton-Schulz steps (Jordan et al., Muon)."""
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    if wide := x.size(0) > x.size(1):
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if wide else x).to(matrix)


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, 1 x 1 convolutions included.

    Written here because torch.optim.Muon accepts two-dimensional parameters only, and half of a Sana block's weights
    are 1 x 1 convolutions.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonalise(update) * 0.2 * math.sqrt(max(update.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


def optimisers(module: nn.Module, lr: float, lr_muon: float | None) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for matrices and AdamW for the rest when `lr_muon` is given."""

    def is_matrix(name: str, p: Tensor) -> bool:
        return (
            p.ndim >= 2
            and p.flatten(1).size(1) > 9
            and not any(part in name for part in ("embed", "table", "proj_out"))
        )

    if lr_muon is None:
        return [torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    matrices = [p for n, p in module.named_parameters() if is_matrix(n, p)]
    rest = [p for n, p in module.named_parameters() if not is_matrix(n, p)]
    return [Muon(matrices, lr=lr_muon), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def save_atomically(state: object, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def fit(
    module: nn.Module,
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    work: Path,
    *,
    steps: int,
    lr: float,
    lr_muon: float | None = None,
    warmup: int = 100,
    cooldown: float = 0.35,
    ema: float = 0.999,
    preview: Callable[[nn.Module, int], None] | None = None,
    every: int = 250,
) -> nn.Module:
    """Trains `module` for `steps` steps and returns its exponential moving average.

    The learning rate warms up, holds and then decays linearly over the last `cooldown` of the steps. Every `every`
    steps the state goes to `work` (a killed run continues from there) and `preview(average, step)` draws pictures.
    """
    work.mkdir(parents=True, exist_ok=True)
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    opts = optimisers(module, lr, lr_muon)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    start, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device())
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        start = state["step"]

    def save(step: int) -> None:
        opt_states = [o.state_dict() for o in opts]
        save_atomically(
            {"module": module.state_dict(), "average": average.state_dict(), "opts": opt_states, "step": step},
            checkpoint,
        )
        if preview:
            preview(average.module, step)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, speed_estimate_period=120) as bar, open(work / "log.jsonl", "a") as log:
        task = bar.add_task(work.name, total=steps, completed=start)
        began = time.time()
        for step in range(start, steps):
            factor = min(1.0, (step + 1) / warmup, (steps - step) / (cooldown * steps))
            for o, lrs in zip(opts, base, strict=True):
                for g, value in zip(o.param_groups, lrs, strict=True):
                    g["lr"] = value * factor
            loss, parts = loss_at(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            average.update_parameters(module)
            if step % 25 == 0:
                row = {"step": step, "sec": time.time() - began, "loss": loss.item(), "grad_norm": norm.item(), **parts}
                log.write(json.dumps(row) + "\n")
                log.flush()
            bar.update(task, advance=1, description=f"{work.name} loss {loss.item():.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                save(step + 1)
    return average.module.eval()
