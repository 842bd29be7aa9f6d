"""Everything around a launch: the tensors' device, numbers from the host, and rules that kernels share.

Only the first three functions have lines that never run without a GPU. Triton launches on the current stream of the current
device. Inside `device_guard`, a kernel runs on the device of its tensors, after the work that made them. For CPU tensors (in
Triton's interpreter, or with compiled kernels on the CPU) there is nothing to guard and nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def address(tensor: Tensor) -> int:
    """Where the tensor's memory begins, for a kernel that finds it in a table. Tests of what a launch touches listen here."""
    return tensor.data_ptr()


def stage(values: Sequence[int], like: Tensor) -> Tensor:
    """Bring host integers to the device of `like` as Tensor[len(values)] int64, in one copy that nobody waits for.

    The copy reads pinned memory, which the result holds: a captured CUDA graph reads it again at each replay.
    """
    host = torch.tensor(values, dtype=torch.int64, pin_memory=like.is_cuda)
    if not like.is_cuda:
        return host
    staged = host.to(like.device, non_blocking=True)
    keep(staged, host)
    return staged


def keep(result: Tensor, staged: Tensor) -> None:
    """Let `staged` live as long as the storage of `result`, hence as long as any view of it."""
    storage = result.untyped_storage()
    storage.staged = (*getattr(storage, "staged", ()), staged)  # type: ignore[attr-defined]


def register_limit(most: int = 96) -> dict[str, int]:
    """Launch option: at most so many registers a thread, where Triton has such an option (NVIDIA)."""
    return {} if torch.version.hip else {"maxnreg": most}
