"""The page's picture grids: every method beside the teacher, and what the brightness filter keeps and drops."""

from pathlib import Path

import torch

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.evaluation.measure import Sampler, evaluation_noise, student_sampler, teacher_sampler
from stepfold.evaluation.preview import sample_rows, save_grid
from stepfold.maths.filters import darkness
from stepfold.reproduction.experiments import Experiments, Run
from stepfold.reproduction.records import SCORES
from stepfold.reproduction.runs import shown_prompts
from stepfold.spaces.generation import walk
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_teacher
from stepfold.training.draws import draw_route

NUM_SHOWN = 10
LARGEST_STEPS = 20  # of the teacher, the reference


def draw_grids(experiments: Experiments, runs: list[Run], folder: Path, root: Path, display: Display) -> None:
    """Figs. 6, 11 and 12: `folder/grid_METHODS_at_K_steps.png`, seed 0 of the first table's rows at 1, 2 and 4 steps.

    Only rows whose runs have scores are in it. Nothing is drawn without any, nor where a student is on another machine.
    """
    first = next(iter(experiments.tables))
    done = [run for run in runs if (run.table, run.config.seed) == (first, 0) and (root / run.name / SCORES).exists()]
    students = {run.row: root / run.name / "student" for run in done}
    if not students or not all(student.is_dir() for student in students.values()):
        return
    display.note(f"drawing {len(students)} students' pictures")
    teacher = load_teacher(load_config(experiments.preset).teacher, "cpu")
    condition = teacher.encode(shown_prompts(NUM_SHOWN))
    noise = evaluation_noise(0, range(NUM_SHOWN), teacher, teacher.device)
    reference: dict[str, Sampler] = {f"teacher, {LARGEST_STEPS} steps": teacher_sampler(teacher, LARGEST_STEPS)}
    loaded = {row: load_student(student, "cpu")[1:] for row, student in students.items()}
    for steps in (1, 2, 4):
        samplers = reference | {
            row: student_sampler(network, card.recipe, steps, 0) for row, (network, card) in loaded.items()
        }
        latents = sample_rows(samplers, noise, condition, teacher.default_guidance)
        name = f"grid_methods_at_{steps}_step{'s' * (steps > 1)}.png"
        save_grid({row: teacher.decode(x0) for row, x0 in latents.items()}, folder / name)


def draw_filter_examples(experiments: Experiments, folder: Path, display: Display) -> None:
    """Fig. 10: `folder/grid_the_brightness_filter.png`, ends of walks: the nearest to black, the farthest."""
    display.note("drawing what the brightness filter sees")
    config = load_config(experiments.preset)
    teacher = load_teacher(config.teacher, "cpu")
    condition = teacher.encode(shown_prompts(experiments.walks))
    noise = evaluation_noise(0, range(experiments.walks), teacher, teacher.device)
    guidance = torch.full((experiments.walks,), teacher.default_guidance)
    route = draw_route(config.space, 0, 0, 0, teacher.sigma_data).expand(experiments.walks, -1)
    x0 = walk(teacher.velocity, noise, route, condition, guidance).x0
    order = darkness(x0, teacher.black_latent(teacher.latent_shape), teacher.sigma_data).argsort()
    rows = {"dropped first": x0[order[:NUM_SHOWN]], "kept": x0[order[-NUM_SHOWN:]]}
    pictures = {name: teacher.decode(part) for name, part in rows.items()}
    save_grid(pictures, folder / "grid_the_brightness_filter.png")
