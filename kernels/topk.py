"""Candidates: the `topk` smallest losses of every (image, ground truth, level), each ground truth's in ascending order.

The potential positives of all images stand one after the other (P of them), and so do the ground truths: the rows. Three
launches, whose cost grows with P + G:

    count     how many potential positives each row has, by atomics that also give each its rank in the row's bucket;
              the program that finishes last turns the counts into the buckets' starts
    scatter   each potential positive's key and tie go to its place in the bucket
    select    one program per row sorts its bucket, a block at a time, and keeps what can still be a candidate

The order is that of the pairs (key, tie): the loss as an ordered integer, and anchor << 32 | position. It is total, so
it does not matter in which order the atomics filled a bucket. An image has fewer than 2^31 anchors, a batch fewer than 2^31
potential positives. What the host knows comes as one integer tensor, `Batch.table`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import max_candidates
from paa_gpu.kernels._launch import device_guard, keep, register_limit, stage
from paa_gpu.kernels._numeric import ordered_key, smallest_integer, sort_pairs

BLOCK_P = 512  # potential positives per program of the kernels that go over all of them
LOG_SLOTS = 7  # four slots a thread: one warp sorts without shared memory or barriers, and its registers last


@triton.jit
def image_of(start_ptr, n_images, value):
    """The image that owns `value`: the last of those that start at or before it (empty ones share their start with the next)."""
    first = tl.full((), 0, tl.int32)
    last = first + n_images
    while last - first > 1:
        middle = (first + last) // 2
        begun = tl.load(start_ptr + middle) <= value
        first = tl.where(begun, middle, first)
        last = tl.where(begun, last, middle)
    return first


@triton.jit
def positions(start_ptr, n_images, BLOCK: tl.constexpr):
    """This program's image, its positions [BLOCK] among all potential positives, and which of them are the image's."""
    block = tl.program_id(0)
    image = image_of(start_ptr, n_images, block)
    image_ptr = start_ptr + image
    begin = tl.load(image_ptr + n_images + 1)
    end = tl.load(image_ptr + n_images + 2)
    position = begin + (block - tl.load(image_ptr)) * BLOCK + tl.arange(0, BLOCK)
    return image, position, position < end


@triton.jit
def anchors(inds_ptr, stride_inds, start_ptr, n_images, image, position, inside):
    """The anchors [BLOCK] within the image, its first one, and which of them exist."""
    anchor = tl.load(inds_ptr + position * stride_inds, mask=inside, other=-1).to(tl.int64)
    first = tl.load(start_ptr + 3 * (n_images + 1) + image)
    n_anchors = tl.load(start_ptr + 3 * (n_images + 1) + image + 1) - first
    return anchor, first, inside & (anchor >= 0) & (anchor < n_anchors)


@triton.jit
def _rows(gt_ptr, stride_gt, start_ptr, n_images, image, position, inside):
    """The rows [BLOCK], and which of them exist."""
    gt = tl.load(gt_ptr + position * stride_gt, mask=inside, other=-1).to(tl.int64)
    first = tl.load(start_ptr + 2 * (n_images + 1) + image)
    n_gts = tl.load(start_ptr + 2 * (n_images + 1) + image + 1) - first
    return first + gt, inside & (gt >= 0) & (gt < n_gts)


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


@triton.jit(do_not_specialize=["n_images", "n_rows"])
def _count_kernel(
    inds_ptr,  # Tensor[P]
    stride_inds,
    gt_ptr,  # Tensor[P]
    stride_gt,
    start_ptr,  # Tensor[4, B + 1]: first block, position, row and anchor of each image, and their totals
    n_images,
    n_rows,
    bucket_ptr,  # Tensor[G + 2]: zeros on entry; first places of the rows on exit, and a ticket behind them
    rank_ptr,  # Tensor[P]: each potential positive's rank in its bucket
    positive_ptr,  # Tensor[P] or None: becomes False
    ignored_ptr,  # Tensor[P] or None: becomes False
    num_pos_ptr,  # Tensor[B] or None: becomes 0
    BLOCK: tl.constexpr,
):
    image, position, inside = positions(start_ptr, n_images, BLOCK)
    if positive_ptr is not None:
        tl.store(positive_ptr + position, False, mask=inside)
        tl.store(ignored_ptr + position, False, mask=inside)
    _, _, exists = anchors(inds_ptr, stride_inds, start_ptr, n_images, image, position, inside)
    row, has_row = _rows(gt_ptr, stride_gt, start_ptr, n_images, image, position, exists)
    rank = tl.atomic_add(bucket_ptr + row, 1, mask=has_row, sem="relaxed")
    tl.store(rank_ptr + position, rank.to(tl.int32), mask=has_row)

    tl.debug_barrier()  # all of this program's atomics come before its ticket
    if tl.atomic_add(bucket_ptr + n_rows + 1, 1) == tl.num_programs(0) - 1:
        _counts_to_starts(bucket_ptr, n_rows, BLOCK)
        if num_pos_ptr is not None:
            for first in range(0, n_images, BLOCK):
                image_block = first + tl.arange(0, BLOCK)
                tl.store(num_pos_ptr + image_block, 0, mask=image_block < n_images)


@triton.jit(do_not_specialize=["n_images"])
def _scatter_kernel(
    loss_ptr,  # Tensor[P]
    stride_loss,
    inds_ptr,  # Tensor[P]
    stride_inds,
    gt_ptr,  # Tensor[P]
    stride_gt,
    start_ptr,  # Tensor[4, B + 1], see _count_kernel
    n_images,
    bucket_ptr,  # Tensor[G + 1]: first places of the rows
    rank_ptr,  # Tensor[P]
    key_ptr,  # Tensor[P], bucket after bucket
    tie_ptr,  # Tensor[P], bucket after bucket
    BLOCK: tl.constexpr,
):
    image, position, inside = positions(start_ptr, n_images, BLOCK)
    anchor, _, exists = anchors(inds_ptr, stride_inds, start_ptr, n_images, image, position, inside)
    row, has_row = _rows(gt_ptr, stride_gt, start_ptr, n_images, image, position, exists)
    loss = tl.load(loss_ptr + position * stride_loss, mask=has_row, other=0.0)
    place = tl.load(bucket_ptr + row, mask=has_row, other=0) + tl.load(rank_ptr + position, mask=has_row, other=0)
    tl.store(key_ptr + place, ordered_key(loss), mask=has_row)
    tl.store(tie_ptr + place, (anchor << 32) | position, mask=has_row)


@triton.jit
def _admit(anchor, taken, end_ptr, n_levels, topk, LEVELS: tl.constexpr):
    """Which of the sorted anchors [BLOCK] are among the first `topk` of their level, of which `taken` [LEVELS] came before."""
    level_index = tl.arange(0, LEVELS)  # [LEVELS]
    admitted = anchor < 0  # [BLOCK]
    begin = tl.full((), 0, tl.int32)
    for level in range(n_levels):
        end = tl.load(end_ptr + level).to(tl.int32)
        here = (anchor >= begin) & (anchor < end)
        room = topk - tl.sum(tl.where(level_index == level, taken, 0), 0)
        admitted = admitted | (here & (tl.cumsum(here.to(tl.int32), 0) <= room))
        begin = end
    return admitted


@triton.jit
def _take(anchor, taken, end_ptr, n_levels, LEVELS: tl.constexpr):
    """The anchors [BLOCK] that are not negative, added to the numbers `taken` [LEVELS] of each level."""
    level_index = tl.arange(0, LEVELS)  # [LEVELS]
    begin = tl.full((), 0, tl.int32)
    for level in range(n_levels):
        end = tl.load(end_ptr + level).to(tl.int32)
        here = (anchor >= begin) & (anchor < end)
        taken += tl.where(level_index == level, tl.sum(here.to(tl.int32), 0), 0)
        begin = end
    return taken


# One compiled form whatever the numbers: the selection is the largest kernel, and its loads of the losses are few and scattered.
@triton.jit(
    do_not_specialize=["stride_loss", "n_images", "n_levels", "topk", "width"],
    do_not_specialize_on_alignment=["loss_ptr", "level_end_ptr"],
)
def _select_kernel(
    key_ptr,  # Tensor[P], bucket after bucket
    tie_ptr,  # Tensor[P], bucket after bucket
    bucket_ptr,  # Tensor[G + 1]: first places of the rows
    loss_ptr,  # Tensor[P]
    stride_loss,
    start_ptr,  # Tensor[4, B + 1], see _count_kernel
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
    LEVELS: tl.constexpr,
    LOG_SLOTS: tl.constexpr,
):
    SLOTS: tl.constexpr = 1 << LOG_SLOTS  # at most half of them hold candidates, the others what is compared with them
    row = tl.program_id(0).to(tl.int64)
    image = image_of(start_ptr + 2 * (n_images + 1), n_images, row)
    tl.store(image_ptr + row, image.to(tl.int64))
    tl.store(gt_ptr + row, row - tl.load(start_ptr + 2 * (n_images + 1) + image))
    end_ptr = level_end_ptr + image.to(tl.int64) * n_levels
    begin = tl.load(bucket_ptr + row)
    end = tl.load(bucket_ptr + row + 1)

    slot = tl.arange(0, SLOTS)  # [SLOTS]
    taken = tl.zeros([LEVELS], tl.int32)
    last_key = smallest_integer(key_ptr.dtype.element_ty)
    last_tie = tl.full((), -1, tl.int64)
    count = tl.full((), 0, tl.int32)
    going = begin < end
    while going:
        # One pass over the bucket: the next candidates after (last_key, last_tie), sorted.
        key = tl.zeros([SLOTS], last_key.dtype)
        tie = tl.zeros([SLOTS], tl.int64)
        kept = slot < 0
        n_kept = tl.zeros([SLOTS], tl.int32)  # up to and including the slot
        found = tl.full((), 0, tl.int32)
        place = begin
        while place < end:
            source = place + slot - n_kept
            place += SLOTS - found
            new = (kept == 0) & (source < end)
            key = tl.where(kept, key, tl.load(key_ptr + source, mask=new, other=0))
            tie = tl.where(kept, tie, tl.load(tie_ptr + source, mask=new, other=0))
            after = (key > last_key) | ((key == last_key) & (tie > last_tie))
            key, tie = sort_pairs(key, tie, (kept | new) & after, LOG_SLOTS)
            kept = _admit((tie >> 32).to(tl.int32), taken, end_ptr, n_levels, topk, LEVELS)
            n_kept = tl.cumsum(kept.to(tl.int32), 0)
            kept = kept & (n_kept <= SLOTS // 2)
            n_kept = tl.minimum(n_kept, SLOTS // 2)
            found = tl.max(n_kept, 0)

        rank = count + n_kept - 1
        position = tie & 0xFFFFFFFF
        out = row * width + rank
        inside = kept & (rank < width)  # anchors that occur twice may be more than there is room for
        tl.store(candidate_loss_ptr + out, tl.load(loss_ptr + position * stride_loss, mask=inside), mask=inside)
        tl.store(candidate_index_ptr + out, position, mask=inside)

        count = tl.minimum(count + found, width)
        going = (found == SLOTS // 2) & (count < width)
        last_key = tl.max(tl.where(kept, key, last_key), 0)
        last_tie = tl.max(tl.where(kept & (key == last_key), tie, -1), 0)
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
    """The potential positives of a batch, one image after the other, and what the host knows about them.

    With one image the three are its own tensors, however strided.
    """

    losses: Tensor  #: Tensor[P]
    inds: Tensor  #: Tensor[P] anchors within the image
    gt_inds: Tensor  #: Tensor[P] ground truths within the image
    table: Tensor  #: Tensor[n] int64: the other three in one, as it was copied
    starts: Tensor  #: Tensor[4, B + 1]: first block, position, row and anchor of each image, and their totals
    buckets: Tensor  #: Tensor[G + 2]: zeros that become the rows' first places, and a ticket
    level_ends: Tensor  #: Tensor[B, L]
    blocks: int  #: programs of a kernel that goes over the potential positives
    rows: int
    width: int  #: K


def gather_batch(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> Batch:
    """One copy of host integers and, with several images, three concatenations."""
    images, levels = len(pos_inds), len(level_sizes) // len(pos_inds)
    sizes = [level_sizes[image * levels : (image + 1) * levels] for image in range(images)]
    starts = image_starts([inds.shape[0] for inds in pos_inds], num_gts, [sum(size) for size in sizes])
    level_ends = [end for size in sizes for end in itertools.accumulate(size)]
    rows = sum(num_gts)
    table = stage([*itertools.chain(*starts), *[0] * (rows + 2), *level_ends], pos_losses[0])
    starts_share, buckets, ends_share = table.split([4 * (images + 1), rows + 2, images * levels])
    return Batch(
        concatenate(pos_losses),
        concatenate(pos_inds),
        concatenate(pos_gt_inds),
        table,
        starts_share.view(4, images + 1),
        buckets,
        ends_share.view(images, levels),
        blocks=starts[0][-1],
        rows=rows,
        width=max_candidates(pos_inds, level_sizes, topk),
    )


def image_starts(
    potential: Sequence[int], num_gts: Sequence[int], anchors: Sequence[int], block: int = BLOCK_P
) -> list[list[int]]:
    """First block, position, row and anchor of each image, and their totals."""
    blocks = [triton.cdiv(number, block) for number in potential]
    return [[0, *itertools.accumulate(numbers)] for numbers in (blocks, potential, num_gts, anchors)]


def concatenate(images: Sequence[Tensor]) -> Tensor:
    """The images' tensors one after the other; a single one as it is."""
    return images[0] if len(images) == 1 else torch.cat(list(images))


