"""Max-IoU assignment: the ground truth of each anchor, before the losses decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._checks import (
    FLOATS,
    LIST,
    check_bool,
    check_corners,
    check_float,
    check_list,
    check_non_negative,
    check_option,
    check_tensor,
)

__all__ = ["Assignment", "assign_max_iou"]

LOW_QUALITY = ("gt", "anchor")


class Assignment(NamedTuple):
    """The assignment of the anchors of N images."""

    gt_inds: list[Tensor]  #: per image Tensor[A_n] int64: i + 1 is ground truth i, 0 is background, -1 is neither
    #: per image Tensor[A_n] float32: the highest IoU; 0 without ground truths, -1 where ignored, not valid or NaN
    max_overlaps: list[Tensor]


def assign_max_iou(
    anchors: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor] | None = None,
    *,
    pos_iou_thr: float = 0.1,
    neg_iou_thr: float = 0.1,
    min_pos_iou: float = 0.0,
    ignore_iof_thr: float = -1.0,
    match_low_quality: bool = True,
    gt_max_assign_all: bool = True,
    low_quality: str = "gt",
    eps: float = 1e-6,
) -> Assignment:
    """Assign the anchors of N images to ground truths, in memory O(A + G).

    This is mmdetection's `MaxIoUAssigner`, or torchvision's `Matcher` and `SSDMatcher`, for a batch. The highest IoU of an anchor
    decides. Below `neg_iou_thr`, the anchor is background. From `pos_iou_thr` on, it belongs to the ground truth. In between, it
    is neither. With `match_low_quality`, the best anchors of each ground truth also become positive, whatever their IoU.

    Args:
        anchors: one list of levels for all images, Tensor[A_l, 4]: x1, y1, x2, y2 in pixels. Or one such list for each image, if
            anchors or proposals differ: `[[boxes] for boxes in proposals]`. A_n = sum(A_l) of image n, less than 2^31.
        gt_bboxes: per image Tensor[G_n, 4], ground truths. G_n may be 0. All have one dtype. It may differ from that of
            `anchors`.
        gt_bboxes_ignore: per image Tensor[I_n, 4], boxes to ignore, dtype of `gt_bboxes`. They count only if `ignore_iof_thr` >
            0.
        valid: per image BoolTensor[A_n]. False takes an anchor out: it gets -1, and is never the best anchor of a ground truth.
        pos_iou_thr, neg_iou_thr: not negative. The defaults of all options are PAA's.
        min_pos_iou: a ground truth has best anchors only if its best overlap reaches this. With 0, a ground truth without any
            overlap gets all anchors but the best ones of later ground truths, as published.
        ignore_iof_thr: an anchor becomes -1 and overlaps nothing, if a larger part of its area than this lies in a box to ignore.
            In an image without ground truths, nothing is ignored. Zero or negative: nothing is ignored.
        match_low_quality: give each ground truth its best anchors.
        gt_max_assign_all: True: all anchors that tie for the best overlap. False: the first of them.
        low_quality: the owner of an anchor that is the best of some ground truth. `"gt"`: this ground truth (mmdetection,
            `SSDMatcher`). `"anchor"`: the ground truth that the anchor itself overlaps most (torchvision's `Matcher`).
        eps: the least union that an intersection is divided by, in square pixels. mmdetection has 1e-6. With 0, as in
            torchvision, the IoU of an empty box is 0.

    Returns:
        `Assignment`.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; lists that are empty or differ in length; a negative
            threshold or `eps`; an unknown `low_quality`.

    With these options, the matches equal torchvision's to the bit, unless both an anchor and a ground truth have no area. Then
    torchvision's IoU is 0 / 0. torchvision writes -1 for background, which is 0 here; -2 for neither, which is -1 here; and i
    for ground truth i, which is i + 1 here::

        Matcher(high, low, True)   pos_iou_thr=high, neg_iou_thr=low, low_quality="anchor", eps=0
        Matcher(high, low, False)  pos_iou_thr=high, neg_iou_thr=low, match_low_quality=False, eps=0
        SSDMatcher(threshold)      pos_iou_thr=threshold, neg_iou_thr=threshold, gt_max_assign_all=False, eps=0

    Ties: an anchor with equal overlaps belongs to the lower ground truth. An anchor that is the best of several ground truths
    belongs to the highest, as published. Overlaps are float32 for all dtypes. Each operation rounds as torch does, and thresholds
    are rounded to float32. A box with a NaN overlaps nothing. If every ground truth has a NaN, all anchors are -1. The function
    does not modify its inputs, records no graph, and does not wait for the device.

    Source: mmdetection 3.3.0, `MaxIoUAssigner`; torchvision 0.29, `models/detection/_utils.py`; PAA (arXiv 2007.08103), section
    3.2.
    """
    check_list("gt_bboxes", gt_bboxes)
    levels, sizes = _levels(anchors, len(gt_bboxes))
    check_boxes(gt_bboxes, levels[0].device)
    gt_inds, overlaps = assignment_of(
        levels, sizes, gt_bboxes, gt_bboxes_ignore, valid, isinstance(anchors[0], LIST),
        pos_iou_thr=pos_iou_thr, neg_iou_thr=neg_iou_thr, min_pos_iou=min_pos_iou, ignore_iof_thr=ignore_iof_thr,
        match_low_quality=match_low_quality, gt_max_assign_all=gt_max_assign_all, low_quality=low_quality, eps=eps,
    )  # fmt: skip
    return Assignment(list(gt_inds.split_with_sizes(sizes)), list(overlaps.split_with_sizes(sizes)))


def assignment_of(
    levels: Sequence[Tensor],
    sizes: Sequence[int],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor] | None,
    valid: Sequence[Tensor] | None,
    per_image: bool,
    *,
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    ignore_iof_thr: float,
    match_low_quality: bool,
    gt_max_assign_all: bool,
    low_quality: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `assign_max_iou` returns, of all images one after the other. The levels and the ground truths were checked.

    `sizes`: the anchors of each image. `per_image`: each image has its own levels.
    """
    device = levels[0].device
    if gt_bboxes_ignore is not None:
        check_list("gt_bboxes_ignore", gt_bboxes_ignore, length=len(gt_bboxes), like="`gt_bboxes`")
        for image, boxes in enumerate(gt_bboxes_ignore):
            check_tensor(f"gt_bboxes_ignore[{image}]", boxes, (None, 4), (gt_bboxes[0].dtype,), device)
            check_corners(f"gt_bboxes_ignore[{image}]", boxes)
    if valid is not None:
        check_list("valid", valid, length=len(gt_bboxes), like="`gt_bboxes`")
        for image, flags in enumerate(valid):
            check_tensor(f"valid[{image}]", flags, (sizes[image],), (torch.bool,), device)
    numbers = {"pos_iou_thr": pos_iou_thr, "neg_iou_thr": neg_iou_thr, "min_pos_iou": min_pos_iou, "eps": eps}
    for name, number in numbers.items():
        check_non_negative(name, number)
    check_float("ignore_iof_thr", ignore_iof_thr)
    check_bool("match_low_quality", match_low_quality)
    check_bool("gt_max_assign_all", gt_max_assign_all)
    check_option("low_quality", low_quality, LOW_QUALITY)
    ignored = gt_bboxes_ignore if gt_bboxes_ignore is not None and ignore_iof_thr > 0 else ()
    columns = map(_ops.detached, (levels, gt_bboxes, ignored, valid or ()))
    thresholds = (float(pos_iou_thr), float(neg_iou_thr), float(min_pos_iou), float(ignore_iof_thr), float(eps))
    options = (per_image, *thresholds, match_low_quality, gt_max_assign_all, low_quality)
    gt_inds, overlaps = _ops.assign_max_iou(*columns, *options)
    return gt_inds, overlaps


def check_boxes(gt_bboxes: Sequence[Tensor], device: torch.device) -> None:
    for image, boxes in enumerate(gt_bboxes):
        check_tensor(f"gt_bboxes[{image}]", boxes, (None, 4), (gt_bboxes[0].dtype,) if image else FLOATS, device)
        check_corners(f"gt_bboxes[{image}]", boxes)


def _levels(anchors: Sequence[Any], images: int) -> tuple[list[Tensor], list[int]]:
    """The levels, and the number of anchors of each image. If images have their own anchors, image follows image.

    Each image gets as many levels. A level without anchors changes nothing.
    """
    check_list("anchors", anchors, "level")
    if not isinstance(anchors[0], LIST):
        levels = _checked_levels("anchors", anchors, None)
        return levels, [sum(level.shape[0] for level in levels)] * images
    check_list("anchors", anchors, length=images, like="`gt_bboxes`")
    of_images: list[list[Tensor]] = []
    for image, levels in enumerate(anchors):
        check_list(f"anchors[{image}]", levels, "level")
        of_images.append(_checked_levels(f"anchors[{image}]", levels, of_images[0][0] if image else None))
    most, none = max(map(len, of_images)), of_images[0][0][:0]
    sizes = [sum(level.shape[0] for level in levels) for levels in of_images]
    return [level for levels in of_images for level in levels + [none] * (most - len(levels))], sizes


def _checked_levels(name: str, levels: Sequence[Tensor], like: Tensor | None) -> list[Tensor]:
    """Levels of one dtype on one device: those of `like`, or of the first."""
    for i, boxes in enumerate(levels):
        dtypes, device = (FLOATS, None) if like is None else ((like.dtype,), like.device)
        check_tensor(f"{name}[{i}]", boxes, (None, 4), dtypes, device)
        like = boxes if like is None else like
    return list(levels)
