"""Which Python this library runs on: one with the global interpreter lock."""

from __future__ import annotations

import sys


def check_lock() -> None:
    """Raise ImportError in a free-threaded process: the library is not tested there."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ImportError(
            "paa_gpu needs Python's global interpreter lock, and this process runs without it. "
            "Set PYTHON_GIL=1 in the environment, or use the usual build of Python."
        )


check_lock()
