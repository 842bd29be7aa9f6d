"""Training in several processes: averages of the numbers that losses are divided by."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["reduce_mean"]


def reduce_mean(tensor: Tensor) -> Tensor:
    """Average a tensor over the processes of `torch.distributed`. An example is the number of positives.

    The authors' repository divides its losses by `reduce_mean(out.num_pos.sum()).clamp(min=1)`. mmdetection's PAA divides by the
    process's own number. With one process, or without a process group, the mean is the value itself. `PAAHead.loss` calls this
    function already.

    Args:
        tensor: Tensor of any real dtype. Shape and dtype are the same in every process. It must be on the device that the process
            group's backend needs: a CUDA device for NCCL. Every process must call equally often.

    Returns:
        A new Tensor of the same shape and device: float64 if `tensor` is, else float32.

    Raises:
        TypeError: not a Tensor, or complex.

    The function does not modify `tensor`, and records no graph. With NCCL it does not wait. NaN in one process is NaN in all.
    Strides may differ between processes.

    Source: `reduce_sum` of the authors' repository; `mmdet.utils.reduce_mean`, for numbers of any dtype.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`tensor` must be a Tensor, got {type(tensor).__name__}")
    if tensor.is_complex():
        raise TypeError(f"`tensor` must be real, got {tensor.dtype}".replace("torch.", ""))
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # Processes add up what lies at the same place of their memory.
    mean = tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean
