"""Score voting for CPU tensors: each class's voters gathered once, in blocks of neighbours; then detection by detection.

The candidates of a class are sorted by the cell of a grid that their centre lies in, and cut into blocks of 32. A detection skips
the blocks whose bounding box it does not touch, and goes through the others without a branch:

    weight = exp(-(1 - IoU)^2 / sigma) * score  where IoU > iou_thr, else 0
    box = detection + sum(weight * (candidate - detection)) / sum(weight)

Offsets from the detection lose nothing to the size of the image. The exponential is a power of two, made of its bits, times a
Taylor series: a call of the library's would keep the loop out of vector registers. A box that is not finite has no IoU that
exceeds a threshold, so it is no candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import flat, lengths, offsets, tensor, view
from ._loops import compiled, compiled_sums, over_slices

BLOCK = 32
CELLS = 8  # of the grid, along each side of what the boxes span

# Detections below which a second thread costs more than it saves, measured on 2 cores: a detection takes 1 us, handing over to a
# thread 100.
SERIAL_ROWS = 256

LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
TAYLOR = tuple(1 / math.factorial(k) for k in range(14))


@compiled
def _is_finite(box: Any) -> Any:
    return np.isfinite(box[0]) and np.isfinite(box[1]) and np.isfinite(box[2]) and np.isfinite(box[3])


@compiled
def _cells(boxes: Any) -> Any:
    """The cell of each box's centre, row after row; -1 where a box is not finite."""
    real = boxes.dtype.type
    low, high = np.full(2, real(np.inf)), np.full(2, real(-np.inf))
    cell = np.zeros(len(boxes), np.int64)
    for i in range(len(boxes)):
        cell[i] = 0 if _is_finite(boxes[i]) else -1
        if cell[i] == 0:
            for axis in range(2):
                centre = boxes[i, axis] + boxes[i, axis + 2]
                low[axis], high[axis] = min(low[axis], centre), max(high[axis], centre)
    scale_x, scale_y = CELLS / (high[0] - low[0]), CELLS / (high[1] - low[1])
    for i in range(len(boxes)):
        if cell[i] == 0:
            across = (boxes[i, 0] + boxes[i, 2] - low[0]) * scale_x
            down = (boxes[i, 1] + boxes[i, 3] - low[1]) * scale_y
            cell[i] = _within(across) + CELLS * _within(down)
    return cell


@compiled
def _within(place: Any) -> int:
    """A cell along one side; NaN, where the boxes have no extent or one beyond the largest number, is the first."""
    return int(min(place, CELLS - 1)) if place > 0 else 0


@compiled
def _group_sizes(scores: Any, threshold: Any, labels: Any, cell: Any) -> Any:
    """The candidates [C, cells] in each cell, of the classes that a detection has."""
    classes = scores.shape[1]
    wanted = np.zeros(classes, np.bool_)
    for label in labels:
        if 0 <= label < classes:
            wanted[label] = True
    size = np.zeros((classes, CELLS * CELLS), np.int64)
    for i in range(len(cell)):
        for c in range(classes):
            if scores[i, c] > threshold and wanted[c] and cell[i] >= 0:
                size[c, cell[i]] += 1
    return size


@compiled
def _fill(boxes: Any, scores: Any, threshold: Any, offset: Any, cell: Any, place: Any, stop: Any, voter: Any) -> None:
    """Put each candidate in the next place of its class and cell; a class that no detection has ends where it begins."""
    for i in range(len(cell)):
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = (x2 - x1 + offset) * (y2 - y1 + offset)
        for c in range(len(stop)):
            if scores[i, c] > threshold and cell[i] >= 0 and place[c, cell[i]] < stop[c]:
                at = place[c, cell[i]]
                place[c, cell[i]] += 1
                voter[0, at], voter[1, at], voter[2, at], voter[3, at] = x1, y1, x2, y2
                voter[4, at], voter[5, at] = area, scores[i, c]


@compiled
def _gather(boxes: Any, scores: Any, threshold: Any, labels: Any, offset: Any) -> tuple[Any, Any, Any]:
    """The candidates of every class that a detection has.

    Returns:
        block_start [C + 1], the blocks of each class; voter [6, n * BLOCK], corners, area and score of the candidates, zeros
        behind the last one of a class; bounds [4, n], what the corners of each block span.
    """
    classes, cell = scores.shape[1], _cells(boxes)
    size = _group_sizes(scores, threshold, labels, cell)
    block_start, place, stop = np.zeros(classes + 1, np.int64), np.empty_like(size), np.empty(classes, np.int64)
    for c in range(classes):
        stop[c] = block_start[c] * BLOCK
        for k in range(CELLS * CELLS):
            place[c, k] = stop[c]
            stop[c] += size[c, k]
        block_start[c + 1] = (stop[c] + BLOCK - 1) // BLOCK
    voter = np.zeros((6, block_start[classes] * BLOCK), boxes.dtype)
    _fill(boxes, scores, threshold, offset, cell, place, stop, voter)

    bounds = np.empty((4, block_start[classes]), boxes.dtype)
    for c in range(classes):
        for b in range(block_start[c], block_start[c + 1]):
            here = slice(b * BLOCK, min((b + 1) * BLOCK, stop[c]))
            bounds[0, b], bounds[1, b] = voter[0, here].min(), voter[1, here].min()
            bounds[2, b], bounds[3, b] = voter[2, here].max(), voter[3, here].max()
    return block_start, voter, bounds


