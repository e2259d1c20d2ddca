"""A pipeline of diffusers through the Python API: an object in memory is the teacher that its saved folder is."""

import copy
import inspect
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from forms import cases
from tiny import make_sana, make_sdxl
from torch import nn

from stepfold import api
from stepfold.config import TeacherSettings, load_config
from stepfold.errors import UserError
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.sections import LoraSettings
from stepfold.students.card import read_card, write_card
from stepfold.teachers.fingerprints import encoder_fingerprint, network_fingerprint, teacher_fingerprint
from stepfold.teachers.licences import licences_of
from stepfold.teachers.live import copied, lent, object_fingerprint, on_cpu, sampled
from stepfold.teachers.loading import counts_to_thousand, load_teacher
from stepfold.training.runs import read_metrics

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SHORT = [
    "training.steps=2", "training.prompts_per_step=2", "training.checkpoint_every=1", "training.precision=no",
    "training.walk_precision=no", "space.route_steps=2", "space.filter_rule=off", "teacher.max_tokens=32",
    "evaluation.n=0",
]  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_given(pipe: Any) -> list[Any]:
    """What a run changes of an object while it goes on."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    flags = [p.requires_grad for module in modules for p in module.parameters(recurse=False)]
    return [flags, [module.training for module in modules], [sorted(vars(module)) for module in modules]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Path, Path]]:
    """Rank of the student's LoRA -> the pipeline object, its student, and the student of its saved folder."""
    folder, found = tmp_path_factory.mktemp("live"), {}
    (folder / "prompts.txt").write_text("a red heart\na fox\npizza\n")
    pipe = make_sana()
    pipe.save_pretrained(folder / "saved")
    pipe.transformer.train()  # as one that a program trains itself
    pipe.text_encoder.requires_grad_(False)
    before = as_given(pipe)
    for rank in (0, 4):
        made = [
            api.distill_pipeline(
                teacher, folder / "prompts.txt", folder / f"{name}-{rank}", [*SHORT, f"student.lora={rank}"], quiet=True
            )
            for name, teacher in (("live", pipe), ("folder", folder / "saved"))
        ]
        found[rank] = (pipe, *made)
        assert as_given(pipe) == before
    return found


@pytest.mark.parametrize("rank", [0, 4])
def test_the_student_of_an_object_is_that_of_its_saved_folder(
    rank: int, pairs: dict[int, tuple[Any, Path, Path]]
) -> None:
    """To the bit, and so are its losses and its samples."""
    pipe, ours, theirs = pairs[rank]
    live, saved = files_of(ours), files_of(theirs)
    assert live.keys() == saved.keys()
    weights = [name for name in live if name.endswith(".safetensors")]
    assert len(weights) == (1 if rank else 3) and all(live[name] == saved[name] for name in weights)
    losses = [[row["loss"] for row in read_metrics(folder.parent)] for folder in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    (image,), (same,) = api.sample(ours, ["a fox"], teacher=pipe if rank else None), api.sample(theirs, ["a fox"])
    assert image.tobytes() == same.tobytes()


def test_the_card_says_that_the_teacher_was_an_object(pairs: dict[int, tuple[Any, Path, Path]]) -> None:
    _, ours, _ = pairs[4]
    card, readme = json.loads((ours / "stepfold.json").read_text()), (ours / "README.md").read_text()
    assert card["teacher"] == card["config"]["teacher"]["source"] == "live:SanaPipeline"
    assert (
        'from_pretrained("TEACHER", dtype=' in readme and "The teacher was a SanaPipeline object in Python." in readme
    )
    assert "object in Python" not in (pairs[0][1] / "README.md").read_text()  # which needs no teacher
    noted = json.loads((ours.parent / "teacher.json").read_text())
    assert noted["file"] == "live:SanaPipeline" and len(noted["sha256"]) == 64


def test_a_lora_of_an_object_is_exported_with_it(pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path) -> None:
    pipe, ours, theirs = pairs[4]
    files = [
        api.export(student, "lora", tmp_path / f"{name}.safetensors", teacher=teacher)
        for name, student, teacher in (("ours", ours, pipe), ("theirs", theirs, None))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UserError, match=r"was a SanaPipeline object in Python .*give stepfold\.api the object"):
        api.sample(ours, ["a fox"])


def test_a_lora_of_an_object_is_not_put_on_another(pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path) -> None:
    """Its images were those of neither."""
    _, ours, _ = pairs[4]
    other = make_sana()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1)
    for use in (partial(api.sample, ours, "a fox"), partial(api.export, ours, "pipeline", tmp_path / "x")):
        with pytest.raises(UserError, match="weights of live:SanaPipeline are not those that this LoRA was"):
            use(teacher=other)
        with pytest.raises(UserError, match=r"teacher is a StableDiffusionXLP\w+, and .* from a SanaPipeline; give"):
            use(teacher=make_sdxl())
    assert not list(tmp_path.iterdir())


