"""The heads: the methods of mmdetection that they replace, and how a built head becomes one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..._checks import check_option
from ...boxes import LEAST_WEIGHT
from ...reassign import Reassignment, paa_reassign_batch
from ...topk import select_candidates
from ...voting import score_voting
from .._classes import change_class, restore_class
from .versions import (
    HEADS,
    IS_3X,
    LOSS,
    LADHead,
    PAAHead,
    Truth,
    bbox_overlaps,
    in_float32,
    levels_to_images,
    multi_apply,
    published_targets,
)
from .whole import LabelAssignment, assign, losses, obstacles, overrides

__all__ = ["PRESETS", "Explanation", "LADHeadGPU", "PAAHeadGPU", "accelerate", "explain", "restore"]

Model = TypeVar("Model", bound=nn.Module)
Scheme = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
MAPS = ("cls_scores", "bbox_preds", "iou_preds")


class Preset(NamedTuple):
    """The conventions of mmdetection, or of the authors' repository."""

    separation: str  #: see `paa_gpu.separation`
    singleton: str  #: what a ground truth with one candidate gets
    offset: float  #: added to the widths and heights of boxes in score voting


PRESETS = {"mmdet": Preset("mmdet", "background", 0.0), "paper": Preset("paper", "positive", 1.0)}


def accelerate(model_or_head: Model, preset: str | None = None) -> Model:
    """Accelerate every PAAHead and LADHead of a model, and every subclass of them.

    The heads change their class in place. Parameters, buffers, hooks and `state_dict` stay. `deepcopy` and pickling work. `topk`,
    `covariance_type` and `num_classes` come from the head. A head that is accelerated already stays so.

    Args:
        model_or_head: a head, or a detector of mmdetection, or another module that contains such heads. LAD keeps its teacher
            outside its modules; it is accelerated too.
        preset: "mmdet", or "paper" for the authors' conventions. With "paper", the separation is "paper", a ground truth with one
            candidate keeps it, and score voting adds 1 to widths and heights. A subclass's own `gmm_separation_scheme` has
            priority over the preset. None: "mmdet" for a new head; an accelerated head keeps its preset.

    Returns:
        `model_or_head`, the same object.

    Raises:
        TypeError: not a module.
        ValueError: it contains no such head; an unknown preset.
        ImportError: when this module is imported, if mmdetection is missing, or is neither 2.11 to 2.28 nor 3.x.
    """
    if preset is not None:
        check_option("preset", preset, PRESETS)
    for _, head in _heads_of(model_or_head):
        if not isinstance(head, PAAHeadGPU):
            change_class(head, _base_of(type(head)))
        if preset is not None:
            head.preset = preset
    return model_or_head


def restore(model_or_head: Model) -> Model:
    """Undo `accelerate`. The heads get their published class back. A PAAHeadGPU of a configuration becomes a PAAHead.

    Heads that are not accelerated do not change, and neither do classes derived from PAAHeadGPU. Errors are those of
    `accelerate`.
    """
    for _, head in _heads_of(model_or_head):
        accelerated = type(head)
        restore_class(head)
        if type(head) is not accelerated:
            for name in ("preset", "grids"):
                vars(head).pop(name, None)
    return model_or_head


class Explanation(NamedTuple):
    """The part of a head's training that this library does."""

    head: str  #: its name in the model and its class
    accelerated: str  #: "the whole loss", "the assignment of the batch", "the assignment of each image" or "nothing"
    reasons: list[str]  #: why not the whole loss

    def __str__(self) -> str:
        return f"{self.head}: {self.accelerated}" + "".join(f"\n  {reason}" for reason in self.reasons)


def explain(model_or_head: nn.Module) -> list[Explanation]:
    """Say what is accelerated in each head of a model, what is not, and why. `print` shows an entry in several lines.

    * "the whole loss": nothing waits for the device, from the levels' outputs to the losses.
    * "the assignment of the batch": the head has another assigner or loss, or overrides a method. Its own code runs, and the
      library reassigns the batch in one call.
    * "the assignment of each image": the head overrides a method that loops over the images, or the method for one image. (If its
      method calls `super()`, it gets the whole loss there. `explain` cannot see this.)
    * "nothing": it is not accelerated.

    Args:
        model_or_head: as for `accelerate`.

    Returns:
        One `Explanation` for each PAAHead and LADHead. It describes the head as it is now. If you exchange parts of the head
        later, its loss may go another way.

    Raises:
        TypeError, ValueError: as `accelerate`.
    """
    return [_explanation(name, head) for name, head in _heads_of(model_or_head)]


