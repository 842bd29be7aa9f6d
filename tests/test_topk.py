"""Candidate selection: order, ties, limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu import _ops, data

SIZES = (64, 16, 4, 1)


def expected(losses, inds, gts, sizes, num_gt, topk):
    """Row by row, level by level, with a sort; NaN last is numpy's own order, and -0.0 equals 0.0."""
    bounds = np.cumsum([0, *sizes])
    rows = []
    for gt in range(num_gt):
        row = []
        for low, high in itertools.pairwise(bounds):
            members = np.flatnonzero((gts == gt) & (inds >= low) & (inds < high))
            row.extend(members[np.lexsort((inds[members], losses[members]))][:topk])
        row = np.array(row, dtype=int)
        rows.append(row[np.lexsort((inds[row], losses[row]))])
    return rows


def draw(rng, potential=60, num_gt=5, sizes=SIZES, dtype=torch.float64):
    inds = rng.permutation(sum(sizes))[:potential]
    losses = torch.from_numpy(rng.normal(size=potential).round(1)).to(dtype)
    return losses, torch.from_numpy(inds), torch.from_numpy(rng.integers(num_gt, size=potential))


def check(losses, inds, gts, sizes, num_gt, topk):
    got = paa_gpu.select_candidates(losses, inds, gts, sizes, num_gt=num_gt, topk=topk)
    rows = expected(losses.double().numpy(), inds.numpy(), gts.numpy(), sizes, num_gt, topk)
    width = min(len(losses), sum(min(topk, size) for size in sizes))
    assert got.loss.shape == got.index.shape == (num_gt, width)
    assert got.loss.dtype == losses.dtype and got.index.dtype == got.count.dtype == torch.int64
    assert got.count.tolist() == [len(row) for row in rows]
    for loss, index, row in zip(got.loss, got.index, rows, strict=True):
        assert index[: len(row)].tolist() == row.tolist()
        assert torch.equal(loss[: len(row)].nan_to_num(1e9), losses[row].nan_to_num(1e9))
        assert (index[len(row) :] == -1).all() and (loss[len(row) :] == np.inf).all()