def test_a_lora_is_not_put_on_a_folder_that_has_changed(
    pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path
) -> None:
    """Nor without the LoRA of its teacher that it was distilled with."""
    _, _, student = pairs[4]
    card = read_card(student)
    weights = Path(card.teacher) / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\0\0\0\1")
        with pytest.raises(UserError, match=r"saved are not those that .* put those back\. If it is the same"):
            api.sample(student, "a fox")
    finally:
        weights.write_bytes(before)
    assert api.sample(student, "a fox")
    extra, config = weights.with_name("diffusion_pytorch_model.fp16.safetensors"), weights.with_name("config.json")
    told = config.read_text()
    try:  # neither is another network
        extra.write_bytes(before[:-4] + b"\0\0\0\1")
        config.write_text(json.dumps(json.loads(told) | {"_diffusers_version": "99"}))
        assert api.sample(student, "a fox")
    finally:
        extra.unlink()
        config.write_text(told)
    style = tmp_path / "style.safetensors"
    style.write_bytes(b"one")
    settings = TeacherSettings(source=card.teacher, lora=(LoraSettings(source=str(style)),))
    found = {network_fingerprint(settings), card.base}
    renamed = style.rename(tmp_path / "other.safetensors")
    assert network_fingerprint(TeacherSettings(source=card.teacher, lora=(LoraSettings(source=str(renamed)),))) in found
    gone = card.config | {"teacher": card.config["teacher"] | {"lora": [{"source": str(style), "scale": 1.0}]}}
    elsewhere = Path(shutil.copytree(student, tmp_path / "student"))
    write_card(elsewhere, card.model_copy(update={"config": gone, "base": f"{card.base} abc"}))
    with pytest.raises(UserError, match=r"style\.safetensors.* does not load .*no such file"):
        api.sample(elsewhere, "a fox")
    moved = card.config | {"teacher": card.config["teacher"] | {"source": str(tmp_path / "moved")}}
    write_card(elsewhere, card.model_copy(update={"config": moved}))
    with pytest.raises(UserError, match=r"if that has moved, correct config\.teacher\.source there"):
        api.sample(elsewhere, "a fox")
    style.write_bytes(b"two")
    assert len(found | {network_fingerprint(settings)}) == 3
    away = TeacherSettings(source="emoji", lora=(LoraSettings(source="no/where"),))  # of the hub: taken as it is
    assert network_fingerprint(away) == network_fingerprint(TeacherSettings(source="emoji")) != ""


