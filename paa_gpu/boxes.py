"""The differentiable parts of a detector's losses: boxes from offsets, IoU, GIoU loss, focal loss.

Boxes are x1, y1, x2, y2 in pixels. The formulas and their constants are those of mmdetection 3.3.0: `DeltaXYWHBBoxCoder`,
`bbox_overlaps`, `GIoULoss`, `FocalLoss`. All are plain torch operations. They run on any device, and do not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["LEAST_AREA", "WH_RATIO_CLIP", "decode", "focal_loss", "giou_loss", "iou_and_union"]

LEAST_AREA = 1e-6  # the smallest union, and the smallest enclosing area, in square pixels
WH_RATIO_CLIP = 16 / 1000  # a box is at most 1 / 0.016 times as large as its anchor, and at least 0.016 times


def decode(anchors: Tensor, deltas: Tensor, stds: Sequence[float], wh_ratio_clip: float = WH_RATIO_CLIP) -> Tensor:
    """Boxes [..., 4] from anchors [..., 4] and predicted offsets [..., 4] (x, y, log w, log h, divided by `stds`)."""
    limit = abs(math.log(wh_ratio_clip))
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.unbind(-1), stds, strict=True))
    x1, y1, x2, y2 = anchors.unbind(-1)
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) * 0.5 + width * dx, (y1 + y2) * 0.5 + height * dy
    half_width = width * dw.clamp(-limit, limit).exp() * 0.5
    half_height = height * dh.clamp(-limit, limit).exp() * 0.5
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1)


def iou_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union [n] of each pair of boxes [n, 4]. Two boxes without area have IoU 0."""
    intersection = _area(torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:]))
    areas = _area(boxes[:, :2], boxes[:, 2:]) + _area(others[:, :2], others[:, 2:])
    union = (areas - intersection).clamp(min=LEAST_AREA)
    return intersection / union, union


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - generalised IoU [n] of each pair of boxes [n, 4] (arXiv 1902.09630)."""
    iou, union = iou_and_union(boxes, others)
    enclosing = _area(torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:]))
    enclosing = enclosing.clamp(min=LEAST_AREA)
    return 1 - iou + (enclosing - union) / enclosing


def focal_loss(scores: Tensor, label: Tensor, gamma: float, alpha: float) -> Tensor:
    """The sigmoid focal loss [n, C] of logits [n, C] (arXiv 1708.02002); a label [n] outside [0, C) belongs to no class."""
    target = label[:, None] == torch.arange(scores.shape[1], device=scores.device)
    logit = torch.where(target, scores, -scores)  # of what is true
    weight = torch.where(target, alpha, 1 - alpha) * (-logit).sigmoid().pow(gamma)
    return -F.logsigmoid(logit) * weight


def _area(upper_left: Tensor, lower_right: Tensor) -> Tensor:
    """The areas [n] between two corners [n, 2]; 0 if the corners are swapped."""
    width, height = (lower_right - upper_left).clamp(min=0).unbind(1)
    return width * height
