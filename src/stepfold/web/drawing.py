"""What the page draws, from the same noise: a student's pictures, the teacher's as they form, the teacher's walk."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepfold import assets
from stepfold.errors import UserError
from stepfold.evaluation.preview import thinned, to_image
from stepfold.maths.formulations import data_prediction, equivalent_noise
from stepfold.prompts.reading import open_prompts
from stepfold.randomness import normal
from stepfold.sampling.samplers import SAMPLERS
from stepfold.sampling.teacher import Step, teacher_steps
from stepfold.students.card import Card
from stepfold.students.loading import load_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher

MAX_PROMPT, MAX_STEPS, MAX_PICTURES, MAX_GUIDANCE, MAX_SEED = 300, 8, 9, 8.0, 2**31 - 1
FIRST_SEED = 2  # the page begins with it
TEACHER_STEPS = 20
STEPS_LABEL, PICTURES_LABEL, SEED_LABEL = "Student's steps", "Images", "Seed"
GAMMA_LABEL = "Fresh noise in the student's steps"
SMALL = 256 * 256  # pixels of an image of which nine are drawn at once unless told otherwise
STRIP = (1, 2, 4, 8)  # steps of the student that stand side by side
KEPT = 15  # drawings of one kind that a median is taken of
NUM_WALK = 7  # times of the walk that are shown
PREVIEW_SEC = 0.1  # at least between two previews of the teacher's
FRAMES = 4  # of a video, side by side
EMOJI_EXAMPLES = (
    "red heart on blue background", "pizza on white background", "fox on green background",
    "rocket on black background", "Christmas tree on red background",
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """What the page draws with.

    Attributes:
        student: the network.
        pipeline: the student's encoder and autoencoder.
        teacher: may be `pipeline` itself.
        card: the student's.
    """

    student: Student
    pipeline: PipelineTeacher
    teacher: PipelineTeacher
    card: Card

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts to begin with."""
        own = EMOJI_EXAMPLES if self.card.teacher == "emoji" else (self.card.example,)
        return self.teacher.examples[: len(EMOJI_EXAMPLES)] or own

    @property
    def branches(self) -> int:
        """Of the teacher's guidance: 2 network calls a step with classifier-free guidance, else 1."""
        return 2 if self.teacher.guidance_kind == "classifier_free" else 1

    @property
    def about(self) -> str:
        """Which student, which teacher, which guidance."""
        taught = ", ".join(f"{scale:g}" for scale in self.card.recipe.taught)
        trained = self.card.config.get("training", {}).get("steps")
        after = f" after {trained:,} training steps" if isinstance(trained, int) else ""
        size = f"{self.teacher.width} × {self.teacher.height} pixels"
        return f"Student of {self.card.teacher}{after}, taught at guidance {taught}; {size}, on {self.teacher.device}."

    @property
    def usual_steps(self) -> int:
        """In how many steps the student draws unless told otherwise: what it was made for, as far as the page goes."""
        asked = self.card.usual_steps
        within = [steps for steps in self.card.recipe.times if steps <= MAX_STEPS]
        return asked if asked <= MAX_STEPS else max(within, default=1)

    @property
    def usual_count(self) -> int:
        """How many images the page begins with: nine small ones, or one."""
        return MAX_PICTURES if self.teacher.frames == 1 and self.teacher.width * self.teacher.height <= SMALL else 1

    @property
    def takes_gamma(self) -> bool:
        """Whether the student's steps may have fresh noise in them: a flow map that jumps anywhere."""
        return self.card.recipe.sampler == "flow_map" and self.card.recipe.jumps_anywhere

    @property
    def vocabulary(self) -> str:
        """What the prompts of a model that knows few words may say; empty for others."""
        if self.card.teacher != "emoji":
            return ""
        names, colours = (len(_lines(assets.JUDGE / file)) for file in ("names.txt", "colours.txt"))
        return f"This model knows {names} names on {colours} background colours; other words give it nothing to draw."

    def random_prompt(self) -> str:
        """One of the prompts that the student was trained on, or of the examples where they are not here."""
        own = assets.PROMPTS if self.card.teacher == "emoji" else self.card.config.get("prompts")
        try:
            texts = open_prompts(own) if own else None
            text = texts.prompt(random.randrange(len(texts))) if texts else random.choice(self.examples)
        except UserError:
            text = random.choice(self.examples)
        return text[:MAX_PROMPT]

    @property
    def guidance_label(self) -> str:
        """The name of the control, which is the teacher's alone where the student was taught one scale."""
        return "Guidance" if len(set(self.card.recipe.taught)) > 1 else "Teacher's guidance"

    @property
    def fine_print(self) -> str:
        """What guidance, steps and milliseconds mean here."""
        taught = self.card.recipe.taught
        said = f"The student was taught at guidance {', '.join(f'{scale:g}' for scale in taught)}"
        if len(set(taught)) == 1:
            said += " and ignores any other scale; the slider changes only the teacher"
        said += f". Steps are the student's; the teacher takes {TEACHER_STEPS}"
        said += ", each of which calls the network with and without the prompt, as one batch" * (self.branches > 1)
        said += (
            ". Milliseconds are measured here: the network, and the decoding of the images. One device draws both in "
        )
        return said + "turn, and each clock counts its own work alone."


