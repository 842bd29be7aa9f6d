"""Score voting: every detection becomes the weighted mean of the candidates around it.

    weight = exp(-(1 - IoU)^2 / sigma) * score  where score > score_thr and IoU > iou_thr, else 0
    box = detection + sum(weight * (candidate - detection)) / sum(weight)

The detections of all images stand one after the other (D of them), and so do the boxes (N) that may be candidates. Their scores
are turned around, Tensor[C, N], so that those of a class lie side by side. One program per detection goes through the boxes of
its image in tiles: the scores of its class, then the boxes of the candidates among them, a box in one access. Each thread sums
what it meets, tile after tile, and the threads' sums are added once: the order never changes, so neither does the result. Offsets
from the detection lose nothing to the size of the image. The program finds the place of its detection by counting: the
detections of its image with a smaller label, and those before it with its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._launch import device_guard, keep, register_limit, stage
from paa_gpu.kernels.topk import concatenate, image_of


@triton.jit
def _place(label_ptr, stride_label, begin, end, detection, label, BLOCK: tl.constexpr):
    """The detection's rank among those from `begin` to `end` by (label, position)."""
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        other = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        other_label = tl.load(label_ptr + other * stride_label, mask=other < end, other=0).to(tl.int64)
        smaller = (other_label < label) | ((other_label == label) & (other < detection))
        before += ((other < end) & smaller).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit
def _load_boxes(box_ptr, box, mask, STRIDE_N: tl.constexpr, STRIDE_SIDE: tl.constexpr, REAL: tl.constexpr):
    """The corners x1, y1, x2, y2 of the boxes [BLOCK], zeros outside the mask."""
    side = tl.arange(0, 4)[None, :]  # [1, 4]
    corners = tl.load(box_ptr + box[:, None] * STRIDE_N + side * STRIDE_SIDE, mask=mask[:, None], other=0.0)  # [BLOCK, 4]
    x, y = tl.split(tl.reshape(corners, [box.shape[0], 2, 2]))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1.to(REAL), y1.to(REAL), x2.to(REAL), y2.to(REAL)


@triton.jit
def _iou(x1, y1, x2, y2, other_x1, other_y1, other_x2, other_y2, offset):
    """NaN, or zero, where a corner is not finite."""
    width = tl.maximum(tl.minimum(x2, other_x2) - tl.maximum(x1, other_x1) + offset, 0.0)
    height = tl.maximum(tl.minimum(y2, other_y2) - tl.maximum(y1, other_y1) + offset, 0.0)
    intersection = width * height
    area, other_area = (x2 - x1 + offset) * (y2 - y1 + offset), (other_x2 - other_x1 + offset) * (other_y2 - other_y1 + offset)
    union = area + other_area - intersection
    tiny = tl.full((), 1e-6, union.dtype)
    # A maximum would drop the NaN.
    return intersection / tl.where(union < tiny, tiny, union)


