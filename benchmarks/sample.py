"""Latency and images/s of sampling: the student at 1, 2 and 4 steps, the teacher at 20 guided ones.

    python benchmarks/sample.py                     the bundled teacher on a CPU, a minute

Each picture goes through text encoder, transformer and decoder, which are timed apart; all parts take turns. The
student has not been trained, since weights do not matter to time. Both branches of a guided teacher call are one batch.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Run, Timing, console, make_parser, open_record, show, take_turns, write_record
from models import SIZES, make_place, open_teacher

from stepfold.evaluation.measure import Sampler, student_sampler, teacher_sampler
from stepfold.randomness import normal
from stepfold.sampling.recipe import Recipe, times_of
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.precision import walk_precision

TEACHER_STEPS, STUDENT_STEPS = 20, (1, 2, 4)
TEACHER = f"teacher {TEACHER_STEPS}"


def parts_of(teacher: SanaTeacher, samplers: dict[str, Sampler], prompts: list[str], dtype: str) -> dict[str, Run]:
    """What there is to time for a batch of prompts: `text`, `decoder`, and a transformer part for every sampler."""
    device, count, precision = teacher.device, len(prompts), "bf16" if dtype == "bfloat16" else "no"
    condition = teacher.encode(prompts)
    noise = teacher.sigma_data * torch.stack([normal(teacher.latent_shape, 0, "noise", i) for i in range(count)])
    noise, guidance = noise.to(device), torch.full((count,), teacher.default_guidance, device=device)

    def text(turn: int, stages: object) -> None:
        with walk_precision(precision, device, teacher.network):
            teacher.encode(prompts)

    def decoder(turn: int, stages: object) -> None:
        with walk_precision(precision, device, teacher.network):
            teacher.decode(noise)

    def transformer(sampler: Sampler) -> Run:
        def run(turn: int, stages: object) -> None:
            with torch.no_grad(), walk_precision(precision, device, teacher.network):
                sampler(noise, condition, guidance, range(count))

        return run

    return {"text": text, "decoder": decoder} | {name: transformer(sampler) for name, sampler in samplers.items()}


def rows_of(timings: dict[str, Timing], batch: int) -> dict[str, dict[str, Any]]:
    """By sampler: seconds of the parts and of the whole, images/s, shares, and how much faster than the teacher."""
    text, decoder = timings["text"].median, timings["decoder"].median
    samplers = [name for name in timings if name not in ("text", "decoder")]
    whole = {name: text + timings[name].median + decoder for name in samplers}
    return {
        name: {
            "text_sec": text,
            "transformer_sec": timings[name].median,
            "decoder_sec": decoder,
            "whole_sec": whole[name],
            "images_per_sec": batch / whole[name],
            "transformer_images_per_sec": batch / timings[name].median,
            "decoder_share": decoder / whole[name],
            "times_as_fast_as_teacher": {
                "transformer": timings[TEACHER].ratio(timings[name])["median"],
                "whole": whole[TEACHER] / whole[name],
            },
        }
        for name in samplers
    }


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints and writes."""
    parser = make_parser(__doc__, "sample", device=True)
    add = parser.add_argument
    add("--size", choices=SIZES, default="emoji", help="emoji is the bundled teacher; the sana sizes want a GPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast (float32)")
    add("--batches", type=int, nargs="+", default=[1, 16], help="pictures at once (1 16)")
    add("--rounds", type=int, default=7, help="turns that count (7)")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    record = open_record("sample", argv, device)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(args.size, args.device, Path(folder))
        teacher = open_teacher(place, with_encoders=True)
        teacher.black_latent(teacher.latent_shape)  # the autoencoder is on the device now
        torch.manual_seed(0)
        student = new_student(teacher).eval()
        recipe = Recipe(
            sampler="consistency", times=times_of(teacher, "consistency"), taught=(1.0,), guidance=1.0,
            sigma_data=teacher.sigma_data,
        )  # fmt: skip
        samplers = {f"student {k}": student_sampler(student, recipe, k, 0) for k in STUDENT_STEPS}
        samplers[TEACHER] = teacher_sampler(teacher, TEACHER_STEPS)
        for batch in args.batches:
            prompts = [place.prompts.prompt(i % len(place.prompts)) for i in range(batch)]
            timings = take_turns(parts_of(teacher, samplers, prompts, args.dtype), args.rounds, device)
            results[str(batch)] = rows_of(timings, batch)

    head = ["", "text", "transformer", "decoder", "whole", "images/s", "decoder's share"]
    for batch, rows in results.items():
        lines = []
        for name, row in rows.items():
            parts = [f"{1e3 * row[f'{part}_sec']:.1f}" for part in ("text", "transformer", "decoder", "whole")]
            title = f"{name} step{'s' * (name != 'student 1')}"
            lines.append([title, *parts, f"{row['images_per_sec']:.1f}", f"{row['decoder_share']:.0%}"])
        show(f"Batches of {batch}, ms", head, lines)
        faster = rows["student 1"]["times_as_fast_as_teacher"]
        console.print(
            f"student, 1 step against {TEACHER} steps: {faster['transformer']:.1f} x the images/s of the transformer "
            f"part, {faster['whole']:.1f} x of the whole\n",
            soft_wrap=True,
        )
    work = {"size": args.size, "dtype": args.dtype, "rounds": args.rounds}
    record |= {"work": work, "batches": results}
    write_record(args.out, record)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
