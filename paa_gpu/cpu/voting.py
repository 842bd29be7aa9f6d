"""Score voting for CPU tensors. Each class gathers its voters once, in blocks of neighbours. Then detection follows detection.

The candidates of a class are sorted so that neighbours of similar size follow each other. They are cut into blocks of 32. A
detection skips the blocks whose bounding box it does not touch. It goes through the others without a branch:

    weight = exp(-(1 - IoU)^2 / sigma) * score  where IoU > iou_thr, else 0
    box = detection + sum(weight * (candidate - detection)) / sum(weight)

Sums are of offsets from the detection, so the size of the image costs no digits. A box that is not finite has no IoU above a
threshold, so it is no candidate. If `offset` is 1, boxes of detections and voters end one pixel later here. All else is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, array, rounded, tensor, view
from ._loops import compiled, compiled_sums, over_slices
from ._numeric import negative_exp2

BLOCK = 32
CELLS = 16  # of the grid, along each side of what the detections span
SIZES = 4  # of boxes, each up to half as long as the one above

# Detections below which a second thread costs more than it saves, measured on 2 cores: a detection takes 1 us, handing over to a
# thread 100.
SERIAL_ROWS = 256


def _hilbert(side: int) -> Array:
    """The place of each cell [x, y] of a grid on a curve that goes from neighbour to neighbour; `side` is a power of two.

    A grid of twice the side is four of them, of which the first and the last are mirrored.
    """
    if side == 1:
        return np.zeros((1, 1), np.int64)
    part = _hilbert(side // 2)
    n = part.size
    return np.block([[part.T, part + n], [part.T[::-1, ::-1] + 3 * n, part + 2 * n]])


CURVE = _hilbert(CELLS).astype(np.uint32)


@compiled
def _is_finite(boxes: Any, i: int) -> Any:
    # Not `boxes[i]`, here and below: a view of a row costs more than what is done with it.
    return np.isfinite(boxes[i, 0]) & np.isfinite(boxes[i, 1]) & np.isfinite(boxes[i, 2]) & np.isfinite(boxes[i, 3])


@compiled
def _classes(labels: Any, classes: int) -> Any:
    """The classes that a detection has, ascending."""
    wanted = np.zeros(classes, np.bool_)
    for label in labels:
        if 0 <= label < classes:
            wanted[label] = True
    return np.flatnonzero(wanted)


@compiled
def _candidates(scores: Any, threshold: Any, classes: Any) -> tuple[Any, Any]:
    """The boxes with a score above the threshold in one of the classes, and how many there are in each of these."""
    some, size = np.zeros(len(scores), np.bool_), np.zeros(len(classes), np.int64)
    for k in range(len(classes)):
        c, n = classes[k], 0
        for i in range(len(scores)):
            above = scores[i, c] > threshold
            some[i] |= above
            n += above
        size[k] = n
    found, n = np.empty(len(scores), np.uint32), 0
    for i in range(len(scores)):
        found[n] = i
        n += some[i]
    return found[:n], size


@compiled
def _within(place: Any) -> int:
    """A cell along one side; NaN, where the detections have no extent or one beyond the largest number, is the first."""
    return int(min(place, CELLS - 1)) if place > 0 else 0


@compiled
def _neighbours(boxes: Any, candidates: Any, det: Any) -> Any:
    """The finite candidates in an order in which neighbours of like size follow each other: by size, then along the curve.

    The grid is over what the centres of the detections span: candidates beyond are in a cell at its border.
    """
    real = boxes.dtype.type
    left = top = real(np.inf)
    right = bottom = real(-np.inf)
    longest = real(0)
    for i in range(len(det)):
        if _is_finite(det, i):
            x1, y1, x2, y2 = det[i, 0], det[i, 1], det[i, 2], det[i, 3]
            left, top, right, bottom = min(left, x1 + x2), min(top, y1 + y2), max(right, x1 + x2), max(bottom, y1 + y2)
            longest = max(longest, x2 - x1, y2 - y1)
    scale_x, scale_y = CELLS / (right - left), CELLS / (bottom - top)
    last = SIZES * CELLS * CELLS  # the group of boxes that are not finite
    group, start = np.empty(len(candidates), np.uint32), np.zeros(last + 2, np.uint32)
    for i in range(len(candidates)):
        at = candidates[i]
        x1, y1, x2, y2 = boxes[at, 0], boxes[at, 1], boxes[at, 2], boxes[at, 3]
        side, size = max(x2 - x1, y2 - y1), 0
        for k in range(1, SIZES):
            size += side < longest / (1 << k)
        across, down = _within((x1 + x2 - left) * scale_x), _within((y1 + y2 - top) * scale_y)
        group[i] = size * CELLS * CELLS + CURVE[across, down] if _is_finite(boxes, at) else last
        start[group[i] + 1] += 1
    for g in range(last):
        start[g + 1] += start[g]
    ordered, finite = np.empty_like(candidates), start[last]
    for i in range(len(candidates)):
        ordered[start[group[i]]] = candidates[i]
        start[group[i]] += 1
    return ordered[:finite]


@compiled
def _gather(boxes: Any, scores: Any, det: Any, labels: Any, rule: Any) -> tuple[Any, Any, Any]:
    """The candidates of every class that a detection has.

    Returns:
        block_start [C + 1], the blocks of each class; voter [6, n * BLOCK], corners, area and score of the candidates, zeros
        behind the last one of a class; bounds [4, n], what the corners of each block span.
    """
    real = boxes.dtype.type
    threshold, offset = real(rule[0]), real(rule[3])
    classes = _classes(labels, scores.shape[1])
    candidates, size = _candidates(scores, threshold, classes)
    block_start, place = np.zeros(scores.shape[1] + 1, np.int64), np.empty(len(classes), np.int64)
    for k in range(len(classes)):
        block_start[classes[k] + 1] = (size[k] + BLOCK - 1) // BLOCK
    for c in range(scores.shape[1]):
        block_start[c + 1] += block_start[c]
    for k in range(len(classes)):
        place[k] = block_start[classes[k]] * BLOCK

    index = np.empty(block_start[-1] * BLOCK, np.uint32)
    for i in _neighbours(boxes, candidates, det):
        for k in range(len(classes)):
            if scores[i, classes[k]] > threshold:
                index[place[k]] = i
                place[k] += 1

    voter = np.zeros((6, block_start[-1] * BLOCK), boxes.dtype)
    bounds = np.empty((4, block_start[-1]), boxes.dtype)
    for k in range(len(classes)):
        c = classes[k]
        for b in range(block_start[c], block_start[c + 1]):
            left = top = real(np.inf)
            right = bottom = real(-np.inf)
            for at in range(b * BLOCK, min((b + 1) * BLOCK, place[k])):
                i = index[at]
                x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2] + offset, boxes[i, 3] + offset
                voter[0, at], voter[1, at], voter[2, at], voter[3, at] = x1, y1, x2, y2
                voter[4, at], voter[5, at] = (x2 - x1) * (y2 - y1), scores[i, c]
                left, top, right, bottom = min(left, x1), min(top, y1), max(right, x2), max(bottom, y2)
            bounds[0, b], bounds[1, b], bounds[2, b], bounds[3, b] = left, top, right, bottom
    return block_start, voter, bounds


@compiled_sums
def _vote(first: Any, last: Any, voter: Any, box: Any, least_iou: Any, scale: Any, total: Any) -> None:
    """Add the weights of voter[:, first:last], and the offsets of their boxes times them, to total [5].

    `first` and `last` are unsigned: an index that may be negative may count from the end, and keeps a loop out of vector
    registers.
    """
    real = voter.dtype.type
    zero, one, tiny = real(0), real(1), real(1e-6)
    x1, y1, x2, y2 = box
    own_area = (x2 - x1) * (y2 - y1)
    w = w1 = w2 = w3 = w4 = zero
    for i in range(first, last):
        width = max(min(voter[2, i], x2) - max(voter[0, i], x1), zero)
        height = min(voter[3, i], y2) - max(voter[1, i], y1)
        intersection = width * height  # not positive where the boxes do not meet, so no IoU above a threshold
        union = own_area + voter[4, i] - intersection
        # A comparison, since a maximum may drop NaN or keep it; NaN is no IoU.
        iou = intersection / (tiny if union < tiny else union)
        root = (one - iou) * scale
        weight = negative_exp2(root * root) * voter[5, i] if iou > least_iou else zero
        w += weight
        w1 += weight * (voter[0, i] - x1)
        w2 += weight * (voter[1, i] - y1)
        w3 += weight * (voter[2, i] - x2)
        w4 += weight * (voter[3, i] - y2)
    total[0] += w
    total[1] += w1
    total[2] += w2
    total[3] += w3
    total[4] += w4


@compiled
def _vote_rows(
    first: int,
    last: int,
    order: Any,
    det: Any,
    label: Any,
    block_start: Any,
    voter: Any,
    bounds: Any,
    rule: Any,
    voted: Any,
) -> None:
    """voted[row] = the box of detection order[row], and its score."""
    real, blocks = det.dtype.type, bounds.shape[1]
    least_iou, scale, offset = real(rule[1]), real(rule[2]), real(rule[3])
    total, touched, edge = np.empty(5, det.dtype), np.zeros(blocks + 2, np.bool_), np.empty(blocks + 2, np.int64)
    for row in range(first, last):
        at = order[row]
        for side in range(5):
            voted[row, side] = det[at, side]
        c = label[at]
        if c < 0 or c >= len(block_start) - 1:
            continue
        x1, y1, x2, y2 = det[at, 0], det[at, 1], det[at, 2] + offset, det[at, 3] + offset
        first_block, n = np.uint64(block_start[c]), np.uint64(block_start[c + 1]) - np.uint64(block_start[c])
        for b in range(n):
            block = first_block + b
            across = (bounds[2, block] > x1) & (x2 > bounds[0, block])
            touched[b + np.uint64(1)] = across & (bounds[3, block] > y1) & (y2 > bounds[1, block])
        touched[n + np.uint64(1)] = False
        # Neighbouring blocks that the box touches are one stretch, from one edge to the next. Without branches: the processor
        # cannot foretell them.
        edges = 0
        for b in range(n + np.uint64(1)):
            edge[edges] = b
            edges += touched[b] != touched[b + np.uint64(1)]
        total[:] = 0
        for k in range(0, edges, 2):
            start, stop = first_block + np.uint64(edge[k]), first_block + np.uint64(edge[k + 1])
            _vote(start * np.uint64(BLOCK), stop * np.uint64(BLOCK), voter, (x1, y1, x2, y2), least_iou, scale, total)
        if total[0] != 0:
            for side in range(4):
                voted[row, side] += total[side + 1] / total[0]


@compiled
def _vote_image(boxes: Any, scores: Any, det: Any, label: Any, order: Any, rule: Any, voted: Any) -> None:
    """On this thread, in one call: with few voters, what Python does in between would take longer than the loops."""
    voters = _gather(boxes, scores, det, label, rule)
    _vote_rows(0, len(order), order, det, label, *voters, rule, voted)


def _image(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor,
    rule: tuple[float, float, float, float], keep_order: bool, dtype: Any, alone: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The voted boxes and the labels of an image, on all threads if it is alone. `rule`: score_thr, least_iou, scale, offset."""
    det, boxes, scores = array(det_bboxes, dtype), array(mlvl_bboxes, dtype), array(mlvl_nms_scores, dtype)
    labels = view(det_labels)
    label = np.ascontiguousarray(labels, np.int64)
    order = np.arange(len(label)) if keep_order else label.argsort(kind="stable")
    voted = np.empty_like(det)
    if alone and len(order) >= SERIAL_ROWS:
        voters = _gather(boxes, scores, det, label, rule)
        over_slices(_vote_rows, len(order), SERIAL_ROWS, order, det, label, *voters, rule, voted)
    else:
        _vote_image(boxes, scores, det, label, order, rule, voted)
    return voted, labels[order]


