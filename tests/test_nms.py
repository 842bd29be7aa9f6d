"""Non-maximum suppression: against torchvision class by class, the definitions of the soft forms, and what limits a result."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ensemble_boxes import soft_nms
from torchvision.ops import nms

import paa_gpu
from paa_gpu import data, testing
from paa_gpu._checks import FLOATS, INTEGERS
from paa_gpu.nms import METHODS


def make_image(number, classes, rng, ties=False, extent=300.0):
    """Boxes, scores and labels; with ties, of few different values, some without area."""
    corner = rng.uniform(0, extent, (number, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 80, (number, 2))], 1)
    score = rng.random(number)
    if ties:
        boxes, score = np.round(boxes / 20) * 20, np.round(score * 8) / 8
        boxes[::9, 2] = boxes[::9, 0]
    return (*(torch.from_numpy(part).float() for part in (boxes, score)), torch.from_numpy(rng.integers(classes, size=number)))


def kept(boxes, scores, labels, iou_threshold, score_thr=None, nms_pre=0, max_per_img=0, class_agnostic=False):
    """Indices of what torchvision's `nms` keeps, called for each class, by score and then by index."""
    order = scores.sort(descending=True, stable=True).indices
    if score_thr is not None:
        order = order[scores[order] > score_thr]
    order = order[: nms_pre or None]
    groups = torch.zeros(len(scores), dtype=torch.int64) if class_agnostic else labels.long()
    found = torch.zeros(len(scores), dtype=torch.bool)
    for label in groups[order].unique():
        own = order[groups[order] == label]
        found[own[nms(boxes[own], scores[own], iou_threshold)]] = True
    return order[found[order]][: max_per_img or None]


def assert_rows(got, image, boxes, scores, labels, index):
    """The detections of an image are these of its boxes, and nothing is behind them."""
    count = int(got.count[image])
    assert count == len(index)
    assert torch.equal(got.index[image, :count], index)
    assert torch.equal(got.boxes[image, :count].nan_to_num(7), boxes[index].nan_to_num(7))
    assert torch.equal(got.scores[image, :count].nan_to_num(7), scores[index].nan_to_num(7))
    assert torch.equal(got.labels[image, :count], labels.long()[index])
    assert not got.boxes[image, count:].any() and not got.scores[image, count:].any()
    assert (got.labels[image, count:] == -1).all() and (got.index[image, count:] == -1).all()


def assert_alone(got, image, alone):
    """An image of a batch got what it gets alone, and padding behind it; `got` and `alone` end in the counts."""
    count = int(alone[-1])
    assert int(got[-1][image]) == count
    for of_batch, own in zip(got[:-1], alone[:-1], strict=True):
        assert torch.equal(of_batch[image, :count], own[0, :count])
        assert (of_batch[image, count:] == (0 if own.is_floating_point() else -1)).all()


def check_alone(images, with_labels, **options):
    """Each image of a list gets what it gets alone. Returns the numbers of detections."""
    boxes, scores, labels = (list(column) for column in zip(*images, strict=True))
    if not with_labels:
        scores, labels = [torch.stack([score, score.flip(0)], 1) for score in scores], None
    got = paa_gpu.batched_nms(boxes, scores, labels, 0.5, **options)
    for i in range(len(images)):
        own = slice(i, i + 1)
        assert_alone(got, i, paa_gpu.batched_nms(boxes[own], scores[own], labels and labels[own], 0.5, **options))
    return got.count.tolist()


def check(images, iou_threshold=0.5, **options):
    """A list of images, and where they are of one size the tensors of them."""
    columns = [list(column) for column in zip(*images, strict=True)]
    ways = [columns] if len({len(image[1]) for image in images}) > 1 else [columns, [torch.stack(column) for column in columns]]
    for way in ways:
        got = paa_gpu.batched_nms(*way, iou_threshold, **options)
        room = options.get("max_per_img") or max(len(image[1]) for image in images)
        assert got.scores.shape == (len(images), room) and got.boxes.dtype == images[0][0].dtype
        for i, image in enumerate(images):
            assert_rows(got, i, *image, kept(*image, iou_threshold, **options))


# --- the hard form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [1, 5])
def test_a_batch(classes, ties, rng):
    """Thresholds that no float32 holds, those of many IoUs of whole numbers among them."""
    for iou_threshold in (0.0, 0.2, 0.6, 1 / 3, 1.0):
        check([make_image(70, classes, rng, ties) for _ in range(3)], iou_threshold)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("options", [{}, {"score_thr": 0.5}, {"max_per_img": 7}, {"nms_pre": 20}, {"score_thr": 0.3, "nms_pre": 50, "max_per_img": 90}])  # fmt: skip
