"""Candidate selection for CPU tensors: group the potential positives by (ground truth, level), keep the smallest losses.

Grouping is a stable counting sort, so the cost grows with P + G, not with their product. Potential positives are taken in
the order of their anchors; everything after that keeps the order of equal losses, which is all that ties need.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import max_candidates
from ._arrays import Array, flat, lengths, offsets, tensor
from ._loops import compiled, over_slices, shared

# Rows and images below which a second thread costs more than it saves, measured on 2 cores: a row takes 1 us, an image of
# 10,000 potential positives 100, and handing over to a thread 100.
SERIAL_ROWS = 512
SERIAL_IMAGES = 4


# Up to this many candidates are kept in order by insertion, which beats a merge sort there; more would make it quadratic.
INSERTION_LIMIT = 64


@compiled
def _ordered_key(bits: int) -> int:
    """An integer that orders like the float64 with these bits: -inf < finite (-0.0 equals 0.0) < +inf < NaN of either sign."""
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    if magnitude > 0x7FF0000000000000:
        return 0x7FFFFFFFFFFFFFFF
    return magnitude if bits >= 0 else -magnitude


@compiled
def _stable_order(values: Any) -> Any:
    """The positions of the values, smallest first, equal ones as they stand; compiled once for all that sort."""
    return np.argsort(values, kind="mergesort")


@compiled
def group_images(
    first: int,
    last: int,
    loss_bits: Any,
    anchor: Any,
    gt: Any,
    pos_offset: Any,
    gt_offset: Any,
    level_bounds: Any,
    group_start: Any,
    group_stop: Any,
    member: Any,
    key: Any,
) -> None:
    """member[group_start[g]:group_stop[g]] = the potential positives of group g by anchor index, key = their losses."""
    levels = level_bounds.shape[1] - 1
    for image in range(first, last):
        start, stop = pos_offset[image], pos_offset[image + 1]
        row, num_gt = gt_offset[image], gt_offset[image + 1] - gt_offset[image]
        bounds = level_bounds[image]
        ascending, previous, level = True, -1, 0
        group = np.empty(stop - start, np.int64)
        group_stop[row * levels : (row + num_gt) * levels] = 0
        for p in range(start, stop):
            if anchor[p] < previous:
                ascending, level = False, 0
            previous = anchor[p]
            group[p - start] = -1  # an index out of range
            if 0 <= gt[p] < num_gt and 0 <= previous < bounds[levels]:
                while previous >= bounds[level + 1]:
                    level += 1
                g = (row + gt[p]) * levels + level
                group[p - start] = g
                group_stop[g] += 1
        place = start
        for g in range(row * levels, (row + num_gt) * levels):
            size = group_stop[g]
            group_start[g] = group_stop[g] = place
            place += size
        order = np.arange(0) if ascending else _stable_order(anchor[start:stop])
        for i in range(stop - start):
            at = i if ascending else order[i]
            g = group[at]
            if g >= 0:
                place = group_stop[g]
                member[place], key[place] = start + at, _ordered_key(loss_bits[start + at])
                group_stop[g] += 1


@compiled
def _insert(slot: int, key: Any, chosen: Any, place: int) -> None:
    """Insert a slot behind those of chosen[:place] with the same key or a smaller one; what stood at `place` is lost."""
    while place > 0 and key[slot] < key[chosen[place - 1]]:
        chosen[place] = chosen[place - 1]
        place -= 1
    chosen[place] = slot


@compiled
def _smallest(start: int, stop: int, key: Any, chosen: Any) -> None:
    """Make chosen the len(chosen) smallest of the slots [start, stop), in order; of equal ones the first."""
    size = len(chosen)
    if size > INSERTION_LIMIT:
        order = _stable_order(key[start:stop])
        for place in range(size):
            chosen[place] = start + order[place]
        return
    for place in range(size):
        _insert(start + place, key, chosen, place)
    if size == 0:
        return
    largest = key[chosen[size - 1]]
    for slot in range(start + size, stop):
        if key[slot] < largest:
            _insert(slot, key, chosen, size - 1)
            largest = key[chosen[size - 1]]


@compiled
def _sort(key: Any, chosen: Any) -> None:
    """Put the slots in the order of their keys, equal ones as they stand."""
    if len(chosen) > INSERTION_LIMIT:
        slots, keys = chosen.copy(), np.empty(len(chosen), np.int64)
        for place in range(len(slots)):
            keys[place] = key[slots[place]]
        order = _stable_order(keys)
        for place in range(len(slots)):
            chosen[place] = slots[order[place]]
        return
    for place in range(len(chosen)):
        _insert(chosen[place], key, chosen, place)


@compiled
def select_rows(
    first: int,
    last: int,
    levels: int,
    topk: int,
    loss: Any,
    group_start: Any,
    group_stop: Any,
    member: Any,
    key: Any,
    row_loss: Any,
    row_index: Any,
    row_count: Any,
) -> None:
    for row in range(first, last):
        count = 0
        for group in range(row * levels, (row + 1) * levels):
            start, stop = group_start[group], group_stop[group]
            # A row has room for all its candidates, unless an index is given twice, which only `validate` refuses.
            size = min(topk, stop - start, row_index.shape[1] - count)
            _smallest(start, stop, key, row_index[row, count : count + size])
            count += size
        _sort(key, row_index[row, :count])
        for i in range(count):
            row_index[row, i] = member[row_index[row, i]]
            row_loss[row, i] = loss[row_index[row, i]]
        row_loss[row, count:] = np.inf
        row_index[row, count:] = -1
        row_count[row] = count


@shared
def empty_groups(rows: int, levels: int, potential: int) -> tuple[Array, ...]:
    """group_start, group_stop [G * L]; member, key [P]."""
    return (
        np.empty(rows * levels, np.int64),
        np.empty(rows * levels, np.int64),
        np.empty(potential, np.int64),
        np.empty(potential, np.int64),
    )


@shared
def empty_candidates(rows: int, width: int, dtype: Any) -> tuple[Array, ...]:
    """loss, index [G, K]; count [G]."""
    return np.empty((rows, width), dtype), np.empty((rows, width), np.int64), np.empty(rows, np.int64)


def select(losses: tuple[Any, ...]) -> tuple[Array, ...]:
    """loss, index [G, K] and count [G] of what `flatten` gives."""
    loss, pos_inds, pos_gt_inds, pos_offset, gt_offset, level_bounds, topk, width = losses
    images, levels, rows = level_bounds.shape[0], level_bounds.shape[1] - 1, gt_offset[-1]
    groups = empty_groups(rows, levels, len(loss))
    bits = loss.astype(np.float64).view(np.int64)
    over_slices(
        group_images, images, SERIAL_IMAGES, bits, pos_inds, pos_gt_inds, pos_offset, gt_offset, level_bounds, *groups
    )  # fmt: skip
    candidates = empty_candidates(rows, width, loss.dtype)
    over_slices(select_rows, rows, SERIAL_ROWS, levels, topk, loss, *groups, *candidates)
    return candidates


@functools.lru_cache
def _level_bounds(level_sizes: tuple[int, ...], images: int) -> Array:
    """Where each level of each image begins, and where its last one ends [B, L + 1]."""
    levels = len(level_sizes) // images
    starts = [[0, *itertools.accumulate(level_sizes[image * levels : (image + 1) * levels])] for image in range(images)]
    return np.array(starts, np.int64)


def flatten(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Any, ...]:
    """What `select` takes: all images in one array; half-precision losses as float32, which holds them in the same order."""
    return (
        flat(pos_losses, np.float64 if pos_losses[0].dtype == torch.float64 else np.float32),
        flat(pos_inds, np.int64),
        flat(pos_gt_inds, np.int64),
        offsets(lengths(pos_inds)),
        offsets(num_gts),
        _level_bounds(tuple(level_sizes), len(pos_inds)),
        topk,
        max_candidates(pos_inds, level_sizes, topk),
    )


def select_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, index, count = select(flatten(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk))
    return tensor(loss, pos_losses[0].dtype), torch.from_numpy(index), torch.from_numpy(count)
