"""Candidates for CPU tensors. A group is a (ground truth, level). It keeps its smallest losses. Then a row merges its groups.

Potential positives are taken in the order of their anchors. Every step keeps the order of equal losses, so ties need nothing
else. Usually each group keeps its smallest losses so far, in order. Then most losses are read once and dropped. For a large
`topk` this would take quadratic time. There, a stable counting sort brings the groups together, and each group is sorted. The
first way costs P + G, the second one P log P at most.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, flat, lengths, offsets, tensor
from ._loops import compiled, inner, over_bounds, shared_bounds

#: Microseconds for a potential positive, measured: to select from it, and to sort it.
SELECTING, SORTING = 0.007, 0.05


# Up to this many candidates of a group are kept in order by insertion, which beats sorting there; more would make it quadratic.
INSERTION_LIMIT = 64


# The key of +inf, and one above all keys.
INFINITE_KEY, NO_KEY = 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF


@inner
def _ordered_key(loss: Any) -> Any:
    """An integer that orders like the loss: -inf < finite (-0.0 equals 0.0) < +inf < NaN of either sign < `NO_KEY`."""
    bits = np.float64(loss).view(np.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    if magnitude > INFINITE_KEY:
        return INFINITE_KEY + 1
    return magnitude if bits >= 0 else -magnitude


# The order in which potential positives are given.
_GIVEN = np.empty(0, np.int64)


def anchor_order(anchor: Array, pos_offset: Sequence[int]) -> Array:
    """The positions [P] in the order of each image's anchors.

    numpy sorts, not a compiled loop: to compile a sort takes as long as the rest of the selection.
    """
    return np.concatenate([begin + anchor[begin:end].argsort(kind="stable") for begin, end in itertools.pairwise(pos_offset)])


@inner
def _insert(loss_key: int, p: Any, start: Any, stop: Any, key: Any, member: Any) -> None:
    """Insert behind those of [start, stop) with the same key or a smaller one; what stood at `stop` is lost."""
    one = np.uint64(1)
    while stop > start and loss_key < key[stop - one]:
        key[stop], member[stop] = key[stop - one], member[stop - one]
        stop -= one
    key[stop], member[stop] = loss_key, p


@inner
def _merge(
    loss: Any, level_bounds: Any, image: Any, topk: int, group_start: Any, group_stop: Any, member: Any, key: Any, row_loss: Any,
    row_index: Any,
) -> int:  # fmt: skip
    """The candidates of a row from its groups, and their number; of equal losses that of the lower level comes first."""
    count, total, room = 0, 0, 0
    for level in range(len(group_start)):
        total += group_stop[level] - group_start[level]
        size = level_bounds[image, level + 1] - level_bounds[image, level]
        room += topk if topk < size else size
    # There is room for all, unless an index is given twice, which only `validate` refuses. What other images have room for does
    # not matter.
    while count < total and count < room:
        best, smallest = -1, 0
        for level in range(len(group_start)):
            at = group_start[level]
            if at < group_stop[level] and (best < 0 or key[at] < smallest):
                best, smallest = level, key[at]
        row_index[count] = member[group_start[best]]
        row_loss[count] = loss[row_index[count]]
        group_start[best] += 1
        count += 1
    for i in range(count, len(row_index)):
        row_loss[i], row_index[i] = np.inf, -1
    return count


@inner
def keep_smallest(
    first: int, last: int, loss: Any, anchor: Any, gt: Any, pos_offset: Any, gt_offset: Any, level_bounds: Any, topk: int,
    order: Any, descends: Any, row_loss: Any, row_index: Any, row_count: Any,
) -> None:  # fmt: skip
    """The candidates of the rows of some images. Each group keeps its `topk` smallest losses so far, in order.

    `order` is empty where the anchors of each image ascend. An image where they do not is left, and `descends` says so.
    """
    zero, one, levels, room = np.uint64(0), np.uint64(1), np.uint64(level_bounds.shape[1] - 1), np.uint64(topk)
    groups = np.uint64(gt_offset[last] - gt_offset[first]) * levels
    number, places = np.int64(groups), np.int64(groups * room)
    group_start, group_stop, member, key = (
        np.empty(number, np.int64), np.empty(number, np.int64), np.empty(places, np.int64), np.empty(places, np.int64)
    )  # fmt: skip
    for g in range(groups):
        group_start[g] = group_stop[g] = g * room
        key[(g + one) * room - one] = NO_KEY
    for image in range(first, last):
        # Unsigned: a negative number is too large then, and an index that may be negative takes a branch.
        start, stop = np.uint64(pos_offset[image]), np.uint64(pos_offset[image + 1])
        row, num_gt = np.uint64(gt_offset[image] - gt_offset[first]), np.uint64(gt_offset[image + 1] - gt_offset[image])
        bounds = level_bounds[image]
        level: Any = zero
        level_end, anchors = np.uint64(bounds[min(one, levels)]), np.uint64(bounds[levels])  # there may be no level
        before: Any = zero
        for i in range(start, stop):
            p = np.uint64(order[i]) if len(order) > 0 else i
            own_gt, own_anchor = np.uint64(gt[p]), np.uint64(anchor[p])
            if own_gt >= num_gt or own_anchor >= anchors:
                continue
            if own_anchor < before:
                descends[image] = 1
                break
            before = own_anchor
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
    for image in range(first, last):
        for at in range(gt_offset[image], gt_offset[image + 1]):
            own = slice((at - gt_offset[first]) * levels, (at - gt_offset[first] + 1) * levels)
            row_count[at] = _merge(
                loss, level_bounds, image, topk, group_start[own], group_stop[own], member, key, row_loss[at], row_index[at]
            )


@compiled
def _select_images(first: int, last: int, losses: Any, candidates: Any) -> None:
    """`keep_smallest` alone."""
    keep_smallest(first, last, *losses, *candidates)


@compiled
def _sort_groups(
    first: int, last: int, loss: Any, anchor: Any, gt: Any, order: Any, pos_offset: Any, gt_offset: Any, level_bounds: Any,
    topk: int, row_loss: Any, row_index: Any, row_count: Any,
) -> None:  # fmt: skip
    """As `keep_smallest`, for a large `topk`: the potential positives of a group come together, then it is sorted."""
    levels = level_bounds.shape[1] - 1
    for image in range(first, last):
        start, size = pos_offset[image], pos_offset[image + 1] - pos_offset[image]
        num_gt, bounds = gt_offset[image + 1] - gt_offset[image], level_bounds[image]
        group, member, key = np.full(size, -1), np.empty(size, np.int64), np.empty(size, np.int64)
        group_start, group_stop = np.zeros(num_gt * levels, np.int64), np.zeros(num_gt * levels, np.int64)
        level = 0
        for i in range(size):
            p = order[start + i]
            if 0 <= gt[p] < num_gt and 0 <= anchor[p] < bounds[levels]:
                while anchor[p] >= bounds[level + 1]:
                    level += 1
                group[i] = gt[p] * levels + level
                group_stop[group[i]] += 1
        place = 0
        for g in range(num_gt * levels):
            number = group_stop[g]
            group_start[g] = group_stop[g] = place
            place += number
        for i in range(size):
            g, p = group[i], order[start + i]
            if g >= 0:
                member[group_stop[g]], key[group_stop[g]] = p, _ordered_key(loss[p])
                group_stop[g] += 1
        for g in range(num_gt * levels):
            begin, end = group_start[g], group_stop[g]
            by_key = np.argsort(key[begin:end], kind="mergesort")
            key[begin:end], member[begin:end] = key[begin:end][by_key], member[begin:end][by_key]
            group_stop[g] = min(end, begin + topk)
        for gt_number in range(num_gt):
            at, own = gt_offset[image] + gt_number, slice(gt_number * levels, (gt_number + 1) * levels)
            row_count[at] = _merge(
                loss, level_bounds, image, topk, group_start[own], group_stop[own], member, key, row_loss[at], row_index[at]
            )


def empty_candidates(rows: int, width: int, real: Any) -> tuple[Array, Array, Array]:
    """loss, index [G, K] and count [G]."""
    return np.empty((rows, width), real), np.empty((rows, width), np.int64), np.empty(rows, np.int64)


def sort_candidates(losses: tuple[Any, ...], candidates: tuple[Array, ...]) -> None:
    """Fill the candidates where `topk` is above `INSERTION_LIMIT`."""
    loss, anchor, gt, pos_offset, gt_offset, level_bounds, topk, _ = losses
    place = pos_offset, gt_offset, level_bounds, topk, *candidates
    bounds = shared_bounds(SORTING * pos_offset)
    over_bounds(_sort_groups, bounds, loss, anchor, gt, anchor_order(anchor, pos_offset.tolist()), *place)


def in_order(attempt: Callable[[Array], Any], anchor: Array, pos_offset: Sequence[int]) -> None:
    """Call `attempt(order)` for the order in which losses are given. If it says that anchors descend, call it for their order."""
    if attempt(_GIVEN):
        attempt(anchor_order(anchor, pos_offset))


def select(losses: tuple[Any, ...]) -> tuple[Array, ...]:
    """loss, index [G, K] and count [G] of what `flatten` gives."""
    loss, anchor, _, pos_offset, gt_offset, _, topk, width = losses
    candidates = empty_candidates(int(gt_offset[-1]), width, loss.dtype)
    if topk > INSERTION_LIMIT:
        sort_candidates(losses, candidates)
        return candidates

    def attempt(order: Array) -> Any:
        descends = np.zeros(len(pos_offset) - 1, np.int64)
        over_bounds(_select_images, shared_bounds(SELECTING * pos_offset), (*losses[:-1], order, descends), candidates)
        return np.count_nonzero(descends)  # faster than `any`

    in_order(attempt, anchor, pos_offset.tolist())
    return candidates


@functools.lru_cache(1024)
def _levels(level_sizes: tuple[int, ...], images: int, topk: int) -> tuple[Array, list[int]]:
    """Where each level of each image begins, and where its last one ends [B, L + 1]; the most candidates of a ground truth of
    each image."""
    levels = len(level_sizes) // images
    sizes = [level_sizes[image * levels : (image + 1) * levels] for image in range(images)]
    bounds = np.array([[0, *itertools.accumulate(image)] for image in sizes], np.int64)
    return bounds, [sum(min(topk, size) for size in image) for image in sizes]


def values(pos_losses: Sequence[Tensor], pos_inds: Sequence[Tensor], pos_gt_inds: Sequence[Tensor]) -> tuple[Array, ...]:
    """Loss, anchor and ground truth of all images in one array each; half-precision losses as float32, which holds them in the
    same order."""
    real = np.float64 if pos_losses[0].dtype == torch.float64 else np.float32
    return flat(pos_losses, real), flat(pos_inds, np.int64), flat(pos_gt_inds, np.int64)


def limits(level_sizes: Sequence[int], sizes: Sequence[int], topk: int) -> tuple[Array, int, int]:
    """What `flatten` gives behind the offsets, for images with so many potential positives."""
    level_bounds, room = _levels(tuple(level_sizes), len(sizes), topk)
    # Groups have a last place, also where nothing is in them.
    return level_bounds, max(min(topk, sum(sizes)), 1), max(map(min, sizes, room))


def flatten(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Any, ...]:
    """What `select` takes."""
    sizes = lengths(pos_inds)
    flat_values = values(pos_losses, pos_inds, pos_gt_inds)
    return *flat_values, offsets(sizes), offsets(num_gts), *limits(level_sizes, sizes, topk)


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
