"""Quantised layers are the layers of their own weights: forward, backward, every tangent, and a LoRA above them."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forms import cases
from safetensors.torch import load_file
from test_cli import Result
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepfold.commands.prompts import run_encode
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.export.pipeline import save_student
from stepfold.maths.tangent import total_derivative
from stepfold.prompts.conditions import cache_of, conditions_from
from stepfold.prompts.reading import open_prompts
from stepfold.students.card import read_card
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers import quantised
from stepfold.teachers.contract import deepcopy_sharing
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.quantised import QuantisedLinear, decoded, encoded, nf4_levels, quantise, quantised_layer
from stepfold.training import set_up
from stepfold.training.doctor import examine

KINDS: tuple[Any, ...] = ("int8", "fp8", "nf4")
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5}


def layer_of(kind: Any, dtype: torch.dtype = torch.float32) -> tuple[QuantisedLinear, nn.Linear]:
    """A quantised layer, and a plain one of the same weights."""
    plain = nn.Linear(128, 96).to(dtype).requires_grad_(False)
    layer = quantised_layer(plain, kind, "cpu")
    plain.weight.copy_(layer.weight)
    return layer, plain


def test_nf4_has_the_levels_of_its_paper() -> None:
    levels = nf4_levels()
    assert len(levels) == 16 and levels[0] == -1 and levels[7] == 0 and levels[15] == 1 and (levels.diff() > 0).all()
    torch.testing.assert_close(levels[[1, 6, 8, 14]], torch.tensor([-0.6961928, -0.0910500, 0.0795803, 0.7229568]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [256, 48, 2])
def test_a_weight_is_off_by_half_a_step_at_most(kind: Any, columns: int) -> None:
    """Of its row, or of its block of 64; rows of zeros stay so, and what is encoded again stays as it is."""
    weight = torch.randn(24, columns) * torch.logspace(-3, 3, 24)[:, None]
    weight[5] = 0
    codes, scales = encoded(weight, kind)
    found = decoded(codes, scales, kind)
    assert codes.dtype == torch.uint8 and codes.numel() == weight.numel() * BYTES[kind] and not found[5].any()
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "nf4":
        blocks = weight.unflatten(1, (-1, min(64, columns) if columns != 48 else 16))
        largest = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).flatten(1)
    step = {"int8": largest / 127, "fp8": (weight.abs() / 8).maximum(largest / 448 / 256), "nf4": 0.3039 * largest}[
        kind
    ]
    assert ((found - weight).abs() <= step / 2 + 1e-6 * largest).all()
    torch.testing.assert_close(decoded(*encoded(found, kind), kind), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_layer_of_its_weights(kind: Any) -> None:
    layer, plain = layer_of(kind)
    assert isinstance(layer, nn.Linear) and not list(layer.parameters())[1:]  # the bias alone
    x, wanted = (torch.randn(3, 7, 128).requires_grad_() for _ in range(2))
    wanted.data.copy_(x.data)
    up = torch.randn(3, 7, 96)
    (layer(x) * up).sum().backward()
    (plain(wanted) * up).sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)
    torch.testing.assert_close(layer(x), plain(wanted))


def test_a_block_of_it_is_computed_again() -> None:
    (first, plain_first), (last, plain_last) = layer_of("nf4"), layer_of("int8")
    back = torch.randn(96, 128)
    x, wanted = (torch.linspace(-2, 2, 256).view(2, 128).requires_grad_() for _ in range(2))
    checkpoint(lambda x: last(torch.tanh(first(x)) @ back), x, use_reentrant=False).sum().backward()
    plain_last(torch.tanh(plain_first(wanted)) @ back).sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_autograd_keeps_no_weight(kind: Any, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of(kind)
    made: list[weakref.ref[Any]] = []

    def noted(self: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        weight = decoded(self.codes, self.scales, self.kind).to(dtype)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(QuantisedLinear, "multiplied_out", noted)
    x = torch.randn(2, 128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = layer(x)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    out.sum().backward()
    assert len(made) == 2 and x.grad is not None and x.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["two_pass", "one_pass", "finite_difference"])
def test_every_tangent_goes_through_it(kind: Any, backend: str) -> None:
    """bitsandbytes' NF4 gives zeros here, and its int8 has no two_pass."""
    layer, plain = layer_of(kind)
    head = nn.Linear(96, 128)

    def network(of: nn.Module) -> Any:
        return lambda x, t: head(torch.tanh(of(x) * (1 + t[:, None])))

    x, t, dx, dt = torch.randn(3, 128), torch.rand(3), torch.randn(3, 128), torch.rand(3)
    found, wanted = (total_derivative(network(of), x, t, dx, dt, backend) for of in (layer, plain))
    torch.testing.assert_close(found.dF, wanted.dF, rtol=1e-4, atol=1e-3)
    assert wanted.dF.norm() > 1 and found.F.requires_grad


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: pytest.FixtureRequest, tiny_sana: Path) -> PipelineTeacher:
    settings = TeacherSettings(source=str(tiny_sana), max_tokens=32, quantise=request.param)
    return load_teacher(settings, "cpu")


