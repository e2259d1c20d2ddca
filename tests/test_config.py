"""Settings: presets, bad values, yaml."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import stepfold
from stepfold.config import Config, Section, from_yaml, load_config, preset_names, setting_names, to_yaml, validate
from stepfold.errors import UserError
from stepfold.near_names import ELSEWHERE, OPTIONS

SOURCE = Path(stepfold.__file__).parent


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    config = load_config(name, prompts="prompts.txt", teacher__source="some/teacher")
    assert config.prompts == "prompts.txt"
    assert config.teacher.source == "some/teacher"


def test_only_the_bundled_teacher_has_prompts_of_its_own() -> None:
    assert load_config("demo").prompts is None
    for name in ("default", "paper", "released"):
        with pytest.raises(UserError, match=r"prompts is missing; give --prompts FILE"):
            load_config(name, teacher__source="some/teacher")


def test_presets_differ_where_paper_and_released_code_do() -> None:
    paper, released = load_config("paper"), load_config("released")
    assert (paper.consistency.prior_weight, released.consistency.prior_weight) == ("none", "inverse_tangent")
    assert (paper.space.keep_first, released.space.keep_first) == (True, False)
    assert (paper.space.filter_rule, released.space.filter_rule) == ("hard", "random")
    assert (paper.space.filter_denominator, released.space.filter_denominator) == ("kept", "all")
    assert (paper.teacher.null_mask, released.teacher.null_mask) == ("own", "prompt")
    assert paper.consistency.r_final == released.consistency.r_final == 0.75


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.step", "training.steps"),
        ("optimizer.lr", "optimiser.lr"),
        ("lr", "optimiser.lr"),
        ("space.rout_steps", "space.route_steps"),
        ("sed", "seed"),
        ("training", "training."),
    ],
)
def test_unknown_setting_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown setting '{re.escape(key)}'; did you mean '{re.escape(nearest)}"):
        load_config("demo", [f"{key}=1"])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora", "'teacher.lora' or 'student.lora'"),
        (
            "guidance",
            "'teacher.guidance' or 'space.guidance' or 'fake.guidance' or 'matching.guidance' or 'evaluation.guidance'",
        ),
    ],
)
def test_a_name_that_several_sections_have_is_asked_about(key: str, said: str) -> None:
    """`lora=64` was sent to the teacher's alone."""
    with pytest.raises(UserError, match=re.escape(f"unknown setting '{key}'; did you mean {said}?")):
        load_config("demo", [f"{key}=64"])


