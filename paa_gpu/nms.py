"""Non-maximum suppression of all images and classes of a batch at once, into a fixed room, so that nobody waits for a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._checks import (
    FLOATS,
    INTEGERS,
    LIST,
    check_bool,
    check_float,
    check_int,
    check_list,
    check_non_negative,
    check_option,
    check_positive,
    check_tensor,
)

__all__ = ["Detections", "batched_nms"]

METHODS = ("hard", "linear", "gaussian")


class Detections(NamedTuple):
    """The detections of N images with room for M each: the first `count` of a row, then zeros, and -1 for labels and index."""

    boxes: Tensor  #: Tensor[N, M, 4], of the dtype of the input
    scores: Tensor  #: Tensor[N, M], of the dtype of the input; descending; those of a soft form have decayed
    labels: Tensor  #: Tensor[N, M] int64
    #: Tensor[N, M] int64: which of the image's boxes it was
    index: Tensor  # type: ignore[assignment]
    #: Tensor[N] int64, on the device
    count: Tensor  # type: ignore[assignment]


def batched_nms(
    boxes: Tensor | Sequence[Tensor],
    scores: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor] | None,
    iou_threshold: float,
    *,
    score_thr: float | None = None,
    nms_pre: int = 0,
    max_per_img: int = 0,
    method: str = "hard",
    sigma: float = 0.5,
    min_score: float = 1e-3,
    class_agnostic: bool = False,
) -> Detections:
    """Keep the best boxes of every class of every image, and suppress or weaken those that overlap them.

    The candidates of an image come in one of two forms: boxes with a score and a label each, as torchvision's `batched_nms`
    takes them, or boxes with a score for every class, as mmcv's `multiclass_nms` takes them, where each box is a candidate of
    each class. Either form is one tensor for the batch, or a list with one tensor per image, of any lengths.

    Args:
        boxes: Tensor[N, K, 4] floating, x1, y1, x2, y2; or a list of Tensor[K_i, 4].
        scores: Tensor[N, K] floating with `labels`, Tensor[N, K, C] without; or a list of Tensor[K_i] or Tensor[K_i, C].
        labels: Tensor[N, K] of any integer dtype, any integers; or a list of Tensor[K_i]. None: a label is a column of scores.
        iou_threshold: a candidate is suppressed by a better one of its class where their IoU exceeds it; not negative.
        score_thr: candidates have a score above it, rounded to the dtype of the scores before; None: every score is one. Padding
            of boxes may have any score up to it.
        nms_pre: candidates of an image, over all classes, that take part at most, the best; 0: all.
        max_per_img: M, detections of an image at most; 0: as many as there may be, K, or K * C without labels.
        method: "hard"; or a soft form, which suppresses nothing, but multiplies scores: "linear" with 1 - IoU where that exceeds
            the threshold, "gaussian" with exp(-IoU^2 / sigma).
        sigma: of "gaussian"; positive.
        min_score: of the soft forms: candidates stay while their score is above it; not negative.
        class_agnostic: boxes suppress or weaken those of other classes too.

    Returns:
        `Detections`, by score, descending. Nothing synchronises, so a CUDA graph can hold it. `index` chooses what else belongs
        to the boxes.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; a number out of range; an unknown method; lists and
            tensors mixed, lists that are empty or differ in length.

    Equal scores: the lower index first, and of one box the lower class. NaN, which counts only where `score_thr` is None and
    `method` "hard", comes before all scores, as in torchvision. IoU = intersection / union, in the dtype of the boxes or float32
    if that is narrower, float64 where the scores are; a box with a NaN and two boxes without area, whose IoU is 0 / 0, suppress
    nothing. So the detections are those of `torchvision.ops.nms` called for each class, exactly. (torchvision's `batched_nms`
    shifts up to 1,000 boxes of a call by their class, which rounds their corners.) Inputs are not modified and no graph is
    recorded. On a GPU the time grows with detections times candidates of a class, or of an image with labels: give `max_per_img`
    where there are many. Source of the soft forms: Soft-NMS (arXiv 1704.04503); names as in mmcv's `soft_nms`, whose linear form
    also weakens at the threshold itself.
    """
    _check_options(iou_threshold, score_thr, nms_pre, max_per_img, method, sigma, min_score, class_agnostic)
    lengths = None
    if isinstance(boxes, LIST):
        columns = _check_lists(boxes, scores, labels)
        lengths = [image.shape[0] for image in columns[0]]
        box, score, *label = (torch.cat(column) for column in columns)
    else:
        box, score, *label = _check_image("", (boxes, scores, labels), (None, None), None)
    if label:
        score = score.unsqueeze(-1)
    options = iou_threshold, score_thr, nms_pre, max_per_img, method, sigma, min_score, class_agnostic
    return Detections(*_ops.batched_nms(box.detach(), score.detach(), label[0] if label else None, lengths, *options))


def _check_options(
    iou_threshold: float,
    score_thr: float | None,
    nms_pre: int,
    max_per_img: int,
    method: str,
    sigma: float,
    min_score: float,
    class_agnostic: bool,
) -> None:
    check_non_negative("iou_threshold", iou_threshold)
    if score_thr is not None:
        check_float("score_thr", score_thr)
    check_int("nms_pre", nms_pre, 0)
    check_int("max_per_img", max_per_img, 0)
    check_option("method", method, METHODS)
    check_positive("sigma", sigma)
    check_non_negative("min_score", min_score)
    check_bool("class_agnostic", class_agnostic)


def _check_lists(boxes: Any, scores: Any, labels: Any) -> list[list[Tensor]]:
    """The columns, without labels where there are none."""
    check_list("boxes", boxes)
    check_list("scores", scores, length=len(boxes), like="`boxes`")
    if labels is not None:
        check_list("labels", labels, length=len(boxes), like="`boxes`")
    images: list[list[Tensor]] = []
    for i, image in enumerate(zip(boxes, scores, labels or [None] * len(boxes), strict=True)):
        images.append(_check_image(f"[{i}]", image, (None,), images[0] if i else None))
    return [list(column) for column in zip(*images, strict=True)]


def _check_image(end: str, image: Sequence[Any], shape: tuple[int | None, ...], first: Sequence[Tensor] | None) -> list[Tensor]:
    """Boxes, scores and perhaps labels of an image, or of all. `shape`: of boxes, without corners; `first`: the first image."""
    boxes, scores, labels = image
    dtypes = (FLOATS, FLOATS, INTEGERS) if first is None else [(tensor.dtype,) for tensor in first]
    check_tensor(f"boxes{end}", boxes, (*shape, 4), dtypes[0], None if first is None else first[0].device)
    shape = boxes.shape[:-1]
    if labels is None:
        shape = (*shape, None if first is None else first[1].shape[-1])
    check_tensor(f"scores{end}", scores, shape, dtypes[1], boxes.device)
    if labels is None:
        return [boxes, scores]
    check_tensor(f"labels{end}", labels, boxes.shape[:-1], dtypes[2], boxes.device)
    return [boxes, scores, labels]
