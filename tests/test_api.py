"""A network of one's own through the Python API, as the example in the docs does it."""

import ast
import copy
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inside import example
from PIL import Image
from torch import Tensor, nn

from stepfold.api import distill_module, draw, load_module_student
from stepfold.config import from_yaml, load_config
from stepfold.errors import NonFiniteError, UserError
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import flow_velocity, trigflow_time
from stepfold.maths.noise_schedules import FLOW
from stepfold.modules import usual_optimiser, with_course_of_r
from stepfold.objectives.consistency import short_of_r
from stepfold.students.card import read_card
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher
from stepfold.training.runs import read_metrics
from stepfold.web.runs import read_run


@pytest.mark.long
def test_the_example_runs_and_its_student_finds_the_rings(tmp_path: Path) -> None:
    assert example("own_network").main(tmp_path) < 0.2


def encode(prompts: Any) -> Condition:
    return Condition.whole(torch.ones(len(prompts), 1, 1))


class Exact(nn.Module):
    """The flow of a Gaussian of standard deviation 1.6, in float64; its one weight does nothing at its start."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.scale, self.prediction = nn.Parameter(torch.ones((), dtype=torch.float64)), prediction

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        exact = GaussianTeacher(torch.zeros(2, dtype=torch.float64), torch.tensor(1.6, dtype=torch.float64), 1.0)
        if self.prediction == "trigflow":
            return self.scale * exact.velocity(x, t)
        if self.prediction == "edm":
            return self.scale * x * 1.6**2 / (1.6**2 + t[:, None] ** 2)  # t is sigma
        time = trigflow_time(t)
        trig = x * (time.sin() + time.cos())[:, None]
        return self.scale * flow_velocity(x, t, exact.velocity(trig, time))


@pytest.mark.parametrize("prediction", ["flow", "trigflow", "edm"])
def test_all_predictions_are_the_same_teacher(prediction: Any) -> None:
    sigma_max = 1e3 if prediction == "edm" else math.inf
    teacher = ModuleTeacher(Exact(prediction), encode, (2,), prediction, sigma_max=sigma_max)
    assert math.tan(teacher.start_time) > 0.999e3 and teacher.student_times(1, "consistency")[0] <= max(
        teacher.start_time, 1.5708
    )
    times = [0.01, 0.3, 0.8, 1.2, 1.5, teacher.start_time]
    x, t = 0.5 * torch.randn(6, 2).double(), torch.tensor(times, dtype=torch.float64)
    exact = GaussianTeacher(torch.zeros(2, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64), 0.5)
    ours = teacher.velocity(x, t, encode(range(6)), t)
    torch.testing.assert_close(ours, exact.velocity(x, t), rtol=0, atol=1e-10)
    student = new_student(teacher)
    torch.testing.assert_close(0.5 * student(x / 0.5, t, encode(range(6)), t), ours, rtol=0, atol=1e-10)
    assert student.transformer.scale.requires_grad and not teacher.network.scale.requires_grad


class Labelled(nn.Module):
    """A flow-matching velocity that is its condition times x; notes how many rows each call has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.rows = nn.Parameter(torch.ones((), dtype=torch.float64)), []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        return self.scale * condition.embeds[:, 0] * x


def label(numbers: Any) -> Condition:
    return Condition.whole(torch.tensor([[[float(number)]] for number in numbers], dtype=torch.float64))


def test_guidance_is_that_of_the_velocities_and_the_student_needs_one_call() -> None:
    """A network in 2 x for nothing and c x for class c, at scale w, is one in (2 + w (c - 2)) x."""
    teacher = ModuleTeacher(Labelled(), label, (2,), nothing=label([2]), guidance=3.0)
    x, t, w = torch.randn(4, 2).double(), torch.tensor([0.2, 0.7, 1.1, 1.5]).double(), torch.tensor([1.0, 0, 3, 5])
    guided = teacher.velocity(x, t, label([5, 6, 7, 8]), w.double())
    alone = ModuleTeacher(Labelled(), label, (2,))
    torch.testing.assert_close(guided, alone.velocity(x, t, label([5, 2, 17, 32]), torch.ones(4)), rtol=0, atol=1e-10)
    assert teacher.network.rows == [8] and alone.network.rows == [4]
    student = new_student(teacher)
    assert student(x / 0.5, t, label([5, 6, 7, 8]), w).shape == guided.shape
    assert student.transformer.rows[-1] == 4 and teacher.default_guidance == 3


