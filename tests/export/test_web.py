"""The page of a student samples what we sample: its graphs here, and the whole of it in a browser."""

import base64
import copy
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import find_browser
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export import onnx, web
from stepfold.jobs.exporting import run_export
from stepfold.prompts.reading import open_prompts
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.loading import load_student

from .conftest import relative

STUDENT = Path("emoji-student")
RUNTIMES = (os.environ.get("STEPFOLD_ONNXRUNTIME_WEB", ""), "node_modules/onnxruntime-web/dist")
PROMPTS = ["red heart on blue background", "Fox, in the SNOW!", "", "🦊 naïve <eos> café 3½", "a" * 200]
HOSTILE = [
    "it's  we'll   x",
    "User Prompt: pizza",
    " \t\n ",
    "ΑΣ İ ǅ",
    "<instruction><pad>",
    "中文 ｆｕｌｌ",
    "_ __ a_b 1234 !?",
]
needs_newer_torch = pytest.mark.skipif(
    torch.__version__ < onnx.GRAPHS_SINCE, reason=f"onnx graphs need torch {onnx.GRAPHS_SINCE}"
)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_student(STUDENT, "cpu")


def ours(loaded: Any, prompt: str, steps: int, noises: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Unit-variance latents and pixels of our own sampler, from unit-variance noise."""
    teacher, student, card = loaded
    noises = [0.5 * noise[None] for noise in noises]
    scale = torch.full((1,), card.recipe.guidance)
    times = card.recipe.times[steps]
    x0 = sample_consistency(student, noises[0], teacher.encode([prompt]), scale, times, lambda i: noises[i], 0.5)
    return x0[0] / 0.5, teacher.decode(x0)[0]


def empty_runtime(folder: Path) -> Path:
    folder.mkdir()
    for name in web.RUNTIME.values():
        (folder / name).write_bytes(b"")
    return folder


def unpacked(page: Path) -> dict[str, bytes]:
    lines = re.findall(r'^stepfold\.files\["(.+)"\] = "(.+)";$', (page / "graphs.js").read_text(), re.MULTILINE)
    return {name: gzip.decompress(base64.b64decode(text)) for name, text in lines}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With onnxruntime-web where it is, and with two empty files where it is not."""
    folder = tmp_path_factory.mktemp("web")
    runtime = next((Path(each) for each in RUNTIMES if each and Path(each).is_dir()), None)
    return run_export(STUDENT, "web", folder / "page", force=False, runtime=runtime or empty_runtime(folder / "none"))


@needs_newer_torch
@pytest.mark.long
def test_the_graphs_are_the_student(page: Path, loaded: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sessions = {name: onnxruntime.InferenceSession(graph) for name, graph in unpacked(page).items()}
    assert list(sessions) == ["text.onnx", "network.onnx", "decoder.onnx"]
    teacher, _, card = loaded
    (ids,) = teacher.pipe.tokenizer([teacher.before_prompts(teacher.pipe)[0] + PROMPTS[0]], padding=False).input_ids
    padded = np.array([ids + [0] * (16 - len(ids))])
    embeds, mask = sessions["text.onnx"].run(None, {"ids": padded, "ids_mask": (padded > 0).astype(np.int64)})
    noises = [torch.randn(teacher.latent_shape) for _ in range(2)]
    x0 = None
    for noise, t in zip(noises, card.recipe.times[2], strict=True):
        x = noise.numpy()[None] if x0 is None else (np.cos(t) * x0 + np.sin(t) * noise.numpy()).astype(np.float32)
        given = {"x": x, "t": np.full(1, t, np.float32), "embeds": embeds, "mask": mask}
        given["guidance"] = np.full(1, card.recipe.guidance, np.float32)
        read = {each.name for each in sessions["network.onnx"].get_inputs()}
        (F,) = sessions["network.onnx"].run(None, {name: value for name, value in given.items() if name in read})
        x0 = np.cos(t) * x - np.sin(t) * F
    assert x0 is not None
    (pixels,) = sessions["decoder.onnx"].run(None, {"x": x0.astype(np.float32)})
    latents, expected = ours(loaded, PROMPTS[0], 2, noises)
    assert relative(torch.from_numpy(x0)[0], latents) < 1e-3
    assert (torch.from_numpy(pixels) - expected).abs().max() < 2e-3
    facts = json.loads((page / "student.js").read_text().removeprefix("stepfold.student = ").rstrip(";\n"))
    assert facts["times"] == {str(n): list(card.recipe.times[n]) for n in (1, 2, 4)}
    assert sum(file.stat().st_size for file in page.iterdir()) < 25e6


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (extra dev)")
    path = find_browser()
    if path is None:
        pytest.skip("browser tests need a chromium; on Debian: apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.long
def test_the_pages_tokens_are_the_tokenizers(chromium: Any, loaded: Any) -> None:
    """Of the bundled prompts, and of strange ones; no graph and no runtime is needed for it."""
    teacher, _, card = loaded
    bundled = open_prompts("src/stepfold/assets/emoji/prompts.txt")
    texts = [*PROMPTS, *HOSTILE, *(bundled.prompt(i) for i in range(0, len(bundled), 37))]
    facts = web.facts_of(teacher, card, web.tokenizer_of(STUDENT, teacher))
    tab = chromium.new_page()
    tab.add_script_tag(path=str(web.PAGE / "page.js"))
    found = tab.evaluate(
        "([student, texts]) => ((stepfold.student = student), texts.map(stepfold.tokenise))", [facts, texts]
    )
    before = teacher.before_prompts(teacher.pipe)[0]
    expected = teacher.pipe.tokenizer(
        [before + text.lower().strip() for text in texts], padding=False, truncation=True, max_length=16
    ).input_ids
    assert found == expected
    tab.close()


@pytest.mark.long
def test_the_pages_noise_is_standard_normal(chromium: Any) -> None:
    tab = chromium.new_page()
    tab.add_script_tag(path=str(web.PAGE / "page.js"))
    noise = tab.evaluate("[[0, 0], [0, 1], [1, 0], [0, 0]].map(([seed, i]) => [...stepfold.noise(seed, i, 20000)])")
    tab.close()
    a, b, c, again = (torch.tensor(each, dtype=torch.float64) for each in noise)
    assert torch.equal(a, again)
    for each in (a, b, c):
        error = 5 / len(each) ** 0.5
        assert abs(each.mean()) < error and abs(each.var() - 1) < 2**0.5 * error
        assert abs((each**4).mean() - 3) < 96**0.5 * error
    for other in (b, c, a.roll(1)):
        assert abs((a * other).mean()) < 5 / len(a) ** 0.5


@needs_newer_torch
@pytest.mark.long
def test_the_page_samples_from_a_disk(page: Path, chromium: Any, loaded: Any) -> None:
    """In one, two and four steps from the page's own noise; it asks nobody for anything."""
    if not any(each and Path(each).is_dir() for each in RUNTIMES):
        pytest.skip("onnxruntime-web is not there; npm install onnxruntime-web, or set STEPFOLD_ONNXRUNTIME_WEB")
    tab = chromium.new_page()
    tab.set_default_timeout(250_000)
    asked: list[str] = []
    wrong: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(f"{(page / 'index.html').resolve().as_uri()}?wasm")
    tab.wait_for_function("document.getElementById('status').textContent.includes('network call')")
    for prompt, steps, seed in ((PROMPTS[0], 1, 0), (PROMPTS[1], 2, 1), (PROMPTS[3], 4, 7)):
        found = tab.evaluate(
            """async ([prompt, steps, seed]) => {
                const { latents, pixels } = await stepfold.sample(prompt, steps, seed);
                const noises = Array.from({ length: steps }, (_, i) => [...stepfold.noise(seed, i, latents.length)]);
                return { latents: [...latents], pixels: [...pixels], noises };
            }""",
            [prompt, steps, seed],
        )
        shape = loaded[0].latent_shape
        latents, pixels = ours(loaded, prompt, steps, [torch.tensor(each).reshape(shape) for each in found["noises"]])
        assert relative(torch.tensor(found["latents"]).reshape(shape), latents) < 1e-3
        assert (torch.tensor(found["pixels"]).reshape(pixels.shape) - pixels).abs().max() < 2e-3
    sides = tab.evaluate("[...document.querySelectorAll('canvas')].map(canvas => [canvas.width, canvas.height])")
    assert sides == [[64, 64]] * 4
    tab.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []


def test_what_the_page_cannot_do_is_refused(
    student_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "check_libraries", lambda to: None)
    out, runtime = tmp_path / "page", empty_runtime(tmp_path / "runtime")
    with pytest.raises(UserError, match=r"--runtime \S+ has no ort\S+; npm install onnxruntime-web, then give"):
        run_export(STUDENT, "web", out, force=False, runtime=tmp_path)
    with pytest.raises(UserError, match=r"--runtime \S+ is for --to web; leave it out of --to onnx"):
        run_export(STUDENT, "onnx", out, force=False, runtime=runtime)
    with pytest.raises(UserError, match=r"another tokenizer than the bundled teacher's.*; use --to onnx"):
        run_export(student_of("sd1", 4), "web", out, force=False, runtime=runtime)
    with pytest.raises(UserError, match=r"is a flow student, and the page samples consistency models; use --to onnx"):
        run_export(student_of("sd1", sampler="flow"), "web", out, force=False, runtime=runtime)
    assert not out.exists()


def test_only_the_bundled_kind_of_tokenizer_is_known(loaded: Any) -> None:
    """A Sana with other rules for its words is refused too; other vocabularies and lengths are fine."""
    rules = json.loads(loaded[0].pipe.tokenizer.backend_tokenizer.to_str())
    known = copy.deepcopy(web.kind_of(rules))
    rules["model"]["merges"], rules["truncation"] = [], None
    assert web.kind_of(rules) == known
    rules["pre_tokenizer"]["add_prefix_space"] = False
    assert web.kind_of(rules) != known


def test_weights_that_fit_are_stored_in_half() -> None:
    helper = pytest.importorskip("onnx").helper
    numpy_helper = pytest.importorskip("onnx").numpy_helper
    large, small = np.full((1024,), 0.1, np.float32), np.full((4,), 0.1, np.float32)
    beyond = np.full((1024,), 1e6, np.float32)
    weights = {"large": large, "small": small, "beyond": beyond}
    nodes = [helper.make_node("Neg", [name], [f"{name}_out"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"{name}_out", 1, value.shape) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes, "g", [], outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    packed = web.in_half(model)
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(packed)
    found = evaluator.run(None, {})
    for value, (name, weight) in zip(found, weights.items(), strict=True):
        stored = weight.astype(np.float16).astype(np.float32) if name == "large" else weight
        assert value.dtype == np.float32 and np.array_equal(value, -stored), name
    assert {each.name for each in model.graph.initializer} == {"large_half", "small", "beyond"}
