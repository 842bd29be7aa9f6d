"""Every kernel compiles ahead of time for every target, with every option that changes its code; what the machine code takes.

A driver that compiles and does not run stands in for the GPU, so the launchers decide, as they do on one, what is compiled: a
case is a call of a launcher. A new kernel adds its calls to `USUAL`, `ALL` and `LAUNCHES`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from kernel_execution import INTERPRETER, OLD_TRITON
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as triton_driver
from triton.runtime.jit import JITFunction

from paa_gpu._checks import INTEGERS
from paa_gpu._ops import INITS, READOUTS, empty_fit
from paa_gpu.fusion import CONF_TYPES
from paa_gpu.kernels import _launch, assign, em, fusion, losses, mixture, nms, reassign, topk, voting
from paa_gpu.separation import SCHEMES

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")

CUDA = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)}
AMD = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}  # with the threads of a warp
TARGETS = CUDA | {name: GPUTarget("hip", name, warp) for name, warp in AMD.items()}
USUAL_TARGETS = ("sm_75", "sm_90", "sm_120", "gfx942")
#: Relatives of the others: they compile the usual forms only.
RELATIVES = ("sm_87", "sm_103", "sm_110", "sm_121", "gfx950", "gfx1100", "gfx1201")

#: Registers of a thread. Checked where the budget is stated.
MOST_REGISTERS, REGISTER_TARGETS = 96, ("sm_80", "sm_90")


#: Triton keeps what it compiled by the number of the device: each case has one of its own.
DEVICES = itertools.count(10_000)


class Compiled(NamedTuple):
    name: str
    binary: bytes
    shared: int


class CompileOnly(DriverBase):
    """A device of the target to Triton; launches do nothing."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device, self.compiled = target, device, list[Compiled]()
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 65536},
        )

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        self.compiled.append(Compiled(name, binary, shared))
        return None, name, 0, 0, 1024

    @staticmethod
    def launcher_cls(*_: Any) -> Callable[..., None]:
        return lambda *args: None

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Compiled]]:
    before, driver, launch = triton_driver._active, CompileOnly(target, next(DEVICES)), JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        assert "enable_fp_fusion" in options, f"{kernel.__name__} takes Triton's default, which changes with 3.10"
        assert options["grid"][0] < 2**31 and max(options["grid"][1:], default=1) <= 65_535, (
            f"{kernel.__name__}: {options['grid']}"
        )
        assert "maxnreg" in options or target.backend == "hip", f"{kernel.__name__} leaves it to the assembler when to spill"
        return launch(kernel, *args, **options)

    triton_driver.set_active(driver)
    capability = divmod(target.arch, 10) if target.backend == "cuda" else None
    try:
        with (
            mock.patch.object(torch.version, "hip", target.arch if target.backend == "hip" else None),
            mock.patch.object(_launch, "capability", lambda like: capability),
            mock.patch.object(JITFunction, "run", run),
        ):
            yield driver.compiled
    finally:
        triton_driver.set_active(before)


# The cases: name -> a call of a launcher, on tensors whose values nobody reads -----------------------------------------------


def fit_rows(
    width: int = 45,
    dtype: torch.dtype = torch.float32,
    source: str = "rows",
    inits: bool = False,
    k: int = 2,
    init: str = "minmax",
    n_init: int = 1,
    **options: str,
) -> None:
    options = {"covariance_type": "diag", "precision": "float64", **options}
    x = torch.zeros(3, width, dtype=dtype)
    count = torch.ones(3, dtype=torch.int64) if source == "count" else None
    lengths = [width] * 3 if source == "flat" else None
    given = [torch.ones(1 if i else 3, k) if inits else None for i in range(3)]
    em.fit_gmm_1d(
        x.view(-1) if source == "flat" else x, count, lengths, *given, options["covariance_type"], 1e-3, 1e-6, 1,
        options["precision"], k, init, n_init,
    )  # fmt: skip