def test_guidance_without_a_condition_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance=3 needs .*; give it as `nothing`"):
        ModuleTeacher(Labelled(), label, (2,), guidance=3.0)
    with pytest.raises(UserError, match="`nothing` has 2 rows; give one"):
        ModuleTeacher(Labelled(), label, (2,), nothing=label([1, 2]))


def test_a_denoiser_is_asked_for_its_largest_noise_and_distils(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sigma_max is inf; .* for example 160"):
        ModuleTeacher(Exact("edm"), encode, (2,), "edm")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    teacher = ModuleTeacher(Exact("edm").float(), encode, (2,), "edm", sigma_max=160)
    few = ["training.steps=2", "training.prompts_per_step=2", "training.precision=no", "consistency.r_warmup=0"]
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, quiet=True)
    one = draw(teacher, student, ["a"] * 4000)
    assert float(one.std()) == pytest.approx(160 * 1.6**2 / (1.6**2 + 160**2), rel=0.05)  # two steps teach it nothing


def test_conditions_come_to_the_network() -> None:
    teacher = ModuleTeacher(Labelled().to("meta"), label, (2,))
    assert teacher.encode(["1", "2"]).embeds.device.type == "meta"


class Picture(nn.Module):
    """A convolution whose weights lie in memory as fast ones do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.net(x)


def test_a_student_of_ones_own_is_loaded_into_its_like(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    teacher, other = ModuleTeacher(Tied(), encode, (4,)), Wide()
    before = copy.deepcopy(other.state_dict())
    settings = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", settings, student=other, quiet=True)
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    assert not torch.equal(student.transformer.last.weight, before["last.weight"])
    assert not student.training  # a dropout would be on in `draw`
    again = load_module_student(teacher, tmp_path / "run", student=Wide())
    assert torch.equal(again.transformer.last.weight, student.transformer.last.weight) and not again.training
    with pytest.raises(UserError, match=r"has the weights of another student \(.*give the `student`"):
        load_module_student(teacher, tmp_path / "run")
    with pytest.raises(UserError, match=r"there is no .*student\.safetensors; give the folder of a run"):
        load_module_student(teacher, tmp_path / "run" / "student")
    begin = copy.deepcopy(student)  # which is an average, whose weights have no gradient
    distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "on", settings, student=begin, quiet=True)
    assert not torch.equal(begin.transformer.first.weight, student.transformer.first.weight)
    more = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "more", settings, student=again, quiet=True)
    assert torch.allclose(more.transformer.first.weight, student.transformer.first.weight, atol=0.01)  # it went on
    assert not torch.equal(again.transformer.first.weight, student.transformer.first.weight)  # in place
    drawn = draw(teacher, again, "a")
    assert drawn.shape == (1, 4) and torch.equal(drawn, draw(teacher, again, ["a"]))


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (nn.Linear(4, 4), r"the student cannot be called with x \[2, 4\]"),
        ("small.pt", "student is a str; give a torch.nn.Module that is called as the teacher's"),
    ],
)
def test_a_student_that_is_not_called_as_the_teacher_is_refused(tmp_path: Path, student: Any, said: str) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=said):
        distill_module(
            ModuleTeacher(Tied(), encode, (4,)), tmp_path / "prompts.txt", tmp_path / "run", student=student, quiet=True
        )
    assert not (tmp_path / "run").exists()


def test_a_network_of_ones_own_trains_at_a_rate_of_its_size(tmp_path: Path) -> None:
    """The preset's rate, which is for 0.6 billion weights, left the docs' first student nearly as it began."""
    small, larger, huge = Tied(), nn.Linear(1500, 1500), nn.Linear(20000, 20000, device="meta")
    assert usual_optimiser(small, []) == ["optimiser.name=adamw", "optimiser.lr=0.001"]
    assert usual_optimiser(larger, [])[1] == "optimiser.lr=0.0004" and usual_optimiser(huge, []) == []
    assert usual_optimiser(small, ["optimiser.lr=1e-5"]) == ["optimiser.name=adamw"]
    assert usual_optimiser(small, ["optimiser.name=came"]) == []
    assert usual_optimiser(small, ["optimiser.name=adamw"])[1] == "optimiser.lr=0.001"
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    settings = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    distill_module(ModuleTeacher(small, encode, (4,)), tmp_path / "prompts.txt", tmp_path / "run", settings, quiet=True)
    optimiser = from_yaml(tmp_path / "run" / "config.yaml").optimiser
    assert (optimiser.name, optimiser.lr) == ("adamw", 1e-3)


def test_r_ends_at_its_last_value_in_a_short_run_too(tmp_path: Path) -> None:
    """It stayed near 0 in a run of 400 steps, whose samples were as far off as the untrained network's."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    teacher = ModuleTeacher(Tied(), encode, (4,))
    few = ["training.steps=40", "training.prompts_per_step=2", "training.checkpoint_every=20"]
    distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, quiet=True)
    config = from_yaml(tmp_path / "run" / "config.yaml")
    assert short_of_r(config) is None and config.consistency.r_warmup == 8
    assert with_course_of_r(load_config("default"), [], tmp_path / "no", False) == load_config("default")
    own = ["consistency.r_warmup=3"]
    assert with_course_of_r(load_config("default", own), own, tmp_path / "no", False).consistency.r_warmup == 3
    longer = load_config("default", ["training.steps=60", "objective=continuous"])
    assert with_course_of_r(longer, [], tmp_path / "run", True).consistency == config.consistency


