"""The voting kernel as it is executed: compiled for several capabilities, or interpreted (see `kernel_execution`)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, poisoned_outputs, slow_interpreted
from test_voting import make_pools

import paa_gpu
from paa_gpu import _ops, data, reference, testing
from paa_gpu._checks import FLOATS, INTEGERS
from paa_gpu.cpu import voting as cpu

#: score_thr, iou_thr, sigma, offset, keep_order
USUAL = (0.05, 0.01, 0.025, 0.0, False)
#: Detections and boxes of each image: tiles of 512 boxes, images without either. The interpreter takes 50 ms a tile and detection.
SHAPES = [(0, 0), (3, 600), (2, 0), (0, 7), (5, 40)] if INTERPRETER else [(0, 0), (30, 1100), (5, 0), (0, 7), (40, 512), (9, 513)]

#: Pixels between the kernel and the CPU loop in float32, each within half of it of float64; in float64 it is rounding alone.
TOLERANCE = {torch.float32: 2.5e-4, torch.float64: 1e-10}


def run(*args):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        result = _ops.score_voting(*args)
    assert_written(*result)
    return result


def assert_close(got, wanted):
    """Labels and scores exactly; boxes but for rounding, of narrow dtypes to the next number."""
    (bboxes, labels), (wanted_bboxes, wanted_labels) = got, wanted
    assert (bboxes.dtype, labels.dtype) == (wanted_bboxes.dtype, wanted_labels.dtype)
    assert torch.equal(labels, wanted_labels)
    assert torch.equal(bboxes[:, 4].nan_to_num(7), wanted_bboxes[:, 4].nan_to_num(7))
    limit = TOLERANCE.get(bboxes.dtype, 2048 * torch.finfo(bboxes.dtype).eps)
    torch.testing.assert_close(bboxes, wanted_bboxes, rtol=0, atol=limit, equal_nan=True)


def check(predictions, options=USUAL):
    assert_close(run(*predictions, *options), cpu.score_voting(*predictions, *options))


# --- results -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0.0, *slow_interpreted(1.0)])
def test_a_batch_equals_the_cpu_operator(session, dtype, offset, rng):
    check(testing.make_predictions(SHAPES, rng, num_classes=3, dtype=dtype), (0.05, 0.01, 0.025, offset, False))


@pytest.mark.parametrize("keep_order", [False, True])
def test_one_image_equals_the_cpu_operator(session, keep_order, rng):
    check(testing.make_predictions(SHAPES[1:2], rng, num_classes=3), (0.3, 0.1, 0.2, 0.0, keep_order))


@pytest.mark.parametrize("wide", [0, *(pytest.param(wide, marks=pytest.mark.long) for wide in (1, 2))])
def test_mixed_dtypes(session, wide, rng):
    """Sums in float64 as soon as one of the tensors is."""
    columns = list(testing.make_predictions(SHAPES, rng, num_classes=3, dtype=torch.bfloat16))
    column = (0, 2, 3)[wide]
    columns[column] = [tensor.double() for tensor in columns[column]]
    check(columns)


@pytest.mark.parametrize("detections", [3] if INTERPRETER else [1, 511, 512, 513, 1100])
def test_places_of_any_number_of_detections(session, detections, rng):
    """More detections than one tile of labels; few boxes."""
    check(testing.make_predictions([(2, 5), (detections, 5), (1, 5)], rng, num_classes=7, share=0.5))


@pytest.mark.parametrize(
    "dtype", [dtype if dtype in (torch.uint8, torch.uint32) else pytest.param(dtype, marks=pytest.mark.long) for dtype in INTEGERS],
    ids=str,
)  # fmt: skip
def test_label_dtypes(session, dtype, rng):
    det, labels, *rest = testing.make_predictions(SHAPES[-2:], rng, num_classes=3)
    check((det, [label.to(dtype) for label in labels], *rest))


def test_labels_that_are_no_class_read_nothing(session, rng):
    """Nor any memory: ptxrun refuses an address outside the tensors."""
    det, labels, *rest = testing.make_predictions([(9, 40), (9, 40)], rng, num_classes=2)
    for label in labels:
        label[:8] = torch.tensor([-1, 3, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1, 4])
    bboxes, _ = run(det, labels, *rest, *USUAL[:4], True)
    for image in range(2):
        assert torch.equal(bboxes[9 * image : 9 * image + 8], det[image][:8])
    check((det, labels, *rest))


def test_nothing_to_vote_for(session, rng):
    for shapes in ([(0, 9)], [(4, 0)], [(0, 0), (0, 3)], [(3, 0), (2, 0)]):
        check(testing.make_predictions(shapes, rng, num_classes=2))
    det, labels, boxes, scores = testing.make_predictions([(4, 9)], rng, num_classes=2)
    for other in (scores[0][:, :0], scores[0] * 0):
        check((det, labels, boxes, [other]))


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_boxes_that_are_not_finite(session, value, rng):
    """They cost themselves only: a voter's weight of zero times infinity would be NaN."""
    det, labels, boxes, scores = (column[0] for column in testing.make_predictions([(4, 60)], rng, num_classes=1))
    for i in range(1, 16):
        boxes[i, [side for side in range(4) if i >> side & 1]] = value
        scores[i] = 1
    det = torch.cat([det.nan_to_num(5, 5, 5), torch.cat([boxes[1:16], scores[1:16, :1]], 1)])
    labels = torch.zeros(len(det), dtype=torch.int64)
    bboxes, _ = run([det], [labels], [boxes], [scores], *USUAL)
    assert torch.equal(bboxes[4:].nan_to_num(7), det[4:].nan_to_num(7))
    assert bboxes[:4].isfinite().all()
    check(([det], [labels], [boxes], [scores]))


