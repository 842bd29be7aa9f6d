"""Long rows on the CPU: the direct EM, and the same bits for any number of threads."""

from __future__ import annotations

import extended_em
import numpy as np
import pytest
import torch
from test_em import assert_close

import paa_gpu
from paa_gpu import testing
from paa_gpu.cpu.em import LONG_ROW
from paa_gpu.cpu.em_long import BLOCK


def long_row(size, rng):
    return np.concatenate(
        [testing.make_losses("bimodal", size - size // 3, rng), testing.make_losses("unimodal", size // 3, rng)]
    )


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (LONG_ROW + 1, {}),
        (LONG_ROW + 1, {"covariance_type": "tied", "init": "kmeans"}),
        (20 * BLOCK, {"init": "quantile", "n_components": 3}),
    ],
    ids=str,
)
def test_against_extended_precision(size, options, rng):
    row = long_row(size, rng)
    covariance_type = options.get("covariance_type", "diag")
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), **options)
    initial = {}
    if "init" in options:
        centres = extended_em.centres(row, options.get("n_components", 2), options["init"])
        initial = extended_em.start(row, centres, covariance_type)
    assert_close(got, extended_em.fit(row, covariance_type, **initial), 0)


def test_the_same_bits_for_any_number_of_threads(rng):
    """Alone, where all threads share it, and among others, where each thread has rows of its own."""
    rows = [torch.from_numpy(long_row(size, rng)) for size in (200_000, 20_000, 300)]
    usual, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            for x in (rows[:1], rows):
                fit = paa_gpu.fit_gmm_1d(x, init="kmeans", max_iter=10)
                found.add(b"".join(value[0].numpy().tobytes() for value in fit[:7]))
    finally:
        torch.set_num_threads(usual)
    assert len(found) == 1


def test_a_long_row_that_cannot_be_fitted(rng):
    row = torch.from_numpy(long_row(LONG_ROW + 5, rng))
    row[BLOCK + 7] = torch.nan
    fit = paa_gpu.fit_gmm_1d([row, row[:BLOCK], torch.full_like(row, 0.5)], reg_covar=0.0, init="kmeans")
    assert fit.valid.tolist() == [False, True, False]
    assert fit.means[0].isnan().all() and fit.means[2].isnan().all() and fit.n_iter.tolist()[::2] == [0, 0]


def test_the_first_iteration_never_converges(rng):
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(rng.normal(size=(1, LONG_ROW + 1))), tol=100.0)
    assert got.n_iter.tolist() == [2]


def assert_starts_by_kmeans(row, k):
    """One iteration from the division by k-means."""
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), n_components=k, init="kmeans", max_iter=1)
    start = extended_em.start(row, extended_em.centres(row, k, "kmeans"))
    assert_close(got, extended_em.fit(row, max_iter=1, **start), 0)


@pytest.mark.parametrize("centres", [(20.0, 0.0, 10.0), (0.0, 10.0, 20.0)], ids=str)
def test_kmeans_starts_at_the_mean(centres, rng):
    """The boundary of the first two centres is the mean of the row, not of the row, or of each block, less its first value."""
    row = np.repeat(centres, [9000 if centre == 20 else 4500 for centre in centres]) + rng.normal(size=18_000) * 0.1
    assert_starts_by_kmeans(row, 2)


def test_the_extremes_of_a_row_wherever_they_are(rng):
    """In a whole vector, behind the last one, in another block; and of negative values."""
    for place in (0, 5, 16, 22, BLOCK + 3):
        for sign in (-1.0, 1.0):
            row = rng.normal(size=max(23, place + 1)) - 100
            row[place] += 50 * sign
            got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), n_components=3, max_iter=1)
            assert_close(got, extended_em.fit(row, max_iter=1, means=np.linspace(row.min(), row.max(), 3)), 0)


@pytest.mark.parametrize("missing", ["weights", "means", "precisions"])
@pytest.mark.parametrize(("k", "size"), [(2, 40), (2, LONG_ROW + 1), (3, 60)])
def test_one_of_three_given_values_is_that_of_the_start(k, size, missing, rng):
    row = rng.gamma(1.0, size=size)
    initial = extended_em.start(row, extended_em.centres(row, k, "kmeans"))
    given = {"weights": rng.dirichlet([3.0] * k), "means": np.linspace(1, 3, k), "precisions": np.linspace(2, 5, k)}
    del given[missing]
    tensors = {f"{name}_init": torch.from_numpy(value) for name, value in given.items()}
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), n_components=k, init="kmeans", max_iter=1, **tensors)
    assert_close(got, extended_em.fit(row, max_iter=1, **{**initial, **given}), 0)


def test_passes_of_kmeans_are_limited():
    """This row needs more than 50 passes."""
    row = np.linspace(0, 1, 2000) ** 8
    assert_starts_by_kmeans(row, 8)


@pytest.mark.parametrize("size", [40, LONG_ROW + 1])
def test_no_change_is_not_less_than_a_limit_of_zero(size, rng):
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(rng.normal(size=size)), n_components=1, tol=0.0, max_iter=6)
    assert (int(got.n_iter), bool(got.converged)) == (6, False)


@pytest.mark.parametrize("times", [1, 200], ids=["short", "long"])
def test_a_value_at_a_boundary_belongs_to_the_lower_centre(times):
    """The mean is 8: with the lower centre, 8 stays there. With none, or with both, it would go over to the upper one."""
    row = np.repeat([0.0, 8.0, 9.0, 16.0], np.array([40, 20, 8, 39]) * times)
    assert_starts_by_kmeans(row, 2)


@pytest.mark.parametrize("size", [40, 32_768])
def test_a_centre_without_values_stays(size):
    row = np.repeat([0.0, 1.0], [3 * size // 4, size // 4])
    assert_starts_by_kmeans(row, 3)
