"""RetinaNet trained by PAA: the anchors it assigns, by torchvision's own losses and the published loop; and what it costs."""

from __future__ import annotations

import copy
import io
import re

import numpy as np
import pytest
import torch
import torchvision_models as models
from synchronisations import Synchronisations
from torch import nn
from torchvision.models.detection._utils import _box_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from paa_gpu import reference
from paa_gpu.integrations.torchvision import PAAOptions, RetinaNetPAA, accelerate, paa, restore, use_paa

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def train(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    return model.train()(*copy.deepcopy(batch))


def recorded(model, batch, monkeypatch):
    """The arguments of the head's own losses in a training step, and the sizes of the levels."""
    calls = []
    computed = model.head.compute_loss
    monkeypatch.setattr(model.head, "compute_loss", lambda *arguments: calls.append(arguments) or computed(*arguments))
    sizes = []
    taken = paa._paa_matches
    monkeypatch.setattr(paa, "_paa_matches", lambda *arguments: sizes.append(arguments[-1]) or taken(*arguments))
    train(model, batch)
    (call,) = calls
    return *call, sizes[0]


def expected(target, logits, offsets, anchors, level_sizes, model, pos_iou_thr=0.1, **options) -> torch.Tensor:
    """The matches of one image: from the matrix of overlaps, torchvision's losses of each anchor, and scikit-learn."""
    if len(target["boxes"]) == 0:
        return torch.full((len(anchors),), -1)
    overlaps = box_iou(target["boxes"], anchors)
    highest, owner = overlaps.max(0)
    owner = torch.where(highest >= pos_iou_thr, owner, -1)
    for i, row in enumerate(overlaps):
        if row.max() > 0:
            owner[row == row.max()] = i
    (inds,) = (owner >= 0).nonzero(as_tuple=True)
    coder, losses = model.head.regression_head.box_coder, []
    truth = nn.functional.one_hot(target["labels"][owner[inds]], CLASSES).double()
    focal = sigmoid_focal_loss(logits[inds].double(), truth, reduction="none").sum(1)
    for anchor, classification in zip(inds.tolist(), focal, strict=True):
        own, one = owner[anchor], slice(anchor, anchor + 1)
        boxes = target["boxes"][own][None].double()
        box = _box_loss(model.paa_options.box_loss, coder, anchors[one].double(), boxes, offsets[one].double())
        losses.append(classification + box)
    label = torch.full((len(anchors),), CLASSES)
    label[inds] = target["labels"][owner[inds]]
    new, weight, _, _ = reference.paa_reassign(
        torch.stack(losses), label, torch.ones(len(anchors)), torch.ones(len(anchors), 4), inds, owner[inds], level_sizes,
        num_classes=CLASSES, **options,
    )  # fmt: skip
    return torch.where(new < CLASSES, owner, torch.where(weight > 0, -1, -2))


@pytest.mark.parametrize(("trained", "scored"), [("l1", {}), ("giou", {}), ("l1", {"box_loss": "l1"})], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 4, "separation": "d"},
        {"pos_iou_thr": 0.3, "covariance_type": "tied"},
        {"pos_iou_thr": 0.6, "singleton": "positive"},
    ],
    ids=str,
)
def test_the_anchors_are_those_of_the_published_loop(trained, scored, options, generator, monkeypatch):
    """Whatever loss trains, GIoU sorts the candidates, unless the caller wants L1."""
    model = use_paa(models.retinanet(trained), **options, **scored)
    assert model.paa_options.box_loss == scored.get("box_loss", "giou")
    batch = models.batch(generator)
    targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    assert outputs.keys() == {"cls_logits", "bbox_regression"}
    assert len(sizes) == 3
    assert sum(sizes) == len(anchors[0])
    assert sum(int((own >= 0).sum()) for own in matches) >= 10
    assert "separation" not in options or any((own == -2).any() for own in matches)
    for i, own in enumerate(matches):
        values = (targets[i], outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i], sizes, model)
        assert torch.equal(own, expected(*values, **options)), i


