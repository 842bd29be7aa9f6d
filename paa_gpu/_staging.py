"""Numbers of the host on a device, in one copy that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Reserve:
    """Pinned memory for captured CUDA graphs, in pieces that live as long as the process.

    A graph copies from there again at each replay, long after the call that was captured. So no part is given out twice. And
    older versions of torch cannot pin memory during a capture: calls outside of captures keep enough in reserve.

    Args:
        pinned: False for tests without a GPU.
    """

    #: Bytes of a piece; and how many captured copies, each as large as the last one, the reserve suffices for.
    PIECE, COPIES = 1 << 20, 16

    #: Bytes that a part begins at a multiple of: those of the largest number.
    ALIGNMENT = 8

    def __init__(self, pinned: bool = True) -> None:
        self._pinned, self._pieces, self._free, self._lock = pinned, [self._piece(0, False)], 0, threading.Lock()

    @staticmethod
    def _piece(size: int, pinned: bool) -> Tensor:
        # Whatever device and mode the caller works in: memory of inference mode may not be written outside of it.
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)

    def _room(self, values: Tensor) -> int:
        return -(-values.nbytes // self.ALIGNMENT) * self.ALIGNMENT

    def fill(self, values: Tensor) -> None:
        """Make sure that copies of as many values can be captured."""
        needed = self.COPIES * self._room(values)
        with self._lock:
            if self._free < needed:
                self._free = max(self.PIECE, 2 * needed)
                self._pieces.append(self._piece(self._free, self._pinned))

    def take(self, values: Tensor) -> Tensor:
        """The values, in memory that nothing else uses from now on.

        Raises:
            RuntimeError: the call that is captured was not made before, outside of a capture; or many captures followed it.
        """
        with self._lock:
            if self._free < values.nbytes:
                raise RuntimeError(
                    "no pinned memory is left for a call of paa_gpu that a CUDA graph captures: make the same call once before "
                    "the capture, which reserves the memory"
                )
            part = self._pieces[-1][len(self._pieces[-1]) - self._free :][: values.nbytes]
            self._free -= self._room(values)
        return part.view(values.dtype).view(values.shape).copy_(values)


RESERVE = Reserve()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a CUDA device.

    The copy reads pinned memory. torch frees it when the copy is over; in a captured graph it stays, see `Reserve`.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            pinned = RESERVE.take(host)
        else:
            RESERVE.fill(host)
            pinned = host.pin_memory()
        return pinned.to(device, non_blocking=True)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor of Python numbers.

    A compiler has no pinned memory, and neither have fake tensors.
    """
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if torch.compiler.is_compiling() or device.type != "cuda" or type(host) is not Tensor:
        return host.to(device, non_blocking=True)
    return to_device(host, device)
