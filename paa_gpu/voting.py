"""Score voting: every detection that NMS kept moves to the weighted mean of the boxes around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._checks import (
    FLOATS,
    INDICES,
    INTEGERS,
    LIST,
    check_bool,
    check_float,
    check_list,
    check_non_negative,
    check_positive,
    check_tensor,
    check_weight,
)

__all__ = ["score_voting", "score_voting_batch"]

# Of the detections, their labels, the candidates and their scores.
_DTYPES: Sequence[Sequence[torch.dtype]] = (FLOATS, INTEGERS, FLOATS, FLOATS)


def score_voting(
    det_bboxes: Tensor,
    det_labels: Tensor,
    mlvl_bboxes: Tensor,
    mlvl_nms_scores: Tensor,
    score_thr: float,
    iou_thr: float = 0.01,
    sigma: float = 0.025,
    offset: float = 0.0,
    keep_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Refine the detections of one image: a drop-in for `PAAHead.score_voting` of mmdetection.

    Boxes before NMS vote for a detection. A box votes if its score for the detection's class exceeds `score_thr`, and its IoU
    with the detection exceeds `iou_thr`. The new box is the mean of the voters, weighted with `exp(-(1 - IoU)^2 / sigma) *
    score`. The score and the class of the detection stay.

    Args:
        det_bboxes: Tensor[k, 5] float16, bfloat16, float32 or float64, the detections that NMS kept: x1, y1, x2, y2 in pixels,
            and the score.
        det_labels: Tensor[k] of any integer dtype, the class of each detection.
        mlvl_bboxes: Tensor[N, 4] floating, the boxes before NMS.
        mlvl_nms_scores: Tensor[N, C] floating, their scores. There may be a last column of zeros for the background.
        score_thr: the score of a voter is above this. It is first rounded to the dtype of the scores.
        iou_thr: the IoU of a voter is above this; not negative.
        sigma: the width of the weights; positive.
        offset: 0 or 1, added to widths and heights for the IoU. mmdetection uses 0, the authors' repository uses 1.
        keep_order: True: detections come back in the order of the input. False: they are sorted by class, and keep their order
            within a class, as in mmdetection.

    Returns:
        `(det_bboxes, det_labels)`: Tensor[k, 5] and Tensor[k], of the dtypes of the inputs.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; `sigma` not positive, `iou_thr` negative, `offset`
            neither 0 nor 1.

    Sums are float64 if any of the tensors is, else float32. A detection keeps its box if the weights sum to zero. This happens
    without voters, for a class without candidates, and for a label outside [0, C). mmdetection divides 0 by 0 there, or drops the
    detection. A box with an infinity or NaN does not vote; a voter with an infinite score makes NaN. A detection whose corners
    have an infinity or NaN keeps its box. The function does not modify its inputs, records no graph, and does not wait for the
    device. Source: PAA (arXiv 2007.08103), section 3.3.
    """
    image = det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores
    _check_image(image, _DTYPES, None, None, "", "")
    options = _check_options(score_thr, iou_thr, sigma, offset, keep_order)
    columns = [[tensor] for tensor in _ops.detached(image)]
    results: tuple[Tensor, Tensor] = _ops.score_voting(*columns, *options)
    return results


