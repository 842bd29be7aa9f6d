"""What only a GPU can show: no synchronisation, CUDA graphs, other devices than the current one. Skipped without one.

That the results are right is shown there by the same suite as everywhere: `pytest --execution cuda`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu import testing
from paa_gpu.separation import separate

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def batch() -> testing.Batch:
    return testing.make_batch([0, 7, 1, 0, 40, 3], np.random.default_rng(0), dtype=torch.float32)


def make_predictions() -> testing.Predictions:
    return testing.make_predictions([(30, 900), (0, 5), (4, 0), (9, 600)], np.random.default_rng(0), num_classes=4)


def tensors(got: paa_gpu.Reassignment) -> list[torch.Tensor]:
    images = [*got.label, *got.label_weight, *got.bbox_weight, *got.positive, *got.ignored]
    return [*images, got.num_pos, *got.fit[:7], got.fit_image, got.fit_gt]


def assert_equal(got: paa_gpu.Reassignment, wanted: paa_gpu.Reassignment) -> None:
    """Equal but for the last bits of the parameters."""
    for a, b in zip(tensors(got), tensors(wanted), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("separation", ["mmdet", separate], ids=["built in", "callable"])
def test_the_batch_call_does_not_synchronise(batch, separation, request):
    wanted = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, separation=separation)
    on_device = batch.to("cuda")
    paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options, separation=separation)  # compiles
    request.getfixturevalue("no_synchronisation")
    got = paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options, separation=separation)
    torch.cuda.set_sync_debug_mode("default")
    assert_equal(got, wanted)


def test_the_building_blocks_do_not_synchronise(request):
    x = torch.rand(10, 45, device="cuda")
    rows = [torch.rand(n, device="cuda") for n in (45, 2, 100)]
    inds = torch.arange(20, device="cuda")
    predictions = make_predictions().to("cuda")
    head = testing.make_head_batch([40, 0, 9], np.random.default_rng(0)).to("cuda")
    boxes = [testing.make_boxes(number, (130, 100), np.random.default_rng(0)).cuda() for number in (4, 0, 2)]
    calls = [
        lambda: paa_gpu.fit_gmm_1d(x),
        lambda: paa_gpu.fit_gmm_1d(rows),
        lambda: paa_gpu.select_candidates(x[0, :20], inds, inds % 3, [10, 10], num_gt=3),
        lambda: paa_gpu.score_voting(*(column[0] for column in predictions), 0.05),
        lambda: paa_gpu.score_voting_batch(*predictions, 0.05),
        lambda: paa_gpu.candidate_losses(*head),
        lambda: paa_gpu.assign_max_iou(head.anchors, boxes, boxes, ignore_iof_thr=0.5),
    ]
    for call in calls:
        call()
    request.getfixturevalue("no_synchronisation")
    for call in calls:
        call()


def test_a_captured_graph(batch):
    on_device = batch.to("cuda")

    def call():
        return paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options)

    wanted = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for losses in on_device.pos_losses:
        losses.mul_(2)
    for _ in range(3):
        graph.replay()
    doubled = paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options)
    assert_equal(captured, doubled)
    assert not torch.equal(wanted.fit.means, doubled.fit.means)


def test_a_captured_graph_does_not_need_what_the_call_returned(batch):
    """Only the labels are kept. The table that each replay reads lies in memory that nobody else gets."""
    on_device = batch.to("cuda")
    graph, label = capture(lambda: paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options).label)
    for losses in on_device.pos_losses:
        losses.mul_(2)
    for _ in range(3):
        churn_memory()
        graph.replay()
    wanted = paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options).label
    assert all(torch.equal(a, b) for a, b in zip(label, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")
def test_another_device_than_the_current_one(batch):
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    on_device = batch.to(other)
    got = paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options)
    assert torch.cuda.current_device() != other.index
    assert all(tensor.device == other for tensor in tensors(got))
    assert_equal(got, paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options))


def test_work_on_a_busy_stream(batch):
    """The inputs are written behind a wait on the stream: a kernel, a copy or a fill that does not queue behind it reads zeros."""
    on_device, stream = batch.to("cuda"), torch.cuda.Stream()
    sources = [[tensor.clone() for tensor in column] for column in on_device[:6]]
    for column in on_device[:6]:
        for tensor in column:
            tensor.zero_()
    with torch.cuda.stream(stream):
        # Compiles, and takes the memory that the stream needs: to get memory from the driver may wait.
        paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for column, source in zip(on_device[:6], sources, strict=True):
            for tensor, values in zip(column, source, strict=True):
                tensor.copy_(values)
        got = paa_gpu.paa_reassign_batch(*on_device.arguments, **batch.options)
    assert not stream.query(), "the stream was not busy long enough to show anything"
    stream.synchronize()
    assert_equal(got, paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options))


def capture(call):
    """The graph of a call and what it gives, after a first call that compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def churn_memory():
    """Other calls take what pinned and device memory is free, and write into it."""
    for size in (1, 3, 17, 200):
        values = torch.full((size * 64,), -1, dtype=torch.int64).pin_memory()
        values.to("cuda", non_blocking=True)
        paa_gpu.fit_gmm_1d([torch.rand(n + 2, device="cuda") for n in range(size)])
    torch.cuda.synchronize()


