"""Boxes and anchors of torchvision's detectors matched without the matrix of overlaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from ...assign import assign_max_iou

Targets = Sequence[dict[str, Tensor]]


class Accelerated:
    """What `accelerate` and `use_paa` change a module to."""

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` asks each module for what to script in its place."""
        raise TypeError(f"`model` must be restored before torch.jit.script: restore(model), got {type(self).__name__}")


class AcceleratedRetinaNet(Accelerated, RetinaNet):
    """torchvision's RetinaNet, matching without the matrix of overlaps."""

    published: ClassVar[type] = RetinaNet

    def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
        """The head's losses on the matches of a batch."""
        matches = matches_of(self.proposal_matcher, [target["boxes"] for target in targets], anchors)
        losses: dict[str, Tensor] = self.head.compute_loss(targets, head_outputs, anchors, matches)
        return losses


class AcceleratedSSD(Accelerated, SSD):
    """torchvision's SSD, matching without the matrix of overlaps."""

    published: ClassVar[type] = SSD

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        """As SSD: the losses of a batch in training, else its detections."""
        batch = training_batch(self, images, targets)
        if batch is None:
            return super().forward(images, targets)
        matches = matches_of(self.proposal_matcher, [target["boxes"] for target in batch.targets], batch.anchors)
        return self.eager_outputs(self.compute_loss(batch.targets, batch.head_outputs, batch.anchors, matches), [])


class AcceleratedRPN(Accelerated, RegionProposalNetwork):
    """torchvision's region proposal network, matching without the matrix of overlaps."""

    published: ClassVar[type] = RegionProposalNetwork

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
        """Per image Tensor[A] float32, 1 for a ground truth, 0 for background, -1 for neither, and Tensor[A, 4], its box."""
        if self.box_similarity is not box_iou:  # somebody replaced it since
            return super().assign_targets_to_anchors(anchors, targets)  # type: ignore[no-any-return]
        boxes = [target["boxes"] for target in targets]
        matches = matches_of(self.proposal_matcher, boxes, anchors)
        labels = [torch.where(own == Matcher.BETWEEN_THRESHOLDS, -1, own >= 0).to(torch.float32) for own in matches]
        some = [image if len(image) else image.new_zeros(1, 4, dtype=torch.float32) for image in boxes]
        return labels, [image[own.clamp(min=0)] for image, own in zip(some, matches, strict=True)]


class AcceleratedRoIHeads(Accelerated, RoIHeads):
    """torchvision's heads of the regions of interest, matching without the matrix of overlaps."""

    published: ClassVar[type] = RoIHeads

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image Tensor[P] int64, the ground truth or 0, and Tensor[P] int64, its label, 0 for background, -1 for neither."""
        matches = matches_of(self.proposal_matcher, gt_boxes, proposals)
        indices = [own.clamp(min=0) for own in matches]
        some = [label.to(torch.int64) if len(label) else label.new_zeros(1, dtype=torch.int64) for label in gt_labels]
        # -1 and -2, below and between the thresholds, are 0 and -1 here.
        labels = [torch.where(own >= 0, label[index], own + 1) for label, own, index in zip(some, matches, indices, strict=True)]
        return indices, labels


def base_of(module: nn.Module) -> Any:
    """The accelerated class of a module's, or None."""
    bases = (AcceleratedRetinaNet, AcceleratedSSD, AcceleratedRPN, AcceleratedRoIHeads)
    return next((base for base in bases if isinstance(module, base.published)), None)


def check_matching(name: str, module: Any) -> None:
    """The module matches by the IoU, with a matcher of torchvision."""
    matcher = type(getattr(module, "proposal_matcher", None))
    if matcher not in OPTIONS:
        raise ValueError(f"`{name}.proposal_matcher` must be a Matcher or SSDMatcher of torchvision, got {matcher.__name__}")
    # RoIHeads has one too, which torchvision never calls.
    if isinstance(module, RegionProposalNetwork) and module.box_similarity is not box_iou:
        raise ValueError(f"`{name}.box_similarity` must be box_iou of torchvision, got {module.box_similarity!r}")


