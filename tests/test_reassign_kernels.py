"""The reassignment as it is executed on the device: results against the CPU operators, and the number of device operations."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from device_operations import SYNCHRONISING, profiled
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, poisoned_outputs, slow_interpreted

import paa_gpu
from paa_gpu import _ops, testing
from paa_gpu.cpu import reassign as cpu
from paa_gpu.separation import SCHEMES, separate

#: Images without boxes at the start, in the middle and at the end.
NUM_GTS = [0, 2, 1, 0, 4, 0] if INTERPRETER else [0, 7, 1, 0, 40, 3, 0]

#: Of max(1, |value|): both sides run the same steps in float64, in another order of summation.
TOLERANCE = 1e-12


def sizes_of(batch):
    return [size for sizes in batch.anchors for size in sizes]


def arguments(batch, topk=9, covariance_type="diag", separation="mmdet", singleton="background", precision="float64"):
    """Of the operator `paa_reassign`."""
    options = topk, covariance_type, separation, singleton, precision
    return *batch[:6], sizes_of(batch), batch.num_gts, batch.num_classes, *options


def run(operator, *args):
    """The operator on poisoned memory."""
    with poisoned_outputs():
        result = operator(*args)
    assert_written(*result)
    return result


def assert_same(got: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]):
    """Integers, masks and targets equal, parameters of the fit but for rounding."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        else:
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), i


# --- results -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separation", SCHEMES)
@pytest.mark.parametrize("singleton", ["background", *slow_interpreted("positive")])
def test_a_batch_equals_the_cpu_operator(session, separation, singleton, rng):
    batch = testing.make_batch(NUM_GTS, rng, dtype=torch.float32)
    args = arguments(batch, separation=separation, singleton=singleton)
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))


@pytest.mark.parametrize("dtype", [torch.float16, *slow_interpreted(torch.bfloat16, torch.float64)], ids=str)
def test_loss_dtypes(session, dtype, rng):
    args = arguments(testing.make_batch(NUM_GTS, rng, dtype=dtype), separation="d", covariance_type="tied")
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))


@pytest.mark.parametrize("dtype", [torch.float16, *slow_interpreted(torch.bfloat16, torch.float64)], ids=str)
def test_weight_dtypes(session, dtype, rng):
    batch = testing.make_batch(NUM_GTS, rng, dtype=torch.float32)
    names = ("label_weight", "bbox_weight")
    args = arguments(batch._replace(**{n: [t.to(dtype) for t in getattr(batch, n)] for n in names}), separation="d")
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))


@pytest.mark.parametrize("num_gts", [[3], [0], [0, 0], [0, 2], [2, 0]], ids=str)
def test_images_without_boxes(session, num_gts, rng):
    args = arguments(testing.make_batch(num_gts, rng, dtype=torch.float32))
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))


@pytest.mark.parametrize("declared", [[0, 0, 0, 0], [0, 1, 0, 2]], ids=["no ground truths", "fewer ground truths"])
def test_potential_positives_without_a_ground_truth_are_background(session, declared, rng):
    batch = testing.make_batch([0, 3, 0, 4], rng, dtype=torch.float32)._replace(num_gts=declared)
    args = arguments(batch)
    label, _, bbox_weight, num_pos, *_, positive, _ = run(_ops.paa_reassign_batch, *args)
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))
    assert int(num_pos.sum()) == int(positive.sum()) == int((label != batch.num_classes).sum()) == int(bbox_weight.any(1).sum())


def test_ground_truths_without_potential_positives(session, rng):
    batch = testing.make_batch([0, 2, 0], rng, dtype=torch.float32)._replace(num_gts=[4, 5, 6])
    args = arguments(batch)
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))
    nothing = testing.make_batch([0, 0], rng, dtype=torch.float32)._replace(num_gts=[3, 1])
    assert_same(run(_ops.paa_reassign_batch, *arguments(nothing)), cpu.paa_reassign_batch(*arguments(nothing)))


def test_no_anchors_at_all(session):
    """Every index is then out of range, and a row has room for no candidate."""
    inds, nothing = torch.tensor([0, 3, -1]), torch.zeros(0, dtype=torch.int64)
    columns = [[t] for t in (torch.zeros(3), nothing, torch.zeros(0), torch.zeros(0, 4), inds, torch.zeros_like(inds))]
    *targets, num_pos = run(_ops.paa_reassign_batch, *columns, [0], [1], 80, 9, "diag", "mmdet", "positive", "float64")[:4]
    assert [len(t) for t in targets] == [0, 0, 0] and num_pos.tolist() == [0]