def score_voting_batch(
    det_bboxes: Sequence[Tensor] | Tensor,
    det_labels: Sequence[Tensor] | Tensor,
    mlvl_bboxes: Sequence[Tensor] | Sequence[Sequence[Tensor]] | Tensor,
    mlvl_nms_scores: Sequence[Tensor] | Sequence[Sequence[Tensor]] | Tensor,
    score_thr: float,
    iou_thr: float = 0.01,
    sigma: float = 0.025,
    offset: float = 0.0,
    keep_order: bool = False,
    count: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """Refine the detections of a batch of images at once. For each image, the result equals that of `score_voting`.

    Args:
        det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores: lists with one tensor per image, shaped as for `score_voting`. A
            list has one dtype, and all images have the same classes. Or padded tensors of N images: Tensor[N, M, 5],
            Tensor[N, M], Tensor[N, K, 4], Tensor[N, K, C]. Or, with several pools of candidates, lists of detections, while
            `mlvl_bboxes` and `mlvl_nms_scores` have for each image a list with one tensor per pool. Pools are, for example, the
            boxes of several models, or of several views.
        score_thr, iou_thr, sigma, offset, keep_order: as in `score_voting`, for all images.
        count: Tensor[N] int64 or int32, the number of detections of each image. Only with tensors. The rest of a row is padding,
            and stays as it is.
        weights: of the pools, from 1e-30 to 1e30; None: 1 for each. A vote is multiplied by the weight of its pool. The weights
            do not change the score threshold. Only with pools.

    Returns:
        `(det_bboxes, det_labels)`: lists if the inputs are lists, tensors if they are tensors. Nothing waits for the device.

    Raises:
        TypeError, ValueError: as `score_voting`, with the number of the image; lists that are empty or differ in length; a mix of
            lists and tensors; `count` with lists; `weights` without pools; images with different numbers of pools.

    An image may have no detections, or no boxes. Pools need no tensor of all candidates, and no more launches. Source: PAA
    (arXiv 2007.08103), section 3.3.
    """
    columns: list[Any] = [det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores]
    pools = isinstance(mlvl_bboxes, LIST) and len(mlvl_bboxes) > 0 and isinstance(mlvl_bboxes[0], LIST)
    if weights is not None and not pools:
        raise ValueError(f"`weights` must be None where `mlvl_bboxes` has no pools, got {type(weights).__name__}")
    if isinstance(det_bboxes, Tensor):
        return _vote_padded(columns, count, score_thr, iou_thr, sigma, offset, keep_order)
    if count is not None:
        raise ValueError(f"`count` must be None where `det_bboxes` is a list, got {type(count).__name__}")
    check_list("det_bboxes", det_bboxes)
    for name, column in zip(("det_bboxes", "det_labels", "mlvl_bboxes", "mlvl_nms_scores"), columns, strict=True):
        check_list(name, column, length=len(det_bboxes), like="`det_bboxes`")
    if pools:
        voted, labels = _vote_pools(columns, weights, score_thr, iou_thr, sigma, offset, keep_order)
    else:
        _check_tensors(columns, [(f"[{image}]",) * 2 for image in range(len(det_bboxes))])
        options = _check_options(score_thr, iou_thr, sigma, offset, keep_order)
        columns = [_ops.detached(column) for column in columns]
        voted, labels = _ops.score_voting(*columns, *options)
    detections = [image.shape[0] for image in det_bboxes]
    return list(voted.split_with_sizes(detections)), list(labels.split_with_sizes(detections))


def _vote_padded(
    columns: list[Tensor], count: Tensor | None, score_thr: float, iou_thr: float, sigma: float, offset: float, keep_order: bool
) -> tuple[Tensor, Tensor]:
    det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores = columns
    check_tensor("det_bboxes", det_bboxes, (None, None, 5), FLOATS)
    images, most = det_bboxes.shape[:2]
    check_tensor("det_labels", det_labels, (images, most), INTEGERS, det_bboxes.device)
    check_tensor("mlvl_bboxes", mlvl_bboxes, (images, None, 4), FLOATS, det_bboxes.device)
    check_tensor("mlvl_nms_scores", mlvl_nms_scores, (images, mlvl_bboxes.shape[1], None), FLOATS, det_bboxes.device)
    if count is not None:
        check_tensor("count", count, (images,), INDICES, det_bboxes.device)
    options = _check_options(score_thr, iou_thr, sigma, offset, keep_order)
    labels = det_labels
    if count is not None:
        # Of no class, and behind every other label.
        there = torch.arange(most, device=count.device) < count[:, None]
        labels = torch.where(there, det_labels.long(), torch.iinfo(torch.int64).max)
    tensors = det_bboxes.detach(), labels, mlvl_bboxes.detach(), mlvl_nms_scores.detach()
    voted, labels = _ops.score_voting_padded(*tensors, *options)
    return voted, labels if count is None else torch.where(there, labels.to(det_labels.dtype), det_labels)


def _vote_pools(
    columns: list[Any],
    weights: Sequence[float] | None,
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
) -> tuple[Tensor, Tensor]:
    """The same for several pools of candidates."""
    pools = len(columns[2][0])
    entries, suffix = [], []
    for i, (det, label, *lists) in enumerate(zip(*columns, strict=True)):
        for name, parts in zip(("mlvl_bboxes", "mlvl_nms_scores"), lists, strict=True):
            check_list(f"{name}[{i}]", parts, "pool", pools if pools else None, "`mlvl_bboxes[0]`")
        entries += [(det, label, *pool) for pool in zip(*lists, strict=True)]
        suffix += [(f"[{i}]", f"[{i}][{pool}]") for pool in range(pools)]
    _check_tensors(list(zip(*entries, strict=True)), suffix)
    weights = [1.0] * pools if weights is None else weights
    check_list("weights", weights, "pool", pools, "`mlvl_bboxes[0]`")
    for pool, weight in enumerate(weights):
        check_weight(f"weights[{pool}]", weight)
    options = _check_options(score_thr, iou_thr, sigma, offset, keep_order)
    det, label = map(_ops.detached, columns[:2])
    boxes, scores = (_ops.detached([entry[place] for entry in entries]) for place in (2, 3))
    factors = [float(weight) for weight in weights]
    results: tuple[Tensor, Tensor] = _ops.score_voting(det, label, boxes, scores, *options, factors)
    return results


def _check_tensors(columns: Sequence[Sequence[Tensor]], suffix: Sequence[tuple[str, str]]) -> None:
    """The four tensors of each image or pool. All are on one device. A column has one dtype, and all scores the same classes.

    In errors, the names of detections and of candidates end in `suffix`.
    """
    dtypes, device, classes = _DTYPES, None, None
    for ends, image in zip(suffix, zip(*columns, strict=True), strict=True):
        _check_image(image, dtypes, device, classes, *ends)
        if device is None:
            dtypes, device, classes = [(tensor.dtype,) for tensor in image], image[0].device, image[3].shape[1]


def _check_image(
    image: Sequence[Tensor],
    dtypes: Sequence[Sequence[torch.dtype]],
    device: torch.device | None,
    classes: int | None,
    end: str,
    pool: str,
) -> None:
    det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores = image
    check_tensor("det_bboxes" + end, det_bboxes, (None, 5), dtypes[0], device)
    device = det_bboxes.device
    check_tensor("det_labels" + end, det_labels, det_bboxes.shape[:1], dtypes[1], device)
    check_tensor("mlvl_bboxes" + pool, mlvl_bboxes, (None, 4), dtypes[2], device)
    check_tensor("mlvl_nms_scores" + pool, mlvl_nms_scores, (mlvl_bboxes.shape[0], classes), dtypes[3], device)


def _check_options(
    score_thr: float, iou_thr: float, sigma: float, offset: float, keep_order: bool
) -> tuple[float, float, float, float, bool]:
    """The options, with ints as floats: a loop or a kernel would be compiled once more for an int."""
    check_float("score_thr", score_thr)
    check_non_negative("iou_thr", iou_thr)
    check_positive("sigma", sigma)
    check_float("offset", offset)
    if offset not in (0, 1):
        raise ValueError(f"`offset` must be 0 or 1, got {offset}")
    check_bool("keep_order", keep_order)
    return float(score_thr), float(iou_thr), float(sigma), float(offset), keep_order
