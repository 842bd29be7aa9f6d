"""`paa_gpu.PAAHead` against the published head: the same weights, features and targets."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from heads import Step, TieRulePAAHead, as_class, assert_same_detections, build, make_features, make_samples, step
from mmdet.models.utils import levels_to_images
from mmengine.structures import InstanceData
from synchronisations import Synchronisations

import paa_gpu
from paa_gpu import PAAHead, targets
from paa_gpu.boxes import decode

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}
LOSSES = {"rtol": 1e-5, "atol": 0}
GRADIENTS = 1e-4  # of the largest


def pair(generator: torch.Generator, published: Any, **options: Any) -> tuple[PAAHead, Any]:
    """A published head, under the library's rule for ties and with weights that tell anchors apart; and ours with its state dict."""
    with torch.no_grad():
        for parameter in published.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    ours = PAAHead(published.num_classes, published.in_channels, published.feat_channels, published.stacked_convs, **options)
    ours.load_state_dict(published.state_dict())
    return ours, as_class(published, TieRulePAAHead)


def targets_of(samples: list[Any]) -> list[dict[str, torch.Tensor]]:
    """mmdetection's samples as torchvision's targets."""
    targets = [{"boxes": sample.gt_instances.bboxes, "labels": sample.gt_instances.labels} for sample in samples]
    for target, sample in zip(targets, samples, strict=True):
        if "ignored_instances" in sample:
            target["ignored_boxes"] = sample.ignored_instances.bboxes
    return targets


def our_step(head: PAAHead, features: list[torch.Tensor], samples: list[Any]) -> tuple[Step, Any]:
    """Forward and backward as `step` makes them; and the call of the reassignment."""
    features = [level.clone().requires_grad_() for level in features]
    head.zero_grad()
    reassignment_of, kept = targets.reassignment_of, []
    with mock.patch.object(targets, "reassignment_of") as reassign:
        reassign.side_effect = lambda *args, **options: kept.append(reassignment_of(*args, **options)) or kept[-1]
        losses = head.loss(features, targets_of(samples), [sample.pad_shape for sample in samples])
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    gradients |= {f"features {i}": level.grad for i, level in enumerate(features)}
    return Step(kept[0][0], kept[0][1], {name: loss.detach() for name, loss in losses.items()}, gradients), reassign.call_args


def assert_same(got: Step, wanted: Step) -> None:
    """Labels and their weights exactly, losses within 1e-5, gradients within 1e-4 of the largest: for features, of all levels, since
    the published focal loss of a level whose scores are all near 0 is mostly rounding."""
    assert torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.label_weights, wanted.label_weights)
    torch.testing.assert_close(got.losses, wanted.losses, **LOSSES)
    assert got.gradients.keys() == wanted.gradients.keys()
    features = max(gradient.abs().max() for name, gradient in wanted.gradients.items() if name.startswith("features"))
    for name, gradient in got.gradients.items():
        largest = features if name.startswith("features") else wanted.gradients[name].abs().max()
        assert (gradient - wanted.gradients[name]).abs().max() <= GRADIENTS * largest, name


def compare(ours: PAAHead, published: Any, features: list[torch.Tensor], samples: list[Any]) -> Step:
    """The step, and before it what the maximum-IoU assignment made of the boxes: exactly mmdetection's."""
    with mock.patch.object(published, "paa_reassign", wraps=published.paa_reassign) as reassign:
        wanted = step(published, features, samples)
    got, call = our_step(ours, features, samples)
    for image, theirs in enumerate(reassign.call_args_list):
        label, label_weight, bbox_weight, pos_inds, pos_gt_inds = (column[image] for column in call.args[0][1:6])
        found = pos_inds >= 0
        assert torch.equal(label, theirs.args[1])
        assert torch.equal(label_weight, theirs.args[2])
        assert torch.equal(bbox_weight[found], theirs.args[3][found])  # nobody asks for the others
        assert torch.equal(pos_inds[found], theirs.args[4])
        assert torch.equal(pos_gt_inds[found], theirs.args[5])
    assert len(reassign.call_args_list) == len(samples)
    assert_same(got, wanted)
    return got


def test_the_state_dict_loads_and_the_outputs_are_the_same(generator):
    """80 classes, 5 levels, 256 channels, four convolutions: the defaults are the published configuration."""
    published = build()
    ours = PAAHead(80, 256)
    ours.load_state_dict(published.state_dict())
    published.load_state_dict(ours.state_dict())
    features = make_features(1, (64, 96), 256, generator)
    with torch.no_grad():
        for mine, theirs in zip(ours(features), published(tuple(features)), strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_a_fresh_head_starts_as_published():
    """Same deviations and biases; the draws differ, so both may be five standard errors of such a difference apart."""
    published, ours = build(), PAAHead(80, 256)
    published.init_weights()
    wanted = published.state_dict()
    for name, value in ours.state_dict().items():
        values, deviation = value.numel(), float(wanted[name].std(correction=0))
        assert float(value.mean()) == pytest.approx(float(wanted[name].mean()), abs=5 * deviation * (2 / values) ** 0.5), name
        assert float(value.std(correction=0)) == pytest.approx(deviation, rel=5 / values**0.5), name


def test_the_published_configuration(generator):
    size = (128, 160)
    ours, published = pair(generator, build())
    compare(ours, published, make_features(3, size, 256, generator), make_samples([0, 1, 60], size, 80, generator))


@pytest.mark.parametrize("boxes", [[0], [0, 0], [1], [7, 0, 1], [200]], ids=str)
def test_batches(boxes, generator):
    ours, published = pair(generator, build(**SMALL))
    compare(ours, published, make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator))


def test_other_settings(generator):
    published = build(**SMALL, num_classes=3, topk=4, covariance_type="tied")
    published.assigner.match_low_quality, published.assigner.pos_iou_thr = False, 0.3
    settings = {"topk": 4, "covariance_type": "tied", "match_low_quality": False, "pos_iou_thr": 0.3}
    ours, published = pair(generator, published, **settings)
    got = compare(ours, published, make_features(2, SIZE, 32, generator), make_samples([5, 12], SIZE, 3, generator))
    assert (got.label_weights == 0).any()  # between the thresholds


def test_padding_and_ignored_boxes(generator):
    """Images of different sizes in one batch, and boxes to ignore; in the second image nothing else."""
    ours, published = pair(generator, build(**SMALL), ignore_iof_thr=0.5)
    published.assigner.ignore_iof_thr = 0.5
    small = (256, 192)
    samples = [make_samples([boxes], size, 80, generator)[0] for boxes, size in ((7, small), (0, SIZE), (5, SIZE))]
    for sample, other in zip(samples, make_samples([3, 2, 2], small, 80, generator), strict=True):
        sample.ignored_instances = other.gt_instances
    got = compare(ours, published, make_features(3, SIZE, 32, generator), samples)
    assert (got.label_weights == 0).any()


@pytest.mark.parametrize("border", [0, 40])
def test_levels_without_an_anchor_inside(border, generator):
    """Anchors that reach beyond the picture are not trained: whole levels of them here."""
    ours, published = pair(generator, build(**SMALL), allowed_border=border)
    published.train_cfg["allowed_border"] = border
    features = make_features(2, SIZE, 32, generator)
    got = compare(ours, published, features, make_samples([7, 3], SIZE, 80, generator))
    weights = got.label_weights.reshape(2, -1).split([level[0, 0].numel() for level in features], 1)
    inside = [bool(level.any()) for level in weights]
    print(inside)
    assert inside[0]
    assert not inside[-1]


def test_boxes_beyond_the_picture(generator):
    """A box that no anchor overlaps has the maximum 0, which all anchors reach; and one without area."""
    ours, published = pair(generator, build(**SMALL))
    samples = make_samples([3], SIZE, 80, generator)
    instances = samples[0].gt_instances
    instances.bboxes[0] = torch.tensor([5000.0, 5000.0, 5010.0, 5020.0])
    instances.bboxes[1, 2:] = instances.bboxes[1, :2]
    compare(ours, published, make_features(1, SIZE, 32, generator), samples)


def test_decoding(generator):
    """Boxes are at most 62.5 times larger or smaller than their anchor; an anchor need not be square."""
    anchors = torch.rand(1000, 2, 2, generator=generator).sort(1).values.flatten(1) * 1000
    deltas = torch.randn(1000, 4, generator=generator) * torch.tensor([1, 1, 30, 30])
    wanted = build().bbox_coder.decode(anchors, deltas)
    torch.testing.assert_close(decode(anchors, deltas, (0.1, 0.1, 0.2, 0.2)), wanted, rtol=1e-5, atol=1e-3)


def test_ten_steps(generator):
    """Trained together: the same at every step from the same weights, and the loss falls."""
    ours, published = pair(generator, build(**SMALL, num_classes=4))
    features, samples = make_features(2, SIZE, 32, generator), make_samples([3, 12], SIZE, 4, generator)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.02, momentum=0.9)
    totals = []
    for _ in range(10):
        published.load_state_dict(ours.state_dict())
        got = compare(ours, published, features, samples)
        optimizer.step()
        totals.append(float(sum(got.losses.values())))
    assert totals[-1] < 0.8 * totals[0]


def test_the_check_can_fail(generator):
    """One candidate fewer, another weight, another threshold: each is seen."""
    inputs = make_features(1, SIZE, 32, generator), make_samples([60], SIZE, 80, generator)
    published = build(**SMALL)
    for options in ({"topk": 8}, {"bbox_loss_weight": 1.301}, {"pos_iou_thr": 0.11}, {"alpha": 0.2501}):
        with pytest.raises(AssertionError):
            compare(*pair(generator, published, **options), *inputs)


# --- float32, synchronisation ---


