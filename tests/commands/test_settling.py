"""The rule for runs that name no preset: every branch, its prices against counted calls, and what commands say."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SanaTransformer2DModel
from test_cli import Result, assert_one_line
from test_family_presets import PIPELINES
from tiny import make_wan, save

from stepfold.commands.plan import Plan, row_words
from stepfold.commands.settling import priced, settle, within_hours
from stepfold.config import from_yaml, load_config, preset_names, to_yaml
from stepfold.errors import UserError
from stepfold.jobs import choosing
from stepfold.jobs.choosing import alternatives, choose, passes
from stepfold.jobs.facts import PRESETS, Facts, family_preset, foreign_preset, no_lora_since, read_facts
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import open_prompts
from stepfold.sampling.recipe import policy_of
from stepfold.sections import TeacherSettings
from stepfold.students.starting import make_fake, make_student
from stepfold.teachers import folders
from stepfold.teachers.loading import choose_objective, load_teacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.critics import fake_loss, fake_states, new_critics
from stepfold.training.draws import draw
from stepfold.training.states import collect
from stepfold.training.terms import add_gradients, terms_of

ROOT = Path(__file__).parents[2]
GIB = {"whole": 40.0, "none": 8.0, "int8": 5.0, "nf4": 3.0, "fake": 1.0}
SDXL = Facts("sdxl-lora-4step", 1000, "classifier_free", GIB, 24.0)
FLOW = replace(SDXL, preset="lora-4step", counts_to=1)
ALL = {"whole": 40.0}
WHOLE = {"student.lora": "0", "optimiser.name": "came", "optimiser.lr": "1.0e-5"}
LUMINA2 = replace(SDXL, preset="lumina2-lora-4step", counts_to=1)
MAP = {"student.times": "two", "target.rule": "edge", "evaluation.steps": "[8, 4, 2, 1]"}
ENDS = {"space.kind": "{generation: 1, endpoints: 1}"}
ALONE = {"space.kind": "endpoints"}
TWO = {"evaluation.steps": "[2, 4, 1]"}
ONE = {"training.micro_batch": "1"}
ONE_STEP = {"evaluation.steps": "[1, 2, 4]"}


@pytest.mark.parametrize(
    ("facts", "preset", "changes", "words"),
    [
        (replace(SDXL, gib=ALL, steps=2), "sdxl-lora-4step", WHOLE | ALONE | TWO, "Noised ends alone: 87% at four"),
        (SDXL, "sdxl-lora-4step", {}, "Trajectories alone: 90, 90 and 80%"),
        (replace(SDXL, steps=2), "sdxl-lora-4step", TWO, "dF/dt is large"),
        (FLOW, "lora-4step", ENDS, "timesteps are in [0, 1], with noised ends: at four steps 92%"),
        (LUMINA2, "lumina2-lora-4step", {}, "with noised ends"),
        (
            replace(LUMINA2, steps=1), "lumina2-lora-4step",
            ONE_STEP | {"space.kind": "generation"}, "Discrete consistency on",
        ),
        (replace(LUMINA2, steps=8), "lumina2-lora-4step", MAP | {"space.kind": "generation"}, "--to lora --steps 8`"),
        (replace(SDXL, steps=8), "sdxl-lora-4step", MAP, "A flow map with discrete targets: 68"),
        (replace(SDXL, steps=8, gib=ALL), "sdxl-lora-4step", MAP | WHOLE, "92% at eight with all weights"),
        (
            replace(SDXL, steps=8, second_time=False), "sdxl-lora-4step",
            {"evaluation.steps": "[8, 4, 2, 1]"}, "eight steps are not measured",
        ),
        (
            replace(FLOW, steps=8, second_time=False), "lora-4step",
            ENDS | {"evaluation.steps": "[8, 4, 2, 1]"}, "not measured",
        ),
        (replace(SDXL, gib=ALL), "sdxl-lora-4step", WHOLE | ALONE, "All weights are trained. Weights"),
        (replace(FLOW, gib=ALL, no_lora="peft is gone"), "lora-4step", ENDS | WHOLE, "trained, since peft is gone."),
        (
            replace(FLOW, steps=1, memory_gib=51), "lora-4step",
            WHOLE | ONE_STEP | {"objective": "discrete"}, "three points better than a LoRA (85.8 against",
        ),
        (
            replace(FLOW, steps=1, memory_gib=49), "lora-4step",
            ONE_STEP | {"objective": "discrete"}, "all weights need 40.0 GiB",
        ),
        (replace(SDXL, memory_gib=11), "sdxl-lora-4step", {}, "8.0 GiB of 11.0 GiB (counted)."),
        (replace(SDXL, memory_gib=9), "sdxl-lora-4step", {"teacher.quantise": "int8"}, "off by 0.9%."),
        (replace(SDXL, memory_gib=4), "sdxl-lora-4step", {"teacher.quantise": "nf4"}, "off by 14%."),
        (replace(SDXL, memory_gib=3), "sdxl-lora-4step", {"teacher.quantise": "nf4"}, "14%; it may not fit"),
        (replace(SDXL, gib=ALL), "sdxl-lora-4step", WHOLE | ALONE, "of 24.0 GiB (counted); it may not fit"),
        (replace(FLOW, billions=8), "lora-4step", ENDS | ONE, "Activations are not counted, so a backward pass has"),
        (replace(FLOW, billions=4.9), "lora-4step", ENDS, "of 24.0 GiB (counted)."),
        (replace(FLOW, video=True), "lora-4step", ENDS | ONE | {"teacher.frames": "33"}, "Videos have 33 frames."),
        (replace(SDXL, billions=12, preset="flux-lora-4step"), "flux-lora-4step", {}, "Activations are not counted"),
        (replace(SDXL, video=True, preset="wan-lora-4step"), "wan-lora-4step", {}, "33 frames"),
        (replace(SDXL, guidance="none"), "sdxl-lora-4step", {"space.guidance": "null"}, ""),
    ],
)  # fmt: skip
def test_every_branch(facts: Facts, preset: str, changes: dict[str, str], words: str) -> None:
    found = choose(facts)
    assert found.preset == preset and found.share == 1 and changes.items() <= found.changes.items()
    several = {"objective", "target.segments", "target.draws"}  # of the flow map, and what auto would be
    assert set(found.changes) - several == set(changes) - several
    assert words in " ".join(found.reasons) and len(found.reasons) == 2


@pytest.mark.parametrize(
    ("facts", "hours", "lora", "share", "words"),
    [
        (SDXL, 20, 64, 1.0, "All steps of the preset take 10 h (counted), which fit into 20 h."),
        (SDXL, 5, 64, 0.5, "5 h are enough for 50% of the preset's steps."),
        (SDXL, 1, 64, 0.1, "10% of the preset's steps, which is short"),
        (replace(SDXL, fixed_hours=1), 6, 64, 0.5, "6 h are enough for 50% of the preset's steps."),
        (replace(SDXL, fixed_hours=1), 20, 64, 1.0, "All steps of the preset take 11 h (counted), which fit into"),
        (replace(SDXL, steps=1, memory_gib=80), 30, 0, 0.3, "30% of the preset's steps."),
        (replace(SDXL, steps=1, memory_gib=80), 15, 64, 1.0, "less than a fifth of what all weights take"),
        (replace(SDXL, steps=1, memory_gib=80, fixed_hours=11), 30, 64, 1.0, "less than a fifth of what all weights"),
    ],
)
def test_hours(facts: Facts, hours: float, lora: int, share: float, words: str) -> None:
    untimed = choose(replace(facts, hours=hours))
    assert untimed.share == 1 and untimed == choose(facts)
    found = choose(replace(facts, hours=hours, full_hours={"whole": 100.0, "lora": 10.0}))
    rank = int(found.changes.get("student.lora", 64))
    assert (rank, found.share) == (lora, pytest.approx(share)) and words in " ".join(found.reasons)


def test_alternatives_are_settings_and_all_different() -> None:
    for facts in (SDXL, FLOW, replace(SDXL, gib=ALL, second_time=False), replace(SDXL, memory_gib=4, guidance="none")):
        found = alternatives(facts)
        assert found[0] == choose(facts) and len({choice.words for choice in found}) == len(found) >= 2
        for choice in found:
            changes = [f"{key}={value}" for key, value in choice.changes.items()]
            load_config(choice.preset, changes, teacher__source="x/y", prompts="p.txt")
    asked = replace(SDXL, gib=GIB | {"whole": float("inf")})
    assert not any("student.lora" in choice.changes for choice in alternatives(asked))
    assert "A LoRA, as asked for." in choose(replace(asked, steps=1)).reasons[1]
    assert "the preset as it is" in {choice.method for choice in alternatives(FLOW)}
    assert not any("pi-Flow" in choice.method for choice in alternatives(SDXL))
    wide = {choice.method: choice.words for choice in alternatives(replace(FLOW, widens=True, memory_gib=9))}
    assert "--set objective=policy" in wide["pi-Flow"] and "--set teacher.quantise=int8" in wide["pi-Flow"]
    wide = {choice.method: choice.words for choice in alternatives(replace(FLOW, widens=True, gib=ALL))}
    assert "--set student.lora=0" in wide["pi-Flow, all weights"]
    assert "the preset as it is" not in {choice.method for choice in alternatives(SDXL)}  # which the rule chose
    matching = {choice.method: choice.words for choice in alternatives(replace(SDXL, memory_gib=7))}
    assert "--set teacher.quantise=int8" in matching["decoupled matching"]
    assert "decoupled matching" not in {choice.method for choice in alternatives(replace(SDXL, guidance="embedded"))}


def test_a_preset_of_another_family_is_said(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = str(tiny_sana)
    said = foreign_preset("sdxl-lora-4step", teacher)
    assert "for a StableDiffusionXLPipeline, and the teacher is a SanaPipeline; its family has sana-lora-4step" in said
    (file := tmp_path / "fast.yaml").write_text("preset: sdxl-lora-4step\nseed: 1\n")
    assert foreign_preset(str(file), teacher) == said
    assert not foreign_preset("sana-lora-4step", teacher) and not foreign_preset("lora-4step", teacher)
    assert not foreign_preset("wan-lora-4step", "nowhere/at-all")
    for options, own in (({}, "wan-lora-4step"), ({"expand_timesteps": True}, "wan22-ti2v-lora-4step")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **options}))
        for preset in ("wan-lora-4step", "wan22-ti2v-lora-4step", "sdxl-lora-4step"):
            said = foreign_preset(preset, str(tmp_path))
            assert said.endswith(f"its family has {own}") if preset != own else not said, (preset, own)
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": []}')
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 64}')
    assert foreign_preset("sdxl-lora-4step", str(tmp_path)).endswith("its family has sd1-lora-4step")
    monkeypatch.setattr(folders, "load_index", lambda _: {"_class_name": "WanPipeline", "expand_timesteps": True})
    monkeypatch.setattr(folders, "part_config", lambda *_: {})
    assert foreign_preset("wan-lora-4step", "some/ti2v").endswith("its family has wan22-ti2v-lora-4step")  # on the hub
    assert "for a StableDiffusion3Pipeline, and the teacher is a WanP" in foreign_preset("sd3-lora-4step", "some/ti2v")
    said = foreign_preset("demo", teacher, 32)
    assert "asks for 32 tokens a prompt" in said and said.endswith("has sana-lora-4step")
    file.write_text("preset: lcm\n")
    assert "preset lcm is for the bundled model: it asks for 16 tokens a prompt" in foreign_preset(
        str(file), teacher, 16
    )
    assert not foreign_preset("demo", teacher, 300) and not foreign_preset("demo", "emoji", 32)
    assert not foreign_preset("scm-endpoints", teacher, None) and not foreign_preset("paper", teacher, None)


def test_all_weights_at_a_loras_rate_are_said(tiny_sana: Path) -> None:
    def notes(*changes: str, **given: Any) -> list[str]:
        there = {"teacher": str(tiny_sana), "prompts": "p.txt"} | given
        return settle("sana-lora-4step", changes, steps=None, hours=None, device="cpu", **there).notes()

    assert "all weights train with AdamW at 0.0001, a LoRA's rate" in notes(lora=0)[0]
    assert not notes() and not notes("optimiser.name=came", lora=0) and not notes(lora=0, lr=1e-5)


def commands_of_families() -> list[tuple[str, list[str]]]:
    """The page's commands that train from prompts for four steps: heading -> options, those of `--lora 0` marked so."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for section in page.split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        found += [(heading, shlex.split(line)) for line in section.splitlines() if line.startswith("stepfold distill")]
    return [(heading, words) for heading, words in found if any("lora-4step" in word for word in words)]


