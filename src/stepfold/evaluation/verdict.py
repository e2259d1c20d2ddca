"""What the numbers of a report say: its metrics, three large figures, a few sentences, all computed from them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stepfold.evaluation.protocol import TEACHER_AT, counted, teachers_of
from stepfold.evaluation.symptoms import DIVERSITY_FALLS, symptoms_of

Row = Mapping[str, float | None]
FEWEST_IMAGES = 100
"""Images a row, below which an FD of two samplers says nothing about which is better."""
LEARNED = 0.98
"""Latent error of the last preview, in units of the first one's, from which on nothing is seen to be learned.

Above the inverse, it grew.
"""
NOT_FINITE = "The student's samples are not finite: it diverged. Train again with a tenth of optimiser.lr."


@dataclass(frozen=True)
class Metric:
    """A column of a table of results.

    Attributes:
        label: its head.
        meaning: one or two sentences.
        digits: after the point.
        best: which value is best: the highest, the lowest, or the one closest to that of real images.
    """

    label: str
    meaning: str
    digits: int
    best: Literal["high", "low", "real"]


METRICS = {
    "latent_error": Metric(
        "Latent error",
        "Distance of the latents from the end of the teacher's long trajectory, from the same noise, relative to that "
        "end (L2). 0 is the same image; about 1.4 is an unrelated one. Lower is better. Between the steps of a "
        "consistency student, fresh noise makes it another image, so only its one step compares.",
        3,
        "low",
    ),
    "accuracy": Metric(
        "Accuracy",
        "Share of images whose nearest name, among all names, is the prompt's. Higher is better.",
        3,
        "high",
    ),
    "clip_score": Metric(
        "CLIP score",
        "100 × the cosine between image and prompt in the CLIP's features (the bundled teacher's evaluator is a CLIP "
        "of its own). Higher is better.",
        1,
        "high",
    ),
    "fd": Metric(
        "FD",
        "Fréchet distance to real images in the evaluator's features. It does not compare with an Inception FID, nor "
        "between different numbers of images. Lower is better.",
        4,
        "low",
    ),
    "fd_imagenet": Metric(
        "FD-ImageNet",
        "The same distance in the features of EfficientNet-Lite0, a network that was trained on photographs of "
        "ImageNet: a second opinion. It compares with no other number than its own. Lower is better.",
        2,
        "low",
    ),
    "diversity": Metric(
        "Diversity",
        "Mean feature distance between images of one prompt. Closest to that of real images is best; near 0, every "
        "seed gives the same image.",
        3,
        "real",
    ),
    "agreement": Metric(
        "Latent MSE",
        "Mean squared latent error against the teacher at its most steps and the student's guidance scale, from the "
        "same noise, in latent variances. 0 is the same image; 2 is an unrelated one. Lower is better.",
        3,
        "low",
    ),
}


def number(value: float | None, digits: int) -> str:
    """A fixed number of digits, or two significant ones where that would show a small number as zero."""
    if value is None:
        return "–"
    fixed = f"{value:.{digits}f}"
    return fixed if value == 0 or float(fixed) else f"{value:.1e}"


def by_steps(report: Mapping[str, Any], who: str) -> dict[int, Row]:
    """Scores by number of steps, fewest first."""
    return {int(steps): scores for steps, scores in sorted(report.get(who, {}).items(), key=lambda item: int(item[0]))}


def taught_teacher(report: Mapping[str, Any]) -> str:
    """Which results are those of the teacher at the scale that the student was taught."""
    return next((who for who in teachers_of(report) if who.startswith(TEACHER_AT)), "teacher")


def calls(report: Mapping[str, Any], who: str, steps: int) -> int | None:
    """Network calls of an image: as its row says, or the steps' own; None where the report does not say those."""
    if own := by_steps(report, who).get(steps, {}).get("calls"):
        return int(own)
    each = 1 if who == "student" else report.get("teacher_calls_per_step")
    return None if each is None else steps * each


CURVED = ("latent_error", "accuracy", "fd")


