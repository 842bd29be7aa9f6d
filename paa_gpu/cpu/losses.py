"""Losses of the potential positives for CPU tensors, in float64: what they need is gathered from the maps, then one by one.

s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
focal = sum over the classes of weight * s(z) * exp(-gamma * s(-z)), weight = alpha for that class, 1 - alpha for the others
box   = weight * (1 - GIoU) of the decoded box
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops import empty_losses
from ._arrays import Array, flat, lengths, offsets, view
from ._loops import compiled, compiled_sums, over_slices
from ._numeric import exp, log1p

# Rows below which a second thread costs more than it saves: 80 classes take a few microseconds, handing over to a thread 100.
SERIAL_ROWS = 256


@compiled_sums
def _focal(logits: Any, sign: float, gamma: float) -> float:
    """Without the weight; `sign`: 1 where the classes are not the label's, -1 where the class is."""
    total = 0.0
    for i in range(len(logits)):
        z = sign * logits[i]
        log = log1p(exp(-abs(z)))
        total += (max(z, 0.0) + log) * exp(-gamma * (max(-z, 0.0) + log))
    return total


@compiled
def _decode_side(low: float, high: float, shift: float, scale: float, limit: float) -> tuple[float, float]:
    """The ends of a side of the anchor, moved and scaled; `limit`: of the logarithm of the scale."""
    scale = limit if scale > limit else -limit if scale < -limit else scale
    centre = (low + high) * 0.5 + (high - low) * shift
    half = (high - low) * math.exp(scale) * 0.5
    return centre - half, centre + half


@compiled
def _giou_loss(x1: float, y1: float, x2: float, y2: float, target: Any) -> float:
    """1 - GIoU; NaN where a corner is NaN."""
    target_x1, target_y1, target_x2, target_y2 = target[0], target[1], target[2], target[3]
    overlap = max(min(x2, target_x2) - max(x1, target_x1), 0.0) * max(min(y2, target_y2) - max(y1, target_y1), 0.0)
    union = (x2 - x1) * (y2 - y1) + (target_x2 - target_x1) * (target_y2 - target_y1) - overlap
    union = 1e-6 if union < 1e-6 else union
    enclosing = max(max(x2, target_x2) - min(x1, target_x1), 0.0) * max(max(y2, target_y2) - min(y1, target_y1), 0.0)
    enclosing = 1e-6 if enclosing < 1e-6 else enclosing
    loss: float = 1 - (overlap / union - (enclosing - union) / enclosing)
    return loss


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
    gamma: float,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Any,
    limit: float,
    loss: Any,
) -> None:
    for row in range(first, last):
        logits, own = scores[row], label[row]
        if 0 <= own < len(logits):
            others = _focal(logits[:own], 1.0, gamma) + _focal(logits[own + 1 :], 1.0, gamma)
            focal = (1 - alpha) * others + alpha * _focal(logits[own : own + 1], -1.0, gamma)
        else:
            focal = (1 - alpha) * _focal(logits, 1.0, gamma)
        box, delta, weight = boxes[row], deltas[row], box_weight[row]
        x1, x2 = _decode_side(box[0], box[2], delta[0] * stds[0], delta[2] * stds[2], limit)
        y1, y2 = _decode_side(box[1], box[3], delta[1] * stds[1], delta[3] * stds[3], limit)
        mean_weight = (weight[0] + weight[1] + weight[2] + weight[3]) * 0.25
        box_loss = loss_bbox_weight * mean_weight * _giou_loss(x1, y1, x2, y2, targets[row])
        loss[row] = loss_cls_weight * label_weight[row] * focal + box_loss


def _locations(level: Tensor, image: Array, y: Array, x: Array) -> Array:
    """The channels of some locations of Tensor[B, C, H, W], float64; only these are read."""
    if level.dtype != torch.bfloat16:
        return level.numpy()[image, :, y, x].astype(np.float64)
    values = level.view(torch.int16).numpy()[image, :, y, x]
    return view(torch.from_numpy(values).view(torch.bfloat16)).astype(np.float64)


def _gather_maps(
    anchors: Sequence[Tensor], cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor], image: Array, anchor: Array
) -> tuple[Array, Array, Array]:
    """Logits [P, C], deltas and anchors [P, 4] of the potential positives, level by level."""
    scores = np.empty((len(anchor), cls_scores[0].shape[1]))
    deltas, boxes = np.empty((2, len(anchor), 4))
    first = offsets(lengths(anchors))
    level_of = np.searchsorted(first, anchor, "right") - 1
    for level, begin in enumerate(first[:-1]):
        here = np.flatnonzero(level_of == level)
        cell = anchor[here] - begin
        y, x = np.divmod(cell, max(cls_scores[level].shape[3], 1))
        scores[here] = _locations(cls_scores[level], image[here], y, x)
        deltas[here] = _locations(bbox_preds[level], image[here], y, x)
        boxes[here] = view(anchors[level])[cell]
    return scores, deltas, boxes


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
) -> Tensor:
    losses = empty_losses(cls_scores[0], label_weight[0], pos_inds)
    inds, image = flat(pos_inds, np.int64), np.repeat(np.arange(len(pos_inds)), lengths(pos_inds))
    exists = (inds >= 0) & (inds < label[0].shape[0])
    inds, image = inds[exists], image[exists]
    bounds = np.searchsorted(image, np.arange(len(pos_inds) + 1))
    targets = [
        np.concatenate([view(tensor)[inds[bounds[i] : bounds[i + 1]]] for i, tensor in enumerate(column)], dtype=dtype)
        for column, dtype in ((label, np.int64), (label_weight, float), (bbox_target, float), (bbox_weight, float))
    ]
    loss = np.empty(len(inds))
    over_slices(
        _losses_rows, len(inds), SERIAL_ROWS, *_gather_maps(anchors, cls_scores, bbox_preds, image, inds), *targets, gamma, alpha,
        loss_cls_weight, loss_bbox_weight, tuple(stds), abs(math.log(wh_ratio_clip)), loss,
    )  # fmt: skip
    values = losses.numpy()
    values.fill(np.nan)
    values[exists] = loss
    return losses