def test_a_box_coder_of_ones_own(generator, monkeypatch):
    """Its weights divide the offsets: their standard deviations are one over these."""
    model, batch = use_paa(models.retinanet(), box_loss="l1"), models.batch(generator)
    model.head.regression_head.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    for i, own in enumerate(matches):
        values = (targets[i], outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i], sizes, model)
        assert torch.equal(own, expected(*values)), i


def test_it_learns(generator):
    model, batch = use_paa(models.retinanet()), models.batch(generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    totals = []
    for _ in range(24):
        loss = sum(train(model, batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.9 * totals[0]


def test_changed_and_changed_back(generator):
    model, batch = models.retinanet(), models.batch(generator)
    wanted = train(model, batch)
    assert use_paa(model) is model
    assert type(model) is RetinaNetPAA
    assert model.paa_options == PAAOptions()
    assert train(model, batch) != wanted
    use_paa(model, 5, singleton="positive")
    assert model.paa_options == PAAOptions(5, singleton="positive")
    assert type(accelerate(model)) is RetinaNetPAA
    restore(model)
    assert type(model) is type(models.retinanet())
    assert "paa_options" not in vars(model)
    assert train(model, batch) == wanted
    assert type(use_paa(accelerate(model))) is RetinaNetPAA
    assert type(restore(model)) is type(models.retinanet())


def test_a_batch_without_boxes(generator):
    model = use_paa(models.retinanet())
    losses = train(model, models.batch(generator, (0, 0)))
    sum(losses.values()).backward()
    assert losses["bbox_regression"] == 0
    assert losses["classification"] > 0


OURS = {f"torchvision/{name}.py" for name in ("matching", "paa", "models")}


def test_it_waits_less_than_torchvision_does(generator):
    batch = models.batch(generator, (7, 3, 5, 0))
    counts, ours = {}, {}
    for name, change in (("torchvision", lambda model: model), ("accelerate", accelerate), ("use_paa", use_paa)):
        model = change(models.retinanet()).train()
        train(model, batch)
        copied = copy.deepcopy(batch)
        with Synchronisations() as waits:
            model(*copied)
        counts[name] = waits.count
        ours[name] = {asked: number for asked, number in waits.by.items() if asked[0] in OURS}
    print(counts)
    # The boxes of all images are looked at once. torchvision looks at those of each image. Nothing else is ours.
    assert ours == {"torchvision": {}, "accelerate": {}, "use_paa": {("torchvision/matching.py", "training_batch"): 1}}
    assert counts["use_paa"] < counts["torchvision"]
    assert counts["accelerate"] < counts["torchvision"]


def test_half_precision(generator, monkeypatch):
    """Anchors and outputs are of half precision, and the losses of the candidates are computed from their values in float32."""
    model, batch = use_paa(models.retinanet()).train(), models.batch(generator)
    with torch.autocast("cpu", torch.bfloat16):
        targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    assert outputs["cls_logits"].dtype == torch.bfloat16
    for i, own in enumerate(matches):
        values = (outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i].float(), sizes, model)
        assert torch.equal(own, expected(targets[i], *values)), i
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["bias", "channel", "weight"])
@pytest.mark.parametrize(("box_loss", "half"), [("l1", False), ("l1", True), ("giou", False)])
def test_training_that_diverges_shows_it(value, part, box_loss, half, generator):
    """PAA takes no anchor without a finite loss. But the head's loss sees it, as in torchvision. GIoU clips the size of a box."""
    model, batch = models.retinanet(box_loss), models.batch(generator)
    head = model.head.regression_head
    with torch.no_grad():
        spoiled = {"bias": head.bbox_reg.bias, "channel": head.bbox_reg.bias[2:3], "weight": head.conv[0][0].weight[0, 0, 0, :1]}
        spoiled[part][:] = value
    with torch.autocast("cpu", torch.float16, enabled=half):
        plain, ours = train(model, batch), train(use_paa(model), batch)
    assert part == "channel" or not plain["bbox_regression"].isfinite()  # of some anchors, torchvision may choose others
    clipped = box_loss == "giou" and part == "channel" and value > 0  # and NaN is not
    assert bool(ours["bbox_regression"].isfinite()) == bool(clipped)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_sizes_that_are_clipped_do_not_make_all_anchors_positive(value, generator, monkeypatch):
    model, batch = use_paa(models.retinanet("giou")), models.batch(generator)
    with torch.no_grad():
        model.head.regression_head.bbox_reg.bias[2] = value
    targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    for i, own in enumerate(matches):
        values = (outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i].float(), sizes, model)
        assert torch.equal(own, expected(targets[i], *values)), i


