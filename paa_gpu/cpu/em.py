"""EM for CPU tensors: two-component 1-D Gaussian mixtures, one row after the other.

For a row x of n values, all on y = x - min(x), so that nothing is lost where the values lie close together:

    E-step   log p_k(i) = log w_k - log(2 pi v_k) / 2 - (y_i - m_k)^2 / (2 v_k)
             r_k(i) = p_k(i) / (p_0(i) + p_1(i)),   lower bound = mean_i log(p_0(i) + p_1(i))
    M-step   n_k = sum_i r_k(i) + 10 eps,   m_k = sum_i r_k(i) y_i / n_k,   w_k = n_k / (n_0 + n_1),
             v_k = sum_i r_k(i) (y_i - m_k)^2 / n_k + reg_covar          (tied: one sum over both components)

until the lower bound changes by less than `tol`, as in scikit-learn's `GaussianMixture`. Arithmetic is that of the dtype of x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import PRECISIONS
from ..separation import tie_tolerance
from ._arrays import Array, flat, view
from ._loops import compiled, compiled_sums, over_slices, shared
from ._numeric import exp, log1p

# Rows below which a second thread costs more than it saves, measured on 2 cores: a row takes 2 to 10 us, handing over to a
# thread 100.
SERIAL_ROWS = 128

# Factors of at most 2 in a product that float32 can hold.
PRODUCT = 100

# Values that the passes over responsibilities take at a time, with room for the widest registers, four deep.
VECTOR = 16

# scikit-learn's guard against an empty component.
EMPTY_COMPONENT = 10 * np.finfo(np.float64).eps


@compiled
def _density_terms(weight: Any, variance: Any, component: int) -> tuple[float, float]:
    """(c, h) of the weighted log-density c - h (y - mean)^2."""
    real = weight.dtype.type
    w, v = weight[component], variance[component]
    return real(math.log(w / math.sqrt(2 * math.pi * v))), real(0.5 / v)


@compiled_sums
def _expectation(y: Any, size: int, weight: Any, mean: Any, variance: Any, r0: Any, r1: Any) -> Any:
    """Fill the responsibilities; return the mean log-density.

    With ratio = smaller / larger of the two densities, log(p_0 + p_1) is the logarithm of the larger one plus log(1 + ratio);
    these are summed as the logarithm of a product, whose factors are at most 2: one logarithm in a hundred values. y, r0
    and r1 are whole vectors, so that no pass leaves a rest to single values: behind its `size` y is 0, and r0 and r1 become 0.
    """
    c0, h0 = _density_terms(weight, variance, 0)
    c1, h1 = _density_terms(weight, variance, 1)
    one, total = y.dtype.type(1), y.dtype.type(0)
    for i in range(size):
        log_p0 = c0 - h0 * (y[i] - mean[0]) ** 2
        log_p1 = c1 - h1 * (y[i] - mean[1]) ** 2
        total += max(log_p0, log_p1)
        r0[i] = log_p0 - log_p1
    for i in range(len(y)):
        r1[i] = exp(-abs(r0[i]))
    for start in range(0, size, PRODUCT):
        product = one
        for ratio in r1[start : min(start + PRODUCT, size)]:
            product *= one + ratio
        total += math.log(product)
    for i in range(len(y)):
        ratio, foreground = r1[i], r0[i] >= 0
        larger = one / (one + ratio)
        r0[i] = larger if foreground else ratio * larger
        r1[i] = ratio * larger if foreground else larger
    r0[size:], r1[size:] = 0, 0
    return total / y.dtype.type(size)


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
        variance[:] = (square0 + square1) / (n0 + n1) + reg_covar
    else:
        variance[0], variance[1] = square0 / n0 + reg_covar, square1 / n1 + reg_covar
    weight[0], weight[1] = n0 / (n0 + n1), n1 / (n0 + n1)


@compiled
def _assign(
    y: Any, size: int, weight: Any, mean: Any, variance: Any, tolerance: float, r0: Any, r1: Any, assignment: Any, score: Any
) -> None:
    """assignment: whether component 0 is at least as likely, but for rounding; score: the log-density of the mixture."""
    c0, h0 = _density_terms(weight, variance, 0)
    c1, h1 = _density_terms(weight, variance, 1)
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
    real = weights.dtype.type
    change, floor, empty = real(tol), real(reg_covar), real(EMPTY_COMPONENT)
    width = 0
    for row in range(first, last):
        width = max(width, count[row])
    width += VECTOR
    y_row, r0_row, r1_row = np.empty(width, weights.dtype), np.empty(width, weights.dtype), np.empty(width, weights.dtype)
    for row in range(first, last):
        size = count[row]
        y = y_row[: (size + VECTOR - 1) // VECTOR * VECTOR]
        y[:size], y[size:] = x[start[row] : start[row] + size], 0
        if score.shape[1] > 0:
            assignment[row] = False
            score[row] = -np.inf
        smallest, largest, finite = _extent(y[:size])
        valid[row] = size >= 2 and finite
        converged[row], n_iter[row] = False, 0
        if not valid[row]:
            weights[row], means[row], variances[row], lower_bound[row] = np.nan, np.nan, np.nan, np.nan
            continue
        y[:size] -= smallest
        r0, r1 = r0_row[: len(y)], r1_row[: len(y)]

        weight, mean, variance = weights[row], means[row], variances[row]
        weight[:] = weights_init[row % len(weights_init)]
        variance[:] = 1 / precisions_init[row % len(precisions_init)]
        if len(means_init) > 0:
            mean[:] = means_init[row % len(means_init)] - smallest
        else:
            mean[0], mean[1] = 0, largest - smallest

        previous = real(-np.inf)
        while n_iter[row] < max_iter and not converged[row]:
            n_iter[row] += 1
            lower_bound[row] = _expectation(y, size, weight, mean, variance, r0, r1)
            _maximisation(y, r0, r1, tied, floor, empty, weight, mean, variance)
            converged[row] = abs(lower_bound[row] - previous) < change
            previous = lower_bound[row]
        if score.shape[1] > 0:
            _assign(y, size, weight, mean, variance, real(tolerance), r0, r1, assignment[row], score[row])
        mean += smallest


@shared
def empty_fit(rows: int, width: int, real: Any) -> tuple[Array, ...]:
    """weights, means, variances [G, 2]; lower_bound, n_iter, converged, valid [G]; assignment, score [G, width]."""
    return (
        np.empty((rows, 2), real),
        np.empty((rows, 2), real),
        np.empty((rows, 2), real),
        np.empty(rows, real),
        np.empty(rows, np.int64),
        np.empty(rows, np.bool_),
        np.empty(rows, np.bool_),
        np.empty((rows, width), np.bool_),
        np.empty((rows, width), real),
    )


def fit(x: Array, start: Array, count: Array, width: int, options: tuple[Any, ...]) -> tuple[Array, ...]:
    """Fit x[start[g] : start[g] + count[g]] of a flat x for every row g: what `empty_fit` holds."""
    results = empty_fit(len(start), width, options[0].dtype)
    over_slices(fit_rows, len(start), SERIAL_ROWS, x, start, count, *options, *results)
    return results


@functools.cache
def _defaults(precision: str) -> tuple[Array, Array, Array]:
    """Weights, means and precisions for all rows; no means: each row's own minimum and maximum."""
    return np.full((1, 2), 0.5, precision), np.empty((0, 2), precision), np.ones((1, 2), precision)


def fit_options(
    precision: str,
    covariance_type: str,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
    max_iter: int = 100,
    initial: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Any, ...]:
    """What `fit_rows` takes between the rows and its results. The initial weights, means and precisions are of the dtype of the
    fit, given or not."""
    given = [
        default if values is None else flat([values], default.dtype)
        for values, default in zip(initial, _defaults(precision), strict=True)
    ]
    return *given, covariance_type == "tied", tol, reg_covar, max_iter, tie_tolerance(PRECISIONS[precision])


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
) -> tuple[Tensor, ...]:
    if lengths is not None:
        size = np.asarray(lengths, np.int64)
        start = np.cumsum(size) - size
    else:
        rows, width = x.shape
        start = np.arange(rows) * width
        size = np.full(rows, width) if count is None else np.clip(view(count), 0, width).astype(np.int64)
    options = fit_options(precision, covariance_type, tol, reg_covar, max_iter, (weights_init, means_init, precisions_init))
    return tuple(map(torch.from_numpy, fit(flat([x], precision).reshape(-1), start, size, 0, options)[:7]))
