"""The report of `python -m paa_gpu check`: what it says without a GPU, and, on a stand-in for one, that each check can fail."""

from __future__ import annotations

import contextlib
import io
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import paa_gpu
from paa_gpu import __main__, diagnose
from paa_gpu.diagnose import FAILED, NOT_CHECKED, OK


class StandIn:
    """The CPU, asked as a GPU is."""

    device, name = torch.device("cpu"), "stand-in"

    def move(self, value):
        return diagnose.map_tensors(lambda tensor: tensor.clone(), value)

    def wait(self):
        pass

    @contextlib.contextmanager
    def nothing_waits(self):
        yield

    def capture(self, call):
        result = call()

        def replay():
            for tensor, new in zip(diagnose.leaves(result), diagnose.leaves(call()), strict=True):
                tensor.copy_(new)

        return result, replay

    def beside_a_busy_stream(self, call, prepare):
        prepare()
        return call(), True

    def seconds(self, call, repeats=2):
        call()
        return 1e-4, 2e-5


@pytest.fixture(scope="module")
def two():
    return diagnose.operations(0), diagnose.operations(1)


def check(cuda, operation, other):
    return {finding.check.partition(", ")[2]: finding for finding in diagnose.check_device(operation, other, cuda, 2)}


@pytest.mark.parametrize(
    "place", [pytest.param(0, marks=pytest.mark.slow), 1, 2, pytest.param(3, marks=pytest.mark.slow), 4, 5, 6, 7]
)
def test_all_passes_where_nothing_is_broken(two, place):
    findings = check(StandIn(), two[0][place], two[1][place])
    assert list(findings) == ["results", "waiting", "captured graph", "busy stream", "repetitions"]
    assert [finding.status for finding in findings.values()] == [OK] * 5, findings


class WrongValues(StandIn):
    def move(self, value):
        return diagnose.map_tensors(lambda tensor: tensor + 1 if tensor.is_floating_point() else tensor.clone(), value)


class Waits(StandIn):
    @contextlib.contextmanager
    def nothing_waits(self):
        raise RuntimeError("called a synchronizing CUDA operation")
        yield


class KeepsAddresses(StandIn):
    """A graph that does not see changed inputs."""

    def capture(self, call):
        return call(), lambda: None


class Overtakes(StandIn):
    """A call that does not queue behind its stream."""

    def beside_a_busy_stream(self, call, prepare):
        result = call()
        prepare()
        return result, True


class Waiting(StandIn):
    """A call that returns when its stream has done everything. Perhaps the driver had to give it memory."""

    def beside_a_busy_stream(self, call, prepare):
        return super().beside_a_busy_stream(call, prepare)[0], False


@pytest.mark.parametrize(
    ("cuda", "broken"),
    [
        (WrongValues, "results"),
        (Waits, "waiting"),
        (KeepsAddresses, "captured graph"),
        (Overtakes, "busy stream"),
    ],
)
def test_each_check_can_fail(two, cuda, broken):
    operation, other = two[0][4], two[1][4]
    findings = check(cuda(), operation, other)
    assert findings[broken].status == FAILED and findings[broken].detail
    if cuda is not WrongValues:
        assert [name for name, finding in findings.items() if finding.status == FAILED] == [broken]


def test_a_stream_that_was_not_busy_shows_nothing(two):
    finding = check(Waiting(), two[0][4], two[1][4])["busy stream"]
    assert (finding.status, finding.detail) == (NOT_CHECKED, "the stream was not busy until the call returned")


def test_repetitions_that_differ(two):
    calls = iter(range(100))
    zeros = (torch.zeros(3, dtype=torch.float64),)
    drifting = two[0][2]._replace(run=lambda x: x + next(calls) * 1e-16, arguments=zeros)
    finding = diagnose.check_repetitions(drifting, 3)
    assert finding.status == FAILED and "result 1 of 1" in finding.detail
    calls = iter(range(100))
    assert "result 1 of 1" in diagnose.DeviceChecks(drifting, drifting, StandIn(), 3).repetitions()


