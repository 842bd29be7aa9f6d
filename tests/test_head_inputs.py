"""What `PAAHead` refuses, and what it does with inputs that it cannot refuse."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from synchronisations import Synchronisations
from test_head import SIZE, STRIDES, make_features, make_head, make_targets
from torch import Tensor, nn
from torchvision import tv_tensors

from paa_gpu import PAAHead, _checks

SETTINGS = [
    ({"num_classes": 0}, ValueError, "`num_classes` must be at least 1, got 0"),
    ({"in_channels": 8.0}, TypeError, "`in_channels` must be an int, got float"),
    ({"norm_groups": 3}, ValueError, "`feat_channels` must be a multiple of `norm_groups`, 3, got 8"),
    ({"stacked_convs": -1}, ValueError, "`stacked_convs` must be at least 0, got -1"),
    ({"strides": 8}, TypeError, "`strides` must be a list with one entry per level, got int"),
    ({"strides": ()}, ValueError, "`strides` must have at least one entry, got an empty list"),
    ({"strides": (8, 0)}, ValueError, "`strides[1]` must be at least 1, got 0"),
    ({"anchor_scale": 0}, ValueError, "`anchor_scale` must be positive, got 0"),
    ({"anchor_scale": "8"}, TypeError, "`anchor_scale` must be a float, got str"),
    ({"target_stds": (1, 1)}, ValueError, "`target_stds` must have 4 entries as a box has, got 2"),
    ({"target_stds": (0.1, 0.1, 0.2, 0)}, ValueError, "`target_stds[3]` must be positive, got 0"),
    ({"pos_iou_thr": -0.1}, ValueError, "`pos_iou_thr` must not be negative, got -0.1"),
    ({"neg_iou_thr": (0, 0.1)}, TypeError, "`neg_iou_thr` must be a float, got tuple"),
    ({"min_pos_iou": float("nan")}, ValueError, "`min_pos_iou` must be a number, got nan"),
    ({"match_low_quality": 1}, TypeError, "`match_low_quality` must be a bool, got int"),
    ({"ignore_iof_thr": None}, TypeError, "`ignore_iof_thr` must be a float, got NoneType"),
    ({"allowed_border": True}, TypeError, "`allowed_border` must be a float, got bool"),
    ({"topk": 0}, ValueError, "`topk` must be at least 1, got 0"),
    ({"covariance_type": "round"}, ValueError, '`covariance_type` must be "full", "tied", "diag" or "spherical", got \'round\''),
    ({"separation": "c"}, ValueError, '`separation` must be "mmdet", "paper", "a", "b" or "d", got \'c\''),
    ({"singleton": "maybe"}, ValueError, '`singleton` must be "background" or "positive", got \'maybe\''),
    ({"precision": "float16"}, ValueError, '`precision` must be "auto", "float64", "float32" or "mixed", got \'float16\''),
    ({"anchor_scale": float("inf")}, ValueError, "`anchor_scale` must be finite, got inf"),
    ({"target_stds": (0.1, 0.1, float("inf"), 0.2)}, ValueError, "`target_stds[2]` must be finite, got inf"),
    ({"gamma": -2}, ValueError, "`gamma` must not be negative, got -2"),
    ({"gamma": float("inf")}, ValueError, "`gamma` must be finite, got inf"),
    ({"alpha": None}, TypeError, "`alpha` must be a float, got NoneType"),
    ({"alpha": -0.1}, ValueError, "`alpha` must not be negative, got -0.1"),
    ({"alpha": 1.5}, ValueError, "`alpha` must be at most 1, got 1.5"),
    ({"bbox_loss_weight": -1.3}, ValueError, "`bbox_loss_weight` must not be negative, got -1.3"),
    ({"iou_loss_weight": "0.5"}, TypeError, "`iou_loss_weight` must be a float, got str"),
    ({"iou_loss_weight": float("inf")}, ValueError, "`iou_loss_weight` must be finite, got inf"),
    ({"nms_pre": -1}, ValueError, "`nms_pre` must be at least 0, got -1"),
    ({"score_thr": [0.05]}, TypeError, "`score_thr` must be a float, got list"),
    ({"iou_threshold": -0.6}, ValueError, "`iou_threshold` must not be negative, got -0.6"),
    ({"max_per_img": 1e2}, TypeError, "`max_per_img` must be an int, got float"),
    ({"score_voting": "yes"}, TypeError, "`score_voting` must be a bool, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), SETTINGS, ids=[message for *_, message in SETTINGS])
def test_wrong_settings(options, error, message):
    settings = {"num_classes": 3, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1, "norm_groups": 4, "strides": STRIDES}
    PAAHead(**settings)
    with pytest.raises(error) as raised:
        PAAHead(**{**settings, **options})
    assert str(raised.value) == message


def boxes_of(**change: Any) -> list[dict[str, Tensor]]:
    return [{**make_targets([2])[0], **change}]


def as_tv(boxes: Tensor, layout: str) -> Tensor:
    return tv_tensors.BoundingBoxes(boxes, format=layout, canvas_size=SIZE)


INPUTS = [
    (make_features(1)[:1], make_targets([2]), None, "`features` must have 2 entries as `strides` has, got 1"),
    ([level[:, :3] for level in make_features(1)], make_targets([2]), None, "`features[0]` must have shape [any, 8, any, any], got [1, 3, 8, 12]"),
    (make_features(2), make_targets([2]), None, "`targets` must have 2 entries as the batch has, got 1"),
    (make_features(1), [{"boxes": torch.zeros(0, 4)}], None, "`targets[0]` must have an entry `labels`, got ['boxes']"),
    (make_features(1), boxes_of(boxes=torch.zeros(2, 5)), None, "`targets[0]['boxes']` must have shape [any, 4], got [2, 5]"),
    (make_features(1), boxes_of(labels=torch.zeros(3).long()), None, "`targets[0]['labels']` must have shape [2], got [3]"),
    (make_features(1), boxes_of(labels=torch.tensor([0, 3])), None, "`targets[0]['labels']` must be in [0, 3), got 3 at position 1"),
    (make_features(1), boxes_of(labels=torch.tensor([-1, 3]).int()), None, "`targets[0]['labels']` must be in [0, 3), got -1 at position 0"),
    (make_features(1), boxes_of(boxes=torch.tensor([[0.0, 0, 9, 9], [40, 30, 20, 60]])), None, "`targets[0]['boxes']` must be finite, with x1 <= x2 and y1 <= y2, got [40.0, 30.0, 20.0, 60.0] at position 1"),
    (make_features(1), boxes_of(boxes=torch.tensor([[0, float("nan"), 9, 9], [1, 1, 2, 2]])), None, "`targets[0]['boxes']` must be finite, with x1 <= x2 and y1 <= y2, got [0.0, nan, 9.0, 9.0] at position 0"),
    (make_features(1), boxes_of(boxes=torch.tensor([[1.0, 1, 2, 2], [0, 0, 9, float("inf")]]).bfloat16()), None, "`targets[0]['boxes']` must be finite, with x1 <= x2 and y1 <= y2, got [0.0, 0.0, 9.0, inf] at position 1"),
    (make_features(1), boxes_of(ignored_boxes=torch.tensor([[9.0, 0, 4, 4]])), None, "`targets[0]['ignored_boxes']` must be finite, with x1 <= x2 and y1 <= y2, got [9.0, 0.0, 4.0, 4.0] at position 0"),
    (make_features(1), boxes_of(ignored_boxes=torch.zeros(4)), None, "`targets[0]['ignored_boxes']` must have 2 dimensions, got shape [4]"),
    ([*make_features(1)[:1], make_features(1)[1].to("meta")], make_targets([2]), None, "`features[1]` must be on cpu as the other tensors are, got meta"),
    (make_features(1), boxes_of(boxes=torch.zeros(2, 4, device="meta")), None, "`targets[0]['boxes']` must be on cpu as the other tensors are, got meta"),
    (make_features(1), make_targets([2]), [SIZE, SIZE], "`image_sizes` must have 1 entry as the batch has, got 2"),
    (make_features(1), make_targets([2]), [96], "`image_sizes[0]` must be (height, width), got 96"),
    (make_features(1), make_targets([2]), torch.zeros(2, 2), "`image_sizes` must have shape [1, 2], got [2, 2]"),
    (make_features(1), make_targets([2]), [(64, -1)], "`image_sizes[0]` must be at least 0, got -1"),
    (make_features(1), make_targets([2]), [(float("nan"), 64)], "`image_sizes[0]` must be at least 0, got nan"),
    (make_features(1), make_targets([2]), torch.tensor([[64, -1]]), "`image_sizes` must be at least 0, got [64, -1] at position 0"),
    (make_features(1), make_targets([2]), [SIZE[::-1]], "`image_sizes[0]` must be (height, width) within the batch, below [72, 104], got (96, 64)"),
    (make_features(2), make_targets([2, 1]), torch.tensor([SIZE, (64, 104)]), "`image_sizes` must be (height, width) within the batch, below [72, 104], got [64, 104] at position 1"),
    (make_features(1)[::-1], make_targets([2]), None, "`features` must have heights that fit the strides [8, 16], got [4, 8]"),
    ([level[:, :, :1] for level in make_features(1)[::-1]], make_targets([2]), None, "`features` must have widths that fit the strides [8, 16], got [6, 12]"),
    (make_features(1), boxes_of(boxes=as_tv(torch.rand(2, 4), "XYWH")), None, "`targets[0]['boxes']` must have the format XYXY, got XYWH"),
    (make_features(1), boxes_of(ignored_boxes=as_tv(torch.rand(1, 4), "CXCYWH")), None, "`targets[0]['ignored_boxes']` must have the format XYXY, got CXCYWH"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "targets", "sizes", "message"), INPUTS, ids=[message for *_, message in INPUTS])
def test_wrong_inputs(features, targets, sizes, message):
    with pytest.raises(ValueError) as error:
        make_head().loss(features, targets, sizes)
    assert str(error.value) == message


def test_levels_of_any_rounding_fit_their_strides():
    """Each level has half of the cells of the one before, rounded up or down."""
    for pixels in range(300):
        for roundings in itertools.product([0, 1], repeat=5):
            cells = [(pixels + 7 * roundings[0]) // 8]
            for up in roundings[1:]:
                cells.append((cells[-1] + up) // 2)
            levels = [torch.empty(0, 0, number, number) for number in cells]
            _checks.check_pyramid("features", levels, (8, 16, 32, 64, 128))


def test_sizes_up_to_the_last_cell():
    """Of networks that round down, an image has up to 7 pixels more than the cells of the first level."""
    make_head().loss(make_features(1), make_targets([2]), [(71, 103)])
    make_head().loss(make_features(1), make_targets([2]), torch.tensor([[71.9, 103.9]]))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1000.0])
def test_a_box_without_a_size_that_nobody_can_read(wrong, monkeypatch):
    """As on a GPU. Such a box overlaps nothing, so the other losses stay finite."""
    monkeypatch.setattr(_checks, "values_of", lambda tensor: None)
    target, other = make_targets([2, 1])
    target["boxes"][1, 2] = wrong
    losses = make_head().loss(make_features(2), [target, other])
    assert losses["loss_bbox"].isnan()
    assert losses["loss_cls"].isfinite()


def test_a_box_that_overlaps_no_anchor():
    """As published it takes the anchors of the others; with a positive `min_pos_iou` it takes none."""
    (target,) = make_targets([3])
    far = {
        "boxes": torch.cat([target["boxes"], torch.tensor([[5000.0, 5000, 5040, 5040]])]),
        "labels": torch.tensor([0, 1, 2, 1]),
    }
    found = {
        least: make_head(min_pos_iou=least).loss(make_features(1), [{**target, "labels": torch.tensor([0, 1, 2])}])
        for least in (0.0, 1e-12)
    }
    assert found[0.0] == found[1e-12]
    assert make_head(min_pos_iou=1e-12).loss(make_features(1), [far]) == found[1e-12]
    assert make_head().loss(make_features(1), [far])["loss_bbox"] < found[0.0]["loss_bbox"] / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda level: level[0], ValueError, "`features[0]` must have 4 dimensions, got shape [8, 8, 12]"),
        (lambda level: level.numpy(), TypeError, "`features[0]` must be a Tensor, got numpy.ndarray"),
        (lambda level: level.tolist(), TypeError, "`features[0]` must be a Tensor, got list"),
    ],
    ids=["one image", "arrays", "lists"],
)
def test_features_that_are_no_batch(change, error, message):
    """They are named, not what is counted by them."""
    features = [change(level) for level in make_features(2)]
    for call in (
        lambda: make_head().loss(features, make_targets([2, 1])),
        lambda: make_head().predict(features, [SIZE, SIZE]),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message


def test_boxes_of_torchvision_are_corners():
    head, features, (target,) = make_head(), make_features(1), make_targets([3])
    got = head.loss(features, [{**target, "boxes": as_tv(target["boxes"], "XYXY")}])
    assert got == head.loss(features, [target])


@pytest.mark.parametrize("target", [torch.rand(2, 4), None, ["boxes", "labels"]], ids=["boxes alone", "nothing", "a list"])
def test_targets_that_are_no_dictionaries(target):
    with pytest.raises(TypeError, match=rf"`targets\[0\]` must be a dictionary, got {type(target).__name__}"):
        make_head().loss(make_features(1), [target])


@contextlib.contextmanager
def default_device():
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("mode", ["device", "default device", "profiler", "dispatch mode", "parameter"])
def test_labels_are_checked_in_any_mode(mode):
    """Whoever watches the calls: the labels have values."""
    contexts = {
        "device": lambda: torch.device("cpu"),
        "default device": default_device,
        "profiler": torch.profiler.profile,
        "dispatch mode": Synchronisations,
    }
    targets = make_targets([2])
    targets[0]["labels"] = torch.tensor([0, 3])
    if mode == "parameter":
        targets[0]["labels"] = nn.Parameter(targets[0]["labels"], requires_grad=False)
    with (
        contexts.get(mode, contextlib.nullcontext)(),
        pytest.raises(ValueError, match=r"must be in \[0, 3\), got 3 at position 1"),
    ):
        make_head().loss(make_features(1), targets)


def test_a_batch_without_images():
    head, features = make_head(), make_features(0)
    with pytest.raises(ValueError, match="`targets` must have 0 entries as the batch has, got 1"):
        head.loss(features, make_targets([1]))
    for sizes in (None, []):
        with pytest.raises(ValueError, match="`targets` must have at least one entry, got an empty list"):
            head.loss(features, [], sizes)


def test_a_border_needs_sizes():
    with pytest.raises(ValueError, match="`image_sizes` must be given with an `allowed_border` of 0, got None"):
        make_head(allowed_border=0).loss(make_features(1), make_targets([2]))


def test_sizes_of_zero_are_accepted():
    targets = make_targets([2])
    targets[0]["boxes"][1, 2:] = targets[0]["boxes"][1, :2]
    assert all(loss.isfinite() for loss in make_head().loss(make_features(1), targets).values())
    for sizes in ([(0, 96)], torch.tensor([[0, 96]])):
        make_head().eval().predict(make_features(1), sizes)