@dataclass(frozen=True)
class Request:
    """What to draw: `count` pictures of one prompt, from the seeds `seed`, `seed + 1`, ..."""

    prompt: str
    steps: int = 1
    guidance: float = 1.0
    seed: int = 0
    count: int = 1
    gamma: float = 0.0

    @property
    def seeds(self) -> range:
        """One a picture."""
        return range(self.seed, self.seed + self.count)


@dataclass(frozen=True)
class Walk:
    """The teacher's way to the first picture.

    Attributes:
        t: some of its times, falling from pi/2.
        pictures: at each, the picture x_0 that the velocity there points at.
        noises: at each, the first channel of the equivalent noise (x_t - cos t x_0) / sin t; grey is 0.
        similarity: at each, the cosine of the equivalent noise to the noise that the walk began with.
    """

    t: list[float]
    pictures: list[Image.Image]
    noises: list[Image.Image]
    similarity: list[float]


@dataclass(frozen=True)
class Drawing:
    """Pictures, whole or on their way.

    Attributes:
        pictures: one a seed.
        steps: steps taken so far.
        of: steps to take.
        branches: of guidance, which go through the network as one batch: 2 with classifier-free guidance, else 1.
        sec: what the steps so far took and, once it is whole, the decoding; encoding the prompt and decoding what is
            shown on the way are left out.
        clock: seconds after each of these steps, decoding left out; of a student one number, after its last step.
        walk: of the teacher, once it is whole.
    """

    pictures: list[Image.Image]
    steps: int
    of: int
    branches: int
    sec: float
    clock: tuple[float, ...] = ()
    walk: Walk | None = None

    @property
    def calls(self) -> int:
        """Network calls per picture so far, counted as in the README's tables: each branch of guidance is one."""
        return self.steps * self.branches

    @property
    def whole(self) -> bool:
        """Whether all steps are taken."""
        return self.steps == self.of


def load_models(student: Path, teacher: str | None, device: str) -> Models:
    """A student, and its teacher: as its card says, or another one.

    Raises:
        UserError: either does not load, or they do not draw from the same noise.
    """
    pipeline, network, card = load_student(student, device)
    settings = card.teacher_settings()
    if teacher is None and (card.lora_rank or card.network_only):
        return Models(network, pipeline, pipeline, card)  # such a student's pipeline is its teacher's
    if teacher is not None:
        settings = settings.model_copy(update={"source": teacher, "lora": ()})
    other = load_teacher(settings, device)
    if (other.latent_shape, other.sigma_data) != (pipeline.latent_shape, pipeline.sigma_data):
        raise UserError(
            f"teacher {settings.source!r} starts from noise of shape {list(other.latent_shape)}, the student from "
            f"{list(pipeline.latent_shape)}; give the teacher that the student was distilled from"
        )
    return Models(network, pipeline, other, card)


