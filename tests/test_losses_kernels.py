"""The losses of the potential positives as they are executed on the device: compiled for several capabilities, or interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from device_operations import profiled
from kernel_execution import assert_written, compiled_only, execute, on_device, poisoned_outputs

import paa_gpu
from paa_gpu import _ops, reference, testing
from paa_gpu.cpu import losses as cpu
from paa_gpu.kernels import losses as kernels
from paa_gpu.kernels._launch import compile_options
from paa_gpu.kernels.losses import _exp, _log1p

OPTIONS = (2.0, 0.25, 1.0, 1.3, [0.1, 0.1, 0.2, 0.2], 16 / 1000, "giou", "mmdet")
#: Relative. The sum over the classes is float32, the box loss float64.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def run(batch, options=OPTIONS):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        losses = _ops.candidate_losses(*map(list, batch), *options)
    assert_written(losses)
    return losses


def check(batch, options=OPTIONS):
    got, wanted = run(batch, options), cpu.candidate_losses(*batch, *options)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[got.dtype], atol=0, equal_nan=True)


def cast(batch, maps, targets=torch.float32, index=torch.int64):
    dtypes = (targets, maps, maps, torch.int64, targets, targets, targets, index)
    return testing.HeadBatch._make([t.to(dtype) for t in column] for column, dtype in zip(batch, dtypes, strict=True))


@pytest.mark.parametrize(
    ("maps", "targets"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        pytest.param(torch.float16, torch.float32, marks=pytest.mark.long),
        pytest.param(torch.float16, torch.float64, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_batch_equals_the_cpu_operator(session, maps, targets, rng):
    """Images without potential positives at the start, in the middle and at the end; blocks that are full and that are not."""
    batch = testing.make_head_batch([0, 70, 1, 0, 32, 33, 0], rng)
    check(cast(batch, maps, targets), (1.5, 0.4, 0.7, 2.0, [0.2, 0.1, 0.3, 0.4], 0.1, "giou", "mmdet"))


@pytest.mark.parametrize(
    ("box_loss", "convention", "gamma"), [("l1", "mmdet", 2.0), ("l1", "torchvision", 1.5), ("giou", "torchvision", 2.0)]
)
def test_several_anchors_of_a_location(session, box_loss, convention, gamma, rng):
    """And scores of half precision beside deltas of float32, as under autocast."""
    batch = testing.make_head_batch([60, 0, 20], rng, ((5, 6), (4, 3)), per_location=3)
    scores = [level.bfloat16() for level in batch.cls_scores]
    check(batch._replace(cls_scores=scores), (gamma, 0.25, 1.0, 1.3, [1.0, 0.5, 2.0, 1.0], 16 / 1000, box_loss, convention))


@pytest.mark.parametrize("num_classes", [1, 9])
@pytest.mark.parametrize("shapes", [((5, 8),), ((0, 4), (6, 6), (3, 0), (1, 1)), ((2, 2),) * 9], ids=str)
def test_any_levels_and_classes(session, shapes, num_classes, rng):
    check(testing.make_head_batch([30, 3], rng, shapes, num_classes))


def test_strided_inputs(session, rng):
    """One image, whose tensors no concatenation makes contiguous; maps of other layouts."""
    batch = cast(testing.make_head_batch([50], rng), torch.float32, index=torch.int32)
    spread = {name: [torch.stack([t, t + 1], -1)[..., 0] for t in getattr(batch, name)] for name in batch._fields[3:]}
    maps = {name: [level.mT.contiguous().mT for level in getattr(batch, name)] for name in ("cls_scores", "bbox_preds")}
    maps["cls_scores"][0] = batch.cls_scores[0].to(memory_format=torch.channels_last)
    check(batch._replace(**spread, **maps, anchors=[boxes.T.contiguous().T for boxes in batch.anchors]))


def test_offsets_beyond_two_to_the_31(session, rng):
    """Memory that nobody touches costs nothing: the last channel lies more than 2^31 elements behind the first."""
    batch = testing.make_head_batch([9], rng, ((3, 3),), num_classes=9)
    stride = 2**28 + 64
    far = torch.empty(stride * 9, dtype=torch.float16).as_strided((1, 9, 3, 3), (0, stride, 3, 1))
    far.copy_(batch.cls_scores[0])
    near = cast(batch, torch.float16)
    check(near._replace(cls_scores=[far]))


def test_indices_out_of_range(session, rng):
    inds = torch.tensor([0, -1, 303, 304, 2**40, -(2**62), 5, 2**63 - 1, -(2**63), 2**31, 2**32, 1])
    batch = testing.make_head_batch([4, 12, 4], rng)
    check(batch._replace(pos_inds=[batch.pos_inds[0], inds, batch.pos_inds[2]]))


def test_nothing_is_lost_of_what_is_not_a_number(session, rng):
    batch = testing.make_head_batch([304], rng)
    for level, channel in ((batch.cls_scores[0], 3), (batch.bbox_preds[1], 0), (batch.bbox_preds[2], 2)):
        level[0, channel, 1, 2] = torch.nan
    batch.bbox_target[0][50, 1], batch.label_weight[0][60] = torch.nan, torch.nan
    check(batch)
    assert run(batch).isnan().sum() == 5


def test_extreme_logits_and_deltas(session, rng):
    batch = testing.make_head_batch([304], rng)
    for maps in (batch.cls_scores, batch.bbox_preds):
        for level in maps:
            level.copy_(
                torch.from_numpy(rng.choice([-1e4, -200, -90, -30, -1e-30, 0, 1e-3, 30, 90, 200, 1e4], level.shape)).float()
            )
    check(batch)


def test_the_public_function(execution, rng):
    batch = testing.make_head_batch([40, 0, 3], rng)
    with execute(execution):
        got = paa_gpu.candidate_losses(*batch, gamma=1.0)
    for losses, wanted in zip(got, reference.candidate_losses(*batch, gamma=1.0), strict=True):
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=0)


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    batch, results = testing.make_head_batch([100, 0, 77], rng), []
    for seed in (None, 0, 1, 2):
        with execute(90, seed=seed):
            results.append(run(batch))
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- helpers -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _functions_kernel(x_ptr, exp_ptr, log1p_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    tl.store(exp_ptr + offset, _exp(-x), mask=offset < n)
    tl.store(log1p_ptr + offset, _log1p(tl.minimum(x, 1.0)), mask=offset < n)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)], ids=str)
def test_functions(session, dtype, tolerance):
    """Each within the stated part of its value; a GPU's `ex2.approx` may differ by another 1.2e-7."""
    x = torch.cat([torch.linspace(0, 87, 700, dtype=torch.float64), torch.logspace(-30, 0, 300, dtype=torch.float64)]).to(dtype)
    exp, log1p = torch.empty_like(x), torch.empty_like(x)
    on_device(_functions_kernel[(1,)])(x, exp, log1p, len(x), BLOCK=1024, **compile_options(fuse=True))
    torch.testing.assert_close(exp.double(), (-x.double()).exp(), rtol=tolerance, atol=0)
    torch.testing.assert_close(log1p.double(), x.double().clamp(max=1).log1p(), rtol=tolerance, atol=0)


