"""A distillation step of ours against today's practice: time, peak memory, forward units.

    python benchmarks/step.py                                           the bundled teacher on a CPU, some minutes
    python benchmarks/step.py --size sana-0.6b --device cuda --dtype bfloat16 --prompts 4 --peak-tflops 989
    python benchmarks/step.py --maps                                    objectives with a target time beside TBCM
    python benchmarks/step.py --scores                                  methods with a fake score, counted

Practice is written down in benchmarks/practice.py. Ours is what the package runs, with conditions from a cache. Both
work on one model, from the same noise, routes and prompts, in the same dtype, with the same optimiser and moving
average; first all parameter gradients are compared in float32, and nothing is timed if they differ. Then the steps take
turns.

With several prompts there is a row with a backward pass for each walk (training.micro_batch): the same gradient in
less memory. Beside the rows of equal dtype there are those of our best settings, against practice in float32. A forward
unit is a plain forward pass without a graph, of the same pairs and in the row's own dtype. The floor is 2 units of the
teacher and 4 of the student, 5 where blocks are recomputed. Peak memory is that of a process of its own: the whole, and
what is above python and its libraries. On a CPU both sides keep freed memory, as `stepfold distill` does.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    PeakMemory,
    Run,
    Timing,
    console,
    in_child,
    make_parser,
    open_record,
    show,
    take_turns,
    write_record,
)
from map_rows import measure_maps
from models import SIZES, make_place
from score_rows import count_scores
from step_rows import (
    STUDENT_UNITS,
    TEACHER_UNITS,
    Bench,
    Row,
    Work,
    example_pairs,
    forward_of,
    gradient_of,
    open_bench,
    settings,
    step_of,
    unit_name,
)
from torch.utils.flop_counter import FlopCounterMode

from stepfold.maths.tangent import BACKENDS
from stepfold.spaces.records import pairs_per_prompt
from stepfold.training.choices import choose_tangent, full_float32, has_bf16
from stepfold.training.stages import Stages

AGREEMENT = 1e-3
CHECKED_PAIRS = 8  # in one backward pass of the comparison of gradients, which is in float32 and keeps all activations
MEMORY_STEPS = 3


def gradients(bench: Bench, row: Row) -> dict[str, torch.Tensor]:
    """Of every parameter, for the first step's pairs; in parts, which changes nothing but the memory.

    Of a compiled row the parts are walks: what is checked is the code that is timed.
    """
    most = bench.work.states - 1 if row.compiled else CHECKED_PAIRS
    small = replace(bench.work, micro_batch=min(bench.work.micro_batch or most, most))
    parts = replace(bench, work=small)
    bench.student.zero_grad(set_to_none=True)
    with full_float32():
        gradient_of(parts, row)(0, Stages())
    found = {name: p.grad for name, p in bench.student.named_parameters() if p.grad is not None}
    bench.student.zero_grad(set_to_none=True)
    return found


def compare_gradients(bench: Bench, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """row -> how far its gradients are from those of practice in float32, relative to them.

    `all` is over all parameters at once; `worst` is the worst single parameter's, relative to its own gradient or, if
    that is nearly zero, to a thousandth of the whole.
    """
    reference = gradients(bench, Row("float32"))
    norm = total_norm(reference.values())
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        ours = gradients(bench, row)
        if ours.keys() != reference.keys():
            raise SystemExit(f"{row.name}: other parameters have a gradient than in practice")
        apart = {name: ours[name] - theirs for name, theirs in reference.items()}
        each = {
            name: float(apart[name].norm() / theirs.norm().clamp(min=1e-3 * norm)) for name, theirs in reference.items()
        }
        worst = max(each, key=lambda name: each[name])
        found[row.name] = {
            "dtype": row.dtype, "all": total_norm(apart.values()) / norm, "worst": each[worst],
            "worst_parameter": worst, "parameters": len(each),
        }  # fmt: skip
    return found


def total_norm(values: Any) -> float:
    """Of many tensors taken as one."""
    return float(torch.stack([value.float().norm() for value in values]).norm())


def must_agree(found: dict[str, dict[str, Any]]) -> None:
    """Prints how far gradients are apart, and refuses to go on if a float32 one is off.

    In bfloat16 rounding is larger than any fault worth finding; there practice's own distance is beside ours.
    """
    show(
        "Gradients against those of practice in float32, relative difference",
        ["", "over all parameters", "worst parameter"],
        [[name, f"{apart['all']:.1e}", f"{apart['worst']:.1e}"] for name, apart in found.items()],
    )
    for name, apart in found.items():
        if apart["dtype"] == "float32" and not apart["worst"] <= AGREEMENT:
            raise SystemExit(
                f"{name}: the gradient of {apart['worst_parameter']} is {apart['worst']:.1e} off, more than "
                f"{AGREEMENT}; there is nothing to time"
            )


def fits(step: Run, name: str, device: torch.device) -> bool:
    """Whether a GPU has the memory for a step, which is tried."""
    try:
        step(0, Stages())
    except torch.OutOfMemoryError:
        console.print(f"{name}: not in this device's memory, left out")
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def step_memory(work: Work, row: Row) -> dict[str, float]:
    """Peak memory of a row's steps; to be called in a child."""
    memory = PeakMemory(torch.device(work.place.device))
    step = step_of(open_bench(work, (row.side,)), row)
    memory.start()
    for turn in range(MEMORY_STEPS):
        step(turn, Stages())
    return memory.read()


