"""What kernels for the fit of rows share: finding a row, given initial values, storing a fit, and the best of several fits.

A row is (pointer, stride, number of values, smallest value). It is strided memory, of which the first `count` values are fitted,
or a part of flat memory, which a table names. The fit of start s of row g has the number g n_init + s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import Fit
from paa_gpu.kernels._launch import compile_options
from paa_gpu.separation import tie_tolerance

#: Values of a row at most. A position is an int32, and the programs of a long row may end a few tiles behind it.
MOST_VALUES = 2**31 - 2**16


def check_width(width: int) -> None:
    """Refuse rows that are too long."""
    if width > MOST_VALUES:
        raise ValueError(f"`x` must have at most {MOST_VALUES} values in a row on a GPU, got {width}")


def tables(lengths: Sequence[int], longest: int) -> list[tuple[int, int, list[int]]]:
    """The launches for flat rows: how many rows, the most values of one, and the table of `locate`. Rows of more than `longest`
    values have a launch of their own."""
    first, launches = [*itertools.accumulate(lengths, initial=0)], []
    short = [g for g, size in enumerate(lengths) if size <= longest]
    long = [g for g, size in enumerate(lengths) if size > longest]
    for rows in filter(None, (short, long)):
        sizes, table = [lengths[g] for g in rows], [0] * (3 * len(rows))
        table[0::3], table[1::3], table[2::3] = [first[g] for g in rows], sizes, rows
        launches.append((len(rows), max(sizes), table))
    return launches


@triton.jit
def locate(source, width, place):
    """Number, pointer, stride and number of values of the row at this place of a launch. A table has the first value, the number
    of values and the number of the row at each place. Without a table, a place is the number of a row."""
    x_ptr, stride_xg, stride_xk, count_ptr, stride_cg, table_ptr = source
    g = place
    if table_ptr is not None:
        table_ptr += 3 * place
        x_ptr += tl.load(table_ptr) * stride_xk
        n = tl.load(table_ptr + 1).to(tl.int32)
        g = tl.load(table_ptr + 2)
    else:
        n = width.to(tl.int32)
        if count_ptr is not None:
            n = tl.minimum(tl.maximum(tl.load(count_ptr + g * stride_cg), 0), width).to(tl.int32)
        x_ptr += g * stride_xg
    return g, x_ptr, stride_xk, n


@triton.jit
def _load_given(init, g, default, K: tl.constexpr, KP: tl.constexpr):
    """The initial values [KP] of a row, from a pointer and its stride over rows; `default` behind them."""
    ptr, stride_g = init
    j = tl.arange(0, KP)
    return tl.load(ptr + g * stride_g + j, mask=j < K, other=default).to(tl.float64)


@triton.jit
def _all_finite(x):
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), 0) > 0


@triton.jit
def given_are_finite(inits, g, K: tl.constexpr, KP: tl.constexpr):
    """Whether all initial values of a row are finite. If not, the row starts as if none were given."""
    weights_init, means_init, precisions_init = inits
    finite = tl.full((), True, tl.int1)
    if weights_init[0] is not None:
        finite &= _all_finite(_load_given(weights_init, g, 0.0, K, KP))
    if means_init[0] is not None:
        finite &= _all_finite(_load_given(means_init, g, 0.0, K, KP))
    if precisions_init[0] is not None:
        finite &= _all_finite(_load_given(precisions_init, g, 1.0, K, KP))
    return finite


@triton.jit
def take_given(inits, g, smallest, take, tolerance, weight, mean, variance, K: tl.constexpr, KP: tl.constexpr):
    """Put given initial values in the place of those of the start, if `take`; and whether they make a mixture."""
    weights_init, means_init, precisions_init = inits
    good = tl.full((), True, tl.int1)
    if weights_init[0] is not None:
        w = _load_given(weights_init, g, 0.0, K, KP)
        good &= (tl.min(w, 0) >= 0) & (tl.abs(tl.sum(w, 0) - 1) <= tolerance)
        weight = tl.where(take, w.to(weight.dtype), weight)
    if means_init[0] is not None:
        m = _load_given(means_init, g, 0.0, K, KP).to(mean.dtype) - smallest
        mean = tl.where(take, tl.where(tl.arange(0, KP) < K, m, 0.0), mean)
    if precisions_init[0] is not None:
        p = _load_given(precisions_init, g, 1.0, K, KP)
        good &= tl.min(p, 0) > 0
        variance = tl.where(take, 1 / p.to(variance.dtype), variance)
    return weight, mean, variance, good | (take == 0)


@triton.jit
def is_fit(weight, mean, variance, lower_bound):
    """Whether all that a fit ends in is finite, and no component [KP] has shrunk to a point."""
    finite = _all_finite(weight) & _all_finite(mean) & _all_finite(variance) & (tl.abs(lower_bound) < float("inf"))
    return finite & (tl.min(variance, 0) > 0)


@triton.jit
def store_fit(
    fit_ptrs, number, smallest, valid, weight, mean, variance, lower_bound, n_iter, converged, K: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Store a fit of K components, [KP] each, or what a row that cannot be fitted has."""
    weights_ptr, means_ptr, variances_ptr, lower_bound_ptr, n_iter_ptr, converged_ptr, valid_ptr = fit_ptrs
    nan, j = float("nan"), tl.arange(0, KP)
    valid &= is_fit(weight, mean + smallest, variance, lower_bound)
    tl.store(weights_ptr + number * K + j, tl.where(valid, weight, nan), mask=j < K)
    tl.store(means_ptr + number * K + j, tl.where(valid, mean + smallest, nan), mask=j < K)
    tl.store(variances_ptr + number * K + j, tl.where(valid, variance, nan), mask=j < K)
    tl.store(lower_bound_ptr + number, tl.where(valid, lower_bound, nan))
    tl.store(n_iter_ptr + number, tl.where(valid, n_iter, 0).to(tl.int64))
    tl.store(converged_ptr + number, valid & converged)
    tl.store(valid_ptr + number, valid)


