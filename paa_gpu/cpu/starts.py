"""Where a fit starts, for CPU tensors: centres, and the division of a row among them.

A value belongs to the nearest centre. One M-step on this division gives the first weights, means and variances, as in
scikit-learn with its k-means. Centres ascend. So the components of a fit ascend too, unless they cross.

    quantile   the values of rank (2 j + 1) n // 2 k
    random     k values of the row, at distinct positions
    kmeans     two centres of up to `EXACT` values: the division with the least sum of squares. Otherwise Lloyd's iteration: the
               centres become the means of their values, until no value changes its centre, `LLOYD_PASSES` times at most. It
               starts from the row's mean as the boundary of two centres, and from the quantiles for more centres.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._ops import EXACT, INITS, LLOYD_PASSES
from ._loops import inner, inner_with_sums

MINMAX, QUANTILE, KMEANS, RANDOM = (INITS.index(name) for name in ("minmax", "quantile", "kmeans", "random"))


@inner
def sum_of(values: Any) -> Any:
    """The sum in the order of the values. numba compiles an array's own `sum` once in a process, in the arithmetic of whoever
    comes first, and then its last bit would depend on what a process did before."""
    total = values.dtype.type(0)
    for i in range(len(values)):
        total += values[i]
    return total


@inner
def minmax(extent: float, weight: Any, mean: Any, variance: Any) -> None:
    """Equal weights, means from the smallest to the largest value, variances of 1."""
    k = len(mean)
    for j in range(k):
        weight[j], variance[j] = 1 / k, 1
        mean[j] = extent * j / (k - 1) if k > 1 else extent / 2


@inner
def philox(seed: int, c0: int, c1: int, c2: int) -> Any:
    """32 random bits from a counter: Philox 4x32 of 10 rounds, its first word. The kernels have Triton's."""
    k0, k1 = np.uint64(seed) & np.uint64(0xFFFFFFFF), np.uint64(seed) >> np.uint64(32)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(0)
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> half) ^ b ^ k0, second & low, (first >> half) ^ d ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.int64(a)


@inner
def draw(seed: int, row: int, attempt: int, size: int, position: Any) -> None:
    """Distinct positions in a row, all sets of them equally likely (Floyd's algorithm)."""
    for j in range(len(position)):
        bound = size - len(position) + j
        drawn = philox(seed, j, attempt, row) * (bound + 1) >> 32
        position[j] = drawn
        for earlier in position[:j]:
            if earlier == drawn:
                position[j] = bound


@inner
def of_rank(x: Any, smallest: float, extent: float, rank: int) -> float:
    """The value with `rank` values before it, less the smallest: what is not negative is in the order of its bits."""
    low, high = np.int64(0), np.float64(extent).view(np.int64)
    while low < high:
        middle = low + (high - low) // 2
        value, number = np.int64(middle).view(np.float64), 0
        for i in range(len(x)):
            number += x[i] - smallest <= value
        if number > rank:
            high = middle
        else:
            low = middle + 1
    return np.int64(high).view(np.float64)


@inner
def centres(
    x: Any, smallest: float, extent: float, mean: float, init: int, seed: int, row: int, attempt: int, centre: Any
) -> None:
    """The centres of a row less its smallest value, from which Lloyd's iteration goes on where `init` is KMEANS."""
    k, size = len(centre), len(x)
    if init == KMEANS and k == 2:
        centre[0], centre[1] = 0, 2 * mean
    elif init == RANDOM:
        position = np.empty(k, np.int64)
        draw(seed, row, attempt, size, position)
        for j in range(k):
            value, place = x[position[j]] - smallest, j
            while place > 0 and centre[place - 1] > value:
                centre[place] = centre[place - 1]
                place -= 1
            centre[place] = value
    else:
        for j in range(k):
            centre[j] = of_rank(x, smallest, extent, (2 * j + 1) * size // (2 * k))


@inner
def boundaries(centre: Any) -> Any:
    """What belongs to centre j is above `boundaries[j]` and not above `boundaries[j + 1]`."""
    edge = np.empty(len(centre) + 1, centre.dtype)
    edge[0], edge[-1] = -np.inf, np.inf
    for j in range(1, len(centre)):
        edge[j] = centre[j - 1] + (centre[j] - centre[j - 1]) / 2
    return edge


@inner_with_sums
def members(y: Any, low: float, high: float) -> tuple[float, float]:
    """How many values lie above `low` and not above `high`, and their sum."""
    zero = y.dtype.type(0)
    number, total = zero, zero
    for i in range(len(y)):
        inside = zero + (
            (y[i] > low) & (y[i] <= high)
        )  # a factor: branches, and a choice between numbers, take four times as long
        number += inside
        total += inside * y[i]
    return number, total


@inner
def move(number: Any, total: Any, before: Any, centre: Any) -> bool:
    """One step of Lloyd's iteration. Returns whether a value has changed sides since the last one; `before` is its `number`."""
    moved = False
    for j in range(len(centre)):
        moved |= number[j] != before[j]
        before[j] = number[j]
        if number[j] > 0:
            centre[j] = total[j] / number[j]
    return moved


@inner
def two_means(y: Any, centre: Any) -> None:
    """The two centres with the least sum of squares: the most of sum^2 / number over both sides of every value.

    An odd number of evenly spaced values has two such divisions, and only rounding would decide. The smaller low group wins.
    """
    all_of, best, boundary = sum_of(y), -np.inf, np.inf
    rounding = EXACT * np.finfo(y.dtype).eps
    for value in y:
        number, total = members(y, -np.inf, value)
        if number < len(y):
            score = total * total / number + (all_of - total) * (all_of - total) / (len(y) - number)
            if score > best * (1 + rounding) or (score >= best * (1 - rounding) and value < boundary):
                best, boundary = score, value
                centre[0], centre[1] = total / number, (all_of - total) / (len(y) - number)


@inner
def kmeans(y: Any, centre: Any) -> None:
    """The centres of a row less its smallest value: exact, or by Lloyd's iteration from `centre`."""
    k = len(centre)
    if k == 2 and len(y) <= EXACT:
        two_means(y, centre)
        return
    number, total, before = np.zeros(k, y.dtype), np.zeros(k, y.dtype), np.full(k, -1, y.dtype)
    for _ in range(LLOYD_PASSES):
        edge = boundaries(centre)
        for j in range(k):
            number[j], total[j] = members(y, edge[j], edge[j + 1])
        if not move(number, total, before, centre):
            break


@inner
def divide(y: Any, centre: Any, resp: Any) -> None:
    """resp[j]: 1 where a value belongs to centre j, else 0."""
    edge, zero, one = boundaries(centre), y.dtype.type(0), y.dtype.type(1)
    for j in range(len(centre)):
        low, high, inside = edge[j], edge[j + 1], resp[j]
        for i in range(len(y)):
            inside[i] = one if (y[i] > low) & (y[i] <= high) else zero
