"""What a search found, as a json file: for which teacher, how good, and how other tools take it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.evaluation.measure import Sampler
from stepfold.evaluation.protocol import SEARCHED
from stepfold.levels.calibrated import calibrated_rollout
from stepfold.levels.solvers import SolverName, rollout, velocity_of
from stepfold.maths.formulations import trigflow_time
from stepfold.teachers.contract import Condition, Teacher
from stepfold.teachers.fingerprints import teacher_fingerprint
from stepfold.training.runs import writing

DIGITS = 4  # of levels and weights, when they are found: what is judged is what is printed


def rounded(numbers: Sequence[float]) -> list[float]:
    """Levels or weights with DIGITS decimals; levels stay apart, since a search keeps them so."""
    return [round(number, DIGITS) for number in numbers]


@dataclass(frozen=True)
class Row:
    """The levels of one solver and number of steps.

    Attributes:
        solver: euler, unipc or calibrated.
        steps: network calls, two rows each under classifier-free guidance.
        levels: flow-matching noise levels in [0, 1], steps + 1, falling to 0.
        weights: of a calibrated solver's steps, else empty.
        error: on the prompts of the verdict: distance of the end to the teacher's, in standard deviations of the data.
        default: the same of the best of the usual levels under that solver; the calibrated one's is Euler's.
        default_name: of those levels.
        better: whether it is to be used.
    """

    solver: str
    steps: int
    levels: list[float]
    error: float
    default: float
    default_name: str
    better: bool
    weights: list[list[float]] = field(default_factory=list)


def read_schedule(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(what the levels depend on, rows) of a file that `stepfold schedule` wrote.

    Raises:
        UserError: it is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in found["rows"]]
        key = dict(found["key"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is no file of `stepfold schedule` ({error}); make it with that command") from None
    if flaws := [flaw for row in rows if (flaw := flaw_of(row))]:
        raise UserError(f"{path} has {flaws[0]}; make it again with `stepfold schedule`")
    return key, rows


def flaw_of(row: Row) -> str | None:
    """What is wrong with a row that was read: levels fall from at most 1 to 0, and calibrated steps have weights."""
    if row.solver not in (*get_args(SolverName), "calibrated") or len(row.levels) != row.steps + 1:
        return f"a row of {row.solver} with {len(row.levels)} levels for {row.steps} steps"
    if row.levels[0] > 1 or row.levels[-1] != 0 or any(high <= low for high, low in pairwise(row.levels)):
        return f"levels that do not fall from 1 to 0: {row.levels}"
    if row.solver == "calibrated" and [len(weights) for weights in row.weights] != list(range(row.steps)):
        return "a calibrated row without a weight for each earlier step"
    return None


def write_schedule(path: Path, key: Mapping[str, Any], rows: Sequence[Row], use: Sequence[Mapping[str, str]]) -> None:
    """The file, whole or not at all."""
    found = {"key": dict(key), "rows": [asdict(row) for row in rows], "use": list(use)}
    with writing(path) as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def check_schedule(path: Path, key: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Levels belong to one teacher at one guidance scale and size.

    Raises:
        UserError: naming what differs.
    """
    for name, value in wanted.items():
        if key.get(name) != value:
            what = f"{name}={key.get(name)!r}, not {value!r}" if name != "fingerprint" else "another teacher"
            raise UserError(
                f"{path} was searched for {what}, and levels belong to one teacher, "
                "guidance scale and size; search again (stepfold schedule), to another --out"
            )


