"""What is particular to Qwen-Image, Chroma, LongCat-Image and Krea 2, and the folders of theirs that are refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chroma
import tiny_qwen
import torch

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.students.saving import save_whole
from stepfold.students.whole import new_student
from stepfold.teachers.flux import pack
from stepfold.teachers.guidance import guided_at_length, row_length, token_length
from stepfold.teachers.licences import licences_of
from stepfold.teachers.loading import family_of, load_teacher
from stepfold.teachers.oracle import agreement

PROMPTS = ["red heart", "dog on blue background"]


def load(folder: Path, **changes: Any) -> Any:
    return load_teacher(TeacherSettings(source=str(folder), **({"height": 16, "width": 32} | changes)), "cpu")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Path]:
    """A maker of pipelines -> the folder of its pipeline, which no test changes."""
    made: dict[Any, Path] = {}

    def of(make: Callable[[], Any]) -> Path:
        if make not in made:
            made[make] = tiny.save(make, tmp_path_factory.mktemp("family") / "pipeline")
        return made[make]

    return of


@pytest.mark.parametrize("most", [float("inf"), 1.0])
def test_guidance_keeps_the_length_of_a_token(most: float) -> None:
    """Or, with a limit, only shortens; elsewhere it is plain guidance."""
    x, without, with_prompt = torch.randn(3, 2, 4, 6, 8)
    t, weight = torch.tensor([0.0, 0.0]), torch.tensor([0.5, 4.0])  # of x = 0 and t = 0 the flow velocity is F
    F = guided_at_length(torch.zeros_like(x), t, without, with_prompt, weight, token_length, most)
    plain = without + weight.view(-1, 1, 1, 1) * (with_prompt - without)
    was, wanted, found = (pack(value).norm(dim=-1) for value in (plain, with_prompt, F))
    assert (wanted > was).any() and (wanted < was).any()
    torch.testing.assert_close(found, wanted if most > 1 else torch.minimum(was, wanted))
    torch.testing.assert_close(pack(F) / found[..., None], pack(plain) / was[..., None])


def test_lengths_are_those_of_rows_and_of_tokens() -> None:
    x = torch.randn(2, 4, 6, 8)
    assert row_length(x).shape == (2, 4, 6, 1) and token_length(x).shape == (2, 1, 6, 8)
    torch.testing.assert_close(token_length(x)[1, 0, 4:6, 2:4], x[1, :, 4:6, 2:4].norm().expand(2, 2))


def test_longcat_lengthens_nothing(folder_of: Any) -> None:
    """At a small scale, where some tokens would be: they are as in its pipeline."""
    teacher = load(folder_of(tiny_qwen.make_longcat))
    condition, scale = teacher.encode(PROMPTS), torch.full((2,), 1.2)
    assert agreement(teacher, PROMPTS, condition, scale, 2).network < 1e-4
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([1.5, 1.0])
    without, with_prompt = teacher.branches(0.5 * x, t, condition)
    rest = x, t, without / 0.5, with_prompt / 0.5, scale
    assert not torch.allclose(teacher.guided(*rest), guided_at_length(*rest, token_length), rtol=1e-3)


def test_chroma_knows_its_pipelines_mask(folder_of: Any) -> None:
    """One token of padding counts as text; the others are attended to as well, and the scores say which is which."""
    teacher = load(folder_of(tiny_chroma.make_chroma), max_tokens=24)
    condition = teacher.encode(["a", "a cat"])
    kept = [len(teacher.pipe.tokenizer(text).input_ids) + 1 for text in ("a", "a cat")]
    assert condition.mask.all() and condition.embeds[..., -1].sum(1).tolist() == kept
    assert condition.embeds[..., -1].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "make", [tiny_chroma.make_chroma, tiny_qwen.make_qwen_image, tiny_qwen.make_krea2, tiny_qwen.make_longcat]
)
def test_blocks_that_are_computed_again_are_the_same(make: Any, folder_of: Any) -> None:
    """diffusers' own Chroma leaves the mask out where it computes blocks again, and is another network there."""
    teacher = load(folder_of(make), max_tokens=24)
    condition, student = teacher.encode(PROMPTS), new_student(teacher)
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([1.5, 1.0])

    def both() -> list[torch.Tensor]:
        F = student(x, t, condition, torch.ones(2))
        weights = [p for p in student.transformer.parameters() if p.requires_grad]
        found = torch.autograd.grad(F.square().mean(), weights, allow_unused=True)
        return [F, *(gradient for gradient in found if gradient is not None)]

    before = both()
    student.recompute_blocks()
    for ours, wanted in zip(both(), before, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("options", [{"depth": 0.5}, {"two_times": True}])
def test_what_chroma_cannot_do_is_refused(options: dict[str, Any], folder_of: Any) -> None:
    teacher = load(folder_of(tiny_chroma.make_chroma), max_tokens=24)
    with pytest.raises(UserError, match=r"leave student\.(depth|times)") as caught:
        new_student(teacher, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "tokens", "said"),
    [
        (tiny_qwen.make_qwen_image, 1025, "max_tokens is 1025, but this pipeline reads 1024 tokens of a prompt; leave"),
        (tiny_qwen.make_longcat, 513, "max_tokens is 513, but this pipeline reads 512 tokens of a prompt; leave"),
        (tiny_qwen.make_krea2, 5, "max_tokens is 5, but this pipeline puts 5 tokens after each prompt, .*; give more"),
    ],
)
def test_prompts_of_a_length_that_it_does_not_read_are_refused(
    make: Any, tokens: int, said: str, folder_of: Any
) -> None:
    with pytest.raises(UserError, match=said):
        load(folder_of(make), max_tokens=tokens)


