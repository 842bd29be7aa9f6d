"""`PAAHead` without torchvision and mmdetection: what it accepts, what it computes, and training over several processes.

That the losses and detections are the published ones is shown in tests/mmdet.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from synchronisations import Synchronisations
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors

import paa_gpu
from paa_gpu import PAAHead, _checks

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDES = (8, 16)
SIZE = (64, 96)


def make_head(**options: Any) -> PAAHead:
    torch.manual_seed(0)
    return PAAHead(3, 8, 8, 1, norm_groups=4, strides=STRIDES, **options)


def make_features(images: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator) for stride in STRIDES]


def make_targets(boxes: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for number in boxes:
        corner = torch.rand(number, 2, generator=generator) * 40
        extent = 10 + torch.rand(number, 2, generator=generator) * 40
        labels = torch.randint(3, (number,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": labels})
    return targets


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters()]


# --- use ---


@pytest.mark.parametrize("boxes", [[0, 0], [4, 0, 2]], ids=str)
def test_every_parameter_gets_a_gradient(boxes):
    """Without boxes too, where it is zero for the regression: DistributedDataParallel waits for all of them."""
    head = make_head()
    losses = head.loss(make_features(len(boxes)), make_targets(boxes))
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_iou"}
    sum(losses.values()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(head))
    assert (losses["loss_bbox"] == 0) == (losses["loss_iou"] == 0) == (sum(boxes) == 0)
    assert bool(head.atss_reg.weight.grad.any()) == (sum(boxes) > 0)


def test_inputs_are_not_modified():
    features, targets = make_features(2), make_targets([3, 1])
    before = [tensor.clone() for tensor in [*features, *(value for target in targets for value in target.values())]]
    make_head().loss(features, targets)
    after = [*features, *(value for target in targets for value in target.values())]
    assert all(map(torch.equal, before, after))


def test_every_option_reaches_the_assignment(monkeypatch):
    """None of them has its default."""
    assignment = {
        "pos_iou_thr": 0.2, "neg_iou_thr": 0.15, "min_pos_iou": 0.05, "match_low_quality": False, "ignore_iof_thr": 0.3
    }  # fmt: skip
    reassignment = {
        "topk": 4, "covariance_type": "tied", "separation": "paper", "singleton": "positive", "precision": "float32"
    }  # fmt: skip
    weights = {"gamma": 1.5, "alpha": 0.3, "bbox_loss_weight": 1.7, "target_stds": (0.2, 0.3, 0.4, 0.5)}
    head, seen = make_head(**assignment, **reassignment, **weights), []
    original = paa_gpu.head.assign_targets
    monkeypatch.setattr(
        paa_gpu.head, "assign_targets", lambda *args, **options: seen.append((args, options)) or original(*args, **options)
    )
    targets = make_targets([3, 1])
    targets[1]["ignored_boxes"] = torch.tensor([[0.0, 0, 30, 30]])
    head.loss(make_features(2), targets)
    ((arguments, options),) = seen
    assert options["num_classes"] == head.num_classes
    assert (options["assignment"], options["reassignment"]) == (assignment, reassignment)
    assert options["losses"] == {"gamma": 1.5, "alpha": 0.3, "loss_bbox_weight": 1.7, "stds": (0.2, 0.3, 0.4, 0.5)}
    assert [boxes.tolist() for boxes in arguments[5]] == [[], [[0.0, 0, 30, 30]]]
    defaults = inspect.signature(paa_gpu.PAAHead).parameters
    assert all(defaults[name].default != value for name, value in {**assignment, **reassignment, **weights}.items())


@pytest.mark.parametrize(("option", "loss"), [("bbox_loss_weight", "loss_bbox"), ("iou_loss_weight", "loss_iou")])
def test_weights_of_losses(option, loss):
    """They are factors. All potential positives are positive, because the weight of a box loss also decides which are."""
    batch = make_features(1), make_targets([1])
    head = make_head(topk=1000, separation=lambda assignment, score, loss, mask: (mask, torch.zeros_like(mask)))
    before = head.loss(*batch)
    setattr(head, option, 2.5 * getattr(head, option))
    after = head.loss(*batch)
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] * (2.5 if name == loss else 1))


def test_a_callers_separation_is_asked():
    """Labels may be int32, boxes float64."""
    seen = []

    def separation(assignment, score, loss, mask):
        seen.append(mask.sum())
        return assignment, torch.zeros_like(mask)

    targets = [{"boxes": target["boxes"].double(), "labels": target["labels"].int()} for target in make_targets([3, 1])]
    make_head(separation=separation).loss(make_features(2), targets)
    assert seen[0] > 0


def test_image_sizes_leave_out_what_is_beyond():
    """The losses of an image within a larger batch are those of the image alone."""
    head, features, targets = make_head(), make_features(1), make_targets([3])
    with torch.no_grad():
        alone = head.loss(features, targets)
        outputs = head(features)
        padded = [tuple(nn.functional.pad(level, (0, 4, 0, 2), value=3.0) for level in levels) for levels in outputs]
        head.forward = lambda _: tuple(list(levels) for levels in padded)
        wide = head.loss(features, targets, [SIZE])
    torch.testing.assert_close(wide, alone)


@pytest.mark.parametrize("boxes", [1, 10_000])
def test_every_anchor_is_a_potential_positive(boxes):
    """Of one box, and of many more boxes than anchors."""
    head, seen = make_head(pos_iou_thr=0.0), []
    original = head._assign
    head._assign = lambda *args: seen.append(original(*args)) or seen[0]
    for loss in head.loss(make_features(1), make_targets([boxes])).values():
        assert loss.isfinite()
        assert loss > 0
    assert (seen[0].gt_inds > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_levels_to_images(dtype):
    levels = [level.to(dtype) for level in make_features(2)]
    for image, got in enumerate(paa_gpu.levels_to_images(levels)):
        assert got.is_contiguous()
        assert torch.equal(got, torch.cat([level[image].flatten(1).T for level in levels]))


def test_torchvision_is_not_imported():
    code = "import sys, paa_gpu; paa_gpu.PAAHead(1, 8, 8, norm_groups=4); print({'torchvision', 'triton', 'numba'} & set(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "set()\n"


@pytest.fixture
def default_dtype():
    """`torch.set_default_dtype`, until the end of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_change_nothing(dtype, default_dtype):
    """Neither the dtype nor the device that torch gives to what names none."""
    head, features, targets = make_head(alpha=0.3), make_features(2), make_targets([3, 1])

    def results() -> list[Tensor]:
        detections = head.predict(features, [(64, 80), SIZE], padded=True)
        return [*head.loss(features, targets, [(64, 80), SIZE]).values(), *detections.values()]

    wanted = results()
    default_dtype(dtype)
    with torch.device("meta"):
        got = results()
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in wanted]
    assert all(map(torch.equal, got, wanted))