@pytest.mark.parametrize(("heading", "words"), commands_of_families())
def test_the_commands_of_families_are_of_the_rule(heading: str, words: list[str]) -> None:
    """Each trains the states, and all or few weights, that the rule takes for four steps of such a teacher."""
    options = list(itertools.pairwise(words))
    preset = next(value for name, value in options if name == "--preset")
    whole, given = ("--lora", "0") in options, [value for name, value in options if name == "--set"]
    given += ["student.lora=0"] if whole else []
    given += [f"optimiser.lr={value}" for name, value in options if name == "--lr"]
    counts_to = 1 if heading in ("Lumina Image 2", "Sana-Sprint", "Anima") else 1000
    choice = choose(replace(SDXL, preset=preset, counts_to=counts_to, gib=ALL if whole else GIB))
    ours, rules = (
        load_config(preset, changes, teacher__source="x/y", prompts="p.txt")
        for changes in (given, [f"{key}={value}" for key, value in choice.changes.items()])
    )
    assert ours.space.kind == rules.space.kind and ours.student.lora == rules.student.lora
    assert ours.optimiser == rules.optimiser and ours.evaluation.steps == rules.evaluation.steps


def test_all_weights_are_counted_as_they_run() -> None:
    """18 bytes a parameter are for a teacher in bfloat16 and CAME; recomputed blocks and small parts come with it."""
    choice = choose(replace(SDXL, gib=ALL))
    config = load_config(
        choice.preset, [f"{key}={value}" for key, value in choice.changes.items()], teacher__source="x/y", prompts="p"
    )
    assert (config.teacher.dtype, config.optimiser.name, config.optimiser.lr) == ("bfloat16", "came", 1e-5)
    assert (config.student.lora, config.training.steps, config.training.micro_batch) == (0, 2000, 4)


