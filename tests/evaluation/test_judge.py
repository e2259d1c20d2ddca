"""The judge gives CLIP's own features and refuses folders that are not a judge."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from stepfold.errors import NonFiniteError, UserError
from stepfold.evaluation.judge import BATCH, Judge, image_features, load_judge, text_features


def checkered(num: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Random 2 x 2 checkers: differences that a random CLIP sees, unlike those of pixel noise."""
    coarse = torch.rand(num, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="nearest")


def test_features_are_those_of_clip(judge: Judge):
    """CLIPModel.forward, an independent path, normalises and multiplies both kinds of features itself."""
    images, texts = checkered(5), ["cat on teal background", "dog"]
    ids = [judge.tokenizer(text)["input_ids"] + [1] for text in texts]
    for i, row in enumerate(ids):  # one text at a time: no padding, no mask
        with torch.no_grad():
            output = judge.clip(input_ids=torch.tensor([row]), pixel_values=images * 2 - 1)
        assert_close(image_features(judge, images), output.image_embeds, atol=1e-6, rtol=0)
        assert_close(text_features(judge, texts)[i : i + 1], output.text_embeds, atol=1e-6, rtol=0)


def test_features_tell_inputs_apart(judge: Judge):
    """Texts are read up to their end token: forgetting it pools at the first token, equal for all texts."""
    assert torch.pdist(text_features(judge, judge.names)).min() > 1e-2
    assert torch.pdist(image_features(judge, checkered(6))).min() > 5e-3


def test_batches_do_not_matter(judge: Judge):
    images = checkered(BATCH + 3, size=8)
    texts = [f"{name} {i}" for i in range(40) for name in judge.names]
    assert len(texts) > BATCH
    assert_close(image_features(judge, images)[-5:], image_features(judge, images[-5:]), atol=1e-5, rtol=0)
    assert_close(text_features(judge, texts)[-5:], text_features(judge, texts[-5:]), atol=1e-5, rtol=0)


def test_other_sizes_are_resized(judge: Judge):
    small = checkered(3)
    large = checkered(3, size=64)  # the same pictures
    features = image_features(judge, small)
    assert features.shape == (3, 6) and features.dtype == torch.float32 and not features.requires_grad
    assert_close(features.norm(dim=-1), torch.ones(3))
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert_close(image_features(judge, flat), image_features(judge, flat[..., :32, :32]), atol=1e-5, rtol=0)
    assert (image_features(judge, large) - features).norm(dim=-1).max() < 0.5 * torch.pdist(features).min()


def test_long_text_keeps_its_end(judge: Judge):
    tail = text_features(judge, ["cat " * 200, "dog " * 200, "cat " * 300])
    assert_close(tail[0], tail[2])
    assert (tail[0] - tail[1]).norm() > 1e-2


def test_bad_images(judge: Judge):
    images = checkered(4)
    images[2, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 4 images"):
        image_features(judge, images)
    with pytest.raises(AssertionError, match="must be in"):
        image_features(judge, checkered(2) * 2 - 1)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json", "colours.txt"])
def test_missing_part(judge_folder: Path, part: str):
    (judge_folder / part).unlink()
    with pytest.raises(UserError, match=f"not a judge, {part} missing"):
        load_judge(judge_folder, "cpu")


def test_pickled_weights_are_never_read(judge_folder: Path):
    weights = load_file(judge_folder / "model.safetensors")
    (judge_folder / "model.safetensors").unlink()
    torch.save(weights, judge_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors missing"):
        load_judge(judge_folder, "cpu")


def test_damaged_parts(judge_folder: Path):
    weights = load_file(judge_folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, judge_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights missing, first visual_projection\.weight"):
        load_judge(judge_folder, "cpu")
    (judge_folder / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read") as error:
        load_judge(judge_folder, "cpu")
    assert "\n" not in str(error.value)


def test_statistics_and_tokenizer_must_fit(judge_folder: Path):
    statistics = load_file(judge_folder / "features.safetensors")
    save_file(statistics | {"mean": torch.zeros(5)}, judge_folder / "features.safetensors")
    with pytest.raises(UserError, match="not the statistics of 6 features"):
        load_judge(judge_folder, "cpu")
    save_file(statistics, judge_folder / "features.safetensors")
    tokens = (judge_folder / "tokenizer.json").read_text()
    (judge_folder / "tokenizer.json").write_text(tokens.replace("<eos>", "<end>"))
    with pytest.raises(UserError, match="not the one that"):
        load_judge(judge_folder, "cpu")
