"""The targets of a batch against the published steps, one after the other in plain torch; and how many device operations they are.

That they are those of mmdetection's heads is shown in tests/mmdet.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import compiled_only
from synchronisations import Synchronisations
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import box_iou, generalized_box_iou_loss

import paa_gpu
from paa_gpu import testing
from paa_gpu.boxes import decode, focal_loss
from paa_gpu.targets import Kept, assign_targets, flatten_levels, positive_losses

SHAPES = ((12, 16), (6, 8), (3, 4))
CLASSES, ANCHORS = 5, sum(height * width for height, width in SHAPES)


def draw(rng, num_gts, dtype=torch.float32):
    """anchors, cls_scores, bbox_preds, boxes, labels."""
    batch = testing.make_head_batch([0] * len(num_gts), rng, SHAPES, CLASSES)
    boxes = [testing.make_boxes(number, (128, 96), rng).to(dtype) for number in num_gts]
    labels = [torch.from_numpy(rng.integers(CLASSES, size=number)) for number in num_gts]
    return batch.anchors, batch.cls_scores, batch.bbox_preds, boxes, labels


def published(anchors, cls_scores, bbox_preds, boxes, labels, valid=None, pos_weight=1.0, topk=9):
    """Image by image with shapes that depend on values: label, label_weight, bbox_target of all, number of positives of each."""
    columns, counts = [], []
    assigned = paa_gpu.assign_max_iou(anchors, boxes, None, valid).gt_inds
    for image, gt_inds in enumerate(assigned):
        label, label_weight = torch.full_like(gt_inds, CLASSES), torch.zeros(len(gt_inds))
        bbox_target, bbox_weight = torch.zeros(len(gt_inds), 4), torch.zeros(len(gt_inds), 4)
        pos_inds = (gt_inds > 0).nonzero().flatten()
        pos_gt_inds = gt_inds[pos_inds] - 1
        label[pos_inds], bbox_target[pos_inds], bbox_weight[pos_inds] = labels[image][pos_gt_inds], boxes[image][pos_gt_inds], 1.0
        label_weight[pos_inds], label_weight[gt_inds == 0] = pos_weight, 1.0
        maps = [[level[image : image + 1] for level in levels] for levels in (cls_scores, bbox_preds)]
        (losses,) = paa_gpu.candidate_losses(anchors, *maps, [label], [label_weight], [bbox_target], [bbox_weight], [pos_inds])
        label, label_weight, _, num_pos = paa_gpu.paa_reassign(
            losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds, anchors, num_classes=CLASSES, topk=topk
        )
        columns.append((label, label_weight, bbox_target))
        counts.append(num_pos)
    return *map(torch.cat, zip(*columns, strict=True)), counts


def check(got, wanted, most):
    """`most`: S, the entries of what lists the positives."""
    label, label_weight, bbox_target, counts = wanted
    assert torch.equal(got.label, label)
    assert torch.equal(got.label_weight, label_weight)
    assert torch.equal(got.bbox_target, bbox_target)
    assert got.num_pos.tolist() == counts
    assert torch.equal(got.positive[got.found], (label < CLASSES).nonzero().flatten())
    assert got.found.tolist() == sorted(got.found.tolist(), reverse=True)
    assert not got.positive[~got.found].any()
    assert len(got.positive) == len(got.found) == most


@pytest.mark.parametrize("num_gts", [[0], [0, 0], [1], [3, 0, 12, 1], [60]], ids=str)
@pytest.mark.parametrize("pos_weight", [0.5, 1.0, 2.5])
def test_as_the_published_steps(num_gts, pos_weight, rng):
    inputs = draw(rng, num_gts)
    got = assign_targets(*inputs, num_classes=CLASSES, pos_weight=pos_weight)
    check(got, published(*inputs, pos_weight=pos_weight), min(27 * sum(num_gts), ANCHORS * len(num_gts)))
    assert bool(got.found.any()) == any(num_gts)


def test_part_of_the_anchors(rng):
    inputs = draw(rng, [4, 0, 6])
    valid = [torch.from_numpy(rng.random(sum(map(len, inputs[0]))) < share) for share in (0.5, 1.0, 0.0)]
    got = assign_targets(*inputs, valid=valid, num_classes=CLASSES)
    check(got, published(*inputs, valid=valid), 27 * 10)
    assert not got.label_weight.view(3, -1)[2].any()


def test_options_reach_the_three_functions(rng):
    inputs = draw(rng, [20])
    got = assign_targets(*inputs, num_classes=CLASSES, reassignment={"topk": 2})
    check(got, published(*inputs, topk=2), 2 * 3 * 20)
    strict = assign_targets(*inputs, num_classes=CLASSES, assignment={"pos_iou_thr": 0.9, "match_low_quality": False})
    assert (strict.gt_inds > 0).sum() < (got.gt_inds > 0).sum()
    only_boxes = assign_targets(*inputs, num_classes=CLASSES, losses={"loss_cls_weight": 0.0})
    assert not torch.equal(only_boxes.label, assign_targets(*inputs, num_classes=CLASSES).label)
    with pytest.raises(ValueError, match="`precision` must be"):
        assign_targets(*inputs, num_classes=CLASSES, reassignment={"precision": "half"})


def test_classification_losses_of_ones_own(rng):
    """They take the place of those of `candidate_losses`, weights included, whatever these would weigh."""
    inputs = draw(rng, [12, 3])
    scores = flatten_levels(inputs[1]).flatten(0, 1)

    def focal(label, label_weight):
        return focal_loss(scores, label, 2.0, 0.25).sum(1) * label_weight

    losses = {"loss_cls_weight": 2.0}
    got = assign_targets(*inputs, num_classes=CLASSES, pos_weight=2.5, losses=losses, classification=focal)
    wanted = assign_targets(*inputs, num_classes=CLASSES, pos_weight=2.5)
    assert all(map(torch.equal, got[:7], wanted[:7]))
    none = assign_targets(*inputs, num_classes=CLASSES, classification=lambda label, weight: torch.zeros_like(weight))
    boxes_only = assign_targets(*inputs, num_classes=CLASSES, losses={"loss_cls_weight": 0.0})
    assert torch.equal(none.label, boxes_only.label) and not torch.equal(none.label, wanted.label)


def test_more_candidates_than_a_level_has(rng):
    inputs = draw(rng, [3])
    got = assign_targets(*inputs, num_classes=CLASSES, reassignment={"topk": 20})
    check(got, published(*inputs, topk=20), (20 + 20 + 12) * 3)


def test_boxes_of_another_dtype(rng):
    """Ground truths in float64, labels in int32, which a data set may have: the targets are those of the anchors' dtype."""
    anchors, cls_scores, bbox_preds, boxes, labels = draw(rng, [3, 0])
    wide, narrow = [image.double() for image in boxes], [image.int() for image in labels]
    got = assign_targets(anchors, cls_scores, bbox_preds, wide, narrow, num_classes=CLASSES)
    wanted = assign_targets(anchors, cls_scores, bbox_preds, boxes, labels, num_classes=CLASSES)
    assert all(map(torch.equal, got[:7], wanted[:7]))
    assert got.bbox_target.dtype == torch.float32
    ignored = [torch.tensor([[0.0, 0, 60, 60]]), torch.zeros(0, 4)]
    got, wanted = (
        assign_targets(
            anchors, cls_scores, bbox_preds, boxes, labels, each, num_classes=CLASSES, assignment={"ignore_iof_thr": 0.5}
        )
        for each in ([image.double() for image in ignored], ignored)
    )
    assert (got.label_weight == 0).any() and torch.equal(got.label_weight, wanted.label_weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_targets_have_the_dtype_of_the_anchors(dtype, rng):
    """And the losses of the positives that of the maps."""
    columns = [[tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in column] for column in draw(rng, [3, 5])]
    targets = assign_targets(*columns, num_classes=CLASSES, pos_weight=2.5)
    assert targets.label_weight.dtype == targets.bbox_target.dtype == dtype
    losses = positive_losses(targets, torch.cat(columns[0]), columns[2], [level[:, :1] for level in columns[1]], STDS)
    assert [loss.dtype for loss in losses] == [dtype] * 3


def test_nothing_waits_and_nothing_changes(rng):
    inputs = draw(rng, [3, 0])
    inputs[1][0].requires_grad_()
    before = [tensor.clone() for column in inputs for tensor in column]
    with Synchronisations() as mode:
        got = assign_targets(*inputs, num_classes=CLASSES)
    assert mode.count == 0
    assert not any(tensor.requires_grad for tensor in got[:7])
    assert all(map(torch.equal, before, [tensor for column in inputs for tensor in column]))


# --- losses of the positives ---

STDS = (0.1, 0.1, 0.2, 0.2)


def losses_and_gradients(anchors, targets, bbox_preds, iou_preds):
    """[S] each, and the gradients of their sums in all maps, [N * A, 5]."""
    maps = [[level.clone().requires_grad_() for level in levels] for levels in (bbox_preds, iou_preds)]
    losses = positive_losses(targets, torch.cat(anchors), *maps, STDS)
    assert not losses[2].requires_grad  # the IoU
    sum(losses).sum().backward()
    return losses, torch.cat([flatten_levels([level.grad for level in levels]).flatten(0, 1) for levels in maps], 1)


def replaced(levels, where, value):
    """Maps with other values at the anchors `where` [N * A]."""
    masks = where.view(len(levels[0]), -1).split([level.shape[2] * level.shape[3] for level in levels], 1)
    return [level.masked_fill(mask.view(-1, 1, *level.shape[2:]), value) for level, mask in zip(levels, masks, strict=True)]


def test_losses_of_the_positives(rng):
    """Of several images, by torchvision's IoU of each one's own box."""
    anchors, cls_scores, bbox_preds, boxes, labels = draw(rng, [3, 0, 2])
    iou_preds = [level[:, :1] for level in cls_scores]
    targets = assign_targets(anchors, cls_scores, bbox_preds, boxes, labels, num_classes=CLASSES)
    got = positive_losses(targets, torch.cat(anchors), bbox_preds, iou_preds, STDS)
    index = targets.positive[targets.found]
    deltas, iou_pred = (flatten_levels(levels).flatten(0, 1)[index] for levels in (bbox_preds, iou_preds))
    box, truth = decode(torch.cat(anchors).repeat(3, 1)[index], deltas, STDS), targets.bbox_target[index]
    iou = box_iou(box, truth).diag()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(iou_pred[:, 0], iou, reduction="none")
    for losses, wanted in zip(got, (generalized_box_iou_loss(box, truth), cross_entropy, iou), strict=True):
        torch.testing.assert_close(losses[targets.found], wanted, rtol=1e-4, atol=1e-5)
        assert not losses[~targets.found].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_outputs_that_no_box_trains_have_no_part_in_its_losses(value, rng):
    """Anchor 0 is one of them, which unused entries of the list of positives read. Nor has a ground truth without positives."""
    anchors, cls_scores, bbox_preds, boxes, labels = draw(rng, [3, 2])
    boxes[1][0] = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf])
    iou_preds = [level[:, :1] for level in cls_scores]
    valid = [torch.arange(ANCHORS) > 0] * 2
    targets = assign_targets(anchors, cls_scores, bbox_preds, boxes, labels, valid=valid, num_classes=CLASSES)
    targets.bbox_target[0] = torch.inf  # as where the infinite ground truth has anchor 0
    untrained, unread = targets.gt_inds <= 0, targets.label == CLASSES
    assert untrained[0] and unread[0] and targets.found.any() and not targets.found.all()
    wanted, wanted_gradients = losses_and_gradients(anchors, targets, bbox_preds, iou_preds)
    maps = replaced(bbox_preds, untrained, value), replaced(iou_preds, unread, value)
    got, gradients = losses_and_gradients(anchors, targets, *maps)
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(gradients, wanted_gradients) and gradients.isfinite().all() and gradients.any()