def test_arguments_that_no_command_would_take_are_refused(
    pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path
) -> None:
    _, _, student = pairs[0]
    (one,), (same,) = api.sample(student, "a fox"), api.sample(student, ["a fox"])
    assert one.tobytes() == same.tobytes()  # it was a picture for each letter
    wrong: Any
    for wrong, said in (
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": None}, "there are no prompts"),
        ({"prompts": ["a fox", 2]}, "prompts holds 2, which is no text"),
        ({"steps": 0}, "steps is 0, and a picture takes one or more"),
        ({"first_step": "techer"}, "first_step is 'techer'; give 'student' or 'teacher'"),
        ({"teacher": "a/b"}, "teacher is 'a/b', but here it is a pipeline object; leave it out"),
        ({"teacher": make_sana()}, r"was distilled from \S+/saved, no pipeline object; leave teacher=SanaPipeline out"),
    ):
        with pytest.raises(UserError, match=said):
            api.sample(student, **({"prompts": "a fox"} | wrong))
    for wrong, said in (
        ({"to": "lora", "keys": "nope"}, "--keys is 'nope'; give one of diffusers, comfy, kohya, peft"),
        ({"to": "pipeline", "dtype": "fp16"}, "--dtype is 'fp16'; give one of bfloat16, float16"),
    ):
        with pytest.raises(UserError, match=said):
            api.export(student, out=tmp_path / "x", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "dtype"),
    cases([("pipeline", None), ("pipeline", "float16"), ("single-file", None)], short=[("pipeline", "float16")]),
)
def test_an_export_leaves_the_object_as_it_was(
    to: str, dtype: Any, pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path
) -> None:
    """The LoRA was merged into the object's own network, once for each export."""
    pipe, student, _ = pairs[4]
    before, parts = as_given(pipe), ("transformer", "text_encoder", "vae")
    weights = {part: copy.deepcopy(getattr(pipe, part).state_dict()) for part in parts}
    end = ".safetensors" if to == "single-file" else ""
    first, again = (api.export(student, to, tmp_path / f"{i}{end}", dtype=dtype, teacher=pipe) for i in range(2))
    for part in parts:
        for name, value in getattr(pipe, part).state_dict().items():
            assert value.dtype == weights[part][name].dtype and torch.equal(value, weights[part][name])
    assert as_given(pipe) == before
    assert first.read_bytes() == again.read_bytes() if end else files_of(first) == files_of(again)


def test_a_copy_of_an_object_is_in_float32() -> None:
    """As a folder is read for an export; a LoRA was merged in the object's own bfloat16."""
    pipe = make_sana().to(torch.bfloat16)
    with lent(pipe) as source, copied(source):
        teacher = load_teacher(TeacherSettings(source=source, max_tokens=32), "cpu", torch.float32)
    assert {p.dtype for p in teacher.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    there = nn.Linear(2, 2, device="meta")  # stands for a GPU, whose memory a copy must not take
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        on_cpu(there)
    tied = nn.Sequential(layer := nn.Linear(2, 2), layer)
    copy_ = on_cpu(tied)
    assert copy_[0] is copy_[1] and copy_[0].weight is not layer.weight and torch.equal(copy_[0].weight, layer.weight)


def test_a_whole_student_from_a_lora_leaves_the_object_as_it_was(
    pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path
) -> None:
    pipe, student, _ = pairs[4]
    (tmp_path / "prompts.txt").write_text("a red heart\na fox\npizza\n")
    weights = copy.deepcopy(pipe.transformer.state_dict())
    changes = [*SHORT, "training.steps=1", f"student.init={student}"]
    api.distill_pipeline(pipe, tmp_path / "prompts.txt", tmp_path / "run", changes, quiet=True)
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())


def test_the_calls_have_the_commands_options() -> None:
    """All that the jobs take."""
    for call, job, left_out in (
        (api.export, run_export, set()),
        (api.sample, run_sample, {"folder"}),
    ):
        given, wanted = (set(inspect.signature(each).parameters) for each in (call, job))
        assert wanted - given <= left_out, wanted - given


