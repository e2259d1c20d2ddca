"""A student's card, `stepfold.json`: where it comes from, how it is sampled, how plain diffusers calls it."""

import json
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from stepfold import assets
from stepfold.errors import Caution, UserError, first_line
from stepfold.near_names import renamed
from stepfold.sampling.recipe import Recipe
from stepfold.scores import MATCHING
from stepfold.sections import CARD, Section, TeacherSettings
from stepfold.students.intact import digests_in

RUN = "config.yaml"
LAST_BYTES = 100_000
"""Of a run's metrics, more than its last row."""
BUNDLED_STUDENT = "emoji-student"
ANYFLOW = "AnyFlowPipeline"
"""The class of diffusers whose network is told both times; an export, which stepfold itself does not load."""

Count = Annotated[int, Field(strict=True, gt=0)]


class Quantisation(Section):
    """How a student's weights were rounded, and what that costs.

    Attributes:
        kind: bits of the linear layers in its blocks.
        dtype: of the other weights.
        loss: what was measured: form of the student -> steps -> scores, and on what; empty where nothing was.
    """

    kind: Literal["int8", "fp8", "nf4"]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    loss: dict[str, Any] = Field(default_factory=dict)


class Card(Section):
    """The fields of a student's card. Defaults are for cards that an earlier version wrote.

    Attributes:
        stepfold: version that wrote it.
        teacher: 'emoji', a folder or a hub id.
        base: `network_fingerprint` of the teacher that a LoRA is for; empty for others, and in earlier cards.
        height, width: of its pictures, in pixels.
        frames: of its videos.
        max_tokens: of a prompt.
        recipe: how the student is sampled.
        output: where the pipeline's result has what it made.
        pipeline, scheduler: their classes in diffusers; empty in the earliest cards.
        calls: number of steps -> the arguments with which the pipeline takes them; empty in the earliest cards.
        example: a prompt as the pipeline takes it.
        conventions: what people get wrong about the teacher's pipeline -> how it is; empty in earlier cards.
        licences: part of the teacher -> the licence fields of its model card.
        config: the run's settings.
        network_only: whether the folder holds the network alone, and the rest is the teacher's.
        merged: whether a LoRA student was merged into its teacher's network.
        folded_steps: the one number of steps that a flow map was folded for; 0 for other students.
        loras_in_diffusers: whether plain diffusers merges the teacher's own LoRAs as their files say.
        lora_parts: part of the pipeline -> the file of its LoRA, for networks beside the usual one.
        quantised: how its weights were rounded; None for plain ones.
        dtype: that an export rounded its weights to; empty for those of its run.
        digests: file of weights that lies directly in the folder -> `intact.digest_of` its tensors; empty in earlier
            cards.
    """

    model_config = ConfigDict(extra="allow")

    stepfold: str = "0.1.0"
    teacher: str
    base: str = ""
    height: Count
    width: Count
    frames: Count | None = None
    max_tokens: Count
    recipe: Recipe
    output: Literal["images", "image", "frames"] = "images"
    pipeline: str = ""
    scheduler: str = ""
    calls: dict[int, dict[str, Any]] = Field(default_factory=dict)
    example: Any = "a photo of a cat"
    conventions: dict[str, str] = Field(default_factory=dict)
    licences: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"teacher": {}})
    config: dict[str, Any]
    network_only: bool = False
    merged: bool = False
    folded_steps: int = 0
    loras_in_diffusers: bool = True
    lora_parts: dict[str, str] = Field(default_factory=dict)
    quantised: Quantisation | None = None
    dtype: Literal["", "bfloat16", "float16"] = ""
    digests: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_rank(self) -> "Card":
        student = self.config.get("student", {})
        if not isinstance(student, dict) or not isinstance(student.get("lora", 0), int):
            raise ValueError("config.student is no section of settings; copy the student folder again")
        return self

    @property
    def lora_rank(self) -> int:
        """The rank of a student that is a LoRA file; 0 for one that is a whole pipeline."""
        return 0 if self.merged else self.config.get("student", {}).get("lora", 0)

    @property
    def lora_convolutions(self) -> bool:
        """Whether a LoRA student has matrices on 1 x 1 convolutions too."""
        return self.config.get("student", {}).get("lora_convolutions", False)

    @property
    def asked_steps(self) -> tuple[int, ...]:
        """The numbers of steps that its run's settings name, the usual one first; none where they name none.

        A student for one number alone, folded or of segments, has that one; one that was matched on its own steps,
        always as many, has theirs.
        """
        if self.recipe.sampler != "consistency" and len(self.recipe.times) == 1:
            return tuple(self.recipe.times)
        if asked := tuple(self.config.get("evaluation", {}).get("steps") or ()):
            return asked
        rollout = self.config.get("rollout", {})
        matched = self.config.get("objective") in MATCHING and self.config.get("space", {}).get("kind") == "rollout"
        return (rollout["steps"],) if matched and rollout.get("lengths") == "fixed" else ()

    @property
    def loaded_dtype(self) -> str:
        """The torch dtype that plain diffusers loads all parts of the pipeline in; by itself it may mix several."""
        rounded, run = self.quantised.dtype if self.quantised else self.dtype, self.config.get("teacher")
        return rounded or (run.get("dtype", "float32") if isinstance(run, dict) else "float32")

    @property
    def usual_steps(self) -> int:
        """The number of steps that it is sampled in where none is asked for."""
        return next(iter(self.asked_steps), 1)

    @property
    def two_times(self) -> bool:
        """Whether the student is told its target time too."""
        return self.config.get("student", {}).get("times", "one") == "two"

    @property
    def with_images(self) -> bool:
        """Whether the student was trained with a reference image for each prompt."""
        teacher = self.config.get("teacher")
        return isinstance(teacher, dict) and bool(teacher.get("image_column"))

    def check_image(self, given: bool) -> None:
        """Refuses an image for a student of texts alone, and none for one of images.

        Raises:
            UserError: which, and the way out.
        """
        if given and not self.with_images:
            raise UserError(
                "--image is for a student that was trained with an image for each prompt (teacher.image_column), and "
                "this one was trained with texts alone; leave it out"
            )
        if self.with_images and not given:
            raise UserError("this student was trained with an image for each prompt; give one with --image FILE")

    def check_texts(self) -> None:
        """Refuses a student of images where texts alone are drawn.

        Raises:
            UserError: it is one.
        """
        if self.with_images:
            raise UserError("here texts alone are drawn, and this student needs an image; use stepfold sample --image")

    def check_told(self) -> None:
        """Refuses a student of segments that has to be told where to jump to: without that its network means 0.

        A policy student, whose network gives several velocities, too.

        Raises:
            UserError: it is one; what plain diffusers can take instead.
        """
        if self.recipe.policy:
            one = " --steps 1" if 1 in self.recipe.times else ""
            raise UserError(
                f"this student gives {self.recipe.policy.nodes} velocities at a time, which other tools do not put "
                f"together; export it with --to pipeline{one}, or use stepfold sample"
            )
        if not self.recipe.jumps_to_zero:
            steps = max(self.recipe.times)
            raise UserError(
                f"this student jumps from edge to edge of its {steps} segments, and plain diffusers tells it no edge; "
                f"export it with --to pipeline --steps {steps}, or use stepfold sample"
            )

    @property
    def folding(self) -> str:
        """The options of `stepfold export` that fold a flow map's jumps for its usual number of steps; else empty.

        In one step it jumps to 0, as other tools sample it, so a student for that alone needs no fold.
        """
        if self.recipe.sampler != "flow_map" or max(self.recipe.times) == 1:
            return ""
        steps = next((k for k in self.asked_steps if k in self.recipe.times), max(self.recipe.times))
        return f"--to {'lora' if self.lora_rank >= max(steps - 1, 1) else 'pipeline'} --steps {steps}"

    def check_folded(self, to: str) -> None:
        """Refuses to write a flow map for tools that tell it one time: they would sample another model with it.

        Args:
            to: what it is to become.

        Raises:
            UserError: it is one; the export that these tools sample rightly.
        """
        if not self.folding or to not in ("lora", "single-file") or (to == "lora" and not self.lora_rank):
            return
        steps = self.folding.rpartition(" ")[2]
        fix = self.folding if to == "lora" else f"--to pipeline --steps {steps}, and export that folder --to {to}"
        raise UserError(
            f"this student is a flow map, and other tools do not tell it where to jump to; fold its jumps for {steps} "
            f"steps first: {fix}"
        )

    def check_plain(self) -> None:
        """Refuses a quantised student where plain weights are needed.

        Raises:
            UserError: it is one.
        """
        if self.quantised:
            raise UserError(
                f"this student's weights are rounded to {self.quantised.kind}, and here plain ones are needed; give "
                "the student that it was made of"
            )

    def check_calls(self) -> None:
        """Refuses a card that does not say how plain diffusers samples the student.

        Raises:
            UserError: the reason.
        """
        self.check_told()
        if not self.calls:
            raise UserError(
                f"{CARD} is of stepfold {self.stepfold} and does not say how plain diffusers calls the student; make a "
                "whole one first: stepfold export STUDENT --to pipeline"
            )

    def teacher_settings(self) -> TeacherSettings:
        """The settings of the teacher that the student was distilled from.

        Raises:
            UserError: the card has none.
        """
        try:
            return TeacherSettings.model_validate(self.config["teacher"])
        except (LookupError, ValidationError) as error:
            raise UserError(f"{CARD} is damaged ({first_line(error)}); copy the student folder again") from None


