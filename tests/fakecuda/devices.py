"""Import this in a process that `libraries.environment` has prepared: its CUDA devices work from then on."""

from __future__ import annotations

import contextlib

import torch

with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401  # its operations are to be replaced too

from . import aten, kernels, runtime  # noqa: F401  # kernels: listens to Triton

aten.install()
torch.backends.cudnn.enabled = False  # a library of kernels


def synchronize() -> None:
    """Let every device come to the end of its work.

    Raises:
        The first error that a device has met.
    """
    for device in range(torch.cuda.device_count()):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            if not runtime.errors:
                raise
    if runtime.errors:
        raise runtime.errors[0]
