"""Pictures from any diffusers text-to-image pipeline, for a place in our tables or for somebody else's scorer."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.judge import Judge
from stepfold.evaluation.preview import to_image
from stepfold.evaluation.protocol import Protocol, Scores, protocol_prompts, score_images
from stepfold.randomness import generator
from stepfold.teachers.loading import FAMILIES
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

BATCH = 25
GENEVAL_SAMPLES = 4  # pictures a prompt, as GenEval's own script draws


@dataclass(frozen=True)
class Drawer:
    """A text-to-image pipeline, and how it is called.

    Attributes:
        pipe: of diffusers.
        calls: of a student: number of steps -> the arguments that its card gives for them; of others empty.
    """

    pipe: Any
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def usual_steps(self) -> list[int]:
        """The numbers of steps that a student's card knows, most first; else what the pipeline takes when not told."""
        own = inspect.signature(self.pipe.__call__).parameters["num_inference_steps"].default
        return sorted(self.calls, reverse=True) or [int(own)]

    def options(self, steps: int, guidance: float | None) -> dict[str, Any]:
        """Arguments of a call.

        Args:
            steps: of its scheduler.
            guidance: scale; None for the pipeline's own default, or what a student was taught. A student that takes
                none (its calls turn guidance off) gets none.

        Raises:
            UserError: it makes videos, or is a student that does not say how to take so many steps.
        """
        accepted = inspect.signature(self.pipe.__call__).parameters
        name = type(self.pipe).__name__
        family = FAMILIES.get(name, PipelineTeacher)
        if "num_frames" in accepted:
            raise UserError(f"{name} makes videos; give a pipeline that makes pictures")
        if self.calls:
            if steps not in self.calls:
                known = ", ".join(map(str, reversed(self.usual_steps)))
                raise UserError(
                    f"this student ({name}) says how to take {known} steps, not {steps}; give --steps one of these"
                )
            options: dict[str, Any] = dict(self.calls[steps])
            if guidance is not None and options.get(family.scale_argument) != family.no_guidance:
                options[family.scale_argument] = guidance
            return options
        options = {"num_inference_steps": steps, **family.fixed_options}
        if guidance is not None:
            options[family.scale_argument] = guidance
        if "use_resolution_binning" in accepted:  # else Sana and PixArt draw at 1024 px, whatever they were trained for
            side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
            options |= {"use_resolution_binning": False, "height": side, "width": side}
        if "intermediate_timesteps" in accepted and steps != 2:  # SanaSprintPipeline has a default for 2 steps alone
            options["intermediate_timesteps"] = None
        return options


def draw(
    drawer: Drawer, prompts: Sequence[str], keys: Sequence[int], steps: int, guidance: float | None, seed: int
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of a diffusers pipeline.

    Args:
        drawer: the pipeline.
        prompts: B strings.
        keys: B numbers; a picture's noise depends on the seed and on its own number only.
        steps, guidance: see `Drawer.options`.
        seed: of the noise.

    Raises:
        UserError: the pipeline cannot be called so.
    """
    options = drawer.options(steps, guidance)
    options |= {"output_type": "pt", "generator": [generator(seed, "pipeline", key) for key in keys]}
    family = FAMILIES.get(type(drawer.pipe).__name__, PipelineTeacher)
    named = family.prompt_argument
    first, options = ([], options | {named: list(prompts)}) if named else ([list(prompts)], options)
    if not drawer.calls and guidance != family.no_guidance:
        options |= family.negatives(len(prompts))
    try:
        return drawer.pipe(*first, **options).images.float().clamp(0, 1)
    except (TypeError, ValueError) as error:
        name = type(drawer.pipe).__name__
        raise UserError(
            f"{name} cannot draw with {', '.join(options)} ({error}); look up what the pipeline's call takes"
        ) from error


def measure_pipeline(
    judge: Judge,
    protocol: Protocol,
    drawer: Drawer,
    steps: int,
    guidance: float | None,
    tick: Callable[[int], None] = lambda count: None,
) -> Scores:
    """A pipeline's scores on the protocol's prompts, with noise of its own, so without an agreement."""
    prompts, targets, groups = protocol_prompts(judge, protocol)

    def pictures() -> Iterator[Tensor]:
        for start in range(0, protocol.n, BATCH):
            samples = range(start, min(start + BATCH, protocol.n))
            yield draw(drawer, [prompts[s] for s in samples], samples, steps, guidance, protocol.seed)
            tick(len(samples))

    return score_images(judge, pictures(), prompts, targets, groups)


def claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Notes in a folder of pictures what makes them, so that they are never taken for another pipeline's.

    Raises:
        UserError: the folder holds pictures that something else made.
    """
    note = folder / "made_by.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != made_by:
        raise UserError(f"{folder} holds pictures of another pipeline or other settings; choose another --out")
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with writing(note) as part:
            part.write_text(json.dumps(made_by, indent=2) + "\n")


def geneval_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of GenEval's evaluation_metadata.jsonl: each a json object with a `prompt`.

    Raises:
        UserError: the file is missing or is none.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give GenEval's evaluation_metadata.jsonl") from None
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
        raise UserError(
            f"{path}: not every line is a json object with a prompt; give GenEval's evaluation_metadata.jsonl"
        )
    return rows


def write_geneval(
    drawer: Drawer,
    rows: Sequence[dict[str, Any]],
    out: Path,
    steps: int,
    guidance: float | None,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Pictures in the folders that GenEval's scorer reads: OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png, ...

    Prompts whose pictures are all there are not drawn again.
    """
    for index, row in enumerate(rows):
        folder = out / f"{index:05d}"
        paths = [folder / "samples" / f"{i:04d}.png" for i in range(GENEVAL_SAMPLES)]
        if not all(path.exists() for path in paths):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            keys = [index * GENEVAL_SAMPLES + i for i in range(GENEVAL_SAMPLES)]
            pictures = draw(drawer, [row["prompt"]] * GENEVAL_SAMPLES, keys, steps, guidance, 0)
            with writing(folder / "metadata.jsonl") as part:
                part.write_text(json.dumps(row))
            for path, picture in zip(paths, pictures, strict=True):
                with writing(path) as part:
                    to_image(picture).save(part, format="PNG")
        tick(1)
