"""Threads, processes and forks: the same bits whatever runs them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import paa_gpu
from bench import threads as bench
from bench.threads import calls
from paa_gpu import _dispatch, _ops, testing
from paa_gpu.cpu import _loops, em, fusion, losses, nms, reassign, voting
from paa_gpu.cpu._compilation import CompilationNotice


@pytest.fixture
def two_threads():
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


def make():
    # Enough rows of every loop for more than one slice.
    return testing.make_batch([2100, 40, 0, 7, 1], np.random.default_rng(5), sizes=(2, 6))


OPERATIONS = list(calls(1, 30))


@functools.cache
def predictions():
    return testing.make_predictions([(300, 400), (5, 20), (0, 3)], np.random.default_rng(6), num_classes=3)


def bits(batch, separation="b"):
    """Everything a call returns, as bytes."""
    got = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, separation=separation)
    voted, labels = paa_gpu.score_voting_batch(*predictions(), 0.05)
    one, _ = paa_gpu.score_voting(*(column[0] for column in predictions()), 0.05)
    tensors = [
        *voted,
        *labels,
        one,
        *got.label,
        *got.label_weight,
        *got.bbox_weight,
        got.num_pos,
        *got.fit[:7],
        *got.positive,
        *got.ignored,
    ]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def as_bytes(value):
    """All tensors of a result."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return b"".join(map(as_bytes, value)) if isinstance(value, list | tuple) else b""


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_same_bits_if_threads_share_the_least_work(name, threads, two_threads, monkeypatch):
    call, handed_over = calls(5, 60)[name], count_slices(monkeypatch)
    for module in (_loops, em, losses, reassign):
        monkeypatch.setattr(module, "HANDING_OVER", 1e-9)
    for module in (fusion, losses, nms, voting):
        monkeypatch.setattr(module, "IN_PYTHON", 0.0)
    monkeypatch.setattr(losses, "PART", 16)
    torch.set_num_threads(1)
    wanted = as_bytes(call())
    assert not handed_over
    torch.set_num_threads(threads)
    assert all(as_bytes(call()) == wanted for _ in range(3))
    assert len(handed_over) >= 3


def count_slices(monkeypatch):
    """A list that grows with each slice that another thread gets."""
    handed_over = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            handed_over.append(args)
            return super().submit(*args)

    pool = Pool(16)
    monkeypatch.setattr(_loops, "_executor", lambda: pool)
    return handed_over


@pytest.mark.parametrize("name", OPERATIONS)
def test_threads_share_what_is_worth_it(name, two_threads, monkeypatch):
    """A few small images or rows are the work of one thread, many large ones are not."""
    handed_over = count_slices(monkeypatch)
    calls(4, 90)[name]()
    assert not handed_over
    calls(32, 1500)[name]()
    assert handed_over


def test_the_benchmark_leaves_the_threads_as_they_were(two_threads, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "IMAGES", (2,))
    monkeypatch.setattr(bench, "SIZES", (30,))
    bench.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert "threads" in first and [line.partition("  ")[0] for line in lines] == OPERATIONS
    assert torch.get_num_threads() == 2