def fit_candidates(
    width: int = 45, dtype: torch.dtype = torch.float32, covariance_type: str = "diag", precision: str = "float64"
) -> None:
    loss, count = torch.zeros(3, width, dtype=dtype), torch.ones(3, dtype=torch.int64)
    fit = empty_fit(loss, 3, precision)
    assignment, score = torch.zeros(3, width, dtype=torch.bool), torch.zeros(3, width, dtype=fit[0].dtype)
    em.launch_fit(loss, count, fit, covariance_type, assignment=assignment, score=score)


def reassign_batch(
    width: int = 45,
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int64,
    weights: torch.dtype = torch.float32,
    covariance_type: str = "diag",
    precision: str = "float64",
    separation: str = "mmdet",
    singleton: str = "background",
) -> None:
    """The kernels of the usual reassignment, for rows of this width."""
    inds, label_weight = torch.zeros(width, dtype=index), torch.zeros(width, dtype=weights)
    columns = (
        torch.zeros(width, dtype=dtype),
        torch.zeros(width, dtype=torch.int64),
        label_weight,
        label_weight[:, None].expand(-1, 4),
    )
    options = 80, width, covariance_type, separation, singleton, precision
    reassign.paa_reassign_batch(*([tensor] for tensor in (*columns, inds, inds)), [width], [3], *options)


def select(dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int64, levels: int = 5) -> None:
    losses, inds = torch.zeros(9, dtype=dtype), torch.zeros(9, dtype=index)
    topk.select(topk.gather_batch([losses], [inds], [inds], [9] * levels, [3], 9), 9, losses)


def write(dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int64) -> None:
    targets = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=dtype), torch.zeros(9, 4, dtype=dtype)
    inds, masks = torch.zeros(9, dtype=index), torch.zeros(2, 3, dtype=torch.bool)
    reassign.write_targets(*([t] for t in targets), [inds], torch.zeros(2, 3, dtype=torch.int64), masks, masks, 80)


def vote(
    dtype: torch.dtype = torch.float32,
    scores: torch.dtype = torch.float32,
    label: torch.dtype = torch.int64,
    images: int = 1,
    stride: int = 1,
    keep_order: bool = False,
    pools: int = 0,
) -> None:
    det, boxes = torch.zeros(3, 5, stride, dtype=dtype)[..., 0], torch.zeros(9, 4, stride, dtype=dtype)[..., 0]
    columns = det, torch.zeros(3 * stride, dtype=label)[::stride], boxes, torch.zeros(9, 4, stride, dtype=scores)[..., 0]
    lists = [[tensor] * images * (max(pools, 1) if place > 1 else 1) for place, tensor in enumerate(columns)]
    voting.score_voting(*lists, 0.05, 0.01, 0.025, 0.0, keep_order, [0.5] * pools or None)


def score(
    maps: torch.dtype = torch.float32,
    targets: torch.dtype = torch.float32,
    index: torch.dtype = torch.int64,
    levels: int = 5,
    stride: int = 1,
    box_loss: str = "giou",
    gamma: float = 2.0,
    sparse: bool = False,
) -> None:
    def spread(*shape: int, dtype: torch.dtype = targets) -> torch.Tensor:
        return torch.zeros(*shape, stride, dtype=dtype)[..., 0]

    scores, deltas = (spread(1, channels, 3, 3, dtype=maps) for channels in (9, 4))
    inds, label = spread(9 * levels if sparse else 5, dtype=index), spread(9 * levels, dtype=torch.int64)
    targets_of = [label], [spread(9 * levels)], [spread(9 * levels, 4)], [spread(9 * levels, 4)]
    options = gamma, 0.25, 1.0, 1.3, [0.1, 0.1, 0.2, 0.2], 0.016, box_loss, "mmdet"
    losses.candidate_losses([spread(9, 4)] * levels, [scores] * levels, [deltas] * levels, *targets_of, [inds], *options)


def match(
    dtype: torch.dtype = torch.float32,
    stride: int = 1,
    full: bool = True,
    match: bool = True,
    match_all: bool = True,
    low_quality: str = "gt",
) -> None:
    boxes, flags = torch.zeros(9, 4, stride, dtype=dtype)[..., 0], [torch.ones(9, dtype=torch.bool)]
    assign.assign_max_iou(
        [boxes], [boxes], [boxes] * full, flags * full, False, 0.1, 0.1, 0.0, 0.5, 1e-6, match, match_all, low_quality
    )


