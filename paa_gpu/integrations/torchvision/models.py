"""Changing the class of the detectors in a model, and back."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torchvision.models.detection import RetinaNet

from ...reassign import Separation
from .._classes import change_class, class_before, restore_class
from .matching import Accelerated, base_of, check_matching
from .paa import PAAOptions, RetinaNetPAA, check_head, check_options

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Match boxes without the matrix of overlaps in every RetinaNet, SSD, region proposal network and RoI head of a model.

    The matches equal torchvision's to the bit. So do losses, gradients and the random sampling of proposals. Memory is O(A + G)
    instead of O(A * G), and the matching waits for nothing. This holds for boxes in float32, also with anchors in half precision,
    as under autocast. For other dtypes torchvision rounds overlaps differently. There the module still makes its matrix.

    Args:
        model: a detector of torchvision (also SSDLite, Faster, Mask and Keypoint R-CNN), or a module that contains one, or that
            contains their RPN or RoI heads. Modules that are accelerated already, or use PAA, do not change.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: it contains no such module, or one whose matcher or measure of similarity is not torchvision's, or an object
            on which somebody has set the method that this function replaces. The error names it. Then nothing has changed.
    """
    found = [(name, module, base_of(module)) for name, module in _modules(model) if base_of(module) is not None]
    if not found:
        raise ValueError(
            "`model` must be or contain a RetinaNet, SSD, RegionProposalNetwork or RoIHeads of torchvision, "
            f"got {type(model).__name__}"
        )
    for name, module, base in found:
        check_matching(name, module)
        if not isinstance(module, Accelerated):
            _check_methods(name, module, base, "call accelerate first, and then replace or wrap it")
    for _, module, base in found:
        if not isinstance(module, Accelerated):
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
    more. A ground truth that overlaps no anchor has none. They are sorted by the focal loss, summed over the classes, plus
    `box_loss`. `paa_reassign_batch` keeps the best. The head computes its own losses on them: L1 in `retinanet_resnet50_fpn`,
    GIoU in `retinanet_resnet50_fpn_v2`.

    There is no new parameter, so weights load in both directions. They do not hold PAA or its options: call this function on
    each model that you build or load.

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
            `paa_reassign`); somebody has set a method on the object that this library replaces, such as a wrapped `forward`.
            After an error, the model is as before.

    Source: PAA (arXiv 2007.08103), section 3.
    """
    options = PAAOptions(topk, pos_iou_thr, covariance_type, separation, singleton, score_voting, box_loss)
    check_options(options)
    found = [(name, module) for name, module in _modules(model) if isinstance(module, RetinaNet)]
    if not found:
        raise ValueError(f"`model` must be or contain a RetinaNet of torchvision, got {type(model).__name__}")
    for name, module in found:
        check_head(name, module)
        if not isinstance(module, RetinaNetPAA):
            _check_methods(name, module, RetinaNetPAA, "call use_paa first, and then replace or wrap it")
    for _, module in found:
        change_class(module, RetinaNetPAA)
        module.paa_options = options
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` and `use_paa`. Every module gets its old class back. Other modules do not change.

    Raises:
        TypeError: not a module, or a scripted one; or its class was derived from a class of this library, as `fully_shard` does.
            Then nothing has changed. Restore a model before `fully_shard`.
        ValueError: somebody has set, on an object, a method that this library gives its class. Then nothing has changed either.
    """
    found = [(name, module) for name, module in _modules(model) if isinstance(module, Accelerated)]
    for name, module in found:
        if class_before(module) is None:
            raise TypeError(
                f"`{name}` must have the class that `accelerate` or `use_paa` gave it, got {type(module).__name__}, "
                "a class derived from it"
            )
        _check_methods(name, module, type(module), "delete it from the object, and then call restore")
    for _, module in found:
        restore_class(module)
        vars(module).pop("paa_options", None)
    return model


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules and what to call them in an error."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"`model` must not be scripted, since what it runs is fixed, got {type(model).__name__}")
    for name, module in model.named_modules():
        yield f"model.{name}" if name else "model", module


def _check_methods(name: str, module: nn.Module, kind: type, advice: str) -> None:
    """Refuse an object with a method of its own, where this package's classes give `kind` one.

    Such a method is often a wrapper. It keeps calling the method of the class that the object had before.
    """
    ours = (vars(base).items() for base in kind.__mro__ if base.__module__.startswith(str(__package__)))
    methods = {method for members in ours for method, member in members if isinstance(member, FunctionType)}
    for method in sorted(methods & vars(module).keys()):
        raise ValueError(f"`{name}.{method}` must be the method of its class, got one that was set on the object: {advice}")
