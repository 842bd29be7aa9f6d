"""Candidates: the `topk` smallest losses of every (image, ground truth, level), each ground truth's in ascending order.

The images of the batch are those of a table (see `_batch`); each ground truth is a row. Three launches, whose cost grows with
P + G:

    count     how many potential positives each row has, by atomics that also give each its rank in the row's bucket;
              the program that finishes last turns the counts into the buckets' starts
    scatter   each potential positive's key and tie go to its place in the bucket
    select    one program per row keeps the best so far of its bucket, in order, and reads on. What comes after the last candidate
              of a level that is full is dropped at once; what is left waits until many slots are taken, and then all are sorted.
              A sort takes little more work with equal losses, and more with nearly equal ones (see `sort_slots`)

The order is that of the pairs (key, tie): the loss as an ordered integer, and anchor << 32 | position. It is total, so
it does not matter in which order the atomics filled a bucket. An image has fewer than 2^31 anchors, a batch fewer than 2^31
potential positives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._batch import (
    BLOCK,
    DTYPES,
    FIRST_BLOCK,
    FIRST_POSITION,
    FIRST_ROW,
    LOSSES,
    anchors_at,
    field,
    image_fields,
    image_of,
    potential,
    rows_at,
    sizes_of,
    vector,
)
from paa_gpu.kernels._launch import compile_options, device_guard, stage
from paa_gpu.kernels._numeric import ordered_key, smallest_integer
from paa_gpu.kernels._sort import count_in_order, count_in_slots, sort_slots


@triton.jit
def _counts_to_starts(bucket_ptr, n_rows, BLOCK: tl.constexpr):
    """Exclusive prefix sums in place, the total behind them."""
    total = tl.full((), 0, tl.int64)
    for first in range(0, n_rows + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        # Past the first-level cache, which does not see the other programs' atomics.
        size = tl.load(bucket_ptr + row, mask=row < n_rows, other=0, cache_modifier=".cg")
        tl.store(bucket_ptr + row, total + tl.cumsum(size, 0) - size, mask=row <= n_rows)
        total += tl.sum(size, 0)


@triton.jit
def count_block(images, n_rows, bucket_ptr, rank_ptr, block, INDS: tl.constexpr, GT_INDS: tl.constexpr, BLOCK: tl.constexpr):
    """Count a block of potential positives into their rows.

    bucket_ptr: Tensor[G + 2], zeros on entry; when all blocks are done, first places of the rows, their total, and behind it how
    many blocks drew a ticket. rank_ptr: Tensor[P], each potential positive's rank in its bucket.
    """
    image, position, inside = potential(images, block, BLOCK)
    _, exists = anchors_at(images, image, position, inside, INDS)
    row, has_row = rows_at(images, image, position, exists, GT_INDS)
    rank = tl.atomic_add(bucket_ptr + row, 1, mask=has_row, sem="relaxed")
    tl.store(rank_ptr + field(images, image, FIRST_POSITION) + position, rank.to(tl.int32), mask=has_row)

    tl.debug_barrier()  # all of this program's atomics come before its ticket
    if tl.atomic_add(bucket_ptr + n_rows + 1, 1) == field(images, images[1], FIRST_BLOCK) - 1:
        _counts_to_starts(bucket_ptr, n_rows, BLOCK)


@triton.jit
def scatter_block(
    images, bucket_ptr, rank_ptr, key_ptr, tie_ptr, image, position, inside, anchor, LOSS: tl.constexpr, GT_INDS: tl.constexpr
):
    """Put potential positives into their buckets: keys and ties Tensor[P], bucket after bucket."""
    row, has_row = rows_at(images, image, position, inside, GT_INDS)
    loss_ptr, stride = vector(images, image, LOSSES, LOSS)
    loss = tl.load(loss_ptr + position * stride, mask=has_row, other=0.0)
    position += field(images, image, FIRST_POSITION)
    place = tl.load(bucket_ptr + row, mask=has_row, other=0) + tl.load(rank_ptr + position, mask=has_row, other=0)
    tl.store(key_ptr + place, ordered_key(loss), mask=has_row)
    tl.store(tie_ptr + place, (anchor << 32) | position, mask=has_row)


@triton.jit(do_not_specialize=["n_images", "n_rows"], do_not_specialize_on_alignment=["bucket_ptr"])
def _count_kernel(
    table_ptr,  # the images, see `_batch`
    n_images,
    n_rows,
    bucket_ptr,  # see count_block
    rank_ptr,  # Tensor[P]
    INDS: tl.constexpr,
    GT_INDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count_block((table_ptr, n_images), n_rows, bucket_ptr, rank_ptr, tl.program_id(0), INDS, GT_INDS, BLOCK)


@triton.jit(do_not_specialize=["n_images"], do_not_specialize_on_alignment=["bucket_ptr"])
def _scatter_kernel(
    table_ptr,  # the images, see `_batch`
    n_images,
    bucket_ptr,  # Tensor[G + 1]: first places of the rows
    rank_ptr,  # Tensor[P]
    key_ptr,  # Tensor[P], bucket after bucket
    tie_ptr,  # Tensor[P], bucket after bucket
    LOSS: tl.constexpr,
    INDS: tl.constexpr,
    GT_INDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    images = (table_ptr, n_images)
    image, position, inside = potential(images, tl.program_id(0), BLOCK)
    anchor, exists = anchors_at(images, image, position, inside, INDS)
    scatter_block(images, bucket_ptr, rank_ptr, key_ptr, tie_ptr, image, position, exists, anchor, LOSS, GT_INDS)


@triton.jit
def _within(anchor, begin, end):
    """Whether begin <= anchor < end, in one comparison: masks of two would be more than AMD has scalar registers."""
    return (anchor - begin).to(tl.uint32, bitcast=True) < (end - begin).to(tl.uint32, bitcast=True)


@triton.jit
def _admit(anchor, taken, end_ptr, n_levels, topk, LEVELS: tl.constexpr):
    """Which of the sorted anchors [BLOCK] are among the first `topk` of their level, of which `taken` [LEVELS] came before."""
    level_index = tl.arange(0, LEVELS)  # [LEVELS]
    admitted = anchor < 0  # [BLOCK]
    begin = tl.full((), 0, tl.int32)
    for level in range(n_levels):
        end = tl.load(end_ptr + level).to(tl.int32)
        here = _within(anchor, begin, end)
        room = topk - tl.sum(tl.where(level_index == level, taken, 0), 0)
        admitted = admitted | (here & (count_in_order(here) <= room))
        begin = end
    return admitted


@triton.jit
def _take(anchor, taken, end_ptr, n_levels, LEVELS: tl.constexpr):
    """The anchors [BLOCK] that are not negative, added to the numbers `taken` [LEVELS] of each level."""
    level_index = tl.arange(0, LEVELS)  # [LEVELS]
    begin = tl.full((), 0, tl.int32)
    for level in range(n_levels):
        end = tl.load(end_ptr + level).to(tl.int32)
        here = _within(anchor, begin, end)
        taken += tl.where(level_index == level, tl.sum(here.to(tl.int32), 0), 0)
        begin = end
    return taken


@triton.jit
def _last(key, tie, among):
    """The last pair (key, tie) among some of the slots [BLOCK]."""
    last_key = tl.max(tl.where(among, key, smallest_integer(key.dtype)), 0)
    return last_key, tl.max(tl.where(among & (key == last_key), tie, -1), 0)


@triton.jit
def _bounds(key, tie, kept, taken, end_ptr, n_levels, topk, LEVELS: tl.constexpr):
    """Key and tie [LEVELS] for each level. What comes after them in the level is no candidate.

    key, tie, kept: the slots [BLOCK], and which of them hold candidates. The last candidate of a level with all its candidates is
    its bound. Where BLOCK // 2 are kept, which is all that a pass finds, the last of them is the bound of the other levels.
    """
    anchor = (tie >> 32).to(tl.int32)
    level_index = tl.arange(0, LEVELS)  # [LEVELS]
    last_key, last_tie = ~smallest_integer(key.dtype), ~smallest_integer(tie.dtype)
    if tl.sum(kept.to(tl.int32), 0) == anchor.shape[0] // 2:
        last_key, last_tie = _last(key, tie, kept)
    bound_key, bound_tie = tl.broadcast_to(last_key, [LEVELS]), tl.broadcast_to(last_tie, [LEVELS])
    begin = tl.full((), 0, tl.int32)
    for level in range(n_levels):
        end = tl.load(end_ptr + level).to(tl.int32)
        here = kept & _within(anchor, begin, end)
        room = topk - tl.sum(tl.where(level_index == level, taken, 0), 0)
        if tl.sum(here.to(tl.int32), 0) == room:
            last_key, last_tie = _last(key, tie, here)
            bound_key = tl.where(level_index == level, last_key, bound_key)
            bound_tie = tl.where(level_index == level, last_tie, bound_tie)
        begin = end
    return bound_key, bound_tie


@triton.jit
def _before(key, tie, bounds, LOG_LEVELS: tl.constexpr):
    """Which slots [BLOCK] come before the bound of their level.

    bounds: [LEVELS] each, the level's end (the largest integer behind the last level), and the key and the tie of its bound.
    """
    level_end, bound_key, bound_tie = bounds
    anchor = (tie >> 32).to(tl.int32)
    level = tl.zeros(anchor.shape, tl.int32)  # by binary search: how many levels end at the anchor or before it
    for i in tl.static_range(LOG_LEVELS):
        step = 1 << (LOG_LEVELS - 1 - i)
        level += tl.where(anchor >= tl.gather(level_end, level + (step - 1), 0), step, 0)
    last_key, last_tie = tl.gather(bound_key, level, 0), tl.gather(bound_tie, level, 0)
    return (key < last_key) | ((key == last_key) & (tie < last_tie))


@triton.jit
def _eligible(key, tie, new, last_key, last_tie, again, bounds, bounded, LOG_LEVELS: tl.constexpr):
    """Which new slots can hold candidates. again: (last_key, last_tie) is the last one of the passes before this one."""
    if again:
        new = new & ((key > last_key) | ((key == last_key) & (tie > last_tie)))
    if bounded:
        new = new & _before(key, tie, bounds, LOG_LEVELS)
    return new


@triton.jit
def _next_candidates(
    bucket, again, last_key, last_tie, taken, level_end, levels, topk, LOG_LEVELS: tl.constexpr, SLOTS: tl.constexpr
):
    """One pass over a bucket: the next candidates, sorted. bucket: keys, ties and length; levels: their ends, and their number.

    again: they come after (last_key, last_tie), the last one of the passes before. taken: of each level, by these passes.
    Returns key, tie, whether there is a candidate and the order from 1 on, each of the slots [SLOTS]; and how many there are.
    """
    LEVELS: tl.constexpr = 1 << LOG_LEVELS
    CROWDED: tl.constexpr = SLOTS * 3 // 4  # so many slots are taken: sorting frees more than reading on would find
    key_ptr, tie_ptr, length = bucket
    end_ptr, n_levels = levels
    slot = tl.arange(0, SLOTS)
    key = tl.zeros([SLOTS], last_key.dtype)
    tie = tl.zeros([SLOTS], tl.int64)
    kept = slot < 0
    found = tl.full((), 0, tl.int32)
    place = tl.full((), 0, tl.int32)
    order = tl.zeros([SLOTS], tl.int32)
    while place < length:
        # Not kept from one round to the next: the sort needs the registers.
        n_kept = tl.zeros([SLOTS], tl.int32)  # up to and including the slot
        bound_key = tl.full([LEVELS], ~smallest_integer(last_key.dtype), last_key.dtype)
        bound_tie = tl.full([LEVELS], 0x7FFFFFFFFFFFFFFF, tl.int64)
        if place > 0:
            n_kept = count_in_slots(kept)
            if length - place > SLOTS - found:
                bound_key, bound_tie = _bounds(key, tie, kept, taken, end_ptr, n_levels, topk, LEVELS)
        filling = True
        while filling:
            source = place + slot - n_kept
            new = (kept == 0) & (source < length)
            key = tl.where(kept, key, tl.load(key_ptr + source, mask=new, other=0))
            tie = tl.where(kept, tie, tl.load(tie_ptr + source, mask=new, other=0))
            more = length - place > SLOTS - found
            bounds = level_end, bound_key, bound_tie
            new = _eligible(key, tie, new, last_key, last_tie, again, bounds, (place > 0) & more, LOG_LEVELS)
            kept = kept | new
            place += SLOTS - found
            filling = more
            if more:
                n_new = tl.sum(new.to(tl.int32), 0)
                if n_new > 0:
                    n_kept = count_in_slots(kept)
                    found += n_new
                    filling = found < CROWDED
        key, tie = sort_slots(key, tie, kept)
        kept = _admit((tie >> 32).to(tl.int32), taken, end_ptr, n_levels, topk, LEVELS)
        order = count_in_order(kept)
        kept = kept & (order <= SLOTS // 2)
        found = tl.minimum(tl.max(order, 0), SLOTS // 2)
    return key, tie, kept, order, found


@triton.jit(
    # Pointers that AMD would take four scalar registers for if it knew them to span less than 2 GiB.
    do_not_specialize=[
        "n_images",
        "n_levels",
        "topk",
        "width",
        "key_ptr",
        "tie_ptr",
        "candidate_loss_ptr",
        "candidate_index_ptr",
    ],
    do_not_specialize_on_alignment=["bucket_ptr", "level_end_ptr"],
)
def _select_kernel(
    key_ptr,  # Tensor[P], bucket after bucket
    tie_ptr,  # Tensor[P], bucket after bucket
    bucket_ptr,  # Tensor[G + 1]: first places of the rows
    table_ptr,  # the images, see `_batch`
    level_end_ptr,  # Tensor[B, L]: anchors of the image up to and including each level
    n_images,
    n_levels,
    topk,
    width,
    candidate_loss_ptr,  # Tensor[G, K], contiguous like all outputs
    candidate_index_ptr,  # Tensor[G, K]
    count_ptr,  # Tensor[G]
    image_ptr,  # Tensor[G]: the row's image
    gt_ptr,  # Tensor[G]: its ground truth within the image
    LOSS: tl.constexpr,
    LOG_LEVELS: tl.constexpr,
):
    LEVELS: tl.constexpr = 1 << LOG_LEVELS
    SLOTS: tl.constexpr = 128  # at most half of them hold candidates, the others what is compared with them
    row = tl.program_id(0).to(tl.int64)
    images = (table_ptr, n_images)
    image = image_of(table_ptr + FIRST_ROW * (n_images + 1), n_images, row)
    tl.store(image_ptr + row, image.to(tl.int64))
    tl.store(gt_ptr + row, row - field(images, image, FIRST_ROW))
    first_position = field(images, image, FIRST_POSITION)
    loss_ptr, stride_loss = vector(images, image, LOSSES, LOSS)
    end_ptr = level_end_ptr + image.to(tl.int64) * n_levels
    begin = tl.load(bucket_ptr + row)
    length = (tl.load(bucket_ptr + row + 1) - begin).to(tl.int32)
    key_ptr += begin
    tie_ptr += begin

    level_index = tl.arange(0, LEVELS)
    level_end = tl.load(end_ptr + level_index, mask=level_index < n_levels, other=0x7FFFFFFF).to(tl.int32)
    # Room for all candidates of a row, unless an anchor occurs twice. What other images have room for does not matter.
    level_begin = tl.load(end_ptr + level_index - 1, mask=(level_index > 0) & (level_index < n_levels), other=0).to(tl.int32)
    room = tl.sum(tl.where(level_index < n_levels, tl.minimum(level_end - level_begin, topk), 0), 0)
    slot = tl.arange(0, SLOTS)  # [SLOTS]
    taken = tl.zeros([LEVELS], tl.int32)
    last_key = smallest_integer(key_ptr.dtype.element_ty)
    last_tie = tl.full((), -1, tl.int64)
    count = tl.full((), 0, tl.int32)
    going = length > 0
    while going:
        key, tie, kept, order, found = _next_candidates(
            (key_ptr, tie_ptr, length),
            count > 0,
            last_key,
            last_tie,
            taken,
            level_end,
            (end_ptr, n_levels),
            topk,
            LOG_LEVELS,
            SLOTS,
        )
        position = tie & 0xFFFFFFFF
        rank = count + order - 1
        out = row * width + rank
        inside = kept & (rank < room)
        loss = tl.load(loss_ptr + (position - first_position) * stride_loss, mask=inside)
        tl.store(candidate_loss_ptr + out, loss, mask=inside)
        tl.store(candidate_index_ptr + out, position, mask=inside)

        count = tl.minimum(count + found, room)
        going = (found == SLOTS // 2) & (count < room)
        last_key, last_tie = _last(key, tie, kept)
        if going:
            taken = _take(tl.where(kept, tie >> 32, -1).to(tl.int32), taken, end_ptr, n_levels, LEVELS)

    tl.store(count_ptr + row, count.to(tl.int64))
    for first in range(0, width, SLOTS):
        rank = first + slot
        out = row * width + rank
        padding = (rank >= count) & (rank < width)
        tl.store(candidate_loss_ptr + out, float("inf"), mask=padding)
        tl.store(candidate_index_ptr + out, -1, mask=padding)


class Batch(NamedTuple):
    """What the launches know of the images of a batch, and memory that they share."""

    table: Tensor  #: Tensor[n] int64, the images (see `_batch`) first
    images: int  #: B
    level_ends: Tensor  #: Tensor[B, L], in the table
    buckets: Tensor  #: Tensor[G + 2], in the table: zeros that become the rows' first places, and a ticket
    rank: Tensor  #: Tensor[P]
    key: Tensor  #: Tensor[P]
    tie: Tensor  #: Tensor[P]
    blocks: int  #: of potential positives
    anchor_blocks: int
    rows: int  #: G
    width: int  #: K
    dtypes: dict[str, Any]  #: of the elements of tensors in the table, as the kernels take them


@functools.lru_cache(1024)
def levels_of(level_sizes: tuple[int, ...], images: int, topk: int) -> tuple[list[int], list[int], list[int]]:
    """Of each image: the anchors up to and including each level, all anchors, the most candidates of a ground truth."""
    levels = len(level_sizes) // images
    sizes = [level_sizes[image * levels : (image + 1) * levels] for image in range(images)]
    ends = [end for image in sizes for end in itertools.accumulate(image)]
    return ends, [sum(image) for image in sizes], [sum(min(topk, size) for size in image) for image in sizes]


def gather_batch(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
    targets: Sequence[Sequence[Tensor]] = (),
) -> Batch:
    """One copy of host integers. `targets`: label, label_weight, bbox_weight of the images, where kernels read them."""
    images, rows, sizes, like = len(pos_inds), sum(num_gts), sizes_of(pos_inds), pos_losses[0]
    level_ends, anchors, room = levels_of(tuple(level_sizes), images, topk)
    numbers, blocks, anchor_blocks = image_fields(sizes, num_gts, anchors, pos_inds, pos_gt_inds, pos_losses, *targets)
    begin = len(numbers), len(numbers) + len(level_ends)
    table = stage([*numbers, *level_ends, *[0] * (rows + 2)], like)
    potential, wide = sum(sizes), like.dtype == torch.float64
    return Batch(
        table,
        images,
        table[begin[0] : begin[1]].view(images, -1),
        table[begin[1] :],
        like.new_empty(potential, dtype=torch.int32),
        like.new_empty(potential, dtype=torch.int64 if wide else torch.int32),
        like.new_empty(potential, dtype=torch.int64),
        blocks,
        anchor_blocks,
        rows,
        max(map(min, sizes, room)),
        {"LOSS": DTYPES[like.dtype], "INDS": DTYPES[pos_inds[0].dtype], "GT_INDS": DTYPES[pos_gt_inds[0].dtype]},
    )


class Selection(NamedTuple):
    """The candidates of every row, and whose row it is."""

    loss: Tensor  #: Tensor[G, K] ascending, then +inf
    index: Tensor  #: Tensor[G, K] into the potential positives, then -1
    count: Tensor  #: Tensor[G]
    image: Tensor  #: Tensor[G]
    gt: Tensor  #: Tensor[G] within the image


def launch_select(batch: Batch, topk: int, like: Tensor) -> Selection:
    """Select from the filled buckets: one launch. `like`: of the dtype of the losses."""
    shape = (batch.rows, batch.width)
    numbers = [like.new_empty(batch.rows, dtype=torch.int64) for _ in range(3)]
    selection = Selection(like.new_empty(shape), like.new_empty(shape, dtype=torch.int64), *numbers)
    levels = batch.level_ends.shape[1]
    if batch.rows:
        _select_kernel[(batch.rows,)](
            batch.key,
            batch.tie,
            batch.buckets,
            batch.table,
            batch.level_ends,
            batch.images,
            levels,
            min(topk, batch.tie.shape[0]),
            batch.width,
            *selection,
            LOSS=batch.dtypes["LOSS"],
            LOG_LEVELS=max((levels - 1).bit_length(), 3),
            num_warps=1,
            **compile_options(fuse=True),
        )
    return selection


def select(batch: Batch, topk: int, like: Tensor) -> Selection:
    """Count, scatter and select: at most three launches. `batch`: fresh from `gather_batch`; its buckets are used up."""
    images, dtypes = (batch.table, batch.images), batch.dtypes
    with device_guard(batch.table):
        if batch.blocks and batch.rows:
            inds = {"INDS": dtypes["INDS"], "GT_INDS": dtypes["GT_INDS"], "BLOCK": BLOCK, **compile_options(fuse=True)}
            _count_kernel[(batch.blocks,)](*images, batch.rows, batch.buckets, batch.rank, **inds)
            _scatter_kernel[(batch.blocks,)](
                *images, batch.buckets, batch.rank, batch.key, batch.tie, LOSS=dtypes["LOSS"], **inds
            )
        return launch_select(batch, topk, like)


def select_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `paa_gpu::select_candidates`: a copy and three launches."""
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    loss, index, count, _, _ = select(batch, topk, pos_losses[0])
    return loss, index, count
