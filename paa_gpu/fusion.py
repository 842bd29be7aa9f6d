"""Weighted boxes fusion: it makes one set from the boxes of several models, and averages those that overlap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from . import _ops
from ._checks import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_float,
    check_list,
    check_non_negative,
    check_option,
    check_tensor,
    check_weight,
    values_of,
)

__all__ = ["FusedBoxes", "weighted_boxes_fusion"]

CONF_TYPES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")

IN_PIXELS = 2.0  # a larger corner most likely is; a model's own boxes end a little beyond the image
MOST_MODELS = 64  # an integer has one bit for each model of a cluster


class FusedBoxes(NamedTuple):
    """The fused boxes of N images with room for M each: the first `count` of a row, then zeros, and -1 for labels."""

    boxes: Tensor  #: Tensor[N, M, 4], of the dtype of the input
    scores: Tensor  #: Tensor[N, M], of the dtype of the input; descending
    labels: Tensor  #: Tensor[N, M] int64
    #: Tensor[N] int64, on the device
    count: Tensor  # type: ignore[assignment]


def weighted_boxes_fusion(
    boxes: Sequence[Sequence[Tensor]],
    scores: Sequence[Sequence[Tensor]],
    labels: Sequence[Sequence[Tensor]],
    weights: Sequence[float] | None = None,
    iou_thr: float = 0.55,
    skip_box_thr: float = 0.0,
    conf_type: str = "avg",
    allows_overflow: bool = False,
) -> FusedBoxes:
    """Fuse the boxes of several models, or of several views of an image, for a batch of images at once.

    The function takes the boxes of a class by weighted score, the best first. A box joins the cluster whose fused box has the
    highest IoU with it, if that IoU exceeds `iou_thr`. Otherwise it begins a cluster. The fused box of a cluster is the mean of
    its boxes. The weights of the mean are the weighted scores.

    Args:
        boxes: for each image a list with one tensor per model: Tensor[K, 4] floating, x1, y1, x2, y2 as fractions of the image's
            width and height. K may differ, and may be 0. Swapped corners are swapped back. Corners outside [0, 1] are clipped.
        scores: lists as `boxes`, of Tensor[K] floating.
        labels: lists as `boxes`, of Tensor[K] of any integer dtype.
        weights: of the models, from 1e-30 to 1e30; None: 1 for each. A weighted score is a score times the weight of its model.
        iou_thr: not negative.
        skip_box_thr: boxes with a lower score are left out. It is rounded to the dtype of the scores first.
        conf_type: how a cluster gets its score.

            - "avg": the mean of the weighted scores, times the number of boxes, divided by the sum of all weights. The number of
              boxes counts at most as the number of models.
            - "max": the highest weighted score, divided by the highest weight.
            - "box_and_model_avg": the sum of the weighted scores, divided by the sum of the boxes' weights. This is multiplied by
              the weights of the models that have a box in the cluster, and divided by the weights of all models.
            - "absent_model_aware_avg": the sum of the weighted scores, divided by the sum of the boxes' weights and the weights
              of the models without a box in the cluster.
        allows_overflow: with "avg", all boxes count, even if there are more than models. Then scores may exceed 1.

    Returns:
        `FusedBoxes`, highest score first. Nothing waits for the device. M is the largest number of boxes of an image, over all
        models.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; a number out of range; an unknown `conf_type`; no model,
            more than 64 models, or a different number of models in an image; a wrong number of weights.

    The results equal those of `ensemble_boxes.weighted_boxes_fusion` under numpy 2, rounded to the dtypes of the inputs. They are
    equal to the last bit for up to 7 models, and within the last digits for more. Both compute in float64. Both keep the sums of
    a cluster, and its box and score if it has more than one box, in float32. Boxes without area are left out. Corners are clipped
    to 0 to 1. So boxes in pixels lose their area, or become the whole image. On the CPU, outside of `torch.compile`, a warning
    says so if a corner is above 2.

    Equal weighted scores of a class: the later model comes first, and in a model the later box. Equal fused scores: the class
    that appears later comes first, then the later cluster. In `ensemble_boxes`, an unstable sort decides.

    Two things differ: boxes with a NaN are left out, and so are boxes with a weighted score that is not finite in float32. A
    cluster of several boxes that all have score 0 gets NaN corners, as in `ensemble_boxes`. A `skip_box_thr` above 0 avoids that.

    Inputs are not modified and no graph is recorded. On a GPU, one program takes one class of one image, box after box. Source:
    Weighted boxes fusion (arXiv 1910.13302).
    """
    columns = _check_boxes(boxes, scores, labels)
    models = len(boxes[0])
    weights = _check_weights(weights, models)
    check_non_negative("iou_thr", iou_thr)
    check_float("skip_box_thr", skip_box_thr)
    check_option("conf_type", conf_type, CONF_TYPES)
    check_bool("allows_overflow", allows_overflow)
    lengths = [part.shape[0] for part in columns[0]]
    box, score, label = map(_ops.joined, columns)
    _warn_of_pixels(box)
    options = float(iou_thr), float(skip_box_thr), conf_type, allows_overflow  # a loop would be compiled once more for an int
    return FusedBoxes(*_ops.weighted_boxes_fusion(box, score, label, lengths, weights, *options))


def _warn_of_pixels(boxes: Tensor) -> None:
    values = values_of(boxes)
    if values is not None and (values > IN_PIXELS).any():
        warnings.warn(
            f"`boxes` has a corner of {np.nanmax(values):g}, and corners are clipped to 1: divide boxes in pixels by the size of "
            "the image",
            stacklevel=3,
        )


def _check_weights(weights: Any, models: int) -> list[float]:
    if weights is None:
        return [1.0] * models
    check_list("weights", weights, "model", length=models, like="`boxes[0]`")
    for t, weight in enumerate(weights):
        check_weight(f"weights[{t}]", weight)
    return [float(weight) for weight in weights]


def _check_boxes(boxes: Any, scores: Any, labels: Any) -> list[list[Tensor]]:
    """Three columns of tensors: image after image, and model after model in each."""
    check_list("boxes", boxes)
    check_list("scores", scores, length=len(boxes), like="`boxes`")
    check_list("labels", labels, length=len(boxes), like="`boxes`")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, image in enumerate(zip(boxes, scores, labels, strict=True)):
        check_list(f"boxes[{i}]", image[0], "model", None if i == 0 else len(boxes[0]), "`boxes[0]`")
        if len(image[0]) > MOST_MODELS:
            raise ValueError(f"`boxes[{i}]` must have at most {MOST_MODELS} entries, got {len(image[0])}")
        check_list(f"scores[{i}]", image[1], "model", len(image[0]), f"`boxes[{i}]`")
        check_list(f"labels[{i}]", image[2], "model", len(image[0]), f"`boxes[{i}]`")
        for t, part in enumerate(zip(*image, strict=True)):
            parts.append(_check_model(f"[{i}][{t}]", *part, parts[0] if parts else None))
    return [list(column) for column in zip(*parts, strict=True)]


def _check_model(
    end: str, boxes: Tensor, scores: Tensor, labels: Tensor, first: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes: Any = (FLOATS, FLOATS, INTEGERS) if first is None else [(tensor.dtype,) for tensor in first]
    check_tensor(f"boxes{end}", boxes, (None, 4), dtypes[0], None if first is None else first[0].device)
    check_tensor(f"scores{end}", scores, (boxes.shape[0],), dtypes[1], boxes.device)
    check_tensor(f"labels{end}", labels, (boxes.shape[0],), dtypes[2], boxes.device)
    return boxes, scores, labels
