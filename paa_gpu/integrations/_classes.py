"""Modules that change their class in place: parameters, buffers, hooks and `state_dict` stay; copies and pickles work."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

__all__ = ["change_class", "restore_class"]


def change_class(module: Any, base: Any) -> None:
    """Let a module be of class `base`, a subclass of the class `base.published` that it has or inherits from.

    What a subclass of the published class overrides comes first: its methods reach those of `base` by `super()`.
    """
    restore_class(module)
    published: Any = type(module)
    module.__class__ = _changed(published, base)


def restore_class(module: nn.Module) -> None:
    """Undo `change_class`. Other modules, and those of a class that somebody wrote on top of such a `base`, stay as they are."""
    published = vars(type(module)).get("published")
    if published is not None:
        module.__class__ = published


@functools.cache
def _changed(published: Any, base: Any) -> Any:
    if published is base.published or issubclass(published, base):
        return base if published is base.published else published
    members = {"published": published, "base": base, "__module__": published.__module__, "__reduce_ex__": _reduce}
    return types.new_class(f"{published.__name__}GPU", (published, base), exec_body=lambda body: body.update(members))


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy, which cannot find a class made by `_changed` by its name."""
    return _new, (module.published, module.base), object.__reduce_ex__(module, 2)[2]


def _new(published: Any, base: Any) -> Any:
    return object.__new__(_changed(published, base))