def warm_up(models: Models) -> None:
    """Draws once, so that the first measured time is not that of starting."""
    request = Request(models.examples[0], models.usual_steps, guidance=models.card.recipe.guidance, seed=FIRST_SEED)
    draw_student(models, replace(request, count=models.usual_count))
    next(draw_teacher(models, request))


def checked(models: Models, prompt: Any, steps: Any, guidance: Any, seed: Any, count: Any, gamma: Any = 0.0) -> Request:
    """A request out of what the page sends, which may be anything.

    Raises:
        UserError: what is wrong, in one line.
    """
    text = " ".join(prompt.split()) if isinstance(prompt, str) else ""
    if not text:
        raise UserError("Type a prompt.")
    if len(text) > MAX_PROMPT:
        raise UserError(f"The prompt has {len(text)} characters; {MAX_PROMPT} is the most.")
    models.teacher.check_prompts([text])
    return Request(
        text,
        steps=round(_number(STEPS_LABEL, steps, 1, MAX_STEPS)),
        guidance=_number(models.guidance_label, guidance, models.teacher.no_guidance, MAX_GUIDANCE),
        seed=round(_number(SEED_LABEL, seed, 0, MAX_SEED)),
        count=round(_number(PICTURES_LABEL, count, 1, MAX_PICTURES)),
        gamma=models.card.recipe.gamma_for(_number(GAMMA_LABEL, gamma, 0, 1)),
    )


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:,.10g}.")
    return value


def draw_student(models: Models, request: Request) -> Drawing:
    """The student's pictures; that of each seed is the one that `stepfold sample --seed` draws."""
    pipeline = models.pipeline
    noise, condition, guidance = _start(pipeline, request)
    recipe = models.card.recipe
    times = recipe.times_for(request.steps)
    options = {"gamma": request.gamma} if request.gamma else {}
    began = _now(pipeline)
    x0 = SAMPLERS[recipe.sampler](
        models.student, noise, condition, guidance, times,
        lambda i: _noise(pipeline, request, "evaluation fresh noise", i, 0), recipe.sigma_data,
        **options,
    )  # fmt: skip
    drawn = _now(pipeline) - began
    pictures = pipeline.decode(x0)
    return Drawing(_images(pipeline, pictures), len(times), len(times), 1, _now(pipeline) - began, (drawn,))


def draw_teacher(models: Models, request: Request) -> Iterator[Drawing]:
    """The teacher's pictures as they form: x_0 as its velocity has it along the way, and then where the way ends."""
    teacher = models.teacher
    noise, condition, guidance = _start(teacher, request)
    branches = models.branches
    steps: list[Step] = []
    began, shown, sec, clock = _now(teacher), 0.0, 0.0, []
    for step in teacher_steps(teacher, noise, condition, guidance, TEACHER_STEPS, even=True):
        steps.append(step)
        sec += _now(teacher) - began
        clock.append(sec)
        if len(steps) < TEACHER_STEPS and time.perf_counter() - shown >= PREVIEW_SEC:
            shown = time.perf_counter()
            preview = teacher.decode(data_prediction(step.x, step.t, step.dxdt))
            yield Drawing(_images(teacher, preview), len(steps), TEACHER_STEPS, branches, sec, tuple(clock))
        began = _now(teacher)
    pictures = teacher.decode(steps[-1].x_next)
    sec += _now(teacher) - began
    walk = _walk(teacher, steps)
    yield Drawing(_images(teacher, pictures), TEACHER_STEPS, TEACHER_STEPS, branches, sec, tuple(clock), walk)