@pytest.mark.parametrize(
    ("channel", "value", "broken"), [(0, torch.nan, True), (1, -torch.inf, True), (3, torch.nan, True), (3, torch.inf, False)]
)
def test_offsets_of_a_candidate_that_make_no_box(channel, value, broken, rng):
    """Its ground truth gets no positives. The published head stops with an error, so the losses are NaN. Sizes are clipped."""
    anchors, cls_scores, bbox_preds, boxes, labels = draw(rng, [3, 2])
    first = assign_targets(anchors, cls_scores, bbox_preds, boxes, labels, num_classes=CLASSES)
    candidate = (first.gt_inds > 0) & ((first.gt_inds > 0).cumsum(0) == 1)
    changed = replaced(bbox_preds, candidate, value)
    maps = [level.clone() for level in bbox_preds]
    for level, new in zip(maps, changed, strict=True):
        level[:, channel] = new[:, channel]
    targets = assign_targets(anchors, cls_scores, maps, boxes, labels, num_classes=CLASSES)
    giou, cross_entropy, _ = positive_losses(targets, torch.cat(anchors), maps, [level[:, :1] for level in cls_scores], STDS)
    assert targets.found.any()
    assert giou.sum().isnan() == cross_entropy.sum().isnan() == broken


@pytest.mark.parametrize("stds", [(0.1, 0.1, 0.2, 0.2), (0.1, 0.3, 0.2, 0.5)])
def test_boxes_from_offsets(stds, rng):
    anchors = testing.make_boxes(50, (128, 96), rng)
    deltas = torch.from_numpy(rng.normal(0, 8, (50, 4))).float()
    (x1, y1, x2, y2), (dx, dy, dw, dh) = anchors.T, (delta * std for delta, std in zip(deltas.T, stds, strict=True))
    limit = math.log(1000 / 16)
    width, height = (x2 - x1) * dw.clamp(-limit, limit).exp(), (y2 - y1) * dh.clamp(-limit, limit).exp()
    x, y = (x1 + x2) / 2 + (x2 - x1) * dx, (y1 + y2) / 2 + (y2 - y1) * dy
    wanted = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    torch.testing.assert_close(decode(anchors, deltas, stds), wanted, rtol=1e-6, atol=1e-4)


