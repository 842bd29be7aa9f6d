"""Losses of the potential positives for CPU tensors, in spans of one level: gathered from the maps, then class by class.

A map holds a channel of all locations, then the next channel. A span therefore reads channel by channel: its potential positives
are neighbours, and share the memory that the processor fetches. The classes are the outer loop of the losses too, so that the
loops over a span fill vector registers however many classes there are.

s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
focal = sum over the classes of weight * s(z) * sigmoid(z)^gamma, weight = alpha for that class, 1 - alpha for the others
box   = weight * (1 - GIoU) of the decoded box, or weight * |delta - delta of the target| summed over the deltas

Focal losses are in the dtype of the result, their sum over the classes and all that follows in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import box_numbers, empty_losses
from ._arrays import Array, flat, lengths, offsets, view
from ._loops import compiled, inner, inner_with_sums, over_slices
from ._numeric import log1p_of_part, negative_exp

# Anchors whose order does not matter: they are a cache line of float32 maps.
STRETCH = 16

# Potential positives of a span. Their logits of 80 classes fit into a second-level cache.
SPAN = 1024

# Threads share whole parts of so many potential positives. Smaller ones would wait for each other: part of the work is Python's.
PART = 512

# A logit so far from zero that its focal loss is zero.
FAR = 1e4

# Classes whose losses are summed in the dtype of the maps, before the sum goes on in float64.
CLASSES = 8


@compiled
def _gather(source: Any, layout: Any, image: Any, cell: Any, found: Any) -> None:
    """Gather the channels of n anchors of a level into `found` [channels, n].

    `source` is the memory of the map, `layout` the anchors of a location, the width and the strides. Places are unsigned: an
    index that may be negative may count from the end, and takes a branch.
    """
    per_location, width, image_stride, stride, y_stride, x_stride = layout
    channels, place = len(found), np.empty(len(cell), np.uint64)
    for i in range(len(cell)):
        location, of_location = divmod(cell[i], per_location)
        y, x = divmod(location, width)
        place[i] = image[i] * image_stride + of_location * channels * stride + y * y_stride + x * x_stride
    for c in range(channels):
        channel, shift = found[c], np.uint64(c * stride)
        for i in range(len(place)):
            channel[i] = source[place[i] + shift]


@inner_with_sums
def _focal_of_class(logits: Any, sign: Any, numbers: Any, total: Any) -> None:
    """Add the focal losses of one class, without their weight, to `total` [n].

    `sign` is -1 where the class is the label's, else 1; `numbers` are gamma, 0 and 1 in the dtype of the logits.
    """
    gamma, zero, one = numbers
    if gamma == 2:  # the usual one, which needs a square and no second exponential
        for i in range(len(logits)):
            z = sign * logits[i]
            e = negative_exp(abs(z))
            p = (one if z > zero else e) / (one + e)
            total[i] += (max(z, zero) + log1p_of_part(e)) * (p * p)
    else:
        for i in range(len(logits)):
            z = sign * logits[i]
            log = log1p_of_part(negative_exp(abs(z)))
            total[i] += (max(z, zero) + log) * negative_exp(gamma * (max(-z, zero) + log))


@inner
def _focal(scores: Any, source: Any, label: Any, numbers: Any, alpha: float, loss: Any) -> None:
    """The focal losses [n] of logits [classes, n], which are written over.

    The logits of the labels get a loop of their own. In their place among the others comes a logit whose loss is zero: a choice
    by the label inside the loops would keep them out of vector registers.
    """
    own, part = np.empty_like(scores[0]), np.zeros_like(scores[0])
    for i in range(len(source)):
        own_class = np.uint64(label[source[i]])  # too large where negative
        own[i] = FAR
        if own_class < len(scores):
            own[i], scores[own_class, i] = scores[own_class, i], -FAR
    _focal_of_class(own, -numbers[2], numbers, part)
    for i in range(len(loss)):
        loss[i] = alpha * part[i]
    for first in range(0, len(scores), CLASSES):
        part[:] = 0
        for c in range(first, min(first + CLASSES, len(scores))):
            _focal_of_class(scores[c], numbers[2], numbers, part)
        for i in range(len(loss)):
            loss[i] += (1 - alpha) * part[i]


@inner
def _decode_side(low: float, high: float, shift: float, scale: float, least: float, most: float) -> tuple[float, float]:
    """The ends of a side of the anchor, moved and scaled; `least`, `most`: of the logarithm of the scale."""
    scale = most if scale > most else least if scale < least else scale
    centre = (low + high) * 0.5 + (high - low) * shift
    half = (high - low) * math.exp(scale) * 0.5
    return centre - half, centre + half


@inner
def _giou_loss(x1: float, y1: float, x2: float, y2: float, target: Any, least_area: float, added_area: float) -> float:
    """1 - GIoU; NaN where a corner is NaN."""
    target_x1, target_y1, target_x2, target_y2 = target[0], target[1], target[2], target[3]
    overlap = max(min(x2, target_x2) - max(x1, target_x1), 0.0) * max(min(y2, target_y2) - max(y1, target_y1), 0.0)
    union = (x2 - x1) * (y2 - y1) + (target_x2 - target_x1) * (target_y2 - target_y1) - overlap
    union = least_area if union < least_area else union
    enclosing = max(max(x2, target_x2) - min(x1, target_x1), 0.0) * max(max(y2, target_y2) - min(y1, target_y1), 0.0)
    enclosing = least_area if enclosing < least_area else enclosing
    loss: float = 1 - (overlap / (union + added_area) - (enclosing - union) / (enclosing + added_area))
    return loss


@inner
def _side_difference(low: float, high: float, target_low: float, target_high: float) -> tuple[float, float]:
    """The shift and the logarithm of the scale that take a side of the anchor to that of the target."""
    size, target_size = high - low, target_high - target_low
    return (target_low + target_high - low - high) * 0.5 / size, math.log(target_size / size)


@inner
def _l1_loss(box: Any, delta: Any, target: Any, weight: Any, stds: Any) -> float:
    dx, dw = _side_difference(box[0], box[2], target[0], target[2])
    dy, dh = _side_difference(box[1], box[3], target[1], target[3])
    loss = weight[0] * abs(delta[0] - dx / stds[0]) + weight[1] * abs(delta[1] - dy / stds[1])
    loss += weight[2] * abs(delta[2] - dw / stds[2]) + weight[3] * abs(delta[3] - dh / stds[3])
    return float(loss)


@compiled
def _losses(
    scores: Any,
    deltas: Any,
    boxes: Any,
    source: Any,
    label: Any,
    label_weight: Any,
    targets: Any,
    box_weight: Any,
    focal_numbers: Any,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Any,
    box_numbers: Any,
    of_deltas: bool,
    loss: Any,
) -> None:
    """The losses [n] of a span: scores [classes, n], deltas [4, n], boxes [n, 4]. The targets are those of `source` [n]."""
    least, most, least_area, added_area = box_numbers
    _focal(scores, source, label, focal_numbers, alpha, loss)
    for i in range(len(loss)):
        p = source[i]
        box, target, weight = boxes[i], targets[p], box_weight[p]
        if of_deltas:
            box_loss = _l1_loss(box, deltas[:, i], target, weight, stds)
        else:
            x1, x2 = _decode_side(box[0], box[2], deltas[0, i] * stds[0], deltas[2, i] * stds[2], least, most)
            y1, y2 = _decode_side(box[1], box[3], deltas[1, i] * stds[1], deltas[3, i] * stds[3], least, most)
            box_loss = _giou_loss(x1, y1, x2, y2, target, least_area, added_area)
            box_loss *= (weight[0] + weight[1] + weight[2] + weight[3]) * 0.25
        loss[i] = loss_cls_weight * label_weight[p] * loss[i] + loss_bbox_weight * box_loss


class _Map:
    """The maps of a pyramid: where each level lies, and how."""

    def __init__(self, levels: Sequence[Tensor], channels: int, dtype: Any) -> None:
        self._half = levels[0].dtype if levels[0].itemsize == 2 else None
        self._memory = [_memory(level) for level in levels]
        self._layout = [(level.shape[1] // channels, max(level.shape[3], 1), *level.stride()) for level in levels]
        self._channels, self._dtype = channels, dtype

    def gather(self, level: int, image: Array, cell: Array) -> Array:
        """[channels, n] of n anchors of a level; only these are read."""
        found = np.empty((self._channels, len(cell)), self._memory[level].dtype)
        _gather(self._memory[level], self._layout[level], image, cell, found)
        if self._half is not None:
            found = view(torch.from_numpy(found).view(self._half))
        return found.astype(self._dtype, copy=False)


def _memory(level: Tensor) -> Array:
    """From the first element to the last, whatever lies between; half precision as its bits."""
    size = 1 + sum((size - 1) * stride for size, stride in zip(level.shape, level.stride(), strict=True))
    flat = level.as_strided((size if level.numel() else 0,), (1,))
    return (flat.view(torch.int16) if flat.itemsize == 2 else flat).numpy()


@inner
def _in_stretches(inds: Any, begin: int, end: int, start: Any, order: Any) -> int:
    """Order the potential positives of an image that are in range by stretches of anchors. Returns where they end in `order`.

    `start` [stretches + 1] is room. Within a stretch, the order does not matter: its cells lie in the same cache lines.
    """
    stretches = len(start) - 1
    start[:] = 0
    for p in range(begin, end):
        if 0 <= inds[p] < stretches * STRETCH:
            start[inds[p] // STRETCH + 1] += 1
    start[0] = begin
    for stretch in range(stretches):
        start[stretch + 1] += start[stretch]
    stop = start[stretches]
    for p in range(begin, end):
        if 0 <= inds[p] < stretches * STRETCH:
            order[start[inds[p] // STRETCH]] = p
            start[inds[p] // STRETCH] += 1
    return int(stop)


@compiled
def _by_level(inds: Any, images: Any, first: Any, source: Any, image: Any, cell: Any, bounds: Any) -> None:
    """The potential positives that are in range, level after level, and there image after image, each by stretches of anchors.

    `images` and `first`: where each image begins among them, and each level among the anchors, and the last one ends. Fills
    source, image and cell [P], the cell in its level; bounds [L + 1] of the levels among them.
    """
    start, order = np.empty((first[-1] + STRETCH - 1) // STRETCH + 1, np.int64), np.empty(len(inds), np.int64)
    stop, n = np.empty(len(images) - 1, np.int64), 0
    for number in range(len(stop)):
        stop[number] = _in_stretches(inds, images[number], images[number + 1], start, order)
    bounds[0] = 0
    for level in range(len(first) - 1):
        for number in range(len(stop)):
            for p in order[images[number] : stop[number]]:
                if first[level] <= inds[p] < first[level + 1]:
                    source[n], image[n], cell[n] = p, number, inds[p] - first[level]
                    n += 1
        bounds[level + 1] = n


def _take(column: Sequence[Tensor], inds: Array, images: Array, dtype: Any) -> Array:
    """The targets of the potential positives; any of the image's where one is out of range."""
    taken = np.empty((len(inds), *column[0].shape[1:]), dtype)
    for tensor, begin, end in zip(column, images[:-1], images[1:], strict=True):
        if tensor.shape[0]:
            taken[begin:end] = view(tensor).take(inds[begin:end], 0, mode="clip")
    return taken