@triton.jit(do_not_specialize=["n_init"])
def _choose_kernel(
    tried_ptrs,  # the seven tensors of `empty_fit`, for G n_init rows
    fit_ptrs,  # the same, for G rows
    n_init,
    tie: tl.float64,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    """The fit with the highest lower bound of each row, the first one where they tie; none is valid: the first."""
    g = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), tl.float64)
    for number in range(g * n_init, (g + 1) * n_init):
        lower_bound = tl.load(tried_ptrs[3] + number).to(tl.float64)
        highest = tl.where(lower_bound > highest, lower_bound, highest)  # not where it is NaN
    best = (g + 1) * n_init
    for number in range(g * n_init, (g + 1) * n_init):
        lower_bound = tl.load(tried_ptrs[3] + number).to(tl.float64)
        best = tl.minimum(best, tl.where(lower_bound >= highest - tie, number, best))
    best = tl.where(best < (g + 1) * n_init, best, g * n_init)
    j = tl.arange(0, KP)
    for part in tl.static_range(3):
        values = tl.load(tried_ptrs[part] + best * K + j, mask=j < K, other=0.0)
        tl.store(fit_ptrs[part] + g * K + j, values, mask=j < K)
    for part in tl.static_range(3, 7):
        tl.store(fit_ptrs[part] + g, tl.load(tried_ptrs[part] + best))


def choose_best(tried: Fit, fit: Fit, n_init: int) -> None:
    """Fill `fit` with the best of the `n_init` fits of each row: one launch."""
    rows, n_components = fit[0].shape
    constants = {"K": n_components, "KP": triton.next_power_of_2(n_components), "num_warps": 1}
    options = compile_options(fuse=True)
    _choose_kernel[(rows,)](tried, fit, n_init, tie_tolerance(fit[0].dtype), **constants, **options)


def strided(init: Tensor | None, rows: int, n_components: int, most: torch.dtype) -> tuple[Tensor | None, int]:
    """Initial values of all rows as a kernel takes them: those of a row lie side by side, and have no more bits than `most`.

    No stride over them: it would mostly be 1, and Triton 3.5 loses a constant in a tuple that is read behind a branch.
    """
    if init is None:
        return None, 0
    init = init.to(min(init.dtype, most, key=lambda dtype: dtype.itemsize))
    init = init.expand(-1, n_components).contiguous().expand(rows, n_components)
    return init, init.stride(0)