def test_a_teachers_blocks_are_quantised_and_nothing_else(teacher: PipelineTeacher, tiny_sana: Path) -> None:
    plain = load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=32), "cpu")
    linears = {name for name, layer in plain.transformer.named_modules() if isinstance(layer, nn.Linear)}
    found = {name for name, layer in teacher.transformer.named_modules() if isinstance(layer, QuantisedLinear)}
    assert found == {name for name in linears if "block" in name} != linears
    condition, x, t = plain.encode(["red heart"]), 0.5 * torch.randn(1, *plain.latent_shape), torch.tensor([1.0])
    near, far = (each.velocity(x, t, condition, None) for each in (teacher, plain))
    assert 1e-4 < float((near - far).norm() / far.norm()) < 0.3


def test_a_lora_is_trained_above_it(teacher: PipelineTeacher) -> None:
    """The codes are in memory once; each matrix that can learn in a first step does."""
    student = lora_student(teacher, 4)
    ours = {name for name, _ in student.named_buffers() if name.endswith(".codes")}
    assert ours and codes_of(student) == codes_of(teacher.transformer) and ours <= student.shared
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.4, 1.2])
    student(x, t, teacher.encode(["a cat", "a dog"]), torch.full((2,), 4.5)).square().sum().backward()
    learnt = {name for name, p in student.named_parameters() if ".lora_B." in name}
    assert learnt and all(student.get_parameter(name).grad.abs().sum() > 0 for name in learnt)  # type: ignore[union-attr]


def test_odd_layers_stay_as_they_are() -> None:
    network = nn.ModuleDict({"block": nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 6))})
    found = quantise(network, "nf4", ("block",), "cpu")
    assert [type(layer) for layer in found["block"]] == [nn.Linear, QuantisedLinear]  # type: ignore[index]
    assert quantise(nn.Sequential(nn.Linear(4, 4)), "none", ("",), "cpu")[0].weight.requires_grad  # type: ignore[index]


def test_whole_networks_beside_it_are_refused() -> None:
    given = ("teacher.quantise=nf4", "prompts=p.txt")
    with pytest.raises(UserError, match=r"student.lora is 0, but teacher.quantise=nf4 .*; give student.lora=64, or "):
        load_config("default", given, teacher__source="x/y")
    with pytest.raises(UserError, match=r"training.compile is not tested with .*; give training.compile=false, or "):
        load_config("default", [*given, "student.lora=4", "training.compile=true"], teacher__source="x/y")
    whole = ("student.lora=4", "objective=matching", "space.kind=rollout", "fake.updates=1", "fake.kind=whole")
    with pytest.raises(UserError, match=r"fake.kind is whole, but teacher.quantise=nf4 .*; give fake.kind=lora"):
        load_config("default", [*given, *whole], teacher__source="x/y")


def codes_of(network: nn.Module) -> set[int]:
    """Where its codes are."""
    return {value.data_ptr() for name, value in network.named_buffers() if name.endswith(".codes")}


def test_a_run_above_it_leaves_a_lora_for_the_plain_weights(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder samples above the codes, once in memory; an export has the plain weights, with the LoRA's change."""
    copies: list[tuple[nn.Module, nn.Module]] = []

    def watched(module: Any, shared: Any) -> Any:
        copies.append((module, deepcopy_sharing(module, shared)))
        return copies[-1][1]

    monkeypatch.setattr(set_up, "deepcopy_sharing", watched)
    small = (
        "training.steps=2", "training.preview_every=9", "space.route_steps=3", "training.precision=no",
        "training.walk_precision=no", "teacher.max_tokens=24", "space.filter_rule=off", "evaluation.n=0",
        "teacher.quantise=nf4", "teacher.quantise_encoders=int8", "optimiser.name=adamw", "optimiser.lr=0.01",
    )  # fmt: skip
    given = ["--preset", "default", *(part for change in small for part in ("--set", change))]
    common = ("--teacher", tiny_sana, "--prompts", prompts_file, "--lora", "2", "--out", tmp_path / "run", "--quiet")
    assert (result := Result("distill", *common, *given)).code == 0, result.err
    [(trained, average)] = copies
    assert codes_of(trained) and codes_of(trained) == codes_of(average)
    student = tmp_path / "run" / "student"
    settings = read_card(student).teacher_settings()
    assert (settings.quantise, settings.quantise_encoders) == ("nf4", "int8")
    above, _, _ = load_student(student, "cpu")
    below, _, _ = load_student(student, "cpu", quantise="none")
    assert any(isinstance(layer, QuantisedLinear) for layer in above.transformer.modules())
    kept, plain = (each.encode(["red heart"]).embeds for each in (above, below))
    of_files = TeacherSettings(source=str(tiny_sana), max_tokens=24, dtype=settings.dtype)
    files = load_teacher(of_files, "cpu").encode(["red heart"]).embeds
    assert not torch.equal(kept, plain) and torch.equal(plain, files)
    merged, _, _ = load_merged(student, "cpu")
    before, after = below.transformer.state_dict(), merged.transformer.state_dict()
    lora = load_file(student / "pytorch_lora_weights.safetensors")
    names = {name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in lora if "lora_A" in name}
    for name in names:
        gain = lora[f"transformer.{name}.lora_B.weight"] @ lora[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], gain, rtol=1e-3, atol=1e-5)
    assert Result("sample", student, "red heart", "--out", tmp_path / "a.png").code == 0
    assert (
        Result("export", student, "--to", "lora", "--keys", "comfy", "--out", tmp_path / "lora.safetensors").code == 0
    )


