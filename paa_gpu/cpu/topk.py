"""Candidates for CPU tensors. A group is a (ground truth, level). It keeps its smallest losses. Then a row merges its groups.

Potential positives are taken in the order of their anchors. Every step keeps the order of equal losses, so ties need nothing
else. Usually each group keeps its smallest losses so far, in order. Then most losses are read once and dropped. For a large
`topk` this would take quadratic time. There, a stable counting sort brings the groups together, and each group is sorted. Both
cost P + G.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, flat, lengths, offsets, tensor
from ._loops import compiled, over_slices, shared

# Rows and images below which a second thread costs more than it saves, measured on 2 cores: a row takes 1 us, an image of
# 10,000 potential positives 100, and handing over to a thread 100.
SERIAL_ROWS = 512
SERIAL_IMAGES = 4


# Up to this many candidates of a group are kept in order by insertion, which beats sorting there; more would make it quadratic.
INSERTION_LIMIT = 64


# The key of +inf, and one above all keys.
INFINITE_KEY, NO_KEY = 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF


@compiled
def _ordered_key(loss: Any) -> Any:
    """An integer that orders like the loss: -inf < finite (-0.0 equals 0.0) < +inf < NaN of either sign < `NO_KEY`."""
    bits = np.float64(loss).view(np.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    if magnitude > INFINITE_KEY:
        return INFINITE_KEY + 1
    return magnitude if bits >= 0 else -magnitude


@compiled
def _ascends(anchor: Any, pos_offset: Any) -> bool:
    """Whether the anchors of every image do."""
    descents = 0  # counted to the end: a loop that may stop early does not fill vector registers
    for image in range(len(pos_offset) - 1):
        own = anchor[pos_offset[image] : pos_offset[image + 1]]
        for p in range(1, len(own)):
            descents += own[p] < own[p - 1]
    return descents == 0


def _anchor_order(anchor: Array, pos_offset: Array) -> Array:
    """The positions [P] in the order of each image's anchors; none where they ascend already, as they usually do.

    numpy sorts, not a compiled loop: to compile a sort takes as long as the rest of the selection.
    """
    if _ascends(anchor, pos_offset):
        return np.empty(0, np.int64)
    images = itertools.pairwise(pos_offset.tolist())
    return np.concatenate([begin + anchor[begin:end].argsort(kind="stable") for begin, end in images])


@compiled
def _insert(loss_key: int, p: Any, start: Any, stop: Any, key: Any, member: Any) -> None:
    """Insert behind those of [start, stop) with the same key or a smaller one; what stood at `stop` is lost."""
    one = np.uint64(1)
    while stop > start and loss_key < key[stop - one]:
        key[stop], member[stop] = key[stop - one], member[stop - one]
        stop -= one
    key[stop], member[stop] = loss_key, p


@compiled
def keep_smallest(
    first: int, last: int, loss: Any, anchor: Any, gt: Any, order: Any, pos_offset: Any, gt_offset: Any, level_bounds: Any,
    topk: int, group_start: Any, group_stop: Any, member: Any, key: Any,
) -> None:  # fmt: skip
    """member[group_start[g]:group_stop[g]] = the `topk` potential positives of group g with the smallest losses, in order."""
    zero, one, levels = np.uint64(0), np.uint64(1), np.uint64(level_bounds.shape[1] - 1)
    for image in range(first, last):
        # Unsigned: a negative number is too large then, and an index that may be negative takes a branch.
        start, stop = np.uint64(pos_offset[image]), np.uint64(pos_offset[image + 1])
        row, num_gt = np.uint64(gt_offset[image]), np.uint64(gt_offset[image + 1] - gt_offset[image])
        bounds, room = level_bounds[image], np.uint64(topk)
        for g in range(row * levels, (row + num_gt) * levels):
            group_start[g] = group_stop[g] = g * room
            key[(g + one) * room - one] = NO_KEY
        level: Any = zero
        level_end, anchors = np.uint64(bounds[min(one, levels)]), np.uint64(bounds[levels])  # there may be no level
        for i in range(start, stop):
            p = np.uint64(order[i]) if len(order) > 0 else i
            own_gt, own_anchor = np.uint64(gt[p]), np.uint64(anchor[p])
            if own_gt >= num_gt or own_anchor >= anchors:
                continue
            while own_anchor >= level_end:
                level += one
                level_end = np.uint64(bounds[level + one])
            g = (row + own_gt) * levels + level
            last_place, loss_key = (g + one) * room - one, _ordered_key(loss[p])
            # A group that is not full yet has no last key: what is smaller has a place.
            if loss_key < key[last_place]:
                end = np.uint64(group_stop[g])
                _insert(loss_key, p, g * room, min(end, last_place), key, member)
                group_stop[g] = min(end, last_place) + one


@compiled
def sort_groups(
    first: int, last: int, loss: Any, anchor: Any, gt: Any, order: Any, pos_offset: Any, gt_offset: Any, level_bounds: Any,
    topk: int, group_start: Any, group_stop: Any, member: Any, key: Any,
) -> None:  # fmt: skip
    """As `keep_smallest`, with room for all potential positives: those of a group come together, then it is sorted."""
    levels = level_bounds.shape[1] - 1
    for image in range(first, last):
        start, stop = pos_offset[image], pos_offset[image + 1]
        row, num_gt, bounds = gt_offset[image], gt_offset[image + 1] - gt_offset[image], level_bounds[image]
        groups = range(row * levels, (row + num_gt) * levels)
        level = 0
        group = np.full(stop - start, -1)  # an index out of range
        group_stop[row * levels : (row + num_gt) * levels] = 0
        for i in range(stop - start):
            p = order[start + i] if len(order) > 0 else start + i
            if 0 <= gt[p] < num_gt and 0 <= anchor[p] < bounds[levels]:
                while anchor[p] >= bounds[level + 1]:
                    level += 1
                group[i] = (row + gt[p]) * levels + level
                group_stop[group[i]] += 1
        place = start
        for g in groups:
            size = group_stop[g]
            group_start[g] = group_stop[g] = place
            place += size
        for i in range(stop - start):
            g = group[i]
            if g >= 0:
                p = order[start + i] if len(order) > 0 else start + i
                member[group_stop[g]], key[group_stop[g]] = p, _ordered_key(loss[p])
                group_stop[g] += 1
        for g in groups:
            begin, end = group_start[g], group_stop[g]
            by_key = np.argsort(key[begin:end], kind="mergesort")
            key[begin:end], member[begin:end] = key[begin:end][by_key], member[begin:end][by_key]
            group_stop[g] = min(end, begin + topk)


@compiled
def select_rows(
    first: int, last: int, levels: int, loss: Any, group_start: Any, group_stop: Any, member: Any, key: Any,
    row_loss: Any, row_index: Any, row_count: Any,
) -> None:  # fmt: skip
    """Merge the groups of each row; of equal losses that of the lower level comes first."""
    head = np.empty(levels, np.int64)
    width = row_index.shape[1]
    for row in range(first, last):
        count, total = 0, 0
        for level in range(levels):
            head[level] = group_start[row * levels + level]
            total += group_stop[row * levels + level] - head[level]
        # A row has room for all its candidates, unless an index is given twice, which only `validate` refuses.
        total = min(total, width)
        while count < total:
            best, smallest = -1, 0
            for level in range(levels):
                at = head[level]
                if at < group_stop[row * levels + level] and (best < 0 or key[at] < smallest):
                    best, smallest = level, key[at]
            p = member[head[best]]
            row_index[row, count], row_loss[row, count] = p, loss[p]
            head[best] += 1
            count += 1
        for i in range(count, width):
            row_loss[row, i], row_index[row, i] = np.inf, -1
        row_count[row] = count


@shared
def empty_groups(groups: int, room: int) -> tuple[Array, ...]:
    """group_start, group_stop; member, key."""
    return np.empty(groups, np.int64), np.empty(groups, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)


@shared
def empty_candidates(rows: int, width: int, dtype: Any) -> tuple[Array, ...]:
    """loss, index [G, K]; count [G]."""
    return np.empty((rows, width), dtype), np.empty((rows, width), np.int64), np.empty(rows, np.int64)


def select(losses: tuple[Any, ...]) -> tuple[Array, ...]:
    """loss, index [G, K] and count [G] of what `flatten` gives."""
    loss, *images, gt_offset, level_bounds, topk, width = losses
    levels, rows = level_bounds.shape[1] - 1, int(gt_offset[-1])
    few = topk <= INSERTION_LIMIT
    groups = empty_groups(rows * levels, rows * levels * topk if few else len(loss))
    grouped = keep_smallest if few else sort_groups
    over_slices(grouped, len(level_bounds), SERIAL_IMAGES, loss, *images, gt_offset, level_bounds, topk, *groups)
    candidates = empty_candidates(rows, width, loss.dtype)
    over_slices(select_rows, rows, SERIAL_ROWS, levels, loss, *groups, *candidates)
    return candidates


@functools.lru_cache(1024)
def _levels(level_sizes: tuple[int, ...], images: int, topk: int) -> tuple[Array, list[int]]:
    """Where each level of each image begins, and where its last one ends [B, L + 1]; the most candidates of a ground truth of
    each image."""
    levels = len(level_sizes) // images
    sizes = [level_sizes[image * levels : (image + 1) * levels] for image in range(images)]
    bounds = np.array([[0, *itertools.accumulate(image)] for image in sizes], np.int64)
    return bounds, [sum(min(topk, size) for size in image) for image in sizes]


def flatten(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Any, ...]:
    """What `select` takes: all images in one array; half-precision losses as float32, which holds them in the same order."""
    sizes = lengths(pos_inds)
    level_bounds, room = _levels(tuple(level_sizes), len(sizes), topk)
    anchor, pos_offset = flat(pos_inds, np.int64), offsets(sizes)
    return (
        flat(pos_losses, np.float64 if pos_losses[0].dtype == torch.float64 else np.float32),
        anchor,
        flat(pos_gt_inds, np.int64),
        _anchor_order(anchor, pos_offset),
        pos_offset,
        offsets(num_gts),
        level_bounds,
        max(min(topk, sum(sizes)), 1),  # groups have a last place, also where nothing is in them
        max(map(min, sizes, room)),
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
