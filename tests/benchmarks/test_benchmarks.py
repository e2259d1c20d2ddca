"""The benchmarks at tiny size: they run, their numbers are there, and a wrong gradient is not timed."""

import copy
import ctypes
import importlib
import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepfold import assets
from stepfold.config import load_config
from stepfold.evaluation.judge import load_judge, text_features
from stepfold.export.pipeline import save_student
from stepfold.sampling.recipe import make_recipe
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_can_be_imported() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    """The json file that a benchmark writes at tiny size."""
    path = out / f"{name}.json"
    importlib.import_module(name).main(["--size", "tiny", "--out", str(path), *options])
    record = json.loads(path.read_text())
    assert record["command"].startswith(f"python benchmarks/{name}.py --size tiny")
    assert set(record["machine"]) == {"cpu", "cores", "threads", "memory_gib", "gpu", "load_average"}
    assert {"torch", "diffusers", "python", "stepfold"} <= set(record["versions"])
    return record


@pytest.mark.long
def test_step_compares_equal_gradients(tmp_path: Path) -> None:
    record = run("step", tmp_path, "--rounds", "1", "--states", "3", "--best", "none")
    assert record["work"]["pairs"] == 2
    assert record["tangent"]["backend"] == "one_pass"
    ours = ["ours, one_pass, float32", "ours, block, float32"]
    assert list(record["rows"]) == ["practice, float32", *ours]
    assert list(record["gradients"]) == ours
    for apart in record["gradients"].values():
        assert 0 < apart["all"] <= apart["worst"] < 1e-5
        assert apart["parameters"] > 50
    stages = {"data", "text", "teacher", "student forward", "student backward", "optimiser"}
    for row in record["rows"].values():
        assert set(row["stages_sec"]) == stages
        assert sum(row["stages_sec"].values()) <= row["sec"]
        assert row["share_of_floor"] == pytest.approx(row["floor_units"] / row["forward_units"])
        assert 0 < row["memory"]["above_gib"] < row["memory"]["peak_gib"]
        assert {"time", "memory"} <= set(row["against_practice"])
    assert [row["floor_units"] for row in record["rows"].values()] == [7, 6, 7]


def test_step_refuses_to_time_another_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    practice = importlib.import_module("practice")
    losses = practice.pair_losses

    def slightly_more(*args: Any) -> Tensor:
        return 1.01 * losses(*args)

    monkeypatch.setattr(practice, "pair_losses", slightly_more)
    with pytest.raises(SystemExit, match="nothing to time"):
        run("step", tmp_path, "--rounds", "1", "--states", "3", "--best", "none", "--no-memory")
    assert not list(tmp_path.iterdir())


def test_practice_computes_everything_at_every_call(tiny_sana: Path) -> None:
    """The package's shortcuts are on the teacher's own transformer and not on practice's."""
    without_shortcuts = importlib.import_module("practice").without_shortcuts
    transformer = SanaTeacher(tiny_sana).transformer
    plain = without_shortcuts(copy.deepcopy(transformer))
    assert not [module for module in plain.modules() if "forward" in module.__dict__]
    weights, theirs = next(plain.caption_projection.parameters()), next(transformer.caption_projection.parameters())
    assert weights.data_ptr() != theirs.data_ptr()
    weights.add_(1)
    embeds = torch.randn(1, 3, transformer.config.caption_channels)
    assert not torch.equal(plain.caption_projection(embeds), transformer.caption_projection(embeds))


@pytest.mark.parametrize(("name", "moves"), [("lcm", [1, 1, 1]), ("sana-sprint", [1, 0, 1]), ("dmd2", [1, 0, 0])])
def test_a_peers_student_moves_when_it_is_its_turn(name: str, moves: list[int], tiny_sana: Path) -> None:
    """Sana-Sprint's student and heads take turns; DMD2's fake score learns in each step, its student in each fifth."""
    practice = importlib.import_module("practice")
    torch.manual_seed(0)
    teacher, generator = SanaTeacher(tiny_sana), torch.Generator().manual_seed(1)
    peer = practice.PEERS[name](teacher, new_student(teacher), 1e-3)
    x0 = teacher.sigma_data * torch.randn(3, *teacher.latent_shape, generator=generator)
    batch = practice.Clean(x0, teacher.encode(["a fox", "a cat", "a fox"]), torch.full((3,), 4.5), generator)
    students, others = [], []
    for _ in moves:
        students.append(flat(peer.student))
        others.append(flat(getattr(peer, {"lcm": "average", "sana-sprint": "heads", "dmd2": "fake"}[name])))
        peer.update(batch)
    students.append(flat(peer.student))
    changed = [int(not torch.equal(a, b)) for a, b in pairwise(students)]
    assert changed == moves and all(each.isfinite().all() for each in students)
    assert not torch.equal(flat(peer.average), students[0])
    if name == "dmd2":
        assert not torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])
    if name == "sana-sprint":
        assert torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])


