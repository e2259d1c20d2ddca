"""Peak memory of training against batch size: sCM with its VAE, sCM on cached latents, Sana-Sprint, TBCM.

    python benchmarks/memory.py                                the bundled teacher, some minutes
    python benchmarks/memory.py --size sana-0.6b --count       by count: no GPU, no weights (see counting.py)
    python benchmarks/memory.py --count --presets flux --set teacher.quantise=nf4    flux-lora-4step, by count
    python benchmarks/memory.py --count --encoders     text encoders by teacher.quantise_encoders, by count
    python benchmarks/memory.py --size flux --count --scores --few-blocks    methods with a fake score, by count

The methods are those of table T3 of `stepfold reproduce`. The batch size counts TBCM's prompts; the others, whose
images are noised to one time each, get as many images as that makes pairs. Each number is the peak of a process of its
own that takes some steps of `stepfold distill`'s loop, without previews: the whole, and what is above python and its
libraries. The pictures are noise, which takes the memory that pictures take. The last rows are ours as it is meant to
be used: no text encoder and no VAE in memory, and a few pairs a backward pass.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from common import PeakMemory, console, in_child, make_parser, open_record, show, training_device, write_record
from counting import count_few, count_step
from counting_presets import count_encoder, count_preset, count_weights
from models import COUNTED, Place, make_place, open_teacher
from shapes import ENCODERS, SHAPES
from torch import Tensor

from stepfold.config import Config
from stepfold.display import Display
from stepfold.images.reading import ImageFolder
from stepfold.reproduction.experiments import IMAGES, load_experiments, make_run
from stepfold.reproduction.figures import draw_memory
from stepfold.spaces.records import pairs_per_prompt
from stepfold.students.starting import make_fake, make_student
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.distill import distill
from stepfold.training.latents import cached_blacks, image_latents
from stepfold.training.opening import open_run

TABLE = "T3"
ENCODED = "TBCM, conditions from a cache"
IN_PARTS = f"{ENCODED}, in parts"
METHODS = {
    "sCM with its VAE": "sCM over images",
    "sCM on cached latents": "sCM over images, latents encoded before",
    "Sana-Sprint": "Sana-Sprint",
    "TBCM": "TBCM",
    ENCODED: "TBCM",
    IN_PARTS: "TBCM",
}
"""Ours -> the row of T3 that it is."""
PART = 5  # pairs a backward pass, of the last one
RANK = 64
MATCHING = (
    "objective=matching", "space.kind=rollout", "rollout.steps=4", "fake.updates=5", "space.filter_rule=off",
    f"fake.rank={RANK}", "fake.head_start=0",
)  # fmt: skip
SCORES: dict[str, tuple[str, ...]] = {
    "TBCM, LoRA student": (f"student.lora={RANK}",),
    "TBCM, whole student": (),
    "dmd, LoRA student, LoRA fake score": (*MATCHING, f"student.lora={RANK}"),
    "dmd, whole student, LoRA fake score": MATCHING,
    "dmd, whole student, whole fake score": (*MATCHING, "fake.kind=whole"),
    "rcm, LoRA student, LoRA fake score": (f"student.lora={RANK}", "matching.weight=0.02", "rollout.steps=4",
                                           "fake.updates=4", f"fake.rank={RANK}", "fake.head_start=0"),
}  # fmt: skip
"""Methods with a fake score, and what they are compared with -> settings that differ from TBCM's in T3."""


class Pictures:
    """Noise in place of a folder of images."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int, height: int, width: int) -> Tensor:
        """As `ImageFolder`'s."""
        return torch.rand(3, height, width)


def settings(place: Place, method: str, prompts: int, steps: int, changes: Sequence[str]) -> Config:
    """T3's, with as many pairs as TBCM makes of so many prompts."""
    experiments = load_experiments()

    def config_of(row: str, *more: str) -> Config:
        given = [change.replace(IMAGES, "pictures") for change in experiments.tables[TABLE].rows[row]]
        return make_run(experiments, TABLE, row, (*given, *changes, *more)).config

    row, own = METHODS.get(method, "TBCM"), SCORES.get(method, ())
    ours, config = config_of("TBCM"), config_of(row, *own)
    count = prompts * per_prompt(ours) // per_prompt(config)
    parts = [f"training.micro_batch={PART}"] if method == IN_PARTS else []
    config = config_of(row, *own, f"training.prompts_per_step={count}", f"training.steps={steps}", *parts)
    teacher = place.teacher.model_copy(update={"dtype": config.teacher.dtype})
    texts = None if config.space.images else str(place.folder / "prompts.txt")
    return choose_precision(config.model_copy(update={"teacher": teacher, "prompts": texts}))


def per_prompt(config: Config) -> int:
    """Pairs of a prompt or an image."""
    return pairs_per_prompt(config.space.route_steps, config.space.keep_first)


