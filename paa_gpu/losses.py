"""The score of each potential positive: its classification loss plus the loss of its decoded box, for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops
from ._checks import (
    FLOATS,
    INDICES,
    check_finite_non_negative,
    check_list,
    check_option,
    check_positive,
    check_share,
    check_tensor,
)
from .boxes import WH_RATIO_CLIP

__all__ = ["candidate_losses"]

BOX_LOSSES = ("giou", "l1")
CONVENTIONS = ("mmdet", "torchvision")


def candidate_losses(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_target: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    loss_cls_weight: float = 1.0,
    loss_bbox_weight: float = 1.3,
    stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    wh_ratio_clip: float = WH_RATIO_CLIP,
    box_loss: str = "giou",
    convention: str = "mmdet",
) -> list[Tensor]:
    """The losses that sort the potential positives of N images: `PAAHead.get_pos_loss` of mmdetection for a batch.

    Each loss is::

        loss_cls_weight * label_weight * (sigmoid focal loss, summed over the classes)
        + loss_bbox_weight * mean(bbox_weight) * (1 - GIoU(decoded box, bbox_target))  # "giou"
        + loss_bbox_weight * sum(bbox_weight * |deltas - deltas of bbox_target|)       # or "l1"

    Level l of the pyramid has H_l x W_l locations with K_l anchors each. An image has A = sum(H_l * W_l * K_l) anchors. They are
    numbered level by level, row by row, location by location. The channels of a location's anchors follow one another. The
    function reads only the locations of the potential positives, directly from the maps.

    Args:
        anchors: per level Tensor[H_l * W_l * K_l, 4]: x1, y1, x2, y2 in pixels, the same for all images.
        cls_scores: per level Tensor[N, K_l * C, H_l, W_l], logits. torchvision's heads return Tensor[N, A, C]. The view
            `[cls_logits.mT[..., None]]` makes it one level of A x 1 locations.
        bbox_preds: per level Tensor[N, K_l * 4, H_l, W_l], the deltas dx, dy, dw, dh, already scaled. All have one dtype. It may
            differ from that of `cls_scores`, as under autocast.
        label: per image Tensor[A] int64, the class of each anchor. A label outside [0, C) is background.
        label_weight: per image Tensor[A], weight of the classification loss, dtype of `anchors`.
        bbox_target: per image Tensor[A, 4], the target box in pixels, dtype of `anchors`.
        bbox_weight: per image Tensor[A, 4], weight of the box loss, dtype of `anchors`. GIoU uses its mean.
        pos_inds: per image Tensor[P_n] int64 or int32, the potential positives, in any order; P_n may be 0.
        gamma, alpha: options of the focal loss.
        loss_cls_weight, loss_bbox_weight: weights of the two losses.
        stds: deviations that the deltas were divided by. torchvision multiplies by weights, the inverses. For RetinaNet all are
            1.
        wh_ratio_clip: the width and the height of the decoded box are at least wh_ratio_clip times those of its anchor, and at
            most 1 / wh_ratio_clip times.
        box_loss: `"giou"` of the decoded box (PAA; `retinanet_resnet50_fpn_v2`), or `"l1"` of the deltas, without decoding
            (`retinanet_resnet50_fpn`).
        convention: details of the GIoU loss. `"mmdet"`: areas are at least 1e-6. `"torchvision"`: 1e-7 is added to areas that are
            divisors, and `wh_ratio_clip` sets no lower limit to a box.

    Returns:
        Per image Tensor[P_n], the `pos_losses` of `paa_reassign_batch`. They are float64 if a map or a target is, else float32.
        The focal losses are computed in this dtype. Half precision is converted to it before any arithmetic.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; lists that are empty or differ in length; a weight or
            `gamma` that is negative or not finite; `alpha` outside [0, 1]; `wh_ratio_clip` not positive; an unknown `box_loss` or
            `convention`.

    Inputs are float16, bfloat16, float32 or float64, of any strides. A logit, delta, anchor or target that is NaN makes the loss
    NaN. If such a loss is among the candidates, `paa_reassign_batch` gives its ground truth no positives. An index out of range
    gives NaN and reads nothing. The function does not modify its inputs, records no graph, and does not wait for the device.

    Source: PAA (arXiv 2007.08103), section 3.2; mmdetection's GIoU loss and `DeltaXYWHBBoxCoder`; torchvision 0.29,
    `models/detection/_utils.py`, `ops/giou_loss.py`.
    """
    check_maps(anchors, cls_scores, bbox_preds, label)
    columns = {
        "label": (label, (torch.int64,), ()),
        "label_weight": (label_weight, (anchors[0].dtype,), ()),
        "bbox_target": (bbox_target, (anchors[0].dtype,), (4,)),
        "bbox_weight": (bbox_weight, (anchors[0].dtype,), (4,)),
    }
    total, device = sum(level.shape[0] for level in anchors), anchors[0].device
    for name, (column, dtypes, sides) in columns.items():
        check_list(name, column, length=len(label), like="`label`")
        for image, tensor in enumerate(column):
            check_tensor(f"{name}[{image}]", tensor, (total, *sides), dtypes, device)
    check_list("pos_inds", pos_inds, length=len(label), like="`label`")
    for image, inds in enumerate(pos_inds):
        check_tensor(f"pos_inds[{image}]", inds, (None,), (pos_inds[0].dtype,) if image else INDICES, device)
    tensors = (anchors, cls_scores, bbox_preds, label, label_weight, bbox_target, bbox_weight, pos_inds)
    losses = losses_of(
        *map(_ops.detached, tensors),
        gamma=gamma, alpha=alpha, loss_cls_weight=loss_cls_weight, loss_bbox_weight=loss_bbox_weight, stds=stds,
        wh_ratio_clip=wh_ratio_clip, box_loss=box_loss, convention=convention,
    )  # fmt: skip
    return list(losses.split_with_sizes([inds.shape[0] for inds in pos_inds]))


def losses_of(
    *tensors: Sequence[Tensor],
    gamma: float,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Sequence[float],
    wh_ratio_clip: float,
    box_loss: str,
    convention: str,
) -> Tensor:
    """The losses [P] of all images. The lists of tensors were checked, or cannot be wrong, and detached.

    The options are checked here.
    """
    numbers = {"gamma": gamma, "alpha": alpha, "loss_cls_weight": loss_cls_weight, "loss_bbox_weight": loss_bbox_weight}
    for name, number in numbers.items():
        (check_share if name == "alpha" else check_finite_non_negative)(name, number)
    check_positive("wh_ratio_clip", wh_ratio_clip)
    check_option("box_loss", box_loss, BOX_LOSSES)
    check_list("stds", stds, "delta", 4, "a box")
    for i, std in enumerate(stds):
        check_finite_non_negative(f"stds[{i}]", std)
        if box_loss == "l1":  # divides by them
            check_positive(f"stds[{i}]", std)
    check_option("convention", convention, CONVENTIONS)
    options = (*map(float, numbers.values()), [*map(float, stds)], float(wh_ratio_clip), box_loss, convention)
    losses: Tensor = _ops.candidate_losses(*tensors, *options)
    return losses


def check_maps(
    anchors: Sequence[Tensor], cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor], label: Sequence[Tensor]
) -> None:
    """The levels; `label` says how many images there are."""
    check_list("anchors", anchors, "level")
    check_list("cls_scores", cls_scores, "level", len(anchors), "`anchors`")
    check_list("bbox_preds", bbox_preds, "level", len(anchors), "`anchors`")
    check_list("label", label)
    device, classes = None, None
    for level, (boxes, scores, deltas) in enumerate(zip(anchors, cls_scores, bbox_preds, strict=True)):
        check_tensor(f"anchors[{level}]", boxes, (None, 4), (anchors[0].dtype,) if level else FLOATS, device)
        device = boxes.device
        dtypes = ((cls_scores[0].dtype,), (bbox_preds[0].dtype,)) if level else (FLOATS, FLOATS)
        check_tensor(f"cls_scores[{level}]", scores, (len(label), None, None, None), dtypes[0], device)
        check_tensor(f"bbox_preds[{level}]", deltas, (len(label), None, *scores.shape[2:]), dtypes[1], device)
        per_location = deltas.shape[1] // 4
        if deltas.shape[1] % 4 or per_location == 0:
            raise ValueError(f"`bbox_preds[{level}]` must have 4 channels for each anchor of a location, got {deltas.shape[1]}")
        if scores.shape[1] != per_location * (scores.shape[1] // per_location if classes is None else classes):
            wanted = f"a multiple of {per_location}" if classes is None else str(per_location * classes)
            raise ValueError(
                f"`cls_scores[{level}]` must have {wanted} channels (anchors at a location: {per_location}), "
                f"got {scores.shape[1]}"
            )
        classes, (height, width) = scores.shape[1] // per_location, scores.shape[2:]
        if boxes.shape[0] != height * width * per_location:
            raise ValueError(
                f"`anchors[{level}]` must hold {height * width * per_location} anchors as `bbox_preds[{level}]` does, "
                f"got {boxes.shape[0]}"
            )