def test_more_images_than_a_block_has(session):
    """No image has a potential positive, so nothing but the first step gives their numbers."""
    images, none = 130, torch.zeros(0, dtype=torch.int64)
    row = torch.zeros(0), torch.full((1,), 80), torch.ones(1), torch.ones(1, 4), none, none
    columns = [[tensor] * images for tensor in row]
    options = 80, 9, "diag", "mmdet", "background", "float64"
    num_pos = run(_ops.paa_reassign_batch, *columns, [1] * images, [0] * images, *options)[3]
    assert num_pos.tolist() == [0] * images


def test_nothing_to_write(session):
    none = torch.zeros(0, dtype=torch.int64)
    targets = [none], [torch.zeros(0)], [torch.zeros(0, 4)], [none]
    masks = torch.zeros(0, 0, dtype=torch.bool)
    num_pos = run(_ops.write_targets, *targets, none.view(0, 0), masks, masks, 80)[3]
    assert num_pos.tolist() == [0]


def test_a_ground_truth_that_is_not_finite_costs_itself_only(session, rng):
    batch = testing.make_batch([6, 5], rng, shapes=["bimodal"], sizes=(5, 9), dtype=torch.float32)
    batch.pos_losses[0][(batch.pos_gt_inds[0] == 2).nonzero()[0]] = torch.nan
    args = arguments(batch, singleton="positive", separation="paper")
    got = run(_ops.paa_reassign_batch, *args)
    assert_same(got, cpu.paa_reassign_batch(*args))
    assert got[10].tolist() == [row != 2 for row in range(11)]


def test_inputs_stay_and_lie_anywhere(session, rng):
    """One image: no concatenation makes its tensors contiguous."""
    batch = testing.make_batch([5], rng, dtype=torch.float32)

    def spread(tensor):
        return torch.stack([tensor, torch.ones_like(tensor)], -1)[..., 0]

    columns = [[spread(t) for t in column] for column in batch[:6]]
    columns[4], columns[5] = [t.int() for t in columns[4]], [t.int() for t in columns[5]]
    before = [[t.clone() for t in column] for column in columns]
    wanted = cpu.paa_reassign_batch(*arguments(batch))
    got = run(_ops.paa_reassign_batch, *columns, *arguments(batch)[6:])
    assert_same(got, wanted)
    for target in got[:3]:
        target.fill_(5)
    assert_same([t for column in columns for t in column], [t for column in before for t in column])


