"""Training in several processes: what losses are divided by, averaged over them."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["reduce_mean"]


def reduce_mean(tensor: Tensor) -> Tensor:
    """Average a tensor over the processes of `torch.distributed`, such as the number of positives that losses are divided by.

    The authors' repository divides by `reduce_mean(out.num_pos.sum()).clamp(min=1)`, mmdetection's PAA by the process's own
    number. With one process, or without a process group, the mean is the value itself. `PAAHead.loss` does this already.

    Args:
        tensor: Tensor of any shape and any real dtype, the same in every process; on the device that the process group's backend
            needs, a CUDA device for NCCL. Every process has to call as often.

    Returns:
        A new Tensor of the same shape and device: float64 if `tensor` is, else float32.

    Raises:
        TypeError: not a Tensor, or complex.

    `tensor` is not modified, no graph is recorded; with NCCL nothing synchronises. NaN in one process is NaN in all. Source:
    `reduce_sum` of the authors' repository; `mmdet.utils.reduce_mean`, for numbers of any dtype.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`tensor` must be a Tensor, got {type(tensor).__name__}")
    if tensor.is_complex():
        raise TypeError(f"`tensor` must be real, got {tensor.dtype}".replace("torch.", ""))
    mean = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean
