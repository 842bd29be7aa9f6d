"""Reassignment for CPU tensors: selection and fit of `topk` and `em`, then separation, then the three outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import PRECISIONS
from ..separation import SCHEMES, tie_tolerance
from ._arrays import Array, flat, lengths, offsets, tensor, view
from ._loops import compiled, over_slices
from .em import fit_rows
from .topk import SERIAL_IMAGES, select

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
def _number_rows(gt_offset: Any) -> tuple[Any, Any]:
    """The image of every row, and which of its ground truths the row is."""
    rows, images = gt_offset[-1], len(gt_offset) - 1
    image_of, gt_of = np.empty(rows, np.int64), np.empty(rows, np.int64)
    for image in range(images):
        for row in range(gt_offset[image], gt_offset[image + 1]):
            image_of[row], gt_of[row] = image, row - gt_offset[image]
    return image_of, gt_of


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
    for image in range(first, last):
        num_pos[image] = 0
        for p in range(pos_offset[image], pos_offset[image + 1]):
            if positive[p]:
                num_pos[image] += 1
            elif 0 <= pos_inds[p] < anchor_offset[image + 1] - anchor_offset[image]:
                anchor = anchor_offset[image] + pos_inds[p]
                label[anchor] = num_classes
                for side in range(4):
                    bbox_weight[anchor, side] = 0
                if ignored[p]:
                    label_weight[anchor] = 0


def _copy(images: Sequence[Tensor]) -> Array:
    """The images' targets one after the other, in memory of their own; half precision as int16, in which zero has the same
    bits."""
    values = [(image.view(torch.int16) if image.itemsize == 2 else image).numpy() for image in images]
    return values[0].copy() if len(values) == 1 else np.concatenate(values)


def _write(
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    positive: Array,
    ignored: Array,
    num_classes: int,
) -> tuple[Tensor, ...]:
    """Copies of the targets with what the masks [P] say written into them, and the number of positives of each image."""
    inputs = (label, label_weight, bbox_weight)
    targets = [_copy(images) for images in inputs]
    num_pos = np.empty(len(label), np.int64)
    over_slices(
        _write_images, len(label), SERIAL_IMAGES, flat(pos_inds, np.int64), positive, ignored, offsets(lengths(pos_inds)),
        offsets(lengths(label)), num_classes, *targets, num_pos,
    )  # fmt: skip
    written = [torch.from_numpy(target) for target in targets]
    # Half precision was copied as int16.
    written = [
        image.view(given[0].dtype) if given[0].itemsize == 2 else image for image, given in zip(written, inputs, strict=True)
    ]
    return *written, torch.from_numpy(num_pos)


def _fit(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
    covariance_type: str,
    precision: str,
) -> tuple[tuple[Array, ...], list[Array]]:
    """loss, index, count, assignment, score of the candidates; the fit."""
    loss, index, count = select(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    rows, width = loss.shape
    fit, assignment, score = fit_rows(
        loss.reshape(-1), np.arange(rows) * width, count, None, None, None, covariance_type, 1e-3, 1e-6, 100, precision, width
    )
    return (loss, index, count, assignment, score), fit


def _reassign(
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
    covariance_type: str,
    separation: str,
    singleton: str,
    precision: str,
) -> tuple[tuple[Tensor, ...], list[Array], Array, Array]:
    """The targets with num_pos, the fit, the masks positive and ignored."""
    candidates, fit = _fit(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk, covariance_type, precision)
    loss, index, count, assignment, score = candidates
    potential = sum(lengths(pos_inds))
    positive, ignored = np.zeros(potential, bool), np.zeros(potential, bool)
    over_slices(
        _separate_rows, len(count), SERIAL_ROWS, loss, index, count, fit[-1], assignment, score, tuple(SCHEMES[separation]),
        singleton == "positive", tie_tolerance(PRECISIONS[precision]), positive, ignored,
    )  # fmt: skip
    return _write(label, label_weight, bbox_weight, pos_inds, positive, ignored, num_classes), fit, positive, ignored


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int],
    num_gt: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _reassign(
        [pos_losses], [label], [label_weight], [bbox_weight], [pos_inds], [pos_gt_inds], level_sizes, [num_gt], *options
    )[0]


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
    targets, fit, *masks = _reassign(
        pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds, level_sizes, num_gts, *options
    )
    return *targets, *map(torch.from_numpy, (*fit, *_number_rows(offsets(num_gts)), *masks))


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
    (loss, *candidates), fit = _fit(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk, covariance_type, precision)
    arrays = (*candidates, *fit, *_number_rows(offsets(num_gts)))
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
    return *_write(label, label_weight, bbox_weight, pos_inds, *masks, num_classes), *map(torch.from_numpy, masks)
