"""Max-IoU assignment as it is executed on the device: compiled for several capabilities, or interpreted. All bits are the matrix's."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from device_operations import profiled
from kernel_execution import assert_written, compiled_only, execute, poisoned_outputs
from test_assign import LARGE, SHAPES, crowd, draw

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


@pytest.mark.parametrize("size", [1, 511, 512, 513])
def test_blocks_that_are_full_and_that_are_not(session, size, rng):
    anchors = torch.cat(testing.make_anchors(LARGE))[:size]
    check([anchors], [testing.make_boxes(n, (136, 104), rng) for n in (3, 1)])


@pytest.mark.parametrize("match_all", [True, False])
@pytest.mark.parametrize("low_quality", ["gt", "anchor"])
def test_boxes_that_touch_few_of_the_anchors(session, low_quality, match_all, rng):
    """Passed over, they overlap as by the matrix: not at all, which is a best overlap too."""
    anchors = testing.make_anchors(LARGE[1:])
    anchors[0][:9, 1], anchors[1][3, 2] = torch.nan, -torch.inf
    check(anchors, [crowd(rng, 30), crowd(rng, 12)], (), (), (0.5, 0.4, 0.0, -1.0, 0.0, True, match_all, low_quality))


@pytest.mark.parametrize("low_quality", ["gt", "anchor"])
def test_anchors_of_each_image(session, low_quality, rng):
    """Of different numbers; none in one, no ground truths in another."""
    levels = testing.make_anchors(SHAPES)
    anchors = [[levels[0], levels[1]], [levels[3], levels[0][7:99]], [levels[2], levels[1]], [levels[2], levels[2]]]
    boxes, ignored, _ = draw(rng)
    valid = [torch.from_numpy(rng.random(sum(map(len, image))) < 0.8) for image in anchors]
    check(anchors, boxes, ignored, valid, (0.5, 0.3, 0.0, 0.5, 1e-6, True, True, low_quality))


def test_more_blocks_than_rows(session, rng, monkeypatch):
    """Then a program has several blocks, and the best of each counts."""
    monkeypatch.setattr(kernels, "MOST_ROWS", 2)
    anchors = testing.make_anchors(LARGE[1:])
    for match_all in (True, False):
        check(anchors, [crowd(rng, 12), crowd(rng, 10)], (), (), (0.5, 0.4, 0.0, -1.0, 1e-6, True, match_all, "gt"))


def test_ties_across_blocks(session):
    """Hundreds of anchors with the same overlaps: all are the best, or the first is; of two boxes alike, the first owns them."""
    anchors = [torch.tensor([[0.0, 0, 10, 10]]).repeat(1100, 1)]
    boxes = [torch.tensor([[0.0, 0, 10, 5]]).repeat(2, 1), torch.tensor([[0.0, 0, 5, 5]])]
    for match_all in (True, False):
        check(anchors, boxes, options=(0.6, 0.6, 0.0, -1.0, 1e-6, True, match_all, "gt"))
    check(anchors, boxes, options=(0.4, 0.4, 0.0, -1.0, 1e-6, False, True, "gt"))


def test_thresholds_are_met_exactly(session):
    """An overlap of the lower one is no background, though the upper one is higher."""
    anchors = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 40]])]
    boxes, options = [torch.tensor([[0.0, 0, 10, 10]])], (1.0, 0.5, 0.0, -1.0, 1e-6, False, True, "gt")
    assert run(anchors, boxes, (), (), *options)[0].tolist() == [1, -1, 0]
    check(anchors, boxes, options=options)


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


def compiled_forms(call):
    """Of each kernel, how often the call compiles it."""
    forms = {}

    def watch(kernel):
        launch = kernel.run

        def run(*args, **options):
            compiled = launch(*args, **options)
            forms.setdefault(compiled.name, {})[compiled.hash] = compiled
            return compiled

        return mock.patch.object(kernel, "run", run)

    with execute(90), watch(kernels._first_kernel), watch(kernels._second_kernel):
        call()
    return forms


@compiled_only
def test_one_compiled_form_for_all_batches(rng):
    """Whatever the number of boxes and anchors, and wherever they lie in memory; that of images has a test in `test_launch`."""
    anchors = testing.make_anchors(SHAPES)

    def call():
        for numbers in ((1,), (16, 0, 5)):
            boxes = [testing.make_boxes(number, (136, 104), rng) for number in numbers]
            check(anchors, boxes)
            check([torch.cat([level[:1], level])[1:] for level in anchors], [torch.cat([box[:1], box])[1:] for box in boxes])
            check([level.T.contiguous().T for level in anchors], boxes)

    forms = compiled_forms(call)
    assert {name: len(found) for name, found in forms.items()} == {"_first_kernel": 1, "_second_kernel": 1}


@compiled_only
def test_the_arithmetic_is_that_of_torch(rng):
    """No operation is fused with another, no quotient is approximate; and no program reads what another of its launch writes."""
    forms = compiled_forms(lambda: check(testing.make_anchors(SHAPES), [testing.make_boxes(2, (99, 99), rng)]))
    for name, (compiled,) in ((name, found.values()) for name, found in forms.items()):
        ptx = compiled.asm["ptx"]
        assert not re.search(r"fma\.rn\.f32|div\.full|div\.approx", ptx), name
        assert not re.search(r"(atom|ld|fence)\S*\.(acquire|acq_rel)", ptx), name


# --- device operations and work ------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("images", [1, 4])
def test_device_operations(images, rng):
    """A copy and two launches, one where no best anchors are wanted; no synchronisation."""
    boxes, ignored, valid = draw(rng, [3] * images, [1] * images)
    anchors = testing.make_anchors(SHAPES)
    assert profiled(lambda: paa_gpu.assign_max_iou(anchors, boxes)) == (["stage"], ["_first_kernel", "_second_kernel"])
    full = profiled(lambda: paa_gpu.assign_max_iou([anchors] * images, boxes, ignored, valid, ignore_iof_thr=0.5))
    assert full == (["stage"], ["_first_kernel", "_second_kernel"])
    assert profiled(lambda: paa_gpu.assign_max_iou(anchors, boxes, match_low_quality=False)) == (["stage"], ["_first_kernel"])


@compiled_only
def test_work_of_sixteen_images_of_100_boxes(rng):
    """Counted for one image of 800 x 1,333 pixels, in both passes. Boxes that do not touch a block cost little."""
    anchors = testing.make_anchors(((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)))
    with execute(90, seed=None, racecheck=0, count=True) as session:
        run(anchors, [testing.make_boxes(100, (1333, 800), rng)], (), (), *USUAL)
    work = {
        name: 16 * sum(n for kind, n in counters.warp_classes.items() if kind != "mov")
        for name, counters in session.by_kernel().items()
    }
    print(f"warp instructions of 16 images of 100 boxes: {work}")
    assert sum(work.values()) <= 64.7e6 / 3
