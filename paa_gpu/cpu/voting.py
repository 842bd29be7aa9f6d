"""Score voting for CPU tensors. Each class gathers its voters once, in blocks of neighbours. Then detection follows detection.

Boxes are sorted so that neighbours of similar size follow each other. The voters of a class are the boxes with a score above the
threshold that touch what its detections span. They are cut into blocks of 32. A detection skips the blocks whose bounding box it
does not touch. It goes through the others without a branch:

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
from ._loops import compiled, cumulated, inner, inner_with_sums, over_bounds, over_slices, shared_bounds
from ._numeric import negative_exp2

BLOCK = 32
CELLS = 16  # of the grid, along each side of what the detections span
SIZES = 2  # of boxes: up to half as long as the longest detection, and the others
TILE = 256  # boxes

# What the loops make are tables of int32 and of real numbers, also where one row is enough: numba compiles `np.empty` for each
# dtype and each number of dimensions, and a first call takes a twentieth of a second longer by each.

# Detections below which a second thread costs more than it saves, measured on 2 cores: a detection takes 1 us, handing over to a
# thread 100.
SERIAL_ROWS = 256

#: Microseconds for an image of several between the compiled loops.
IN_PYTHON = 40.0


def _hilbert(side: int) -> Array:
    """The place of each cell [x, y] of a grid on a curve that goes from neighbour to neighbour; `side` is a power of two.

    A grid of twice the side is four of them, of which the first and the last are mirrored.
    """
    if side == 1:
        return np.zeros((1, 1), np.int64)
    part = _hilbert(side // 2)
    n = part.size
    return np.block([[part.T, part + n], [part.T[::-1, ::-1] + 3 * n, part + 2 * n]])


# The groups in the order in which they lie: those of each size [x, y] along the curve, then one for boxes that are not finite.
GRID = CELLS**2  # not in a loop, where numba would compile a function for it
GROUPS = SIZES * GRID
CURVE = np.append(_hilbert(CELLS).reshape(1, -1) + GRID * np.arange(SIZES)[:, None], GROUPS)


@inner
def _is_finite(boxes: Any, i: int) -> Any:
    # Not `boxes[i]`, here and below: a view of a row costs more than what is done with it.
    return np.isfinite(boxes[i, 0]) & np.isfinite(boxes[i, 1]) & np.isfinite(boxes[i, 2]) & np.isfinite(boxes[i, 3])


@inner
def _classes(first: int, last: int, order: Any, det: Any, label: Any, all_classes: int, offset: Any) -> tuple[Any, ...]:
    """The classes of some detections.

    Returns:
        number [C], the number of a class among these, -1 if no detection has it; the classes; size [C], 0 for each class; span
        [C, 4], what the detections of each of these classes span.
    """
    real, n = det.dtype.type, 0
    table, span = np.empty((3, all_classes), np.int32), np.empty((all_classes, 4), det.dtype)
    number, classes, size = table[0], table[1], table[2]
    for c in range(all_classes):
        number[c], size[c] = -1, 0
    for row in range(first, last):
        at = order[row]
        c = label[at]
        if 0 <= c < all_classes and _is_finite(det, at):
            if number[c] < 0:
                number[c], classes[n] = n, c
                for axis in range(2):
                    span[n, axis], span[n, axis + 2] = real(np.inf), real(-np.inf)
                n += 1
            k = number[c]
            for axis in range(2):
                span[k, axis] = min(span[k, axis], det[at, axis])
                span[k, axis + 2] = max(span[k, axis + 2], det[at, axis + 2] + offset)
    return number, classes[:n], size, span


@inner
def _within(place: Any, zero: Any) -> Any:
    """A cell along one side; NaN, where the detections have no extent or one beyond the largest number, is the first."""
    place = place if place > zero else zero
    return np.int32(place) if place < CELLS else np.int32(CELLS - 1)


@inner
def _neighbours(boxes: Any, det: Any, label: Any, all_classes: int) -> Any:
    """The finite boxes in an order in which neighbours of like size follow each other: by size, then along the curve.

    The grid is over what the centres of the detections span: boxes beyond are in a cell at its border. Detections of no class,
    as padding is, count for nothing. `boxes` [4 * n] is flat: the compiler does not know how long a row is, and a loop over rows
    of an unknown length takes one at a time.
    """
    real, zero = boxes.dtype.type, boxes.dtype.type(0)
    left = top = real(np.inf)
    right = bottom = real(-np.inf)
    longest = zero
    for i in range(len(det)):
        if 0 <= label[i] < all_classes and _is_finite(det, i):
            x1, y1, x2, y2 = det[i, 0], det[i, 1], det[i, 2], det[i, 3]
            left, top, right, bottom = min(left, x1 + x2), min(top, y1 + y2), max(right, x1 + x2), max(bottom, y1 + y2)
            longest = max(longest, max(x2 - x1, y2 - y1))  # two by two: numba compiles a function for each number
    scale_x, scale_y, half = real(CELLS) / (right - left), real(CELLS) / (bottom - top), longest / real(2)
    n = len(boxes) // 4
    table = np.empty((2, n), np.int32)
    group, ordered, start = table[0], table[1], np.empty((1, GROUPS + 2), np.int32)[0]
    for g in range(len(start)):
        start[g] = 0
    for i in range(n):
        x1, y1, x2, y2 = boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]
        cell = _within((x1 + x2 - left) * scale_x, zero) * np.int32(CELLS) + _within((y1 + y2 - top) * scale_y, zero)
        small = (x2 - x1 < half) & (y2 - y1 < half)
        finite = np.isfinite(x1) & np.isfinite(y1) & np.isfinite(x2) & np.isfinite(y2)
        group[i] = (cell + np.int32(GRID) if small else cell) if finite else np.int32(GROUPS)
    for i in range(n):
        start[CURVE[group[i]] + 1] += 1
    for g in range(GROUPS):
        start[g + 1] += start[g]
    number = start[GROUPS]
    for i in range(n):
        g = CURVE[group[i]]
        ordered[start[g]] = i
        start[g] += 1
    return ordered[:number]


@inner
def _corners(boxes: Any, offset: Any, ordered: Any) -> Any:
    """Corners and area [5, n] of the boxes in this order."""
    corner = np.empty((5, len(ordered)), boxes.dtype)
    for i in range(np.uint64(len(ordered))):
        at = ordered[i]
        x1, y1, x2, y2 = boxes[4 * at], boxes[4 * at + 1], boxes[4 * at + 2] + offset, boxes[4 * at + 3] + offset
        corner[0, i], corner[1, i], corner[2, i], corner[3, i] = x1, y1, x2, y2
        corner[4, i] = (x2 - x1) * (y2 - y1)
    return corner


@inner
def _span(corner: Any, first: Any, last: Any) -> tuple[Any, Any, Any, Any]:
    """What the boxes corner[:, first:last] span."""
    left = top = corner.dtype.type(np.inf)
    right = bottom = corner.dtype.type(-np.inf)
    for i in range(first, last):
        left, top = min(left, corner[0, i]), min(top, corner[1, i])
        right, bottom = max(right, corner[2, i]), max(bottom, corner[3, i])
    return left, top, right, bottom


@inner
def _candidates(
    boxes: Any, scores: Any, all_classes: int, threshold: Any, offset: Any, ordered: Any, classes: Any, size: Any, span: Any
) -> tuple[Any, Any, Any]:
    """The boxes in this order, and where they are candidates: their score is above the threshold, and they touch what the
    detections of the class span. `boxes` [4 * n] and `scores` [n * all_classes] are flat.

    Returns:
        corner [5, n], corners and area of the boxes; index and score [classes, n + 1] of the candidates of each class. How many
        these are goes to `size`.
    """
    n = np.uint64(len(ordered))
    corner, row = _corners(boxes, offset, ordered), np.uint64(all_classes)
    # One place more than there are boxes: what is no candidate is written behind those that are.
    lists = (len(classes), len(ordered) + 1)
    index, score = np.empty(lists, np.int32), np.empty(lists, boxes.dtype)
    own, kept = np.empty((1, TILE), boxes.dtype)[0], np.empty((1, TILE), np.int32)[0]
    # By tiles whose scores fit into a second-level cache, since a class has one number in each row of them. A class skips a tile
    # that lies beside its detections. A class that is alone has detections almost everywhere, so nobody looks for such a tile.
    # Unsigned: an index that may be negative takes a branch. One loop after the other, so that the first two fill vector
    # registers. The third takes one box at a time, and stores no more than its index.
    x_min = y_min = boxes.dtype.type(-np.inf)
    x_max = y_max = boxes.dtype.type(np.inf)
    for first in range(np.uint64(0), n, np.uint64(TILE)):
        tile = min(np.uint64(TILE), n - first)
        if len(classes) > 1:
            x_min, y_min, x_max, y_max = _span(corner, first, first + tile)
        for k in range(np.uint64(len(classes))):
            c, left, top, right, bottom = np.uint64(classes[k]), span[k, 0], span[k, 1], span[k, 2], span[k, 3]
            if not ((right > x_min) & (x_max > left) & (bottom > y_min) & (y_max > top)):
                continue
            for j in range(tile):
                own[j] = scores[np.uint64(ordered[first + j]) * row + c]
            for j in range(tile):
                i = first + j
                across = (right > corner[0, i]) & (corner[2, i] > left)
                kept[j] = across & (bottom > corner[1, i]) & (corner[3, i] > top) & (own[j] > threshold)
            start = found = np.uint64(size[k])
            for j in range(tile):
                index[k, found] = first + j
                found += np.uint64(kept[j])
            for at in range(start, found):
                score[k, at] = own[np.uint64(index[k, at]) - first]
            size[k] = found
    return corner, index, score


@inner
def _gather(corner: Any, index: Any, score: Any, size: int, voter: Any, bounds: Any) -> int:
    """The candidates of a class in their order, and zeros behind the last one, up to the end of its block.

    They go to voter [6, blocks * BLOCK], corners, area and score; what the corners of each block span goes to bounds [4, blocks].
    Returns how many blocks there are.
    """
    real, blocks, stop = corner.dtype.type, (size + BLOCK - 1) // BLOCK, np.uint64(size)
    for b in range(blocks):
        left = top = real(np.inf)
        right = bottom = real(-np.inf)
        for at in range(np.uint64(b * BLOCK), min(np.uint64((b + 1) * BLOCK), stop)):
            box = np.uint64(index[at])
            for side in range(5):
                voter[side, at] = corner[side, box]
            voter[5, at] = score[at]
            left, top = min(left, voter[0, at]), min(top, voter[1, at])
            right, bottom = max(right, voter[2, at]), max(bottom, voter[3, at])
        bounds[0, b], bounds[1, b], bounds[2, b], bounds[3, b] = left, top, right, bottom
    for side in range(6):
        for at in range(stop, np.uint64(blocks * BLOCK)):
            voter[side, at] = 0
    return blocks


@inner_with_sums
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


@inner
def _touched(box: Any, bounds: Any, blocks: Any, touched: Any, edge: Any) -> int:
    """The stretches of neighbouring blocks that a box touches, from one edge to the next, and the number of edges.

    Without branches: the processor cannot foretell them. `touched` has room for two more blocks, which are not touched.
    """
    x1, y1, x2, y2 = box
    one = np.uint64(1)
    for b in range(blocks):
        across = (bounds[2, b] > x1) & (x2 > bounds[0, b])
        touched[b + one] = across & (bounds[3, b] > y1) & (y2 > bounds[1, b])
    touched[blocks + one] = False
    edges = 0
    for b in range(blocks + one):
        edge[edges] = b
        edges += touched[b] != touched[b + one]
    return edges


@inner
def _room(boxes: int, real: Any) -> tuple[Any, Any, Any, Any, Any]:
    """What `_vote_image` needs for itself: voter and bounds for as many voters as boxes, total, touched and edge."""
    blocks = (boxes + BLOCK - 1) // BLOCK
    voter, bounds, total = np.empty((6, blocks * BLOCK), real), np.empty((4, blocks), real), np.empty((1, 5), real)[0]
    table = np.empty((2, blocks + 2), np.int32)
    touched, edge = table[0], table[1]
    touched[0] = False
    return voter, bounds, total, touched, edge


@compiled
def _vote_image(
    first: int, last: int, boxes: Any, scores: Any, all_classes: int, det: Any, label: Any, order: Any, score_thr: float,
    least_iou: float, scale: float, offset: float, voted: Any,
) -> None:  # fmt: skip
    """voted[row] = the box of detection order[row], and its score, for some of the rows of an image.

    Detections come class by class. A class may have other rows too: what its detections span decides which boxes are its voters,
    and in which order they are added up. The voters of a class are gathered at its first detection, and lie where those of the
    class before it lay: they stay in the cache. All is in one call: with few voters, what Python does in between would take
    longer than the loops.
    """
    real = det.dtype.type
    pixel = real(offset)
    begin, end = first, last
    while begin > 0 and label[order[begin - 1]] == label[order[first]]:
        begin -= 1
    while end < len(order) and label[order[end]] == label[order[last - 1]]:
        end += 1
    number, classes, size, span = _classes(begin, end, order, det, label, all_classes, pixel)
    ordered = _neighbours(boxes, det, label, all_classes)
    corner, index, score = _candidates(boxes, scores, all_classes, real(score_thr), pixel, ordered, classes, size, span)
    voter, bounds, total, touched, edge = _room(len(ordered), det.dtype)
    gathered, blocks = -1, 0
    for row in range(first, last):
        at = order[row]
        for side in range(5):
            voted[row, side], total[side] = det[at, side], 0
        k = number[label[at]] if 0 <= label[at] < all_classes else -1
        if k < 0:
            continue
        if k != gathered:
            gathered, blocks = k, _gather(corner, index[k], score[k], size[k], voter, bounds)
        box = (det[at, 0], det[at, 1], det[at, 2] + pixel, det[at, 3] + pixel)
        edges = _touched(box, bounds, np.uint64(blocks), touched, edge)
        for e in range(0, edges, 2):
            start, stop = np.uint64(edge[e]), np.uint64(edge[e + 1])
            _vote(start * np.uint64(BLOCK), stop * np.uint64(BLOCK), voter, box, real(least_iou), real(scale), total)
        if total[0] != 0:
            for side in range(4):
                voted[row, side] += total[side + 1] / total[0]


def _image(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor,
    rule: tuple[float, float, float, float], keep_order: bool, dtype: Any, alone: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The voted boxes and the labels of an image, on all threads if it is alone. `rule`: score_thr, least_iou, scale, offset.

    Detections are shared by class, as is the gathering of their voters.
    """
    det, boxes, scores = array(det_bboxes, dtype), array(mlvl_bboxes, dtype), array(mlvl_nms_scores, dtype)
    labels = view(det_labels)
    label = np.ascontiguousarray(labels, np.int64)
    order = label.argsort(kind="stable")
    voted = np.empty_like(det)
    args = boxes.reshape(-1), scores.reshape(-1), scores.shape[1], det, label, order, *rule, voted
    over_slices(_vote_image, len(order), SERIAL_ROWS if alone else len(order) + 1, *args)
    if keep_order:
        in_order = np.empty_like(voted)
        in_order[order] = voted
        return in_order, labels.copy()
    return voted, labels[order]