def test_layouts_that_differ(two):
    careless = two[0][2]._replace(run=lambda x: torch.tensor(x.storage_offset() + x.stride(0)))
    assert diagnose.check_layouts(careless).status == FAILED


class Torch:
    """A stand-in for `torch.cuda`, which writes down what the current device is asked to do."""

    def __init__(self):
        self.done, self.current = [], "cuda:0"

    def get_device_name(self, device):
        return str(device)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(stream.device):
            yield

    @contextlib.contextmanager
    def graph(self, graph, stream):
        with self.stream(stream):
            self.ask("capture")
            yield

    def ask(self, what):
        self.done.append((what, self.current))

    def _sleep(self, cycles):
        assert cycles > 0
        self.ask("sleep")

    def Stream(self, device=None):
        return Stream(self, str(device or self.current))

    def current_stream(self):
        return Stream(self, self.current)

    def CUDAGraph(self):
        return Stream(self, self.current)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Stream(NamedTuple):
    """Also a graph."""

    torch: Torch
    device: str

    def wait_stream(self, other):
        assert self.device == other.device

    def query(self):
        return False

    def synchronize(self):
        pass

    replay = synchronize


class Event(NamedTuple):
    torch: Torch

    def record(self):
        self.torch.ask("event")

    def synchronize(self):
        self.torch.ask("wait")

    def elapsed_time(self, end):
        return 3.0


@pytest.fixture
def stand_in(monkeypatch):
    cuda = Torch()
    monkeypatch.setattr(diagnose, "_cuda", cuda)
    return cuda


def test_a_time_on_the_device_begins_behind_work_and_a_flushed_cache(monkeypatch, stand_in):
    """The order of what a GPU is asked to do. It need not be the current one."""
    memory, flush = torch.empty(0), SimpleNamespace(zero_=lambda: stand_in.ask("flush"))
    monkeypatch.setattr(diagnose.torch, "empty", lambda size, **_: flush if size == diagnose.L2_BYTES else memory)
    on_device, on_host = diagnose.Cuda("cuda:1").seconds(lambda: stand_in.ask("call"), repeats=2)
    assert on_device == 3e-3 and 0 < on_host < 1e-2
    wanted = ["call"] * 3 + ["sleep", "flush", "event", "call", "event", "wait"] * 2
    assert stand_in.done == [(what, "cuda:1") for what in wanted]


def test_graphs_and_streams_are_those_of_the_device(stand_in):
    """Also where another device is the current one."""
    cuda = diagnose.Cuda("cuda:1")
    cuda.capture(lambda: stand_in.ask("call"))[1]()
    _, busy = cuda.beside_a_busy_stream(lambda: stand_in.ask("call"), lambda: stand_in.ask("prepare"))
    assert busy
    assert stand_in.done == [(what, "cuda:1") for what in ("call", "capture", "call", "call", "sleep", "prepare", "call")]
    assert stand_in.current == "cuda:0"


