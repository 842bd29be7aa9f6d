"""torchvision's detectors, and models that contain them: matching without the matrix of overlaps, and RetinaNet trained by PAA.

    accelerate(model)   # RetinaNet, SSD, SSDLite, Faster, Mask and Keypoint R-CNN: the same matches, in memory O(A + G)
    use_paa(model)      # RetinaNet: probabilistic anchor assignment instead of IoU thresholds; no new parameter
    restore(model)      # as it was

Modules change their class in place. Parameters, buffers, hooks and `state_dict` stay. `deepcopy` and pickling work. A subclass of
torchvision's classes keeps the methods that it overrides. Their `super()` calls this library. A scripted module cannot change its
class, so restore a model before `torch.jit.script`.

There is no PAA for FCOS. FCOS defines its centerness only inside a ground truth. An anchor with an IoU of 0.1 may have its centre
outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

try:
    from torchvision.models.detection import RetinaNet
except ImportError as error:
    raise ImportError("paa_gpu.integrations.torchvision needs torchvision: pip install torchvision") from error
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, clip_boxes_to_image

from .._checks import FLOATS, INDICES, check_bool, check_classes, check_int, check_non_negative, check_option, check_tensor
from ..assign import assign_max_iou
from ..em import COVARIANCE_TYPES
from ..losses import BOX_LOSSES
from ..reassign import SINGLETONS, Separation
from ..separation import SCHEMES
from ..targets import assign_targets
from ..voting import score_voting_batch
from ._classes import change_class, class_before, restore_class

__all__ = [
    "AcceleratedRPN", "AcceleratedRetinaNet", "AcceleratedRoIHeads", "AcceleratedSSD", "PAAOptions", "RetinaNetPAA",
    "accelerate", "restore", "use_paa",
]  # fmt: skip

Model = TypeVar("Model", bound=nn.Module)
Targets = Sequence[dict[str, Tensor]]


class PAAOptions(NamedTuple):
    """How a `RetinaNetPAA` assigns anchors and makes detections; see `use_paa`."""

    topk: int = 9
    pos_iou_thr: float = 0.1
    covariance_type: str = "diag"
    separation: Separation = "mmdet"
    singleton: str = "background"
    score_voting: bool = False
    box_loss: str = "giou"


def accelerate(model: Model) -> Model:
    """Match boxes without the matrix of overlaps in every RetinaNet, SSD, region proposal network and RoI head of a model.

    The matches equal torchvision's to the bit. So do losses, gradients and the random sampling of proposals. Memory is O(A + G)
    instead of O(A * G), and nothing waits for the device. This holds for boxes in float32, also with anchors in half precision,
    as under autocast. For other dtypes torchvision rounds overlaps differently. There the module still makes its matrix.

    Args:
        model: a detector of torchvision (also SSDLite, Faster, Mask and Keypoint R-CNN), or a module that contains one, or that
            contains their RPN or RoI heads. Modules that are accelerated already, or use PAA, do not change.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: it contains no such module, or one whose matcher or measure of similarity is not torchvision's. The error
            names it. Then nothing has changed.
    """
    found = [(name, module, _base_of(module)) for name, module in _modules(model) if _base_of(module) is not None]
    if not found:
        raise ValueError(
            "`model` must be or contain a RetinaNet, SSD, RegionProposalNetwork or RoIHeads of torchvision, "
            f"got {type(model).__name__}"
        )
    for name, module, _ in found:
        _check_matching(name, module)
    for _, module, base in found:
        if not isinstance(module, _Accelerated):
            change_class(module, base)
    return model


def use_paa(
    model: Model,
    topk: int = 9,
    *,
    pos_iou_thr: float = 0.1,
    covariance_type: str = "diag",
    separation: Separation = "mmdet",
    singleton: str = "background",
    score_voting: bool = False,
    box_loss: str = "giou",
) -> Model:
    """Train every RetinaNet of a model by probabilistic anchor assignment (PAA), and no longer by thresholds of the IoU.

    In training, the potential positives of a ground truth are its best anchors, and all anchors with an IoU of `pos_iou_thr` or
    more. Their losses sort them. Each is the focal loss, summed over the classes, plus `box_loss`. `paa_reassign_batch` keeps
    the best. The head computes its own losses on them: L1 in `retinanet_resnet50_fpn`, GIoU in `retinanet_resnet50_fpn_v2`.
    There is no new parameter, so checkpoints load in both directions.

    Args:
        model: a RetinaNet, or a module that contains RetinaNets, such as a DeepForest. A second call replaces the options.
        topk: the most candidates of a ground truth on each level.
        pos_iou_thr: not negative.
        covariance_type, separation, singleton: see `paa_reassign`.
        score_voting: at inference, move each detection to the weighted mean of the boxes around it; see `score_voting`. Every
            anchor may vote if its score for the class exceeds the model's `score_thresh`.
        box_loss: of the candidates. "giou" of the decoded box, or "l1" of the four offsets. Prefer GIoU, also where the head
            trains with L1. Offsets are in units of the anchor. So L1 prefers anchors that are larger than the box. In the
            experiment of `docs/torchvision.md`, such a model learned next to nothing.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: the model contains no RetinaNet; its anchors do not come from torchvision's `AnchorGenerator`, whose anchors
            are the same for all images, level by level; its box loss is neither L1 nor GIoU; a wrong option (see
            `paa_reassign`). After an error, the model is as before.

    Source: PAA (arXiv 2007.08103), section 3.
    """
    options = PAAOptions(topk, pos_iou_thr, covariance_type, separation, singleton, score_voting, box_loss)
    _check_options(options)
    found = [(name, module) for name, module in _modules(model) if isinstance(module, RetinaNet)]
    if not found:
        raise ValueError(f"`model` must be or contain a RetinaNet of torchvision, got {type(model).__name__}")
    for name, module in found:
        _check_head(name, module)
    for _, module in found:
        change_class(module, RetinaNetPAA)
        module.paa_options = options
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` and `use_paa`. Every module gets its old class back. Other modules do not change.

    Raises:
        TypeError: not a module, or a scripted one; or its class was derived from a class of this library, as `fully_shard` does.
            Then nothing has changed. Restore a model before `fully_shard`.
    """
    found = [(name, module) for name, module in _modules(model) if isinstance(module, _Accelerated)]
    for name, module in found:
        if class_before(module) is None:
            raise TypeError(
                f"`{name}` must have the class that `accelerate` or `use_paa` gave it, got {type(module).__name__}, "
                "a class derived from it"
            )
    for _, module in found:
        restore_class(module)
        vars(module).pop("paa_options", None)
    return model


