"""Losses of the potential positives for CPU tensors. Their inputs are gathered from the maps, then computed one by one.

s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
focal = sum over the classes of weight * s(z) * sigmoid(z)^gamma, weight = alpha for that class, 1 - alpha for the others, in the
        dtype of the result
box   = weight * (1 - GIoU) of the decoded box, or weight * |delta - delta of the target| summed over the deltas, in float64
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import box_numbers, empty_losses
from ._arrays import Array, flat, lengths, offsets, view
from ._loops import compiled, compiled_sums, over_slices
from ._numeric import log1p_of_part, negative_exp

# Rows below which a second thread costs more than it saves: 80 classes take a microsecond, handing over to a thread 100.
SERIAL_ROWS = 256


@compiled_sums
def _focal(logits: Any, sign: Any, numbers: Any) -> Any:
    """Without the weight; `sign`: 1 where the classes are not the label's, -1 where the class is; `numbers`: gamma, 0 and 1."""
    gamma, zero, one = numbers
    total = zero
    if gamma == 2:  # the usual one, which needs a square and no second exponential
        for i in range(len(logits)):
            z = sign * logits[i]
            e = negative_exp(abs(z))
            p = (one if z > zero else e) / (one + e)
            total += (max(z, zero) + log1p_of_part(e)) * (p * p)
        return total
    for i in range(len(logits)):
        z = sign * logits[i]
        log = log1p_of_part(negative_exp(abs(z)))
        total += (max(z, zero) + log) * negative_exp(gamma * (max(-z, zero) + log))
    return total


@compiled
def _decode_side(low: float, high: float, shift: float, scale: float, least: float, most: float) -> tuple[float, float]:
    """The ends of a side of the anchor, moved and scaled; `least`, `most`: of the logarithm of the scale."""
    scale = most if scale > most else least if scale < least else scale
    centre = (low + high) * 0.5 + (high - low) * shift
    half = (high - low) * math.exp(scale) * 0.5
    return centre - half, centre + half


@compiled
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


@compiled
def _side_difference(low: float, high: float, target_low: float, target_high: float) -> tuple[float, float]:
    """The shift and the logarithm of the scale that take a side of the anchor to that of the target."""
    size, target_size = high - low, target_high - target_low
    return (target_low + target_high - low - high) * 0.5 / size, math.log(target_size / size)


@compiled
def _l1_loss(box: Any, delta: Any, target: Any, weight: Any, stds: Any) -> float:
    dx, dw = _side_difference(box[0], box[2], target[0], target[2])
    dy, dh = _side_difference(box[1], box[3], target[1], target[3])
    loss = weight[0] * abs(delta[0] - dx / stds[0]) + weight[1] * abs(delta[1] - dy / stds[1])
    loss += weight[2] * abs(delta[2] - dw / stds[2]) + weight[3] * abs(delta[3] - dh / stds[3])
    return float(loss)


