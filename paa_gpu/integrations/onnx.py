"""The operators of detection in ONNX, for `torch.onnx.export(dynamo=True)`: needs `pip install onnx onnxscript`.

The translations are made of standard operators of opset 18 alone. Shapes: N images, M detections, K boxes of each, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset18

from ..cpu._arrays import at_most

__all__ = ["translations"]

op: Any = opset18  # whose annotations take tensors alone, not the numbers that it takes too

FLOAT, INT64, DOUBLE = 1, 7, 11  # of onnx.TensorProto


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export(dynamo=True)` for what `PAAHead.predict(..., padded=True)` calls.

    Returns:
        The translations of `batched_nms` with `method="hard"`, and of `score_voting_batch`, both for tensors and not for lists.
        N, M and K may be dynamic, and K may be 0.

    Raises:
        ValueError: during the export, for a soft form or for lists of tensors; torch raises its `ConversionError` from it.

    The detections are those of the library. Differences: NMS compares scores and IoU as float32, also of float64 tensors. A score
    of NaN is no candidate. The runtime decides what a box with swapped corners or NaN suppresses; in the library, nothing. Equal
    scores come by index where the runtime takes the lower index first, as onnxruntime does; ONNX leaves it open. Voting holds an
    IoU of each detection with each box, N * M * K numbers; the library's own operators hold none.
    """
    return {
        torch.ops.paa_gpu.batched_nms.default: _batched_nms,
        torch.ops.paa_gpu.score_voting_padded.default: _score_voting,
    }


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _number(number: float, like: Any) -> Any:
    """[1], in the type of a tensor; a float64 is not rounded to float32 on the way."""
    return op.CastLike(op.Constant(value=numpy_helper.from_array(np.array([number], np.float64))), like)


def _shape(*sizes: Any) -> Any:
    return op.Concat(*sizes, axis=0)


def _size(tensor: Any, axis: int) -> Any:
    return op.Shape(tensor, start=axis, end=axis + 1)


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
    if method != "hard":
        raise ValueError(f'`method` must be "hard" in ONNX, got {method!r}')
    if lengths is not None:
        raise ValueError("`boxes` must be a Tensor in ONNX, got list")
    nothing = _number(-np.inf, scores)
    room = _ints(max_per_img) if max_per_img else op.Mul(_size(scores, 1), _size(scores, 2))
    # A box that is no candidate stands behind all others, because the runtime refuses empty lists.
    boxes, scores = _with_one_more(boxes, _number(0, boxes)), _with_one_more(scores, nothing)
    labels = labels if labels is None else _with_one_more(labels, _number(0, labels))
    classes = _size(scores, 2)
    entries = op.Mul(_size(scores, 1), classes)
    flat = op.Reshape(scores, _shape(_size(scores, 0), entries))  # an entry is box * C + class
    if score_thr is not None:
        flat = op.Where(op.Greater(flat, _number(score_thr, scores)), flat, nothing)
    if nms_pre:
        _, best = op.TopK(flat, op.Min(entries, _ints(nms_pre)))
        flat = op.ScatterElements(op.Expand(nothing, op.Shape(flat)), best, op.GatherElements(flat, best, axis=1), axis=1)
    kept = _suppress(boxes, flat, classes, labels, room, iou_threshold, class_agnostic)
    # Where an image has fewer detections than room, entries behind all others fill it.
    kept = op.Concat(kept, op.Expand(nothing, _shape(_size(scores, 0), room)), axis=1)
    value, entry = op.TopK(kept, room)
    there = op.Greater(value, nothing)
    entry = op.Where(there, entry, _ints(0))
    index, label = op.Div(entry, classes), op.Mod(entry, classes)
    if labels is not None:
        label = op.GatherElements(op.Cast(labels, to=INT64), index, axis=1)
    chosen = op.GatherND(boxes, op.Unsqueeze(index, _ints(2)), batch_dims=1)
    return (
        op.Where(op.Unsqueeze(there, _ints(2)), chosen, _number(0, boxes)),
        op.Where(there, value, _number(0, scores)),
        op.Where(there, label, _ints(-1)),
        op.Where(there, index, _ints(-1)),
        op.ReduceSum(op.Cast(there, to=INT64), _ints(1), keepdims=0),
    )


def _with_one_more(rows: Any, number: Any) -> Any:
    """Rows [N, K, ...] with one more of this number."""
    shape = _shape(_size(rows, 0), _ints(1), op.Shape(rows, start=2))
    return op.Concat(rows, op.Expand(number, shape), axis=1)