@triton.jit
def _add(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _narrow(x, ptr):
    """`x` in the dtype that the pointer points to, by way of float32: no target turns float64 into less at once."""
    return (x if ptr.dtype.element_ty == tl.float64 else x.to(tl.float32)).to(ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["stride_detection", "stride_side", "stride_label", "n_images", "n_boxes", "n_classes"])
def _vote_kernel(
    detection_ptr,  # Tensor[D, 5]
    stride_detection,
    stride_side,
    label_ptr,  # Tensor[D]
    stride_label,
    box_ptr,  # Tensor[N, 4]
    score_ptr,  # Tensor[C, N], contiguous
    start_ptr,  # Tensor[2, B + 1]: first detection and box of each image, and their totals; None with one image
    n_images,
    n_boxes,
    n_classes,
    score_thr: tl.float64,
    iou_thr: tl.float64,
    decay: tl.float64,  # 1 / sigma
    offset: tl.float64,
    voted_ptr,  # Tensor[D, 5], contiguous like the one below
    voted_label_ptr,  # Tensor[D]
    KEEP_ORDER: tl.constexpr,
    # Known to the compiler: a box of four numbers side by side is one access.
    STRIDE_N: tl.constexpr,
    STRIDE_SIDE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    detection = tl.program_id(0).to(tl.int64)
    begin, end = tl.full((), 0, tl.int64), tl.num_programs(0).to(tl.int64)
    box_begin, box_end = begin, begin + n_boxes
    if start_ptr is not None:
        image_ptr = start_ptr + image_of(start_ptr, n_images, detection)
        begin, end = tl.load(image_ptr), tl.load(image_ptr + 1)
        box_begin, box_end = tl.load(image_ptr + n_images + 1), tl.load(image_ptr + n_images + 2)
    label = tl.load(label_ptr + detection * stride_label)
    c = label.to(tl.int64)
    place = detection
    if not KEEP_ORDER:
        place = begin + _place(label_ptr, stride_label, begin, end, detection, c, BLOCK)

    own_ptr = detection_ptr + detection * stride_detection
    own_x1, own_y1 = tl.load(own_ptr).to(REAL), tl.load(own_ptr + stride_side).to(REAL)
    own_x2, own_y2 = tl.load(own_ptr + 2 * stride_side).to(REAL), tl.load(own_ptr + 3 * stride_side).to(REAL)
    # As torch rounds a number before it compares a tensor with it.
    score_limit = _narrow(tl.full((), score_thr, tl.float64), score_ptr).to(REAL)
    iou_limit = tl.full((), iou_thr, REAL)
    slope, margin = tl.full((), -decay, REAL), tl.full((), offset, REAL)
    total = tl.zeros([BLOCK], REAL)
    x1_sum, y1_sum, x2_sum, y2_sum = total, total, total, total
    box_end = tl.where((c >= 0) & (c < n_classes), box_end, box_begin)
    for first in range(box_begin, box_end, BLOCK):
        box = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        inside = box < box_end
        score = tl.load(score_ptr + c * n_boxes + box, mask=inside, other=0.0).to(REAL)
        candidate = inside & (score > score_limit)
        x1, y1, x2, y2 = _load_boxes(box_ptr, box, candidate, STRIDE_N, STRIDE_SIDE, REAL)
        iou = _iou(x1, y1, x2, y2, own_x1, own_y1, own_x2, own_y2, margin)
        voter = candidate & (iou > iou_limit)
        weight = tl.where(voter, tl.exp((1 - iou) * (1 - iou) * slope) * score, 0.0)
        total += weight
        # An infinity times zero would be NaN.
        x1_sum += weight * tl.where(voter, x1 - own_x1, 0.0)
        y1_sum += weight * tl.where(voter, y1 - own_y1, 0.0)
        x2_sum += weight * tl.where(voter, x2 - own_x2, 0.0)
        y2_sum += weight * tl.where(voter, y2 - own_y2, 0.0)
    weights, x1, y1, x2, y2 = tl.reduce((total, x1_sum, y1_sum, x2_sum, y2_sum), 0, _add)

    out_ptr, voted = voted_ptr + place * 5, weights != 0
    tl.store(out_ptr, _narrow(tl.where(voted, own_x1 + x1 / weights, own_x1), voted_ptr))
    tl.store(out_ptr + 1, _narrow(tl.where(voted, own_y1 + y1 / weights, own_y1), voted_ptr))
    tl.store(out_ptr + 2, _narrow(tl.where(voted, own_x2 + x2 / weights, own_x2), voted_ptr))
    tl.store(out_ptr + 3, _narrow(tl.where(voted, own_y2 + y2 / weights, own_y2), voted_ptr))
    tl.store(out_ptr + 4, tl.load(own_ptr + 4 * stride_side))
    tl.store(voted_label_ptr + place, label)


def launch_rule(wide: bool) -> dict[str, int]:
    """Four boxes a thread; one where sums are float64, whose registers would spill.

    One is enough for lanes to agree: their sums come out of a loop, so no product is fused into the additions between lanes.
    """
    return {"BLOCK": 256 if wide else 512, "num_warps": 8 if wide else 4, **register_limit()}


def _by_class(scores: Sequence[Tensor]) -> Tensor:
    """The images' scores Tensor[N_b, C] as one Tensor[C, N], contiguous: one copy."""
    return scores[0].t().contiguous() if len(scores) == 1 else torch.cat([image.t() for image in scores], 1)


def score_voting(
    det_bboxes: Sequence[Tensor],
    det_labels: Sequence[Tensor],
    mlvl_bboxes: Sequence[Tensor],
    mlvl_nms_scores: Sequence[Tensor],
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `paa_gpu::score_voting`: a copy and a launch; with several images four concatenations, a copy and a launch."""
    detections, labels, boxes = concatenate(det_bboxes), concatenate(det_labels), concatenate(mlvl_bboxes)
    voted, voted_labels = detections.new_empty(detections.shape), labels.new_empty(labels.shape)
    if labels.shape[0] == 0:
        return voted, voted_labels
    scores, starts = _by_class(mlvl_nms_scores), None
    if len(det_bboxes) > 1:
        sizes = ([image.shape[0] for image in images] for images in (det_labels, mlvl_bboxes))
        starts = stage([start for size in sizes for start in (0, *itertools.accumulate(size))], labels)
        keep(voted, starts)
    wide = torch.float64 in (detections.dtype, boxes.dtype, scores.dtype)
    with device_guard(labels):
        _vote_kernel[(labels.shape[0],)](
            detections,
            *detections.stride(),
            labels,
            labels.stride(0),
            boxes,
            scores,
            starts,
            len(det_bboxes),
            boxes.shape[0],
            scores.shape[0],
            score_thr,
            iou_thr,
            min(1 / sigma, torch.finfo(torch.float64 if wide else torch.float32).max),  # finite: an IoU of 1 weighs 1
            offset,
            voted,
            voted_labels,
            KEEP_ORDER=keep_order,
            STRIDE_N=boxes.stride(0),
            STRIDE_SIDE=boxes.stride(1),
            REAL=tl.float64 if wide else tl.float32,
            **launch_rule(wide),
        )
    return voted, voted_labels


def score_voting_padded(
    det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The operator `paa_gpu::score_voting_padded`."""
    if det_bboxes.shape[0] == 0:
        return det_bboxes.clone(), det_labels.clone()
    det, label, boxes, scores = (list(column.unbind()) for column in (det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores))
    voted, labels = score_voting(det, label, boxes, scores, *options)
    return voted.view(det_bboxes.shape), labels.view(det_labels.shape)
