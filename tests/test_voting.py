"""Score voting: against the published loop on recorded predictions and random ones; order, limits, values that are not finite."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu import data, reference, testing
from paa_gpu._checks import FLOATS, INTEGERS

#: Pixels between float32 boxes at 1,333 pixels, where float32 resolves 1.2e-4, and the loop in float64, or the published results.
TOLERANCE, PUBLISHED_TOLERANCE = 5e-4, 1e-3
NARROW = {torch.float64: 1e-9, torch.float32: TOLERANCE}

#: Two classes of scores: 0 above the threshold, 1 below it.
BOX = torch.tensor([[10.0, 20.0, 50.0, 60.0], [12.0, 20.0, 52.0, 60.0], [300.0, 20.0, 350.0, 60.0]])
SCORES = torch.tensor([[0.9, 0.0], [0.6, 0.0], [0.8, 0.0]])


def tolerance(dtype, size=1333.0):
    """Half the distance of two numbers of a narrow dtype at the image's far side, above what the sums lose."""
    return NARROW.get(dtype, TOLERANCE + size * torch.finfo(dtype).eps / 2)


def check(arguments, options, limit):
    """Labels, scores and order exactly, boxes within a limit in pixels, of the loop in float64."""
    got, labels = paa_gpu.score_voting(*arguments, **options)
    wanted, wanted_labels = reference.score_voting(*arguments, **options)
    assert (got.dtype, labels.dtype) == (arguments[0].dtype, arguments[1].dtype)
    assert torch.equal(labels, wanted_labels)
    assert torch.equal(got[:, 4].double(), wanted[:, 4])
    difference = (got.double() - wanted).abs()
    assert difference.numel() == 0 or difference.max() <= limit, difference.max()


def predictions(rng, detections=40, boxes=700, **options):
    """The arguments of one image."""
    image = testing.make_predictions([(detections, boxes)], rng, **{"num_classes": 5, **options})
    return *(column[0] for column in image), 0.05


# --- the published loop --------------------------------------------------------------------------------------------------------


def recorded():
    quick = {"g01_OSBS_029_late", "g02_YELL_541_late", "g03_YELL_541_init", "voting0"}
    return [
        pytest.param(path, marks=() if path.stem in quick else pytest.mark.slow, id=path.stem) for path in data.voting_paths()
    ]


@pytest.mark.parametrize("path", recorded())
def test_recordings(path):
    """The published results to a thousandth of a pixel, the loop in float64 to half of that; everything else exactly."""
    for call in data.load_voting(path):
        check(call.arguments, {}, TOLERANCE)
        got, labels = paa_gpu.score_voting(*call.arguments)
        assert torch.equal(labels, call.out_labels) and torch.equal(got[:, 4], call.out_bboxes[:, 4])
        assert (got - call.out_bboxes).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("path", [data.BUNDLED, data.voting_paths()[-1]], ids=lambda path: path.stem)
