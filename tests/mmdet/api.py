"""What the tests call differently in mmdetection 2.x and 3.x, under one name each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet
import numpy as np
import stand_in  # noqa: F401  # before mmcv's operators
import torch
from mmdet.models import dense_heads
from torch import Tensor

VERSION = tuple(int(part) for part in mmdet.__version__.split(".")[:2])
IS_3X = VERSION >= (3, 0)
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
PAAHead = dense_heads.PAAHead
LADHead = getattr(dense_heads, "LADHead", None)

if IS_3X:
    from mmdet.models.utils import unpack_gt_instances
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    build_head = build_detector = MODELS.build
else:
    from mmcv import Config
    from mmdet.models import build_detector, build_head

__all__ = ["Config", "build_detector", "build_head"]  # and what is defined here

#: The published configuration of PAA, for versions whose wheel has no configurations.
_PAA = {
    "type": "PAA",
    "backbone": {
        "type": "ResNet", "depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3), "frozen_stages": 1,
        "norm_cfg": {"type": "BN", "requires_grad": True}, "norm_eval": True, "style": "pytorch",
    },
    "neck": {
        "type": "FPN", "in_channels": [256, 512, 1024, 2048], "out_channels": 256, "start_level": 1,
        "add_extra_convs": "on_output", "num_outs": 5,
    },
    "bbox_head": {
        "type": "PAAHead", "reg_decoded_bbox": True, "score_voting": True, "topk": 9, "num_classes": 80, "in_channels": 256,
        "stacked_convs": 4, "feat_channels": 256,
        "anchor_generator": {
            "type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1, "strides": [8, 16, 32, 64, 128],
        },
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0], "target_stds": [0.1, 0.1, 0.2, 0.2]},
        "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.3},
        "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.5},
    },
    "train_cfg": {
        "assigner": {"type": "MaxIoUAssigner", "pos_iou_thr": 0.1, "neg_iou_thr": 0.1, "min_pos_iou": 0, "ignore_iof_thr": -1},
        "allowed_border": -1, "pos_weight": -1, "debug": False,
    },
    "test_cfg": {
        "nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "score_voting": True, "nms": {"type": "nms", "iou_threshold": 0.6},
        "max_per_img": 100,
    },
}  # fmt: skip


def model_of(path: str) -> Any:
    """The model of a published configuration."""
    file = CONFIGS / path
    if not IS_3X and not file.exists():  # 3.x has other names for a few
        file = CONFIGS / "lad" / "lad_r50_paa_r101_fpn_coco_1x.py" if path.startswith("lad") else file
    return Config.fromfile(str(file)).model if file.exists() else Config({"model": _PAA}).model


class Instances(SimpleNamespace):
    """The instances of an image, where mmdetection has no type of its own for them."""

    def __len__(self) -> int:
        return len(self.labels)


class Sample:
    """What 2.x has no type for."""

    ignored_instances: Any = None

    def __init__(self, metainfo: dict[str, Any]) -> None:
        self.metainfo = metainfo

    def set_metainfo(self, metainfo: dict[str, Any]) -> None:
        self.metainfo.update(metainfo)


def make_sample(metainfo: dict[str, Any], bboxes: Tensor, labels: Tensor) -> Any:
    sample = DetDataSample(metainfo=metainfo) if IS_3X else Sample(metainfo)
    sample.gt_instances = InstanceData(bboxes=bboxes, labels=labels) if IS_3X else Instances(bboxes=bboxes, labels=labels)
    return sample


def truth_of(samples: list[Any]) -> tuple[Any, ...]:
    """What follows the levels' outputs in the arguments of a head's methods."""
    if IS_3X:
        instances, ignored, metas = unpack_gt_instances(samples)
        return instances, metas, ignored
    boxes, labels = ([getattr(sample.gt_instances, name) for sample in samples] for name in ("bboxes", "labels"))
    ignored = None
    if any(sample.ignored_instances is not None for sample in samples):
        ignored = [sample.ignored_instances.bboxes for sample in samples]
    return boxes, labels, _metas(samples), ignored


def _metas(samples: list[Any]) -> list[dict[str, Any]]:
    """Sizes with channels, and scale factors of four sides."""
    metas = []
    for sample in samples:
        meta = {name: (*value, 3) for name, value in sample.metainfo.items() if name != "scale_factor"}
        metas.append({**meta, "scale_factor": np.tile(np.array(sample.metainfo["scale_factor"], dtype=np.float32), 2)})
    return metas


def loss(head: Any, features: list[Tensor], samples: list[Any], assignment: tuple[Any, ...] = ()) -> dict[str, Tensor]:
    """The losses of a head, a student's with its teacher's assignment."""
    if IS_3X:
        return head.loss(features, *assignment, samples)
    boxes, labels, metas, ignored = truth_of(samples)
    return head.forward_train(features, *assignment, metas, boxes, labels, ignored)


def predict(head: Any, features: list[Tensor], samples: list[Any], rescale: bool = False) -> list[Any]:
    """The detections of each image: bboxes, scores, labels."""
    if IS_3X:
        return head.predict(features, samples, rescale=rescale)
    found = head.get_bboxes(*head(features), _metas(samples), rescale=rescale)
    return [Instances(bboxes=boxes[:, :4], scores=boxes[:, 4:].flatten(), labels=labels) for boxes, labels in found]


def detector_loss(model: Any, images: Tensor, samples: list[Any]) -> dict[str, Tensor]:
    if IS_3X:
        return model.loss(images, samples)
    boxes, labels, metas, ignored = truth_of(samples)
    return model.forward_train(images, metas, boxes, labels, ignored)


def detector_predict(model: Any, images: Tensor, samples: list[Any]) -> list[Any]:
    """The detections of each image: bboxes, scores, labels."""
    if IS_3X:
        return [sample.pred_instances for sample in model.predict(images, samples, rescale=False)]
    return [_of_classes(image) for image in model.simple_test(images, _metas(samples), rescale=False)]


def _of_classes(arrays: list[np.ndarray]) -> Instances:
    """The instances of one array [k, 5] for each class."""
    rows = torch.from_numpy(np.concatenate(arrays))
    labels = torch.repeat_interleave(torch.arange(len(arrays)), torch.tensor([len(array) for array in arrays]))
    return Instances(bboxes=rows[:, :4], scores=rows[:, 4], labels=labels)


def assign(teacher: Any, features: list[Tensor], samples: list[Any]) -> Any:
    """The teacher's assignment; as the detector asks for it, without gradients."""
    with torch.no_grad():
        return teacher.get_label_assignment(*teacher(features), *truth_of(samples))
