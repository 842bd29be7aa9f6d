"""What would wait for a device, counted on the CPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Synchronisations(TorchDispatchMode):
    """Counts what would wait for the device: reads of a value, and results whose shape depends on values."""

    WAITING = (
        "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "is_nonzero",
        "torchvision::nms",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in self.WAITING or by_mask
        return func(*args, **(kwargs or {}))