def test_draw_samples_the_teacher_itself() -> None:
    """The Gaussian's flow by twenty steps has its spread; a network that is told another time has not."""
    right = ModuleTeacher(Exact("flow").float(), encode, (2,))
    assert float(draw(right, None, ["a"] * 4000, steps=40).std()) == pytest.approx(1.6, rel=0.05)
    late = ModuleTeacher(Late(), encode, (2,))
    assert abs(float(draw(late, None, ["a"] * 4000, steps=40).std()) - 1.6) > 0.2
    assert torch.equal(draw(right, None, ["a"]), draw(right, None, ["a"], steps=20))
    with pytest.raises(NonFiniteError, match="the teacher's samples are not finite; check `prediction`"):
        draw(ModuleTeacher(Lost(), encode, (2,)), None, ["a"])
    with pytest.raises(UserError, match="student is a Exact; give what distill_module returned, or None"):
        draw(right, right.network, ["a"])  # type: ignore[arg-type]


class Lost(nn.Module):
    """Knows no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float("nan")))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.weight * x


class Late(nn.Module):
    """The Gaussian's flow, told half the time that it is called at."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Exact("flow").float()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.flow(x, t / 2, condition)


class Wide(nn.Module):
    """Another network than the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_a_student_in_another_memory_order_is_kept(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    teacher = ModuleTeacher(Picture(), encode, (4, 8, 8))
    settings = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", settings, quiet=True)
    again = load_module_student(teacher, tmp_path / "run")
    assert torch.equal(again.transformer.net.weight, student.transformer.net.weight)


class Tied(nn.Module):
    """Two layers with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_tied_weights_are_kept_resumed_and_stay_tied(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    few = ["training.steps=4", "training.prompts_per_step=2", "training.checkpoint_every=2", "objective=discrete"]
    torch.manual_seed(0)
    teacher = ModuleTeacher(Tied(), encode, (4,))
    run = tmp_path / "run"
    student = distill_module(teacher, tmp_path / "prompts.txt", run, few, quiet=True)
    again = load_module_student(teacher, run).transformer
    assert again.last.weight is again.first.weight and torch.equal(again.last.weight, student.transformer.last.weight)
    assert not torch.equal(again.last.weight, teacher.network.last.weight)
    before = (run / "student.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "000004")
    distill_module(teacher, tmp_path / "prompts.txt", run, few, resume=True, quiet=True)
    assert (run / "student.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_set_aside_as_the_command_does(tmp_path: Path) -> None:
    """It was resumed: one flipped bit changed the student without a word."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    few = ["training.steps=2", "training.prompts_per_step=2", "objective=discrete", "training.checkpoint_every=1"]
    teacher, run = ModuleTeacher(Tied(), encode, (4,)), tmp_path / "run"
    distill_module(teacher, tmp_path / "prompts.txt", run, few, quiet=True)
    before = (run / "student.safetensors").read_bytes()
    average = run / "checkpoints" / "000002" / "average.safetensors"
    contents = bytearray(average.read_bytes())
    contents[-1] ^= 1
    average.write_bytes(contents)
    distill_module(teacher, tmp_path / "prompts.txt", run, few, resume=True, quiet=True)
    assert (run / "student.safetensors").read_bytes() == before
    assert (run / "checkpoints" / "damaged_000002").is_dir()


def test_a_run_knows_its_module(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    few = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    teacher = ModuleTeacher(Tied(), encode, (4,))
    distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, quiet=True)
    with torch.no_grad():
        teacher.network.last.bias += 1e-3
    with pytest.raises(UserError, match=r"the content of Tied \(teacher\) has changed since this run began"):
        distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, resume=True, quiet=True)


def test_a_run_knows_how_its_module_is_read(tmp_path: Path) -> None:
    """The same weights under another meaning are another teacher: a run went on half under either."""
    few = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    network = nn.Sequential(nn.Linear(4, 4))
    wrapped = Timeless(network)
    distill_module(ModuleTeacher(wrapped, None, (4,)), None, tmp_path / "run", few, quiet=True)
    for other in (
        ModuleTeacher(wrapped, None, (4,), "trigflow"),
        ModuleTeacher(wrapped, None, (4,), data_std=2.0),
        ModuleTeacher(wrapped, None, (4,), "velocity", schedule=FLOW),
    ):
        with pytest.raises(UserError, match=r"what ModuleTeacher is told of the network \(now .*\) has changed"):
            distill_module(other, None, tmp_path / "run", ["training.steps=2", *few[1:]], resume=True, quiet=True)
        with pytest.raises(UserError, match=r"what ModuleTeacher is told of the network"):
            load_module_student(other, tmp_path / "run")
    same = ModuleTeacher(wrapped, None, (4,))
    load_module_student(same, tmp_path / "run")
    (tmp_path / "run" / "reading.json").unlink()  # of a run of an earlier version
    load_module_student(same, tmp_path / "run")
    distill_module(same, None, tmp_path / "run", ["training.steps=2", *few[1:]], resume=True, quiet=True)
    assert (tmp_path / "run" / "reading.json").is_file()


def test_a_network_in_half_precision_has_a_student_in_float32(tmp_path: Path) -> None:
    """In bfloat16 most of its weights never moved; float16 was "not finite", and its fix a traceback."""
    few = ["training.steps=3", "training.prompts_per_step=2", "objective=discrete", "optimiser.lr=1e-5"]
    half = ["training.precision=bf16", "training.walk_precision=bf16"]
    network = Timeless(nn.Sequential(nn.Linear(4, 4)).bfloat16())
    student = distill_module(ModuleTeacher(network, None, (4,)), None, tmp_path / "run", [*few, *half], quiet=True)
    ours, theirs = (next(m for m in each.modules() if isinstance(m, nn.Linear)) for each in (student, network))
    assert ours.weight.dtype == torch.float32 and theirs.weight.dtype == torch.bfloat16
    assert bool((ours.weight != theirs.weight.float()).all())
    with pytest.raises(UserError, match=r"is in bfloat16, and this run would call it in float32; give network\.float"):
        distill_module(ModuleTeacher(network, None, (4,)), None, tmp_path / "b", [*few, "training.precision=no"])
    with pytest.raises(UserError, match=r"cannot be called with x \[2, 4\].* give network\.float\(\)"):
        distill_module(ModuleTeacher(network.double(), None, (4,)), None, tmp_path / "d", few, quiet=True)
    with pytest.raises(UserError, match=r"the network is a function; give a torch\.nn\.Module"):
        ModuleTeacher(lambda x, t: x, None, (4,))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"latent_shape is 4; give that of one sample, such as \(4,\)"):
        ModuleTeacher(network, None, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"is in float16, which overflows; give network\.float"):
        distill_module(ModuleTeacher(network.half(), None, (4,)), None, tmp_path / "c", few, quiet=True)


def test_the_pages_settings_match_a_network_of_ones_own(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text(encoding="utf-8")
    matching = ast.literal_eval(page.split("\nmatching = ")[1].split("\nstudent")[0])
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    teacher = ModuleTeacher(Tied(), encode, (4,), nothing=encode([""]), guidance=3.0)
    few = [*matching, "fake.head_start=1", "training.steps=2", "training.prompts_per_step=2"]
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, quiet=True)
    assert any(
        bool((a != b).any()) for a, b in zip(student.parameters(), new_student(teacher).parameters(), strict=True)
    )


def test_guidance_that_is_none_is_refused(tmp_path: Path) -> None:
    """It called the network twice for the unguided, without a word."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    few = ["training.steps=1", "training.prompts_per_step=2", "objective=discrete"]
    teacher = ModuleTeacher(Tied(), encode, (4,), nothing=encode([""]))
    with pytest.raises(UserError, match=r"guidance is 1, which is none at twice the calls; give guidance=4"):
        distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", few, quiet=True)
    distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", [*few, "space.guidance=[3.0]"], quiet=True)
    with pytest.raises(UserError, match=r"has the student of a network of one's own; load it in Python"):
        read_card(tmp_path / "run")


class Timeless(nn.Module):
    """A network of x alone, whose output is changed by `after`."""

    def __init__(self, network: nn.Module, after: Any = lambda x: x) -> None:
        super().__init__()
        self.network, self.after = network, after

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.after(self.network(x))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda x: x[:, :1], r"returns \[2, 1\] for x \[2, 4\]"),
        (lambda x: x.mean(), r"returns \[\] for x \[2, 4\]"),
        (lambda x: (x,), r"returns a tuple for x"),
        (lambda x: None, r"returns a NoneType for x"),
        (lambda x: x @ torch.ones(3, 3), r"cannot be called with x \[2, 4\], its time \[2\] and the condition: mat1"),
    ],
)
def test_a_network_with_another_output_is_refused_before_a_run_is_made(after: Any, said: str, tmp_path: Path) -> None:
    """A single number a sample was broadcast without a word, and trained."""
    teacher = ModuleTeacher(Timeless(nn.Linear(4, 4), after), None, (4,))
    with pytest.raises(UserError, match=said):
        distill_module(teacher, None, tmp_path / "run", ["training.steps=1"], quiet=True)
    assert not (tmp_path / "run").exists() and not teacher.network._forward_hooks


