"""What surrounds a launch: the device guard, staged integers, and the context that sends CPU tensors to the kernels."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from kernel_execution import EXECUTIONS, INTERPRETER, assert_written, execute, poison

from paa_gpu import _ops
from paa_gpu.kernels import em
from paa_gpu.kernels._launch import device_guard, keep, stage
from paa_gpu.testing import make_predictions, triton_on_cpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_nothing_to_guard_on_the_cpu():
    with device_guard(torch.zeros(1)):
        pass


@needs_gpu
def test_guard_makes_the_device_current():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    with device_guard(torch.zeros(1, device=last)):
        assert torch.cuda.current_device() == last.index


@pytest.mark.parametrize("values", [[], [3], [0, 2**40, -1]])
def test_staged_integers(values):
    staged = stage(values, torch.zeros(2, 2))
    assert (staged.dtype, staged.tolist(), staged.device.type) == (torch.int64, values, "cpu")


@needs_gpu
def test_staging_does_not_wait():
    like = torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        staged = stage([1, 2, 3], like)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (host,) = staged.untyped_storage().staged
    assert host.is_pinned() and staged.tolist() == [1, 2, 3]


def test_staged_memory_lives_as_long_as_any_view_of_the_result():
    result, first, second = torch.zeros(4), torch.zeros(1), torch.zeros(1)
    keep(result, first)
    keep(result, second)
    alive = [weakref.ref(first), weakref.ref(second)]
    view = result[2:].detach()
    del result, first, second
    gc.collect()
    assert all(reference() is not None for reference in alive)
    del view
    gc.collect()
    assert all(reference() is None for reference in alive)


def test_offsets_of_flat_rows_live_as_long_as_the_operators_result():
    with execute(EXECUTIONS[0] if INTERPRETER else 90):
        weights = _ops.fit_gmm_1d(torch.rand(5), None, [2, 3], None, None, None, "diag", 1e-3, 1e-6, 100, "float64")[0]
    (offsets,) = weights[1:].untyped_storage().staged
    assert offsets.tolist() == [0, 2, 5]


def test_starts_of_images_live_as_long_as_the_voted_boxes(rng):
    predictions = make_predictions([(2, 5), (3, 7)], rng, num_classes=2)
    with execute(EXECUTIONS[0] if INTERPRETER else 90):
        bboxes, _ = _ops.score_voting(*predictions, 0.05, 0.01, 0.025, 0.0, False)
    (starts,) = bboxes[1:].untyped_storage().staged
    assert starts.tolist() == [0, 2, 5, 0, 5, 12]


def test_cpu_tensors_reach_the_kernels_inside_the_context_only(monkeypatch):
    calls = []
    fit = em.fit_gmm_1d
    monkeypatch.setattr(em, "fit_gmm_1d", lambda *args: calls.append(1) or fit(*args))
    arguments = (torch.rand(2, 5), None, None, None, None, None, "diag", 1e-3, 1e-6, 100, "float64")
    with execute(EXECUTIONS[0] if INTERPRETER else 90):
        inside = _ops.fit_gmm_1d(*arguments)
    assert len(calls) == 1
    outside = _ops.fit_gmm_1d(*arguments)
    assert len(calls) == 1
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(INTERPRETER, reason="under the interpreter the context is always possible")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton finds its driver")
def test_context_says_what_is_missing():
    with (
        pytest.raises(
            RuntimeError,
            match=r"must run under Triton's interpreter \(TRITON_INTERPRET=1\) or an active ptxrun session",
        ),
        triton_on_cpu(),
    ):
        pass


def test_poison_shows_what_nobody_wrote():
    for dtype in (torch.bool, torch.int64, torch.float16, torch.float64):
        tensor = poison(torch.zeros(2, 3, dtype=dtype))
        tensor[0] = 1
        with pytest.raises(AssertionError, match="3 of 6 elements"):
            assert_written(tensor)
        tensor[1] = 0
        assert_written(tensor)
