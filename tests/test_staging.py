"""Numbers of the host on a device: pinned memory, and the reserve of captured graphs."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch

from paa_gpu import _staging
from paa_gpu._staging import Reserve, on_device, to_device


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_the_reserve_gives_no_memory_twice():
    """Parts keep their values while others are given out, also when another piece is begun."""
    reserve = Reserve(pinned=False)
    reserve.fill(integers(0, 0, 0))
    parts = [reserve.take(integers(i, -i, 2**40)) for i in range(100)]
    reserve.fill(torch.zeros(Reserve.PIECE, dtype=torch.uint8))
    parts += [reserve.take(integers(*[i] * 5000)) for i in range(100)]
    assert [part.tolist() for part in parts[:100]] == [[i, -i, 2**40] for i in range(100)]
    assert all(bool((part == i).all()) for i, part in enumerate(parts[100:]))
    memory = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(memory))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_the_reserve_takes_every_dtype_and_shape(dtype):
    """What lies before it may end anywhere."""
    reserve = Reserve(pinned=False)
    for shape in ((3, 1, 2), (0, 4), (5,), ()):
        values = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        reserve.fill(values)
        reserve.take(torch.ones(3, dtype=torch.bool))
        part = reserve.take(values)
        assert (part.dtype, part.shape) == (dtype, shape) and torch.equal(part, values)


@pytest.mark.parametrize("size", [10, 3 * Reserve.PIECE])
def test_the_reserve_suffices_for_many_captures_of_a_call(size):
    reserve, values = Reserve(pinned=False), torch.zeros(size, dtype=torch.uint8)
    reserve.fill(values)
    for _ in range(Reserve.COPIES):
        reserve.take(values)


def test_a_capture_without_a_call_before_it_is_refused():
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        Reserve(pinned=False).take(integers(1))
    assert Reserve(pinned=False).take(integers()).tolist() == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_a_reserve_of_inference_mode_serves_training(dtype):
    reserve = Reserve(pinned=False)
    with torch.inference_mode():
        reserve.fill(integers(1).to(dtype))
    assert not reserve._pieces[-1].is_inference()
    assert reserve.take(integers(1).to(dtype)).tolist() == [1]


@pytest.mark.parametrize("values", [[], [3], [[0, 2**40], [-1, 5]]])
def test_python_numbers(values):
    staged = on_device(values, torch.int64, torch.device("cpu"))
    assert (staged.dtype, staged.tolist(), staged.device.type) == (torch.int64, values, "cpu")


CUDA_TENSORS = """
import torch
from torch._subclasses import FakeTensorMode
from paa_gpu._staging import RESERVE, on_device
from paa_gpu.kernels._launch import stage

with torch.device("meta"):
    assert stage([], torch.empty(0, device="cpu")).device.type == "cpu"
with FakeTensorMode():
    staged = on_device([1.0, 2.0], torch.float32, torch.device("cuda:0"))
    assert (staged.device.type, staged.shape) == ("cuda", (2,))
assert len(RESERVE._pieces) == 1  # a fake tensor is no memory
"""


def test_fake_tensors_and_other_default_devices():
    subprocess.run([sys.executable, "-c", CUDA_TENSORS], check=True)


@pytest.mark.parametrize("capturing", [False, True])
def test_where_a_copy_reads(capturing, monkeypatch):
    """In a capture, from the reserve that earlier calls have filled. Nothing is pinned then."""
    reserve, pinned = Reserve(pinned=False), []
    monkeypatch.setattr(_staging, "RESERVE", reserve)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    to_device(integers(1, 2), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    copied = to_device(integers(3, 4), torch.device("cpu"))
    assert copied.tolist() == [3, 4] and len(pinned) == (1 if capturing else 2)
    (_, piece) = reserve._pieces
    assert (piece.data_ptr() <= copied.data_ptr() < piece.data_ptr() + piece.nbytes) == capturing


@pytest.mark.gpu
@pytest.mark.parametrize("place", [0, -1])
def test_staging_does_not_wait(place):
    device = torch.device("cuda", range(torch.cuda.device_count())[place])
    torch.cuda.set_sync_debug_mode("error")
    try:
        staged = to_device(integers(1, 2, 3), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert staged.device == device and staged.tolist() == [1, 2, 3]


@pytest.mark.gpu
def test_a_captured_copy_reads_its_own_numbers():
    """Later calls, captured or not, do not change what a replay copies."""
    device = torch.device("cuda:0")
    on_device([0.0, 0.0], torch.float32, device)
    graphs, copies = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            copies.append(on_device([float(i), 0.5], torch.float32, device))
    for _ in range(3):
        on_device([7.0, 7.0], torch.float32, device)
        for graph in graphs:
            graph.replay()
    assert [copy.tolist() for copy in copies] == [[float(i), 0.5] for i in range(3)]
