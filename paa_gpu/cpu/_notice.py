"""A message for users who wait while the loops are compiled. It comes once in a process, and only after two seconds."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from numba.core.event import Listener, register

logger = logging.getLogger("paa_gpu")

#: Seconds of compilation without a word. To load compiled loops from the disk takes less.
PATIENCE = 2.0


class CompilationNotice(Listener):
    """Warns when loops of this package have been compiled for `PATIENCE` seconds altogether, and still are.

    numba tells when the compilation of a function begins and ends, under a lock of its own. Functions that call others nest; only
    the outermost one counts.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._depth = 0
        self._begun = 0.0
        self._timer: threading.Timer | None = None
        self._said = False

    def on_start(self, event: Any) -> None:
        self._depth += 1
        loop = event.data["dispatcher"]
        if self._timer is None and not self._said and loop.py_func.__module__.startswith("paa_gpu."):
            self._begun = time.monotonic()
            self._timer = threading.Timer(max(self._patience, 0.0), self._say, [loop._cache.cache_path])
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._patience -= time.monotonic() - self._begun

    def _say(self, folder: str | None) -> None:
        self._said = True
        if folder is None:
            kept = "Every process does this again, as there is no folder that it may write to. Set NUMBA_CACHE_DIR to one."
        else:
            kept = f"It happens once: the result is kept in {folder}."
        logger.warning("paa_gpu is compiling its loops for this machine, which may take ten seconds. %s", kept)


register("numba:compile", CompilationNotice())
