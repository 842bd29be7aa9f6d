"""torchvision's RetinaNet trained by PAA."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from ..._checks import FLOATS, INDICES, check_bool, check_classes, check_non_negative, check_option, check_tensor
from ...losses import BOX_LOSSES
from ...reassign import Separation, check_scheme
from ...targets import assign_targets
from ...voting import score_voting_batch
from .matching import AcceleratedRetinaNet, Batch, Targets, marked, training_batch


class PAAOptions(NamedTuple):
    """How a `RetinaNetPAA` assigns anchors and makes detections; see `use_paa`."""

    topk: int = 9
    pos_iou_thr: float = 0.1
    covariance_type: str = "diag"
    separation: Separation = "mmdet"
    singleton: str = "background"
    score_voting: bool = False
    box_loss: str = "giou"


class RetinaNetPAA(AcceleratedRetinaNet):
    """torchvision's RetinaNet, trained by PAA; see `use_paa`. It takes RetinaNet's arguments."""

    published: ClassVar[type] = RetinaNet
    paa_options = PAAOptions()

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        """As RetinaNet: the losses of a batch in training, else its detections."""
        if self.training:
            check_head("model", self)  # again, since somebody may have replaced a part
        batch = training_batch(self, images, targets)
        if batch is None:
            return super().forward(images, targets)
        return self.eager_outputs(_losses_of_step(self, batch), [])

    def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
        """The head's losses on the anchors that PAA assigns."""
        step = getattr(_THREAD, "step", None)
        if step is None or step.model is not self:
            raise RuntimeError(_not_from_forward(self))
        step.reached = True
        found = _paa_matches(self, targets, head_outputs, anchors, step.level_sizes)
        # NaN where a box is not finite, infinite ones too: they overlap nothing, and training would go on without them.
        matches = [marked(own, target["boxes"] * 0) for own, target in zip(found, targets, strict=True)]
        losses: dict[str, Tensor] = self.head.compute_loss(targets, head_outputs, anchors, matches)
        return losses

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections of a batch, with score voting where `use_paa` asked for it."""
        detections: list[dict[str, Tensor]] = super().postprocess_detections(head_outputs, anchors, image_shapes)
        if not self.paa_options.score_voting:
            return detections
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "`score_voting` has no form in ONNX for torchvision's models: call use_paa(model) without it first"
            )
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


@dataclass
class _Step:
    """A training step of a `RetinaNetPAA`, between its `forward` and its `compute_loss`."""

    model: RetinaNetPAA
    level_sizes: list[int]
    reached: bool = False


#: Its `step` is the step of this thread. A subclass may stand between the two methods, with torchvision's arguments only.
_THREAD = threading.local()


def _losses_of_step(model: RetinaNetPAA, batch: Batch) -> dict[str, Tensor]:
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


def _not_from_forward(model: RetinaNetPAA) -> str:
    message = (
        "`compute_loss` must be called by model(images, targets) of the same model in training mode, for PAA to know the levels; "
        "for the loss of validation, call the model so under torch.no_grad()"
    )
    if getattr(model.published, "forward", None) is RetinaNet.forward:
        return message
    return f"{message}. `{model.published.__name__}.forward` must call super().forward(images, targets)"


#: The smallest overlap of a box with its best anchors. With 0, a box far outside of the image would take the anchors of the
#: others. Its image would train as background.
ABOVE_ZERO = torch.finfo(torch.float32).tiny


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
        assignment={"pos_iou_thr": options.pos_iou_thr, "neg_iou_thr": options.pos_iou_thr, "min_pos_iou": ABOVE_ZERO},
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


def check_head(name: str, model: Any) -> None:
    """The anchors come level by level, and the head trains with a box loss of `candidate_losses`."""
    generator = model.anchor_generator
    if getattr(type(generator), "forward", None) is not AnchorGenerator.forward:
        raise ValueError(f"`{name}.anchor_generator` must be an AnchorGenerator of torchvision, got {type(generator).__name__}")
    box_loss = getattr(getattr(model.head, "regression_head", None), "_loss_type", None)
    if box_loss not in BOX_LOSSES:
        raise ValueError(f'`{name}.head.regression_head` must have the box loss "giou" or "l1", got {box_loss!r}')


def check_options(options: PAAOptions) -> None:
    """The options of `use_paa` are of the right type and in range."""
    check_scheme(options.topk, options.covariance_type, options.separation, options.singleton)
    check_non_negative("pos_iou_thr", options.pos_iou_thr)
    check_bool("score_voting", options.score_voting)
    check_option("box_loss", options.box_loss, BOX_LOSSES)
