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
from ._arrays import Array, flat, lengths, offsets, tensor, view
from ._loops import compiled, inner, over_slices
from ._mixtures import VECTOR
from .em import REALS, SERIAL_ROWS, assign, empty_fit, fit, fit_options, fit_row
from .topk import INSERTION_LIMIT, SERIAL_IMAGES, empty_candidates, flatten, in_order, keep_smallest, select, sort_candidates


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


@inner
def _ignore(begin: Any, end: Any, pos_inds: Any, ignored: Any, start: Any, label_weight: Any, size: Any) -> None:
    """No label weight at the ignored ones of the potential positives [begin, end) of the image whose anchors begin at `start`.

    A label weight has `size` bytes.
    """
    for p in range(begin, end):
        if ignored[p]:
            at = (start + np.uint64(pos_inds[p])) * size
            for byte in range(at, at + size):
                label_weight[byte] = 0


@inner
def _write_images(
    first: int, last: int, pos_inds: Any, pos_offset: Any, positive: Any, ignored: Any, anchor_offset: Any, num_classes: int,
    label: Any, label_weight: Any, bbox_weight: Any, kept: Any, background: Any, num_pos: Any,
) -> None:  # fmt: skip
    """Background at all potential positives, but for anchors that are a positive's (`kept`), in whatever order two of them that
    share an anchor come.

    The anchors that become background are gathered first, so that the loops that write ask nothing. An anchor is unsigned: a
    negative one is too large then, and an index that may be negative takes a branch. All that are too large share the place of
    `kept` behind those of the image. Box weights go column by column: a call to fill one short row takes longer than to fill it.
    """
    for image in range(first, last):
        start, stop = np.uint64(anchor_offset[image]), np.uint64(anchor_offset[image + 1])
        begin, end = np.uint64(pos_offset[image]), np.uint64(pos_offset[image + 1])
        none = stop - start
        own = kept[start + np.uint64(image) :]
        positives, ignoreds = 0, 0
        for p in range(begin, end):
            if positive[p]:
                own[np.uint64(pos_inds[p])] = True
            positives += positive[p]
            ignoreds += ignored[p]
        own[none], num_pos[image] = True, positives
        found = begin
        for p in range(begin, end):
            anchor = min(np.uint64(pos_inds[p]), none)
            background[found] = start + anchor
            found += np.uint64(not own[anchor])
        for i in range(begin, found):
            label[background[i]] = num_classes
        for word in range(np.uint64(bbox_weight.shape[1])):
            for i in range(begin, found):
                bbox_weight[background[i], word] = 0
        if ignoreds > 0:
            _ignore(begin, end, pos_inds, ignored, start, label_weight, np.uint64(len(label_weight) // len(label)))


@compiled
def _write_alone(
    first: int, last: int, pos_inds: Any, pos_offset: Any, positive: Any, ignored: Any, anchor_offset: Any, num_classes: int,
    label: Any, label_weight: Any, bbox_weight: Any, kept: Any, background: Any, num_pos: Any,
) -> None:  # fmt: skip
    """`_write_images` alone."""
    _write_images(
        first, last, pos_inds, pos_offset, positive, ignored, anchor_offset, num_classes,
        label, label_weight, bbox_weight, kept, background, num_pos,
    )  # fmt: skip


# The steps of a reassignment, as bits.
SELECT, FIT, WRITE = 1, 2, 4


@inner
def _space(width: int, real: Any) -> tuple[Any, Any, Any]:
    """What the fit of a row of `width` candidates needs for itself, its scores and its assignment."""
    space = np.empty((4, width + VECTOR), real)
    return space[:3], space[3], np.empty(width + VECTOR, np.bool_)


@compiled
def _take_steps(
    first: int, last: int, steps: int, losses: Any, candidates: Any, options: Any, fitted: Any, masks: Any, targets: Any,
    room: Any,
) -> None:  # fmt: skip
    """Some steps of a reassignment for some images. For some rows, if the step is `FIT` alone.

    The tuples hold what `keep_smallest`, `fit_row` and `_write_images` take, in this order.
    All steps are in one loop, so that a small batch takes one call. A call costs as much as the fit of a row. After the selection
    nothing is done where the anchors of an image descend. `descends` says so then.
    """
    _, anchor, _, _, descends, pos_offset, gt_offset, _, _ = losses
    if steps & SELECT:
        keep_smallest(first, last, *losses, *candidates)
        for image in range(first, last):
            if descends[image]:
                return
    if steps & FIT:
        first_row, last_row = (first, last) if steps == FIT else (gt_offset[first], gt_offset[last])
        loss, index, count = candidates
        fit_options, rule, keep_singleton, tolerance = options
        weights, means, variances, _, _, _, valid = fitted
        positive, ignored = masks
        space, score, assignment = _space(loss.shape[1], weights.dtype)
        for row in range(first_row, last_row):
            n, mean = count[row], means[row]
            smallest, y, r0, r1 = fit_row(row, loss[row][:n], space, *fit_options, *fitted)
            if valid[row]:
                assign(y, n, weights[row], mean, variances[row], tolerance, r0, r1, assignment, score)
                _separate(n, index[row], assignment, score, rule, tolerance, positive, ignored)
            elif keep_singleton and n == 1 and np.isfinite(loss[row, 0]):
                positive[index[row, 0]] = True
            mean[0], mean[1] = mean[0] + smallest, mean[1] + smallest
    if steps & WRITE:
        _write_images(first, last, anchor, pos_offset, *masks, *targets, *room)


def _number_rows(num_gts: Sequence[int], gt_offset: Array) -> tuple[Array, Array]:
    """The image of every row, and which of its ground truths the row is."""
    image = np.arange(len(num_gts)).repeat(num_gts)
    return image, np.arange(len(image)) - gt_offset[image]


def _room(targets: tuple[Any, ...], images: int, potential: int) -> tuple[Array, Array, Array]:
    """What `_write_images` takes behind the targets: kept and background, which it needs only for itself, and num_pos."""
    return np.zeros(len(targets[2]) + images, bool), np.empty(potential, np.uint64), np.empty(images, np.int64)


@functools.cache
def _options(covariance_type: str, separation: str, singleton: str, precision: str) -> tuple[Any, ...]:
    """What `_take_steps` takes between the candidates and the fit."""
    rule = tuple(SCHEMES[separation]), singleton == "positive", tie_tolerance(PRECISIONS[precision])
    return fit_options(covariance_type), *rule


def _reassign(losses: tuple[Any, ...], targets: tuple[Any, ...], *options: str) -> tuple[Array, tuple[Array, ...], Array, Array]:
    """Write into the targets; the number of positives, the fit, the masks positive and ignored [P]."""
    loss, anchor, *_, gt_offset, level_bounds, topk, width = losses
    rows, images = int(gt_offset[-1]), len(level_bounds)
    candidates, fitted = empty_candidates(rows, width, loss.dtype), empty_fit(rows, REALS[options[-1]])
    masks = np.zeros(len(anchor), bool), np.zeros(len(anchor), bool)
    room = _room(targets, images, len(anchor))
    if rows < SERIAL_ROWS and images < SERIAL_IMAGES:
        steps = [(SELECT | FIT | WRITE, images, SERIAL_IMAGES)]
    else:
        steps = [(SELECT, images, SERIAL_IMAGES), (FIT, rows, SERIAL_ROWS), (WRITE, images, SERIAL_IMAGES)]
    if topk > INSERTION_LIMIT:
        sort_candidates(losses, candidates)
        steps = [(step & ~SELECT, number, serial_below) for step, number, serial_below in steps]

    def attempt(given: tuple[Any, ...], descends: Array) -> None:
        for step, number, serial_below in steps:
            over_slices(
                _take_steps, number, serial_below, step, given, candidates, _options(*options), fitted, masks, targets, room
            )
            if np.count_nonzero(descends):
                return

    in_order(attempt, losses)
    return room[-1], fitted, *masks


def _joined(images: Sequence[Array]) -> Array:
    """The images' targets one after the other, in memory of their own."""
    # numpy would keep the order of transposed images, whose bytes are not those of an anchor.
    return images[0].copy() if len(images) == 1 else np.ascontiguousarray(np.concatenate(images))


def _copied(images: Sequence[Tensor]) -> tuple[Tensor, Array]:
    """`_joined` as a tensor and as integers: bytes or, where an anchor has four numbers, [A, words of eight bytes]. Zero has the
    same bits in every dtype, so that one compiled loop writes all."""
    dtype = images[0].dtype
    if dtype.itemsize == 2:  # as int16: numpy has no bfloat16
        images = [image.view(torch.int16) for image in images]
    copy = _joined([image.numpy() for image in images])
    words = copy.view(np.int64 if copy.ndim == 2 else np.uint8)
    tensor = torch.from_numpy(copy)
    return tensor.view(dtype) if dtype.itemsize == 2 else tensor, words


def _targets(
    label: Sequence[Tensor], label_weight: Sequence[Tensor], bbox_weight: Sequence[Tensor], num_classes: int
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Copies of the targets: the tensors, and what `_write_images` takes."""
    labels = _joined([image.numpy() for image in label])
    weights, weight_bytes = _copied(label_weight)
    box_weights, box_weight_words = _copied(bbox_weight)
    anchor_offset = offsets(lengths(label))
    return (torch.from_numpy(labels), weights, box_weights), (anchor_offset, num_classes, labels, weight_bytes, box_weight_words)


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int],
    num_gt: int | None,
    num_classes: int,
    topk: int,
    *options: str,
) -> tuple[Tensor, ...]:
    if num_gt is None:
        gts = view(pos_gt_inds)
        num_gt = max(gts.item(gts.argmax()) + 1, 0) if len(gts) else 0
    losses = flatten([pos_losses], [pos_inds], [pos_gt_inds], level_sizes, [num_gt], topk)
    tensors, targets = _targets([label], [label_weight], [bbox_weight], num_classes)
    return *tensors, torch.from_numpy(_reassign(losses, targets, *options)[0])


def paa_reassign_batch(
    pos_losses: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    *options: str,
) -> tuple[Tensor, ...]:
    losses = flatten(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    tensors, targets = _targets(label, label_weight, bbox_weight, num_classes)
    num_pos, fitted, *masks = _reassign(losses, targets, *options)
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
    tensors, targets = _targets(label, label_weight, bbox_weight, num_classes)
    room = _room(targets, len(label), len(masks[0]))
    over_slices(
        _write_alone, len(label), SERIAL_IMAGES, flat(pos_inds, np.int64), offsets(lengths(pos_inds)), *masks, *targets, *room
    )
    return *tensors, *map(torch.from_numpy, (room[-1], *masks))
