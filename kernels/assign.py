"""Max-IoU assignment: anchors against the ground truths of their image, without the matrix of their overlaps.

There are two launches. A program has one row, which is some blocks of anchors of one image. It goes through the image's ground
truths. All arithmetic is float32, and each operation rounds as torch rounds:

    first    finds the best overlap of each anchor, and its ground truth. The row's best overlap with each ground truth goes into
             `best`, [R, G]. A ground truth that does not touch the bounds of a block overlaps none of its anchors, and is skipped
    second   the rows that contain a ground truth's best overlap look for its best anchors. These go to the ground truth, in the
             order of the ground truths, or to the ground truth that they themselves overlap most

No program reads what another program of its launch writes. A table has the addresses of the images' tensors, and what the host
knows. Memory is O(A + G), because `best` has at most MOST_ROWS rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._batch import places, sizes_of, starts_of
from paa_gpu.kernels._launch import compile_options, device_guard, has_slow_float64, stage

LAST = tl.constexpr(2**31 - 1)  # an anchor is counted from the end: of equals, the lower one is the larger
# Fields of a row of the table. Of an image: address, number and strides of its boxes; their first among all and its first anchor;
# address, number and strides of its boxes to ignore; address and stride of its flags. Of a level: address, size, strides.
IMAGE_FIELDS, LEVEL_FIELDS = tl.constexpr(12), tl.constexpr(4)
INFINITY = tl.constexpr(float("inf"))
MOST_ROWS = 128


@triton.jit
def _load_box(ptr, offset, stride, mask):
    x1 = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y1 = tl.load(ptr + offset + stride, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(ptr + offset + 2 * stride, mask=mask, other=0.0).to(tl.float32)
    return x1, y1, x2, tl.load(ptr + offset + 3 * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _boxes_of(row_ptr, like):
    """Address, number and strides of boxes."""
    return tl.load(row_ptr).to(like.dtype), tl.load(row_ptr + 1).to(tl.int32), tl.load(row_ptr + 2), tl.load(row_ptr + 3)


@triton.jit
def _ratio(box, anchor, eps, OF_ANCHOR: tl.constexpr):
    """Intersection over union, or over the area of the anchor. A box with a NaN has no area in common with an anchor."""
    x1, y1, x2, y2 = box
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = anchor
    # GPUs differ in the minimum of a NaN and a number. This is the box's own corner if either is NaN.
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
def _blocks(level_ptr, n_levels, BLOCK: tl.constexpr):
    """The number of blocks of an image."""
    n_blocks = tl.zeros((), tl.int32)
    for i in range(n_levels):
        n_blocks += tl.cdiv(tl.load(level_ptr + i * LEVEL_FIELDS + 1), BLOCK).to(tl.int32)
    return n_blocks


@triton.jit
def _block(level_ptr, n_levels, like, block, BLOCK: tl.constexpr):
    """The anchors of a block, which are of one level; their places in the image; and which of them there are."""
    level, in_level, first_anchor = tl.zeros((), tl.int32), block + tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    size = tl.load(level_ptr + 1)
    for i in range(1, n_levels):
        of_level = tl.cdiv(size, BLOCK).to(tl.int32)
        beyond = (level == i - 1) & (in_level >= of_level)
        in_level = tl.where(beyond, in_level - of_level, in_level)
        first_anchor = tl.where(beyond, first_anchor + size, first_anchor)
        size = tl.where(beyond, tl.load(level_ptr + i * LEVEL_FIELDS + 1), size)
        level = tl.where(beyond, i, level)
    place = in_level.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    ptr, _, stride, side = _boxes_of(level_ptr + level * LEVEL_FIELDS, like)
    return _load_box(ptr, place * stride, side, inside), (first_anchor + place).to(tl.int32), inside


@triton.jit
def _counting(anchor, image_ptr, box_like, valid_like, index, inside, ignore_iof_thr, eps, IGNORE: tl.constexpr):
    """The anchors that are there, and those among them that are not ignored and that may overlap something."""
    exist = inside
    if valid_like is not None:
        flag_ptr = tl.load(image_ptr + 10).to(valid_like.dtype) + index * tl.load(image_ptr + 11)
        exist = inside & (tl.load(flag_ptr, mask=inside, other=0) != 0)
    area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
    counts = exist & (area == area)
    if IGNORE:
        most = tl.full(index.shape, -1.0, tl.float32)
        ptr, size, stride, side = _boxes_of(image_ptr + 6, box_like)
        for i in range(size):
            iof = _ratio(_load_box(ptr, i * stride, side, i < size), anchor, eps, True)
            most = tl.where(iof > most, iof, most)
        counts &= most <= ignore_iof_thr
    return exist, counts


@triton.jit
def _key(highest, at):
    """(Overlap as an ordered integer, place from the end), 0 for nobody."""
    key = ((highest.to(tl.int32, bitcast=True).to(tl.int64) + 1) << 32) | (at ^ LAST).to(tl.int64)
    return tl.where(highest >= 0, key, 0)


@triton.jit
def _first_block(
    image_ptr, like, anchor, index, counts, best_ptr, eps, MATCH: tl.constexpr, ALL: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The best overlap of each anchor, -1 for none, and whose it is. Into `best`: the highest overlap, and its first anchor."""
    ptr, size, stride, side = _boxes_of(image_ptr, like)
    bounds = _bounds(anchor, counts)
    first = tl.min(tl.where(counts, index, LAST), 0)
    none = _key(tl.where(first < LAST, 0.0, -1.0), first)
    most, owner = tl.full(index.shape, -1.0, tl.float32), tl.zeros(index.shape, tl.int32)
    lowest_apart = size
    for tile in range(0, size, BLOCK_G):
        gt = tile + tl.arange(0, BLOCK_G)
        apart = _apart(_load_box(ptr, gt * stride, side, gt < size), bounds)
        lowest_apart = tl.minimum(lowest_apart, tl.min(tl.where(apart & (gt < size), gt, size), 0))
        if MATCH:
            tl.atomic_max(best_ptr + gt, tl.broadcast_to(none, [BLOCK_G]), mask=apart & (gt < size), sem="relaxed")
        near = (gt < size) & (apart == 0)
        for _ in range(tl.sum(near.to(tl.int32), 0)):
            g = tl.min(tl.where(near, gt, LAST), 0)
            near = near & (gt != g)
            iou = _overlap(_load_box(ptr, g * stride, side, g < size), anchor, eps, counts)
            owner = tl.where(iou > most, g, owner)
            most = tl.where(iou > most, iou, most)
            if MATCH:
                highest = tl.max(iou, 0)
                at = first
                if not ALL:
                    at = tl.min(tl.where(iou == highest, index, LAST), 0)
                tl.atomic_max(best_ptr + g, _key(highest, at), sem="relaxed")
    at_least = counts & (lowest_apart < size) & ((most < 0) | ((most == 0) & (owner > lowest_apart)))
    return tl.where(at_least, 0.0, most), tl.where(at_least, lowest_apart, owner)


