"""The kernels of weighted boxes fusion as they are executed: compiled for several capabilities, or interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, poisoned_outputs
from test_fusion import make_models

import paa_gpu
from paa_gpu import _ops, fusion
from paa_gpu._checks import FLOATS
from paa_gpu.cpu import fusion as cpu
from paa_gpu.fusion import CONF_TYPES

#: The interpreter takes milliseconds for a box.
BOXES = 8 if INTERPRETER else 40


def arguments(rng, images=2, models=3, boxes=BOXES, options=(0.5, 0.1, "avg", False), dtype=torch.float64, **settings):
    """Images of several lengths, one of them empty."""
    numbers = [rng.integers(boxes // 2, boxes + 1, models) for _ in range(images)]
    made = [make_models(number, rng, dtype=dtype, **settings) for number in [*numbers, [0] * models]]
    columns = [torch.cat([part for image in made for part in image[column]]) for column in range(3)]
    lengths = [len(part) for image in made for part in image[1]]
    return *columns, lengths, rng.uniform(0.5, 2, models).tolist(), *options


def run(*args):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        result = _ops.weighted_boxes_fusion(*args)
    assert_written(*result)
    return result


def check(*args):
    """Every bit."""
    got, wanted = run(*args), cpu.weighted_boxes_fusion(*args)
    for part, other in zip(got, wanted, strict=True):
        assert (part.dtype, part.shape) == (other.dtype, other.shape)
        assert torch.equal(part.nan_to_num(7), other.nan_to_num(7))
    return got


# --- results -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*((conf_type, False) for conf_type in CONF_TYPES), ("avg", True)], ids=str)
def test_scores_of_clusters(session, options, rng):
    got = check(*arguments(rng, options=(0.4, 0.2, *options)))
    assert 0 < got[3][0] < BOXES * 2


def test_equal_scores(session, rng):
    boxes, scores, labels, *rest = arguments(rng)
    check(boxes, (scores * 4).round() / 4, labels - 1, *rest)


def test_more_clusters_than_a_block_has(session, rng):
    """In one class, beside another of few."""
    check(*arguments(rng, images=1, boxes=20 if INTERPRETER else 150, models=2, classes=1, objects=200))


def test_what_is_left_out_and_zero(session, rng):
    """Scores below the threshold or not finite, boxes with NaN, without area, out of order; clusters of score 0 alone."""
    boxes, scores, labels, *rest = arguments(rng, boxes=12)
    scores[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0])
    scores[4::3] = 0
    boxes[[5, 9, 10, 11], [0, 1, 2, 3]], boxes[6, 2], boxes[7] = torch.nan, torch.inf, 0.5
    boxes[8] = boxes[8].flip(0)
    rest[3] = 0.0
    check(boxes, scores, labels, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(session, dtype, rng):
    if INTERPRETER and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 to bfloat16 instead of rounding it")
    boxes, scores, labels, *rest = arguments(rng, dtype=dtype)
    scores[::4] = 0.1
    check(boxes, scores, labels.int(), *rest)


def test_nothing(session):
    none = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    check(*none, [0, 0, 0, 0], [1.0, 2.0], 0.5, 0.0, "avg", False)
    low = torch.rand(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    check(*low, [0, 0, 1, 2], [1.0, 2.0], 0.5, 0.5, "max", False)


def test_the_public_function(execution, rng):
    images = [[column] for column in make_models([BOXES, BOXES], rng)]
    wanted = paa_gpu.weighted_boxes_fusion(*images)
    with execute(execution):
        got = paa_gpu.weighted_boxes_fusion(*images)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# --- repeatability, operations, work -------------------------------------------------------------------------------------------


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    args = arguments(rng)
    results = []
    for seed in (None, 0, 1):
        with execute(90, seed=seed):
            results.append(run(*args))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@compiled_only
@pytest.mark.parametrize("images", [1, 5])
def test_device_operations(images, rng, monkeypatch):
    """Four launches whatever the images, three concatenations and one copy."""
    monkeypatch.setattr(fusion, "values_of", lambda tensor: None)  # as on a GPU
    columns = list(map(list, zip(*(make_models([BOXES, BOXES], rng) for _ in range(images)), strict=True)))
    operations, launches = profiled(lambda: paa_gpu.weighted_boxes_fusion(*columns))
    print(operations, launches)
    assert not SYNCHRONISING & set(operations)
    assert sorted(operations) == ["cat"] * 3 + ["stage"]
    assert launches == ["_prepare_kernel", "_order_kernel", "_cluster_kernel", "_finish_kernel"]


@compiled_only
def test_work_is_that_of_the_boxes_of_a_class(rng):
    """Two models of 200 boxes each, of one class and of 40: a box passes over the fused boxes of its class."""
    counted = {}
    for classes in (1, 40):
        boxes, scores, labels = make_models([200, 200], rng, classes=classes, objects=120)
        with execute(90, seed=None, racecheck=0, count=True) as session:
            found = paa_gpu.weighted_boxes_fusion([boxes], [scores], [labels])
        counted[classes] = {name: work.warp_instructions for name, work in session.by_kernel().items()}
        print(classes, int(found.count), {name: f"{number:,}" for name, number in counted[classes].items()})
    assert counted[1]["_cluster_kernel"] <= 280_000 and counted[40]["_cluster_kernel"] <= 200_000
    assert max(counted[classes][f"_{name}_kernel"] for classes in counted for name in ("order", "finish")) <= 110_000
