"""Weighted boxes fusion against ensemble-boxes: all its options, ties, boxes out of order, and what is left out."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from ensemble_boxes import ensemble_boxes_wbf

import paa_gpu
from paa_gpu._checks import FLOATS, INTEGERS
from paa_gpu.fusion import CONF_TYPES


def make_models(numbers, rng, classes=3, objects=8, noise=0.02, dtype=torch.float64):
    """The boxes of one image: for each model so many boxes around the same objects, as three lists of tensors."""
    corner = rng.uniform(0, 0.7, (objects, 2))
    truth = np.concatenate([corner, corner + rng.uniform(0.05, 0.3, (objects, 2))], 1)
    label_of = rng.integers(classes, size=objects)
    columns = [], [], []
    for number in numbers:
        which = rng.integers(objects, size=number)
        boxes = truth[which] + rng.normal(0, noise, (number, 4))
        label = np.where(rng.random(number) < 0.9, label_of[which], rng.integers(classes, size=number))
        for column, part in zip(columns, (boxes, rng.random(number), label), strict=True):
            column.append(torch.from_numpy(part))
    return [part.to(dtype) for part in columns[0]], [part.to(dtype) for part in columns[1]], columns[2]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:ensemble_boxes", "ignore::RuntimeWarning:ensemble_boxes")


class Stable(np.ndarray):
    """An array whose sort is stable: what ensemble-boxes does with equal scores is otherwise chance."""

    def argsort(self, *args, **kwargs):
        return np.asarray(self).argsort(kind="stable")


class StableNumpy:
    """numpy, whose arrays that ensemble-boxes sorts are such."""

    def __getattr__(self, name):
        return getattr(np, name)

    def array(self, *args):
        return np.array(*args).view(Stable)

    def concatenate(self, *args, **kwargs):
        return np.concatenate(*args, **kwargs).view(Stable)


@pytest.fixture
def stable(monkeypatch):
    monkeypatch.setattr(ensemble_boxes_wbf, "np", StableNumpy())


@pytest.fixture(autouse=True)
def promotion_of_numpy_2():
    """Before it, numpy rounded the sum of the scores to float32 where a float32 array is divided by it."""
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        yield
        return
    before = np._get_promotion_state()
    np._set_promotion_state("weak")
    yield
    np._set_promotion_state(before)


def fuse_published(boxes, scores, labels, *options):
    columns = [[part.double().numpy() for part in column] for column in (boxes, scores)]
    got = ensemble_boxes_wbf.weighted_boxes_fusion(*columns, [part.numpy() for part in labels], *options)
    return [np.asarray(part) for part in got]


def assert_fused(got, image, wanted, dtypes=(torch.float64, torch.float64)):
    count = int(got.count[image])
    assert count == len(wanted[1])
    for part, other, dtype in zip(got[:2], wanted[:2], dtypes, strict=True):
        assert part.dtype == dtype and torch.equal(
            part[image, :count].nan_to_num(7), torch.from_numpy(other).to(dtype).nan_to_num(7)
        )
        assert not part[image, count:].any()
    assert got.labels[image, :count].tolist() == wanted[2].tolist() and (got.labels[image, count:] == -1).all()


def check(images, *options, least=1):
    """Every bit of float64, image by image."""
    got = paa_gpu.weighted_boxes_fusion(*map(list, zip(*images, strict=True)), *options)
    assert got.scores.shape == (len(images), max(sum(map(len, image[1])) for image in images))
    for i, image in enumerate(images):
        assert_fused(got, i, fuse_published(*image, *options))
    assert int(got.count.sum()) >= least


@pytest.mark.parametrize("models", [1, 2, 3, 6])
@pytest.mark.parametrize("conf_type", CONF_TYPES)
def test_a_batch(models, conf_type, rng):
    images = [make_models(rng.integers(0, 40, models), rng) for _ in range(3)]
    weights = rng.uniform(0.1, 3, models).tolist()
    for given, overflow in itertools.product((None, weights), (False, True)):
        check(images, given, 0.5, 0.2, conf_type, overflow, least=10 * models)


@pytest.mark.parametrize("iou_thr", [0.0, 0.3, 0.55, 0.9, 1.0])
def test_thresholds(iou_thr, rng):
    images = [make_models([30, 30, 30], rng, classes=2) for _ in range(2)]
    for skip_box_thr in (-1.0, 0.0, 0.6):
        check(images, [2, 1, 0.5], iou_thr, skip_box_thr)


def test_more_clusters_than_a_chunk_has(rng):
    check([make_models([300, 300], rng, classes=1, objects=200)], None, 0.6, least=100)


def test_equal_scores(stable, rng):
    """The later model, then the later box; of fused boxes the later class, then the later cluster."""
    images = []
    for _ in range(3):
        boxes, scores, labels = make_models([40, 30, 50], rng)
        images.append((boxes, [(score * 4).round() / 4 for score in scores], labels))
    for conf_type in CONF_TYPES:
        check(images, None, 0.4, 0.0, conf_type)
    far = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.6, 0.6], [0.8, 0.8, 0.9, 0.9]], dtype=torch.float64)
    image = [far, far + 0.05], [torch.full((3,), 0.5).double()] * 2, [torch.tensor([7, 5, 7]), torch.tensor([5, 7, 9])]
    check([image, image], None, 0.9, least=12)


def test_boxes_out_of_order_outside_and_without_area():
    boxes = torch.tensor([
        [0.5, 0.6, 0.1, 0.2], [-1.0, 0.1, 0.4, 2.0], [-torch.inf, 0.0, torch.inf, 0.5], [0.3, 0.3, 0.3, 0.9], [1.2, 0.1, 1.5, 0.9],
        [0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1e-200, 1e-200],
    ]).double()  # fmt: skip
    boxes[6, 2:] = 1e-200
    image = [boxes], [torch.linspace(0.9, 0.3, 7).double()], [torch.zeros(7).long()]
    check([image], None, 0.5, least=3)


def test_scores_of_zero(stable):
    """Whatever is fused with nothing but them has no place: NaN, with which all that follow are fused."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.52], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.5, 0.51]]).double()
    image = (
        [boxes, boxes[:2]],
        [torch.zeros(4).double(), torch.tensor([0.4, 0.0]).double()],
        [torch.zeros(4).long(), torch.ones(2).long()],
    )
    check([image], least=2)
    assert paa_gpu.weighted_boxes_fusion(*([column] for column in image)).boxes.isnan().any()