def searched_sampler(teacher: Teacher, row: Row) -> Sampler:
    """The teacher under a row's solver and levels."""

    def sample(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
        velocity = velocity_of(teacher, condition, float(guidance[0]), len(noise))
        return teacher.sigma_data * end_of(row, velocity, noise / teacher.sigma_data)

    return sample


def searched_samplers(path: Path, teacher: Teacher, settings: TeacherSettings, guidance: float) -> dict[str, Sampler]:
    """`teacher, searched SOLVER STEPS` -> sampler, of the rows of a file that beat the usual levels.

    Raises:
        UserError: it is no such file, or of another teacher, guidance scale or size.
    """
    key, rows = read_schedule(path)
    wanted = {"fingerprint": teacher_fingerprint(settings, network_only=False), "guidance": float(guidance)}
    check_schedule(path, key, wanted | {name: getattr(teacher, name) for name in ("height", "width")})
    return {f"{SEARCHED}{row.solver} {row.steps}": searched_sampler(teacher, row) for row in rows if row.better}


def end_of(row: Row, velocity: Any, noise: Tensor) -> Tensor:
    """Where a row's steps end, from unit noise [B, ...]."""
    if row.solver == "calibrated":
        return calibrated_rollout(velocity, noise, row.levels, row.weights)
    return rollout(velocity, noise, row.levels, row.solver)[0]  # type: ignore[arg-type] # checked when it was read


def lines_for(teacher: Any, row: Row, guidance: float) -> dict[str, str]:
    """How diffusers and ComfyUI take a row: Python lines, and a ManualSigmas node's text with the guidance beside it.

    Schedulers of diffusers shift levels that they are given once more, so theirs is told no shift.

    Args:
        teacher: a pipeline's.
        row: what was found.
        guidance: scale that it was searched at.
    """
    own = teacher.fixed_options | teacher.own_guidance(guidance)
    if guidance != teacher.no_guidance and teacher.negative_prompt is not None:
        own |= {"negative_prompt": teacher.negative_prompt}
    guiders = [
        f"pipe.{name} = {f'pipe.{name}.new(guidance_scale={guidance:g})' if part else None}"
        for name, part in teacher.own_parts(guidance).items()
    ]
    cfg = {"comfyui_guidance": comfyui_guidance(teacher, guidance)}
    name, comfyui = f"{row.solver} {row.steps}", ", ".join(f"{level:g}" for level in row.levels)
    if row.solver == "calibrated":
        lines = [
            "from stepfold.api import CalibratedScheduler",
            f"pipe.scheduler = CalibratedScheduler({row.levels}, {row.weights}, {teacher.num_train_timesteps})",
            *guiders,
            f"pipe({called({'num_inference_steps': row.steps} | own)})",
        ]
        return {"name": name, "diffusers": "\n".join(lines), "comfyui": ""}
    if teacher.ode == "trigflow" and "sigmas" not in inspect.signature(teacher.pipe.__call__).parameters:
        lines = [f"# none: {type(teacher.pipe).__name__} takes no noise levels"]
        return {"name": name, "diffusers": lines[0], "comfyui": ""}
    if teacher.ode == "trigflow":
        sigmas = torch.tan(trigflow_time(torch.tensor(row.levels, dtype=torch.float64))).tolist()
        lines = [
            "import diffusers",
            "pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, "
            'timestep_spacing="leading")',
            f"pipe({called({'sigmas': sigmas} | own)})",
        ]
        return {
            "name": name,
            "diffusers": "\n".join(lines),
            "comfyui": ", ".join(f"{sigma:.6f}" for sigma in sigmas),
        } | cfg
    listed = f"{row.levels[:-1]}"
    scheduler = f"diffusers.FlowMatchEulerDiscreteScheduler({teacher.num_train_timesteps}, shift=1.0)"
    if row.solver == "unipc":
        listed = f"numpy.array({listed})"
        scheduler = (
            'diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)'
        )
    lines = [
        "import diffusers, numpy" if row.solver == "unipc" else "import diffusers",
        f"pipe.scheduler = scheduler = {scheduler}",
        "own = scheduler.set_timesteps  # some pipelines take no levels, and others drop them",
        "scheduler.set_timesteps = lambda num_inference_steps=None, device=None, sigmas=None, mu=None: "
        f"own(sigmas={listed}, device=device)",
        *guiders,
        f"pipe({called({'num_inference_steps': row.steps} | own)})",
    ]
    return {"name": name, "diffusers": "\n".join(lines), "comfyui": comfyui if row.solver == "euler" else ""} | cfg


def comfyui_guidance(teacher: Any, guidance: float) -> str:
    """The scale as ComfyUI takes it: CFG is 1 where guidance is off or is told to the network."""
    if teacher.guidance_kind == "embedded":
        return f"CFG 1, FluxGuidance {guidance:g}"
    return f"CFG {guidance - teacher.no_guidance + 1:g}" if teacher.guidance_kind == "classifier_free" else "CFG 1"


def called(arguments: Mapping[str, Any]) -> str:
    """The arguments of a call, the prompt first."""
    return ", ".join(["prompt", *(f"{name}={value!r}" for name, value in arguments.items())])