def _cost(detections: int, boxes: int, classes: int) -> float:
    """Microseconds to vote in an image: to read the scores of the detections' classes, to gather voters and to look at them."""
    return 0.15 * detections + boxes * (0.01 + 8e-4 * min(detections, classes) + 1e-4 * detections)


@functools.lru_cache
def _weights(iou_thr: float, sigma: float, dtype: Any) -> tuple[float, float]:
    """(least_iou, scale): weights are 2^-((1 - IoU) * scale)^2 above least_iou, and 0 up to it.

    least_iou is iou_thr, or more where weights would be below the smallest normal number. The scale is limited. So an IoU that
    differs from 1 only by rounding still has a finite weight above 0.
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
    inside = (label >= 0) & (label < all_classes)
    classes, among = np.unique(label[inside]), np.full(len(label), -1)
    among[inside] = np.searchsorted(classes, label[inside])
    candidates: tuple[list[Array], list[Array]] = [], []
    for box, score, weight in zip(boxes, scores, weights, strict=True):
        own = array(score, dtype)[:, classes]
        above = own > threshold
        found = above.any(1)
        candidates[0].append(array(box, dtype)[found])
        candidates[1].append(np.where(above[found], own[found] * dtype(weight), dtype(-np.inf)))
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

        pools = len(weights or [0])
        columns = zip(det_labels, mlvl_nms_scores[::pools], strict=True)
        costs = [_cost(label.shape[0], pools * score.shape[0], score.shape[1]) for label, score in columns]
        over_bounds(vote_images, shared_bounds(cumulated(costs), IN_PYTHON))
        voted, labels = map(np.concatenate, zip(*results, strict=True))
    return tensor(voted, dtype), torch.from_numpy(labels)


def score_voting_padded(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    if det_bboxes.shape[0] == 0:
        return det_bboxes.clone(), det_labels.clone()
    det, label, boxes, scores = (list(column.unbind()) for column in (det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores))
    voted, labels = score_voting(det, label, boxes, scores, *options)
    return voted.view(det_bboxes.shape), labels.view(det_labels.shape)
