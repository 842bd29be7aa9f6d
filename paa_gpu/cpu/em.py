"""EM for CPU tensors: two-component 1-D Gaussian mixtures, one row after the other.

A row x has n values. All arithmetic is on y = x - min(x), so values close together lose no digits:

    E-step   log p_k(i) = log w_k - log(2 pi v_k) / 2 - (y_i - m_k)^2 / (2 v_k)
             r_k(i) = p_k(i) / (p_0(i) + p_1(i)),   lower bound = mean_i log(p_0(i) + p_1(i))
    M-step   n_k = sum_i r_k(i) + 10 eps,   m_k = sum_i r_k(i) y_i / n_k,   w_k = n_k / (n_0 + n_1),
             v_k = sum_i r_k(i) (y_i - m_k)^2 / n_k + reg_covar          (tied: one sum over both components)

until the lower bound changes by less than `tol`, as in scikit-learn's `GaussianMixture`. Arithmetic is in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import FIT_OPTIONS, INITS, PRECISIONS, sum_tolerance
from ..separation import tie_tolerance
from . import em_long
from ._arrays import Array, flat, view
from ._loops import HANDING_OVER, compiled, cumulated, inner, inner_with_sums, over_bounds, shared_bounds
from ._mixtures import EMPTY_COMPONENT, VECTOR, density_terms, expectation, is_fit, take_given, usable, void
from ._numeric import PER_LOG2, STOP, STOP_SINGLE, log1p_of_part, negative_exp2
from .em_long import LONG_ROW
from .starts import KMEANS, MINMAX, centres, divide, kmeans, minmax, sum_of

#: The dtype of a fit by `precision`.
REALS = {name: np.dtype(str(dtype).removeprefix("torch.")) for name, dtype in PRECISIONS.items()}

#: Microseconds for a row and for each of its values: to find where it starts; to fit from there, and from its extremes.
STARTING, FITTING_STARTED, FITTING = (0.3, 0.01), (0.4, 0.01), (0.6, 0.018)


@inner_with_sums
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
        d0, d1 = y[i] - mean[0], y[i] - mean[1]
        square0 += r0[i] * (d0 * d0)
        square1 += r1[i] * (d1 * d1)
    if tied:
        variance[0] = variance[1] = (square0 + square1) / (n0 + n1) + reg_covar
    else:
        variance[0], variance[1] = square0 / n0 + reg_covar, square1 / n1 + reg_covar
    weight[0], weight[1] = n0 / (n0 + n1), n1 / (n0 + n1)


@inner
def _shifted(values: Any, y: Any) -> tuple[Any, Any, bool]:
    """Fill y with the values less the smallest, and zeros behind; in the arithmetic of y.

    Returns the smallest value, the extent, and whether all values are finite.
    """
    real = y.dtype.type
    smallest, largest, finite = values.dtype.type(np.inf), values.dtype.type(-np.inf), True
    for value in values:
        smallest, largest = min(smallest, value), max(largest, value)
        finite &= np.isfinite(value)
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

    A loop of its own, as is `given_rows`: the assignment, which starts from the smallest and the largest loss, does not have to
    wait until they are compiled.
    """
    real = weights.dtype.type
    for row in range(first, last):
        size = count[row]
        values, y = x[start[row] : start[row] + size], np.empty(size, weights.dtype)
        smallest, extent, finite = _shifted(values, y)
        if size < 2 or not finite:
            continue
        centre, resp = np.empty(2, weights.dtype), np.empty((2, size), weights.dtype)
        centres(values, smallest, extent, sum_of(y) / real(size), init, seed, row // n_init, row % n_init, centre)
        if init == KMEANS:
            kmeans(y, centre)
        divide(y, centre, resp)
        _maximisation(y, resp[0], resp[1], tied, real(reg_covar), real(EMPTY_COMPONENT), weights[row], means[row], variances[row])


@compiled
def given_rows(
    first: int, last: int, x: Any, start: Any, count: Any, weights_init: Any, means_init: Any, precisions_init: Any,
    sum_tolerance: float, n_init: int, started: bool, weights: Any, means: Any, variances: Any,
) -> None:  # fmt: skip
    """The parameters that the first E-step takes, on y: what is given, the rest as `start_rows` has left it where `started`.

    NaN where what is given makes no mixture.
    """
    for row in range(first, last):
        weight, mean, variance, given = weights[row], means[row], variances[row], row // n_init
        values, y = x[start[row] : start[row] + count[row]], np.empty(count[row], weights.dtype)
        smallest, extent, _ = _shifted(values, y)
        if not started:
            minmax(extent, weight, mean, variance)
        usual = not usable(given, weights_init, means_init, precisions_init)
        if not usual and not take_given(
            given, smallest, weights_init, means_init, precisions_init, sum_tolerance, weight, mean, variance
        ):
            weight[0] = np.nan


@inner
def fit_row(
    row: int, values: Any, room: Any, tied: bool, tol: float, reg_covar: float, max_iter: int, started: bool,
    weights: Any, means: Any, variances: Any, lower_bound: Any, n_iter: Any, converged: Any, valid: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Fit a row. Returns the smallest value; y, less this value, as are the means then; and room for two rows like y."""
    real, size = weights.dtype.type, len(values)
    whole = (size + VECTOR - 1) // VECTOR * VECTOR
    # Rows first: a slice of columns is not contiguous for the compiler, and the loops would not fill vector registers.
    y, r0, r1 = room[0][:whole], room[1][:whole], room[2][:whole]
    smallest, extent, finite = _shifted(values, y)
    weight, mean, variance = weights[row], means[row], variances[row]
    if not started:
        minmax(extent, weight, mean, variance)
    converged[row], n_iter[row], previous = False, 0, real(-np.inf)
    valid[row] = size >= 2 and finite and not np.isnan(weight[0])
    while valid[row] and n_iter[row] < max_iter and not converged[row]:
        n_iter[row] += 1
        lower_bound[row] = expectation(y, size, weight, mean, variance, r0, r1) / real(size)
        _maximisation(y, r0, r1, tied, real(reg_covar), real(EMPTY_COMPONENT), weight, mean, variance)
        converged[row] = abs(lower_bound[row] - previous) < real(tol)
        previous = lower_bound[row]
    if not valid[row] or not is_fit(weight, mean, variance, lower_bound[row]):
        void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
    return smallest, y, r0, r1


# There is no sum here. But numba compiles what this calls once for each set of options, and `expectation` has these.
@inner_with_sums
def assign(
    y: Any, size: int, weight: Any, mean: Any, variance: Any, tolerance: float, r0: Any, r1: Any, assignment: Any, score: Any
) -> None:
    """assignment: whether component 0 is at least as likely, but for rounding; score: the log-density of the mixture."""
    c0, h0 = density_terms(weight, variance, np.uint64(0))
    c1, h1 = density_terms(weight, variance, np.uint64(1))
    real = y.dtype.type
    per_log2, stop = real(PER_LOG2), real(STOP if y.itemsize == 8 else STOP_SINGLE)
    for i in range(size):
        d0, d1 = y[i] - mean[0], y[i] - mean[1]
        log_p0, log_p1 = c0 - h0 * (d0 * d0), c1 - h1 * (d1 * d1)
        assignment[i] = log_p0 >= log_p1 - real(tolerance)
        score[i] = max(log_p0, log_p1)
        r0[i] = log_p0 - log_p1
    for i in range(len(y)):
        power = abs(r0[i]) * per_log2
        r1[i] = negative_exp2(stop if power > stop else power)
    for i in range(len(y)):
        r1[i] = log1p_of_part(r1[i])
    for i in range(size):
        score[i] += r1[i]


@compiled
def fit_rows(
    first: int, last: int, x: Any, start: Any, count: Any, tied: bool, tol: float, reg_covar: float, max_iter: int, started: bool,
    tolerance: float, weights: Any, means: Any, variances: Any, lower_bound: Any, n_iter: Any, converged: Any, valid: Any,
    assignment: Any, score: Any,
) -> None:  # fmt: skip
    """`started`: the parameters hold what the first E-step takes, on y; else a row starts from its smallest and largest value."""
    width = 0
    for row in range(first, last):
        width = max(width, count[row])
    room = np.empty((3, width + VECTOR), weights.dtype)
    for row in range(first, last):
        size, weight, mean, variance = count[row], weights[row], means[row], variances[row]
        smallest, y, r0, r1 = fit_row(
            row, x[start[row] : start[row] + size], room, tied, tol, reg_covar, max_iter, started,
            weights, means, variances, lower_bound, n_iter, converged, valid,
        )  # fmt: skip
        for i in range(score.shape[1]):
            assignment[row, i], score[row, i] = False, -np.inf
        if valid[row] and score.shape[1] > 0:
            assign(y, size, weight, mean, variance, tolerance, r0, r1, assignment[row], score[row])
        mean[0], mean[1] = mean[0] + smallest, mean[1] + smallest


def empty_fit(rows: int, real: Any, k: int = 2) -> tuple[Array, ...]:
    """weights, means, variances [G, k]; lower_bound, n_iter, converged, valid [G]."""
    return (
        np.empty((rows, k), real),
        np.empty((rows, k), real),
        np.empty((rows, k), real),
        np.empty(rows, real),
        np.empty(rows, np.int64),
        np.empty(rows, np.bool_),
        np.empty(rows, np.bool_),
    )


def fit_options(covariance_type: str, options: tuple[float, float, int] = FIT_OPTIONS, started: bool = False) -> tuple[Any, ...]:
    """What `fit_row` takes between the row and its results; `options`: tol, reg_covar and max_iter."""
    return covariance_type == "tied", *options, started


def row_bounds(cost: tuple[float, float], count: Array) -> list[int]:
    """The bounds of slices of rows with so many values, which threads share."""
    of_row, of_value = cost
    if len(count) * of_row + of_value * int(count.sum()) < 2 * HANDING_OVER:
        return [0, len(count)]
    return shared_bounds(cumulated(of_row + of_value * count))


def fit(loss: Array, count: Array, covariance_type: str, precision: str) -> tuple[Array, ...]:
    """Fit two components to loss[g, :count[g]] of every row g: what `empty_fit` holds, then assignment and score [G, K]."""
    rows, width = loss.shape
    real = REALS[precision]
    results = *empty_fit(rows, real), np.empty((rows, width), np.bool_), np.empty((rows, width), real)
    options = *fit_options(covariance_type), tie_tolerance(PRECISIONS[precision])
    over_bounds(fit_rows, row_bounds(FITTING, count), loss.reshape(-1), np.arange(rows) * width, count, *options, *results)
    return results


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
        number, width = x.shape
        start = np.arange(number) * width
        size = np.full(number, width) if count is None else np.clip(view(count), 0, width).astype(np.int64)
    real, tied, initial = REALS[precision], covariance_type == "tied", (weights_init, means_init, precisions_init)
    complete = all(values is not None and np.isfinite(view(values)).all() for values in initial)
    # Empty where not given.
    given = [np.empty((0, 2), real) if values is None else flat([values], real) for values in initial]
    x_values, starts, sizes = flat([x], real).reshape(-1), np.repeat(start, n_init), np.repeat(size, n_init)
    results = empty_fit(len(sizes), real, n_components)
    short = (sizes <= LONG_ROW) & (n_components == 2)
    if short.any():
        # What `em_long` fits is an empty row here.
        rows = x_values, starts, np.where(short, sizes, 0)
        if started := INITS.index(init) != MINMAX and not complete:
            start_options = INITS.index(init), seed, n_init, tied, reg_covar
            over_bounds(start_rows, row_bounds(STARTING, rows[2]), *rows, *start_options, *results[:3])
        if any_given := any(values is not None for values in initial):
            given_options = sum_tolerance(weights_init), n_init, started
            over_bounds(given_rows, row_bounds(STARTING, rows[2]), *rows, *given, *given_options, *results[:3])
        options = *fit_options(covariance_type, (tol, reg_covar, max_iter), started or any_given), 0.0
        unread = np.empty((len(sizes), 0), np.bool_), np.empty((len(sizes), 0), real)
        bounds = row_bounds(FITTING_STARTED if started or any_given else FITTING, rows[2])
        over_bounds(fit_rows, bounds, *rows, *options, *results, *unread)
    if not short.all():
        long_options = tied, tol, reg_covar, max_iter, n_init, sum_tolerance(weights_init), INITS.index(init), seed
        em_long.fit(np.flatnonzero(~short), x_values, starts, sizes, (*given, *long_options), results)
    return tuple(map(torch.from_numpy, _best(results, len(size), n_init)))
