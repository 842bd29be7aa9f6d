"""Weak memory: kernels that hand something from one program to another, right and broken."""
import contextlib
import re
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

import ptxrun

SEEDS = range(12)
PROGRAMS = 20


@triton.jit
def ticket_kernel(x, part, ticket, total, BARRIER: tl.constexpr, SEM: tl.constexpr, CACHE: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Each program stores its block; the one with the last ticket sums what all have stored."""
    p = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(part + p, tl.load(x + p) * 2)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem=SEM) == tl.num_programs(0) - 1:
        s = tl.zeros([B], tl.int32)
        for i in range(N):
            s += tl.load(part + i * B + tl.arange(0, B), cache_modifier=CACHE)
        tl.store(total, tl.sum(s, 0))


@contextlib.contextmanager
def as_written():
    """What is compiled now has no barrier before its last atomic. Triton puts one before an atomic that releases, from 3.9 on."""
    def program(ptx):
        before, atomic, after = ptx.rpartition("atom.")
        return ptxrun.Program(re.sub(r"bar\.sync\s+0;", "", before) + atomic + after)

    with mock.patch.object(ptxrun.driver, "Program", program):
        yield


def wrong(launch):
    """How many seeds go wrong."""
    count = 0
    for seed in SEEDS:
        with ptxrun.active(capability=90, seed=seed, weak=True):
            count += not launch()
    return count


def ticket(barrier=True, sem="acq_rel", cache=".cg", num_warps=4):
    block = 32 * num_warps
    x = torch.arange(PROGRAMS * block, dtype=torch.int32) % 1000 + 1
    total, counter = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    ticket_kernel[(PROGRAMS,)](x, torch.zeros_like(x), counter, total, barrier, sem, cache, B=block, N=PROGRAMS, num_warps=num_warps)
    return total.item() == 2 * x.sum().item()


def test_a_ticket_after_a_barrier():
    """The acquire empties the first-level cache: the plain load is as good as `.cg`."""
    assert wrong(ticket) == 0
    assert wrong(lambda: ticket(cache="")) == 0
    assert wrong(lambda: ticket(num_warps=1)) == 0


def test_no_barrier_before_the_ticket():
    with as_written():
        assert wrong(lambda: ticket(barrier=False)) > 6


@pytest.mark.parametrize("sem", ["relaxed", "acquire"])
def test_a_ticket_that_does_not_release(sem):
    assert wrong(lambda: ticket(sem=sem)) > 6


def test_a_ticket_that_does_not_acquire():
    """What was stored is there, but the first-level cache may hold what was there before."""
    assert wrong(lambda: ticket(sem="release", cache="")) > 6
    assert wrong(lambda: ticket(sem="release", cache=".cg")) == 0


@triton.jit
def counts_kernel(count, ticket, out, BARRIER: tl.constexpr, B: tl.constexpr):
    """Every lane counts at its place, by an atomic whose result nobody uses; the last program copies the counts."""
    place = tl.arange(0, B)
    tl.atomic_add(count + place, 1, sem="relaxed")
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(out + place, tl.load(count + place, cache_modifier=".cg"))


@pytest.mark.parametrize("barrier", [True, False])
def test_atomics_before_a_ticket(barrier):
    def launch():
        count, out = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        counts_kernel[(PROGRAMS,)](count, torch.zeros(1, dtype=torch.int32), out, barrier, B=128)
        assert (count == PROGRAMS).all()
        return (out == PROGRAMS).all().item()

    with contextlib.nullcontext() if barrier else as_written():
        assert (wrong(launch) == 0) == barrier


@triton.jit
def flag_kernel(x, part, flag, out, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr, CACHE: tl.constexpr, B: tl.constexpr):
    """Program 0 stores a block and raises a flag; the others copy the block if they find the flag raised."""
    place = tl.arange(0, B)
    if tl.program_id(0) == 0:
        tl.store(part + place, tl.load(x + place))
        tl.debug_barrier()
        tl.atomic_add(flag, 1, sem=RELEASE)
    else:
        before = tl.load(part + place)  # the first-level cache may hold it from now on
        if tl.atomic_add(flag, 0, sem=ACQUIRE) == 1:
            tl.store(out + tl.program_id(0) * B + place, tl.load(part + place, cache_modifier=CACHE) + 0 * before)


@pytest.mark.parametrize(
    ("release", "acquire", "cache", "right"),
    [
        ("release", "acquire", "", True),
        pytest.param("release", "relaxed", ".cg", True, marks=pytest.mark.long),
        ("release", "relaxed", "", False),
        pytest.param("relaxed", "acquire", "", False, marks=pytest.mark.long),
        ("relaxed", "acquire", ".cg", False),
        pytest.param("acquire", "acquire", "", False, marks=pytest.mark.long),
    ],
)
def test_a_flag(release, acquire, cache, right):
    raised = 0

    def launch():
        nonlocal raised
        x, out = torch.arange(1, 65, dtype=torch.int32), torch.zeros(PROGRAMS, 64, dtype=torch.int32)
        flag_kernel[(PROGRAMS,)](x, torch.zeros_like(x), torch.zeros(1, dtype=torch.int32), out, release, acquire, cache, B=64, num_warps=1)
        copies = out[out.any(1)]
        raised += len(copies)
        return torch.equal(copies, x.expand(copies.shape))

    assert (wrong(launch) == 0) == right
    assert raised > 20


@triton.jit
def exchange_kernel(x, part, out, BARRIER: tl.constexpr, B: tl.constexpr):
    """A program's threads read what others of the same program stored."""
    place = tl.arange(0, B)
    tl.store(part + place, tl.load(x + place))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + place, tl.load(part + (B - 1 - place)))


