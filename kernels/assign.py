"""Max-IoU assignment: anchors against the ground truths of their image, without the matrix of their overlaps.

Two launches. A program has a row of one image, some blocks of its anchors, and goes through the image's ground truths, all in
float32 and rounded as torch rounds, operation by operation:

    first    the best overlap of each anchor and whose it is; the row's best overlap with each ground truth goes into `best`,
             [R, G]. A ground truth that does not touch the bounds of a block overlaps none of its anchors, and is passed over
    second   the rows that hold a ground truth's best overlap look for its best anchors, which become its own, in the order of the
             ground truths, or what they themselves overlap most

No program reads what another of its launch writes. What the host knows comes as arguments, for up to IMAGES images a launch, and
so needs no memory of the device that a copy fills. Memory is O(A + G): `best` has at most MOST_ROWS rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._launch import device_guard, register_limit

LAST = tl.constexpr(2**31 - 1)  # an anchor is counted from the end: of equals, the lower one is the larger
INFINITY = tl.constexpr(float("inf"))
IMAGES = 16
MOST_ROWS = 128


@triton.jit
def _pick(rows, i, FIELD: tl.constexpr):
    """A field of row i of a tuple of tuples."""
    picked = rows[0][FIELD]
    for k in tl.static_range(1, len(rows)):
        picked = tl.where(i == k, rows[k][FIELD], picked)
    return picked


@triton.jit
def _load_box(ptr, offset, stride, mask):
    x1 = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y1 = tl.load(ptr + offset + stride, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(ptr + offset + 2 * stride, mask=mask, other=0.0).to(tl.float32)
    return x1, y1, x2, tl.load(ptr + offset + 3 * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _boxes_of(rows, image):
    """Address, number and strides of the boxes of an image."""
    stride, side = _pick(rows, image, 2).to(tl.int64), _pick(rows, image, 3).to(tl.int64)
    return _pick(rows, image, 0), _pick(rows, image, 1), stride, side


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
def _decided(most, owner, pos_iou_thr, neg_iou_thr):
    """The ground truth from 1, 0 for background, -1 for neither."""
    return tl.where(most >= pos_iou_thr, owner, tl.where((most >= 0) & (most < neg_iou_thr), 0, -1))


@triton.jit
def _least(x, counts):
    """The least number; not one that is NaN."""
    return tl.min(tl.where(counts & (x == x), x, INFINITY), 0)


@triton.jit
def _bounds(anchor, counts):
    """x1, y1, x2, y2 around the anchors of a block."""
    x1, y1, x2, y2 = anchor
    return _least(x1, counts), _least(y1, counts), -_least(-x2, counts), -_least(-y2, counts)


@triton.jit
def _apart(box, bounds):
    """Whether the box overlaps no anchor within the bounds, so that each IoU is 0. Not known of one whose area is not finite."""
    x1, y1, x2, y2 = box
    outside = (x1 >= bounds[2]) | (y1 >= bounds[3]) | (x2 <= bounds[0]) | (y2 <= bounds[1])
    return outside & (tl.abs((x2 - x1) * (y2 - y1)) < INFINITY)


@triton.jit
def _blocks(levels, image, SHARED: tl.constexpr, N_LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of blocks of an image."""
    n_blocks = tl.zeros((), tl.int32)
    for i in tl.static_range(N_LEVELS):
        n_blocks += tl.cdiv(_pick(levels, i if SHARED else image * N_LEVELS + i, 1), BLOCK)
    return n_blocks


