"""The PAA heads of mmdetection 3.x, with assignment and score voting by this library.

For a model that is built, `accelerate(model)`; in a configuration file

    custom_imports = dict(imports=["paa_gpu.integrations.mmdet"])
    model = dict(bbox_head=dict(type="PAAHeadGPU", ...))  # or "LADHeadGPU"; the arguments of the published head

The whole batch is reassigned in one call that does not synchronise; voting takes one call an image. What a subclass of the
published heads overrides stays in force: the accelerated class comes after it in the order of inheritance. So one that overrides

* `gmm_separation_scheme` has it called for every ground truth of the batch, with mmdetection's arguments: slower;
* `loss_by_feat` or (LADHead) `get_label_assignment` has it, and there the library's `paa_reassign`, image by image;
* `paa_reassign` has it called image by image; with `super().paa_reassign(...)` it reaches the library;
* `score_voting` has it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

try:
    from mmdet import __version__ as _mmdet_version
except ImportError as error:
    raise ImportError(
        "paa_gpu.integrations.mmdet needs mmdetection 3.x: `pip install mmdet==3.3.0 mmengine==0.10.7` and mmcv 2.0 or 2.1"
    ) from error
if _mmdet_version.partition(".")[0] != "3":
    raise ImportError(f"paa_gpu.integrations.mmdet needs mmdetection 3.x, got mmdet {_mmdet_version}")

from mmdet.models.dense_heads import LADHead, PAAHead
from mmdet.models.dense_heads.paa_head import EPS
from mmdet.models.utils import levels_to_images, multi_apply
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps

from .._checks import check_option
from ..reassign import Reassignment, paa_reassign_batch
from ..topk import select_candidates
from ..voting import score_voting

__all__ = ["PRESETS", "LADHeadGPU", "PAAHeadGPU", "accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)
Scheme = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Preset(NamedTuple):
    """Where mmdetection and the authors' repository differ."""

    separation: str  #: see `paa_gpu.separation`
    singleton: str  #: what a ground truth with one candidate gets
    offset: float  #: added to the widths and heights of boxes in score voting


PRESETS = {"mmdet": Preset("mmdet", "background", 0.0), "paper": Preset("paper", "positive", 1.0)}


def accelerate(model_or_head: Model, preset: str | None = None) -> Model:
    """Let every PAAHead and LADHead of a model, and every subclass of them, use this library.

    The heads change their class in place: parameters, buffers, hooks and `state_dict` stay, `deepcopy` and pickling work.
    `topk`, `covariance_type` and `num_classes` are the head's. A head that is accelerated already stays so.

    Args:
        model_or_head: a detector of mmdetection or another module with such heads in it (a teacher that LAD keeps outside its
            modules included), or a head.
        preset: "mmdet", or "paper" for the authors' conventions: separation "paper", a ground truth with one candidate keeps it,
            and score voting adds 1 to widths and heights. A subclass's own `gmm_separation_scheme` comes before the preset's
            separation. None: "mmdet" for a head that is not accelerated yet, no change for others.

    Returns:
        `model_or_head`, the same object.

    Raises:
        TypeError: not a module.
        ValueError: no such head in it; an unknown preset.
        ImportError: raised by importing this module, where mmdetection is missing or not 3.x.
    """
    if preset is not None:
        check_option("preset", preset, PRESETS)
    for head in _heads_of(model_or_head):
        if not isinstance(head, PAAHeadGPU):
            head.__class__ = _accelerated(head.__class__)
        if preset is not None:
            head.preset = preset
    return model_or_head


def restore(model_or_head: Model) -> Model:
    """Undo `accelerate`: the heads get their published class back (a PAAHeadGPU of a configuration becomes a PAAHead).

    Heads that are not accelerated, and classes written on top of PAAHeadGPU, stay as they are. Raises as `accelerate`.
    """
    for head in _heads_of(model_or_head):
        published = vars(type(head)).get("published")
        if published is not None:
            head.__class__ = published
            vars(head).pop("preset", None)
    return model_or_head


@MODELS.register_module()
class PAAHeadGPU(PAAHead):
    """mmdetection's PAAHead, with this library's assignment and score voting.

    Args:
        preset: "mmdet" or "paper", see `accelerate`. All others are PAAHead's.
    """

    published: ClassVar[type] = PAAHead
    preset = "mmdet"

    def __init__(self, *args: Any, preset: str = "mmdet", **kwargs: Any) -> None:
        check_option("preset", preset, PRESETS)
        super().__init__(*args, **kwargs)
        self.preset = preset

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        iou_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch from the levels' outputs, [B, channels, H, W] each: as PAAHead, but reassigned in one call."""
        labels, label_weights, bbox_targets, _, positive, anchors, num_pos = _assign(
            self, cls_scores, bbox_preds, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
        )
        scores, boxes, ious = (
            torch.cat(_images(levels, channels))
            for levels, channels in ((cls_scores, self.cls_out_channels), (bbox_preds, 4), (iou_preds, 1))
        )
        loss_cls = self.loss_cls(scores, labels, label_weights, avg_factor=max(num_pos, len(batch_img_metas)))
        if num_pos == 0:
            return {"loss_cls": loss_cls, "loss_bbox": boxes.sum() * 0, "loss_iou": ious.sum() * 0}
        bbox_pred, bbox_target = self.bbox_coder.decode(anchors, boxes[positive]), bbox_targets[positive]
        iou = bbox_overlaps(bbox_pred.detach(), bbox_target, is_aligned=True)
        return {
            "loss_cls": loss_cls,
            "loss_bbox": self.loss_bbox(bbox_pred, bbox_target, iou.clamp(min=EPS), avg_factor=iou.sum()),
            "loss_iou": self.loss_centerness(ious[positive], iou.unsqueeze(-1), avg_factor=num_pos),
        }

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
        """One image: see `paa_gpu.paa_reassign`. Only subclasses that loop over the images themselves come here."""
        num_gt = int(pos_gt_inds.max()) + 1 if len(pos_gt_inds) else 0
        columns = [[tensor] for tensor in (pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds)]
        out = _reassign(self, columns, [anchors], [num_gt])
        return out.label[0], out.label_weight[0], out.bbox_weight[0], int(out.num_pos)

    def score_voting(
        self, det_bboxes: Tensor, det_labels: Tensor, mlvl_bboxes: Tensor, mlvl_nms_scores: Tensor, score_thr: float
    ) -> tuple[Tensor, Tensor]:
        """The detections of one image: see `paa_gpu.score_voting`."""
        offset = PRESETS[self.preset].offset
        return score_voting(det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores, score_thr, offset=offset)


