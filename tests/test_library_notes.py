"""Of what the model libraries warn, a person sees what is not known to be harmless."""

import logging
from collections.abc import Iterator

import pytest

from stepfold.display import quiet_libraries
from stepfold.library_notes import HARMLESS


@pytest.fixture(autouse=True)
def _with_notes() -> Iterator[None]:
    """The handlers of this test alone."""
    before = {name: list(logging.getLogger(name).handlers) for name in ("diffusers", "transformers")}
    for name in before:
        logging.getLogger(name).handlers = []
    quiet_libraries()
    quiet_libraries()
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers = handlers


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_an_unknown_warning_is_one_line_once(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All were hidden: dropped weights, ignored settings, cut prompts."""
    for _ in range(3):
        logging.getLogger(f"{library}.models.some").warning("Some weights\nwere not used: %s", ["x.weight"])
    logging.getLogger(f"{library}.models.some").info("loading")
    assert capsys.readouterr().err == f"note: {library} says: Some weights were not used: ['x.weight']\n"


def test_what_is_known_to_be_harmless_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, reason in HARMLESS.items():
        logging.getLogger("diffusers").warning(f"{pattern} and so on")
        assert len(reason.split()) > 5
    assert capsys.readouterr().err == ""
