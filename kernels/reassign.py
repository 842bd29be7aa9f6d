"""Reassignment: the potential positives become background, and the positives among them get their targets back.

    stage     the table of the images, their levels, and zeros for the buckets (see `_batch`, `topk`)
    copy      copies the targets into the outputs, and counts the potential positives of each row
    scatter   puts the potential positives into the rows' buckets, and makes their anchors background
    select    selects the candidates of each row (see `topk`)
    fit       fits and separates the candidates, and gives the positives their targets back (see `em`)

These are five operations for any batch and any width of its rows. Programs of a launch share memory in a few places, and none
waits for another. An atomic gives each potential positive its place in a bucket, and the program with the last ticket sums the
counts (see `topk`). In the launch for the background, programs that meet at an anchor write the same values. So do programs that
give targets back (see `_targets`). Atomics count the positives of an image. The order of the launches takes care of all else.

A potential positive outside its image's anchors writes nothing. One without a ground truth is not positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import PRECISIONS, count_gts, empty_fit, empty_masks, empty_targets
from paa_gpu.kernels._batch import BLOCK, DTYPES, FIRST_POSITION, anchors_at, field, image_fields, image_of, potential, sizes_of
from paa_gpu.kernels._launch import compile_options, device_guard, mixes, stage
from paa_gpu.kernels._targets import copy_targets, give_back, make_background
from paa_gpu.kernels.em import launch_fit
from paa_gpu.kernels.topk import count_block, gather_batch, launch_select, scatter_block, select


@triton.jit(do_not_specialize=["n_images", "n_blocks", "n_rows"], do_not_specialize_on_alignment=["bucket_ptr"])
def _copy_kernel(
    table_ptr,  # the images, see `_batch`
    n_images,
    n_blocks,  # of potential positives; the programs behind them take anchors
    n_rows,
    bucket_ptr,  # Tensor[G + 2], see `count_block`; None: nobody counts
    rank_ptr,  # Tensor[P]
    positive_ptr,  # Tensor[P]: becomes False
    ignored_ptr,  # Tensor[P]: becomes False
    targets,  # see `_targets`
    num_pos_ptr,  # Tensor[B]: becomes 0
    INDS: tl.constexpr,
    GT_INDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    images, block = (table_ptr, n_images), tl.program_id(0)
    if block == 0:
        for first in range(0, n_images, BLOCK):
            image = first + tl.arange(0, BLOCK)
            tl.store(num_pos_ptr + image, 0, mask=image < n_images)
    if block < n_blocks:
        image, position, inside = potential(images, block, BLOCK)
        position += field(images, image, FIRST_POSITION)
        tl.store(positive_ptr + position, False, mask=inside)
        tl.store(ignored_ptr + position, False, mask=inside)
        if bucket_ptr is not None:
            count_block(images, n_rows, bucket_ptr, rank_ptr, block, INDS, GT_INDS, BLOCK)
    else:
        copy_targets(images, targets, block - n_blocks, BLOCK)


@triton.jit(do_not_specialize=["n_images", "num_classes"], do_not_specialize_on_alignment=["bucket_ptr"])
def _background_kernel(
    table_ptr,  # the images, see `_batch`
    n_images,
    num_classes,
    bucket_ptr,  # Tensor[G + 1]: first places of the rows; None: nothing is scattered
    rank_ptr,  # Tensor[P]
    key_ptr,  # Tensor[P], bucket after bucket
    tie_ptr,  # Tensor[P], bucket after bucket
    targets,  # see `_targets`
    LOSS: tl.constexpr,
    INDS: tl.constexpr,
    GT_INDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    images = (table_ptr, n_images)
    image, position, inside = potential(images, tl.program_id(0), BLOCK)
    anchor, exists = anchors_at(images, image, position, inside, INDS)
    make_background(images, targets, num_classes, image, anchor, exists)
    if bucket_ptr is not None:
        scatter_block(images, bucket_ptr, rank_ptr, key_ptr, tie_ptr, image, position, exists, anchor, LOSS, GT_INDS)


@triton.jit(do_not_specialize=["n_images", "n_candidates"])
def _give_back_kernel(
    table_ptr,  # the images, see `_batch`
    n_images,
    n_candidates,
    index_ptr,  # Tensor[N]
    candidate_positive_ptr,  # Tensor[N]
    candidate_ignored_ptr,  # Tensor[N]
    positive_ptr,  # Tensor[P]: False on entry
    ignored_ptr,  # Tensor[P]: False on entry
    targets,  # see `_targets`
    num_pos_ptr,  # Tensor[B]
    INDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    images = (table_ptr, n_images)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < n_candidates
    index = tl.load(index_ptr + offset, mask=inside, other=-1)
    exists = (index >= 0) & (index < field(images, n_images, FIRST_POSITION))
    positive = exists & (tl.load(candidate_positive_ptr + offset, mask=inside, other=0) != 0)
    ignored = exists & (tl.load(candidate_ignored_ptr + offset, mask=inside, other=0) != 0) & (positive == 0)
    tl.store(positive_ptr + index, True, mask=positive)
    tl.store(ignored_ptr + index, True, mask=ignored)
    image = image_of(table_ptr + FIRST_POSITION * (n_images + 1), n_images, tl.where(exists, index, 0))
    give_back(images, targets, num_pos_ptr, image, index - field(images, image, FIRST_POSITION), positive, ignored, INDS)


def paa_reassign_batch(
    pos_losses: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    covariance_type: str,
    separation: str,
    singleton: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """The operator `paa_gpu::paa_reassign_batch`: a copy and four launches."""
    like = pos_losses[0]
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk, (label, label_weight, bbox_weight))
    *targets, num_pos = empty_targets(label, label_weight, bbox_weight)
    positive, ignored = empty_masks(pos_inds)
    fit = empty_fit(like, batch.rows, precision)
    images, buckets = (batch.table, batch.images), (batch.buckets, batch.rank)
    options = {"BLOCK": BLOCK, **compile_options(fuse=True)}
    inds = {name: batch.dtypes[name] for name in ("INDS", "GT_INDS")}
    with device_guard(like):
        _copy_kernel[(batch.blocks + batch.anchor_blocks or 1,)](
            *images, batch.blocks, batch.rows, *buckets, positive, ignored, tuple(targets), num_pos, **inds, **options
        )
        if batch.blocks:
            _background_kernel[(batch.blocks,)](
                *images, num_classes, *buckets, batch.key, batch.tie, tuple(targets), **batch.dtypes, **options
            )
        loss, index, count, image, gt = launch_select(batch, topk, like)
    launch_fit(
        loss,
        count,
        fit,
        covariance_type,
        index=index,
        positive=positive,
        ignored=ignored,
        separation=separation,
        singleton=singleton,
        targets=(image, *images, tuple(targets), num_pos),
        inds=pos_inds[0].dtype,
        mixed=mixes(precision, like),
    )
    return *targets, num_pos, *fit, image, gt, positive, ignored


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int],
    num_gt: int | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """The operator `paa_gpu::paa_reassign`: a batch of one image."""
    num_gts = count_gts([pos_gt_inds]) if num_gt is None else [num_gt]
    tensors = ([tensor] for tensor in (pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds))
    return paa_reassign_batch(*tensors, level_sizes, num_gts, *options)[:4]


def fit_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
    covariance_type: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """The operator `paa_gpu::fit_candidates`: a copy and four launches."""
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    loss, index, count, image, gt = select(batch, topk, pos_losses[0])
    assignment = torch.empty_like(index, dtype=torch.bool)
    score = torch.empty_like(loss, dtype=PRECISIONS[precision])
    fit = empty_fit(loss, batch.rows, precision)
    launch_fit(loss, count, fit, covariance_type, assignment=assignment, score=score)
    return loss, index, count, assignment, score, *fit, image, gt


def write_targets(
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    index: Tensor,
    candidate_positive: Tensor,
    candidate_ignored: Tensor,
    num_classes: int,
) -> tuple[Tensor, ...]:
    """The operator `paa_gpu::write_targets`: a copy and three launches."""
    images, nothing = len(label), (None, None)
    fields = (pos_inds, pos_inds, pos_inds, label, label_weight, bbox_weight)  # no ground truths and losses are read
    numbers, blocks, anchor_blocks = image_fields(sizes_of(pos_inds), [0] * images, sizes_of(label), *fields)
    table = stage(numbers, index)
    *targets, num_pos = empty_targets(label, label_weight, bbox_weight)
    masks = empty_masks(pos_inds)
    inds, options = DTYPES[pos_inds[0].dtype], {"BLOCK": BLOCK, **compile_options(fuse=True)}
    with device_guard(index):
        _copy_kernel[(blocks + anchor_blocks or 1,)](
            table, images, blocks, 0, *nothing, *masks, tuple(targets), num_pos, INDS=inds, GT_INDS=inds, **options
        )
        if blocks:
            _background_kernel[(blocks,)](
                *(table, images, num_classes, *nothing, *nothing, tuple(targets)), LOSS=inds, INDS=inds, GT_INDS=inds, **options
            )
        if index.numel():
            candidates = (tensor.contiguous() for tensor in (index, candidate_positive, candidate_ignored))
            _give_back_kernel[(triton.cdiv(index.numel(), BLOCK),)](
                table, images, index.numel(), *candidates, *masks, tuple(targets), num_pos, INDS=inds, **options
            )
    return *targets, num_pos, *masks