def test_a_run_goes_on_with_the_same_weights_alone(
    pairs: dict[int, tuple[Any, Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bits of a run without a stop, with an object that is made again."""
    _, ours, _ = pairs[0]
    run, prompts = tmp_path / "run", ours.parents[1] / "prompts.txt"
    shutil.copytree(ours.parent, run)
    shutil.rmtree(run / "checkpoints" / "000002")
    shutil.rmtree(run / "student")
    again: Any = make_sana()
    changes = [*SHORT, "student.lora=0"]
    student = api.distill_pipeline(again, prompts, run, changes, resume=True)
    assert files_of(student) == files_of(ours)
    assert "teacher: a SanaPipeline object; its files are not known" in capsys.readouterr().err
    with torch.no_grad():
        next(again.transformer.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match=r"the content of live:SanaPipeline \(teacher\) has changed since this run"):
        api.distill_pipeline(again, prompts, run, changes, resume=True, quiet=True)


def test_a_fingerprint_changes_with_each_part_of_an_object(tmp_path: Path) -> None:
    """Saving it, which notes classes and precisions in its configs, changes nothing."""

    def prints(pipe: Any) -> tuple[str, str, str]:
        with lent(pipe) as source:
            settings = TeacherSettings(source=source)
            both = (teacher_fingerprint(settings, network_only=alone) for alone in (False, True))
            return (*both, encoder_fingerprint(source))

    usual = prints(make_sana())
    same: Any = make_sana()
    same.save_pretrained(tmp_path)
    assert prints(same) == usual and len(set(usual)) == 3
    other: Any = make_sana()
    other.tokenizer.add_tokens(["zebra"])
    assert [a == b for a, b in zip(prints(other), usual, strict=True)] == [False, True, False]
    other = make_sana()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, shift=5.0)
    assert [a == b for a, b in zip(prints(other), usual, strict=True)] == [False, False, True]
    other = make_sana()
    other.vae.register_to_config(scaling_factor=0.9)
    assert [a == b for a, b in zip(prints(other), usual, strict=True)] == [False, True, False]


MAKERS: dict[str, Callable[[], Any]] = {
    "sana": make_sana, "sprint": tiny.make_sprint, "sd3": tiny.make_sd3, "flux": tiny.make_flux,
    "flux2 klein": tiny.make_flux2_klein, "pixart": tiny.make_pixart, "sd1": tiny.make_sd1, "sdxl": make_sdxl,
    "lumina2": tiny.make_lumina2, "wan": tiny.make_wan, "dit": tiny.make_dit,
}  # fmt: skip


@pytest.mark.parametrize("family", cases(MAKERS, ("sd1",)))
def test_an_object_of_each_family_is_the_teacher_that_its_folder_is(family: str, tmp_path: Path) -> None:
    """Velocities, decoded images and the count of time, to the bit; and its fingerprint outlives being saved."""
    pipe = MAKERS[family]()

    def seen(source: str) -> list[Any]:
        small = {"height": 32, "width": 32, "frames": 5} if family == "wan" else {}
        settings = TeacherSettings(source=source, max_tokens=24, **small)
        teacher, numbers = load_teacher(settings, "cpu"), torch.Generator().manual_seed(0)
        x, one = 0.5 * torch.randn(1, *teacher.latent_shape, generator=numbers), torch.ones(1)
        velocity = teacher.velocity(x, 0.9 * one, teacher.encode(["7" if family == "dit" else "a fox"]), 3 * one)
        teacher.release_decoder()
        return [
            velocity,
            teacher.decode(x),
            counts_to_thousand(load_config("demo", teacher__source=source, prompts="x")),
        ]

    with lent(pipe) as source:
        ours, known = seen(source), teacher_fingerprint(TeacherSettings(source=source), network_only=False)
    pipe.save_pretrained(tmp_path)
    theirs = seen(str(tmp_path))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]
    with lent(pipe) as source:
        assert teacher_fingerprint(TeacherSettings(source=source), network_only=False) == known


def test_a_large_weight_is_read_in_part() -> None:
    weight = torch.arange(3 * 2**20 + 5, dtype=torch.float32)
    found = sampled(weight)
    assert len(found) == 2**20 and found[0] == 0 and found[-1] == weight[-1] and bool((found.diff() > 0).all())
    assert torch.equal(sampled(weight[:7]), weight[:7])
    assert object_fingerprint(make_sana(), ("nothing",)) == object_fingerprint(make_sdxl(), ("nothing",))


def test_licences_are_those_of_the_place_it_was_loaded_from(tmp_path: Path) -> None:
    pipe: Any = make_sana()
    with lent(pipe) as source:
        assert licences_of(source) == {"teacher": {}, "text_encoder": {}}
        assert "loaded from" not in api._unknown_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: mit\n---\n")
    loaded: Any = type(pipe).from_pretrained(tmp_path / "saved")
    with lent(loaded) as source:
        assert licences_of(source)["teacher"] == {"license": "mit"}
        assert f"object loaded from {tmp_path / 'saved'}; its files" in api._unknown_of(loaded)


class Compiled(nn.Module):
    """As torch.compile leaves a module, without the seconds that its first import takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod, self.config = module, module.config


def compiled(pipe: Any) -> None:
    pipe.register_modules(transformer=Compiled(pipe.transformer))


def offloaded(pipe: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.vae, ModelHook())


def adapted(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def quantised(pipe: Any) -> None:
    pipe.transformer.register_to_config(quantization_config={"quant_method": "torchao"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (compiled, "part 'transformer' of this SanaPipeline is compiled; give the pipeline as it was before"),
        (offloaded, r"part 'vae' of this SanaPipeline is offloaded; call pipe.remove_all_hooks\(\)"),
        (adapted, "part 'transformer' of this SanaPipeline has LoRAs that are not merged; call pipe.fuse_lora"),
        (quantised, "part 'transformer' of this SanaPipeline is quantised; load it in bfloat16"),
        (lambda pipe: pipe.vae.to("meta"), "part 'vae' of this SanaPipeline is not in memory; call"),
        (lambda pipe: pipe.transformer.half(), "part 'transformer' of this SanaPipeline is in float16; call pipe.to"),
        (lambda pipe: setattr(pipe, "vae", None), "this SanaPipeline has no 'vae'; load it with all its parts"),
    ],
)
def test_objects_that_are_no_plain_weights_are_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    pipe = make_sana()
    spoil(pipe)
    with pytest.raises(UserError, match=said):
        api.distill_pipeline(pipe, tmp_path / "prompts.txt", tmp_path / "run", SHORT, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("teacher.dtype=bfloat16", "teacher.dtype is bfloat16, but this pipeline object is in float32; leave it out"),
        ("teacher.source=./sana", "teacher.source is given twice, in changes and as `teacher`; leave it out of"),
        ("teacher.revision=main", "teacher.revision and teacher.variant are for hub ids; load the object with them"),
        ("teacher.lora=[style.safetensors]", r"merge it into the object with pipe.fuse_lora\(\)"),
        ("teacher.quantise=int8", "teacher.quantise would change the object's weights; give the pipeline's folder"),
        ("teacher.quantise_encoders=nf4", "teacher.quantise_encoders would change the object's weights; give the"),
        (
            "training.shard=all optimiser.name=adamw",
            "training.shard would take the object's weights apart; give the pipeline's folder",
        ),
    ],
)
def test_settings_that_are_for_folders_are_refused(change: str, said: str, tmp_path: Path) -> None:
    changes = [*SHORT, *change.split(), *["student.lora=4"] * ("quantise" in change)]
    with pytest.raises(UserError, match=said):
        api.distill_pipeline(make_sana(), tmp_path / "prompts.txt", tmp_path / "run", changes, quiet=True)
    assert not (tmp_path / "run").exists()


def test_other_objects_are_no_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the teacher is a Linear; give a DiffusionPipeline of diffusers"):
        api.distill_pipeline(nn.Linear(1, 1), tmp_path / "prompts.txt", tmp_path / "run")  # type: ignore[arg-type]


@pytest.fixture
def sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` of SDXL gives the tiny one."""

    def small(*_: Any, **__: Any) -> Any:
        pipe: Any = make_sdxl()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", small)


def test_the_examples_of_the_page_run_and_are_those_of_the_docstrings(
    sdxl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    for call in (api.distill_pipeline, api.sample, api.export):
        assert call.__doc__ and call.__doc__.split("Example:\n")[1].strip() in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox in snow\na red heart\n")
    names: dict[str, Any] = {"TINY": [*SHORT, "student.lora=4"]}
    exec(code.replace('preset="sdxl-lora-4step"', "changes=TINY, quiet=True"), names)
    assert names["student"] == Path("runs/mine/student")
    assert (tmp_path / "fox.png").stat().st_size > 100
    assert names["file"].stat().st_size > 1000 and (tmp_path / "fox-4step.README.md").is_file()


def test_a_device_that_is_not_here_is_refused(tmp_path: Path, prompts_file: Path) -> None:
    """Without a GPU, cuda and mps trained on the CPU without a word."""
    for device in ("cuda:7", "meta7"):
        with pytest.raises(UserError, match=rf"--device {device} cannot be used here"):
            api.distill_pipeline("emoji", prompts_file, tmp_path / "run", SHORT, device=device, quiet=True)
    assert not (tmp_path / "run").exists()