@triton.jit
def _second_block(
    image_ptr,
    like,
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
    ptr, size, stride, side = _boxes_of(image_ptr, like)
    assigned = tl.zeros(index.shape, tl.int32)
    for tile in range(0, size, BLOCK_G):
        gt = tile + tl.arange(0, BLOCK_G)
        best = tl.zeros([BLOCK_G], tl.int64)
        for other in range(n_rows):
            best = tl.maximum(best, tl.load(best_ptr + other * n_gts + gt, mask=gt < size, other=0))
        own = tl.load(best_ptr + row * n_gts + gt, mask=gt < size, other=0)
        most = ((best >> 32) - 1).to(tl.int32)
        mine = (best > 0) & ((own >> 32) == (best >> 32) if ALL else own == best)
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
                best_one = index == ((key & LAST) ^ LAST).to(tl.int32)
            assigned = tl.where(counts & best_one, g + 1, assigned)
    return assigned


_SIZES = ["n_levels", "level_step", "n_rows", "n_gts"]


# One compiled form whatever the number of images, boxes and anchors.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["level_ptr"])
def _first_kernel(
    # One tensor of each kind. Read at the addresses in the table: here for their dtypes.
    anchor_like,
    box_like,
    valid_like,  # or None
    image_ptr,  # Tensor[B, IMAGE_FIELDS]
    level_ptr,  # Tensor[L, LEVEL_FIELDS], or of each image
    n_levels,
    level_step,  # from the levels of an image to those of the next: 0 where all have the same
    n_rows,
    n_gts,
    pos_iou_thr: tl.float32,
    neg_iou_thr: tl.float32,
    ignore_iof_thr: tl.float32,
    eps: tl.float32,
    best_ptr,  # Tensor[R, G]
    gt_inds_ptr,  # Tensor[A], of all images, like the one below
    overlap_ptr,  # Tensor[A]
    IGNORE: tl.constexpr,
    MATCH: tl.constexpr,
    ALL: tl.constexpr,
    OWNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    image, row = tl.program_id(0) // n_rows, tl.program_id(0) % n_rows
    image_ptr += image.to(tl.int64) * IMAGE_FIELDS
    level_ptr += image.to(tl.int64) * level_step * LEVEL_FIELDS
    size = tl.load(image_ptr + 1)
    best_ptr += row.to(tl.int64) * n_gts + tl.load(image_ptr + 4)
    if MATCH:
        for first in range(0, size, BLOCK):
            gt = first + tl.arange(0, BLOCK)
            tl.store(best_ptr + gt, tl.zeros([BLOCK], tl.int64), mask=gt < size)
        tl.debug_barrier()  # one thread of this program raises what another has written
    n_blocks = _blocks(level_ptr, n_levels, BLOCK)
    of_row = tl.cdiv(n_blocks, n_rows)
    for block in range(row * of_row, tl.minimum((row + 1) * of_row, n_blocks)):
        anchor, index, inside = _block(level_ptr, n_levels, anchor_like, block, BLOCK)
        exist, counts = _counting(anchor, image_ptr, box_like, valid_like, index, inside, ignore_iof_thr, eps, IGNORE)
        most, owner = _first_block(image_ptr, box_like, anchor, index, counts, best_ptr, eps, MATCH, ALL, BLOCK_G)
        most = tl.where((size == 0) & exist, 0.0, most)
        assigned = tl.where(most >= 0, owner + 1, -1)
        if not OWNER:
            assigned = _decided(most, assigned, pos_iou_thr, neg_iou_thr)
        assigned = tl.where((size == 0) & exist, 0, assigned)
        offset = tl.load(image_ptr + 5) + index
        tl.store(gt_inds_ptr + offset, assigned.to(tl.int64), mask=inside)
        tl.store(overlap_ptr + offset, most, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["level_ptr"])
def _second_kernel(
    anchor_like,  # these and the others, see _first_kernel
    box_like,
    image_ptr,
    level_ptr,
    n_levels,
    level_step,
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
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    image, row = tl.program_id(0) // n_rows, tl.program_id(0) % n_rows
    image_ptr += image.to(tl.int64) * IMAGE_FIELDS
    level_ptr += image.to(tl.int64) * level_step * LEVEL_FIELDS
    best_ptr += tl.load(image_ptr + 4)
    n_blocks = _blocks(level_ptr, n_levels, BLOCK)
    of_row = tl.cdiv(n_blocks, n_rows)
    for block in range(row * of_row, tl.minimum((row + 1) * of_row, n_blocks)):
        anchor, index, inside = _block(level_ptr, n_levels, anchor_like, block, BLOCK)
        offset = tl.load(image_ptr + 5) + index
        most = tl.load(overlap_ptr + offset, mask=inside, other=-1.0)
        assigned = _second_block(
            image_ptr,
            box_like,
            anchor,
            index,
            most >= 0,
            best_ptr,
            n_gts,
            row.to(tl.int64),
            n_rows,
            min_pos_iou,
            eps,
            ALL,
            BLOCK_G,
        )
        if OWNER:
            owner = tl.load(gt_inds_ptr + offset, mask=inside, other=0)
            kept = (assigned > 0) | (tl.load(image_ptr + 1) == 0)
            tl.store(gt_inds_ptr + offset, tl.where(kept, owner, _decided(most, owner, pos_iou_thr, neg_iou_thr)), mask=inside)
        else:
            tl.store(gt_inds_ptr + offset, assigned.to(tl.int64), mask=inside & (assigned > 0))


def launch_rule(anchor: Tensor, box: Tensor) -> dict[str, int]:
    """Four anchors a thread, two where half precision takes registers; and not so many together that all boxes touch them.

    No fused multiply-adds: the two passes, and torch, must get the same bits. GPUs with slow float64 hold fewer threads than
    others, and as many registers. So a thread may have more of them there. With 96, some of its forms spill.
    """
    block = 256 if 2 in (anchor.itemsize, box.itemsize) else 512
    registers = 128 if has_slow_float64(box) else 96
    return {"BLOCK": block, "num_warps": 4, **compile_options(fuse=False, registers=registers)}


def _rows(boxes: Sequence[Tensor]) -> list[Sequence[int]]:
    """Address, number and strides of each."""
    address, *strides = places(boxes)
    return [address, sizes_of(boxes), *strides]


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
    """The operator `paa_gpu::assign_max_iou`: a copy and two launches, one where nothing is matched afterwards."""
    images, rule = len(gt_bboxes), launch_rule(anchors[0], gt_bboxes[0])
    levels = len(anchors) // images if per_image else len(anchors)
    level_sizes = sizes_of(anchors)
    sizes = [level_sizes[i * levels * per_image :][:levels] for i in range(images)]
    first_anchor, first_gt = starts_of(map(sum, sizes)), starts_of(sizes_of(gt_bboxes))
    gt_inds = gt_bboxes[0].new_empty(first_anchor[images], dtype=torch.int64)
    overlaps = gt_bboxes[0].new_empty(first_anchor[images], dtype=torch.float32)
    if first_anchor[images] == 0:
        return gt_inds, overlaps
    nothing = [0] * images
    some = _rows(gt_bboxes_ignore) if gt_bboxes_ignore else [nothing] * 4
    flags = places(valid) if valid else [nothing] * 2
    of_image = zip(*_rows(gt_bboxes), first_gt[:-1], first_anchor[:-1], *some, *flags, strict=True)
    of_images = [*itertools.chain(*of_image)]
    table = stage([*of_images, *itertools.chain(*zip(*_rows(anchors), strict=True))], gt_inds)
    different = sizes if per_image else sizes[:1]
    n_rows = min(MOST_ROWS, max(sum(-(-size // rule["BLOCK"]) for size in of_image) for of_image in different))
    best = gt_inds.new_empty(n_rows * first_gt[images])
    step = (table, table[len(of_images) :], levels, levels * per_image, n_rows, first_gt[images], pos_iou_thr, neg_iou_thr)
    # The least union is no zero, which would make an IoU of 0 not a number. A smaller number may count as zero.
    eps = max(eps, torch.finfo(torch.float32).tiny)
    shape = {"OWNER": match_low_quality and low_quality == "anchor", "ALL": gt_max_assign_all, **rule}
    with device_guard(gt_inds):
        _first_kernel[(images * n_rows,)](
            anchors[0], gt_bboxes[0], valid[0] if valid else None, *step, ignore_iof_thr, eps, best, gt_inds, overlaps,
            IGNORE=len(gt_bboxes_ignore) > 0, MATCH=match_low_quality, BLOCK_G=32, **shape,
        )  # fmt: skip
        if match_low_quality:
            _second_kernel[(images * n_rows,)](
                anchors[0], gt_bboxes[0], *step, min_pos_iou, eps, best, gt_inds, overlaps, BLOCK_G=128, **shape
            )
    return gt_inds, overlaps