def test_large_offsets_in_half_precision_are_finite(generator, monkeypatch):
    """The sum of the four offsets of a box is too large for float16, and each of them is not."""
    model, batch = use_paa(models.retinanet()), models.batch(generator)
    with torch.no_grad():
        model.head.regression_head.bbox_reg.bias.fill_(2e4)
    with torch.autocast("cpu", torch.float16):
        targets, outputs, anchors, matches, _ = recorded(model, batch, monkeypatch)
    offsets = outputs["bbox_regression"]
    assert offsets.dtype == torch.float16 and offsets.isfinite().all() and offsets.sum(2).isinf().all()
    potential = sum(
        int((box_iou(target["boxes"], own.float()).amax(0) >= 0.1).sum())
        for target, own in zip(targets, anchors, strict=True)
        if len(target["boxes"])
    )
    assert 10 <= sum(int((own >= 0).sum()) for own in matches) < potential / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("only", [False, True])
def test_a_box_that_is_not_finite_shows_in_the_loss(value, only, generator):
    model, (images, targets) = models.retinanet(), models.batch(generator)
    targets[0]["boxes"][0, 2] = value
    if only:
        targets[0] = {key: column[:1] for key, column in targets[0].items()}
    for change in (restore, use_paa):
        assert not train(change(model), (images, targets))["bbox_regression"].isfinite()


@pytest.mark.long
def test_it_compiles(generator):
    model, batch = use_paa(models.retinanet()), models.batch(generator)
    wanted = train(model, batch)
    losses = torch.compile(model, backend="aot_eager")(*copy.deepcopy(batch))
    assert all(torch.allclose(losses[name], wanted[name]) for name in losses)


def test_score_voting(generator):
    model = models.retinanet(score_thresh=0.5, nms_thresh=0.3).eval()
    nn.init.normal_(model.head.classification_head.cls_logits.weight)
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    model.box_coder.weights = (2.0, 2.0, 1.0, 1.0)  # other ones than those that train
    images, _ = models.batch(generator, (0, 0))
    plain = model(images)
    assert min(len(image["boxes"]) for image in plain) > 5
    seen = []
    published = model.postprocess_detections
    model.postprocess_detections = lambda *arguments: seen.append(arguments) or published(*arguments)
    model(images)
    del model.postprocess_detections
    use_paa(model)
    assert all(torch.equal(got["boxes"], image["boxes"]) for got, image in zip(model(images), plain, strict=True))
    use_paa(model, score_voting=True)
    voted = model.postprocess_detections(*seen[0])
    outputs, anchors, shapes = seen[0]
    for i, image in enumerate(published(*seen[0])):
        got = voted[i]
        assert torch.equal(got["scores"], image["scores"])
        assert torch.equal(got["labels"], image["labels"])
        logits, offsets = (torch.cat([level[i] for level in outputs[name]]) for name in ("cls_logits", "bbox_regression"))
        boxes = model.box_coder.decode_single(offsets, torch.cat(anchors[i]))
        height, width = shapes[i]
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        rows = torch.cat([image["boxes"], image["scores"][:, None]], 1)
        wanted, _ = reference.score_voting(rows, image["labels"], boxes, logits.sigmoid(), 0.5, keep_order=True)
        torch.testing.assert_close(got["boxes"], wanted[:, :4].float())
        assert not torch.allclose(got["boxes"], image["boxes"])


@pytest.mark.parametrize("number", [np.float32(0.3), torch.tensor(0.3), 0])
def test_thresholds_that_torchvision_takes(number, generator):
    images, _ = models.batch(generator, (0,))
    model = use_paa(models.retinanet(), score_voting=True).eval()
    model.score_thresh = float(number)
    wanted = model(images)
    model.score_thresh = number
    assert all(torch.equal(got["boxes"], image["boxes"]) for got, image in zip(model(images), wanted, strict=True))


