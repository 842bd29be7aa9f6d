"""Ways to execute the kernels for CPU tensors, and outputs that show what no kernel wrote.

A pytest run with `TRITON_INTERPRET=1` executes everything under Triton's interpreter, one without it what was compiled for
several capabilities, through ptxrun: Triton reads the variable when a kernel is decorated, so one process cannot do both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from paa_gpu import _dispatch
from paa_gpu.kernels import _launch, assign, em, fusion, losses, mixture, nms, reassign, topk, voting
from paa_gpu.testing import triton_on_cpu

INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

#: Newer versions are not skipped: what ptxrun does not know of their instructions and their launcher is to be seen.
compiled_only = pytest.mark.skipif(
    INTERPRETER or OLD_TRITON,
    reason="ptxrun runs what Triton compiles from 3.8 on, not the interpreter",
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
    + [pytest.param("stand-in", marks=(compiled_only, pytest.mark.long))]
    + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
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
    "weighted_boxes_fusion": fusion,
}

#: Settings of ptxrun for the whole pytest run: its option --ptxrun.
SETTINGS: dict[str, Any] = {}

_POISON = 0xAA
EMPTY = torch.empty  #: Memory of inputs, of which nothing is to be touched, while `poisoned_outputs` replaces it for results.


@contextlib.contextmanager
def execute(execution: str | int, **settings: Any) -> Iterator[Any]:
    """The operators run their kernels in this way; gives the ptxrun session, or None. Compiled: random order, race check."""
    if execution == "interpreter":
        with triton_on_cpu():
            yield None
    elif execution == "cuda":
        with _through_device("cuda"):
            yield None
    elif execution == "stand-in":
        import ptxrun

        with ptxrun.active(capability=90, seed=1, **SETTINGS) as session, _admitted(session), _through_device("cpu"):
            session.refuse = _refuse_outside
            yield session
    else:
        import ptxrun

        settings = {"seed": 1, "racecheck": 2, **SETTINGS, **settings}
        with ptxrun.active(capability=int(execution), **settings) as session, triton_on_cpu(), _admitted(session):
            yield session


_device: list[str] = []  # where kernels run, innermost last; none: where the tensors are
_inside: list[bool] = []  # while something runs there


def _refuse_outside() -> None:
    """The stand-in of a GPU refuses what a GPU cannot read: tensors that nobody brought to it."""
    if not _inside:
        raise RuntimeError("a kernel was launched for tensors of the CPU: call it through on_device()")


def on_device(function: Any) -> Any:
    """`function` for CPU tensors wherever kernels run: on a GPU with copies there, whose changes come back, and the results too.

    A copy has the strides, the offset and the storage of its original; tensors that share a storage share it there.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not _device or _inside:
            return function(*args, **kwargs)
        copies = Copies(_device[-1])
        _inside.append(True)
        try:
            result = function(*copies.of(args), **copies.of(kwargs))
        finally:
            _inside.pop()
        copies.bring_back()
        return map_tensors(lambda tensor: tensor.cpu(), result)

    return run


class Copies:
    """Copies of CPU tensors on a device, storage by storage."""

    #: A storage beyond this many bytes is memory that nobody touches but for what a view shows: only that is copied.
    LARGEST = 2**30

    def __init__(self, device: str) -> None:
        self.device = device
        self.storages: dict[int, Tensor] = {}
        self.views: list[tuple[Tensor, Tensor]] = []

    def of(self, value: Any) -> Any:
        return map_tensors(self._copy, value)

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages or not storage.nbytes():
            whole = EMPTY(storage.nbytes(), dtype=torch.uint8, device=self.device)
            if storage.nbytes() <= self.LARGEST:
                whole.copy_(EMPTY(0, dtype=torch.uint8).set_(storage))
            self.storages[storage.data_ptr()] = whole
        there = EMPTY(0, dtype=tensor.dtype, device=self.device)
        there.set_(self.storages[storage.data_ptr()].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if storage.nbytes() > self.LARGEST:
            there.copy_(tensor)
        self.views.append((tensor, there))
        return there

    def bring_back(self) -> None:
        for tensor, there in self.views:
            back = there.cpu()
            if not torch.equal(_bytes(_flat(back)), _bytes(_flat(tensor.detach()))):
                tensor.copy_(back)


def map_tensors(function: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


@contextlib.contextmanager
def _admitted(session: Any) -> Iterator[None]:
    """Kernels may touch the tensors whose addresses they find in a table."""

    def pointers(tensors: Sequence[Tensor]) -> list[int]:
        for tensor in tensors:
            session.allow(tensor)
        return [tensor.data_ptr() for tensor in tensors]

    with mock.patch.object(_launch, "pointers", pointers):
        yield


@contextlib.contextmanager
def _through_device(device: str) -> Iterator[None]:
    """The operators take CPU tensors to the device and their results back: the same tests, on a GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_dispatch.kernels_on_cpu())
        for name in _dispatch.OPERATORS:
            module = MODULES.get(name, reassign)
            stack.enter_context(mock.patch.object(module, name, on_device(getattr(module, name))))
        _device.append(device)
        stack.callback(_device.pop)
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


def _flat(tensor: Tensor) -> Tensor:
    """The elements, one after the other; a single one may have any stride."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,), tensor.contiguous().storage_offset())


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [..., bytes per element]."""
    return tensor.view(torch.uint8).view(*tensor.shape, tensor.element_size())
