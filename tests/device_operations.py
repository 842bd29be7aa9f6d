"""Device operations of a call, counted by the profiler inside the GPU implementation as `triton_on_cpu()` runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

from kernel_execution import execute
from torch.profiler import ProfilerActivity, profile, record_function

from paa_gpu import targets
from paa_gpu.kernels import _launch, assign, fusion, losses, mixture, nms, reassign, topk, voting

#: Operations that touch no memory of the device, however they come about.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "view", "split", "split_with_sizes", "select", "slice", "narrow",
    "as_strided", "detach", "expand", "unsqueeze", "t", "transpose", "alias", "view_as", "reshape", "unbind", "flatten",
}  # fmt: skip
#: Operations that are one kernel or one copy.
ONE = {"cat", "copy_", "fill_", "zero_", "clone"}
#: Operations that consist of others.
COMPOSITE = {"to", "_to_copy", "contiguous", "zeros", "new_zeros", "zeros_like", "new_full", "full", "stack"}
SYNCHRONISING = {"item"}


#: Operations of several kernels: of four when the input has one dimension, see torch's `Nonzero.cu`.
SEVERAL = {"nonzero_static": 4}


def device_operations(event: Any, small: Collection[str] = ()) -> Iterator[str]:
    """The operations of a profiled one that would be kernels or copies on a device, in order; an unknown one fails.

    `small` are further ones that are known to be one kernel, or as many as `SEVERAL` says.
    """
    name = event.name.removeprefix("aten::")
    if name in ONE | SYNCHRONISING | {"stage"} | set(small):
        yield from [name] * SEVERAL.get(name, 1)
    elif name in COMPOSITE or name.startswith("paa_gpu::"):
        for child in event.cpu_children:
            yield from device_operations(child, small)
    elif name not in FREE:
        raise AssertionError(f"{name} may be several kernels, wait for the device, or copy from pageable memory")


def staged(values, like):
    """On a device it is one copy from pinned memory; making that memory is the host's work."""
    with record_function("stage"):
        return STAGE(values, like)


def on_device(*args):
    with record_function("stage"):
        return ON_DEVICE(*args)


STAGE, ON_DEVICE = _launch.stage, targets.on_device


def profiled(call, small: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The device operations of a call and the kernels of ours that it launches."""
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(execute(90))
        for module in (assign, fusion, losses, mixture, nms, reassign, topk, voting):
            stack.enter_context(mock.patch.object(module, "stage", staged))
        stack.enter_context(mock.patch.object(targets, "on_device", on_device))
        call()  # compiles
        session.launches.clear()
        with profile(activities=[ProfilerActivity.CPU]) as events:
            call()
    top = [event for event in events.events() if event.cpu_parent is None]
    return [name for event in top for name in device_operations(event, small)], [name for name, _ in session.launches]
