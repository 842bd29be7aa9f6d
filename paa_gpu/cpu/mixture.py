"""Reading mixtures out for CPU tensors: one pass over the values, without memory of their size besides the result.

For a value x and components of weight w_k, mean m_k and variance v_k,

    log p_k = log w_k - log(2 pi v_k) / 2 - (x - m_k)^2 / (2 v_k)
    responsibility r_k = exp(log p_k - log sum_j p_j)          label = the first k of the largest log p_k
    log-density = log sum_j p_j                                log-likelihood = its sum over a row

The values of all rows stand one after the other. They are cut into spans of fixed size, and the threads share the spans. So one
long row keeps all threads busy, and the sums do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import READOUTS
from ._arrays import Array, array, cast, offsets, part, view
from ._loops import compiled, inner, inner_fused, inner_with_sums, over_slices
from ._numeric import PER_LOG2, STOP, STOP_SINGLE, log1p_of_part, negative_exp2

PREDICT, PREDICT_PROBA, LOW_PROBABILITY, SCORE_SAMPLES, LOG_LIKELIHOOD = range(len(READOUTS))

# Values of a span: 100 us of work, as long as it takes to hand a span to another thread.
SPAN = 1 << 15
SERIAL_SPANS = 4

# Values at a time, whose terms stay in the first cache.
BLOCK = 256


@inner_fused
def _log_p(x: Any, row: Any, weights: Any, means: Any, variances: Any, log_p: Any) -> None:
    """Log p_k of a block, [k, BLOCK]."""
    real = log_p.dtype.type
    for k in range(weights.shape[1]):
        mean, variance = means[row, k], variances[row, k]
        c, h = real(math.log(weights[row, k]) - 0.5 * math.log(2 * math.pi * variance)), real(0.5 / variance)
        of_component = log_p[k]
        for i in range(len(x)):
            of_component[i] = c - h * (x[i] - mean) ** 2


@inner
def _decay(x: Any, result: Any) -> None:
    """exp(-|x|) of a block; NaN of NaN."""
    per_log2, stop = x.dtype.type(PER_LOG2), x.dtype.type(STOP if x.itemsize == 8 else STOP_SINGLE)
    for i in range(len(x)):
        power = abs(x[i]) * per_log2
        result[i] = negative_exp2(stop if power > stop else power)


@inner
def _share_of_two(log_p: Any, first: int, share: Any, ratio: Any) -> None:
    """The responsibility of component `first` of two."""
    one, own, other = share.dtype.type(1), log_p[first], log_p[1 - first]
    for i in range(len(share)):
        share[i] = own[i] - other[i]
    _decay(share, ratio)
    for i in range(len(share)):
        larger = one / (one + ratio[i])
        share[i] = larger if share[i] >= 0 else ratio[i] * larger


@inner
def _shares(log_p: Any, best: Any, total: Any) -> None:
    """Log p_k become p_k over the largest of them, and `total` their sum."""
    total[:] = 0
    for k in range(len(log_p)):
        share = log_p[k, : len(best)]
        for i in range(len(best)):
            share[i] = best[i] - share[i]
        _decay(share, share)
        for i in range(len(best)):
            total[i] += share[i]


@inner
def _best(log_p: Any, best: Any) -> None:
    best[:] = log_p[0, : len(best)]
    for k in range(1, len(log_p)):
        for i in range(len(best)):
            best[i] = max(best[i], log_p[k, i])


@inner
def _probabilities(log_p: Any, best: Any, total: Any, answer: Any) -> None:
    """Responsibilities, [BLOCK, k]."""
    if len(log_p) == 2:
        _share_of_two(log_p, 0, best, total)
        one = best.dtype.type(1)
        for i in range(len(best)):
            # The second one is not one minus the first: it may be tiny.
            larger = one / (one + total[i])
            answer[i, 0], answer[i, 1] = best[i], total[i] * larger if best[i] == larger else larger
        return
    _best(log_p, best)
    _shares(log_p, best, total)
    for i in range(len(best)):
        for k in range(len(log_p)):
            answer[i, k] = log_p[k, i] / total[i]


@inner
def _low_probabilities(log_p: Any, low: Any, best: Any, total: Any, answer: Any) -> None:
    """The responsibility of component `low`, [BLOCK, 1]."""
    if len(log_p) == 2:
        _share_of_two(log_p, low, best, total)
        answer[:, 0] = best
        return
    _best(log_p, best)
    _shares(log_p, best, total)
    for i in range(len(best)):
        answer[i, 0] = log_p[low, i] / total[i]


@inner
def _labels(x: Any, log_p: Any, best: Any, answer: Any) -> None:
    """The first of the likeliest components, [BLOCK, 1]; -1 where x is not finite, or the densities are no numbers.

    All densities of a value far away are zero. Then the first component is as likely as the others.
    """
    best[:] = -np.inf
    for i in range(len(best)):
        answer[i, 0] = 0 if np.isfinite(x[i]) and log_p[0, i] == log_p[0, i] else -1
    for k in range(len(log_p)):
        for i in range(len(best)):
            if log_p[k, i] > best[i]:
                best[i], answer[i, 0] = log_p[k, i], k


@inner
def _scores(log_p: Any, best: Any, total: Any) -> None:
    """The log-densities, in `best`; -inf where no component has a density."""
    if len(log_p) == 2:
        for i in range(len(best)):
            best[i] = log_p[0, i] - log_p[1, i]
        _decay(best, total)
        for i in range(len(best)):
            largest = max(log_p[0, i], log_p[1, i])
            best[i] = largest if largest == -np.inf else largest + log1p_of_part(total[i])
        return
    _best(log_p, best)
    _shares(log_p, best, total)
    for i in range(len(best)):
        best[i] = best[i] if best[i] == -np.inf else best[i] + math.log(total[i])


@inner_with_sums
def _sum(values: Any) -> Any:
    """In float64, whatever the values are."""
    total = 0.0
    for value in values:
        total += value
    return total


@compiled
def read_span(
    what: int,
    begin: int,
    x: Any,
    start: Any,
    size: Any,
    weights: Any,
    means: Any,
    variances: Any,
    answer: Any,
    piece: int,
    pieces: Any,
) -> None:
    """Read the values x, which stand at `begin` and behind, row after row.

    answer: [values, columns] of these values. The log-likelihood has none: the sum over a row's values of this span goes to
    pieces[piece + row].
    """
    log_p = np.empty((weights.shape[1], BLOCK), x.dtype)
    best_block, total_block = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    row, here, end = np.searchsorted(start, begin, side="right") - 1, begin, begin + len(x)
    while here < end:
        stop = min(start[row + 1], end)
        inside = max(here, min(stop, start[row] + size[row]))
        low = np.argmin(means[row])
        for first in range(here - begin, inside - begin, BLOCK):
            last = min(first + BLOCK, inside - begin)
            best, total = best_block[: last - first], total_block[: last - first]
            _log_p(x[first:last], row, weights, means, variances, log_p)
            if what == PREDICT:
                _labels(x[first:last], log_p, best, answer[first:last])
            elif what == PREDICT_PROBA:
                _probabilities(log_p, best, total, answer[first:last])
            elif what == LOW_PROBABILITY:
                _low_probabilities(log_p, low, best, total, answer[first:last])
            else:
                _scores(log_p, best, total)
                if what == SCORE_SAMPLES:
                    answer[first:last, 0] = best
                else:
                    pieces[piece + row] += _sum(best)
        if what != LOG_LIKELIHOOD:
            answer[inside - begin : stop - begin] = -1 if what == PREDICT else np.nan
        here, row = stop, row + 1


def _read_spans(
    first: int, last: int, what: int, x: Tensor, start: Array, size: Array, parameters: list[Array], answer: Array, pieces: Array
) -> None:
    for span in range(first, last):
        begin, end = span * SPAN, min((span + 1) * SPAN, int(start[-1]))
        values = part(x, begin, end, parameters[0].dtype)
        read_span(what, begin, values, start, size, *parameters, answer[begin:end], span, pieces)


def _sums(start: Array, pieces: Array) -> Array:
    """The sum of each row's pieces, in order: piece `span + row` is that of a row in a span."""
    first, last = start[:-1] // SPAN, (start[1:] - 1) // SPAN
    rows = np.arange(len(first))
    # `reduceat` sums from each even place to the next odd one.
    return np.add.reduceat(np.append(pieces, 0), np.stack([first + rows, last + rows + 1], 1).reshape(-1))[::2]


def read_mixture(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights: Tensor,
    means: Tensor,
    variances: Tensor,
    what: str,
) -> Tensor:
    wanted = READOUTS.index(what)
    parameters = [array(values, view(weights).dtype) for values in (weights, means, variances)]
    rows, components = parameters[0].shape
    if lengths is not None:
        start = offsets(lengths)
        size = np.diff(start)
    else:
        width = x.shape[1]
        start = np.arange(rows + 1) * width
        size = np.full(rows, width) if count is None else np.clip(view(count), 0, width).astype(np.int64)
    real, proba, summed = parameters[0].dtype, wanted == PREDICT_PROBA, wanted == LOG_LIKELIHOOD
    spans = -(-int(start[-1]) // SPAN)
    answer = np.empty((0 if summed else start[-1], components if proba else 1), np.int64 if wanted == PREDICT else real)
    pieces = np.zeros(spans + rows if summed else 0)
    over_slices(_read_spans, spans, SERIAL_SPANS, wanted, x, start, size, parameters, answer, pieces)
    if summed:
        return torch.from_numpy(cast(_sums(start, pieces), real))
    return torch.from_numpy(answer.reshape(*x.shape, components) if proba else answer.reshape(x.shape))
