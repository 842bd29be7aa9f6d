"""Max-IoU assignment as it is executed on the device: compiled for several capabilities, or interpreted. All bits are the matrix's."""

from __future__ import annotations

import re

import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import assert_written, compiled_only, execute, poisoned_outputs
from test_assign import SHAPES, draw

import paa_gpu
from paa_gpu import _ops, reference, testing
from paa_gpu.kernels import assign as kernels

NAMES = (
    "pos_iou_thr",
    "neg_iou_thr",
    "min_pos_iou",
    "ignore_iof_thr",
    "eps",
    "match_low_quality",
    "gt_max_assign_all",
    "low_quality",
)
#: PAA's.
USUAL = (0.1, 0.1, 0.0, -1.0, 1e-6, True, True, "gt")


def run(anchors, boxes, ignored=(), valid=(), *options):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        per_image = isinstance(anchors[0], list)
        flat = [level for levels in anchors for level in levels] if per_image else anchors
        results = _ops.assign_max_iou(flat, boxes, list(ignored), list(valid), per_image, *options)
    assert_written(*results)
    return results


def check(anchors, boxes, ignored=(), valid=(), options=USUAL):
    wanted = reference.assign_max_iou(anchors, boxes, ignored or None, valid or None, **dict(zip(NAMES, options, strict=True)))
    for got, expected in zip(run(anchors, boxes, ignored, valid, *options), wanted, strict=True):
        assert torch.equal(got, torch.cat(expected))


@pytest.mark.parametrize(
    ("padded", "options"),
    [
        (False, (0.1, 0.1, 0.0, -1.0, 1e-6, True, True, "gt")),
        (True, (0.1, 0.1, 0.0, 0.4, 1e-6, True, False, "gt")),
        (True, (0.5, 0.3, 0.2, 0.7, 1e-6, True, True, "gt")),
        (False, (0.4, 0.3, 0.0, 0.4, 1e-6, False, True, "gt")),
    ],
    ids=str,
)
def test_equal_to_the_matrix(session, options, padded, rng):
    boxes, ignored, valid = draw(rng)
    check(testing.make_anchors(SHAPES), boxes, ignored if options[3] > 0 else (), valid if padded else (), options)


@pytest.mark.parametrize("numbers", [(0,), (0, 0), (0, 3, 0), (1,)], ids=str)
def test_images_without_ground_truths(session, numbers, rng):
    boxes, _, valid = draw(rng, numbers, [0] * len(numbers))
    check(testing.make_anchors(SHAPES), boxes, (), valid)
    check(testing.make_anchors(SHAPES), boxes)


@pytest.mark.parametrize("size", [1, 127, 128, 129])
def test_blocks_that_are_full_and_that_are_not(session, size, rng):
    anchors = torch.cat(testing.make_anchors(SHAPES))[:size]
    check([anchors], [testing.make_boxes(n, (136, 104), rng) for n in (3, 1)])


def test_ties_across_blocks(session):
    """Hundreds of anchors with the same overlaps: all are the best, or the first is; of two boxes alike, the first owns them."""
    anchors = [torch.tensor([[0.0, 0, 10, 10]]).repeat(300, 1)]
    boxes = [torch.tensor([[0.0, 0, 10, 5]]).repeat(2, 1), torch.tensor([[0.0, 0, 5, 5]])]
    for match_all in (True, False):
        check(anchors, boxes, options=(0.6, 0.6, 0.0, -1.0, 1e-6, True, match_all, "gt"))
    check(anchors, boxes, options=(0.4, 0.4, 0.0, -1.0, 1e-6, False, True, "gt"))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_views(session, dtype, rng):
    """One image, which nobody concatenates."""
    anchors, boxes, ignored = torch.cat(testing.make_anchors(SHAPES)), *(testing.make_boxes(n, (136, 104), rng) for n in (6, 2))
    columns = [[torch.stack([t, t + 1], -1)[..., 0].to(dtype)] for t in (anchors, boxes.T.contiguous().T, ignored)]
    valid = torch.from_numpy(rng.random((len(anchors), 2)) < 0.8)[:, 1]
    check(*columns, [valid], (0.1, 0.1, 0.0, 0.5, 1e-6, True, True, "gt"))


def test_offsets_beyond_two_to_the_31(session, rng):
    """Memory that nobody touches costs nothing: the last anchor lies 2^31 elements behind the first."""
    stride, anchors = 2**28 + 4, testing.make_boxes(9, (50, 50), rng)
    far = torch.empty(stride * 8 + 4).as_strided((9, 4), (stride, 1))
    far.copy_(anchors)
    check([far], [testing.make_boxes(3, (50, 50), rng)])


