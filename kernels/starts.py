"""Where a fit starts: centres of the components, and the division of a row among them (see `paa_gpu/cpu/starts.py`).

Blocks over components are [KP]. KP is the next power of two of the number of components K. Entries beyond K never have a member.
The smallest value of a row is subtracted from all its values. So none is negative, and their bits, as integers, have their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paa_gpu._ops import EXACT, LLOYD_PASSES
from paa_gpu.kernels._numeric import EPS

EXACT_VALUES, MOST_PASSES = tl.constexpr(EXACT), tl.constexpr(LLOYD_PASSES)
EPS32 = tl.constexpr(2.0**-23)  # of float32


@triton.jit
def load_values(row, start, BLOCK: tl.constexpr):
    """Values [BLOCK] of the row less its smallest one, zero outside, and where inside."""
    x_ptr, stride_xk, n, smallest = row
    position = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + position.to(tl.int64) * stride_xk, mask=position < n, other=0.0).to(smallest.dtype)
    return tl.where(position < n, x - smallest, 0.0), position < n


@triton.jit
def load_at(row, position):
    """The values [KP] at some positions of the row."""
    x_ptr, stride_xk, n, smallest = row
    inside = (position >= 0) & (position < n)
    return tl.load(x_ptr + position.to(tl.int64) * stride_xk, mask=inside, other=0.0).to(smallest.dtype) - smallest


@triton.jit
def even_spread(extent, K: tl.constexpr, KP: tl.constexpr):
    """Weights, means and variances that no value decides: the means from the smallest to the largest."""
    j = tl.arange(0, KP)
    used = j < K
    mean = (extent * j.to(extent.dtype)) / (K - 1) if K > 1 else extent * 0.5 + 0 * j.to(extent.dtype)
    one = tl.full([KP], 1.0, extent.dtype)
    return tl.where(used, one / K, 0.0), tl.where(used, mean, 0.0), one


@triton.jit
def ascending(x, K: tl.constexpr, KP: tl.constexpr):
    """Sort the first K of [KP], by counting what is before each."""
    j = tl.arange(0, KP)
    other, mine = x[:, None], x[None, :]
    before = (other < mine) | ((other == mine) & (j[:, None] < j[None, :]))
    place = tl.sum((before & (j[:, None] < K)).to(tl.int32), 0)
    sorted_x = tl.sum(tl.where((place[:, None] == j[None, :]) & (j[:, None] < K), x[:, None], 0.0), 0)
    return tl.where(j < K, sorted_x, 0.0)


@triton.jit
def boundaries(centre, K: tl.constexpr, KP: tl.constexpr):
    """What belongs to centre j is above low[j] and not above high[j]."""
    j = tl.arange(0, KP)
    before = tl.sum(tl.where(j[:, None] + 1 == j[None, :], centre[:, None], 0.0), 0)
    after = tl.sum(tl.where(j[:, None] == j[None, :] + 1, centre[:, None], 0.0), 0)
    low = tl.where(j == 0, float("-inf"), before + (centre - before) * 0.5)
    high = tl.where(j == K - 1, float("inf"), centre + (after - centre) * 0.5)
    return tl.where(j < K, low, float("inf")), high


@triton.jit
def belongs(x, inside, low, high):
    """Whether value i belongs to centre j, [BLOCK, KP]."""
    return inside[:, None] & (x[:, None] > low[None, :]) & (x[:, None] <= high[None, :])


@triton.jit
def draw(seed, row, attempt, n, K: tl.constexpr, KP: tl.constexpr):
    """K distinct positions in a row of n values (Floyd's algorithm), -1 behind them."""
    j = tl.arange(0, KP)
    position = tl.full([KP], -1, tl.int32)
    for i in tl.static_range(K):
        bound = n - K + i
        counter = tl.full((), i, tl.uint32)
        bits, _, _, _ = tl.philox(seed, counter, attempt.to(tl.uint32), row.to(tl.uint32), counter * 0)
        drawn = ((bits.to(tl.uint64) * (bound + 1).to(tl.uint64)) >> 32).to(tl.int32)
        taken = tl.max((position == drawn).to(tl.int32), 0) > 0
        position = tl.where(j == i, tl.where(taken, bound, drawn), position)
    return position


@triton.jit
def quantile_ranks(n, K: tl.constexpr, KP: tl.constexpr):
    return ((2 * tl.arange(0, KP).to(tl.int64) + 1) * n // (2 * K)).to(tl.int32)


@triton.jit
def key_of(x):
    """The bits of values that are not negative: integers in the same order."""
    return x.to(tl.int64, bitcast=True) if x.dtype == tl.float64 else x.to(tl.int32, bitcast=True)


@triton.jit
def value_of(key, DTYPE: tl.constexpr):
    return key.to(DTYPE, bitcast=True)


@triton.jit
def _quantiles(row, extent, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """The values of the quantiles' ranks, [KP]: the smallest key that has more values than its rank up to it, by halving."""
    n = row[2]
    rank = quantile_ranks(n, K, KP)
    high = key_of(extent) + tl.zeros([KP], key_of(extent).dtype)
    low = high * 0
    while tl.max(high - low, 0) > 0:
        middle = low + ((high - low) >> 1)
        count = tl.zeros([KP], tl.int32)
        for start in range(0, n, BLOCK):
            x, inside = load_values(row, start, BLOCK)
            count += tl.sum((inside[:, None] & (key_of(x)[:, None] <= middle[None, :])).to(tl.int32), 0)
        enough = count > rank
        high, low = tl.where(enough, middle, high), tl.where(enough, low, tl.minimum(middle + 1, high))
    return value_of(high, row[3].dtype)


@triton.jit
def members(row, low, high, KP: tl.constexpr, BLOCK: tl.constexpr):
    """How many values belong to each centre, and their sum, [KP]."""
    number, total = tl.zeros([KP], tl.int32), tl.zeros([KP], low.dtype)
    for start in range(0, row[2], BLOCK):
        x, inside = load_values(row, start, BLOCK)
        belong = belongs(x, inside, low, high)
        number += tl.sum(belong.to(tl.int32), 0)
        total += tl.sum(tl.where(belong, x[:, None], 0.0), 0)
    return number, total


@triton.jit
def mean_of(number, total, centre):
    """The means of what belongs to each centre; the centre where nothing does."""
    return tl.where(number > 0, total / tl.maximum(number, 1).to(total.dtype), centre)


@triton.jit
def two_means(row, centre, KP: tl.constexpr, BLOCK: tl.constexpr):
    """The two centres with the least sum of squares: the most of sum^2 / number over both sides of every value.

    Of divisions that only rounding tells apart, the one with the smaller low group.
    """
    rounding: tl.constexpr = EXACT_VALUES * (EPS if centre.dtype == tl.float64 else EPS32)
    j = tl.arange(0, KP)
    n = row[2]
    best, boundary = tl.full((), float("-inf"), centre.dtype), tl.full((), float("inf"), centre.dtype)
    for i in range(n):
        value = tl.max(load_at(row, tl.where(j == 0, i, -1)) + tl.where(j == 0, row[3] * 0, float("-inf")), 0)
        low = tl.where(j == 0, float("-inf"), value)
        number, total = members(row, low, tl.where(j == 0, value, float("inf")), KP, BLOCK)
        score = tl.sum(tl.where(number > 0, total * (total / tl.maximum(number, 1).to(total.dtype)), 0.0), 0)
        better = (score > best * (1 + rounding)) | ((score >= best * (1 - rounding)) & (value < boundary))
        better = better & (tl.min(number, 0) > 0)
        best, boundary = tl.where(better, score, best), tl.where(better, value, boundary)
        centre = tl.where(better, mean_of(number, total, centre), centre)
    return centre


@triton.jit
def first_centres(row, extent, mean, source, INIT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """The centres of a row, from which Lloyd's iteration goes on where INIT is "kmeans"."""
    if INIT == "random":
        centre = ascending(load_at(row, draw(source[0], source[1], source[2], row[2], K, KP)), K, KP)
    elif INIT == "kmeans" and K == 2:
        centre = tl.where(tl.arange(0, KP) == 1, 2 * mean, 0.0)
    else:
        centre = _quantiles(row, extent, K, KP, BLOCK)
    return centre


@triton.jit
def lloyd(row, centre, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    before = tl.full([KP], -1, tl.int32)
    passes = tl.full((), 0, tl.int32)
    while passes < MOST_PASSES:
        low, high = boundaries(centre, K, KP)
        number, total = members(row, low, high, KP, BLOCK)
        moved = tl.max((number != before).to(tl.int32), 0) > 0
        centre, before = mean_of(number, total, centre), number
        passes = tl.where(moved, passes + 1, MOST_PASSES)
    return centre


@triton.jit
def moments(x, r):
    """Number, mean and sum of squares about the mean, [KP], of what each component is responsible for, r [BLOCK, KP]."""
    number = tl.sum(r, 0)
    mean = tl.sum(r * x[:, None], 0) / tl.where(number > 0, number, 1.0)
    return number, mean, tl.sum(r * (x[:, None] - mean[None, :]) * (x[:, None] - mean[None, :]), 0)


@triton.jit
def merge(number, mean, square, number_, mean_, square_):
    """The moments of two sets together, in which nothing cancels."""
    both = number + number_
    share = tl.where(both > 0, number_ / tl.where(both > 0, both, 1.0), 0.0)
    apart = mean_ - mean
    return both, mean + apart * share, square + square_ + apart * apart * (number * share)


@triton.jit
def maximisation(number, mean, square, reg_covar, K: tl.constexpr, TIED: tl.constexpr):
    """Weights, means and variances [KP] from the moments of a row: scikit-learn's M-step, its guard included."""
    used = tl.arange(0, number.shape[0]) < K
    n = tl.where(used, number + 10 * EPS, 0.0)
    total = tl.sum(n, 0)
    safe = tl.where(used, n, 1.0)
    new_mean = tl.where(used, number * mean / safe, 0.0)
    square += number * (mean - new_mean) * (mean - new_mean)
    if TIED:
        variance = tl.sum(tl.where(used, square, 0.0), 0) / total + tl.zeros_like(number) + reg_covar
    else:
        variance = square / safe + reg_covar
    return n / total, new_mean, tl.where(used, variance, 1.0)


@triton.jit
def begin(
    row, extent, source, reg_covar, INIT: tl.constexpr, TIED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights, means and variances [KP] of a row's start, by one program."""
    weight, mean, variance = even_spread(extent, K, KP)
    if INIT != "minmax":
        n = row[2]
        everything = tl.full([KP], float("inf"), extent.dtype)
        j = tl.arange(0, KP)
        average = extent * 0
        if INIT == "kmeans" and K == 2:
            _, total = members(row, tl.where(j == 0, float("-inf"), everything), everything, KP, BLOCK)
            average = tl.sum(total, 0) / n.to(extent.dtype)
        centre = first_centres(row, extent, average, source, INIT, K, KP, BLOCK)
        if INIT == "kmeans":
            if K == 2 and n <= EXACT_VALUES:  # noqa: SIM108  # not known when it compiles
                centre = two_means(row, centre, KP, BLOCK)
            else:
                centre = lloyd(row, centre, K, KP, BLOCK)
        low, high = boundaries(centre, K, KP)
        zero = tl.zeros([KP], extent.dtype)
        sums = (zero, zero, zero)
        for start in range(0, n, BLOCK):
            x, inside = load_values(row, start, BLOCK)
            sums = merge(*sums, *moments(x, belongs(x, inside, low, high).to(x.dtype)))
        weight, mean, variance = maximisation(*sums, reg_covar, K, TIED)
    return weight, mean, variance