def read_card(folder: Path) -> Card:
    """The card of a student folder, of this version or an earlier one.

    Raises:
        UserError: the folder is no student that stepfold wrote, or its card is damaged.
    """
    path = student_folder(folder) / CARD
    run = path.parent.parent
    if not path.is_file() and path.parent.name == "student" and is_run(run):
        if (run / "student.safetensors").is_file():
            raise UserError(
                f"run {run} has the student of a network of one's own; load it in Python, with "
                "load_module_student(teacher, folder)"
            )
        config, out = shlex.quote(str(run / RUN)), shlex.quote(str(run))
        raise UserError(
            f"run {run} has no student yet; finish it: stepfold distill --preset {config} --out {out} --resume"
        )
    if not path.is_file():
        raise UserError(f"{path.parent} is no student folder ({CARD} is missing); give OUT/student of a run")
    try:
        card = Card.model_validate(upgraded(json.loads(path.read_text(encoding="utf-8"))))
    except ValidationError as error:
        problem = error.errors()[0]
        what = ": ".join([*(str(part) for part in problem["loc"]), problem["msg"]])
        raise UserError(f"{path} is damaged ({what}); copy the student folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); copy the student folder again") from None
    if path.parent.name == "student" and is_run(run):
        warn_of_longer(run, card)
    return card