def _suppress(boxes: Any, flat: Any, classes: Any, labels: Any, room: Any, iou_threshold: float, class_agnostic: bool) -> Any:
    """The scores [N, K * C] of what is kept, and -inf for the others."""
    images, number = _size(boxes, 0), _size(boxes, 1)
    nothing = _number(-np.inf, flat)
    # The candidates as lists [N, lists, boxes]: one for each class, or one for each label, or one where classes do not matter.
    by_class = labels is None and not class_agnostic
    rows = boxes
    if by_class:
        lists = op.Transpose(op.Reshape(flat, _shape(images, number, classes)), perm=[0, 2, 1])
    else:
        lists = op.Unsqueeze(flat, _ints(1))
        wide = op.Expand(op.Unsqueeze(boxes, _ints(2)), _shape(images, number, classes, _ints(4)))
        rows = op.Reshape(wide, _shape(images, op.Mul(number, classes), _ints(4)))
        if not class_agnostic:
            lists = op.Where(_one_hot(labels), lists, nothing)
    lowest = op.Constant(value_float=float(np.finfo(np.float32).min))
    picked = op.NonMaxSuppression(
        op.Cast(rows, to=FLOAT),
        op.Cast(lists, to=FLOAT),
        room,
        op.Constant(value_float=at_most(min(iou_threshold, 1.0), np.float32)),  # more is not allowed, and no IoU is above 1
        lowest,
    )
    kept = op.ScatterND(op.Expand(nothing, op.Shape(lists)), picked, op.GatherND(lists, picked))
    if by_class:
        return op.Reshape(op.Transpose(kept, perm=[0, 2, 1]), op.Shape(flat))
    return op.ReduceMax(kept, _ints(1), keepdims=0)


def _one_hot(labels: Any) -> Any:
    """Bool [N, labels that there are, K]: which of them each box has."""
    labels = op.Cast(labels, to=INT64)
    different, _, number, _ = op.Unique(op.Reshape(labels, _ints(-1)))
    number = op.Reshape(number, op.Shape(labels))
    which = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(different)), op.Constant(value_int=1))
    return op.Equal(op.Unsqueeze(number, _ints(1)), op.Unsqueeze(which, _ints(0, 2)))


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
    real = DOUBLE if any(int(part.dtype) == DOUBLE for part in (det_bboxes, mlvl_bboxes, mlvl_nms_scores)) else FLOAT
    detections = op.Cast(det_bboxes, to=real)
    own = _columns(detections, 5)  # [N, M, 1] each
    box = [op.Transpose(side, perm=[0, 2, 1]) for side in _columns(op.Cast(mlvl_bboxes, to=real), 4)]  # [N, 1, K] each
    label = op.Cast(det_labels, to=INT64)
    known = op.And(op.GreaterOrEqual(label, _ints(0)), op.Less(label, _size(mlvl_nms_scores, 2)))
    by_class = op.Transpose(mlvl_nms_scores, perm=[0, 2, 1])
    score = op.GatherND(by_class, op.Unsqueeze(op.Where(known, label, _ints(0)), _ints(2)), batch_dims=1)  # [N, M, K]
    voter = op.And(op.Greater(score, _number(score_thr, score)), op.Unsqueeze(known, _ints(2)))
    iou = _iou(own, box, offset)
    voter = op.And(voter, op.Greater(iou, _number(iou_thr, iou)))
    distance = op.Sub(_number(1, iou), iou)
    weight = op.Exp(op.Div(op.Mul(distance, distance), _number(-sigma, iou)))
    zero = _number(0, iou)
    weight = op.Where(voter, op.Mul(weight, op.Cast(score, to=real)), zero)
    total = op.ReduceSum(weight, _ints(2))
    corners = []
    for mine, theirs in zip(own, box, strict=False):
        moved = op.ReduceSum(op.Mul(weight, op.Where(voter, op.Sub(theirs, mine), zero)), _ints(2))
        corners.append(op.Where(op.Equal(total, zero), mine, op.Add(mine, op.Div(moved, total))))
    voted = op.CastLike(op.Concat(*corners, own[4], axis=2), det_bboxes)
    if keep_order:
        return voted, op.Identity(det_labels)
    _, order = op.TopK(label, _size(label, 1), axis=1, largest=0)  # equal ones by index
    return op.GatherND(voted, op.Unsqueeze(order, _ints(2)), batch_dims=1), op.GatherElements(det_labels, order, axis=1)


def _columns(rows: Any, number: int) -> list[Any]:
    return [op.Slice(rows, _ints(side), _ints(side + 1), _ints(2)) for side in range(number)]


def _iou(own: list[Any], box: list[Any], offset: float) -> Any:
    """[N, M, K]; NaN where a corner is."""
    longer = _number(offset, own[0])

    def extent(low: Any, high: Any) -> Any:
        return op.Add(op.Sub(high, low), longer)

    width, height = (
        op.Max(extent(op.Max(own[side], box[side]), op.Min(own[side + 2], box[side + 2])), _number(0, own[0])) for side in (0, 1)
    )
    overlap = op.Mul(width, height)
    area, other = (op.Mul(extent(each[0], each[2]), extent(each[1], each[3])) for each in (own, box))
    union = op.Sub(op.Add(area, other), overlap)
    return op.Div(overlap, op.Max(union, _number(1e-6, own[0])))
