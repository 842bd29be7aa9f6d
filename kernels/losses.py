"""Scores of the potential positives: focal loss over the classes plus the GIoU loss of the decoded box.

    s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
    focal = sum over the classes of weight * s(z) * exp(-gamma * s(-z)), weight = alpha for that class, 1 - alpha for the others
    box   = weight * (1 - GIoU) of the decoded box, in float64: in float32, a good box far from the origin has no accurate loss

The potential positives of all images stand one after the other (P of them). A program takes a block of them, a lane each, and
reads what it needs where it lies: in the level's maps, Tensor[B, C, H, W] of any strides, the channels of one location. The
lanes run along the locations, which mostly are neighbours, and each sums the classes of its own: no sum crosses lanes.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import empty_losses
from paa_gpu.kernels._launch import device_guard, keep, register_limit, stage
from paa_gpu.kernels.topk import anchors as anchors_of
from paa_gpu.kernels.topk import concatenate, image_starts, positions

BLOCK_P = 32  # one warp; on AMD half of one
# Of a level in its table: first anchor, width; address and strides of the scores, the deltas and the anchors. To choose among
# addresses that are arguments, three for each level, would fill AMD's scalar registers.
LEVEL_FIELDS = tl.constexpr(15)
LOG2_HIGH, LOG2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)  # the first times an exponent is exact
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp(x) of x <= 0 to 3e-7 of its value; `tl.exp` of float32 loses a digit of its result for each of its argument."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.where(x < -104, -104.0, x)
    n = tl.floor(x * LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp2((x - n * LOG2_HIGH - n * LOG2_LOW) * LOG2_E)


@triton.jit
def _log1p(x):
    """log(1 + x) of 0 <= x <= 1, accurate also for the tiny ones."""
    if x.dtype == tl.float64:
        u = 1 + x
        return tl.log(u) + (x - (u - 1)) / u
    s = x / (2 + x)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    return 2 * s * series


@triton.jit
def _focal(logit, is_label, gamma, positive_weight, negative_weight):
    z = tl.where(is_label, -logit, logit)
    log1p = _log1p(_exp(-tl.abs(z)))  # NaN of a NaN, which the maxima below may drop
    weight = tl.where(is_label, positive_weight, negative_weight)
    return weight * (tl.maximum(z, 0.0) + log1p) * _exp(-gamma * (tl.maximum(-z, 0.0) + log1p))


@triton.jit
def _giou_loss(x1, y1, x2, y2, target_x1, target_y1, target_x2, target_y2):
    """1 - GIoU; NaN where a corner is NaN."""
    tiny = tl.full((), 1e-6, x1.dtype)
    width = tl.maximum(tl.minimum(x2, target_x2) - tl.maximum(x1, target_x1), 0.0)
    height = tl.maximum(tl.minimum(y2, target_y2) - tl.maximum(y1, target_y1), 0.0)
    overlap = width * height
    union = (x2 - x1) * (y2 - y1) + (target_x2 - target_x1) * (target_y2 - target_y1) - overlap
    union = tl.where(union < tiny, tiny, union)
    width = tl.maximum(tl.maximum(x2, target_x2) - tl.minimum(x1, target_x1), 0.0)
    height = tl.maximum(tl.maximum(y2, target_y2) - tl.minimum(y1, target_y1), 0.0)
    enclosing = tl.maximum(width * height, tiny)
    return 1 - (overlap / union - (enclosing - union) / enclosing)


@triton.jit
def _load4(ptr, stride, mask):
    """Four numbers of each lane, as float64."""
    first = tl.load(ptr, mask=mask, other=0.0).to(tl.float64)
    second = tl.load(ptr + stride, mask=mask, other=0.0).to(tl.float64)
    third = tl.load(ptr + 2 * stride, mask=mask, other=0.0).to(tl.float64)
    return first, second, third, tl.load(ptr + 3 * stride, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _of_map(row_ptr, image, y, x, mask, dtype: tl.constexpr):
    """Where the channels of each lane's location begin, and their stride. `row_ptr`: its map's address, then its strides."""
    ptr = tl.load(row_ptr, mask=mask, other=0).to(dtype)
    image_stride, stride = tl.load(row_ptr + 1, mask=mask, other=0), tl.load(row_ptr + 2, mask=mask, other=0)
    y_stride, x_stride = tl.load(row_ptr + 3, mask=mask, other=0), tl.load(row_ptr + 4, mask=mask, other=0)
    return ptr + image * image_stride + y * y_stride + x * x_stride, stride


@triton.jit
def _option(ptr):
    return tl.load(ptr).to(tl.float64, bitcast=True)


@triton.jit
def _decode_side(low, high, shift, scale, limit):
    """The ends of a side of the anchor, moved and scaled; `limit`: of the logarithm of the scale."""
    scale = tl.where(scale > limit, limit, tl.where(scale < -limit, -limit, scale))  # extrema would drop a NaN
    centre = (low + high) * 0.5 + (high - low) * shift
    half = (high - low) * tl.exp(scale) * 0.5
    return centre - half, centre + half


# One compiled form whatever the number of images, which decides where in the table its parts begin.
@triton.jit(do_not_specialize=["n_images", "n_classes"], do_not_specialize_on_alignment=["level_ptr", "option_ptr"])
def _losses_kernel(
    # Of each level. Read at their addresses in the table: here for their dtypes, and for whoever checks what a launch may touch.
    anchor_ptrs,  # Tensor[H * W, 4]
    score_ptrs,  # Tensor[B, C, H, W]
    delta_ptrs,  # Tensor[B, 4, H, W]
    level_ptr,  # Tensor[L, LEVEL_FIELDS]
    start_ptr,  # Tensor[4, B + 1]: first block, position, row (there are none) and anchor of each image, and their totals
    n_images,
    n_classes,
    inds,  # each of the five: the tensor of all images, Tensor[P] or Tensor[A] or Tensor[A, 4], and its strides
    label,
    label_weight,
    bbox_target,
    bbox_weight,
    # Tensor[9], the bits of float64: deviations of dx, dy, dw, dh; limit of dw, dh; weight of the box loss; gamma; weights of the
    # label's class and of the others
    option_ptr,
    loss_ptr,  # Tensor[P]
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    REAL: tl.constexpr = loss_ptr.dtype.element_ty
    image, position, inside = positions(start_ptr, n_images, BLOCK_P)
    anchor, first, exists = anchors_of(inds[0], inds[1], start_ptr, n_images, image, position, inside)
    anchor = tl.where(exists, anchor, 0)  # [BLOCK_P], as all below without a remark
    row = first + anchor
    level = tl.zeros([BLOCK_P], tl.int32)
    for i in tl.static_range(1, len(anchor_ptrs)):
        level += (anchor >= tl.load(level_ptr + i * LEVEL_FIELDS)).to(tl.int32)
    row_ptr = level_ptr + level * LEVEL_FIELDS
    cell = anchor - tl.load(row_ptr, mask=exists, other=0)
    width = tl.load(row_ptr + 1, mask=exists, other=1).to(tl.int32)
    y, x = (cell.to(tl.int32) // width).to(tl.int64), (cell.to(tl.int32) % width).to(tl.int64)

    delta_ptr, delta_stride = _of_map(row_ptr + 7, image, y, x, exists, delta_ptrs[0].dtype)
    dx, dy, dw, dh = _load4(delta_ptr, delta_stride, exists)
    anchor_ptr = tl.load(row_ptr + 12, mask=exists, other=0).to(anchor_ptrs[0].dtype)
    anchor_ptr += cell * tl.load(row_ptr + 13, mask=exists, other=0)
    x1, y1, x2, y2 = _load4(anchor_ptr, tl.load(row_ptr + 14, mask=exists, other=0), exists)
    limit = _option(option_ptr + 4)
    x1, x2 = _decode_side(x1, x2, dx * _option(option_ptr), dw * _option(option_ptr + 2), limit)
    y1, y2 = _decode_side(y1, y2, dy * _option(option_ptr + 1), dh * _option(option_ptr + 3), limit)
    target = _load4(bbox_target[0] + row * bbox_target[1], bbox_target[2], exists)
    w0, w1, w2, w3 = _load4(bbox_weight[0] + row * bbox_weight[1], bbox_weight[2], exists)
    weight = (w0 + w1 + w2 + w3) * (_option(option_ptr + 5) * 0.25)
    loss = (_giou_loss(x1, y1, x2, y2, *target) * weight).to(REAL)

    score_ptr, score_stride = _of_map(row_ptr + 2, image, y, x, exists, score_ptrs[0].dtype)
    own_label = tl.load(label[0] + row * label[1], mask=exists, other=-1)
    gamma = _option(option_ptr + 6).to(REAL)
    positive, negative = _option(option_ptr + 7).to(REAL), _option(option_ptr + 8).to(REAL)
    total = tl.zeros([BLOCK_C, BLOCK_P], REAL)
    for first_class in range(0, n_classes, BLOCK_C):
        c = first_class + tl.arange(0, BLOCK_C).to(tl.int64)[:, None]  # [BLOCK_C, 1]
        counts = exists[None, :] & (c < n_classes)
        logit = tl.load(score_ptr[None, :] + c * score_stride[None, :], mask=counts, other=0.0).to(REAL)
        total += tl.where(counts, _focal(logit, c == own_label[None, :], gamma, positive, negative), 0.0)
    weight = tl.load(label_weight[0] + row * label_weight[1], mask=exists, other=0.0).to(REAL)
    loss += tl.sum(total, 0) * weight
    tl.store(loss_ptr + position, tl.where(exists, loss, float("nan")), mask=inside)


def launch_rule(wide: bool) -> dict[str, int]:
    """One warp, whose threads sum the classes of their locations, some at a time; fewer where sums are float64."""
    return {"BLOCK_P": BLOCK_P, "BLOCK_C": 2 if wide else 8, "num_warps": 1, **register_limit()}


def _level_table(anchors: Sequence[Tensor], cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor]) -> list[int]:
    first = itertools.accumulate((level.shape[0] for level in anchors), initial=0)
    levels = zip(first, anchors, cls_scores, bbox_preds, strict=False)
    return [
        number
        for begin, boxes, scores, deltas in levels
        for number in (
            *(begin, scores.shape[3], scores.data_ptr(), *scores.stride()),
            *(deltas.data_ptr(), *deltas.stride(), boxes.data_ptr(), *boxes.stride()),
        )
    ]


def candidate_losses(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_target: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    gamma: float,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Sequence[float],
    wh_ratio_clip: float,
) -> Tensor:
    """The operator `paa_gpu::candidate_losses`: a copy and a launch; with several images five concatenations before them."""
    losses = empty_losses(cls_scores[0], label_weight[0], pos_inds)
    if losses.shape[0] == 0:
        return losses
    images, total = len(label), label[0].shape[0]
    starts = image_starts([inds.shape[0] for inds in pos_inds], [0] * images, [total] * images, BLOCK_P)
    starts = list(itertools.chain(*starts))
    # In memory and not as arguments: they are needed late, and would fill AMD's scalar registers until then.
    weights = loss_bbox_weight, gamma, loss_cls_weight * alpha, loss_cls_weight * (1 - alpha)
    options = struct.unpack("9q", struct.pack("9d", *stds, abs(math.log(wh_ratio_clip)), *weights))
    table = stage([*starts, *options, *_level_table(anchors, cls_scores, bbox_preds)], losses)
    keep(losses, table)
    columns = [concatenate(column) for column in (pos_inds, label, label_weight, bbox_target, bbox_weight)]
    with device_guard(losses):
        _losses_kernel[(starts[images],)](
            tuple(anchors),
            tuple(cls_scores),
            tuple(bbox_preds),
            table[len(starts) + len(options) :],
            table,
            images,
            cls_scores[0].shape[1],
            *((column, *column.stride()) for column in columns),
            table[len(starts) :],
            losses,
            **launch_rule(losses.itemsize == 8),
        )
    return losses
