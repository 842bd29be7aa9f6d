"""torch's own operations on the devices: those of the CPU, on the same memory, when the stream comes to them.

What comes from the CPU: values, shapes, strides. What comes from CUDA: allocation, copies between host and device, streams, events,
graphs, and the checks of what waits.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .runtime import queue

#: Operations that only arrange memory, or whose CUDA code calls other operations and the runtime. They stay as they are.
OWN = {
    "empty", "empty_strided", "empty_like", "as_strided", "view", "set_", "resize_", "resize_as_", "_reshape_alias", "_unsafe_view",
    "unfold", "_local_scalar_dense", "record_stream", "is_set_to", "is_pinned", "_pin_memory", "_copy_from", "_copy_from_and_resize",
}  # fmt: skip


def aliased(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor of the CPU."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    there = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(there, tensor.storage_offset(), tensor.size(), tensor.stride())


def map_values(function: Any, value: Any) -> Any:
    """The same value with other leaves, in lists and tuples too."""
    if isinstance(value, list | tuple):
        return type(value)(map_values(function, item) for item in value)
    return function(value)


def leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_values(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


class OnDevice:
    """An operation on tensors of a device, in place of CUDA's kernel."""

    def __init__(self, operation: Any) -> None:
        self.operation, self.schema = operation, operation._schema
        self.written = [argument.name for argument in self.schema.arguments if argument.is_write]
        #: The arguments that the operation returns, in this order, if it makes no tensor of its own.
        returned = [result.alias_info for result in self.schema.returns]
        self.in_place = bool(self.written) and None not in returned
        # A number comes as such, where the schema has a tensor.
        self.tensors = {argument.name for argument in self.schema.arguments if str(argument.type) == "Tensor"}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip((argument.name for argument in self.schema.arguments), args, strict=False)), **kwargs}
        device = self._device(named)
        with torch.cuda.device(device):
            return self._write(named) if self.in_place else self._make(named, device)

    def _device(self, named: dict[str, Any]) -> torch.device:
        tensors = leaves(list(named.values()))
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        if len(devices) > 1 or any(tensor.dim() and not tensor.is_cuda for tensor in tensors):
            raise RuntimeError(
                f"{self.operation}: expected all tensors to be on the same device, got {[t.device for t in tensors]}"
            )
        return devices.pop() if devices else torch.device(named.get("device") or "cuda", torch.cuda.current_device())

    def _on(self, device: str, named: dict[str, Any]) -> dict[str, Any]:
        """The arguments for another device: the same memory for "cpu", shapes alone for "meta"."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and device == "cpu":
                return aliased(value) if value.is_cuda else value.clone()  # now: a launch takes a number with it
            if isinstance(value, Tensor):
                return _empty(value, torch.device(device))
            if isinstance(value, torch.device):
                return torch.device(device)
            return None if isinstance(value, torch.Generator) else value

        there = {name: map_values(moved, value) for name, value in named.items()}
        for name in self.tensors & there.keys():
            if isinstance(there[name], int | float | complex):
                there[name] = torch.tensor(there[name], device=device)
        if there.get("pin_memory"):
            there["pin_memory"] = False
        return there

    def _shapes(self, named: dict[str, Any]) -> Any:
        """The results without values. None if torch cannot tell them: they depend on values, or the arguments are wrong."""
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradMeta)):
            try:
                return self.operation(**self._on("meta", named))
            except (NotImplementedError, RuntimeError, TypeError):
                return None

    def _compute(self, arguments: dict[str, Any]) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)):
            return self.operation(**arguments)

    def _write(self, named: dict[str, Any]) -> Any:
        if any(argument.is_out for argument in self.schema.arguments):
            shapes = self._shapes(named)
            for tensor, shape in zip(leaves([named[name] for name in self.written]), leaves([shapes]), strict=False):
                if tensor.shape != shape.shape:
                    tensor.resize_(shape.shape)
        arguments = self._on("cpu", named)
        queue(lambda: self._compute(arguments))
        results = [named[name] for name in self.written][: len(self.schema.returns)]
        return results[0] if len(results) == 1 else tuple(results) or None

    def _make(self, named: dict[str, Any], device: torch.device) -> Any:
        shapes, arguments = self._shapes(named), self._on("cpu", named)
        if shapes is None:
            torch.cuda.current_stream().synchronize()
            return map_values(lambda value: value.to(device) if isinstance(value, Tensor) else value, self._compute(arguments))
        results = map_values(lambda shape: shape if shape is None else _empty(shape, device), shapes)
        filled = [aliased(tensor) for tensor in leaves([results])]

        def run() -> None:
            for target, value in zip(filled, leaves([self._compute(arguments)]), strict=True):
                if value.numel():  # the CPU leaves out what only a backward pass would need
                    target.copy_(value)

        queue(run)
        return results


def _empty(shape: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device=device)


_copy_memory = torch.library.get_kernel("aten::copy_", "CUDA")  # before `install`


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`Tensor.copy_`: within a device as any operation; between two, and from or to the host, by CUDA's own code."""
    if target.device != source.device:
        device = target if target.is_cuda else source
        return _copy_memory.call_boxed(torch._C._dispatch_keys(device), target, source, non_blocking)
    with torch.cuda.device(target.device):
        to, values = aliased(target), aliased(source)
        queue(lambda: to.copy_(values))
    return target


def _equal(a: Tensor, b: Tensor) -> bool:
    with torch.cuda.device(a.device):
        torch.cuda.current_stream().synchronize()
    return torch.equal(aliased(a), aliased(b))


def _operations() -> dict[str, Any]:
    """The operations of torch and torchvision that return tensors, or write into them, by a kernel for CUDA."""
    more = ["aten::convolution", "aten::convolution_backward"]  # they choose a kernel by the device
    found = {}
    for name in [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), *more]:
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace in ("aten", "torchvision") and base not in OWN:
            operation = getattr(getattr(getattr(torch.ops, namespace), base, None), overload or "default", None)
            if operation is not None and all("Tensor" in str(result.type) for result in operation._schema.returns):
                found[name] = operation
    return found


_libraries = {name: Library(name, "IMPL") for name in ("aten", "torchvision")}


def install() -> None:
    """Replace the kernels for CUDA in this process."""
    replacements = {
        **{name: OnDevice(operation) for name, operation in _operations().items()},
        "aten::copy_": _copy,
        "aten::equal": _equal,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each of them replaces a kernel
        for name, function in replacements.items():
            namespace, _, rest = name.partition("::")
            _libraries[namespace].impl(rest, function, "CUDA", allow_override=True)