def test_limits(options, class_agnostic, rng):
    images = [make_image(number, 3, rng, ties=True) for number in (90, 0, 1, 40)]
    check(images, class_agnostic=class_agnostic, **options)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("numbers", [(0, 9), (9, 0), (0, 9, 0, 0, 4, 0)], ids=str)
def test_images_without_boxes(numbers, method, with_labels, rng):
    """Wherever they are in a list, the others get what they get alone."""
    counts = check_alone([make_image(number, 2, rng) for number in numbers], with_labels, method=method)
    assert [count > 0 for count in counts] == [number > 0 for number in numbers]


def test_many_of_one_class(rng):
    """More than one chunk of what is kept."""
    check([make_image(600, 1, rng, extent=3000) for _ in range(3)])


def test_values_that_are_not_finite(rng):
    """NaN scores come first, and a box with NaN suppresses nothing, as in torchvision."""
    boxes, scores, labels = make_image(60, 2, rng, ties=True)
    scores[[3, 9]], scores[[4, 20]], scores[5] = torch.nan, -torch.inf, torch.inf
    scores[[6, 7]] = torch.tensor([0.0, -0.0])
    boxes[10:14] = boxes[10]
    for i in range(1, 16):
        boxes[10 + i, [side for side in range(4) if i >> side & 1]] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    check([(boxes, scores, labels)] * 2)
    check([(boxes, scores, labels)], score_thr=-torch.inf, class_agnostic=True)


def test_boxes_without_area_stay():
    """Even the same one twice: 0 / 0 exceeds no threshold."""
    boxes = torch.tensor([[5.0, 5, 5, 9]]).repeat(3, 1)
    got = paa_gpu.batched_nms(boxes[None], torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int64), 0.5)
    assert got.index.tolist() == [[0, 1, 2]]


