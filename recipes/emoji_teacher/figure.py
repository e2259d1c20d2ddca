"""The README's picture: the teacher, and students of both demos and the bundled one, from the same noise.

make demo
python recipes/emoji_teacher/figure.py runs/demo-4step/student runs/demo/student
"""

import sys
from pathlib import Path

import torch

from stepfold import assets
from stepfold.evaluation.measure import evaluation_noise, student_sampler, teacher_sampler
from stepfold.evaluation.preview import sample_rows, save_grid
from stepfold.evaluation.protocol import EMOJI
from stepfold.sections import TeacherSettings
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_teacher

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "teacher_student.png"
GUIDANCE = 3.0
PROMPTS = [
    "red heart on white background",
    "pizza on blue background",
    "fox on green background",
    "rocket on black background",
    "snowman on pink background",
    "mushroom on yellow background",
    "teddy bear on orange background",
    "tomato on gray background",
    "butterfly on purple background",
]


def main(four: str, one: str) -> None:
    """Draws the picture; `four` and `one` are the folders of the demos' students."""
    teacher = load_teacher(TeacherSettings(source="emoji", max_tokens=32), "cpu")
    samplers = {"teacher, 20 steps": teacher_sampler(teacher, 20)}
    for name, folder, steps in (("demo-4step", four, 4), ("demo", one, 1), ("emoji-long", assets.STUDENT, 1)):
        _, student, card = load_student(Path(folder), "cpu")
        label = f"{name}, {steps} step" + "s" * (steps > 1)
        samplers[label] = student_sampler(student, card.recipe, steps, EMOJI.seed)
    noise = evaluation_noise(EMOJI.seed, range(len(PROMPTS)), teacher, torch.device("cpu"))
    latents = sample_rows(samplers, noise, teacher.encode(PROMPTS), GUIDANCE)
    save_grid({name: teacher.decode(x0) for name, x0 in latents.items()}, PICTURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
