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


def test_kmeans_starts_at_the_mean(rng):
    """The boundary of the first two centres is the mean of the row, not of the row less its first value."""
    row = np.repeat([20.0, 0.0, 10.0], [9000, 4500, 4500]) + rng.normal(size=18_000) * 0.1
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), init="kmeans", max_iter=1)
    assert_close(got, extended_em.fit(row, max_iter=1, **extended_em.start(row, extended_em.centres(row, 2, "kmeans"))), 0)
