"""The numbers that a sampler is judged by: pure functions of features and latents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StreamingMoments:
    """Count, mean and scatter of the rows seen so far; its size does not grow with their number.

    Attributes:
        count: rows seen.
        mean: float64 [D].
        scatter: float64 [D, D], sum of (x - mean)(x - mean)^T.

    Reference: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
        (1979): two sets of moments are merged without cancellation.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> "StreamingMoments":
        """Moments of no rows yet, for features of size `dim`."""
        mean = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, mean, torch.outer(mean, mean))

    def updated(self, rows: Tensor) -> "StreamingMoments":
        """The moments with the rows [B, D] added, B >= 1; self stays as it is."""
        rows = rows.to(self.mean)
        count = self.count + len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        shift = mean - self.mean
        between = torch.outer(shift, shift) * (self.count * len(rows) / count)
        return StreamingMoments(
            count, self.mean + shift * (len(rows) / count), self.scatter + centred.T @ centred + between
        )

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], the unbiased estimate (divides by count - 1)."""
        assert self.count >= 2, f"a covariance needs two rows or more, got {self.count}"
        return self.scatter / (self.count - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians; 0 when they are the same.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). The root's trace is the sum of the square roots
    of the eigenvalues of the symmetric cov_a^(1/2) cov_b cov_a^(1/2), which stays real where covariances are singular.

    Args:
        mean_a, mean_b: [D].
        cov_a, cov_b: [D, D], symmetric, positive semi-definite.

    Returns:
        float64 scalar >= 0, in squared feature units. From few samples it is biased upwards: compare at equal n.

    Reference: arXiv:1706.08500, Eq. (6).
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return distance.clamp(min=0)  # rounding leaves about -1e-15 between equal Gaussians


def accuracy(image_features: Tensor, name_features: Tensor, target: Tensor) -> Tensor:
    """The share of images whose nearest name, by cosine, is the one that was asked for.

    Args:
        image_features: [N, D].
        name_features: [K, D].
        target: int64 [N], the right name of each image, in [0, K).

    Returns:
        Scalar in [0, 1].
    """
    nearest = (F.normalize(image_features, dim=-1) @ F.normalize(name_features, dim=-1).T).argmax(dim=-1)
    return (nearest == target).double().mean()


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 x the mean cosine between each image and its own prompt, a negative cosine counting as 0.

    Args:
        image_features: [N, D].
        text_features: [N, D], row i is the prompt of image i.

    Returns:
        Scalar in [0, 100].

    Reference: arXiv:2104.08718, section 3.
    Deviation: scaled by 100 instead of 2.5, as image generation papers report it.
    """
    assert image_features.shape == text_features.shape, f"{image_features.shape} and {text_features.shape}"
    images, texts = image_features.cpu().double(), text_features.cpu().double()  # not every device has float64
    return 100 * F.cosine_similarity(images, texts, dim=-1).clamp(min=0).mean()


def diversity(features: Tensor, group: Tensor) -> Tensor:
    """How different the pictures of one prompt are: the mean pairwise distance within a group, averaged over groups.

    Args:
        features: [N, D].
        group: int64 [N], the prompt each row belongs to. Groups of one row do not count; one larger group is needed.

    Returns:
        Scalar >= 0, a Euclidean distance (at most 2 between features of unit length).
    """
    order = group.argsort(stable=True)
    sizes = group.unique(return_counts=True)[1].tolist()
    spreads = [torch.pdist(rows).mean() for rows in features.double()[order].split(sizes) if len(rows) > 1]
    assert spreads, "no group has two members"
    return torch.stack(spreads).mean()


def latent_error(latents: Tensor, reference: Tensor, sigma_data: float) -> Tensor:
    """Mean squared error between a sampler's latents and the reference's, from the same noise (the *agreement*).

    Args:
        latents: [N, C, H, W], scaled so that their standard deviation is sigma_data.
        reference: the same shape: the teacher's latents at 20 steps, from the same noise and prompts.
        sigma_data: standard deviation of the latents.

    Returns:
        Scalar >= 0 in units of the latents' variance: 0 is the same picture, 2 two unrelated ones.
    """
    assert latents.shape == reference.shape, f"{latents.shape} and {reference.shape}"
    difference = (latents - reference).cpu().double()  # not every device has float64
    return difference.square().mean() / sigma_data**2


def relative_error(latents: Tensor, reference: Tensor) -> Tensor:
    """||latents - reference|| / ||reference|| of each sample (the *latent error*).

    Args:
        latents: [N, ...].
        reference: the same shape: where the teacher's long trajectory ends, from the same noise.

    Returns:
        [N], >= 0: 0 is the same image, about 1.4 two unrelated ones of equal size.
    """
    assert latents.shape == reference.shape, f"{latents.shape} and {reference.shape}"
    ours, theirs = (x.cpu().double().flatten(1) for x in (latents, reference))  # not every device has float64
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