def result_of(row: Row, timings: dict[str, Timing], memory: dict[str, dict[str, float]], flops: int) -> dict[str, Any]:
    """A row's numbers, and their ratios to practice in its own dtype."""
    timing = timings[row.name]
    units = timing.ratio(timings[unit_name(row.dtype)])["median"]
    result = asdict(row) | {
        "sec": timing.median,
        "sec_of_turns": timing.seconds,
        "stages_sec": timing.by_stage(),
        "forward_units": units,
        "floor_units": row.floor,
        "share_of_floor": row.floor / units,
        "model_tflops_per_sec": (TEACHER_UNITS + STUDENT_UNITS) * flops / timing.median / 1e12,  # nothing twice
        "memory": memory.get(row.name),
    }
    if row.practice in timings:
        result["against_practice"] = against(row.name, row.practice, timings, memory)
    return result


def against(name: str, other: str, timings: dict[str, Timing], memory: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios of one row to another."""
    ratios: dict[str, Any] = {"row": other, "time": timings[name].ratio(timings[other])}
    if name in memory and other in memory:
        ratios["memory"] = {key: memory[name][key] / memory[other][key] for key in ("peak_gib", "above_gib")}
    return ratios


def show_results(results: dict[str, dict[str, Any]], best: list[dict[str, Any]], pairs: int) -> None:
    """Prints the tables."""

    def line(name: str, result: dict[str, Any], ratios: dict[str, Any]) -> list[str]:
        memory, shares = result["memory"], ratios.get("memory")
        return [
            name,
            f"{1e3 * result['sec']:.1f}",
            f"{ratios['time']['median']:.2f} ({ratios['time']['lowest']:.2f}-{ratios['time']['highest']:.2f})",
            f"{result['forward_units']:.2f}",
            f"{result['share_of_floor']:.0%} of {result['floor_units']}",
            f"{memory['peak_gib']:.2f}" if memory else "-",
            f"{memory['above_gib']:.2f}" if memory else "-",
            f"{shares['above_gib']:.2f} ({shares['peak_gib']:.2f})" if shares else "-",
        ]

    lines = [
        line(name, result, result["against_practice"])
        for name, result in results.items()
        if "against_practice" in result
    ]
    for each in best:
        lines.append(line(f"best setting: {each['row']}*", results[each["row"]], each["against"]))
    head = ["", "ms", "against practice", "units a pair", "floor", "peak GiB", "above libraries", "against practice"]
    show(f"A step of {pairs} pairs", head, lines)
    if best:
        console.print(
            f"* against {best[0]['against']['row']}; the other rows are against practice in their own dtype\n"
        )
    stages = list(dict.fromkeys(stage for result in results.values() for stage in result["stages_sec"]))
    cells = [[name, *(f"{1e3 * r['stages_sec'].get(s, 0):.1f}" for s in stages)] for name, r in results.items()]
    renamed = {"student forward": "tangent + forward", "student backward": "backward"}
    show("Its stages, ms", ["", *[renamed.get(stage) or stage for stage in stages]], cells)


def parse(argv: Sequence[str]) -> Any:
    """The options."""
    parser = make_parser(__doc__, "step", device=True)
    add = parser.add_argument
    add("--size", choices=SIZES, default="emoji", help="emoji is the bundled teacher; the sana sizes want a GPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast, for both sides (float32)")
    add("--prompts", type=int, default=1, help="walks a step (1)")
    add("--states", type=int, default=16, help="states a walk; one less is trained on (16)")
    add("--rounds", type=int, default=7, help="turns that count (7)")
    add("--micro-batch", type=int, default=0, help="pairs a backward pass, for both sides; 0 for all at once (0)")
    add(
        "--backend", choices=("auto", *BACKENDS), default="auto",
        help="our tangent; auto is what training.tangent=auto chooses here. block is measured beside it",
    )  # fmt: skip
    add(
        "--best", choices=("one_pass", "compiled", "none"), default="one_pass",
        help="our best settings: bfloat16 and one_pass, or that compiled (minutes more), or none (one_pass)",
    )  # fmt: skip
    add("--compile", action="store_true", help="rows with compiled blocks beside the others (minutes more)")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="of our rows, those with one of these in their name")
    add("--maps", action="store_true", help="what a pair costs with each objective that has a target time; float32")
    add("--scores", action="store_true", help="forward passes of a step with a fake score, counted; float32")
    add("--no-memory", action="store_true", help="leave the children out that measure peak memory")
    add("--peak-tflops", type=float, help="of the device in --dtype (H200, bfloat16, dense: 989): gives utilisation")
    args = parser.parse_args(argv)
    if args.states < 2 or min(args.prompts, args.rounds) < 1:
        parser.error("--states must be at least 2, --prompts and --rounds at least 1")
    return args


def planned_rows(args: Any, backend: str) -> tuple[list[Row], list[Row]]:
    """The rows of equal dtype, then what our best settings need; and the best settings, the fastest first."""
    rows = [Row(args.dtype)]
    for fast in (False, True)[: 1 + args.compile]:
        rows += [Row(args.dtype, backend, fast), Row(args.dtype, "block", fast)]
        if args.prompts > 1:
            rows += [Row(args.dtype, backend, fast, walks=True), Row(args.dtype, "block", fast, walks=True)]
    best = []
    if args.best != "none":
        dtype = "bfloat16" if has_bf16(torch.device(args.device)) else "float32"
        fast = args.best == "compiled"
        best = [Row(dtype, "one_pass", fast)]
        if args.prompts > 1:
            best += [Row(dtype, "one_pass", fast, walks=True), Row(dtype, "block", fast, walks=True)]
        rows += [Row("float32"), *best]
    wanted = [row for row in rows if not row.backend or any(text in row.name for text in args.only)]
    return list(dict.fromkeys(wanted)), [row for row in best if row in wanted]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints and writes."""
    args = parse(argv)
    device = torch.device(args.device)
    record = open_record("step", argv, device)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(make_place(args.size, args.device, Path(folder)), args.prompts, args.states, args.micro_batch)
        if args.scores:
            record |= {"scores": {name: asdict(each) for name, each in count_scores(work, args.only).items()}}
            write_record(args.out, record)
            return record
        if args.maps:
            costs = measure_maps(work, "one_pass" if args.backend == "auto" else args.backend, args.rounds)
            record |= {"maps": {name: asdict(cost) for name, cost in costs.items()}}
            write_record(args.out, record)
            return record
        bench = open_bench(work, ("practice", "ours"))
        config = settings(work, args.dtype)
        condition = bench.cache.rows([0]).to(device, bench.teacher.dtype)
        backend, reason = args.backend, "as asked for"
        if backend == "auto":
            choice = choose_tangent(config, bench.student, condition, bench.teacher.latent_shape)
            backend, reason = choice.backend, choice.reason
        console.print(f"our tangent: {backend} ({reason})", soft_wrap=True)
        rows, best = planned_rows(args, backend)

        exact = [replace(row, dtype="float32") for row in rows if row.backend]
        rounded = [row for row in rows if row.dtype != "float32"]
        rounded += [replace(row, backend="", compiled=False) for row in rounded]
        apart = compare_gradients(bench, list(dict.fromkeys([*exact, *rounded])))
        must_agree(apart)

        pairs = example_pairs(bench)
        rows = [row for row in rows if fits(step_of(bench, row), row.name, device)]
        best = [row for row in best if row in rows]
        runs = {row.name: step_of(bench, row) for row in rows}
        runs |= {unit_name(dtype): forward_of(bench, pairs, dtype) for dtype in {row.dtype for row in rows}}
        with FlopCounterMode(display=False) as counter:
            forward_of(bench, pairs, "float32")(0, Stages())
        timings = take_turns(runs, args.rounds, device)
        flops = counter.get_total_flops()
        record |= {
            "work": {
                "size": args.size, "dtype": args.dtype, "prompts": work.prompts, "states": work.states,
                "pairs": work.prompts * pairs_per_prompt(config.space.route_steps, config.space.keep_first),
                "micro_batch": work.micro_batch, "rounds": args.rounds,
            },
            "tangent": {"backend": backend, "reason": reason},
            "gradients": apart,
            "forward_sec": {name: timings[name].median for name in timings if name.startswith("plain forward")},
            "forward_tflop": flops / 1e12,
        }  # fmt: skip
        report(record, rows, best, timings, {}, flops, args)  # already, since memory takes a while
        if not args.no_memory:
            del bench, runs, condition, pairs
            if device.type == "cuda":
                torch.cuda.empty_cache()
            memory = {row.name: in_child(step_memory, work, row) for row in rows}
            report(record, rows, best, timings, memory, flops, args)
    return record


def report(
    record: dict[str, Any],
    rows: list[Row],
    best: list[Row],
    timings: dict[str, Timing],
    memory: dict[str, dict[str, float]],
    flops: int,
    args: Any,
) -> None:
    """Prints what was measured, adds it to the record and writes that."""
    results = {row.name: result_of(row, timings, memory, flops) for row in rows}
    if args.peak_tflops:
        for row in rows:
            if row.dtype == args.dtype:
                results[row.name]["utilisation"] = results[row.name]["model_tflops_per_sec"] / args.peak_tflops
                console.print(f"{row.name}: {results[row.name]['utilisation']:.1%} of the device's peak")
    against_float32 = [
        {"row": row.name, "against": against(row.name, Row("float32").name, timings, memory)} for row in best
    ]
    show_results(results, against_float32, record["work"]["pairs"])
    record |= {"rows": results, "best_settings": against_float32}
    write_record(args.out, record)


if __name__ == "__main__":
    main(sys.argv[1:])