# --- synchronisation; that of `predict` is in test_predict ---


@pytest.mark.parametrize("boxes", [[0], [4, 0, 2]], ids=str)
def test_training_never_waits(boxes):
    """No value is read between features and gradients, and no shape depends on one."""
    head, features, targets = make_head(), make_features(len(boxes)), make_targets(boxes)
    with Synchronisations() as mode:
        sum(head.loss(features, targets, [SIZE] * len(boxes)).values()).backward()
    assert mode.count == 0


WAITS = [
    (lambda x, mask: x.sum().item(), 1), (lambda x, mask: x.nonzero(), 1), (lambda x, mask: x[mask], 1),
    (lambda x, mask: bool(mask.any()), 1), (lambda x, mask: x.tolist(), 1), (lambda x, mask: x.cpu(), 1),
    (lambda x, mask: x.numpy(), 1), (lambda x, mask: x.new_tensor([1, 2]), 1), (lambda x, mask: torch.tensor([1, 2]), 1),
    (lambda x, mask: x.index_put_((mask,), torch.zeros_like(x)[:2]), 1), (lambda x, mask: x.unique(), 1), (lambda x, mask: x.repeat_interleave(x), 1),
    (lambda x, mask: list(range(x[0])), 1), (lambda x, mask: torch.tensor([1, 2], device=x.device), 1),
    # what does not wait
    (lambda x, mask: nn.functional.one_hot(x, 4), 0), (lambda x, mask: x.masked_fill(mask, 7), 0),
    (lambda x, mask: x.__setitem__(mask, 7), 0), (lambda x, mask: torch.where(mask, x, 0), 0),
    (lambda x, mask: torch.nonzero_static(mask, size=2), 0), (lambda x, mask: torch.tensor([1, 2], device="cpu"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("call", "count"), WAITS)
def test_what_is_counted(call, count):
    """By this test, as it is the one that asks."""
    x = torch.arange(4)
    mask = x > 1
    with Synchronisations() as mode:
        call(x, mask)
    assert mode.count == count
    assert set(mode.by) <= {("tests/test_head.py", "<lambda>")}


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.9 asks CUDA's driver to pad fake tensors, 2.14 does not")
def test_training_on_fake_cuda_tensors():
    """From the towers' outputs on: without values nothing can be read. A label that is out of range is not refused there either."""
    head = make_head()
    with FakeTensorMode(), torch.device("cuda"):
        features = [torch.empty(level.shape) for level in make_features(2)]
        outputs = [[torch.empty(2, channels, *level.shape[2:]) for level in features] for channels in (3, 4, 1)]
        head.forward = lambda _: outputs
        targets = [{"boxes": torch.empty(number, 4), "labels": torch.empty(number, dtype=torch.int64)} for number in (3, 0)]
        losses = head.loss(features, targets, [SIZE, SIZE])
    assert {(loss.shape, loss.device.type) for loss in losses.values()} == {((), "cuda")}


# --- errors ---


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
    ({"min_pos_iou": float("nan")}, ValueError, "`min_pos_iou` must not be negative, got nan"),
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
    (make_features(1), make_targets([2]), [(96, -1)], "`image_sizes[0]` must be at least 0, got -1"),
    (make_features(1), make_targets([2]), [(float("nan"), 96)], "`image_sizes[0]` must be at least 0, got nan"),
    (make_features(1), make_targets([2]), torch.tensor([[96, -1]]), "`image_sizes` must be at least 0, got [96, -1] at position 0"),
    (make_features(1), boxes_of(boxes=as_tv(torch.rand(2, 4), "XYWH")), None, "`targets[0]['boxes']` must have the format XYXY, got XYWH"),
    (make_features(1), boxes_of(ignored_boxes=as_tv(torch.rand(1, 4), "CXCYWH")), None, "`targets[0]['ignored_boxes']` must have the format XYXY, got CXCYWH"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "targets", "sizes", "message"), INPUTS, ids=[message for *_, message in INPUTS])
def test_wrong_inputs(features, targets, sizes, message):
    with pytest.raises(ValueError) as error:
        make_head().loss(features, targets, sizes)
    assert str(error.value) == message


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


def test_settings_that_change_after_a_call():
    """What is kept for the sizes of the maps belongs to the settings."""
    head, batch = make_head(), (make_features(1), make_targets([2]))
    before = head.loss(*batch)["loss_bbox"]
    head.anchor_scale, head.strides = head.anchor_scale / 4, list(head.strides)
    changed = head.loss(*batch)["loss_bbox"]
    assert changed == copy.deepcopy(head).loss(*batch)["loss_bbox"] != before


def test_gradients_of_a_function():
    """`torch.func.grad` gives those of `backward`: a transform has no values, so labels are not checked."""
    model, batch = Loss(), (make_features(1), make_targets([2]))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    got = torch.func.grad(lambda parameters: torch.func.functional_call(model, parameters, batch))(parameters)
    model(*batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_a_border_needs_sizes():
    with pytest.raises(ValueError, match="`image_sizes` must be given with an `allowed_border` of 0, got None"):
        make_head(allowed_border=0).loss(make_features(1), make_targets([2]))


def test_levels_that_differ():
    levels = make_features(2)
    with pytest.raises(ValueError, match=r"`mlvl_tensor\[1\]` must have shape \[2, 8, any, any\], got \[1, 8, 4, 6\]"):
        paa_gpu.levels_to_images([levels[0], levels[1][:1]])
    with pytest.raises(TypeError, match=r"`mlvl_tensor\[1\]` must be float32, got float64"):
        paa_gpu.levels_to_images([levels[0], levels[1].double()])


# --- several processes ---


class Loss(nn.Module):
    """What DistributedDataParallel wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = make_head()

    def forward(self, features: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        return sum(self.head.loss(features, targets).values())


BATCHES = [[5, 0, 2], [0, 0, 0], [9, 1, 0]]  # boxes; the first process has one image, the second two


def train_one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    wrapped = DistributedDataParallel(Loss())
    results = []
    for seed, boxes in enumerate(BATCHES):
        wrapped.zero_grad()
        wrapped([level[own] for level in make_features(3, seed)], make_targets(boxes, seed)[own]).backward()
        results.append([gradient.clone() for gradient in gradients(wrapped)])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Of one process with the joined batch: with images, boxes and positives shared unevenly."""
    torch.multiprocessing.spawn(train_one_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for seed, boxes in enumerate(BATCHES):
        alone = Loss()
        alone(make_features(3, seed), make_targets(boxes, seed)).backward()
        for first, second, wanted in zip(ranks[0][seed], ranks[1][seed], gradients(alone), strict=True):
            assert torch.equal(first, second)
            assert (first - wanted).abs().max() <= 1e-5 * wanted.abs().max()
