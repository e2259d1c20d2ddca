"""What licences a teacher's model cards state."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCardData

from stepfold.teachers.licences import in_words, is_hub_id, licences_of, stated_licence

FLUX_LIKE = """\ufeff---
language: [en]
license: other
license_name: 'some-non-commercial'
license_link: LICENSE.md
---
license: mit
"""


def test_the_front_matter_is_read_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FLUX_LIKE)
    found = stated_licence(str(tmp_path))
    assert found == {"license": "other", "license_name": "some-non-commercial", "license_link": "LICENSE.md"}
    assert in_words(found) == "some-non-commercial (LICENSE.md)"
    for text in ("license: mit\n", "", "# Title\n\n---\nlicense: mit\n---\n", "---\nlicense:\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert stated_licence(str(tmp_path)) == {}
    assert in_words({}) == "unknown: see the teacher's page" and in_words({"license": "mit"}) == "mit"


def test_the_bundled_teacher_says_its_own() -> None:
    own = {"license": "apache-2.0"}
    assert licences_of("emoji") == {"teacher": own, "text_encoder": own}


def test_a_text_encoders_licence_is_that_of_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that mean a folder or nothing that can be reached stay unknown."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--some--encoder" / "snapshots" / "1"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlicense: gemma\n---\n")
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    teacher = tmp_path / "teacher"
    names = {"text_encoder": "some/encoder", "text_encoder_2": "no/where", "text_encoder_3": None}
    index = {"_class_name": "StableDiffusion3Pipeline"} | {name: ["transformers", "Encoder"] for name in names}
    for part, name in names.items():
        (teacher / part).mkdir(parents=True)
        (teacher / part / "config.json").write_text(json.dumps({} if name is None else {"_name_or_path": name}))
    (teacher / "model_index.json").write_text(json.dumps(index | {"text_encoder_4": [None, None]}))
    assert licences_of(str(teacher)) == {
        "teacher": {},
        "text_encoder": {"license": "gemma"},
        "text_encoder_2": {},
        "text_encoder_3": {},
    }


def test_the_hub_is_asked_for_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ModelCardData(license="other", license_name="gemma", tags=["x"])
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo, timeout: SimpleNamespace(card_data=told))
    assert stated_licence("some/where") == {"license": "other", "license_name": "gemma"}
    assert stated_licence("not an id") == {}


def test_a_hub_id_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert is_hub_id("black-forest-labs/FLUX.1-dev")
    assert not any(is_hub_id(name) for name in ("runs/mine", "./a/b", "/abs/olute", "emoji", "a/b/c", ""))