def test_the_floor_of_the_union_keeps_its_precision(session):
    """And so do the other constants: float32's 1e-6 would show."""
    boxes = 1000 + torch.tensor([[0, 0, 1e-4, 1e-4], [1e-5, 0, 11e-5, 1e-4]], dtype=torch.float64)
    det = torch.cat([boxes[:1], torch.ones(1, 1, dtype=torch.float64)], 1)
    image = (det, torch.tensor([0]), boxes, torch.tensor([[0.5], [1.0]], dtype=torch.float64))
    check([[tensor] * 2 for tensor in image], (0.05, 1e-3, 0.3, 0.0, False))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                INTERPRETER and dtype == torch.bfloat16,
                reason="Triton's interpreter cuts float32 to bfloat16 instead of rounding it",
            ),
        )
        for dtype in FLOATS
    ],
    ids=str,
)
def test_the_threshold_is_rounded_to_the_dtype_of_the_scores(session, dtype):
    """A score of 0.05 does not exceed it, though in float32 and in bfloat16 it is more than 0.05."""
    boxes = torch.tensor([[16.0, 16, 64, 64], [20, 16, 68, 64]], dtype=dtype)
    det = torch.cat([boxes[:1], torch.ones(1, 1, dtype=dtype)], 1)
    for score, moved in ((0.05, False), (0.0625, True)):
        image = (det, torch.tensor([0]), boxes, torch.tensor([[0.0], [score]], dtype=dtype))
        bboxes, _ = run(*([tensor] * 2 for tensor in image), *USUAL)
        assert torch.equal(bboxes[:1], det) != moved


def test_an_iou_of_the_threshold_does_not_vote(session):
    box, det = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 20, 0.9]])
    image = det, torch.tensor([0]), box, torch.tensor([[0.8]])
    for iou_thr, moved in ((0.5, False), (0.49, True)):
        bboxes, _ = run(*([tensor] for tensor in image), 0.05, iou_thr, 0.025, 0.0, False)
        assert torch.equal(bboxes, det) != moved