class _Accelerated:
    """What `accelerate` and `use_paa` change a module to."""

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` asks each module for what to script in its place."""
        raise TypeError(f"`model` must be restored before torch.jit.script: restore(model), got {type(self).__name__}")


class AcceleratedRetinaNet(_Accelerated, RetinaNet):
    """torchvision's RetinaNet, matching without the matrix of overlaps."""

    published: ClassVar[type] = RetinaNet

    def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
        """The head's losses on the matches of a batch."""
        matches = _matches(self.proposal_matcher, [target["boxes"] for target in targets], anchors)
        losses: dict[str, Tensor] = self.head.compute_loss(targets, head_outputs, anchors, matches)
        return losses


class AcceleratedSSD(_Accelerated, SSD):
    """torchvision's SSD, matching without the matrix of overlaps."""

    published: ClassVar[type] = SSD

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        """As SSD: the losses of a batch in training, else its detections."""
        batch = _training_batch(self, images, targets)
        if batch is None:
            return super().forward(images, targets)
        matches = _matches(self.proposal_matcher, [target["boxes"] for target in batch.targets], batch.anchors)
        return self.eager_outputs(self.compute_loss(batch.targets, batch.head_outputs, batch.anchors, matches), [])


class AcceleratedRPN(_Accelerated, RegionProposalNetwork):
    """torchvision's region proposal network, matching without the matrix of overlaps."""

    published: ClassVar[type] = RegionProposalNetwork

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
        """Per image Tensor[A] float32, 1 for a ground truth, 0 for background, -1 for neither, and Tensor[A, 4], its box."""
        if self.box_similarity is not box_iou:  # somebody replaced it since
            return super().assign_targets_to_anchors(anchors, targets)  # type: ignore[no-any-return]
        boxes = [target["boxes"] for target in targets]
        matches = _matches(self.proposal_matcher, boxes, anchors)
        labels = [torch.where(own == Matcher.BETWEEN_THRESHOLDS, -1, own >= 0).to(torch.float32) for own in matches]
        some = [image if len(image) else image.new_zeros(1, 4, dtype=torch.float32) for image in boxes]
        return labels, [image[own.clamp(min=0)] for image, own in zip(some, matches, strict=True)]


class AcceleratedRoIHeads(_Accelerated, RoIHeads):
    """torchvision's heads of the regions of interest, matching without the matrix of overlaps."""

    published: ClassVar[type] = RoIHeads

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image Tensor[P] int64, the ground truth or 0, and Tensor[P] int64, its label, 0 for background, -1 for neither."""
        matches = _matches(self.proposal_matcher, gt_boxes, proposals)
        indices = [own.clamp(min=0) for own in matches]
        some = [label.to(torch.int64) if len(label) else label.new_zeros(1, dtype=torch.int64) for label in gt_labels]
        # -1 and -2, below and between the thresholds, are 0 and -1 here.
        labels = [torch.where(own >= 0, label[index], own + 1) for label, own, index in zip(some, matches, indices, strict=True)]
        return indices, labels


class RetinaNetPAA(AcceleratedRetinaNet):
    """torchvision's RetinaNet, trained by PAA; see `use_paa`. It takes RetinaNet's arguments."""

    published: ClassVar[type] = RetinaNet
    paa_options = PAAOptions()

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        """As RetinaNet: the losses of a batch in training, else its detections."""
        if self.training:
            _check_head("model", self)  # again, since somebody may have replaced a part
        batch = _training_batch(self, images, targets)
        if batch is None:
            return super().forward(images, targets)
        return self.eager_outputs(_losses_of_step(self, batch), [])

    def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
        """The head's losses on the anchors that PAA assigns."""
        step = getattr(_THREAD, "step", None)
        if step is None or step.model is not self:
            raise RuntimeError(
                f"`{self.published.__name__}.forward` must call super().forward(images, targets), for PAA to know the levels"
            )
        step.reached = True
        found = _paa_matches(self, targets, head_outputs, anchors, step.level_sizes)
        matches = [_marked(own, target["boxes"]) for own, target in zip(found, targets, strict=True)]
        losses: dict[str, Tensor] = self.head.compute_loss(targets, head_outputs, anchors, matches)
        return losses

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections of a batch, with score voting where `use_paa` asked for it."""
        detections: list[dict[str, Tensor]] = super().postprocess_detections(head_outputs, anchors, image_shapes)
        if not self.paa_options.score_voting:
            return detections
        scores = torch.cat(head_outputs["cls_logits"], 1).sigmoid()
        offsets = torch.cat(head_outputs["bbox_regression"], 1)
        voters = [
            clip_boxes_to_image(self.box_coder.decode_single(offset, torch.cat(levels)), shape)
            for offset, levels, shape in zip(offsets, anchors, image_shapes, strict=True)
        ]
        rows = [torch.cat([image["boxes"], image["scores"][:, None]], 1) for image in detections]
        labels = [image["labels"] for image in detections]
        voted, _ = score_voting_batch(rows, labels, voters, list(scores), float(self.score_thresh), keep_order=True)
        return [{**image, "boxes": row[:, :4]} for image, row in zip(detections, voted, strict=True)]


class _Batch(NamedTuple):
    """A training batch between the network and the matching."""

    targets: Targets  # at the size of the network's input
    head_outputs: dict[str, Tensor]  # [N, A, C] and [N, A, 4], level after level, location after location
    anchors: list[Tensor]  # per image [A, 4]
    locations: list[int]  # of each level


@dataclass
class _Step:
    """A training step of a `RetinaNetPAA`, between its `forward` and its `compute_loss`."""

    model: RetinaNetPAA
    level_sizes: list[int]
    reached: bool = False


#: Its `step` is the step of this thread. A subclass may stand between the two methods, with torchvision's arguments only.
_THREAD = threading.local()


def _losses_of_step(model: RetinaNetPAA, batch: _Batch) -> dict[str, Tensor]:
    """What `model.compute_loss` returns, if it came to that of `RetinaNetPAA`."""
    cells = [len(cell) for cell in model.anchor_generator.cell_anchors]
    step = _Step(model, [each * size for each, size in zip(cells, batch.locations, strict=True)])
    outer, _THREAD.step = getattr(_THREAD, "step", None), step
    try:
        losses: dict[str, Tensor] = model.compute_loss(batch.targets, batch.head_outputs, batch.anchors)
    finally:
        _THREAD.step = outer
    if not step.reached:
        raise RuntimeError(
            f"`{model.published.__name__}.compute_loss` must call super().compute_loss(targets, head_outputs, anchors), "
            "for PAA to assign the anchors"
        )
    return losses


def _training_batch(model: Any, images: list[Tensor], targets: Targets | None) -> _Batch | None:
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
    return _Batch(sized, head_outputs, model.anchor_generator(batch, features), locations)


def _check_targets(number: int, images: int) -> None:
    if number != images:
        raise ValueError(f"`targets` must have one entry for each of the {images} images, got {number}")


def _are_boxes(boxes: Any) -> bool:
    return isinstance(boxes, Tensor) and boxes.dim() == 2 and boxes.shape[1] == 4


def _matches(matcher: Matcher, boxes: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
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
    return [_marked(indices - 1, image) for indices, image in zip(assigned.gt_inds, gts, strict=True)]


def _marked(matches: Tensor, boxes: Tensor) -> Tensor:
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


@torch.no_grad()
def _paa_matches(
    model: RetinaNetPAA, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor], level_sizes: list[int]
) -> Tensor:
    """Tensor[N, A] int64: the ground truth of each positive, -1 for background, -2 for ignored anchors."""
    scores, offsets = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    boxes, labels = [target["boxes"] for target in targets], [target["labels"] for target in targets]
    num_classes, options = scores.shape[2], model.paa_options
    _check_anchors(anchors, head_outputs, sum(level_sizes))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        check_tensor(f"targets[{i}]['boxes']", box, (None, 4), FLOATS, scores.device)
        check_tensor(f"targets[{i}]['labels']", label, (len(box),), INDICES, scores.device)
        check_classes(f"targets[{i}]['labels']", label, num_classes)
    found = assign_targets(
        anchors[0].float().split_with_sizes(level_sizes), _maps(scores, level_sizes), _maps(offsets, level_sizes), boxes, labels,
        num_classes=num_classes,
        assignment={"pos_iou_thr": options.pos_iou_thr, "neg_iou_thr": options.pos_iou_thr},
        losses=_losses(model),
        reassignment={
            "topk": options.topk, "covariance_type": options.covariance_type,
            "separation": options.separation, "singleton": options.singleton,
        },
    )  # fmt: skip
    background = torch.where(found.label_weight > 0, Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS)
    # PAA takes no anchor without a finite loss. But the head must see it, or nobody would notice that training diverges.
    broken = ~found.pos_losses.isfinite()
    if model.head.regression_head._loss_type == "l1":  # GIoU clips the size: then an infinite one makes a box
        broken |= ~offsets.isfinite().all(2).flatten()
    positive = (found.label != num_classes) | ((found.gt_inds > 0) & broken)
    return torch.where(positive, found.gt_inds - 1, background).view(len(targets), -1)


def _check_anchors(anchors: list[Tensor], head_outputs: dict[str, Tensor], number: int) -> None:
    outputs = {f"head_outputs['{name}'][0]": head_outputs[name][0] for name in ("cls_logits", "bbox_regression")}
    for name, rows in {"anchors[0]": anchors[0], **outputs}.items():
        if len(rows) != number:
            raise ValueError(f"`{name}` must have {number} anchors as the levels of `anchor_generator` have, got {len(rows)}")


def _maps(outputs: Tensor, level_sizes: list[int]) -> list[Tensor]:
    """Tensor[N, A, channels], level after level, as a map of one column for each level: Tensor[N, channels, A_l, 1], a view."""
    return [level.transpose(1, 2)[..., None] for level in outputs.split_with_sizes(level_sizes, 1)]


def _losses(model: RetinaNetPAA) -> dict[str, Any]:
    """The options of `candidate_losses` for torchvision's losses, which are sums over classes and offsets."""
    stds = [1 / weight for weight in model.head.regression_head.box_coder.weights]
    return {"loss_bbox_weight": 1.0, "stds": stds, "box_loss": model.paa_options.box_loss, "convention": "torchvision"}


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules and what to call them in an error."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"`model` must not be scripted, since what it runs is fixed, got {type(model).__name__}")
    for name, module in model.named_modules():
        yield f"model.{name}" if name else "model", module


def _base_of(module: nn.Module) -> Any:
    """The accelerated class of a module's, or None."""
    bases = (AcceleratedRetinaNet, AcceleratedSSD, AcceleratedRPN, AcceleratedRoIHeads)
    return next((base for base in bases if isinstance(module, base.published)), None)


def _check_matching(name: str, module: Any) -> None:
    matcher = type(getattr(module, "proposal_matcher", None))
    if matcher not in OPTIONS:
        raise ValueError(f"`{name}.proposal_matcher` must be a Matcher or SSDMatcher of torchvision, got {matcher.__name__}")
    # RoIHeads has one too, which torchvision never calls.
    if isinstance(module, RegionProposalNetwork) and module.box_similarity is not box_iou:
        raise ValueError(f"`{name}.box_similarity` must be box_iou of torchvision, got {module.box_similarity!r}")


def _check_head(name: str, model: Any) -> None:
    generator = model.anchor_generator
    if getattr(type(generator), "forward", None) is not AnchorGenerator.forward:
        raise ValueError(f"`{name}.anchor_generator` must be an AnchorGenerator of torchvision, got {type(generator).__name__}")
    box_loss = getattr(getattr(model.head, "regression_head", None), "_loss_type", None)
    if box_loss not in BOX_LOSSES:
        raise ValueError(f'`{name}.head.regression_head` must have the box loss "giou" or "l1", got {box_loss!r}')


def _check_options(options: PAAOptions) -> None:
    check_int("topk", options.topk, 1)
    check_non_negative("pos_iou_thr", options.pos_iou_thr)
    check_option("covariance_type", options.covariance_type, COVARIANCE_TYPES)
    if not callable(options.separation):
        check_option("separation", options.separation, SCHEMES)
    check_option("singleton", options.singleton, SINGLETONS)
    check_bool("score_voting", options.score_voting)
    check_option("box_loss", options.box_loss, BOX_LOSSES)
