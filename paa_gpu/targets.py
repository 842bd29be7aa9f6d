"""From the maps of the pyramid's levels and the ground truths to the targets of a whole batch, without waiting for the device.

`PAAHead` and the integrations all train this way. `assign_max_iou` finds the potential positives. `candidate_losses` computes
their losses directly from the maps. `paa_reassign_batch` keeps the best. No shape depends on a value. There is an entry for each
of the A anchors, and one that is no potential positive has index -1. The positives stand at the front of a list whose length
Python knows.

Shapes: N images, C classes, A anchors of an image over all levels, G_n ground truths of image n. Boxes are x1, y1, x2, y2 in
pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .assign import assign_max_iou
from .boxes import decode, giou_loss, iou_and_union
from .losses import candidate_losses
from .reassign import Reassignment, paa_reassign_batch

__all__ = ["Targets", "assign_targets", "flatten_levels", "on_device", "positive_losses"]


class Targets(NamedTuple):
    """The targets of the N * A anchors of a batch, image after image."""

    label: Tensor  #: Tensor[N * A] int64, the class after the reassignment, C for background
    label_weight: Tensor  #: Tensor[N * A], of the classification: 0 where an anchor is not trained
    bbox_target: Tensor  #: Tensor[N * A, 4], the box of the anchor's ground truth, zeros without one
    positive: Tensor  #: Tensor[S] int64, the positives in [0, N * A), ascending, then 0; S: see `assign_targets`
    found: Tensor  #: BoolTensor[S], False for what follows the positives
    num_pos: Tensor  #: Tensor[N] int64, positives of each image
    gt_inds: Tensor  #: Tensor[N * A] int64 before the reassignment: i + 1, the ground truth i; 0, background; -1, not trained
    reassignment: Reassignment


@torch.no_grad()
def assign_targets(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    ignored: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor] | None = None,
    *,
    num_classes: int,
    pos_weight: float = 1.0,
    assignment: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    reassignment: Mapping[str, Any] | None = None,
    classification: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Targets:
    """The targets of a batch.

    Args:
        anchors: per level Tensor[A_l, 4], the same for all images.
        cls_scores: per level Tensor[N, C, H_l, W_l], logits.
        bbox_preds: per level Tensor[N, 4, H_l, W_l], offsets; see `candidate_losses`.
        boxes: per image Tensor[G_n, 4] of any floating dtype, ground truths. G_n may be 0. Arithmetic is in the dtype of
        `anchors`.
        labels: per image Tensor[G_n] int64 or int32 in [0, C).
        ignored: per image Tensor[I_n, 4], boxes to ignore, see `assign_max_iou`.
        valid: per image BoolTensor[A], the anchors to train. None: all.
        num_classes: C, the label of background.
        pos_weight: the classification weight of positives and of potential positives.
        assignment, losses, reassignment: options of `assign_max_iou`, `candidate_losses` and `paa_reassign_batch`, by name.
        classification: a function from labels and weights Tensor[N * A] to the classification losses Tensor[N * A]. It is for
            losses that must be rounded exactly as another library rounds them. None: those of `candidate_losses`.

    Returns:
        `Targets`. Its list of positives has S = min(G * K, N * A) entries. G is the number of ground truths of the batch. K is
        the most candidates that one can have: `topk` of each level, or all anchors of a level with fewer.

    Raises:
        TypeError, ValueError: as the three functions do.

    A label outside [0, C) belongs to no class. The function does not modify its inputs, records no graph, and does not wait for
    the device. Source: PAA (arXiv 2007.08103), section 3.2; `PAAHead.get_targets` and `get_pos_loss` of mmdetection.
    """
    options, dtype, device = {"topk": 9, **(reassignment or {})}, anchors[0].dtype, anchors[0].device
    boxes = [image.to(dtype) for image in boxes]
    ignored = None if ignored is None else [image.to(dtype) for image in ignored]
    gt_inds = torch.stack(assign_max_iou(anchors, boxes, ignored, valid, **(assignment or {})).gt_inds)  # [N, A]
    num_gts = [len(image) for image in boxes]
    # One copy to the device: what `gt_inds` is compared with, the label of background, where the boxes of each image begin.
    numbers = on_device([0, 1, num_classes, *itertools.accumulate(num_gts[:-1], initial=0)], torch.int64, device)
    is_trained = gt_inds >= numbers[:2, None, None]  # [2, N, A]: at all, and with a box
    label_weight, bbox_weight = is_trained.to(dtype)
    if pos_weight != 1:
        label_weight = torch.where(is_trained[1], pos_weight, label_weight)
    row = ((gt_inds + numbers[3:, None]) * is_trained[1]).flatten()  # 0: no ground truth
    label = torch.cat([numbers[2:3], *labels]).index_select(0, row).view_as(gt_inds)
    bbox_target = torch.cat([boxes[0].new_zeros(1, 4), *boxes]).index_select(0, row)
    weights = label_weight.unbind(), bbox_weight[..., None].expand(-1, -1, 4).unbind()
    pos_inds = torch.where(is_trained[1], torch.arange(gt_inds.shape[1], device=device), -1).unbind()
    boxes_only = {} if classification is None else {"loss_cls_weight": 0.0}
    pos_losses = candidate_losses(
        anchors, cls_scores, bbox_preds, label.unbind(), weights[0], bbox_target.view(*gt_inds.shape, 4).unbind(), weights[1],
        pos_inds, **{**(losses or {}), **boxes_only},
    )  # fmt: skip
    if classification is not None:
        own = classification(label.flatten(), label_weight.flatten()).view_as(label)
        pos_losses = list((torch.stack(pos_losses) + own).unbind())
    reassigned = paa_reassign_batch(
        pos_losses, label.unbind(), *weights, pos_inds, (gt_inds - 1).unbind(), anchors,
        num_classes=num_classes, num_gts=num_gts, **options,
    )  # fmt: skip
    label = torch.cat(reassigned.label)
    most = sum(min(options["topk"], len(level)) for level in anchors)
    # A list of a length that depends on the number of positives could only be had by waiting for it.
    size = min(sum(num_gts) * most, len(label))
    index = torch.nonzero_static(label != num_classes, size=size, fill_value=-1).flatten()
    return Targets(
        label, torch.cat(reassigned.label_weight), bbox_target, index.clamp(min=0), index >= 0,
        reassigned.num_pos, gt_inds.flatten(), reassigned,
    )  # fmt: skip


def positive_losses(
    targets: Targets, anchors: Tensor, bbox_preds: Sequence[Tensor], iou_preds: Sequence[Tensor], stds: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the positives: GIoU loss [S], cross entropy of the predicted IoU [S], and IoU [S]. The IoU has no gradient.

    Args:
        targets: of the batch. Its list of S positives ends in unused entries. Their losses and their IoU are 0.
        anchors: Tensor[A, 4].
        bbox_preds, iou_preds: per level Tensor[N, 4, H_l, W_l] and Tensor[N, 1, H_l, W_l].
        stds: deviations that the offsets were divided by.
    """
    index, found = targets.positive, targets.found
    boxes = decode(anchors[index % len(anchors)], flatten_levels(bbox_preds).flatten(0, 1).index_select(0, index), stds)
    bbox_target = targets.bbox_target[index]
    iou = torch.where(found, iou_and_union(boxes.detach(), bbox_target)[0], 0)
    iou_pred = flatten_levels(iou_preds).flatten().index_select(0, index)
    cross_entropy = F.binary_cross_entropy_with_logits(iou_pred, iou, reduction="none")
    return giou_loss(boxes, bbox_target) * found, cross_entropy * found, iou


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """Tensor[N, A, channels] from Tensor[N, channels, H_l, W_l] of each level; cells row after row."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor of Python numbers. For a GPU it goes through pinned memory, so nothing waits for the copy.

    A compiler has no pinned memory, and neither have fake tensors without a GPU.
    """
    pinned = device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling()
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned).to(device, non_blocking=True)