@pytest.mark.parametrize("kind", cases(KINDS, short=["nf4"]))
def test_text_encoders_are_quantised_and_students_have_the_plain_ones(
    kind: Any, tiny_sana: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """Once: what was parked comes back as it was. Conditions on disk are those of their kind."""
    common = (f"teacher.source={tiny_sana}", "teacher.max_tokens=32", f"prompts={prompts_file}", "objective=discrete")
    rounded = (*common, f"teacher.quantise_encoders={kind}")
    config = load_config("default", rounded)
    plain, teacher = (load_teacher(load_config("default", each).teacher, "cpu") for each in (common, rounded))
    wanted, found = plain.encode(["red heart"]).embeds, teacher.encode(["red heart"]).embeds
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 0.3
    encoder, codes = teacher.pipe.text_encoder, codes_of(teacher.pipe.text_encoder)
    linears = {name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    inside = {name for name, layer in encoder.named_modules() if isinstance(layer, QuantisedLinear)}
    assert inside == {name for name in linears if "layers" in name} and inside
    assert not any(isinstance(layer, QuantisedLinear) for layer in teacher.transformer.modules())
    teacher.park_text_encoder()
    assert torch.equal(teacher.encode(["red heart"]).embeds, found) and codes_of(encoder) == codes

    folder = tmp_path / "student"
    save_student(teacher, new_student(teacher), folder, config, tiny.recipe(teacher), "red heart")
    ours, theirs = (load_file(next((each / "text_encoder").glob("*.safetensors"))) for each in (folder, tiny_sana))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert teacher.pipe.text_encoder is encoder

    run_encode(config.teacher, prompts_file, tmp_path / "cache", batch=5, display=Display(quiet=True), device="cpu")
    prompts = open_prompts(prompts_file)
    other = load_config("default", [*common, f"conditions={tmp_path / 'cache'}"])
    with pytest.raises(UserError, match=rf"encoded with another quantise_encoders \('{kind}' there, None now\)"):
        cache_of(other, prompts)
    same = load_config("default", [*rounded, f"conditions={tmp_path / 'cache'}"])
    kept = conditions_from(cache_of(same, prompts), teacher, prompts)([1])
    torch.testing.assert_close(kept.embeds, teacher.encode([prompts.prompt(1)]).embeds, rtol=0.01, atol=0.01)


def test_a_lora_in_text_encoders_that_are_quantised_is_for_lora_students() -> None:
    given = ("teacher.quantise_encoders=int8", "teacher.lora=style.safetensors", "prompts=p.txt")
    with pytest.raises(UserError, match=r"quantise_encoders=int8 leaves none with .*; give student.lora=64, or"):
        load_config("default", given, teacher__source="x/y")
    load_config("default", [*given, "student.lora=4"], teacher__source="x/y")


@pytest.mark.parametrize(
    ("encoders", "what"), [("none", "int8 weights"), ("nf4", "int8 weights and nf4 text encoders")]
)
def test_doctor_measures_what_it_costs(encoders: Any, what: str, tiny_sana: Path) -> None:
    settings = TeacherSettings(source=str(tiny_sana), max_tokens=32, quantise="int8", quantise_encoders=encoders)
    findings = {finding.check: finding for finding in examine(settings, "cpu", lora=4)}
    found = findings[f"velocity with {what}"]
    assert found.ok and "relative difference" in found.number
    with pytest.raises(UserError, match="--quantise int8 leaves no weights to train; add --lora 64"):
        examine(settings, "cpu")


def test_wrong_codes_are_flagged(tiny_sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "decoded", lambda codes, scales, kind: -decoded(codes, scales, kind))
    settings = TeacherSettings(source=str(tiny_sana), max_tokens=32, quantise="int8")
    findings = {finding.check: finding for finding in examine(settings, "cpu", lora=4)}
    assert not findings["velocity with int8 weights"].ok