@triton.jit
def _block(levels, image, block, SHARED: tl.constexpr, N_LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The anchors of a block, which are of one level; their places in the image; and which of them there are."""
    row = 0 if SHARED else image * N_LEVELS
    ptr, size, stride, side = _boxes_of(levels, row)
    first_block, first_anchor = tl.zeros((), tl.int32), tl.zeros((), tl.int64)  # of the level
    begun, begun_anchors = tl.cdiv(size, BLOCK), size.to(tl.int64)
    for i in tl.static_range(1, N_LEVELS):
        next_ptr, next_size, next_stride, next_side = _boxes_of(levels, row + i)
        here = block >= begun
        ptr, size = tl.where(here, next_ptr, ptr), tl.where(here, next_size, size)
        stride, side = tl.where(here, next_stride, stride), tl.where(here, next_side, side)
        first_block, first_anchor = tl.where(here, begun, first_block), tl.where(here, begun_anchors, first_anchor)
        begun += tl.cdiv(next_size, BLOCK)
        begun_anchors += next_size
    of_level = (block - first_block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = of_level < size
    return _load_box(ptr, of_level * stride, side, inside), first_anchor + of_level, inside


@triton.jit
def _counting(anchor, ignored, valid, image, index, inside, ignore_iof_thr, eps):
    """The anchors that are there, and those among them that are not ignored and that may overlap something."""
    exist = inside
    if valid is not None:
        flag_ptr = _pick(valid, image, 0) + index * _pick(valid, image, 1)
        exist = inside & (tl.load(flag_ptr, mask=inside, other=0) != 0)
    most = tl.full(index.shape, -1.0, tl.float32)
    if ignored is not None:
        ptr, size, stride, side = _boxes_of(ignored, image)
        for i in range(size):
            iof = _ratio(_load_box(ptr, i * stride, side, i < size), anchor, eps, True)
            most = tl.where(iof > most, iof, most)
    area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
    return exist, exist & (most <= ignore_iof_thr) & (area == area)


@triton.jit
def _first_block(images, image, anchor, index, counts, best_ptr, eps, MATCH: tl.constexpr, ALL: tl.constexpr):
    """The best overlap of each anchor, -1 for none, and whose it is. Into `best`: the highest overlap as an ordered integer, and
    below it, where not ALL, its first anchor's place from the end."""
    ptr, size, stride, side = _boxes_of(images, image)
    bounds = _bounds(anchor, counts)
    floor = tl.where(tl.max(counts.to(tl.int32), 0) > 0, 0.0, -1.0)
    first = tl.min(tl.where(counts, index, LAST), 0)
    most, owner = tl.full(index.shape, -1.0, tl.float32), tl.zeros(index.shape, tl.int32)
    lowest_apart = size
    for g in range(size):
        box = _load_box(ptr, g * stride, side, g < size)
        highest, at = floor, first
        if _apart(box, bounds):
            lowest_apart = tl.minimum(lowest_apart, g)
        else:
            iou = _overlap(box, anchor, eps, counts)
            owner = tl.where(iou > most, g, owner)
            most = tl.where(iou > most, iou, most)
            if MATCH:
                highest = tl.max(iou, 0)
                if not ALL:
                    at = tl.min(tl.where(iou == highest, index, LAST), 0)
        if MATCH:
            key = (highest.to(tl.int32, bitcast=True).to(tl.int64) + 1) << 32
            if not ALL:
                key |= at ^ LAST
            tl.atomic_max(best_ptr + g, tl.where(highest >= 0, key, 0), sem="relaxed")
    at_least = counts & (lowest_apart < size) & ((most < 0) | ((most == 0) & (owner > lowest_apart)))
    return tl.where(at_least, 0.0, most), tl.where(at_least, lowest_apart, owner)


@triton.jit
def _second_block(
    images,
    image,
    anchor,
    index,
    counts,
    best_ptr,
    n_gts,
    row,
    n_rows,
    min_pos_iou,
    eps,
    ALL: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The last ground truth of which the anchor is a best one, from 1; 0 for nobody."""
    ptr, size, stride, side = _boxes_of(images, image)
    assigned = tl.zeros(index.shape, tl.int32)
    for tile in range(0, size, BLOCK_G):
        gt = tile + tl.arange(0, BLOCK_G)
        best = tl.zeros([BLOCK_G], tl.int64)
        for other in range(n_rows):
            best = tl.maximum(best, tl.load(best_ptr + other * n_gts + gt, mask=gt < size, other=0))
        own = tl.load(best_ptr + row * n_gts + gt, mask=gt < size, other=0)
        most = ((best >> 32) - 1).to(tl.int32)
        mine = (best > 0) & (own >> 32 == best >> 32 if ALL else own == best)
        mine = mine & (most.to(tl.float32, bitcast=True) >= min_pos_iou)
        n_mine = tl.sum(mine.to(tl.int32), 0)
        for _ in range(n_mine):
            g = tl.min(tl.where(mine, gt, LAST), 0)
            key = tl.max(tl.where(gt == g, best, 0), 0)
            mine = mine & (gt != g)
            if ALL:
                iou = _overlap(_load_box(ptr, g * stride, side, g < size), anchor, eps, counts)
                best_one = iou.to(tl.int32, bitcast=True) == ((key >> 32) - 1).to(tl.int32)
            else:
                best_one = index == ((key & LAST) ^ LAST)
            assigned = tl.where(counts & best_one, g + 1, assigned)
    return assigned


_ARGUMENTS = ["images", "levels", "ignored", "valid", "n_rows", "n_gts"]
_NUMBERS = ["pos_iou_thr", "neg_iou_thr", "min_pos_iou", "ignore_iof_thr", "eps"]


# One compiled form whatever the number of images, levels' sizes and alignments.
@triton.jit(do_not_specialize=[*_ARGUMENTS, *_NUMBERS], do_not_specialize_on_alignment=_ARGUMENTS)
def _first_kernel(
    images,  # of each: Tensor[G_n, 4], G_n, strides; first ground truth and first anchor in the launch
    levels,  # of each, or of each of each image: Tensor[A_l, 4], A_l, strides
    ignored,  # of each image: Tensor[I_n, 4], I_n, strides; or None
    valid,  # of each image: Tensor[A_n] bool, stride; or None
    n_rows,
    n_gts,
    pos_iou_thr: tl.float32,
    neg_iou_thr: tl.float32,
    ignore_iof_thr: tl.float32,
    eps: tl.float32,
    best_ptr,  # Tensor[R, G]
    gt_inds_ptr,  # Tensor[A], of all images, like the one below
    overlap_ptr,  # Tensor[A]
    MATCH: tl.constexpr,
    ALL: tl.constexpr,
    OWNER: tl.constexpr,
    SHARED: tl.constexpr,
    N_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, row = tl.program_id(0) // n_rows, tl.program_id(0) % n_rows
    size = _pick(images, image, 1)
    best_ptr += row.to(tl.int64) * n_gts + _pick(images, image, 4)
    if MATCH:
        for first in range(0, size, BLOCK):
            gt = first + tl.arange(0, BLOCK)
            tl.store(best_ptr + gt, tl.zeros([BLOCK], tl.int64), mask=gt < size)
        tl.debug_barrier()  # one thread of this program raises what another has written
    n_blocks = _blocks(levels, image, SHARED, N_LEVELS, BLOCK)
    of_row = tl.cdiv(n_blocks, n_rows)
    for block in range(row * of_row, tl.minimum((row + 1) * of_row, n_blocks)):
        anchor, index, inside = _block(levels, image, block, SHARED, N_LEVELS, BLOCK)
        exist, counts = _counting(anchor, ignored, valid, image, index, inside, ignore_iof_thr, eps)
        most, owner = _first_block(images, image, anchor, index, counts, best_ptr, eps, MATCH, ALL)
        most = tl.where((size == 0) & exist, 0.0, most)
        assigned = tl.where(most >= 0, owner + 1, -1)
        if not OWNER:
            assigned = _decided(most, assigned, pos_iou_thr, neg_iou_thr)
        assigned = tl.where((size == 0) & exist, 0, assigned)
        offset = _pick(images, image, 5) + index
        tl.store(gt_inds_ptr + offset, assigned.to(tl.int64), mask=inside)
        tl.store(overlap_ptr + offset, most, mask=inside)


@triton.jit(do_not_specialize=[*_ARGUMENTS, *_NUMBERS], do_not_specialize_on_alignment=_ARGUMENTS)
def _second_kernel(
    images,  # these and the others, see _first_kernel
    levels,
    n_rows,
    n_gts,
    pos_iou_thr: tl.float32,
    neg_iou_thr: tl.float32,
    min_pos_iou: tl.float32,
    eps: tl.float32,
    best_ptr,
    gt_inds_ptr,
    overlap_ptr,
    ALL: tl.constexpr,
    OWNER: tl.constexpr,
    SHARED: tl.constexpr,
    N_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    image, row = tl.program_id(0) // n_rows, tl.program_id(0) % n_rows
    best_ptr += _pick(images, image, 4)
    n_blocks = _blocks(levels, image, SHARED, N_LEVELS, BLOCK)
    of_row = tl.cdiv(n_blocks, n_rows)
    for block in range(row * of_row, tl.minimum((row + 1) * of_row, n_blocks)):
        anchor, index, inside = _block(levels, image, block, SHARED, N_LEVELS, BLOCK)
        offset = _pick(images, image, 5) + index
        most = tl.load(overlap_ptr + offset, mask=inside, other=-1.0)
        assigned = _second_block(
            images, image, anchor, index, most >= 0, best_ptr, n_gts, row.to(tl.int64), n_rows, min_pos_iou, eps, ALL, BLOCK_G
        )
        if OWNER:
            owner = tl.load(gt_inds_ptr + offset, mask=inside, other=0)
            kept = (assigned > 0) | (_pick(images, image, 1) == 0)
            tl.store(gt_inds_ptr + offset, tl.where(kept, owner, _decided(most, owner, pos_iou_thr, neg_iou_thr)), mask=inside)
        else:
            tl.store(gt_inds_ptr + offset, assigned.to(tl.int64), mask=inside & (assigned > 0))


def launch_rule() -> dict[str, int]:
    """Four anchors a thread, and so many together that few touch them all.

    No fused multiply-adds: the two passes, and torch, must get the same bits.
    """
    return {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": False, **register_limit()}


def _rows(boxes: Sequence[Tensor], most: int) -> tuple[tuple[Any, ...], ...]:
    """Tensor, number and strides of each, as many rows as there may be."""
    rows = [(tensor, tensor.shape[0], *tensor.stride()) for tensor in boxes]
    return tuple(rows + rows[-1:] * (most - len(rows)))


def _assign(
    anchors: Sequence[Tensor],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor],
    valid: Sequence[Tensor],
    per_image: bool,
    numbers: Sequence[float],
    options: dict[str, Any],
    gt_inds: Tensor,
    overlaps: Tensor,
) -> None:
    """The images of one launch."""
    images, rule = len(gt_bboxes), launch_rule()
    levels = len(anchors) // images if per_image else len(anchors)
    most = max(1, IMAGES // levels) if per_image else IMAGES
    sizes = [[level.shape[0] for level in anchors[i * levels * per_image :][:levels]] for i in range(images)]
    n_blocks = max(sum(triton.cdiv(size, rule["BLOCK"]) for size in of_image) for of_image in sizes)
    first_gt = [*itertools.accumulate((boxes.shape[0] for boxes in gt_bboxes), initial=0)]
    first_anchor = itertools.accumulate(map(sum, sizes), initial=0)
    places = [
        (*row, *first) for row, first in zip(_rows(gt_bboxes, images), zip(first_gt, first_anchor, strict=False), strict=False)
    ]
    of_images = tuple(places + places[-1:] * (most - images))
    of_levels = _rows(anchors, most * levels if per_image else levels)
    flags = [(flag, flag.stride(0)) for flag in valid]
    n_rows, n_gts = min(n_blocks, MOST_ROWS), first_gt[-1]
    pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, eps = numbers
    best = gt_inds.new_empty(n_rows * n_gts)
    shape = {"OWNER": options["OWNER"], "ALL": options["ALL"], "SHARED": not per_image, "N_LEVELS": levels, **rule}
    with device_guard(gt_inds):
        _first_kernel[(images * n_rows,)](
            of_images,
            of_levels,
            _rows(gt_bboxes_ignore, most) if gt_bboxes_ignore else None,
            tuple(flags + flags[-1:] * (most - images)) if flags else None,
            n_rows,
            n_gts,
            pos_iou_thr,
            neg_iou_thr,
            ignore_iof_thr,
            eps,
            best,
            gt_inds,
            overlaps,
            MATCH=options["MATCH"],
            **shape,
        )
        if options["MATCH"]:
            _second_kernel[(images * n_rows,)](
                of_images, of_levels, n_rows, n_gts, pos_iou_thr, neg_iou_thr, min_pos_iou, eps, best, gt_inds, overlaps,
                BLOCK_G=32, **shape,
            )  # fmt: skip


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
    """The operator `paa_gpu::assign_max_iou`: two launches for each IMAGES images, one where nothing is matched afterwards. Of
    levels of each image, IMAGES are one launch's."""
    images = len(gt_bboxes)
    levels = len(anchors) // images if per_image else len(anchors)
    sizes = [sum(level.shape[0] for level in anchors[i * levels * per_image :][:levels]) for i in range(images)]
    gt_inds = gt_bboxes[0].new_empty(sum(sizes), dtype=torch.int64)
    overlaps = gt_bboxes[0].new_empty(sum(sizes), dtype=torch.float32)
    owner = match_low_quality and low_quality == "anchor"
    options = {"MATCH": match_low_quality, "ALL": gt_max_assign_all, "OWNER": owner}
    # The least union is no zero, which would make an IoU of 0 not a number.
    numbers = (pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, max(eps, 2.0**-149))
    step = max(1, IMAGES // levels) if per_image else IMAGES
    for first in range(0, images, step):
        some = slice(first, min(first + step, images))
        begin, end = sum(sizes[:first]), sum(sizes[: some.stop])
        if begin < end:
            of_images = anchors[first * levels : some.stop * levels] if per_image else anchors
            columns = (gt_bboxes[some], gt_bboxes_ignore[some], valid[some])
            _assign(of_images, *columns, per_image, numbers, options, gt_inds[begin:end], overlaps[begin:end])
    return gt_inds, overlaps