def test_equal_scores_by_index():
    boxes = torch.arange(5.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    labels = torch.tensor([1, 0, 1, 0, 2])
    got = paa_gpu.batched_nms(boxes[None], torch.full((1, 5), 0.5), labels[None], 0.5, max_per_img=4)
    assert got.index.tolist() == [[0, 1, 2, 3]]
    scores = torch.full((1, 5, 2), 0.5)
    got = paa_gpu.batched_nms(boxes[None], scores, None, 0.5, max_per_img=3)
    assert (got.index.tolist(), got.labels.tolist()) == ([[0, 0, 1]], [[0, 1, 0]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, rng):
    """Narrow ones are compared as float32, a threshold is rounded as torch rounds it."""
    boxes, scores, labels = make_image(80, 2, rng)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    scores[:3] = 0.05
    got = paa_gpu.batched_nms([boxes], [scores], [labels], 0.4, score_thr=0.05)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    index = kept(boxes.to(wide), scores.to(wide), labels, 0.4, score_thr=float(torch.tensor(0.05).to(dtype)))
    assert_rows(got, 0, boxes, scores, labels, index)
    assert 0 not in index and got.scores.dtype == dtype


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_label_dtypes(dtype, rng):
    boxes, scores, labels = make_image(40, 3, rng)
    check([(boxes, scores, (labels + 100).to(dtype))])


def test_labels_are_any_integers(rng):
    boxes, scores, labels = make_image(40, 3, rng)
    check([(boxes, scores, torch.tensor([-(2**62), 2**62, -1])[labels])] * 2)


def test_a_score_for_every_class(rng):
    """Each box is a candidate of each class whose score is above the threshold."""
    columns = testing.make_predictions([(0, 60), (0, 60)], rng, num_classes=4, size=200.0)
    boxes, scores = torch.stack(columns.mlvl_bboxes), torch.stack(columns.mlvl_nms_scores)[..., :4]
    for options in ({}, {"max_per_img": 9}, {"nms_pre": 30}, {"class_agnostic": True, "max_per_img": 50}):
        got = paa_gpu.batched_nms(boxes, scores, None, 0.6, score_thr=0.05, **options)
        assert torch.equal(got.count, paa_gpu.batched_nms(list(boxes), list(scores), None, 0.6, score_thr=0.05, **options).count)
        for i in range(2):
            flat, labels = boxes[i].repeat_interleave(4, 0), torch.arange(4).repeat(60)
            index = kept(flat, scores[i].flatten(), labels, 0.6, score_thr=0.05, **options)
            count = len(index)
            assert got.count[i] == count > 4
            assert torch.equal(got.index[i, :count], index // 4) and torch.equal(got.labels[i, :count], index % 4)
            assert torch.equal(got.scores[i, :count], scores[i].flatten()[index])


@pytest.mark.parametrize("path", data.voting_paths()[::4] + data.voting_paths()[-1:], ids=lambda path: path.stem)
def test_recorded_predictions(path):
    """What the published head kept: its detections, before they were voted on."""
    for call in data.load_voting(path):
        det, _, boxes, scores, score_thr = call.arguments
        scores = scores[:, : scores.shape[1] - (not scores[:, -1].any())]
        got = paa_gpu.batched_nms(boxes[None], scores[None], None, 0.6, score_thr=score_thr, max_per_img=len(det))
        index = kept(
            boxes.repeat_interleave(scores.shape[1], 0), scores.flatten(), torch.arange(scores.shape[1]).repeat(len(boxes)),
            0.6, score_thr, max_per_img=len(det),
        )  # fmt: skip
        assert torch.equal(got.index[0, : got.count[0]], index // scores.shape[1])
        assert set(map(tuple, det.tolist())) == set(map(tuple, torch.cat([got.boxes[0], got.scores[0, :, None]], 1).tolist()))


# --- the soft forms ------------------------------------------------------------------------------------------------------------


def soften(boxes, scores, labels, method, iou_threshold, sigma=0.5, min_score=1e-3):
    """mmcv's loop of `soft_nms` for each class, in float64: indices and decayed scores."""
    rows = []
    for label in np.unique(labels):
        left = [(float(scores[i]), i) for i in np.flatnonzero(labels == label)]
        while left:
            best = max(left, key=lambda pair: (pair[0], -pair[1]))
            left.remove(best)
            rows.append(best)
            decayed = []
            for score, i in left:
                low, high = np.maximum(boxes[i, :2], boxes[best[1], :2]), np.minimum(boxes[i, 2:], boxes[best[1], 2:])
                overlap = np.prod(np.maximum(high - low, 0))
                areas = [np.prod(box[2:] - box[:2]) for box in (boxes[i], boxes[best[1]])]
                with np.errstate(invalid="ignore"):  # 0 / 0 where both have no area
                    iou = overlap / (sum(areas) - overlap)
                weight = np.exp(-(iou**2) / sigma) if method == "gaussian" else 1 - iou if iou > iou_threshold else 1
                decayed.append((score * weight, i))
            left = [pair for pair in decayed if pair[0] > min_score]
    return sorted(rows, key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_soft_forms(method, class_agnostic, rng):
    """Order and decayed scores of the definition, with room for all and for some. Of equal scores, the first comes first; those that
    exponentials have made are equal but for their last bit."""
    usual = ((1, {}), (3, {"sigma": 0.1, "min_score": 0.2}), (3, {"max_per_img": 11}))
    for (classes, options), ties in itertools.product(usual, {False, method == "linear"}):
        boxes, scores, labels = (part.double() for part in make_image(80, classes, rng, ties=ties, extent=150))
        got = paa_gpu.batched_nms(
            [boxes], [scores], [labels.long()], 0.3, method=method, class_agnostic=class_agnostic, **options
        )
        limits = {name: value for name, value in options.items() if name != "max_per_img"}
        groups = labels * 0 if class_agnostic else labels
        wanted = soften(boxes.numpy(), scores.numpy(), groups.numpy(), method, 0.3, **limits)[: options.get("max_per_img")]
        assert got.index[0, : got.count[0]].tolist() == [i for _, i in wanted]
        np.testing.assert_allclose(got.scores[0, : got.count[0]], [score for score, _ in wanted], rtol=1e-12)
        assert torch.equal(got.labels[0, : got.count[0]], labels[got.index[0, : got.count[0]]].long())


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_the_soft_forms_of_ensemble_boxes(method, rng):
    boxes, scores, labels = (part.double() for part in make_image(60, 3, rng, extent=150))
    got = paa_gpu.batched_nms([boxes], [scores], [labels.long()], 0.4, method=method)
    number = {"linear": 1, "gaussian": 2}[method]
    theirs = soft_nms([boxes.numpy() / 256], [scores.numpy()], [labels.numpy()], number, 0.4, 0.5, 1e-3)
    count = int(got.count[0])
    rows = [got.boxes[0, :count].numpy() / 256, got.labels[0, :count, None].numpy()]
    wanted = np.concatenate([theirs[0], theirs[2][:, None]], 1)
    assert set(map(tuple, np.concatenate(rows, 1).tolist())) == set(map(tuple, wanted.tolist()))


def test_soft_forms_of_what_decays_or_does_not():
    """A score at the least one is none, even the first; boxes without area, or with NaN, weaken nothing."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5], [5, 5, 5, 5], [torch.nan, 0, 10, 10]])
    scores = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.3])
    for method in ("linear", "gaussian"):
        got = paa_gpu.batched_nms([boxes], [scores], [torch.zeros(5).long()], 0.3, method=method, min_score=0.3)
        assert got.index[0, : got.count[0]].tolist() == [0, 2, 3]
        for alone in (scores[-1:], scores[-1:] * torch.nan):
            got = paa_gpu.batched_nms(boxes[None, :1], alone[None], torch.zeros(1, 1).long(), 0.3, method=method, min_score=0.3)
            assert got.count.item() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scores_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("boxes_dtype", FLOATS, ids=str)
def test_boxes_and_scores_of_different_dtypes(boxes_dtype, scores_dtype, method, rng):
    """Each keeps its own; what is compared, is so in the wider one."""
    boxes, scores, labels = make_image(30, 2, rng, extent=100)
    boxes, scores = boxes.to(boxes_dtype), scores.to(scores_dtype)
    got = paa_gpu.batched_nms([boxes], [scores], [labels], 0.4, method=method)
    wide = torch.float64 if torch.float64 in (boxes_dtype, scores_dtype) else torch.float32
    wanted = paa_gpu.batched_nms([boxes.to(wide)], [scores.to(wide)], [labels], 0.4, method=method)
    assert torch.equal(got.index, wanted.index) and torch.equal(got.count, wanted.count)
    assert got.count > 0 and (got.count < 30 or method != "hard")
    assert (got.boxes.dtype, got.scores.dtype) == (boxes_dtype, scores_dtype)
    assert torch.equal(got.boxes.to(wide), wanted.boxes)
    assert torch.equal(got.scores, wanted.scores.float().to(scores_dtype) if scores_dtype != wide else wanted.scores)


@pytest.mark.parametrize("sigma", [5e-324, 1e-300, 1e-39, 1e-20])
def test_a_tiny_sigma_leaves_what_overlaps_nothing(sigma):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    for dtype in (torch.float32, torch.float64):
        column = [boxes.to(dtype)], [torch.tensor([0.9, 0.8, 0.7], dtype=dtype)], [torch.zeros(3).long()]
        got = paa_gpu.batched_nms(*column, 0.5, method="gaussian", sigma=sigma)
        assert got.index[0, : got.count[0]].tolist() == [0, 2]
        assert torch.equal(got.scores[0, :2], column[1][0][[0, 2]])


def test_the_linear_form_at_its_threshold():
    """An IoU of exactly the threshold weakens nothing here, and in mmcv it does."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]), torch.tensor([0.9, 0.8])
    for iou_threshold, second in ((0.5, 0.8), (0.49, 0.4)):
        got = paa_gpu.batched_nms([boxes], [scores], [torch.zeros(2).long()], iou_threshold, method="linear")
        torch.testing.assert_close(got.scores[0], torch.tensor([0.9, second]))


def test_soft_forms_take_the_best_first(rng):
    """`nms_pre` counts what the scores were before."""
    boxes, scores, labels = make_image(50, 2, rng, ties=True)
    best = scores.sort(descending=True, stable=True).indices[:20]
    for method in ("linear", "gaussian"):
        got = paa_gpu.batched_nms([boxes], [scores], [labels], 0.3, method=method, nms_pre=20)
        lower = torch.where(torch.isin(torch.arange(50), best), scores, 0)
        wanted = paa_gpu.batched_nms([boxes], [lower], [labels], 0.3, method=method)
        assert torch.equal(got.index, wanted.index) and torch.equal(got.scores, wanted.scores)


# --- what does not change ------------------------------------------------------------------------------------------------------


def test_strided_inputs_are_not_modified(rng):
    boxes, scores, labels = (torch.stack(column) for column in zip(*(make_image(50, 3, rng) for _ in range(2)), strict=True))
    wanted = paa_gpu.batched_nms(boxes, scores, labels, 0.4)
    spread = [torch.stack([t, torch.ones_like(t)], -1)[..., 0] for t in (boxes, scores, labels)]
    turned = [boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.t().contiguous().t(), labels.t().contiguous().t()]
    for way in (spread, turned):
        before = [t.clone() for t in way]
        for got, other in zip(paa_gpu.batched_nms(*way, 0.4), wanted, strict=True):
            assert torch.equal(got, other)
        assert all(torch.equal(a, b) for a, b in zip(way, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_nothing(method):
    """No images, no boxes, no classes: rows of padding."""
    for images, boxes, classes in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        got = paa_gpu.batched_nms(
            torch.ones(images, boxes, 4), torch.ones(images, boxes, classes), None, 0.5, method=method, max_per_img=4
        )
        assert got.boxes.shape == (images, 4, 4) and got.count.tolist() == [0] * images
        assert (got.labels == -1).all()


def test_inputs_may_need_gradients():
    boxes, scores = torch.rand(1, 3, 4, requires_grad=True), torch.rand(1, 3, 2, requires_grad=True)
    assert not paa_gpu.batched_nms(boxes, scores, None, 0.5).scores.requires_grad
