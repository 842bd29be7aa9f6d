"""What happens around the compilation of loops: a cache on disk; whoever waits is told once; no garbage is collected."""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.event import Listener, register

logger = logging.getLogger("paa_gpu")

#: Seconds of compilation without a word. To load compiled loops from the disk takes less.
PATIENCE = 2.0


@functools.cache
def _warn_that_nothing_is_kept(folder: str, error: str) -> None:
    """Once for each folder and error."""
    logger.warning(
        "paa_gpu cannot keep its compiled loops in %s (%s). Every process compiles them again. Set NUMBA_CACHE_DIR to a folder "
        "that has room for some megabytes.",
        folder,
        error,
    )


class Homeless(CompileResultCacheImpl):
    """The folders where numba may keep loops, without those below the user's home."""

    def __init__(self, function: Any) -> None:
        at_home = "UserWide", "Zip"
        self._locator_classes = [kind for kind in self._locator_classes if not any(name in kind.__name__ for name in at_home)]
        super().__init__(function)


class LoopCache(FunctionCache):
    """numba's cache on disk, which no call depends on: a loop that cannot be read is compiled, also if it cannot be written."""

    # A user without a home has no cache folder. numba would make one that is called "~".
    if os.path.expanduser("~") == "~" and not os.environ.get("XDG_CACHE_HOME"):  # noqa: PTH111  # for Path it is an error
        _impl_class = Homeless

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            loop = super().load_overload(sig, target_context)
        except (OSError, MemoryError):
            return None
        except Exception:  # a file that was cut off raises errors of any kind
            loop, broken = None, True
        else:  # two processes that compile at once may give two loops the same file
            broken = loop is not None and loop.signature.args != sig
        if broken:
            self._drop()
        return None if broken else loop

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._drop()
            _warn_that_nothing_is_kept(self.cache_path, getattr(error, "strerror", None) or str(error))

    def _drop(self) -> None:
        """Remove the index and all that it names. Numbers are given again: an index must not name the file of another loop."""
        with contextlib.suppress(OSError):
            for path in Path(self.cache_path).glob(f"{glob.escape(self._impl.filename_base)}.*nb[ic]"):
                path.unlink()


class CompilationListener(Listener):
    """Does something when the compilation of a loop of this package begins, and when it ends.

    numba tells when the compilation of a function begins and ends, under a lock of its own. Functions that call others nest; only
    the outermost one counts.
    """

    def __init__(self) -> None:
        self._depth = 0

    def on_start(self, event: Any) -> None:
        self._depth += 1
        loop = event.data["dispatcher"]
        # A function of another package may have no module.
        if self._depth == 1 and (loop.py_func.__module__ or "").startswith("paa_gpu."):
            self.begin(loop)

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.end()

    def begin(self, loop: Any) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Also called where nothing has begun."""
        raise NotImplementedError

    def forget(self) -> None:
        """In a forked child: another thread of the parent may have been compiling. It is not here. The lock of numba's compiler
        stays locked then, which nothing here can change."""
        self._depth = 0


class CompilationNotice(CompilationListener):
    """Warns when loops have been compiled for `PATIENCE` seconds altogether, and still are: once in a process."""

    def __init__(self, patience: float = PATIENCE) -> None:
        super().__init__()
        self._patience = patience
        self._begun = 0.0
        self._timer: threading.Timer | None = None
        self._said = False

    def begin(self, loop: Any) -> None:
        if not self._said:
            self._begun = time.monotonic()
            self._timer = threading.Timer(max(self._patience, 0.0), self._say, [loop])
            self._timer.daemon = True
            with contextlib.suppress(RuntimeError):  # Python is about to end, or the system has too many threads: nobody is told
                self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._patience -= time.monotonic() - self._begun

    def forget(self) -> None:
        super().forget()
        self._timer = None  # its thread is not here either

    def _say(self, loop: Any) -> None:
        self._said = True
        folder = loop._cache.cache_path
        if folder is not None:
            kept = f"It happens once for each dtype. The result is kept in {folder}."
        elif Path(loop.py_func.__code__.co_filename).exists():
            kept = "Every process does this again, as there is no folder that it may write to. Set NUMBA_CACHE_DIR to one."
        else:
            kept = "Every process does this again, as numba finds no source files of the package on the disk."
        logger.warning("paa_gpu is compiling its loops for this machine, which may take ten seconds. %s", kept)


class NoCollection(CompilationListener):
    """Pauses the collection of garbage, if it is on. The compiler makes many objects and little garbage, and Python would look
    through all objects of the process again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._stopped = False

    def begin(self, loop: Any) -> None:
        self._stopped = gc.isenabled()
        gc.disable()

    def end(self) -> None:
        if self._stopped:
            self._stopped = False
            gc.enable()

    def forget(self) -> None:
        super().forget()
        self.end()


for listener in (CompilationNotice(), NoCollection()):
    register("numba:compile", listener)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=listener.forget)
