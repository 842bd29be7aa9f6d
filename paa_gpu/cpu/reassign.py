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
from ._loops import compiled, over_slices
from .em import SERIAL_ROWS as FIT_SERIAL_ROWS
from .em import empty_fit, fit, fit_options, fit_rows
from .topk import INSERTION_LIMIT, SERIAL_IMAGES, empty_candidates, empty_groups, flatten, keep_smallest, select, select_rows

# Rows below which a second thread costs more than it saves, measured on 2 cores: a row takes 0.3 us, handing over 100.
SERIAL_ROWS = 2048


@compiled
def _first_best(score: Any, assignment: Any, component: bool, tolerance: float) -> int:
    """The first candidate of a component whose score ties with the component's highest; the row's length if it has none."""
    best = -np.inf
    for i in range(len(score)):
        if assignment[i] == component:
            best = max(best, score[i])
    for i in range(len(score)):
        if assignment[i] == component and score[i] >= best - tolerance:
            return i
    return len(score)


@compiled
def _separate_row(index: Any, assignment: Any, score: Any, rule: Any, tolerance: float, positive: Any, ignored: Any) -> None:
    stop_at_threshold, foreground_only, ignore_foreground, ignore_before_background, all_without_foreground = rule
    threshold = _first_best(score, assignment, True, tolerance)
    background = _first_best(score, assignment, False, tolerance)
    if threshold == len(index) and not all_without_foreground:
        return
    for i in range(len(index)):
        within = i <= threshold or not stop_at_threshold
        if within and (assignment[i] or not foreground_only):
            positive[index[i]] = True
        elif (ignore_foreground and assignment[i]) or (ignore_before_background and threshold < i < background):
            ignored[index[i]] = True


@compiled
def _separate_rows(
    first: int,
    last: int,
    loss: Any,
    index: Any,
    count: Any,
    valid: Any,
    assignment: Any,
    score: Any,
    rule: Any,
    keep_singleton: bool,
    tolerance: float,
    positive: Any,
    ignored: Any,
) -> None:
    for row in range(first, last):
        n = count[row]
        if valid[row]:
            _separate_row(index[row, :n], assignment[row, :n], score[row, :n], rule, tolerance, positive, ignored)
        elif keep_singleton and n == 1 and np.isfinite(loss[row, 0]):
            positive[index[row, 0]] = True


@compiled
def _largest(values: Any) -> int:
    largest = -1
    for value in values:
        largest = max(largest, value)
    return largest


@compiled
def _number_rows(gt_offset: Any) -> tuple[Any, Any]:
    """The image of every row, and which of its ground truths the row is."""
    rows, images = gt_offset[-1], len(gt_offset) - 1
    image_of, gt_of = np.empty(rows, np.int64), np.empty(rows, np.int64)
    for image in range(images):
        for row in range(gt_offset[image], gt_offset[image + 1]):
            image_of[row], gt_of[row] = image, row - gt_offset[image]
    return image_of, gt_of


@compiled
def _copy_row(source: Any, i: int, target: Any, j: int) -> None:
    # One by one: numba takes seconds to compile an assignment of arrays, for the error that it might raise.
    for word in range(source.shape[1]):
        target[j, word] = source[i, word]


@compiled
def _make_background(anchor: Any, anchors: int, num_classes: int, label: Any, bbox_weight: Any) -> None:
    """The label of background and no box weight at these anchors of an image, where they exist.

    As unsigned numbers: a negative one is too large then, and an index that may be negative takes a branch. Column by column: a
    call to fill one short row takes longer than to fill it.
    """
    for i in range(len(anchor)):
        if np.uint64(anchor[i]) < np.uint64(anchors):
            label[np.uint64(anchor[i])] = num_classes
    for word in range(np.uint64(bbox_weight.shape[1])):
        for i in range(len(anchor)):
            if np.uint64(anchor[i]) < np.uint64(anchors):
                bbox_weight[np.uint64(anchor[i]), word] = 0


