"""The two libraries that replace CUDA's runtime and its driver, and the environment in which torch finds them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ptxrun.driver import MAX_SHARED
from ptxrun.program import cache_dir

#: What torch asks the loader for.
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"

HERE = Path(__file__).parent
PARTS = ("world", "devices", "memory", "streams", "graphs", "kernels")  # of the runtime
COMPILER = ("g++", "-std=c++17", "-O1", "-fPIC")


def _site(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else Path("/nowhere")


def original() -> Path:
    """The runtime that torch came with."""
    return _site("nvidia") / "cu13" / "lib" / RUNTIME


def unavailable() -> str | None:
    """Why the devices cannot be had here; None if they can."""
    if not sys.platform.startswith("linux"):
        return "fakecuda runs on Linux"
    if missing := [tool for tool in ("g++", "nm") if not shutil.which(tool)]:
        return f"fakecuda needs {missing[0]}"
    return None if original().exists() else "fakecuda needs a torch that is built for CUDA 13"


def _run(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def _exported(library: Path) -> set[str]:
    """The functions and variables of a library, without their versions."""
    return {line.split()[-1].partition("@")[0] for line in _run("nm", "-D", "--defined-only", library).splitlines()} - {RUNTIME}


def _called(source: Path) -> set[str]:
    """The driver's functions that C code calls. Any Triton may call others than the last one."""
    return set(re.findall(r"\b(cu[A-Z]\w*)\(", source.read_text()))


def _stubs(wanted: set[str], parts: list[Path]) -> str:
    """C++ of the functions that our parts do not have: a call of one ends the process with its name."""
    ours = {line.split()[-1] for line in _run("nm", "--defined-only", "--extern-only", *parts).splitlines() if line.strip()}
    lines = ["#include <cstdio>", "#include <cstdlib>"]
    for name in sorted(wanted - ours):
        lines.append(f'extern "C" void {name}() {{ std::fputs("fakecuda has no {name}\\n", stderr); std::abort(); }}')
    return "\n".join(lines)


def _link(library: Path, parts: list[Path], wanted: set[str], *more: object) -> None:
    """Make a library of our parts, and of stubs for what else is wanted."""
    stubs = library.with_suffix(".cpp")
    stubs.write_text(_stubs(wanted, parts))
    _run(*COMPILER, "-shared", f"-Wl,-soname,{library.name}", *parts, stubs, *more, "-o", library)


def _build(folder: Path) -> None:
    nvidia, versions = _site("triton") / "backends" / "nvidia", folder / "versions"
    for name in (*PARTS, "driver"):
        _run(*COMPILER, "-Wall", f"-I{nvidia / 'include'}", "-c", HERE / f"{name}.cpp", "-o", folder / f"{name}.o")
    versions.write_text(f"{RUNTIME} {{ global: cuda*; __cuda*; fakecuda_*; local: *; }};")
    parts = [folder / f"{name}.o" for name in PARTS]
    _link(folder / RUNTIME, parts, _exported(original()), f"-Wl,--version-script={versions}", "-ldl")
    _link(folder / DRIVER, [folder / "driver.o"], _called(nvidia / "driver.c"), folder / RUNTIME)


def build() -> Path:
    """The folder of the libraries, which are built if they are not there. Several processes may ask at once."""
    sources = [*sorted(HERE.glob("*.h")), *sorted(HERE.glob("*.cpp")), Path(__file__)]
    sources.append(_site("triton") / "backends" / "nvidia" / "driver.c")
    key = hashlib.sha256(b"".join([*(path.read_bytes() for path in sources), bytes(original())]))
    cache = cache_dir() / f"fakecuda-{key.hexdigest()[:32]}"
    if not cache.exists():
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            built = Path(scratch) / "built"
            built.mkdir()
            _build(built)
            try:
                built.rename(cache)
            except OSError:  # another process was faster
                if not cache.exists():
                    raise
    return cache


def environment(devices: int = 2, capability: int = 90) -> dict[str, str]:
    """The environment of a process that has the devices, once it has imported `fakecuda.devices`."""
    folder = build()
    settings = {"DEVICES": devices, "CAPABILITY": capability, "SHARED": MAX_SHARED[capability]}
    return {
        **os.environ,
        **{f"FAKECUDA_{name}": str(value) for name, value in settings.items()},
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",  # Triton's launcher instead, which tells `kernels.py` what it loads
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
