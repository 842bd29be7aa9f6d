"""Python's side of the runtime: work that a stream runs when somebody waits for it."""

from __future__ import annotations

import ctypes
import itertools
import traceback
from collections.abc import Callable

import torch

from .libraries import RUNTIME

#: What a device answers after a kernel that failed, and until the process ends: cudaErrorLaunchFailure.
FAILED = 719

library = ctypes.CDLL(RUNTIME)

_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)
_numbers = itertools.count()
_calls: dict[int, Callable[[], None]] = {}  # a captured one runs more than once, so they stay
library.fakecuda_queue_call.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

#: What went wrong on a device, in order.
errors: list[BaseException] = []


def judged(work: Callable[[], None]) -> int:
    """Run the work; the error code of a device."""
    try:
        with torch.no_grad():
            work()
    except BaseException as error:
        traceback.print_exception(error)
        errors.append(error)
        return FAILED
    return 0


def forget_errors() -> None:
    """A device that has failed works again, as it does in a new process."""
    errors.clear()
    library.fakecuda_forget_errors()


_run = _CALL(lambda number: judged(_calls[number]))
library.fakecuda_on_call(_run)


def queue(work: Callable[[], None]) -> None:
    """Put the work into the current stream of the current device, or into the graph that it captures."""
    number = next(_numbers)
    _calls[number] = work
    library.fakecuda_queue_call(torch.cuda.current_stream().cuda_stream, number)
