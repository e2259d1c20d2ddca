"""The graph under onnxruntime gives the student's latents, at other sizes than it was made with."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export import onnx
from stepfold.jobs.exporting import run_export
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.loading import load_merged

from .conftest import relative, run_alone

StudentOf = Callable[..., Path]
needs_newer_torch = pytest.mark.skipif(
    torch.__version__ < onnx.GRAPHS_SINCE, reason=f"onnx graphs need torch {onnx.GRAPHS_SINCE}"
)
PROMPTS = ["red heart", "a cat", "rocket on a white plate"]
READS = {
    "sana": {"x", "t", "embeds", "mask", "guidance"},
    "first sana": {"x", "t", "embeds", "mask"},
    "sd3": {"x", "t", "embeds", "pooled"},
    "flux": {"x", "t", "embeds", "pooled", "guidance"},
    "sd1": {"x", "t", "embeds"},
    "sdxl": {"x", "t", "embeds", "pooled"},
    "pixart": {"x", "t", "embeds", "mask"},
    "wan": {"x", "t", "embeds", "mask"},
    "dit": {"x", "t", "embeds"},
    "ernie-image": {"x", "t", "embeds", "mask"},
    "prx": {"x", "t", "embeds", "mask"},
}
LORA = {"sd1": 4}
"""Family -> rank of its student's LoRA, which is merged. The others are whole, among them sdxl, the other UNet."""

SETUP = """
import sys
import numpy
tensors = dict(numpy.load({file!r}))
noise, drawn = tensors.pop("noise"), iter([tensors.pop("fresh"), 0])
others = tensors
numpy.random.standard_normal = lambda shape: next(drawn)
"""


def pictures_of(teacher: Any, x0: Tensor) -> Tensor:
    """As the pipeline decodes them; of a video its frames [B, 3, F, H, W]."""
    pictures = teacher.decode(x0)
    return pictures if teacher.frames == 1 else pictures.unflatten(3, (teacher.frames, -1)).transpose(2, 3)


@needs_newer_torch
@pytest.mark.long
@pytest.mark.parametrize("family", READS)
def test_onnxruntime_alone_gives_the_students_latents(student_of: StudentOf, tmp_path: Path, family: str) -> None:
    """Two steps, three samples, by the README's own code; torch is not even imported there."""
    folder = student_of(family, LORA.get(family, 0))
    out = run_export(folder, "onnx", tmp_path / "onnx", force=False)
    teacher, student, card = load_merged(folder, "cpu")
    condition = teacher.encode(teacher.examples[:3] or PROMPTS)
    noise, fresh = torch.randn(2, len(PROMPTS), *teacher.latent_shape)
    scale = torch.full((len(PROMPTS),), 3.0)
    times = card.recipe.times[2]
    expected = sample_consistency(student, 0.5 * noise, condition, scale, times, lambda i: 0.5 * fresh, 0.5) / 0.5

    readme = (out / "README.md").read_text()
    named = set(re.findall(r"^\| (\w+) \| \w+\d", readme, re.MULTILINE))
    assert named == READS[family]
    given = {"embeds": condition.embeds, "mask": condition.mask, "pooled": condition.pooled, "guidance": scale}
    arrays = {name: value.numpy() for name, value in given.items() if name in named and isinstance(value, Tensor)}
    file, result = tmp_path / "inputs.npz", tmp_path / "x0.npy"
    np.savez(file, noise=noise.numpy(), fresh=fresh.numpy(), **arrays)
    code = re.search(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert code is not None
    end = f"assert 'torch' not in sys.modules\nnumpy.save({str(result)!r}, latents)"
    run_alone(SETUP.format(file=str(file)) + code[1].replace("FOLDER", str(out)) + end)
    scale, offset = teacher.autoencoder_scale()
    latents = torch.from_numpy(np.load(result))
    assert relative(latents, expected / scale + offset) < 1e-4
    decoded = teacher.pipe.vae.decode(teacher.to_autoencoder(latents.float()), return_dict=False)[0]
    assert relative((decoded / 2 + 0.5).clamp(0, 1), pictures_of(teacher, 0.5 * expected)) < 1e-4


@pytest.mark.long
@needs_newer_torch
@pytest.mark.parametrize("family", ["lumina", "z-image"])
def test_networks_that_count_tokens_on_the_host_cannot_be_traced_and_say_so(
    family: str, student_of: StudentOf, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"torch makes no onnx graph of .*; use --to pipeline"):
        run_export(student_of(family), "onnx", tmp_path / "onnx", force=False)
    assert list(tmp_path.iterdir()) == []


@needs_newer_torch
def test_what_torch_cannot_trace_is_one_line(
    student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("step 3 of 3") from TypeError("no such\nthing")

    with monkeypatch.context() as patch:
        patch.setattr(onnx, "trace", fails)
        with pytest.raises(UserError, match=r"torch makes no onnx graph of .* \(no such\); use --to pipeline"):
            run_export(student_of("sana"), "onnx", tmp_path / "onnx", force=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
        with pytest.raises(UserError, match=r"needs torch 2\.12 or newer, this is 2\.11\.0; install a newer one"):
            run_export(student_of("sana"), "onnx", tmp_path / "onnx", force=False)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxscript; pip install onnx onnxscript onnxruntime"):
        run_export(student_of("sana"), "onnx", tmp_path / "onnx", force=False)
    assert list(tmp_path.iterdir()) == []
