"""Everything around a launch: the tensors' device, numbers from the host, and rules that kernels share.

Only `device_guard` and `stage` have lines that never run without a GPU. Triton launches on the current stream of the current
device. Inside `device_guard`, a kernel runs on the device of its tensors, after the work that made them. For CPU tensors (in
Triton's interpreter, or with compiled kernels on the CPU) there is nothing to guard and nothing to copy.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's memory begins, for a kernel that finds it in a table. Tests of what a launch touches listen here."""
    return [*map(Tensor.data_ptr, tensors)]


#: Compute capabilities of GPUs that do float64 at a 32nd or a 64th of the speed of float32, see the CUDA programming guide,
#: "Throughput of native arithmetic instructions". Others count as fast.
SLOW_FLOAT64 = {(7, 5), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """The compute capability of the tensor's device; None where there is none."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda and torch.version.hip is None else None


def has_slow_float64(like: Tensor) -> bool:
    """Whether the device of `like` is slow at float64, as GPUs for graphics are."""
    return capability(like) in SLOW_FLOAT64


def mixes(precision: str, like: Tensor) -> bool:
    """Whether fits on the device of `like` are of mixed precision."""
    return has_slow_float64(like) if precision == "auto" else precision == "mixed"


class Reserve:
    """Pinned memory for captured CUDA graphs, in pieces that live as long as the process.

    A graph copies from there again at each replay, long after the call that was captured. So no part is given out twice. And
    older versions of torch cannot pin memory during a capture: calls outside of captures keep enough in reserve.

    Args:
        pinned: False for tests without a GPU.
    """

    #: Integers of a piece, 1 MiB; and how many captured calls, each as large as the last one, the reserve suffices for.
    PIECE, CALLS = 1 << 17, 16

    def __init__(self, pinned: bool = True) -> None:
        self._pinned, self._pieces, self._free, self._lock = pinned, [torch.empty(0, dtype=torch.int64)], 0, threading.Lock()

    def fill(self, size: int) -> None:
        """Make sure that calls with `size` integers can be captured."""
        with self._lock:
            if self._free < self.CALLS * size:
                self._free = max(self.PIECE, 2 * self.CALLS * size)
                self._pieces.append(torch.empty(self._free, dtype=torch.int64, pin_memory=self._pinned))

    def take(self, values: Sequence[int]) -> Tensor:
        """The values, in memory that nothing else uses from now on.

        Raises:
            RuntimeError: the call that is captured was not made before, outside of a capture; or many captures followed it.
        """
        with self._lock:
            if self._free < len(values):
                raise RuntimeError(
                    "a CUDA graph captures a call of paa_gpu for which no pinned memory is left: make this call once outside of "
                    "the capture, before it"
                )
            part = self._pieces[-1][len(self._pieces[-1]) - self._free :][: len(values)]
            self._free -= len(values)
        return part.copy_(_integers(values))


RESERVE = Reserve()


def _integers(values: Sequence[int]) -> Tensor:
    """Tensor[len(values)] int64; `torch.tensor` takes twice as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def stage(values: Sequence[int], like: Tensor) -> Tensor:
    """Bring host integers to the device of `like` as Tensor[len(values)] int64, in one copy that nobody waits for.

    The copy reads pinned memory. torch frees it when the copy is over; in a captured graph it stays, see `Reserve`.
    """
    if not like.is_cuda:
        return _integers(values).clone()  # aligned as torch aligns
    if torch.cuda.is_current_stream_capturing():
        host = RESERVE.take(values)
    else:
        RESERVE.fill(len(values))
        host = _integers(values).pin_memory()
    return host.to(like.device, non_blocking=True)


def compile_options(fuse: bool, registers: int = 96) -> dict[str, int]:
    """Launch options: whether a product and a sum may become one instruction, and at most so many registers a thread.

    Each launch says the first, because Triton changes its default with 3.10. Each says the second, because NVIDIA's assembler, if
    nobody tells it, spills registers to get more threads onto a processor. Triton has it for NVIDIA only.
    """
    return {"enable_fp_fusion": fuse, **({} if torch.version.hip else {"maxnreg": registers})}
