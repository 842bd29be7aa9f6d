"""Weighted boxes fusion for CPU tensors. All threads share the images for sorting, and the classes of all images for clustering.

A box is compared with the fused boxes of its class in chunks of 32, without a branch in a chunk. Arithmetic is that of
`ensemble_boxes`, operation by operation: float64, but float32 for the sums of a cluster and what is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import AVERAGE, BOX_AND_MODEL, MAXIMUM, OVERFLOW, confidence_rule
from ._arrays import Array, array, offsets, rounded, tensor, view
from ._loops import compiled, inner, over_bounds, shared_bounds

CHUNK = 32
LARGEST = float(np.finfo(np.float32).max)  # weighted score: clusters keep them as float32
#: Microseconds for a box: to sort it, to find its cluster; and for an image, between the sorts.
SORTING, CLUSTERING, IN_PYTHON = 0.08, 0.09, 40.0


@compiled
def _prepare(first: int, last: int, bounds: Any, boxes: Any, scores: Any, weights: Any, threshold: Any, out: Any) -> None:
    """Order and clip the corners, weight the scores, and mark what stays. A part is one model of one image."""
    box, score, kept = out
    for part in range(first, last):
        weight = weights[part % len(weights)]
        for e in range(bounds[part], bounds[part + 1]):
            for axis in range(2):
                low, high = np.float64(boxes[e, axis]), np.float64(boxes[e, axis + 2])
                if high < low:
                    low, high = high, low
                box[e, axis], box[e, axis + 2] = min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)
            score[e] = np.float64(scores[e]) * weight
            there = (abs(score[e]) <= LARGEST) & (scores[e] >= threshold)  # also no NaN
            for side in range(4):
                there &= not np.isnan(boxes[e, side])
            kept[e] = there & ((box[e, 2] - box[e, 0]) * (box[e, 3] - box[e, 1]) != 0.0)


@inner
def _most_overlapped(fused: Any, clusters: int, x1: float, y1: float, x2: float, y2: float, iou_thr: float, overlaps: Any) -> int:
    """The fused box with the highest IoU, the first of equal ones; -1 if none exceeds the threshold."""
    area, best, match = (x2 - x1) * (y2 - y1), iou_thr, -1
    for chunk in range((clusters + CHUNK - 1) // CHUNK):
        hits = 0
        for i in range(CHUNK):
            width = max(min(fused[chunk, 2, i], x2) - max(fused[chunk, 0, i], x1), 0.0)
            height = max(min(fused[chunk, 3, i], y2) - max(fused[chunk, 1, i], y1), 0.0)
            overlap = width * height
            overlaps[i] = overlap / (fused[chunk, 4, i] + area - overlap)
            hits += overlaps[i] > best
        if hits:
            for i in range(CHUNK):
                if overlaps[i] > best:
                    best, match = overlaps[i], chunk * CHUNK + i
    return match


@inner
def _narrow(x: float) -> float:
    """Rounded to float32."""
    return np.float64(np.float32(x))


@inner
def _set_box(fused: Any, c: int, x1: float, y1: float, x2: float, y2: float) -> None:
    chunk, i = c // CHUNK, c % CHUNK
    fused[chunk, 0, i], fused[chunk, 1, i], fused[chunk, 2, i], fused[chunk, 3, i] = x1, y1, x2, y2
    fused[chunk, 4, i] = (x2 - x1) * (y2 - y1)


@inner
def _confidence(rule: int, mean: float, highest: float, n: int, weight: float, models: Any, weights: Any, total: float) -> Any:
    """The score of a cluster of n boxes. `mean` and `highest` are of their weighted scores, `weight` sums their weights."""
    if rule == MAXIMUM:
        return highest / weights.max()
    if rule == AVERAGE:
        return mean * min(len(weights), n) / total
    if rule == OVERFLOW:
        return mean * n / total
    present = absent = 0.0
    for t in range(len(weights)):
        if models >> np.uint64(t) & np.uint64(1):
            present += weights[t]
        else:
            absent += weights[t]
    if rule == BOX_AND_MODEL:
        return mean * n / weight * present / total
    return mean * n / (weight + absent)


@inner
def _cluster(order: Any, inputs: Any, weights: Any, iou_thr: float, rule: int, total: float, out: Any) -> int:
    """Form the clusters of a class. Its boxes are `order`. Write the fused boxes and scores, and return their number."""
    box, score, model = inputs
    boxes, scores = out
    size = len(order)
    fused = np.empty(((size + CHUNK - 1) // CHUNK, 5, CHUNK))
    # An empty place overlaps nothing.
    fused[:, :2], fused[:, 2:4], fused[:, 4] = np.inf, -np.inf, 0.0
    overlaps, sums = np.empty(CHUNK), np.zeros((size, 4), np.float32)
    conf, highest, weight = np.zeros(size), np.empty(size), np.zeros(size)
    number, models = np.zeros(size, np.int64), np.zeros(size, np.uint64)
    clusters, undefined = 0, -1
    for e in order:
        x1, y1, x2, y2 = box[e, 0], box[e, 1], box[e, 2], box[e, 3]
        # numpy takes the first NaN as the highest IoU.
        c = undefined if undefined >= 0 else _most_overlapped(fused, clusters, x1, y1, x2, y2, iou_thr, overlaps)
        if c < 0:
            c = clusters
            clusters += 1
            highest[c] = score[e]
            _set_box(fused, c, x1, y1, x2, y2)
        conf[c] += score[e]
        highest[c] = max(highest[c], score[e])
        weight[c] += weights[model[e]]
        number[c] += 1
        models[c] |= np.uint64(1) << np.uint64(model[e])
        for side in range(4):
            sums[c, side] = np.float32(np.float64(sums[c, side]) + score[e] * box[e, side])
        if number[c] > 1:
            _set_box(
                fused, c, _narrow(sums[c, 0] / conf[c]), _narrow(sums[c, 1] / conf[c]),
                _narrow(sums[c, 2] / conf[c]), _narrow(sums[c, 3] / conf[c]),
            )  # fmt: skip
            if np.isnan(fused[c // CHUNK, 4, c % CHUNK]):
                undefined = c
    for c in range(clusters):
        mean, most, sum_of_weights = conf[c] / number[c], highest[c], weight[c]
        if number[c] > 1:
            mean, most, sum_of_weights = _narrow(mean), _narrow(most), _narrow(sum_of_weights)
        scores[c] = _confidence(rule, mean, most, number[c], sum_of_weights, models[c], weights, total)
        for side in range(4):
            boxes[c, side] = fused[c // CHUNK, side, c % CHUNK]
    return clusters


@compiled
def _cluster_classes(
    first: int, last: int, start: Any, order: Any, inputs: Any, weights: Any, iou_thr: float, rule: int, total: float,
    out: Any, clusters: Any,
) -> None:  # fmt: skip
    boxes, scores = out
    for g in range(first, last):
        own = slice(start[g], start[g + 1])
        clusters[g] = _cluster(order[own], inputs, weights, iou_thr, rule, total, (boxes[own], scores[own]))


def _by_class(kept: Array, score: Array, label: Array) -> tuple[Array, Array]:
    """The boxes of an image by class, then by score, and of equal scores the later first. And whether a box begins a class."""
    entry = np.flatnonzero(kept)
    order = entry[np.lexsort((score[entry], label[entry]))[::-1]]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = label[order[1:]] != label[order[:-1]]
    return order, begins


def _in_order(score: Array, clusters: Array, order: Array, start: Array) -> Array:
    """The places of an image's clusters, by score. Of equal scores, later classes come first, then later clusters."""
    first = np.minimum.reduceat(order[: start[-1]], start[:-1])
    group = np.repeat(np.arange(len(clusters)), clusters)
    number = np.arange(len(group)) - np.repeat(np.cumsum(clusters) - clusters, clusters)
    place = start[group] + number
    ordered: Array = place[np.lexsort((number, first[group], score[place]))[::-1]]
    return ordered


