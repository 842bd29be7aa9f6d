"""mmdetection's heads as the tests compare them, and inputs."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import api
import torch
from api import LADHead, PAAHead
from torch import Tensor

from paa_gpu.integrations.mmdet import accelerate
from paa_gpu.reference import TIE

PAA = "paa/paa_r50_fpn_1x_coco.py"
LAD = "lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py"
STRIDES = (8, 16, 32, 64, 128)


class Float64:
    """The published head, whose losses are fitted in float64, as the library fits them."""

    def paa_reassign(self, pos_losses: Tensor, *args: Any) -> Any:
        return super().paa_reassign(pos_losses.double(), *args)


class TieRule(Float64):
    """The same with the library's rule: of scores within 1e-9 of the highest, the first. There scikit-learn's last bit decides in
    the published head: `ties` counts such ground truths, `tied` has one mask per image over its anchors, of their candidates."""

    tied: list[Tensor]
    ties: int

    def paa_reassign(self, pos_losses: Tensor, label: Tensor, *args: Any) -> Any:
        self.tied.append(torch.zeros_like(label, dtype=torch.bool))
        return super().paa_reassign(pos_losses, label, *args)

    def gmm_separation_scheme(self, gmm_assignment: Tensor, scores: Tensor, pos_inds_gmm: Tensor) -> Any:
        foreground = gmm_assignment == 0
        highest = foreground & (scores >= scores[foreground].max() - TIE) if foreground.any() else foreground
        if highest.sum() > 1:
            self.tied[-1][pos_inds_gmm] = True
            self.ties += 1
        first = highest & (highest.cumsum(0) == 1)
        return super().gmm_separation_scheme(gmm_assignment, first.double(), pos_inds_gmm)


class Float64PAAHead(Float64, PAAHead):
    pass


class TieRulePAAHead(TieRule, PAAHead):
    pass


if LADHead is not None:

    class Float64LADHead(Float64, LADHead):
        pass

    class TieRuleLADHead(TieRule, LADHead):
        pass


class Heads(NamedTuple):
    """One head four times, with the same weights."""

    published: Any
    float64: Any
    tie_rule: Any
    accelerated: Any


def small(config: str) -> Any:
    """The model of a published configuration, made small."""
    model = api.model_of(config)
    model.pop("pretrained", None)
    for prefix in ("", "teacher_") if config == LAD else ("",):
        model[f"{prefix}backbone"].pop("init_cfg", None)  # pretrained weights
        model[f"{prefix}backbone"].update(depth=18, base_channels=8)
        model[f"{prefix}neck"].update(in_channels=[8, 16, 32, 64], out_channels=32)
        model[f"{prefix}bbox_head"].update(in_channels=32, feat_channels=32, stacked_convs=1)
    if config == LAD:
        model.teacher_ckpt = None
    return model


def build(config: str = PAA, part: str = "bbox_head", **changes: Any) -> Any:
    """The head of a published configuration, with changes."""
    model = api.model_of(config)
    return api.build_head({**model[part], "train_cfg": model.train_cfg, "test_cfg": model.test_cfg, **changes})


def variants(head: Any) -> Heads:
    return Heads(
        copy.deepcopy(head),
        as_class(head, globals()[f"Float64{_kind(head)}"]),
        under_the_tie_rule(head),
        accelerate(copy.deepcopy(head)),
    )


def under_the_tie_rule(head: Any) -> Any:
    """A copy of a published head as `TieRule` makes it."""
    return as_class(head, globals()[f"TieRule{_kind(head)}"])


def _kind(head: Any) -> str:
    return "LADHead" if LADHead is not None and isinstance(head, LADHead) else "PAAHead"


def as_class(head: Any, other: type) -> Any:
    """A copy of a head as if it had been built as another class."""
    head = copy.deepcopy(head)
    head.__class__ = other
    if isinstance(head, TieRule):
        head.tied, head.ties = [], 0
    return head


def make_features(images: int, size: tuple[int, int], channels: int, generator: torch.Generator) -> list[Tensor]:
    """Levels of features [images, channels, H / stride, W / stride]."""
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in STRIDES]
    return [torch.randn(images, channels, *shape, generator=generator) for shape in shapes]


def make_samples(boxes: list[int], size: tuple[int, int], classes: int, generator: torch.Generator) -> list[Any]:
    """One sample per image with this many random boxes; `size` is (height, width)."""
    samples = []
    for number in boxes:
        height, width = size
        corner = torch.rand(number, 2, generator=generator) * torch.tensor([width, height]) * 0.8
        extent = 8 + torch.rand(number, 2, generator=generator) ** 2 * torch.tensor([width, height]) * 0.7
        sides = torch.tensor([width, height, width, height])
        shapes = dict.fromkeys(("img_shape", "pad_shape", "batch_input_shape"), size)
        bboxes = torch.cat([corner, corner + extent], 1).minimum(sides)
        labels = torch.randint(classes, (number,), generator=generator)
        samples.append(api.make_sample({**shapes, "scale_factor": (1.0, 1.0)}, bboxes, labels))
    return samples


class Step(NamedTuple):
    """What a head makes of a batch."""

    labels: Tensor  # [anchors of all images]
    label_weights: Tensor
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def step(head: Any, features: list[Tensor], samples: list[Any], assignment: Any = ()) -> Step:
    """Forward and backward; the labels are what the last call of the classification loss got."""
    seen: list[tuple[Any, ...]] = []
    hook = head.loss_cls.register_forward_pre_hook(lambda module, args: seen.append(args))
    features = [level.clone().requires_grad_() for level in features]
    head.zero_grad()
    losses = api.loss(head, features, samples, assignment)
    hook.remove()
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters() if parameter.grad is not None}
    gradients |= {f"features {i}": level.grad for i, level in enumerate(features)}
    return Step(seen[-1][1], seen[-1][2], {name: loss.detach() for name, loss in losses.items()}, gradients)


def assert_same_step(got: Step, wanted: Step) -> None:
    """The same labels, and losses within float32 rounding. Gradients cancel, in one number for a scale most of all: 1e-4."""
    assert torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.label_weights, wanted.label_weights)
    torch.testing.assert_close(got.losses, wanted.losses, rtol=1e-6, atol=0)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        scale = wanted.gradients[name].abs().max()
        assert (gradient - wanted.gradients[name]).abs().max() <= 1e-4 * scale, name


def compare(heads: Heads, features: list[Tensor], samples: list[Any]) -> Step:
    """One step of the accelerated head against the published one in float64: the same outside ties, and everywhere under the
    library's rule for ties."""
    rule = heads.tie_rule
    rule.tied, rule.ties = [], 0
    got, ruled, float64 = (step(head, features, samples) for head in (heads.accelerated, rule, heads.float64))
    assert_same_step(got, ruled)
    assert_same_outside(torch.cat(rule.tied), rule.ties, got.labels, float64.labels)
    if torch.equal(got.labels, float64.labels):
        assert_same_step(got, float64)
    return got


def assert_same_outside(tied: Tensor, ties: int, got: Tensor, wanted: Tensor) -> None:
    """The same labels but for one candidate of each ground truth whose score ties: the second of a foreground of two."""
    differs = got != wanted
    assert not (differs & ~tied).any()
    assert differs.sum() <= ties
    print(f"{ties} ties, {int(differs.sum())} labels differ there")


def assert_same_detections(got: Any, wanted: Any, rounding: float = 0.0) -> None:
    """The same detections in the same order, their scores within `rounding` of them.

    Boxes, which are weighted means of up to a thousand, are within float32 rounding.
    """
    assert torch.equal(got.labels, wanted.labels)
    torch.testing.assert_close(got.scores, wanted.scores, rtol=rounding, atol=0)
    largest = max(wanted.bboxes.abs().flatten().tolist(), default=0.0)
    torch.testing.assert_close(got.bboxes, wanted.bboxes, rtol=1e-6, atol=1e-6 * largest)