@functools.lru_cache
def _weights(iou_thr: float, sigma: float, dtype: Any) -> tuple[float, float]:
    """(least_iou, scale): weights are 2^-((1 - IoU) * scale)^2 above least_iou, and 0 up to it.

    least_iou is iou_thr, or more where weights would be below the smallest normal number. The widest scale gives IoUs that
    only rounding makes differ from 1 a weight that is a number.
    """
    info = np.finfo(dtype)
    vanishing = math.sqrt(info.maxexp - 2)
    width = max(math.sqrt(sigma * math.log(2)), float(info.eps) / vanishing)
    return max(iou_thr, 1 - vanishing * width), 1 / width


def _from_pools(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], weights: Sequence[float], label: Array, threshold: float, dtype: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of an image from several pools: boxes [n, 4], weighted scores [n, its classes], and labels among these.

    A score up to the threshold is -inf.
    """
    all_classes = scores[0].shape[1]
    classes = _classes(label, all_classes)
    candidates: tuple[list[Array], list[Array]] = [], []
    for box, score, weight in zip(boxes, scores, weights, strict=True):
        values = array(score, dtype)
        found, _ = _candidates(values, dtype(threshold), classes)
        own = values[found[:, None], classes[None]]
        candidates[0].append(array(box, dtype)[found])
        candidates[1].append(np.where(own > dtype(threshold), own * dtype(weight), dtype(-np.inf)))
    number = np.full(all_classes, -1)
    number[classes] = np.arange(len(classes))
    among, inside = np.full(len(label), -1), (label >= 0) & (label < all_classes)
    among[inside] = number[label[inside]]
    box, score = (torch.from_numpy(np.concatenate(column)) for column in candidates)
    return box, score, torch.from_numpy(among)


def _pooled_image(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Sequence[Tensor], mlvl_nms_scores: Sequence[Tensor],
    weights: Sequence[float], rule: tuple[float, float, float, float], keep_order: bool, dtype: Any, alone: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """`_image` of several pools."""
    labels = view(det_labels)
    order = np.arange(len(labels)) if keep_order else labels.argsort(kind="stable")
    label = np.ascontiguousarray(labels[order], np.int64)
    boxes, scores, among = _from_pools(mlvl_bboxes, mlvl_nms_scores, weights, label, rule[0], dtype)
    det = torch.from_numpy(array(det_bboxes, dtype)[order])
    voted, _ = _image(det, among, boxes, scores, (-math.inf, *rule[1:]), True, dtype, alone)
    return voted, labels[order]


def score_voting(
    det_bboxes: Sequence[Tensor],
    det_labels: Sequence[Tensor],
    mlvl_bboxes: Sequence[Tensor],
    mlvl_nms_scores: Sequence[Tensor],
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    images, dtype = len(det_bboxes), det_bboxes[0].dtype
    wide = torch.float64 in (dtype, mlvl_bboxes[0].dtype, mlvl_nms_scores[0].dtype)
    real = np.float64 if wide else np.float32
    rule = rounded(score_thr, mlvl_nms_scores[0].dtype), *_weights(iou_thr, sigma, real), offset

    def vote_image(i: int, alone: bool) -> tuple[Array, Array]:
        if weights is None:
            return _image(det_bboxes[i], det_labels[i], mlvl_bboxes[i], mlvl_nms_scores[i], rule, keep_order, real, alone)
        own = slice(i * len(weights), (i + 1) * len(weights))
        pools = mlvl_bboxes[own], mlvl_nms_scores[own], weights
        return _pooled_image(det_bboxes[i], det_labels[i], *pools, rule, keep_order, real, alone)

    if images == 1:
        voted, labels = vote_image(0, True)
    else:
        results: list[Any] = [None] * images

        def vote_images(first: int, last: int) -> None:
            for i in range(first, last):
                results[i] = vote_image(i, False)

        over_slices(vote_images, images, 2)
        voted, labels = map(np.concatenate, zip(*results, strict=True))
    if wide and dtype != torch.float64:
        voted = voted.astype(np.float32)
    return tensor(voted, dtype), torch.from_numpy(labels)


def score_voting_padded(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    if det_bboxes.shape[0] == 0:
        return det_bboxes.clone(), det_labels.clone()
    det, label, boxes, scores = (list(column.unbind()) for column in (det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores))
    voted, labels = score_voting(det, label, boxes, scores, *options)
    return voted.view(det_bboxes.shape), labels.view(det_labels.shape)