class UnevenHead(nn.Module):
    """As many outputs at a location of a level as it has anchors. torchvision's head has the same number at each level."""

    def __init__(self, each: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(models.with_differences(RetinaNetHead(16, number, CLASSES)) for number in each)
        self.regression_head = self.heads[0].regression_head

    def forward(self, features):
        levels = [head([feature]) for head, feature in zip(self.heads, features, strict=True)]
        return {name: torch.cat([level[name] for level in levels], 1) for name in levels[0]}

    def compute_loss(self, *arguments):
        return self.heads[0].compute_loss(*arguments)


def test_levels_with_different_numbers_of_anchors(generator, monkeypatch):
    model, batch = use_paa(models.retinanet()), models.batch(generator)
    model.anchor_generator = AnchorGenerator(((8, 12), (16,), (32, 48, 72)), (models.RATIOS,) * 3)
    with pytest.raises(ValueError, match=re.escape("`head_outputs['cls_logits'][0]` must have ")):
        train(model, batch)
    model.head = UnevenHead([6, 3, 9])
    targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    (low, high) = (sizes[0] // 6, sizes[1] // 3)
    assert low == 4 * high  # strides 8 and 16
    assert sizes == [6 * low, 3 * high, len(anchors[0]) - 6 * low - 3 * high]
    for i, own in enumerate(matches):
        values = (targets[i], outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i], sizes, model)
        assert torch.equal(own, expected(*values)), i


def test_parts_that_are_replaced_later(generator):
    model, batch = use_paa(models.retinanet()), models.batch(generator)

    class Shifted(AnchorGenerator):
        def forward(self, *arguments):
            return [own + i for i, own in enumerate(super().forward(*arguments))]

    published = model.anchor_generator
    model.anchor_generator = Shifted(published.sizes, published.aspect_ratios)
    message = "`model.anchor_generator` must be an AnchorGenerator of torchvision, got Shifted"
    with pytest.raises(ValueError, match=message):
        train(model, batch)
    model.eval()(batch[0])  # only training needs the same anchors for all images
    model.anchor_generator = published
    model.head.regression_head._loss_type = "ciou"
    with pytest.raises(ValueError, match=r"`model.head.regression_head` must have the box loss"):
        train(model, batch)


def test_what_it_refuses(generator):
    with pytest.raises(ValueError, match="`model` must be or contain a RetinaNet of torchvision, got FasterRCNN"):
        use_paa(models.faster_rcnn())
    with pytest.raises(ValueError, match='`box_loss` must be "giou" or "l1", got \'iou\''):
        use_paa(models.retinanet(), box_loss="iou")
    model = models.retinanet("smooth_l1")
    message = '`model.head.regression_head` must have the box loss "giou" or "l1", got \'smooth_l1\''
    with pytest.raises(ValueError, match=re.escape(message)):
        use_paa(model)

    class OwnGenerator(type(models.anchors())):
        def forward(self, *arguments):
            return super().forward(*arguments)

    model = nn.ModuleDict({"net": models.retinanet()})
    model["net"].anchor_generator.__class__ = OwnGenerator
    message = "`model.net.anchor_generator` must be an AnchorGenerator of torchvision, got OwnGenerator"
    with pytest.raises(ValueError, match=re.escape(message)):
        use_paa(model)
    two = nn.ModuleList([models.retinanet(), models.retinanet("smooth_l1")])
    with pytest.raises(ValueError, match=r"`model.1.head.regression_head` must have the box loss"):
        use_paa(two)
    assert type(two[0]) is type(models.retinanet()) and "paa_options" not in vars(two[0])
    model = models.retinanet()
    for options, message in (
        ({"topk": 0}, "`topk` must be at least 1, got 0"),
        ({"pos_iou_thr": -0.1}, "`pos_iou_thr` must not be negative, got -0.1"),
        ({"covariance_type": "round"}, "`covariance_type` must be"),
        ({"separation": "e"}, "`separation` must be"),
        ({"singleton": "none"}, "`singleton` must be"),
        ({"score_voting": 1}, "`score_voting` must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            use_paa(model, **options)
    assert type(model) is type(models.retinanet())


def test_targets_it_refuses(generator):
    model, (images, targets) = use_paa(models.retinanet()).train(), models.batch(generator)
    wrong = copy.deepcopy(targets)
    wrong[2]["labels"][1] = CLASSES
    with pytest.raises(ValueError, match=re.escape("`targets[2]['labels']` must be in [0, 3), got 3 at position 1")):
        model(images, wrong)
    wrong = [{**target, "labels": target["labels"].to("meta")} for target in targets]
    with pytest.raises(ValueError, match=re.escape("`targets[0]['labels']` must be on cpu as the other tensors are, got meta")):
        model(images, wrong)

    class OwnForward(models.detection.RetinaNet):
        def forward(self, images, targets=None):
            return models.detection.RetinaNet.forward(self, images, targets)

    options = {"min_size": models.SIZE, "anchor_generator": models.anchors()}
    model = use_paa(OwnForward(models.backbone(), 3, **options)).train()
    with pytest.raises(RuntimeError, match=r"`OwnForward.forward` must call super\(\).forward\(images, targets\)"):
        model(images, targets)


def test_sizes_are_clipped_only_above(generator, monkeypatch):
    """As in torchvision: in mmdetection also below. The sizes of the boxes alone sort the candidates."""
    model, batch = use_paa(models.retinanet("giou")), models.batch(generator)
    nn.init.zeros_(model.head.classification_head.cls_logits.weight)
    last = model.head.regression_head.bbox_reg
    nn.init.normal_(last.weight, std=1.5)
    with torch.no_grad():
        last.weight.view(-1, 4, *last.weight.shape[1:])[:, :2] = 0
        last.bias.view(-1, 4)[:, 2:] = -6
    targets, outputs, anchors, matches, sizes = recorded(model, batch, monkeypatch)
    assert 0.5 < (outputs["bbox_regression"][..., 2:] < -4.2).float().mean() < 0.95
    for i, own in enumerate(matches):
        values = (outputs["cls_logits"][i].detach(), outputs["bbox_regression"][i].detach(), anchors[i].float(), sizes, model)
        assert torch.equal(own, expected(targets[i], *values)), i


def test_a_loss_by_itself(generator):
    """The levels are not known there. The error does not blame torchvision's own `forward`."""
    model, (images, targets) = use_paa(models.retinanet()).eval(), models.batch(generator)
    images, targets = model.transform(images, targets)
    features = list(model.backbone(images.tensors).values())
    message = r"^`compute_loss` must be called by model\(images, targets\) .* call the model so under torch.no_grad\(\)$"
    with pytest.raises(RuntimeError, match=message):
        model.compute_loss(targets, model.head(features), model.anchor_generator(images, features))


@pytest.mark.parametrize("corner", [(5000.0, 5000.0), (-900.0, -900.0)], ids=str)
def test_a_box_that_overlaps_no_anchor_takes_none(generator, corner, monkeypatch):
    """A crop that does not clip its boxes leaves such ones. Those of the other boxes stay."""
    model, (images, targets) = use_paa(models.retinanet()), models.batch(generator, (4, 2))
    wanted = recorded(model, (images, targets), monkeypatch)[3]
    far = {
        "boxes": torch.cat([targets[0]["boxes"], torch.tensor([[*corner, corner[0] + 40, corner[1] + 40]])]),
        "labels": torch.cat([targets[0]["labels"], torch.tensor([1])]),
    }
    monkeypatch.undo()
    found = recorded(model, (images, [far, *targets[1:]]), monkeypatch)[3]
    assert torch.equal(torch.stack(list(found)), torch.stack(list(wanted)))
    assert (found[0] >= 0).any()


@pytest.mark.filterwarnings("ignore")
def test_voting_does_not_go_into_onnx(generator):
    """torchvision's models can only be exported by way of TorchScript, for which the operator has no translation."""
    images, _ = models.batch(generator, (1,))
    model = use_paa(models.retinanet(), score_voting=True).eval()
    with pytest.raises(RuntimeError, match=r"`score_voting` has no form in ONNX .* use_paa\(model\) without it first"):
        torch.onnx.export(model, (images,), io.BytesIO(), dynamo=False, opset_version=16)