@pytest.mark.parametrize("topk", [1, 3, 9, 100, 2**40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_smallest_losses_of_each_level_ties_by_anchor(topk, dtype, rng):
    check(*draw(rng, dtype=dtype), SIZES, 5, topk)


@pytest.mark.parametrize("topk", [9, 70])
def test_levels_without_potential_positives(topk):
    """The first anchors lie several levels further on. On the CPU 9 are kept by insertion, and 70 sorted."""
    inds = torch.arange(3, 103)
    check(torch.arange(100.0), inds, inds * 0, (1, 1, 1, 100), 1, topk)


def test_images_with_other_levels(rng):
    losses, inds, gts = draw(rng)
    levels = SIZES, SIZES[::-1]
    _, index, count = _ops.select_candidates([losses] * 2, [inds] * 2, [gts] * 2, [*levels[0], *levels[1]], [5, 5], 2)
    rows = [expected(losses.numpy(), inds.numpy(), gts.numpy(), sizes, 5, 2) for sizes in levels]
    assert count.tolist() == [len(row) for row in rows[0] + rows[1]]
    for number, row in enumerate(rows[0] + rows[1]):
        assert index[number, : len(row)].tolist() == (row + number // 5 * len(inds)).tolist()


@pytest.mark.parametrize("sizes", [(85,), (0, 85), (40, 0, 0, 45), (5,) * 17], ids=str)
def test_any_levels(sizes, rng):
    check(*draw(rng, sizes=sizes), sizes, 5, 4)


def test_order_of_special_values():
    losses = torch.tensor([np.nan, np.inf, 0.0, -0.0, -np.inf, -np.nan, 1.0, 0.0])
    inds = torch.tensor([3, 6, 5, 1, 7, 0, 2, 4])
    got = paa_gpu.select_candidates(losses, inds, torch.zeros(8, dtype=torch.int64), [8], num_gt=1)
    # -inf, the zeros by anchor (1, 4, 5), 1, +inf, NaN of either sign by anchor (0, 3)
    assert got.index.tolist() == [[4, 3, 7, 2, 6, 1, 5, 0]]


def test_float64_losses_are_not_rounded():
    losses = 1 + torch.arange(20, 0, -1, dtype=torch.float64) * 1e-15
    gts = torch.zeros(20, dtype=torch.int64)
    got = paa_gpu.select_candidates(losses, torch.arange(20), gts, [20], num_gt=1, topk=3)
    assert got.index.tolist() == [[19, 18, 17]]


def test_many_candidates_of_a_level_are_sorted_stably(rng):
    """Longer than the limit up to which candidates are kept by insertion."""
    check(*draw(rng, potential=900, num_gt=2, sizes=(1000, 200)), (1000, 200), 2, 300)


def test_order_of_inputs_does_not_matter(rng):
    losses, inds, gts = draw(rng)
    plain = paa_gpu.select_candidates(losses, inds, gts, SIZES, num_gt=5)
    order = torch.from_numpy(rng.permutation(len(losses)))
    shuffled = paa_gpu.select_candidates(losses[order], inds[order], gts[order], SIZES, num_gt=5)
    assert torch.equal(plain.loss, shuffled.loss)
    padding = plain.index < 0
    assert torch.equal(inds[plain.index].masked_fill(padding, -1), inds[order][shuffled.index].masked_fill(padding, -1))


def test_views_and_int32_indices(rng):
    losses, inds, gts = draw(rng)
    plain = paa_gpu.select_candidates(losses, inds, gts, SIZES, num_gt=5)
    wide = torch.stack([losses, losses + 1], 1)[:, 0]
    got = paa_gpu.select_candidates(wide, inds.int().repeat_interleave(2)[::2], gts.int(), SIZES, num_gt=5)
    assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_a_ground_truth_without_potential_positives():
    losses = torch.tensor([1.0, 2.0])
    got = paa_gpu.select_candidates(losses, torch.tensor([0, 1]), torch.tensor([2, 2]), [4], num_gt=4)
    assert got.count.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("num_gt", [0, 3])
def test_nothing_to_select(num_gt):
    nothing = torch.zeros(0, dtype=torch.int64)
    got = paa_gpu.select_candidates(torch.zeros(0), nothing, nothing, [4, 2], num_gt=num_gt)
    assert got.loss.shape == (num_gt, 0) and got.count.tolist() == [0] * num_gt


def test_no_levels():
    """An anchor index is then always out of range."""
    for potential in (0, 2):
        inds = torch.arange(potential)
        got = paa_gpu.select_candidates(torch.zeros(potential), inds, inds, [], num_gt=2)
        assert got.loss.shape == got.index.shape == (2, 0)
        assert got.count.tolist() == [0, 0]


def test_a_ground_truth_with_every_anchor(rng):
    check(*draw(rng, potential=5000, num_gt=1, sizes=(4000, 1000)), (4000, 1000), 1, 9)


def test_indices_out_of_range_are_nobodys_candidates():
    inds = torch.tensor([0, -1, 4, 1, 2**40, -(2**62), 2, 3])
    gts = torch.tensor([0, 0, 0, -1, 0, 0, 2**40, 1])
    got = paa_gpu.select_candidates(torch.arange(8.0), inds, gts, [3, 1], num_gt=2)
    assert got.index[:, 0].tolist() == [0, 7] and got.count.tolist() == [1, 1]


def test_repeated_indices_stay_within_the_row():
    inds = torch.zeros(50, dtype=torch.int64)
    got = paa_gpu.select_candidates(torch.arange(50.0), inds, inds, [1, 1], num_gt=1)
    assert got.index.shape == (1, 2) and got.count.item() <= 2


def test_recordings(recording: data.Recording):
    sizes = [len(level) for level in recording.anchors]
    check(recording.pos_losses, recording.pos_inds, recording.pos_gt_inds, sizes, recording.num_gt, 9)


@pytest.mark.parametrize("topk", [9, 80])
def test_neighbours_of_the_range_are_nobodys_candidates(topk):
    """Behind the last ground truth come those of the next image. On the CPU 9 are kept by insertion, and 80 sorted."""
    inds, gts = torch.arange(200), torch.arange(200) // 100
    gts[10:20], inds[30:35], inds[35:40] = -1, -1, 200
    losses = torch.arange(200.0)
    losses[100:] -= 1000
    got = _ops.select_candidates([losses, torch.arange(200.0)], [inds] * 2, [gts, gts * 0], [200] * 2, [1, 1], topk)
    first = [i for i in range(100) if i not in {*range(10, 20), *range(30, 40)}]
    second = [i for i in range(200) if i not in range(30, 40)]
    assert got[1][0, :topk].tolist() == first[:topk] and got[1][1, :topk].tolist() == [200 + i for i in second[:topk]]
    assert got[2].tolist() == [min(topk, 80), topk]
