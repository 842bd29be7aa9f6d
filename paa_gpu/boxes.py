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

__all__ = ["LEAST_AREA", "LEAST_WEIGHT", "WH_RATIO_CLIP", "corners", "decode", "focal_loss", "iou_and_giou_loss"]

LEAST_AREA = 1e-6  # the smallest union, and the smallest enclosing area, in square pixels
LEAST_WEIGHT = 1e-12  # of a box's GIoU loss, which its IoU weights
WH_RATIO_CLIP = 16 / 1000  # a box is at most 1 / 0.016 times as large as its anchor, and at least 0.016 times


def decode(anchors: Tensor, deltas: Tensor, stds: Sequence[float]) -> Tensor:
    """Boxes [..., 4] from anchors [..., 4] and predicted offsets [..., 4] (x, y, log w, log h, divided by `stds`)."""
    return torch.cat(corners(anchors, deltas, stds), -1)


def corners(
    anchors: Tensor, deltas: Tensor, stds: Sequence[float], wh_ratio_clip: float = WH_RATIO_CLIP
) -> tuple[Tensor, Tensor]:
    """Upper left and lower right corners [..., 2] of the boxes of `decode`."""
    limit = abs(math.log(wh_ratio_clip))
    position, log_size = deltas.chunk(2, -1)
    lower, upper = anchors.chunk(2, -1)
    size = upper - lower
    centre = (lower + upper) * 0.5 + size * _scaled(position, stds[:2])
    half = (size * 0.5) * _scaled(log_size, stds[2:]).clamp(-limit, limit).exp()
    return centre - half, centre + half


def iou_and_giou_loss(lower: Tensor, upper: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and 1 - generalised IoU [n] (arXiv 1902.09630) of pairs of boxes: corners [n, 2] of one, [n, 4] of the other.

    Two boxes without area have IoU 0.
    """
    other_lower, other_upper = others.chunk(2, 1)
    sides = [
        upper - lower,
        other_upper - other_lower,
        torch.minimum(upper, other_upper) - torch.maximum(lower, other_lower),
        torch.maximum(upper, other_upper) - torch.minimum(lower, other_lower),
    ]
    width, height = torch.stack(sides).clamp(min=0).unbind(2)
    area, other, intersection, enclosing = (width * height).unbind()
    union = (area + other - intersection).clamp(min=LEAST_AREA)
    enclosing = enclosing.clamp(min=LEAST_AREA)
    iou = intersection / union
    return iou, 1 - iou + (enclosing - union) / enclosing


def focal_loss(scores: Tensor, label: Tensor, gamma: float, alpha: float) -> Tensor:
    """The sigmoid focal loss [n, C] of logits [n, C] (arXiv 1708.02002); a label [n] outside [0, C) belongs to no class."""
    target = label[:, None] == torch.arange(scores.shape[1], device=scores.device)
    logit = torch.where(target, scores, -scores)  # of what is true
    weight = torch.where(target, scores.new_full((), -alpha), alpha - 1)  # `where` of two numbers has the default dtype
    other = (-logit).sigmoid()
    if 0 < gamma < 1:
        other = other.clamp(min=torch.finfo(other.dtype).tiny)  # the derivative of such a power of 0 is infinite
    return F.logsigmoid(logit) * (weight * other.pow(gamma))


def _scaled(pair: Tensor, factors: Sequence[float]) -> Tensor:
    """A pair [..., 2], each number times its own factor. One operation where both are the same, as they usually are."""
    if factors[0] == factors[1]:
        return pair * factors[0]
    return torch.stack([column * factor for column, factor in zip(pair.unbind(-1), factors, strict=True)], -1)