def test_unknown_setting_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {stpes: 3}\n")
    with pytest.raises(UserError, match=r"unknown setting 'training.stpes'; did you mean 'training.steps'\?"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("size", "; did you mean 'teacher.height' and 'teacher.width'?"),
        ("training.batch_size", "; did you mean 'training.prompts_per_step'?"),
        ("learning_rate", "; did you mean 'optimiser.lr'?"),
        ("device", "; give --device, which is no setting"),
        ("training.seed", "; did you mean 'seed'?"),
    ],
)
def test_a_name_of_other_trainers_is_known(key: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown setting '{key}'{said}")):
        load_config("demo", [f"{key}=1"])


def test_every_name_of_other_trainers_leads_to_a_setting() -> None:
    known = setting_names()
    assert {name for names in ELSEWHERE.values() for name in names.split()} <= set(known)
    assert {*ELSEWHERE, *OPTIONS} & {name.rsplit(".", 1)[-1] for name in known} == {"rank"}


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown preset 'sdxl'; did you mean 'sdxl-lora-4step'"):
        load_config("sdxl")
    with pytest.raises(UserError, match=r"unknown preset 'papr'; did you mean 'paper'\?; or give a yaml file"):
        load_config("papr")


@pytest.mark.parametrize(
    "change",
    [
        "training.steps=0", "training.steps=-3", "training.steps=many", "training.steps=2.5", "training.steps=",
        "training.prompts_per_step=0", "training.micro_batch=-1", "training.precision=fp16", "training.ema=1.0",
        "training.ema=.nan", "training.checkpoint_every=0", "training.keep_checkpoints=0", "training.tangent=jvp",
        "optimiser.lr=0", "optimiser.lr=-1e-4", "optimiser.lr=.nan", "optimiser.lr=.inf", "optimiser.name=sgd",
        "optimiser.betas=[0.9, 1.5]", "optimiser.betas=[0.9]", "optimiser.decay=1.1", "optimiser.clip=0",
        "space.route_steps=1", "space.route_steps=1000", "space.route=straight", "space.guidance=[]",
        "space.guidance=[.nan]", "space.guidance=[.inf]", "space.filter_threshold=0", "space.route_shift=0",
        "space.keep_first=perhaps", "consistency.r_final=1.5", "consistency.normalise_constant=-1",
        "teacher.height=0", "teacher.max_tokens=0", "evaluation.n=-1", "evaluation.n=1", "seed=-1",
        "seed=99999999999999999999",
    ],
)  # fmt: skip
def test_impossible_values_are_named(change: str) -> None:
    key = change.split("=")[0]
    with pytest.raises(UserError, match=rf"^setting {re.escape(key)}[.\d]* is ") as caught:
        load_config("demo", [change])
    assert "\n" not in str(caught.value)


def test_set_values_are_yaml() -> None:
    config = load_config(
        "demo",
        [
            "training.steps = 7", "optimiser.lr=1e-4", "space.guidance=[4, 4.5]", "space.keep_first=true",
            "training.precision=no", "training.walk_precision=no", "space.filter_rule=off", "teacher.height=null",
            "prompts=a=b.txt",
        ],
    )  # fmt: skip
    assert config.training.steps == 7
    assert config.optimiser.lr == 1e-4
    assert config.space.guidance == (4.0, 4.5)
    assert config.space.keep_first is True
    assert config.training.precision == config.training.walk_precision == "no"
    assert config.space.filter_rule == "off"
    assert config.teacher.height is None
    assert config.prompts == "a=b.txt"


def test_later_changes_win_over_earlier_ones_and_options_over_both() -> None:
    config = load_config("demo", ["seed=1", "seed=2", "prompts=a.txt"], prompts="b.txt", teacher__source=None)
    assert (config.seed, config.prompts, config.teacher.source) == (2, "b.txt", "emoji")


@pytest.mark.parametrize("change", ["training.steps", "=3", "training.steps=[1", "training.steps: 3"])
def test_malformed_changes_are_one_line(change: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("demo", [change])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds no settings"),
        (b"just words", "holds no settings"),
        (b"training: [unclosed", "is not valid yaml"),
        (b"seed: \xff\xfe", "cannot be read"),
        (b"training: 3\n", "setting training is 3, but it is a section"),
        (b"training:\n", "setting training is None, but it is a section"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "is not valid yaml"),
    ],
)
def test_bad_settings_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(path), ["training.steps=4"])
    assert "\n" not in str(caught.value)


def test_empty_settings_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing\n")
    assert load_config(str(path)) == Config()


