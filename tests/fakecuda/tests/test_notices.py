"""The tests for a GPU fail on these devices if the code around a launch is wrong."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import test_cuda
import torch
from fakecuda import devices, runtime

from paa_gpu import _staging, testing
from paa_gpu.kernels import _launch, reassign

no_synchronisation = test_cuda.no_synchronisation


@pytest.fixture
def batch() -> testing.Batch:
    return testing.make_batch([0, 7, 3], np.random.default_rng(0), dtype=torch.float32)


@contextlib.contextmanager
def noticed() -> Any:
    """Something fails: the test's own comparison, or a device."""
    with pytest.raises((AssertionError, RuntimeError)):
        yield
        devices.synchronize()
    torch.cuda.set_sync_debug_mode("default")
    with contextlib.suppress(Exception):
        devices.synchronize()  # what else is queued
    runtime.forget_errors()


def pageable(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, non_blocking=True)


def waiting(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.pin_memory().to(device)


def test_a_captured_copy_of_memory_that_is_not_pinned(batch, monkeypatch):
    monkeypatch.setattr(_launch, "to_device", pageable)
    with noticed():
        test_cuda.test_a_captured_graph(batch)


def test_pinned_memory_that_a_graph_does_not_own(batch, monkeypatch):
    """Freed after the capture, it goes to the next call, and a replay reads what that has written there."""
    shared = torch.empty(1 << 16, dtype=torch.uint8).pin_memory()

    def take(values: torch.Tensor) -> torch.Tensor:
        return shared[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)

    monkeypatch.setattr(_staging.RESERVE, "take", take)
    churn = test_cuda.churn_memory
    monkeypatch.setattr(test_cuda, "churn_memory", lambda: (churn(), shared.fill_(0)))
    with noticed():
        test_cuda.test_a_captured_graph_does_not_need_what_the_call_returned(batch)


def test_a_launch_without_the_guard_of_its_device(batch, monkeypatch):
    monkeypatch.setattr(reassign, "device_guard", lambda tensor: contextlib.nullcontext())
    with noticed():
        test_cuda.test_another_device_than_the_current_one(batch)


def test_a_copy_that_waits(batch, monkeypatch, request):
    monkeypatch.setattr(_launch, "to_device", waiting)
    with noticed():
        test_cuda.test_the_batch_call_does_not_synchronise(batch, "mmdet", request)


def test_work_beside_the_current_stream(batch, monkeypatch):
    """The kernels run on the default stream instead."""
    guard = _launch.device_guard

    @contextlib.contextmanager
    def elsewhere(tensor: torch.Tensor) -> Any:
        with guard(tensor), torch.cuda.stream(torch.cuda.default_stream()):
            yield

    monkeypatch.setattr(reassign, "device_guard", elsewhere)
    with noticed():
        test_cuda.test_work_on_a_busy_stream(batch)
