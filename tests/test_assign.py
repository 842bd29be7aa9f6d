"""Max-IoU assignment: exactly that from the matrix of all overlaps."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

import paa_gpu
from paa_gpu import reference, testing
from paa_gpu.cpu import assign as cpu

SHAPES = ((13, 17), (7, 9), (0, 3), (2, 2))
EXTENT = (136.0, 104.0)


def check(anchors, boxes, ignored=None, valid=None, **options):
    got = paa_gpu.assign_max_iou(anchors, boxes, ignored, valid, **options)
    wanted = reference.assign_max_iou(anchors, boxes, ignored, valid, **options)
    for values, expected, dtype in zip(got, wanted, (torch.int64, torch.float32), strict=True):
        assert len(values) == len(boxes)
        for a, b in zip(values, expected, strict=True):
            assert a.dtype == dtype and torch.equal(a, b)
    return got


def draw(rng, numbers=(5, 0, 12, 1), ignored=(0, 2, 3, 1)):
    """Boxes of four images; two are the same, one lies outside of all anchors, one has no area. Boxes to ignore, and valid flags."""
    boxes = [testing.make_boxes(number, EXTENT, rng) for number in numbers]
    if len(boxes) > 2 and len(boxes[2]) > 7:
        boxes[2][3], boxes[2][5], boxes[2][7, 2:] = boxes[2][1], torch.tensor([900.0, 900, 910, 920]), boxes[2][7, :2]
    total = sum(height * width for height, width in SHAPES)
    valid = [torch.from_numpy(rng.random(total) < 0.8) for _ in numbers]
    return boxes, [testing.make_boxes(number, EXTENT, rng) for number in ignored], valid


@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"match_low_quality": False},
        {"match_low_quality": False, "pos_iou_thr": 0.4, "neg_iou_thr": 0.3},
        {"gt_max_assign_all": False, "pos_iou_thr": 0.6, "neg_iou_thr": 0.5},
        {"min_pos_iou": 0.2, "pos_iou_thr": 0.7, "neg_iou_thr": 0.3},
        {"ignore_iof_thr": 0.3},
        {"ignore_iof_thr": 0.7, "gt_max_assign_all": False, "min_pos_iou": 0.05},
        {"low_quality": "anchor", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "ignore_iof_thr": 0.5},
        {"low_quality": "anchor", "gt_max_assign_all": False, "min_pos_iou": 0.1, "pos_iou_thr": 0.7, "neg_iou_thr": 0.3},
    ],
    ids=str,
)
def test_equal_to_the_matrix(options, padded, rng):
    for _ in range(4):
        boxes, ignored, valid = draw(rng)
        check(testing.make_anchors(SHAPES), boxes, ignored, valid if padded else None, **options)


def crowd(rng, number):
    """Boxes small and large over a picture of 800 x 640: most touch few of the anchors, three touch none, one holds a NaN."""
    boxes = testing.make_boxes(number, (800, 640), rng)
    boxes[3] = torch.tensor([5000.0, 10, 5050, 60])
    boxes[7] = torch.tensor([300.0, -900, 350, -800])
    boxes[5], boxes[9, 2] = boxes[3], torch.nan
    return boxes


LARGE = ((80, 100), (40, 50), (20, 25))


@pytest.mark.parametrize("low_quality", ["gt", "anchor"])
@pytest.mark.parametrize("match_all", [True, False])
def test_boxes_that_touch_few_of_the_anchors(low_quality, match_all, rng):
    """Boxes that are passed over overlap as they would by the matrix: not at all, which is a best overlap too."""
    anchors, boxes = testing.make_anchors(LARGE), [crowd(rng, 40), crowd(rng, 12)]
    options = {"low_quality": low_quality, "gt_max_assign_all": match_all}
    for thresholds in ((0.1, 0.1, 0.0), (0.5, 0.4, 0.0), (0.0, 0.0, 0.2)):
        check(anchors, boxes, **dict(zip(("pos_iou_thr", "neg_iou_thr", "min_pos_iou"), thresholds, strict=True)), **options)
    anchors[0][:300, 1], anchors[1][7], anchors[2][3, 2] = torch.nan, torch.inf, -torch.inf
    check(anchors, boxes, **options)
    check(anchors, boxes, [boxes[0][:4], boxes[1][8:]], ignore_iof_thr=0.5, min_pos_iou=0.01, **options)


def test_anchors_of_each_image(rng):
    """Of different numbers, in different numbers of levels, none in one."""
    levels = testing.make_anchors(LARGE)
    anchors = [[levels[1]], levels[1:], [levels[2][:0], levels[2][5:90], levels[0]], [levels[2][:0]]]
    boxes = [crowd(rng, 12), crowd(rng, 30), torch.empty(0, 4), crowd(rng, 11)]
    valid = [torch.from_numpy(rng.random(sum(map(len, image))) < 0.8) for image in anchors]
    for low_quality in ("gt", "anchor"):
        got = check(anchors, boxes, boxes[::-1], valid, ignore_iof_thr=0.5, pos_iou_thr=0.4, low_quality=low_quality)
    assert [len(inds) for inds in got.gt_inds] == [sum(map(len, image)) for image in anchors]


def torchvision_boxes(rng, number):
    """Boxes as torchvision accepts them: some are the same, some lie on the grid and tie, one overlaps nothing, one is tiny."""
    boxes = testing.make_boxes(number, (800, 640), rng)
    boxes[number // 2 :] = boxes[number // 2 :].round() + torch.tensor([0.0, 0, 1, 1])
    boxes[1], boxes[2] = boxes[0], torch.tensor([7000.0, 7000, 7100, 7100])
    boxes[4] = torch.tensor([100.0, 100, 100.0001, 100.0001])
    return boxes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_matches_of_torchvision(dtype, rng):
    """Anchors of half precision beside boxes of float32 are what autocast makes."""
    anchors = torch.cat(testing.make_anchors(LARGE)).to(dtype)
    boxes = [torchvision_boxes(rng, number) for number in (60, 9)]
    images, differ = [[anchors], [anchors[200:4000]]], 0
    for high, low in ((0.5, 0.4), (0.7, 0.3), (0.5, 0.5)):
        matchers = {
            Matcher(high, low, allow_low_quality_matches=True): {"low_quality": "anchor"},
            Matcher(high, low, allow_low_quality_matches=False): {"match_low_quality": False},
            SSDMatcher(high): {"gt_max_assign_all": False, "neg_iou_thr": high},
        }
        for matcher, options in matchers.items():
            got = paa_gpu.assign_max_iou(images, boxes, **{"pos_iou_thr": high, "neg_iou_thr": low, "eps": 0, **options})
            plain = paa_gpu.assign_max_iou(images, boxes, pos_iou_thr=high, neg_iou_thr=low)
            for (each,), gts, inds, others in zip(images, boxes, got.gt_inds, plain.gt_inds, strict=True):
                matches = matcher(box_iou(gts, each))
                wanted = torch.where(matches >= 0, matches + 1, torch.where(matches == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
                assert torch.equal(inds, wanted)
                differ += int((inds != others).sum())
    assert differ > 1000


def test_ties_go_to_the_lower_ground_truth_and_forced_ones_to_the_higher():
    """A small box in the middle of four anchors that contain it: all have the same overlap."""
    anchors = [torch.tensor([[0.0, 0, 40, 40], [4, 0, 44, 40], [0, 4, 40, 44], [4, 4, 44, 44], [90, 90, 99, 99]])]
    box = torch.tensor([[15.0, 15, 30, 30]])
    inds, overlaps = check(anchors, [box.expand(3, 4)])
    assert inds[0].tolist() == [3, 3, 3, 3, 0] and overlaps[0].tolist() == pytest.approx([0.140625] * 4 + [0])
    inds, _ = check(anchors, [box.expand(3, 4)], match_low_quality=False)
    assert inds[0].tolist() == [1, 1, 1, 1, 0]
    inds, _ = check(anchors, [box], gt_max_assign_all=False, pos_iou_thr=0.5, neg_iou_thr=0.1)
    assert inds[0].tolist() == [1, -1, -1, -1, 0]


def test_a_ground_truth_that_nothing_overlaps():
    """As published: its best overlap is 0, and so it takes every anchor that has none; not with a threshold."""
    anchors = [torch.tensor([[0.0, 0, 9, 9], [50, 50, 60, 60]])]
    boxes = [torch.tensor([[0.0, 0, 9, 9], [500, 500, 510, 510]])]
    assert check(anchors, boxes)[0][0].tolist() == [2, 2]
    assert check(anchors, boxes, min_pos_iou=1e-6)[0][0].tolist() == [1, 0]


def test_thresholds_are_met_exactly():
    """0.5 is an overlap of 0.5, and 0.1 is what float32 makes of it."""
    anchors = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 1], [0, 0, 10, 5]])]
    boxes = [torch.tensor([[0.0, 0, 10, 10]])]
    for threshold in (0.1, 0.5, np.nextafter(0.5, 1)):
        check(anchors, boxes, pos_iou_thr=threshold, neg_iou_thr=threshold, match_low_quality=False)


def test_valid_flags_take_anchors_away():
    anchors, boxes = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])], [torch.tensor([[0.0, 0, 10, 10]])]
    inds, overlaps = check(anchors, boxes, valid=[torch.tensor([False, True])], pos_iou_thr=0.95)
    assert inds[0].tolist() == [-1, 1] and overlaps[0][0] == -1
    assert check(anchors, boxes, valid=[torch.zeros(2, dtype=torch.bool)])[0][0].tolist() == [-1, -1]


@pytest.mark.parametrize("numbers", [(0,), (0, 0), (0, 3), (3, 0)], ids=str)
def test_images_without_ground_truths(numbers, rng):
    boxes, ignored, valid = draw(rng, numbers, [2] * len(numbers))
    for flags in (None, valid):
        for low_quality, neg_iou_thr in itertools.product(("gt", "anchor"), (0.0, 0.4)):
            options = {"low_quality": low_quality, "neg_iou_thr": neg_iou_thr, "ignore_iof_thr": 0.3}
            check(testing.make_anchors(SHAPES), boxes, ignored, flags, **options)


def test_thousands_of_ground_truths(rng):
    check(testing.make_anchors([(9, 9)]), [testing.make_boxes(10_000, EXTENT, rng)])


def test_no_anchors(rng):
    check(testing.make_anchors([(0, 3)]), draw(rng)[0])


def test_ignoring_needs_a_threshold(rng):
    boxes, ignored, _ = draw(rng)
    anchors = testing.make_anchors(SHAPES)
    plain = paa_gpu.assign_max_iou(anchors, boxes)
    for threshold in (-1, 0.0, -2):
        got = paa_gpu.assign_max_iou(anchors, boxes, ignored, ignore_iof_thr=threshold)
        assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*plain), itertools.chain(*got), strict=True))


def test_boxes_without_area_where_tiny_numbers_are_zero():
    """An IoU of 0 / 0 is 0, also in a process whose processor takes numbers below the smallest normal one for 0."""
    boxes = torch.tensor([[3.0, 3, 3, 3]])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        _, (overlaps,) = paa_gpu.assign_max_iou([boxes], [boxes], eps=0)
    finally:
        torch.set_flush_denormal(False)
    assert overlaps.tolist() == [0]


@pytest.mark.slow  # on compiled kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_rounded_to_float32(dtype, rng):
    boxes, ignored, _ = draw(rng)
    columns = testing.make_anchors(SHAPES), boxes, ignored
    check(*([t.to(dtype) for t in column] for column in columns), ignore_iof_thr=0.4)


@pytest.mark.slow
def test_views(rng):
    """One level and one image, which nobody concatenates."""
    anchors, (box, ignored) = torch.cat(testing.make_anchors(SHAPES)), [testing.make_boxes(n, EXTENT, rng) for n in (6, 2)]
    valid = torch.from_numpy(rng.random(len(anchors)) < 0.8)
    plain = check([anchors], [box], [ignored], [valid], ignore_iof_thr=0.5)
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (anchors, box.T.contiguous().T, ignored)]
    got = check(*([t] for t in spread), [torch.stack([valid, ~valid], 1)[:, 0]], ignore_iof_thr=0.5)
    assert torch.equal(got.gt_inds[0], plain.gt_inds[0])


def test_a_box_with_a_nan_overlaps_nothing(rng):
    """Of the others, nothing changes."""
    boxes, ignored, _ = draw(rng, (4, 3), (2, 1))
    anchors = testing.make_anchors(SHAPES)
    plain = paa_gpu.assign_max_iou(anchors, boxes, ignored, ignore_iof_thr=0.5)
    for side in range(4):
        bad = torch.tensor([[10.0, 10, 60, 60]])
        bad[0, side] = torch.nan
        more = torch.cat([boxes[0], bad]), boxes[1]
        got = paa_gpu.assign_max_iou(anchors, more, [torch.cat([ignored[0], bad]), ignored[1]], ignore_iof_thr=0.5)
        assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*plain), itertools.chain(*got), strict=True))
        assert paa_gpu.assign_max_iou(anchors, [bad]).gt_inds[0].eq(-1).all()


def test_no_change(rng):
    boxes, ignored, valid = draw(rng)
    columns = [testing.make_anchors(SHAPES), boxes, ignored, valid]
    before = [[t.clone() for t in column] for column in columns]
    got = paa_gpu.assign_max_iou(*columns, ignore_iof_thr=0.3)
    got.gt_inds[0].fill_(7)
    assert all(torch.equal(a, b) for old, new in zip(before, columns, strict=True) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("options", [{}, {"gt_max_assign_all": False}, {"low_quality": "anchor"}], ids=str)
def test_any_number_of_threads_gives_the_same_bits(options, rng, monkeypatch):
    """The CPU's rows of anchors in one slice, as for few anchors, and in several."""
    anchors = testing.make_anchors([(40, 40), (20, 20)])
    boxes = [testing.make_boxes(number, (320, 320), rng) for number in (9, 0, 30)]
    wanted, threads = paa_gpu.assign_max_iou(anchors, boxes, **options), torch.get_num_threads()
    monkeypatch.setattr(cpu, "SERIAL_ANCHORS", 0)
    try:
        for number in (2, 5):
            torch.set_num_threads(number)
            got = paa_gpu.assign_max_iou(anchors, boxes, **options)
            assert all(map(torch.equal, [*got.gt_inds, *got.max_overlaps], [*wanted.gt_inds, *wanted.max_overlaps]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.long
def test_600_boxes_against_200_000_anchors_need_a_few_megabytes(rng):
    """The results are 2.4 megabytes, the matrix would be 480."""
    anchors = testing.make_anchors([(400, 400), (200, 200)])
    boxes = [testing.make_boxes(600, (3200, 3200), rng)]
    paa_gpu.assign_max_iou([anchors[1]], boxes)  # compiles
    tracemalloc.start()
    got = paa_gpu.assign_max_iou(anchors, boxes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{peak / 1e6:.1f} MB of numpy's memory")
    assert peak < 16e6
    some = torch.from_numpy(rng.permutation(200_000)[:2000])
    overlaps = reference._iou_or_iof(boxes[0], torch.cat(anchors)[some], 1e-6)
    assert torch.equal(got.max_overlaps[0][some], overlaps.amax(0))


def test_boxes_and_anchors_without_area():
    """Their union is `eps` then; so is one that is smaller."""
    boxes = torch.tensor([[0.0, 0, 5e-4, 5e-4], [5, 5, 5, 5], [7, 7, 7, 8]])
    inds, overlaps = check([boxes], [boxes[:2]], match_low_quality=False)
    assert inds[0].tolist() == [1, 0, 0] and overlaps[0].tolist() == pytest.approx([0.25, 0, 0])


def test_areas_of_zero_without_eps():
    boxes = torch.tensor([[5.0, 5, 5, 5], [7, 7, 7, 8]])
    inds, _ = check([boxes], [boxes[:1]], match_low_quality=False, eps=0.0)
    assert inds[0].tolist() == [0, 0]


def test_anchors_that_do_not_count_have_no_best_overlap():
    """A whole row of the CPU's, before the first anchor that counts."""
    anchors, valid = testing.make_anchors([(30, 30)]), torch.arange(900) >= 600
    box = torch.tensor([[5000.0, 5000, 5010, 5010]])
    inds, _ = check(anchors, [box], valid=[valid], gt_max_assign_all=False)
    assert inds[0][600] == 1


def test_a_box_with_a_nan_outside_of_all_anchors():
    """It is not the one whose overlaps those of other boxes outside are."""
    boxes = torch.tensor([[5000.0, torch.nan, 5050, 60], [6000, 10, 6050, 60], [6000, 10, 6050, torch.nan]])
    inds, _ = check(testing.make_anchors([(8, 8)]), [boxes])
    assert inds[0].eq(2).all()


def test_more_than_the_threshold_is_ignored():
    box = torch.tensor([[0.0, 0, 10, 10]])
    inds, _ = check([box], [box], [torch.tensor([[0.0, 0, 10, 5]])], ignore_iof_thr=0.5)
    assert inds[0].tolist() == [1]
