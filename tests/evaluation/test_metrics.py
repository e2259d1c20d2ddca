"""Each metric against an independent computation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from torch.testing import assert_close

from stepfold.evaluation.metrics import (
    StreamingMoments,
    accuracy,
    clip_score,
    diversity,
    frechet_distance,
    latent_error,
)


def gaussian(dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), factor @ factor.T / dim


@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_against_scipy(dim: int, seed: int):
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(dim, seed), gaussian(dim, seed + 100)
    root = np.real(sqrtm(cov_a.numpy() @ cov_b.numpy()))
    expected = ((mean_a - mean_b) ** 2).sum().item() + np.trace(cov_a.numpy() + cov_b.numpy() - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b).item() == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a).item() == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_known_values():
    """Covariances that commute have a closed form; singular ones are no exception."""
    mean, (_, cov) = torch.zeros(8, dtype=torch.float64), gaussian(8, 0)
    assert frechet_distance(mean, cov, mean, cov).item() < 1e-12
    assert frechet_distance(mean, cov, mean + 2, 9 * cov).item() == pytest.approx(
        32 + 4 * cov.trace().item(), rel=1e-12
    )
    a, b = torch.tensor([4.0, 0, 1, 0]), torch.tensor([1.0, 9, 0, 0])
    assert frechet_distance(torch.zeros(4), a.diag(), torch.zeros(4), b.diag()).item() == pytest.approx(1 + 9 + 1)
    assert frechet_distance(torch.zeros(4), a.diag(), torch.zeros(4), b.diag()).dtype == torch.float64


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=8), shift=st.sampled_from([0.0, 1.0, 1e4]))
def test_streaming_moments_equal_batch_moments(sizes: list[int], shift: float):
    rows = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64) + shift
    moments = StreamingMoments.empty(5)
    for part in rows.split(sizes):
        moments = moments.updated(part)
    assert moments.count == len(rows)
    assert_close(moments.mean, rows.mean(0), atol=1e-10, rtol=0)
    assert_close(moments.covariance, rows.T.cov(), atol=1e-10, rtol=1e-10)


def test_streaming_moments_of_float32_rows_are_exact_enough():
    rows = torch.randn(1000, 4) + 100
    moments = StreamingMoments.empty(4)
    for part in rows.split(64):
        moments = moments.updated(part)
    assert_close(moments.covariance, rows.double().T.cov(), atol=0, rtol=1e-10)
    with pytest.raises(AssertionError, match="two rows"):
        _ = StreamingMoments.empty(4).updated(rows[:1]).covariance


def test_accuracy():
    names = torch.eye(4) * torch.tensor([1.0, 5.0, 2.0, 0.1])[:, None]  # their length must not matter
    images = torch.tensor([[1.0, 0.9, 0, 0], [0, 1, 0.5, 0], [0.2, 0, 0, 0.3], [0, 0, 1, 0]])
    assert accuracy(images, names, torch.tensor([0, 1, 3, 2])).item() == 1
    assert accuracy(images, names, torch.tensor([0, 1, 0, 0])).item() == 0.5


def test_clip_score():
    images = torch.tensor([[2.0, 0], [0, 3], [1, 0], [1, 1]])
    texts = torch.tensor([[5.0, 0], [1, 0], [-1, 0], [1, 0]])  # cosines 1, 0, -1 (counts as 0), sqrt(1/2)
    assert clip_score(images, texts).item() == pytest.approx(100 * (1 + math.sqrt(0.5)) / 4, abs=1e-6)


def test_diversity_against_scipy():
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([7, 0, 7, 3, 0, 7, 5, 0, 0])  # in any order; 3 and 5 are alone
    expected = np.mean([pdist(features[group == g].numpy()).mean() for g in (0, 7)])
    assert diversity(features, group).item() == pytest.approx(expected, rel=1e-6)
    assert diversity(features[:1].expand(4, 3), torch.zeros(4, dtype=torch.long)).item() == 0
    with pytest.raises(AssertionError, match="two members"):
        diversity(features, torch.arange(9))


def test_latent_error_units():
    generator = torch.Generator().manual_seed(0)
    a, b = (0.5 * torch.randn(64, 4, 8, 8, generator=generator) for _ in range(2))
    assert latent_error(a, a, 0.5).item() == 0
    assert latent_error(a, b, 0.5).item() == pytest.approx(2, rel=0.03)  # unrelated
    assert latent_error(a, torch.zeros_like(a), 0.5).item() == pytest.approx(1, rel=0.03)
