"""What must hold for any input: properties of the public functions, on random batches that hypothesis varies and shrinks.

`make fuzz` takes many more of them, at least 100,000 ground truths, and prints its seed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fusion import make_models
from test_head import make_features, make_head, make_targets
from test_nms import assert_alone, check, check_alone, make_image

import paa_gpu
from paa_gpu import reference, testing
from paa_gpu.em import COVARIANCE_TYPES
from paa_gpu.fusion import CONF_TYPES
from paa_gpu.nms import METHODS
from paa_gpu.separation import SCHEMES

LEVELS = (600, 150, 40, 12, 3)

batches = st.builds(
    lambda num_gts, shapes, seed, dtype: testing.make_batch(
        num_gts, np.random.default_rng(seed), shapes, (0, 40), level_sizes=LEVELS, num_classes=4, dtype=dtype
    ),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.lists(st.sampled_from(testing.LOSS_SHAPES), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.float64]),
)
options = st.fixed_dictionaries(
    {
        "topk": st.integers(1, 20),
        "covariance_type": st.sampled_from(COVARIANCE_TYPES),
        "separation": st.sampled_from(list(SCHEMES)),
        "singleton": st.sampled_from(["background", "positive"]),
        "precision": st.sampled_from(["float64", "float32"]),
    }
)
orders = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def ground_truths(request):
    """How many the properties of this module were tried on; `make fuzz` shows it, and the seed that repeats the run."""
    seen = [0]
    yield seen
    print(f"\n{seen[0]:,} ground truths, seed {request.config.getoption('--hypothesis-seed')}")


def reassign(batch, chosen, **changed):
    return paa_gpu.paa_reassign_batch(*batch.arguments, **{**batch.options, **chosen, **changed})


def assert_same(ours, theirs):
    """Two results of the same images."""
    for name in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(ours.num_pos, theirs.num_pos)
    for a, b in zip(ours.fit[:7], theirs.fit[:7], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def shuffled(order, size):
    places = list(range(size))
    order.shuffle(places)
    return places


@given(batches, options, orders)
def test_permuted_images_permute_the_result(ground_truths, batch, chosen, order):
    ground_truths[0] += sum(batch.num_gts)
    images = shuffled(order, len(batch.num_gts))
    permuted = batch._replace(
        **{name: [getattr(batch, name)[image] for image in images] for name in batch._fields if name != "num_classes"}
    )
    got, wanted = reassign(permuted, chosen), reassign(batch, chosen)
    for name in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        for ours, image in zip(getattr(got, name), images, strict=True):
            assert torch.equal(ours, getattr(wanted, name)[image])
    assert torch.equal(got.num_pos, wanted.num_pos[images])
    rows = [row for image in images for row in (wanted.fit_image == image).nonzero().flatten().tolist()]
    assert torch.equal(got.fit.n_iter, wanted.fit.n_iter[rows])
    assert torch.equal(got.fit_gt, wanted.fit_gt[rows])


@given(batches, options)
def test_a_batch_equals_its_images_one_by_one(ground_truths, batch, chosen):
    ground_truths[0] += sum(batch.num_gts)
    out = reassign(batch, chosen)
    for image, arguments in enumerate(zip(*batch.arguments, strict=True)):
        *targets, num_pos = paa_gpu.paa_reassign(*arguments, num_classes=batch.num_classes, **chosen)
        for ours, theirs in zip(targets, (out.label, out.label_weight, out.bbox_weight), strict=True):
            assert torch.equal(ours, theirs[image])
        assert num_pos == out.num_pos[image]


@given(batches, options)
def test_targets_are_those_of_scikit_learns_fits(ground_truths, batch, chosen):
    ground_truths[0] += sum(batch.num_gts)
    published = {"num_classes": batch.num_classes, **{name: value for name, value in chosen.items() if name != "precision"}}
    for arguments in zip(*batch.arguments, strict=True):
        got = paa_gpu.paa_reassign(*arguments, precision="float64", **published)
        *wanted, num_pos = reference.paa_reassign(*arguments, **published)
        assert all(map(torch.equal, got[:3], wanted))
        assert got[3] == num_pos


@given(batches, options, orders)
def test_renumbered_ground_truths_change_no_target(ground_truths, batch, chosen, order):
    ground_truths[0] += sum(batch.num_gts)
    numbers = [torch.tensor(shuffled(order, num_gt), dtype=torch.int64) for num_gt in batch.num_gts]
    renumbered = batch._replace(pos_gt_inds=[new[old] for new, old in zip(numbers, batch.pos_gt_inds, strict=True)])
    got, wanted = reassign(renumbered, chosen), reassign(batch, chosen)
    rows = torch.cat([sum(batch.num_gts[:image]) + new for image, new in enumerate(numbers)])
    assert torch.equal(got.fit.n_iter[rows], wanted.fit.n_iter)
    for name in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        for ours, theirs in zip(getattr(got, name), getattr(wanted, name), strict=True):
            assert torch.equal(ours, theirs)


@given(batches, options, orders)
def test_the_order_of_potential_positives_changes_no_target(ground_truths, batch, chosen, order):
    ground_truths[0] += sum(batch.num_gts)
    orders_of = [torch.tensor(shuffled(order, len(inds)), dtype=torch.int64) for inds in batch.pos_inds]
    permuted = batch._replace(
        **{
            name: [values[places] for values, places in zip(getattr(batch, name), orders_of, strict=True)]
            for name in ("pos_losses", "pos_inds", "pos_gt_inds")
        }
    )
    got, wanted = reassign(permuted, chosen), reassign(batch, chosen)
    masks = {
        name: [mask[places] for mask, places in zip(getattr(wanted, name), orders_of, strict=True)]
        for name in ("positive", "ignored")
    }
    assert_same(got, wanted._replace(**masks))


@given(batches, options, st.integers(-3, 3))
def test_a_constant_on_the_losses_changes_no_positive(ground_truths, batch, chosen, constant):
    """On losses of a grid so coarse that the sums are exact, every bit but that of the means stays: no ties to leave out."""
    ground_truths[0] += sum(batch.num_gts)
    coarse = [(losses.clamp(max=64) * 1024).round() / 1024 for losses in batch.pos_losses]
    got = reassign(batch._replace(pos_losses=[losses + constant for losses in coarse]), chosen)
    wanted = reassign(batch._replace(pos_losses=coarse), chosen)
    means = torch.where(wanted.fit.valid[:, None], wanted.fit.means, got.fit.means)
    torch.testing.assert_close(got.fit.means - constant * got.fit.valid[:, None], means, rtol=0, atol=1e-4, equal_nan=True)
    assert_same(got._replace(fit=got.fit._replace(means=wanted.fit.means)), wanted)


@given(batches, options)
def test_more_than_all_candidates_are_all(ground_truths, batch, chosen):
    ground_truths[0] += sum(batch.num_gts)
    assert_same(reassign(batch, chosen, topk=40), reassign(batch, chosen, topk=10**9))


@given(batches, options, st.sampled_from([0.25, 2.0, 1024.0]))
def test_weights_scale(ground_truths, batch, chosen, scale):
    ground_truths[0] += sum(batch.num_gts)
    scaled = batch._replace(bbox_weight=[weight * scale for weight in batch.bbox_weight])
    got, wanted = reassign(scaled, chosen), reassign(batch, chosen)
    assert_same(got, wanted._replace(bbox_weight=[weight * scale for weight in wanted.bbox_weight]))


@given(batches, options)
def test_positives_are_candidates_of_their_own_ground_truth(ground_truths, batch, chosen):
    ground_truths[0] += sum(batch.num_gts)
    out = reassign(batch, chosen)
    for image, (losses, inds, gts) in enumerate(zip(batch.pos_losses, batch.pos_inds, batch.pos_gt_inds, strict=True)):
        found = paa_gpu.select_candidates(losses, inds, gts, LEVELS, num_gt=batch.num_gts[image], topk=chosen["topk"])
        candidate = torch.zeros(len(inds), dtype=torch.bool)
        for gt, (index, count) in enumerate(zip(found.index, found.count, strict=True)):
            assert (gts[index[:count]] == gt).all()
            candidate[index[:count]] = True
        assert not (out.positive[image] & ~candidate).any()
        assert not (out.ignored[image] & (~candidate | out.positive[image])).any()
        assert out.num_pos[image] == out.positive[image].sum()
        background = out.label[image][inds] == batch.num_classes
        assert torch.equal(background | out.positive[image], torch.ones(len(inds), dtype=torch.bool))


rows = st.builds(
    lambda shape, size, seed: torch.from_numpy(testing.make_losses(shape, size, np.random.default_rng(seed))),
    st.sampled_from([shape for shape in testing.LOSS_SHAPES if shape != "one"]),
    st.integers(2, 70),
    st.integers(0, 2**32),
)


@given(st.lists(rows, min_size=1, max_size=5), st.sampled_from(COVARIANCE_TYPES))
def test_responsibilities_sum_to_one(ground_truths, x, covariance_type):
    ground_truths[0] += len(x)
    fit = paa_gpu.fit_gmm_1d(x, covariance_type=covariance_type)
    assert fit.valid.all()
    torch.testing.assert_close(fit.weights.sum(1), torch.ones(len(x), dtype=torch.float64), rtol=0, atol=1e-12)
    for probability in fit.predict_proba(x):
        torch.testing.assert_close(probability.sum(1), torch.ones(len(probability), dtype=torch.float64), rtol=0, atol=1e-12)
        assert ((probability >= 0) & (probability <= 1)).all()


@given(rows, st.sampled_from(COVARIANCE_TYPES), st.integers(-8, 8), st.integers(1, 12))
def test_scaled_losses_scale_the_fit(ground_truths, x, covariance_type, power, max_iter):
    """A power of two scales every intermediate exactly; the number of iterations is given, since the lower bound shifts."""
    ground_truths[0] += 1
    scale = 2.0**power
    precisions = torch.ones(1 if covariance_type == "tied" else 2, dtype=torch.float64)
    fixed = {"covariance_type": covariance_type, "tol": 0.0, "max_iter": max_iter}
    wanted = paa_gpu.fit_gmm_1d(x[None], precisions_init=precisions, reg_covar=1e-6, **fixed)
    got = paa_gpu.fit_gmm_1d(x[None] * scale, precisions_init=precisions / scale**2, reg_covar=1e-6 * scale**2, **fixed)
    assume(wanted.converged.item() == got.converged.item())
    # Rounding of the densities' logarithms, over the iterations.
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(got.weights, wanted.weights, **close)
    torch.testing.assert_close(got.means / scale, wanted.means, **close)
    torch.testing.assert_close(got.variances / scale**2, wanted.variances, **close)


predictions = st.builds(
    lambda shapes, seed, dtype: testing.make_predictions(shapes, np.random.default_rng(seed), num_classes=3, dtype=dtype),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.float64]),
)


@given(predictions, st.booleans(), st.sampled_from([0.0, 1.0]))
def test_a_batch_of_detections_equals_its_images_one_by_one(made, keep_order, offset):
    chosen = {"keep_order": keep_order, "offset": offset}
    boxes, labels = paa_gpu.score_voting_batch(*made, 0.05, **chosen)
    for image, arguments in enumerate(zip(*made, strict=True)):
        got, got_labels = paa_gpu.score_voting(*arguments, 0.05, **chosen)
        assert torch.equal(got, boxes[image])
        assert torch.equal(got_labels, labels[image])


@given(predictions)
def test_voted_boxes_are_means_of_boxes(made):
    """They stay within what the voters and the box itself span; score and class stay."""
    for det, label, box, score in zip(*made, strict=True):
        got, got_label = paa_gpu.score_voting(det, label, box, score, 0.05, keep_order=True)
        assert torch.equal(got[:, 4], det[:, 4])
        assert torch.equal(got_label, label)
        everything = torch.cat([box, det[:, :4]])
        if len(det):
            slack = 1e-4
            assert (got[:, :4] >= everything.amin(0) - slack).all()
            assert (got[:, :4] <= everything.amax(0) + slack).all()


@given(predictions, orders)
def test_the_order_of_detections_is_kept(made, order):
    for det, label, box, score in zip(*made, strict=True):
        places = torch.tensor(shuffled(order, len(label)), dtype=torch.int64)
        got, got_label = paa_gpu.score_voting(det[places], label[places], box, score, 0.05, keep_order=True)
        wanted, wanted_label = paa_gpu.score_voting(det, label, box, score, 0.05, keep_order=True)
        assert torch.equal(got, wanted[places])
        assert torch.equal(got_label, wanted_label[places])


numbers_of_boxes = st.lists(st.integers(0, 30), min_size=1, max_size=4)
candidates = st.builds(
    lambda numbers, seed: [
        make_image(number, 3, np.random.default_rng([seed, i]), ties=i % 2 == 0) for i, number in enumerate(numbers)
    ],
    numbers_of_boxes,
    st.integers(0, 2**32),
)
limits = st.fixed_dictionaries(
    {
        "score_thr": st.sampled_from([None, 0.25]),
        "nms_pre": st.integers(0, 20),
        "max_per_img": st.integers(0, 20),
        "class_agnostic": st.booleans(),
    }
)


@given(candidates, st.booleans(), st.sampled_from(METHODS), limits)
def test_suppression_in_a_batch_is_that_of_its_images(images, with_labels, method, chosen):
    check_alone(images, with_labels, method=method, **chosen)


@given(candidates, st.sampled_from([0.0, 1 / 3, 0.5, 1.0]), limits)
def test_suppression_is_that_of_torchvision(images, iou_threshold, chosen):
    check(images, iou_threshold, **chosen)


@given(numbers_of_boxes, st.integers(1, 3), st.integers(0, 2**32), st.sampled_from(CONF_TYPES), st.sampled_from([0.0, 0.3]))
def test_fusion_in_a_batch_is_that_of_its_images(numbers, models, seed, conf_type, skip_box_thr):
    """Models differ in their boxes, and the second has none."""
    images = [
        make_models([number, 0, number // 2][:models], np.random.default_rng([seed, i])) for i, number in enumerate(numbers)
    ]
    chosen = {"conf_type": conf_type, "skip_box_thr": skip_box_thr}
    got = paa_gpu.weighted_boxes_fusion(*zip(*images, strict=True), **chosen)
    for i, image in enumerate(images):
        assert_alone(got, i, paa_gpu.weighted_boxes_fusion(*([column] for column in image), **chosen))


@given(numbers_of_boxes, st.integers(1, 3), st.sampled_from(["quantile", "kmeans"]), st.integers(0, 2**32))
def test_rows_of_any_length_fit_as_they_do_alone(ground_truths, numbers, n_components, init, seed):
    ground_truths[0] += len(numbers)
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(rng.normal(size=number)) for number in numbers]
    got = paa_gpu.fit_gmm_1d(rows, n_components=n_components, init=init)
    for i, row in enumerate(rows):
        alone = paa_gpu.fit_gmm_1d([row], n_components=n_components, init=init)
        for of_all, own in zip(got[:7], alone[:7], strict=True):
            torch.testing.assert_close(of_all[i], own[0], rtol=0, atol=0, equal_nan=True)


heads = st.builds(
    lambda potential, seed: testing.make_head_batch(
        potential, np.random.default_rng(seed), ((5, 6), (3, 3), (1, 2)), num_classes=3
    ),
    st.lists(st.integers(0, 41), min_size=1, max_size=3),
    st.integers(0, 2**32),
)


@given(heads, orders)
def test_the_order_of_images_and_potential_positives_permutes_their_losses(made, order):
    images = shuffled(order, len(made.label))
    places = [torch.tensor(shuffled(order, len(inds)), dtype=torch.int64) for inds in made.pos_inds]
    columns = ("label", "label_weight", "bbox_target", "bbox_weight")
    permuted = made._replace(
        cls_scores=[level[images] for level in made.cls_scores],
        bbox_preds=[level[images] for level in made.bbox_preds],
        **{name: [getattr(made, name)[image] for image in images] for name in columns},
        pos_inds=[made.pos_inds[image][places[image]] for image in images],
    )
    wanted = paa_gpu.candidate_losses(*made)
    for losses, image in zip(paa_gpu.candidate_losses(*permuted), images, strict=True):
        assert torch.equal(losses, wanted[image][places[image]])


@given(heads, st.floats(0, 10), st.floats(0, 10))
def test_losses_are_a_weighted_sum(made, cls, bbox):
    def losses(**weights):
        return torch.cat(paa_gpu.candidate_losses(*made, **weights))

    focal, giou = losses(loss_bbox_weight=0.0), losses(loss_cls_weight=0.0, loss_bbox_weight=1.0)
    assert ((focal >= 0) & (giou >= 0)).all()
    assert (giou <= 2 + 1e-5).all()
    torch.testing.assert_close(
        losses(loss_cls_weight=cls, loss_bbox_weight=bbox), cls * focal + bbox * giou, rtol=1e-5, atol=1e-6
    )


boxes_of_images = st.builds(
    lambda numbers, seed: [
        testing.make_boxes(number, (70, 60), np.random.default_rng([seed, i])) for i, number in enumerate(numbers)
    ],
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.integers(0, 2**32),
)
ANCHORS = testing.make_anchors([(7, 8), (4, 4), (1, 2)])


@given(boxes_of_images, st.booleans(), st.integers(-4, 4))
def test_the_assignment_of_a_batch_is_that_of_its_images_at_any_scale(ground_truths, boxes, match_low_quality, power):
    """A power of two scales every intermediate exactly."""
    ground_truths[0] += sum(map(len, boxes))
    options, scale = {"match_low_quality": match_low_quality, "pos_iou_thr": 0.3, "neg_iou_thr": 0.2}, 2.0**power
    got = paa_gpu.assign_max_iou([level * scale for level in ANCHORS], [image * scale for image in boxes], **options)
    for image, gt_inds, overlaps in zip(boxes, *got, strict=True):
        one = paa_gpu.assign_max_iou(ANCHORS, [image], **options)
        assert torch.equal(gt_inds, one.gt_inds[0])
        assert torch.equal(overlaps, one.max_overlaps[0])
        assert ((gt_inds >= -1) & (gt_inds <= len(image))).all()


@given(boxes_of_images, st.booleans(), st.booleans(), st.sampled_from(["gt", "anchor"]))
def test_the_assignment_is_that_of_all_overlaps(ground_truths, boxes, match_low_quality, gt_max_assign_all, low_quality):
    """Every box is there twice, so that overlaps tie."""
    boxes = [image.repeat(2, 1) for image in boxes]
    ground_truths[0] += sum(map(len, boxes))
    options = {"match_low_quality": match_low_quality, "gt_max_assign_all": gt_max_assign_all, "low_quality": low_quality}
    got, wanted = paa_gpu.assign_max_iou(ANCHORS, boxes, **options), reference.assign_max_iou(ANCHORS, boxes, **options)
    for ours, theirs in zip(got, wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))


@given(boxes_of_images, orders)
def test_renumbered_boxes_renumber_the_assignment(ground_truths, boxes, order):
    """Without forced matches, which go to the last of several."""
    ground_truths[0] += sum(map(len, boxes))
    places = [torch.tensor(shuffled(order, len(image)), dtype=torch.int64) for image in boxes]
    wanted = paa_gpu.assign_max_iou(ANCHORS, boxes, match_low_quality=False)
    renumbered = [image[old] for image, old in zip(boxes, places, strict=True)]
    got = paa_gpu.assign_max_iou(ANCHORS, renumbered, match_low_quality=False)
    for old, gt_inds, before in zip(places, got.gt_inds, wanted.gt_inds, strict=True):
        names = torch.cat([torch.tensor([0]), old + 1])
        assert torch.equal(names[gt_inds], before)
    assert all(map(torch.equal, got.max_overlaps, wanted.max_overlaps))


@pytest.mark.slow
@settings(max_examples=25)  # convolutions take their time
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 2**32), orders)
def test_the_order_of_images_changes_no_loss_of_the_head(ground_truths, numbers, seed, order):
    ground_truths[0] += sum(numbers)
    head, images = make_head(), shuffled(order, len(numbers))
    features, targets = make_features(len(numbers), seed), make_targets(numbers, seed)
    with torch.no_grad():
        wanted = head.loss(features, targets)
        got = head.loss([level[images] for level in features], [targets[image] for image in images])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