def method_memory(place: Place, config: Config, cached: bool) -> dict[str, float]:
    """Peak memory of a method's training, as `run_distill` sets it up; to be called in a child."""
    memory, peaks = PeakMemory(torch.device(place.device)), []
    accelerator = make_accelerator(config.training.precision)
    cache = place.cache if cached else None
    teacher = open_teacher(place, with_encoders=not cached, dtype=getattr(torch, config.teacher.dtype))
    device, prompts = teacher.device, place.prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        open_run(folder, config, resume=False)
        blacks = [cache.black.to(device)] if cache else cached_blacks(folder, teacher)
        latents = None
        if "images" in config.space.weights:
            pictures = cast(ImageFolder, Pictures(len(prompts)))
            latents = image_latents(folder, teacher, pictures, config.space.cache_latents, Display(quiet=True))
        if latents is None or config.space.cache_latents:
            teacher.release_decoder()
        student = make_student(teacher, config.student, config.teacher)
        memory.start()
        distill(
            config, folder, teacher, student, prompts, blacks, accelerator, latents=latents,
            conditions=(lambda index: cache.rows(index).to(device, teacher.work_dtype)) if cache else None,
            report=lambda progress: peaks.append(memory.read()), make_fake=lambda: make_fake(teacher, config.fake),
        )  # fmt: skip
    return peaks[-1]  # before the checkpoint is written


def draw(records: dict[str, list[dict[str, Any]]], out: Path, what: str) -> None:
    """The figure, as svg and png beside the json file; above the libraries, which no GPU holds either."""
    rows = {
        f"{method}; {record['pairs_per_step']}": [record | {"peak_memory_gib": record["above_gib"]}]
        for method, of in records.items()
        for record in of
    }
    figure = draw_memory(rows)
    figure.axes[0].set_ylabel(f"peak {what}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=120)


def count_presets(families: Sequence[str], changes: Sequence[str], weights_only: bool) -> list[dict[str, Any]]:
    """A row for each FAMILY-lora-4step: its weights by `teacher.quantise`, its LoRA, and a step of it."""
    rows = []
    for family in families:
        rows.append({"preset": f"{family}-lora-4step", **count_weights(family)})
        rows[-1] |= {} if weights_only else count_preset(family, changes)
        console.print(rows[-1])
    return rows


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints, draws and writes."""
    parser = make_parser(__doc__, "memory", device=False)
    add = parser.add_argument
    add("--size", choices=COUNTED, default="emoji", help="emoji is the bundled teacher; flux is for --count")
    add("--prompts", type=int, nargs="+", default=[1, 2, 4, 8], help="TBCM's prompts a step (1 2 4 8)")
    add(
        "--methods",
        nargs="+",
        choices=(*METHODS, *SCORES),
        default=list(METHODS),
        metavar="METHOD",
        help="some of them",
    )
    add("--steps", type=int, default=3, help="steps a process (3)")
    add("--count", action="store_true", help="add up the bytes of a step's tensors instead, on this machine")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that differs from T3's")
    add("--presets", nargs="+", choices=SHAPES, default=[], help="with --count: families of presets FAMILY-lora-4step")
    add("--encoders", action="store_true", help="with --count: text encoders, their weights alone")
    add("--weights-only", action="store_true", help="with --presets: no step")
    add("--scores", action="store_true", help="methods with a fake score instead; with --count")
    add("--few-blocks", action="store_true", help="with --count: on few of the equal blocks, the rest as those")
    args = parser.parse_args(argv)
    if args.encoders:
        record = open_record("memory", argv, torch.device("cpu"))
        record |= {"counted": True, "rows": [{"encoder": name, **count_encoder(name)} for name in ENCODERS]}
        console.print(record["rows"])
        write_record(args.out, record)
        return record
    if args.presets:
        record = open_record("memory", argv, torch.device("cpu"))
        record |= {"set": args.set, "counted": True, "rows": count_presets(args.presets, args.set, args.weights_only)}
        write_record(args.out, record)
        return record
    if args.scores:
        args.methods = [name for name in SCORES if name in args.methods] or list(SCORES)
    if (args.size == "flux" or args.scores) and not args.count:
        parser.error("--scores and --size flux are counted: add --count")
    if args.count and args.size == "emoji":
        parser.error("--count takes a shape of Sana: add --size tiny, sana-0.6b or sana-1.6b")

    device = training_device()
    record = open_record("memory", argv, device)
    records: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    work = {"size": args.size, "steps": 1 if args.count else args.steps, "set": args.set, "counted": args.count}
    record |= {"work": work, "rows": records}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(args.size, device.type, Path(folder))
        if not args.count:
            make_place(args.size, device.type, Path(folder))
        for prompts in args.prompts:
            for method, rows in records.items():
                config = settings(place, method, prompts, args.steps, args.set)
                pairs = config.training.prompts_per_step * per_prompt(config)
                cached = method in (ENCODED, IN_PARTS, *SCORES)
                try:
                    peak = (
                        (count_few if args.few_blocks else count_step)(args.size, config, cached)
                        if args.count
                        else in_child(method_memory, place, config, cached)
                    )
                except torch.OutOfMemoryError:
                    console.print(f"{method}, {pairs} pairs: not in this device's memory")
                    continue
                rows.append({"prompts": prompts, "pairs_per_step": pairs, **peak})
                write_record(args.out, record)  # already, since the next one takes a while

    counts = list(dict.fromkeys(row["pairs_per_step"] for rows in records.values() for row in rows))
    lines = []
    for method, rows in records.items():
        more = [f" ({row['between_steps_gib' if args.count else 'peak_gib']:.2f})" for row in rows]
        cells = {row["pairs_per_step"]: f"{row['above_gib']:.2f}{after}" for row, after in zip(rows, more, strict=True)}
        lines.append([method, *(cells.get(count, "-") for count in counts)])
    what = "GiB by count" if args.count else "GiB above the libraries"
    head = [f"{what} ({'between steps' if args.count else 'in all'})", *(f"{count} pairs" for count in counts)]
    show("Peak memory while training", head, lines)
    draw(records, args.out, what)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
