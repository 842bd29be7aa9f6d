"""What fits of short and long rows share: densities, given initial values, and the results of a row that cannot be fitted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._loops import inner, inner_with_sums
from ._numeric import PER_LOG2, STOP, STOP_SINGLE, exp, negative_exp2

# Factors of at most 2 in a product that float32 can hold; of at most 8, in a mixture of eight components.
PRODUCT, PRODUCT_OF_EIGHT = 100, 40

# Values that the passes over responsibilities take at a time, with room for the widest registers, four deep.
VECTOR = 16

# scikit-learn's guard against an empty component.
EMPTY_COMPONENT = 10 * np.finfo(np.float64).eps


@inner
def density_terms(weight: Any, variance: Any, component: Any) -> tuple[float, float]:
    """(c, h) of the weighted log-density c - h (y - mean)^2.

    `component` is no plain 0 or 1: numba would compile a version for each.
    """
    real = weight.dtype.type
    w, v = weight[component], variance[component]
    return real(math.log(w / math.sqrt(2 * math.pi * v))), real(0.5 / v)


@inner_with_sums
def expectation(y: Any, size: int, weight: Any, mean: Any, variance: Any, r0: Any, r1: Any) -> Any:
    """Fill the responsibilities of two components; return the sum of the log-densities.

    With ratio = smaller / larger of the two densities, log(p_0 + p_1) is the logarithm of the larger one plus log(1 + ratio);
    these are summed as the logarithm of a product, whose factors are at most 2: one logarithm in a hundred values. y, r0
    and r1 are whole vectors, so that no pass leaves a rest to single values: behind its `size` y is 0, and r0 and r1 become 0.
    """
    c0, h0 = density_terms(weight, variance, np.uint64(0))
    c1, h1 = density_terms(weight, variance, np.uint64(1))
    real = y.dtype.type
    one, total = real(1), real(0)
    per_log2, stop = real(PER_LOG2), real(STOP if y.itemsize == 8 else STOP_SINGLE)
    for i in range(size):
        d0, d1 = y[i] - mean[0], y[i] - mean[1]  # not `** 2` below, for which numba compiles a function
        log_p0, log_p1 = c0 - h0 * (d0 * d0), c1 - h1 * (d1 * d1)
        total += max(log_p0, log_p1)
        r0[i] = log_p0 - log_p1
    for i in range(len(y)):
        power = abs(r0[i]) * per_log2
        r1[i] = negative_exp2(stop if power > stop else power)
    ratios = r1[:size]
    for start in range(0, size, PRODUCT):
        product = one
        for ratio in ratios[start : start + PRODUCT]:
            product *= one + ratio
        total += math.log(product)
    for i in range(len(y)):
        ratio, foreground = r1[i], r0[i] >= 0
        larger = one / (one + ratio)
        r0[i] = larger if foreground else ratio * larger
        r1[i] = ratio * larger if foreground else larger
    for i in range(size, len(y)):
        r0[i], r1[i] = 0, 0
    return total


@inner_with_sums
def expectation_of_any(y: Any, size: int, weight: Any, mean: Any, variance: Any, resp: Any) -> Any:
    """`expectation` for any number k of components.

    resp is [k + 2, len(y) or more]. Its last two rows are room for the largest density and the sum of the others over it.
    """
    k = len(mean)
    top, density = resp[k], resp[k + 1]
    one, total = y.dtype.type(1), y.dtype.type(0)
    top[: len(y)] = -np.inf
    for j in range(k):
        c, h = density_terms(weight, variance, j)
        for i in range(len(y)):
            log_p = c - h * (y[i] - mean[j]) ** 2
            resp[j, i] = log_p
            # Not back to `top`: a masked store would do there, and some processors are slow at it.
            density[i] = log_p if log_p > top[i] else top[i]
        top, density = density, top
    density[: len(y)] = 0
    for j in range(k):
        for i in range(len(y)):
            resp[j, i] = exp(resp[j, i] - top[i])
            density[i] += resp[j, i]
    for value in top[:size]:
        total += value
    for start in range(0, size, PRODUCT_OF_EIGHT):
        product = one
        for value in density[start : min(start + PRODUCT_OF_EIGHT, size)]:
            product *= value
        total += math.log(product)
    for j in range(k):
        for i in range(len(y)):
            resp[j, i] /= density[i]
    resp[:k, size : len(y)] = 0
    return total


@inner
def usable(row: int, weights_init: Any, means_init: Any, precisions_init: Any) -> bool:
    """Whether all initial values of a row are finite. If not, the row starts as if none were given."""
    finite = True
    for init in (weights_init, means_init, precisions_init):
        for j in range(init.shape[1] if len(init) > 0 else 0):
            finite &= np.isfinite(init[row % len(init), j])
    return finite


@inner
def take_given(
    row: int, smallest: float, weights_init: Any, means_init: Any, precisions_init: Any, tolerance: float,
    weight: Any, mean: Any, variance: Any,
) -> bool:  # fmt: skip
    """Put given initial values in the place of those of the start. Returns whether they make a mixture."""
    # One by one, here and below: numba takes seconds to compile an assignment of arrays, for the error that it might raise.
    good, total = True, weight.dtype.type(0)
    for j in range(len(weight)):
        if len(weights_init) > 0:
            weight[j] = weights_init[row % len(weights_init), j]
            good &= weight[j] >= 0
            total += weight[j]
        if len(means_init) > 0:
            mean[j] = means_init[row % len(means_init), j] - smallest
        if len(precisions_init) > 0:
            precision = precisions_init[row % len(precisions_init), j % precisions_init.shape[1]]
            good &= precision > 0
            variance[j] = 1 / precision
    return good and (len(weights_init) == 0 or abs(total - 1) <= tolerance)


@inner
def is_fit(weight: Any, mean: Any, variance: Any, lower_bound: float) -> Any:
    """Whether all is finite, and no component has shrunk to a point."""
    good = np.isfinite(lower_bound)
    for j in range(len(weight)):
        good &= np.isfinite(weight[j]) and np.isfinite(mean[j]) and np.isfinite(variance[j]) and variance[j] > 0
    return good


@inner
def void(row: int, weights: Any, means: Any, variances: Any, lower_bound: Any, n_iter: Any, converged: Any, valid: Any) -> None:
    """The results of a row that cannot be fitted."""
    lower_bound[row] = np.nan
    for j in range(weights.shape[1]):
        weights[row, j], means[row, j], variances[row, j] = np.nan, np.nan, np.nan
    n_iter[row], converged[row], valid[row] = 0, False, False
