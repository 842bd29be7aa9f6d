"""Max-IoU assignment for CPU tensors, in float32, without the matrix of overlaps. Rows of neighbouring anchors take two passes.

    first    finds each anchor's best overlap, and its ground truth. Each row's best overlap with each ground truth goes into
             `best`, [R, G]
    second   the rows that contain a ground truth's best overlap look for its best anchors

A ground truth that does not touch the bounds of a row's anchors has an overlap of 0 with all of them. Only the first of these
takes part: of equal overlaps an anchor keeps the first. Floats that are not negative have the same order as their bits as
integers. With integers, the search for the highest uses vector registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, cast, flat, lengths, offsets
from ._loops import compiled, inner, over_slices

# Anchors of a row: many enough to fill vector registers, few enough to lie together; of an image with many anchors, more, so that
# `best` has no more than MOST_ROWS numbers for each ground truth.
ROW, MOST_ROWS = 512, 128
# Anchors below which a second thread costs more than it saves, measured on 2 cores: with it, four images of 22,400 anchors and 7
# boxes take 1.1 ms instead of 0.8, and eight images 1.5 either way.
SERIAL_ANCHORS = 100_000


@inner
def _row(sides: Any, first: int, end: int) -> tuple[Any, Any, Any, Any]:
    """x1, y1, x2 and y2 of the anchors of a row. Each side by itself: a slice of columns is not contiguous for the compiler, and
    its loops would not fill vector registers."""
    return sides[0][first:end], sides[1][first:end], sides[2][first:end], sides[3][first:end]


@inner
def _ratio(box: Any, side: Any, area: Any, of_anchor: bool, eps: Any, ratio: Any) -> None:
    """Intersection over union of a box with the anchors of a row, or over the area of the anchor. A box with a NaN has no area in
    common with an anchor."""
    zero = np.float32(0)
    x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    own = np.float32(0) if of_anchor else (x2 - x1) * (y2 - y1)
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = side
    for i in range(len(area)):
        width = (anchor_x2[i] if anchor_x2[i] < x2 else x2) - (anchor_x1[i] if anchor_x1[i] > x1 else x1)
        height = (anchor_y2[i] if anchor_y2[i] < y2 else y2) - (anchor_y1[i] if anchor_y1[i] > y1 else y1)
        overlap = (width if width > zero else zero) * (height if height > zero else zero)
        whole = area[i] if of_anchor else own + area[i] - overlap
        ratio[i] = overlap / (eps if whole < eps else whole)


@inner
def _overlap(box: Any, side: Any, area: Any, eps: Any, counts: Any, iou: Any) -> None:
    """IoU of the anchors that count, -1 of the others and where it is not a number."""
    _ratio(box, side, area, False, eps, iou)
    none = np.float32(-1)
    for i in range(len(iou)):
        iou[i] = iou[i] if counts[i] and iou[i] >= 0 else none


@inner
def _highest(iou: Any) -> Any:
    """The highest of the overlaps, of which those that do not count are -1."""
    bits, highest = iou.view(np.int32), np.int32(-(2**31))
    for i in range(len(bits)):
        highest = max(highest, bits[i])
    return np.array([highest], np.int32).view(np.float32)[0]


@inner
def _keep_higher(iou: Any, gt: Any, most: Any, owner: Any, new_most: Any, new_owner: Any) -> None:
    """The higher of two overlaps of each anchor, and whose it is; of equal ones the first.

    Into other arrays: in the same ones the compiler would use masked stores, and some processors are slow at them. Two loops:
    with both in one it would use jumps.
    """
    for a in range(len(iou)):
        new_owner[a] = gt if iou[a] > most[a] else owner[a]
    for a in range(len(iou)):
        new_most[a] = iou[a] if iou[a] > most[a] else most[a]


@inner
def _bounds(side: Any) -> tuple[Any, Any, Any, Any]:
    """x1, y1, x2, y2 around the anchors of a row; comparisons leave out what is NaN."""
    x1, y1, x2, y2 = np.float32(np.inf), np.float32(np.inf), np.float32(-np.inf), np.float32(-np.inf)
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = side
    for i in range(len(anchor_x1)):
        x1 = anchor_x1[i] if anchor_x1[i] < x1 else x1
        y1 = anchor_y1[i] if anchor_y1[i] < y1 else y1
        x2 = anchor_x2[i] if anchor_x2[i] > x2 else x2
        y2 = anchor_y2[i] if anchor_y2[i] > y2 else y2
    return x1, y1, x2, y2


@inner
def _apart(box: Any, bounds: tuple[Any, Any, Any, Any]) -> bool:
    """Whether the box overlaps no anchor within the bounds, so that each IoU is 0. Not known of one whose area is not finite."""
    x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    outside = x1 >= bounds[2] or y1 >= bounds[3] or x2 <= bounds[0] or y2 <= bounds[1]
    return bool(outside and np.isfinite((x2 - x1) * (y2 - y1)))


@inner
def _counting(side: Any, area: Any, boxes: Any, valid: Any, ignore_iof_thr: Any, eps: Any, iou: Any, counts: Any) -> None:
    """The anchors that are there and not ignored."""
    for a in range(len(area)):
        counts[a] = len(valid) == 0 or valid[a]
    for i in range(len(boxes)):
        _ratio(boxes[i], side, area, True, eps, iou)
        for a in range(len(area)):
            counts[a] &= not iou[a] > ignore_iof_thr


@inner
def _decided(most: Any, owner: int, pos_iou_thr: Any, neg_iou_thr: Any) -> int:
    """The ground truth from 1, 0 for background, -1 for neither."""
    return owner + 1 if most >= pos_iou_thr else 0 if most >= 0 and most < neg_iou_thr else -1


@inner
def _decide(most: Any, owner: Any, keep_owner: bool, pos_iou_thr: Any, neg_iou_thr: Any, inds: Any) -> None:
    """What `_decided` says, or with `keep_owner` whose the best overlap is, for the second pass to decide."""
    if keep_owner:
        for a in range(len(inds)):
            inds[a] = owner[a] + 1
    else:
        for a in range(len(inds)):
            inds[a] = _decided(most[a], owner[a], pos_iou_thr, neg_iou_thr)


@compiled
def _first_pass(
    first: int,
    last: int,
    rows: Any,  # Tensor[R, 5]: image; row in it; first anchor and end, of those of all images; first anchor in `sides`
    sides: Any,
    areas: Any,
    boxes: Any,
    box_offset: Any,
    numbers: Any,
    keep_owner: bool,
    ignored: Any,
    ignored_offset: Any,
    valid: Any,
    best: Any,
    gt_inds: Any,
    overlaps: Any,
) -> None:
    pos_iou_thr, neg_iou_thr, _, ignore_iof_thr, eps = numbers
    widest, none = (rows[first:last, 3] - rows[first:last, 2]).max(), np.float32(-1)
    room, owners, room_counts = np.empty((3, widest), np.float32), np.empty((2, widest), np.int32), np.empty(widest, np.bool_)
    for row in range(first, last):
        image, place, low, high, source = rows[row]
        begin, end, size = box_offset[image], box_offset[image + 1], high - low
        side, area = _row(sides, source, source + size), areas[source : source + size]
        inds, highest, flags = gt_inds[low:high], overlaps[low:high], valid[low:high]
        if begin == end:
            for a in range(size):
                there = len(flags) == 0 or flags[a]
                inds[a], highest[a] = 0 if there else -1, 0 if there else none
            continue
        some = ignored[ignored_offset[image] : ignored_offset[image + 1]]
        iou, most, new_most = room[0][:size], room[1][:size], room[2][:size]
        owner, new_owner, counts = owners[0][:size], owners[1][:size], room_counts[:size]
        _counting(side, area, some, flags, ignore_iof_thr, eps, iou, counts)
        most[:], owner[:], bounds, apart = none, 0, _bounds(side), end
        for g in range(begin, end):
            if _apart(boxes[g], bounds):
                if apart < g:
                    best[place, g] = best[place, apart]
                    continue
                apart = g
            _overlap(boxes[g], side, area, eps, counts, iou)
            _keep_higher(iou, np.int32(g - begin), most, owner, new_most, new_owner)
            most, new_most, owner, new_owner = new_most, most, new_owner, owner
            best[place, g] = _highest(iou)
        for a in range(size):
            highest[a] = most[a]
        _decide(most, owner, keep_owner, pos_iou_thr, neg_iou_thr, inds)


@inner
def _own(iou: Any, most: Any, gt: int, first_only: bool, gt_inds: Any) -> None:
    """The best anchors of a ground truth become its own."""
    for i in range(len(iou)):
        if iou[i] == most:
            gt_inds[i] = gt
            if first_only:
                return


@compiled
def _second_pass(
    first: int,
    last: int,
    rows: Any,
    sides: Any,
    areas: Any,
    boxes: Any,
    box_offset: Any,
    numbers: Any,
    keep_owner: bool,
    match_all: bool,
    best: Any,
    highest: Any,
    gt_inds: Any,
    overlaps: Any,
) -> None:
    pos_iou_thr, neg_iou_thr, min_pos_iou, _, eps = numbers
    widest = (rows[first:last, 3] - rows[first:last, 2]).max()
    room, room_own, room_counts = np.empty(widest, np.float32), np.empty(widest, np.int64), np.empty(widest, np.bool_)
    for row in range(first, last):
        image, place, low, high, source = rows[row]
        if box_offset[image] == box_offset[image + 1]:
            continue  # all is background, as the first pass has said
        size, inds, most = high - low, gt_inds[low:high], overlaps[low:high]
        side, area = _row(sides, source, source + size), areas[source : source + size]
        iou, own, counts = room[:size], room_own[:size], room_counts[:size]
        for a in range(size):
            own[a], counts[a] = 0, most[a] >= 0
        for g in range(box_offset[image], box_offset[image + 1]):
            if best[place, g] < highest[g] or highest[g] < min_pos_iou:
                continue
            if match_all or (best[:place, g] < highest[g]).all():
                _overlap(boxes[g], side, area, eps, counts, iou)
                _own(iou, highest[g], g - box_offset[image] + 1, not match_all, own)
        for a in range(size):
            if own[a] > 0:
                inds[a] = inds[a] if keep_owner else own[a]
            elif keep_owner:
                inds[a] = _decided(most[a], inds[a] - 1, pos_iou_thr, neg_iou_thr)


def _rows(sizes: Sequence[int], shared: bool) -> Array:
    """The rows of all images, see `_first_pass`; each image has up to MOST_ROWS."""
    rows = []
    for image, (begin, size) in enumerate(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)):
        step = max(ROW, -(-size // MOST_ROWS))
        for place, low in enumerate(range(0, size, step)):
            rows.append((image, place, begin + low, begin + min(low + step, size), low if shared else begin + low))
    return np.array(rows, np.int64).reshape(-1, 5)


def _boxes(images: Sequence[Tensor]) -> Array:
    return flat(images, np.float32) if images else np.empty((0, 4), np.float32)


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
    sides, images = np.ascontiguousarray(_boxes(anchors).T), len(gt_bboxes)
    with np.errstate(all="ignore"):  # areas that are no number are met below
        areas, levels = (sides[2] - sides[0]) * (sides[3] - sides[1]), len(anchors) // images
    sizes = [sum(lengths(anchors[i * levels : (i + 1) * levels])) for i in range(images)] if per_image else [len(areas)] * images
    gt_inds, overlaps = np.empty(sum(sizes), np.int64), np.empty(sum(sizes), np.float32)
    rows, boxes, box_offset = _rows(sizes, not per_image), _boxes(gt_bboxes), offsets(lengths(gt_bboxes))
    if len(rows):
        numbers = cast(np.array([pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, eps]), np.float32)
        # The least union is no zero, which would make an IoU of 0 not a number. A smaller number may count as zero.
        numbers[4] = max(numbers[4], np.finfo(np.float32).tiny)
        keep_owner = match_low_quality and low_quality == "anchor"
        best = np.full((rows[:, 1].max() + 1, len(boxes)), np.float32(-1))
        some = _boxes(gt_bboxes_ignore), offsets(lengths(gt_bboxes_ignore) or [0] * images)
        flags = flat(valid, np.bool_) if valid else np.empty(0, np.bool_)
        common = (rows, sides, areas, boxes, box_offset, tuple(numbers), keep_owner)
        serial_below = len(rows) + 1 if len(gt_inds) < SERIAL_ANCHORS else 0
        over_slices(_first_pass, len(rows), serial_below, *common, *some, flags, best, gt_inds, overlaps)
        if match_low_quality:
            best_of_all = best.max(0)
            over_slices(_second_pass, len(rows), serial_below, *common, gt_max_assign_all, best, best_of_all, gt_inds, overlaps)
    return torch.from_numpy(gt_inds), torch.from_numpy(overlaps)
