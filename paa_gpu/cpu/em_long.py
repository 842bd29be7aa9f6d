"""EM for CPU tensors in blocks: rows of any length and any number of components, with all threads in one row.

A pass goes over the values of a row once, block after block. For every block and component it computes three moments, weighted by
responsibility: the number n, the mean m, and the sum of squares q about m. Those of the row are

    N = sum_b n_b,   M = sum_b n_b m_b / N,   Q = sum_b q_b + n_b (m_b - M)^2

Nothing cancels in these sums, so no other pass has to find the means first. The blocks and the order of the sums do not depend on
the number of threads. So neither does any bit of the result.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from .._ops import LLOYD_PASSES
from ._arrays import Array
from ._loops import compiled, cumulated, inner, inner_with_sums, over_bounds, over_slices, shared_bounds
from ._mixtures import EMPTY_COMPONENT, VECTOR, expectation, expectation_of_any, is_fit, take_given, usable, void
from .starts import KMEANS, MINMAX, boundaries, centres, divide, minmax, move, sum_of

# Values of a block: with the responsibilities of two components they fill half of a small first-level cache.
BLOCK = 1024

# Rows of more values are fitted in blocks, so that threads can share them.
LONG_ROW = 16_384

# Blocks below which a second thread costs more than it saves: a block takes 1 us in Lloyd's iteration and 8 in EM, handing over
# to a thread 100 and more.
SERIAL_BLOCKS = 100
#: Microseconds to fit more than two components to a row, and for each of its values.
FITTING = 15.0, 0.1

# What a pass finds out, in this order; Lloyd's iteration and EM take as many passes as they need.
RANGE, LLOYD, DIVISION, EM, DONE = range(5)


@inner_with_sums
def _range(x: Any, origin: float, low: Any, high: Any, out: Any) -> None:
    """The smallest and the largest value, the sum less `origin` each, and whether all are finite.

    `low` and `high` have room for a vector: to find the extremes of many lanes is what the compiler can do at once.
    """
    low[:], high[:] = x[0], x[0]
    whole = len(x) // VECTOR * VECTOR
    for start in range(0, whole, VECTOR):
        for lane in range(VECTOR):
            value = x[start + lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
    for value in x[whole:]:
        low[0], high[0] = min(low[0], value), max(high[0], value)
    zero = x.dtype.type(0)
    total, nothing = zero, zero
    for i in range(len(x)):
        total += x[i] - origin
        nothing += x[i] * zero  # NaN where a value is not finite
    out[0], out[1], out[2], out[3] = low.min(), high.max(), total, nothing == zero


@inner_with_sums
def _moments(y: Any, r: Any, out: Any) -> None:
    """n, m and q of one component and block."""
    zero = y.dtype.type(0)
    number, total, square = zero, zero, zero
    for i in range(len(y)):
        number += r[i]
        total += r[i] * y[i]
    mean = total / number if number > 0 else zero
    for i in range(len(y)):
        square += r[i] * (y[i] - mean) ** 2
    out[0], out[1], out[2] = number, mean, square


@inner_with_sums
def _lloyd(values: Any, smallest: float, edge: Any, out: Any) -> None:
    """How many values belong to each centre, and their sum less `smallest` each. What is left belongs to the last centre."""
    zero, one = values.dtype.type(0), values.dtype.type(1)
    k, total = len(edge) - 1, zero
    for i in range(len(values)):
        total += values[i] - smallest
    number, rest = values.dtype.type(len(values)), total
    for j in range(k - 1):
        low, high, inside, within = edge[j], edge[j + 1], zero, zero
        for i in range(len(values)):
            y = values[i] - smallest
            member = one if (y > low) & (y <= high) else zero
            inside += member
            within += member * y
        out[1 + 3 * j], out[2 + 3 * j] = inside, within
        number, rest = number - inside, rest - within
    out[3 * k - 2], out[3 * k - 1] = number, rest


@compiled
def scan(
    first: int, last: int, x: Any, phase: int, smallest: float, centre: Any, weight: Any, mean: Any, variance: Any, partial: Any
) -> None:
    """One pass over some blocks of a row: `partial` [blocks, 1 + 3 k]."""
    k, real = len(mean), partial.dtype
    room, resp = np.zeros(BLOCK, real), np.zeros((k + 2, BLOCK), real)
    edge = boundaries(centre)
    for block in range(first, last):
        values, out = x[block * BLOCK : (block + 1) * BLOCK], partial[block]
        size = len(values)
        if phase == RANGE:
            _range(values, x[0], room[:VECTOR], room[VECTOR : 2 * VECTOR], out)
            continue
        if phase == LLOYD:
            _lloyd(values, smallest, edge, out)
            continue
        whole = (size + VECTOR - 1) // VECTOR * VECTOR
        y = room[:whole]
        for i in range(size):
            y[i] = values[i] - smallest
        y[size:] = 0
        # Rows first: a slice of columns is not contiguous for the compiler, and the loops would not fill vector registers.
        if phase == DIVISION:
            divide(y[:size], centre, resp)
            resp[:k, size:whole] = 0
        elif k == 2:
            out[0] = expectation(y, size, weight, mean, variance, resp[0][:whole], resp[1][:whole])
        else:
            out[0] = expectation_of_any(y, size, weight, mean, variance, resp)
        for j in range(k):
            _moments(y, resp[j][:whole], out[1 + 3 * j : 4 + 3 * j])


@inner
def maximisation(partial: Any, tied: bool, reg_covar: float, weight: Any, mean: Any, variance: Any) -> None:
    """The M-step, from the moments of the blocks."""
    k, zero, empty = len(mean), weight.dtype.type(0), weight.dtype.type(EMPTY_COMPONENT)
    for j in range(k):
        number, centre, square = partial[:, 1 + 3 * j], partial[:, 2 + 3 * j], partial[:, 3 + 3 * j]
        n, weighted, squares = sum_of(number), zero, zero
        for block in range(len(number)):
            weighted += number[block] * centre[block]
        m = weighted / n if n > 0 else n
        for block in range(len(number)):
            squares += square[block] + number[block] * (centre[block] - m) ** 2
        weight[j] = n + empty
        mean[j] = n * m / weight[j]
        variance[j] = squares + n * (m - mean[j]) ** 2
    total = sum_of(weight)
    if tied:
        variance[:] = sum_of(variance) / total + reg_covar
    else:
        variance[:] = variance / weight + reg_covar
    weight /= total


@compiled
def advance(
    x: Any, row: int, partial: Any, phase: int, passes: int, span: Any, centre: Any, before: Any,
    weights_init: Any, means_init: Any, precisions_init: Any, tied: bool, tol: float, reg_covar: float, max_iter: int,
    n_init: int, tolerance: float, init: int, seed: int,
    weights: Any, means: Any, variances: Any, lower_bound: Any, n_iter: Any, converged: Any, valid: Any,
) -> int:  # fmt: skip
    """Draw the conclusion of a pass, the `passes`-th of its phase; return the phase of the next one.

    `span` becomes the smallest value and the extent of the row, `centre` and `before` are Lloyd's.
    """
    weight, mean, variance = weights[row], means[row], variances[row]
    k, real, given = len(mean), weights.dtype.type, row // n_init
    usual = not usable(given, weights_init, means_init, precisions_init)
    if phase == RANGE:
        span[0] = partial[:, 0].min()
        span[1] = partial[:, 1].max() - span[0]
        average = sum_of(partial[:, 2]) / real(len(x)) + (x[0] - span[0])
        if len(x) < max(2, k) or not (partial[:, 3] > 0).all():
            void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
            return DONE
        n_iter[row], converged[row], lower_bound[row] = 0, False, -np.inf
        minmax(span[1], weight, mean, variance)
        complete = len(weights_init) > 0 and len(means_init) > 0 and len(precisions_init) > 0
        if init != MINMAX and (usual or not complete):
            centres(x, span[0], span[1], average, init, seed, given, row % n_init, centre)
            before[:] = -1
            return LLOYD if init == KMEANS else DIVISION
    elif phase == LLOYD:
        number, total = np.empty(k, real), np.empty(k, real)
        for j in range(k):
            number[j], total[j] = sum_of(partial[:, 1 + 3 * j]), sum_of(partial[:, 2 + 3 * j])
        return LLOYD if move(number, total, before, centre) and passes < LLOYD_PASSES else DIVISION
    elif phase == DIVISION:
        maximisation(partial, tied, real(reg_covar), weight, mean, variance)
    else:
        previous = lower_bound[row]
        lower_bound[row] = sum_of(partial[:, 0]) / real(len(x))
        maximisation(partial, tied, real(reg_covar), weight, mean, variance)
        n_iter[row] = passes
        converged[row] = abs(lower_bound[row] - previous) < real(tol)
        if passes < max_iter and not converged[row]:
            return EM
        mean += span[0]
        valid[row] = is_fit(weight, mean, variance, lower_bound[row])
        if not valid[row]:
            void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
        return DONE
    if not usual and not take_given(given, span[0], weights_init, means_init, precisions_init, tolerance, weight, mean, variance):
        void(row, weights, means, variances, lower_bound, n_iter, converged, valid)
        return DONE
    return EM


@inner
def _scratch(size: int, k: int, like: Any) -> tuple[Array, Array, Array, Array]:
    """partial, span, centre and before of a row, see `advance`."""
    real = like.dtype
    blocks = max((size + BLOCK - 1) // BLOCK, 1)
    return np.zeros((blocks, 1 + 3 * k), real), np.zeros(2, real), np.zeros(k, real), np.zeros(k, real)


@compiled
def fit_rows_in_blocks(first: int, last: int, rows: Any, x: Any, start: Any, count: Any, weights: Any, *rest: Any) -> None:
    """Fit some of the rows, one after the other in one thread. `rest` is what `advance` takes from `weights_init` on."""
    for row in rows[first:last]:
        values, means, variances = x[start[row] : start[row] + count[row]], rest[12], rest[13]
        partial, span, centre, before = _scratch(len(values), weights.shape[1], weights)
        phase, passes = (RANGE, 0) if len(values) > 0 else (DONE, 0)
        if phase == DONE:
            void(row, *rest[11:])
        while phase != DONE:
            scan(0, len(partial), values, phase, span[0], centre, weights[row], means[row], variances[row], partial)
            passes += 1
            following = advance(values, row, partial, phase, passes, span, centre, before, *rest)
            phase, passes = following, passes if following == phase else 0


def fit_row_in_blocks(row: int, serial_below: int, x: Array, start: Array, count: Array, weights: Array, *rest: Any) -> None:
    """Fit one row. Its blocks are shared by all threads, unless there are fewer than `serial_below`."""
    values, means, variances = x[start[row] : start[row] + count[row]], rest[12], rest[13]
    partial, span, centre, before = _scratch(len(values), weights.shape[1], weights)
    phase, passes = RANGE, 0
    while phase != DONE:
        pointers = values, phase, span[0], centre, weights[row], means[row], variances[row], partial
        over_slices(scan, len(partial), serial_below, *pointers)
        passes += 1
        following = advance(values, row, partial, phase, passes, span, centre, before, *rest)
        phase, passes = following, passes if following == phase else 0


def fit(rows: Array, x: Array, start: Array, count: Array, options: tuple[Any, ...], results: tuple[Array, ...]) -> None:
    """Fit the rows of these numbers: side by side where there are as many as threads, else one after the other on all threads.

    The length of a row alone decides which compiled loop adds it up: another one may add in another order.
    """
    args = x, start, count, results[0], *options, *results
    long = count[rows] > LONG_ROW
    if not long.all():
        short_rows = rows[~long]
        over_bounds(fit_rows_in_blocks, shared_bounds(cumulated(FITTING[0] + FITTING[1] * count[short_rows])), short_rows, *args)
    rows = rows[long]

    def fit_rows(first: int, last: int, serial_below: int) -> None:
        for row in rows[first:last]:
            fit_row_in_blocks(row, serial_below, *args)

    if len(rows) >= torch.get_num_threads():
        over_slices(fit_rows, len(rows), 2, sys.maxsize)
    else:
        fit_rows(0, len(rows), SERIAL_BLOCKS)
