"""Ways to execute the kernels for CPU tensors, and outputs that show what no kernel wrote.

A pytest run with `TRITON_INTERPRET=1` executes everything under Triton's interpreter, one without it what was compiled for
several capabilities, through ptxrun: Triton reads the variable when a kernel is decorated, so one process cannot do both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from paa_gpu import _ops
from paa_gpu.kernels import _launch, assign, em, losses, mixture, nms, reassign, topk, voting
from paa_gpu.testing import triton_on_cpu

INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

#: Written for one version of Triton: with another its instructions and its launcher differ.
compiled_only = pytest.mark.skipif(
    INTERPRETER or not triton.__version__.startswith("3.8."),
    reason="ptxrun runs what Triton 3.8 compiles, not the interpreter",
)


def slow_interpreted(*values: Any) -> list[Any]:
    """Parameters that `make test` takes compiled, and only `make test-long` interpreted too."""
    return [pytest.param(value, marks=[pytest.mark.slow] * INTERPRETER) for value in values]


def compiled_long(first: Any, *values: Any) -> list[Any]:
    """Parameters of which `make test` takes the first compiled, and all of them interpreted: each of them is compiled anew."""
    return [first, *(pytest.param(value, marks=[] if INTERPRETER else [pytest.mark.long]) for value in values)]


#: Parameters of a fixture: the executions of this pytest run.
EXECUTIONS = (
    ["interpreter"]
    if INTERPRETER
    else [
        pytest.param(capability, marks=(compiled_only, *([] if capability == 90 else [pytest.mark.long])))
        for capability in (75, 80, 86, 89, 90, 100, 120)
    ]
    + ["cuda"] * torch.cuda.is_available()
)

#: Where the implementations are that are not in `reassign`.
MODULES = {
    "select_candidates": topk,
    "fit_gmm_1d": em,
    "read_mixture": mixture,
    "score_voting": voting,
    "score_voting_padded": voting,
    "candidate_losses": losses,
    "assign_max_iou": assign,
    "batched_nms": nms,
}

#: Settings of ptxrun for the whole pytest run: its option --ptxrun.
SETTINGS: dict[str, Any] = {}

_POISON = 0xAA


@contextlib.contextmanager
def execute(execution: str | int, **settings: Any) -> Iterator[Any]:
    """The operators run their kernels in this way; gives the ptxrun session, or None. Compiled: random order, race check."""
    if execution == "interpreter":
        with triton_on_cpu():
            yield None
    elif execution == "cuda":
        with _cuda_for_cpu_tensors():
            yield None
    else:
        import ptxrun

        settings = {"seed": 1, "racecheck": 2, **SETTINGS, **settings}
        with ptxrun.active(capability=int(execution), **settings) as session, triton_on_cpu(), _admitted(session):
            yield session


@contextlib.contextmanager
def _admitted(session: Any) -> Iterator[None]:
    """Kernels may touch the tensors whose addresses they find in a table."""

    def address(tensor: Tensor) -> int:
        session.allow(tensor)
        return tensor.data_ptr()

    with mock.patch.object(_launch, "address", address):
        yield


@contextlib.contextmanager
def _cuda_for_cpu_tensors() -> Iterator[None]:
    """CPU tensors go to the GPU, the kernels run there, the results come back: the same tests, on a device."""

    def through_cuda(kernels: Any) -> Any:
        def move(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [move(item) for item in value]
            return value.cuda() if isinstance(value, Tensor) else value

        def run(*args: Any) -> Any:
            result = kernels(*map(move, args))
            return result.cpu() if isinstance(result, Tensor) else tuple(part.cpu() for part in result)

        return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(_ops.kernels_on_cpu())
        for name in _ops.operators():
            module = MODULES.get(name, reassign)
            stack.enter_context(mock.patch.object(module, name, through_cuda(getattr(module, name))))
        yield


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh memory holds 0xAA bytes: no bool, and as a number nothing that a kernel computes."""

    def poisoned(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return poison(make(*args, **kwargs))

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def poison(tensor: Tensor) -> Tensor:
    _bytes(tensor).fill_(_POISON)
    return tensor


def assert_written(*tensors: Tensor) -> None:
    """No element is poisoned memory, whatever else it is."""
    for tensor in tensors:
        unwritten = (_bytes(tensor) == _POISON).all(-1)
        assert not unwritten.any(), f"{int(unwritten.sum())} of {tensor.numel()} elements of {tuple(tensor.shape)} not written"


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [..., bytes per element]."""
    return tensor.view(torch.uint8).view(*tensor.shape, tensor.element_size())