@pytest.mark.parametrize("path", data.voting_paths()[:1] + data.voting_paths()[-1:], ids=lambda path: path.stem)
def test_recorded_predictions(session, path):
    for call in data.load_voting(path):
        arguments = [tensor[:4] for tensor in call.arguments[:2]] if INTERPRETER else call.arguments[:2]
        tensors = (*arguments, *call.arguments[2:4])
        got, labels = run(*([tensor] for tensor in tensors), call.score_thr, *USUAL[1:])
        wanted, wanted_labels = reference.score_voting(*tensors, call.score_thr)
        assert torch.equal(labels, wanted_labels) and torch.equal(got[:, 4].double(), wanted[:, 4])
        assert (got - wanted).abs().max() <= 5e-4


@compiled_only
def test_225_000_candidates(rng):
    """80 classes, 5,000 boxes, 1,000 detections, 225,000 candidates."""
    predictions = testing.make_predictions([(1000, 5000)], rng, share=0.5625)
    assert abs(int((predictions.mlvl_nms_scores[0] > 0.05).sum()) - 225_000) < 1000
    with execute(90):
        check(predictions)


def test_the_public_functions(execution, rng):
    batch = testing.make_predictions(SHAPES, rng, num_classes=3)
    wanted = paa_gpu.score_voting_batch(*batch, 0.05)
    with execute(execution):
        got = paa_gpu.score_voting_batch(*batch, 0.05)
        one = paa_gpu.score_voting(*(column[-1] for column in batch), 0.05)
    for image in range(len(SHAPES)):
        assert_close((got[0][image], got[1][image]), (wanted[0][image], wanted[1][image]))
    assert torch.equal(one[0], got[0][-1]) and torch.equal(one[1], got[1][-1])


# --- how the inputs lie --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2])
def test_strided_inputs(session, images, rng):
    """With one image nothing makes its tensors contiguous but the copy of the scores."""
    predictions = testing.make_predictions([(4, 50)] * images, rng, num_classes=3)
    wanted = cpu.score_voting(*predictions, *USUAL)
    spread = [[torch.stack([t, torch.ones_like(t)], -1)[..., 0] for t in column] for column in predictions]
    turned = [[t.t().contiguous().t() for t in column] for column in predictions]
    for columns in (spread, turned):
        before = [[t.clone() for t in column] for column in columns]
        bboxes, labels = run(*columns, *USUAL)
        assert_close((bboxes, labels), wanted)
        bboxes.fill_(5), labels.fill_(5)
        for column, other in zip(columns, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(column, other, strict=True))


def test_offsets_beyond_two_to_the_31(session, rng):
    """Memory that nobody touches costs nothing: the last of nine rows lies 2^31 elements behind the first."""
    stride, rows = 2**28 + 1, 9
    predictions = testing.make_predictions([(rows, rows)], rng, num_classes=2, dtype=torch.float16)
    det, labels, boxes = (
        torch.empty(stride * (rows - 1) + 5, dtype=column[0].dtype) for column in (predictions[0], predictions[1], predictions[2])
    )
    far = det.as_strided((rows, 5), (stride, 1)), labels[::stride], boxes.as_strided((rows, 4), (stride, 1))
    for view, column in zip(far, predictions[:3], strict=True):
        view.copy_(column[0])
    check(([far[0]], [far[1]], [far[2]], predictions[3]))


# --- repeatability, operations, work -------------------------------------------------------------------------------------------


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    predictions = testing.make_predictions([(40, 1500), (30, 600)], rng, num_classes=2)
    results = []
    for seed in (None, 0, 1, 2):
        with execute(90, seed=seed):
            results.append(run(*predictions, *USUAL))
    for (bboxes, labels), (other_bboxes, other_labels) in itertools.pairwise(results):
        assert torch.equal(bboxes, other_bboxes) and torch.equal(labels, other_labels)


@compiled_only
@pytest.mark.parametrize("shapes", [[(1, 1), (1, 1)], SHAPES, [(100, 1000)] * 16], ids=["small", "uneven", "16 images"])
def test_device_operations_of_a_batch(shapes, rng):
    """At most 3 and no synchronisation, whatever the images, detections and boxes."""
    batch = testing.make_predictions(shapes, rng, num_classes=4)
    operations, launches = profiled(lambda: paa_gpu.score_voting_batch(*batch, 0.05))
    print(operations, launches)
    assert len(operations) + len(launches) <= 3 and not SYNCHRONISING & set(operations)
    assert operations == ["stage"] and launches == ["_gather_kernel", "_vote_kernel"]


