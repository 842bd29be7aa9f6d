"""`mmcv._ext`, the compiled module that mmcv-lite lacks, as far as a PAA head needs it. Import before mmcv.

Its `nms` is torchvision's. Its focal loss, which mmdetection asks for on a GPU only, is torchvision's too. Whatever else mmcv looks
up raises when it is called.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import one_hot


class _Extension(types.ModuleType):
    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0, offset
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    @staticmethod
    def sigmoid_focal_loss_forward(
        input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
    ) -> None:
        output.copy_(_focal_loss(input, target, weight, gamma, alpha))

    @staticmethod
    def sigmoid_focal_loss_backward(
        input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
    ) -> None:
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            total = _focal_loss(leaf, target, weight, gamma, alpha).sum()
        grad_input.copy_(torch.autograd.grad(total, leaf)[0])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"mmcv._ext.{name} is not in the stand-in")

        return missing


def _focal_loss(scores: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """[N, C] of labels [N], where C is background."""
    assert not weight.numel(), "weights of classes"
    classes = scores.shape[1]
    labels = one_hot(target, classes + 1)[:, :classes].to(scores)
    return torchvision.ops.sigmoid_focal_loss(scores, labels, alpha, gamma)


sys.modules["mmcv._ext"] = _Extension("mmcv._ext")
sys.modules["mmcv._ext"].__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)  # which `importlib.util.find_spec` looks at