def test_a_krea_2_of_another_kind_is_refused(folder_of: Any, tmp_path: Path) -> None:
    folder = tiny.save(partial(tiny_qwen.make_krea2, is_distilled=True), tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"distilled to few steps already .*; give Krea 2 Raw"):
        load(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False, "patch_size": 4}))
    with pytest.raises(UserError, match=r"patch_size=4, and only 2 is understood; give Krea 2 Raw"):
        load(folder)


def test_the_layers_that_krea_2_reads_are_no_text_encoder(folder_of: Any, tmp_path: Path) -> None:
    """Their setting has a name that begins like a part's; a student has it, with conditions from disk too."""
    folder = folder_of(tiny_qwen.make_krea2)
    assert licences_of(str(folder)).keys() == {"teacher", "text_encoder"}
    whole = load(folder)
    condition = whole.encode(PROMPTS)
    source = TeacherSettings(source=str(folder), height=16, width=32)
    teacher = load_teacher(source, "cpu", network_only=True, null=whole.null_condition)
    torch.testing.assert_close(teacher.encode(PROMPTS).embeds, condition.embeds)
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    torch.testing.assert_close(load(tmp_path / "student").encode(PROMPTS).embeds, condition.embeds)


def test_a_qwen_image_that_embeds_guidance_is_refused(folder_of: Any, tmp_path: Path) -> None:
    def make() -> Any:
        pipe = tiny_qwen.make_qwen_image()
        pipe.transformer.register_to_config(guidance_embeds=True)
        return pipe

    with pytest.raises(UserError, match=r"has guidance_embeds=True: the pipeline cannot call .*; use a plain"):
        load(tiny.save(make, tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("QwenImageEditPipeline", "edits an image"),
        ("QwenImageEditPlusPipeline", "edits an image"),
        ("QwenImageLayeredPipeline", "takes an image apart"),
        ("QwenImageControlNetPipeline", "reads a control image"),
        ("LongCatImageEditPipeline", "edits an image"),
        ("ChromaImg2ImgPipeline", "starts from an image"),
    ],
)
def test_pipelines_of_more_than_a_text_are_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=rf"is a {name} \(it {why}.*(give|load)"):
        family_of(str(tmp_path))