@pytest.mark.parametrize("barrier", [True, False])
def test_within_a_program(barrier):
    def launch():
        x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        exchange_kernel[(1,)](x, torch.zeros_like(x), out, barrier, B=128)
        return torch.equal(out, x.flip(0))

    assert (wrong(launch) == 0) == barrier


PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 .ptr .global .align 4 k_0, .param .u64 .ptr .global .align 4 k_1)
.reqntid 1
{
  .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [k_0];
  ld.param.b64 %rd2, [k_1];
  mov.u32 %r1, %ctaid.x;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra READ;
  mov.b32 %r2, 1;
  WRITE
  ret;
READ:
  LOOK
  mad.wide.u32 %rd3, %r1, 4, %rd2;
  setp.ne.u32 %p2, %r3, 1;
  @%p2 bra DONE;
  add.u32 %r4, %r4, 1;
  st.global.b32 [%rd3], %r4;
DONE:
  ret;
}
"""


@pytest.mark.parametrize(
    ("write", "look", "right"),
    [
        ("st.global.b32 [%rd1], %r2; fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%rd1+32], %r2;",
         "ld.relaxed.gpu.global.b32 %r3, [%rd1+32]; fence.acq_rel.gpu; ld.global.b32 %r4, [%rd1];", True),
        ("st.global.b32 [%rd1], %r2; membar.gl; st.volatile.global.b32 [%rd1+32], %r2;",
         "ld.volatile.global.b32 %r3, [%rd1+32]; membar.gl; ld.global.b32 %r4, [%rd1];", True),
        ("st.global.b32 [%rd1], %r2; st.release.gpu.global.b32 [%rd1+32], %r2;",
         "ld.acquire.gpu.global.b32 %r3, [%rd1+32]; ld.global.b32 %r4, [%rd1];", True),
        ("st.global.b32 [%rd1], %r2; membar.cta; st.relaxed.gpu.global.b32 [%rd1+32], %r2;",
         "ld.acquire.gpu.global.b32 %r3, [%rd1+32]; ld.global.b32 %r4, [%rd1];", False),
        ("st.global.b32 [%rd1], %r2; st.release.cta.global.b32 [%rd1+32], %r2;",
         "ld.acquire.gpu.global.b32 %r3, [%rd1+32]; ld.global.b32 %r4, [%rd1];", False),
        ("st.global.b32 [%rd1], %r2; st.release.gpu.global.b32 [%rd1+32], %r2;",
         "ld.acquire.gpu.global.b32 %r3, [%rd1+32]; ld.global.nc.b32 %r4, [%rd1];", False),
        ("red.relaxed.gpu.global.add.u32 [%rd1], %r2; red.relaxed.gpu.global.add.u32 [%rd1+32], %r2;",
         "ld.acquire.gpu.global.b32 %r3, [%rd1+32]; ld.global.b32 %r4, [%rd1];", False),
    ],
)
def test_fences_scopes_and_orders(write, look, right):
    """Each program that sees the flag adds one to the value that it finds: 2."""
    launcher = ptxrun.Launcher.from_ptx(PTX.replace("WRITE", write).replace("LOOK", look), ["*i32", "*i32"])
    seen = 0

    def launch():
        nonlocal seen
        out = torch.zeros(100, dtype=torch.int32)
        launcher.launch((100, 1, 1), (torch.zeros(16, dtype=torch.int32), out))
        seen += int((out != 0).sum())
        return not (out == 1).any()

    assert (wrong(launch) == 0) == right
    assert seen > 20


def test_all_is_visible_after_the_launch():
    def launch():
        x, out = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
        copy_kernel[(8,)](x, out, 1000, B=128)
        return torch.equal(x, out)

    assert wrong(launch) == 0


@triton.jit
def copy_kernel(x, o, n, B: tl.constexpr):
    c = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + c, tl.load(x + c, mask=c < n, other=0), mask=c < n)


def test_one_seed_is_one_execution():
    def run(seed):
        out = torch.zeros(PROGRAMS * 128, dtype=torch.int32)
        with ptxrun.active(seed=seed, weak=True):
            total = torch.zeros(1, dtype=torch.int32)
            ticket_kernel[(PROGRAMS,)](torch.ones_like(out), out, torch.zeros(1, dtype=torch.int32), total, False, "acq_rel", ".cg", B=128, N=PROGRAMS)
        return total.item()

    with as_written():
        totals = [run(seed) for seed in SEEDS]
        assert totals == [run(seed) for seed in SEEDS] and len(set(totals)) > 3


def test_one_worker():
    with pytest.raises(ValueError, match="weak memory runs on one worker, got workers=2"), ptxrun.active(weak=True, workers=2):
        pass
