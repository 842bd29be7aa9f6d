"""The targets of a batch. They are copied, made background at every potential positive, and given back to the positives.

`targets` are the outputs of all images, contiguous: label, label_weight Tensor[A] and bbox_weight Tensor[A, 4]. Kernels read the
images' own targets at the addresses in the table (see `_batch`). Three launches copy, make background, and give back, one after
the other. A later launch overwrites an earlier one.

An anchor may occur twice. It is background if none of its potential positives is positive. Each positive gives the same values
back. Its label_weight is 0 if any of them is ignored. The published loop does the same, because it finds targets by anchor index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paa_gpu.kernels._batch import (
    BBOX_WEIGHT,
    FIRST_ANCHOR,
    FIRST_ANCHOR_BLOCK,
    LABEL,
    LABEL_WEIGHT,
    TILES,
    anchors_at,
    field,
    image_of,
    vector,
)


@triton.jit
def copy_targets(images, targets, block, BLOCK: tl.constexpr):
    """Copy the targets of a block of an image's anchors, tile by tile."""
    image = image_of(images[0] + FIRST_ANCHOR_BLOCK * (images[1] + 1), images[1], block)
    first = field(images, image, FIRST_ANCHOR)
    n_anchors = field(images, image + 1, FIRST_ANCHOR) - first
    begin = (block - field(images, image, FIRST_ANCHOR_BLOCK)) * (TILES * BLOCK)
    label_ptr, stride = vector(images, image, LABEL, tl.int64)
    weight_ptr, weight_stride = vector(images, image, LABEL_WEIGHT, targets[1].dtype.element_ty)
    for tile in range(TILES):
        anchor = begin + tile * BLOCK + tl.arange(0, BLOCK)
        inside = anchor < n_anchors
        tl.store(targets[0] + first + anchor, tl.load(label_ptr + anchor * stride, mask=inside), mask=inside)
        tl.store(targets[1] + first + anchor, tl.load(weight_ptr + anchor * weight_stride, mask=inside), mask=inside)

    box_ptr, stride = vector(images, image, BBOX_WEIGHT, targets[2].dtype.element_ty)
    stride_side = field(images, image, BBOX_WEIGHT + 2)
    for tile in range(4 * TILES):
        number = 4 * begin + tile * BLOCK + tl.arange(0, BLOCK)
        inside = number < 4 * n_anchors
        weight = tl.load(box_ptr + (number >> 2) * stride + (number & 3) * stride_side, mask=inside)
        tl.store(targets[2] + 4 * first + number, weight, mask=inside)


@triton.jit
def make_background(images, targets, num_classes, image, anchor, exists):
    """Label `num_classes` and no bbox_weight for the anchors [BLOCK] of an image."""
    anchor += field(images, image, FIRST_ANCHOR)
    tl.store(targets[0] + anchor, num_classes, mask=exists)
    tl.store(targets[2] + (4 * anchor)[:, None] + tl.arange(0, 4)[None, :], 0.0, mask=exists[:, None])


@triton.jit
def give_back(images, targets, num_pos_ptr, image, position, positive, ignored, DTYPE: tl.constexpr):
    """Write what became of potential positives [BLOCK] of one image, or of an image each; count the positives, by atomics."""
    anchor, exists = anchors_at(images, image, position, positive | ignored, DTYPE)
    positive, ignored = positive & exists, ignored & exists
    out = field(images, image, FIRST_ANCHOR) + anchor
    label_ptr, stride = vector(images, image, LABEL, tl.int64)
    tl.store(targets[0] + out, tl.load(label_ptr + anchor * stride, mask=positive), mask=positive)
    weight_ptr, stride = vector(images, image, BBOX_WEIGHT, targets[2].dtype.element_ty)
    stride_side = field(images, image, BBOX_WEIGHT + 2)
    for side in tl.static_range(4):
        weight = tl.load(weight_ptr + anchor * stride + side * stride_side, mask=positive)
        tl.store(targets[2] + 4 * out + side, weight, mask=positive)
    tl.store(targets[1] + out, 0.0, mask=ignored)
    tl.atomic_add(num_pos_ptr + image + anchor * 0, tl.full(anchor.shape, 1, tl.int64), mask=positive, sem="relaxed")
