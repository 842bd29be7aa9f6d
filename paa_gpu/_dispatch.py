"""How an operator is registered with torch, and how it is called.

torch's dispatcher lets a tracer, a mode, a transform, a subclass of Tensor or a profiler see a call. Mostly there is none. The
dispatcher then only calls the implementation for the device, and small calls notice the detour. So an `Operator` asks first
whether anything would see the call. If nothing would, it calls the implementation itself.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, custom_op, fallthrough_kernel, infer_schema
from torch.overrides import has_torch_function

# For what `custom_op` registers only at a price on every call: an autograd kernel (30 us; nothing here is differentiated, and the
# public functions detach), and a check that no result is a view of an argument (10 us; `tests/test_ops.py -k memory` makes it).
# So both devices have kernels of their own; that of `custom_op` is left for what is on no device.
_library = Library("paa_gpu", "IMPL")

#: The package with the implementations for each device. They are imported when an operator first runs.
_PACKAGES = {"cpu": "cpu", "cuda": "kernels"}


@functools.cache
def _module(package: str, stem: str) -> ModuleType:
    return importlib.import_module(f"paa_gpu.{package}.{stem}")


# Not public. Without it, each call goes through the dispatcher.
try:
    from torch._C import DispatchKey, DispatchKeySet, _dispatch_tls_local_include_set
    from torch._C._autograd import _profiler_enabled

    # All keys, as bits, but for those that every thread has.
    _OTHERS = ~(DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()
except (ImportError, AttributeError):

    def _watched() -> bool:
        """Nobody can tell, so yes."""
        return True

    def transforms() -> bool:
        """Nobody can tell, so yes."""
        return True
else:

    def _watched() -> bool:
        """Whether this thread has a mode, a tracer, a transform or a profiler."""
        return _dispatch_tls_local_include_set().raw_repr() & _OTHERS != 0 or _profiler_enabled()

    def transforms() -> bool:
        """Whether this thread is in a transform of `torch.func`. New tensors may be wrappers then, and look like others."""
        inside: bool = _dispatch_tls_local_include_set().has(DispatchKey.FuncTorchDynamicLayerFrontMode)
        return inside


OPERATORS: dict[str, Operator] = {}


class Operator:
    """An operator of the library `paa_gpu`, from its contract (see `_ops`).

    Args:
        stem: the module of the implementations in each package. They are functions of the contract's name and signature.
        contract: its annotations are the schema. It makes empty results from the arguments (the fake).
    """

    def __init__(self, stem: str, contract: Callable[..., Any]) -> None:
        functools.update_wrapper(self, contract)
        self.name, self._stem = contract.__name__, stem
        OPERATORS[self.name] = self
        annotations = [str(parameter.annotation) for parameter in inspect.signature(contract).parameters.values()]
        self._tensor_places = [place for place, text in enumerate(annotations) if text.startswith("Tensor")]
        self._list_places = [place for place, text in enumerate(annotations) if text == "Sequence[Tensor]"]
        schema = infer_schema(contract, mutates_args=())
        custom_op(f"paa_gpu::{self.name}", self._on("cuda"), mutates_args=(), schema=schema).register_fake(contract)
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            _library.impl(self.name, self._on(device), key)
            _library.impl(self.name, fallthrough_kernel, f"Autograd{key}")
        #: What torch knows the operator by.
        self.overload = getattr(torch.ops.paa_gpu, self.name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # before the arguments are looked at: a compiler would trace that
            return self.overload(*args)
        device = device_alone(self._tensors(args))
        return self.overload(*args) if device is None else self._run(device, args)

    def _tensors(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors among the arguments, those in lists too."""
        tensors = [args[place] for place in self._tensor_places if args[place] is not None]
        for place in self._list_places:
            tensors += args[place]
        return tensors

    def _on(self, device: str) -> Callable[..., Any]:
        return lambda *args: self._run(device, self._detached(args))

    def _detached(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The public functions detach, but a program that torch has decomposed may not."""
        result = list(args)
        for place in self._tensor_places:
            result[place] = args[place] if args[place] is None else args[place].detach()
        for place in self._list_places:
            result[place] = [tensor.detach() for tensor in args[place]]
        return tuple(result)

    def _run(self, device: str, args: tuple[Any, ...]) -> Any:
        return getattr(_module(_PACKAGES[device], self._stem), self.name)(*args)


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """The Triton implementations run for CPU tensors too, in the whole process, while the context is open."""
    before, _PACKAGES["cpu"] = _PACKAGES["cpu"], "kernels"
    try:
        yield
    finally:
        _PACKAGES["cpu"] = before


def device_alone(tensors: list[Tensor]) -> str | None:
    """The device of the tensors, if the dispatcher would only call its implementation; else None."""
    if not tensors or _watched() or has_torch_function(tensors):  # which asks for function modes too
        return None
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.is_neg():  # some subclasses have no functions of their own
            return None
    return "cuda" if tensors[0].is_cuda else "cpu" if tensors[0].is_cpu else None