def test_the_reference_is_the_published_loop(path):
    for call in data.load_voting(path):
        bboxes, labels = reference.score_voting(*call.arguments, published=True)
        assert torch.equal(labels, call.out_labels) and bboxes.dtype == torch.float32
        torch.testing.assert_close(bboxes, call.out_bboxes, rtol=0, atol=PUBLISHED_TOLERANCE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"offset": 1}, {"keep_order": True}, {"sigma": 0.3, "iou_thr": 0.5}, {"sigma": 0.002}, {"iou_thr": 0.0, "offset": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_random_predictions(options, dtype, rng):
    check(predictions(rng, dtype=dtype), options, tolerance(dtype))


@pytest.mark.parametrize("boxes", [1, 31, 32, 33, 511, 512, 513])
@pytest.mark.parametrize("classes", [1, 3])
def test_any_number_of_boxes(boxes, classes, rng):
    check(predictions(rng, 20, boxes, num_classes=classes), {}, TOLERANCE)


@pytest.mark.slow
def test_225_000_candidates(rng):
    """1,000 detections, 5,000 boxes, 80 classes."""
    arguments = predictions(rng, 1000, 5000, num_classes=80, share=0.5625)
    assert abs(int((arguments[3] > 0.05).sum()) - 225_000) < 1000
    check(arguments, {}, TOLERANCE)


def test_float64_is_not_rounded(rng):
    """A box of 1e-4 pixels, at 1,000: its union is below the floor of 1e-6, and float32 would resolve half of it."""
    boxes = 1000 + torch.tensor([[0, 0, 1e-4, 1e-4], [1e-5, 0, 11e-5, 1e-4]], dtype=torch.float64)
    det = torch.cat([boxes[:1], torch.ones(1, 1, dtype=torch.float64)], 1)
    scores = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    options = {"iou_thr": 1e-3, "sigma": 10.0}
    got, _ = paa_gpu.score_voting(det, torch.zeros(1, dtype=torch.int64), boxes, scores, 0.05, **options)
    wanted, _ = reference.score_voting(det, torch.zeros(1, dtype=torch.int64), boxes, scores, 0.05, **options)
    assert wanted[0, 0] > 1000 + 6e-6
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", range(4))
def test_one_float64_tensor_makes_the_sums_float64(which, rng):
    arguments = list(predictions(rng))
    if which != 1:
        arguments[which] = arguments[which].double()
    check(arguments, {}, 1e-9 if which == 0 else TOLERANCE)


# --- thresholds, order, classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("det_dtype", [None, torch.float64], ids=["one dtype", "float64 detections"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_threshold_is_rounded_to_the_dtype_of_the_scores(dtype, det_dtype):
    """0.05 in float32 and in bfloat16 is more than 0.05; a score of that value does not exceed it."""
    boxes = BOX[:2].to(dtype)
    det = torch.cat([boxes[:1], torch.ones(1, 1)], 1).to(det_dtype or dtype)
    for scores, moved in (([0.0, 0.05], False), ([0.0, 0.0625], True)):
        scores = torch.tensor(scores, dtype=dtype)[:, None]
        got, _ = paa_gpu.score_voting(det, torch.tensor([0]), boxes, scores, 0.05)
        assert bool((got != det).any()) == moved


def test_scores_equal_to_the_threshold(rng):
    """In one class, while the box exceeds it in another."""
    *arguments, scores, _ = predictions(rng)
    check((*arguments, (scores * 8).round() / 8, 0.25), {}, TOLERANCE)


def test_voters_weigh_as_the_specification_says():
    det = torch.tensor([[10.0, 20.0, 50.0, 60.0, 0.7]], dtype=torch.float64)
    iou = 38 / 42
    weight = np.exp(-((1 - iou) ** 2) / 0.025) * 0.6
    got, label = paa_gpu.score_voting(det, torch.tensor([0]), BOX, SCORES, 0.05)
    x = 10 + 2 * weight / (0.9 + weight)
    # The scores are float32: 0.6 and 0.9 are not these numbers.
    torch.testing.assert_close(got, torch.tensor([[x, 20, x + 40, 60, 0.7]], dtype=torch.float64), rtol=0, atol=1e-6)
    assert label.tolist() == [0]


@pytest.mark.parametrize("keep_order", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_order_and_label_dtypes(dtype, keep_order, rng):
    det, label, *rest = predictions(rng, 60)
    got, labels = paa_gpu.score_voting(det, label.to(dtype), *rest, keep_order=keep_order)
    order = torch.arange(60) if keep_order else label.sort(stable=True).indices
    assert labels.dtype == dtype and torch.equal(labels.long(), label[order])
    assert torch.equal(got[:, 4], det[order, 4])
    plain, _ = paa_gpu.score_voting(det, label, *rest, keep_order=True)
    assert torch.equal(got, plain[order])


@pytest.mark.parametrize("classes", [1, 2])
def test_with_and_without_a_background_column(classes, rng):
    *arguments, scores, score_thr = predictions(rng, num_classes=classes)
    one, other = (paa_gpu.score_voting(*arguments, s, score_thr)[0] for s in (scores, scores[:, :-1]))
    assert torch.equal(one, other)


# --- boxes that stay -----------------------------------------------------------------------------------------------------------


def vote(det, labels, boxes=BOX, scores=SCORES, **options):
    det = torch.tensor(det, dtype=torch.float32).view(-1, 5)
    got, labels = paa_gpu.score_voting(
        det, torch.tensor(labels, dtype=torch.int64), boxes, scores, 0.05, keep_order=True, **options
    )
    return det, got, labels


def test_nothing_to_do():
    for boxes, scores in ((BOX, SCORES), (BOX[:0], SCORES[:0]), (BOX[:0], SCORES[:0, :0])):
        _, got, labels = vote([], [], boxes, scores)
        assert got.shape == (0, 5) and labels.shape == (0,)


@pytest.mark.parametrize(
    ("boxes", "scores"), [(BOX[:0], SCORES[:0]), (BOX, SCORES[:, :0]), (BOX, SCORES[:, 1:])], ids=["no boxes", "no classes", "no candidates"]
)  # fmt: skip
def test_no_candidates(boxes, scores):
    det, got, labels = vote([[1, 2, 30, 40, 0.5], [5, 6, 7, 8, 0.25]], [0, 0], boxes, scores)
    assert torch.equal(got, det) and labels.tolist() == [0, 0]


@pytest.mark.parametrize(("iou_thr", "moved"), [(0.5, False), (0.49, True)])
def test_a_voter_overlaps_by_more_than_the_threshold(iou_thr, moved):
    """IoU 1/2, exactly; and a box that only touches, or lies elsewhere, never votes, even where the threshold is 0."""
    det, boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.5]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    got, _ = paa_gpu.score_voting(det, torch.tensor([0]), boxes, torch.tensor([[0.9]]), 0.05, iou_thr=iou_thr, sigma=1.0)
    assert bool((got != det).any()) == moved
    elsewhere = torch.tensor([[2.0, 0.0, 4.0, 1.0], [90.0, 90.0, 99.0, 99.0]])
    got, _ = paa_gpu.score_voting(det, torch.tensor([0]), elsewhere, torch.full((2, 1), 0.9), 0.05, iou_thr=0.0, sigma=1.0)
    assert torch.equal(got, det)


def test_no_voters_and_labels_that_are_no_class():
    rows = [[600, 600, 700, 700, 0.5], [10, 20, 50, 60, 0.9], [10, 20, 50, 60, 0.8], [10, 20, 50, 60, 0.7], [10, 20, 50, 60, 0.6]]
    det, got, labels = vote(rows, [0, 1, 2, -1, 0])
    assert torch.equal(got[:4], det[:4]) and not torch.equal(got[4], det[4])
    assert labels.tolist() == [0, 1, 2, -1, 0]
    grouped, labels = paa_gpu.score_voting(det, labels, BOX, SCORES, 0.05)
    assert labels.tolist() == [-1, 0, 0, 1, 2] and torch.equal(grouped, got[[3, 0, 4, 1, 2]])


def test_boxes_without_width():
    boxes = torch.tensor([[10.0, 10, 10, 60], [10, 10, 10, 10], [10, 10, 60, 60], [60, 60, 10, 10]])
    det, got, _ = vote([[10, 10, 10, 60, 0.5], [10, 10, 10, 10, 0.5], [10, 10, 60, 60, 0.5]], [0, 0, 0], boxes, torch.ones(4, 1))
    assert torch.equal(got, det)
    arguments, options = (det, torch.zeros(3, dtype=torch.int64), boxes, torch.ones(4, 1), 0.05), {"offset": 1, "sigma": 1.0}
    check(arguments, options, TOLERANCE)
    with_offset, _ = paa_gpu.score_voting(*arguments, **options)
    assert not torch.equal(with_offset, det)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_boxes_that_are_not_finite(value, dtype, rng):
    """They vote for nothing; a detection that is not finite stays; the others do not notice."""
    det, label, boxes, scores, score_thr = predictions(rng, 30, 200, num_classes=1, dtype=dtype)
    bad_boxes, bad_scores = boxes[:16].clone(), scores[:16].clone().fill_(1)
    for i in range(16):
        bad_boxes[i, [side for side in range(4) if i >> side & 1]] = value
    bad = bad_boxes[1:], bad_scores[1:]
    # Boxes over the whole plane, and detections among them.
    everywhere = torch.tensor([[-np.inf, -np.inf, np.inf, np.inf]], dtype=dtype)
    more_boxes, more_scores = torch.cat([bad[0], boxes, everywhere]), torch.cat([bad[1], scores, scores[:1] + 1])
    more_det = torch.cat([torch.cat([det, torch.cat([bad[0], bad[1][:, :1]], 1)]), torch.cat([everywhere, everywhere[:, :1]], 1)])
    wanted, _ = paa_gpu.score_voting(det, label, boxes, scores, score_thr)
    got, _ = paa_gpu.score_voting(more_det, torch.zeros(46, dtype=torch.int64), more_boxes, more_scores, score_thr)
    assert torch.equal(got[30:].nan_to_num(7), more_det[30:].nan_to_num(7))
    assert (got[:30].double() - wanted.double()).abs().max() <= 2 * tolerance(dtype)


def test_scores_that_are_not_numbers_are_no_candidates(rng):
    det, label, boxes, scores, score_thr = predictions(rng)
    wanted, _ = paa_gpu.score_voting(det, label, boxes, scores, score_thr)
    with_nan = torch.where(scores == 0, torch.nan, scores)
    assert torch.equal(paa_gpu.score_voting(det, label, boxes, with_nan, score_thr)[0], wanted)


@pytest.mark.parametrize("sigma", [1e-300, 1e-30, 1e30, float("inf")])
def test_weights_that_vanish_or_do_not_fall(sigma):
    """Without any weight the box stays, of a sigma beyond float32 as well; with a wide one all voters weigh their scores."""
    det, got, _ = vote([[11, 20, 51, 60, 0.5]], [0], sigma=sigma)
    if sigma < 1:
        assert torch.equal(got, det)
        det, got, _ = vote([[10, 20, 50, 60, 0.5]], [0], sigma=sigma)  # its own voter
        assert torch.equal(got, det)
    else:
        x = 10 + 2 * 0.6 / 1.5
        torch.testing.assert_close(got[0], torch.tensor([x, 20, x + 40, 60, 0.5]), rtol=0, atol=1e-4)


def test_boxes_beyond_the_largest_area():
    """Areas of 1e40 are infinite in float32: no IoU, no voters, no NaN."""
    boxes = torch.tensor([[0.0, 0, 1e20, 1e20]])
    det, got, _ = vote([[0, 0, 1e20, 1e20, 0.5]], [0], boxes, torch.ones(1, 1))
    assert torch.equal(got, det)


# --- batches, memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_order", [False, True])
def test_a_batch_equals_its_images(keep_order, rng):
    """Images without detections, without boxes, without both; at the start, in the middle and at the end."""
    shapes = [(0, 0), (0, 50), (20, 300), (5, 0), (0, 0), (60, 700), (1, 1), (3, 40), (0, 9)]
    batch = testing.make_predictions(shapes, rng, num_classes=4)
    got = paa_gpu.score_voting_batch(*batch, 0.05, keep_order=keep_order)
    assert [type(part) for part in got] == [list, list]
    for image, (bboxes, labels) in enumerate(zip(*got, strict=True)):
        one = paa_gpu.score_voting(*(column[image] for column in batch), 0.05, keep_order=keep_order)
        assert torch.equal(bboxes, one[0]) and torch.equal(labels, one[1])


def test_a_batch_of_many_detections(rng):
    """As many as one image would share between threads."""
    batch = testing.make_predictions([(600, 900)] * 5, rng)
    got, _ = paa_gpu.score_voting_batch(*batch, 0.05)
    for image, voted in zip(zip(*batch, strict=True), got, strict=True):
        torch.testing.assert_close(voted, paa_gpu.score_voting(*image, 0.05)[0], rtol=0, atol=1e-4)


def test_a_batch_without_detections(rng):
    bboxes, labels = paa_gpu.score_voting_batch(*testing.make_predictions([(0, 5), (0, 0)], rng), 0.05)
    assert [tuple(t.shape) for t in (*bboxes, *labels)] == [(0, 5), (0, 5), (0,), (0,)]


def test_inputs_stay_and_lie_anywhere(rng, request):
    *tensors, score_thr = predictions(rng)
    plain = paa_gpu.score_voting(*tensors, score_thr)
    spread = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in tensors]
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    for arguments in (spread, turned):
        before = [t.clone() for t in arguments]
        got = paa_gpu.score_voting(*arguments, score_thr)
        # A compiled kernel adds in an order that depends on how its inputs lie; the loops on the CPU do not.
        slack = 0 if request.config.getoption("--execution") == "cpu" else 1e-4
        torch.testing.assert_close(got[0], plain[0], rtol=0, atol=slack)
        assert torch.equal(got[0][:, 4], plain[0][:, 4]) and torch.equal(got[1], plain[1])
        got[0].fill_(5), got[1].fill_(5)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_no_graph_is_recorded(rng):
    det, label, boxes, scores, score_thr = predictions(rng)
    got, _ = paa_gpu.score_voting(det.requires_grad_(), label, boxes.requires_grad_(), scores.requires_grad_(), score_thr)
    assert not got.requires_grad