def _explanation(name: str, head: Any) -> Explanation:
    title = f"{name}: {type(head).__name__}" if name else type(head).__name__
    if not isinstance(head, PAAHeadGPU):
        return Explanation(title, "nothing", ["it is not accelerated: accelerate(model)"])
    loops = _loops(head)
    if loops:
        return Explanation(title, "the assignment of each image", loops)
    reasons = obstacles(head)
    return Explanation(title, "the assignment of the batch" if reasons else "the whole loss", reasons)


def _loops(head: Any) -> list[str]:
    """The methods that a head overrides, among those that loop over the images or take one image."""
    base = _base_of(type(head))
    methods = [(LOSS, base), ("paa_reassign", PAAHeadGPU)]
    if base is not PAAHeadGPU:
        methods.append(("get_label_assignment", base))
    return [f"it has a `{method}` of its own" for method, base in methods if overrides(head, method, base)]


@HEADS.register_module()
class PAAHeadGPU(PAAHead):
    """mmdetection's PAAHead, with this library's assignment and score voting.

    Args:
        preset: "mmdet" or "paper", see `accelerate`. All other arguments are PAAHead's.
    """

    published: ClassVar[type] = PAAHead
    preset = "mmdet"

    def __init__(self, *args: Any, preset: str = "mmdet", **kwargs: Any) -> None:
        check_option("preset", preset, PRESETS)
        super().__init__(*args, **kwargs)
        self.preset = preset

    if IS_3X:

        def loss_by_feat(
            self,
            cls_scores: list[Tensor],
            bbox_preds: list[Tensor],
            iou_preds: list[Tensor],
            batch_gt_instances: list[Any],
            batch_img_metas: list[dict[str, Any]],
            batch_gt_instances_ignore: list[Any] | None = None,
        ) -> dict[str, Tensor]:
            """The losses of a batch from the levels' outputs, [N, channels, H, W] each: as PAAHead's."""
            truth = Truth.of(batch_gt_instances, batch_img_metas, batch_gt_instances_ignore)
            return _losses(self, (cls_scores, bbox_preds, iou_preds), truth)

    else:

        @in_float32(*MAPS)
        def loss(
            self,
            cls_scores: list[Tensor],
            bbox_preds: list[Tensor],
            iou_preds: list[Tensor],
            gt_bboxes: list[Tensor],
            gt_labels: list[Tensor],
            img_metas: list[dict[str, Any]],
            gt_bboxes_ignore: list[Tensor] | None = None,
        ) -> dict[str, Tensor]:
            """The losses of a batch from the levels' outputs, [N, channels, H, W] each: as PAAHead's."""
            truth = Truth.of(gt_bboxes, gt_labels, img_metas, gt_bboxes_ignore)
            return _losses(self, (cls_scores, bbox_preds, iou_preds), truth)

    def reassignment(self) -> dict[str, Any]:
        """The options of `paa_reassign_batch` that a head has."""
        preset = PRESETS[self.preset]
        return {
            "topk": self.topk, "covariance_type": self.covariance_type, "separation": preset.separation,
            "singleton": preset.singleton, "precision": "auto",
        }  # fmt: skip

    def paa_reassign(
        self,
        pos_losses: Tensor,
        label: Tensor,
        label_weight: Tensor,
        bbox_weight: Tensor,
        pos_inds: Tensor,
        pos_gt_inds: Tensor,
        anchors: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """One image: see `paa_gpu.paa_reassign`. Only subclasses with their own loop over the images call this."""
        num_gt = int(pos_gt_inds.max()) + 1 if len(pos_gt_inds) else 0
        columns = [[tensor] for tensor in (pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds)]
        out = _reassign(self, columns, [anchors], [num_gt])
        return out.label[0], out.label_weight[0], out.bbox_weight[0], int(out.num_pos)

    def score_voting(
        self, det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor, score_thr: float
    ) -> tuple[Tensor, Tensor]:
        """The detections of one image: see `paa_gpu.score_voting`."""
        if not len(det_bboxes):  # Tensor[0, 4] in 2.11
            return det_bboxes, det_labels
        offset = PRESETS[self.preset].offset
        return score_voting(det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores, score_thr, offset=offset)


if LADHead is not None:

    @HEADS.register_module()
    class LADHeadGPU(LADHead, PAAHeadGPU):
        """mmdetection's LADHead, teacher or student, with this library's assignment and score voting.

        It takes the arguments of PAAHeadGPU.
        """

        published: ClassVar[type] = LADHead

        @in_float32(*MAPS)
        def get_label_assignment(
            self, cls_scores: list[Tensor], bbox_preds: list[Tensor], iou_preds: list[Tensor], *args: Any, **kwargs: Any
        ) -> Any:
            """The teacher's assignment, for the student's loss. The results are LADHead's, see `LabelAssignment`."""
            truth = Truth.of(*args, **kwargs)
            if not _whole(self, truth):
                return _assign(self, cls_scores, bbox_preds, truth)
            return LabelAssignment(*assign(self, cls_scores, bbox_preds, truth))

        @in_float32(*MAPS)
        def _student_loss(
            self,
            cls_scores: list[Tensor],
            bbox_preds: list[Tensor],
            iou_preds: list[Tensor],
            *args: Any,
            label_assignment_results: Any = None,
            **kwargs: Any,
        ) -> dict[str, Tensor]:
            """The student's losses with its teacher's assignment. LADHead computes them if the teacher is not ours."""
            truth, given = Truth.of(*args, **kwargs), label_assignment_results
            if isinstance(given, LabelAssignment) and _whole(self, truth):
                maps = (cls_scores, bbox_preds, iou_preds)
                return losses(self, maps, given.anchors, given.targets, len(truth.metas), by_iou=False)
            published: Callable[..., dict[str, Tensor]] = getattr(super(), LOSS)
            return published(cls_scores, bbox_preds, iou_preds, *args, label_assignment_results=given, **kwargs)

        if IS_3X:
            loss_by_feat = _student_loss
        else:
            loss = _student_loss

else:
    LADHeadGPU = None  # type: ignore[misc,assignment]


def _whole(head: Any, truth: Truth) -> bool:
    """Whether nothing stands in the way: nothing of the head, and the ground truths have labels."""
    return truth.labels is not None and not overrides(head, "paa_reassign", PAAHeadGPU) and not obstacles(head)


def _losses(head: Any, maps: tuple[list[Tensor], list[Tensor], list[Tensor]], truth: Truth) -> dict[str, Tensor]:
    """As PAAHead's: here as a whole, or with the head's own assigner and losses around one call for the batch."""
    cls_scores, bbox_preds, iou_preds = maps
    if _whole(head, truth):
        return losses(head, maps, *assign(head, cls_scores, bbox_preds, truth), len(truth.metas), by_iou=True)
    labels, label_weights, bbox_targets, _, positive, anchors, num_pos = _assign(head, cls_scores, bbox_preds, truth)
    scores, boxes, ious = (
        torch.cat(_images(levels, channels))
        for levels, channels in ((cls_scores, head.cls_out_channels), (bbox_preds, 4), (iou_preds, 1))
    )
    loss_cls = head.loss_cls(scores, labels, label_weights, avg_factor=max(num_pos, len(truth.metas)))
    if num_pos == 0:
        return {"loss_cls": loss_cls, "loss_bbox": boxes.sum() * 0, "loss_iou": ious.sum() * 0}
    bbox_pred, bbox_target = head.bbox_coder.decode(anchors, boxes[positive]), bbox_targets[positive]
    iou = bbox_overlaps(bbox_pred.detach(), bbox_target, is_aligned=True)
    return {
        "loss_cls": loss_cls,
        "loss_bbox": head.loss_bbox(bbox_pred, bbox_target, iou.clamp(min=LEAST_WEIGHT), avg_factor=iou.sum()),
        "loss_iou": head.loss_centerness(ious[positive], iou.unsqueeze(-1), avg_factor=num_pos),
    }


@torch.no_grad()
def _assign(head: Any, cls_scores: list[Tensor], bbox_preds: list[Tensor], truth: Truth) -> tuple[Any, ...]:
    """The results of `LADHead.get_label_assignment`, over the anchors of all images: see `LabelAssignment`."""
    sizes = [level.shape[-2:] for level in cls_scores]
    anchors, valid_flags = head.get_anchors(sizes, truth.metas, device=cls_scores[0].device)
    labels, label_weights, bbox_targets, bbox_weights, pos_inds, pos_gt_inds = published_targets(
        head, anchors, valid_flags, truth
    )
    scores, boxes = _images(cls_scores, head.cls_out_channels), _images(bbox_preds, 4)
    (pos_losses,) = multi_apply(
        head.get_pos_loss, anchors, scores, boxes, labels, label_weights, bbox_targets, bbox_weights, pos_inds
    )
    columns = [pos_losses, labels, label_weights, bbox_weights, pos_inds, pos_gt_inds]
    if overrides(head, "paa_reassign", PAAHeadGPU):
        new_labels, new_weights, _, counts = multi_apply(head.paa_reassign, *columns, anchors)
        num_pos = sum(counts)
    else:
        out = _reassign(head, columns, anchors, [len(boxes) for boxes in truth.boxes])
        new_labels, new_weights, num_pos = out.label, out.label_weight, int(out.num_pos.sum())
    all_labels = torch.cat(new_labels)
    positive = ((all_labels >= 0) & (all_labels < head.num_classes)).nonzero().flatten()
    all_anchors = torch.cat([level for levels in anchors for level in levels])
    pos_anchors = all_anchors[positive] if num_pos else None
    return all_labels, torch.cat(new_weights), torch.cat(bbox_targets), bbox_weights, positive, pos_anchors, num_pos


def _images(levels: list[Tensor], channels: int) -> list[Tensor]:
    """Levels [B, anchors * channels, H, W] as one Tensor[A, channels] per image."""
    return [image.reshape(-1, channels) for image in levels_to_images(levels)]


def _reassign(head: Any, columns: Sequence[Sequence[Tensor]], anchors: list[list[Tensor]], num_gts: list[int]) -> Reassignment:
    """`paa_reassign_batch` with the options of a head."""
    pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds = columns
    # Under autocast the head makes the empty losses of an image without boxes in another dtype than those of the others.
    pos_losses = torch.cat(list(pos_losses)).split_with_sizes([len(losses) for losses in pos_losses])
    options = head.reassignment()
    options["separation"] = _own_scheme(head, pos_losses, pos_inds, pos_gt_inds, anchors, num_gts) or options["separation"]
    return paa_reassign_batch(
        pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds, anchors,
        num_classes=head.num_classes, num_gts=num_gts, **options,
    )  # fmt: skip


def _own_scheme(
    head: Any,
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    anchors: list[list[Tensor]],
    num_gts: list[int],
) -> Scheme | None:
    """A subclass's `gmm_separation_scheme` as a scheme for the padded batch, ground truth by ground truth. None: PAAHead's."""
    if not overrides(head, "gmm_separation_scheme", PAAHead):
        return None
    candidates: list[Tensor] = []  # anchor indices of each ground truth of the batch
    for scores, inds, gts, levels, num_gt in zip(pos_losses, pos_inds, pos_gt_inds, anchors, num_gts, strict=True):
        found = select_candidates(scores, inds, gts, levels, num_gt=num_gt, topk=head.topk)
        candidates += [inds[index[:count]] for index, count in zip(found.index, found.count.tolist(), strict=True)]

    def separate(assignment: Tensor, score: Tensor, loss: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        positive, ignored = torch.zeros_like(mask), torch.zeros_like(mask)
        for row in mask.any(1).nonzero().flatten().tolist():
            inds = candidates[row]
            own = slice(len(inds))
            kept, dropped = head.gmm_separation_scheme((~assignment[row, own]).long(), score[row, own], inds)
            positive[row, own], ignored[row, own] = torch.isin(inds, kept), torch.isin(inds, dropped)
        return positive, ignored

    return separate


def _heads_of(model: Any) -> list[tuple[str, Any]]:
    """The heads of a model and their names in it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model_or_head` must be a Module, got {type(model).__name__}")
    heads = [(name, module) for name, module in _modules("", model) if isinstance(module, PAAHead)]
    if not heads:
        raise ValueError(f"`model_or_head` must be or contain a PAAHead or LADHead of mmdetection, got {type(model).__name__}")
    return heads


def _modules(prefix: str, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, also the teacher that `KnowledgeDistillationSingleStageDetector` keeps as a plain object."""
    for name, module in model.named_modules(prefix=prefix):
        yield name, module
        teacher = vars(module).get("teacher_model")
        if isinstance(teacher, nn.Module):
            yield from _modules(f"{name}.teacher_model".removeprefix("."), teacher)


def _base_of(head_class: type) -> Any:
    """The accelerated head that a class is, or becomes."""
    return LADHeadGPU if LADHead is not None and issubclass(head_class, LADHead) else PAAHeadGPU
