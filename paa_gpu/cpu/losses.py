"""Losses of the potential positives for CPU tensors, in spans of one level of an image, class by class.

A map holds a channel of all locations, then the next channel. A span therefore reads channel by channel: its potential positives
are neighbours, and share the memory that the processor fetches. So the classes are the outer loop, and the loops over a span fill
vector registers however many classes there are.

s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
focal = sum over the classes of weight * s(z) * sigmoid(z)^gamma, weight = alpha for that class, 1 - alpha for the others
box   = weight * (1 - GIoU) of the decoded box, or weight * |delta - delta of the target| summed over the deltas

Focal losses are in the dtype of the result, their sum over the classes and all that follows in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from .._ops import box_numbers, empty_losses
from ._arrays import Array, array, flat, lengths, offsets
from ._loops import HANDING_OVER, compiled, inner, inner_fused, over_slices
from ._numeric import log1p_of_part, negative_exp

# Anchors whose order does not matter: they are a cache line of float32 maps.
STRETCH = 16

# Potential positives of a span. What the loops over them read again and again fits into a first-level cache.
SPAN = 512

# Threads share whole parts of so many potential positives. For one part, a second thread costs more than it saves.
PART = 512

# Levels of maps that a tuple has room for, or twice as many, and so on.
LEVELS = 6

#: Microseconds for an image between the compiled loops.
IN_PYTHON = 25.0

# A logit so far from zero that its focal loss is zero.
FAR = 1e4

# Classes whose losses are summed in the dtype of the maps, before the sum goes on in float64.
CLASSES = 8


def _number(value: Any) -> Any:
    """A value of a map as a number: half precision comes as its bits, those of float16 as int16, those of bfloat16 as uint16."""
    return value


@overload(_number)
def _number_of(value: Any) -> Any:
    def same(value: Any) -> Any:
        return value

    def of_bfloat16(value: Any) -> Any:  # the upper half of a float32
        return np.int32(np.int32(value) << 16).view(np.float32)

    def of_float16(value: Any) -> Any:
        # Shifted, the digits are where float32 has them. The exponent is too small by 112, and the largest one means no number.
        size = np.int32((np.int32(value) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
        bits = np.float32(size).view(np.int32) | (0x7F800000 if size >= 65536 else 0)
        return np.int32(bits | (np.int32(value) & 0x8000) << 16).view(np.float32)

    return {numba.uint16: of_bfloat16, numba.int16: of_float16}.get(value, same)


@inner_fused
def _focal_of_class(logits: Any, numbers: Any, total: Any) -> None:
    """Add the focal losses of a class, without their weight, to `total` [n].

    The logits are negated where the class is the label's. `numbers` are gamma, 0 and 1 in the dtype of the logits.
    """
    gamma, zero, one = numbers
    far = logits.dtype.type(FAR)  # not beyond: infinity times a gamma of 0 would be NaN
    if gamma == 2:  # the usual one, which needs a square and no second exponential
        for i in range(len(logits)):
            z = logits[i]
            e = negative_exp(abs(z))
            p = (one if z > zero else e) / (one + e)
            total[i] += (max(z, zero) + log1p_of_part(e)) * (p * p)
    else:
        for i in range(len(logits)):
            z = logits[i]
            log = log1p_of_part(negative_exp(abs(z)))
            of_other = max(-z, zero) + log
            total[i] += (max(z, zero) + log) * negative_exp(gamma * (far if of_other > far else of_other))


@inner
def _focal(source: Any, place: Any, stride: Any, label: Any, last: Any, numbers: Any, alpha: float, loss: Any, like: Any) -> None:
    """The focal losses [n] of a span, in the dtype of `like` until they are summed over classes.

    In the memory `source`, its logits of the first class lie at `place` [n], those of the next class `stride` further on. The
    logits of its labels get a loop of their own. In their place among the others comes a logit whose loss is zero: a choice by
    the label inside the loops would keep them out of vector registers. `last` [C], the last one with a label, is room.
    """
    logits, part = np.empty(len(place), like.dtype), np.empty(len(place), like.dtype)
    before = np.empty(len(place), np.int64)  # the one before with the same label
    part[:], last[:] = 0, -1
    for i in range(len(place)):
        logits[i] = -FAR
        if 0 <= label[i] < len(last):
            logits[i] = -_number(source[place[i] + np.uint64(label[i] * stride)])
            before[i], last[label[i]] = last[label[i]], i
    _focal_of_class(logits, numbers, part)
    for i in range(len(loss)):
        loss[i] = alpha * part[i]
    for first in range(0, len(last), CLASSES):
        part[:] = 0
        for c in range(first, min(first + CLASSES, len(last))):
            shift = np.uint64(c * stride)
            for i in range(len(place)):
                logits[i] = _number(source[place[i] + shift])
            i = last[c]
            while i >= 0:
                logits[i] = -FAR
                i = before[i]
            _focal_of_class(logits, numbers, part)
        for i in range(len(loss)):
            loss[i] += (1 - alpha) * part[i]


@inner
def _decode_side(low: float, high: float, shift: float, scale: float, least: float, most: float) -> tuple[float, float]:
    """The ends of a side of the anchor, moved and scaled; `least`, `most`: of the logarithm of the scale."""
    scale = most if scale > most else least if scale < least else scale
    centre = (low + high) * 0.5 + (high - low) * shift
    part = negative_exp(abs(scale))
    half = (high - low) * 0.5 * (1 / part if scale > 0 else part)
    return centre - half, centre + half


@inner
def _giou_losses(boxes: Any, deltas: Any, targets: Any, weights: Any, stds: Any, numbers: Any, loss: Any) -> None:
    """Weight * (1 - GIoU) of decoded boxes [4, n]; NaN where a corner is NaN."""
    least, most, least_area, added_area = numbers
    for i in range(len(loss)):
        x1, x2 = _decode_side(boxes[0, i], boxes[2, i], deltas[0, i] * stds[0], deltas[2, i] * stds[2], least, most)
        y1, y2 = _decode_side(boxes[1, i], boxes[3, i], deltas[1, i] * stds[1], deltas[3, i] * stds[3], least, most)
        target_x1, target_y1, target_x2, target_y2 = targets[0, i], targets[1, i], targets[2, i], targets[3, i]
        overlap = max(min(x2, target_x2) - max(x1, target_x1), 0.0) * max(min(y2, target_y2) - max(y1, target_y1), 0.0)
        union = (x2 - x1) * (y2 - y1) + (target_x2 - target_x1) * (target_y2 - target_y1) - overlap
        union = least_area if union < least_area else union
        enclosing = max(max(x2, target_x2) - min(x1, target_x1), 0.0) * max(max(y2, target_y2) - min(y1, target_y1), 0.0)
        enclosing = least_area if enclosing < least_area else enclosing
        giou = overlap / (union + added_area) - (enclosing - union) / (enclosing + added_area)
        loss[i] = (weights[0, i] + weights[1, i] + weights[2, i] + weights[3, i]) * 0.25 * (1 - giou)


@inner
def _side_difference(low: float, high: float, target_low: float, target_high: float) -> tuple[float, float]:
    """The shift and the logarithm of the scale that take a side of the anchor to that of the target."""
    size, target_size = high - low, target_high - target_low
    return (target_low + target_high - low - high) * 0.5 / size, math.log(target_size / size)


@inner
def _l1_losses(boxes: Any, deltas: Any, targets: Any, weights: Any, stds: Any, loss: Any) -> None:
    """Weight * |delta - delta of the target|, summed over the deltas [4, n]."""
    for i in range(len(loss)):
        dx, dw = _side_difference(boxes[0, i], boxes[2, i], targets[0, i], targets[2, i])
        dy, dh = _side_difference(boxes[1, i], boxes[3, i], targets[1, i], targets[3, i])
        x, y = weights[0, i] * abs(deltas[0, i] - dx / stds[0]), weights[1, i] * abs(deltas[1, i] - dy / stds[1])
        w, h = weights[2, i] * abs(deltas[2, i] - dw / stds[2]), weights[3, i] * abs(deltas[3, i] - dh / stds[3])
        loss[i] = x + y + w + h


@inner
def _taken(values: Any, place: Any) -> Any:
    """The values at `place` [n]."""
    taken = np.empty(len(place), np.int64)
    for i in range(len(place)):
        taken[i] = values[place[i]]
    return taken


@inner
def _columns(rows: Any, place: Any, first: int) -> Any:
    """The rows [n, 4] at `place` [n], counted from `first`, as columns [4, n]."""
    columns = np.empty((4, len(place)))
    for i in range(len(place)):
        row = rows[place[i] - first]
        columns[0, i], columns[1, i], columns[2, i], columns[3, i] = row[0], row[1], row[2], row[3]
    return columns


@inner
def _places(anchor: Any, first: int, image: int, layout: Any, channels: int, places: Any) -> None:
    """Where the first channels of the anchors [n] of a level lie in the memories of the maps [2, n] of scores and of deltas.

    `first`: the level's first anchor. `layout`: the anchors of a location, the width, and the strides of both maps. Places are
    unsigned: an index that may be negative may count from the end, and takes a branch.
    """
    per_location, width = np.uint32(layout[0]), np.uint32(layout[1])
    for i in range(len(anchor)):
        cell = np.uint32(anchor[i] - first)
        location = cell // per_location
        of_location, y = cell - location * per_location, location // width
        x = location - y * width
        places[0, i] = image * layout[2] + of_location * channels * layout[3] + y * layout[4] + x * layout[5]
        places[1, i] = image * layout[6] + of_location * 4 * layout[7] + y * layout[8] + x * layout[9]


@compiled
def _losses(
    levels: Any,
    image: int,
    targets: Any,
    inds: Any,
    order: Any,
    bounds: Any,
    begin: int,
    end: int,
    classes: int,
    options: Any,
    losses: Any,
) -> None:
    """The losses of the potential positives `begin` to `end` in `order`, as far as they are of an image.

    `levels`: per level the scores, deltas and anchors, its layout (see `_places`), and its first anchor. `bounds` [L + 1]: where
    the levels begin and end in `order`. `targets`: the label of each anchor, its weight, box, and weights of the box.
    """
    scores, deltas, anchors, layouts, first = levels
    labels, label_weights, target_boxes, box_weights = targets
    focal_numbers, alpha, loss_cls_weight, loss_bbox_weight, stds, box_numbers, of_deltas = options
    last = np.empty(classes, np.int64)
    for level in range(len(bounds) - 1):
        stop = min(bounds[level + 1], end)
        for start in range(max(bounds[level], begin), stop, SPAN):
            source = order[start : min(start + SPAN, stop)]
            anchor = _taken(inds, source)
            places = np.empty((2, len(source)), np.uint64)
            _places(anchor, first[level], image, layouts[level], classes, places)
            focal, box = np.empty(len(source)), np.empty(len(source))
            label = _taken(labels, anchor)
            _focal(scores[level], places[0], layouts[level, 3], label, last, focal_numbers, alpha, focal, losses)
            boxes = _columns(anchors[level], anchor, first[level])
            delta = np.empty((4, len(source)))
            for side in range(4):
                for i in range(len(source)):
                    delta[side, i] = _number(deltas[level][places[1, i] + np.uint64(side * layouts[level, 7])])
            target, weights = _columns(target_boxes, anchor, 0), _columns(box_weights, anchor, 0)
            if of_deltas:
                _l1_losses(boxes, delta, target, weights, stds, box)
            else:
                _giou_losses(boxes, delta, target, weights, stds, box_numbers, box)
            for i in range(len(source)):
                label_weight = label_weights[anchor[i]]
                losses[source[i]] = loss_cls_weight * label_weight * focal[i] + loss_bbox_weight * box[i]


@compiled
def _by_level(inds: Any, images: Any, first: Any, order: Any, bounds: Any) -> None:
    """Order the potential positives of each image that are in range by levels, and these by stretches of anchors.

    Within a stretch the order does not matter: its cells lie in the same cache lines. `images` [N + 1], `first` [L + 1]: where
    each image begins among the potential positives, and each level among the anchors, and the last one ends. Fills `order` [P],
    and `bounds` [N, L + 1] with where the levels begin and end in it.
    """
    before, stretch = np.empty(len(first), np.int64), np.empty(len(inds), np.int64)
    before[0] = 0
    for level in range(len(first) - 1):
        before[level + 1] = before[level] + (first[level + 1] - first[level] + STRETCH - 1) // STRETCH
    start = np.empty(before[-1] + 1, np.int64)
    for image in range(len(images) - 1):
        start[:] = 0
        for p in range(images[image], images[image + 1]):
            stretch[p] = -1
            if 0 <= inds[p] < first[-1]:
                level = 0
                while inds[p] >= first[level + 1]:
                    level += 1
                stretch[p] = before[level] + (inds[p] - first[level]) // STRETCH
                start[stretch[p] + 1] += 1
        start[0] = images[image]
        for number in range(len(start) - 1):
            start[number + 1] += start[number]
        for level in range(len(first)):
            bounds[image, level] = start[before[level]]
        for p in range(images[image], images[image + 1]):
            if stretch[p] >= 0:
                order[start[stretch[p]]] = p
                start[stretch[p]] += 1


def _filled(levels: Iterable[Array]) -> tuple[Array, ...]:
    """The levels, and the first one again in the places that are left: numba compiles a loop for each length of a tuple."""
    arrays = (*levels,)
    return arrays + arrays[:1] * (-len(arrays) % LEVELS)


def _memory(level: Tensor) -> Array:
    """A map from its first element to its last, whatever lies between; half precision as `_number` takes it."""
    if not level.is_contiguous():
        size = 1 + sum((size - 1) * stride for size, stride in zip(level.shape, level.stride(), strict=True))
        level = level.as_strided((size,), (1,))  # an empty map is contiguous
    if level.itemsize > 2:
        return level.numpy().ravel()
    bits = level.view(torch.int16).numpy().ravel()
    return bits.view(np.uint16) if level.dtype == torch.bfloat16 else bits


def candidate_losses(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_target: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    gamma: float,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Sequence[float],
    wh_ratio_clip: float,
    box_loss: str,
    convention: str,
) -> Tensor:
    losses = empty_losses(cls_scores[0], bbox_preds[0], label_weight[0], pos_inds)
    inds, classes = flat(pos_inds, np.int64), cls_scores[0].shape[1] * 4 // bbox_preds[0].shape[1]
    first, images = offsets(lengths(anchors)), offsets(lengths(pos_inds))
    order, bounds = np.empty(len(inds), np.int64), np.empty((len(pos_inds), len(first)), np.int64)
    # In the order of the memory of the maps, which the processor then foretells.
    _by_level(inds, images, first, order, bounds)
    real: Any = np.float64 if anchors[0].dtype == torch.float64 else np.float32
    levels = (
        _filled(map(_memory, cls_scores)), _filled(map(_memory, bbox_preds)), _filled(array(level, real) for level in anchors),
        np.array([
            (delta.shape[1] // 4, delta.shape[3], *score.stride(), *delta.stride())
            for score, delta in zip(cls_scores, bbox_preds, strict=True)
        ]), first,
    )  # fmt: skip
    values = losses.numpy()
    values.fill(np.nan)
    options = (
        tuple(values.dtype.type(number) for number in (gamma, 0, 1)), alpha, loss_cls_weight, loss_bbox_weight, tuple(stds),
        box_numbers(wh_ratio_clip, convention), box_loss == "l1",
    )  # fmt: skip

    def run(first_part: int, last_part: int) -> None:
        begin, end = first_part * PART, last_part * PART
        for image in range(len(bounds)):
            if images[image] < end and begin < images[image + 1]:
                reals = (array(column[image], real) for column in (label_weight, bbox_target, bbox_weight))
                targets = array(label[image], np.int64), *reals
                _losses(levels, image, targets, inds, order, bounds[image], begin, end, classes, options, values)

    parts, cost = math.ceil(len(inds) / PART), len(inds) * (0.045 + 0.0033 * classes) - IN_PYTHON * len(bounds)
    over_slices(run, parts, 2 if cost > 2 * HANDING_OVER else parts + 1)
    return losses
