"""Non-maximum suppression for CPU tensors, image by image on all threads.

The candidates of an image come in the order of their scores. Each is compared with the boxes of its class that were kept, in
chunks of 32 boxes without a branch, until a box suppresses it. An image is finished when it has all detections that there is room
for. The soft forms pick the highest score again and again, and lower the other scores of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, array, at_most, offsets, rounded, tensor, view
from ._loops import compiled, cumulated, inner, over_bounds, shared_bounds

CHUNK = 32
#: Microseconds for an image between the compiled loops.
IN_PYTHON = 55.0


@compiled
def _candidates(scores: Any, threshold: Any, everything: bool) -> Any:
    """The entries, box * C + class, whose score is above the threshold."""
    found, n = np.empty(scores.size, np.int64), 0
    for i in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            found[n] = i * scores.shape[1] + c
            n += everything | (scores[i, c] > threshold)
    return found[:n]


@compiled
def _keys(score: Any, entry: Any) -> Any:
    """Integers in the order of the float32 scores, descending, NaN first, then of the entries."""
    bits, keys = score.view(np.uint32), np.empty(len(entry), np.uint64)
    for i in range(len(entry)):
        sign, magnitude = bits[i] >> np.uint32(31), bits[i] & np.uint32(0x7FFFFFFF)
        above = np.uint32(0x7FFFFFFF) - magnitude  # of the scores that are not negative: the higher, the smaller
        key = np.uint32(0x7FFFFFFF) + magnitude if sign else above
        keys[i] = (np.uint64(0 if magnitude > np.uint32(0x7F800000) else key) << np.uint64(32)) | np.uint64(entry[i])
    return keys


def _ordered(score: Array, entry: Array) -> Array:
    """The entries by score, descending, NaN first, equal ones by entry."""
    if score.dtype == np.float32 and (len(entry) == 0 or entry[-1] < 2**32):
        return (np.sort(_keys(score, entry)) & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return entry[np.lexsort((-score, ~np.isnan(score)))]


@compiled
def _groups(entry: Any, labels: Any, classes: int, class_agnostic: bool) -> tuple[Any, int]:
    """A number from 0 on for the class of each entry, and how many there may be. `labels`: of the boxes, dense, if given."""
    group, most = np.zeros(len(entry), np.int64), 0
    for i in range(len(entry)):
        if not class_agnostic:
            group[i] = labels[entry[i]] if len(labels) else entry[i] % classes
        most = max(most, group[i])
    return group, most + 1


def _dense(labels: Array) -> Array:
    """Any integers as numbers from 0 to fewer than their own number, or to not much more."""
    if labels.size and labels.min() >= 0 and labels.max() < 2 * labels.size + 1024:
        return labels.astype(np.int64)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


@inner
def _hits(kept: Any, chunk: Any, x1: Any, y1: Any, x2: Any, y2: Any, area: Any, limit: Any) -> Any:
    """Whether one of the chunk's boxes has an IoU above the limit with this one.

    Rounded as torchvision rounds; without area, or with NaN, it is NaN, which exceeds nothing.
    """
    zero, hits = kept.dtype.type(0), 0
    for i in range(CHUNK):
        width = max(min(kept[chunk, 2, i], x2) - max(kept[chunk, 0, i], x1), zero)
        height = max(min(kept[chunk, 3, i], y2) - max(kept[chunk, 1, i], y1), zero)
        overlap = width * height
        hits += overlap / (area + kept[chunk, 4, i] - overlap) > limit
    return hits > 0


@compiled
def _suppress(boxes: Any, order: Any, group: Any, groups: int, classes: int, limit: Any, picked: Any) -> int:
    """Entries of the detections, by score, into `picked`; how many there are."""
    real = boxes.dtype.type
    chunks = min(len(picked), len(order)) // CHUNK + min(groups, len(order)) + 1
    kept = np.empty((chunks, 5, CHUNK), boxes.dtype)
    # Chains of chunks: that of a group begins with its newest chunk, which alone may have room.
    newest, older, size = np.full(groups, -1), np.full(chunks, -1), np.zeros(chunks, np.int64)
    used = n = 0
    for rank in range(len(order)):
        if n == len(picked):
            break
        at, g = order[rank] // classes, group[rank]
        x1, y1, x2, y2 = boxes[at, 0], boxes[at, 1], boxes[at, 2], boxes[at, 3]
        area, chunk, suppressed = (x2 - x1) * (y2 - y1), newest[g], False
        while chunk >= 0 and not suppressed:
            suppressed = _hits(kept, np.uint64(chunk), x1, y1, x2, y2, area, limit)
            chunk = older[chunk]
        if suppressed:
            continue
        picked[n] = order[rank]
        n += 1
        chunk = newest[g]
        if chunk < 0 or size[chunk] == CHUNK:
            older[used] = chunk
            chunk = newest[g] = used
            used += 1
            # What is not there yet overlaps nothing.
            kept[chunk, :2], kept[chunk, 2:4], kept[chunk, 4] = real(np.inf), real(-np.inf), real(0)
        slot = size[chunk]
        kept[chunk, 0, slot], kept[chunk, 1, slot], kept[chunk, 2, slot], kept[chunk, 3, slot] = x1, y1, x2, y2
        kept[chunk, 4, slot] = area
        size[chunk] += 1
    return n


@inner
def _by_group(group: Any, groups: int) -> tuple[Any, Any]:
    """Positions in the order of the groups, within one as they were; where each group begins."""
    start = np.zeros(groups + 1, np.int64)
    for g in group:
        start[g + 1] += 1
    for g in range(groups):
        start[g + 1] += start[g]
    position, place = np.empty(len(group), np.int64), start.copy()
    for i in range(len(group)):
        position[place[group[i]]] = i
        place[group[i]] += 1
    return position, start


@inner
def _decay(boxes: Any, entry: Any, score: Any, first: int, last: int, best: int, classes: int, rule: Any) -> tuple[int, int]:
    """Let the scores first:last decay by their overlap with the box of the best one, which leaves, as do those that are too low.

    `rule`: whether Gaussian, the least IoU of the linear form, sigma, the least score. What remains moves to the front, in its
    order.

    Returns:
        the new `last`, and the position of the first of the highest scores.
    """
    real = score.dtype.type
    gaussian, limit, sigma, min_score = rule[0] != 0, real(rule[1]), real(rule[2]), real(rule[3])
    own = entry[best] // classes
    x1, y1, x2, y2 = boxes[own, 0], boxes[own, 1], boxes[own, 2], boxes[own, 3]
    area, end, highest = (x2 - x1) * (y2 - y1), first, first
    for i in range(first, last):
        at = entry[i] // classes
        width = max(min(boxes[at, 2], x2) - max(boxes[at, 0], x1), real(0))
        height = max(min(boxes[at, 3], y2) - max(boxes[at, 1], y1), real(0))
        overlap = width * height
        iou = overlap / ((boxes[at, 2] - boxes[at, 0]) * (boxes[at, 3] - boxes[at, 1]) + area - overlap)
        decayed = score[i]
        if gaussian:
            # No overlap where the ratio is no number.
            decayed *= np.exp(-(iou * iou) / sigma) if iou > 0 else real(1)
        elif iou > limit:
            decayed *= real(1) - iou
        if i != best and decayed > min_score:
            entry[end], score[end] = entry[i], decayed
            if decayed > score[highest]:
                highest = end
            end += 1
    return end, highest


@compiled
def _soften(
    boxes: Any, entry: Any, score: Any, group: Any, groups: int, classes: int, rule: Any, picked: Any, scores: Any
) -> int:
    """Entries of the detections and their scores, by score, into `picked` and `scores`; how many there are. `entry` ascends."""
    position, start = _by_group(group, groups)
    entry, score, end = entry[position], score[position], start[1:].copy()
    best = start[:-1].copy()
    for g in range(groups):
        for i in range(start[g], end[g]):
            if score[i] > score[best[g]]:
                best[g] = i
    n = 0
    while n < len(picked):
        chosen = -1
        for g in range(groups):
            if start[g] < end[g]:
                i, j = best[g], best[chosen]
                if chosen < 0 or score[i] > score[j] or (score[i] == score[j] and entry[i] < entry[j]):
                    chosen = g
        if chosen < 0:
            break
        picked[n], scores[n] = entry[best[chosen]], score[best[chosen]]
        n += 1
        end[chosen], best[chosen] = _decay(boxes, entry, score, start[chosen], end[chosen], best[chosen], classes, rule)
    return n


def _image(
    boxes: Array,
    scores: Array,
    labels: Array | None,
    options: tuple[Any, ...],
    rule: tuple[float, ...],
    entry: Array,
    score: Array,
) -> int:
    """Fill in the detections of one image, box * C + class and score, and give their number."""
    threshold, nms_pre, method, class_agnostic = options
    classes = scores.shape[1]
    found = _candidates(scores, threshold or 0.0, threshold is None)
    flat = scores.reshape(-1)
    found = found if method == "hard" else found[flat[found] > rule[3]]
    order = _ordered(flat[found], found) if method == "hard" or 0 < nms_pre < len(found) else found
    if nms_pre:
        order = order[:nms_pre]
    dense = np.empty(0, np.int64) if labels is None else _dense(labels)
    if method == "hard":
        group, groups = _groups(order, dense, classes, class_agnostic)
        number: int = _suppress(boxes, order, group, groups, classes, boxes.dtype.type(rule[1]), entry)
        score[:number] = flat[entry[:number]]
        return number
    order = np.sort(order)
    group, groups = _groups(order, dense, classes, class_agnostic)
    number = _soften(boxes, order, flat[order], group, groups, classes, rule, entry, score)
    return int(number)


def _costs(boxes: Array, classes: int, room: int, groups: int, method: str) -> Array:
    """Microseconds for the images of so many boxes: to sort the candidates, to pick the best, and to compare it with those of its
    class. Soft forms compare it with all of them, hard suppression with the few that are kept."""
    picks = np.minimum(boxes, room)
    compared = 2e-4 * picks if method == "hard" else 3.5e-3 * boxes
    costs: Array = boxes * (0.009 + 0.002 * classes) + picks * (0.05 + compared / groups)
    return costs


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    lengths: Sequence[int] | None,
    iou_threshold: float,
    score_thr: float | None,
    nms_pre: int,
    max_per_img: int,
    method: str,
    sigma: float,
    min_score: float,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 in (boxes.dtype, scores.dtype)
    real = np.float64 if wide else np.float32
    images, most = (boxes.shape[0], boxes.shape[1]) if lengths is None else (len(lengths), max(lengths))
    bounds, classes = offsets(lengths or [most] * images), scores.shape[-1]
    room = max_per_img or most * classes
    box = array(boxes, real).reshape(-1, 4)
    value = array(scores, real).reshape(len(box), classes)
    label = None if labels is None else view(labels).reshape(-1)
    threshold = None if score_thr is None else rounded(score_thr, scores.dtype)
    options = threshold, nms_pre, method, class_agnostic
    rule = float(method == "gaussian"), at_most(iou_threshold, real), sigma, min_score
    entry, score = np.zeros((images, room), np.int64), np.zeros((images, room), real)
    count = np.zeros(images, np.int64)

    def suppress_images(first: int, last: int) -> None:
        for i in range(first, last):
            own = slice(bounds[i], bounds[i + 1])
            own_label = None if label is None else label[own]
            count[i] = _image(box[own], value[own], own_label, options, rule, entry[i], score[i])

    groups = 1 if class_agnostic else max(classes if label is None else int(label.max(initial=0)) + 1, 1)
    costs = _costs(np.diff(bounds), classes, room, groups, method)
    over_bounds(suppress_images, shared_bounds(cumulated(costs), IN_PYTHON))
    there = np.arange(room) < count[:, None]
    index, column = np.divmod(entry, classes) if classes > 1 else (entry, np.zeros_like(entry))
    # Padding reads row 0: the first row of an image without boxes belongs to another image, or is behind all of them.
    rows = np.where(there, index + bounds[:-1, None], 0)
    kept = np.where(there[..., None], box[rows] if len(box) else np.zeros((images, room, 4), real), 0)
    if label is not None and len(label):
        column = label[rows].astype(np.int64)
    return (
        tensor(kept.astype(real), boxes.dtype),
        tensor(score, scores.dtype),
        torch.from_numpy(np.where(there, column, -1)),
        torch.from_numpy(np.where(there, index, -1)),
        torch.from_numpy(count),
    )
