"""The losses of the potential positives: against the unfused form, in all dtypes, from maps of any strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, _box_loss
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss

import paa_gpu
from paa_gpu import reference, testing
from paa_gpu.boxes import focal_loss

#: Relative, of float32 results: the sum over the classes is float32 on a GPU. The unfused form itself, in float32, is up to 5e-5 off.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def check(batch, **options):
    """Against the unfused form in float64, on the same values."""
    got, wanted = paa_gpu.candidate_losses(*batch, **options), reference.candidate_losses(*batch, **options)
    wide = torch.float64 in (batch.cls_scores[0].dtype, batch.bbox_preds[0].dtype, batch.anchors[0].dtype)
    for losses, expected in zip(got, wanted, strict=True):
        assert losses.dtype == (torch.float64 if wide else torch.float32) and losses.shape == expected.shape
        torch.testing.assert_close(losses.double(), expected, rtol=TOLERANCE[losses.dtype], atol=0)


def cast(batch, maps, targets=torch.float32, deltas=None):
    dtypes = (targets, maps, deltas or maps, torch.int64, targets, targets, targets, torch.int64)
    return testing.HeadBatch._make([t.to(dtype) for t in column] for column, dtype in zip(batch, dtypes, strict=True))


def full_images(rng, error=0.5):
    """Every location of three images is a potential positive."""
    return testing.make_head_batch([13 * 17 + 7 * 9 + 4 * 5] * 3, rng, error=error)


@pytest.mark.parametrize("error", [0.01, 0.3, 1.5], ids=["good boxes", "fair boxes", "poor boxes"])
def test_equal_to_the_unfused_form(error, rng):
    check(full_images(rng, error))


@pytest.mark.slow
@pytest.mark.parametrize("targets", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maps", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(maps, targets, rng):
    check(cast(full_images(rng), maps, targets))


@pytest.mark.parametrize("maps", [torch.float32, torch.float64], ids=str)
def test_targets_of_float64_are_not_rounded(maps, rng):
    batch = cast(full_images(rng), maps, torch.float64)
    names = ("anchors", "label_weight", "bbox_target", "bbox_weight")
    check(batch._replace(**{name: [t * (1 + 1e-9) for t in getattr(batch, name)] for name in names}))


@pytest.mark.parametrize(
    ("scores", "deltas"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float64)],
    ids=str,
)
def test_maps_of_different_dtypes(scores, deltas, rng):
    """Under autocast, scores come in half precision and boxes, which a parameter has scaled, in float32."""
    check(cast(full_images(rng), scores, deltas=deltas))


@pytest.mark.parametrize("box_loss", ["giou", "l1"])
def test_several_anchors_of_a_location(box_loss, rng):
    check(testing.make_head_batch([300, 0, 60], rng, ((7, 9), (4, 5)), per_location=3), box_loss=box_loss)


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_the_losses_of_torchvision(box_loss, rng):
    """From its head's outputs as they lie, and from the maps before it permutes them; nine anchors a location."""
    head, features = RetinaNetHead(8, 9, 5), [torch.randn(2, 8, 6, 5) * 9, torch.randn(2, 8, 3, 3) * 9]
    maps = {name: [] for name in ("cls_logits", "bbox_reg")}
    for module, name in ((head.classification_head, "cls_logits"), (head.regression_head, "bbox_reg")):
        getattr(module, name).register_forward_hook(lambda module, args, out, name=name: maps[name].append(out.detach()))
        torch.nn.init.normal_(getattr(module, name).weight, std=0.5)
    with torch.no_grad():
        outputs = head(features)
    logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]
    anchors = testing.make_boxes(6 * 5 * 9 + 3 * 3 * 9, (99, 99), rng)
    targets = [anchors + torch.from_numpy(rng.uniform(-0.2, 0.2, anchors.shape)).float() for _ in range(2)]
    label = [torch.from_numpy(rng.integers(5, size=len(anchors))) for _ in range(2)]
    ones, inds = [torch.ones(len(anchors))] * 2, [torch.from_numpy(rng.permutation(len(anchors))[:200]) for _ in range(2)]
    rest = (label, ones, targets, [weight[:, None].expand(-1, 4) for weight in ones], inds)
    options = {"stds": (1, 1, 1, 1), "loss_bbox_weight": 1.0, "box_loss": box_loss, "convention": "torchvision"}
    got = paa_gpu.candidate_losses([anchors], [logits.mT[..., None]], [deltas.mT[..., None]], *rest, **options)
    levels = anchors.split([6 * 5 * 9, 3 * 3 * 9])
    assert all(map(torch.equal, got, paa_gpu.candidate_losses(levels, maps["cls_logits"], maps["bbox_reg"], *rest, **options)))
    for image, losses in enumerate(got):
        for i, loss in zip(inds[image].tolist()[:40], losses, strict=False):
            one = slice(i, i + 1)
            wanted = sigmoid_focal_loss(
                logits[image, i].double(), torch.nn.functional.one_hot(label[image][i], 5).double(), reduction="sum"
            )
            wanted += _box_loss(
                box_loss, BoxCoder((1.0, 1.0, 1.0, 1.0)), anchors[one].double(), targets[image][one].double(),
                deltas[image, one].double(),
            )  # fmt: skip
            torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_half_precision(dtype):
    """The loops for the CPU take half precision as bits. numba has no such numbers."""
    from numba import njit

    from paa_gpu.cpu import losses

    bits = np.arange(2**16, dtype=np.uint16)
    wanted = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
    number = njit(lambda value: losses._number(value))
    own = bits if dtype == torch.bfloat16 else bits.view(np.int16)
    got = torch.tensor([number(value) for value in own])
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int32), wanted[~wanted.isnan()].view(torch.int32))


