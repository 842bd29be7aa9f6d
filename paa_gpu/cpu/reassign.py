"""Reassignment for CPU tensors: selection and fit of `topk` and `em`, then separation, then the three outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import PRECISIONS
from ..separation import SCHEMES, tie_tolerance
from ._arrays import Array, flat, largest, lengths, offsets, tensor, view
from ._loops import HANDING_OVER, compiled, duration, equal_bounds, inner, over_bounds, shared_bounds
from ._mixtures import VECTOR
from ._targets import Copy, after, copies, room_to_write, write_alone, write_images, writing
from .em import REALS, assign, empty_fit, fit, fit_options, fit_row
from .topk import (
    INSERTION_LIMIT,
    SELECTING,
    empty_candidates,
    flatten,
    in_order,
    keep_smallest,
    limits,
    select,
    sort_candidates,
    values,
)

#: Microseconds to fit and separate a row, and for each candidate that it may have.
FITTING = 0.7, 0.02

#: By `precision`, an array with the dtype of the fit, since numba has no arguments that are dtypes, and one of flags.
_EMPTY = {name: (np.empty(0, real), np.empty(0, np.bool_)) for name, real in REALS.items()}


@inner
def _first_best(n: int, assignment: Any, score: Any, tolerance: float) -> tuple[int, int]:
    """Of the candidates assigned and of the others: the first whose score ties with their highest; n if there are none."""
    highest, highest_other, first, first_other = -np.inf, -np.inf, n, n
    for i in range(n):
        if assignment[i]:
            highest = max(highest, score[i])
        else:
            highest_other = max(highest_other, score[i])
    for i in range(n - 1, -1, -1):
        if assignment[i]:
            first = i if score[i] >= highest - tolerance else first
        else:
            first_other = i if score[i] >= highest_other - tolerance else first_other
    return first, first_other


@inner
def _separate(n: int, index: Any, assignment: Any, score: Any, rule: Any, tolerance: float, positive: Any, ignored: Any) -> None:
    stop_at_threshold, foreground_only, ignore_foreground, ignore_before_background, all_without_foreground = rule
    threshold, background = _first_best(n, assignment, score, tolerance)
    if threshold == n and not all_without_foreground:
        return
    for i in range(n):
        within = i <= threshold or not stop_at_threshold
        if within and (assignment[i] or not foreground_only):
            positive[index[i]] = True
        elif (ignore_foreground and assignment[i]) or (ignore_before_background and threshold < i < background):
            ignored[index[i]] = True


# The steps of a reassignment, as bits.
SELECT, FIT, WRITE = 1, 2, 4


@inner
def _fit_rows(first: int, last: int, candidates: Any, options: Any, fitted: Any, masks: Any) -> None:
    """Fit and separate some rows."""
    loss, index, count = candidates
    fit_options, rule, keep_singleton, tolerance = options
    weights, means, variances, _, _, _, valid = fitted
    positive, ignored = masks
    room = loss.shape[1] + VECTOR
    space, assignment = np.empty((4, room), weights.dtype), np.empty(room, np.bool_)
    score = space[3]
    for row in range(first, last):
        n, mean = count[row], means[row]
        smallest, y, r0, r1 = fit_row(row, loss[row][:n], space[:3], *fit_options, *fitted)
        if valid[row]:
            assign(y, n, weights[row], mean, variances[row], tolerance, r0, r1, assignment, score)
            _separate(n, index[row], assignment, score, rule, tolerance, positive, ignored)
        elif keep_singleton and n == 1 and np.isfinite(smallest):
            positive[index[row, 0]] = True
        mean[0], mean[1] = mean[0] + smallest, mean[1] + smallest


@compiled
def _reassign_images(
    first: int, last: int, steps: int, losses: Any, candidates: Any, options: Any, fitted: Any, masks: Any, targets: Any,
    room: Any,
) -> None:  # fmt: skip
    """Some steps of a reassignment for some images. For some rows, if the step is `FIT` alone.

    The tuples hold what `keep_smallest`, `fit_row` and `write_images` take, in this order.
    All steps are in one loop, so that a small batch takes one call. A call costs as much as the fit of a row. After the selection
    nothing is done where the anchors of an image descend. `descends` says so then.
    """
    _, anchor, _, pos_offset, gt_offset, _, _, _, descends = losses
    if steps & SELECT:
        keep_smallest(first, last, *losses, *candidates)
        for image in range(first, last):
            if descends[image]:
                return
    if steps & FIT:
        first_row, last_row = (first, last) if steps == FIT else (gt_offset[first], gt_offset[last])
        _fit_rows(first_row, last_row, candidates, options, fitted, masks)
    if steps & WRITE:
        write_images(first, last, anchor, pos_offset, *masks, *targets, *room)


def _kept_room(num_gt: int, potential: int, precision: str) -> tuple[Array, ...]:
    """words, reals and flags."""
    flags = np.empty(2 * (num_gt + potential), np.bool_)
    return np.empty(1 + num_gt, np.int64), np.empty(7 * num_gt, REALS[precision]), flags


def _kept(words: Array, reals: Array, flags: Array) -> tuple[Array, ...]:
    """num_pos, the fit and the masks. Few arrays hold them all: to make one of each, and to hand it over, takes longer than to
    fill it."""
    rows, potential = len(words) - 1, len(flags) // 2 - len(words) + 1
    of_rows, of_potential = flags[: 2 * rows].reshape(2, rows), flags[2 * rows :].reshape(2, potential)
    pairs = reals[: 6 * rows].reshape(3, rows, 2)
    return words[:1], *pairs, reals[6 * rows :], words[1:], *of_rows, *of_potential


@inner
def _image_room(potential: int, num_gt: int, anchors: int, width: int, loss: Any, real: Any) -> Any:
    """What `_reassign_image` needs for itself: where the parts of its only image begin and end, the candidates, the fit, the
    masks, and what `write_images` needs for itself.

    numba compiles `np.empty` once for each kind of array and of caller, and `np.zeros` too. So there are few kinds, in one place.
    """
    shape, ends = (num_gt, 2), np.empty((4, 2), np.int64)
    for i in range(4):
        ends[i, 0], ends[i, 1] = 0, (potential, num_gt, anchors, 0)[i]
    candidates = np.empty((num_gt, width), loss.dtype), np.empty((num_gt, width), np.int64), np.empty(num_gt, np.int64)
    weights, means, variances = np.empty(shape, real.dtype), np.empty(shape, real.dtype), np.empty(shape, real.dtype)
    lower_bound, n_iter = np.empty((1, num_gt), real.dtype)[0], np.empty(num_gt, np.int64)
    fitted = weights, means, variances, lower_bound, n_iter, np.empty(num_gt, np.bool_), np.empty(num_gt, np.bool_)
    masks, kept = (np.empty(potential, np.bool_), np.empty(potential, np.bool_)), np.empty(anchors + 1, np.bool_)
    for p in range(potential):
        masks[0][p] = masks[1][p] = False
    for i in range(len(kept)):
        kept[i] = False
    return ends, candidates, fitted, masks, (kept, np.empty(potential, np.int64))


@compiled
def _reassign_image(
    values: Any, order: Any, num_gt: int, level_bounds: Any, topk: int, width: int, options: Any, num_classes: int,
    targets: Any, keep: bool, words: Any, reals: Any, flags: Any,
) -> bool:  # fmt: skip
    """All steps for a single image, with room of its own: numpy would take longer to make it than a small image takes.

    The first of `words` becomes the number of positives. If `keep`, the rest of it, reals and flags take the fit and the masks.
    Otherwise only the dtype of reals is read, which is that of the fit. Returns whether the anchors descend. Then nothing is
    written.
    """
    (loss, anchor, gt), (label, label_weight, bbox_weight) = values, targets
    room = _image_room(len(anchor), num_gt, len(label), width, loss, reals)
    ends, candidates, fitted, (positive, ignored), (kept, background) = room
    pos_offset, gt_offset, anchor_offset, descends = ends[0], ends[1], ends[2], ends[3]
    keep_smallest(0, 1, loss, anchor, gt, pos_offset, gt_offset, level_bounds, topk, order, descends, *candidates)
    if descends[0]:
        return True
    _fit_rows(0, num_gt, candidates, options, fitted, (positive, ignored))
    write_images(
        0, 1, anchor, pos_offset, positive, ignored, anchor_offset, num_classes,
        label, label_weight, bbox_weight, kept, background, words,
    )  # fmt: skip
    if keep:
        # Where `_kept` reads them. Slices would be shorter, but take numba a second to compile.
        weights, means, variances, lower_bound, n_iter, converged, valid = fitted
        for row in range(num_gt):
            for k in range(2):
                at = 2 * row + k
                reals[at], reals[2 * num_gt + at], reals[4 * num_gt + at] = weights[row, k], means[row, k], variances[row, k]
            reals[6 * num_gt + row], words[1 + row] = lower_bound[row], n_iter[row]
            flags[row], flags[num_gt + row] = converged[row], valid[row]
        for p in range(len(anchor)):
            flags[2 * num_gt + p], flags[2 * num_gt + len(anchor) + p] = positive[p], ignored[p]
    return False


def _number_rows(num_gts: Sequence[int], gt_offset: Array) -> tuple[Array, Array]:
    """The image of every row, and which of its ground truths the row is."""
    image = np.arange(len(num_gts)).repeat(num_gts)
    return image, np.arange(len(image)) - gt_offset[image]


@functools.cache
def _options(covariance_type: str, separation: str, singleton: str, precision: str) -> tuple[Any, ...]:
    """What `_fit_rows` takes between the candidates and the fit."""
    rule = tuple(SCHEMES[separation]), singleton == "positive", tie_tolerance(PRECISIONS[precision])
    return fit_options(covariance_type), *rule


def _of_row(width: int) -> float:
    """Microseconds to fit and separate a row."""
    return FITTING[0] + FITTING[1] * width


def _plan(losses: tuple[Any, ...], rows: int, targets: tuple[Any, ...]) -> list[tuple[int, list[int]]]:
    """Steps, and the bounds of the slices of images or, for `FIT` alone, of rows, which threads share.

    All steps in one call hand over once. A call for each step is faster where one image has most of the boxes.
    """
    pos_offset, gt_offset, of_row = losses[3], losses[4], _of_row(losses[-1])
    if len(pos_offset) == 2:
        return [(SELECT, [0, 1]), (FIT, equal_bounds(rows, of_row)), (WRITE, [0, 1])]
    by_rows = equal_bounds(rows, of_row)
    select, write = SELECTING * pos_offset, writing(pos_offset, targets[0])
    ends = select + write + of_row * gt_offset
    together = shared_bounds(ends)
    # The other way hands over twice more.
    if duration(ends, together) <= ends[-1] / (len(by_rows) - 1) + 3 * HANDING_OVER:
        return [(SELECT | FIT | WRITE, together)]
    return [(SELECT, shared_bounds(select)), (FIT, by_rows), (WRITE, shared_bounds(write))]


def _reassign(
    losses: tuple[Any, ...], copy: Copy | None, targets: tuple[Any, ...], *options: str
) -> tuple[Array, tuple[Array, ...], Array, Array]:
    """Fill the targets by `copy` and write into them; the number of positives, the fit, the masks positive and ignored [P]."""
    loss, anchor, *_, gt_offset, level_bounds, topk, width = losses
    rows, images = int(gt_offset[-1]), len(level_bounds)
    candidates, fitted = empty_candidates(rows, width, loss.dtype), empty_fit(rows, REALS[options[-1]])
    masks = np.zeros(len(anchor), bool), np.zeros(len(anchor), bool)
    room = room_to_write(targets, images, len(anchor))
    steps = _plan(losses, rows, targets)
    if topk > INSERTION_LIMIT:
        sort_candidates(losses, candidates)
        steps = [(step & ~SELECT, bounds) for step, bounds in steps if step != SELECT]

    def attempt(order: Array) -> bool:
        descends = np.zeros(images, np.int64)
        args = (*losses[:-1], order, descends), candidates, _options(*options), fitted, masks, targets, room
        for step, bounds in steps:
            over_bounds(after(copy, _reassign_images) if step & WRITE else _reassign_images, bounds, step, *args)
            if np.count_nonzero(descends):
                return True
        return False

    in_order(attempt, anchor, losses[3].tolist())
    return room[-1], fitted, *masks


def _small_image(
    keep: bool,
    columns: Sequence[Sequence[Tensor]],
    level_sizes: Sequence[int],
    num_gt: int,
    num_classes: int,
    topk: int,
    *options: str,
) -> tuple[tuple[Tensor, ...], tuple[Array, ...]] | None:
    """The targets of a single image that threads would not share, and an array with the number of its positives. If `keep`, all
    arrays that `_kept` reads. None for any other batch."""
    pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds = columns
    sizes = lengths(pos_losses)
    if len(sizes) > 1 or topk > INSERTION_LIMIT:
        return None
    level_bounds, most, width = limits(level_sizes, sizes, topk)
    if len(equal_bounds(num_gt, _of_row(width))) > 2:
        return None
    image = values(pos_losses, pos_inds, pos_gt_inds)
    results = _kept_room(num_gt, sizes[0], options[-1]) if keep else (np.empty(1, np.int64), *_EMPTY[options[-1]])
    tensors, _, targets = copies(label, label_weight, bbox_weight)
    given = num_gt, level_bounds, most, width, _options(*options), num_classes, targets, keep, *results
    in_order(lambda order: _reassign_image(image, order, *given), image[1], [0, sizes[0]])
    return tensors, results


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int],
    num_gt: int | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    num_gt = largest(pos_gt_inds) + 1 if num_gt is None else num_gt
    columns = [pos_losses], [label], [label_weight], [bbox_weight], [pos_inds], [pos_gt_inds]
    small = _small_image(False, columns, level_sizes, num_gt, *options)
    if small is None:
        return _reassign_columns(columns, level_sizes, [num_gt], *options)[:4]
    tensors, (num_pos, *_) = small
    return *tensors, torch.from_numpy(num_pos)


def paa_reassign_batch(
    pos_losses: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    columns = pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds
    small = _small_image(True, columns, level_sizes, num_gts[0], *options)
    if small is None:
        return _reassign_columns(columns, level_sizes, num_gts, *options)
    tensors, results = small
    num_pos, *fitted, positive, ignored = _kept(*results)
    numbering = np.zeros(num_gts[0], np.int64), np.arange(num_gts[0])
    return *tensors, *map(torch.from_numpy, (num_pos, *fitted, *numbering, positive, ignored))


def _reassign_columns(
    columns: Sequence[Sequence[Tensor]],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    *options: str,
) -> tuple[Tensor, ...]:
    """`paa_reassign_batch` for any images."""
    pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds = columns
    losses = flatten(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    tensors, copy, written = copies(label, label_weight, bbox_weight)
    targets: tuple[Any, ...] = (offsets(lengths(label)), num_classes, *written)
    num_pos, fitted, *masks = _reassign(losses, copy, targets, *options)
    return *tensors, *map(torch.from_numpy, (num_pos, *fitted, *_number_rows(num_gts, losses[4]), *masks))


def fit_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
    covariance_type: str,
    precision: str,
) -> tuple[Tensor, ...]:
    losses = flatten(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    loss, *candidates = select(losses)
    *fitted, assignment, score = fit(loss, candidates[1], covariance_type, precision)
    arrays = (*candidates, assignment, score, *fitted, *_number_rows(num_gts, losses[4]))
    return tensor(loss, pos_losses[0].dtype), *map(torch.from_numpy, arrays)


def write_targets(
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    index: Tensor,
    candidate_positive: Tensor,
    candidate_ignored: Tensor,
    num_classes: int,
) -> tuple[Tensor, ...]:
    masks = np.zeros(sum(lengths(pos_inds)), bool), np.zeros(sum(lengths(pos_inds)), bool)
    for mask, candidates in zip(masks, (candidate_positive, candidate_ignored), strict=True):
        mask[view(index)[view(candidates)]] = True
    tensors, copy, written = copies(label, label_weight, bbox_weight)
    targets: tuple[Any, ...] = (offsets(lengths(label)), num_classes, *written)
    pos_offset, anchors = offsets(lengths(pos_inds)), flat(pos_inds, np.int64)
    room = room_to_write(targets, len(label), len(anchors))
    bounds = shared_bounds(writing(pos_offset, targets[0]))
    over_bounds(after(copy, write_alone), bounds, anchors, pos_offset, *masks, *targets, *room)
    return *tensors, *map(torch.from_numpy, (room[-1], *masks))