@compiled
def _write_images(
    first: int,
    last: int,
    pos_inds: Any,
    positive: Any,
    ignored: Any,
    pos_offset: Any,
    anchor_offset: Any,
    num_classes: int,
    label: Any,
    label_weight: Any,
    bbox_weight: Any,
    num_pos: Any,
) -> None:
    """Background at all potential positives; then the positives get back what their anchors had, in whatever order two of them
    that share an anchor come."""
    for image in range(first, last):
        begin, end, start, stop = pos_offset[image], pos_offset[image + 1], anchor_offset[image], anchor_offset[image + 1]
        anchor, own_label, own_weight = pos_inds[begin:end], label[start:stop], bbox_weight[start:stop]
        kept = 0
        for p in range(begin, end):
            kept += positive[p]
        anchor_of = np.empty(kept, np.int64)
        labels, box_weights = np.empty(kept, label.dtype), np.empty((kept, bbox_weight.shape[1]), bbox_weight.dtype)
        num_pos[image], kept = kept, 0
        for i in range(len(anchor)):
            if positive[begin + i]:
                anchor_of[kept], labels[kept] = anchor[i], own_label[anchor[i]]
                _copy_row(own_weight, anchor[i], box_weights, kept)
                kept += 1
            elif ignored[begin + i]:
                for byte in range(label_weight.shape[1]):
                    label_weight[start + anchor[i], byte] = 0
        _make_background(anchor, stop - start, num_classes, own_label, own_weight)
        for i in range(kept):
            own_label[anchor_of[i]] = labels[i]
            _copy_row(box_weights, i, own_weight, anchor_of[i])


def _write(pos_inds: Array, positive: Array, ignored: Array, pos_offset: Array, targets: tuple[Any, ...]) -> Array:
    """Write what the masks [P] say into the targets that `_targets` gives; returns the number of positives of each image."""
    num_pos = np.empty(len(pos_offset) - 1, np.int64)
    over_slices(_write_images, len(num_pos), SERIAL_IMAGES, pos_inds, positive, ignored, pos_offset, *targets, num_pos)
    return num_pos


