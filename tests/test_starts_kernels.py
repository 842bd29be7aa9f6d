"""Starts and numbers of components as the kernels have them: the CPU path's fits, which `test_starts` holds to the direct EM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_execution import assert_written, execute, on_device, poisoned_outputs, slow_interpreted
from test_starts import SHAPES, evenly_spaced, philox

from paa_gpu import _ops, testing

BASE = ("diag", 1e-3, 1e-6, 30, "float64")


def run(*arguments):
    with poisoned_outputs():
        result = _ops.fit_gmm_1d(*arguments)
    assert_written(*result)
    return result


def assert_same(got, wanted, tolerance=1e-9):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def both(execution, *arguments):
    """The same call by the loops of the CPU, then inside the execution."""
    wanted = _ops.fit_gmm_1d(*arguments)
    with execute(execution):
        return run(*arguments), wanted


def rows_of(size, rng):
    return torch.from_numpy(np.stack([testing.make_losses(shape, size, rng) for shape in SHAPES[:2]]))


CASES = [
    (40, 2, "kmeans", 1, "diag"),
    *slow_interpreted((100, 2, "kmeans", 1, "tied"), (30, 2, "quantile", 1, "diag"), (30, 2, "random", 3, "diag")),
    (30, 3, "minmax", 1, "diag"),
    *slow_interpreted((30, 1, "minmax", 1, "tied"), (90, 5, "kmeans", 1, "diag"), (30, 3, "random", 3, "tied")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_starts(execution, case, rng):
    size, k, init, n_init, covariance_type = case
    x = rows_of(size, rng)
    x[1, -1] = torch.nan
    got, wanted = both(execution, x, None, None, None, None, None, covariance_type, *BASE[1:], k, init, n_init, 2**40 + 3)
    assert_same(got, wanted)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_evenly_spaced_values_divide_alike_everywhere(execution, precision):
    x, count = evenly_spaced()
    got, wanted = both(execution, x, count, None, None, None, None, "tied", 1e-3, 1e-6, 1, precision, 2, "kmeans")
    assert_same(got, wanted, 1e-9 if precision == "float64" else 1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_given_values_that_are_not_finite_or_make_no_mixture(execution, k, rng):
    x = rows_of(20, rng)[:1].expand(5, -1)
    weights, means, precisions = torch.full((5, k), 1 / k), torch.arange(k).expand(5, -1).double().clone(), torch.ones(5, k)
    weights[1, 0], means[2, 0], precisions[3, 0], weights[4, 0] = -1.0, torch.nan, 0.0, torch.inf
    got, wanted = both(execution, x, None, None, weights, means, precisions, *BASE, k)
    assert wanted[-1].tolist() == [True, False, True, False, True]
    assert_same(got, wanted)


def test_fewer_values_than_components(execution):
    x = torch.arange(12).view(2, 6).double()
    got, wanted = both(execution, x, torch.tensor([3, 4]), None, None, None, None, *BASE, 4)
    assert wanted[-1].tolist() == [False, True]
    assert_same(got, wanted)


@pytest.mark.parametrize("size", [_ops.EXACT, _ops.EXACT + 1])
def test_the_best_division_of_few_values(execution, size, rng):
    """Lloyd's iteration, which finds the two centres of more values, often ends elsewhere. One step of EM shows where a fit starts."""
    x = torch.from_numpy(np.stack([testing.make_losses("heavy", size, rng) for _ in range(8)]))
    got, wanted = both(execution, x, None, None, None, None, None, *BASE[:3], 1, "float64", 2, "kmeans")
    assert_same(got, wanted)


def test_divisions_with_one_sum_of_squares(execution):
    """The first of them is taken."""
    x = torch.tensor([[0.0, 1, 2]], dtype=torch.float64)
    got, wanted = both(execution, x, None, None, None, None, None, *BASE[:3], 1, "float64", 2, "kmeans")
    assert wanted[0][0, 0] < 0.5
    assert_same(got, wanted)


@pytest.mark.slow
def test_starts_that_end_in_one_place(execution, rng):
    """The first of them is kept, as its number of iterations shows."""
    x = torch.from_numpy(np.stack([testing.make_losses(shape, 30, rng) for shape in SHAPES[:3]]))
    got, wanted = both(execution, x, None, None, None, None, None, "diag", 1e-11, 1e-6, 5000, "float64", 2, "random", 6, 3)
    assert_same(got, wanted)


@pytest.mark.parametrize("k", [2, 3])
def test_a_fit_that_is_not_finite_is_not_valid(session, k):
    x = torch.stack([torch.full((9,), 0.5), torch.arange(9) ** 1.5])
    fit = run(x, None, None, None, None, None, "diag", 1e-3, 0.0, 5, "float64", k)
    assert fit[-1].tolist() == [False, True] and fit[0][0].isnan().all() and int(fit[4][0]) == 0
    fit = run(x * 1e20, None, None, None, None, None, "diag", 1e-3, 0.0, 5, "float32", k)
    assert not fit[-1].any() and torch.cat(fit[:3]).isnan().all()


def test_philox_of_the_cpu_is_tritons(session):
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out_ptr, seed: tl.int64):
        i = tl.arange(0, 8)
        bits, _, _, _ = tl.philox(seed, i.to(tl.uint32), (i + 1).to(tl.uint32), (i * 3).to(tl.uint32), (i * 0).to(tl.uint32))
        tl.store(out_ptr + i, bits.to(tl.int64))

    out = torch.zeros(8, dtype=torch.int64)
    on_device(draw[(1,)])(out, 2**40 + 3)
    assert out.tolist() == [philox(2**40 + 3, i, i + 1, 3 * i) for i in range(8)]


@pytest.mark.parametrize(
    ("row", "k", "init"), [([0.0] + [5.0] * 12 + [6, 7, 9], 5, "kmeans"), ([1.0] * 5 + [2.0] * 4 + [3, 7], 3, "random")]
)
def test_values_that_repeat(execution, row, k, init):
    """A group without values keeps its centre; of equal values that are drawn, none counts twice."""
    x = torch.tensor(row, dtype=torch.float64).repeat(6, 1)
    got, wanted = both(execution, x, None, None, None, None, None, *BASE[:3], 1, "float64", k, init, 1, 3)
    assert_same(got, wanted)
