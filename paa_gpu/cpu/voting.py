"""Score voting for CPU tensors: each class's voters gathered once, in blocks of neighbours; then detection by detection.

The candidates of a class, sorted so that neighbours of like size follow each other, are cut into blocks of 32. A detection skips
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

from ._arrays import Array, flat, tensor, view
from ._loops import compiled, compiled_sums, over_slices
from ._numeric import power_of_two

BLOCK = 32
CELLS = 16  # of the grid, along each side of what the detections span
SIZES = 4  # of boxes, each up to half as long as the one above

# Detections below which a second thread costs more than it saves, measured on 2 cores: a detection takes 1 us, handing over to a
# thread 100.
SERIAL_ROWS = 256

LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
LARGEST = {wide: float(np.finfo(real).max) for wide, real in ((False, np.float32), (True, np.float64))}
TAYLOR = tuple(1 / math.factorial(k) for k in range(14))


def _hilbert(side: int) -> Array:
    """The place of each cell [x, y] of a grid on a curve that goes from neighbour to neighbour; `side` is a power of two.

    A grid of twice the side is four of them, of which the first and the last are mirrored.
    """
    if side == 1:
        return np.zeros((1, 1), np.int64)
    part = _hilbert(side // 2)
    n = part.size
    return np.block([[part.T, part + n], [part.T[::-1, ::-1] + 3 * n, part + 2 * n]])


CURVE = _hilbert(CELLS)


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
def _candidates(boxes: Any, scores: Any, threshold: Any, classes: Any) -> Any:
    """The finite boxes with a score above the threshold in one of the classes."""
    found, n = np.empty(len(boxes), np.int64), 0
    for i in range(len(boxes)):
        some = False
        for k in range(len(classes)):
            some |= scores[i, classes[k]] > threshold
        found[n] = i
        n += some & _is_finite(boxes, i)
    return found[:n]


@compiled
def _within(place: Any) -> int:
    """A cell along one side; NaN, where the detections have no extent or one beyond the largest number, is the first."""
    return int(min(place, CELLS - 1)) if place > 0 else 0


@compiled
def _neighbours(boxes: Any, candidates: Any, det: Any) -> Any:
    """The candidates in an order in which neighbours of like size follow each other: by size, then along the curve.

    The grid is over what the centres of the detections span: candidates beyond are in a cell at its border.
    """
    real = boxes.dtype.type
    low, high, longest = np.full(2, real(np.inf)), np.full(2, real(-np.inf)), real(0)
    for i in range(len(det)):
        if _is_finite(det, i):
            for axis in range(2):
                centre = det[i, axis] + det[i, axis + 2]
                low[axis], high[axis] = min(low[axis], centre), max(high[axis], centre)
                longest = max(longest, det[i, axis + 2] - det[i, axis])
    scale_x, scale_y = CELLS / (high[0] - low[0]), CELLS / (high[1] - low[1])
    group, start = np.empty(len(candidates), np.int64), np.zeros(SIZES * CELLS * CELLS + 1, np.int64)
    for i in range(len(candidates)):
        at = candidates[i]
        x1, y1, x2, y2 = boxes[at, 0], boxes[at, 1], boxes[at, 2], boxes[at, 3]
        side, size = max(x2 - x1, y2 - y1), 0
        while size < SIZES - 1 and side < longest / (2 << size):
            size += 1
        across, down = _within((x1 + x2 - low[0]) * scale_x), _within((y1 + y2 - low[1]) * scale_y)
        group[i] = size * CELLS * CELLS + CURVE[across, down]
        start[group[i] + 1] += 1
    for g in range(1, len(start)):
        start[g] += start[g - 1]
    ordered = np.empty_like(candidates)
    for i in range(len(candidates)):
        ordered[start[group[i]]] = candidates[i]
        start[group[i]] += 1
    return ordered


@compiled
def _gather(boxes: Any, scores: Any, threshold: Any, det: Any, labels: Any, offset: Any) -> tuple[Any, Any, Any]:
    """The candidates of every class that a detection has.

    Returns:
        block_start [C + 1], the blocks of each class; voter [6, n * BLOCK], corners, area and score of the candidates, zeros
        behind the last one of a class; bounds [4, n], what the corners of each block span.
    """
    classes = _classes(labels, scores.shape[1])
    candidates = _neighbours(boxes, _candidates(boxes, scores, threshold, classes), det)
    size = np.zeros(scores.shape[1], np.int64)
    for i in candidates:
        for c in classes:
            size[c] += scores[i, c] > threshold
    block_start, place = np.zeros(len(size) + 1, np.int64), np.empty(len(size), np.int64)
    for c in range(len(size)):
        place[c] = block_start[c] * BLOCK
        block_start[c + 1] = block_start[c] + (size[c] + BLOCK - 1) // BLOCK

    voter = np.zeros((6, block_start[-1] * BLOCK), boxes.dtype)
    bounds = np.empty((4, block_start[-1]), boxes.dtype)
    bounds[:2], bounds[2:] = np.inf, -np.inf
    for i in candidates:
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = (x2 - x1 + offset) * (y2 - y1 + offset)
        for c in classes:
            if scores[i, c] > threshold:
                at = place[c]
                place[c] += 1
                voter[0, at], voter[1, at], voter[2, at], voter[3, at] = x1, y1, x2, y2
                voter[4, at], voter[5, at] = area, scores[i, c]
                b = at // BLOCK
                bounds[0, b], bounds[1, b] = min(bounds[0, b], x1), min(bounds[1, b], y1)
                bounds[2, b], bounds[3, b] = max(bounds[2, b], x2), max(bounds[3, b], y2)
    return block_start, voter, bounds


@compiled_sums
def _vote(first: Any, last: Any, voter: Any, box: Any, rule: Any, total: Any) -> None:
    """Add the weights of voter[:, first:last], and the offsets of their boxes times them, to total [5].

    `first` and `last` are unsigned: an index that may be negative may count from the end, and keeps a loop out of vector
    registers.
    """
    offset, iou_thr, scale = rule
    real, info = voter.dtype.type, np.finfo(voter.dtype)
    zero, half, one, tiny = real(0), real(0.5), real(1), real(1e-6)
    degree = 13 if info.bits == 64 else 6
    most = real(info.maxexp - 1)  # where no bit of the power is left
    x1, y1, x2, y2 = box
    own_area = (x2 - x1 + offset) * (y2 - y1 + offset)
    w = w1 = w2 = w3 = w4 = zero
    for i in range(first, last):
        width = max(min(voter[2, i], x2) - max(voter[0, i], x1) + offset, zero)
        height = max(min(voter[3, i], y2) - max(voter[1, i], y1) + offset, zero)
        intersection = width * height
        union = own_area + voter[4, i] - intersection
        # Comparisons, since a minimum or maximum may drop NaN or keep it: no IoU, and a power that is a number.
        iou = intersection / (tiny if union < tiny else union)
        exponent = (one - iou) * (one - iou) * scale
        exponent = exponent if exponent < most else most
        whole = np.int32(exponent + half)
        rest = (real(whole) - exponent) * real(LN_2)
        series = zero
        for k in range(degree, -1, -1):
            series = series * rest + real(TAYLOR[k])
        weight = series * power_of_two(-whole, one) * voter[5, i] if iou > iou_thr else zero
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
    offset = rule[0]
    total, touched = np.empty(5, det.dtype), np.empty(bounds.shape[1], np.bool_)
    for row in range(first, last):
        at = order[row]
        x1, y1, x2, y2 = det[at, 0], det[at, 1], det[at, 2], det[at, 3]
        voted[row, 0], voted[row, 1], voted[row, 2], voted[row, 3], voted[row, 4] = x1, y1, x2, y2, det[at, 4]
        c = label[at]
        if c < 0 or c >= len(block_start) - 1:
            continue
        total[:] = 0
        first_block, last_block = np.uint64(block_start[c]), np.uint64(block_start[c + 1])
        for b in range(first_block, last_block):
            across = (bounds[2, b] - x1 + offset > 0) & (x2 - bounds[0, b] + offset > 0)
            touched[b] = across & (bounds[3, b] - y1 + offset > 0) & (y2 - bounds[1, b] + offset > 0)
        # Neighbouring blocks that the box touches are one stretch.
        start = first_block
        for b in range(first_block, last_block + np.uint64(1)):
            if b == last_block or not touched[b]:
                if start < b:
                    stretch = start * np.uint64(BLOCK), b * np.uint64(BLOCK)
                    _vote(*stretch, voter, (x1, y1, x2, y2), rule, total)
                start = b + np.uint64(1)
        if total[0] != 0:
            for side in range(4):
                voted[row, side] += total[side + 1] / total[0]


@compiled
def _vote_image(boxes: Any, scores: Any, threshold: Any, det: Any, label: Any, order: Any, rule: Any, voted: Any) -> None:
    """An image on this thread, in one call: with few voters, what Python does in between would take longer than the loops."""
    voters = _gather(boxes, scores, threshold, det, label, rule[0])
    _vote_rows(0, len(order), order, det, label, *voters, rule, voted)


def _rounded(number: float, dtype: torch.dtype) -> Any:
    """A number as torch rounds it before it compares a tensor of this dtype with it; of the usual one without a tensor."""
    return np.float32(number) if dtype == torch.float32 else torch.tensor(number, dtype=dtype).item()


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
    images, dtype = len(det_bboxes), det_bboxes[0].dtype
    wide = torch.float64 in (dtype, mlvl_bboxes[0].dtype, mlvl_nms_scores[0].dtype)
    real = np.float64 if wide else np.float32
    threshold = real(_rounded(score_thr, mlvl_nms_scores[0].dtype))
    rule = real(offset), real(iou_thr), real(min(LOG2_E / sigma, LARGEST[wide]))

    def vote(image: int) -> tuple[Array, Array]:
        det, label = flat([det_bboxes[image]], real), flat([det_labels[image]], np.int64)
        boxes, scores = flat([mlvl_bboxes[image]], real), flat([mlvl_nms_scores[image]], real)
        order = np.arange(len(label)) if keep_order else np.argsort(label, kind="stable")
        voted = np.empty_like(det)
        if images > 1 or len(order) < SERIAL_ROWS:
            _vote_image(boxes, scores, threshold, det, label, order, rule, voted)
        else:
            voters = _gather(boxes, scores, threshold, det, label, rule[0])
            over_slices(_vote_rows, len(order), SERIAL_ROWS, order, det, label, *voters, rule, voted)
        return voted, label[order]

    results: list[Any] = [None] * images

    def vote_images(first: int, last: int) -> None:
        results[first:last] = map(vote, range(first, last))

    over_slices(vote_images, images, 2)
    voted, labels = results[0] if images == 1 else map(np.concatenate, zip(*results, strict=True))
    voted = voted.astype(np.float64 if dtype == torch.float64 else np.float32, copy=False)
    labels = labels.astype(view(det_labels[0]).dtype, copy=False)
    return tensor(voted, dtype), torch.from_numpy(labels)
