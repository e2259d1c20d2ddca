"""A CLIP as a reward: the cosine of picture and prompt, with a gradient to the picture. It is never the evaluator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.judge import alignment, load_judge
from stepfold.evaluation.mjhq import ClipScorer, load_clip
from stepfold.fingerprints import sampled_sha256
from stepfold.randomness import send
from stepfold.teachers.contract import PictureScore

WEIGHTS = "model.safetensors"


def clip_reward(source: str, device: torch.device | str) -> PictureScore:
    """The score of a folder or hub id: a CLIP, or an evaluator as `stepfold` ships one.

    Raises:
        UserError: it does not load.
    """
    if (Path(source) / "names.txt").is_file():
        judge = load_judge(source, device)
        return lambda pictures, prompts: alignment(judge, pictures, prompts)
    scorer = load_clip(source, str(device))
    return lambda pictures, prompts: clip_alignment(scorer, pictures, prompts)


def clip_alignment(scorer: ClipScorer, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosines [M] of pictures [M, 3, H, W] in [0, 1] to their prompts, with a gradient to the pictures.

    No host-device sync. A text is read up to its end, so that it needs no mask.
    """
    model, device = scorer.model, scorer.model.device
    with torch.no_grad():
        tokens = scorer.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        of_texts = model.get_text_features(input_ids=send(tokens["input_ids"], device)).pooler_output
    pixels = prepared(pictures.to(device, model.dtype), scorer.processor)
    of_pictures = model.get_image_features(pixel_values=pixels).pooler_output
    return F.cosine_similarity(of_pictures.float(), of_texts.float(), dim=1)


def prepared(pictures: Tensor, processor: Any) -> Tensor:
    """Pictures [M, 3, H, W] in [0, 1] as a CLIP's image processor makes its pixels: resized, cut, normed."""
    side, size = processor.size["shortest_edge"], pictures.shape[-2:]
    if min(size) != side:
        scaled = [int(side * length / min(size)) for length in size]  # as transformers rounds
        pictures = F.interpolate(pictures, scaled, mode="bicubic", antialias=True).clamp(0, 1)
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    top, left = ((length - cut) // 2 for length, cut in zip(pictures.shape[-2:], (height, width), strict=True))
    pictures = pictures[..., top : top + height, left : left + width]
    channels = zip(pictures.unbind(1), processor.image_mean, processor.image_std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def refuse_own_evaluator(reward: str, evaluators: Sequence[str]) -> None:
    """Refuses a reward whose weights are those of an evaluator: what is measured by it would say nothing.

    Raises:
        UserError: naming both.
    """
    own = weights_of(reward)
    for evaluator in evaluators:
        if evaluator == reward or (own is not None and own == weights_of(evaluator)):
            raise UserError(
                f"reward.clip={reward} has the weights of the evaluator {evaluator}, which would then measure how well "
                "it was fooled; train against another CLIP"
            )


def weights_of(source: str) -> str | None:
    """Fingerprint of a folder's weights; None of a hub id's."""
    file = Path(source) / WEIGHTS
    return sampled_sha256([file], file.parent) if file.is_file() else None