def draw_both(
    models: Models, request: Request, step_sec: float | None, is_old: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Drawing | None, Drawing | None]]:
    """A race on one device, which works for both in turn: what happens first by its own clock is yielded first.

    Args:
        models: the racers.
        request: what they draw.
        step_sec: what one step of the teacher is known to take; None where it is not.
        is_old: whether something newer is asked for; the student does not wait for its clock then.

    Yields:
        (the student's pictures when they are due, else None; the teacher's as they form, else None).
    """
    student = draw_student(models, request)
    due = is_old() or step_sec is None or student.sec <= step_sec  # before the teacher's first step is done
    if due:
        yield student, None
    for teacher in draw_teacher(models, request):
        now = not due and (teacher.whole or teacher.sec >= student.sec or is_old())
        due = due or now
        yield student if now else None, teacher


def draw_strip(models: Models, request: Request) -> list[tuple[int, Drawing]]:
    """The student's first picture in 1, 2, 4 and 8 steps, as far as its card has times for them; else in its own."""
    first = replace(request, count=1)
    known = [steps for steps in STRIP if steps in models.card.recipe.times] or [models.usual_steps]
    return [(steps, draw_student(models, replace(first, steps=steps))) for steps in known]


@dataclass
class Paces:
    """What drawings took on this machine, by what was drawn. The page compares medians, which no hiccup moves."""

    seconds: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def note(self, who: str, request: Request, sec: float) -> None:
        """A drawing took so long."""
        self._of(who, request).append(sec)

    def median(self, who: str, request: Request) -> tuple[float | None, int]:
        """The median seconds of such drawings, and how many there were."""
        found = self._of(who, request)[-KEPT:]
        return (statistics.median(found) if found else None), len(found)

    def _of(self, who: str, request: Request) -> list[float]:
        steps = request.steps if who == "student" else TEACHER_STEPS
        return self.seconds.setdefault((who, steps, request.count), [])


def _start(model: PipelineTeacher, request: Request) -> tuple[Tensor, Condition, Tensor]:
    """Noise, condition and guidance of a request, one row a picture."""
    guidance = torch.full((request.count,), float(request.guidance), device=model.device)
    return _noise(model, request, "sample", 0), model.encode([request.prompt]).expand(request.count), guidance


def _noise(model: PipelineTeacher, request: Request, name: str, *indices: int) -> Tensor:
    rows = [normal(model.latent_shape, seed, name, *indices) for seed in request.seeds]
    return model.sigma_data * torch.stack(rows).to(model.device)


def _walk(teacher: PipelineTeacher, steps: list[Step]) -> Walk:
    """The first row of the teacher's steps, at some of their times."""
    x0 = steps[-1].x_next[:1]
    shown = [steps[i * (len(steps) - 1) // (NUM_WALK - 1)] for i in range(NUM_WALK)]
    noises = [equivalent_noise(step.x[:1], step.t[:1], x0) for step in shown]
    first = steps[0].x[:1].flatten(1)
    predicted = torch.cat([data_prediction(step.x[:1], step.t[:1], step.dxdt[:1]) for step in shown])
    return Walk(
        t=[step.t[0].item() for step in shown],
        pictures=_images(teacher, teacher.decode(predicted)),
        noises=[_map(noise[0, 0], 3 * teacher.sigma_data) for noise in noises],
        similarity=[torch.cosine_similarity(noise.flatten(1), first).item() for noise in noises],
    )


def _map(values: Tensor, largest: float) -> Image.Image:
    """Numbers [H, W] (of a video [F, H, W], its first frame) from -largest to largest as black to white."""
    plane = values if values.ndim == 2 else values[0]
    return to_image((plane / largest / 2 + 0.5).clamp(0, 1).expand(3, *plane.shape))


def _images(model: PipelineTeacher, pictures: Tensor) -> list[Image.Image]:
    if model.frames > 1:
        pictures = thinned(pictures, model.frames, FRAMES)
    return [to_image(picture) for picture in pictures]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _now(model: PipelineTeacher) -> float:
    """Seconds, once the device has done what it was given."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()