def warn_of_longer(run: Path, card: Card) -> None:
    """Says of a run that has gone on since its student was made that the student is the earlier one."""
    training, step = card.config.get("training"), 0
    made = training.get("steps") if isinstance(training, dict) else None
    with suppress(OSError, ValueError, LookupError, TypeError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, (run / "metrics.jsonl").stat().st_size - LAST_BYTES))
        step = 1 + int(json.loads(file.read().splitlines()[-1])["step"])
    if isinstance(made, int) and step > made:
        said = f"{run} has gone on to step {step}, and its student is still of step {made}; resume it to its end"
        warnings.warn(said, Caution, stacklevel=2)


def write_card(folder: Path, card: Card) -> None:
    """Writes a student folder's `stepfold.json`, which knows the files of weights beside it again."""
    card = card.model_copy(update={"digests": digests_in(folder)})
    (folder / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def upgraded(values: Any) -> Any:
    """A card's fields as this version has them; before there was a recipe, every student was a consistency model."""
    if not isinstance(values, dict):
        return values
    config = renamed(values.get("config"))
    if "recipe" in values:
        return values | {"config": config}
    recipe = {
        "sampler": "consistency",
        "times": {},  # those of the teacher's class, which is known when it is loaded
        "taught": taught_before(values),
        "guidance": values.get("guidance"),
        "sigma_data": values.get("sigma_data", 0.5),
    }
    rest = {name: value for name, value in values.items() if name not in (*recipe, "config")}
    return rest | {"recipe": recipe, "config": config}


def taught_before(values: dict[str, Any]) -> Any:
    """The guidance scales of a student whose card has no recipe: as it says, its settings say, or its usual one."""
    config = values.get("config")
    space = config.get("space") if isinstance(config, dict) else None
    listed = space.get("guidance") if isinstance(space, dict) else None
    return values.get("taught") or listed or [values.get("guidance")]


def student_folder(name: Path) -> Path:
    """The bundled student's folder for `emoji-student`, the student's of a run folder, else the folder itself."""
    if str(name) == BUNDLED_STUDENT:
        return assets.STUDENT
    return name / "student" if is_run(name) else name


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a distillation, finished or not."""
    return (folder / RUN).is_file() and not any((folder / name).exists() for name in (CARD, "teacher"))


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student, or is a run's, which has one or will have one."""
    return is_run(folder) or (student_folder(folder) / CARD).is_file()
