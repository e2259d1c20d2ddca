"""MJHQ-30k: FID with the standard 2015 Inception features and CLIP score, for pipelines of real size.

Pictures go to disk first, so that a run which is stopped goes on where it was; features are then read off them batch by
batch, and only their moments are kept.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.metrics import StreamingMoments, clip_score, frechet_distance
from stepfold.evaluation.pipelines import Drawer, draw
from stepfold.evaluation.preview import to_image
from stepfold.evaluation.protocol import fields_hash
from stepfold.training.runs import writing

BATCH = 16
META = "meta_data.json"
INCEPTION_SIZE = 2048
Features = Callable[[Tensor], Tensor]
"""uint8 pictures [B, 3, H, W] -> features [B, D]."""


@dataclass(frozen=True)
class MjhqProtocol:
    """Everything that a result depends on besides the pipeline.

    Attributes:
        n: prompts, the first of the list; 30,000 for the published figure.
        seed: of the noise.
        images_sha256: of meta_data.json, the list of prompts and pictures.
        inception_sha256: of the weights file.
        clip: hub id or folder of the CLIP.
        resize: how pictures reach the Inception network's 299 pixels.
        name, version: of the protocol.
    """

    n: int
    seed: int
    images_sha256: str
    inception_sha256: str
    clip: str
    resize: str = "TensorFlow 1's bilinear, as torch-fidelity has it"
    name: str = "mjhq30k"
    version: int = 1

    def hash(self) -> str:
        """As `Protocol.hash`."""
        return fields_hash(self)


@dataclass(frozen=True)
class Mjhq:
    """The benchmark's prompts and pictures.

    Attributes:
        keys: ids, in the file's order.
        prompts: one a key.
        paths: of the real pictures, one a key.
    """

    keys: list[str]
    prompts: list[str]
    paths: list[Path]


def open_mjhq(folder: Path, n: int) -> Mjhq:
    """The first n rows of a local MJHQ-30k folder in its published layout.

    Raises:
        UserError: meta_data.json or a picture is not where it belongs.
    """
    meta = folder / META
    if not meta.is_file():
        raise UserError(
            f"{meta} is missing; put MJHQ-30k's meta_data.json there and its unpacked mjhq30k_imgs.zip beside it, "
            "as mjhq30k_imgs/CATEGORY/ID.jpg"
        )
    try:
        rows = {
            str(key): (str(row["category"]), str(row["prompt"]))
            for key, row in json.loads(meta.read_text(encoding="utf-8")).items()
        }
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{meta} does not map ids to category and prompt ({error!r}); give MJHQ-30k's own meta_data.json"
        ) from None
    if len(rows) < n:
        raise UserError(f"{meta} has {len(rows)} prompts, fewer than n = {n}; give a smaller --n")
    keys = list(rows)[:n]
    for name in (*keys, *(rows[key][0] for key in keys)):
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:  # it becomes a file's name
            raise UserError(
                f"{meta} has {name!r} for an id or a category, which is no name of a file; "
                "give MJHQ-30k's own meta_data.json"
            )
    root = folder / "mjhq30k_imgs" if (folder / "mjhq30k_imgs").is_dir() else folder
    paths = [root / rows[key][0] / f"{key}.jpg" for key in keys]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{len(missing)} of {n} real pictures are missing, first {missing[0]}; unpack mjhq30k_imgs.zip")
    return Mjhq(keys, [rows[key][1] for key in keys], paths)


def inception_features(weights: Path, device: str) -> Features:
    """The 2048 features of the 2015 Inception network, by torch-fidelity.

    Raises:
        UserError: torch-fidelity or the weights are missing.
    """
    if not weights.is_file():
        raise UserError(
            f"{weights} is missing; it is torch-fidelity's weights-inception-2015-12-05-6726825d.pth as safetensors: "
            "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('weights-inception-2015-12-05-"
            "6726825d.pth', weights_only=True), 'inception.safetensors')\""
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} is no safetensors file ({error}); a .pth has to be converted first") from None
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(f"FID needs torch-fidelity ({error}); pip install torch-fidelity") from None
    buffer = io.BytesIO()
    torch.save(state, buffer)  # its constructor reads a pickle; this one holds what has just been read safely
    buffer.seek(0)
    network = FeatureExtractorInceptionV3("inception", [str(INCEPTION_SIZE)], feature_extractor_weights_path=buffer)
    network = network.to(device)
    return lambda pictures: network(pictures.to(device))[0]


@dataclass(frozen=True)
class ClipScorer:
    """The usual CLIP, through transformers."""

    model: Any
    tokenizer: Any
    processor: Any

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """100 x cosine of each picture to its prompt [B], negative ones as 0."""
        device = self.model.device
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        of_pictures = self.model.get_image_features(pixel_values=pixels).pooler_output
        of_texts = self.model.get_text_features(**tokens).pooler_output
        return torch.stack([clip_score(a[None], b[None]) for a, b in zip(of_pictures, of_texts, strict=True)])


def load_clip(source: str, device: str) -> ClipScorer:
    """A CLIP from a folder or the hub; safetensors only.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    try:
        model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor = CLIPImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the CLIP {source!r} does not load ({reason}); give a folder with --clip") from None
    return ClipScorer(model.eval().requires_grad_(False).to(device), tokenizer, processor)


