"""Modules that change their class in place. Parameters, buffers, hooks and `state_dict` stay. Copies and pickles work."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

__all__ = ["change_class", "class_before", "restore_class"]


def change_class(module: Any, base: Any) -> None:
    """Change the class of a module to `base`. The module's class must be `base.published` or inherit from it.

    A subclass of the published class keeps the methods that it overrides. Their `super()` calls those of `base`.
    """
    restore_class(module)
    published: Any = type(module)
    module.__class__ = _changed(published, base)


def restore_class(module: nn.Module) -> None:
    """Undo `change_class`. Other modules stay as they are, and so does a class that somebody derived from a `base`."""
    published = class_before(module)
    if published is not None:
        module.__class__ = published


def class_before(module: nn.Module) -> type | None:
    """The class that `restore_class` gives a module, or None if it stays as it is."""
    published = vars(type(module)).get("published")
    # Another class may have an attribute of this name.
    return published if isinstance(published, type) and issubclass(type(module), published) else None


@functools.cache
def _changed(published: Any, base: Any) -> Any:
    if published is base.published or issubclass(published, base):
        return base if published is base.published else published
    members = {"published": published, "base": base, "__module__": published.__module__, "__reduce_ex__": _reduce}
    return types.new_class(f"{published.__name__}GPU", (published, base), exec_body=lambda body: body.update(members))


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy. They cannot find a class made by `_changed` by its name."""
    return _new, (module.published, module.base), object.__reduce_ex__(module, 2)[2]


def _new(published: Any, base: Any) -> Any:
    return object.__new__(_changed(published, base))
