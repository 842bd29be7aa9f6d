"""Compiled loops, and a small pool of threads for slices of their rows.

numba's own `parallel` is not used. Its OpenMP layer kills forked children, and its workqueue layer aborts under several Python
threads. Our loops release the GIL, so ordinary threads suffice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numba import config, njit
from numba.extending import register_jitable

from ._arrays import Array
from ._compilation import LoopCache

# The loops need numba's arithmetic. In plain Python a sum of np.uint64 and np.int64, for example, is no integer.
if config.DISABLE_JIT:  # type: ignore[attr-defined]  # numba sets it from the environment
    raise ImportError("tensors on the CPU need loops that numba compiles: unset NUMBA_DISABLE_JIT in the environment")

#: Modules outside of this package whose constants are in the loops.
CONSTANTS = ("_ops.py", "separation.py")


def _version() -> str:
    """Numba keeps compiled code on disk under a function's name, and looks whether the function's own file has changed. What the
    function calls, and its constants, lie in other files. So the name tells all of them, also of a package in a zip file."""
    package, root = files(__package__), files(__package__.rpartition(".")[0])
    inside = package.iterdir() if package.is_dir() else ()  # a frozen application may have no such folder
    loops = sorted((path for path in inside if path.name.endswith(".py")), key=lambda path: path.name)
    sources = b"".join(path.read_bytes() for path in (*loops, *(root / name for name in CONSTANTS)) if path.is_file())
    return hashlib.sha256(sources).hexdigest()[:12]


_VERSION = _version()


# error_model: a division by zero gives inf or NaN, as it does on a GPU, instead of an exception from inside the loop.
# no_cfunc_wrapper: nothing calls the loops from C, so numba need not compile an entry for it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True}

# forceinline: a part of a loop has no machine code of its own. Otherwise the process that compiles would run that code, and those
# that load the loop from disk the copy in the loop. A sum of the one may end in another bit than a sum of the other.
_INLINED: dict[str, Any] = {**_OPTIONS, "forceinline": True}
with contextlib.suppress(ImportError):  # then numba makes machine code that nobody calls
    from ._parts import PartCompiler

    _INLINED["pipeline_class"] = PartCompiler

# For sums over a row: the compiler may order and fuse them, so that they fill vector registers. The order is the row's own, the
# same on any number of threads; infinities and NaN stay what they are.
_SUMS: dict[str, Any] = {**_INLINED, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}

# For functions of one value: no sums in another order, whatever the caller allows. Their digits come from what rounding leaves. A
# value gets the same bits wherever it stands in a row.
EXACT_SUMS: Any = {**_INLINED, "fastmath": {"contract"}}


def compiled(function: Callable[..., Any]) -> Any:
    """A loop that Python calls. Its first call compiles it, for the types of the arguments."""
    function.__qualname__ += f"-{_VERSION}"
    loop = njit(function, nogil=True, **_OPTIONS)
    # No folder is writable: neither that of the package nor one of the user. Then each process compiles for itself.
    with contextlib.suppress(RuntimeError):
        loop._cache = LoopCache(function)
    return loop


# In a loop, such a function is a part of the loop; called from Python, it is plain Python. Parts have no entry of their own for
# Python, and are not kept on disk. So they compile in half of the time.
inner = register_jitable(**_INLINED)
inner_fused = register_jitable(**EXACT_SUMS)
inner_with_sums = register_jitable(**_SUMS)


#: Microseconds that it costs to hand a slice over, measured on 2 cores: 100 until the other thread has begun and its end is
#: noticed, and the rest because its core has cold caches. What loops cost is measured there too, on one thread. This decides only
#: how many threads share a call. Results do not depend on it. `python -m bench.threads` shows whether a second thread pays.
HANDING_OVER = 150.0


@functools.cache
def _executor() -> ThreadPoolExecutor:
    """The pool of this process."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="paa_gpu")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executor.cache_clear)  # a forked child has no threads of its parent


def _hand_over(loop: Callable[..., None], *args: Any) -> Callable[[], None]:
    """Call the loop on another thread; on this one, if no thread can be started. What is returned waits for it."""
    lock, done = threading.Lock(), list[bool]()

    def once() -> None:
        with lock:
            if not done:
                loop(*args)
                done.append(True)

    try:
        return _executor().submit(once).result
    except RuntimeError:  # Python is about to end, or the system has too many threads
        return once  # a thread that is there already may have taken it nevertheless


def over_slices(loop: Callable[..., None], rows: int, serial_below: int, *args: Any) -> None:
    """Call `loop(start, stop, *args)` over slices of `range(rows)`, on as many threads as torch would use.

    Rows are independent, so the result does not depend on the slices. Fewer than `serial_below` rows are one slice: waking
    a thread would take longer than they do.
    """
    slices = 1 if rows < serial_below else min(torch.get_num_threads(), rows)
    over_bounds(loop, [rows * i // slices for i in range(slices + 1)], *args)


def equal_bounds(rows: int, cost: float) -> list[int]:
    """`shared_bounds` of rows that cost the same."""
    if rows * cost < 2 * HANDING_OVER:
        return [0, rows]
    slices = min(torch.get_num_threads(), rows, int(rows * cost // HANDING_OVER))
    return [rows * i // slices for i in range(slices + 1)]


def shared_bounds(ends: Array, in_python: float = 0.0) -> list[int]:
    """Where slices of rows begin and end that cost about the same: as many as torch has threads, but none that costs less than to
    hand it over.

    Args:
        ends: microseconds in compiled loops, from 0 on: of no row, of the first row, of the first two, and so on.
        in_python: microseconds between these loops, of each row. Threads take them one at a time, so they are lost.
    """
    rows, total = len(ends) - 1, float(ends[-1])
    slices = min(torch.get_num_threads(), rows, int((total - in_python * rows) // HANDING_OVER))
    if slices < 2:
        return [0, rows]
    # A row belongs to the slice in which its middle lies.
    middles = (ends[1:] + ends[:-1]).searchsorted([2 * total * i / slices for i in range(1, slices)])
    bounds = sorted({0, *middles.tolist(), rows})
    # One row may have most of the work.
    return bounds if duration(ends, bounds) < total else [0, rows]


def duration(ends: Array, bounds: list[int]) -> float:
    """Microseconds until all slices are done."""
    slowest: float = max(after - before for before, after in itertools.pairwise(ends[bounds].tolist()))
    return slowest + HANDING_OVER * (len(bounds) > 2)


def cumulated(costs: Sequence[float] | Array) -> Array:
    """What `shared_bounds` takes, from what each row costs."""
    return np.concatenate([[0.0], np.cumsum(costs)])


def over_bounds(loop: Callable[..., None], bounds: Sequence[int], *args: Any) -> None:
    """Call `loop(start, stop, *args)` for each two bounds, each on a thread of its own."""
    first, last, *others = bounds
    handed_over = [_hand_over(loop, *other, *args) for other in itertools.pairwise((last, *others))]
    loop(first, last, *args)
    for wait in handed_over:
        wait()
