"""What surrounds a launch: the device guard, staged integers, and the context that sends CPU tensors to the kernels."""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_execution import EXECUTIONS, INTERPRETER, assert_written, compiled_only, execute, poison
from test_fusion import make_models
from test_voting import make_pools
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from paa_gpu import _ops, assign_max_iou, candidate_losses, kernels, score_voting_batch, weighted_boxes_fusion
from paa_gpu._dispatch import kernels_on_cpu
from paa_gpu.kernels import _launch, assign, em, fusion, losses, reassign, topk, voting
from paa_gpu.kernels._launch import device_guard, mixes, stage
from paa_gpu.testing import make_anchors, make_batch, make_boxes, make_head_batch, make_predictions, triton_on_cpu


def test_nothing_to_guard_on_the_cpu():
    with device_guard(torch.zeros(1)):
        pass


def test_the_interpreter_is_refused_for_cuda_tensors(monkeypatch):
    assert _launch.INTERPRETED == INTERPRETER
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="start Python without TRITON_INTERPRET, or use CPU tensors"):
        device_guard(SimpleNamespace(is_cuda=True))


@pytest.mark.gpu
def test_guard_makes_the_device_current():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    with device_guard(torch.zeros(1, device=last)):
        assert torch.cuda.current_device() == last.index


@pytest.mark.parametrize("values", [[], [3], [0, 2**40, -1]])
def test_staged_integers(values):
    staged = stage(values, torch.zeros(2, 2))
    assert (staged.dtype, staged.tolist(), staged.device.type) == (torch.int64, values, "cpu")


@pytest.mark.parametrize(
    ("capability", "slow"),
    [((7, 5), True), ((8, 0), False), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((10, 3), True), ((12, 0), True)],
)
def test_a_device_with_slow_float64(capability, slow):
    device = mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability)
    with device, mock.patch.object(torch.version, "hip", None):
        like = SimpleNamespace(is_cuda=True, device="cuda:1")
        assert mixes("auto", like) == slow
        assert mixes("mixed", like) and not mixes("float64", like)
    assert not mixes("auto", torch.zeros(1))


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


# --- one compiled form ---------------------------------------------------------------------------------------------------------


def _reassign(images: int, rng) -> None:
    batch = make_batch([images + i % 3 for i in range(images)], rng, level_sizes=(200, 40 + images), sizes=(5, 9))
    columns, options = batch[:6], (batch.num_classes, 9, "diag", "mmdet", "background", "float64")
    sizes = [size for levels in batch.anchors for size in levels]
    reassign.paa_reassign_batch(*columns, sizes, batch.num_gts, *options)
    losses = batch.pos_losses, batch.pos_inds, batch.pos_gt_inds, sizes, batch.num_gts, 9
    index = torch.zeros(sum(batch.num_gts), 18, dtype=torch.int64)
    reassign.fit_candidates(*losses, "diag", "float64")
    reassign.write_targets(*batch[1:5], index, index == 0, index > 0, batch.num_classes)


def _vote(images: int, rng) -> None:
    """One image needs no table, and is a form of its own."""
    voting.score_voting(*make_predictions([(i + 1, 20 + i) for i in range(images + 1)], rng), 0.05, 0.01, 0.025, 0.0, False)


def _vote_pools(images: int, rng) -> None:
    _, pooled = make_pools(rng, images + 1)
    score_voting_batch(*pooled, 0.05)


def _losses(images: int, rng) -> None:
    batch = make_head_batch([7 + images] * images, rng, ((6, 5), (3, 2)), num_classes=5)
    candidate_losses(*batch)


def _assign(images: int, rng) -> None:
    anchors, boxes = make_anchors([(20, 30), (10, 15)]), [make_boxes(i + 1, (160, 240), rng) for i in range(images)]
    assign_max_iou(anchors, boxes)


def _fuse(images: int, rng) -> None:
    weighted_boxes_fusion(*zip(*(make_models([images + 1, 9], rng) for _ in range(images)), strict=True))


def _caches() -> dict[str, Any]:
    """What each kernel has compiled in this process, by device."""
    jitted = [value for module in (topk, reassign, em, voting, losses, assign, fusion) for value in vars(module).values()]
    return {kernel.fn.__name__: kernel.device_caches for kernel in jitted if isinstance(kernel, JITFunction)}


def _forms() -> dict[str, int]:
    """How many forms of each kernel were compiled for the current device."""
    caches = _caches()
    device = driver.active.get_current_device()
    return {name: len(cache[device][0]) for name, cache in caches.items() if device in cache and cache[device][0]}


@pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
def test_what_is_not_specialised_is_a_parameter():
    """Triton does not notice a name that no parameter has."""
    modules = [importlib.import_module(f"paa_gpu.kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    functions = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    unknown = {
        function.fn.__name__: named - {*function.arg_names}
        for function in functions
        if (named := {*(function.do_not_specialize or ()), *(function.do_not_specialize_on_alignment or ())})
    }
    assert len(unknown) > 10 and not any(unknown.values()), unknown


@pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "call",
    [_reassign, _vote, _vote_pools, _losses, _assign, _fuse],
    ids=["reassign", "vote", "pools", "losses", "assign", "fuse"],
)
def test_one_compiled_form_for_all_batch_sizes(call, rng):
    """Another form would be compiled in the middle of training, or inside a capture: by a size of 1, or by where in a table a part
    begins."""
    from test_compile import TARGETS, compiling

    with compiling(TARGETS["sm_90"]), kernels_on_cpu():
        call(1, rng)
        first = _forms()
        for images in (2, 3, 4, 5, 16):
            call(images, rng)
        assert first and _forms() == first


@compiled_only
@pytest.mark.slow
def test_an_epoch_compiles_nothing_after_its_first_step():
    """A training step of the head has a few kernels. Batches of other sizes and other numbers of boxes need no others."""
    from test_head import make_features, make_head, make_targets

    head = make_head()
    with execute(90, seed=None, racecheck=0):
        for cache in _caches().values():  # forget what other tests have compiled
            cache.clear()
        head.loss(make_features(2), make_targets([3, 1]))
        first = _forms()
        print(f"a training step: {sum(first.values())} compiled forms of {len(first)} kernels")
        assert sum(first.values()) == len(first) <= 8
        for boxes in ([1], [0, 5, 2], [7, 0], [2, 2, 2, 2, 9]):
            head.loss(make_features(len(boxes)), make_targets(boxes))
        assert _forms() == first
