"""The model under OpenVINO gives the student's latents.

pip install --target LIBRARIES --no-deps openvino
PYTHONPATH=src:tests:LIBRARIES pytest tests/export/test_openvino.py
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepfold.errors import UserError
from stepfold.export import onnx, openvino
from stepfold.export.runtimes import openvino_student
from stepfold.jobs.exporting import run_export
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.loading import load_merged

from .conftest import relative
from .test_files import listed, there
from .test_onnx import needs_newer_torch

StudentOf = Callable[..., Path]
PROMPTS = ["red heart", "a cat", "rocket on a white plate"]
LORA = {"sd1": 4}


@needs_newer_torch
@pytest.mark.long
@pytest.mark.parametrize("family", ["sana", "sd1", "emoji"])
def test_openvino_gives_the_students_latents(
    family: str, student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, three samples, by the README's own code and called as a student."""
    pytest.importorskip("openvino", reason="see the head of this file for the command")
    folder = Path("emoji-student") if family == "emoji" else student_of(family, LORA.get(family, 0))
    out = run_export(folder, "openvino", tmp_path / "openvino", force=False)
    assert there(out) == sorted(listed(out / "README.md")) == ["README.md", "model.bin", "model.xml", "stepfold.json"]
    teacher, student, card = load_merged(folder, "cpu")
    condition = teacher.encode(PROMPTS)
    noise, fresh = torch.randn(2, len(PROMPTS), *teacher.latent_shape)
    scales = torch.full((len(PROMPTS),), 3.0)

    def sampled(network: Any) -> torch.Tensor:
        times = card.recipe.times[2]
        return sample_consistency(network, 0.5 * noise, condition, scales, times, lambda i: 0.5 * fresh, 0.5) / 0.5

    expected = sampled(student)
    assert relative(sampled(openvino_student(out, threads=1)), expected) < 1e-4

    code = re.search(r"^```python\n(.*?)^```$", (out / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert code
    named = set(re.findall(r"^\| (\w+) \| \w+\d", (out / "README.md").read_text(), re.MULTILINE))
    given = {"embeds": condition.embeds, "mask": condition.mask, "pooled": condition.pooled, "guidance": scales}
    others = {name: value.numpy() for name, value in given.items() if name in named and value is not None}
    draws = iter([fresh.numpy(), np.zeros(1)])
    monkeypatch.setattr(np.random, "standard_normal", lambda shape: next(draws))
    names: dict[str, Any] = {"noise": noise.numpy(), "others": others}
    exec(code[1].replace("FOLDER", str(out)), names)
    scale, offset = teacher.autoencoder_scale()
    assert relative(torch.from_numpy(names["latents"]), expected / scale + offset) < 1e-4


@needs_newer_torch
def test_without_the_package_it_is_one_line(
    student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to openvino needs openvino; pip install 'openvino>=2026.4,<2027' onnx"):
        run_export(student_of("sana"), "openvino", tmp_path / "out", force=False)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to openvino needs onnx and onnxscript; pip install"):
        run_export(student_of("sana"), "openvino", tmp_path / "out", force=False)
    assert list(tmp_path.iterdir()) == []