@pytest.mark.slow
def test_the_report(capsys, monkeypatch):
    """Without a GPU: the CPU's findings, and what could not be checked; 1 if something fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnose, "RECORDINGS", 2)
    assert __main__.main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "| kernels on a GPU | cuda | not checked | torch finds no CUDA device here |" in printed
    passed = printed.count("| ok |")
    assert passed > 10 and f"{passed} checks passed, 0 failed, 1 could not be made here" in printed
    assert "2 recorded images equal" in printed
    for operation in diagnose.operations():
        assert printed.count(f"| {operation.name}") == 3  # layouts, repetitions, times
    monkeypatch.setattr(diagnose, "PIXELS", -1.0)
    assert diagnose.run_check() == 1
    assert "| score voting against the published loop | cpu | FAILED |" in capsys.readouterr().out


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(diagnose.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(diagnose, "RECORDINGS", 1)
    first = diagnose.check_reassignment()
    assert (first.status, first.detail) == (NOT_CHECKED, "scikit-learn is not installed")


class Fails(StandIn):
    """A device after an illegal access: nothing works any more."""

    def move(self, value):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def test_a_device_that_has_failed_is_in_the_report(two, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnose, "Cuda", lambda device: Fails())
    monkeypatch.setattr(diagnose, "check", lambda cuda, repeats: diagnose.check_device(two[0][4], two[1][4], cuda, repeats))
    assert diagnose.run_check() == 1
    printed = capsys.readouterr().out
    said = "RuntimeError: CUDA error: an illegal memory access"
    assert printed.count(f"| cpu | FAILED | {said} was encountered |") == 5
    assert f"The times FAILED: {said}" in printed
    assert "0 checks passed, 6 failed, 0 could not be made here" in printed


def test_rows_are_printed_as_they_come(monkeypatch):
    """What ends the process leaves the rows before."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))

    def check(cuda, repeats):
        yield diagnose.Finding("first", "cpu", OK, "equal")
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose, "check", check)
    with pytest.raises(KeyboardInterrupt):
        diagnose.run_check("cpu")
    assert b"| first | cpu | ok | equal |" in raw.getvalue()


def test_a_device_in_the_report(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnose, "Cuda", lambda device: StandIn())
    monkeypatch.setattr(diagnose, "check", lambda cuda, repeats: [diagnose.Finding("a | b", "cuda", OK, f"{repeats} times")])
    assert diagnose.run_check(repeats=7) == 0
    printed = capsys.readouterr().out
    assert (
        "| a / b | cuda | ok | 7 times |" in printed
        and "| stand-in | host that launches |" in printed
        and "| 100 us | 20 us |" in printed
    )


def test_the_mode_in_which_waits_are_errors_ends_as_it_began(monkeypatch):
    modes = ["warn"]
    fake = SimpleNamespace(get_sync_debug_mode=lambda: modes[-1], set_sync_debug_mode=modes.append)
    monkeypatch.setattr(diagnose, "_cuda", fake)
    with diagnose.Cuda.nothing_waits(None):
        assert modes[-1] == "error"
    assert modes[-1] == "warn"


@pytest.mark.parametrize(("dtype", "change"), [(torch.float16, 1e-3), (torch.float64, 1e-12)])
def test_layouts_have_equal_bits(two, dtype, change):
    def run(x):
        return torch.ones(4, dtype=dtype) + change * (x.stride(0) > 1 or x.storage_offset() > 0)

    assert diagnose.check_layouts(two[0][2]._replace(run=run, arguments=(torch.ones(4),))).status == FAILED


def test_a_copy_has_the_layout_of_the_original():
    cuda = object.__new__(diagnose.Cuda)
    cuda.device = torch.device("cpu")
    view = torch.arange(24.0)[4:].view(4, 5).mT
    copy = cuda.move(view)
    assert torch.equal(copy, view) and (copy.stride(), copy.storage_offset()) == (view.stride(), view.storage_offset())


def test_all_repetitions_run(two):
    calls = iter(range(100))
    late = two[0][2]._replace(run=lambda x: x + (next(calls) == 3), arguments=(torch.zeros(3),))
    assert diagnose.check_repetitions(late, 4).status == FAILED


@pytest.mark.parametrize("wrong", ["targets", "labels"])
def test_wrong_answers_on_recordings_are_found(monkeypatch, wrong):
    """Of the right number, and with the right boxes."""
    if wrong == "targets":
        name, check, function = "paa_reassign_batch", diagnose.check_reassignment, paa_gpu.paa_reassign_batch

        def change(result):
            return result._replace(label_weight=[2 * weight for weight in result.label_weight])
    else:
        name, check, function = "score_voting_batch", diagnose.check_voting, paa_gpu.score_voting_batch

        def change(result):
            return result[0], [labels + 1 for labels in result[1]]

    assert check().status == OK
    monkeypatch.setattr(diagnose, name, lambda *args, **options: change(function(*args, **options)))
    assert check().status == FAILED