def test_boxes_that_end_a_little_beyond_the_image_raise_no_warning():
    image = [torch.tensor([[0.5, 0.5, 1.01, 1.2]])], [torch.ones(1)], [torch.zeros(1).long()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paa_gpu.weighted_boxes_fusion(*([column] for column in image)).boxes.tolist() == [[[0.5, 0.5, 1, 1]]]


def test_boxes_in_pixels_raise_a_warning():
    """Clipped, these have no area, and nothing is left."""
    image = [torch.tensor([[10.0, 20, 50, 40], [torch.nan, 0, 1, 1]])], [torch.ones(2)], [torch.zeros(2).long()]
    with pytest.warns(UserWarning, match="^`boxes` has a corner of 50, .* divide boxes in pixels"):
        assert paa_gpu.weighted_boxes_fusion(*([column] for column in image)).count.item() == 0


def test_what_is_not_finite_is_left_out(rng):
    boxes, scores, labels = make_models([20, 20], rng)
    wanted = paa_gpu.weighted_boxes_fusion([boxes], [scores], [labels])
    odd = torch.rand(8, 4).double()
    odd[[0, 1, 2, 3], [0, 1, 2, 3]] = torch.nan
    # Clusters keep sums as float32, in which the last two are infinite.
    odd_scores = torch.tensor([0.9, 0.9, 0.9, 0.9, torch.nan, torch.inf, 1e39, -1e39], dtype=torch.float64)
    more = (
        [boxes[0], torch.cat([boxes[1], odd])],
        [scores[0], torch.cat([scores[1], odd_scores])],
        [labels[0], torch.cat([labels[1], labels[1][:8]])],
    )
    got = paa_gpu.weighted_boxes_fusion(*([column] for column in more))
    for part, other in zip(got[:3], wanted[:3], strict=True):
        assert torch.equal(part[:, : other.shape[1]], other)
    assert torch.equal(got.count, wanted.count)


def test_many_models(rng):
    """More than seven: numpy adds weights in another order."""
    boxes, scores, labels = make_models([5] * 64, rng)
    for conf_type in CONF_TYPES:
        options = rng.uniform(0.5, 2, 64).tolist(), 0.5, 0.0, conf_type
        got, wanted = (
            paa_gpu.weighted_boxes_fusion([boxes], [scores], [labels], *options),
            fuse_published(boxes, scores, labels, *options),
        )
        np.testing.assert_allclose(got.scores[0, : got.count[0]], wanted[1], rtol=1e-14)
        assert np.array_equal(got.boxes[0, : got.count[0]], wanted[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, stable, rng):
    """float64 inside; the result is rounded, as is the threshold before."""
    image = make_models([30, 20], rng, dtype=dtype)
    image[1][0][:3] = torch.tensor(0.3)
    got = paa_gpu.weighted_boxes_fusion(*([column] for column in image), skip_box_thr=0.3)
    threshold = float(torch.tensor(0.3).to(dtype)) if dtype != torch.float64 else 0.3
    wanted = fuse_published(*image, None, 0.55, threshold)
    count = int(got.count[0])
    assert got.boxes.dtype == got.scores.dtype == dtype and count == len(wanted[1])
    # By way of float32, which half and bfloat16 are rounded from.
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(got.boxes[0, :count], torch.from_numpy(wanted[0]).to(narrow).to(dtype))
    assert torch.equal(got.scores[0, :count], torch.from_numpy(wanted[1]).to(narrow).to(dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_label_dtypes(dtype, rng):
    boxes, scores, labels = make_models([20, 20], rng)
    check([(boxes, scores, [(label + 100).to(dtype) for label in labels])])


def test_labels_are_any_integers(rng):
    boxes, scores, labels = make_models([20, 20], rng)
    got = paa_gpu.weighted_boxes_fusion([boxes], [scores], [[torch.tensor([-(2**62), 2**62 + 1, -1])[label] for label in labels]])
    wanted = paa_gpu.weighted_boxes_fusion([boxes], [scores], [labels])
    assert torch.equal(got.scores, wanted.scores) and got.labels.unique().tolist() == [-(2**62), -1, 2**62 + 1]


def test_nothing():
    none = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    some = torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([0.5]), torch.tensor([3])
    got = paa_gpu.weighted_boxes_fusion(*([[part], [part]] for part in none))
    assert got.boxes.shape == (2, 0, 4) and got.count.tolist() == [0, 0]
    images = [none, some], [none, none], [some, some]
    got = paa_gpu.weighted_boxes_fusion(*([[model[i] for model in image] for image in images] for i in range(3)))
    assert got.count.tolist() == [1, 0, 1] and got.labels.tolist() == [[3, -1], [-1, -1], [3, -1]]
    assert got.scores.tolist() == [[0.25, 0], [0, 0], [0.5, 0]]
    got = paa_gpu.weighted_boxes_fusion(*([[part]] for part in some), skip_box_thr=0.6)
    assert got.count.tolist() == [0] and got.labels.tolist() == [[-1]]


def test_inputs_are_not_modified_and_may_be_strided(rng):
    boxes, scores, labels = make_models([20, 20], rng)
    wanted = paa_gpu.weighted_boxes_fusion([boxes], [scores], [labels])
    spread = [
        [torch.stack([part, part * 0], -1)[..., 0].requires_grad_(part.is_floating_point()) for part in column]
        for column in (boxes, scores, labels)
    ]
    before = [part.clone() for column in spread for part in column]
    got = paa_gpu.weighted_boxes_fusion(*([column] for column in spread))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)) and not got.boxes.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((part for column in spread for part in column), before, strict=True))
