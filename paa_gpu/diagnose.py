"""`python -m paa_gpu check`: does everything work on this machine, and how long does it take?

`check` compares the CPU with the published loop, on the recordings of this machine. On a GPU, it compares every operation with
the CPU, on random input of every dtype and layout. It checks that nothing waits for the device. It replays captured graphs with
changed inputs, uses a busy stream, and repeats calls to see equal bits. It prints one table, and says what it could not check.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import (
    assign_max_iou,
    batched_nms,
    candidate_losses,
    data,
    fit_gmm_1d,
    paa_reassign_batch,
    reference,
    score_voting_batch,
    select_candidates,
    testing,
    weighted_boxes_fusion,
)

_cuda: Any = torch.cuda  # parts of it have no types

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: In a report: passed, failed, could not be checked here.
OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
#: Larger than any second-level cache, and the clock of no GPU is faster.
L2_BYTES, CYCLES_A_SECOND = 256 << 20, 3_000_000_000
#: Of a checkout's recordings: scikit-learn takes seconds for more.
RECORDINGS = 8
#: Where results need not be equal: voted boxes in pixels and losses by their value, in float32; parameters of a fit in float64.
PIXELS, LOSSES, PARAMETERS = 2.5e-4, 1e-6, 1e-9


class Operation(NamedTuple):
    """A public function with arguments for it on the CPU."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    relative: float = 0.0  #: Tolerance of floating results.
    absolute: float = 0.0


class Finding(NamedTuple):
    """A line of the report."""

    check: str
    device: str
    status: str
    detail: str


class Layout(NamedTuple):
    """A layout of a tensor in memory."""

    name: str
    of: Callable[[Tensor], Tensor]


LAYOUTS = (
    Layout("strided", lambda tensor: torch.stack([tensor, tensor], -1)[..., 0]),
    Layout(
        "offset", lambda tensor: torch.cat([tensor, tensor, tensor])[len(tensor) : 2 * len(tensor)] if tensor.dim() else tensor
    ),
    Layout("transposed", lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor),
)


def operations(seed: int = 0) -> list[Operation]:
    """Every operation on random input; another seed gives other values of the same shapes."""
    shapes = np.random.default_rng(0)  # sizes are drawn from this one, whatever the seed
    batch = testing.make_batch([0, 7, 1, 40, 3], shapes, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    losses = [losses * torch.from_numpy(rng.uniform(0.5, 2, losses.shape)).to(losses) for losses in batch.pos_losses]
    predictions = testing.make_predictions([(30, 900), (0, 5), (40, 600)], rng, num_classes=4)
    head = testing.make_head_batch([60, 0, 33], rng)
    anchors = testing.make_anchors([(25, 40), (13, 20)])
    boxes = [testing.make_boxes(number, (320, 200), rng) for number in (9, 0, 30)]
    rows = torch.from_numpy(rng.gamma(2.0, 1.0, (200, 45)))
    first = 3  # the image of `batch` with the most boxes

    def reassign(*columns: Any) -> Any:
        arguments: Any = (*columns, batch.anchors)
        return paa_reassign_batch(*arguments, **batch.options)

    def decide(*columns: Any) -> Any:
        arguments: Any = (*columns, batch.anchors)
        got = paa_reassign_batch(*arguments, **batch.options, precision="mixed")
        return (*got[:4], got.fit.n_iter, got.fit.converged, got.fit.valid, *got[5:])  # all but the parameters of the fits

    def select(*tensors: Any) -> Any:
        arguments: Any = (*tensors, batch.anchors[first])
        return select_candidates(*arguments, num_gt=batch.num_gts[first])

    def vote(*columns: Any) -> Any:
        arguments: Any = (*columns, 0.05)
        return score_voting_batch(*arguments)

    def suppress(*columns: Any) -> Any:
        arguments: Any = (*columns, None, 0.5)
        return batched_nms(*arguments, score_thr=0.05, max_per_img=50)

    image = (losses[first], batch.pos_inds[first], batch.pos_gt_inds[first])
    return [
        Operation("paa_reassign_batch", reassign, (losses, *batch[1:6]), PARAMETERS, PARAMETERS),
        Operation("select_candidates", select, image),
        Operation("fit_gmm_1d", fit_gmm_1d, (rows,), PARAMETERS, PARAMETERS),
        Operation("score_voting_batch", vote, tuple(predictions), 0.0, PIXELS),
        Operation("candidate_losses", candidate_losses, tuple(head), LOSSES),
        Operation("assign_max_iou", assign_max_iou, (anchors, boxes)),
        Operation("batched_nms", suppress, (predictions.mlvl_bboxes, predictions.mlvl_nms_scores)),
        Operation("weighted_boxes_fusion", weighted_boxes_fusion, _several_models(rng)),
        Operation("mixed_precision", decide, (losses, *batch[1:6])),
    ]


def _several_models(rng: np.random.Generator) -> tuple[Any, ...]:
    """Boxes, scores and labels of three models, for each of two images."""
    corner = rng.uniform(0, 0.9, (2, 3, 150, 2))
    parts = np.concatenate([corner, corner + 0.1], 3), rng.random((2, 3, 150)), rng.integers(4, size=(2, 3, 150))
    return tuple([list(torch.from_numpy(image)) for image in part] for part in parts)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with other tensors, in lists and tuples too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map_tensors(function, item) for item in value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same value with floating tensors of this dtype."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def difference(got: Any, wanted: Any, operation: Operation) -> str | None:
    """The difference of two results, or None. Integers and masks must be equal, floats within the operation's tolerance."""
    pairs = list(zip(leaves(got), leaves(wanted), strict=True))
    for place, (a, b) in enumerate(pairs):
        relative, absolute = (operation.relative, operation.absolute) if b.is_floating_point() else (0.0, 0.0)
        if b.dtype in (torch.float16, torch.bfloat16) and (relative or absolute):
            relative = absolute = 2048 * torch.finfo(b.dtype).eps
        try:
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=relative, atol=absolute, equal_nan=True)
        except AssertionError as error:
            return f"result {place + 1} of {len(pairs)}: " + " ".join(str(error).split())[:160]
    return None


