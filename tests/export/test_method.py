"""A student's README names the method that made it."""

from typing import Any

import pytest

from stepfold.config import load_config
from stepfold.export.method import method_of, source_of, step_of


def settings(preset: str, *changes: str) -> dict[str, Any]:
    """As a card has them."""
    images = ["space.images=pictures"] if preset in ("scm", "sana-sprint") else []
    return load_config(preset, [*images, *changes]).model_dump(mode="json")


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("demo", "discrete consistency (like LCM, arXiv:2310.04378) on the teacher's own sampling trajectories"),
        ("reproduce", "trajectory-backward consistency (TBCM, arXiv:2511.20410)"),
        ("scm", "continuous-time consistency (sCM, arXiv:2410.11081) on noised images"),
        ("scm-endpoints", "consistency (sCM, arXiv:2410.11081) on noised ends of the teacher's trajectories"),
        ("dmd", "distribution matching (DMD2 without its discriminator, arXiv:2405.14867)"),
        ("vsd", "distribution matching (DMD2 without its discriminator, arXiv:2405.14867)"),
        ("sid", "score identity distillation (SiD, arXiv:2404.04057)"),
        ("decoupled", "decoupled distribution matching (arXiv:2511.22677)"),
        (
            "rcm",
            "trajectory-backward consistency (TBCM, arXiv:2511.20410), then trajectory-backward consistency (TBCM, "
            "arXiv:2511.20410) with distribution matching beside it (rCM, arXiv:2510.08431)",
        ),
        (
            "dp-dmd",
            "distribution matching (DMD2 without its discriminator, arXiv:2405.14867), its first step on the teacher's "
            "trajectory (DP-DMD, arXiv:2602.03139)",
        ),
        ("endpoint", "regression on pairs of states (like CMT) on the teacher's own sampling trajectories"),
        ("sana-sprint", "on noised images with an adversarial term (Sana-Sprint, arXiv:2503.09641)"),
    ],
)
def test_every_preset_has_its_own_method(preset: str, said: str) -> None:
    """All were called trajectory-backward consistency."""
    assert method_of(settings(preset)).endswith(said)
    assert source_of(settings(preset)) == ("prompts alone" if "images" not in said else "captioned images")


def test_methods_of_several_parts() -> None:
    both = settings("demo", "space.kind={generation: 1, endpoints: 0.5, coupling: 0}")
    assert method_of(both).endswith(
        " on the teacher's own sampling trajectories and noised ends of the teacher's trajectories"
    )
    assert method_of(settings("demo", "objective=velocity", "space.kind=coupling")) == "reflow (arXiv:2209.03003)"
    first = settings("reproduce", "training.phases=[{steps: 20, set: {objective: discrete}}]")
    assert method_of(first) == (
        "discrete consistency (like LCM, arXiv:2310.04378) on the teacher's own sampling trajectories, then "
        "trajectory-backward consistency (TBCM, arXiv:2511.20410)"
    )
    changes = ("matching.weight=0.3", "matching.form=decoupled", "fake.updates=2", "rollout.first=2")
    assert method_of(settings("demo", *changes)) == (
        "discrete consistency (like LCM, arXiv:2310.04378) on the teacher's own sampling trajectories with decoupled "
        "distribution matching (arXiv:2511.22677) beside it"
    )
    whole = settings("reproduce", "training.phases=[{steps: 120, set: {objective: discrete}}]")
    assert "then" not in method_of(whole) and "LCM" in method_of(whole)


def test_a_card_of_an_earlier_version_may_lack_settings() -> None:
    old: dict[str, Any] = {"training": {"steps": 3}, "space": {}}
    assert method_of(old) == "trajectory-backward consistency (TBCM, arXiv:2511.20410)"
    assert source_of(old) == "prompts alone"


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("demo", "8 trajectories, 9 route steps"),
        ("scm", "30 images"),
        ("dmd", "8 prompts"),
        ("dp-dmd", "8 trajectories, 9 route steps"),
        ("rcm", "2 trajectories, 16 route steps"),
        ("pi-flow", "12 prompts"),
    ],
)
def test_a_step_learns_from_what_the_method_walks(preset: str, said: str) -> None:
    """pi-Flow was said to take trajectories of route steps, which it has none of."""
    assert step_of(settings(preset)) == said
