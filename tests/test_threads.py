"""Threads, processes and forks: the same bits whatever runs them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu import testing


def make():
    # Enough rows of every loop for more than one slice.
    return testing.make_batch([2100, 40, 0, 7, 1], np.random.default_rng(5), sizes=(2, 6))


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
