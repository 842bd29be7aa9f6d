"""Score voting: every detection moves to the weighted mean of the candidates around it.

    weight = exp(-(1 - IoU)^2 / sigma) * score  where score > score_thr and IoU > iou_thr, else 0
    box = detection + sum(weight * (candidate - detection)) / sum(weight)

Boxes (N) and detections (D) are counted over all images. Each image's tensors are read in place. There are two launches:

    gather    one program per block of an image's boxes: copies the boxes, and transposes their scores to Tensor[C, N]. So the
              scores of a class lie side by side. It does so for the classes of the image's detections, since only these are read
    vote      one program per detection: goes through the boxes of its image in tiles. It reads the scores of its class, then the
              boxes of the candidates among them, one box in one access

Each thread of a vote sums its own boxes, tile after tile. The sums of the threads are added once. The order is always the same,
and so is the result. Sums are of offsets from the detection, so the size of the image costs no digits. A program finds the place
of its detection by counting the detections of its image with a smaller label, and the earlier ones with the same label.

A batch has a table (see `_batch`). A single image serves as its own table, and needs no copy of integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import empty_voted
from paa_gpu.kernels._batch import DTYPES, addresses, field, image_of, sizes_of, starts_of, vector
from paa_gpu.kernels._launch import compile_options, device_guard, has_slow_float64, stage
from paa_gpu.kernels._numeric import narrow

# In the table: where the blocks of boxes, the boxes and the detections of each image begin; then addresses and strides.
FIRST_BOX_BLOCK, FIRST_BOX, FIRST_DETECTION = (tl.constexpr(number) for number in range(3))
DETECTIONS, LABELS, BOXES, SCORES, WEIGHT = (tl.constexpr(number) for number in (3, 6, 8, 11, 14))

BLOCK_N = 32  # boxes of a program that gathers: four numbers each, one a thread
BLOCK_C = tl.constexpr(32)


@triton.jit
def _matrix(images, image, own, FIELD: tl.constexpr, ptr_dtype: tl.constexpr):
    """Address and two strides of one of the image's tensors; what came as an argument, `own`, without a table."""
    if images[0] is None:
        ptr, stride, stride_side = own
    else:
        ptr = field(images, image, FIELD).to(ptr_dtype)
        stride, stride_side = field(images, image, FIELD + 1), field(images, image, FIELD + 2)
    return ptr, stride, stride_side


@triton.jit
def _labels(images, image, own, DTYPE: tl.constexpr):
    if images[0] is None:
        ptr, stride = own
    else:
        ptr, stride = vector(images, image, LABELS, DTYPE)
    return ptr, stride


@triton.jit
def _span(images, image, total, FIELD: tl.constexpr):
    """Where the boxes or detections of an image begin and end; all of them are those of one image without a table."""
    begin, end = tl.full((), 0, tl.int64), total.to(tl.int64)
    if images[0] is not None:
        begin, end = field(images, image, FIELD), field(images, image + 1, FIELD)
    return begin, end


@triton.jit
def _wanted(labels, n_detections, c, BLOCK: tl.constexpr):
    """Which of the classes [BLOCK_C] a detection of the image has."""
    wanted = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, n_detections, BLOCK):
        detection = first + tl.arange(0, BLOCK).to(tl.int64)
        label = tl.load(labels[0] + detection * labels[1], mask=detection < n_detections, other=0).to(tl.int64)
        same = (label[:, None] == c[None, :]) & (detection < n_detections)[:, None]
        wanted = wanted | tl.max(same.to(tl.int32), 0)
    return wanted != 0


@triton.jit(do_not_specialize=["n_images", "n_detections", "n_boxes", "n_classes"])
def _gather_kernel(
    table_ptr,  # the images, see above; None: one image, whose tensors and strides the next three are
    labels,  # Tensor[D_b]
    boxes,  # Tensor[N_b, 4]
    scores,  # Tensor[N_b, C]
    n_images,
    n_detections,
    n_boxes,
    n_classes,
    box_ptr,  # Tensor[N, 4]: filled
    score_ptr,  # Tensor[C, N]: filled where it is read
    score_thr: tl.float64,  # matters only where scores are weighted
    LABEL: tl.constexpr,
    SCORE: tl.constexpr,  # dtype of the images' scores
    WEIGHTED: tl.constexpr,  # "images" are pools of images; scores get the weight of the pool, or -inf up to the threshold
    UNIT: tl.constexpr,  # the scores of a box lie side by side
    BLOCK_N: tl.constexpr,
):
    images, block = (table_ptr, n_images), tl.program_id(0)
    image = tl.full((), 0, tl.int32)
    if table_ptr is not None:
        image = image_of(table_ptr + FIRST_BOX_BLOCK * (n_images + 1), n_images, block)
        block -= field(images, image, FIRST_BOX_BLOCK)
    first, end = _span(images, image, n_boxes, FIRST_BOX)
    begin = block.to(tl.int64) * BLOCK_N

    source = _matrix(images, image, boxes, BOXES, box_ptr.dtype)
    number = 4 * begin + tl.arange(0, 4 * BLOCK_N)
    inside = number < 4 * (end - first)
    corner = tl.load(source[0] + (number >> 2) * source[1] + (number & 3) * source[2], mask=inside)
    tl.store(box_ptr + 4 * first + number, corner, mask=inside)

    source = _matrix(images, image, scores, SCORES, tl.pointer_type(SCORE))
    label = _labels(images, image, labels, LABEL)
    first_detection, last_detection = _span(images, image, n_detections, FIRST_DETECTION)
    box = begin + tl.arange(0, BLOCK_N)
    for first_class in range(0, n_classes, BLOCK_C):
        c = first_class + tl.arange(0, BLOCK_C).to(tl.int64)
        wanted = _wanted(label, last_detection - first_detection, c, BLOCK_N) & (c < n_classes)
        offset = c if UNIT else c * source[2]
        here = (box < end - first)[:, None] & wanted[None, :]  # [BLOCK_N, BLOCK_C]
        score = tl.load(source[0] + box[:, None] * source[1] + offset[None, :], mask=here)
        if WEIGHTED:
            real: tl.constexpr = score_ptr.dtype.element_ty
            weight = field(images, image, WEIGHT).to(tl.float64, bitcast=True).to(real)
            above = score.to(real) > narrow(tl.full((), score_thr, tl.float64), source[0]).to(real)
            score = tl.where(above, score.to(real) * weight, float("-inf"))
        tl.store(score_ptr + c[None, :] * n_boxes + (first + box)[:, None], score, mask=here)


