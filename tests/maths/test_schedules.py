from typing import Any

import pytest

from stepfold.errors import UserError
from stepfold.maths.schedules import tangent_warmup

RELEASED: dict[str, Any] = dict(warmup=4000, final=0.75, cooldown_start=15000, cooldown_steps=2000)


@pytest.mark.parametrize(
    ("step", "r"),
    [(0, 0.0), (1000, 0.25), (4000, 1.0), (15000, 1.0), (15500, 0.9375), (16000, 0.875), (17000, 0.75), (10**6, 0.75)],
)
def test_warmup_then_cooldown(step, r):
    assert tangent_warmup(step, **RELEASED) == pytest.approx(r, abs=1e-12)


def test_the_ramps_may_overlap():
    """Half risen and half cooled: the blend of both, not one after the other."""
    r = tangent_warmup(50, warmup=100, final=0.8, cooldown_start=0, cooldown_steps=100)
    assert r == pytest.approx(0.5 * 0.5 + 0.5 * 0.8)


@pytest.mark.parametrize(("step", "r"), [(0, 0.0), (1000, 0.1875), (4000, 0.75), (16000, 0.75)])
def test_direct_warmup(step, r):
    assert tangent_warmup(step, **RELEASED, schedule="warmup") == pytest.approx(r, abs=1e-12)


@pytest.mark.parametrize("step", [0, 16000])
def test_constant(step):
    assert tangent_warmup(step, **RELEASED, schedule="none") == 0.75


def test_ramps_of_length_zero_jump():
    zero: dict[str, Any] = dict(warmup=0, final=0.5, cooldown_start=10, cooldown_steps=0)
    assert [tangent_warmup(step, **zero) for step in (0, 9, 10)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("change", [{"final": 1.1}, {"warmup": -1}, {"cooldown_steps": -1}, {"schedule": "linear"}])
def test_impossible_values_are_refused(change):
    with pytest.raises(UserError):
        tangent_warmup(0, **{**RELEASED, **change})
