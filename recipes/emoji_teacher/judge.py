"""The judge: a tiny CLIP that has seen nothing but renders, and the feature statistics of real renders.

It reads 64 x 64 pictures and answers: which of the names is this, does the background match, how far is a set of
pictures from real renders (Frechet distance in its feature space), how different are pictures of one prompt.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from autoencoder import to_unit
from fit import device, fit
from render import COLOURED, COLOURS, NAMES, Renders
from teacher import make_tokenizer

TEXT_TOKENS = 16


def make_clip(vocab_size: int) -> CLIPModel:
    text = dict(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    vision = dict(
        image_size=64, patch_size=8, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def tokenise(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and mask [n, 16]; the end token comes right after the text, where CLIP pools."""
    tokens = tokenizer([t + "<eos>" for t in texts], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    return {"input_ids": tokens.input_ids.to(device()), "attention_mask": tokens.attention_mask.to(device())}


def degrade(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A little noise on every picture and a slight blur on a third of them: a decoder's artefacts are no new class."""
    x = x + 0.04 * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    chosen = torch.from_numpy(rng.random((len(x), 1, 1, 1)) < 0.33).to(x.device)
    return torch.where(chosen, blurred, x)


def train_judge(renders: Renders, work: Path, steps: int, batch: int = 128) -> CLIPModel:
    """Two contrastive terms: the picture against every name, and against the batch's prompts, colours included."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    clip = make_clip(len(tokenizer)).to(device())
    names = tokenise(tokenizer, list(NAMES))
    colours = list(COLOURS)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((3, step))
        rows = rng.integers(len(renders.images), size=batch)
        name = torch.from_numpy(renders.name[rows].astype(np.int64)).to(device())
        colour = torch.from_numpy(renders.colour[rows].astype(np.int64)).to(device())
        phrasings = [COLOURED[i] for i in rng.integers(len(COLOURED), size=batch)]
        prompts = [p.format(name=NAMES[n], colour=colours[c]) for p, n, c in zip(phrasings, name, colour, strict=True)]
        with torch.autocast(device().type, torch.bfloat16):
            pictures = clip.get_image_features(degrade(to_unit(renders.images[rows]), rng)).pooler_output
            # One plain phrasing for the names in each step; the bare name is what accuracy is read from.
            captions = clip.get_text_features(**names).pooler_output
            texts = clip.get_text_features(**tokenise(tokenizer, prompts)).pooler_output
        scale = clip.logit_scale.exp().clamp(max=60)
        pictures, captions, texts = (F.normalize(f.float(), dim=-1) for f in (pictures, captions, texts))
        by_name = scale * pictures @ captions.T
        by_prompt = scale * pictures @ texts.T
        same = ((name[:, None] == name) & (colour[:, None] == colour)).float()
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(by_name, name) + 0.5 * (
            F.cross_entropy(by_prompt, target) + F.cross_entropy(by_prompt.T, target)
        )
        return loss, {"accuracy": (by_name.argmax(1) == name).float().mean().item()}

    return fit(clip, loss_at, work, steps=steps, lr=1.5e-3, warmup=100, cooldown=0.5, ema=0.998)


@torch.no_grad()
def save_judge(clip: CLIPModel, real: Renders, folder: Path) -> dict[str, float]:
    """Writes the judge's folder and returns what it says of the real renders, none of which it has seen."""
    tokenizer = make_tokenizer()
    clip.save_pretrained(folder, safe_serialization=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    parts = [
        clip.get_image_features(to_unit(real.images[i : i + 256])).pooler_output
        for i in range(0, len(real.images), 256)
    ]
    features = F.normalize(torch.cat(parts), dim=-1).cpu()
    captions = F.normalize(clip.get_text_features(**tokenise(tokenizer, list(NAMES))).pooler_output, dim=-1).cpu()
    accuracy = ((features @ captions.T).argmax(1).numpy() == real.name).mean()
    # Diversity within a prompt that names its colour, as the protocol's prompts do.
    groups = renders_groups(real)
    spread = [torch.pdist(features[g]).mean().item() for g in groups if len(g) > 1]
    wide = features.double()
    save_file(
        {"mean": wide.mean(0), "covariance": wide.T.cov(), "diversity": torch.tensor(float(np.mean(spread)))},
        folder / "features.safetensors",
    )
    return {"accuracy": float(accuracy), "diversity": float(np.mean(spread)), "renders": len(features)}


def renders_groups(renders: Renders) -> list[np.ndarray]:
    """Row indices of the renders that share name and colour."""
    keys = renders.name.astype(np.int64) * len(COLOURS) + renders.colour
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)