def test_functions_at_the_ends(session):
    x = torch.tensor([0.0, math.inf, math.nan, 200.0])
    exp, log1p = torch.empty_like(x), torch.empty_like(x)
    on_device(_functions_kernel[(1,)])(x, exp, log1p, 4, BLOCK=4, **compile_options(fuse=True))
    assert exp[0] == 1 and exp[1] < 1e-37 and exp[3] < 1e-37 and exp[2].isnan() and log1p[0] == 0


# --- device operations and work ------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("images", [1, 4])
def test_device_operations(images, rng):
    """A copy and a launch, whatever the images and levels."""
    batch = testing.make_head_batch([20] * images, rng)
    assert profiled(lambda: paa_gpu.candidate_losses(*batch)) == (["stage"], ["_losses_kernel"])


def padded(batch):
    """All anchors given as potential positives, with -1 where there is none, as a head does that finds none out."""
    everywhere = [torch.full_like(label, -1).index_copy(0, i, i) for label, i in zip(batch.label, batch.pos_inds, strict=True)]
    return batch._replace(pos_inds=everywhere)


@pytest.mark.parametrize("potential", [[0, 40, 1], [304]], ids=str)
def test_all_anchors_given(session, potential, rng):
    """The losses of those that are potential positives, and NaN."""
    batch = testing.make_head_batch(potential, rng)
    got = run(padded(batch)).split([304] * len(potential))
    for losses, inds, wanted in zip(got, batch.pos_inds, cpu.candidate_losses(*batch, *OPTIONS).split(potential), strict=True):
        torch.testing.assert_close(losses[inds], wanted, rtol=1e-6, atol=0)
        assert losses.isnan().sum() == 304 - len(inds)


@compiled_only
@pytest.mark.parametrize("spread", [False, True], ids=["in boxes", "anywhere"])
def test_work_of_all_anchors_of_sixteen_images(spread, rng):
    """Counted for one image of 800 x 1,333 pixels with 2,000 potential positives of 80 classes, in four boxes or anywhere."""
    batch = testing.make_head_batch([2000], rng, ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), num_classes=80)
    if not spread:
        grid, boxes = (
            torch.arange(100 * 168).view(100, 168),
            ((5, 9, 20, 30), (50, 100, 25, 20), (80, 20, 10, 40), (40, 20, 10, 50)),
        )
        batch = batch._replace(pos_inds=[torch.cat([grid[y : y + h, x : x + w].flatten() for y, x, h, w in boxes])])
    with execute(90, seed=None, racecheck=0, count=True) as session:
        run(padded(batch))
    (work,) = session.by_kernel().values()
    instructions = 16 * sum(n for name, n in work.warp_classes.items() if name != "mov")
    print(f"warp instructions of 16 images with {len(batch.pos_inds[0])} potential positives each: {instructions:,}")
    assert instructions <= 5e6


@compiled_only
def test_work_grows_with_the_potential_positives_only(rng):
    """Rows of adjacent locations, as in a box: sectors are full but at their ends. Larger maps cost nothing."""
    results = []
    for side in (64, 128):
        batch = testing.make_head_batch([0], rng, ((side, side),), num_classes=16)
        batch = batch._replace(pos_inds=[torch.cat([torch.arange(32) + side * row for row in range(16)])])
        with execute(90, seed=None, racecheck=0, count=True) as session:
            _ops.candidate_losses(*map(list, batch), *OPTIONS)
        (work,) = session.by_kernel().values()
        instructions = sum(n for name, n in work.warp_classes.items() if name != "mov")
        results.append((instructions, work.load_sectors / (work.load_bytes / 32)))
    print(f"512 potential positives of 16 classes: warp instructions, load sectors of those needed: {results}")
    assert results[0][0] == results[1][0]
    assert max(sectors for _, sectors in results) <= 1.5


def test_launch_rule():
    assert kernels.launch_rule(False, False)["BLOCK_P"] == 32 and kernels.launch_rule(True, True)["BLOCK_C"] == 1
    assert kernels.launch_rule(False, True)["BLOCK_P"] == 512