@compiled_only
@pytest.mark.parametrize("classes", [1, 80])
def test_device_operations_of_an_image(classes, rng):
    image = [column[0] for column in testing.make_predictions([(100, 1000)], rng, num_classes=classes)]
    operations, launches = profiled(lambda: paa_gpu.score_voting(*image, 0.05))
    print(operations, launches)
    assert len(operations) + len(launches) <= 2 and not SYNCHRONISING & set(operations)
    assert operations == [] and launches == ["_gather_kernel", "_vote_kernel"]


@compiled_only
@pytest.mark.parametrize("path", data.voting_paths()[:1] + data.voting_paths()[-1:], ids=lambda path: path.stem)
def test_sectors_loaded(path):
    """At most twice the bytes needed, with one class and with 80."""
    call = data.load_voting(path)[0]
    with execute(90, seed=None, racecheck=0, count=True) as session:
        paa_gpu.score_voting(*call.arguments)
    for name, work in session.by_kernel().items():
        print(f"{call.name}, {name}: {work.load_sectors / (work.load_bytes / 32):.2f} of the sectors needed; {work}")
        # Gathered: a sector holds the scores of eight classes, of which not all are wanted.
        assert name == "_gather_kernel" or work.load_sectors <= 2 * work.load_bytes / 32


@compiled_only
def test_only_what_is_read_is_turned_around(rng):
    """Scores of the classes that the image's detections have; a sector of eight of them for each at most."""
    det, labels, boxes, scores = testing.make_predictions([(20, 4000), (30, 2000)], rng, num_classes=80)
    labels = [torch.full_like(label, 7 + 60 * image) for image, label in enumerate(labels)]
    with execute(90, seed=None, racecheck=0, count=True) as session:
        check((det, labels, boxes, scores))
    work = session.by_kernel()["_gather_kernel"]
    print(work)
    read = 6000 * (4 + 1) * 4
    assert work.store_bytes == read
    assert work.load_bytes <= 32 * 6000 * (4 + 32) * 4 and work.load_sectors <= 6000 * (1 + 1) + 20_000


def test_padded_detections(session, rng):
    """Images of one size in one tensor each, some detections of which are padding."""
    columns = testing.make_predictions([(3, 40)] * 2, rng, num_classes=3)
    tensors = [torch.stack(column) for column in columns]
    tensors[1][1, 1:] = torch.iinfo(torch.int64).max
    with poisoned_outputs():
        got = _ops.score_voting_padded(*tensors, *USUAL)
    assert_written(*got)
    wanted = cpu.score_voting_padded(*tensors, *USUAL)
    assert got[0].shape == (2, 3, 5)
    assert_close([part.flatten(0, 1) for part in got], [part.flatten(0, 1) for part in wanted])


# --- several pools of candidates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *slow_interpreted(torch.float64, torch.float16)], ids=str)
def test_pools_equal_the_cpu_operator(session, dtype, rng):
    _, pooled = make_pools(rng, images=2, dtype=dtype)
    flat = [*pooled[:2], *([part for image in column for part in image] for column in pooled[2:])]
    options = 0.2, 0.01, 0.025, 0.0, False, [1.0, 0.3, 2.5]
    check(flat, options)
    check([flat[0][1:], flat[1][1:], flat[2][3:], flat[3][3:]], options)


@compiled_only
def test_device_operations_of_pools(rng):
    """Two launches and a copy, however many pools."""
    _, pooled = make_pools(rng, images=2, pools=5)
    operations, launches = profiled(lambda: paa_gpu.score_voting_batch(*pooled, 0.05))
    assert not SYNCHRONISING & set(operations) and sorted(operations) == ["stage"]
    assert launches == ["_gather_kernel", "_vote_kernel"]
