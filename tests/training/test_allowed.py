"""Which methods a teacher allows, on tiny teachers that differ in guidance, LoRA, places for a time, and networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_wan22
from forms import cases

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.loading import load_teacher
from stepfold.training import allowed, doctor
from stepfold.training.allowed import allowed_methods

TEACHERS: dict[str, Callable[[], Any]] = {
    "sana": tiny.make_sana,
    "flux": tiny.make_flux,
    "schnell": lambda: tiny.make_flux(guidance_embeds=False),
    "dit": tiny.make_dit,
    "wan 2.2": tiny_wan22.make_a14b,
}
SECOND, GUIDED, APART = "AYF, MeanFlow", "VSD, SiD-LSG", "Decoupled DMD"
EXPERTS, LORA, IMAGES = "Phased DMD", "LoRA student", "sCM over images"
SAID = {
    "sana": {
        SECOND: "yes: time_embed.emb.timestep_embedder embeds", GUIDED: "yes: the network has",
        APART: "yes: both branches", EXPERTS: "no: the pipeline has one network", LORA: "yes: ", IMAGES: "yes: ",
    },
    "flux": {
        SECOND: "yes: time_text_embed.timestep_embedder embeds", GUIDED: "no: guidance is embedded",
        APART: "yes, nearly: ", EXPERTS: "no: ", LORA: "yes: ", IMAGES: "yes: ",
    },
    "schnell": {GUIDED: "no: no guidance", APART: "no: no guidance", LORA: "yes: "},
    "dit": {
        SECOND: "no: a DiTTransformer2DModel embeds its time in several", GUIDED: "yes: ", EXPERTS: "no: ",
        LORA: "no: DiTPipeline loads no LoRA",
    },
    "wan 2.2": {
        SECOND: "no: a Experts embeds", EXPERTS: "yes: the pipeline has 2 networks (transformer, transformer_2)",
        IMAGES: "no: this teacher makes videos", LORA: "yes: ",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", cases(SAID, ["sana", "flux", "dit", "wan 2.2"]))
def test_what_is_said_is_what_a_run_would_do(name: str, tmp_path: Path) -> None:
    source = str(tiny.save(TEACHERS[name], tmp_path / "teacher"))
    frames = {"frames": 5} if name == "wan 2.2" else {}
    teacher = load_teacher(TeacherSettings(source=source, max_tokens=16, height=32, width=32, **frames), "cpu")
    found = allowed_methods(teacher, "")
    for start, said in SAID[name].items():
        (line,) = (line for method, line in found.items() if method.startswith(start))
        assert line.startswith(said), line
        assert "\n" not in line

    def works(made: Callable[[], Any]) -> bool:
        try:
            made()
        except UserError:
            return False
        return True

    can = {method.partition(" (")[0]: line.startswith("yes") for method, line in found.items()}
    assert can["AYF, MeanFlow, CTM"] == works(lambda: new_student(teacher, two_times=True))
    assert can["pi-Flow"] == works(lambda: new_student(teacher, policy=Policy(3, 4, 1.0)))
    assert can["VSD, SiD-LSG"] == works(lambda: teacher.null(teacher.encode(["7"])))
    assert can["LoRA student"] == works(lambda: lora_student(teacher, 2))
    assert can["DMD, SiD, DP-DMD"] and works(lambda: lora_student(teacher, 2, for_export=False))


def test_without_peft_there_is_no_lora(monkeypatch: pytest.MonkeyPatch, tiny_sana: Path) -> None:
    teacher = load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=16), "cpu")
    monkeypatch.setattr(allowed, "find_spec", lambda name: None)
    found = allowed_methods(teacher, "dF/dt is large")
    assert (
        found["LoRA student"].startswith("no: peft") and "fake.kind=whole" in found["DMD, SiD, DP-DMD (a fake score)"]
    )
    assert found["TBCM, sCM, rCM (a tangent)"] == "no: dF/dt is large"


def test_a_tangent_is_refused_for_its_size_or_for_disagreement() -> None:
    def finding(ok: bool) -> doctor.Finding:
        return doctor.Finding("", "812.00", "", ok)

    assert doctor.why_no_tangent(finding(True), finding(True), "objective=discrete") == ""
    assert (
        doctor.why_no_tangent(finding(True), finding(False), "objective=discrete")
        == "dF/dt is 812.00, above 50; take objective=discrete"
    )
    assert "do not agree" in doctor.why_no_tangent(finding(False), finding(True), "objective=discrete")