@pytest.mark.parametrize(
    ("made", "said"),
    [(lambda p: torch.zeros(len(p), 1, 2), "gives a Tensor for 2"), (lambda p: label([1]), "gives 1 rows for 2")],
)
def test_an_encode_that_gives_no_row_a_prompt_is_refused(made: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=said):
        distill_module(ModuleTeacher(Tied(), made, (4,)), tmp_path / "prompts.txt", tmp_path / "run", quiet=True)


def test_samples_take_a_step_and_are_one_or_more() -> None:
    """No step gave back the noise."""
    teacher = ModuleTeacher(Timeless(nn.Linear(4, 4)), None, (4,))
    student = new_student(teacher)
    wrong: Any
    for wrong, count, said in (
        (0, 3, "steps is 0"),
        (-1, 3, "steps is -1"),
        (1.5, 3, "steps is 1.5"),
        (1, 0, "prompts"),
    ):
        with pytest.raises(UserError, match=rf"{said}.*, and `draw` takes one or more"):
            draw(teacher, student, count, steps=wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("conditions=/nowhere", "leave `conditions` out"),
        ("space.kind=images", "comes without an autoencoder; take space"),
        ("space.filter_rule=hard", "leave space.filter_rule=off"),
        ("adversarial.weight=0.5", "leave adversarial.weight at 0"),
        ("training.phases=[{steps: 1, set: {adversarial.weight: 0.5}}]", "leave adversarial.weight at 0"),
        ("student.lora=4", "leave student.lora at 0"),
        ("fake.updates=1", "give fake.kind=whole and fake.lr_factor=2"),
        ("teacher.height=64", "an argument of ModuleTeacher"),
    ],
)
def test_what_a_module_lacks_is_refused_and_leaves_no_run(change: str, said: str, tmp_path: Path) -> None:
    """Conditions and filters were ignored, images were walk ends, the discriminator was an AttributeError."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=said):
        distill_module(ModuleTeacher(Tied(), encode, (4,)), tmp_path / "prompts.txt", tmp_path / "run", [change])
    assert not (tmp_path / "run").exists()


def test_a_student_is_kept_read_back_and_resumed(tmp_path: Path) -> None:
    module = example("own_network")
    torch.manual_seed(0)
    teacher = ModuleTeacher(module.Flow(), module.encode, (2,))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("small ring\nlarge ring\n")
    few = ["training.steps=4", "training.prompts_per_step=2", "optimiser.name=adamw", "training.precision=no"]
    student = distill_module(teacher, prompts, tmp_path / "run", few, quiet=True)
    assert read_run(tmp_path, "run").state == "finished"  # it was "stopped", for want of a folder `student`
    again = load_module_student(teacher, tmp_path / "run")
    ours, theirs = (draw(teacher, s, ["small ring"] * 3, seed=4, steps=2) for s in (student, again))
    assert torch.equal(ours, theirs) and ours.shape == (3, 2)
    assert not torch.equal(ours, draw(teacher, new_student(teacher), ["small ring"] * 3, seed=4, steps=2))
    with pytest.raises(UserError, match="resume"):
        distill_module(teacher, prompts, tmp_path / "run", few, quiet=True)
    with pytest.raises(UserError, match=r"space\.guidance is \[1\.0, 2\.0\], but this teacher has no guidance"):
        distill_module(teacher, prompts, tmp_path / "two", [*few, "space.guidance=[1.0, 2.0]"], quiet=True)


@pytest.mark.parametrize("objective", ["matching", "identity"])
def test_a_guided_network_of_ones_own_is_matched(tmp_path: Path, objective: str) -> None:
    """With a fake score that is guided too, and so is asked without a prompt."""
    torch.manual_seed(0)
    module = example("own_network")
    nothing = Condition.whole(torch.zeros(1, 1, module.encode(["small ring"]).embeds.shape[-1]))
    teacher = ModuleTeacher(module.Flow(), module.encode, (2,), nothing=nothing, guidance=2.0)
    (tmp_path / "prompts.txt").write_text("small ring\nlarge ring\n")
    changes = [
        f"objective={objective}", "space.kind=rollout", "fake.kind=whole", "fake.updates=1", "fake.head_start=0",
        "fake.unprompted=0.5", "matching.fake_guidance=same", "rollout.steps=2", "training.steps=2",
        "training.prompts_per_step=4", "training.precision=no", "optimiser.name=adamw",
    ]  # fmt: skip
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", changes, quiet=True)
    assert draw(teacher, student, ["small ring"], steps=2).isfinite().all()
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(row["gap"] > 0 and row["fake/loss"] > 0 for row in rows)


class Free(nn.Module):
    """A velocity without a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None]], 1))


