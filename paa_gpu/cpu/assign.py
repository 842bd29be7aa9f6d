"""Max-IoU assignment for CPU tensors: ground truth after ground truth, against all anchors of the image, in float32.

The overlaps of one ground truth are all that is kept of the matrix. As integers, floats that are not negative are in the same
order, and the search for the highest fills vector registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, flat, lengths, offsets
from ._loops import compiled, over_slices

# Images below which a second thread costs more than it saves: two of some ground truths do not.
SERIAL_IMAGES = 2


@compiled
def _ratio(box: Any, side: Any, area: Any, of_anchor: bool, ratio: Any) -> None:
    """Intersection over union of a box with all anchors, or over the area of the anchor. A box with a NaN has no area in common
    with an anchor."""
    zero, tiny = np.float32(0), np.float32(1e-6)
    x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    own = np.float32(0) if of_anchor else (x2 - x1) * (y2 - y1)
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = side[0], side[1], side[2], side[3]
    for i in range(len(ratio)):
        width = (anchor_x2[i] if anchor_x2[i] < x2 else x2) - (anchor_x1[i] if anchor_x1[i] > x1 else x1)
        height = (anchor_y2[i] if anchor_y2[i] < y2 else y2) - (anchor_y1[i] if anchor_y1[i] > y1 else y1)
        overlap = (width if width > zero else zero) * (height if height > zero else zero)
        whole = area[i] if of_anchor else own + area[i] - overlap
        ratio[i] = overlap / (tiny if whole < tiny else whole)


@compiled
def _highest(iou: Any) -> Any:
    """The highest of the overlaps, of which those that do not count are -1."""
    bits, highest = iou.view(np.int32), np.int32(-(2**31))
    for i in range(len(bits)):
        highest = max(highest, bits[i])
    return np.array([highest], np.int32).view(np.float32)[0]


@compiled
def _own(iou: Any, most: Any, gt: int, first_only: bool, gt_inds: Any) -> None:
    """The best anchors of a ground truth become its own."""
    for i in range(len(iou)):
        if iou[i] == most:
            gt_inds[i] = gt
            if first_only:
                return


@compiled
def _assign_images(
    first: int,
    last: int,
    side: Any,
    area: Any,
    boxes: Any,
    box_offset: Any,
    ignored: Any,
    ignored_offset: Any,
    valid: Any,
    thresholds: Any,
    match: bool,
    match_all: bool,
    gt_inds: Any,
    overlaps: Any,
) -> None:
    size = len(area)
    pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr = thresholds
    none, iou = np.float32(-1), np.empty(size, np.float32)
    owner, own, counts = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.bool_)
    for image in range(first, last):
        begin, end, most = box_offset[image], box_offset[image + 1], overlaps[image]
        counts[:] = valid[image % len(valid)]
        if begin == end:
            gt_inds[image] = np.where(counts, 0, -1)
            most[:] = np.where(counts, np.float32(0), none)
            continue
        for i in range(ignored_offset[image], ignored_offset[image + 1]):
            _ratio(ignored[i], side, area, True, iou)
            for a in range(size):
                counts[a] &= not iou[a] > ignore_iof_thr
        most[:], owner[:], own[:] = none, 0, 0
        for g in range(begin, end):
            _ratio(boxes[g], side, area, False, iou)
            for a in range(size):
                iou[a] = iou[a] if counts[a] and iou[a] >= 0 else none
                owner[a] = g - begin if iou[a] > most[a] else owner[a]
                most[a] = iou[a] if iou[a] > most[a] else most[a]
            if match:
                highest = _highest(iou)
                if highest >= 0 and highest >= min_pos_iou:
                    _own(iou, highest, g - begin + 1, not match_all, own)
        for a in range(size):
            background = 0 if most[a] >= 0 and most[a] < neg_iou_thr else -1
            gt_inds[image, a] = own[a] if own[a] > 0 else owner[a] + 1 if most[a] >= pos_iou_thr else background


def _boxes(images: Sequence[Tensor]) -> Array:
    return flat(images, np.float32) if images else np.empty((0, 4), np.float32)


def assign_max_iou(
    anchors: Sequence[Tensor],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor],
    valid: Sequence[Tensor],
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    ignore_iof_thr: float,
    match_low_quality: bool,
    gt_max_assign_all: bool,
) -> tuple[Tensor, Tensor]:
    side = np.ascontiguousarray(_boxes(anchors).T)
    area = (side[2] - side[0]) * (side[3] - side[1])
    images, size = len(gt_bboxes), len(area)
    gt_inds, overlaps = np.empty((images, size), np.int64), np.empty((images, size), np.float32)
    flags = flat(valid, np.bool_).reshape(images, size) if valid else np.ones((1, size), np.bool_)
    thresholds = tuple(map(np.float32, (pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr)))
    over_slices(
        _assign_images, images, SERIAL_IMAGES, side, area, _boxes(gt_bboxes), offsets(lengths(gt_bboxes)),
        _boxes(gt_bboxes_ignore), offsets(lengths(gt_bboxes_ignore) or [0] * images), flags, thresholds, match_low_quality,
        gt_max_assign_all, gt_inds, overlaps,
    )  # fmt: skip
    return torch.from_numpy(gt_inds.reshape(-1)), torch.from_numpy(overlaps.reshape(-1))
