"""Long rows as the kernels have them: the CPU path's fits, whatever the order of the programs; and the work of an iteration."""

from __future__ import annotations

import re
from unittest import mock

import numpy as np
import pytest
import torch
from kernel_execution import compiled_only, execute, slow_interpreted
from test_starts_kernels import assert_same, both, run

from paa_gpu import _ops, testing
from paa_gpu.kernels import em, em_long

OPTIONS = ("diag", 1e-3, 1e-6, 4, "float64")


@pytest.fixture
def short_is_long(monkeypatch):
    """Programs of 128 values at least, so that a short row has many."""
    monkeypatch.setattr(em, "LONG_ROW", 0)
    monkeypatch.setattr(em_long, "PART", 128)


CASES = [
    (2, "minmax", 1),
    (2, "kmeans", 1),
    *slow_interpreted((2, "random", 2), (3, "minmax", 1)),
    pytest.param((3, "kmeans", 1), marks=pytest.mark.long),
    pytest.param((2, "quantile", 1), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_rows(execution, short_is_long, case, rng):
    """Rows of several parts, of one, of none, and one that cannot be fitted, in one call."""
    k, init, n_init = case
    lengths = [700, 70, 0, 9]
    x = torch.from_numpy(np.concatenate([testing.make_losses("bimodal", length, rng) for length in lengths]))
    x[-1] = torch.inf
    got, wanted = both(execution, x, None, lengths, None, None, None, *OPTIONS, k, init, n_init, 5)
    assert wanted[-1].tolist() == [True, True, False, False]
    assert_same(got, wanted)


@pytest.mark.parametrize("case", [(2, "minmax", 1), *slow_interpreted((2, "random", 2), (3, "quantile", 1))], ids=str)
def test_long_and_short_rows_of_a_list(execution, short_is_long, monkeypatch, case, rng):
    """Each with its own values, start and initial values; and only the long ones take the long way."""
    k, init, n_init = case
    monkeypatch.setattr(em, "LONG_ROW", 64)
    lengths, ways = [9, 300, 0, 40, 70, 64], []
    launch = em_long.launch_long
    monkeypatch.setattr(em, "launch_long", lambda rows, *args, **options: ways.append(rows) or launch(rows, *args, **options))
    x = torch.from_numpy(np.concatenate([testing.make_losses("bimodal", length, rng) for length in lengths]))
    given = torch.linspace(0.2, 0.7, len(lengths)).double()[:, None] * torch.arange(1, k + 1) if init != "random" else None
    got, wanted = both(execution, x, None, lengths, None, given, None, *OPTIONS, k, init, n_init, 5)
    assert ways == [2 * n_init]
    assert wanted[-1].tolist() == [True, True, False, True, True, True]
    assert_same(got, wanted)


def test_a_quantile_takes_every_halving(execution, short_is_long):
    """The middle lies between zeros and numbers that are far above them."""
    x = torch.cat([torch.zeros(150), torch.linspace(3, 4, 150)]).double()[None]
    options = "diag", 0.0, 1e-6, 2, "float64"
    got, wanted = both(execution, x, None, None, None, None, None, *options, 2, "quantile", 1, 0)
    assert wanted[4].tolist() == [2]
    assert_same(got, wanted)


@compiled_only
def test_a_ticket_comes_after_all_partial_sums(short_is_long, rng):
    """Programs run one by one here, so that only the code can show it: a barrier between the last store and the ticket, which
    others acquire."""
    x = torch.from_numpy(testing.make_losses("bimodal", 300, rng))[None]
    launch, compiled = em_long._pass_kernel.run, []

    def watched(*args, **options):
        compiled.append(launch(*args, **options))
        return compiled[-1]

    with execute(90), mock.patch.object(em_long._pass_kernel, "run", watched):
        run(x, None, None, None, None, None, *OPTIONS, 2)
    ptx = compiled[0].asm["ptx"]
    ticket = next(match for match in re.finditer(r"\batom\.\S+add\S*", ptx))
    assert "acq_rel" in ticket.group()
    stores = [match.end() for match in re.finditer(r"\bst\.global", ptx[: ticket.start()])]
    assert stores and "bar.sync" in ptx[stores[-1] : ticket.start()]


@compiled_only
@pytest.mark.slow
def test_stores_of_other_programs_may_come_late(short_is_long, rng):
    """Ticket and barrier: the last program of a row sees what all others have left, whenever their stores become visible."""
    x = torch.from_numpy(testing.make_losses("bimodal", 700, rng))[None]
    arguments = (x, None, None, None, None, None, *OPTIONS, 2, "kmeans")
    wanted = _ops.fit_gmm_1d(*arguments)
    for seed in (1, 2):
        with execute(90, weak=True, seed=seed):
            assert_same(run(*arguments), wanted)


@compiled_only
@pytest.mark.parametrize(
    ("rows", "length"),
    [(1, 17_000), *(pytest.param(*table, marks=pytest.mark.long) for table in ((1, 50_000), (1, 1_000_000), (100, 50_000)))],
)
def test_an_iteration_reads_each_value_once(rows, length, rng):
    """And takes one launch, the values spread over programs; a launch after the last iteration reads next to nothing."""
    # A copy: memory of numpy may begin in the middle of a sector, memory of torch, on a GPU too, does not.
    x, counted = torch.from_numpy(rng.gamma(2, size=(rows, length))).clone(), []
    for max_iter in (1, 2):
        with execute(90, seed=None, count=True, racecheck=0) as session:
            fit = run(x, None, None, None, None, None, "diag", 0.0, 1e-6, max_iter, "float64")
        assert fit[4].tolist() == [max_iter] * rows
        counted.append(session.counters)
    launches, sectors = (getattr(counted[1], name) - getattr(counted[0], name) for name in ("launches", "load_sectors"))
    work = sum(counted[1].warp_classes.values()) - sum(counted[0].warp_classes.values())
    programs = em_long.launch_rule(length, 2)["PROGRAMS"]
    print(
        f"{rows} x {length}: {launches} launch, {programs} programs a row, {sectors:,} sectors of {rows * length // 4:,}, "
        f"{work:,} warp instructions"
    )
    assert launches == 1
    # Besides the values: parameters and partial sums, which each warp of a program asks for, 117 sectors a program in all.
    assert sectors <= rows * (length / 4 + 128 * programs)


def test_launch_rule():
    assert em_long.launch_rule(1_000_000, 2)["PROGRAMS"] >= 100
    assert em_long.passes_at_most("minmax", 2, 10, torch.float64) == 11
    assert em_long.passes_at_most("kmeans", 2, 10, torch.float64) == 62


NOTHING_GIVEN = (None,) * 5


def test_the_first_iteration_never_converges(session, short_is_long, rng):
    x = torch.from_numpy(rng.gamma(2, size=(1, 200)))
    assert run(x, *NOTHING_GIVEN, "diag", 100.0, 1e-6, 9, "float64", 2)[4].tolist() == [2]


def test_one_value_is_no_fit_of_one_component(session, short_is_long):
    x, count = torch.tensor([[3.0, 1.0], [3.0, 4.0]], dtype=torch.float64), torch.tensor([1, 2])
    assert run(x, count, *NOTHING_GIVEN[1:], "diag", 1e-3, 1e-6, 9, "float64", 1)[-1].tolist() == [False, True]


def test_negative_values(execution, short_is_long, rng):
    """The smallest and the largest are found, also if fewer programs than a power of two share the row."""
    x = -torch.from_numpy(1 + rng.gamma(2, size=(1, 700)))
    assert_same(*both(execution, x, *NOTHING_GIVEN, "diag", 1e-3, 1e-6, 3, "float64", 2, "minmax", 1, 0))


def test_quantiles_in_float32(execution, short_is_long, rng):
    x = torch.from_numpy(rng.gamma(2, size=(1, 200))).float()
    assert_same(*both(execution, x, *NOTHING_GIVEN, "diag", 1e-3, 1e-6, 2, "float32", 2, "quantile", 1, 0), 1e-4)


def test_kmeans_starts_at_the_mean(execution, short_is_long, rng):
    x = torch.from_numpy(np.repeat([20.0, 0.0, 10.0], [100, 50, 50]) + rng.normal(size=200) * 0.1)[None]
    assert_same(*both(execution, x, *NOTHING_GIVEN, "diag", 1e-3, 1e-6, 1, "float64", 2, "kmeans", 1, 0))


@pytest.mark.parametrize("size", [64, 65])
def test_the_best_division_of_up_to_64_values(execution, short_is_long, size, rng):
    x = torch.from_numpy(np.stack([testing.make_losses("heavy", size, rng) for _ in range(8)]))
    assert_same(*both(execution, x, *NOTHING_GIVEN, "diag", 1e-3, 1e-6, 1, "float64", 2, "kmeans", 1, 0))
