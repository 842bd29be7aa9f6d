"""Losses of the potential positives: focal loss over the classes plus the loss of the box.

    s(z) = log(1 + exp(z)), z = the logit, negated for the class of the label
    focal = sum over the classes of weight * s(z) * sigmoid(z)^gamma, weight = alpha for that class, 1 - alpha for the others
    box   = weight * (1 - GIoU) of the decoded box, or weight * |delta - delta of the target| summed over the deltas

The loss of the box is float64. In float32, a good box far from the origin has no accurate loss.

A program takes a block of the potential positives of one image. It gathers those that exist, LANES at a time, one for each lane.
A block without any is finished at once. The program reads everything in place: targets in the image's tensors, and predictions in
the level's maps, Tensor[B, K * C, H, W] of any strides, in the channels of one anchor. Lanes are mostly neighbours in the maps.
Each lane sums its own classes, so no sum crosses lanes.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import box_numbers, empty_losses
from paa_gpu.kernels._batch import image_of, places, sizes_of, starts_of
from paa_gpu.kernels._launch import compile_options, device_guard, stage

# Fields of a row of the table. Of a level: first anchor, anchors per location, width; address and strides of the scores, the
# deltas and the anchors. Of an image: first position, number of positions; address and strides of each of its five tensors. To
# choose among addresses that are arguments, several for each level, would fill AMD's scalar registers.
LEVEL_FIELDS, IMAGE_FIELDS = tl.constexpr(16), tl.constexpr(14)
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
    # atanh(s) / s to 5e-9 of its value: the polynomial that differs least for t <= 1 / 9.
    return 2 * s * (1 + t * (0.3333320915699005 + t * (0.2001076340675354 + t * (0.14000903069972992 + t * 0.1400599330663681))))


@triton.jit
def _focal(z, gamma, SQUARE: tl.constexpr):
    """s(z) * sigmoid(z)^gamma; SQUARE: gamma is 2, the usual one, which needs no second exponential."""
    e = _exp(-tl.abs(z))
    log1p = _log1p(e)  # NaN of a NaN, which the maxima below may drop
    if SQUARE:
        sigmoid = tl.where(z > 0, 1.0, e) / (1 + e)
        return (tl.maximum(z, 0.0) + log1p) * (sigmoid * sigmoid)
    # Not beyond 1e4: infinity times a gamma of 0 would be NaN.
    return (tl.maximum(z, 0.0) + log1p) * _exp(-gamma * tl.minimum(tl.maximum(-z, 0.0) + log1p, 1e4))


@triton.jit
def _giou_loss(x1, y1, x2, y2, target_x1, target_y1, target_x2, target_y2, least, added):
    """1 - GIoU; NaN where a corner is NaN. `least`: of an area; `added`: to one that is divided by."""
    width = tl.maximum(tl.minimum(x2, target_x2) - tl.maximum(x1, target_x1), 0.0)
    height = tl.maximum(tl.minimum(y2, target_y2) - tl.maximum(y1, target_y1), 0.0)
    overlap = width * height
    union = (x2 - x1) * (y2 - y1) + (target_x2 - target_x1) * (target_y2 - target_y1) - overlap
    union = tl.where(union < least, least, union)
    width = tl.maximum(tl.maximum(x2, target_x2) - tl.minimum(x1, target_x1), 0.0)
    height = tl.maximum(tl.maximum(y2, target_y2) - tl.minimum(y1, target_y1), 0.0)
    enclosing = tl.maximum(width * height, least)
    return 1 - (overlap / (union + added) - (enclosing - union) / (enclosing + added))


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
def _decode_side(low, high, shift, scale, least, most):
    """The ends of a side of the anchor, moved and scaled; `least`, `most`: of the logarithm of the scale."""
    scale = tl.where(scale > most, most, tl.where(scale < least, least, scale))  # extrema would drop a NaN
    centre = (low + high) * 0.5 + (high - low) * shift
    half = (high - low) * tl.exp(scale) * 0.5
    return centre - half, centre + half


@triton.jit
def _side_difference(low, high, target_low, target_high, shift, scale, std_ptr, w_shift, w_scale):
    """|delta - delta of the target|, weighted: of the shift of one side, and of the logarithm of its scale."""
    size = high - low
    target_shift = (target_low + target_high - low - high) * 0.5 / size
    target_scale = tl.log((target_high - target_low) / size)
    of_shift = w_shift * tl.abs(shift - target_shift / _option(std_ptr))
    return of_shift + w_scale * tl.abs(scale - target_scale / _option(std_ptr + 2))


@triton.jit
def _box_loss(deltas, anchor, target, weights, option_ptr, OF_DELTAS: tl.constexpr):
    """Weighted. The options: four deviations, least and most logarithm of the scale, least and added area."""
    dx, dy, dw, dh = deltas
    x1, y1, x2, y2 = anchor
    w0, w1, w2, w3 = weights
    if OF_DELTAS:
        of_x = _side_difference(x1, x2, target[0], target[2], dx, dw, option_ptr, w0, w2)
        return of_x + _side_difference(y1, y2, target[1], target[3], dy, dh, option_ptr + 1, w1, w3)
    least, most = _option(option_ptr + 4), _option(option_ptr + 5)
    x1, x2 = _decode_side(x1, x2, dx * _option(option_ptr), dw * _option(option_ptr + 2), least, most)
    y1, y2 = _decode_side(y1, y2, dy * _option(option_ptr + 1), dh * _option(option_ptr + 3), least, most)
    giou_loss = _giou_loss(x1, y1, x2, y2, *target, _option(option_ptr + 6), _option(option_ptr + 7))
    return giou_loss * ((w0 + w1 + w2 + w3) * 0.25)


@triton.jit
def _focal_sum(score_ptr, stride, own, active, n_classes, numbers, SQUARE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Over the classes of each lane's anchor; `own`: the class of its label, or -1."""
    gamma, positive, negative = numbers
    of_block = tl.arange(0, BLOCK_C)[:, None]
    ptr = score_ptr[None, :] + of_block.to(tl.int64) * stride[None, :]  # [BLOCK_C, LANES], as all below
    total = tl.zeros([BLOCK_C, score_ptr.shape[0]], gamma.dtype)
    for first in range(0, n_classes, BLOCK_C):
        c = first + of_block
        counts = active[None, :] & (c < n_classes)
        logit = tl.load(ptr, mask=counts, other=0.0).to(gamma.dtype)
        total += tl.where(counts & (c != own[None, :]), _focal(logit, gamma, SQUARE), 0.0)
        ptr += BLOCK_C * stride[None, :]
    has_own = active & (own >= 0)
    logit = tl.load(score_ptr + own * stride, mask=has_own, other=0.0).to(gamma.dtype)
    return negative * tl.sum(total, 0) + positive * tl.where(has_own, _focal(-logit, gamma, SQUARE), 0.0)