@pytest.mark.slow
def test_half_precision_throughout(rng):
    check(cast(full_images(rng), torch.float16, torch.float16))
    check(cast(full_images(rng), torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0}, {"gamma": 1.5, "alpha": 0.6}, {"loss_cls_weight": 0.0}, {"loss_bbox_weight": 0.0}, {"loss_bbox_weight": 2},
        {"stds": (1.0, 0.5, 0.2, 3)}, {"box_loss": "l1", "stds": (1, 0.5, 1, 2)}, {"convention": "torchvision", "stds": (1, 1, 1, 1)},
        {"wh_ratio_clip": 0.9, "stds": (0.1, 0.1, 1.0, 1.0)}, {"wh_ratio_clip": 1e-308},
    ],
    ids=str,
)  # fmt: skip
def test_options(options, rng):
    check(full_images(rng), **options)


@pytest.mark.parametrize("potential", [[0], [1], [0, 5, 0, 33, 32, 0], [2] * 40], ids=str)
def test_any_numbers_of_potential_positives(potential, rng):
    check(testing.make_head_batch(potential, rng))


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((5, 8),), ((0, 4), (6, 6), (3, 0), (1, 1)), ((3, 2),) * 9], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 80])
def test_any_levels_and_classes(shapes, num_classes, rng):
    check(testing.make_head_batch([10, 3], rng, shapes, num_classes))


@pytest.mark.slow
def test_maps_and_targets_of_any_strides(rng):
    """Channels last, a slice of a larger map, one image expanded to a batch; columns and steps of larger targets."""
    batch = full_images(rng)
    scores, deltas = batch.cls_scores, batch.bbox_preds
    batch = batch._replace(
        cls_scores=[scores[0].to(memory_format=torch.channels_last), torch.stack([scores[1]] * 2, 2)[:, :, 1], scores[2].mT.contiguous().mT],
        bbox_preds=[deltas[0][:1].expand(3, -1, -1, -1), deltas[1].flip(0)[[2, 1, 0]], torch.cat([deltas[2]] * 2, 1)[:, 4:]],
        anchors=[boxes.T.contiguous().T for boxes in batch.anchors],
    )  # fmt: skip
    check(batch)
    one = batch._replace(**{name: getattr(batch, name)[:1] for name in batch._fields[3:]})
    one = one._replace(cls_scores=[m[:1] for m in batch.cls_scores], bbox_preds=[m[:1] for m in batch.bbox_preds])
    spread = {name: [torch.stack([t, t + 1], -1)[..., 0] for t in getattr(one, name)] for name in batch._fields[3:]}
    check(one._replace(**spread))
    check(one._replace(pos_inds=[one.pos_inds[0].int()]))


def test_a_label_outside_the_classes_is_background(rng):
    batch = full_images(rng)
    labels = [label.fill_(value) for label, value in zip(batch.label, (7, -1, 2**40), strict=True)]
    check(batch._replace(label=labels))
    check(batch._replace(label=[label.fill_(-(2**40)) for label in labels]))