def test_slices_cost_about_the_same(two_threads, monkeypatch):
    monkeypatch.setattr(_loops, "HANDING_OVER", 10.0)
    for costs, wanted in {
        (30.0, 30.0, 30.0, 30.0): [0, 2, 4],
        (10.0, 10.0, 10.0, 60.0): [0, 3, 4],
        (60.0, 40.0): [0, 1, 2],
        (95.0, 1.0, 1.0): [0, 3],  # the other thread would have nothing to do
        (9.0, 9.0): [0, 2],
        (): [0, 0],
    }.items():
        assert _loops.shared_bounds(_loops.cumulated(costs)) == wanted, costs
    # Python takes 25 of 30 us each, for which no other thread is of use.
    assert _loops.shared_bounds(_loops.cumulated([30.0] * 3), in_python=25.0) == [0, 3]
    assert (
        _loops.equal_bounds(5, 30.0) == [0, 2, 5]
        and _loops.equal_bounds(5, 3.0) == [0, 5]
        and _loops.equal_bounds(0, 3.0) == [0, 0]
    )


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_same_bits_for_any_number_of_threads(threads):
    batch, usual = make(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = bits(batch)
        torch.set_num_threads(threads)
        assert all(bits(batch) == wanted for _ in range(5))
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("classes", [1, 3])
def test_voting_does_not_depend_on_where_it_is_cut(classes):
    """A class that two threads share has the same voters, in the same order, as on one thread and in a batch."""
    rng = np.random.default_rng(0)
    boxes = testing.make_boxes(4000, (400, 400), rng)
    det = torch.cat([boxes[:600], torch.from_numpy(rng.random((600, 1))).float()], 1)
    det = det[det[:, 0].argsort()]
    labels, scores = torch.arange(600) * classes // 600, torch.from_numpy(rng.random((4000, classes))).float()
    arguments, usual, results = (det, labels, boxes, scores), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(paa_gpu.score_voting(*arguments, 0.05)[0])
        results += paa_gpu.score_voting_batch(*([column] * 2 for column in arguments), 0.05)[0]
    finally:
        torch.set_num_threads(usual)
    assert not torch.equal(results[0], det) and all(torch.equal(results[0], each) for each in results)


def test_four_python_threads_at_once():
    batch = make()
    wanted = bits(batch)
    with ThreadPoolExecutor(4) as pool:
        assert all(got == wanted for got in pool.map(lambda _: bits(batch), range(40)))


FIRST_USE = """
import sys
sys.path.insert(0, "tests")
from concurrent.futures import ThreadPoolExecutor
from test_threads import bits, make
batch = make()
with ThreadPoolExecutor(4) as pool:
    assert len(set(pool.map(lambda _: bits(batch), range(4)))) == 1
"""


@pytest.mark.slow
def test_the_first_use_from_four_threads():
    """Loops are loaded, or compiled, by whichever thread comes first."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=300)


def _child(queue, batch):
    torch.set_num_threads(2)
    queue.put(bits(batch))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_after_first_use(method):
    batch = make()
    wanted = bits(batch)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=_child, args=(queue, batch)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=120) for _ in children] == [wanted] * 2
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert bits(batch) == wanted


def other_calls():
    """Calls with what `calls` leaves out."""
    batch, row = testing.make_batch([3, 4], np.random.default_rng(0)), torch.arange(9.0)
    image, boxes = [column[0] for column in batch[:6]], torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 3)
    weights, spread = torch.tensor([0.5, 0.5]), torch.ones(2)
    sizes = batch.anchors[0]
    return {
        "paa_reassign": lambda: paa_gpu.paa_reassign(*image, sizes, num_classes=80),
        "paa_reassign_batch, validate": lambda: paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, validate=True),
        "select_candidates": lambda: paa_gpu.select_candidates(image[0], *image[4:], sizes, num_gt=3),
        "fit_gmm_1d, a list": lambda: paa_gpu.fit_gmm_1d([row, row], weights_init=weights, precisions_init=spread),
        "assign_max_iou": lambda: paa_gpu.assign_max_iou([boxes], [boxes, boxes], [boxes, boxes]),
    }


# They make no numbers.
IDLE = {"detach", "lift_fresh", "split_with_sizes", "unsqueeze", "slice", "new_empty", "_local_scalar_dense"}


class Watch(TorchDispatchMode):
    """What torch computes."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*(name for name in OPERATIONS if "callable" not in name), *other_calls()])
def test_torch_computes_nothing_on_the_cpu(name, monkeypatch):
    """It would use its own threads for large tensors. A forked child does not have them, and waits for ever."""
    call = {**calls(2, 60), **other_calls()}[name]
    monkeypatch.setattr(_dispatch, "_watched", lambda: False)  # the implementations run here, where they are seen
    monkeypatch.setattr(_ops, "SHARED", 0)
    with Watch() as watch:
        call()
    assert watch.found - IDLE == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no process")
def test_a_forked_child_has_a_pool_of_its_own():
    """Whatever its process id: in a name space of its own it may have that of its parent."""
    pool = _loops._executor()
    child = os.fork()
    if child == 0:
        os._exit(_loops._executor() is pool)
    assert os.waitpid(child, 0)[1] == 0
    assert _loops._executor() is pool


def test_each_slice_runs_once_where_no_thread_can_be_started(monkeypatch):
    """A thread that is there may take a slice although it was not handed over. Nothing is written after the call."""
    with ThreadPoolExecutor(8) as pool:
        pool.submit(int).result()  # one thread is there
        monkeypatch.setattr(_loops, "_executor", lambda: pool)
        monkeypatch.setattr(threading.Thread, "start", refuse_to_start)
        runs = []

        def loop(first, last):
            time.sleep(0.05)
            runs.append((first, last))

        _loops.over_bounds(loop, range(7))
        assert sorted(runs) == [(i, i + 1) for i in range(6)]
    assert len(runs) == 6


def refuse_to_start(thread):
    raise RuntimeError("can't start new thread")


def test_the_word_about_compilation_needs_no_thread(monkeypatch):
    """Without one nobody is told, and the loop is compiled."""
    notice = CompilationNotice(0.0)
    monkeypatch.setattr(threading.Thread, "start", refuse_to_start)
    notice.begin(SimpleNamespace())
    notice.end()
    assert not notice._said


AT_EXIT = """
import atexit, torch, paa_gpu

torch.set_num_threads(2)
rows = torch.rand(20000, 45)
wanted = paa_gpu.fit_gmm_1d(rows).means
atexit.register(lambda: print(torch.equal(paa_gpu.fit_gmm_1d(rows).means, wanted)))
"""


def test_a_call_at_the_end_of_python_needs_no_other_thread():
    """Python starts no threads then."""
    assert subprocess.run([sys.executable, "-c", AT_EXIT], check=True, capture_output=True, text=True).stdout == "True\n"


def test_a_forked_child_with_large_tensors(two_threads):
    """So large that torch would share them among its threads."""
    inds = torch.arange(40_000)
    columns = [[inds.double()], [inds % 4], [torch.zeros(40_000)], [torch.zeros(40_000, 4)], [inds], [inds % 7]]
    boxes, scores, labels = [torch.rand(20_000, 4)] * 2, [torch.rand(20_000)] * 2, [inds[:20_000] % 2] * 2

    def call():
        paa_gpu.paa_reassign_batch(*columns, [40_000], num_classes=3, validate=True)
        paa_gpu.batched_nms(boxes, scores, labels, 0.5, score_thr=0.99)

    call()
    inds.max()  # torch's threads are there now
    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs and child.exitcode == 0


class _Targets(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.frombuffer(bytearray(bits(make())), dtype=torch.uint8)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_inside_dataloader_workers(method):
    wanted = bits(make())
    loader = torch.utils.data.DataLoader(_Targets(), batch_size=None, num_workers=2, multiprocessing_context=method)
    items = [item.numpy().tobytes() for item in loader]
    assert items == [wanted] * 4
    assert bits(make()) == wanted


SECOND_PROCESS = """
import hashlib, torch, numpy as np
import paa_gpu
from numba.core.dispatcher import Dispatcher
from paa_gpu import testing
batch = testing.make_batch([3, 40], np.random.default_rng(0))
got = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options)
voted, _ = paa_gpu.score_voting_batch(*testing.make_predictions([(30, 90)], np.random.default_rng(0)), 0.05)
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (*got.fit[:4], *voted))).hexdigest())
from paa_gpu.cpu import em, reassign, topk, voting
used = [loop for module in (em, reassign, topk, voting) for loop in vars(module).values()
        if isinstance(loop, Dispatcher) and loop.signatures]
compiled = [loop for loop in used if loop.stats.cache_misses]
print(len(compiled), len(used))
# What a loop has beside itself is code of the process that compiles: see `forceinline` in `_loops.py`.
print([function.name for loop in compiled for code in loop.overloads.values() for function in code.library.get_defined_functions()
       if "paa_gpu" in function.name and loop.__name__ not in function.name])
"""


@pytest.mark.slow
def test_a_second_process_starts_hot_and_gets_the_same_bits(tmp_path):
    """The first one compiles into an empty cache. The second one finds everything there."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", SECOND_PROCESS], env=environment, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    (bits, counts, beside), (same_bits, later_counts, _) = first.splitlines(), second.splitlines()
    compiled, used = counts.split()
    assert int(compiled) > 0 and compiled == used and later_counts == f"0 {used}"
    assert beside == "[]"
    assert bits == same_bits
