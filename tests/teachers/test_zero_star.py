"""CFG-Zero*: the branch without a prompt is scaled towards the other, in flow-matching velocities."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from stepfold.config import TeacherSettings, load_config
from stepfold.errors import UserError
from stepfold.maths.formulations import flow_state, flow_velocity, guide, trigflow_output, unsqueeze_like
from stepfold.teachers.guiding import zero_star_branch
from stepfold.teachers.loading import load_teacher


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, WITHOUT, WITH = (normal(3, 2, 4, 4, seed=seed) for seed in range(3))
T = torch.tensor([0.3, 1.0, math.pi / 2 - 0.05], dtype=torch.float64)


def test_the_branch_is_the_multiple_nearest_to_the_prompts_own() -> None:
    """In flow velocities: what is left of v_c is at right angles to v_u. Formed of F the factor is another."""
    x_flow, t_flow = flow_state(X, T)
    found = flow_velocity(x_flow, t_flow, zero_star_branch(X, T, WITHOUT, WITH))
    v_u, v_c = flow_velocity(x_flow, t_flow, WITHOUT), flow_velocity(x_flow, t_flow, WITH)
    factor = (found / v_u).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-9, atol=0)
    assert ((v_c - found) * v_u).flatten(1).sum(1).abs().max() < 1e-12
    of_F = (WITH * WITHOUT).flatten(1).sum(1) / WITHOUT.square().flatten(1).sum(1)
    wrong = flow_velocity(x_flow, t_flow, unsqueeze_like(of_F, X) * WITHOUT)
    assert ((v_c - wrong) * v_u).flatten(1).sum(1).abs().min() > 0.1


def test_branches_that_differ_by_a_factor_are_one_whatever_the_scale() -> None:
    x_flow, t_flow = flow_state(X, T)
    twice = trigflow_output(x_flow, t_flow, 2 * flow_velocity(x_flow, t_flow, WITHOUT))
    torch.testing.assert_close(zero_star_branch(X, T, WITHOUT, twice), twice, rtol=0, atol=1e-12)
    nothing = trigflow_output(x_flow, t_flow, torch.zeros_like(x_flow))
    assert zero_star_branch(X, T, nothing, WITH).isfinite().all()


def teacher_of(folder: Path, **changed: Any) -> Any:
    return load_teacher(TeacherSettings(source=str(folder), height=32, width=32, max_tokens=24, **changed), "cpu")


def test_a_teacher_is_guided_so(tiny_sana: Path) -> None:
    plain, teacher = teacher_of(tiny_sana), teacher_of(tiny_sana, guidance_rule="zero_star")
    x, t = 0.5 * normal(2, *plain.latent_shape, seed=4).float(), T[:2].float()
    condition, scale = plain.encode(["red heart", "a cat"]), torch.tensor([3.0, 1.0])
    without, with_prompt = (2 * each for each in plain.branches(x, t, condition))
    wanted = 0.5 * guide(zero_star_branch(2 * x, t, without, with_prompt), with_prompt, scale)
    found = teacher.velocity(x, t, condition, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    usual = plain.velocity(x, t, condition, scale)
    assert (found[0] - usual[0]).abs().max() > 1e-4
    torch.testing.assert_close(found[1], usual[1], rtol=1e-4, atol=1e-5)  # a scale of 1 is the prompt's own


def test_what_has_no_such_guidance_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_flux, tmp_path / "flux")
    with pytest.raises(UserError, match=r"guidance_rule is zero_star, but the guidance of '.*' is embedded"):
        teacher_of(folder, guidance_rule="zero_star")
    with pytest.raises(UserError, match="guidance_rule"):
        load_config("default", ["teacher.guidance_rule=zero"])
