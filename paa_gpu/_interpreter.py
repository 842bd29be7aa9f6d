"""Which Python this library runs on: one with the global interpreter lock."""

from __future__ import annotations

import sys
from typing import Any


def check_lock(python: Any = sys) -> None:
    """Raise ImportError in a free-threaded process: neither the library nor numba is tested there."""
    if not getattr(python, "_is_gil_enabled", lambda: True)():
        raise ImportError(
            "paa_gpu needs Python's global interpreter lock, and this process runs without it. "
            "Set PYTHON_GIL=1 in the environment, or use the usual build of Python."
        )


check_lock()