@triton.jit
def _place(labels, n_detections, detection, label, BLOCK: tl.constexpr):
    """The detection's rank among those of its image by (label, position)."""
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_detections, BLOCK):
        other = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        other_label = tl.load(labels[0] + other * labels[1], mask=other < n_detections, other=0).to(tl.int64)
        smaller = (other_label < label) | ((other_label == label) & (other < detection))
        before += ((other < n_detections) & smaller).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit
def _load_boxes(box_ptr, box, mask, REAL: tl.constexpr):
    """The corners x1, y1, x2, y2 of the boxes [BLOCK], zeros outside the mask."""
    side = tl.arange(0, 4)[None, :]  # [1, 4]
    corners = tl.load(box_ptr + box[:, None] * 4 + side, mask=mask[:, None], other=0.0)  # [BLOCK, 4]
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


@triton.jit(do_not_specialize=["n_images", "n_boxes", "n_classes"])
def _vote_kernel(
    table_ptr,  # the images, see above; None: one image, whose tensors and strides the next two are
    detections,  # Tensor[D_b, 5]
    labels,  # Tensor[D_b]
    n_images,
    n_boxes,
    n_classes,
    box_ptr,  # Tensor[N, 4]
    score_ptr,  # Tensor[C, N]
    score_thr: tl.float64,
    iou_thr: tl.float64,
    decay: tl.float64,  # 1 / sigma
    offset: tl.float64,
    voted_ptr,  # Tensor[D, 5], contiguous like the one below
    voted_label_ptr,  # Tensor[D]
    KEEP_ORDER: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    images, detection = (table_ptr, n_images), tl.program_id(0).to(tl.int64)
    image = tl.full((), 0, tl.int32)
    if table_ptr is not None:
        image = image_of(table_ptr + FIRST_DETECTION * (n_images + 1), n_images, detection)
    first, last = _span(images, image, tl.num_programs(0), FIRST_DETECTION)
    box_begin, box_end = _span(images, image, n_boxes, FIRST_BOX)
    detection -= first
    own_labels = _labels(images, image, labels, voted_label_ptr.dtype.element_ty)
    label = tl.load(own_labels[0] + detection * own_labels[1])
    c = label.to(tl.int64)
    place = first + detection
    if not KEEP_ORDER:
        place = first + _place(own_labels, last - first, detection, c, BLOCK)

    own = _matrix(images, image, detections, DETECTIONS, voted_ptr.dtype)
    own_ptr, stride_side = own[0] + detection * own[1], own[2]
    own_x1, own_y1 = tl.load(own_ptr).to(REAL), tl.load(own_ptr + stride_side).to(REAL)
    own_x2, own_y2 = tl.load(own_ptr + 2 * stride_side).to(REAL), tl.load(own_ptr + 3 * stride_side).to(REAL)
    # As torch rounds a number before it compares a tensor with it.
    score_limit = narrow(tl.full((), score_thr, tl.float64), score_ptr).to(REAL)
    iou_limit = tl.full((), iou_thr, REAL)
    slope, margin = tl.full((), -decay, REAL), tl.full((), offset, REAL)
    total = tl.zeros([BLOCK], REAL)
    x1_sum, y1_sum, x2_sum, y2_sum = total, total, total, total
    box_end = tl.where((c >= 0) & (c < n_classes), box_end, box_begin)
    for tile in range(box_begin, box_end, BLOCK):
        box = tile + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        inside = box < box_end
        score = tl.load(score_ptr + c * n_boxes + box, mask=inside, other=0.0).to(REAL)
        candidate = inside & (score > score_limit)
        x1, y1, x2, y2 = _load_boxes(box_ptr, box, candidate, REAL)
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
    tl.store(out_ptr, narrow(tl.where(voted, own_x1 + x1 / weights, own_x1), voted_ptr))
    tl.store(out_ptr + 1, narrow(tl.where(voted, own_y1 + y1 / weights, own_y1), voted_ptr))
    tl.store(out_ptr + 2, narrow(tl.where(voted, own_x2 + x2 / weights, own_x2), voted_ptr))
    tl.store(out_ptr + 3, narrow(tl.where(voted, own_y2 + y2 / weights, own_y2), voted_ptr))
    tl.store(out_ptr + 4, tl.load(own_ptr + 4 * stride_side))
    tl.store(voted_label_ptr + place, label)


def launch_rule(wide: bool) -> dict[str, int]:
    """Four boxes a thread; one where sums are float64, whose registers would spill.

    One is enough for lanes to agree: their sums come out of a loop, so no product is fused into the additions between lanes.
    """
    return {"BLOCK": 256 if wide else 512, "num_warps": 8 if wide else 4, **compile_options(fuse=True)}


def _table(*columns: Sequence[Tensor]) -> tuple[list[int], int]:
    """The table of several images, from det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores; the number of blocks of boxes."""
    boxes = sizes_of(columns[2])
    blocks = starts_of([-(-size // BLOCK_N) for size in boxes])
    starts = (blocks, starts_of(boxes), starts_of(sizes_of(columns[1])))
    return [*itertools.chain(*starts), *itertools.chain(*map(addresses, columns))], blocks[-1]


def _pool_tables(columns: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> tuple[list[int], list[int], int]:
    """Two tables: of the pools of all images for what gathers, and of the images for what votes. And the number of blocks."""
    det, label, boxes, scores = columns
    pools, repeated = len(weights), [[tensor for tensor in column for _ in weights] for column in (det, label)]
    of_pools, blocks = _table(*repeated, boxes, scores)
    bits = np.array(weights, np.float64).view(np.int64).tolist() * len(det)
    sizes = sizes_of(boxes)
    starts = [sum(sizes[i * pools : (i + 1) * pools]) for i in range(len(det))]
    of_images = [*[0] * (len(det) + 1), *starts_of(starts), *starts_of(sizes_of(label)), *addresses(det), *addresses(label)]
    return [*of_pools, *bits, 0], of_images, blocks


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
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator `paa_gpu::score_voting`: two launches. With several images or pools, a copy comes before them."""
    columns = det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores
    own = [(tensor, *tensor.stride()) if len(det_labels) == 1 else None for tensor, *_ in columns]
    images, detections, n_boxes = len(det_labels), sum(sizes_of(det_labels)), sum(sizes_of(mlvl_bboxes))
    classes = mlvl_nms_scores[0].size(1)
    voted, voted_labels = empty_voted(det_bboxes, det_labels)
    if detections == 0:
        return voted, voted_labels
    boxes, scores = mlvl_bboxes[0].new_empty((n_boxes, 4)), mlvl_nms_scores[0].new_empty((classes, n_boxes))
    wide = torch.float64 in (voted.dtype, boxes.dtype, scores.dtype)
    table = pools = None
    blocks, parts, limit, registers = triton.cdiv(n_boxes, BLOCK_N), images, score_thr, 96
    if weights is not None:
        of_pools, of_images, blocks = _pool_tables(columns, weights)
        # An address that is a multiple of 16 bytes, so that the kernel keeps its one compiled form.
        of_pools += [0] * (len(of_pools) % 2)
        staged = stage([*of_pools, *of_images], voted)
        pools, table, parts = staged, staged[len(of_pools) :], images * len(weights)
        own, limit = [None] * 4, -math.inf
        scores = scores.new_empty(scores.shape, dtype=torch.float64 if wide else torch.float32)
    elif images > 1:
        numbers, blocks = _table(*columns)
        pools = table = stage(numbers, voted)
        # The table takes registers, which GPUs with slow float64 have for fewer threads (see `assign.launch_rule`).
        registers = 128 if has_slow_float64(voted) else 96
    with device_guard(voted):
        if blocks:
            _gather_kernel[(blocks,)](
                *(pools, *own[1:], parts, detections, n_boxes, classes, boxes, scores, score_thr),
                LABEL=DTYPES[voted_labels.dtype],
                SCORE=DTYPES[mlvl_nms_scores[0].dtype],
                WEIGHTED=weights is not None,
                UNIT=all(image.stride(1) == 1 for image in mlvl_nms_scores),
                BLOCK_N=BLOCK_N,
                num_warps=4 if weights is None else 8,  # weights take registers, so a thread gets fewer scores
                **compile_options(fuse=True, registers=registers),
            )
        _vote_kernel[(detections,)](
            *(table, *own[:2], images, n_boxes, classes, boxes, scores),
            limit,
            iou_thr,
            min(1 / sigma, torch.finfo(torch.float64 if wide else torch.float32).max),  # finite: an IoU of 1 weighs 1
            offset,
            voted,
            voted_labels,
            KEEP_ORDER=keep_order,
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
