"""The head of a PAA detector, for any backbone: what mmdetection's `PAAHead` does, in torch, with this library's operators.

Anchors, boxes and sizes are in pixels of the batch; boxes are x1, y1, x2, y2. Level `l` has one square anchor of side
`anchor_scale * strides[l]` per cell, centred on its first pixel. Shapes: N images, A anchors over all levels, C classes.

Training never waits for the device. `targets.py` assigns without waiting, and the divisors of the losses stay on the device.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ._checks import (
    LIST,
    check_bool,
    check_finite_non_negative,
    check_float,
    check_image_sizes,
    check_int,
    check_levels,
    check_list,
    check_non_negative,
    check_positive,
    check_pyramid,
    check_scale_factors,
    check_share,
    check_targets,
)
from ._staging import on_device
from .boxes import LEAST_WEIGHT, decode, focal_loss
from .distributed import reduce_mean
from .nms import batched_nms
from .reassign import Separation, check_options
from .targets import Kept, Targets, assign_targets, flatten_levels, positive_losses
from .voting import score_voting_batch

__all__ = ["PAAHead", "levels_to_images"]

EPS = float(torch.finfo(torch.float32).eps)  # added to what losses are divided by, as published

Size = tuple[int, int]
Sizes = Sequence[Size] | Tensor
Scales = Sequence[float | tuple[float, float]] | Tensor


def levels_to_images(mlvl_tensor: Sequence[Tensor]) -> list[Tensor]:
    """Turn one tensor for each pyramid level into one tensor for each image, with the levels one after the other.

    Args:
        mlvl_tensor: Tensor[N, C, H_l, W_l] for each level, of one dtype, whichever it is.

    Returns:
        N tensors Tensor[sum of H_l * W_l, C]. They are contiguous views of one tensor. Cells come row after row.

    Raises:
        TypeError, ValueError: not a list or empty; a level whose rank, N, C, dtype or device differs from the first's.

    Source: the function of the same name in mmdetection's `mmdet.models.utils`.
    """
    check_list("mlvl_tensor", mlvl_tensor, "level")
    check_levels("mlvl_tensor", mlvl_tensor, None, floating=False)
    return list(flatten_levels(mlvl_tensor).unbind())


class PAAHead(nn.Module):
    """Towers, losses and detections of PAA. Parameters have the same names as in mmdetection, so its checkpoints load.

    The defaults are the published configuration. Source: PAA (arXiv 2007.08103); mmdetection 3.3.0, `PAAHead`.

    Args:
        num_classes: C. Labels are 0 to C - 1.
        in_channels: channels of the features of every level.
        feat_channels: channels of the towers; a multiple of `norm_groups`.
        stacked_convs: convolutions in each of the two towers.
        norm_groups: groups of the towers' group normalisation.
        strides: pixels between two cells of each level.
        anchor_scale: side of an anchor in strides.
        target_stds: factors of the predicted offsets (x, y, log w, log h).
        pos_iou_thr, neg_iou_thr, min_pos_iou, match_low_quality, ignore_iof_thr: which anchors are potential positives, see
            `assign_max_iou`. With the default `ignore_iof_thr`, ignored boxes change nothing. With `min_pos_iou` 0, as published,
            a box outside of all anchors takes the anchors of others; 1e-12 leaves it without any.
        allowed_border: an anchor is trained if it reaches at most this many pixels beyond the left and the top of its image, and
            less beyond the right and the bottom. Negative: all are trained.
        topk, covariance_type, separation, singleton, precision: options of the assignment, see `paa_reassign`.
        gamma, alpha: options of the focal loss.
        bbox_loss_weight, iou_loss_weight: weights of the GIoU loss and the IoU prediction. The focal loss has weight 1.
        nms_pre: the most boxes of each level that go on to NMS. 0: all.
        score_thr: the score of a detection is above this. A score is the root of class score * predicted IoU.
        iou_threshold: threshold of NMS within a class.
        max_per_img: the most detections of an image. 0: all.
        score_voting: whether `score_voting` refines the boxes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        stacked_convs: int = 4,
        norm_groups: int = 32,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        anchor_scale: float = 8,
        target_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        *,
        pos_iou_thr: float = 0.1,
        neg_iou_thr: float = 0.1,
        min_pos_iou: float = 0.0,
        match_low_quality: bool = True,
        ignore_iof_thr: float = -1.0,
        allowed_border: float = -1.0,
        topk: int = 9,
        covariance_type: str = "diag",
        separation: Separation = "mmdet",
        singleton: str = "background",
        precision: str = "auto",
        gamma: float = 2.0,
        alpha: float = 0.25,
        bbox_loss_weight: float = 1.3,
        iou_loss_weight: float = 0.5,
        nms_pre: int = 1000,
        score_thr: float = 0.05,
        iou_threshold: float = 0.6,
        max_per_img: int = 100,
        score_voting: bool = True,
    ) -> None:
        for name, number, least in (
            ("in_channels", in_channels, 1), ("feat_channels", feat_channels, 1),
            ("stacked_convs", stacked_convs, 0), ("norm_groups", norm_groups, 1),
            ("nms_pre", nms_pre, 0), ("max_per_img", max_per_img, 0),
        ):  # fmt: skip
            check_int(name, number, least)
        if feat_channels % norm_groups:
            raise ValueError(f"`feat_channels` must be a multiple of `norm_groups`, {norm_groups}, got {feat_channels}")
        check_list("strides", strides, "level")
        for level, stride in enumerate(strides):
            check_int(f"strides[{level}]", stride, 1)
        check_list("target_stds", target_stds, "offset", length=4, like="a box")
        for i, std in enumerate(target_stds):
            check_positive(f"target_stds[{i}]", std)
            check_finite_non_negative(f"target_stds[{i}]", std)
        check_positive("anchor_scale", anchor_scale)
        for name, value in (
            ("pos_iou_thr", pos_iou_thr), ("neg_iou_thr", neg_iou_thr), ("min_pos_iou", min_pos_iou),
            ("iou_threshold", iou_threshold),
        ):  # fmt: skip
            check_non_negative(name, value)
        for name, value in (
            ("anchor_scale", anchor_scale), ("gamma", gamma), ("bbox_loss_weight", bbox_loss_weight),
            ("iou_loss_weight", iou_loss_weight),
        ):  # fmt: skip
            check_finite_non_negative(name, value)
        check_share("alpha", alpha)
        for name, value in (
            ("ignore_iof_thr", ignore_iof_thr), ("allowed_border", allowed_border), ("score_thr", score_thr),
        ):  # fmt: skip
            check_float(name, value)
        check_bool("match_low_quality", match_low_quality)
        check_bool("score_voting", score_voting)
        check_options(num_classes, topk, covariance_type, separation, singleton, precision)
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels
        self.strides, self.anchor_scale, self.target_stds = tuple(strides), anchor_scale, tuple(target_stds)
        self.assignment: dict[str, Any] = {
            "pos_iou_thr": pos_iou_thr, "neg_iou_thr": neg_iou_thr, "min_pos_iou": min_pos_iou,
            "match_low_quality": match_low_quality, "ignore_iof_thr": ignore_iof_thr,
        }  # fmt: skip
        self.allowed_border = allowed_border
        self.reassignment: dict[str, Any] = {
            "topk": topk, "covariance_type": covariance_type, "separation": separation, "singleton": singleton,
            "precision": precision,
        }  # fmt: skip
        self.gamma, self.alpha = gamma, alpha
        self.bbox_loss_weight, self.iou_loss_weight = bbox_loss_weight, iou_loss_weight
        self.nms_pre, self.score_thr, self.iou_threshold = nms_pre, score_thr, iou_threshold
        self.max_per_img, self.score_voting = max_per_img, score_voting
        self.cls_convs = _tower(in_channels, feat_channels, stacked_convs, norm_groups)
        self.reg_convs = _tower(in_channels, feat_channels, stacked_convs, norm_groups)
        features = feat_channels if stacked_convs else in_channels
        self.atss_cls = nn.Conv2d(features, num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(features, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(features, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise again: convolutions from a normal distribution of deviation 0.01, every class at a score of 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.constant_(module.bias, -math.log(99) if module is self.atss_cls else 0)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, Scale):
                nn.init.ones_(module.scale)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The predictions of every level.

        Args:
            features: a list or tuple with Tensor[N, in_channels, H_l, W_l] for each level.

        Returns:
            `(cls_scores, bbox_preds, iou_preds)`, three lists: Tensor[N, C, H_l, W_l] logits, Tensor[N, 4, H_l, W_l] float32
            offsets, and Tensor[N, 1, H_l, W_l] logits of the IoU.

        Raises:
            TypeError, ValueError: not one tensor per stride; a level of another rank, N or number of channels. Outside of
                `torch.compile`, also levels whose sides do not fit the strides, such as levels in another order.
        """
        check_list("features", features, "level", length=len(self.strides), like="`strides`")
        check_levels("features", features, self.in_channels)
        check_pyramid("features", features, self.strides)
        cls_scores, bbox_preds, iou_preds = [], [], []
        for level, scale in zip(features, self.scales, strict=True):
            cls_feature, reg_feature = level, level
            for conv in self.cls_convs:
                cls_feature = conv(cls_feature)
            for conv in self.reg_convs:
                reg_feature = conv(reg_feature)
            cls_scores.append(self.atss_cls(cls_feature))
            bbox_preds.append(scale(self.atss_reg(reg_feature)).float())
            iou_preds.append(self.atss_centerness(reg_feature))
        return cls_scores, bbox_preds, iou_preds

    def _num_images(self, features: Any) -> int:
        """Of the first level. `forward` checks the others."""
        check_list("features", features, "level")
        check_levels("features", features[:1], self.in_channels)
        images: int = features[0].shape[0]
        return images

    def loss(
        self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], image_sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch. Train with their sum. They are float32, also under autocast. Nothing waits for the device.

        Args:
            features: as for `forward`.
            targets: a dictionary for each image, as for torchvision's detectors. `boxes`: Tensor[G, 4] floating. `labels`:
                Tensor[G] int64 or int32 in [0, C). Optional `ignored_boxes`: Tensor[I, 4] (see `ignore_iof_thr`). G and I may be
                0.
            image_sizes: (height, width) of each image within the batch, or Tensor[N, 2]. The cells beyond are not trained.
                mmdetection passes the size padded to a multiple of 32, its `pad_shape`. None: each image fills the batch.

        Returns:
            `{"loss_cls", "loss_bbox", "loss_iou"}`, three scalars. In a batch without positives, the last two are 0. If
            `torch.distributed` is initialised, the divisors are averaged over the processes. Then the average of the gradients,
            which DistributedDataParallel takes, equals the gradient of the joined batch.

        Raises:
            TypeError, ValueError: as `forward`; a batch without images; a list without N entries; a target without `boxes` or
                `labels`, or of the wrong shape, dtype, device or format (of `tv_tensors`); a size that is negative or beyond the
                batch, or no `image_sizes` although `allowed_border` is not negative. On the CPU, outside of `torch.compile`, also
                a label outside [0, C), a box that is not finite, and a box with x1 > x2 or y1 > y2.

        On a GPU and in a compiled graph, an error would have to wait for the device. There, a box with a label outside [0, C)
        belongs to no class. A box that is not finite, or has x1 > x2 or y1 > y2, makes `loss_bbox` NaN. An image without an
        anchor inside it contributes nothing (mmdetection raises an error). If the offsets of a potential positive make no box,
        such as NaN, `loss_bbox` and `loss_iou` are NaN. Other losses that are not finite: see `paa_reassign`.
        """
        num_images = self._num_images(features)
        check_targets(targets, num_images, self.num_classes, features[0].device)
        if image_sizes is not None:
            check_image_sizes(image_sizes, num_images, features[0].device, features[0], self.strides[0])
        elif self.allowed_border >= 0:
            raise ValueError(f"`image_sizes` must be given with an `allowed_border` of {self.allowed_border}, got None")
        cls_scores, bbox_preds, iou_preds = self(features)
        # Autocast keeps to float32 what starts there: there are neither products of matrices nor convolutions behind the towers.
        cls_scores, iou_preds = [level.float() for level in cls_scores], [level.float() for level in iou_preds]
        anchors, all_anchors = self._anchors(cls_scores)
        valid = None if image_sizes is None else self._inside(all_anchors, image_sizes).unbind()
        assigned = self._assign(cls_scores, bbox_preds, anchors, targets, valid)
        giou, cross_entropy, iou = positive_losses(assigned, all_anchors, bbox_preds, iou_preds, self.target_stds)
        sums = torch.stack([assigned.num_pos.sum(), iou.new_full((), num_images), iou.sum()])
        num_pos, images, iou_sum = (reduce_mean(sums) + EPS).unbind()
        lower, upper = torch.cat([target["boxes"] for target in targets]).detach().float().chunk(2, 1)
        # 0; NaN if a box is not finite or has a negative size. It overlaps nothing, and training would go on without it.
        sound = ((upper - lower).sqrt() * 0).sum()
        loss_cls = focal_loss(flatten_levels(cls_scores).flatten(0, 1), assigned.label, self.gamma, self.alpha).sum(1)
        return {
            "loss_cls": (loss_cls * assigned.label_weight).sum() / torch.maximum(num_pos, images),
            "loss_bbox": self.bbox_loss_weight * (giou * iou.clamp(min=LEAST_WEIGHT)).sum() / iou_sum + sound,
            "loss_iou": self.iou_loss_weight * cross_entropy.sum() / num_pos,
        }

    @overload
    def predict(
        self,
        features: Sequence[Tensor],
        image_sizes: Sizes,
        scale_factors: Scales | None = ...,
        padded: Literal[False] = ...,
    ) -> list[dict[str, Tensor]]: ...

    @overload
    def predict(
        self,
        features: Sequence[Tensor],
        image_sizes: Sizes,
        scale_factors: Scales | None = ...,
        *,
        padded: Literal[True],
    ) -> dict[str, Tensor]: ...

    @torch.no_grad()
    def predict(
        self,
        features: Sequence[Tensor],
        image_sizes: Sizes,
        scale_factors: Scales | None = None,
        padded: bool = False,
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """The detections of a batch. They are float32, also under autocast.

        Args:
            features: as for `forward`.
            image_sizes: (height, width) of each image within the batch, or Tensor[N, 2]. Boxes are clipped to it.
            scale_factors: how much each image was enlarged before: a number, or (in x, in y). Or Tensor[N] or Tensor[N, 2], for
                which `torch.compile` makes one graph. The boxes are divided by it before NMS. None: boxes stay in pixels of the
                batch.
            padded: give the result a fixed shape, with room for M = `max_per_img` detections in each image. Then nothing waits
                for the device. One CUDA graph can hold the call. `torch.compile(fullgraph=True)` and `torch.export` can take it.

        Returns:
            A dictionary for each image: `boxes` Tensor[k, 4], `scores` Tensor[k] and `labels` Tensor[k] int64. They are ordered
            by class, and within a class the highest score comes first, as published. Without voting they are ordered by score.
            The call waits once, for the numbers k. With `padded`, one dictionary: `boxes` Tensor[N, M, 4], `scores` and `labels`
            Tensor[N, M], and `count` Tensor[N] int64, the numbers k. The rest of a row is zeros, and -1 for labels.

        Raises:
            TypeError, ValueError: as `forward`; a list without N entries, or a tensor of the wrong shape, dtype or device; a size
                or a factor that is no number or pair of numbers; a size that is negative, NaN or beyond the batch; a factor that
                is not positive. The values of tensors on a device are not checked, because that would wait.

        NMS is that of `batched_nms`: equal scores by index, and each class on its own, exactly.
        """
        num_images, device = self._num_images(features), features[0].device
        check_image_sizes(image_sizes, num_images, device, features[0], self.strides[0])
        if scale_factors is not None:
            check_scale_factors(scale_factors, num_images, device)
        check_bool("padded", padded)
        cls_scores, bbox_preds, iou_preds = self(features)
        mlvl_bboxes, mlvl_scores = self._decode(cls_scores, bbox_preds, iou_preds, image_sizes)
        if scale_factors is not None:
            mlvl_bboxes = mlvl_bboxes / _pairs(scale_factors, mlvl_bboxes)
        found = batched_nms(
            mlvl_bboxes, mlvl_scores, None, self.iou_threshold, score_thr=self.score_thr, max_per_img=self.max_per_img
        )
        bboxes, labels = torch.cat([found.boxes, found.scores[..., None]], 2), found.labels
        if self.score_voting:
            bboxes, labels = score_voting_batch(bboxes, labels, mlvl_bboxes, mlvl_scores, self.score_thr, count=found.count)
        batch = {"boxes": bboxes[..., :4], "scores": bboxes[..., 4], "labels": labels}
        if padded:
            return batch | {"count": found.count}
        numbers = found.count.tolist()
        return [{name: rows[i, :number] for name, rows in batch.items()} for i, number in enumerate(numbers)]

    def _anchors(self, levels: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """Tensor[A_l, 4] of each level, and Tensor[A, 4], made from Python numbers, so nothing waits."""
        return self._kept.of(levels, lambda: self._make_anchors(levels), tuple(self.strides), self.anchor_scale)

    def _make_anchors(self, levels: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        anchors = []
        for level, stride in zip(levels, self.strides, strict=True):
            y, x = (torch.arange(size, device=level.device, dtype=torch.float32) * stride for size in level.shape[2:])
            half = 0.5 * stride * self.anchor_scale
            y, x = torch.meshgrid(y, x, indexing="ij")
            anchors.append(torch.stack([x - half, y - half, x + half, y + half], -1).reshape(-1, 4))
        return anchors, torch.cat(anchors)

    def _assign(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        anchors: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        valid: Sequence[Tensor] | None,
    ) -> Targets:
        """The targets of the anchors."""
        boxes = [target["boxes"] for target in targets]
        ignored = None
        if self.assignment["ignore_iof_thr"] > 0:
            ignored = [target.get("ignored_boxes", boxes[0][:0]) for target in targets]
        return assign_targets(
            anchors, cls_scores, bbox_preds, boxes, [target["labels"] for target in targets], ignored, valid,
            num_classes=self.num_classes,
            assignment=self.assignment,
            losses={
                "gamma": self.gamma, "alpha": self.alpha, "loss_bbox_weight": self.bbox_loss_weight, "stds": self.target_stds,
            },
            reassignment=self.reassignment,
        )  # fmt: skip

    def _inside(self, anchors: Tensor, image_sizes: Sizes) -> Tensor:
        """BoolTensor[N, A]: anchors whose cell is within the image, and that reach at most `allowed_border` pixels beyond it."""
        x1, y1, x2, y2 = anchors.unbind(1)
        width, height, _, _ = _limits(image_sizes, anchors).unbind(2)
        inside = (x1 + x2 < 2 * width) & (y1 + y2 < 2 * height)
        if self.allowed_border >= 0:
            border = self.allowed_border
            inside &= (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
        return inside

    def _decode(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], iou_preds: list[Tensor], image_sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Boxes [N, K, 4] and scores [N, K, C] of the best `nms_pre` of each level."""
        anchors, _ = self._anchors(cls_scores)
        limits = _limits(image_sizes, anchors[0])
        boxes, scores = [], []
        for *outputs, priors in zip(cls_scores, bbox_preds, iou_preds, anchors, strict=True):
            cls_score, bbox_pred, iou_pred = (flatten_levels([level.float()]) for level in outputs)
            score = (cls_score.sigmoid() * iou_pred.sigmoid()).sqrt()
            priors = priors.expand(score.shape[0], -1, -1)
            size: Any = score.shape[1]
            # During an export, the size is not known yet. Then all boxes are sorted, even if there are few.
            unknown = isinstance(size, torch.SymInt) or torch.compiler.is_exporting()
            if self.nms_pre and (unknown or self.nms_pre < size):
                # Dynamo of torch 2.9 knows `min`, and says of every graph that it is exported.
                least = min if torch.compiler.is_dynamo_compiling() else torch.sym_min
                best = score.amax(2).topk(least(self.nms_pre, size)).indices[..., None]
                score, bbox_pred, priors = (
                    tensor.gather(1, best.expand(-1, -1, tensor.shape[2])) for tensor in (score, bbox_pred, priors)
                )
            boxes.append(decode(priors, bbox_pred, self.target_stds).clamp(min=0).minimum(limits))
            scores.append(score)
        return torch.cat(boxes, 1), torch.cat(scores, 1)


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _tower(in_channels: int, feat_channels: int, stacked_convs: int, groups: int) -> nn.ModuleList:
    """Convolutions with group normalisation, under the names of mmcv's ConvModule."""
    return nn.ModuleList(
        nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(feat_channels if i else in_channels, feat_channels, 3, padding=1, bias=False),
                gn=nn.GroupNorm(groups, feat_channels),
                activate=nn.ReLU(inplace=True),
            )
        )
        for i in range(stacked_convs)
    )


def _pairs(values: Scales, like: Tensor) -> Tensor:
    """Tensor[N, 1, 4] of x, y, x, y of each image, on the device of `like`."""
    if isinstance(values, Tensor):
        pairs = values if values.dim() == 2 else values[:, None].expand(-1, 2)
        return pairs.to(like.dtype).repeat(1, 2)[:, None]
    each = [value if isinstance(value, LIST) else (value, value) for value in values]
    return on_device([[x, y, x, y] for x, y in each], like.dtype, like.device).view(-1, 1, 4)


def _limits(image_sizes: Sizes, like: Tensor) -> Tensor:
    """Tensor[N, 1, 4] of width, height, width, height of each image, on the device of `like`."""
    if isinstance(image_sizes, Tensor):
        return _pairs(image_sizes.flip(1), like)
    return _pairs([(width, height) for height, width in image_sizes], like)