FEW = ["training.steps=2", "training.prompts_per_step=2", "training.precision=no", "consistency.r_warmup=0"]


def test_a_network_without_conditions_needs_no_prompts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, run = ModuleTeacher(Free(), None, (2,)), tmp_path / "run"
    few = [*FEW, "training.checkpoint_every=1"]
    student = distill_module(teacher, None, run, few, quiet=True)
    again = load_module_student(teacher, run)
    samples = draw(teacher, student, 5, steps=2)
    assert samples.shape == (5, 2) and len({tuple(row) for row in samples.tolist()}) == 5
    assert torch.equal(samples[:3], draw(teacher, again, 3, steps=2))
    assert not (run / "prompts.json").exists() and "prompts: ''" in (run / "config.yaml").read_text()
    before = (run / "student.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "000002")
    distill_module(teacher, None, run, few, resume=True, quiet=True)
    assert (run / "student.safetensors").read_bytes() == before


def test_prompts_and_conditions_go_together(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    free, reading = ModuleTeacher(Free(), None, (2,)), ModuleTeacher(Exact("flow"), encode, (2,))
    for teacher, prompts, said in (
        (free, tmp_path / "prompts.txt", r"takes no condition .*; give None instead of prompts"),
        (
            reading,
            None,
            r"takes a condition of each prompt, but there are no prompts; give them, or .* None for `encode`",
        ),
    ):
        with pytest.raises(UserError, match=said):
            distill_module(teacher, prompts, tmp_path / "run", FEW, quiet=True)
        with pytest.raises(UserError, match=said):
            draw(teacher, new_student(teacher), 3 if prompts is None else ["a"])
    assert not (tmp_path / "run").exists()


class Read(nn.Module):
    """A network that notes the conditions of its calls, and adds what each is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), set()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.seen |= {tuple(row) for row in condition.embeds.flatten(1).tolist()}
        return self.scale * (x + condition.embeds.flatten(1).mean(1)[:, None, None, None])


def test_numbers_and_pictures_are_conditions_too(tmp_path: Path) -> None:
    """As many as the network likes, of any shape; what stands in a line is for `encode` to read."""
    numbers, pictures = tmp_path / "numbers.txt", tmp_path / "pictures.txt"
    numbers.write_text("0.5 -1.25\n2 8\n")
    for i in range(2):
        Image.fromarray(np.full((4, 6, 3), 51 * (i + 1), np.uint8)).save(tmp_path / f"{i}.png")
    pictures.write_text(f"{tmp_path / '0.png'}\n{tmp_path / '1.png'}\n")

    def of_numbers(prompts: Any) -> Condition:
        return Condition.whole(torch.tensor([[[float(word) for word in prompt.split()]] for prompt in prompts]))

    def of_pictures(prompts: Any) -> Condition:
        read = [torch.from_numpy(np.array(Image.open(prompt))) for prompt in prompts]
        return Condition.whole(torch.stack(read).movedim(3, 1) / 255)

    few = [*FEW, "objective=discrete", "training.prompts_per_step=4"]
    seen = []
    for name, prompts, each in (("n", numbers, of_numbers), ("p", pictures, of_pictures)):
        nothing = each([prompts.read_text().split("\n")[0]]).each(torch.zeros_like)
        teacher = ModuleTeacher(Read(), each, (3, 4, 6), nothing=nothing, guidance=2.0)
        student = distill_module(teacher, prompts, tmp_path / name, few, quiet=True)
        lines = prompts.read_text().split() if name == "p" else ["0.5 -1.25"]
        assert draw(teacher, student, lines).isfinite().all()
        seen.append(teacher.network.seen)
    assert seen[0] == {(0.5, -1.25), (2.0, 8.0), (0.0, 0.0)}
    fifths = {tuple([value] * 72) for value in torch.tensor([0.0, 51 / 255, 102 / 255]).tolist()}
    assert seen[1] == fifths


def test_a_student_that_is_a_velocity_is_drawn_as_one(tmp_path: Path) -> None:
    """Euler steps with the exact velocity end at the data's deviation; consistency steps would shrink it."""
    teacher = ModuleTeacher(Exact("flow"), encode, (2,))
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    changes = ["objective=velocity", "training.steps=1", "optimiser.lr=1e-12"]
    student = distill_module(teacher, tmp_path / "prompts.txt", tmp_path / "run", changes, quiet=True)
    again = load_module_student(teacher, tmp_path / "run")
    assert student.sampler == again.sampler == "flow"
    deviations = [draw(teacher, s, ["a"] * 4000, steps=64).std().item() for s in (student, again)]
    assert deviations[0] == deviations[1] == pytest.approx(1.6, abs=0.1)
    again.sampler = "consistency"
    assert draw(teacher, again, ["a"] * 4000, steps=64).std().item() < 1.3
