"""Trains a small network that tells renders of Fluent's emoji from those of Noto's.

`python recipes/emoji_teacher/style_classifier.py` after style_lora.py, whose renders it reads. It sees half of its
renders through the bundled autoencoder, as all samples go through it. Every fifth name is held out. benchmarks/style.py
reads what it writes:

- classifier.safetensors: the network, its accuracy on names that it has not seen;
- fluent_judge.safetensors: the judge's statistics of Fluent renders, and the mean feature of each name.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder import to_unit
from fit import device, fit
from judge import degrade
from render import NAMES, Renders, render_all
from stepfold import assets
from stepfold.evaluation.judge import image_features, load_judge

HELD_OUT = 5
PER_NAME = 4


def make_classifier() -> nn.Sequential:
    """Pictures [n, 3, 64, 64] in [-1, 1] -> the logit of Fluent [n, 1]."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


def some(pool: Renders) -> Renders:
    """The first PER_NAME renders of each name."""
    rows = np.concatenate([np.flatnonzero(pool.name == i)[:PER_NAME] for i in range(len(NAMES))])
    return Renders(pool.images[rows], pool.name[rows], pool.colour[rows])


@torch.no_grad()
def both_ways(pool: Renders, vae: AutoencoderDC) -> Tensor:
    """Renders as they are, and through the autoencoder: [2, n, 3, 64, 64] in [-1, 1]."""
    x = to_unit(pool.images)
    again = [vae.decode(vae.encode(part).latent).sample.clamp(-1, 1) for part in x.split(64)]
    return torch.stack([x, torch.cat(again)])


def train_classifier(x: Tensor, fluent: Tensor, work: Path, steps: int, batch: int = 64) -> nn.Module:
    """Binary cross-entropy; pictures are mirrored, and degraded as the judge's are."""
    torch.manual_seed(0)
    network = make_classifier().to(device())

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((6, step))
        rows = torch.from_numpy(rng.integers(len(x), size=batch))
        picked = degrade(x[rows], rng)
        picked = picked.flip(3) if rng.random() < 0.5 else picked
        logits = network(picked)[:, 0]
        return F.binary_cross_entropy_with_logits(logits, fluent[rows]), {
            "accuracy": ((logits > 0) == (fluent[rows] > 0)).float().mean().item()
        }

    return fit(network, loss_at, work / "style_classifier", steps=steps, lr=3e-3, warmup=20, cooldown=0.5, ema=0.98)


def fluent_statistics(pool: Renders) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The judge's features of Fluent renders: statistics, and the names' means; how well both judges name renders.

    The means are of every other render of a name, and are tried on the rest.
    """
    judge = load_judge(assets.JUDGE, device())
    features = image_features(judge, (to_unit(pool.images) + 1) / 2)
    names, even = torch.from_numpy(pool.name.astype(np.int64)), torch.arange(len(features)) % 2 == 0
    means = torch.stack([F.normalize(features[even & (names == i)].mean(0), dim=0) for i in range(len(NAMES))])
    rest, wide = ~even, features.double()
    found = {"mean": wide.mean(0), "covariance": wide.T.cov(), "names": means}
    right = ((features[rest] @ means.T).argmax(1) == names[rest]).float().mean()
    return found, {"by_means": float(right), "renders": int(rest.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji_style"), help="that of style_lora.py")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    args = parser.parse_args()
    pool = Renders.load(args.work / "fluent.npz")
    noto_path = args.work / "noto.npz"
    if not noto_path.exists():
        render_all(PER_NAME, seed=5, processes=1).save(noto_path)
    vae = AutoencoderDC.from_pretrained(assets.TEACHER / "vae").float().to(device())
    sets = [some(Renders.load(noto_path)), some(pool)]
    x = torch.cat([both_ways(each, vae) for each in sets], 1)
    names = torch.from_numpy(np.concatenate([each.name for each in sets]).astype(np.int64))
    fluent = torch.cat([torch.full((len(each.name),), float(i)) for i, each in enumerate(sets)])
    held = names % HELD_OUT == 0
    network = train_classifier(x[:, ~held].flatten(0, 1), fluent[~held].repeat(2), args.work, args.steps)
    with torch.no_grad():
        right = (network(x[:, held].flatten(0, 1))[:, 0] > 0) == (fluent[held].repeat(2) > 0)
    statistics, named = fluent_statistics(pool)
    save_file(statistics, args.work / "fluent_judge.safetensors")
    said = {
        "accuracy": float(right.float().mean()), "pictures": len(right),
        "through_the_autoencoder": float(right[len(right) // 2 :].float().mean()), **named,
    }  # fmt: skip
    save_file(network.state_dict(), args.work / "classifier.safetensors", metadata={"scores": json.dumps(said)})
    print(json.dumps(said))


if __name__ == "__main__":
    main()
