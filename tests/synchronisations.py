"""What would wait for a CUDA device, counted on the CPU, by who asks.

Two modes see it: what reads a value, or has a shape that depends on one, is dispatched as an operation; what copies between host
and device (`cpu`, `tolist`, `numpy`, `new_tensor`, `torch.tensor`, `from_numpy`) does nothing on a CPU and is seen as a call of
Python only. Not seen: `.to(device)`, which on a CPU is no copy. Not counted, since a device does not do it: the checks of `one_hot`,
and those of values, both on the CPU only; and the inside of this library's operators, whose CPU implementation reads what it
likes. That the kernels behind them do not wait is counted by `device_operations`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TORCH = str(Path(torch.__file__).parent) + os.sep  # not torchvision


class Synchronisations(TorchDispatchMode):
    """Counts while it is open: `count` in all, `by[file, function]` of each that asked, the first outside torch."""

    WAITING = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
         "is_nonzero", "equal", "bincount", "torchvision::nms")
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[tuple[str, str]] = Counter()
        self.quiet = 0
        self.calls = _Calls(self)

    @property
    def count(self) -> int:
        return sum(self.by.values())

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.WAITING or waits(name, args, kwargs or {}):
            self.ask()
        if name.startswith("paa_gpu::"):
            with self.silence():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def silence(self):
        """Nothing in it would happen on a device."""
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def ask(self) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        asking = [("/".join(Path(f.f_code.co_filename).parts[-2:]), f.f_code.co_name) for f in (frame, frame.f_back)]
        if not self.quiet and ("paa_gpu/_checks.py", "values_of") not in asking:
            self.by[asking[0]] += 1


def waits(name, args, kwargs) -> bool:
    """Operations that wait with some arguments only."""
    if name == "index":
        return masked(args[1])
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        return masked(args[1]) and args[2].numel() != 1  # one value is a `masked_fill`
    return name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3


def masked(indices) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Calls(TorchFunctionMode):
    """Python calls that copy between host and device."""

    METHODS = frozenset(
        (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.new_tensor)
    )
    MAKERS = frozenset((torch.tensor, torch.as_tensor, torch.from_numpy))

    def __init__(self, mode: Synchronisations) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_host = isinstance(kwargs.get("device"), str)  # "cpu"; the device of a tensor is no host elsewhere
        if func in self.METHODS or (func in self.MAKERS and not on_host):
            self.mode.ask()
        if func in (torch.nn.functional.one_hot, torch._C._nn.one_hot):
            with self.mode.silence():
                return func(*args, **kwargs)
        return func(*args, **kwargs)
