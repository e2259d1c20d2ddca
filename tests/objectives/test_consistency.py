import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepfold.config import load_config, phases_of, preset_names
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import (
    data_prediction,
    flow_input,
    flow_time,
    flow_velocity,
    trigflow_output,
    unsqueeze_like,
)
from stepfold.maths.routes import half_pi, reference_times
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.consistency import (
    ConsistencyOptions,
    consistency_tangent,
    consistency_terms,
    normalise_tangent,
    prior_weight,
    r_of,
    short_of_r,
    tangent_direction,
)

SIGMA_DATA = 0.5
SHAPE = (3, 2, 2)
D = 12
EXACT: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


def batch(num: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What `consistency_terms` takes, all of it random, t over the open interval."""
    generator = torch.Generator().manual_seed(0)
    F, dF, x, dxdt = torch.randn(4, num, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.linspace(0.05, 1.55, num, dtype=torch.float64).to(dtype)
    log_variance = torch.randn(num, generator=generator, dtype=torch.float64).to(dtype)
    return dict(F=F, dF=dF, x=x, t=t, dxdt=dxdt, log_variance=log_variance)


def by_hand(
    values: dict[str, Tensor], i: int, r: float, options: ConsistencyOptions
) -> tuple[list[float], float, float]:
    """Sample i in plain numbers: the target g / (||g|| + c), weight(t) e^{w_phi}, and ||g||^2 / D."""
    t = values["t"][i].item()
    F, dF, x, dxdt = (values[name][i].flatten().tolist() for name in ("F", "dF", "x", "dxdt"))
    cos, sin = math.cos(t), math.sin(t)
    g = [
        -cos * cos * (SIGMA_DATA * F[j] - dxdt[j]) - r * (cos * sin * x[j] + SIGMA_DATA * dF[j])
        for j in range(D)
    ]  # fmt: skip
    norm = math.sqrt(sum(value * value for value in g))
    divisor = {
        "none": 1.0,
        "l2": norm + options.normalise_constant,
        "l2_per_element": norm / math.sqrt(D) + options.normalise_constant,
    }[options.normalise]
    weight = 1 / (SIGMA_DATA * math.tan(t)) if options.prior_weight == "inverse_tangent" else 1.0
    weight *= math.exp(-values["log_variance"][i].item()) if options.adaptive_weight else 1.0
    return [value / divisor for value in g], weight, norm * norm / D


ALL_OPTIONS = [
    ConsistencyOptions(prior, adaptive, normalise, constant)
    for prior, adaptive, normalise, constant in itertools.product(
        ("inverse_tangent", "none"), (True, False), ("l2", "l2_per_element", "none"), (0.1, 0.7)
    )
]


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=lambda o: "-".join(map(str, vars(o).values())))
@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_those_derived_by_hand(options: ConsistencyOptions, r: float):
    """loss = a / D ||F - F^- - g||^2 - w, so dloss/dF = -2 a g / D and dloss/dlogvar = 1 - a / D ||g||^2 at F = F^-."""
    values = batch()
    F, log_variance = values["F"].requires_grad_(), values["log_variance"].requires_grad_()
    terms = consistency_terms(**values, r=r, sigma_data=SIGMA_DATA, options=options)
    dloss_dF, dloss_dlogvar = torch.autograd.grad(
        terms.loss.sum(), (F, log_variance), materialize_grads=True, allow_unused=True
    )
    for i in range(len(F)):
        g, weight, raw = by_hand(values, i, r, options)
        error = sum(value * value for value in g) / D
        logvar = log_variance[i].item() if options.adaptive_weight else 0.0
        assert terms.loss[i].item() == pytest.approx(weight * error + logvar, rel=1e-12, abs=1e-12)
        assert terms.squared_error[i].item() == pytest.approx(error, rel=1e-12)
        assert terms.tangent_norm[i].item() == pytest.approx(math.sqrt(raw), rel=1e-12)
        expected = torch.tensor([-2 * weight * value / D for value in g], dtype=torch.float64)
        torch.testing.assert_close(dloss_dF[i].flatten(), expected, **EXACT)
        slope = 1 - weight * error if options.adaptive_weight else 0.0
        assert dloss_dlogvar[i].item() == pytest.approx(slope, rel=1e-12, abs=1e-12)
    assert not terms.squared_error.requires_grad and not terms.tangent_norm.requires_grad


def test_the_options_differ_from_each_other():
    losses = [
        consistency_terms(**batch(), r=0.75, sigma_data=SIGMA_DATA, options=options).loss for options in ALL_OPTIONS
    ]
    meanings = [  # without normalisation there is no constant
        (o.prior_weight, o.adaptive_weight, o.normalise, o.normalise_constant if o.normalise != "none" else 0)
        for o in ALL_OPTIONS
    ]
    for i, j in itertools.combinations(range(len(losses)), 2):
        assert torch.equal(losses[i], losses[j]) == (meanings[i] == meanings[j]), (ALL_OPTIONS[i], ALL_OPTIONS[j])


def test_nothing_but_the_students_output_and_its_weight_gets_a_gradient():
    values = {name: value.requires_grad_() for name, value in batch().items()}
    g = consistency_tangent(*(values[k] for k in ("F", "dF", "x", "t", "dxdt")), r=1.0, sigma_data=SIGMA_DATA)
    assert not g.requires_grad
    options = ConsistencyOptions(prior_weight="none")
    terms = consistency_terms(**values, r=1.0, sigma_data=SIGMA_DATA, options=options)
    terms.loss.sum().backward()
    assert [name for name, value in values.items() if value.grad is not None] == ["F", "log_variance"]


def test_r_0_is_plain_velocity_matching():
    """Its gradient is that of cos^2 t / (sigma_data D) ||sigma_data F - dxdt||^2, without the student's derivative."""
    values = batch()
    options = ConsistencyOptions(prior_weight="none", adaptive_weight=False, normalise="none")
    F = values["F"].requires_grad_()
    terms = consistency_terms(**values, r=0.0, sigma_data=SIGMA_DATA, options=options)
    (ours,) = torch.autograd.grad(terms.loss.sum(), F)
    error = (SIGMA_DATA * F - values["dxdt"]).square().flatten(1).mean(1)
    (matching,) = torch.autograd.grad((values["t"].cos() ** 2 / SIGMA_DATA * error).sum(), F)
    torch.testing.assert_close(ours, matching, **EXACT)
    changed = values | {"dF": torch.full_like(F, 1e3), "x": values["x"] * 0.5}
    again = consistency_terms(**changed, r=0.0, sigma_data=SIGMA_DATA, options=options)
    torch.testing.assert_close(again.loss, terms.loss, **EXACT)


class Net(nn.Module):
    """A smooth network of x / sigma_data and time, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D + 1, 32), nn.Tanh(), nn.Linear(32, D)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x.flatten(1), t[:, None]], 1)).reshape(x.shape)


def trajectory() -> tuple[GaussianTeacher, Tensor, Tensor]:
    """A closed-form teacher and states of its trajectories at times between 0.1 and 1.5."""
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.rand(2, *SHAPE, generator=generator, dtype=torch.float64)
    teacher = GaussianTeacher(mean, std + 0.2, SIGMA_DATA)
    t = torch.linspace(0.1, 1.5, 9, dtype=torch.float64)
    noise = SIGMA_DATA * torch.randn(9, *SHAPE, generator=generator, dtype=torch.float64)
    return teacher, teacher.flow_map(noise, torch.full_like(t, math.pi / 2), t), t


def test_g_is_cos_t_times_the_change_of_f_along_the_trajectory():
    """Against a fourth-order difference of f(x(s), s) along the teacher's exact flow: no derivative rule in common."""
    (teacher, x, t), net, h = trajectory(), Net(), 1e-3

    def f(offset: float) -> Tensor:
        state = teacher.flow_map(x, t, t + offset)
        return data_prediction(state, t + offset, SIGMA_DATA * net(state / SIGMA_DATA, t + offset))

    with torch.no_grad():
        dfdt = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
    dxdt = teacher.velocity(x, t)
    tangent = total_derivative(net, x / SIGMA_DATA, t, *tangent_direction(x, t, dxdt, SIGMA_DATA))
    g = consistency_tangent(tangent.F, tangent.dF, x, t, dxdt, 1.0, SIGMA_DATA)
    torch.testing.assert_close(g, unsqueeze_like(t.cos(), x) * dfdt, rtol=1e-9, atol=1e-9)
    assert g.abs().max() > 0.1


def test_in_flow_matching_coordinates_the_target_is_teacher_velocity_minus_t_dv_dt():
    """g is cos t sigma_data dt_flow/dt times (v_teacher - t dv/dt) - v, with dv/dt along the flow-matching ODE."""
    (teacher, x, t), net = trajectory(), Net()

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return trigflow_output(flow_input(x_unit, t, 1.0), flow_time(t), net(flow_input(x_unit, t, 1.0), flow_time(t)))

    dxdt = teacher.velocity(x, t)
    tangent = total_derivative(network, x / SIGMA_DATA, t, *tangent_direction(x, t, dxdt, SIGMA_DATA))
    g = consistency_tangent(tangent.F, tangent.dF, x, t, dxdt, 1.0, SIGMA_DATA)

    t_flow, x_flow = flow_time(t), flow_input(x, t, SIGMA_DATA)
    v_teacher = flow_velocity(x_flow, t_flow, dxdt / SIGMA_DATA)
    v, dvdt = torch.func.jvp(net, (x_flow, t_flow), (v_teacher, torch.ones_like(t)))[:2]
    target = v_teacher - unsqueeze_like(t_flow, x) * dvdt
    rate = 1 / (t.sin() + t.cos()) ** 2  # dt_flow / dt
    torch.testing.assert_close(g, unsqueeze_like(t.cos() * SIGMA_DATA * rate, x) * (target - v), rtol=1e-10, atol=1e-10)


def test_prior_weight_along_the_released_ladder():
    """The public code's weights for 16 steps; at pi/2 it is as good as nothing, and not negative."""
    weight = prior_weight(reference_times(16, 2.5), SIGMA_DATA, "inverse_tangent")
    known = [0, 0.057, 0.12, 0.20, 0.29, 0.40, 0.53, 0.70, 0.91, 1.19, 1.59, 2.18, 3.16, 5.1, 10.8, 320]
    torch.testing.assert_close(weight, torch.tensor(known, dtype=torch.float64), rtol=0.03, atol=1e-9)
    assert 0 <= prior_weight(torch.tensor(half_pi(torch.float32)), SIGMA_DATA, "inverse_tangent") < 1e-6
    assert prior_weight(weight, SIGMA_DATA, "none").tolist() == [1.0] * 16


def test_normalised_tangents_do_not_depend_on_the_rest_of_the_batch_and_survive_zero():
    g = torch.randn(4, *SHAPE, dtype=torch.float64)
    for kind in ("l2", "l2_per_element"):
        together = normalise_tangent(g, kind, 0.1)
        torch.testing.assert_close(together[2:3], normalise_tangent(g[2:3], kind, 0.1), **EXACT)
        assert normalise_tangent(torch.zeros_like(g), kind, 0.1).abs().max() == 0
    size = normalise_tangent(1e9 * g, "l2", 0.1).flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-6, atol=0)
    size = normalise_tangent(1e9 * g, "l2_per_element", 0.1).flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.full_like(size, D**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", ALL_OPTIONS[::5], ids=lambda o: "-".join(map(str, vars(o).values())))
def test_float32_stays_float32_and_agrees_with_float64(options: ConsistencyOptions):
    settings: dict[str, Any] = dict(r=0.75, sigma_data=SIGMA_DATA, options=options)
    single, double = (
        consistency_terms(**batch(dtype=torch.float32), **settings),
        consistency_terms(**batch(), **settings),
    )
    for name, value in vars(single).items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value.double(), vars(double)[name], rtol=2e-5, atol=1e-6)


