"""torchvision's detectors, accelerated: torchvision itself says what they must match, lose, and sample."""

from __future__ import annotations

import copy
import pickle
import re
import tracemalloc

import pytest
import torch
import torchvision_models as models
from torch import nn
from torchvision.models import detection
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, generalized_box_iou

from paa_gpu.integrations.torchvision import accelerate, matching, restore, use_paa

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """Losses and gradients of a training step, and the state that it leaves the random numbers in."""
    torch.manual_seed(5)
    model.train().zero_grad()
    losses = model(*copy.deepcopy(batch))
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**{name: loss.detach() for name, loss in losses.items()}, **gradients, "random": torch.get_rng_state()}


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


# --- accelerate ---


@pytest.mark.parametrize("name", models.MODELS)
def test_losses_gradients_and_sampling_are_those_of_torchvision(name, generator, monkeypatch):
    model = models.MODELS[name]()
    counts = (7, 0, 3) if name not in ("MaskRCNN", "KeypointRCNN") else (7, 1, 3)  # which torchvision trains with boxes only
    batch = models.batch(generator, counts, 2 if name == "KeypointRCNN" else 3)
    wanted = step(model, batch)
    called = []
    monkeypatch.setattr(Matcher, "__call__", lambda *_: called.append(0))
    monkeypatch.setattr(SSDMatcher, "__call__", lambda *_: called.append(0))
    assert accelerate(model) is model
    assert same(step(model, batch), wanted)
    assert not called
    monkeypatch.undo()
    assert same(step(restore(model), batch), wanted)
    assert not any(isinstance(module, matching.Accelerated) for module in model.modules())


@pytest.mark.parametrize("name", ["RetinaNet", "SSD", "FasterRCNN"])
def test_detections_are_those_of_torchvision(name, generator):
    model = models.MODELS[name]().eval()
    images, _ = models.batch(generator)
    wanted = model(images)
    for got, detections in zip(accelerate(model)(images), wanted, strict=True):
        assert same(got, detections)