@compiled
def _losses_rows(
    first: int,
    last: int,
    scores: Any,
    deltas: Any,
    boxes: Any,
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
    _, _, one = focal_numbers
    least, most, least_area, added_area = box_numbers
    for row in range(first, last):
        logits, own = scores[row], label[row]
        if 0 <= own < len(logits):
            others = _focal(logits[:own], one, focal_numbers) + _focal(logits[own + 1 :], one, focal_numbers)
            focal = (1 - alpha) * others + alpha * _focal(logits[own : own + 1], -one, focal_numbers)
        else:
            focal = (1 - alpha) * _focal(logits, one, focal_numbers)
        box, delta, weight = boxes[row], deltas[row], box_weight[row]
        if of_deltas:
            box_loss = _l1_loss(box, delta, targets[row], weight, stds)
        else:
            x1, x2 = _decode_side(box[0], box[2], delta[0] * stds[0], delta[2] * stds[2], least, most)
            y1, y2 = _decode_side(box[1], box[3], delta[1] * stds[1], delta[3] * stds[3], least, most)
            box_loss = _giou_loss(x1, y1, x2, y2, targets[row], least_area, added_area)
            box_loss *= (weight[0] + weight[1] + weight[2] + weight[3]) * 0.25
        loss[row] = loss_cls_weight * label_weight[row] * focal + loss_bbox_weight * box_loss


@compiled
def _gather_rows(first: int, last: int, rows: Any, image: Any, cell: Any, source: Any, layout: Any, found: Any) -> None:
    """The channels of some anchors of a level: `source` is its memory, `layout` anchors per location, width and strides."""
    per_location, width, image_stride, stride, y_stride, x_stride = layout
    channels = found.shape[1]
    for i in range(first, last):
        location, of_location = divmod(cell[i], per_location)
        y, x = divmod(location, width)
        place = image[i] * image_stride + of_location * channels * stride + y * y_stride + x * x_stride
        for c in range(channels):
            found[rows[i], c] = source[place + c * stride]


def _memory(level: Tensor) -> Array:
    """From the first element to the last, whatever lies between; half precision as its bits."""
    size = 1 + sum((size - 1) * stride for size, stride in zip(level.shape, level.stride(), strict=True))
    flat = level.as_strided((size if level.numel() else 0,), (1,))
    return (flat.view(torch.int16) if flat.itemsize == 2 else flat).numpy()


def _gather_map(levels: Sequence[Tensor], places: list[Any], channels: int, dtype: Any) -> Array:
    """[P, channels] of the potential positives, level by level; only these are read."""
    memory = [_memory(level) for level in levels]
    found = np.empty((sum(len(rows) for rows, _, _ in places), channels), memory[0].dtype)
    for level, source, (rows, image, cell) in zip(levels, memory, places, strict=True):
        layout = (level.shape[1] // channels, max(level.shape[3], 1), *level.stride())
        over_slices(_gather_rows, len(rows), SERIAL_ROWS, rows, image, cell, source, layout, found)
    if levels[0].itemsize == 2:
        found = view(torch.from_numpy(found).view(levels[0].dtype))
    return found.astype(dtype, copy=False)


def _places(anchors: Sequence[Tensor], image: Array, anchor: Array) -> list[Any]:
    """Of each level: which potential positives it holds, and their images and anchors in it."""
    first = offsets(lengths(anchors))
    level_of = np.searchsorted(first, anchor, "right") - 1
    rows = [np.flatnonzero(level_of == level) for level in range(len(anchors))]
    return [(here, image[here], anchor[here] - begin) for here, begin in zip(rows, first, strict=False)]


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
    inds, image = flat(pos_inds, np.int64), np.repeat(np.arange(len(pos_inds)), lengths(pos_inds))
    exists = (inds >= 0) & (inds < label[0].shape[0])
    inds, image = inds[exists], image[exists]
    bounds = np.searchsorted(image, np.arange(len(pos_inds) + 1))
    targets = [
        np.concatenate([view(tensor)[inds[bounds[i] : bounds[i + 1]]] for i, tensor in enumerate(column)], dtype=dtype)
        for column, dtype in ((label, np.int64), (label_weight, float), (bbox_target, float), (bbox_weight, float))
    ]
    places, values = _places(anchors, image, inds), losses.numpy()
    scores = _gather_map(cls_scores, places, cls_scores[0].shape[1] * 4 // bbox_preds[0].shape[1], values.dtype)
    deltas, boxes, loss = _gather_map(bbox_preds, places, 4, float), np.empty((len(inds), 4)), np.empty(len(inds))
    for level, (rows, _, cell) in zip(anchors, places, strict=True):
        boxes[rows] = view(level)[cell]
    focal_numbers = tuple(values.dtype.type(number) for number in (gamma, 0, 1))
    over_slices(
        _losses_rows, len(inds), SERIAL_ROWS, scores, deltas, boxes, *targets, focal_numbers, alpha, loss_cls_weight,
        loss_bbox_weight, tuple(stds), box_numbers(wh_ratio_clip, convention), box_loss == "l1", loss,
    )  # fmt: skip
    values.fill(np.nan)
    values[exists] = loss
    return losses
