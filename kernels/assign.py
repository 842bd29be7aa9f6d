"""Max-IoU assignment: anchors against the ground truths of their image, without the matrix of their overlaps.

A program takes a block of anchors of one image and goes through the image's ground truths, all in float32 and rounded as torch
rounds, operation by operation:

    first    the best overlap of each anchor and whose it is; the block's best overlap with each ground truth goes into `best`,
             [G], by an atomic maximum of (overlap, lower anchor first)
    second   once all blocks of the image have done this, each block compares its anchors with `best`: the best anchors of a
             ground truth become its own, in the order of the ground truths

Which of the two a program does its ticket says, drawn when it starts: those with the first half of the tickets wait for nobody,
and a program that waits has a ticket behind all of theirs, so that they have started. Memory is O(A + G).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._launch import device_guard, keep, register_limit, stage
from paa_gpu.kernels.topk import concatenate

LAST = tl.constexpr(2**31 - 1)  # an anchor is counted from the end: of equals, the lower one is the larger


@triton.jit
def _load_box(ptr, offset, stride, mask):
    x1 = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y1 = tl.load(ptr + offset + stride, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(ptr + offset + 2 * stride, mask=mask, other=0.0).to(tl.float32)
    return x1, y1, x2, tl.load(ptr + offset + 3 * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _ratio(box, anchor, eps, OF_ANCHOR: tl.constexpr):
    """Intersection over union, or over the area of the anchor. A box with a NaN has no area in common with an anchor."""
    x1, y1, x2, y2 = box
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = anchor
    # An extremum of a NaN and a number is the number on the one GPU and NaN on the other; this is the box's own.
    width = tl.where(anchor_x2 < x2, anchor_x2, x2) - tl.where(anchor_x1 > x1, anchor_x1, x1)
    height = tl.where(anchor_y2 < y2, anchor_y2, y2) - tl.where(anchor_y1 > y1, anchor_y1, y1)
    overlap = tl.where(width > 0, width, 0.0) * tl.where(height > 0, height, 0.0)
    area = (anchor_x2 - anchor_x1) * (anchor_y2 - anchor_y1)
    if not OF_ANCHOR:
        area = (x2 - x1) * (y2 - y1) + area - overlap
    return tl.div_rn(overlap, tl.where(area < eps, eps, area))


@triton.jit
def _overlap(box, anchor, eps, counts):
    """IoU of the anchors that count, -1 of the others and where it is not a number."""
    iou = _ratio(box, anchor, eps, False)
    return tl.where(counts & (iou >= 0), iou, -1.0)


@triton.jit
def _candidates(anchor, ignored_ptr, ignored_stride, begin, end, valid_ptr, offset, inside, ignore_iof_thr, eps):
    """The anchors that are there, and those among them that are not ignored."""
    exist = inside
    if valid_ptr is not None:
        exist = inside & (tl.load(valid_ptr + offset, mask=inside, other=0) != 0)
    most = tl.full(offset.shape, -1.0, tl.float32)
    if ignored_ptr is not None:
        for i in range(begin, end):
            box = _load_box(ignored_ptr, i * ignored_stride[0], ignored_stride[1], i < end)
            iof = _ratio(box, anchor, eps, True)
            most = tl.where(iof > most, iof, most)
    return exist, exist & (most <= ignore_iof_thr)


@triton.jit
def _decided(most, owner, pos_iou_thr, neg_iou_thr):
    """The ground truth from 1, 0 for background, -1 for neither."""
    return tl.where(most >= pos_iou_thr, owner, tl.where((most >= 0) & (most < neg_iou_thr), 0, -1))


@triton.jit
def _first_pass(boxes, box_stride, begin, end, anchor, index, exist, counts, best_ptr, eps, MATCH: tl.constexpr):
    """Of each anchor, the ground truth that it overlaps most, from 1, and max_overlaps; into `best`: (overlap as an ordered
    integer, place from the end), 0 for nobody."""
    most = tl.full(index.shape, -1.0, tl.float32)
    owner = tl.zeros(index.shape, tl.int32)
    for g in range(begin, end):
        iou = _overlap(_load_box(boxes, g * box_stride[0], box_stride[1], g < end), anchor, eps, counts)
        owner = tl.where(iou > most, (g - begin).to(tl.int32), owner)
        most = tl.where(iou > most, iou, most)
        if MATCH:
            key = ((iou.to(tl.int32, bitcast=True).to(tl.int64) + 1) << 32) | (index ^ LAST)
            tl.atomic_max(best_ptr + g, tl.max(tl.where(iou >= 0, key, 0), 0), sem="relaxed")
    most = tl.where((begin == end) & exist, 0.0, most)
    owner = tl.where(most >= 0, tl.where(begin == end, 0, owner + 1), -1)
    return owner.to(tl.int64), most


@triton.jit
def _second_pass(boxes, box_stride, begin, end, anchor, index, counts, best_ptr, min_pos_iou, eps, ALL: tl.constexpr):
    """The last ground truth of which the anchor is a best one, from 1; 0 for nobody."""
    assigned = tl.zeros(index.shape, tl.int64)
    for g in range(begin, end):
        best = tl.load(best_ptr + g, cache_modifier=".cg")
        most = ((best >> 32) - 1).to(tl.int32)
        mine = counts & (index == ((best & LAST) ^ LAST))
        if ALL:
            iou = _overlap(_load_box(boxes, g * box_stride[0], box_stride[1], g < end), anchor, eps, counts)
            mine = counts & (iou.to(tl.int32, bitcast=True) == most)
        matched = (best > 0) & (most.to(tl.float32, bitcast=True) >= min_pos_iou)
        assigned = tl.where(mine & matched, g - begin + 1, assigned)
    return assigned


@triton.jit(
    do_not_specialize=["n_images", "n_anchors", "pos_iou_thr", "neg_iou_thr", "min_pos_iou", "ignore_iof_thr", "eps"],
    do_not_specialize_on_alignment=["counter_ptr", "best_ptr"],  # in the table, where the number of images has them begin
)
def _assign_kernel(
    anchor_ptr,  # Tensor[A, 4]
    anchor_stride,  # of the three boxes: over boxes and sides
    box_ptr,  # Tensor[G, 4]
    box_stride,
    ignored_ptr,  # Tensor[I, 4] or None
    ignored_stride,
    valid_ptr,  # Tensor[B * A] bool or None
    start_ptr,  # Tensor[2, B + 1]: first ground truth and ignored box of each image, and their totals
    n_images,
    n_anchors,
    counter_ptr,  # Tensor[1 + B]: zeros on entry; tickets, and the blocks of each image that are done
    best_ptr,  # Tensor[G]: zeros on entry
    pos_iou_thr: tl.float32,
    neg_iou_thr: tl.float32,
    min_pos_iou: tl.float32,
    ignore_iof_thr: tl.float32,
    eps: tl.float32,
    gt_inds_ptr,  # Tensor[B, A], contiguous like the one below
    overlap_ptr,  # Tensor[B, A]
    MATCH: tl.constexpr,
    ALL: tl.constexpr,
    OWNER: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    n_blocks = tl.cdiv(n_anchors, BLOCK_A)
    ticket = tl.program_id(0)
    if MATCH:
        ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed").to(tl.int32)
    first = ticket < n_images * n_blocks
    block = tl.where(first, ticket, ticket - n_images * n_blocks)
    image = block // n_blocks
    index = (block % n_blocks).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A], as all below
    inside = index < n_anchors
    offset = image.to(tl.int64) * n_anchors + index
    start_ptr += image
    begin, end = tl.load(start_ptr), tl.load(start_ptr + 1)
    anchor = _load_box(anchor_ptr, index * anchor_stride[0], anchor_stride[1], inside)
    if first:
        ignored_begin, ignored_end = tl.load(start_ptr + n_images + 1), tl.load(start_ptr + n_images + 2)
        exist, counts = _candidates(
            anchor, ignored_ptr, ignored_stride, ignored_begin, ignored_end, valid_ptr, offset, inside, ignore_iof_thr, eps
        )
        assigned, most = _first_pass(box_ptr, box_stride, begin, end, anchor, index, exist, counts, best_ptr, eps, MATCH)
        if not OWNER:
            assigned = tl.where(begin == end, assigned, _decided(most, assigned, pos_iou_thr, neg_iou_thr))
        tl.store(gt_inds_ptr + offset, assigned, mask=inside)
        tl.store(overlap_ptr + offset, most, mask=inside)
        if MATCH:
            tl.debug_barrier()  # all that this program wrote comes before its sign
            tl.atomic_add(counter_ptr + 1 + image, 1, sem="release")
    else:
        while tl.atomic_add(counter_ptr + 1 + image, 0, sem="acquire") < n_blocks:
            pass
        # Past the first-level cache, which does not see what other programs write.
        most = tl.load(overlap_ptr + offset, mask=inside, other=-1.0, cache_modifier=".cg")
        assigned = _second_pass(box_ptr, box_stride, begin, end, anchor, index, most >= 0, best_ptr, min_pos_iou, eps, ALL)
        if OWNER:
            owner = tl.load(gt_inds_ptr + offset, mask=inside, other=0, cache_modifier=".cg")
            decided = tl.where(begin == end, owner, _decided(most, owner, pos_iou_thr, neg_iou_thr))
            tl.store(gt_inds_ptr + offset, tl.where(assigned > 0, owner, decided), mask=inside)
        else:
            tl.store(gt_inds_ptr + offset, assigned, mask=inside & (assigned > 0))


def launch_rule(half: bool) -> dict[str, int]:
    """Four anchors a thread, two where rounding to half precision takes registers: one warp finds the best without shared memory.

    No fused multiply-adds: the two passes, and torch, must get the same bits.
    """
    return {"BLOCK_A": 64 if half else 128, "num_warps": 1, "enable_fp_fusion": False, **register_limit()}


def assign_max_iou(
    anchors: Sequence[Tensor],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor],
    valid: Sequence[Tensor],
    per_image: bool,
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    ignore_iof_thr: float,
    eps: float,
    match_low_quality: bool,
    gt_max_assign_all: bool,
    low_quality: str,
) -> tuple[Tensor, Tensor]:
    """The operator `paa_gpu::assign_max_iou`: at most four concatenations, one copy and one launch; image by image where each
    has its own anchors."""
    if per_image:
        levels = len(anchors) // len(gt_bboxes)
        numbers = (pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, eps)
        columns = [
            (anchors[i * levels : (i + 1) * levels], gt_bboxes[i : i + 1], gt_bboxes_ignore[i : i + 1], valid[i : i + 1])
            for i in range(len(gt_bboxes))
        ]
        options = (False, *numbers, match_low_quality, gt_max_assign_all, low_quality)
        results = zip(*(assign_max_iou(*image, *options) for image in columns), strict=True)
        inds, most = (torch.cat(result) for result in results)
        return inds, most
    priors, boxes = concatenate(anchors), concatenate(gt_bboxes)
    images, n_anchors, rows = len(gt_bboxes), priors.shape[0], boxes.shape[0]
    gt_inds = boxes.new_empty(images * n_anchors, dtype=torch.int64)
    overlaps = boxes.new_empty(images * n_anchors, dtype=torch.float32)
    if n_anchors == 0:
        return gt_inds, overlaps
    ignored = concatenate(gt_bboxes_ignore) if gt_bboxes_ignore else None
    starts = [[0, *itertools.accumulate(box.shape[0] for box in column)] for column in (gt_bboxes, gt_bboxes_ignore)]
    starts[1] += [0] * (images + 1 - len(starts[1]))
    table = stage([*itertools.chain(*starts), *[0] * (1 + images + rows)], boxes)
    keep(gt_inds, table)
    rule = launch_rule(boxes.itemsize == 2)
    blocks = images * triton.cdiv(n_anchors, rule["BLOCK_A"])
    with device_guard(boxes):
        _assign_kernel[(2 * blocks if match_low_quality else blocks,)](
            priors,
            priors.stride(),
            boxes,
            boxes.stride(),
            ignored,
            (0, 0) if ignored is None else ignored.stride(),
            concatenate(valid).contiguous() if valid else None,
            table,
            images,
            n_anchors,
            table[2 * (images + 1) :],
            table[2 * (images + 1) + 1 + images :],
            pos_iou_thr,
            neg_iou_thr,
            min_pos_iou,
            ignore_iof_thr,
            max(eps, 1e-45),
            gt_inds,
            overlaps,
            MATCH=match_low_quality,
            ALL=gt_max_assign_all,
            OWNER=match_low_quality and low_quality == "anchor",
            **rule,
        )
    return gt_inds, overlaps
