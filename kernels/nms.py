"""Non-maximum suppression of a batch: pick the best candidate, suppress or weaken those that overlap it, until there are enough.

Candidates form lists. A list is one class of an image. If candidates have labels, or if classes do not matter, it is a whole
image. An entry of a list is a box, or box * C + class. There are three kernels. The first runs only if `nms_pre` limits anything:

    limit       one program per image: finds the score of the last candidate that takes part, bit by bit, by counting. Among equal
                scores it also finds the entry
    suppress    one program per list: gathers the candidates as (key, entry), in the order of their entries. A key is the score
                as an ordered integer. Each pass suppresses or weakens what overlaps the last pick, and finds the next pick. In
                the soft forms no score is negative, so a key is the score's bits
    merge       one program per image: merges the lists' picks, by key and then by entry, into rows of `Detections`

A list has as many passes as picks, and at most as many picks as an image has room for. Memory is a key and an entry for each
candidate that a list may have. The IoU rounds operation by operation, as torchvision does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import empty_detections
from paa_gpu.cpu._arrays import at_most
from paa_gpu.kernels._launch import compile_options, device_guard, stage
from paa_gpu.kernels._numeric import first_of_highest, narrow, ordered_key, smallest_integer


@triton.jit
def _begin_and_size(start_ptr, image, n_boxes):
    """Where the boxes of the image begin in flat tensors, and their number."""
    begin = tl.full((), 0, tl.int64)
    size = begin + n_boxes
    if start_ptr is not None:
        begin = tl.load(start_ptr + image)
        size = tl.load(start_ptr + image + 1) - begin
    return begin, size


@triton.jit
def _keys_of(scores, limits, entry, inside, THRESHOLD: tl.constexpr, SOFT: tl.constexpr, REAL: tl.constexpr):
    """The keys of the entries, box * C + class, and which of them are candidates."""
    score_ptr, stride, image, begin, n_classes = scores
    at = image * stride[0] + (begin + entry // n_classes) * stride[1] + entry % n_classes * stride[2]
    score = tl.load(score_ptr + at, mask=inside, other=0.0).to(REAL)
    found = inside
    score_thr, min_score = limits
    if THRESHOLD:
        # As torch rounds a number before it compares a tensor with it.
        found &= score > narrow(tl.full((), score_thr, tl.float64), score_ptr).to(REAL)
    if SOFT:
        found &= score > tl.full((), min_score, REAL)
    return ordered_key(score), found


@triton.jit
def _count(
    scores, limits, size, key_limit, entry_limit, AT: tl.constexpr,
    THRESHOLD: tl.constexpr, SOFT: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates with a key of at least the limit; where `AT`, with exactly this key and an entry below the limit."""
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        entry = first + tl.arange(0, BLOCK).to(tl.int64)
        key, found = _keys_of(scores, limits, entry, entry < size, THRESHOLD, SOFT, REAL)
        chosen = (key == key_limit) & (entry < entry_limit) if AT else key >= key_limit
        number += (found & chosen).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit(do_not_specialize=["n_boxes", "nms_pre"])