def test_lcms_target_is_the_average_after_the_teachers_step(tiny_sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step by hand; at the lowest level the target is where the teacher's step ends, at t = 0."""
    practice = importlib.import_module("practice")
    teacher = SanaTeacher(tiny_sana)
    peer = practice.LCM(teacher, new_student(teacher), 1e-3)
    generator = torch.Generator().manual_seed(2)
    x0 = teacher.sigma_data * torch.randn(2, *teacher.latent_shape, generator=generator)
    batch = practice.Clean(x0, teacher.encode(["a fox", "a cat"]), torch.full((2,), 4.5), generator)
    monkeypatch.setattr(practice.Clean, "uniform", lambda self: torch.tensor([0.0, 0.99]))  # levels 50 and 1 of 50
    noise = teacher.sigma_data * torch.randn(x0.shape, generator=generator)
    monkeypatch.setattr(practice.Clean, "noise", lambda self, sigma_data: noise)
    found: list[Tensor] = []
    monkeypatch.setattr(peer, "move_student", lambda loss: found.append(loss.detach()))
    peer.update(batch)
    t, t_next = (torch.tensor([0.5 * math.pi, math.atan2(1, 49)]), torch.tensor([math.atan2(49, 1), 0.0]))
    wide, later = t.view(-1, 1, 1, 1), t_next.view(-1, 1, 1, 1)
    x = wide.cos() * x0 + wide.sin() * noise
    dxdt = teacher.velocity(x, t, batch.condition, batch.guidance)
    x_next = (wide - later).cos() * x - (wide - later).sin() * dxdt
    with torch.no_grad():
        ours = peer.picture(peer.student, x, t, batch)
        target = torch.cat([peer.picture(peer.average, x_next, t_next, batch)[:1], x_next[1:]])
    expected = (((ours - target) ** 2 + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_time_to_quality_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset's checkpoints and a peer's steps are measured; a row that is there is not run again."""
    bench = importlib.import_module("time_to_quality")
    tiny = ["training.steps=2", "training.prompts_per_step=1", "space.route_steps=2", "training.preview_every=9"]
    options = ["--presets", "demo", "--peers", "lcm", "--n", "2", "--every", "1", "--batch", "2", "--stock", "3"]
    options += ["--minutes", "0.0001", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    options += [part for change in tiny for part in ("--set", change)]
    bench.main([*options, "--fd", "0"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [check["steps"] for check in rows["preset demo"]["checks"]] == [1, 2]
    assert [check["steps"] for check in rows["peer lcm"]["checks"]] == [1]  # its minutes were over
    for row in rows.values():
        assert row["reached"] is None
        for check in row["checks"]:
            assert check["fd"] > 0 <= check["accuracy"] <= 1 and check["sec"] > 0 < check["spent_sec"]
    with pytest.raises(SystemExit):
        bench.main(["--peers", "nobody"])
    for other in ("--fd=0.5", "--lr=1e-3"):  # rows of other settings came out as this command's
        with pytest.raises(
            SystemExit, match=r"has '(preset demo|peer lcm)' with (fd=0.0|lr=0.0004); give another --out"
        ):
            bench.main([*options, "--fd", "0", other])
    monkeypatch.setattr(bench, "of_preset", None)
    monkeypatch.setattr(bench, "of_peer", None)
    bench.main([*options, "--fd", "0"])
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    reached = {"reached": rows["peer lcm"]["checks"][0], "checks": rows["peer lcm"]["checks"]}
    assert bench.words("x", reached)[3] == "1" and bench.words("x", rows["peer lcm"])[3] == "(1)"


def test_the_first_check_with_the_quality_counts() -> None:
    bench = importlib.import_module("time_to_quality")
    setting = bench.Setting(None, None, None, 0.02, 0.85, 1, 0)
    near = [{"fd": 0.021, "accuracy": 0.9}, {"fd": 0.019, "accuracy": 0.84}]
    good = {"fd": 0.02, "accuracy": 0.85}
    assert not any(map(setting.passes, near)) and setting.passes(good)
    assert bench.outcome([*near, good], setting)["reached"] == good and bench.outcome(near, setting)["reached"] is None


def flat(module: Any) -> Tensor:
    """A copy of its weights."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.mark.long
def test_stages_are_those_of_a_step(tmp_path: Path) -> None:
    record = run("stages", tmp_path, "--rounds", "1", "--steps", "1", "--set", "training.prompts_per_step=1")
    assert len(record["rows"]) == 4
    for row in record["rows"].values():
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert {"text", "teacher", "student forward", "student backward", "optimiser"} <= set(row["shares"])
        assert not {"preview", "first preview", "checkpoint", "load"} & set(row["shares"])


@pytest.mark.long
def test_checkpoints_are_timed_in_turns(tmp_path: Path) -> None:
    record = run("checkpoints", tmp_path, "--rounds", "1", "--steps", "2", "--set", "training.prompts_per_step=1")
    assert record["work"]["checkpoint_bytes"] > 1e6
    for name, row in record["rows"].items():
        assert row["sec_waited_for_each"] > 0 and (row["sec_more_for_each"] == 0) == (name == "the last one alone")


@pytest.mark.long
def test_memory_draws_what_it_measured(tmp_path: Path) -> None:
    record = run("memory", tmp_path, "--prompts", "1", "--steps", "1", "--methods", "sCM with its VAE", "TBCM")
    rows = record["rows"]
    assert list(rows) == ["sCM with its VAE", "TBCM"]
    assert [row["pairs_per_step"] for of in rows.values() for row in of] == [15, 15]
    assert all(0 < row["above_gib"] < row["peak_gib"] for of in rows.values() for row in of)
    assert (tmp_path / "memory.svg").stat().st_size > 1000 and (tmp_path / "memory.png").stat().st_size > 1000


def test_bytes_are_counted_while_they_are_there() -> None:
    with importlib.import_module("counting").CountedBytes() as counted:
        a = torch.ones(1000)
        view = a.view(10, 100)[2:]
        assert counted.now == 4000
        b = a.double()
        assert counted.now == counted.peak == 12000
        del a, b
        assert counted.now == 4000  # the view holds all of it
        del view
    assert (counted.now, counted.peak) == (0, 12000)


@pytest.mark.long
def test_weights_of_a_preset_by_count(tmp_path: Path) -> None:
    """Those of Z-Image, as its page has them; a quantised base is smaller by what its blocks save."""
    path = tmp_path / "memory.json"
    given = ["--count", "--weights-only", "--presets", "z-image", "--out", str(path)]
    importlib.import_module("memory").main(given)
    (row,) = json.loads(path.read_text())["rows"]
    rounded = {what: round(row[what], 1) for what in ("none", "int8", "fp8", "nf4", "lora")}
    assert rounded == {"none": 11.5, "int8": 5.8, "fp8": 5.8, "nf4": 3.2, "lora": 3.6}


@pytest.mark.long
def test_text_encoders_by_count() -> None:
    """Each has its published number of parameters, in billions, and its row of the page."""
    counting = importlib.import_module("counting_presets")
    published = {
        "Qwen3 4B": 4.02, "Gemma 2 2B": 2.61, "T5 XXL": 4.76, "UMT5 XXL": 5.68, "Qwen2.5-VL 7B": 8.29,
        "Mistral Small 3 24B": 24.01,
    }  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    for name, parameters in published.items():
        found = counting.count_encoder(name)
        assert found["parameters"] == pytest.approx(parameters, abs=0.006), name
        cells = " | ".join(f"{found[kind]:.1f}" for kind in ("none", "int8", "nf4"))
        assert f"| {name} | {found['parameters']:.2f} billion | {cells} |" in page, name


@pytest.mark.long
def test_memory_by_count(tmp_path: Path) -> None:
    names = ["sCM with its VAE", "TBCM, conditions from a cache", "TBCM, conditions from a cache, in parts"]
    recomputed = ["--set", "training.checkpointing=true"]
    record = run("memory", tmp_path, "--count", "--prompts", "1", "--methods", *names, *recomputed)
    assert record["work"]["counted"]
    images, whole, parts = ((row["peak_gib"], row["between_steps_gib"]) for (row,) in map(record["rows"].get, names))
    models = importlib.import_module("models")
    with torch.device("meta"):
        teacher = models.SanaTransformer2DModel(**models.TRANSFORMERS["tiny"])
        student = models.SanaTransformer2DModel(**models.TRANSFORMERS["tiny"] | {"guidance_embeds": True})
    sizes = [4 * sum(p.numel() for p in network.parameters()) for network in (teacher, student)]
    stays = (sizes[0] + 4 * sizes[1]) / 2**30  # weights, average, AdamW's two moments
    assert whole[1] == parts[1] == pytest.approx(stays, rel=0.02)
    assert parts[0] < 0.7 * whole[0] and whole[1] < images[1] and whole[0] < images[0]


@pytest.mark.long
@pytest.mark.parametrize("method", ["TBCM, conditions from a cache", "dmd, whole student, LoRA fake score"])
def test_a_run_takes_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A real one with numbers, at its peak and between two steps, when nothing but the states may be left."""
    memory, counting = importlib.import_module("memory"), importlib.import_module("counting")
    place = memory.make_place("tiny", "cpu", tmp_path)
    config = memory.settings(place, method, 1, 2, ["training.checkpointing=true"])
    with counting.CountedBytes() as counted:

        class Bytes:
            def __init__(self, device: torch.device) -> None:
                pass

            def start(self) -> None:
                counted.peak = 0

            def read(self) -> dict[str, float]:
                return {"peak_gib": counted.peak / 2**30, "between_steps_gib": counted.now / 2**30}

        monkeypatch.setattr(memory, "PeakMemory", Bytes)
        found = memory.method_memory(place, config, True)
    wanted = counting.count_step("tiny", config, True)
    assert found == {name: pytest.approx(wanted[name], rel=0.05) for name in found}


@pytest.mark.long
def test_a_teachers_call_that_repeats_another_is_counted_as_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a walk keeps the prompt's keys, the second is the first of its kind, and the others repeat."""
    memory, counting = importlib.import_module("memory"), importlib.import_module("counting")
    place = memory.Place("tiny", "cpu", tmp_path)
    few = ["space.route_steps=4", "objective=velocity", "training.micro_batch=1"]
    config = memory.settings(place, memory.ENCODED, 1, 2, few)
    runs: list[int] = []

    class Noted(counting.Repeats):
        def __call__(self, *args: Any) -> Tensor:
            out = super().__call__(*args)
            runs.append(self.runs)
            return out

    class Every(counting.Repeats):
        def __call__(self, *args: Any) -> Tensor:
            return self.call(*args)

    found = []
    for kind in (Noted, Every):
        monkeypatch.setattr(counting, "Repeats", kind)
        found.append(counting.count_step("tiny", config, True))
    assert runs == [1, 2, 2, 2] and found[0] == found[1]


def test_sample_splits_the_time(tmp_path: Path) -> None:
    record = run("sample", tmp_path, "--rounds", "1", "--batches", "1", "2")
    assert list(record["batches"]) == ["1", "2"]
    for rows in record["batches"].values():
        assert list(rows) == ["student 1", "student 2", "student 4", "teacher 20"]
        for row in rows.values():
            parts = row["text_sec"] + row["transformer_sec"] + row["decoder_sec"]
            assert row["whole_sec"] == pytest.approx(parts)
        assert rows["teacher 20"]["times_as_fast_as_teacher"] == {"transformer": 1, "whole": 1}
        assert rows["student 1"]["times_as_fast_as_teacher"]["transformer"] > 2


def test_soak_tells_growth_from_noise() -> None:
    soak = importlib.import_module("soak")
    flat = [(minute, 1.0 + 0.01 * (-1) ** minute) for minute in range(100)]
    assert soak.slope(flat)["within_noise"]
    rising = soak.slope([(minute, value + 0.001 * minute) for minute, value in flat])
    assert not rising["within_noise"] and rising["per_hour"] == pytest.approx(0.06, abs=0.005)
    rows = [{"minute": 0.0, "steps": 0}, {"minute": 0.5, "steps": 10}, {"minute": 0.6, "steps": 10}]
    assert soak.step_times(rows) == [(0.5, pytest.approx(3.0))]


@pytest.mark.long
def test_soak_watches_a_run(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    options = ["--minutes", "0.7", "--every", "0.5", "--out", str(path)]
    small = ["training.prompts_per_step=1", "space.route_steps=2", "training.preview_every=1000"]
    importlib.import_module("soak").main([*options, *(word for change in small for word in ("--set", change))])
    record = json.loads(path.read_text())
    assert record["exit_code"] == 130 and record["looks"][-1]["steps"] > 1
    assert {"memory_gib", "files", "threads", "step_sec"} == set(record["slopes"]) - {"handed_out_gib"}
    if hasattr(ctypes.CDLL(None), "mallinfo2"):
        assert 0.05 < record["slopes"]["handed_out_gib"]["mean"] < record["slopes"]["memory_gib"]["mean"]


def test_errors_of_a_known_teacher_are_small_where_students_are_exact() -> None:
    closed_form = importlib.import_module("closed_form")
    prompts = closed_form.LABELS * 3
    wanted = closed_form.belongs(prompts, 5)
    assert torch.allclose(wanted, closed_form.belongs(prompts, 5, steps=1600), atol=2e-2)
    petals = closed_form.mixture(torch.float64).means / closed_form.SIGMA_DATA
    labels = closed_form.labels_of(closed_form.encode(prompts))
    nearest = [(petals[:, label] - point).norm(dim=1).min() for point, label in zip(wanted, labels, strict=True)]
    assert max(nearest) < 4 * 0.12 / closed_form.SIGMA_DATA  # it ends in a petal of its own label


@pytest.mark.long
def test_the_cost_of_objectives_with_a_target_time_is_in_forward_passes(tmp_path: Path) -> None:
    costs = run("step", tmp_path, "--maps", "--rounds", "1", "--states", "3")["maps"]
    assert len(costs) == 7 and all(cost["pairs"] == 2 and cost["units"] > 1 for cost in costs.values())
    for name, cost in costs.items():  # operations, which no other work moves
        assert cost["counted"] == pytest.approx(cost["expected"], rel=0.1), name
    by_reasoning = {name: cost["expected"] for name, cost in costs.items()}
    assert by_reasoning["pair"] == 6 and by_reasoning["semigroup, teacher and student"] == 7  # a walk of 3 for 2 pairs


@pytest.mark.long
@pytest.mark.parametrize(
    ("row", "passes"),
    [
        ("vsd", 11),
        ("sid, guided, four steps", 25),
        ("rcm, four steps", 43.5),
        ("dp-dmd, four steps", 43),
        ("dmd and a reward, one step", 29),
        ("endpoint", 12),
        ("adversarial, alternating", 36),
    ],
)
def test_a_step_with_a_fake_score_takes_the_passes_that_it_needs(tmp_path: Path, row: str, passes: float) -> None:
    """Counted in floating-point operations; a pass too many or too few would be seen."""
    counts = run("step", tmp_path, "--scores", "--states", "3", "--only", row)["scores"]
    assert list(counts) == [row] and counts[row]["passes"] == passes
    assert abs(counts[row]["units"] - passes) < 0.06 * passes


@pytest.mark.long
def test_a_benchmark_of_flow_maps_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed_form = importlib.import_module("closed_form")
    monkeypatch.setattr(closed_form, "MAPS", {name: closed_form.MAPS[name] for name in ("TBCM", "pairs")})
    monkeypatch.setattr(closed_form, "PICTURES", 20)
    options = ["--maps", "--steps", "1", "--fit", "1", "--out", str(tmp_path / "maps.json")]
    closed_form.main([*options, "--seeds", "1"])
    first = json.loads((tmp_path / "maps.json").read_text())["errors"]
    assert len(first["TBCM"]["0"]) == 1 and len(first["pairs"]["0"]) == 4
    first["pairs"]["0"] = [1.0, 2.0, 3.0, 4.0]
    whole = json.loads((tmp_path / "maps.json").read_text()) | {"errors": first}
    (tmp_path / "maps.json").write_text(json.dumps(whole))
    closed_form.main([*options, "--seeds", "2"])
    second = json.loads((tmp_path / "maps.json").read_text())["errors"]
    assert second["pairs"]["0"] == [1.0, 2.0, 3.0, 4.0] and set(second["pairs"]) == {"0", "1"}


def make_run(folder: Path, weight: float, loss: float, name: str = "weight") -> dict[str, Any]:
    """What `equal` notes of a run of one step with a weight of 1 + `weight`."""
    for part in ("checkpoints/000040", "student", "previews"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.ones(3) + weight, "half": torch.zeros(2, dtype=torch.bfloat16), "step": torch.tensor(1.0)}
    save_file(tensors, folder / "checkpoints" / "000040" / "student.safetensors")
    save_file({"w": torch.ones(1)}, folder / "student" / "model.safetensors")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": loss, "r": math.nan, "sec": loss}) + "\n")
    return importlib.import_module("equal_runs").read_run(folder) | {"case": "same"}


def test_equal_finds_a_changed_weight_and_a_changed_row(tmp_path: Path) -> None:
    verdict = importlib.import_module("equal").verdict
    run = make_run(tmp_path, 0.0, 0.5)
    assert verdict(run, make_run(tmp_path, 0.0, 0.5), set()) == (True, "equal: 1 rows, 4 tensors")
    assert verdict(run, make_run(tmp_path, 2e-7, 0.5), set()) == (
        False,
        "1 differences: checkpoint/student:weight: other bytes",
    )
    equal, line = verdict(run, make_run(tmp_path, 0.0, 0.5 + 3e-15), set())
    assert not equal and line.startswith("1 differences: step 0: loss 0.5 and 0.500000000000003")
    assert verdict(run, run | {"case": "other"}, set())[0] is verdict(run, {"failed": "why"}, set())[0] is False
    assert verdict(run, None, set()) == (False, "not recorded in the newer one")


def test_equal_knows_what_only_has_another_name(tmp_path: Path) -> None:
    equal = importlib.import_module("equal")
    run, renamed = make_run(tmp_path, 0.0, 0.5), make_run(tmp_path, 0.0, 0.5, name="scale")
    assert equal.verdict(run, renamed, set()) == (True, "equal: 1 rows, 4 tensors, 1 of them under other names")
    changed = make_run(tmp_path, 1e-3, 0.5, name="scale")
    found, twins = equal.tensor_differences(run["tensors"], changed["tensors"])
    assert (len(found), twins) == (2, 0)  # neither has a twin
    more = [run["rows"][0] | {"lr": 1.0}]
    assert list(equal.row_differences(run["rows"], more, set())) == ["step 0: lr is only in the newer one"]
    assert not list(equal.row_differences(run["rows"], more, {"lr"}))
    assert list(equal.row_differences(run["rows"], [], set())) == ["1 and 0 rows"]
    assert (
        importlib.import_module("equal_cases").spelt("training.rollout_precision", {"training.walk_precision"})
        == "training.walk_precision"
    )


@pytest.mark.long
def test_memory_is_linear_in_the_number_of_equal_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, counting = importlib.import_module("memory"), importlib.import_module("counting")
    monkeypatch.setitem(counting.TRANSFORMERS, "tiny", counting.TRANSFORMERS["tiny"] | {"num_layers": 5})
    small = [*memory.MATCHING, "training.checkpointing=true", "rollout.steps=1", "fake.rank=4"]
    config = memory.settings(memory.Place("tiny", "cpu", tmp_path), memory.ENCODED, 1, 2, small)
    whole, few = counting.count_step("tiny", config, True), counting.count_few("tiny", config, True, few=1)
    assert few == {name: pytest.approx(value, rel=5e-3) for name, value in whole.items()}  # 0.2% off


@pytest.mark.long
def test_methods_with_a_fake_score_are_counted(tmp_path: Path) -> None:
    """Between steps a fake score has its weights and two moments, a student its average besides; so have LoRAs."""
    memory, counting = importlib.import_module("memory"), importlib.import_module("counting")
    place, models = memory.Place("tiny", "cpu", tmp_path), importlib.import_module("models")
    small = [*memory.MATCHING, "training.checkpointing=true", "rollout.steps=1", "fake.rank=4"]

    def stays(*changes: str) -> float:
        """In weights of the teacher."""
        config = memory.settings(place, memory.ENCODED, 1, 2, [*small, *changes])
        return counting.count_step("tiny", config, True)["between_steps_gib"] * 2**30 / weights

    sizes = []
    for more in ({}, {"guidance_embeds": True}):
        with torch.device("meta"):
            network = models.SanaTransformer2DModel(**models.TRANSFORMERS["tiny"] | more)
        sizes.append(4 * sum(parameter.numel() for parameter in network.parameters()))
    weights, student = sizes[0], sizes[1] / sizes[0]
    fake = (stays() - 1 - 4 * student) / 3  # a LoRA of convolutions too
    assert stays("fake.kind=whole") == pytest.approx(1 + 7 * student, rel=0.01)
    assert stays("student.lora=4") == pytest.approx(1 + 4 * own_lora() / weights + 3 * fake, rel=0.01)
    assert 0.05 < fake < 0.1


def own_lora() -> int:
    """Bytes of a student's LoRA of rank 4: of linear layers alone."""
    models = importlib.import_module("models")
    with torch.device("meta"):
        network = models.SanaTransformer2DModel(**models.TRANSFORMERS["tiny"])
    blocks = network.transformer_blocks
    layers = [layer for layer in blocks.modules() if isinstance(layer, torch.nn.Linear)]
    return sum(4 * 4 * (layer.in_features + layer.out_features) for layer in layers)


def test_the_curves_of_a_fake_score_are_logged_as_a_runs_are(tmp_path: Path) -> None:
    """A few steps of each run: they differ in the fake score's updates or in guidance alone."""
    curves = importlib.import_module("score_curves")
    record = curves.main(["--steps", "44", "--fit", "2", "--figure", str(tmp_path / "curves.png")])
    assert list(record["curves"]) == list(record["said"]) == ["healthy", "late fake score", "guidance too strong"]
    for of in record["curves"].values():
        assert list(of) == list(curves.SHOWN) and all(len(points) == 4 for points in of.values())
    healthy, late, strong = (of["gap"][0][1] for of in record["curves"].values())
    assert len({healthy, late, strong}) == 3
    assert record["curves"]["healthy"]["fake/loss"][0] == record["curves"]["guidance too strong"]["fake/loss"][0]
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.long
def test_a_style_is_measured_in_every_row_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA students that have learned nothing are the teacher, so both ways to the style are the same network."""
    style = importlib.import_module("style")
    judge = load_judge(assets.JUDGE, "cpu")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "recipes" / "emoji_teacher"))
    network = importlib.import_module("style_classifier").make_classifier()
    said = {"scores": json.dumps({"accuracy": 1.0})}
    save_file(network.state_dict(), tmp_path / "classifier.safetensors", said)
    means = text_features(judge, judge.names).contiguous()
    statistics = {"mean": judge.mean, "covariance": judge.covariance, "names": means}
    save_file(statistics, tmp_path / "fluent_judge.safetensors")
    layer = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"{layer}A.weight": torch.randn(2, 192), f"{layer}B.weight": torch.randn(192, 2)}, lora)
    options = ["--work", str(tmp_path), "--n", "2", "--out", str(tmp_path / "style.json")]
    for name, loras in (("student", [str(lora)]), ("step-saver", [])):
        config = load_config("demo", ["student.lora=2", f"teacher.lora={json.dumps(loras)}"])
        teacher = load_teacher(config.teacher, "cpu")
        recipe = make_recipe(config, teacher, (3.0,), 3.0)
        save_student(teacher, lora_student(teacher, 2), tmp_path / name, config, recipe, "a fox")
        options += [f"--{name}", str(tmp_path / name)]
    style.main(options)
    record = json.loads((tmp_path / "style.json").read_text())
    rows = record["rows"]
    assert len(rows) == 12 and all(set(row) == set(style.COLUMNS) for row in rows.values())
    assert rows["step-saver and style 4"] == rows["style first, then distilled 4"] != rows["step-saver alone 4"]
    assert rows["teacher with the style 20"] != rows["teacher 20"]
    record["rows"] = {"teacher 20": rows["teacher 20"] | {"fluent": 7.0}}
    (tmp_path / "style.json").write_text(json.dumps(record))
    style.main(options)
    again = json.loads((tmp_path / "style.json").read_text())["rows"]
    assert again["teacher 20"]["fluent"] == 7.0 and again["teacher 4"] == rows["teacher 4"]