class Selection(NamedTuple):
    """The candidates of every row, and whose row it is."""

    loss: Tensor  #: Tensor[G, K] ascending, then +inf
    index: Tensor  #: Tensor[G, K] into the potential positives, then -1
    count: Tensor  #: Tensor[G]
    image: Tensor  #: Tensor[G]
    gt: Tensor  #: Tensor[G] within the image


def launch_select(
    batch: Batch,
    topk: int,
    positive: Tensor | None = None,
    ignored: Tensor | None = None,
    num_pos: Tensor | None = None,
) -> Selection:
    """At most three launches.

    Args:
        batch: fresh from `gather_batch`; its buckets are used up.
        topk: candidates per level.
        positive, ignored, num_pos: Tensor[P] bool and Tensor[B] int64, cleared if there is any potential positive; all or none.
    """
    shape, empty = (batch.rows, batch.width), batch.losses.new_empty
    numbers = [empty(batch.rows, dtype=torch.int64) for _ in range(3)]
    selection = Selection(empty(shape), empty(shape, dtype=torch.int64), *numbers)
    potential, (images, levels) = batch.inds.shape[0], batch.level_ends.shape
    inds = (batch.inds, batch.inds.stride(0), batch.gt_inds, batch.gt_inds.stride(0), batch.starts, images)
    wide = batch.losses.dtype == torch.float64
    key = batch.losses.new_empty(potential, dtype=torch.int64 if wide else torch.int32)
    tie = batch.losses.new_empty(potential, dtype=torch.int64)
    rank = batch.losses.new_empty(potential, dtype=torch.int32)
    with device_guard(batch.losses):
        if batch.blocks:
            _count_kernel[(batch.blocks,)](
                *inds, batch.rows, batch.buckets, rank, positive, ignored, num_pos, BLOCK=BLOCK_P, **register_limit()
            )
        if batch.blocks and batch.rows:
            _scatter_kernel[(batch.blocks,)](
                batch.losses, batch.losses.stride(0), *inds, batch.buckets, rank, key, tie, BLOCK=BLOCK_P, **register_limit()
            )
        if batch.rows:
            _select_kernel[(batch.rows,)](
                key,
                tie,
                batch.buckets,
                batch.losses,
                batch.losses.stride(0),
                batch.starts,
                batch.level_ends,
                images,
                levels,
                min(topk, potential),
                batch.width,
                *selection,
                LEVELS=triton.next_power_of_2(max(levels, 8)),
                LOG_SLOTS=LOG_SLOTS,
                num_warps=1,
                **register_limit(),
            )
    return selection


def select_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `paa_gpu::select_candidates`: at most three concatenations, one copy and three launches."""
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    loss, index, count, _, _ = launch_select(batch, topk)
    keep(count, batch.table)
    return loss, index, count