def _spans(bounds: list[int], begin: int, end: int) -> Iterator[tuple[int, slice]]:
    """Some of the potential positives in the order of the levels, in spans, each with its level."""
    for level, (first, last) in enumerate(itertools.pairwise(bounds)):
        stop = min(last, end)
        for start in range(max(first, begin), stop, SPAN):
            yield level, slice(start, min(start + SPAN, stop))


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
    source, image, cell = (np.empty(len(inds), np.int64) for _ in range(3))
    bounds = np.empty(len(first), np.int64)
    # In the order of the memory of the maps, which the processor then foretells.
    _by_level(inds, images, first, source, image, cell, bounds)
    targets = [
        _take(column, inds, images, dtype)
        for column, dtype in ((label, np.int64), (label_weight, float), (bbox_target, float), (bbox_weight, float))
    ]
    values, loss = losses.numpy(), np.empty(bounds[-1])
    scores, deltas = _Map(cls_scores, classes, values.dtype), _Map(bbox_preds, 4, np.float64)
    focal_numbers = tuple(values.dtype.type(number) for number in (gamma, 0, 1))
    options = (
        focal_numbers, alpha, loss_cls_weight, loss_bbox_weight, tuple(stds), box_numbers(wh_ratio_clip, convention),
        box_loss == "l1",
    )  # fmt: skip
    levels = bounds.tolist()

    def run(first_part: int, last_part: int) -> None:
        for level, span in _spans(levels, first_part * PART, last_part * PART):
            place = image[span], cell[span]
            boxes = view(anchors[level]).take(place[1], 0).astype(float)
            maps = scores.gather(level, *place), deltas.gather(level, *place)
            _losses(*maps, boxes, source[span], *targets, *options, loss[span])

    over_slices(run, math.ceil(len(loss) / PART), 2)
    values.fill(np.nan)
    values[source[: len(loss)]] = loss
    return losses