def moments(paths: Sequence[Path], features: Features, tick: Callable[[int], None]) -> StreamingMoments:
    """Mean and covariance of the features of pictures on disk; one batch of them is in memory at a time.

    Pictures of different sizes go through one by one.

    Raises:
        UserError: a picture cannot be read.
    """
    found: StreamingMoments | None = None
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        pictures = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in map(read, batch)]
        groups = [torch.stack(pictures)] if len({p.shape for p in pictures}) == 1 else [p[None] for p in pictures]
        rows = torch.cat([features(group).cpu() for group in groups])
        found = (found or StreamingMoments.empty(rows.shape[1])).updated(rows)
        tick(len(batch))
    assert found is not None, "no pictures"
    return found


def read(path: Path) -> Image.Image:
    """A picture as RGB.

    Raises:
        UserError: it is none.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"picture {path} cannot be read ({error}); replace or delete it") from None


def real_moments(data: Mjhq, features: Features, cache: Path, tick: Callable[[int], None]) -> StreamingMoments:
    """`moments` of the real pictures, kept in the file `cache` for the next pipeline."""
    if not cache.exists():
        found = moments(data.paths, features, tick)
        with writing(cache) as part:
            save_file({"count": torch.tensor(found.count), "mean": found.mean, "scatter": found.scatter}, part)
    kept = load_file(cache)
    return StreamingMoments(int(kept["count"]), kept["mean"], kept["scatter"])


def draw_all(
    drawer: Drawer, data: Mjhq, folder: Path, steps: int, guidance: float | None, seed: int, tick: Callable[[int], None]
) -> list[Path]:
    """A pipeline's picture of every prompt, as folder/ID.png; those that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{key}.png" for key in data.keys]
    for start in range(0, len(paths), BATCH):
        batch = range(start, min(start + BATCH, len(paths)))
        todo = [i for i in batch if not paths[i].exists()]
        if todo:
            pictures = draw(drawer, [data.prompts[i] for i in todo], todo, steps, guidance, seed)
            for i, picture in zip(todo, pictures, strict=True):
                with writing(paths[i]) as part:
                    to_image(picture).save(part, format="PNG")
        tick(len(batch))
    return paths


def measure(
    paths: Sequence[Path], data: Mjhq, reals: StreamingMoments, features: Features, clip: ClipScorer,
    tick: Callable[[int], None],
) -> dict[str, float]:  # fmt: skip
    """FID and CLIP score of pictures on disk, one a prompt."""
    fakes = moments(paths, features, tick)
    fid = frechet_distance(fakes.mean, fakes.covariance, reals.mean, reals.covariance).item()
    scores = [
        clip.score([read(path) for path in paths[start : start + BATCH]], data.prompts[start : start + BATCH])
        for start in range(0, len(paths), BATCH)
    ]
    return {"fid": fid, "clip_score": torch.cat(scores).mean().item(), "n": len(paths)}