def test_indices_out_of_range_write_nothing(session):
    """Also where they would be in range of the next image, or of the memory around."""
    inds = torch.tensor([0, -1, 6, 1, 2**40, -(2**62), 2, 3, 4, 5, 2**63 - 1])
    gts = torch.tensor([0, 0, 0, -1, 0, 0, 2**40, 1, 1, 7, 0])
    label, weight, boxes = torch.full((6,), 3), torch.full((6,), 3.0), torch.full((6, 4), 3.0)
    one = (torch.arange(11.0), label, weight, boxes, inds, gts)
    other = (torch.ones(1), label + 1, weight + 1, boxes + 1, torch.tensor([-1]), torch.tensor([0]))
    columns = [list(column) for column in zip(other, one, other, strict=True)]
    args = *columns, [6] * 3, [1, 2, 1], 80, 9, "diag", "mmdet", "positive", "float64"
    got = run(_ops.paa_reassign_batch, *args)
    # 0 is alone with its ground truth; 3 and 4 share one; 1, 2 and 5 have no ground truth and become background.
    assert got[0].tolist() == [4] * 6 + [3, 80, 80, 3, 80, 80] + [4] * 6
    assert got[2].tolist() == [[4.0] * 4] * 6 + [[float(v)] * 4 for v in (3, 0, 0, 3, 0, 0)] + [[4.0] * 4] * 6
    assert got[3].tolist() == [0, 2, 0]
    masks = torch.ones(3, 1, dtype=torch.bool)
    written = run(_ops.write_targets, *columns[1:5], torch.tensor([[-1], [12], [13]]), masks, masks, 80)
    assert written[0].tolist() == [4] * 6 + [80] * 6 + [4] * 6 and written[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("separation", ["mmdet", "d"])
def test_anchors_that_occur_twice(session, separation, rng):
    """A positive gets the targets of its anchor back, whatever else the anchor was; ignored by one, it has no label_weight."""
    batch = testing.make_batch([4, 0, 3], rng, ["bimodal"], (8, 12), dtype=torch.float32)
    for inds in (batch.pos_inds[0], batch.pos_inds[2]):
        inds[::2] = inds[1]
    args = arguments(batch, separation=separation)
    got = run(_ops.paa_reassign_batch, *args)
    assert_same(got, cpu.paa_reassign_batch(*args))
    first = 0
    for image, (label, inds) in enumerate(zip(batch.label, batch.pos_inds, strict=True)):
        positive, ignored = (mask[sum(map(len, batch.pos_inds[:image])) :][: len(inds)] for mask in got[-2:])
        kept = torch.zeros(len(label), dtype=torch.bool).index_fill(0, inds[positive], True)
        touched = torch.zeros(len(label), dtype=torch.bool).index_fill(0, inds, True)
        wanted = torch.where(touched & ~kept, batch.num_classes, label)
        assert torch.equal(got[0][first : first + len(label)], wanted)
        assert (got[1][first:][inds[ignored]] == 0).all() and got[3][image] == positive.sum()
        first += len(label)
    assert (got[0] != batch.num_classes).any()


@pytest.mark.parametrize("precision", ["float64", *slow_interpreted("float32")])
def test_fitted_candidates_equal_the_cpu_operator(session, precision, rng):
    batch = testing.make_batch(NUM_GTS, rng, shapes=["bimodal", "heavy", "one"], dtype=torch.float32)
    args = *batch[:1], *batch[4:6], sizes_of(batch), batch.num_gts, 9, "full", precision
    got, wanted = run(_ops.fit_candidates, *args), cpu.fit_candidates(*args)
    if precision == "float64":
        assert_same(got, wanted)
    else:  # its agreement with float64 is the fit's business
        assert_same((*got[:3], *got[-3:]), (*wanted[:3], *wanted[-3:]))


def test_written_masks(session, rng):
    """Any masks of a caller: positive wins over ignored, padding counts for nothing."""
    batch = testing.make_batch(NUM_GTS, rng, dtype=torch.float32)
    index = cpu.fit_candidates(*batch[:1], *batch[4:6], sizes_of(batch), batch.num_gts, 9, "diag", "float64")[1]
    positive, ignored = (torch.from_numpy(rng.random(index.shape) < 0.4) for _ in range(2))
    wanted = cpu.write_targets(*batch[1:5], index, positive & (index >= 0), ignored & ~positive & (index >= 0), 80)
    assert_same(run(_ops.write_targets, *batch[1:5], index, positive, ignored, 80), wanted)
    turned = [t.t().contiguous().t() for t in (index, positive, ignored)]
    assert_same(run(_ops.write_targets, *batch[1:5], *turned, 80), wanted)


@pytest.mark.parametrize("separation", ["b", lambda *candidates: separate(*candidates, "b")], ids=["built in", "callable"])
def test_the_public_functions(execution, separation, rng):
    batch = testing.make_batch(NUM_GTS, rng, dtype=torch.float32)
    options = {**batch.options, "separation": separation, "singleton": "positive"}
    wanted = paa_gpu.paa_reassign_batch(*batch.arguments, **options)
    with execute(execution):
        got = paa_gpu.paa_reassign_batch(*batch.arguments, **options)
        image = [column[4] for column in batch.arguments]
        label, label_weight, bbox_weight, num_pos = paa_gpu.paa_reassign(
            *image, num_classes=80, separation=separation, singleton="positive"
        )
    for name in ("label", "label_weight", "bbox_weight", "positive", "ignored"):
        assert_same(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.num_pos, wanted.num_pos) and torch.equal(got.fit.n_iter, wanted.fit.n_iter)
    assert_same((label, label_weight, bbox_weight), (wanted.label[4], wanted.label_weight[4], wanted.bbox_weight[4]))
    assert num_pos == int(wanted.num_pos[4])


def test_losses_are_not_rounded(session):
    """Candidates that only float64 tells apart decide who is positive."""
    losses = torch.from_numpy(np.r_[1 + np.arange(6) * 1e-13, 2 + np.arange(6) * 1e-13])
    zeros = torch.zeros(12, dtype=torch.int64)
    columns = [[t] for t in (losses.flip(0), zeros, torch.ones(12), torch.ones(12, 4), torch.arange(12), zeros)]
    args = *columns, [12], [1], 80, 4, "diag", "a", "background", "float64"
    assert_same(run(_ops.paa_reassign_batch, *args), cpu.paa_reassign_batch(*args))


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    args = arguments(testing.make_batch([20, 0, 20], rng, dtype=torch.float32), separation="b")
    results = []
    for seed in (None, 0, 1, 2):
        with execute(90, seed=seed):
            results.append(run(_ops.paa_reassign_batch, *args))
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(results[0], other, strict=True))


