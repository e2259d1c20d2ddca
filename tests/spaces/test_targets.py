"""Target times: the law of each rule, mixtures by shares, states of the walk, draws that know nothing of batches."""

import math
from typing import Any

import pytest
import torch
from gaussians import Law, Score, batch_of, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.maths.formulations import flow_time
from stepfold.objectives.contract import Networks
from stepfold.spaces.records import Pairs, States
from stepfold.spaces.targets import Rules, aimed, edge_below, gap_below, later_state
from stepfold.training.states import collect, states_per_prompt

TWO = ("student.times=two", "objective=continuous", "space.filter_rule=off", "training.precision=no")


def drawn(rule: str, *changes: str, batch: int = 16, number: int = 0, keep: Any = None) -> States:
    """States of a batch with targets by a rule, as a run has them."""
    config = load_config("default", [*TWO, "space.route_steps=9", *changes, f"target.rule={rule}"])
    networks: Any = Networks(Score(0.4, 0.2), Law())  # type: ignore[arg-type]
    (space,) = config.space.weights
    options = {} if keep is None else {"black": torch.full((3,), keep)}
    return collect([space], batch_of(batch, number), nothing(batch), networks, config, **options)[space]


@pytest.mark.parametrize(
    "rule", ["gap", "uniform", "edge", "{gap: 1, zero: 1, diagonal: 1}", "{later: 3, diagonal: 1}"]
)
def test_every_target_lies_between_zero_and_the_states_own_time(rule: str) -> None:
    found = drawn(rule)
    assert found.t_target is not None and found.t_target.dtype == found.t.dtype
    assert bool(((found.t_target >= 0) & (found.t_target <= found.t)).all())
    apart = (found.t_target < found.t).cpu()
    assert torch.equal(apart, ~found.stays if found.stays is not None else torch.ones_like(apart))


def test_target_zero_leaves_the_states_as_they_are() -> None:
    assert drawn("zero").t_target is None and drawn("{zero: 2}").t_target is None


def test_the_gap_is_logit_normal_in_flow_matchings_time() -> None:
    t, u = torch.full((20000,), 1.5).double(), torch.rand(20000).double()
    s = gap_below(t, u, -0.8, 1.0)
    gap = (flow_time(t) - flow_time(s))[s > 0]
    logit = torch.logit(gap)
    assert (s > 0).double().mean() > 0.99 and abs(logit.mean() + 0.8) < 0.03 and abs(logit.std() - 1) < 0.03
    low = gap_below(torch.full((20000,), 0.1).double(), u, -0.8, 1.0)
    assert (low == 0).double().mean() > 0.9  # a longer gap ends at 0


def test_the_uniform_rule_is_uniform_below_t() -> None:
    found = drawn("uniform", batch=400)
    assert found.t_target is not None
    share = (found.t_target / found.t).sort().values
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.04


def test_the_edge_is_the_lower_end_of_the_segment() -> None:
    edges = [1.5708, 1.2, 0.7]
    t = torch.tensor([math.pi / 2, 1.3, 1.2, 1.0, 0.7, 0.2, 0.0])
    assert edge_below(t, edges).tolist() == pytest.approx([1.2, 1.2, 0.7, 0.7, 0.0, 0.0, 0.0])
    found = drawn("edge", "target.segments=3")
    times = torch.tensor([*Law().student_times(3, "flow_map")[1:], 0.0])
    assert found.t_target is not None
    wanted = [max(time for time in times.tolist() if time < t) for t in found.t.tolist()]
    assert found.t_target.tolist() == pytest.approx(wanted)


def grids_of_walks(found: States, count: int) -> list[int]:
    """How many segments each walk's states have been given; every state's target fits."""
    assert found.t_target is not None
    edges = {n: torch.tensor([*Law().student_times(n, "flow_map")[1:], 0.0]) for n in (1, 3)}
    walks = []
    for t, s in zip(found.t.view(-1, count), found.t_target.view(-1, count), strict=True):
        below = {n: torch.stack([edge[edge < time].max() for time in t]) for n, edge in edges.items()}
        walks.append(next(n for n, wanted in below.items() if torch.allclose(s, wanted)))
    return walks


def test_each_walk_draws_a_number_of_segments() -> None:
    changes = ("target.segments={1: 1, 3: 3}", "objective=discrete")
    found = drawn("edge", *changes, batch=400)
    walks = grids_of_walks(found, 8)
    assert len(walks) == 400 and walks.count(3) / 400 == pytest.approx(0.75, abs=0.05)
    alone = [drawn("edge", *changes, "space.route_per=prompt", batch=1, number=i) for i in range(8)]
    assert [grids_of_walks(part, 8)[0] for part in alone] == walks[:8]