def test_what_is_kept(monkeypatch):
    """One thing for the same sizes, whatever the batch; nothing of a trace; no more than the last sizes; no copies."""
    monkeypatch.setattr(Kept, "MOST", 2)
    kept, made = Kept(), []

    def of(*sizes, images=1, channels=3):
        levels = [torch.empty(images, channels, *size) for size in sizes]
        return kept.of(levels, lambda: made.append(sizes) or torch.tensor(float(len(made))))

    first = of((2, 3), (1, 2))
    assert of((2, 3), (1, 2), images=4, channels=1) is first
    assert of((3, 2), (1, 2)) is not first
    with FakeTensorMode():
        assert of((2, 3), (1, 2)) is not first
    assert of((2, 3), (1, 2)) is first and len(made) == 3
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.of([torch.empty(1, 1, 2, 3), torch.empty(1, 1, 1, 2)], lambda: None) is None
    of((5, 5))  # there is room for two
    assert of((2, 3), (1, 2)) is not first


def test_nothing_is_kept_of_a_trace():
    """What is made there are values of the graph, for sizes that no other call has."""
    kept = Kept()
    torch.jit.trace(lambda level: level + kept.of([level], lambda: level.sum()), torch.ones(1, 1, 2, 2), check_trace=False)
    assert not kept._values


