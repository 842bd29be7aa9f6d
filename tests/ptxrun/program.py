"""Kernels as C, compiled and loaded."""
import ctypes as C
import hashlib
import os
import random
import re
import subprocess
import tempfile
from pathlib import Path

from .ptx import PTXError
from .translate import translate

HERE = Path(__file__).parent
FLAGS = ["-O1", "-w", "-fPIC", "-shared", "-std=gnu11", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off",
         "-fno-math-errno"]
PRINT = C.CFUNCTYPE(None, C.c_uint64, C.c_uint64)


class Region(C.Structure):
    _fields_ = [("lo", C.c_uint64), ("hi", C.c_uint64)]


class Ctx(C.Structure):        # mirrors Ctx in rt.h
    _fields_ = [("nctaid", C.c_uint32 * 3), ("ntid", C.c_uint32 * 3), ("ctaid", C.c_uint32 * 3), ("smem_bytes", C.c_uint32),
                ("seed", C.c_uint32), ("nregions", C.c_uint32), ("last", C.c_uint32), ("err", C.c_uint32),
                ("err_ins", C.c_uint32), ("err_tid", C.c_uint32), ("err_cta", C.c_uint32 * 3), ("racecheck", C.c_uint32), ("slots", C.c_uint32), ("approximate", C.c_uint32),
                ("err_x", C.c_uint64 * 4), ("fuel", C.c_int64), ("barriers", C.c_uint64), ("warp_barriers", C.c_uint64), ("clashes", C.c_uint64),
                ("bytes", C.c_uint64 * 2), ("sectors", C.c_uint64 * 2), ("requests", C.c_uint64 * 2),
                ("params", C.c_void_p), ("smem", C.c_void_p), ("shadow", C.c_void_p), ("regions", C.c_void_p),
                ("thread_blocks", C.c_void_p), ("warp_blocks", C.c_void_p), ("print", PRINT), ("fuse", C.c_void_p), ("private", C.c_uint64 * 16)]


def cache_dir():
    path = os.environ.get("PTXRUN_CACHE") or os.path.join(tempfile.gettempdir(), f"ptxrun-{os.getuid()}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    return Path(path)


def _cpu_flags():
    try:
        have = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    except (OSError, AttributeError):
        return []
    return [f"-m{x}" for x in ("fma", "avx2", "f16c") if x in have]


class Program:
    """One kernel: its PTX, the C translation and the loaded shared objects (of each combination of settings)."""

    def __init__(self, ptx):
        self.ptx = ptx
        source, tr = translate(ptx)
        self.code, self.counts, self.module = tr.code, tr.counts, tr.m
        self.sources, self.libs, self.products = {(): source}, {}, {}

    def source(self, settings):
        """The C translation with these of the translator's settings, a sorted tuple of names."""
        if settings not in self.sources:
            self.sources[settings], translator = translate(self.ptx, **dict.fromkeys(settings, True))
            self.products = translator.products
        return self.sources[settings]

    def fusions(self, which, seed):
        """For each instruction the operand whose product ptxas takes in: of all sums of products, of a random half, or of none."""
        fuse, rng = bytearray(len(self.code)), random.Random(seed)
        for k, products in self.products.items():
            place, drawn = rng.choice(products)[0], rng.random() < 0.5
            fuse[k] = place if which == "all" or (which == "half" and drawn) else 0
        return bytes(fuse)

    def lib(self, count=False, weak=False, loose=False):
        settings = ("loose",) * loose + ("weak",) * weak
        if (count, settings) not in self.libs:
            source = self.source(settings)
            flags = FLAGS + _cpu_flags() + ["-DCOUNT"] * count + ["-DWEAK"] * weak
            key = hashlib.sha256("\0".join([source, *map(Path.read_text, sorted(HERE.glob("*.h"))), *flags]).encode()).hexdigest()[:32]
            out = cache_dir() / f"{key}.so"
            if not out.exists():
                with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
                    src = Path(tmp) / "kernel.c"
                    src.write_text(source)
                    cmd = [os.environ.get("CC", "gcc"), *flags, f"-I{HERE}", str(src), "-o", f"{tmp}/k.so", "-lm"]
                    r = subprocess.run(cmd, capture_output=True, text=True)
                    if r.returncode:
                        raise PTXError(f"the C translation of {self.module.kernel} does not compile:\n{r.stderr[:4000]}")
                    os.replace(f"{tmp}/k.so", out)
            lib = C.CDLL(str(out))
            lib.ptxrun_run.argtypes = [C.POINTER(Ctx), C.c_void_p, C.c_uint64]
            regions = (Region * (len(self.module.symbols) + 1))()
            lib.regions = [(r.lo, r.hi) for r in regions[:lib.ptxrun_symbols(regions)]]
            self.libs[count, settings] = lib
        return self.libs[count, settings]
