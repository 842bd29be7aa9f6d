"""Out of Python: a detector as one module for `torch.export`, and the operators of its way as standard operators of ONNX.

`torch.export` takes the operators as they are. For ONNX, `torch.onnx.export(dynamo=True)` asks `translations()` what they are
made of: `NonMaxSuppression`, `TopK`, gathers and arithmetic, of opset 18 and the domain that every runtime has. Needs `pip
install paa-gpu[export]`, imported when `translations` is called. Shapes: N images, M detections, K boxes of each, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .head import PAAHead

__all__ = ["Detector", "translations"]


class Detector(nn.Module):
    """From images to detections of a fixed shape: what is exported.

    Args:
        head: a `PAAHead`; its `max_per_img` is the room for detections.
        backbone: from images Tensor[N, 3, H, W] to one feature map per stride, in a list, a tuple or a dictionary; None: what the
            module is called with are the feature maps.
    """

    def __init__(self, head: PAAHead, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.backbone = head, backbone

    def forward(self, images: Any, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [N, M, 4], scores [N, M], labels [N, M] and count [N] as `PAAHead.predict` gives them padded.

        Args:
            images: what the backbone takes, or the feature maps.
            image_sizes: Tensor[N, 2], (height, width) of each image within the batch.
        """
        features = images if self.backbone is None else self.backbone(images)
        features = list(features.values()) if isinstance(features, Mapping) else list(features)
        found = self.head.predict(features, image_sizes, padded=True)
        return found["boxes"], found["scores"], found["labels"], found["count"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The operators of detections in ONNX, as `custom_translation_table` of `torch.onnx.export(dynamo=True)` takes them.

    `batched_nms` in its hard form, with boxes and scores as tensors, and `score_voting_batch` of tensors. NMS compares float32,
    as ONNX does, and scores that are not finite are no candidates. Voting has an IoU of each detection with each box: N * M * K
    numbers, of which the kernels hold none.

    Raises:
        ImportError: no onnxscript.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("`paa_gpu.export.translations` needs onnxscript: pip install paa-gpu[export]") from error
    return {
        torch.ops.paa_gpu.batched_nms.default: _batched_nms,
        torch.ops.paa_gpu.score_voting_padded.default: _score_voting,
    }


def _batched_nms(
    boxes: Any,
    scores: Any,
    labels: Any,
    lengths: Any,
    iou_threshold: float,
    score_thr: float | None,
    nms_pre: int,
    max_per_img: int,
    method: str,
    sigma: float,
    min_score: float,
    class_agnostic: bool,
) -> Any:
    op = _operators()
    if method != "hard":
        raise ValueError(f'`method` must be "hard" in ONNX, got {method!r}')
    if lengths is not None:
        raise ValueError("`boxes` must be a Tensor in ONNX, got list")
    images, number, classes = (op.Shape(scores, start=axis, end=axis + 1) for axis in range(3))
    entries = op.Mul(number, classes)
    flat = op.Reshape(scores, op.Concat(images, [-1], axis=0))  # box * C + class
    nothing = op.CastLike([-np.inf], scores)
    if nms_pre:
        _, best = op.TopK(flat, op.Min(entries, [nms_pre]))
        taken = op.ScatterElements(op.Expand([0], op.Shape(flat)), best, op.Expand([1], op.Shape(best)), axis=1)
        flat = op.Where(op.Cast(taken, to=_BOOL), flat, nothing)
    # Lists of candidates [N, lists, boxes]: a list for each class, one where classes do not matter, or one for each label.
    if class_agnostic:
        lists = op.Reshape(flat, op.Concat(images, [1], [-1], axis=0))
        wide = op.Expand(op.Unsqueeze(boxes, [2]), op.Concat(images, number, classes, [4], axis=0))
        rows = op.Reshape(wide, op.Concat(images, [-1], [4], axis=0))
    else:
        lists = op.Transpose(op.Reshape(flat, op.Concat(images, number, classes, axis=0)), perm=[0, 2, 1])
        rows = boxes
        if labels is not None:
            lists = op.Where(_one_hot(op, labels), lists, nothing)
    most = entries if max_per_img == 0 else [max_per_img]
    lowest = float(np.finfo(np.float32).min)
    picked = op.NonMaxSuppression(
        op.Cast(rows, to=_FLOAT),
        op.Cast(lists, to=_FLOAT),
        most,
        [_at_most(iou_threshold)],
        [lowest if score_thr is None else score_thr],
    )
    # What was kept, at its entry, and behind all entries room for nothing.
    kept = op.ScatterND(op.Expand(nothing, op.Shape(lists)), picked, op.GatherND(lists, picked))
    kept = op.ReduceMax(kept, [1], keepdims=0) if labels is not None else op.Transpose(kept, perm=[0, 2, 1])
    kept = op.Reshape(kept, op.Concat(images, [-1], axis=0))
    kept = op.Concat(kept, op.Expand(nothing, op.Concat(images, most, axis=0)), axis=1)
    value, entry = op.TopK(kept, most)
    there = op.Greater(value, nothing)
    entry = op.Where(there, entry, [0])
    index, label = op.Div(entry, classes), op.Mod(entry, classes)
    if labels is not None:
        label = op.GatherElements(op.Cast(labels, to=_INT64), index, axis=1)
    chosen = op.GatherND(boxes, op.Unsqueeze(index, [2]), batch_dims=1)
    return (
        op.Where(op.Unsqueeze(there, [2]), chosen, op.CastLike([0.0], boxes)),
        op.Where(there, value, op.CastLike([0.0], scores)),
        op.Where(there, label, [-1]),
        op.Where(there, index, [-1]),
        op.ReduceSum(op.Cast(there, to=_INT64), [1], keepdims=0),
    )


def _operators() -> Any:
    """Those of ONNX, whose types are not those of Python's numbers and lists that they take."""
    from onnxscript import opset18

    return opset18


def _one_hot(op: Any, labels: Any) -> Any:
    """Bool [N, labels that there are, K]: which label each box has."""
    _, _, number, _ = op.Unique(op.Reshape(op.Cast(labels, to=_INT64), [-1]))
    found = op.Add(op.ReduceMax(op.Concat(number, [0], axis=0), keepdims=0), 1)
    number = op.Unsqueeze(op.Reshape(number, op.Shape(labels)), [1])
    return op.Equal(number, op.Reshape(op.Range(0, found, 1), [1, -1, 1]))


def _score_voting(
    det_bboxes: Any,
    det_labels: Any,
    mlvl_bboxes: Any,
    mlvl_nms_scores: Any,
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
) -> Any:
    op = _operators()
    own = [op.Slice(det_bboxes, [side], [side + 1], [2]) for side in range(5)]  # [N, M, 1]
    turned = op.Transpose(mlvl_bboxes, perm=[0, 2, 1])
    box = [op.CastLike(op.Slice(turned, [side], [side + 1], [1]), det_bboxes) for side in range(4)]  # [N, 1, K]
    label = op.Cast(det_labels, to=_INT64)
    classes = op.Shape(mlvl_nms_scores, start=2, end=3)
    known = op.And(op.GreaterOrEqual(label, [0]), op.Less(label, classes))
    by_class = op.Transpose(mlvl_nms_scores, perm=[0, 2, 1])
    score = op.GatherND(by_class, op.Unsqueeze(op.Where(known, label, [0]), [2]), batch_dims=1)  # [N, M, K]
    above = op.Greater(score, op.CastLike([score_thr], score))
    score = op.CastLike(score, det_bboxes)
    zero, tiny, one = (op.CastLike([number], det_bboxes) for number in (0.0, 1e-6, 1.0))
    longer = op.CastLike([offset], det_bboxes)

    def extent(low: Any, high: Any) -> Any:
        return op.Add(op.Sub(high, low), longer)

    width = op.Max(extent(op.Max(own[0], box[0]), op.Min(own[2], box[2])), zero)
    height = op.Max(extent(op.Max(own[1], box[1]), op.Min(own[3], box[3])), zero)
    overlap = op.Mul(width, height)
    areas = [op.Mul(extent(each[0], each[2]), extent(each[1], each[3])) for each in (own, box)]
    union = op.Sub(op.Add(*areas), overlap)
    iou = op.Div(overlap, op.Where(op.Less(union, tiny), tiny, union))
    voter = op.And(op.And(above, op.Unsqueeze(known, [2])), op.Greater(iou, op.CastLike([iou_thr], iou)))
    distance = op.Sub(one, iou)
    weight = op.Mul(op.Exp(op.Div(op.Mul(distance, distance), op.CastLike([-sigma], iou))), score)
    weight = op.Where(voter, weight, zero)
    total = op.ReduceSum(weight, [2])
    corners = []
    for side in range(4):
        moved = op.ReduceSum(op.Mul(weight, op.Where(voter, op.Sub(box[side], own[side]), zero)), [2])
        corners.append(op.Where(op.Equal(total, zero), own[side], op.Add(own[side], op.Div(moved, total))))
    voted = op.Concat(*corners, own[4], axis=2)
    if keep_order:
        return voted, op.Identity(det_labels)
    _, order = op.TopK(label, op.Shape(label, start=1, end=2), axis=1, largest=0)  # equal ones by index
    return op.GatherND(voted, op.Unsqueeze(order, [2]), batch_dims=1), op.GatherElements(det_labels, order, axis=1)


_FLOAT, _INT64, _BOOL = 1, 7, 9  # of onnx.TensorProto


def _at_most(number: float) -> float:
    """The largest float32 up to this one: what exceeds the one exceeds the other."""
    nearest = np.float32(number)
    return float(nearest if float(nearest) <= number else np.nextafter(nearest, np.float32(-np.inf)))