@compiled_sums
def _vote(voter: Any, here: Any, box: Any, rule: Any, bits: Any, power: Any, weight: Any, total: Any) -> None:
    """Add the weights of voter[:, here], and the offsets of their boxes times them, to total [5].

    bits, power: one memory, as integers and as floats; weight: another one.
    """
    offset, iou_thr, scale = rule
    real, info = voter.dtype.type, np.finfo(voter.dtype)
    zero, half, one, tiny = real(0), real(0.5), real(1), real(1e-6)
    bias, mantissa, degree = info.maxexp - 1, info.nmant, 13 if info.bits == 64 else 6
    most = real(bias)  # where no bit of the power is left
    x1, y1, x2, y2 = box
    left, top, right, bottom = voter[0, here], voter[1, here], voter[2, here], voter[3, here]
    area, score = voter[4, here], voter[5, here]
    own_area = (x2 - x1 + offset) * (y2 - y1 + offset)
    for i in range(len(left)):
        width = max(min(right[i], x2) - max(left[i], x1) + offset, zero)
        height = max(min(bottom[i], y2) - max(top[i], y1) + offset, zero)
        intersection = width * height
        union = own_area + area[i] - intersection
        # Comparisons, since a minimum or maximum may drop NaN or keep it: no IoU, and a power that is a number.
        iou = intersection / (tiny if union < tiny else union)
        exponent = (one - iou) * (one - iou) * scale
        exponent = exponent if exponent < most else most
        whole = np.int32(exponent + half)
        bits[i] = (bias - whole) << mantissa
        rest = (real(whole) - exponent) * real(LN_2)
        series = zero
        for k in range(degree, -1, -1):
            series = series * rest + real(TAYLOR[k])
        weight[i] = series * score[i] if iou > iou_thr else zero
    w = w1 = w2 = w3 = w4 = zero
    for i in range(len(left)):
        weighted = weight[i] * power[i]
        w += weighted
        w1 += weighted * (left[i] - x1)
        w2 += weighted * (top[i] - y1)
        w3 += weighted * (right[i] - x2)
        w4 += weighted * (bottom[i] - y2)
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
    integer: Any,
    voted: Any,
) -> None:
    """voted[row] = the box of detection order[row], and its score. `integer` has the dtype as wide as that of the boxes."""
    most, offset = voter.shape[1], rule[0]
    bits, weight, total = np.empty(most, integer.dtype), np.empty(most, det.dtype), np.empty(5, det.dtype)
    power = bits.view(det.dtype)
    for row in range(first, last):
        x1, y1, x2, y2, score = det[order[row]]
        voted[row, 0], voted[row, 1], voted[row, 2], voted[row, 3], voted[row, 4] = x1, y1, x2, y2, score
        c = label[order[row]]
        if c < 0 or c >= len(block_start) - 1:
            continue
        total[:] = 0
        # Neighbouring blocks that the box touches are one stretch.
        start = block_start[c]
        for b in range(block_start[c], block_start[c + 1] + 1):
            touched = b < block_start[c + 1] and (
                (bounds[2, b] - x1 + offset > 0)
                & (bounds[3, b] - y1 + offset > 0)
                & (x2 - bounds[0, b] + offset > 0)
                & (y2 - bounds[1, b] + offset > 0)
            )
            if not touched:
                if start < b:
                    _vote(voter, slice(start * BLOCK, b * BLOCK), (x1, y1, x2, y2), rule, bits, power, weight, total)
                start = b + 1
        if total[0] != 0:
            for side in range(4):
                voted[row, side] += total[side + 1] / total[0]


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
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (det_bboxes[0].dtype, mlvl_bboxes[0].dtype, mlvl_nms_scores[0].dtype)
    real, integer = (np.float64, np.int64) if wide else (np.float32, np.int32)
    # As torch rounds a number before it compares a tensor with it.
    threshold = real(torch.tensor(score_thr, dtype=mlvl_nms_scores[0].dtype).item())
    rule = real(offset), real(iou_thr), real(min(LOG2_E / sigma, float(np.finfo(real).max)))
    start = offsets(lengths(det_bboxes))
    voted, labels = np.empty((start[-1], 5), real), np.empty(start[-1], view(det_labels[0]).dtype)

    def vote_images(first: int, last: int, serial_below: int) -> None:
        for image in range(first, last):
            det, label = flat([det_bboxes[image]], real), flat([det_labels[image]], np.int64)
            rows = slice(start[image], start[image + 1])
            order = np.arange(len(label)) if keep_order else np.argsort(label, kind="stable")
            labels[rows] = label[order]
            voters = _gather(flat([mlvl_bboxes[image]], real), flat([mlvl_nms_scores[image]], real), threshold, label, rule[0])
            over_slices(_vote_rows, len(label), serial_below, order, det, label, *voters, rule, np.empty(0, integer), voted[rows])

    # Slices of images, or of the detections of one image.
    if len(det_bboxes) > 1:
        over_slices(vote_images, len(det_bboxes), 2, len(labels) + 1)
    else:
        vote_images(0, 1, SERIAL_ROWS)
    dtype = det_bboxes[0].dtype
    return tensor(voted.astype(np.float64 if dtype == torch.float64 else np.float32, copy=False), dtype), torch.from_numpy(labels)