def read(
    what: str = "predict_proba",
    components: int = 2,
    width: int = 45,
    dtype: torch.dtype = torch.float32,
    precision: torch.dtype = torch.float64,
    source: str = "rows",
) -> None:
    x, parameter = torch.zeros(3, width, dtype=dtype), torch.ones(3, components, dtype=precision)
    count = torch.ones(3, dtype=torch.int64) if source == "count" else None
    lengths = [width] * 3 if source == "flat" else None
    mixture.read_mixture(x.flatten() if lengths else x, count, lengths, parameter, parameter, parameter, what)


def suppress(
    dtype: torch.dtype = torch.float32,
    scores: torch.dtype = torch.float32,
    label: torch.dtype | None = None,
    method: str = "hard",
    stride: int = 1,
    boxes: int = 40,
    lists: bool = False,
    pre: int = 9,
    threshold: float | None = 0.1,
    classes: int = 80,
) -> None:
    """So many classes without labels."""
    shape = (boxes,) if lists else (2, boxes)
    columns = torch.zeros(*shape, 4, stride, dtype=dtype), torch.zeros(*shape, 1 if label else classes, stride, dtype=scores)
    labels = torch.zeros(*shape, stride, dtype=label)[..., 0] if label else None
    lengths = [boxes] if lists else None
    nms.batched_nms(*(c[..., 0] for c in columns), labels, lengths, 0.5, threshold, pre, 7, method, 0.5, 1e-3, False)


def fuse(
    dtype: torch.dtype = torch.float32,
    scores: torch.dtype = torch.float32,
    label: torch.dtype = torch.int64,
    conf_type: str = "avg",
    overflow: bool = False,
    boxes: int = 40,
) -> None:
    """Three models of two images."""
    columns = torch.zeros(6 * boxes, 4, dtype=dtype), torch.zeros(6 * boxes, dtype=scores), torch.zeros(6 * boxes, dtype=label)
    fusion.weighted_boxes_fusion(*columns, [boxes] * 6, [1.0] * 3, 0.5, 0.1, conf_type, overflow)