# --- device operations ---------------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("num_gts", [[1, 1], [0, 7, 1, 0, 40, 3, 0], [2] * 16], ids=["small", "uneven", "16 images"])
def test_device_operations_of_a_batch(num_gts, rng):
    """At most 5 and no synchronisation, whatever the images, boxes and levels."""
    batch = testing.make_batch(num_gts, rng, dtype=torch.float32)
    operations, launches = profiled(lambda: paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options))
    print(operations, launches)
    assert len(operations) + len(launches) <= 5
    assert not SYNCHRONISING & set(operations)
    assert operations == ["stage"]


@compiled_only
def test_device_operations_of_an_image(rng):
    """At most 5, and the copy of the one int, which is the one synchronisation."""
    batch = testing.make_batch([7], rng, dtype=torch.float32)
    image = [column[0] for column in batch.arguments]
    operations, launches = profiled(lambda: paa_gpu.paa_reassign(*image, num_classes=80, num_gt=7))
    print(operations, launches)
    assert operations == ["stage", "item"] and len(launches) <= 4


@compiled_only
def test_device_operations_of_a_callable_separation(rng):
    """Nine, besides what the callable itself takes: two operators, of which neither concatenates."""
    batch = testing.make_batch([3, 0, 5], rng, dtype=torch.float32)
    args = *batch[:1], *batch[4:6], sizes_of(batch), batch.num_gts, 9, "diag", "float64"
    index = cpu.fit_candidates(*args)[1]
    masks = index >= 0, index < 0
    operations, launches = profiled(lambda: _ops.fit_candidates(*args))
    assert operations == ["stage"] and len(launches) == 4
    operations, launches = profiled(lambda: _ops.write_targets(*batch[1:5], index, *masks, 80))
    assert operations == ["stage"] and len(launches) == 3


@compiled_only
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.sort(), lambda x: x.cumsum(0), lambda x: x.unique(),
        lambda x: torch.tensor([1, 2], device=x.device), lambda x: x.index_put_((x.long(),), x.clone()), lambda x: x.tolist(),
    ],
    ids=["mask", "nonzero", "sort", "cumsum", "unique", "pageable", "index_put", "tolist"],
)  # fmt: skip
def test_other_device_operations_are_refused(call):
    with pytest.raises(AssertionError, match="several kernels"):
        profiled(lambda: call(torch.zeros(2)))


# --- work ----------------------------------------------------------------------------------------------------------------------


@compiled_only
def test_loads_are_coalesced(rng):
    potential = 20_000
    batch = testing.make_batch([20], rng, sizes=(1000, 1000), level_sizes=(potential, potential // 4), dtype=torch.float32)
    with execute(90, seed=None, racecheck=0, count=True) as session:
        _ops.paa_reassign_batch(*arguments(batch))
    for name, work in session.by_kernel().items():
        print(f"{name}: {work}")
        if name != "_fit_candidates_kernel":
            assert work.load_sectors <= 1.5 * work.load_bytes / 32, name


def test_ignored_anchors_out_of_range_leave_the_next_image_alone(session):
    targets = torch.full((6,), 3), torch.full((6,), 3.0), torch.full((6, 4), 3.0)
    columns = [[tensor, tensor] for tensor in targets] + [[torch.tensor([6, 0, -1]), torch.tensor([-1, 1, 6])]]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    _, label_weight, *_ = _ops.write_targets(*columns, torch.tensor([[0, 2, 3, 5]]), nothing, ~nothing, 80)
    assert label_weight.tolist() == [3.0] * 12


@pytest.mark.parametrize("turned", range(3))
def test_one_table_in_another_memory_order(session, turned):
    """A caller's scheme may return such a mask."""
    columns = [[tensor] for tensor in (torch.full((6,), 3), torch.ones(6), torch.ones(6, 4), torch.arange(6))]
    positive, ignored = torch.tensor([[1, 0, 0], [0, 1, 0]]).bool(), torch.tensor([[0, 1, 0], [0, 0, 1]]).bool()
    tables = [torch.arange(6).view(2, 3), positive, ignored]
    wanted = cpu.write_targets(*columns, *tables, 80)
    tables[turned] = tables[turned].t().contiguous().t()
    assert_same(_ops.write_targets(*columns, *tables, 80), wanted)
