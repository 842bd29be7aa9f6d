"""The NMS kernels as they are executed: compiled for several capabilities, or interpreted (see `kernel_execution`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, poisoned_outputs, slow_interpreted
from test_nms import make_image

import paa_gpu
from paa_gpu import _ops
from paa_gpu._checks import FLOATS
from paa_gpu.cpu import nms as cpu
from paa_gpu.kernels import nms
from paa_gpu.nms import METHODS

#: The interpreter takes 0.1 s for a pass over a tile of candidates.
BOXES, ROOM = (30, 5) if INTERPRETER else (150, 40)


def options(score_thr=0.1, nms_pre=0, max_per_img=ROOM, method="hard", class_agnostic=False):
    return 0.4, score_thr, nms_pre, max_per_img, method, 0.5, 1e-3, class_agnostic


def labelled(rng, images=2, boxes=BOXES, ties=True):
    """Boxes [B, K, 4], scores [B, K, 1], labels [B, K]."""
    columns = zip(*(make_image(boxes, 3, rng, ties) for _ in range(images)), strict=True)
    boxes, scores, labels = map(torch.stack, columns)
    return boxes, scores[..., None], labels


def run(*args):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        result = _ops.batched_nms(*args)
    assert_written(*result)
    return result


def check(*args):
    """All of it exactly, but for decayed scores: exponentials differ in their last place."""
    got, wanted = run(*args), cpu.batched_nms(*args)
    for part, other in zip(got, wanted, strict=True):
        assert (part.dtype, part.shape) == (other.dtype, other.shape)
        if args[8] == "gaussian":
            torch.testing.assert_close(part, other, rtol=max(1e-6, torch.finfo(args[1].dtype).eps), atol=0)
        else:
            assert torch.equal(part.nan_to_num(7), other.nan_to_num(7))


# --- results -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_labels(session, method, rng):
    boxes, scores, labels = labelled(rng, ties=method != "gaussian")
    check(boxes, scores, labels, None, *options(method=method))


@pytest.mark.parametrize("method", ["hard", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])])
def test_a_score_for_every_class(session, method, rng):
    boxes, _, _ = labelled(rng)
    check(boxes, torch.from_numpy(rng.random((2, BOXES, 5))).float(), None, None, *options(method=method))


@pytest.mark.parametrize("nms_pre", [1, *slow_interpreted(20, BOXES + 10)])
def test_the_best_take_part(session, nms_pre, rng):
    """Ties at the limit included: the lower entries are those that do. The limit may be above the number of boxes."""
    boxes, _, _ = labelled(rng)
    scores = torch.from_numpy(rng.integers(4, size=(2, BOXES, 2)) / 4).float()
    check(boxes, scores, None, None, *options(nms_pre=nms_pre, max_per_img=0 if nms_pre > BOXES else ROOM))


HALF = torch.tensor([[[0.0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]]])  # the first two have an IoU of 1/2


@pytest.mark.parametrize(
    ("scores", "method", "iou_threshold", "score_thr", "min_score", "count"),
    [
        ([0.5, 0.75, 0.25], "hard", 0.5, 0.25, 0.0, 2),
        ([0.25, 0.125, 0.125], "linear", 0.9, None, 0.25, 0),
        ([0.25, 0.5, 0.5], "linear", 0.5, None, 0.125, 3),
        ([0.5, 0.5, 0.25], "linear", 0.25, None, 0.25, 1),
    ],
    ids=["score_thr and IoU", "min_score", "IoU", "what a score decays to"],
)
def test_what_equals_a_limit(session, scores, method, iou_threshold, score_thr, min_score, count):
    """A score has to exceed its limit to stay, and an IoU to suppress."""
    args = (None, iou_threshold, score_thr, 0, 3, method, 0.5, min_score, False)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    check(HALF, torch.tensor(scores).view(1, 3, 1), labels, *args)
    assert run(HALF, torch.tensor(scores).view(1, 3, 1), labels, *args)[4].tolist() == [count]


def test_a_tie_at_the_limit_of_candidates(session):
    """The first of two equal scores takes part, the next one does not, though it is of another class."""
    scores = torch.tensor([[[0.75, 0.75], [0.0, 0.0], [0.0, 0.5]]])
    args = HALF, scores, None, None, *options(nms_pre=1, max_per_img=3)
    check(*args)
    assert run(*args)[4].tolist() == [1]


@compiled_only
def test_many_classes(session, rng):
    """More lists than four warps hold."""
    scores = torch.from_numpy(rng.random((1, 3, 1100))).float()
    check(HALF, scores, None, None, *options(score_thr=0.99, max_per_img=10))


def test_images_of_any_length(session, rng):
    boxes, scores, labels = (part.flatten(0, 1) for part in labelled(rng))
    lengths = [0, BOXES + 7, 1, BOXES - 8]
    check(boxes, scores, labels, lengths, *options(class_agnostic=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ["hard", "linear"])
def test_dtypes(session, dtype, method, rng):
    """Narrow ones are compared as float32; in float64 keys have 64 bits."""
    if INTERPRETER and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 to bfloat16 instead of rounding it")
    boxes, _, _ = labelled(rng)
    scores = torch.from_numpy(rng.random((2, BOXES, 3)))
    check(boxes.to(dtype), scores.to(dtype), None, None, *options(nms_pre=30, method=method))


def test_values_that_are_not_finite(session, rng):
    """Scores: NaN first, however many there are where `nms_pre` counts. Boxes: NaN suppresses nothing."""
    boxes, scores, labels = labelled(rng)
    scores[0, :3], scores[1, ::2], scores[1, 5], scores[0, 7] = torch.nan, -torch.inf, torch.inf, -0.0
    scores[0, 8] = 0.0
    boxes[:, 2::3, 1] = torch.nan
    boxes[0, 4::3, 2] = torch.inf
    check(boxes, scores, labels, None, *options(score_thr=None, nms_pre=2, max_per_img=4))
    check(boxes, scores, labels, None, *options(score_thr=None, max_per_img=ROOM if INTERPRETER else 0))
    # In float64 the key of NaN is the largest number that there is, so a sum of two would be negative.
    scores[:, ::2] = torch.nan
    check(boxes.double(), scores.double(), labels, None, *options(score_thr=None, nms_pre=3, max_per_img=5))


def test_nothing(session):
    for images, boxes, classes, lengths in ((0, 3, 2, None), (2, 0, 2, None), (2, 3, 0, None), (1, 0, 2, [0, 0])):
        shape = (images, boxes) if lengths is None else (0,)
        args = torch.ones(*shape, 4), torch.ones(*shape, classes), None, lengths
        check(*args, *options(max_per_img=4))
        check(*args, *options(max_per_img=0))
    check(torch.ones(2, 3, 4), torch.zeros(2, 3, 2), None, None, *options(max_per_img=4))


@pytest.mark.slow
def test_strided_inputs(session, rng):
    boxes, scores, labels = labelled(rng, boxes=20)
    turned = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread = torch.stack([labels, labels * 0], -1)[..., 0].int()
    before = [part.clone() for part in (*turned, spread)]
    check(*turned, spread, None, *options(max_per_img=4))
    assert all(torch.equal(a, b) for a, b in zip((*turned, spread), before, strict=True))


def test_the_public_function(execution, rng):
    boxes, scores, labels = labelled(rng)
    arguments = boxes, scores[..., 0], labels, 0.4
    wanted = paa_gpu.batched_nms(*arguments, max_per_img=ROOM)
    with execute(execution):
        got = paa_gpu.batched_nms(*arguments, max_per_img=ROOM)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# --- repeatability, operations, work -------------------------------------------------------------------------------------------


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    boxes, _, _ = labelled(rng)
    scores = torch.from_numpy(rng.random((2, BOXES, 5))).float()
    results = []
    for seed in (None, 0, 1):
        with execute(90, seed=seed):
            results.append(run(boxes, scores, None, None, *options()))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@compiled_only
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_several_threads_of_a_candidate_weaken_it_once(method, rng, monkeypatch):
    """As on GPUs whose warps have 64 threads, of which two then have the same float64 candidate."""
    boxes, _, _ = labelled(rng, boxes=600)
    boxes[..., 2:] = boxes[..., :2] + 300  # so that a candidate is weakened again and again
    scores = torch.from_numpy(rng.random((2, 600, 1)))
    usual = nms.launch_rule
    monkeypatch.setattr(nms, "launch_rule", lambda *args: {**usual(*args), "BLOCK": usual(*args)["BLOCK"] // 2})
    for seed in (0, 1, 2):
        with execute(90, seed=seed):
            check(boxes.double(), scores, None, None, *options(method=method))


def test_scratch_is_that_of_the_candidates(monkeypatch):
    """A class has no more picks than boxes, however many detections an image may have."""
    images, boxes, classes = 2, 12, 5
    sizes, make = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *shape, **of: sizes.append(*shape) or make(like, *shape, **of))
    with execute("interpreter" if INTERPRETER else 90):
        got = _ops.batched_nms(
            torch.rand(images, boxes, 4), torch.rand(images, boxes, classes), None, None, *options(max_per_img=0)
        )
    assert got[0].shape == (images, boxes * classes, 4)
    assert [shape for shape in sizes if shape == (images * classes, boxes)] == [(images * classes, boxes)] * 4


@compiled_only
@pytest.mark.parametrize("images", [1, 16])
def test_device_operations(images, rng):
    """Two launches whatever the images, classes and boxes, one more where `nms_pre` limits. Lists cost a copy, and a concatenation
    each if they hold several images."""
    boxes, scores = torch.rand(images, 40, 4), torch.rand(images, 40, 3)
    of_lists = ("stage",) if images == 1 else ("cat", "cat", "stage")
    calls = {
        (): lambda: paa_gpu.batched_nms(boxes, scores, None, 0.5, max_per_img=3),
        of_lists: lambda: paa_gpu.batched_nms(list(boxes), list(scores), None, 0.5, max_per_img=3, nms_pre=5),
    }
    for expected, call in calls.items():
        operations, launches = profiled(call)
        print(operations, launches)
        assert not SYNCHRONISING & set(operations) and sorted(operations) == sorted(expected)
        assert launches == ["_limit_kernel"] * bool(expected) + ["_suppress_kernel", "_merge_kernel"]


@compiled_only
def test_work_is_that_of_the_candidates(rng):
    """80 classes of 1,000 boxes: passes go over the candidates of a class, not over its boxes, and end with its candidates."""
    boxes, _, _ = labelled(rng, 1, 1000)
    counted = {}
    for share in (0.02, 0.2):
        scores = torch.from_numpy(rng.random((1, 1000, 80)) * (rng.random((1, 1000, 80)) < share)).float()
        with execute(90, seed=None, racecheck=0, count=True) as session:
            paa_gpu.batched_nms(boxes, scores, None, 0.6, score_thr=0.05, max_per_img=100)
        counted[share] = {name: work.warp_instructions for name, work in session.by_kernel().items()}
        print(share, {name: f"{number:,}" for name, number in counted[share].items()})
    assert counted[0.02]["_suppress_kernel"] <= 2_000_000 and counted[0.2]["_suppress_kernel"] <= 9_000_000
    assert counted[0.02]["_merge_kernel"] == counted[0.2]["_merge_kernel"] <= 40_000