def product(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: The launch rule: one warp, one tile of 8 and of 16 warps, several tiles.
WIDTHS = (45, 500, 1000, 1500)

#: Compiled in every run; the rest belongs to the long one.
USUAL = {
    "fit_rows": [
        {},
        {"width": 1000, "covariance_type": "tied", "dtype": torch.float64},
        {"width": 1500, "source": "flat"},
        {"precision": "float32", "source": "count", "inits": True},
        {"init": "kmeans"},
        {"k": 3, "init": "random", "n_init": 2, "inits": True},
        {"k": 8, "init": "kmeans", "precision": "float32", "covariance_type": "tied"},
        {"precision": "mixed"},
        {"width": 50_000, "init": "kmeans"},
        {"width": 50_000, "k": 8, "init": "quantile", "inits": True, "precision": "float32"},
    ],
    "fit_candidates": [{}],
    "reassign_batch": [
        {},
        {"separation": "b", "singleton": "positive", "width": 500, "index": torch.int32, "weights": torch.bfloat16},
        {"separation": "b", "width": 1500, "precision": "float32"},
        {"separation": "b", "precision": "mixed"},
    ],
    "select": [{}, {"dtype": torch.float64, "index": torch.int32}],
    "write": [{}, {"dtype": torch.bfloat16, "index": torch.int32}],
    "vote": [
        {},
        {"pools": 2},
        {"dtype": torch.bfloat16, "scores": torch.float64, "label": torch.int32, "images": 2, "stride": 2},
    ],
    "score": [{}, {"maps": torch.float64, "targets": torch.bfloat16, "index": torch.int32, "levels": 2, "stride": 2}],
    "match": [{}, {"dtype": torch.float16, "stride": 2, "match": False}],
    "read": [
        {},
        {"what": "log_likelihood", "components": 3, "width": 1500, "source": "flat"},
        {"what": "low_probability", "dtype": torch.float64},
    ],
    "fuse": [{}, {"dtype": torch.float64, "scores": torch.bfloat16, "conf_type": "absent_model_aware_avg", "boxes": 10}],
    "suppress": [
        {"boxes": 5000, "classes": 1203},
        {"dtype": torch.float64, "scores": torch.bfloat16, "label": torch.int32, "method": "gaussian", "stride": 2, "boxes": 500},
    ],
}
INDICES, STRIDES = (torch.int32, torch.int64), (1, 2)
ALL = {
    "fit_rows": [
        *product(width=WIDTHS, precision=("float64", "float32"), covariance_type=("diag", "tied"), dtype=FLOATS[2:]),
        *product(dtype=FLOATS, source=("rows", "count", "flat"), inits=(False, True)),
        *product(width=(45, 1500, 50_000), k=(1, 2, 3, 8), init=INITS, precision=("float64", "float32")),
    ],
    "fit_candidates": [*product(width=WIDTHS, precision=("float64", "float32"), covariance_type=("diag", "tied"))],
    "reassign_batch": [
        *product(width=WIDTHS, precision=("float64", "float32"), separation=tuple(SCHEMES)),
        *product(separation=tuple(SCHEMES), singleton=("positive",), precision=("float64", "mixed")),
        *product(dtype=FLOATS, index=INDICES, weights=FLOATS),
    ],
    "select": [*product(dtype=FLOATS, index=INDICES), *product(levels=(1, 9, 17))],
    "write": [*product(dtype=FLOATS, index=INDICES)],
    "vote": [
        *product(dtype=FLOATS, scores=FLOATS),
        *product(dtype=FLOATS, images=(1, 2), stride=STRIDES),
        *product(label=INTEGERS, keep_order=(False, True)),
        *product(dtype=FLOATS, scores=FLOATS, stride=STRIDES, pools=(3,)),
    ],
    "score": [
        *product(maps=FLOATS, targets=FLOATS),
        *product(levels=(1, 3, 9), stride=STRIDES),
        *product(maps=FLOATS[2:], index=INDICES, stride=STRIDES),
        *product(box_loss=("giou", "l1"), gamma=(1.5, 2.0), sparse=(False, True)),
    ],
    "read": [
        *product(what=READOUTS, components=(1, 2, 8), source=("rows", "count", "flat")),
        *product(what=READOUTS, dtype=FLOATS, precision=FLOATS[2:]),
        *product(what=READOUTS, width=WIDTHS),
    ],
    "fuse": [
        *product(dtype=FLOATS, scores=FLOATS),
        *product(label=INTEGERS, boxes=(10, 40)),
        *product(conf_type=CONF_TYPES, overflow=(False, True), boxes=(10, 40)),
    ],
    "suppress": [
        *product(dtype=FLOATS, scores=FLOATS),
        *product(method=("hard", "linear", "gaussian"), boxes=(40, 500, 5000), dtype=FLOATS[2:]),
        *product(label=INTEGERS, lists=(False, True)),
        *product(classes=(365, 600, 4096), dtype=FLOATS[2:]),
        *product(method=("hard", "linear"), pre=(0, 9), threshold=(None, 0.1), stride=STRIDES),
    ],
    "match": [
        *product(dtype=FLOATS, stride=STRIDES),
        *product(full=(False, True), match=(False, True), match_all=(False, True), low_quality=("gt", "anchor")),
    ],
}
LAUNCHES: dict[str, Callable[..., None]] = {
    "fit_rows": fit_rows,
    "fit_candidates": fit_candidates,
    "reassign_batch": reassign_batch,
    "select": select,
    "write": write,
    "vote": vote,
    "score": score,
    "match": match,
    "read": read,
    "suppress": suppress,
    "fuse": fuse,
}
#: Kernels of one warp have nothing to share; so do the fits of rows of up to 64 values.
ONE_WARP = ("_select_kernel", "_fit_rows_kernel", "_fit_candidates_kernel", "_losses_kernel")


#: AMD: scalar registers that a kernel may keep in lanes of vector registers. The version of LLVM decides how many: up to 4 with Triton
#: 3.8, and up to 6 with 3.9, in one form of twenty. Nothing may lie in memory.
MOST_SCALAR_SPILLS = 6


def cases() -> list[Any]:
    chosen = [(launch, options, ()) for launch, some in USUAL.items() for options in some]
    chosen += [(launch, options, (pytest.mark.long,)) for launch, some in ALL.items() for options in some]
    return [
        pytest.param(
            target,
            launch,
            options,
            marks=marks if target in USUAL_TARGETS else pytest.mark.long,
            id="-".join(map(str, (target, launch, *options.values()))),
        )
        for target in TARGETS
        for launch, options, marks in chosen
        if target not in RELATIVES or not marks
    ]


@pytest.mark.parametrize(("target", "launch", "options"), cases())
def test_compiles(target: str, launch: str, options: dict[str, Any]) -> None:
    with compiling(TARGETS[target]) as compiled:
        LAUNCHES[launch](**options)
    assert compiled
    for kernel in compiled:
        usage = resources(kernel) if target in CUDA else spills(kernel)
        print(f"{target} {launch} {options}: {kernel.name}, {kernel.shared} bytes of shared memory, {usage}")
        if OLD_TRITON:  # some forms spill a few bytes, or share memory: slower, and right
            continue
        registers = usage.pop("registers", 0)
        assert usage.pop(".sgpr_spill_count", 0) <= MOST_SCALAR_SPILLS, kernel.name
        assert not any(usage.values()), (kernel.name, usage)
        assert target not in REGISTER_TARGETS or registers <= MOST_REGISTERS, (kernel.name, registers)
        assert kernel.shared == 0 or kernel.name not in ONE_WARP or options.get("width", 45) > 64, kernel.name


def resources(kernel: Compiled) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, which is where registers are spilled to, of NVIDIA machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "local"}
    return {names[kind]: int(number) for kind, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}


