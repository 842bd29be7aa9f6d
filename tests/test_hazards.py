"""What a GPU may do and the PTX alone does not show: late stores, fused products, approximations at their worst (see `ptxrun`).

The kernels run as compiled. Whatever a mode does, the decisions are those of the CPU, and values stay within the bounds of the library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_execution import compiled_only, execute
from test_fusion import make_models
from torch import Tensor

import paa_gpu
from bench import cases, mixed
from paa_gpu import data, testing
from paa_gpu.kernels import em, em_long

pytestmark = compiled_only

#: The modes, and those of `make test`: one seed of each.
MODES: dict[str, dict[str, Any]] = {
    **{f"late stores {seed}": {"weak": True, "seed": seed} for seed in range(6)},
    "all fused": {"fuse": "all"},
    **{f"half fused {seed}": {"fuse": "half", "seed": seed} for seed in range(4)},
    **{f"approximate {seed}": {"approximate": True, "seed": seed} for seed in range(4)},
    **{f"approximate and half fused {seed}": {"approximate": True, "fuse": "half", "seed": seed} for seed in range(4, 6)},
}
USUAL = ("late stores 0", "all fused", "approximate 0")


def modes(*usual: str) -> list[Any]:
    return [pytest.param(mode, marks=pytest.mark.slow if mode in (usual or USUAL) else pytest.mark.long) for mode in MODES]


def run(mode: str, function: Any, *arguments: Any, capability: int = 90, **options: Any) -> tuple[Any, Any]:
    """The result in this mode, and the CPU's."""
    with execute(capability, **MODES[mode]):
        got = function(*arguments, **options)
    return got, function(*arguments, **options)


