"""The operators as torch sees them: schema, fake, opcheck, compile; and what importing does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_fusion import make_models
from torch._subclasses.fake_tensor import FakeTensorMode

import paa_gpu
from paa_gpu import _dispatch, _ops, testing

FIT = ("diag", 1e-3, 1e-6, 100, "float64")


@pytest.fixture
def batch(rng):
    """Every ground truth has a fit: opcheck takes NaN for a difference."""
    return testing.make_batch(
        [3, 0, 5], rng, shapes=["unimodal"], level_sizes=(60, 40), sizes=(2, 9), num_classes=4, dtype=torch.float32
    )


def calls(batch):
    """Every operator with arguments of every kind it takes."""
    losses, label, label_weight, bbox_weight, inds, gts = batch.arguments[:6]
    sizes = [size for levels in batch.anchors for size in levels]
    loss, index, count = _ops.select_candidates(losses, inds, gts, sizes, batch.num_gts, 9)
    mask = index >= 0
    two = torch.tensor([[0.25, 0.75]])
    yield _ops.select_candidates, (losses, inds, gts, sizes, batch.num_gts, 9)
    yield _ops.select_candidates, ([loss.half() for loss in losses[:1]], inds[:1], gts[:1], [60, 40], [3], 2)
    yield _ops.fit_gmm_1d, (loss, count, None, None, None, None, *FIT)
    yield _ops.fit_gmm_1d, (torch.rand(9, 4).T, None, None, two, two, two[:, :1], "tied", 0.0, 0.0, 1, "float32")
    yield _ops.fit_gmm_1d, (torch.rand(9), None, [2, 3, 4], None, None, None, *FIT)
    parameters = [torch.rand(5, 2) + 0.1 for _ in range(3)]
    for what in _ops.READOUTS:
        yield _ops.read_mixture, (torch.rand(5, 4), count[:5] * 0 + 4, None, *parameters, what)
        yield _ops.read_mixture, (torch.rand(9, 1)[:, 0], None, [2, 3, 1, 1, 2], *(p.double() for p in parameters), what)
    yield _ops.fit_candidates, (losses, inds, gts, sizes, batch.num_gts, 9, "diag", "float32")
    yield _ops.write_targets, (label, label_weight, bbox_weight, inds, index, mask, mask, 4)
    predictions = testing.make_predictions([(3, 9), (0, 5), (4, 0)], np.random.default_rng(0), num_classes=2)
    yield _ops.score_voting, (*predictions, 0.05, 0.01, 0.025, 0.0, False)
    yield (
        _ops.score_voting,
        ([predictions[0][0].half()], [predictions[1][0].int()], *(c[:1] for c in predictions[2:]), 0.05, 0.0, 1.0, 1.0, True),
    )
    pools = [predictions[0][:2], predictions[1][:2], predictions[2][:2] * 2, predictions[3][:2] * 2]
    yield _ops.score_voting, (*pools, 0.05, 0.01, 0.025, 0.0, False, [1.0, 0.5])
    padded = [torch.stack([part, part]) for part in (column[0] for column in predictions)]
    yield _ops.score_voting_padded, (*padded, 0.05, 0.01, 0.025, 0.0, False)
    head = testing.make_head_batch([5, 0, 9], np.random.default_rng(0))
    yield _ops.candidate_losses, (*map(list, head), 2.0, 0.25, 1.0, 1.3, [0.1, 0.1, 0.2, 0.2], 0.016, "l1", "torchvision")
    boxes = [testing.make_boxes(number, (99, 99), np.random.default_rng(1)) for number in (4, 0, 2)]
    valid = [label == 1 for label in head.label]
    yield _ops.assign_max_iou, (head.anchors, boxes, boxes[::-1], valid, False, 0.1, 0.1, 0.0, 0.5, 1e-6, True, False, "gt")
    yield _ops.assign_max_iou, (head.anchors, boxes, [], [], False, 0.5, 0.4, 0.0, -1.0, 1e-6, False, True, "gt")
    each = [level for image in range(3) for level in (head.anchors[0][image:], head.anchors[1])]
    yield _ops.assign_max_iou, (each, boxes, [], [], True, 0.7, 0.3, 0.0, -1.0, 0.0, True, True, "anchor")
    boxes, scores = torch.rand(2, 9, 4), torch.rand(2, 9, 3)
    yield _ops.batched_nms, (boxes, scores, None, None, 0.5, 0.1, 5, 4, "hard", 0.5, 1e-3, False)
    flat = boxes.flatten(0, 1).half(), scores[..., :1].flatten(0, 1), torch.arange(18) % 2, [11, 0, 7]
    yield _ops.batched_nms, (*flat, 0.5, None, 0, 0, "gaussian", 0.5, 1e-3, True)
    yield _ops.weighted_boxes_fusion, (flat[0], flat[1][:, 0].abs(), flat[2], [4, 7, 0, 7], [1.0, 2.0], 0.5, 0.1, "max", False)
    image = [column[2] for column in batch.arguments[:6]]
    yield _ops.paa_reassign, (*image, [60, 40], 5, 4, 9, "diag", "mmdet", "background", "float32")
    yield _ops.paa_reassign_batch, (*batch.arguments[:6], sizes, batch.num_gts, 4, 9, "tied", "b", "positive", "float64")


@pytest.mark.slow
def test_opcheck(batch):
    for operator, arguments in calls(batch):
        torch.library.opcheck(operator.overload, arguments)


def test_every_operator_is_called(batch):
    assert {operator.name for operator, _ in calls(batch)} == set(_dispatch.OPERATORS)


def memory(values):
    """Where the memory of each tensor begins, also of those in lists."""
    tensors = [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]
    return [t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor) and t.numel()]


def test_results_share_no_memory_with_arguments_or_each_other(batch):
    """`opcheck` compares storages, and memory that numpy and torch share has two of them."""
    for operator, arguments in calls(batch):
        results = operator(*arguments)
        made = memory([results] if isinstance(results, torch.Tensor) else results)
        assert len({*made}) == len(made) and not {*made} & {*memory(arguments)}, operator.name


def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results(batch):
    for operator, arguments in calls(batch):
        real = operator(*arguments)
        mode = FakeTensorMode()

        def fake(value, mode=mode):
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        with mode:
            faked = operator(*map(fake, arguments))
        if isinstance(real, torch.Tensor):
            real, faked = [real], [faked]
        for a, b in zip(real, faked, strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_the_public_functions_on_fake_cuda_tensors(batch):
    """No device, no data: shapes and devices only. The batch call takes nothing from the data when it knows num_gts."""
    with FakeTensorMode():
        columns = [[torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in column] for column in batch.arguments[:6]]
        got = paa_gpu.paa_reassign_batch(*columns, batch.anchors, **batch.options)
        gmm = paa_gpu.fit_gmm_1d(torch.empty(8, 45, device="cuda"))
        shapes = ((3, 5), torch.float32), ((3,), torch.int64), ((9, 4), torch.float32), ((9, 2), torch.float32)
        predictions = [[torch.empty(shape, dtype=dtype, device="cuda")] * 2 for shape, dtype in shapes]
        voted, labels = paa_gpu.score_voting_batch(*predictions, 0.05)
    assert [label.shape for label in got.label] == [label.shape for label in batch.label]
    assert [(t.shape, t.device.type) for t in (*voted, *labels)] == [((3, 5), "cuda")] * 2 + [((3,), "cuda")] * 2
    assert got.num_pos.device.type == got.fit.means.device.type == gmm.means.device.type == "cuda"


@pytest.mark.parametrize("separation", ["mmdet", paa_gpu.separation.separate], ids=["built in", "callable"])
def test_the_batch_call_compiles_whole(batch, separation):
    anchors, options = batch.anchors, {**batch.options, "separation": separation}

    def reassign(*columns):
        return paa_gpu.paa_reassign_batch(*columns, anchors, **options)

    wanted = reassign(*batch.arguments[:6])
    got = torch.compile(reassign, fullgraph=True, backend="aot_eager")(*batch.arguments[:6])
    for field in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(got, field), getattr(wanted, field), strict=True))
    assert torch.equal(got.num_pos, wanted.num_pos)
    assert torch.equal(got.fit.n_iter, wanted.fit.n_iter)


def test_the_building_blocks_compile_whole(batch):
    def both(losses, inds, gts):
        candidates = paa_gpu.select_candidates(losses, inds, gts, [60, 40], num_gt=5)
        gmm = paa_gpu.fit_gmm_1d(candidates.loss, candidates.count)
        return candidates.index, gmm.means, gmm.predict(candidates.loss, candidates.count)

    arguments = batch.pos_losses[2], batch.pos_inds[2], batch.pos_gt_inds[2]
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(both(*arguments), compiled(*arguments), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_score_voting_compiles_whole(rng):
    batch = testing.make_predictions([(5, 20), (0, 4), (3, 9)], rng, num_classes=3)
    wanted = paa_gpu.score_voting_batch(*batch, 0.05)
    got = torch.compile(paa_gpu.score_voting_batch, fullgraph=True, backend="aot_eager")(*batch, 0.05)
    one = torch.compile(paa_gpu.score_voting, fullgraph=True, backend="aot_eager")(*(column[0] for column in batch), 0.05)
    for a, b in zip((*got[0], *got[1], *one), (*wanted[0], *wanted[1], wanted[0][0], wanted[1][0]), strict=True):
        assert torch.equal(a, b)


def test_nms_compiles_whole():
    boxes, scores = torch.rand(2, 30, 4), torch.rand(2, 30, 3)
    wanted = paa_gpu.batched_nms(boxes, scores, None, 0.5, max_per_img=9)
    got = torch.compile(paa_gpu.batched_nms, fullgraph=True, backend="aot_eager")(boxes, scores, None, 0.5, max_per_img=9)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_nms_of_lengths_that_depend_on_data_compiles_whole(monkeypatch):
    """With `max_per_img` the results have one shape."""
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    boxes, scores = torch.rand(30, 4), torch.rand(30, 3)

    def both(boxes, scores):
        chosen = [scores[:, 0] > 0.3, scores[:, 1] < 0.6]
        return paa_gpu.batched_nms([boxes[each] for each in chosen], [scores[each] for each in chosen], None, 0.5, max_per_img=9)

    got, wanted = torch.compile(both, fullgraph=True, backend="aot_eager")(boxes, scores), both(boxes, scores)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("per_location", [1, 3])
def test_losses_of_any_channels_compile_whole(per_location, rng):
    anchors = testing.make_anchors([(3, 5)])[0].repeat_interleave(per_location, 0)
    size = len(anchors)
    columns = [torch.arange(size) % 3], [torch.ones(size)], [anchors + 1], [torch.ones(size, 4)], [torch.arange(size)]

    def losses(scores, deltas):
        return paa_gpu.candidate_losses([anchors], [scores], [deltas], *columns)[0]

    maps = torch.randn(1, 2 * per_location, 3, 5), torch.randn(1, 4 * per_location, 3, 5)
    assert torch.equal(torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=True)(*maps), losses(*maps))


def test_a_graph_that_reaches_an_operator_is_left(batch):
    """The public functions leave it. A program that was decomposed calls operators with tensors that have graphs."""
    boxes, scores = torch.rand(2, 30, 4, requires_grad=True), torch.rand(2, 30, 3, requires_grad=True)
    arguments = None, None, 0.5, None, 0, 9, "hard", 0.5, 1e-3, False
    got = torch.ops.paa_gpu.batched_nms(boxes, scores, *arguments)
    wanted = torch.ops.paa_gpu.batched_nms(boxes.detach(), scores.detach(), *arguments)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, wanted, strict=True))
    losses = [loss.clone().requires_grad_() for loss in batch.pos_losses]
    arguments = batch.pos_inds, batch.pos_gt_inds, [60, 40] * len(losses), batch.num_gts, 9
    got, wanted = (torch.ops.paa_gpu.select_candidates(each, *arguments) for each in (losses, batch.pos_losses))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, wanted, strict=True))


def test_fusion_compiles_whole(rng):
    columns = list(zip(*(make_models([9, 7], rng) for _ in range(2)), strict=True))
    wanted = paa_gpu.weighted_boxes_fusion(*columns)
    got = torch.compile(paa_gpu.weighted_boxes_fusion, fullgraph=True, backend="aot_eager")(*columns)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_way_from_boxes_to_losses_compiles_whole(rng):
    head = testing.make_head_batch([20, 0, 9], rng)
    boxes = [testing.make_boxes(number, (130, 100), rng) for number in (4, 0, 2)]

    def both(*columns):
        return paa_gpu.candidate_losses(*columns), paa_gpu.assign_max_iou(columns[0], boxes)

    wanted, got = both(*head), torch.compile(both, fullgraph=True, backend="aot_eager")(*head)
    for a, b in zip((*got[0], *got[1][0], *got[1][1]), (*wanted[0], *wanted[1][0], *wanted[1][1]), strict=True):
        assert torch.equal(a, b)


def test_importing_is_light():
    """Neither Triton nor numba nor scikit-learn nor a device: they come with the first call that needs them."""
    code = """
import sys, torch
before = set(sys.modules)
import paa_gpu
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "numba", "sklearn", "matplotlib"}, new
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