def crowd(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors and boxes with ties: of an anchor's overlaps, of a box's best anchors, and a box that no anchor overlaps."""
    corner = torch.randint(0, 20, (400, 2), generator=generator).float() * 4
    anchors = torch.cat([corner, corner + torch.randint(1, 6, (400, 2), generator=generator) * 8], 1)
    boxes = torch.cat([anchors[::40], anchors[5:9] + 3, anchors[5:7] + 3, torch.tensor([[500.0, 500, 510, 510]])])
    return anchors, boxes


@pytest.mark.parametrize(
    "matcher",
    [
        Matcher(0.5, 0.4, True),
        Matcher(0.7, 0.3, True),
        Matcher(0.5, 0.5, False),
        SSDMatcher(0.5),
        Matcher(0.5, -1.0, True),
        Matcher(-0.5, -1.0, False),
    ],
    ids=["RetinaNet", "RPN", "RoI", "SSD", "no background", "no thresholds"],
)
@pytest.mark.parametrize(
    ("boxes_dtype", "anchors_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32"), ("float16", "float16"), ("float64", "float32")],
)
def test_matches_to_the_bit(matcher, boxes_dtype, anchors_dtype, generator):
    anchors, boxes = crowd(generator)
    anchors, boxes = anchors.to(getattr(torch, anchors_dtype)), boxes.to(getattr(torch, boxes_dtype))
    wanted = matcher(box_iou(boxes, anchors))
    assert len(wanted.unique()) > 8  # several boxes, and background
    (got,) = matching.matches_of(matcher, [boxes], [anchors])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_without_boxes_or_anchors(dtype):
    """torchvision gives background to an image without boxes before it asks the matcher, which refuses an image without anchors."""
    matcher, anchors, none = Matcher(0.5, 0.4, True), torch.tensor([[0.0, 0, 9, 9]], dtype=dtype), torch.empty(0, 4, dtype=dtype)
    got = matching.matches_of(matcher, [none, anchors, none], [anchors, anchors, none])
    assert [matches.tolist() for matches in got] == [[-1], [0], []]
    with pytest.raises(ValueError, match="No proposal boxes") as wanted:
        matcher(box_iou(anchors, none))
    with pytest.raises(ValueError, match=str(wanted.value)):
        matching.matches_of(matcher, [anchors], [none])


@pytest.mark.parametrize("matcher", [Matcher(0.5, 0.4, True), Matcher(0.5, 0.5, False)], ids=["RetinaNet", "RoI"])
def test_matches_of_a_box_with_a_nan(matcher, generator):
    """All anchors go to the first such box, and so the loss becomes NaN."""
    anchors, boxes = crowd(generator)
    boxes[3, 2] = boxes[5, 1] = torch.nan
    wanted = [matcher(box_iou(each, anchors)) for each in (boxes, boxes[3:4])]
    got = matching.matches_of(matcher, [boxes, boxes[3:4], boxes[:3]], [anchors] * 3)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert set(got[0].tolist()) == {3}
    assert torch.equal(got[2], matcher(box_iou(boxes[:3], anchors)))  # other images stay as they are


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("name", ["RetinaNet", "SSD", "FasterRCNN"])
def test_a_box_with_a_nan_makes_the_loss_nan(name, only, generator):
    model, (images, targets) = models.MODELS[name]().train(), models.batch(generator, (7,))
    targets[0]["boxes"][0] = torch.nan
    if only:
        targets = [{key: value[:1] for key, value in targets[0].items()}]

    def losses() -> dict[str, bool]:
        torch.manual_seed(5)
        return {name: bool(loss.isnan()) for name, loss in model(images, copy.deepcopy(targets)).items()}

    wanted = losses()
    assert any(wanted.values())
    accelerate(model)
    assert losses() == wanted


def test_matching_does_without_the_matrix(generator):
    anchors = torch.rand(20_000, 4, generator=generator) * 400
    anchors[:, 2:] += anchors[:, :2] + 4
    boxes = anchors[:500] + 2
    matcher = Matcher(0.5, 0.4, True)

    def peak(match) -> int:
        match()  # compile
        with torch.profiler.profile(profile_memory=True) as profile:
            match()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    matrix = len(anchors) * len(boxes) * 4
    assert peak(lambda: matcher(box_iou(boxes, anchors))) > 5 * matrix
    matching.matches_of(matcher, [boxes], [anchors])  # compile before numba's own memory counts
    tracemalloc.start()  # NumPy's arrays
    got = peak(lambda: matching.matches_of(matcher, [boxes], [anchors]))
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got + arrays < matrix / 4


class OwnRetinaNet(detection.RetinaNet):
    """A subclass that reaches the method of its base."""

    def compute_loss(self, targets, head_outputs, anchors):
        losses = super().compute_loss(targets, head_outputs, anchors)
        return {name: 2 * loss for name, loss in losses.items()}


def own_retinanet() -> OwnRetinaNet:
    return OwnRetinaNet(models.backbone(), 3, min_size=models.SIZE, max_size=2 * models.SIZE, anchor_generator=models.anchors())


CHANGES = {"accelerate": accelerate, "use_paa": use_paa}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [models.retinanet, own_retinanet])
def test_copies_pickles_and_checkpoints(change, build, generator):
    model = build()
    batch, published, keys = models.batch(generator), type(model), list(model.state_dict())
    CHANGES[change](model)
    assert list(model.state_dict()) == keys
    wanted = step(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert same(step(other, batch), wanted)
        assert type(restore(other)) is published
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert same(step(CHANGES[change](plain), batch), wanted)


def test_a_subclass_stays_in_force(generator):
    model, batch = own_retinanet(), models.batch(generator)
    wanted = step(model, batch)
    accelerate(model)
    assert isinstance(model, OwnRetinaNet)
    assert isinstance(model, matching.AcceleratedRetinaNet)
    assert same(step(model, batch), wanted)


def test_heads_in_a_model_of_ones_own(generator):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = models.faster_rcnn()
            self.first, self.second = parts.rpn, nn.ModuleList([parts.roi_heads])

    model = accelerate(Holder())
    assert isinstance(model.first, matching.AcceleratedRPN)
    assert isinstance(model.second[0], matching.AcceleratedRoIHeads)
    restore(model)
    assert type(model.first) is RegionProposalNetwork
    assert type(model.second[0]) is RoIHeads


@pytest.mark.long
def test_it_compiles(generator):
    model, batch = accelerate(models.retinanet()), models.batch(generator)
    wanted = step(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    losses = compiled(*copy.deepcopy(batch))
    assert all(torch.allclose(losses[name], wanted[name]) for name in losses)


def test_what_accelerate_refuses():
    with pytest.raises(TypeError, match="`model` must be a Module, got str"):
        accelerate("RetinaNet")
    with pytest.raises(ValueError, match=r"`model` must be or contain a RetinaNet, SSD, .* got Linear"):
        accelerate(nn.Linear(1, 1))
    scripted = torch.jit.script(nn.Linear(1, 1))
    for function in (accelerate, use_paa, restore):
        with pytest.raises(
            TypeError, match="`model` must not be scripted, since what it runs is fixed, got RecursiveScriptModule"
        ):
            function(scripted)

    class OwnMatcher(Matcher):
        pass

    model = models.faster_rcnn()
    model.roi_heads.proposal_matcher = OwnMatcher(0.5, 0.5)
    message = "`model.roi_heads.proposal_matcher` must be a Matcher or SSDMatcher of torchvision, got OwnMatcher"
    with pytest.raises(ValueError, match=re.escape(message)):
        accelerate(model)
    assert type(model.rpn) is RegionProposalNetwork  # nothing is changed
    model = models.faster_rcnn()
    model.rpn.box_similarity = torch.cdist
    with pytest.raises(ValueError, match=r"`model.rpn.box_similarity` must be box_iou of torchvision, got"):
        accelerate(model)

    class OwnHeads(RoIHeads):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    with pytest.raises(ValueError, match=r"`model.proposal_matcher` must be a Matcher or SSDMatcher .*, got NoneType"):
        accelerate(OwnHeads())


def test_a_measure_of_ones_own(generator):
    """The RPN matches by its own. RoIHeads has one too, and does not call it."""
    model, batch = models.faster_rcnn(), models.batch(generator)
    plain = step(model, batch)
    model.roi_heads.box_similarity = model.rpn.box_similarity = generalized_box_iou
    wanted = step(model, batch)
    assert not same(wanted, plain)
    model.rpn.box_similarity = box_iou
    assert same(step(accelerate(model), batch), plain)
    model.rpn.box_similarity = generalized_box_iou  # replaced later
    assert same(step(model, batch), wanted)


@pytest.mark.parametrize(
    ("name", "change"),
    [("RetinaNet", "accelerate"), ("SSD", "accelerate"), ("FasterRCNN", "accelerate"), ("RetinaNet", "use_paa")],
)
def test_as_many_targets_as_images(name, change, generator):
    model, (images, targets) = CHANGES[change](models.MODELS[name]()).train(), models.batch(generator)
    with pytest.raises(ValueError, match="`targets` must have one entry for each of the 2 images, got 3"):
        model(images[:2], targets)
    if name == "SSD" or change == "use_paa":  # the others raise torchvision's own error before they match
        with pytest.raises(ValueError, match="`targets` must have one entry for each of the 3 images, got 2"):
            model(images, targets[:2])


@pytest.mark.parametrize(("name", "change"), [("RetinaNet", "accelerate"), ("SSD", "accelerate"), ("RetinaNet", "use_paa")])
def test_targets_that_torchvision_refuses(name, change, generator):
    model, (images, targets) = models.MODELS[name]().train(), models.batch(generator)
    targets[0]["boxes"][1, 2] = targets[0]["boxes"][1, 0]
    messages = []
    for _ in range(2):
        with pytest.raises(AssertionError, match="All bounding boxes should have positive height and width") as raised:
            model(images, targets)
        messages.append(str(raised.value))
        CHANGES[change](model)
    assert messages[0] == messages[1]
    targets[0]["boxes"] = torch.zeros(4)
    with pytest.raises(AssertionError, match="Expected target boxes to be a tensor of shape"):
        model(images, targets)
    with pytest.raises(AssertionError, match="targets should not be none when in training mode"):
        model(images)


@pytest.mark.parametrize(("name", "change"), [("RetinaNet", "accelerate"), ("SSD", "accelerate"), ("RetinaNet", "use_paa")])
def test_targets_do_not_matter_in_evaluation(name, change, generator):
    """As in torchvision, which gives detections then."""
    model, (images, targets) = CHANGES[change](models.MODELS[name]()).eval(), models.batch(generator)
    for got, wanted in zip(model(images, targets), model(images), strict=True):
        assert same(got, wanted)


class OneMap(models.Body):
    out_channels = 16

    def forward(self, images):
        return self.low(images)


class OneNamedMap(OneMap):
    def forward(self, images):
        return {"0": self.low(images)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_backbone_that_gives_a_tensor(change, generator):
    """It stands for one level, as in torchvision."""
    results, batch = [], models.batch(generator)
    for backbone in (OneMap, OneNamedMap):
        torch.manual_seed(0)
        anchors = AnchorGenerator(((8, 16, 32),), (models.RATIOS,))
        model = detection.RetinaNet(backbone(), 3, min_size=models.SIZE, max_size=2 * models.SIZE, anchor_generator=anchors)
        results.append(step(CHANGES[change](model), batch))
    assert same(*results)


@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_matches_of_tiny_boxes(scale, generator):
    anchors, boxes = (rows * scale for rows in crowd(generator))
    matcher = Matcher(0.5, 0.4, True)
    wanted = matcher(box_iou(boxes, anchors))
    assert len(wanted.unique()) > 8
    assert torch.equal(matching.matches_of(matcher, [boxes], [anchors])[0], wanted)