def test_families_have_their_presets() -> None:
    """As the presets' own tests name them; classes of several sizes by what their configs say."""
    for family, name in PIPELINES.items():
        index = {"_class_name": name, "expand_timesteps": family == "wan22-ti2v"}
        assert family_preset(index, {"sample_size": 64}) == f"{family}-lora-4step"
    assert family_preset({"_class_name": "StableDiffusionPipeline"}, {"sample_size": 96}) == "lora-4step"
    assert family_preset({"_class_name": "KreaPipeline"}, {}) == "lora-4step"
    assert set(PRESETS.values()) < set(preset_names())


def test_facts_of_a_folder(tiny_sana: Path, first_sana: Path) -> None:
    found = read_facts(TeacherSettings(source=str(tiny_sana)), None, 2, 1.5, "cpu")
    assert (found.preset, found.counts_to, found.guidance, found.steps) == ("sana-lora-4step", 1, "classifier_free", 2)
    teacher = load_teacher(TeacherSettings(source=str(tiny_sana)), "cpu")
    assert found.second_time and found.memory_gib > 1 and found.hours == 1.5 and found.full_hours is None
    parameters = sum(weight.numel() for weight in teacher.transformer.parameters())
    assert found.gib["whole"] == pytest.approx(18 * parameters / 2**30) and found.gib["nf4"] < found.gib["none"]
    assert read_facts(TeacherSettings(source=str(first_sana)), None, 4, None, "cpu").counts_to == 1000
    whole = read_facts(TeacherSettings(source=str(tiny_sana)), 0, 4, None, "cpu")
    assert set(whole.gib) == {"whole"} and choose(whole).changes["student.lora"] == "0"
    assert whole.no_lora == "no LoRA is wanted" and not found.no_lora and not found.video
    assert found.billions == pytest.approx(parameters / 1e9)
    lora = read_facts(TeacherSettings(source=str(tiny_sana)), 8, 1, None, "cpu")
    assert lora.gib["none"] < found.gib["none"] and choose(lora).preset == "sana-lora-4step"
    unguided = TeacherSettings(source=str(tiny_sana), guidance="none")
    assert read_facts(unguided, None, 4, None, "cpu").guidance == "none"