def test_a_box_with_a_nan(session):
    anchors, nan = testing.make_anchors(SHAPES), torch.nan
    boxes = torch.tensor([[10.0, 10, 60, 60], [30, 30, 50, 55]])
    for bad in ([nan, 10, 60, 60], [10, nan, 60, 60], [10, 10, nan, 60], [10, 10, 60, nan]):
        plain = run(anchors, [boxes], [boxes[:1] + 30], (), 0.1, 0.1, 0.0, 0.5, 1e-6, True, True, "gt")
        bad = torch.tensor([bad])
        got = run(
            anchors, [torch.cat([boxes, bad])], [torch.cat([boxes[:1] + 30, bad])], (), 0.1, 0.1, 0.0, 0.5, 1e-6, True, True, "gt"
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_the_public_function(execution, rng):
    boxes, ignored, valid = draw(rng)
    anchors = testing.make_anchors(SHAPES)
    wanted = paa_gpu.assign_max_iou(anchors, boxes, ignored, valid, ignore_iof_thr=0.5)
    with execute(execution):
        got = paa_gpu.assign_max_iou(anchors, boxes, ignored, valid, ignore_iof_thr=0.5)
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True))


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    boxes, ignored, valid = draw(rng)
    results = []
    for seed in (None, 0, 1, 2):
        with execute(90, seed=seed):
            results.append(run(testing.make_anchors(SHAPES), boxes, ignored, valid, 0.3, 0.2, 0.0, 0.5, 1e-6, True, True, "gt"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled_only
@pytest.mark.parametrize("capability", [75, 90])
def test_the_second_pass_waits_for_the_first(capability, rng, monkeypatch):
    """Programs run one by one here, so that only the code can show it: what a block wrote comes before its sign, a barrier and a
    release; the sign is acquired in a loop; what others wrote is read past the first-level cache."""
    compiled, launch = [], kernels._assign_kernel.run
    monkeypatch.setattr(kernels._assign_kernel, "run", lambda *args, **options: compiled.append(launch(*args, **options)))
    with execute(capability):
        run(
            testing.make_anchors(SHAPES),
            [testing.make_boxes(2, (99, 99), rng)],
            (),
            (),
            0.1,
            0.1,
            0.0,
            -1.0,
            1e-6,
            True,
            True,
            "gt",
        )
    ptx = compiled[0].asm["ptx"]
    release, acquire = (re.search(rf"(atom|ld)\.global\S*{order}\S*", ptx) for order in ("release", "acquire"))
    before, after = ptx[: release.start()], ptx[acquire.end() :]
    assert "bar.sync" in before[before.rindex("st.global") :] or "bar.warp.sync" in before[before.rindex("st.global") :]
    assert after.count("ld.global.cg") >= 2 and "ld.global.cg" not in before
    assert not re.search(r"fma\.rn\.f32|div\.full|div\.approx", ptx)


# --- device operations and work ------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("images", [1, 4])
def test_device_operations(images, rng):
    """One launch; concatenations of levels, boxes, boxes to ignore and flags; no synchronisation."""
    boxes, ignored, valid = draw(rng, [3] * images, [1] * images)
    anchors = testing.make_anchors(SHAPES)
    plain = profiled(lambda: paa_gpu.assign_max_iou(anchors, boxes))
    full = profiled(lambda: paa_gpu.assign_max_iou(anchors, boxes, ignored, valid, ignore_iof_thr=0.5))
    print(plain, full)
    assert plain[1] == full[1] == ["_assign_kernel"] and not SYNCHRONISING & {*plain[0], *full[0]}
    assert sorted(plain[0]) == ["cat"] * (1 if images == 1 else 2) + ["stage"]
    assert sorted(full[0]) == ["cat"] * (1 if images == 1 else 4) + ["stage"]


@compiled_only
def test_work_for_an_overlap(rng):
    """The count for an overlap, in both passes; loads are coalesced but for the boxes, which all lanes share."""
    anchors, counted = testing.make_anchors([(64, 64)]), []
    for number in (10, 20):
        with execute(90, seed=None, racecheck=0, count=True) as session:
            run(anchors, [testing.make_boxes(number, (512, 512), rng)], (), (), 0.1, 0.1, 0.0, -1.0, 1e-6, True, True, "gt")
        (work,) = session.by_kernel().values()
        counted.append(sum(n for name, n in work.warp_classes.items() if name != "mov"))
    each = (counted[1] - counted[0]) / (10 * 64 * 64 / 32)
    print(f"warp instructions for 32 overlaps, two passes: {each:.0f}")
    assert each <= 120
