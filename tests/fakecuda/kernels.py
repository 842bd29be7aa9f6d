"""Triton's kernels on the devices: its own launcher calls the driver, and ptxrun runs the PTX when the stream comes to it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

import triton
from ptxrun.driver import Launcher, Session
from ptxrun.program import Program

from .runtime import judged, library

#: Of memory blocks that a kernel may touch.
ROOM = 4096


class Block(NamedTuple):
    """What an error says of the memory nearest to an address."""

    shape: tuple[int, ...]
    dtype: str


session = Session(capability=int(os.environ["FAKECUDA_CAPABILITY"]), seed=1)
_programs: dict[int, Program] = {}
_by_ptx: dict[str, Program] = {}

_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 5, ctypes.c_void_p)
_driver = ctypes.CDLL("libcuda.so.1")


def _loaded(module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
    """Triton has loaded a kernel: find its PTX, and tell the driver the sizes of its parameters."""
    ptx = Path(next(path for file, path in files.items() if file.endswith(".ptx"))).read_text()
    program = _programs[function] = _by_ptx.get(ptx) or _by_ptx.setdefault(ptx, Program(ptx))
    sizes = [size for _, size in program.module.params.values()]
    _driver.fakecuda_sizes(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), (ctypes.c_size_t * len(sizes))(*sizes))


def _memory(device: int) -> list[tuple[int, int, Block]]:
    """The blocks of the device that exist: all that a kernel may touch, whatever its arguments."""
    bounds = (ctypes.c_uint64 * (2 * ROOM))()
    count = library.fakecuda_blocks(device, bounds, ROOM)
    pairs = [(bounds[2 * i], bounds[2 * i + 1]) for i in range(count)]
    return [(begin, end - begin, Block((end - begin,), f"cuda:{device} uint8")) for begin, end in pairs]


def _launch(function: int, x: int, y: int, z: int, block: int, shared: int, parameters: int) -> int:
    program = _programs[function]
    values, at = bytearray(program.module.param_bytes), parameters
    for offset, size in program.module.params.values():
        values[offset : offset + size] = ctypes.string_at(at, size)
        at += size
    launcher: Any = Launcher.__new__(Launcher)  # what it needs else is for launches that Triton does not make itself
    launcher.program, launcher.shared = program, shared
    device = library.fakecuda_device_of(ctypes.c_void_p(function))
    return judged(lambda: launcher.execute(session, (x, y, z), bytes(values), _memory(device)))


_callback = _LAUNCH(_launch)
library.fakecuda_on_launch(_callback)
triton.knobs.runtime.kernel_load_end_hook = _loaded