def test_a_state_may_have_several_targets() -> None:
    """A walk's states come once for each, in the same order; the draws of a walk are stratified."""
    one, two = (drawn("edge", "target.segments={1: 1, 3: 1}", f"target.draws={n}", batch=6) for n in (1, 2))
    assert isinstance(one, Pairs) and isinstance(two, Pairs) and two.t_target is not None
    assert torch.equal(two.x.view(6, 2, 8, 3), one.x.view(6, 1, 8, 3).expand(6, 2, 8, 3))
    assert torch.equal(two.number, torch.arange(96)) and two.num_drawn == 96 and two.walk_length == one.walk_length
    assert torch.equal(two.prompt, torch.arange(6).repeat_interleave(16))
    assert grids_of_walks(two, 8) == [1, 3] * 6 and two.num_jumps is not None
    assert torch.equal(two.num_jumps, torch.tensor([1.0, 3.0]).repeat(6).repeat_interleave(8).to(two.num_jumps))
    mixed = drawn("{edge: 1, zero: 1}", "target.segments=3")
    assert mixed.num_jumps is not None and set(mixed.num_jumps.tolist()) == {1.0, 3.0}
    assert bool((mixed.t_target[mixed.num_jumps == 1] == 0).all()) and drawn("uniform").num_jumps is None  # type: ignore[index]
    dropped = drawn(
        "edge", "target.segments={1: 1, 3: 1}", "target.draws=2", "space.filter_rule=hard",
        "space.filter_threshold=0.3", batch=6, keep=0.0,
    )  # fmt: skip
    assert 0 < len(dropped) < 96 and torch.equal(dropped.number // 16, dropped.prompt)
    assert torch.equal(dropped.t_target, two.t_target[dropped.number])  # type: ignore[arg-type]
    each = drawn("uniform", "target.draws=2", batch=1)
    assert each.t_target is not None and not torch.equal(*each.t_target.view(2, 8))
    assert states_per_prompt("generation", load_config("default", [*TWO, "target.rule=gap", "target.draws=2"])) == 30
    assert states_per_prompt("generation", load_config("default", [*TWO, "target.rule=gap"])) == 15


def test_later_states_are_of_the_same_walk_and_equally_likely() -> None:
    found = drawn("later", batch=2000)
    assert isinstance(found, Pairs) and found.t_target is not None and found.x_target is not None
    count = found.walk_length
    walks = found.x.reshape(-1, count, 3), found.t.reshape(-1, count)
    ends, zeros = found.x0.reshape(-1, count, 3)[:, :1], torch.zeros_like(walks[1][:, :1])
    at, times = torch.cat([walks[0], ends], 1), torch.cat([walks[1], zeros], 1)
    chosen = (found.t_target.reshape(-1, count, 1) == times[:, None]).int().argmax(2)
    place = torch.arange(count)
    assert bool((chosen > place).all())
    wanted = at[torch.arange(len(at))[:, None], chosen]
    assert torch.equal(found.x_target.reshape(-1, count, 3), wanted)
    for i in range(count):
        frequency = torch.bincount(chosen[:, i], minlength=count + 1)[i + 1 :] / len(at)
        assert (frequency - 1 / (count - i)).abs().max() < 0.05


def test_a_state_of_another_walk_would_be_noticed() -> None:
    pairs = drawn("later", batch=4)
    assert isinstance(pairs, Pairs)
    uniform = torch.rand(len(pairs))
    time, state = later_state(pairs, uniform)
    other = pairs.rows(torch.arange(len(pairs)).roll(pairs.walk_length))
    assert not torch.equal(later_state(other, uniform)[1], state) and bool((time <= pairs.t).all())


def test_a_mixture_has_its_shares_and_says_which_states_stay() -> None:
    found = drawn("{zero: 1, uniform: 2, diagonal: 1}", batch=1000)
    assert found.t_target is not None and found.stays is not None
    assert found.stays.device.type == "cpu" and torch.equal(found.stays, found.t_target == found.t)
    shares = [float(part.float().mean()) for part in (found.t_target == 0, found.stays)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.02)
    known = drawn("{zero: 1, later: 2, diagonal: 1}", batch=50)
    assert isinstance(known, Pairs) and known.x_target is not None and known.stays is not None
    assert torch.equal(known.x_target[known.stays], known.x[known.stays])
    assert drawn("{zero: 1, later: 2, uniform: 1}").__dict__["x_target"] is None  # there it is not known


def test_draws_do_not_depend_on_the_batch_or_on_who_is_dropped() -> None:
    rule = "{gap: 1, zero: 1, diagonal: 1}"
    changes = ("space.route_per=prompt",)
    one = [drawn(rule, *changes, batch=1, number=i) for i in range(8)]
    eight = drawn(rule, *changes, batch=8)
    assert all(part.t_target is not None and part.stays is not None for part in (*one, eight))
    torch.testing.assert_close(torch.cat([part.t_target for part in one]), eight.t_target)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part.stays for part in one]), eight.stays)  # type: ignore[arg-type]
    kept = drawn(rule, *changes, "space.filter_rule=hard", "space.filter_threshold=0.5", batch=8, keep=0.0)
    assert 0 < len(kept) < len(eight) and eight.t_target is not None and eight.stays is not None
    torch.testing.assert_close(kept.t_target, eight.t_target[kept.number])  # type: ignore[index]
    assert torch.equal(kept.stays, eight.stays[kept.number])  # type: ignore[arg-type]
    other = drawn(rule, *changes, batch=8, number=1)
    assert not torch.equal(other.t_target, eight.t_target)  # type: ignore[arg-type]