def test_what_is_not_finite_stays_so_and_its_own(rng):
    """`paa_reassign_batch` leaves out a ground truth whose loss is not finite; a NaN that got lost would be a wrong positive."""
    clean = full_images(rng)
    losses = torch.cat(paa_gpu.candidate_losses(*clean))
    places = torch.cat([inds + 304 * image for image, inds in enumerate(clean.pos_inds)])
    for name in ("cls_scores", "bbox_preds"):
        for channel in range(getattr(clean, name)[0].shape[1]):
            maps = [level.clone() for level in getattr(clean, name)]
            maps[1][1, channel, 2, 3] = torch.nan
            got = torch.cat(paa_gpu.candidate_losses(*clean._replace(**{name: maps})))
            poisoned = places == 304 + 13 * 17 + 2 * 9 + 3
            assert got[poisoned].isnan().all() and torch.equal(got[~poisoned], losses[~poisoned])
    for side in range(4):
        for name in ("bbox_target", "bbox_weight"):
            columns = [t.clone() for t in getattr(clean, name)]
            columns[2][7, side] = torch.nan
            got = torch.cat(paa_gpu.candidate_losses(*clean._replace(**{name: columns})))
            poisoned = places == 608 + 7
            assert got[poisoned].isnan().all() and torch.equal(got[~poisoned], losses[~poisoned])


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_a_class_that_is_masked_out_costs_nothing(gamma, rng):
    """Its logit is -inf, as the head's own focal loss takes it."""
    batch = full_images(rng)
    labels = [label.clamp(min=1) for label in batch.label]
    others, masked = ([level.clone() for level in batch.cls_scores] for _ in range(2))
    for level, other in zip(masked, others, strict=True):
        level[:, 0], other[:, 0] = -torch.inf, -200.0
    got, wanted = (
        paa_gpu.candidate_losses(*batch._replace(label=labels, cls_scores=maps), gamma=gamma) for maps in (masked, others)
    )
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_the_focal_loss_of_the_head_has_a_gradient_at_every_logit(gamma):
    """A class that is masked out, or as good as, has none."""
    scores = torch.tensor([[-torch.inf, 0.3, -200.0, 60.0]], requires_grad=True)
    loss = focal_loss(scores, torch.tensor([1]), gamma, 0.25)
    loss.sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all() and scores.grad[0, [0, 2]].abs().max() < 1e-6
    assert scores.grad[0, 1] < 0 < scores.grad[0, 3]


def test_extreme_logits_and_deltas(rng):
    batch = full_images(rng)
    for maps in (batch.cls_scores, batch.bbox_preds):
        for level in maps:
            level.copy_(
                torch.from_numpy(rng.choice([-1e4, -200, -90, -30, -1e-30, 0, 1e-3, 30, 90, 200, 1e4], level.shape)).float()
            )
    check(batch)


def test_boxes_without_area(rng):
    batch = full_images(rng)
    for target in batch.bbox_target:
        target[:, 2] = target[:, 0]
    check(batch)
    for boxes in batch.anchors:
        boxes[:, 2:] = boxes[:, :2]
    check(batch)
    check(batch._replace(bbox_target=[torch.cat(batch.anchors)] * 3))


def test_an_index_out_of_range_gives_nan_and_reads_nothing(rng):
    batch = testing.make_head_batch([4, 12, 4], rng)
    inds = torch.tensor([0, -1, 303, 304, 2**40, -(2**62), 5, 2**63 - 1, -(2**63), 2**31, 2**32, 1])
    got = paa_gpu.candidate_losses(*batch._replace(pos_inds=[batch.pos_inds[0], inds, batch.pos_inds[2]]))
    inside = torch.tensor([i in (0, 2, 6, 11) for i in range(12)])
    wanted = reference.candidate_losses(*batch._replace(pos_inds=[batch.pos_inds[0], inds[inside], batch.pos_inds[2]]))
    assert got[1][~inside].isnan().all()
    for a, b in zip((got[0], got[1][inside], got[2]), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


def test_no_graph_and_no_change(rng):
    batch = full_images(rng)
    before = [[t.clone() for t in column] for column in batch]
    for level in (*batch.cls_scores, *batch.bbox_preds):
        level.requires_grad_()
    assert not any(losses.requires_grad for losses in paa_gpu.candidate_losses(*batch))
    assert all(torch.equal(a, b) for old, new in zip(before, batch, strict=True) for a, b in zip(old, new, strict=True))


@pytest.mark.slow  # on compiled kernels
def test_the_losses_feed_the_reassignment(rng):
    batch = testing.make_head_batch([60, 0, 90], rng)
    gts = [torch.from_numpy(np.arange(len(inds)) % 3) for inds in batch.pos_inds]
    losses = paa_gpu.candidate_losses(*batch)
    targets = batch.label, batch.label_weight, batch.bbox_weight
    out = paa_gpu.paa_reassign_batch(losses, *targets, batch.pos_inds, gts, batch.anchors, num_classes=7, num_gts=[3, 0, 3])
    assert out.fit.valid.all() and len(out.fit.valid) == 6 and out.num_pos[1] == 0


@pytest.mark.parametrize("convention", ["mmdet", "torchvision"])
def test_small_boxes(convention, rng):
    """What torchvision adds to the areas counts there."""
    batch = full_images(rng)
    columns = {name: [boxes * 1e-4 for boxes in getattr(batch, name)] for name in ("anchors", "bbox_target")}
    check(batch._replace(**columns), convention=convention)


@pytest.mark.parametrize("convention", ["mmdet", "torchvision"])
@pytest.mark.parametrize("order", [[2, 3, 0, 1], [2, 1, 0, 3]], ids=str)
def test_boxes_that_end_before_they_begin(order, convention, rng):
    batch = full_images(rng)
    columns = {name: [boxes[:, order] for boxes in getattr(batch, name)] for name in ("anchors", "bbox_target")}
    check(batch._replace(**columns), convention=convention)