def test_autocast(generator):
    """Towers in bfloat16; losses and detections are those of the float32 values of their outputs."""
    size = (64, 96)  # convolutions in bfloat16 are slow here
    ours, _ = pair(generator, build(**SMALL))
    features, samples = make_features(2, size, 32, generator), make_samples([0, 7], size, 80, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = ours(features)
        got, found = ours.loss(features, targets_of(samples)), ours.predict(features, [size, size])
    assert outputs[0][0].dtype == outputs[2][0].dtype == torch.bfloat16
    with mock.patch.object(ours, "forward", lambda _: tuple([level.float() for level in levels] for levels in outputs)):
        wanted, detections = ours.loss(features, targets_of(samples)), ours.predict(features, [size, size])
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, wanted[name])
    for image, other in zip(found, detections, strict=True):
        assert image["boxes"].dtype == image["scores"].dtype == torch.float32
        assert all(torch.equal(values, other[name]) for name, values in image.items())


@pytest.mark.parametrize("boxes", [[0], [7, 0, 1], [7] * 6], ids=str)
def test_training_never_waits(boxes, generator):
    """Reads and results of unknown shape between features and gradients: none; the published head's grow with the boxes."""
    ours, published = pair(generator, build(**SMALL))
    features, samples = make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator)
    with Synchronisations() as mode:
        sum(ours.loss(features, targets_of(samples), [SIZE] * len(boxes)).values()).backward()
    with Synchronisations() as others:
        sum(published.loss(features, samples).values()).backward()
    print(f"{mode.count} synchronisations, published {others.count}")
    assert mode.count == 0 < others.count


# --- detections ---


def detectors(generator: torch.Generator, **options: Any) -> tuple[PAAHead, Any]:
    """Heads of which a few hundred scores an image are above the threshold."""
    published = build(**SMALL).eval()
    torch.nn.init.normal_(published.atss_cls.weight, std=0.09, generator=generator)
    torch.nn.init.constant_(published.atss_cls.bias, -8)
    ours = PAAHead(80, **SMALL, **options).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def assert_detects_the_same(ours: PAAHead, published: Any, features: Any, samples: Any, rescale: bool = False) -> None:
    """Scores are square roots of two sigmoids. torch's differ by a rounding between a vector register and the end of a row."""
    sizes, factors = [sample.img_shape for sample in samples], [sample.scale_factor for sample in samples]
    got = ours.predict(features, sizes, factors if rescale else None)
    with torch.no_grad():
        wanted = published.predict(features, samples, rescale=rescale)
    for image, theirs in zip(got, wanted, strict=True):
        assert len(theirs) > 0
        mine = InstanceData(bboxes=image["boxes"], scores=image["scores"], labels=image["labels"])
        assert_same_detections(mine, theirs, rounding=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("voting", [True, False])
def test_the_same_detections_in_the_same_order(voting, rescale, generator):
    ours, published = detectors(generator, score_voting=voting)
    published.with_score_voting = voting
    samples = make_samples([0] * 3, SIZE, 80, generator)
    samples[0].set_metainfo({"scale_factor": (0.5, 0.8), "img_shape": (250, 314)})
    samples[1].set_metainfo({"scale_factor": (1.5, 1.5)})
    assert_detects_the_same(ours, published, make_features(3, SIZE, 32, generator), samples, rescale)


@pytest.mark.parametrize(
    ("options", "test_cfg"),
    [
        ({"score_thr": 0.07}, {"score_thr": 0.07}),
        ({"max_per_img": 1}, {"max_per_img": 1}),
        ({"max_per_img": 0}, {"max_per_img": -1}),
        ({"nms_pre": 20}, {"nms_pre": 20}),
        ({"nms_pre": 0}, {"nms_pre": -1}),
        ({"iou_threshold": 0.9}, {"nms": {"type": "nms", "iou_threshold": 0.9}}),
    ],
    ids=str,
)
def test_other_test_settings(options, test_cfg, generator):
    ours, published = detectors(generator, **options)
    published.test_cfg.update(test_cfg)
    assert_detects_the_same(ours, published, make_features(2, SIZE, 32, generator), make_samples([0] * 2, SIZE, 80, generator))


@pytest.mark.parametrize("images", [1, 3])
def test_prediction_waits_once_a_batch(images, generator):
    """For the numbers of detections; NMS, voting and rescaling wait for nothing."""
    ours, published = detectors(generator)
    features, samples = make_features(images, SIZE, 32, generator), make_samples([0] * images, SIZE, 80, generator)
    with Synchronisations() as mode:
        found = ours.predict(features, [SIZE] * images, [1.5] * images)
    with Synchronisations() as others, torch.no_grad():
        published.predict(features, samples, rescale=True)
    print(f"{mode.count} synchronisations, published {others.count}")
    assert all(len(image["boxes"]) > 0 for image in found)
    assert mode.count == 1 < others.count


def test_no_detections(generator):
    ours, _ = detectors(generator, score_thr=0.999)
    for image in ours.predict(make_features(2, SIZE, 32, generator), [SIZE] * 2):
        assert {name: tuple(values.shape) for name, values in image.items()} == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_levels_to_images(generator):
    levels = make_features(3, (40, 64), 6, generator)
    got = paa_gpu.levels_to_images(levels)
    assert len(got) == 3
    assert all(map(torch.equal, got, levels_to_images(levels)))