def _limit_kernel(
    score_ptr,  # Tensor[B, K, C]
    stride,
    start_ptr,  # Tensor[B + 1]: the first box of each image in flat tensors; None: all have K
    n_boxes,
    n_classes,
    nms_pre,
    score_thr: tl.float64,
    min_score: tl.float64,
    limit_ptr,  # Tensor[B, 2] int64: the key of the last candidate, and one more than its entry
    THRESHOLD: tl.constexpr,  # whether there is one
    SOFT: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BITS: tl.constexpr = REAL.primitive_bitwidth
    image = tl.program_id(0).to(tl.int64)
    begin, boxes = _begin_and_size(start_ptr, image, n_boxes)
    scores, limits = (score_ptr, stride, image, begin, n_classes), (score_thr, min_score)
    size = boxes * n_classes
    one = tl.full((), 1, tl.int64)
    key = -(one << (BITS - 1))
    for bit in range(BITS):
        trial = key + (one << (BITS - 1 - bit))  # of 64 bits the first wraps around, to 0
        n = _count(scores, limits, size, trial, size, False, THRESHOLD, SOFT, REAL, BLOCK)
        key = tl.where(n >= nms_pre, trial, key)
    above = key + 1
    more = _count(scores, limits, size, above, size, False, THRESHOLD, SOFT, REAL, BLOCK)
    # NaN has the largest key, which has none above it.
    more = tl.where(above > key, more, 0)
    end = tl.zeros([], tl.int64)
    for bit in range(32):
        trial = end + (one << (31 - bit))
        n = _count(scores, limits, size, key, trial, True, THRESHOLD, SOFT, REAL, BLOCK)
        end = tl.where(more + n <= nms_pre, trial, end)
    tl.store(limit_ptr + 2 * image, key)
    tl.store(limit_ptr + 2 * image + 1, end)


@triton.jit
def _gather(
    scores, limits, size, first_entry, step, limit_ptr, key_ptr, entry_ptr,
    THRESHOLD: tl.constexpr, SOFT: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the candidates among the entries first_entry, first_entry + step, ...; their number, and the first best of them."""
    KEY: tl.constexpr = tl.int64 if REAL.primitive_bitwidth == 64 else tl.int32
    n = 0
    best_key = tl.zeros([BLOCK], KEY) + smallest_integer(KEY)
    best_at = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        entry = first_entry + row * step
        key, found = _keys_of(scores, limits, entry, row < size, THRESHOLD, SOFT, REAL)
        if limit_ptr is not None:
            last_key, last_entry = tl.load(limit_ptr), tl.load(limit_ptr + 1)
            found &= (key > last_key) | ((key == last_key) & (entry < last_entry))
        at = n + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(key_ptr + at, key, mask=found)
        tl.store(entry_ptr + at, entry.to(tl.int32), mask=found)
        higher = found & (key > best_key)
        best_key, best_at = tl.where(higher, key, best_key), tl.where(higher, at, best_at)
        n += tl.sum(found.to(tl.int32), 0)
    best_key, best_at = tl.reduce((best_key, best_at), 0, first_of_highest)
    return n, best_key, best_at


@triton.jit
def _load_boxes(box_ptr, stride, image, box, mask, REAL: tl.constexpr):
    ptr = box_ptr + image * stride[0] + box * stride[1]
    x1, y1 = tl.load(ptr, mask=mask, other=0.0).to(REAL), tl.load(ptr + stride[2], mask=mask, other=0.0).to(REAL)
    x2 = tl.load(ptr + 2 * stride[2], mask=mask, other=0.0).to(REAL)
    return x1, y1, x2, tl.load(ptr + 3 * stride[2], mask=mask, other=0.0).to(REAL)


@triton.jit
def _iou(box, other):
    """Zero, or NaN, which exceeds nothing, where a corner is NaN or both boxes have no area."""
    x1, y1, x2, y2 = box
    other_x1, other_y1, other_x2, other_y2 = other
    # GPUs differ in the minimum of a NaN and a number. This is the box's own corner if either is NaN.
    width = tl.where(other_x2 < x2, other_x2, x2) - tl.where(other_x1 > x1, other_x1, x1)
    height = tl.where(other_y2 < y2, other_y2, y2) - tl.where(other_y1 > y1, other_y1, y1)
    overlap = tl.where(width > 0, width, 0.0) * tl.where(height > 0, height, 0.0)
    union = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1) - overlap
    return overlap / union if overlap.dtype == tl.float64 else tl.div_rn(overlap, union)


@triton.jit
def _weakened(key, iou, iou_limit, slope, min_score, METHOD: tl.constexpr):
    """Keys after the pick of a box of their class with this IoU; the smallest integer where they are no candidates any more."""
    gone = smallest_integer(key.dtype)
    if METHOD == "hard":
        weakened = tl.where(iou > iou_limit, gone, key)
    else:
        score = key.to(iou.dtype, bitcast=True)
        if METHOD == "gaussian":
            # No overlap where the ratio is no number.
            iou = tl.where(iou > 0, iou, 0.0)
            score *= tl.exp(iou * iou * slope)
        else:
            score = tl.where(iou > iou_limit, score * (1 - iou), score)
        weakened = tl.where(score > tl.full((), min_score, score.dtype), score.to(key.dtype, bitcast=True), gone)
    return weakened


@triton.jit(do_not_specialize=["n_boxes", "most_picks", "capacity"])
def _suppress_kernel(
    box_ptr,  # Tensor[B, K, 4]
    box_stride,
    score_ptr,  # Tensor[B, K, C]
    score_stride,
    label_ptr,  # Tensor[B, K], or None
    label_stride,
    start_ptr,  # Tensor[B + 1], see the limit kernel
    n_boxes,
    n_classes,
    limit_ptr,  # Tensor[B, 2], or None
    most_picks,  # of a list
    capacity,
    iou_threshold: tl.float64,
    score_thr: tl.float64,
    min_score: tl.float64,
    slope: tl.float64,  # -1 / sigma
    key_ptr,  # Tensor[lists, capacity], scratch like the next
    entry_ptr,
    picked_key_ptr,  # Tensor[lists, most_picks]
    picked_entry_ptr,
    count_ptr,  # Tensor[lists]
    METHOD: tl.constexpr,
    PER_CLASS: tl.constexpr,  # a list is a class of an image, otherwise an image
    THRESHOLD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    KEY: tl.constexpr = tl.int64 if REAL.primitive_bitwidth == 64 else tl.int32
    group = tl.program_id(0).to(tl.int64)
    image = group // n_classes if PER_CLASS else group
    begin, size = _begin_and_size(start_ptr, image, n_boxes)
    step = n_classes if PER_CLASS else 1
    size = size if PER_CLASS else size * n_classes
    first_entry = group % n_classes if PER_CLASS else group * 0
    key_ptr += group * capacity
    entry_ptr += group * capacity
    if limit_ptr is not None:
        limit_ptr += 2 * image
    scores, limits = (score_ptr, score_stride, image, begin, n_classes), (score_thr, min_score)
    n, best_key, best_at = _gather(
        scores, limits, size, first_entry, step, limit_ptr, key_ptr, entry_ptr, THRESHOLD, METHOD != "hard", REAL, BLOCK
    )
    gone = smallest_integer(KEY)
    iou_limit, rate = tl.full((), iou_threshold, REAL), tl.full((), slope, REAL)
    picks = 0
    while (picks < most_picks) & (best_key != gone):
        tl.debug_barrier()  # what the threads wrote, each for itself, others read
        own_entry = tl.load(entry_ptr + best_at)
        own_box = begin + own_entry // n_classes
        tl.store(picked_key_ptr + group * most_picks + picks, best_key)
        tl.store(picked_entry_ptr + group * most_picks + picks, own_entry)
        picks += 1
        own = _load_boxes(box_ptr, box_stride, image, own_box, own_box >= 0, REAL)
        next_key = tl.zeros([BLOCK], KEY) + gone
        next_at = tl.zeros([BLOCK], tl.int32)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = tl.load(key_ptr + at, mask=at < n, other=gone)
            there = key != gone
            box = begin + tl.load(entry_ptr + at, mask=there, other=0) // n_classes
            iou = _iou(own, _load_boxes(box_ptr, box_stride, image, box, there, REAL))
            weakened = _weakened(key, iou, iou_limit, rate, min_score, METHOD)
            if label_ptr is not None:
                label_row = label_ptr + image * label_stride[0]
                label = tl.load(label_row + box * label_stride[1], mask=there, other=0)
                weakened = tl.where(label == tl.load(label_row + own_box * label_stride[1]), weakened, key)
            key = tl.where(there & (at != best_at), weakened, gone)
            if METHOD != "hard" and tl.int64 == KEY:
                # Where a warp has 64 threads, two of different warps may have the same candidate. It is weakened once.
                tl.debug_barrier()
            tl.store(key_ptr + at, key, mask=there)
            higher = key > next_key
            next_key, next_at = tl.where(higher, key, next_key), tl.where(higher, at, next_at)
        best_key, best_at = tl.reduce((next_key, next_at), 0, first_of_highest)
    tl.store(count_ptr + group, picks)


@triton.jit
def _merge_lists(
    picked_key_ptr, picked_entry_ptr, count_ptr, choice_ptr, n_lists, most_picks, room, KEY: tl.constexpr, LISTS: tl.constexpr
):  # fmt: skip
    """Write, in order, where the picks of the image are; their number."""
    gone = smallest_integer(KEY)
    lists = tl.arange(0, LISTS)
    inside = lists < n_lists
    count = tl.load(count_ptr + lists, mask=inside, other=0)
    at = lists.to(tl.int64) * most_picks
    end = at + count
    total = tl.minimum(tl.sum(count.to(tl.int64), 0), room)
    for n in range(total):
        there = at < end
        key = tl.load(picked_key_ptr + at, mask=there, other=gone)
        entry = tl.load(picked_entry_ptr + at, mask=there, other=2147483647)
        best_key, best_entry = tl.reduce((key, entry), 0, first_of_highest)
        chosen = there & (key == best_key) & (entry == best_entry)  # one: an entry is in one list
        tl.store(choice_ptr + n + lists * 0, at, mask=chosen)
        at += chosen.to(tl.int64)
    return total


@triton.jit(do_not_specialize=["n_boxes", "n_lists", "most_picks", "room"])
def _merge_kernel(
    box_ptr,
    box_stride,
    score_ptr,
    score_stride,
    label_ptr,
    label_stride,
    start_ptr,
    n_boxes,
    n_classes,
    n_lists,  # of an image
    most_picks,  # of a list
    room,
    picked_key_ptr,  # Tensor[B, lists, most_picks]
    picked_entry_ptr,
    count_ptr,  # Tensor[B, lists]
    choice_ptr,  # Tensor[B, room], scratch; None with one list
    boxes_ptr,  # Tensor[B, room, 4], contiguous like those below
    scores_ptr,  # Tensor[B, room]
    labels_ptr,
    index_ptr,
    number_ptr,  # Tensor[B]
    SOFT: tl.constexpr,
    REAL: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    KEY: tl.constexpr = tl.int64 if REAL.primitive_bitwidth == 64 else tl.int32
    image = tl.program_id(0).to(tl.int64)
    picked_key_ptr += image * n_lists * most_picks
    picked_entry_ptr += image * n_lists * most_picks
    count_ptr += image * n_lists
    if choice_ptr is not None:
        choice_ptr += image * room
        total = _merge_lists(picked_key_ptr, picked_entry_ptr, count_ptr, choice_ptr, n_lists, most_picks, room, KEY, LISTS)
        tl.debug_barrier()  # one thread wrote what another reads
    else:
        total = tl.load(count_ptr).to(tl.int64)
    tl.store(number_ptr + image, total)
    begin, _ = _begin_and_size(start_ptr, image, n_boxes)
    for first in range(0, room, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        inside, there = row < room, row < total
        at = row if choice_ptr is None else tl.load(choice_ptr + row, mask=there, other=0)
        entry = tl.load(picked_entry_ptr + at, mask=there, other=0)
        index, label = (entry // n_classes).to(tl.int64), (entry % n_classes).to(tl.int64)
        if SOFT:
            score = tl.load(picked_key_ptr + at, mask=there, other=0).to(REAL, bitcast=True)
        else:
            place = image * score_stride[0] + (begin + index) * score_stride[1] + label * score_stride[2]
            score = tl.load(score_ptr + place, mask=there, other=0.0)
        if label_ptr is not None:
            place = image * label_stride[0] + (begin + index) * label_stride[1]
            label = tl.load(label_ptr + place, mask=there, other=0).to(tl.int64)
        out = image * room + row
        tl.store(scores_ptr + out, narrow(score, scores_ptr) if SOFT else score, mask=inside)
        tl.store(labels_ptr + out, tl.where(there, label, -1), mask=inside)
        tl.store(index_ptr + out, tl.where(there, index, -1), mask=inside)
        for side in tl.static_range(4):
            place = image * box_stride[0] + (begin + index) * box_stride[1] + side * box_stride[2]
            tl.store(boxes_ptr + out * 4 + side, tl.load(box_ptr + place, mask=there, other=0.0), mask=inside)


def launch_rule(capacity: int, wide: bool) -> dict[str, int | bool]:
    """Two candidates a thread, one where they are float64; one warp for few of them, eight for many.

    No fused multiply-adds: an IoU is compared as torchvision rounds it.
    """
    warps = 1 if capacity <= 64 else 4 if capacity <= 1024 else 8
    return {"BLOCK": warps * (32 if wide else 64), "num_warps": warps, **compile_options(fuse=False)}


def limit_rule() -> dict[str, int]:
    return {"BLOCK": 1024, "num_warps": 8, **compile_options(fuse=True)}


def merge_rule(lists: int) -> dict[str, int]:
    """A detection a thread. Up to eight lists a thread: sixteen spill."""
    warps = 4 if lists <= 1024 else 16
    return {"LISTS": triton.next_power_of_2(lists), "BLOCK": 32 * warps, "num_warps": warps, **compile_options(fuse=True)}


def _nothing(results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    for result, value in zip(results, (0, 0, -1, -1, 0), strict=True):
        result.fill_(value)
    return results


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    lengths: Sequence[int] | None,
    iou_threshold: float,
    score_thr: float | None,
    nms_pre: int,
    max_per_img: int,
    method: str,
    sigma: float,
    min_score: float,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator `paa_gpu::batched_nms`: two launches, three where `nms_pre` limits, and one copy with `lengths`."""
    starts, most = None, boxes.shape[1]
    if lengths is not None:
        starts, most = stage([0, *itertools.accumulate(lengths)], boxes), max(lengths)
        # Every image in the same memory: where its boxes begin there, `starts` says.
        boxes, scores = (part.expand(len(lengths), -1, -1) for part in (boxes, scores))
        labels = labels if labels is None else labels.expand(len(lengths), -1)
    images, classes, wide = boxes.shape[0], scores.shape[2], torch.float64 in (boxes.dtype, scores.dtype)
    per_class = classes > 1 and not class_agnostic
    lists, entries = classes if per_class else 1, most if per_class else most * classes
    if most * classes >= 2**31:
        raise ValueError(f"`scores` must have fewer than 2^31 scores per image on a GPU, got {most * classes}")
    room = max_per_img or most * classes
    results = empty_detections(boxes, scores, images, room)
    if results[0].numel() == 0 or entries == 0:
        return _nothing(results)
    capacity = min(entries, nms_pre) if nms_pre else entries
    picks = min(room, capacity)  # of a list
    of_boxes, of_scores = (boxes, boxes.stride()), (scores, scores.stride())
    of_labels, unread = (labels, (0, 0) if labels is None else labels.stride()), (None, (0, 0))
    layout, real = (starts, most, classes), tl.float64 if wide else tl.float32
    candidates = {"THRESHOLD": score_thr is not None, "REAL": real}
    numbers = score_thr or 0.0, min_score
    limits = None
    with device_guard(boxes):
        if 0 < nms_pre < entries * lists:
            limits = boxes.new_empty((images, 2), dtype=torch.int64)
            _limit_kernel[(images,)](
                *of_scores, *layout, nms_pre, *numbers, limits, SOFT=method != "hard", **candidates, **limit_rule()
            )
        key = torch.int64 if wide else torch.int32
        scratch = [boxes.new_empty((images * lists, n), dtype=dtype) for n in (capacity, picks) for dtype in (key, torch.int32)]
        count = boxes.new_empty(images * lists, dtype=torch.int32)
        _suppress_kernel[(images * lists,)](
            *of_boxes,
            *of_scores,
            *(unread if class_agnostic else of_labels),
            *layout,
            limits,
            picks,
            capacity,
            at_most(iou_threshold, np.float64 if wide else np.float32),
            *numbers,
            -min(1 / sigma, torch.finfo(torch.float64 if wide else torch.float32).max),  # finite: an IoU of 0 changes nothing
            *scratch,
            count,
            METHOD=method,
            PER_CLASS=per_class,
            **candidates,
            **launch_rule(capacity, wide),
        )
        choice = boxes.new_empty((images, room), dtype=torch.int64) if lists > 1 else None
        _merge_kernel[(images,)](
            *of_boxes,
            *of_scores,
            *of_labels,
            *layout,
            lists,
            picks,
            room,
            *scratch[2:],
            count,
            choice,
            *results,
            SOFT=method != "hard",
            REAL=real,
            **merge_rule(lists),
        )
    return results