def test_what_is_kept_trains_after_inference():
    kept, levels = Kept(), [torch.empty(1, 1, 2, 2)]
    with torch.inference_mode():
        kept.of(levels, lambda: torch.ones(3))
    weight = torch.ones(3, requires_grad=True)
    (kept.of(levels, lambda: None) * weight).sum().backward()
    assert weight.grad.tolist() == [1, 1, 1]


# --- device operations ---------------------------------------------------------------------------------------------------------

#: Operations of `assign_targets` on a device, those of the three operators and what they copy left out: each is one kernel, but
#: that `nonzero_static` is four (sums of blocks, their prefix sums, the indices, what follows them).
SMALL = ("ge", "gt", "add", "mul", "ne", "clamp", "where", "arange", "index_select", "nonzero_static")


@compiled_only
@pytest.mark.parametrize("num_gts", [[3], [2, 0, 5], [1] * 16], ids=["one image", "uneven", "16 images"])
def test_device_operations(num_gts, rng):
    """As many small ones whatever the batch, besides those of the three operators; no synchronisation."""
    inputs = draw(rng, num_gts)
    operations, launches = profiled(lambda: assign_targets(*inputs, num_classes=CLASSES), small=SMALL)
    print(len(operations), len(launches), operations)
    assert not SYNCHRONISING & set(operations)
    assert sum(name in SMALL for name in operations) == 15
    assert len(operations) + len(launches) <= 31
