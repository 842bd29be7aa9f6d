"""What the devices do, and what they refuse: each thing that a GPU would do to a program that is wrong."""

from __future__ import annotations

import ctypes

import pytest
import torch
import triton
import triton.language as tl
from fakecuda import devices, runtime


def test_there_are_two_devices():
    assert torch.cuda.device_count() == 2
    assert torch.cuda.get_device_name(1) == "fakecuda 1"


def test_nothing_runs_until_somebody_waits():
    stream = torch.cuda.current_stream()
    stream.synchronize()
    value = torch.ones(3, device="cuda") * 2
    assert not stream.query()
    assert value.tolist() == [2, 2, 2]
    assert stream.query()


def test_a_stream_does_not_wait_for_another_by_itself():
    other = torch.cuda.Stream()
    given, taken = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    given.fill_(7)
    with torch.cuda.stream(other):
        taken.copy_(given)
    other.synchronize()
    assert runtime_view(taken) == [0, 0, 0]


def test_a_stream_waits_for_an_event():
    other = torch.cuda.Stream()
    given, taken = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    given.fill_(7)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        taken.copy_(given)
    other.synchronize()
    assert runtime_view(taken) == [7, 7, 7]


def runtime_view(tensor: torch.Tensor) -> list[float]:
    """What the memory holds now: the host of a fake device can look."""
    from fakecuda.aten import aliased

    return aliased(tensor).tolist()


def test_memory_that_is_given_away_too_early_is_overwritten():
    """A tensor of one stream is used on another and dropped: its memory goes to the next tensor. `record_stream` keeps it."""
    for kept in (False, True):
        other, result = torch.cuda.Stream(), torch.zeros(1000, device="cuda")
        lent = torch.full((1000,), 3.0, device="cuda")
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            result.copy_(lent)
        if kept:
            lent.record_stream(other)
        address = lent.data_ptr()
        del lent
        again = torch.full((1000,), 9.0, device="cuda")
        torch.cuda.current_stream().synchronize()
        other.synchronize()
        assert (again.data_ptr() == address) != kept
        assert runtime_view(result)[0] == (3.0 if kept else 9.0)


def test_a_copy_reads_pinned_memory_when_it_runs():
    host = torch.ones(3).pin_memory()
    there = host.to("cuda", non_blocking=True)
    host.fill_(5)
    assert there.tolist() == [5, 5, 5]


def test_a_graph_runs_again():
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    for value in (4, 5):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3


def _wait_for_an_event_from_outside(x):
    """Of a stream that takes no part in the capture."""
    torch.cuda.current_stream().wait_event(torch.cuda.Stream().record_event())


def _allocate_outside_of_the_pool(x):
    if error := runtime.library.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)):
        raise RuntimeError(f"cudaMalloc: {error}")


def _load_a_kernel(x):
    @triton.jit
    def _first_call_kernel(x):
        tl.store(x, 1.0)

    _first_call_kernel[(1,)](x)


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: torch.ones(3).to("cuda", non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        _wait_for_an_event_from_outside,
        _allocate_outside_of_the_pool,
        _load_a_kernel,
    ],
    ids=["item", "pageable copy", "synchronize", "event", "cudaMalloc", "first call of a kernel"],
)
def test_a_capture_refuses(forbidden):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    refused = None
    with pytest.raises((RuntimeError, torch.AcceleratorError)), torch.cuda.graph(graph):
        try:
            forbidden(x)
        except Exception as error:
            refused = error
            raise
    assert refused is not None
    runtime.forget_errors()


def test_a_wait_is_noticed_by_the_debug_mode():
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (lambda: x.sum().item(), x.nonzero, x.cpu, lambda: torch.ones(3).to("cuda")):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda:0") + torch.ones(3)


@triton.jit
def _double_kernel(x, first, last, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at, at < last) * 2, at < last)


def test_a_kernel_runs():
    x = torch.arange(5.0, device="cuda")
    _double_kernel[(1,)](x, 0, 5, 8)
    assert x.tolist() == [0, 2, 4, 6, 8]


def test_a_kernel_on_another_device_than_the_current_one_is_refused():
    x = torch.arange(5.0, device="cuda:1")
    _double_kernel[(1,)](x, 0, 5, 8)  # on a stream of device 0, where the memory of device 1 is not
    with pytest.raises(Exception, match="outside every tensor"):
        devices.synchronize()
    runtime.forget_errors()


def test_an_access_outside_of_the_memory_is_an_error_at_the_next_wait():
    x = torch.ones(5, device="cuda")
    _double_kernel[(1,)](x, 1 << 30, (1 << 30) + 1, 8)  # 4 GiB beyond: all that torch has is nearer
    with pytest.raises(RuntimeError):
        x.tolist()
    with pytest.raises(Exception, match="outside every tensor"):
        devices.synchronize()
    runtime.forget_errors()


def test_a_kernel_is_of_one_device():
    x = torch.ones(8, device="cuda")
    loaded = _double_kernel[(1,)](x, 0, 8, 8)
    with torch.cuda.device(1), pytest.raises(RuntimeError):
        loaded[(1, 1, 1)](x, 0, 8)
    assert x.tolist() == [2] * 8


def test_a_grid_that_is_too_large_is_refused():
    x = torch.ones(8, device="cuda")
    for grid in ((1, 65_536), (1, 1, 65_536)):
        with pytest.raises(RuntimeError):
            _double_kernel[grid](x, 0, 8, 8)
    assert x.tolist() == [1] * 8


@triton.jit
def _gather_kernel(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.gather(tl.load(x + at), (at * 7 + 3) % SIZE, 0))


def test_too_much_shared_memory_is_refused():
    with pytest.raises(triton.runtime.errors.OutOfResources):
        _gather_kernel[(1,)](torch.ones(1 << 17, device="cuda"), 1 << 17, num_warps=4)