def test_the_curve_of_the_voters_goes_from_neighbour_to_neighbour():
    """On the CPU candidates are sorted along it, size by size: blocks of neighbours are what a detection can skip."""
    from paa_gpu.cpu.voting import CELLS, CURVE, GROUPS, SIZES

    assert sorted(CURVE) == list(range(GROUPS + 1)) and CURVE[GROUPS] == GROUPS
    for place in CURVE[:GROUPS].reshape(SIZES, CELLS, CELLS):
        cells = np.stack(np.unravel_index(np.argsort(place, axis=None), place.shape), 1)
        assert np.ptp(place) == place.size - 1
        assert (np.abs(np.diff(cells, axis=0)).sum(1) == 1).all()


# --- padded --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_padded_detections(dtype, keep_order, rng):
    """Rows up to the count are those of the list, whatever is behind them, which stays as it is."""
    det, labels, boxes, scores = testing.make_predictions([(9, 300)] * 4, rng, num_classes=3)
    counts = [9, 0, 4, 1]
    det[2][7:] = 0.0
    tensors = [torch.stack(column) for column in (det, labels, boxes, scores)]
    tensors[1] = tensors[1].to(dtype)
    before = [tensor.clone() for tensor in tensors]
    got, got_labels = paa_gpu.score_voting_batch(*tensors, 0.05, keep_order=keep_order, count=torch.tensor(counts))
    columns = [[image[:count] for image, count in zip(column, counts, strict=True)] for column in tensors[:2]]
    wanted = paa_gpu.score_voting_batch(*columns, boxes, scores, 0.05, keep_order=keep_order)
    assert (got.shape, got_labels.dtype) == (tensors[0].shape, dtype)
    for image, count in enumerate(counts):
        assert torch.equal(got_labels[image, :count], wanted[1][image])
        assert torch.equal(got[image, :count], wanted[0][image])
        assert torch.equal(got[image, count:], det[image][count:])
        assert torch.equal(got_labels[image, count:], tensors[1][image, count:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    full = paa_gpu.score_voting_batch(*tensors, 0.05, keep_order=keep_order)
    assert torch.equal(
        full[0], torch.stack(paa_gpu.score_voting_batch(det, labels, boxes, scores, 0.05, keep_order=keep_order)[0])
    )


def test_no_padded_images():
    tensors = torch.ones(0, 3, 5), torch.ones(0, 3).long(), torch.ones(0, 9, 4), torch.ones(0, 9, 2)
    assert paa_gpu.score_voting_batch(*tensors, 0.05, count=torch.ones(0).long())[0].shape == (0, 3, 5)


# --- several pools of candidates -----------------------------------------------------------------------------------------------


def make_pools(rng, images=3, pools=3, dtype=torch.float32):
    """Detections, and of each image several pools of candidates, one of them empty."""
    columns = testing.make_predictions([(9 * i, 200) for i in range(images)], rng, num_classes=4, dtype=dtype)
    cuts = [0, 0, *sorted(rng.integers(1, 200, pools - 2).tolist()), 200]
    split = [[[tensor[a:b] for a, b in itertools.pairwise(cuts)] for tensor in column] for column in columns[2:]]
    columns[1][-1][:2] = torch.tensor([-2, 77])[: len(columns[1][-1])]
    return columns, [*columns[:2], *split]


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pools(keep_order, dtype, rng):
    """As if one tensor held the candidates of all, with scores of 0 up to the threshold, and weighted above it."""
    columns, pooled = make_pools(rng, dtype=dtype)
    weights, wide = [1.0, 0.3, 2.5], torch.float64 if dtype == torch.float64 else torch.float32
    threshold = torch.tensor(0.2).to(dtype)
    scores = []
    for image in pooled[3]:
        parts = [torch.where(score > threshold, score.to(wide) * weight, 0) for score, weight in zip(image, weights, strict=True)]
        scores.append(torch.cat(parts))
    got, labels = paa_gpu.score_voting_batch(*pooled, 0.2, keep_order=keep_order, weights=weights)
    for i, (bboxes, label) in enumerate(zip(got, labels, strict=True)):
        wanted = reference.score_voting(columns[0][i], columns[1][i], columns[2][i], scores[i], 0.0, keep_order=keep_order)
        assert bboxes.dtype == dtype and torch.equal(label, wanted[1]) and torch.equal(bboxes[:, 4].double(), wanted[0][:, 4])
        torch.testing.assert_close(bboxes.double(), wanted[0], rtol=0, atol=tolerance(dtype))


def test_pools_without_weights_vote_as_one(rng):
    columns, pooled = make_pools(rng)
    for a, b in zip(*(paa_gpu.score_voting_batch(*way, 0.05)[0] for way in (columns, pooled)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
    one = paa_gpu.score_voting_batch(*([column[2]] for column in pooled), 0.05)[0][0]
    assert torch.equal(one, paa_gpu.score_voting_batch(*pooled, 0.05)[0][2])


def test_pools_of_nothing():
    det, label = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.5]]), torch.tensor([1])
    none = [torch.zeros(0, 4)] * 2, [torch.zeros(0, 3)] * 2
    got = paa_gpu.score_voting_batch([det, det[:0]], [label, label[:0]], [none[0]] * 2, [none[1]] * 2, 0.05)
    assert torch.equal(got[0][0], det) and got[0][1].shape == (0, 5)