def weighted_boxes_fusion(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    iou_thr: float,
    skip_box_thr: float,
    conf_type: str,
    allows_overflow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bounds = np.array(weights, np.float64), offsets(lengths)
    of_image = bounds[:: len(weight)]
    images, entries = len(of_image) - 1, int(bounds[-1])
    room, label = int(np.diff(of_image).max()), view(labels)
    model = np.repeat(np.tile(np.arange(len(weight)), images), lengths)
    box, score, kept = np.empty((entries, 4)), np.empty(entries), np.empty(entries, np.bool_)
    wide = [array(part, np.float64 if part.dtype == torch.float64 else np.float32) for part in (boxes, scores)]
    threshold = wide[1].dtype.type(rounded(skip_box_thr, scores.dtype))
    _prepare(0, len(lengths), bounds, *wide, weight, threshold, (box, score, kept))
    parts: list[Any] = [None] * images

    def sort_images(first: int, last: int) -> None:
        for i in range(first, last):
            own = slice(of_image[i], of_image[i + 1])
            order, begins = _by_class(kept[own], score[own], label[own])
            parts[i] = order + of_image[i], begins

    over_bounds(sort_images, shared_bounds(SORTING * of_image, IN_PYTHON))
    order, begins = (np.concatenate(column) for column in zip(*parts, strict=True))
    start = np.append(np.flatnonzero(begins), len(order))
    clusters, fused = np.zeros(len(start) - 1, np.int64), (np.empty((len(order), 4)), np.empty(len(order)))
    rule, total = confidence_rule(conf_type, allows_overflow), weight.sum()
    boxes_of_model = box, score, model
    over_bounds(
        _cluster_classes, shared_bounds(CLUSTERING * start),
        start, order, boxes_of_model, weight, iou_thr, rule, total, fused, clusters,
    )  # fmt: skip
    results = np.zeros((images, room, 4)), np.zeros((images, room)), np.full((images, room), -1), np.zeros(images, np.int64)
    groups = offsets([int(image_begins.sum()) for _, image_begins in parts])
    for i in range(images):
        own = slice(groups[i], groups[i + 1])
        place = _in_order(fused[1], clusters[own], order, start[groups[i] : groups[i + 1] + 1])
        n = results[3][i] = len(place)
        results[0][i, :n], results[1][i, :n], results[2][i, :n] = fused[0][place], fused[1][place], label[order[place]]
    return (
        tensor(results[0], boxes.dtype),
        tensor(results[1], scores.dtype),
        torch.from_numpy(results[2]),
        torch.from_numpy(results[3]),
    )
