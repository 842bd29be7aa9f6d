"""EM for CPU tensors: two-component 1-D Gaussian mixtures, one row after the other.

A row x has n values. All arithmetic is on y = x - min(x), so values close together lose no digits:

    E-step   log p_k(i) = log w_k - log(2 pi v_k) / 2 - (y_i - m_k)^2 / (2 v_k)
             r_k(i) = p_k(i) / (p_0(i) + p_1(i)),   lower bound = mean_i log(p_0(i) + p_1(i))
    M-step   n_k = sum_i r_k(i) + 10 eps,   m_k = sum_i r_k(i) y_i / n_k,   w_k = n_k / (n_0 + n_1),
             v_k = sum_i r_k(i) (y_i - m_k)^2 / n_k + reg_covar          (tied: one sum over both components)

until the lower bound changes by less than `tol`, as in scikit-learn's `GaussianMixture`. Arithmetic is in the dtype of x.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import INITS, PRECISIONS, sum_tolerance
from ..separation import tie_tolerance
from . import em_long
from ._arrays import Array, flat, view
from ._loops import compiled, compiled_sums, over_slices, shared
from ._mixtures import EMPTY_COMPONENT, VECTOR, density_terms, expectation, is_fit, take_given, usable, void
from ._numeric import exp, log1p
from .starts import KMEANS, MINMAX, centres, divide, kmeans, minmax

# Rows below which a second thread costs more than it saves, measured on 2 cores: a row takes 2 to 10 us, handing over to a
# thread 100.
SERIAL_ROWS = 128

# Rows of more values are fitted in blocks, by `em_long`, so that threads can share them.
LONG_ROW = 16_384


@compiled_sums
def _maximisation(
    y: Any, r0: Any, r1: Any, tied: bool, reg_covar: float, empty: float, weight: Any, mean: Any, variance: Any
) -> None:
    zero = y.dtype.type(0)
    n0 = n1 = sum0 = sum1 = square0 = square1 = zero
    for i in range(len(y)):
        n0 += r0[i]
        n1 += r1[i]
        sum0 += r0[i] * y[i]
        sum1 += r1[i] * y[i]
    n0 += empty
    n1 += empty
    mean[0], mean[1] = sum0 / n0, sum1 / n1
    for i in range(len(y)):
        square0 += r0[i] * (y[i] - mean[0]) ** 2
        square1 += r1[i] * (y[i] - mean[1]) ** 2
    if tied:
        variance[0] = variance[1] = (square0 + square1) / (n0 + n1) + reg_covar
    else:
        variance[0], variance[1] = square0 / n0 + reg_covar, square1 / n1 + reg_covar
    weight[0], weight[1] = n0 / (n0 + n1), n1 / (n0 + n1)


@compiled
def _assign(
    y: Any, size: int, weight: Any, mean: Any, variance: Any, tolerance: float, r0: Any, r1: Any, assignment: Any, score: Any
) -> None:
    """assignment: whether component 0 is at least as likely, but for rounding; score: the log-density of the mixture."""
    c0, h0 = density_terms(weight, variance, 0)
    c1, h1 = density_terms(weight, variance, 1)
    for i in range(size):
        log_p0 = c0 - h0 * (y[i] - mean[0]) ** 2
        log_p1 = c1 - h1 * (y[i] - mean[1]) ** 2
        assignment[i] = log_p0 >= log_p1 - tolerance
        score[i] = max(log_p0, log_p1)
        r0[i] = log_p0 - log_p1
    for i in range(len(y)):
        r1[i] = log1p(exp(-abs(r0[i])))
    for i in range(size):
        score[i] += r1[i]


@compiled
def _extent(values: Any) -> tuple[Any, Any, bool]:
    """The smallest and the largest value, and whether all are finite."""
    smallest, largest, finite = values.dtype.type(np.inf), values.dtype.type(-np.inf), True
    for value in values:
        smallest, largest = min(smallest, value), max(largest, value)
        finite &= np.isfinite(value)
    return smallest, largest, finite


@compiled
def _shifted(values: Any, y: Any) -> tuple[Any, Any, bool]:
    """Fill y with the values less the smallest, and zeros behind; in the arithmetic of y.

    Returns the smallest value, the extent, and whether all values are finite.
    """
    real = y.dtype.type
    smallest, largest, finite = _extent(values)
    low = real(smallest)
    for i in range(len(values)):
        y[i] = real(values[i]) - low
    for i in range(len(values), len(y)):
        y[i] = 0
    return low, real(largest) - low, finite


@compiled
def start_rows(
    first: int, last: int, x: Any, start: Any, count: Any, init: int, seed: int, n_init: int, tied: bool, reg_covar: float,
    weights: Any, means: Any, variances: Any,
) -> None:  # fmt: skip
    """The parameters that the first E-step takes, on y, from centres; for rows that can be fitted.

    A loop of its own: the assignment, which starts from the smallest and the largest loss, does not have to wait until this one
    is compiled.
    """
    real = weights.dtype.type
    for row in range(first, last):
        size = count[row]
        values, y = x[start[row] : start[row] + size], np.empty(size, weights.dtype)
        smallest, extent, finite = _shifted(values, y)
        if size < 2 or not finite:
            continue
        centre, resp = np.empty(2, weights.dtype), np.empty((2, size), weights.dtype)
        centres(values, smallest, extent, y.mean(), init, seed, row // n_init, row % n_init, centre)
        if init == KMEANS:
            kmeans(y, centre)
        divide(y, centre, resp)
        _maximisation(y, resp[0], resp[1], tied, real(reg_covar), real(EMPTY_COMPONENT), weights[row], means[row], variances[row])


@compiled
def fit_rows(
    first: int,
    last: int,
    x: Any,
    start: Any,
    count: Any,
    weights_init: Any,
    means_init: Any,
    precisions_init: Any,
    tied: bool,
    tol: float,
    reg_covar: float,
    max_iter: int,
    n_init: int,
    sum_tolerance: float,
    started: bool,
    tolerance: float,
    weights: Any,
    means: Any,
    variances: Any,
    lower_bound: Any,
    n_iter: Any,
    converged: Any,
    valid: Any,
    assignment: Any,
    score: Any,
) -> None:
    """`started`: the parameters hold what `start_rows` has left, on y; else a row starts from its smallest and largest value."""
    real = weights.dtype.type
    change, floor, empty = real(tol), real(reg_covar), real(EMPTY_COMPONENT)
    width = 0
    for row in range(first, last):
        width = max(width, count[row])
    width += VECTOR
    y_row, resp_row = np.empty(width, weights.dtype), np.empty((2, width), weights.dtype)
    for row in range(first, last):
        size = count[row]
        values = x[start[row] : start[row] + size]
        y = y_row[: (size + VECTOR - 1) // VECTOR * VECTOR]
        for i in range(score.shape[1]):
            assignment[row, i], score[row, i] = False, -np.inf
        smallest, extent, finite = _shifted(values, y)
        valid[row] = size >= 2 and finite
        # Rows first: a slice of columns is not contiguous for the compiler, and the loops would not fill vector registers.
        r0, r1 = resp_row[0][: len(y)], resp_row[1][: len(y)]
        weight, mean, variance = weights[row], means[row], variances[row]
        if valid[row]:
            if not started:
                minmax(extent, weight, mean, variance)
            given = row // n_init
            valid[row] = not usable(given, weights_init, means_init, precisions_init) or take_given(
                given, smallest, weights_init, means_init, precisions_init, sum_tolerance, weight, mean, variance
            )
        if not valid[row]:
            void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
            continue

        previous = real(-np.inf)
        converged[row], n_iter[row] = False, 0
        while n_iter[row] < max_iter and not converged[row]:
            n_iter[row] += 1
            lower_bound[row] = expectation(y, size, weight, mean, variance, r0, r1) / real(size)
            _maximisation(y, r0, r1, tied, floor, empty, weight, mean, variance)
            converged[row] = abs(lower_bound[row] - previous) < change
            previous = lower_bound[row]
        if not is_fit(weight, mean, variance, lower_bound[row]):
            void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
            continue
        if score.shape[1] > 0:
            _assign(y, size, weight, mean, variance, real(tolerance), r0, r1, assignment[row], score[row])
        mean[0], mean[1] = mean[0] + smallest, mean[1] + smallest


@shared
def empty_fit(rows: int, width: int, real: Any, k: int = 2) -> tuple[Array, ...]:
    """weights, means, variances [G, k]; lower_bound, n_iter, converged, valid [G]; assignment, score [G, width]."""
    return (
        np.empty((rows, k), real),
        np.empty((rows, k), real),
        np.empty((rows, k), real),
        np.empty(rows, real),
        np.empty(rows, np.int64),
        np.empty(rows, np.bool_),
        np.empty(rows, np.bool_),
        np.empty((rows, width), np.bool_),
        np.empty((rows, width), real),
    )


def fit(x: Array, start: Array, count: Array, width: int, options: tuple[Any, ...]) -> tuple[Array, ...]:
    """Fit two components to x[start[g] : start[g] + count[g]] of a flat x for every row g: what `empty_fit` holds."""
    results = empty_fit(len(start), width, options[0].dtype)
    over_slices(fit_rows, len(start), SERIAL_ROWS, x, start, count, *options, *results)
    return results


@functools.cache
def _none(precision: str) -> Array:
    """No initial values."""
    return np.empty((0, 2), precision)


def fit_options(
    precision: str,
    covariance_type: str,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
    max_iter: int = 100,
    initial: Sequence[Tensor | None] = (None, None, None),
    n_init: int = 1,
    started: bool = False,
) -> tuple[Any, ...]:
    """What `fit_rows` takes between the rows and its results. The initial weights, means and precisions are of the dtype of the
    fit, and empty where not given."""
    given = [_none(precision) if values is None else flat([values], precision) for values in initial]
    return (
        *given, covariance_type == "tied", tol, reg_covar, max_iter, n_init, sum_tolerance(initial[0]), started,
        tie_tolerance(PRECISIONS[precision]),
    )  # fmt: skip


def _best(results: tuple[Array, ...], rows: int, n_init: int) -> tuple[Array, ...]:
    """The fit with the highest lower bound of each row, the first one where they tie: starts that end in one place do."""
    if n_init == 1:
        return results
    lower_bound = results[3].reshape(rows, n_init)
    lower_bound = np.where(np.isnan(lower_bound), -np.inf, lower_bound)
    tie = tie_tolerance(PRECISIONS[str(lower_bound.dtype)])
    best = (lower_bound >= lower_bound.max(1, keepdims=True) - tie).argmax(1) + np.arange(rows) * n_init
    return tuple(result[best] for result in results)


def fit_gmm_1d(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights_init: Tensor | None,
    means_init: Tensor | None,
    precisions_init: Tensor | None,
    covariance_type: str,
    tol: float,
    reg_covar: float,
    max_iter: int,
    precision: str,
    n_components: int = 2,
    init: str = "minmax",
    n_init: int = 1,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    if lengths is not None:
        size = np.asarray(lengths, np.int64)
        start = np.cumsum(size) - size
    else:
        rows, width = x.shape
        start = np.arange(rows) * width
        size = np.full(rows, width) if count is None else np.clip(view(count), 0, width).astype(np.int64)
    initial = (weights_init, means_init, precisions_init)
    started = INITS.index(init) != MINMAX and not all(given is not None and np.isfinite(view(given)).all() for given in initial)
    options = fit_options(precision, covariance_type, tol, reg_covar, max_iter, initial, n_init, started)
    values = flat([x], precision).reshape(-1)
    all_starts, sizes = np.repeat(start, n_init), np.repeat(size, n_init)
    results = empty_fit(len(sizes), 0, np.dtype(precision), n_components)
    in_blocks = np.flatnonzero((sizes > LONG_ROW) | (n_components != 2))
    if len(in_blocks) < len(sizes):
        # What `em_long` fits is an empty row here.
        short = np.where(sizes > LONG_ROW, 0, sizes)
        if started:
            start_options = INITS.index(init), seed, n_init, covariance_type == "tied", reg_covar
            over_slices(start_rows, len(short), SERIAL_ROWS, values, all_starts, short, *start_options, *results[:3])
        over_slices(fit_rows, len(short), SERIAL_ROWS, values, all_starts, short, *options, *results)
    if len(in_blocks):
        em_long.fit(in_blocks, values, all_starts, sizes, (*options[:-2], INITS.index(init), seed), results[:7])
    return tuple(map(torch.from_numpy, _best(results[:7], len(size), n_init)))