def test_a_student_in_bfloat16_gets_its_loss_in_float32():
    """Under autocast F and dF are bfloat16; rounding them must be all that changes."""
    values = batch(dtype=torch.float32)
    half = values | {"F": values["F"].bfloat16(), "dF": values["dF"].bfloat16()}
    rounded = half | {"F": half["F"].float(), "dF": half["dF"].float()}
    settings: dict[str, Any] = dict(r=1.0, sigma_data=SIGMA_DATA, options=ConsistencyOptions())
    terms, expected = consistency_terms(**half, **settings), consistency_terms(**rounded, **settings)
    assert terms.loss.dtype == torch.float32
    assert torch.equal(terms.loss, expected.loss)


@pytest.mark.parametrize("preset", preset_names())
def test_r_reaches_its_end_in_the_steps_of_every_preset(preset: str):
    config = load_config(preset, teacher__source="x/y", prompts=None if preset in ("scm", "sana-sprint") else "p")
    if config.objective == "auto":
        config = config.model_copy(update={"objective": "continuous"})
    first, last = phases_of(config)[-1]
    if last.objective == "continuous":
        assert r_of(last, config.training.steps - 1 - first) == pytest.approx(last.consistency.r_final)
    assert short_of_r(config) is None


def test_a_run_too_short_for_the_course_of_r_is_told_so():
    config = load_config("default", ["objective=continuous", "training.steps=2000"], teacher__source="x", prompts="p")
    assert short_of_r(config) == (
        "r ends at 0.5 after 2000 steps, not at consistency.r_final=0.75: its course is given in steps; for this run "
        "take --set consistency.r_warmup=400 --set consistency.r_cooldown_start=1500 "
        "--set consistency.r_cooldown_steps=200"
    )
    assert short_of_r(config.model_copy(update={"objective": "discrete"})) is None
    scaled = ["consistency.r_warmup=400", "consistency.r_cooldown_start=1500", "consistency.r_cooldown_steps=200"]
    config = load_config(
        "default", ["objective=continuous", "training.steps=2000", *scaled], teacher__source="x", prompts="p"
    )
    assert short_of_r(config) is None
    phases = "training.phases=[{steps: 1500, set: {objective: discrete}}]"
    config = load_config(
        "default", ["objective=continuous", "training.steps=2000", *scaled, phases], teacher__source="x", prompts="p"
    )
    assert "after 500 steps" in (short_of_r(config) or "")