def test_parts_of_the_states_keep_their_targets() -> None:
    found = drawn("{uniform: 1, diagonal: 1}")
    part = found.rows(slice(3, 7))
    assert torch.equal(part.t_target, found.t_target[3:7])  # type: ignore[index,arg-type]
    assert torch.equal(part.stays, found.stays[3:7])  # type: ignore[index,arg-type]


def test_pure_noise_has_targets_too() -> None:
    found = drawn("{uniform: 1, diagonal: 1}", "objective=lagrange", "space.kind=prior", batch=32)
    assert not isinstance(found, Pairs) and found.t_target is not None and len(found.t_target.unique()) > 10


def test_rules_by_hand() -> None:
    states = drawn("zero", batch=1)
    choice, half = torch.tensor([0.0, 0.49, 0.5, 0.99] * 2), torch.full((8,), 0.5)
    rules = Rules({"zero": 0.5, "uniform": 0.5})
    found = aimed(states, rules, choice, half)
    wanted = torch.where(torch.tensor([False, False, True, True] * 2), states.t / 2, torch.zeros(8))
    assert torch.equal(found.t_target, wanted) and found.stays is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["target.rule=uniform", "objective=velocity"], r"objective=velocity, which has no target time; give obj"),
        (
            ["target.rule=edge", "target.segments={1: 1, 2: 1}", "objective=discrete"],
            r"1 and 2 segments for .*times=two, or one number",
        ),
        (
            [*TWO, "objective=discrete", "target.rule={zero: 1, diagonal: 1}"],
            r"a jump of no length; give target\.rule without diagonal",
        ),
        ([*TWO, "target.draws=2"], r"the same target again with target\.rule=zero; leave target\.draws out, or give"),
        ([*TWO, "target.rule=edge", "target.draws=3"], r"target\.draws=3 gives each state the same target again with"),
        (["target.segments={4: 0}"], r"none has a share above 0; give one, for example \{1: 0.5, 4: 0.5\}"),
        (["target.rule=uniform"], r"objective=auto, which has no target time; give objective=continuous, discrete"),
        (["target.rule=uniform", "objective=continuous"], r"needs a student that is told where to jump to; give"),
        (["target.rule={edge: 1, zero: 1}", "objective=semigroup"], r"edge, zero needs a student .*; give student"),
        (["target.rule=diagonal", "objective=continuous"], r"alone is velocity matching; give objective=velocity"),
        (["objective=lagrange", "student.times=two"], r"objective=lagrange moves the target time; give student\.times"),
        (["objective=lagrange", "target.rule=edge"], r"objective=lagrange moves the target time; give student\.times"),
        (
            ["target.rule=later", "objective=continuous", "student.times=two", "space.kind=endpoints"],
            r"takes states of the teacher's walk; give space\.kind=generation",
        ),
        (["objective=pair", "space.kind=coupling"], r"not target\.rule=zero on coupling; give space\.kind=generation"),
        (
            ["objective=pair", "student.times=two", "target.rule=uniform"],
            r"not target\.rule=uniform on generation; give space\.kind=generation and target\.rule=zero or later",
        ),
        (
            [*TWO, "target.rule={gap: 1, diagonal: 1}", "consistency.tangent_weight=ayf"],
            r"tangent_weight=ayf is 0 where target\.rule=diagonal; give consistency\.tangent_weight=trig",
        ),
        (["objective=continuous", "space.kind=prior"], r"pure noise, without walks or pictures; give obj"),
        (
            ["objective=semigroup", "space.kind=prior", "adversarial.weight=1", "semigroup.alpha=0.5"],
            r"pure noise, .* adversarial\.weight=0, or space\.kind=generation",
        ),
        (["objective=semigroup", "space.kind=prior"], r"no route whose next time could be m; give semi"),
        (["semigroup.alpha_final=0.1"], r"where a course of alpha ends; give semigroup\.alpha=1 and"),
        (["target.rule={gap: 0}"], r"none has a share above 0; give one, for example \{uniform"),
        (["target.segments=9"], r"target\.segments is 9: 9 is no number of segments; give 1 to 8"),
        (["target.segments={2: 1, 0: 1}"], r"target\.segments: 0 is no number of segments; give 1 to 8"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("default", changes)
    assert "\n" not in str(caught.value)


def as_shares(rule: Tensor | str) -> dict[str, float]:
    return {str(k): v for k, v in load_config("default", [*TWO, f"target.rule={rule}"]).target.shares.items()}


def test_shares_sum_to_one_and_zero_shares_are_none() -> None:
    assert as_shares("{uniform: 3, diagonal: 1, gap: 0}") == {"uniform": 0.75, "diagonal": 0.25}
    assert as_shares("uniform") == {"uniform": 1.0}