def _fit(losses: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The candidates, loss, index and count; their fit, with assignment and score."""
    candidates = loss, _, count = select(losses)
    rows, width = loss.shape
    return candidates, fit(loss.reshape(-1), np.arange(rows) * width, count, width, options)


def _reassign(
    losses: tuple[Any, ...], options: tuple[Any, ...], rule: tuple[Any, ...], targets: tuple[Any, ...]
) -> tuple[Array, tuple[Array, ...], Array, Array]:
    """Write into the targets; the number of positives, the fit, the masks positive and ignored [P]."""
    candidates, fitted = _fit(losses, options)
    pos_inds, pos_offset = losses[1], losses[4]
    masks = np.zeros(len(pos_inds), bool), np.zeros(len(pos_inds), bool)
    over_slices(_separate_rows, len(candidates[0]), SERIAL_ROWS, *candidates, *fitted[-3:], *rule, *masks)
    return _write(pos_inds, *masks, pos_offset, targets), fitted[:-2], *masks


@compiled
def _reassign_few(losses: Any, options: Any, rule: Any, targets: Any) -> Any:
    """The number of positives from `_reassign`, for a few rows of one image. It runs the same loops, on this thread: what Python
    does between them would take longer than they do."""
    loss, pos_inds, pos_gt_inds, order, pos_offset, gt_offset, level_bounds, topk, width = losses
    levels, rows = level_bounds.shape[1] - 1, gt_offset[-1]
    groups = empty_groups(rows * levels, rows * levels * topk)
    keep_smallest(0, 1, loss, pos_inds, pos_gt_inds, order, pos_offset, gt_offset, level_bounds, topk, *groups)
    candidates = empty_candidates(rows, width, loss.dtype)
    select_rows(0, rows, levels, loss, *groups, *candidates)
    fitted = empty_fit(rows, width, options[0].dtype)
    start = np.empty(rows, np.int64)
    for row in range(rows):
        start[row] = row * width
    fit_rows(0, rows, candidates[0].reshape(-1), start, candidates[2], *options, *fitted)
    positive, ignored = np.zeros(len(loss), np.bool_), np.zeros(len(loss), np.bool_)
    _separate_rows(0, rows, *candidates, *fitted[-3:], *rule, positive, ignored)
    num_pos = np.empty(1, np.int64)
    _write_images(0, 1, pos_inds, positive, ignored, pos_offset, *targets, num_pos)
    return num_pos


def _copied(images: Sequence[Tensor]) -> tuple[Tensor, Array]:
    """The images' targets one after the other, in memory of their own, as a tensor and as integers, of each anchor its bytes or,
    where these are four numbers, words of eight: zero has the same bits in every dtype, so that one compiled loop writes all."""
    dtype = images[0].dtype
    # Half precision as int16: numpy has no bfloat16.
    values = [(image.view(torch.int16) if dtype.itemsize == 2 else image).numpy() for image in images]
    # numpy would keep the order of transposed images, whose bytes are not those of an anchor.
    copy = values[0].copy() if len(values) == 1 else np.ascontiguousarray(np.concatenate(values))
    tensor = torch.from_numpy(copy)
    words = copy.view(np.int64) if copy.ndim == 2 else copy[:, None].view(np.uint8)
    return tensor.view(dtype) if dtype.itemsize == 2 else tensor, words


def _targets(
    label: Sequence[Tensor], label_weight: Sequence[Tensor], bbox_weight: Sequence[Tensor], num_classes: int
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Copies of the targets: the tensors, and what `_write` takes."""
    labels = label[0].numpy().copy() if len(label) == 1 else np.concatenate([image.numpy() for image in label])
    weights, weight_bytes = _copied(label_weight)
    box_weights, box_weight_words = _copied(bbox_weight)
    anchor_offset = offsets(lengths(label))
    return (torch.from_numpy(labels), weights, box_weights), (anchor_offset, num_classes, labels, weight_bytes, box_weight_words)


@functools.cache
def _rules(covariance_type: str, separation: str, singleton: str, precision: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What `_reassign` takes between the losses and the targets."""
    rule = tuple(SCHEMES[separation]), singleton == "positive", tie_tolerance(PRECISIONS[precision])
    return fit_options(precision, covariance_type), rule


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
    num_gt = _largest(flat([pos_gt_inds], np.int64)) + 1 if num_gt is None else num_gt
    losses = flatten([pos_losses], [pos_inds], [pos_gt_inds], level_sizes, [num_gt], topk)
    tensors, targets = _targets([label], [label_weight], [bbox_weight], num_classes)
    if num_gt < FIT_SERIAL_ROWS and topk <= INSERTION_LIMIT:
        num_pos = _reassign_few(losses, *_rules(*options), targets)
    else:
        num_pos = _reassign(losses, *_rules(*options), targets)[0]
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
    num_classes: int,
    topk: int,
    *options: str,
) -> tuple[Tensor, ...]:
    losses = flatten(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    tensors, targets = _targets(label, label_weight, bbox_weight, num_classes)
    num_pos, fitted, *masks = _reassign(losses, *_rules(*options), targets)
    return *tensors, *map(torch.from_numpy, (num_pos, *fitted, *_number_rows(offsets(num_gts)), *masks))


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
    (loss, *candidates), (*fitted, assignment, score) = _fit(losses, fit_options(precision, covariance_type))
    arrays = (*candidates, assignment, score, *fitted, *_number_rows(offsets(num_gts)))
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
    num_pos = _write(flat(pos_inds, np.int64), *masks, offsets(lengths(pos_inds)), targets)
    return *tensors, *map(torch.from_numpy, (num_pos, *masks))