@MODELS.register_module()
class LADHeadGPU(LADHead, PAAHeadGPU):
    """mmdetection's LADHead, teacher or student, with this library's assignment and score voting; arguments as PAAHeadGPU."""

    published: ClassVar[type] = LADHead

    def get_label_assignment(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        iou_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> tuple[Any, ...]:
        """The teacher's assignment, which the student's loss takes: as LADHead, but reassigned in one call."""
        return _assign(self, cls_scores, bbox_preds, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore)


@torch.no_grad()
def _assign(
    head: Any,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    batch_gt_instances: list[Any],
    batch_img_metas: list[dict[str, Any]],
    batch_gt_instances_ignore: list[Any] | None,
) -> tuple[Any, ...]:
    """The results of `LADHead.get_label_assignment`, over the anchors of all images: labels, label weights, box targets, box
    weights before reassignment (a list), indices of the positives, their anchors (None without any), their number."""
    sizes = [level.shape[-2:] for level in cls_scores]
    anchors, valid_flags = head.get_anchors(sizes, batch_img_metas, device=cls_scores[0].device)
    labels, label_weights, bbox_targets, bbox_weights, pos_inds, pos_gt_inds = head.get_targets(
        anchors, valid_flags, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore=batch_gt_instances_ignore
    )
    scores, boxes = _images(cls_scores, head.cls_out_channels), _images(bbox_preds, 4)
    (pos_losses,) = multi_apply(
        head.get_pos_loss, anchors, scores, boxes, labels, label_weights, bbox_targets, bbox_weights, pos_inds
    )
    columns = [pos_losses, labels, label_weights, bbox_weights, pos_inds, pos_gt_inds]
    if _overrides(head, "paa_reassign", PAAHeadGPU):
        new_labels, new_weights, _, counts = multi_apply(head.paa_reassign, *columns, anchors)
        num_pos = sum(counts)
    else:
        out = _reassign(head, columns, anchors, [len(instances) for instances in batch_gt_instances])
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
    preset = PRESETS[head.preset]
    return paa_reassign_batch(
        pos_losses,
        label,
        label_weight,
        bbox_weight,
        pos_inds,
        pos_gt_inds,
        anchors,
        num_classes=head.num_classes,
        topk=head.topk,
        covariance_type=head.covariance_type,
        separation=_own_scheme(head, pos_losses, pos_inds, pos_gt_inds, anchors, num_gts) or preset.separation,
        singleton=preset.singleton,
        num_gts=num_gts,
    )


def _own_scheme(
    head: Any,
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    anchors: list[list[Tensor]],
    num_gts: list[int],
) -> Scheme | None:
    """A subclass's `gmm_separation_scheme`, ground truth by ground truth, as a scheme over the padded batch. None: PAAHead's."""
    if not _overrides(head, "gmm_separation_scheme", PAAHead):
        return None
    candidates: list[Tensor] = []  # anchor indices of each ground truth of the batch
    for losses, inds, gts, levels, num_gt in zip(pos_losses, pos_inds, pos_gt_inds, anchors, num_gts, strict=True):
        found = select_candidates(losses, inds, gts, levels, num_gt=num_gt, topk=head.topk)
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


def _overrides(head: Any, method: str, base: type) -> bool:
    """Whether a head has another method of this name than `base`: from its class, or set on the object."""
    return getattr(getattr(head, method), "__func__", None) is not getattr(base, method)


def _heads_of(model: Any) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model_or_head` must be a Module, got {type(model).__name__}")
    heads = [module for module in _modules(model) if isinstance(module, PAAHead)]
    if not heads:
        raise ValueError(f"`model_or_head` must be or contain a PAAHead or LADHead of mmdetection, got {type(model).__name__}")
    return heads


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules; the teacher too that `KnowledgeDistillationSingleStageDetector` keeps as a plain object."""
    for module in model.modules():
        yield module
        teacher = vars(module).get("teacher_model")
        if isinstance(teacher, nn.Module):
            yield from _modules(teacher)


@functools.cache
def _accelerated(published: Any) -> Any:
    """The accelerated class of a published head or a subclass, in which whatever the subclass overrides comes first."""
    base = LADHeadGPU if issubclass(published, LADHead) else PAAHeadGPU
    if published is base.published:
        return base
    members = {"published": published, "__module__": published.__module__, "__reduce_ex__": _reduce_accelerated}
    return types.new_class(f"{published.__name__}GPU", (published, base), exec_body=lambda body: body.update(members))


def _reduce_accelerated(head: Any, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy, which cannot find a class made by `_accelerated` by its name."""
    return _new_accelerated, (head.published,), object.__reduce_ex__(head, 2)[2]


def _new_accelerated(published: type) -> Any:
    return object.__new__(_accelerated(published))
