"""What licences a teacher's model cards state."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"---\r\nlicense:\r\n- apache-2.0\r\n- other\r\nlicense_name: mine\r\n---\r\n# model\r\n",
         {"license": ["apache-2.0", "other"], "license_name": "mine"}),
        (b"---\nlicense: [mit, gemma]\n---\n", {"license": ["mit", "gemma"]}),
        ("---\nlicense: caf\u00e9\n---\n".encode("latin-1"), {}),
        (b"---\nlicense: [mit\n---\n", {}),
        (b"---\nlicense: !!python/object/apply:os.system [ls]\n---\n", {}),
        (b"---\n- mit\n---\n", {}),
        (b"# A model\n", {}),
        (b"---\nlicense: mit\nmodel-index: 3\n---\n", {}),
    ],
    ids=["a list, CRLF", "two", "another encoding", "no yaml", "code", "no mapping", "no front matter", "odd results"],
)  # fmt: skip
def test_no_card_ends_a_run(
    card: bytes, found: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is only shown is unknown where it cannot be read."""
    (tmp_path / "README.md").write_bytes(card)
    told = stated_licence(str(tmp_path))
    assert told == found or (not found and set(told) <= {"license"})
    assert "[" not in in_words(told) and not caplog.records


@pytest.mark.parametrize("name", ["./text_encoder", "me--you/clip", "a/b/c", "..", 3, ["a/b"], {"a": 1}])
def test_any_origin_of_a_text_encoder_ends_no_run(name: Any, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"_name_or_path": name}))
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "Encoder"]}))
    assert licences_of(str(tmp_path)) == {"teacher": {}, "text_encoder": {}}


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
