"""`mmcv._ext`, the compiled module that mmcv-lite lacks, as far as a PAA head on the CPU needs it. Import before mmcv.

Its `nms` is torchvision's; whatever else mmcv looks up raises when it is called.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torchvision
from torch import Tensor


class _Extension(types.ModuleType):
    __spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0, offset
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"mmcv._ext.{name} is not in the stand-in")

        return missing


sys.modules["mmcv._ext"] = _Extension("mmcv._ext")
