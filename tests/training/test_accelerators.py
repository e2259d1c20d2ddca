"""Device and precision of a run."""

import pytest
import torch
from accelerate import PartialState
from torch import nn

from stepfold.errors import UserError
from stepfold.training.accelerators import LAUNCHED, check_launch, make_accelerator


def test_runs_of_one_process_have_each_its_own_precision() -> None:
    """accelerate keeps the first one's for all: the second run was a ValueError of accelerate's own."""
    layer = nn.Linear(2, 2)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        accelerator = make_accelerator(precision)
        with accelerator.autocast():
            assert layer.to(accelerator.device)(torch.ones(1, 2, device=accelerator.device)).dtype == dtype


def test_the_device_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run's device was that of all; a number is of one process."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    set_to: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", set_to.append)
    kinds = [make_accelerator("no", device=name).device.type for name in ("auto", "cpu", "cuda:1", "cpu")]
    assert (kinds, set_to) == (["meta", "cpu", "meta", "cpu"], [1])
    for name, value in zip(LAUNCHED, ("0", "0", "2", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--device cuda:1 is one device for several processes; leave its number out"):
        make_accelerator("no", device="cuda:1")


def test_gradients_that_the_environment_would_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate lets the variable win over what it is told: 4 made every gradient a quarter."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match=r"GRADIENT_ACCUMULATION_STEPS=4, .* unset .* training\.micro_batch"):
        make_accelerator("no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    make_accelerator("no")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "2"}, r"has WORLD_SIZE=2 but no RANK, LOCAL_RANK, .* which is no launch; unset WORLD_SIZE, or"),
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "2"}, r"RANK=3.* but no LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK=0 but no RANK"),
        (dict.fromkeys(LAUNCHED, "two"), r"RANK=two, .* is no launch"),
    ],
)
def test_what_a_launcher_left_is_named(left: dict[str, str], said: str) -> None:
    """A scheduler leaves WORLD_SIZE: the run waited for the other processes, or ended in a traceback."""
    with pytest.raises(UserError, match=said):
        check_launch(left)


def test_a_launch_and_what_means_one_process_are_let_through() -> None:
    launch = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for environment in (launch, {}, {"MASTER_ADDR": "localhost"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}):
        check_launch(environment)