def test_captured_graphs_of_assignment_and_losses():
    rng = np.random.default_rng(0)
    head = testing.make_head_batch([40, 0, 9], rng).to("cuda")
    boxes = [testing.make_boxes(number, (130, 100), rng).cuda() for number in (4, 0, 2)]
    for call, changed in (
        (lambda: paa_gpu.assign_max_iou(head.anchors, boxes), boxes[0]),
        (lambda: paa_gpu.candidate_losses(*head), head.cls_scores[0]),
    ):
        graph, captured = capture(call)
        changed.mul_(0.5)
        wanted = call()
        for _ in range(3):
            churn_memory()
            graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(flat(captured), flat(wanted), strict=True):
            assert torch.equal(a, b)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [tensor for item in value for tensor in flat(item)]


def test_a_captured_training_step_of_the_head():
    """Losses and their gradients, replayed with other features while memory is taken and given back."""
    head = paa_gpu.PAAHead(3, 8, 8, 1, norm_groups=4, strides=(8, 16)).to("cuda")
    features = [torch.randn(2, 8, 8 // level, 12 // level, device="cuda") for level in (1, 2)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 8.0, 90.0, 60.0]], device="cuda")
    targets = [{"boxes": boxes[:count], "labels": torch.ones(count, dtype=torch.int64, device="cuda")} for count in (2, 0)]

    def train():
        losses = head.loss(features, targets, [(64, 96), (60, 80)])
        return losses, torch.autograd.grad(sum(losses.values()), list(head.parameters()))

    graph, (losses, gradients) = capture(train)
    for level in features:
        level.normal_()
    wanted, wanted_gradients = train()
    for _ in range(3):
        churn_memory()
        graph.replay()
    torch.cuda.synchronize()
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def assert_voted(got: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    """Equal to the CPU but for the last bits of the boxes."""
    for a, b in zip((*got[0], *got[1]), itertools.chain(*paa_gpu.score_voting_batch(*make_predictions(), 0.05)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2.5e-4)


def test_a_captured_graph_of_score_voting():
    predictions = make_predictions().to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        paa_gpu.score_voting_batch(*predictions, 0.05)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paa_gpu.score_voting_batch(*predictions, 0.05)
    for bboxes in captured[0]:
        bboxes.zero_()
    for _ in range(3):
        graph.replay()
    assert_voted(captured)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")
def test_score_voting_on_another_device_than_the_current_one():
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    got = paa_gpu.score_voting_batch(*make_predictions().to(other), 0.05)
    assert all(tensor.device == other for tensor in (*got[0], *got[1]))
    assert_voted(got)


def test_training_the_head_does_not_synchronise(request):
    head = paa_gpu.PAAHead(3, 8, 8, 1, norm_groups=4, strides=(8, 16)).to("cuda")
    features = [torch.randn(2, 8, 8 // level, 12 // level, device="cuda") for level in (1, 2)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 8.0, 90.0, 60.0]], device="cuda")
    targets = [{"boxes": boxes[:count], "labels": torch.ones(count, dtype=torch.int64, device="cuda")} for count in (2, 0)]

    def train():
        sum(head.loss(features, targets, [(64, 96), (60, 80)]).values()).backward()

    train()  # compiles
    request.getfixturevalue("no_synchronisation")
    train()


def test_assignment_of_many_blocks_at_once():
    """Thousands of programs at once: the bits are the CPU's, every time."""
    rng = np.random.default_rng(0)
    anchors = testing.make_anchors([(200, 200), (100, 100), (50, 50)])
    boxes = [testing.make_boxes(number, (1600, 1600), rng) for number in (40, 0, 300, 1) * 4]
    wanted = paa_gpu.assign_max_iou(anchors, boxes)
    on_device = [boxes.cuda() for boxes in anchors], [image.cuda() for image in boxes]
    for _ in range(20):
        got = paa_gpu.assign_max_iou(*on_device)
        for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
            assert torch.equal(a.cpu(), b)


def test_losses_of_a_large_batch():
    """`ex2.approx` of a GPU is an approximation: the sum over the classes is held to the same part of its value."""
    batch = testing.make_head_batch([5000, 0, 9000], np.random.default_rng(0), ((100, 100), (50, 50)), num_classes=80)
    for a, b in zip(paa_gpu.candidate_losses(*batch.to("cuda")), paa_gpu.candidate_losses(*batch), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=0)
