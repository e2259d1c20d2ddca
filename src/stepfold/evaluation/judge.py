"""The judge: a small CLIP that knows the teacher's pictures, with the feature statistics of real ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from stepfold.errors import NonFiniteError, UserError, first_line
from stepfold.evaluation.imagenet import ImageNet, load_imagenet
from stepfold.randomness import send

BATCH = 256
_PARTS = ("config.json", "model.safetensors", "tokenizer.json", "names.txt", "colours.txt", "features.safetensors")
_STATISTICS = ("mean", "covariance", "diversity")


@dataclass(frozen=True, eq=False)
class Judge:
    """What pictures are judged with. All feature statistics are those of real pictures.

    Attributes:
        clip: transformers CLIPModel, float32, frozen, on the judge's device.
        image_size: side of the pictures that the CLIP reads, in pixels.
        text_tokens: the longest text it reads, start and end included.
        pad_token, end_token: their ids.
        tokenizer: its tokenizer, which adds the start but not the end.
        names: what accuracy chooses among, in the order of the target indices.
        colours: the words that the protocol's prompts draw backgrounds from.
        mean: float64 [D], on the CPU.
        covariance: float64 [D, D], on the CPU.
        diversity: mean pairwise feature distance between real pictures of one prompt.
        imagenet: a second opinion; None without its package.
    """

    clip: CLIPModel
    image_size: int
    text_tokens: int
    pad_token: int
    end_token: int
    tokenizer: PreTrainedTokenizerFast
    names: tuple[str, ...]
    colours: tuple[str, ...]
    mean: Tensor
    covariance: Tensor
    diversity: float
    imagenet: ImageNet | None = None


def load_judge(folder: str | Path, device: torch.device | str) -> Judge:
    """Reads a judge's folder; nothing is fetched and nothing is unpickled.

    Args:
        folder: holds config.json and model.safetensors (a CLIPModel), tokenizer.json, names.txt and colours.txt (one a
            line) and features.safetensors (mean [D], covariance [D, D], diversity, of real pictures).
        device: where the CLIP runs.

    Raises:
        UserError: a part is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    if missing := [name for name in _PARTS if not (folder / name).is_file()]:
        raise UserError(f"{folder}: not a judge, {', '.join(missing)} missing; it holds {', '.join(_PARTS)}")
    try:
        clip, report = _as_any(CLIPModel).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        statistics = load_file(folder / "features.safetensors")
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}: the judge cannot be read ({reason}); copy or install it again") from error
    if absent := sorted(report["missing_keys"]):
        raise UserError(f"{folder}/model.safetensors: {len(absent)} weights missing, first {absent[0]}; copy it again")
    if absent := [name for name in _STATISTICS if name not in statistics]:
        raise UserError(f"{folder}/features.safetensors: {', '.join(absent)} missing; make the judge again")
    dim, text = clip.config.projection_dim, _as_any(clip.config.text_config)
    if statistics["mean"].shape != (dim,) or statistics["covariance"].shape != (dim, dim):
        raise UserError(f"{folder}/features.safetensors: not the statistics of {dim} features; make the judge again")
    tokenizer = _load_tokenizer(folder, text.eos_token_id, text.vocab_size)
    return Judge(
        clip=clip.eval().requires_grad_(False).to(device),
        image_size=_as_any(clip.config.vision_config).image_size,
        text_tokens=text.max_position_embeddings,
        pad_token=_as_any(tokenizer).pad_token_id,
        end_token=text.eos_token_id,
        tokenizer=tokenizer,
        names=_lines(folder / "names.txt"),
        colours=_lines(folder / "colours.txt"),
        mean=statistics["mean"].double(),
        covariance=statistics["covariance"].double(),
        diversity=float(statistics["diversity"]),
        imagenet=load_imagenet(folder, device),
    )


def _as_any(value: Any) -> Any:
    """The same value; transformers annotates its configs and tokenizers too loosely to read a field of them."""
    return value


def _load_tokenizer(folder: Path, end_token: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer, refused where its special tokens are not the ones that the model was trained with."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>"
    )
    if tokenizer.eos_token_id != end_token or len(tokenizer) > vocab_size:
        raise UserError(f"{folder}: tokenizer.json is not the one that the weights were trained with; copy both again")
    return tokenizer


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line)
    if not lines:
        raise UserError(f"{path}: empty; write one a line")
    return lines


def alignment(judge: Judge, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosines [N] of images float [N, 3, H, W] in [0, 1] to their texts, on the judge's device, with a gradient.

    No host-device sync: the images' numbers are not checked.
    """
    with torch.no_grad():
        ids, _ = _token_ids(judge, list(texts))
        of_texts = judge.clip.get_text_features(input_ids=send(ids, judge.clip.device))  # text is read up to its end
    return (_of_images(judge, images.to(judge.clip.device, torch.float32)) * _unit_features(of_texts)).sum(1)


@torch.no_grad()
def image_features(judge: Judge, images: Tensor) -> Tensor:
    """Features of unit length, in batches of BATCH.

    Args:
        images: float [N, 3, H, W] in [0, 1], on any device; resized where the CLIP's image size is another.

    Returns:
        float32 [N, D] on the CPU.

    Raises:
        NonFiniteError: an image holds NaN or infinity.
    """
    assert images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point(), f"{images.shape}, {images.dtype}"
    return torch.cat([_image_batch(judge, batch).cpu() for batch in images.split(BATCH)])


def _image_batch(judge: Judge, images: Tensor) -> Tensor:
    x = images.to(judge.clip.device, torch.float32)
    if not x.isfinite().all():
        broken = (~x.isfinite()).flatten(1).any(1).sum()
        raise NonFiniteError(f"{broken} of {len(x)} images to judge are not finite; look at the run's curves")
    low, high = x.aminmax()
    assert low >= 0 and high <= 1, f"images must be in [0, 1], not [{low:.3g}, {high:.3g}]"
    return _of_images(judge, x)


def _of_images(judge: Judge, x: Tensor) -> Tensor:
    """Features of unit length [N, D] of images in [0, 1], on the judge's device."""
    size = (judge.image_size, judge.image_size)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return _unit_features(judge.clip.get_image_features(x * 2 - 1))


def _unit_features(output: Any) -> Tensor:
    """The projected features of CLIPModel's get_*_features, which transformers 5 returns as `pooler_output`."""
    return F.normalize(output.pooler_output, dim=-1)


@torch.no_grad()
def text_features(judge: Judge, texts: Sequence[str]) -> Tensor:
    """Features of unit length [N, D], float32 on the CPU, in batches of BATCH.

    A text too long for the CLIP is cut; its end token, from which CLIP reads the text, always stays.
    """
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return torch.cat([_text_batch(judge, list(batch)).cpu() for batch in batches])


def _text_batch(judge: Judge, texts: list[str]) -> Tensor:
    ids, mask = (part.to(judge.clip.device) for part in _token_ids(judge, texts))
    return _unit_features(judge.clip.get_text_features(input_ids=ids, attention_mask=mask))


def _token_ids(judge: Judge, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens [N, L] and mask [N, L], in the host's memory."""
    encoded: Any = judge.tokenizer(texts, truncation=True, max_length=judge.text_tokens - 1)
    rows = [[*row, judge.end_token] for row in encoded["input_ids"]]
    ids = torch.full((len(rows), judge.text_tokens), judge.pad_token)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(judge.text_tokens) < torch.tensor([len(row) for row in rows])[:, None]).long()
    return ids, mask
