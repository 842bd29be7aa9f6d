"""Max-IoU assignment: which ground truth each anchor belongs to before the losses decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, check_bool, check_float, check_list, check_non_negative, check_tensor

__all__ = ["Assignment", "assign_max_iou"]


class Assignment(NamedTuple):
    """What the anchors of N images were assigned to."""

    gt_inds: list[Tensor]  #: per image Tensor[A] int64: i + 1, the ground truth i; 0, background; -1, neither
    max_overlaps: list[
        Tensor
    ]  #: per image Tensor[A] float32: the highest IoU; 0 without ground truths, -1 where ignored or not valid


def assign_max_iou(
    anchors: Sequence[Tensor],
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
) -> Assignment:
    """Assign the anchors of N images to ground truths: mmdetection's `MaxIoUAssigner` for a batch, in memory O(A + G).

    An anchor is background where its highest IoU is below `neg_iou_thr`, the ground truth's from `pos_iou_thr` on, neither in
    between. With `match_low_quality` the best anchors of each ground truth become its own after that, whatever theirs is.

    Args:
        anchors: one list of levels for all images, Tensor[A_l, 4]: x1, y1, x2, y2 in pixels; A = sum(A_l), less than 2^31.
        gt_bboxes: per image Tensor[G_n, 4], ground truths; G_n may be 0. Dtype of `anchors`, as the one below.
        gt_bboxes_ignore: per image Tensor[I_n, 4], boxes to ignore; only with `ignore_iof_thr` > 0.
        valid: per image BoolTensor[A]; an anchor where it is False is not there: it gets -1, and is no ground truth's best.
        pos_iou_thr, neg_iou_thr: not negative. The defaults are PAA's, as those of all options.
        min_pos_iou: a ground truth whose best overlap is below has no best anchors. With 0, one that no anchor overlaps gets all
            anchors without an overlap, as published.
        ignore_iof_thr: an anchor of whose area a larger part lies in a box to ignore overlaps nothing and becomes -1, unless the
            image has no ground truths. Not positive: nothing is ignored.
        match_low_quality: give each ground truth its best anchors.
        gt_max_assign_all: all anchors that tie for the best overlap; otherwise the first of them.

    Returns:
        `Assignment`.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; lists that are empty or differ in length; a negative
            threshold.

    Ties: an anchor with equal overlaps belongs to the lower ground truth, one that is the best of several to the higher, as
    published. Overlaps are float32 whatever the dtype, each operation rounded as torch rounds it; thresholds are rounded to
    float32. A box with a NaN overlaps nothing, which with ground truths of its kind only makes all anchors -1. Inputs are not
    modified, no graph is recorded, nothing synchronises. Source: mmdetection 3.3.0, `MaxIoUAssigner`; PAA (arXiv 2007.08103),
    section 3.2.
    """
    check_list("anchors", anchors, "level")
    check_list("gt_bboxes", gt_bboxes)
    device = None
    for name, column in (("anchors", anchors), ("gt_bboxes", gt_bboxes)):
        for i, boxes in enumerate(column):
            dtypes = FLOATS if device is None else (anchors[0].dtype,)
            check_tensor(f"{name}[{i}]", boxes, (None, 4), dtypes, device)
            device = boxes.device
    if gt_bboxes_ignore is not None:
        check_list("gt_bboxes_ignore", gt_bboxes_ignore, length=len(gt_bboxes), like="`gt_bboxes`")
        for image, boxes in enumerate(gt_bboxes_ignore):
            check_tensor(f"gt_bboxes_ignore[{image}]", boxes, (None, 4), (anchors[0].dtype,), device)
    if valid is not None:
        check_list("valid", valid, length=len(gt_bboxes), like="`gt_bboxes`")
        total = sum(level.shape[0] for level in anchors)
        for image, flags in enumerate(valid):
            check_tensor(f"valid[{image}]", flags, (total,), (torch.bool,), device)
    thresholds = {"pos_iou_thr": pos_iou_thr, "neg_iou_thr": neg_iou_thr, "min_pos_iou": min_pos_iou}
    for name, threshold in thresholds.items():
        check_non_negative(name, threshold)
    check_float("ignore_iof_thr", ignore_iof_thr)
    check_bool("match_low_quality", match_low_quality)
    check_bool("gt_max_assign_all", gt_max_assign_all)
    ignored = gt_bboxes_ignore if gt_bboxes_ignore is not None and ignore_iof_thr > 0 else ()
    columns = [
        [tensor.detach() if tensor.requires_grad else tensor for tensor in column]
        for column in (anchors, gt_bboxes, ignored, valid or ())
    ]
    options = (*map(float, thresholds.values()), float(ignore_iof_thr), match_low_quality, gt_max_assign_all)
    gt_inds, overlaps = _ops.assign_max_iou(*columns, *options)
    sizes = [sum(level.shape[0] for level in anchors)] * len(gt_bboxes)
    return Assignment(list(gt_inds.split_with_sizes(sizes)), list(overlaps.split_with_sizes(sizes)))