BOTH_KINDS = "space.kind={generation: 1, endpoints: 1}"
SMALL = ("space.route_steps=4", "training.precision=no", "training.walk_precision=no", "teacher.dtype=float32")


@pytest.mark.parametrize(
    ("preset", "changes", "calls"),
    [
        ("lora-4step", ["objective=discrete"], 8 + 4 * 4),
        ("lora-4step", ["objective=discrete", BOTH_KINDS], 16 + 4 * 4 + 4 * 5),
        ("lora-4step", [BOTH_KINDS], 16 + 8 * 5),  # continuous
        ("lora-4step", ["objective=discrete", "training.micro_batch=3"], 8 + 4 * 5),
        ("default", ["objective=discrete"], 8 + 3 * 3),  # the next state's own pass is the target
        ("default", ["objective=discrete", BOTH_KINDS], 8 + 3 * 3 + 6 + 3 * 4),
        ("default", ["objective=discrete", "teacher.guidance=none"], 4 + 3 * 3),
        ("flow", [], 8 + 8 * 4),
        ("policy", [], 4 * (1 + 2 * 2) + 4 * 4),
        ("matching", ["rollout.steps=2", "fake.updates=2", "training.prompts_per_step=2"], 17 + 2 * 11),
        ("matching", ["rollout.steps=1", "fake.updates=1", "training.checkpointing=false"], 4 * (1 + 2 + 4 + 4)),
        ("policy", ["policy.steps=2", "policy.states=3", "teacher.guidance=none"], 2 * (1 + 3) + 2 * 4),
    ],
)
def test_passes_are_the_calls_of_a_step(
    preset: str, changes: list[str], calls: int, tiny_sana: Path, prompts_file: Path
) -> None:
    """Rows that the network is called with; backward passes, recomputed blocks and the tangent by their definition."""
    settings = {"flow": choosing.FLOW_MAP, "policy": choosing.POLICY, "matching": choosing.MATCHING}.get(preset, {})
    if settings:
        preset, changes = "lora-4step", [*(f"{key}={value}" for key, value in settings.items()), *changes]
    own = [*SMALL, "space.filter_rule=off", *changes, *(["student.lora=2"] if preset != "default" else [])]
    config = choose_objective(load_config(preset, own, teacher__source=str(tiny_sana), prompts=str(prompts_file)))
    teacher = load_teacher(config.teacher, torch.device("cpu"))
    accelerator = make_accelerator("no", device="cpu")
    student = make_student(teacher, config.student, config.teacher, policy_of(config, teacher))
    critics = new_critics([config], teacher, torch.device("cpu"), lambda: make_fake(teacher, config.fake))
    networks = Networks(student, teacher, critics, tangent="one_pass", average=student)
    rows: list[tuple[int, bool]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        rows.append((len(args[0] if args else kwargs["hidden_states"]), torch.is_grad_enabled()))

    modules = {
        id(module): module for each in (teacher.network, student, *critics.values()) for module in each.modules()
    }
    networks_there = [module for module in modules.values() if isinstance(module, SanaTransformer2DModel)]
    for module in networks_there:
        module.register_forward_pre_hook(note, with_kwargs=True)
    turns = config.rollout.steps if config.fake.updates else 1  # after which each of a rollout's steps was trained
    for step in range(turns):
        batch = draw(step, open_prompts(prompts_file), teacher, config, torch.device("cpu"))
        condition = teacher.encode(batch.prompts)
        states = collect(list(config.space.weights), batch, condition, networks, config, step)
        for update in range(step * config.fake.updates, (step + 1) * config.fake.updates):
            learnt = fake_states(networks, batch, condition, config, update, states)
            fake_loss(networks, batch, learnt, config).value.mean().backward()
        add_gradients(terms_of(config), networks, states, batch.draws, config, step, accelerator)
    trained = sum(count for count, graph in rows if graph)
    found = sum(count for count, _ in rows) + 2 * trained
    found += trained * (config.training.checkpointing + (config.objective == "continuous"))
    assert found / turns == calls == passes(config, teacher.guidance_kind) and networks_there


def test_matching_is_that_of_the_docs() -> None:
    page = (ROOT / "docs" / "four-step-lora.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(page.split("```yaml\n# matching.yaml\n")[1].split("```")[0])
    flat = {
        f"{name}.{key}": value for name, part in shown.items() if isinstance(part, dict) for key, value in part.items()
    }
    ours = {key: yaml.safe_load(value) for key, value in choosing.MATCHING.items()}
    steps = ours.pop("training.steps")
    assert ours == flat | {"objective": shown["objective"]} and f"--train-steps {steps} --out runs/matching" in page


def test_passes_are_those_of_the_docs() -> None:
    """docs/four-step-lora.md counts them by hand."""
    config = load_config("lora-4step", ["objective=discrete"], teacher__source="x/y", prompts="p.txt")
    assert (passes(config, "classifier_free"), passes(config, "embedded")) == (112, 96)
    flux = load_config("flux-lora-4step", ["objective=discrete"], teacher__source="x/y", prompts="p.txt")
    assert passes(flux, "embedded") == 96
    both = load_config("lora-4step", ["objective=discrete", BOTH_KINDS], teacher__source="x/y", prompts="p.txt")
    assert passes(both, "classifier_free") == 224


FEW = (
    "training.steps=2", "space.route_steps=2", "teacher.max_tokens=24", "student.lora=2", "evaluation.n=0",
    "training.preview_every=9", "training.checkpoint_every=9", "training.precision=no", "training.walk_precision=no",
)  # fmt: skip


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each trial's run, all of it steps: ten hours by the first one, and five by any other one."""
    seconds: list[float] = []

    def make_plan(config: Any, *_: Any) -> Plan:
        seconds.append(18000.0 if seconds else 36000.0)
        return Plan("one_pass", 1.0, {"steps": seconds[-1]}, seconds[-1], 1.5, 12, config.training.steps, "cpu")

    monkeypatch.setattr("stepfold.commands.plan.make_plan", make_plan)
    return seconds


@pytest.mark.usefixtures("trials")
def test_distill_and_plan_say_what_they_chose(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    few = [part for change in FEW for part in ("--set", change)]
    common = ("--teacher", tiny_sana, "--prompts", prompts_file, *few)
    planned = Result("plan", *common[:4], *few[2:], "--json", tmp_path / "plan.json")
    assert planned.code == 0, planned.err
    assert "method: --preset sana-lora-4step" in planned.err and "timesteps are in [0, 1]" in planned.err
    rows = json.loads((tmp_path / "plan.json").read_text())["alternatives"]
    assert rows[0]["method"] == "continuous, with noised ends" and rows[0]["hours"] == pytest.approx(10)
    a_pass = [row["hours"] / (row["passes"] * row["steps"]) for row in rows]
    assert a_pass == pytest.approx([a_pass[0]] * len(rows)) and len(rows) >= 4
    matching, preset = (
        next(r for r in rows if r["method"] == name) for name in ("decoupled matching", rows[0]["method"])
    )
    assert matching["gib"] > preset["gib"] and matching["sampling_steps"] == [4]
    assert "flow map" in planned.out and "pi-Flow" in planned.out and f"{rows[1]['passes']}" in planned.out
    out = tmp_path / "run"
    assert_one_line(Result("distill", *common, "--lora", "2"), "--lora and --set student.lora are one setting")
    done = Result("distill", *common, "--steps", "1", "--out", out)
    assert done.code == 0 and "method: --preset sana-lora-4step --set objective=discrete" in done.err, done.err
    config = from_yaml(out / "config.yaml")
    assert (config.objective, config.space.kind, config.student.lora) == ("discrete", "generation", 2)
    again = Result("distill", *common, "--out", out, "--resume")  # the run's own settings count, not four steps'
    assert again.code == 0, again.err


@pytest.mark.long
def test_hours_shorten_a_run_which_goes_on_as_it_began(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, trials: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two trials say the same; the command that a stopped run prints has `--hours`, and maybe no `--out`."""
    monkeypatch.chdir(tmp_path)
    few = [part for change in FEW[1:] for part in ("--set", change)]
    common = ("--teacher", tiny_sana, "--prompts", prompts_file, *few, "--hours", "0.01")
    done = Result("distill", *common)
    assert done.code == 0, done.err
    assert "0.01 h are enough for 0% of the preset's steps, which is short" in done.err
    config = from_yaml(tmp_path / "runs" / "sana-lora-4step" / "config.yaml")
    assert config.training.steps == 2  # of 2,000
    assert (config.consistency.r_warmup, config.consistency.r_cooldown_start) == (1, 2)
    assert config.optimiser.warmup == 1
    for out in ((), ("--out", "runs/sana-lora-4step")):
        assert_one_line(Result("distill", *common, *out), "already holds a run; add --resume")
        again = Result("distill", *common, *out, "--resume")
        assert again.code == 0, again.err
        assert "goes on with the settings that it began with; --hours change nothing" in again.err
    assert len(trials) == 1
    planned = Result("plan", *common)
    assert planned.code == 0 and "0.01 h are enough for 0% of the preset's steps, which is short" in planned.err


def test_start_and_evaluation_take_their_time_of_the_hours(tiny_sana: Path) -> None:
    plan = Plan("", 1.0, {"start": 1000.0, "steps": 30.0, "previews": 6.0, "evaluation": 200.0}, 1236.0, 1.0, 12, 9, "")
    assert (plan.fixed_sec, plan.whole_step_sec) == (1200, 4)
    settled = settle(None, None, steps=4, hours=6, device="cpu", teacher=str(tiny_sana), prompts="p.txt")
    found = within_hours(settled, 18.0, 3600.0)
    assert settled.config.training.steps == 2000 and found.config.training.steps == 1000
    rows = priced(settled, 18.0, 3600.0)
    assert rows[0]["hours"] == pytest.approx(11)
    assert len({tuple(row_words(row)) for row in rows}) == len(rows)  # people can tell them apart
    with pytest.raises(UserError, match=r"--hours is 6, but start and evaluation alone take 6 h; give more, or --set"):
        within_hours(settled, 18.0, 6 * 3600.0)
    given: dict[str, Any] = {"steps": 4, "hours": 6, "device": "cpu", "teacher": str(tiny_sana), "prompts": "p.txt"}
    quantised = within_hours(settle(None, ["teacher.quantise=int8"], **given), 18.0, 3600.0)
    assert quantised.config.training.steps == 1000 and quantised.config.student.lora


def test_a_run_of_an_earlier_version_goes_on(tiny_sana: Path, tmp_path: Path) -> None:
    config = load_config("lora-4step", ["training.steps=9"], teacher__source=str(tiny_sana), prompts="p.txt")
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("walk_precision", "rollout_precision"))
    given: dict[str, Any] = {"steps": 8, "hours": None, "device": "cpu", "teacher": str(tiny_sana), "prompts": "p.txt"}
    found = settle(None, ["optimiser.lr=3e-4"], out=tmp_path, resume=True, **given)
    assert found.config == load_config(config, ["optimiser.lr=3e-4"]) and found.config != config
    assert found.notes() == ["the run goes on with the settings that it began with; --steps change nothing"]
    assert settle(None, None, out=tmp_path, **given).config.student.times == "two"  # not resumed: the rule's
    with pytest.raises(UserError, match=rf"holds no run to go on with; did you mean {tmp_path}\?; --preset or --tea"):
        settle(None, None, steps=None, hours=None, device="cpu", out=Path(f"{tmp_path}x"), resume=True)
    alone = settle(None, None, steps=None, hours=None, device="cpu", out=tmp_path, resume=True)
    assert alone.config == config and not alone.notes()  # the demo's settings were compared with it


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--steps", 3], "--steps is 3, but it counts the student's sampling steps: 1, 2, 4 or 8"),
        (["--steps", 4], "--steps is for choosing a method, and the bundled teacher has presets"),
        (["--hours", 1, "--preset", "demo"], "--hours is for choosing a method, and --preset demo is one"),
        (["--hours", 0, "--teacher", "x"], "--hours is 0; give more than 0"),
        (["--hours", 1, "--train-steps", 5, "--teacher", "x"], "give one of them"),
        (["--hours", 1, "--set", "training.steps=5", "--teacher", "x"], "give one of them"),
        (["--teacher", "no/such"], "no/such"),
    ],
)
def test_wishes_that_are_none(options: list[Any], wanted: str) -> None:
    for command in ("distill", "plan"):
        assert_one_line(Result(command, *options), wanted)


def test_hours_of_several_processes_and_of_a_dry_run(tiny_sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("distill", "--teacher", tiny_sana, "--prompts", "p.txt", "--hours", "1")
    assert_one_line(Result(*given, "--dry-run"), "leave out one of them")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_line(Result(*given), "there are several; give --train-steps")


def test_a_dry_run_says_its_reasons_apart(tiny_sana: Path) -> None:
    result = Result("distill", "--teacher", tiny_sana, "--prompts", "p.txt", "--lora", "0", "--steps", "4", "--dry-run")
    changes = [BOTH_KINDS, "student.lora=0", "optimiser.name=came", "optimiser.lr=1.0e-5"]
    words = " --set ".join(["sana-lora-4step", f"'{BOTH_KINDS}'", *changes[1:]])
    assert result.err.startswith(f"method: --preset {words}\n") and result.err.count("\n") == 3
    assert "92%, without 83% (three seeds, all weights). 2,000 optimiser steps.\n" in result.err
    expected = load_config("sana-lora-4step", changes, teacher__source=str(tiny_sana), prompts="p.txt")
    assert result.out == to_yaml(expected)


def test_why_no_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_lora_since(True, None) == no_lora_since(True, 8) == ""
    assert no_lora_since(False, 8) == "the pipeline loads no LoRA"
    monkeypatch.setattr("stepfold.jobs.facts.find_spec", lambda _: None)
    assert "(pip install peft)" in no_lora_since(True, None)


def test_the_facts_of_a_video(tmp_path: Path) -> None:
    found = read_facts(TeacherSettings(source=str(save(make_wan, tmp_path / "wan"))), None, 4, None, "cpu")
    assert found.video and found.preset == "wan-lora-4step" and found.billions < 1
