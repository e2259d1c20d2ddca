"""A CLIP as a reward: the processor's own pixels, the scorer's own number, a gradient; and never the evaluator."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import save_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from stepfold.errors import UserError
from stepfold.evaluation import judge, reward
from stepfold.evaluation.judge import image_features, load_judge, text_features
from stepfold.evaluation.mjhq import load_clip
from stepfold.evaluation.reward import clip_reward, prepared, refuse_own_evaluator

PROMPTS = ["a red cat", "a fish", "a house and a moon"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_clip(tmp_path_factory.mktemp("clip"))
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)  # with these, every score is above 0, which the scorer clamps at
    for name, value in weights.items():  # the default scale gives nearly equal features for all inputs
        if value.is_floating_point() and name != "logit_scale":
            torch.nn.init.normal_(value, std=0.3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def smooth(height: int, width: int) -> torch.Tensor:
    """Pictures without detail that two ways of resizing would treat differently."""
    x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)[:, None]
    return torch.stack([torch.stack([x * y, 1 - x + 0 * y, (i + 1) / 4 * y + 0 * x]) for i in range(3)])


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (12, 20)])
def test_the_score_is_the_scorers_with_a_gradient(clip: Path, size: tuple[int, int]) -> None:
    """Resized pixels are off by what rounding to 8 bits takes: half a level each way that an image is resized."""
    pictures, scorer = (smooth(*size) * 255).round() / 255, load_clip(str(clip), "cpu")
    images = [Image.fromarray((p.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for p in pictures]
    theirs = scorer.processor(images, return_tensors="pt")["pixel_values"]
    resized, level = size != (16, 16), 1 / 255 / min(scorer.processor.image_std)
    ours = prepared(pictures, scorer.processor)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=level if resized else 1e-6)
    pictures.requires_grad_(True)
    found = clip_reward(str(clip), "cpu")(pictures, PROMPTS)
    assert found.shape == (3,) and (found.abs() > 1e-3).all()
    scores = scorer.score(images, PROMPTS).float()
    torch.testing.assert_close(100 * found.clamp(min=0), scores, rtol=0, atol=0.2 if resized else 1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    with torch.no_grad():
        raised = clip_reward(str(clip), "cpu")((pictures + 0.02 * gradient / gradient.abs().max()).clamp(0, 1), PROMPTS)
    assert (raised > found).all()


class Copies(TorchDispatchMode):
    """Notes operations that copy numbers of this machine to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = args[0] if args and isinstance(args[0], torch.Tensor) else out
        if isinstance(out, torch.Tensor) and first.device != out.device:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("kind", ["clip", "evaluator"])
def test_no_device_is_waited_for(clip: Path, judge_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without numbers reading one fails. Tokens are sent there as `send` does, and nothing else is."""
    sent: list[torch.Tensor] = []
    for module in (judge, reward):
        monkeypatch.setattr(
            module,
            "send",
            lambda values, device: sent.append(values) or torch.empty(values.shape, dtype=values.dtype, device=device),
        )
    score = clip_reward(str(clip if kind == "clip" else judge_folder), "meta")
    pictures = torch.empty(2, 3, 40, 48, device="meta", requires_grad=True)
    with Copies() as copies:
        found = score(pictures, ["cat on teal background", "red heart on white background"])
        (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert found.is_meta and gradient.shape == pictures.shape
    assert [values.shape[0] for values in sent] == [2] and copies.found == []


def test_an_evaluators_folder_scores_too(judge_folder: Path) -> None:
    evaluator, pictures = load_judge(judge_folder, "cpu"), torch.rand(2, 3, 48, 48).requires_grad_(True)
    texts = ["cat on teal background", "red heart on white background"]
    found = clip_reward(str(judge_folder), "cpu")(pictures, texts)
    exact = (image_features(evaluator, pictures.detach()) * text_features(evaluator, texts)).sum(1)
    torch.testing.assert_close(found, exact)
    assert torch.autograd.grad(found.sum(), pictures)[0].abs().max() > 0


def test_what_measures_is_no_reward_wherever_a_copy_of_it_lies(clip: Path, judge_folder: Path) -> None:
    copy = shutil.copytree(clip, judge_folder / "copy")
    with pytest.raises(UserError, match="has the weights of the evaluator"):
        refuse_own_evaluator(str(copy), [str(clip)])
    with pytest.raises(UserError, match="has the weights of the evaluator some/hub-id"):
        refuse_own_evaluator("some/hub-id", ["some/hub-id"])
    refuse_own_evaluator(str(copy), [str(judge_folder)])
    refuse_own_evaluator("some/hub-id", ["another/hub-id"])