class Batch(NamedTuple):
    """A training batch between the network and the matching."""

    targets: Targets  # at the size of the network's input
    head_outputs: dict[str, Tensor]  # [N, A, C] and [N, A, 4], level after level, location after location
    anchors: list[Tensor]  # per image [A, 4]
    locations: list[int]  # of each level


def training_batch(model: Any, images: list[Tensor], targets: Targets | None) -> Batch | None:
    """The part of `forward` of RetinaNet and SSD before they match.

    None outside training. Also None if the boxes are wrong, because torchvision's own `forward` reports this.
    """
    if not model.training or targets is None or not all(_are_boxes(target["boxes"]) for target in targets):
        return None
    _check_targets(len(targets), len(images))
    batch, sized = model.transform(images, targets)
    boxes = torch.cat([target["boxes"] for target in sized]) if sized else batch.tensors.new_zeros(0, 4)
    if (boxes[:, 2:] <= boxes[:, :2]).any():  # one look at the values, where torchvision takes one for each image
        return None
    features = model.backbone(batch.tensors)
    features = [features] if isinstance(features, Tensor) else list(features.values())
    head_outputs = model.head(features)
    locations = [feature.shape[2] * feature.shape[3] for feature in features]
    return Batch(sized, head_outputs, model.anchor_generator(batch, features), locations)


def _check_targets(number: int, images: int) -> None:
    if number != images:
        raise ValueError(f"`targets` must have one entry for each of the {images} images, got {number}")


def _are_boxes(boxes: Any) -> bool:
    return isinstance(boxes, Tensor) and boxes.dim() == 2 and boxes.shape[1] == 4


def matches_of(matcher: Matcher, boxes: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    """`matcher(box_iou(boxes, anchors))` of each image, without the matrix.

    Tensor[A] int64: the ground truth, -1 below the low threshold, -2 between the two. In an image without boxes, all are -1.
    """
    _check_targets(len(boxes), len(anchors))
    pairs = list(zip(boxes, anchors, strict=True))
    if type(matcher) not in OPTIONS or not all(_in_float32(*pair) for pair in pairs):
        return [matcher(box_iou(*pair)) if len(pair[0]) else _background(pair[1]) for pair in pairs]
    levels, gts = [[own.float()] for own in anchors], [image.float() for image in boxes]
    # No IoU is negative, so a negative threshold says what 0 says.
    thresholds = {"pos_iou_thr": max(matcher.high_threshold, 0.0), "neg_iou_thr": max(matcher.low_threshold, 0.0)}
    assigned = assign_max_iou(levels, gts, **thresholds, eps=0.0, **OPTIONS[type(matcher)](matcher))
    return [marked(indices - 1, image) for indices, image in zip(assigned.gt_inds, gts, strict=True)]


def marked(matches: Tensor, boxes: Tensor) -> Tensor:
    """`matches`, modified: all anchors get the first box with a NaN, as with torchvision's `Matcher`. So the loss becomes NaN."""
    if len(boxes) == 0:
        return matches
    largest, first = boxes.amax(1).max(0)  # both are NaN if any value is
    return torch.where(largest.isnan(), first, matches, out=matches)


#: For the matchers of torchvision: the options of `assign_max_iou` that say what becomes of a box's best anchors.
OPTIONS: dict[type, Callable[[Any], dict[str, Any]]] = {
    Matcher: lambda matcher: {"match_low_quality": matcher.allow_low_quality_matches, "low_quality": "anchor"},
    SSDMatcher: lambda _: {"gt_max_assign_all": False},
}


def _in_float32(boxes: Tensor, anchors: Tensor) -> bool:
    """Whether torchvision computes overlaps in float32. In half precision it rounds before it multiplies.

    Its matcher refuses an image without anchors.
    """
    dtypes = {boxes.dtype, anchors.dtype}
    return len(anchors) > 0 and torch.float32 in dtypes and dtypes <= {torch.float32, torch.float16, torch.bfloat16}


def _background(anchors: Tensor) -> Tensor:
    return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=anchors.device)
