"""Compiled loops, and a small pool of threads for slices of their rows.

numba's own `parallel` is not used. Its OpenMP layer kills forked children, and its workqueue layer aborts under several Python
threads. Our loops release the GIL, so ordinary threads suffice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numba import njit
from numba.extending import register_jitable

from . import _notice  # noqa: F401  # registers itself with numba

# numba keeps compiled code on disk under a function's name, and looks whether the function's own file has changed. What the
# function calls lies in other files, so the name tells all of them.
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_VERSION = hashlib.sha256(_SOURCES).hexdigest()[:12]


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compile_at_first_call(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"-{_VERSION}"
        # error_model: a division by zero gives inf or NaN, as it does on a GPU, instead of an exception from inside the loop.
        loop = njit(function, nogil=True, error_model="numpy", **options)
        # No folder is writable: neither that of the package nor one of the user. Then each process compiles for itself.
        with contextlib.suppress(RuntimeError):
            loop.enable_caching()
        return loop

    return compile_at_first_call


compiled = _compiled()

# For sums over a row: the compiler may order and fuse them, so that they fill vector registers. The order is the row's own, the
# same on any number of threads; infinities and NaN stay what they are.
compiled_sums = _compiled(fastmath={"reassoc", "contract", "arcp", "nsz"})

# Python to Python, and a part of the compiled functions that call it.
shared = register_jitable


@functools.cache
def _executor(process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """The pool of a process: a forked child has another id, and with it a pool of its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="paa_gpu")


def over_slices(loop: Callable[..., None], rows: int, serial_below: int, *args: Any) -> None:
    """Call `loop(start, stop, *args)` over slices of `range(rows)`, on as many threads as torch would use.

    Rows are independent, so the result does not depend on the slices. Fewer than `serial_below` rows are one slice: waking
    a thread would take longer than they do.
    """
    slices = 1 if rows < serial_below else min(torch.get_num_threads(), rows)
    if slices == 1:
        loop(0, rows, *args)
        return
    bounds = [rows * i // slices for i in range(slices + 1)]
    others = [_executor(os.getpid()).submit(loop, bounds[i], bounds[i + 1], *args) for i in range(1, slices)]
    loop(bounds[0], bounds[1], *args)
    for other in others:
        other.result()
