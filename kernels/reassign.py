"""Reassignment: potential positives that are not positive become background.

The outputs start as concatenated copies of `label`, `label_weight` and `bbox_weight` (A anchors over all images). After the
candidates were selected (`topk`) and fitted and separated (`em`), one program per block of potential positives writes, at the
anchor of each: label = num_classes and bbox_weight = 0 unless it is positive, label_weight = 0 where it is ignored. A
potential positive outside its image's anchors writes nothing; one without a ground truth is not positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import PRECISIONS, count_gts, empty_fit
from paa_gpu.kernels._launch import device_guard, keep, register_limit, stage
from paa_gpu.kernels.em import launch_fit
from paa_gpu.kernels.topk import (
    BLOCK_P,
    anchors,
    concatenate,
    gather_batch,
    image_starts,
    launch_select,
    positions,
)


@triton.jit(do_not_specialize=["n_images", "num_classes"])
def _write_kernel(
    inds_ptr,  # Tensor[P]
    stride_inds,
    start_ptr,  # Tensor[4, B + 1]: first block, position, row and anchor of each image, and their totals
    n_images,
    num_classes,
    positive_ptr,  # Tensor[P]
    ignored_ptr,  # Tensor[P]
    label_ptr,  # Tensor[A], contiguous like the two below
    label_weight_ptr,  # Tensor[A]
    bbox_weight_ptr,  # Tensor[A, 4]
    num_pos_ptr,  # Tensor[B]: zeros on entry
    BLOCK: tl.constexpr,
):
    image, position, inside = positions(start_ptr, n_images, BLOCK)
    anchor, first, exists = anchors(inds_ptr, stride_inds, start_ptr, n_images, image, position, inside)
    positive = tl.load(positive_ptr + position, mask=exists, other=0) != 0
    ignored = tl.load(ignored_ptr + position, mask=exists, other=0) != 0
    background = exists & (positive == 0)
    tl.store(label_ptr + first + anchor, num_classes, mask=background)
    tl.store(label_weight_ptr + first + anchor, 0.0, mask=background & ignored)
    side = tl.arange(0, 4)[None, :]  # [1, 4]
    bbox_weight = bbox_weight_ptr + (first + anchor)[:, None] * 4 + side  # [BLOCK, 4]
    tl.store(bbox_weight, 0.0, mask=background[:, None])
    tl.atomic_add(num_pos_ptr + image, tl.sum((exists & positive).to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["n_candidates", "n_potential"])
def _mark_kernel(
    index_ptr,  # Tensor[N]
    candidate_positive_ptr,  # Tensor[N]
    candidate_ignored_ptr,  # Tensor[N]
    positive_ptr,  # Tensor[P]: False on entry
    ignored_ptr,  # Tensor[P]: False on entry
    n_candidates,
    n_potential,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < n_candidates
    index = tl.load(index_ptr + offset, mask=inside, other=-1)
    exists = (index >= 0) & (index < n_potential)
    positive = tl.load(candidate_positive_ptr + offset, mask=inside, other=0) != 0
    ignored = tl.load(candidate_ignored_ptr + offset, mask=inside, other=0) != 0
    tl.store(positive_ptr + index, True, mask=exists & positive)
    tl.store(ignored_ptr + index, True, mask=exists & ignored & (positive == 0))


def _write(
    targets: tuple[Tensor, Tensor, Tensor],
    num_pos: Tensor,
    inds: Tensor,
    starts: Tensor,
    blocks: int,
    positive: Tensor,
    ignored: Tensor,
    num_classes: int,
) -> None:
    if blocks == 0:
        return
    with device_guard(inds):
        _write_kernel[(blocks,)](
            inds,
            inds.stride(0),
            starts,
            num_pos.shape[0],
            num_classes,
            positive,
            ignored,
            *targets,
            num_pos,
            BLOCK=BLOCK_P,
            **register_limit(),
        )


def _copy_targets(
    label: Sequence[Tensor], label_weight: Sequence[Tensor], bbox_weight: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of all images, one after the other; also with one image never an alias of the inputs."""
    return torch.cat(list(label)), torch.cat(list(label_weight)), torch.cat(list(bbox_weight))


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
    """The operator `paa_gpu::paa_reassign_batch`: at most six concatenations (three with one image), a copy and five launches."""
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    targets = _copy_targets(label, label_weight, bbox_weight)
    positive = batch.inds.new_empty(batch.inds.shape[0], dtype=torch.bool)
    ignored = torch.empty_like(positive)
    # The selection clears it, but where there is nothing to select from.
    num_pos = (batch.inds.new_empty if batch.blocks else batch.inds.new_zeros)(len(label), dtype=torch.int64)
    fit = empty_fit(batch.losses, batch.rows, precision)
    loss, index, count, image, gt = launch_select(batch, topk, positive, ignored, num_pos)
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
    )
    _write(targets, num_pos, batch.inds, batch.starts, batch.blocks, positive, ignored, num_classes)
    keep(num_pos, batch.table)
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
    """The operator `paa_gpu::fit_candidates`: at most three concatenations, one copy and four launches."""
    batch = gather_batch(pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk)
    loss, index, count, image, gt = launch_select(batch, topk)
    assignment = torch.empty_like(index, dtype=torch.bool)
    score = torch.empty_like(loss, dtype=PRECISIONS[precision])
    fit = empty_fit(loss, batch.rows, precision)
    launch_fit(loss, count, fit, covariance_type, assignment=assignment, score=score)
    keep(count, batch.table)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator `paa_gpu::write_targets`: at most four concatenations, one copy, three fills and two launches."""
    starts = image_starts([inds.shape[0] for inds in pos_inds], [0] * len(label), [image.shape[0] for image in label])
    inds = concatenate(pos_inds)
    table = stage([value for numbers in starts for value in numbers], inds)
    targets = _copy_targets(label, label_weight, bbox_weight)
    positive = inds.new_zeros(inds.shape[0], dtype=torch.bool)
    ignored = torch.zeros_like(positive)
    num_pos = inds.new_zeros(len(label), dtype=torch.int64)
    if index.numel():
        with device_guard(index):
            _mark_kernel[(triton.cdiv(index.numel(), BLOCK_P),)](
                index.contiguous(),
                candidate_positive.contiguous(),
                candidate_ignored.contiguous(),
                positive,
                ignored,
                index.numel(),
                inds.shape[0],
                BLOCK=BLOCK_P,
                **register_limit(),
            )
    _write(targets, num_pos, inds, table, starts[0][-1], positive, ignored, num_classes)
    keep(num_pos, table)
    return *targets, num_pos, positive, ignored
