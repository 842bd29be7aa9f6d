"""Everything around a launch: the tensors' device, numbers from the host, and rules that kernels share.

Only `device_guard`, `stage` and `capability` have lines for a GPU alone. `tests/fakecuda` runs them without one. Triton launches
on the current stream of the current device. Inside `device_guard`, a kernel runs on the device of its tensors, after the work
that made them. For CPU tensors (in Triton's interpreter, or with compiled kernels on the CPU) there is nothing to guard and
nothing to copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from paa_gpu._staging import to_device

#: Whether Triton interprets kernels. It decides when it decorates them, as this package is imported.
INTERPRETED = triton.knobs.runtime.interpret


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; nothing for a CPU tensor.

    Raises:
        RuntimeError: Triton interprets kernels. It would read the addresses in our tables on the host.
    """
    if not tensor.is_cuda:
        return nullcontext()
    if INTERPRETED:
        raise RuntimeError(
            "Triton's interpreter cannot take CUDA tensors in paa_gpu: start Python without TRITON_INTERPRET, or use CPU tensors"
        )
    return torch.cuda.device(tensor.device)


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's memory begins, for a kernel that finds it in a table. Tests of what a launch touches listen here."""
    return [*map(Tensor.data_ptr, tensors)]


#: Compute capabilities of GPUs that do float64 at a 32nd or a 64th of the speed of float32, see the CUDA programming guide,
#: "Throughput of native arithmetic instructions". 10.3 is Blackwell Ultra. Others count as fast.
SLOW_FLOAT64 = {(7, 5), (8, 6), (8, 7), (8, 9), (10, 3), (12, 0), (12, 1)}


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """The compute capability of the tensor's device; None where there is none."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda and torch.version.hip is None else None


def has_slow_float64(like: Tensor) -> bool:
    """Whether the device of `like` is slow at float64, as GPUs for graphics are."""
    return capability(like) in SLOW_FLOAT64


def mixes(precision: str, like: Tensor) -> bool:
    """Whether fits on the device of `like` are of mixed precision."""
    return has_slow_float64(like) if precision == "auto" else precision == "mixed"


def _integers(values: Sequence[int]) -> Tensor:
    """Tensor[len(values)] int64; `torch.tensor` takes twice as long."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def stage(values: Sequence[int], like: Tensor) -> Tensor:
    """Bring host integers to the device of `like` as Tensor[len(values)] int64, in one copy that nobody waits for."""
    host = _integers(values)
    return to_device(host, like.device) if like.is_cuda else host.clone()  # aligned as torch aligns


def compile_options(fuse: bool, registers: int = 96) -> dict[str, int]:
    """Launch options: whether a product and a sum may become one instruction, and at most so many registers a thread.

    Each launch says the first, because Triton changes its default with 3.10. Each says the second, because NVIDIA's assembler, if
    nobody tells it, spills registers to get more threads onto a processor. Triton has it for NVIDIA only.
    """
    return {"enable_fp_fusion": fuse, **({} if torch.version.hip else {"maxnreg": registers})}