def assert_same_decisions(got: paa_gpu.Reassignment, wanted: paa_gpu.Reassignment) -> None:
    """Everything that is no float64 parameter; the parameters of a row as they are held to scikit-learn's."""
    for name in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        for a, b in zip(getattr(got, name), getattr(wanted, name), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(got.num_pos, wanted.num_pos)
    assert_same_fit(got.fit, wanted.fit)


def assert_same_fit(got: paa_gpu.GaussianMixture1D, wanted: paa_gpu.GaussianMixture1D) -> None:
    for name, a in got._asdict().items():
        if isinstance(a, Tensor):
            b = getattr(wanted, name)
            torch.testing.assert_close(
                a, b, rtol=1e-9 if a.is_floating_point() else 0, atol=1e-9 if a.is_floating_point() else 0, equal_nan=True
            )


@pytest.mark.parametrize("mode", modes())
def test_reassignment(mode):
    batch = testing.make_batch([0, 7, 1, 0, 40, 3], np.random.default_rng(0), dtype=torch.float32)
    assert_same_decisions(*run(mode, paa_gpu.paa_reassign_batch, *batch.arguments, **batch.options, separation="b"))


@pytest.mark.parametrize("mode", modes())
def test_voting(mode):
    predictions = testing.make_predictions([(0, 0), (30, 1100), (5, 0), (40, 512)], np.random.default_rng(0), num_classes=3)
    (bboxes, labels), (wanted, wanted_labels) = run(mode, paa_gpu.score_voting_batch, *predictions, 0.05)
    for a, b in zip(bboxes, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2.5e-4)
    assert all(map(torch.equal, labels, wanted_labels))


@pytest.mark.parametrize("mode", modes())
def test_losses(mode):
    batch = testing.make_head_batch([0, 70, 1, 0, 33], np.random.default_rng(0), num_classes=9)
    for a, b in zip(*run(mode, paa_gpu.candidate_losses, *batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", modes())
def test_assignment(mode):
    rng = np.random.default_rng(0)
    anchors = testing.make_anchors([(20, 30), (10, 15), (5, 8)])
    boxes = [testing.make_boxes(number, (240, 160), rng) for number in (6, 0, 20, 1)]
    ignored = [testing.make_boxes(number, (240, 160), rng) for number in (1, 0, 0, 2)]
    got, wanted = run(mode, paa_gpu.assign_max_iou, anchors, boxes, ignored, ignore_iof_thr=0.5)
    for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", modes())
def test_suppression(mode):
    """Many boxes are half of their width apart, so that their IoU is the threshold, which suppresses nothing."""
    rng = np.random.default_rng(0)
    corner = torch.from_numpy(rng.integers(20, size=(2, 150, 2))).float() * 10
    boxes, scores = torch.cat([corner, corner + 40], 2), torch.from_numpy(rng.random((2, 150, 5))).float()
    for a, b in zip(*run(mode, paa_gpu.batched_nms, boxes, scores, None, 1 / 3, max_per_img=40), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", modes())
def test_fusion(mode):
    rng = np.random.default_rng(0)
    columns = list(zip(*(make_models([30, 40], rng) for _ in range(2)), strict=True))
    for a, b in zip(*run(mode, paa_gpu.weighted_boxes_fusion, *columns, [1.0, 0.7], 0.5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("init", ["minmax", pytest.param("kmeans", marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", modes())
def test_long_rows(mode, init, monkeypatch):
    """Rows whose values several programs share."""
    monkeypatch.setattr(em, "LONG_ROW", 0)
    monkeypatch.setattr(em_long, "PART", 128)
    x = torch.from_numpy(testing.make_losses("bimodal", 1400, np.random.default_rng(0))).reshape(2, 700)
    assert_same_fit(*run(mode, paa_gpu.fit_gmm_1d, x, init=init))


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_recorded_images(mode):
    for path in data.paths():
        call = data.load(path)
        columns = [[argument] for argument in call.arguments[:6]]
        options = {"num_classes": call.num_classes, "num_gts": [call.num_gt]}
        assert_same_decisions(*run(mode, paa_gpu.paa_reassign_batch, *columns, call.arguments[6], **options))


ROUNDING = [mode for mode in MODES if not mode.startswith("late")]


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode == "approximate 0" else pytest.mark.long) for mode in ROUNDING]
)
def test_mixed_precision(mode):
    """Its bounds cover what float32 may lose there: decisions as in float64."""
    batch = testing.make_batch([100], np.random.default_rng(0), scales=(1e-3, 1e3), level_sizes=(9000, 2000), dtype=torch.float32)
    assert_mixed_decisions(mode, batch, separation="b")


@pytest.mark.long
@pytest.mark.parametrize("mode", ROUNDING)
def test_mixed_precision_of_recorded_and_random_images(mode):
    """2,000 random ground truths for each of the usual size and of sizes from 0.001 to 1,000."""
    assert_mixed_decisions(mode, cases.recorded(), separation="b")
    for batch in mixed.random_batches(2 * mixed.EACH):
        assert_mixed_decisions(mode, batch, separation="mmdet")


def assert_mixed_decisions(mode: str, batch: testing.Batch, separation: str) -> None:
    options = {**batch.options, "separation": separation, "precision": "mixed"}
    got, wanted = run(mode, paa_gpu.paa_reassign_batch, *batch.arguments, **options)
    for name in ("label", "label_weight", "positive", "ignored"):
        assert all(map(torch.equal, getattr(got, name), getattr(wanted, name))), name
    for name in ("n_iter", "converged", "valid"):
        assert torch.equal(getattr(got.fit, name), getattr(wanted.fit, name)), name


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("mode", ROUNDING)
def test_lanes_agree_on_convergence(mode, precision):
    """Two thousand rows of every width class: a lane that leaves the loop alone would be a divergence or a deadlock."""
    rng = np.random.default_rng(list(mode.encode()))
    for width in (33, 45, 64, 100, 700):
        x = torch.from_numpy(rng.gamma(2.0, 1.0, (2000 if width < 65 else 100, width))).sort(1).values
        got, wanted = run(mode, paa_gpu.fit_gmm_1d, x, precision=precision)
        assert got.valid.all()
        if precision != "float32":
            tolerance = 1e-9 if precision == "float64" else 1e-4
            assert torch.equal(got.n_iter, wanted.n_iter) and torch.equal(got.converged, wanted.converged)
            torch.testing.assert_close(got.means, wanted.means, rtol=tolerance, atol=tolerance)
        else:
            assert (got.n_iter == wanted.n_iter).float().mean() > 0.95
