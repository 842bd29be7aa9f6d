"""Non-maximum suppression of all images and classes of a batch at once. Results have a fixed shape, so nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """The detections of N images, with room for M in each.

    The first `count` entries of a row are detections. The rest is zeros, and -1 for labels and index.
    """

    boxes: Tensor  #: Tensor[N, M, 4], of the dtype of the input
    scores: Tensor  #: Tensor[N, M], of the dtype of the input; descending; a soft form has lowered them
    labels: Tensor  #: Tensor[N, M] int64
    #: Tensor[N, M] int64: the index of each detection among the image's boxes
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

    Candidates come in one of two forms. With `labels`, each box has one score and one label, as in torchvision's `batched_nms`.
    Without, each box has a score for every class, and is a candidate of every class, as in mmcv's `multiclass_nms`. Either form
    is one tensor for the batch, or a list with one tensor per image, of any lengths.

    Args:
        boxes: Tensor[N, K, 4] floating, x1, y1, x2, y2; or a list of Tensor[K_i, 4].
        scores: Tensor[N, K] floating with `labels`, Tensor[N, K, C] without them; or a list of Tensor[K_i] or Tensor[K_i, C].
        labels: Tensor[N, K] of any integer dtype; or a list of Tensor[K_i]. None: the columns of the scores are the labels.
        iou_threshold: a better candidate of the same class suppresses a candidate if their IoU is above this; not negative.
        score_thr: the score of a candidate is above this, which is first rounded to the dtype of the scores. None: every box is
            a candidate. Give padding boxes a score of at most this.
        nms_pre: the best candidates of an image, over all classes, take part: this many at most. 0: all.
        max_per_img: M, the most detections of an image. 0: the most there can be: K, or K * C without labels.
        method: "hard", or a soft form. A soft form suppresses nothing, but multiplies scores: "linear" with 1 - IoU if the IoU is
            above the threshold, "gaussian" with exp(-IoU^2 / sigma).
        sigma: for "gaussian"; positive.
        min_score: for the soft forms: a candidate stays while its score is above this; not negative.
        class_agnostic: boxes also suppress or weaken boxes of other classes.

    Returns:
        `Detections`, the highest score first. Nothing waits for the device, so a CUDA graph can hold the call. With `index`, you
        can pick other properties of the boxes.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; a number out of range; an unknown method; a mix of
            lists and tensors; lists that are empty or differ in length.

    The detections equal those of `torchvision.ops.nms`, called for each class, exactly. torchvision's `batched_nms` differs for
    few boxes (up to 1,000 on the CPU, 25,000 on a GPU), because it shifts boxes by their class, which rounds their corners.

    Equal scores: the lower index comes first, and for one box the lower class. A NaN score counts only if `score_thr` is None and
    `method` is "hard". Then it comes before all scores, as in torchvision. IoU = intersection / union. It is float64 if the boxes
    or the scores are, else float32. A box with a NaN suppresses nothing. Two boxes without area, whose IoU is 0 / 0, do not
    suppress each other.

    The function does not modify its inputs, and records no graph. On a GPU, the time grows with the number of detections times
    the number of candidates of a class (with labels: of an image). Give `max_per_img` if there are many. Source of the soft
    forms: Soft-NMS (arXiv 1704.04503). Names are as in mmcv's `soft_nms`. mmcv's linear form also weakens at the threshold
    itself.
    """
    options = _check_options(iou_threshold, score_thr, nms_pre, max_per_img, method, sigma, min_score, class_agnostic)
    lengths = None
    if isinstance(boxes, LIST):
        columns = _check_lists(boxes, scores, labels)
        lengths = [image.shape[0] for image in columns[0]]
        box, score, *label = map(_ops.joined, columns)
    else:
        box, score, *label = _check_image("", (boxes, scores, labels), (None, None), None)
    if label:
        score = score.unsqueeze(-1)
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
) -> tuple[float, float | None, int, int, str, float, float, bool]:
    """The options, with ints as floats: a loop or a kernel would be compiled once more for an int."""
    check_non_negative("iou_threshold", iou_threshold)
    if score_thr is not None:
        check_float("score_thr", score_thr)
    check_int("nms_pre", nms_pre, 0)
    check_int("max_per_img", max_per_img, 0)
    check_option("method", method, METHODS)
    check_positive("sigma", sigma)
    check_non_negative("min_score", min_score)
    check_bool("class_agnostic", class_agnostic)
    score_thr = score_thr if score_thr is None else float(score_thr)
    return float(iou_threshold), score_thr, nms_pre, max_per_img, method, float(sigma), float(min_score), class_agnostic


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
    """Boxes, scores and perhaps labels of one image, or of all. `shape` is that of the boxes, `first` the first image."""
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