@triton.jit
def _of_image(row_ptr, like, index):
    """Where the rows of one of an image's tensors begin, and their stride. `row_ptr`: its address, then its strides."""
    return tl.load(row_ptr).to(like.dtype) + index * tl.load(row_ptr + 1)


# One compiled form whatever the number of images, which decides where in the table its parts begin.
@triton.jit(
    do_not_specialize=["n_images", "n_anchors", "n_classes"],
    do_not_specialize_on_alignment=["option_ptr", "level_ptr", "start_ptr"],
)
def _losses_kernel(
    # One tensor of each kind. Read at the addresses in the table: here for their dtypes.
    anchor_like,  # of each level, Tensor[H * W * K, 4]
    score_like,  # of each level, Tensor[B, K * C, H, W]
    delta_like,  # of each level, Tensor[B, K * 4, H, W]
    ind_like,  # of each image, Tensor[P_n]
    label_like,  # of each image, Tensor[A]
    target_like,  # of each image, label_weight Tensor[A]; bbox_target and bbox_weight Tensor[A, 4]
    # Tensor[11], the bits of float64: deviations of dx, dy, dw, dh; least and most logarithm of the scale; least and added area;
    # gamma; weights of the label's class and of the others
    option_ptr,
    level_ptr,  # Tensor[L, LEVEL_FIELDS]
    start_ptr,  # Tensor[B + 1], first block of each image and their total; then Tensor[B, IMAGE_FIELDS]
    n_images,
    n_anchors,
    n_classes,
    loss_bbox_weight: tl.float64,
    order_ptr,  # Tensor[P] int32: room for the positions that exist, block by block
    loss_ptr,  # Tensor[P]
    N_LEVELS: tl.constexpr,
    OF_DELTAS: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
):
    REAL: tl.constexpr = loss_ptr.dtype.element_ty
    block = tl.program_id(0)
    image = image_of(start_ptr, n_images, block)
    image_ptr = start_ptr + n_images + 1 + image * IMAGE_FIELDS
    in_image = (block - tl.load(start_ptr + image)) * BLOCK_P
    in_batch = tl.load(image_ptr) + in_image
    order_ptr += in_batch
    loss_ptr += in_batch
    of_block = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inside = in_image + of_block < tl.load(image_ptr + 1)
    inds = tl.load(_of_image(image_ptr + 2, ind_like, in_image + of_block), mask=inside, other=-1).to(tl.int64)
    exists = (inds >= 0) & (inds < n_anchors)
    tl.store(loss_ptr + of_block, float("nan"), mask=inside & (exists == 0))
    place = tl.cumsum(exists.to(tl.int32), 0)
    n_here = tl.max(place, 0)
    tl.store(order_ptr + place - 1, of_block, mask=exists)
    tl.debug_barrier()  # other threads of this program read what one has written

    for first in range(0, n_here, LANES):
        lane = first + tl.arange(0, LANES)  # [LANES], as all below without a remark
        active = lane < n_here
        position = tl.load(order_ptr + lane, mask=active, other=0)
        anchor = tl.load(_of_image(image_ptr + 2, ind_like, in_image + position), mask=active, other=0).to(tl.int64)
        level = tl.zeros([LANES], tl.int32)
        for i in tl.static_range(1, N_LEVELS):
            level += (anchor >= tl.load(level_ptr + i * LEVEL_FIELDS)).to(tl.int32)
        row_ptr = level_ptr + level * LEVEL_FIELDS
        cell = anchor - tl.load(row_ptr, mask=active, other=0)
        per_location = tl.load(row_ptr + 1, mask=active, other=1).to(tl.int32)
        width = tl.load(row_ptr + 2, mask=active, other=1).to(tl.int32)
        location, of_location = cell.to(tl.int32) // per_location, (cell.to(tl.int32) % per_location).to(tl.int64)
        y, x = (location // width).to(tl.int64), (location % width).to(tl.int64)

        delta_ptr, delta_stride = _of_map(row_ptr + 8, image, y, x, active, delta_like.dtype)
        deltas = _load4(delta_ptr + of_location * 4 * delta_stride, delta_stride, active)
        anchor_ptr = tl.load(row_ptr + 13, mask=active, other=0).to(anchor_like.dtype)
        anchor_ptr += cell * tl.load(row_ptr + 14, mask=active, other=0)
        box = _load4(anchor_ptr, tl.load(row_ptr + 15, mask=active, other=0), active)
        target = _load4(_of_image(image_ptr + 8, target_like, anchor), tl.load(image_ptr + 10), active)
        weights = _load4(_of_image(image_ptr + 11, target_like, anchor), tl.load(image_ptr + 13), active)
        loss = loss_bbox_weight * _box_loss(deltas, box, target, weights, option_ptr, OF_DELTAS)

        score_ptr, stride = _of_map(row_ptr + 3, image, y, x, active, score_like.dtype)
        label = tl.load(_of_image(image_ptr + 4, label_like, anchor), mask=active, other=-1)
        own = tl.where((label >= 0) & (label < n_classes), label, -1).to(tl.int32)
        gamma, positive, negative = _option(option_ptr + 8), _option(option_ptr + 9), _option(option_ptr + 10)
        numbers = gamma.to(REAL), positive.to(REAL), negative.to(REAL)
        score_ptr += of_location * n_classes * stride
        focal = _focal_sum(score_ptr, stride, own, active, n_classes, numbers, SQUARE, BLOCK_C)
        weight = tl.load(_of_image(image_ptr + 6, target_like, anchor), mask=active, other=0.0).to(REAL)
        tl.store(loss_ptr + position, loss.to(REAL) + focal * weight, mask=active)


def launch_rule(wide: bool, sparse: bool) -> dict[str, int]:
    """One warp, whose threads sum the classes of their anchors, some at a time; fewer where sums are float64.

    `sparse`: where every anchor is given as a potential positive, most are none, and many positions make one full warp.
    """
    return {
        "BLOCK_P": 512 if sparse else 32,
        "LANES": 32,
        "BLOCK_C": 1 if wide else 4,
        "num_warps": 1,
        **compile_options(fuse=True),
    }


def _level_table(anchors: Sequence[Tensor], cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor]) -> list[int]:
    first = starts_of(sizes_of(anchors))[:-1]
    per_location, widths = [deltas.shape[1] // 4 for deltas in bbox_preds], [scores.shape[3] for scores in cls_scores]
    maps = places(cls_scores) + places(bbox_preds) + places(anchors)
    return [*itertools.chain(*zip(first, per_location, widths, *maps, strict=True))]


def _image_table(sizes: Sequence[int], *columns: Sequence[Tensor]) -> list[int]:
    tensors = itertools.chain(*map(places, columns))
    return [*itertools.chain(*zip(starts_of(sizes)[:-1], sizes, *tensors, strict=True))]


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
    box_loss: str,
    convention: str,
) -> Tensor:
    """The operator `paa_gpu::candidate_losses`: a copy and a launch."""
    losses = empty_losses(cls_scores[0], bbox_preds[0], label_weight[0], pos_inds)
    if losses.shape[0] == 0:
        return losses
    images, total, sizes = len(label), label[0].shape[0], sizes_of(pos_inds)
    rule = launch_rule(losses.itemsize == 8, sizes == [total] * images)
    starts = starts_of(-(-size // rule["BLOCK_P"]) for size in sizes)
    # In memory and not as arguments: they are needed late, and would fill AMD's scalar registers until then.
    numbers = *stds, *box_numbers(wh_ratio_clip, convention), gamma, loss_cls_weight * alpha, loss_cls_weight * (1 - alpha)
    options = struct.unpack("11q", struct.pack("11d", *numbers))
    levels = _level_table(anchors, cls_scores, bbox_preds)
    rows = _image_table(sizes, pos_inds, label, label_weight, bbox_target, bbox_weight)
    table = stage([*options, *levels, *starts, *rows], losses)
    with device_guard(losses):
        _losses_kernel[(starts[images],)](
            anchors[0],
            cls_scores[0],
            bbox_preds[0],
            pos_inds[0],
            label[0],
            label_weight[0],
            table,
            table[len(options) :],
            table[len(options) + len(levels) :],
            images,
            total,
            cls_scores[0].shape[1] * 4 // bbox_preds[0].shape[1],
            loss_bbox_weight,
            losses.new_empty(losses.shape[0], dtype=torch.int32),
            losses,
            N_LEVELS=len(anchors),
            OF_DELTAS=box_loss == "l1",
            SQUARE=gamma == 2,
            **rule,
        )
    return losses
