"""Any diffusers pipeline in our tables."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import torch
from PIL import Image

from stepfold import assets
from stepfold.commands.evaluate import run_evaluate
from stepfold.commands.protocols import run_geneval
from stepfold.display import Display, results_table
from stepfold.errors import UserError
from stepfold.evaluation.pipelines import Drawer, draw, geneval_prompts, write_geneval
from stepfold.teachers.loading import load_any_pipeline
from stepfold.teachers.safety import is_diffusers_own


@pytest.fixture(scope="module")
def sana(tiny_sana: Path) -> Drawer:
    return Drawer(load_any_pipeline(tiny_sana, "cpu"))


def test_a_picture_depends_on_its_own_number_only(sana: Drawer) -> None:
    together = draw(sana, ["red heart", "a cat"], [3, 4], 2, 4.5, seed=0)
    alone = draw(sana, ["a cat"], [4], 2, 4.5, seed=0)
    assert together.shape == (2, 3, 32, 32) and together.min() >= 0 and together.max() <= 1
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=0)
    assert (draw(sana, ["a cat"], [5], 2, 4.5, seed=0) - alone).abs().mean() > 1e-3
    assert (draw(sana, ["a cat"], [4], 2, 1.0, seed=0) - alone).abs().mean() > 1e-4  # guidance arrives
    assert sana.usual_steps == [20]


def test_a_call_that_the_pipeline_refuses_is_one_line(sana: Drawer) -> None:
    with pytest.raises(UserError, match="SanaPipeline cannot draw with num_inference_steps"):
        draw(sana, ["a cat"], [0, 1], 2, 4.5, seed=0)  # two generators for one prompt


def test_videos_are_not_measured() -> None:
    with pytest.raises(UserError, match="WanPipeline makes videos"):
        draw(Drawer(tiny.make_wan()), ["a cat"], [0], 2, 4.5, seed=0)


@pytest.mark.parametrize(
    ("kind", "negatives", "fixed"),
    [
        (diffusers.QwenImagePipeline, [" ", " "], {}),
        (diffusers.LongCatImagePipeline, ["", ""], {"enable_prompt_rewrite": False}),
        (diffusers.ErnieImagePipeline, None, {"use_pe": False}),
    ],
)
def test_a_teacher_is_called_as_for_its_students(
    kind: type, negatives: list[str] | None, fixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without negative prompts Qwen-Image has no guidance, and two others rewrite the prompts."""
    told: list[dict[str, Any]] = []

    def call(self: Any, prompt: Any = None, num_inference_steps: int = 50, **options: Any) -> Any:
        told.append(options)
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, 8, 8))

    monkeypatch.setattr(kind, "__call__", call)
    pipe = object.__new__(kind)
    draw(Drawer(pipe), ["a cat", "a dog"], [0, 1], 2, 4.0, seed=0)
    draw(Drawer(pipe), ["a cat"], [0], 2, 1.0, seed=0)  # guidance is off
    draw(Drawer(pipe, {2: {"num_inference_steps": 2}}), ["a cat"], [0], 2, None, seed=0)  # of a student
    assert [options.get("negative_prompt") for options in told] == [negatives, None, None]
    assert told[0].items() >= fixed.items() and not fixed.keys() & told[2].keys()


@pytest.mark.long
def test_pipelines_stand_side_by_side_and_the_better_one_scores_better(tiny_sana: Path) -> None:
    folders = [tiny_sana, Path(str(assets.TEACHER))]
    result = run_evaluate(folders, steps=[12], n=24, guidance=None, display=Display(quiet=True), device="cpu")
    poor, good = (result["pipelines"][str(folder)]["12"] for folder in folders)
    assert good["accuracy"] > 0.7 > 0.2 > poor["accuracy"] and good["fd"] < poor["fd"] / 2
    assert abs(good["accuracy"] - result["teacher"]["20"]["accuracy"]) < 0.2  # it is the same network
    assert good["agreement"] is None
    assert len(results_table(result).rows) == 4 + 2


def test_a_class_or_a_part_from_elsewhere_is_refused(tiny_sana: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sana, folder)
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"_class_name": "MyPipeline"}))
    with pytest.raises(UserError, match="MyPipeline, which is no pipeline of diffusers"):
        load_any_pipeline(folder, "cpu")
    index.write_text(json.dumps(parts | {"_class_name": ["pipeline", "MyPipeline"]}))
    with pytest.raises(UserError, match=r"code of its own, .*must be a pipeline of diffusers"):
        load_any_pipeline(folder, "cpu")
    index.write_text(json.dumps(parts | {"vae": ["evil", "Vae"]}))
    with pytest.raises(UserError, match="part 'vae' comes from 'evil', whose code would be run"):
        load_any_pipeline(folder, "cpu")
    assert is_diffusers_own("stable_diffusion")  # where Stable Diffusion's safety checker comes from
    assert not is_diffusers_own("evil") and not is_diffusers_own("../models") and not is_diffusers_own("")
    index.write_text(json.dumps(parts))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="does not load"):
        load_any_pipeline(folder, "cpu")


def test_geneval_pictures_are_where_its_scorer_looks_and_are_drawn_once(tiny_sana: Path, tmp_path: Path) -> None:
    rows = [{"tag": "single_object", "include": [], "prompt": "a cat"}, {"tag": "x", "prompt": "a fish, please"}]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = tmp_path / "out"
    options: Any = dict(steps=1, guidance=None, display=Display(quiet=True), device="cpu")
    run_geneval(tiny_sana, prompts, out, **options)
    for index, row in enumerate(rows):
        folder = out / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
    assert Image.open(out / "00001" / "samples" / "0003.png").size == (32, 32)
    (out / "00001" / "samples" / "0002.png").unlink()  # as if stopped there
    kept = {path: path.stat().st_mtime_ns for path in out.glob("00000/samples/*.png")}
    run_geneval(tiny_sana, prompts, out, **options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (out / "00001" / "samples" / "0002.png").exists()
    with pytest.raises(UserError, match="pictures of another pipeline or other settings"):
        run_geneval(tiny_sana, prompts, out, **options | {"steps": 2})
    other = tmp_path / "other"
    shutil.copytree(tiny_sana, other)
    (other / "model_index.json").touch()
    with pytest.raises(UserError, match="pictures of another pipeline or other settings"):
        run_geneval(other, prompts, out, **options)


@pytest.mark.parametrize("content", ["", "not json\n", '{"tag": "no prompt"}\n', "[1]\n"])
def test_a_file_that_is_not_genevals_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"evaluation_metadata.jsonl"):
        geneval_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        geneval_prompts(tmp_path / "none")


def test_pictures_of_a_prompt_differ(sana: Drawer, tmp_path: Path) -> None:
    write_geneval(sana, [{"prompt": "a cat"}], tmp_path, 1, None)
    pictures = {path.read_bytes() for path in (tmp_path / "00000" / "samples").iterdir()}
    assert len(pictures) == 4
