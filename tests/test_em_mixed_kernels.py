"""Fits of mixed precision: float32 where its decisions are those of float64 for sure, as they are executed (see `kernel_execution`)."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_execution import INTERPRETER, compiled_only, execute, on_device, slow_interpreted

import paa_gpu
from bench import cases, host
from paa_gpu import testing
from paa_gpu.kernels import _launch
from paa_gpu.kernels._tiles import find_range, load_tile
from paa_gpu.kernels.em_mixed import fit_narrow
from paa_gpu.separation import SCHEMES

FEW = 4 if INTERPRETER else 300


def reassign(batch, precision, **options):
    return paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, precision=precision, **options)


def assert_same_decisions(got, wanted):
    for name in ("label", "positive", "ignored"):
        assert all(map(torch.equal, getattr(got, name), getattr(wanted, name))), name
    assert torch.equal(got.num_pos, wanted.num_pos)
    for name in ("n_iter", "converged", "valid"):
        assert torch.equal(getattr(got.fit, name), getattr(wanted.fit, name)), name


def assert_close(fit, wanted):
    """The accuracy of float32."""
    for name in ("weights", "means", "variances", "lower_bound"):
        torch.testing.assert_close(getattr(fit, name), getattr(wanted, name), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("separation", ["b", *(pytest.param(name, marks=pytest.mark.long) for name in ("mmdet", "paper"))])
def test_random_ground_truths(execution, separation, rng):
    """All shapes, among them equal losses, pairs, losses rounded to float16, ranges of 1e-3 to 1e3."""
    batch = testing.make_batch(
        [FEW // 2, 0, FEW // 2], rng, scales=(1e-3, 1e3), level_sizes=(9000, 2000, 500), dtype=torch.float32
    )
    with execute(execution):
        got = reassign(batch, "mixed", separation=separation)
    wanted = reassign(batch, "float64", separation=separation)
    assert_same_decisions(got, wanted)
    assert_close(got.fit, wanted.fit)


CLOSE = [
    [0.43537744177848803, 0.4353776161588786],  # too close for float32
    [0.5],
    [1.0, np.nan],
    [np.inf],
    [1e200, 2e200, 3e200, 9e200, 1e201],
    # Only float64 tells which candidate is the best one.
    [8.54400392007361e-05, 0.9996955404490752, 1.006239953984261],
    [0.02826233433387381, 0.2963577128896504, 0.6218922709026486, 2.5177583823124454, 3.2799494864857115],
]


@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("separation", SCHEMES)
def test_ground_truths_that_float32_does_not_decide(execution, separation, precision):
    losses = torch.tensor([loss for row in CLOSE for loss in row], dtype=torch.float64)
    pos_gt_inds = torch.repeat_interleave(torch.arange(len(CLOSE)), torch.tensor([len(row) for row in CLOSE]))
    n = len(losses)
    columns = [[t] for t in (losses, 0 * pos_gt_inds, torch.ones(n), torch.ones(n, 4), torch.arange(n), pos_gt_inds)]
    options = {"num_classes": 1, "num_gts": [len(CLOSE)], "topk": n, "separation": separation, "singleton": "positive"}
    wanted = paa_gpu.paa_reassign_batch(*columns, [n], **options)
    with execute(execution):
        got = paa_gpu.paa_reassign_batch(*columns, [n], precision=precision, **options)
    assert_same_decisions(got, wanted)


@compiled_only
@pytest.mark.long
def test_recorded_images():
    """Decisions as in float64; 12 % of the rows, in which the lower bound has the same bits, are fitted in float64."""
    batch = cases.recorded()
    with execute(90, seed=None, racecheck=0):
        mixed, double = reassign(batch, "mixed"), reassign(batch, "float64")
    assert_same_decisions(mixed, double)
    assert_same_decisions(mixed, reassign(batch, "float64"))
    again = (mixed.fit.lower_bound == double.fit.lower_bound).double().mean().item()
    print(f"{100 * again:.1f} % of {len(double.fit.valid)} recorded ground truths are fitted in float64")
    assert 0 < again <= 0.13


@triton.jit
def _narrow_kernel(x_ptr, width, max_iter, parameter_ptr, bound_ptr, sure_ptr, BLOCK_K: tl.constexpr):
    """Means and variances of rows fitted in float32 with so many iterations, and their bounds: Tensor[G, 4] each."""
    g = tl.program_id(0)
    x_ptr += g * width
    smallest, largest, valid = find_range(x_ptr, 1, width, BLOCK_K, tl.float64, BLOCK_K)
    row = (x_ptr, 1, width, smallest)
    x, _ = load_tile(row, 0, BLOCK_K)
    # No change is near -1, hence no row stops.
    fit, error, sure = fit_narrow(x, row, valid, largest - smallest, (-1.0, 1e-6, max_iter), BLOCK_K)
    for i in tl.static_range(4):
        tl.store(parameter_ptr + 4 * g + i, fit[i + 2])
        tl.store(bound_ptr + 4 * g + i, error[i + 1])
    tl.store(sure_ptr + g, sure)


@pytest.mark.parametrize("max_iter", [1, 4, *slow_interpreted(20)])
def test_errors_are_within_their_bounds(session, max_iter, rng):
    """Within a half, in the rows that are sure. Errors that grow by 20 iterations are larger than those of one."""
    shapes = ("bimodal", "unimodal", "heavy")
    x = torch.from_numpy(np.stack([testing.make_losses(shapes[i % 3], 45, rng) for i in range(6 if INTERPRETER else 600)]))
    x -= x.min(1, keepdim=True).values
    parameters, bounds, sure = torch.empty(len(x), 4), torch.empty(len(x), 4), torch.empty(len(x), dtype=torch.bool)
    on_device(_narrow_kernel[(len(x),)])(
        x, 45, max_iter, parameters, bounds, sure, BLOCK_K=64, num_warps=1, **_launch.compile_options(fuse=True)
    )
    wanted = direct_em(x, max_iter)
    share = ((parameters - wanted).abs() / bounds)[sure]
    print(f"{max_iter} iterations: {len(share)} of {len(x)} rows are sure, errors up to {share.max():.3f} of their bounds")
    assert len(share) > 0.8 * len(x)
    assert share.max() <= 0.5


def direct_em(x, max_iter):
    """Means and variances [G, 4] in float64: operations of torch, one after the other."""
    weight = torch.full((len(x), 2), 0.5, dtype=torch.float64)
    mean, variance = torch.stack([0 * x[:, 0], x.max(1).values], 1), torch.ones(len(x), 2, dtype=torch.float64)
    for _ in range(max_iter):
        logs = (weight.log() - variance.log() / 2)[:, None] - (x[..., None] - mean[:, None]) ** 2 / (2 * variance[:, None])
        share = logs.softmax(2)
        n = share.sum(1)
        weight, mean = n / 45, (share * x[..., None]).sum(1) / n
        variance = (share * (x[..., None] - mean[:, None]) ** 2).sum(1) / n + 1e-6
    return torch.cat([mean, variance], 1)


def test_a_change_at_the_limit_is_decided_by_float64(execution, rng):
    """The limit is the change of the third iteration, a billionth more or less: float32 cannot tell, and must not try."""
    x = torch.from_numpy(np.stack([testing.make_losses("bimodal", 45, rng) for _ in range(2 if INTERPRETER else 20)]))
    bounds = [paa_gpu.fit_gmm_1d(x, tol=0.0, max_iter=n).lower_bound for n in (2, 3)]
    told_apart = 0
    for row, change in zip(x, (bounds[1] - bounds[0]).abs().tolist(), strict=True):
        stops = []
        for tol in (change * (1 + 1e-9), change * (1 - 1e-9)):
            with execute(execution):
                stops.append(int(paa_gpu.fit_gmm_1d(row, tol=tol, precision="mixed").n_iter))
            assert stops[-1] == int(paa_gpu.fit_gmm_1d(row, tol=tol).n_iter)
        told_apart += stops[0] == 3 < stops[1]
    assert told_apart > 0 if INTERPRETER else told_apart > 5


def test_rows_that_float32_cannot_fit(execution):
    """Beyond its range, too close together for it, equal, and not finite."""
    rows = [[1e30, 2e30, 5e30], [1.0, 1 + 1e-12, 1 + 2e-12, 2.0], [3.0] * 4, [1.0, 2.0], [1.0, torch.inf], [torch.nan, 1.0]]
    x = [torch.tensor(row, dtype=torch.float64) for row in rows]
    with execute(execution):
        got = paa_gpu.fit_gmm_1d(x, precision="mixed")
    wanted = paa_gpu.fit_gmm_1d(x)
    for name in ("n_iter", "converged", "valid"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@compiled_only
@pytest.mark.parametrize(("width", "covariance_type"), [(65, "diag"), (45, "tied")])
def test_other_rows_are_fitted_in_float64(execution, width, covariance_type, rng):
    x = torch.from_numpy(rng.gamma(2.0, 1.0, (3, width)))
    with execute(execution):
        mixed, double = (paa_gpu.fit_gmm_1d(x, covariance_type=covariance_type, precision=name) for name in ("mixed", "float64"))
    assert torch.equal(mixed.means, double.means) and torch.equal(mixed.lower_bound, double.lower_bound)


@compiled_only
def test_a_function_of_scores_gets_those_of_float64(execution, rng):
    scores = []

    def separation(assignment, score, loss, mask):
        scores.append(score)
        return assignment, torch.zeros_like(assignment)

    batch = testing.make_batch([4], rng, ["bimodal"], dtype=torch.float32)
    with execute(execution):
        for precision in ("mixed", "float64"):
            reassign(batch, precision, separation=separation)
    assert torch.equal(*scores)


@pytest.mark.parametrize("precision", ["mixed", "auto"])
def test_loops_for_cpu_tensors_fit_in_float64(precision, rng):
    x = torch.from_numpy(rng.gamma(2.0, 1.0, (3, 45)))
    mixed, double = (paa_gpu.fit_gmm_1d(x, precision=precision) for precision in (precision, "float64"))
    assert mixed.means.dtype == torch.float64 and torch.equal(mixed.means, double.means)


@compiled_only
@pytest.mark.parametrize(("capability", "precision"), [((8, 6), "mixed"), ((9, 0), "float64"), (None, "float64")])
def test_the_device_decides(capability, precision, rng):
    """Which of the two others "auto" is, by the bits of the means."""
    batch = testing.make_batch([6], rng, ["bimodal"], dtype=torch.float32)
    x = torch.from_numpy(np.stack([testing.make_losses("bimodal", 45, rng) for _ in range(6)]))
    with execute(90), mock.patch.object(_launch, "capability", lambda like: capability):
        fits = {name: (reassign(batch, name).fit, paa_gpu.fit_gmm_1d(x, precision=name)) for name in ("auto", "mixed", "float64")}
    for place in (0, 1):
        means = {name: fit[place].means for name, fit in fits.items()}
        assert torch.equal(means["auto"], means[precision]) and not torch.equal(means["mixed"], means["float64"])


@compiled_only
def test_who_asks_the_device(rng):
    """By default: what returns decisions only. What returns parameters of fits has float64, wherever it runs.

    The head asks twice: once more for the registers of its assigner.
    """
    asked = []
    capability = mock.patch.object(_launch, "capability", lambda like: asked.append(1))
    batch = testing.make_batch([2], rng, ["bimodal"], dtype=torch.float32)
    tensors = [column[0] for column in batch.arguments[:6]]
    rows, head = torch.from_numpy(rng.random((3, 20))), paa_gpu.PAAHead(2, 1, 1, 0, 1)
    calls = {
        lambda: paa_gpu.paa_reassign(*tensors, batch.anchors[0], num_classes=batch.num_classes, num_gt=2): 1,
        lambda: head.loss(
            [torch.zeros(1, 1, size, size) for size in (4, 2, 1, 1, 1)],
            [{"boxes": torch.ones(1, 4), "labels": torch.zeros(1).long()}],
        ): 2,
        lambda: paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options): 0,
        lambda: paa_gpu.fit_gmm_1d(rows): 0,
    }
    with host.launches_return_at_once(), host.as_with_results(), capability:
        for call, times in calls.items():
            asked.clear()
            call()
            assert len(asked) == times


@compiled_only
def test_work_of_an_iteration(rng):
    """Of rows that stay in float32: no operation in float64, which a consumer's GPU does at a 64th of the speed; no barrier."""
    x = torch.from_numpy(np.stack([testing.make_losses("bimodal", 45, rng) for _ in range(20)]))
    work = {}
    for max_iter in (1, 3):
        with execute(90, seed=None, count=True, racecheck=0) as session:
            fit = paa_gpu.fit_gmm_1d(x, tol=0.0, max_iter=max_iter, precision="mixed")
        assert fit.n_iter.tolist() == [max_iter] * 20
        assert session.counters.barriers == 0 and session.counters.warp_classes["shared"] == 0
        work[max_iter] = session.counters.warp_classes.copy()
    classes = {name: (work[3][name] - work[1][name]) / 40 for name in work[3] if name != "mov"}
    print(f"mixed, 45 values: {sum(classes.values()):.0f} of", {name: round(n, 1) for name, n in classes.items() if n})
    assert classes["fp64"] == 0
    assert sum(classes.values()) <= 700


def test_the_first_iteration_never_converges(execution, rng):
    with execute(execution):
        got = paa_gpu.fit_gmm_1d(torch.from_numpy(rng.gamma(2, size=(1, 45))), tol=100.0, precision="mixed")
    assert got.n_iter.tolist() == [2]
