"""Calls of operators: straight to the implementation, unless something would see them in torch's dispatcher."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import paa_gpu
from paa_gpu import _ops

OVERLOAD = torch.ops.paa_gpu.fit_gmm_1d.default


class Subclass(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """Sees what the dispatcher sees, and no function of torch's: without its inner tensor it has no values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*(value.inner if isinstance(value, cls) else value for value in args), **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.detach.default else result


class Recorder:
    def __init__(self):
        super().__init__()
        self.seen = []

    def record(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Calls(Recorder, TorchDispatchMode):
    __torch_dispatch__ = Recorder.record


class Functions(Recorder, TorchFunctionMode):
    __torch_function__ = Recorder.record


@pytest.fixture
def x():
    return torch.rand(3, 9, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def dispatched():
    """The calls that go through the dispatcher."""
    with mock.patch.object(_ops.fit_gmm_1d, "overload", mock.Mock(wraps=OVERLOAD)) as overload:
        yield overload


def means(x):
    return paa_gpu.fit_gmm_1d(x).means


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_usual_call_goes_straight(x, context):
    wanted = OVERLOAD(x, None, None, None, None, None, "diag", 1e-3, 1e-6, 100, "float64")[1]
    with dispatched() as overload, context():
        got = means(x), means(torch.nn.Parameter(x)), means(x + 0)
    assert not overload.called
    assert all(torch.equal(each, wanted) for each in got)


@pytest.mark.parametrize("mode", [Calls, Functions])
def test_modes_see_the_operator(x, mode):
    with mode() as mode:
        got = means(x)
    assert OVERLOAD in mode.seen
    assert torch.equal(got, means(x))


@pytest.mark.parametrize("kind", [lambda x: x.as_subclass(Subclass), Wrapper])
def test_subclasses_are_dispatched(x, kind):
    with dispatched() as overload:
        assert torch.equal(means(kind(x)), means(x))
    assert overload.call_count == 1


def test_fake_tensors_are_dispatched_outside_their_mode(x):
    fake = FakeTensorMode().from_tensor(x)
    assert means(fake).shape == (3, 2)


def test_tracers_record_the_operator(x):
    graph = make_fx(means)(x)  # plain tensors, under a mode
    assert OVERLOAD in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x + 1), means(x + 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_the_operator(x):
    with dispatched() as overload:
        assert torch.equal(torch.func.functionalize(means)(x), means(x))
        assert overload.call_count == 1
        torch.testing.assert_close(torch.vmap(means)(torch.stack([x, x + 1]))[1], means(x + 1))
        assert overload.call_count == 2


def test_a_profiler_names_the_operator(x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        means(x)
    assert "paa_gpu::fit_gmm_1d" in [event.key for event in profile.key_averages()]


def test_a_lazily_negated_tensor(x):
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    assert torch.equal(means(negated), means(x))


@pytest.mark.parametrize("name", ["_dispatch_tls_local_include_set", "DispatchKeySet.raw_repr"])
def test_without_what_is_not_public_each_call_is_dispatched(name):
    code = f"""
import torch
from unittest import mock
del torch._C.{name}
import paa_gpu
from paa_gpu import _ops
with mock.patch.object(_ops.fit_gmm_1d, "overload", mock.Mock(wraps=_ops.fit_gmm_1d.overload)) as overload:
    assert paa_gpu.fit_gmm_1d(torch.rand(2, 9)).means.shape == (2, 2)
assert overload.called
"""
    subprocess.run([sys.executable, "-c", code], check=True)