@pytest.mark.parametrize("name", preset_names())
def test_yaml_round_trip(tmp_path: Path, name: str) -> None:
    config = load_config(name, ["optimiser.lr=1.2345678e-5", "space.filter_rule=off", "training.precision=no"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config
    assert load_config(str(path)) == config
    assert validate(yaml.safe_load(to_yaml(config))) == config  # other readers agree on what is a word
    assert len(setting_names()) == to_yaml(config).count("\n") - _sections(config) + _list_rows(to_yaml(config))


def _sections(config: Config) -> int:
    return sum(isinstance(value, Section) for value in dict(config).values())


def _list_rows(text: str) -> int:
    """Lines of lists and, four deep, of mappings; less than none."""
    return -len(re.findall(r"^( *- |    )", text, re.MULTILINE))


def test_a_preset_builds_on_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: demo\nspace: {route_steps: 5}\nseed: 3\n")
    config, demo = load_config(str(path), ["training.steps=7"]), load_config("demo")
    assert (config.space.route_steps, config.seed, config.training.steps) == (5, 3, 7)
    space = demo.space.model_copy(update={"route_steps": 5})
    training = demo.training.model_copy(update={"steps": 7})
    assert config == demo.model_copy(update={"space": space, "seed": 3, "training": training})


def test_a_setting_that_is_a_mapping_replaces_the_base_presets(tmp_path: Path) -> None:
    """Sections are merged; a mapping of shares is one value, as with `--set`."""
    path = tmp_path / "mine.yaml"
    path.write_text("preset: flow-map\ntarget: {segments: {4: 0.5, 8: 0.5}}\n")
    base, config = load_config("flow-map"), load_config(str(path))
    assert set(base.target.grids) > {4, 8} == set(config.target.grids)
    assert config.target == base.target.model_copy(update={"segments": {4: 0.5, 8: 0.5}})
    assert config == load_config("flow-map", ["target.segments={4: 0.5, 8: 0.5}"])


def test_a_preset_that_builds_on_itself_or_on_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: {path}\n")
    with pytest.raises(UserError, match=r"builds on itself .*mine.yaml -> .*mine.yaml"):
        load_config(str(path))
    path.write_text("preset: dmo\n")
    with pytest.raises(UserError, match=r"unknown preset 'dmo'; did you mean 'demo'"):
        load_config(str(path))


def test_baselines_are_presets() -> None:
    sprint, scm, tbcm = load_config("sana-sprint"), load_config("scm"), load_config("reproduce")
    assert (scm.space.kind, sprint.space.kind, tbcm.space.kind) == ("images", "images", "generation")
    assert (scm.adversarial.weight, sprint.adversarial.weight) == (0, 0.5)
    assert sprint.model_copy(update={"adversarial": scm.adversarial}) == scm
    assert load_config("lcm").objective == "discrete"
    assert scm.optimiser == tbcm.optimiser and scm.consistency == tbcm.consistency


def test_a_difference_that_rounding_swamps_is_refused() -> None:
    with pytest.raises(UserError, match=r"setting training: precision=bf16 .*leave tangent at auto, or precision"):
        load_config("demo", ["training.precision=bf16", "training.tangent=finite_difference"])


def test_settings_cannot_change() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def fields(section: type[BaseModel] = Config) -> list[tuple[str, str | None, object]]:
    """(name, description, annotation) of every setting."""
    out: list[tuple[str, str | None, object]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            assert kind.__doc__
            out += fields(kind)
        else:
            out.append((name, field.description, kind))
    return out


def test_every_setting_is_described() -> None:
    assert [name for name, description, _ in fields() if not description] == []


def test_every_setting_is_used() -> None:
    source = "\n".join(p.read_text() for p in SOURCE.rglob("*.py") if p.name != "config.py")
    assert [name for name, *_ in fields() if not re.search(rf"\.{name}\b(?!\()", source)] == []


@pytest.mark.parametrize(
    "change",
    ["optimiser.lr=1e300", "space.guidance=[1e300]", "teacher.height=1000000000", "teacher.sizes=[[64,1000000000]]",
     "training.steps=1000000000000", "training.prompts_per_step=100000000", f"training.steps={'9' * 5000}"],
)  # fmt: skip
def test_numbers_beyond_reason_are_one_line(change: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("demo", [change])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_mappings_are_not_merged(tmp_path: Path) -> None:
    """Nine lines of `<<` become millions of entries."""
    lines = [
        "a: &a {x: 1}",
        *(f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}' if i else '*a'] * 9)}]}}" for i in range(9)),
    ]
    (tmp_path / "merge.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="mappings are not merged with <<"):
        load_config(str(tmp_path / "merge.yaml"))


def test_a_setting_that_was_renamed(tmp_path: Path) -> None:
    """A run folder of an earlier version is read; who gives the old name is told the new one."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config("demo")).replace("walk_precision", "rollout_precision"))
    assert from_yaml(path) == load_config("demo")
    for give in (lambda: load_config("demo", ["training.rollout_precision=no"]), lambda: load_config(str(path))):
        with pytest.raises(UserError, match=r"training\.rollout_precision.*called training\.walk_precision now"):
            give()


def test_discrete_consistency_needs_more_than_one_time() -> None:
    """One time a latent leaves one teacher step straight to t = 0, which teaches nothing of the trajectory."""
    one = ("space.kind=endpoints", "space.route_steps=2")
    with pytest.raises(UserError, match=r"one time a latent .* give space\.route_steps=16, or objective=continuous"):
        load_config("demo", [*one, "space.keep_first=false", "objective=discrete"])
    assert load_config("demo", [*one, "objective=continuous"]).objective == "continuous"


def test_loras_have_scales_where_a_number_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of earlier versions is a word, or nothing; hub ids, drives and files keep their colons."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine:2").touch()
    given: dict[Any, list[tuple[str, float]]] = {
        None: [],
        "a.safetensors": [("a.safetensors", 1.0)],
        "a.safetensors:0.8": [("a.safetensors", 0.8)],
        "you/it:-1e-1": [("you/it", -0.1)],
        "C:\\loras\\a.safetensors": [("C:\\loras\\a.safetensors", 1.0)],
        "C:\\loras\\a:.5": [("C:\\loras\\a", 0.5)],
        "a:b": [("a:b", 1.0)],
        "mine:2": [("mine:2", 1.0)],
        "mine:2:0.5": [("mine:2", 0.5)],
        ("a:0.5", "b"): [("a", 0.5), ("b", 1.0)],
    }
    for lora, expected in given.items():
        config = validate({"teacher": {"lora": list(lora) if isinstance(lora, tuple) else lora}})
        assert [(each.source, each.scale) for each in config.teacher.lora] == expected
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert from_yaml(tmp_path / "config.yaml") == config
    assert load_config("demo", ["teacher.lora=[a:0.5, b]"]) == load_config("demo", teacher__lora=["a:0.5", "b"])
    for wrong in ("a:0", "a:1e12", ""):
        with pytest.raises(UserError, match=r"setting teacher\.lora\.0\.s"):
            load_config("demo", teacher__lora=[wrong])


def test_settings_of_one_lora_or_none_are_read_as_an_earlier_version_wrote_them(tmp_path: Path) -> None:
    values = yaml.safe_load(to_yaml(load_config("demo")))
    for lora in (None, "a.safetensors"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"teacher": values["teacher"] | {"lora": lora}}))
        assert from_yaml(tmp_path / "config.yaml") == load_config("demo", teacher__lora=lora)


def test_one_scale_is_a_list_of_one() -> None:
    with pytest.raises(
        UserError, match=r"space\.guidance is 3: a single value .*; give --set 'space\.guidance=\[3\]'$"
    ):
        load_config("demo", ["space.guidance=3"])


def test_a_single_number_of_steps_and_a_single_change_are_said_or_taken() -> None:
    with pytest.raises(UserError, match=r"a single value is no list; give --set 'evaluation\.steps=\[4\]'"):
        load_config("demo", ["evaluation.steps=4"])
    with pytest.raises(UserError, match=r"no list; give --set 'training\.trackers=\[wandb\]'"):
        load_config("demo", ["training.trackers=wandb"])
    with pytest.raises(UserError, match=r"mine\.yaml cannot be read .*No such file"):
        load_config("mine.yaml")
    assert load_config("demo", "training.steps=7").training.steps == 7


@pytest.mark.parametrize("given", ["{generation:1,endpoints:1}", "{generation: 0}"])
def test_a_map_of_spaces_needs_blanks_and_a_weight(given: str) -> None:
    with pytest.raises(UserError, match=r"no space has a weight above 0; write \{generation: 1\}, with a blank"):
        load_config("demo", [f"space.kind={given}"])