def curves_over_calls(report: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Metric -> `student` and `teacher` -> (network calls of an image, value), fewest calls first.

    A metric that one of the two has no value of, at a known number of calls, is left out.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key in CURVED:
        curves: dict[str, list[tuple[int, float]]] = {}
        for who in ("student", "teacher"):
            rows = ((calls(report, who, steps), row.get(key)) for steps, row in by_steps(report, who).items())
            curves[who] = sorted((each, value) for each, value in rows if each and value is not None)
        if all(curves.values()):
            found[key] = curves
    return found


def best_steps(report: Mapping[str, Any], key: str) -> int | None:
    """The student's number of steps with the best value of a metric, of several."""
    values = {steps: value for steps, row in by_steps(report, "student").items() if (value := row.get(key)) is not None}
    real = report.get("reals", {}).get(key)
    rank = {"high": lambda v: -v, "low": lambda v: v, "real": lambda v: abs(v - real) if real is not None else math.nan}
    ranks = {steps: rank[METRICS[key].best](value) for steps, value in values.items()}
    return min(ranks, key=lambda steps: ranks[steps]) if len(set(ranks.values())) > 1 else None


@dataclass(frozen=True)
class Figure:
    """A large number, what it is, and what to hold it against."""

    big: str
    label: str
    detail: str = ""


def usual_steps(report: Mapping[str, Any]) -> int:
    """The measured number of steps that the student is for; the fewest where a report does not say it."""
    measured, usual = by_steps(report, "student"), report.get("usual_steps")
    return usual if usual in measured else min(measured)


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Quality, calls, and what the quality is to be held against; none where nothing was measured."""
    student = by_steps(report, "student")
    if not student:
        return []
    steps = usual_steps(report)
    ours = student[steps]
    found = [_accuracy(report, steps, ours), _latent(report, steps), _calls(report, steps)]
    found += [_diversity(report, ours), _line_to_beat(report, steps)]
    return [figure for figure in found if figure]


def headline(report: Mapping[str, Any]) -> str:
    """The figures and sentences as lines for a terminal."""
    figure_lines = [
        f"{each.big} {each.label}" + (f" ({each.detail})" if each.detail else "") for each in figures(report)
    ]
    return "\n".join([*figure_lines, *sentences(report)])


def _in(steps: int) -> str:
    return "one step" if steps == 1 else counted(steps)


def _accuracy(report: Mapping[str, Any], steps: int, ours: Row) -> Figure | None:
    who = taught_teacher(report)
    rows = by_steps(report, who)
    a, most = ours.get("accuracy"), max(rows, default=0)
    b = rows[most].get("accuracy") if rows else None
    if a is None or b is None:
        return None
    against = f"{a:.3f} against {b:.3f}: the {who}, {counted(most)}"
    if not b:
        return Figure(f"{a:.3f}", f"accuracy in {_in(steps)}", against)
    return Figure(f"{100 * a / b:.0f}%", f"of the teacher's accuracy in {_in(steps)}", against)


def noisy_note(report: Mapping[str, Any], columns: Collection[str]) -> str:
    """What to say where latent errors are shown of steps that do not compare with the teacher's; empty elsewhere."""
    noisy = report.get("fresh_noise") and "latent_error" in columns and max(by_steps(report, "student"), default=1) > 1
    return "Latent errors compare at one step alone: further steps add fresh noise" if noisy else ""


def _compared(report: Mapping[str, Any], steps: int) -> int | None:
    """The number of steps whose latent errors are compared: one, of students that add fresh noise between steps.

    None where one step was not measured.
    """
    if not report.get("fresh_noise"):
        return steps
    return 1 if 1 in by_steps(report, "student") else None


def _latent(report: Mapping[str, Any], steps: int) -> Figure | None:
    compared = _compared(report, steps)
    value = by_steps(report, "student")[compared].get("latent_error") if compared else None
    if value is None or compared is None:
        return None
    return Figure(
        number(value, 2), f"latent error in {_in(compared)}", "0 is the teacher's image, 1.4 an unrelated one"
    )


def _calls(report: Mapping[str, Any], steps: int) -> Figure | None:
    most = max((steps for who in teachers_of(report) for steps in by_steps(report, who)), default=0)
    theirs = calls(report, "teacher", most)
    if not theirs:
        return None
    each = theirs // most
    detail = f"the teacher's {counted(most)}" + (f" call its network {each} times each" if each > 1 else "")
    return Figure(f"{theirs} → {steps}", "network calls an image: the teacher's, the student's", detail)


def _diversity(report: Mapping[str, Any], ours: Row) -> Figure | None:
    value, real = ours.get("diversity"), report.get("reals", {}).get("diversity")
    if value is None:
        return None
    rows = by_steps(report, taught_teacher(report))
    theirs = rows[max(rows)].get("diversity") if rows else None
    detail = f"the teacher has {theirs:.2f}" if theirs is not None else ""
    label = "diversity" + (f"; real images have {real:.2f}, and closest is best" if real is not None else "")
    return Figure(f"{value:.2f}", label, detail)


def _line_to_beat(report: Mapping[str, Any], steps: int) -> Figure | None:
    compared = _compared(report, steps)
    value = by_steps(report, "teacher").get(compared, {}).get("latent_error") if compared else None
    if value is None or compared is None:
        return None
    return Figure(number(value, 2), f"latent error of the untrained teacher in {_in(compared)}", "the line to beat")


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Short sentences that hold the student against the teacher."""
    student, teacher = by_steps(report, "student"), by_steps(report, "teacher")
    looks = symptoms_of(report.get("curves") or {})
    if not student or not teacher:
        return [f"No {'student' if not student else 'teacher'} has been measured.", *looks]
    if not all(math.isfinite(value) for row in student.values() for value in row.values() if value is not None):
        return [NOT_FINITE, *looks]
    alike = {steps: row for steps, row in student.items() if steps == 1 or not report.get("fresh_noise")}
    said = [
        _beaten(alike, teacher, "latent_error", "Latent error"),
        _by_previews(report),
        _ranking(report),
        _measured_on(report),
        _collapsed(report),
    ]
    return [sentence for sentence in said if sentence] + looks


def _beaten(student: Mapping[int, Row], teacher: Mapping[int, Row], key: str, label: str) -> str:
    """Where the student is better than the teacher at as many steps; what a table shows alike is level."""
    digits = METRICS[key].digits
    pairs = {
        steps: (round(a, digits), round(b, digits))
        for steps, row in student.items()
        if (a := row.get(key)) is not None and (b := teacher.get(steps, {}).get(key)) is not None
    }
    if not pairs:
        return ""
    better = [steps for steps, (a, b) in pairs.items() if a < b]
    if len(pairs) == 1:
        ((steps, (a, b)),) = pairs.items()
        than = "better than" if better else "level with" if a == b else "no better than"
        return f"{label}: the student is {than} the teacher itself in {_in(steps)}."
    if len(better) == len(pairs):
        return f"{label}: the student is better than the untrained teacher at every measured number of steps."
    if not better:
        return f"{label}: the student is no better than the untrained teacher at any measured number of steps."
    worse = [steps for steps in pairs if steps not in better]
    return f"{label}: the student beats the untrained teacher at {listed(better)}, not at {listed(worse)}."


def _by_previews(report: Mapping[str, Any]) -> str:
    """Whether the previews of one step are no nearer to the teacher's trajectory than before the training."""
    config, course = report.get("config") or {}, (report.get("curves") or {}).get("latent_error") or []
    if len(course) < 2 or config.get("objective") not in ("continuous", "discrete"):  # which learn to take one step
        return ""
    (_, before), (_, after) = course[0], course[-1]
    if before is None or after is None or after < LEARNED * before:
        return ""
    said = f"Previews: the latent error of one step is {after:.3f}, and was {before:.3f} before the training."
    if after <= before / LEARNED:
        return f"{said} Train longer, or with a higher optimiser.lr."
    return f"{said} It grew: train again with a lower optimiser.lr, a tenth at first."


def _ranking(report: Mapping[str, Any]) -> str:
    """At how many steps the teacher's FD is worse than that of the student at its usual number."""
    student, teacher = by_steps(report, "student"), by_steps(report, "teacher")
    steps = usual_steps(report)
    fd = student[steps].get("fd")
    known = {k: value for k, scores in teacher.items() if (value := scores.get("fd")) is not None}
    if fd is None or not known:
        return ""
    beaten = sorted(k for k, value in known.items() if fd < value)
    if (n := _images(report)) < FEWEST_IMAGES:
        return f"FD: {n} images rank nothing; evaluate {FEWEST_IMAGES} or more."
    named, against = f"FD: the student in {_in(steps)}", _against_fd(student[steps], teacher, beaten)
    if not beaten:
        return f"{named} is worse than the teacher at every measured number of steps.{against}"
    if len(beaten) == len(known):
        return f"{named} is better than the teacher at every measured number of steps.{against}"
    return f"{named} is better than the teacher at {listed(beaten)}.{against}"


def _images(report: Mapping[str, Any]) -> int:
    """Images of a row that has an FD; where the report does not say, enough."""
    protocol = report.get("protocol")
    n = protocol.get("n") if isinstance(protocol, Mapping) else None
    return n if isinstance(n, int) else FEWEST_IMAGES


def _against_fd(ours: Row, teacher: Mapping[int, Row], beaten: list[int]) -> str:
    """Where FD-ImageNet says the opposite of FD, which has the student ahead at the steps of `beaten`."""
    second = ours.get("fd_imagenet")
    if second is None:
        return ""
    known = {k: value for k, row in teacher.items() if (value := row.get("fd_imagenet")) is not None}
    apart = sorted(k for k, value in known.items() if (second < value) != (k in beaten))
    return f" FD-ImageNet says the opposite at {listed(apart)}." if apart else " FD-ImageNet agrees." if known else ""


def _collapsed(report: Mapping[str, Any]) -> str:
    """Whether images of one prompt have become one image."""
    rows, student = by_steps(report, taught_teacher(report)), by_steps(report, "student")
    ours, theirs = student[usual_steps(report)].get("diversity"), rows[max(rows)].get("diversity") if rows else None
    if ours is None or not theirs or ours > DIVERSITY_FALLS * theirs:
        return ""
    matches = bool((report.get("config") or {}).get("fake", {}).get("updates"))
    cure = "Lower matching.guidance or matching.weight, or take the preset dp-dmd"
    cure = cure if matches else "Train longer, or lower space.guidance"
    return f"Diversity: images of one prompt look collapsed, {ours:.3f} against the teacher's {theirs:.3f}. {cure}."


def _measured_on(report: Mapping[str, Any]) -> str:
    protocol = report.get("protocol", {})
    if not isinstance(protocol, Mapping) or "n" not in protocol:
        return ""
    what = protocol.get("prompts") or f"{protocol['n']} images a row"
    return f"Measured on {what}, at guidance {protocol['guidance']:g}." if "guidance" in protocol else ""


def listed(steps: list[int]) -> str:
    """`1 step`, `1, 2 and 4 steps`."""
    head = ", ".join(map(str, steps[:-1]))
    return f"{head} and {counted(steps[-1])}" if head else counted(steps[-1])