class Cuda:
    """The functions of a GPU. A test replaces this class with a stand-in."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.name = _cuda.get_device_name(self.device)

    def move(self, value: Any) -> Any:
        """Copies on the device with the same layout as the originals."""
        return map_tensors(self._move, value)

    def _move(self, tensor: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(self.device)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def wait(self) -> None:
        _cuda.synchronize(self.device)

    @contextlib.contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """A context in which a wait for the device raises an error."""
        before = _cuda.get_sync_debug_mode()
        _cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            _cuda.set_sync_debug_mode(before)

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The result of a captured call, and what replays it."""
        with _cuda.device(self.device):
            stream = _cuda.Stream()
            stream.wait_stream(_cuda.current_stream())
            with _cuda.stream(stream):
                call()
            _cuda.current_stream().wait_stream(stream)
            graph = _cuda.CUDAGraph()
            with _cuda.graph(graph, stream=stream):  # else the stream of an earlier capture, perhaps of another device
                result = call()
        return result, graph.replay

    def beside_a_busy_stream(self, call: Callable[[], Any], prepare: Callable[[], None]) -> tuple[Any, bool]:
        """The call's result on a separate, busy stream, and whether the stream still was busy when the call had returned.

        `prepare` is the last work on the stream before the call. An earlier call takes the memory that the stream needs: to get
        memory from the driver may wait.
        """
        stream = _cuda.Stream(self.device)
        with _cuda.stream(stream):
            call()
            stream.synchronize()
            _cuda._sleep(500_000_000)
            prepare()
            result = call()
        busy = not stream.query()
        stream.synchronize()
        return result, busy

    def seconds(self, call: Callable[[], Any], repeats: int = 30) -> tuple[float, float]:
        """Medians of a warm call's time between two events on the device, and on the host that launches it.

        Before each call, the device is kept busy for longer than the host needs. So it does not wait for the host. Its writes in
        this time push the inputs out of its caches.
        """
        with _cuda.device(self.device):
            return self._seconds(call, repeats)

    def _seconds(self, call: Callable[[], Any], repeats: int) -> tuple[float, float]:
        on_device, on_host = [], [self._host_seconds(call) for _ in range(3)][1:]
        large = torch.empty(L2_BYTES, dtype=torch.uint8, device=self.device)
        for _ in range(repeats):
            start, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
            _cuda._sleep(int(CYCLES_A_SECOND * 3 * max(on_host)))
            large.zero_()
            start.record()
            on_host.append(self._host_seconds(call))
            end.record()
            end.synchronize()
            on_device.append(start.elapsed_time(end) / 1e3)
        return statistics.median(on_device), statistics.median(on_host)

    @staticmethod
    def _host_seconds(call: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun


# --- the checks -----------------------------------------------------------------------------------------------------------------


def _judge(problems: list[str], passed: str) -> tuple[str, str]:
    return (FAILED, "; ".join(problems[:3])) if problems else (OK, passed)


def check_reassignment() -> Finding:
    """The CPU against the published loop with scikit-learn, on recordings."""
    name, problems, paths = "reassignment against scikit-learn", [], data.paths()[:RECORDINGS]
    if not importlib.util.find_spec("sklearn"):
        return Finding(name, "cpu", NOT_CHECKED, "scikit-learn is not installed")
    for path in paths:
        call = data.load(path)
        columns: Any = [*([argument] for argument in call.arguments[:6]), call.anchors]
        got = paa_reassign_batch(*columns, num_classes=call.num_classes, num_gts=[call.num_gt])
        wanted = reference.paa_reassign(*call.arguments, num_classes=call.num_classes)
        targets = [*got.label, *got.label_weight, *got.bbox_weight]
        if not all(map(torch.equal, targets, wanted[:3])) or int(got.num_pos) != wanted[3]:
            problems.append(f"{call.name} differs")
    return Finding(name, "cpu", *_judge(problems, f"{len(paths)} recorded images equal"))


def check_voting() -> Finding:
    """The CPU against the published loop, on recordings."""
    problems, worst = [], 0.0
    calls = [data.load_voting(path)[0] for path in data.voting_paths()[:RECORDINGS]]
    for call in calls:
        columns: Any = [*([argument] for argument in call.arguments[:4]), call.score_thr]
        voted, labels = score_voting_batch(*columns)
        wanted, wanted_labels = reference.score_voting(*call.arguments)
        worst = max(worst, float((voted[0] - wanted).abs().max())) if len(wanted) else worst
        if worst > PIXELS or not torch.equal(labels[0], wanted_labels):
            problems.append(f"{call.name} differs")
    passed = f"{len(calls)} recorded calls within {worst:.0e} pixels"
    return Finding("score voting against the published loop", "cpu", *_judge(problems, passed))


def check_layouts(operation: Operation) -> Finding:
    """The CPU on input of other layouts: the same bits."""
    wanted = operation.run(*operation.arguments)
    exact = operation._replace(relative=0.0, absolute=0.0)
    problems = []
    for layout in LAYOUTS:
        problem = difference(operation.run(*map_tensors(layout.of, operation.arguments)), wanted, exact)
        problems += [f"{layout.name}: {problem}"] if problem else []
    return Finding(f"{operation.name}, layouts", "cpu", *_judge(problems, f"{len(LAYOUTS)} layouts, equal bits"))


def check_repetitions(operation: Operation, repeats: int) -> Finding:
    """The CPU, again and again."""
    problem = repetition(operation, operation.arguments, repeats)
    name = f"{operation.name}, repetitions"
    return Finding(name, "cpu", *_judge([problem] if problem else [], f"{repeats} times, equal bits"))


def repetition(operation: Operation, arguments: Any, repeats: int) -> str | None:
    """How another call differs from the first one; None if all give the same bits."""
    wanted = [tensor.clone() for tensor in leaves(operation.run(*arguments))]
    exact = operation._replace(relative=0.0, absolute=0.0)
    for _ in range(repeats):
        if problem := difference(list(leaves(operation.run(*arguments))), wanted, exact):
            return problem
    return None


class NothingShownError(Exception):
    """A check could not be made: it says why."""


class DeviceChecks:
    """The checks of one operation on a device. Each method returns what is wrong, or None. `NothingShownError`: neither.

    `other` is the same operation on other values of the same shapes.
    """

    def __init__(self, operation: Operation, other: Operation, cuda: Any, repeats: int) -> None:
        self.operation, self.other, self.cuda, self.repeats = operation, other, cuda, repeats

    def _inputs(self) -> Any:
        return self.cuda.move(self.operation.arguments)

    def _inputs_and_change(self) -> tuple[Any, Callable[[], None]]:
        """Inputs, and what writes those of the other operation into them, in place. It does not wait: all is on the device."""
        inputs, others = self._inputs(), self.cuda.move(self.other.arguments)

        def change() -> None:
            for tensor, source in zip(leaves(inputs), leaves(others), strict=True):
                tensor.copy_(source)

        return inputs, change

    def _is_changed(self, result: Any) -> str | None:
        return difference(result, self.other.run(*self.other.arguments), self.operation)

    def results(self) -> str | None:
        """Every dtype and layout gives the result of the CPU."""
        for dtype in DTYPES:
            arguments = cast(self.operation.arguments, dtype)
            wanted = self.operation.run(*arguments)
            for layout in (Layout("contiguous", lambda tensor: tensor), *LAYOUTS):
                got = self.operation.run(*self.cuda.move(map_tensors(layout.of, arguments)))
                if problem := difference(got, wanted, self.operation):
                    return f"{dtype} {layout.name}: {problem}"
        return None

    def waiting(self) -> str | None:
        """Nothing waits for the device, after a first call that compiles."""
        inputs = self._inputs()
        self.operation.run(*inputs)
        with self.cuda.nothing_waits():
            self.operation.run(*inputs)
        return None

    def captured_graph(self) -> str | None:
        """A replay with changed inputs gives their result."""
        inputs, change = self._inputs_and_change()
        result, replay = self.cuda.capture(lambda: self.operation.run(*inputs))
        change()
        for _ in range(3):
            replay()
        self.cuda.wait()
        return self._is_changed(result)

    def busy_stream(self) -> str | None:
        """The call sees the earlier work of its stream."""
        inputs, change = self._inputs_and_change()
        self.cuda.wait()
        got, busy = self.cuda.beside_a_busy_stream(lambda: self.operation.run(*inputs), change)
        problem = self._is_changed(got)
        if problem is None and not busy:
            raise NothingShownError("the stream was not busy until the call returned")
        return problem

    def repetitions(self) -> str | None:
        """Equal bits every time."""
        return repetition(self.operation, self._inputs(), self.repeats)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"


def check_device(operation: Operation, other: Operation, cuda: Any, repeats: int) -> Iterator[Finding]:
    """Check one operation on the device; see `DeviceChecks`."""
    checks = DeviceChecks(operation, other, cuda, repeats)
    for run in (checks.results, checks.waiting, checks.captured_graph, checks.busy_stream, checks.repetitions):
        name = f"{operation.name}, {run.__name__.replace('_', ' ')}"
        try:
            problem = run()
        except NothingShownError as reason:
            yield Finding(name, str(cuda.device), NOT_CHECKED, str(reason))
            continue
        except Exception as error:  # whatever a device raises belongs in the report
            problem = _said(error)
        yield Finding(name, str(cuda.device), FAILED if problem else OK, problem or (run.__doc__ or "").rstrip("."))


def check(cuda: Any = None, repeats: int = 1000) -> Iterator[Finding]:
    """All findings for the CPU and, with `cuda`, for this device. There, `repeats` calls must give equal bits."""
    yield check_reassignment()
    yield check_voting()
    usual, other = operations(0), operations(1)
    for operation in usual:
        yield check_layouts(operation)
        yield check_repetitions(operation, 20)
    if cuda is None:
        yield Finding("kernels on a GPU", "cuda", NOT_CHECKED, "torch finds no CUDA device here")
        return
    for operation, changed in zip(usual, other, strict=True):
        yield from check_device(operation, changed, cuda, repeats)


def times(cuda: Any = None) -> Iterator[tuple[str, ...]]:
    """Medians of each operation: on the CPU, and on the device and the host that launches it."""
    for operation in operations():
        taken = []
        for _ in range(10):
            start = time.perf_counter()
            operation.run(*operation.arguments)
            taken.append(time.perf_counter() - start)
        row = [operation.name, f"{statistics.median(taken) * 1e3:.3f} ms"]
        if cuda is not None:
            there = cuda.move(operation.arguments)
            row += [f"{seconds * 1e6:.0f} us" for seconds in cuda.seconds(lambda: operation.run(*there))]  # noqa: B023
        yield tuple(row)


def _print_row(cells: Iterable[str]) -> None:
    """Of a table in Markdown, to paste into a report. Whatever ends the process, the rows before are there."""
    print("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |", flush=True)


def _print_header(*cells: str) -> None:
    _print_row(cells)
    _print_row("---" for _ in cells)


def run_check(device: str | None = None, repeats: int = 1000) -> int:
    """Print the report; 1 if something failed, else 0."""
    cuda = Cuda(device or "cuda") if torch.cuda.is_available() and device != "cpu" else None
    start, count = time.perf_counter(), dict.fromkeys((OK, FAILED, NOT_CHECKED), 0)
    _print_header("check", "device", "status", "detail")
    for finding in check(cuda, repeats):
        _print_row(finding)
        count[finding.status] += 1
    print()
    _print_header("median time", "CPU", *((cuda.name, "host that launches") if cuda else ()))
    try:
        for row in times(cuda):
            _print_row(row)
    except Exception as error:  # of a device that has failed before
        print(f"\nThe times {FAILED}: {_said(error)}")
        count[FAILED] += 1
    spent = time.perf_counter() - start
    print(f"\n{count[OK]} checks passed, {count[FAILED]} failed, {count[NOT_CHECKED]} could not be made here; {spent:.0f} s")
    return int(count[FAILED] > 0)