def spills(kernel: Compiled) -> dict[str, int]:
    """Spilled registers of AMD machine code, and its bytes of memory that only one thread uses.

    They are in the notes of the ELF file: a name, then a small MessagePack integer.
    """
    found = {}
    for kind in (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size"):
        at = kernel.binary.index(kind.encode()) + len(kind)
        found[kind] = kernel.binary[at]
    return found


def test_a_grid_has_room_for_many_boxes() -> None:
    """More tiles of boxes than a second dimension has room for."""
    number = 65_536 * fusion.order_rule()["ROWS"]
    boxes, scores, labels = torch.zeros(number, 4), torch.zeros(number), torch.zeros(number, dtype=torch.int64)
    with compiling(TARGETS["sm_90"]) as compiled:
        fusion.weighted_boxes_fusion(boxes, scores, labels, [number], [1.0], 0.5, 0.0, "avg", False)
    assert len(compiled) == 4


@pytest.mark.parametrize("source", ["rows", "flat"])
def test_rows_whose_positions_have_no_number_are_refused(source: str) -> None:
    """Memory that nobody touches costs nothing."""
    x = torch.zeros(1).expand(2**31)
    lengths = None if source == "rows" else [2**31]
    with (
        compiling(TARGETS["sm_90"]),
        pytest.raises(ValueError, match="`x` must have at most 2147418112 values in a row on a GPU"),
    ):
        em.fit_gmm_1d(x if lengths else x[None], None, lengths, None, None, None, "diag", 1e-3, 1e-6, 1, "float64")


def test_more_candidates_than_have_numbers_are_refused() -> None:
    boxes, scores = torch.zeros(1, 1, 4).expand(1, 2**31, 4), torch.zeros(1, 1, 1).expand(1, 2**31, 1)
    with pytest.raises(ValueError, match=r"`scores` must have fewer than 2\^31 scores per image on a GPU, got 2147483648"):
        nms.batched_nms(boxes, scores, None, None, 0.5, None, 0, 100, "hard", 0.5, 0.0, False)
    one_list = boxes[0], scores[0, :, 0], torch.zeros(1, dtype=torch.int64).expand(2**31)
    with pytest.raises(
        ValueError, match=r"`boxes` must have fewer than 2\^31 boxes over images of one length on a GPU, got 2147483648"
    ):
        fusion.weighted_boxes_fusion(*one_list, [2**31], [1.0], 0.5, 0.0, "avg", False)
