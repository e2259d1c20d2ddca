"""Which methods a teacher allows, and why: what its network, its guidance and its pipeline have places for."""

from importlib.util import find_spec

from stepfold.errors import UserError
from stepfold.students.policy import head_of
from stepfold.students.whole import time_part
from stepfold.teachers.pipeline import PipelineTeacher


def allowed_methods(teacher: PipelineTeacher, tangent: str) -> dict[str, str]:
    """Methods -> `yes: ...` or `no: ...` with the reason, or the way out.

    Args:
        teacher: the teacher.
        tangent: why the continuous objective is not for it; empty where it is.
    """
    return {
        "TBCM, sCM, rCM (a tangent)": no(tangent) if tangent else "yes: the tangent is exact and of usual size",
        "LCM, PCM, walk pairs": "yes: they take no tangent",
        "AYF, MeanFlow, CTM (student.times=two)": second_time(teacher),
        "DMD, SiD, DP-DMD (a fake score)": fake_score(),
        "VSD, SiD-LSG (the fake score guided)": guided_fake_score(teacher),
        "Decoupled DMD (guidance apart)": guidance_apart(teacher),
        "Phased DMD (an expert a phase)": experts(teacher),
        "Sana-Sprint, LADD (adversarial)": f"yes: heads read {len(teacher.feature_widths)} feature maps of the network",
        "sCM over images": over_images(teacher),
        "reward": reward(teacher),
        "pi-Flow (a policy)": policy(teacher),
        "LoRA student": lora(teacher),
    }


def no(reason: str) -> str:
    """For a reason."""
    return f"no: {reason}"


def second_time(teacher: PipelineTeacher) -> str:
    """Whether a student can be told a target time."""
    try:
        return f"yes: {time_part(teacher, teacher.transformer)} embeds the network's time, and a second is added to it"
    except UserError as error:
        return no(str(error))


def fake_score() -> str:
    """Whether there can be a fake score, and of which kind."""
    if find_spec("peft") is None:
        return "yes: with fake.kind=whole; a LoRA needs peft (pip install peft)"
    return "yes: the fake score is a LoRA beside the teacher's weights, or whole"


GUIDANCE = {
    "embedded": "guidance is embedded, so the network has no branch without a prompt",
    "none": "no guidance, so no branch without a prompt",
}


def guided_fake_score(teacher: PipelineTeacher) -> str:
    """Whether a fake score can be guided."""
    if teacher.guidance_kind == "classifier_free":
        return "yes: the network has a branch without a prompt"
    return no(f"{GUIDANCE[teacher.guidance_kind]}; leave matching.fake_guidance and fake.guidance at 1")


def guidance_apart(teacher: PipelineTeacher) -> str:
    """Whether guidance can be matched at times of its own."""
    if teacher.guidance_kind == "none":
        return no("no guidance; objective=matching is the same")
    if teacher.exact_branches:
        return "yes: both branches of its guidance are the network's own"
    return "yes, nearly: guidance is embedded, and its branch without a prompt is extrapolated from two scales"


def experts(teacher: PipelineTeacher) -> str:
    """Whether the pipeline has a network for each phase."""
    parts = list(teacher.network_parts(teacher.transformer))
    if len(parts) == 1:
        return no("the pipeline has one network; rollout.phased=true trains one student in phases")
    return f"yes: the pipeline has {len(parts)} networks ({', '.join(parts)}), each for times of its own"


def over_images(teacher: PipelineTeacher) -> str:
    """Whether a student can learn from images."""
    return no("this teacher makes videos") if teacher.frames > 1 else "yes: its autoencoder encodes images"


def reward(teacher: PipelineTeacher) -> str:
    """Whether a student's pictures can be scored by a CLIP."""
    return no("this teacher makes videos") if teacher.frames > 1 else "yes: a gradient comes through its decoder"


def policy(teacher: PipelineTeacher) -> str:
    """Whether a student can give several velocities at a time."""
    try:
        return f"yes: {head_of(teacher)}, the network's last layer, can be made several times as wide"
    except UserError as error:
        return no(str(error))


def lora(teacher: PipelineTeacher) -> str:
    """Whether a student can be a LoRA."""
    if not teacher.loads_lora:
        return no(f"{type(teacher.pipe).__name__} loads no LoRA; leave student.lora at 0")
    return "yes: the pipeline loads it" if find_spec("peft") else no("peft is not installed (pip install peft)")
