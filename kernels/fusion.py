"""Weighted boxes fusion of a batch: each box joins the cluster that it overlaps most, or begins one.

The boxes of an image are a row of M places. The last box comes first, so that of equal scores the later one comes first. There
are four kernels:

    prepare   orders and clips the corners, and weights the scores; a box that is left out gets -inf
    order     sorts a row by label, then by score; it counts for each box how many come before it
    cluster   one program per place: where a class begins, it takes the boxes of the class one after the other; elsewhere it
              leaves at once
    finish    sorts the clusters by score, into a row of `FusedBoxes`

Sorting compares M^2 pairs per image. Each box costs a pass over the fused boxes that its class has so far, and waits for the box
before it. Arithmetic is that of `ensemble_boxes`, operation by operation: float64, but float32 for the sums of
a cluster and what is made of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu import _ops
from paa_gpu._ops import confidence_rule, empty_fused
from paa_gpu.kernels._launch import compile_options, device_guard, stage
from paa_gpu.kernels._numeric import first_of_highest, narrow, only_if

LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))  # weighted score: clusters keep them as float32
AVERAGE, OVERFLOW, MAXIMUM, BOX_AND_MODEL = map(tl.constexpr, (_ops.AVERAGE, _ops.OVERFLOW, _ops.MAXIMUM, _ops.BOX_AND_MODEL))


@triton.jit
def _weight(table_ptr, n_parts, model, mask):
    """The weight of a model. The table holds its bits, after the starts of the parts."""
    return tl.load(table_ptr + n_parts + 1 + model, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _ordered_and_clipped(low, high):
    swapped = high < low
    first, second = tl.where(swapped, high, low), tl.where(swapped, low, high)
    first, second = tl.where(first < 0, 0.0, first), tl.where(second < 0, 0.0, second)
    return tl.where(first > 1, 1.0, first), tl.where(second > 1, 1.0, second)


@triton.jit
def _image_and_tile(room, SIZE: tl.constexpr):
    """Which tile of which row a program has. All programs are in one dimension: a grid takes only 65,535 in another."""
    tiles = tl.cdiv(room, SIZE)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@triton.jit(do_not_specialize=["n_parts", "n_models", "room"])
def _prepare_kernel(
    box_ptr,  # Tensor[T, 4], contiguous like all others
    score_ptr,  # Tensor[T]
    label_ptr,
    table_ptr,  # Tensor[parts + 1 + models] int64: where each model of each image begins, and the weights
    n_parts,
    n_models,
    room,  # M, the places of a row
    skip_box_thr: tl.float64,
    boxes_ptr,  # Tensor[B, M, 4] float64; what follows is of the same rows
    weighted_ptr,  # float64
    labels_ptr,  # int64
    model_ptr,  # int32
    BLOCK: tl.constexpr,
):
    image, tile = _image_and_tile(room, BLOCK)
    begin = tl.load(table_ptr + image * n_models)
    end = tl.load(table_ptr + (image + 1) * n_models)
    number = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    entry = begin + number
    inside = entry < end
    model = tl.zeros([BLOCK], tl.int32)
    for t in range(1, n_models):
        model += (entry >= tl.load(table_ptr + image * n_models + t)).to(tl.int32)
    x1, y1 = tl.load(box_ptr + entry * 4, mask=inside, other=0.0), tl.load(box_ptr + entry * 4 + 1, mask=inside, other=0.0)
    x2, y2 = tl.load(box_ptr + entry * 4 + 2, mask=inside, other=0.0), tl.load(box_ptr + entry * 4 + 3, mask=inside, other=0.0)
    x1, y1, x2, y2 = x1.to(tl.float64), y1.to(tl.float64), x2.to(tl.float64), y2.to(tl.float64)
    is_number = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    x1, x2 = _ordered_and_clipped(x1, x2)
    y1, y2 = _ordered_and_clipped(y1, y2)
    score = tl.load(score_ptr + entry, mask=inside, other=0.0).to(tl.float64)
    # As torch rounds a number before it compares a tensor with it.
    threshold = narrow(tl.full((), skip_box_thr, tl.float64), score_ptr).to(tl.float64)
    weighted = score * _weight(table_ptr, n_parts, model, inside)
    finite = tl.abs(weighted) <= LARGEST  # also no NaN
    there = inside & is_number & finite & (score >= threshold) & ((x2 - x1) * (y2 - y1) != 0)
    place = room - 1 - number
    mask = place >= 0
    row = image * room + place
    tl.store(weighted_ptr + row, tl.where(there, weighted, float("-inf")), mask=mask)
    tl.store(labels_ptr + row, tl.load(label_ptr + entry, mask=inside, other=0).to(tl.int64), mask=mask)
    tl.store(model_ptr + row, model, mask=mask)
    tl.store(boxes_ptr + row * 4, x1, mask=mask)
    tl.store(boxes_ptr + row * 4 + 1, y1, mask=mask)
    tl.store(boxes_ptr + row * 4 + 2, x2, mask=mask)
    tl.store(boxes_ptr + row * 4 + 3, y2, mask=mask)


@triton.jit
def _number_before(own, row, room, label_ptr, score_ptr, tie_ptr, COLUMNS: tl.constexpr):
    """How many places of the row come before these, and how many places have a score above -inf.

    The order is by label, if given, then by score, descending, then by `tie_ptr`, or by place.
    """
    place, score, label, tie = own
    before = tl.zeros_like(place)
    count = tl.full((), 0, tl.int32)
    for first in range(0, room, COLUMNS):
        other = first + tl.arange(0, COLUMNS)
        there = other < room
        other_score = tl.load(score_ptr + row + other, mask=there, other=float("-inf"))
        count += tl.sum((other_score > float("-inf")).to(tl.int32), 0)
        other_tie = other
        if tie_ptr is not None:
            other_tie = tl.load(tie_ptr + row + other, mask=there, other=0)
        equal = other_score[None, :] == score[:, None]
        is_before = (other_score[None, :] > score[:, None]) | (equal & (other_tie[None, :] < tie[:, None]))
        if label_ptr is not None:
            other_label = tl.load(label_ptr + row + other, mask=there, other=0)
            same = other_label[None, :] == label[:, None]
            is_before = (other_label[None, :] < label[:, None]) | (same & is_before)
        before += tl.sum((is_before & there[None, :]).to(tl.int32), 1)
    return before, count


@triton.jit(do_not_specialize=["room"])
def _order_kernel(
    weighted_ptr,  # Tensor[B, M], as prepared, like the next
    labels_ptr,
    room,
    order_ptr,  # Tensor[B, M] int32: where in the row the boxes are, in their order
    sorted_ptr,  # Tensor[B, M]: their labels
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, tile = _image_and_tile(room, ROWS)
    row, place = image * room, tile * ROWS + tl.arange(0, ROWS)
    inside = place < room
    score = tl.load(weighted_ptr + row + place, mask=inside, other=0.0)
    label = tl.load(labels_ptr + row + place, mask=inside, other=0)
    before, _ = _number_before((place, score, label, place), row, room, labels_ptr, weighted_ptr, None, COLUMNS)
    tl.store(order_ptr + row + before, place, mask=inside)
    tl.store(sorted_ptr + row + before, label, mask=inside)


@triton.jit
def _most_overlapped(x1, y1, x2, y2, fused_ptr, clusters, iou_thr, BLOCK: tl.constexpr):
    """The fused box with the highest IoU, the first of equal ones; -1 if none exceeds the threshold."""
    best = tl.zeros([BLOCK], tl.float64) + iou_thr
    best_at = tl.zeros([BLOCK], tl.int32) + 2147483647
    area = (x2 - x1) * (y2 - y1)
    for first in range(0, clusters, BLOCK):
        at = first + tl.arange(0, BLOCK)
        there = at < clusters
        ptr = fused_ptr + at * 4
        left, top = tl.load(ptr, mask=there, other=0.0), tl.load(ptr + 1, mask=there, other=0.0)
        right, bottom = tl.load(ptr + 2, mask=there, other=0.0), tl.load(ptr + 3, mask=there, other=0.0)
        width = tl.where(right < x2, right, x2) - tl.where(left > x1, left, x1)
        height = tl.where(bottom < y2, bottom, y2) - tl.where(top > y1, top, y1)
        overlap = tl.where(width > 0, width, 0.0) * tl.where(height > 0, height, 0.0)
        iou = overlap / ((right - left) * (bottom - top) + area - overlap)
        higher = there & (iou > best)
        best, best_at = tl.where(higher, iou, best), tl.where(higher, at, best_at)
    best, best_at = tl.reduce((best, best_at), 0, first_of_highest)
    return tl.where(best > iou_thr, best_at, -1)


@triton.jit
def _confidences(
    at, mask, state_ptr, number_ptr, models_ptr, table_ptr, n_parts, n_models, total, most_weight, RULE: tl.constexpr
):
    """The scores of clusters. The means and sums of more than one box round to float32."""
    number = tl.load(number_ptr + at, mask=mask, other=1)
    n = number.to(tl.float64)
    several = number > 1
    if RULE == MAXIMUM:
        highest = tl.load(state_ptr + at * 4 + 1, mask=mask, other=0.0)
        score = tl.where(several, highest.to(tl.float32).to(tl.float64), highest) / most_weight
    else:
        mean = tl.load(state_ptr + at * 4, mask=mask, other=0.0) / n
        mean = tl.where(several, mean.to(tl.float32).to(tl.float64), mean)
        if RULE == AVERAGE:
            score = mean * tl.minimum(number, n_models).to(tl.float64) / total
        elif RULE == OVERFLOW:
            score = mean * n / total
        else:
            weight = tl.load(state_ptr + at * 4 + 2, mask=mask, other=1.0)
            weight = tl.where(several, weight.to(tl.float32).to(tl.float64), weight)
            models = tl.load(models_ptr + at, mask=mask, other=0)
            others = tl.zeros_like(weight)  # the weights of the models that count, one after the other
            for t in range(n_models):
                present = (models >> t) & 1
                chosen = (present != 0) if RULE == BOX_AND_MODEL else (present == 0)
                others += tl.where(chosen, _weight(table_ptr, n_parts, t, True), 0.0)
            score = mean * n / weight * others / total if RULE == BOX_AND_MODEL else mean * n / (weight + others)
    return score


@triton.jit(do_not_specialize=["n_parts", "n_models", "room"])
def _cluster_kernel(
    boxes_ptr,  # Tensor[B, M, 4] float64, as prepared, like the next two
    weighted_ptr,
    model_ptr,
    labels_ptr,  # Tensor[B, M], sorted
    order_ptr,  # Tensor[B, M]: where in the row the boxes of these labels are
    table_ptr,
    n_parts,
    n_models,
    room,
    iou_thr: tl.float64,
    total: tl.float64,  # of the weights
    most_weight: tl.float64,
    sums_ptr,  # Tensor[B, M, 4] float32; from here to models_ptr scratch, a place for each cluster from where its class begins
    state_ptr,  # Tensor[B, M, 4] float64: the sum and the highest of the weighted scores, the sum of the weights, nothing
    number_ptr,  # int32
    models_ptr,  # int64
    fused_ptr,  # Tensor[B, M, 4] float64
    score_ptr,  # Tensor[B, M] float64: -inf where no cluster is
    rank_ptr,  # Tensor[B, M]: which of equal scores is first
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // room * room
    begin = tl.program_id(0).to(tl.int64) - row
    boxes_ptr += row * 4
    weighted_ptr += row
    model_ptr += row
    labels_ptr += row
    order_ptr += row
    nothing = tl.full((), float("-inf"), tl.float64)
    label = tl.load(labels_ptr + begin)
    place = tl.load(order_ptr + begin)
    score = tl.load(weighted_ptr + place)
    follows = (tl.load(labels_ptr + begin - 1, mask=begin > 0, other=0) == label) & (begin > 0)
    # No box, no cluster.
    tl.store(score_ptr + row + begin, nothing, mask=score == nothing)
    tl.store(rank_ptr + row + begin, -1 - begin, mask=score == nothing)
    there = (score > nothing) & (follows == 0)
    own = row + begin
    sums_ptr += own * 4
    fused_ptr += own * 4
    state_ptr += own * 4
    number_ptr += own
    models_ptr += own
    side = tl.arange(0, 4)
    member = begin
    clusters = tl.full((), 0, tl.int32)
    undefined = tl.full((), -1, tl.int32)
    last = tl.full((), -1, tl.int64)
    while there:
        tl.debug_barrier()  # a thread reads what another one wrote
        last = tl.maximum(last, place.to(tl.int64))
        box_ptr = boxes_ptr + place * 4
        x1, y1, x2, y2 = tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3)
        box = tl.load(box_ptr + side)
        model = tl.load(model_ptr + place)
        # numpy takes the first NaN as the highest IoU.
        match = _most_overlapped(x1, y1, x2, y2, fused_ptr, tl.where(undefined < 0, clusters, 0), iou_thr, BLOCK)
        match = tl.where(undefined < 0, match, undefined)
        joins = match >= 0
        c = tl.where(joins, match, clusters)
        of_cluster = only_if(joins, side >= 0)
        sums = tl.load(sums_ptr + c * 4 + side, mask=of_cluster, other=0.0)
        old = tl.load(state_ptr + c * 4 + side, mask=of_cluster, other=0.0)
        highest = tl.where(joins, tl.maximum(old, score), score)
        state = tl.where(side == 1, highest, old + tl.where(side == 0, score, _weight(table_ptr, n_parts, model, True)))
        conf = tl.sum(tl.where(side == 0, state, 0.0), 0)
        number = tl.load(number_ptr + c, mask=joins, other=0) + 1
        models = tl.load(models_ptr + c, mask=joins, other=0) | (tl.full((), 1, tl.int64) << model)
        sums = (sums.to(tl.float64) + score * box).to(tl.float32)
        mean = (sums.to(tl.float64) / conf).to(tl.float32).to(tl.float64)
        tl.debug_barrier()  # every thread has read what is written below
        fused = tl.where(joins, mean, box)
        tl.store(fused_ptr + c * 4 + side, fused)
        tl.store(sums_ptr + c * 4 + side, sums)
        tl.store(state_ptr + c * 4 + side, state)
        tl.store(number_ptr + c, number)
        tl.store(models_ptr + c, models)
        width = tl.sum(tl.where(side == 2, fused, tl.where(side == 0, -fused, 0.0)), 0)
        height = tl.sum(tl.where(side == 3, fused, tl.where(side == 1, -fused, 0.0)), 0)
        area = width * height
        undefined = tl.where(area != area, c, undefined)
        clusters += (joins == 0).to(tl.int32)
        member += 1
        inside = member < room
        place = tl.load(order_ptr + member, mask=inside, other=0)
        score = tl.load(weighted_ptr + place)
        there = inside & (tl.load(labels_ptr + member, mask=inside, other=0) == label) & (score > nothing)
    tl.debug_barrier()
    members = (member - begin).to(tl.int32)
    for first in range(0, members, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < clusters
        scores = _confidences(at, mask, state_ptr, number_ptr, models_ptr, table_ptr, n_parts, n_models, total, most_weight, RULE)
        inside = at < members
        tl.store(score_ptr + own + at, tl.where(mask, scores, nothing), mask=inside)
        # The class that appears first has the last place of the row. It comes last, and so does the first cluster.
        tl.store(rank_ptr + own + at, last * room + (room - 1 - at), mask=inside)


@triton.jit(do_not_specialize=["room"])
def _finish_kernel(
    fused_ptr,  # Tensor[B, M, 4], of the places where clusters are
    score_ptr,  # Tensor[B, M], -inf where none is
    labels_ptr,
    rank_ptr,
    room,
    boxes_ptr,  # Tensor[B, M, 4], results like those below
    scores_ptr,
    label_ptr,
    count_ptr,  # Tensor[B]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, tile = _image_and_tile(room, ROWS)
    row, place = image * room, tile * ROWS + tl.arange(0, ROWS)
    inside = place < room
    score = tl.load(score_ptr + row + place, mask=inside, other=float("-inf"))
    rank = tl.load(rank_ptr + row + place, mask=inside, other=0)
    before, count = _number_before((place, score, None, rank), row, room, None, score_ptr, rank_ptr, COLUMNS)
    there = score > float("-inf")
    out = row + before
    label = tl.load(labels_ptr + row + place, mask=there, other=-1)
    tl.store(label_ptr + out, label, mask=inside)
    tl.store(scores_ptr + out, narrow(tl.where(there, score, 0.0), scores_ptr), mask=inside)
    for side in tl.static_range(4):
        corner = tl.load(fused_ptr + (row + place) * 4 + side, mask=there, other=0.0)
        tl.store(boxes_ptr + out * 4 + side, narrow(corner, boxes_ptr), mask=inside)
    tl.store(count_ptr + image, count.to(tl.int64), mask=tile == 0)


def cluster_rule() -> dict[str, int | bool]:
    """One warp, so that many classes run side by side. No fused multiply-adds: the arithmetic is that of numpy."""
    return {"BLOCK": 64, "num_warps": 1, **compile_options(fuse=False)}


def prepare_rule() -> dict[str, int | bool]:
    return {"BLOCK": 128, "num_warps": 4, **compile_options(fuse=False)}


def order_rule() -> dict[str, int]:
    return {"ROWS": 32, "COLUMNS": 32, "num_warps": 4, **compile_options(fuse=True)}


def weighted_boxes_fusion(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    iou_thr: float,
    skip_box_thr: float,
    conf_type: str,
    allows_overflow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `paa_gpu::weighted_boxes_fusion`: one copy and four launches."""
    models, parts = len(weights), len(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    images, room = parts // models, max(end - begin for begin, end in itertools.pairwise(starts[::models]))
    if images * room >= 2**31:
        raise ValueError(f"`boxes` must have fewer than 2^31 boxes over images of one length on a GPU, got {images * room}")
    results = empty_fused(boxes, scores, images, room)
    if room == 0:
        results[3].zero_()
        return results
    weight = np.array(weights, np.float64)
    table = stage([*starts, *weight.view(np.int64).tolist()], boxes)

    def rows(dtype: torch.dtype, *sides: int) -> Tensor:
        return boxes.new_empty((images, room, *sides), dtype=dtype)

    real = torch.float64
    box, weighted, label, model = rows(real, 4), rows(real), rows(torch.int64), rows(torch.int32)
    sums, state, number, which = rows(torch.float32, 4), rows(real, 4), rows(torch.int32), rows(torch.int64)
    fused, score, rank = rows(real, 4), rows(real), rows(torch.int64)
    order, by_label = rows(torch.int32), rows(torch.int64)
    with device_guard(boxes):
        rule, grid = prepare_rule(), (images * triton.cdiv(room, order_rule()["ROWS"]),)
        _prepare_kernel[(images * triton.cdiv(room, rule["BLOCK"]),)](
            boxes.contiguous(), scores.contiguous(), labels.contiguous(), table, parts, models, room, skip_box_thr,
            box, weighted, label, model, **rule,
        )  # fmt: skip
        _order_kernel[grid](weighted, label, room, order, by_label, **order_rule())
        _cluster_kernel[(images * room,)](
            box, weighted, model, by_label, order, table, parts, models, room, iou_thr, float(weight.sum()), float(weight.max()),
            sums, state, number, which, fused, score, rank,
            RULE=confidence_rule(conf_type, allows_overflow), **cluster_rule(),
        )  # fmt: skip
        _finish_kernel[grid](fused, score, by_label, rank, room, *results, **order_rule())
    return results
