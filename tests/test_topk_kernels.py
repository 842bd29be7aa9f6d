"""The selection kernels as they are executed: compiled for several capabilities, or interpreted (see `kernel_execution`)."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, on_device, poisoned_outputs, slow_interpreted

from paa_gpu import _ops
from paa_gpu.kernels import topk as kernels
from paa_gpu.kernels._batch import BLOCK, image_fields
from paa_gpu.kernels._numeric import ordered_key
from paa_gpu.kernels._sort import count_in_order, count_in_slots, sort_slots

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEVEL_SIZES = (1300, 400, 0, 90, 10)
#: Potential positives and ground truths of each image. Empty images stand at the start, in the middle and at the end.
IMAGES = ((0, 0), (0, 3), (150, 4), (0, 0), (40, 0), (400, 2), (7, 30), (0, 2), (0, 0))
#: The slots of a sort in the order of what is sorted: four of each lane.
LANE_ORDER = np.arange(128).reshape(4, 32).T.ravel()
#: The interpreter takes a tenth of a second for one round of a row.
LONG_ROW = 300 if INTERPRETER else 3000


def draw_losses(rng, potential, dtype, special=True):
    """Many ties, and where `special` the values at the ends of the order; NaN of both signs and of several payloads."""
    losses = torch.from_numpy(rng.normal(size=potential).round(1)).to(dtype)
    if special:
        values = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, 6e-8, -1e-45]
        where = rng.random(potential) < 0.3
        losses[torch.from_numpy(where)] = torch.tensor(rng.choice(values, where.sum()), dtype=torch.float64).to(dtype)
    return losses


def draw_image(rng, potential, num_gt, dtype=torch.float32, sizes=LEVEL_SIZES, special=True):
    """pos_losses, pos_inds in random order, pos_gt_inds."""
    inds = torch.from_numpy(rng.permutation(sum(sizes))[:potential])
    return draw_losses(rng, potential, dtype, special), inds, torch.from_numpy(rng.integers(max(num_gt, 1), size=potential))


def in_order(losses, inds, members):
    """Members by loss, NaN last whatever its sign; then by anchor."""
    values = losses.double().numpy()[members]
    return members[np.lexsort((inds.numpy()[members], np.where(np.isnan(values), 0, values), np.isnan(values)))]


def expected_rows(losses, inds, gts, sizes, num_gt, topk):
    bounds, anchors, owners = np.cumsum([0, *sizes]), inds.numpy(), gts.numpy()
    for gt in range(num_gt):
        row = [
            in_order(losses, inds, np.flatnonzero((owners == gt) & (anchors >= low) & (anchors < high)))[:topk]
            for low, high in itertools.pairwise(bounds)
        ]
        yield in_order(losses, inds, np.concatenate(row))


def select(images, level_sizes, num_gts, topk=9):
    """The operator, on poisoned memory."""
    with poisoned_outputs():
        result = _ops.select_candidates(*map(list, zip(*images, strict=True)), level_sizes, num_gts, topk)
    assert_written(*result)
    return result


def bits(losses):
    return losses.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[losses.element_size()])


def check(images, sizes, num_gts, topk=9):
    """Exactly the candidates of the specification, their losses to the bit."""
    loss, index, count = select(images, [size for _ in images for size in sizes], num_gts, topk)
    width = max(min(len(losses), sum(min(topk, size) for size in sizes)) for losses, _, _ in images)
    assert loss.shape == index.shape == (sum(num_gts), width)
    row, first = 0, 0
    for (losses, inds, gts), num_gt in zip(images, num_gts, strict=True):
        for wanted in expected_rows(losses, inds, gts, sizes, num_gt, topk):
            n = len(wanted)
            assert int(count[row]) == n
            assert index[row].tolist() == [*(wanted + first), *[-1] * (width - n)]
            assert torch.equal(bits(loss[row, :n]), bits(losses[torch.from_numpy(wanted)]))
            assert (loss[row, n:] == np.inf).all()
            row += 1
        first += len(losses)


# --- what is selected --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [9, *slow_interpreted(1, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_with_ties_and_special_values(session, dtype, topk, rng):
    images = [draw_image(rng, potential, num_gt, dtype) for potential, num_gt in IMAGES]
    check(images, LEVEL_SIZES, [num_gt for _, num_gt in IMAGES], topk)


@pytest.mark.parametrize("topk", [5, 60])
def test_rows_of_any_length(session, topk, rng):
    """All lengths around the slots of a round and around half of them, which is what one pass can find."""
    lengths = (0, 1, 2, 31, 32, 33, 45, 63, 64, 65, 0, 127, 128, 129, 191, 192, 193, LONG_ROW, 0)
    potential = sum(lengths)
    losses, inds, _ = draw_image(rng, potential, 1, sizes=(potential, 50))
    gts = torch.from_numpy(rng.permutation(np.repeat(np.arange(len(lengths)), lengths)))
    check([(losses, inds, gts)], (potential // 3, potential // 3, potential), [len(lengths)], topk)


@pytest.mark.parametrize("topk", [64, pytest.param(200, marks=pytest.mark.slow)] if INTERPRETER else [63, 64, 65, 128, 200])
def test_more_candidates_than_one_pass_finds(session, topk, rng):
    sizes = (300, 129, 128, 64, 3)
    check([draw_image(rng, 600, 1, torch.float64, sizes), draw_image(rng, 300, 2, torch.float64, sizes)], sizes, [1, 2], topk)


@pytest.mark.parametrize("sizes", [(500,), (0, 0, 500, 0), (29,) * 17], ids=["one level", "empty levels", "17 levels"])
def test_any_levels(session, sizes, rng):
    for topk in (1, 2**40):
        check([draw_image(rng, 200, 4, sizes=sizes)], sizes, [4], topk)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "NaN"])
def test_long_rows_in_any_order(session, order, rng):
    """What is read later is all dropped at once, is all better, or ties: then the anchor decides, in whatever order they come."""
    potential = 300 if INTERPRETER else 1000
    losses = {"ascending": torch.arange(1.0 * potential), "descending": -torch.arange(1.0 * potential)}
    losses |= {"equal": torch.zeros(potential), "NaN": torch.full((potential,), np.nan)}
    gts, sizes = torch.zeros(potential, dtype=torch.int64), (potential // 2, potential // 3, potential)
    for inds in (torch.arange(potential), torch.arange(potential).flip(0), torch.from_numpy(rng.permutation(potential))):
        for topk in (9, 25):  # the third level begins while two are full
            check([(losses[order], inds, gts)], sizes, [1], topk)


def test_levels_differ_between_images(session, rng):
    sizes = [(40, 20), (0, 60), (59, 1)]
    images = [draw_image(rng, 50, 3, sizes=size) for size in sizes]
    _, index, count = select(images, [n for size in sizes for n in size], [3, 3, 3], 2)
    rows = [
        wanted + 50 * image
        for image, (tensors, size) in enumerate(zip(images, sizes, strict=True))
        for wanted in expected_rows(*tensors, size, 3, 2)
    ]
    assert [row[:n].tolist() for row, n in zip(index, count, strict=True)] == [row.tolist() for row in rows]


def test_losses_are_ordered_in_their_own_precision(session):
    losses = 1 + torch.arange(20, 0, -1, dtype=torch.float64) * 1e-15
    gts = torch.zeros(20, dtype=torch.int64)
    _, index, _ = select([(losses, torch.arange(20), gts)], [20], [1], 3)
    assert index.tolist() == [[19, 18, 17]]


def test_many_images(session, rng):
    """More than one block of image numbers, most of them without boxes."""
    shapes = [(int(rng.integers(1, 8)), int(rng.integers(1, 3))) if i % 7 == 3 else (0, 0) for i in range(130)]
    images = [draw_image(rng, *shape, sizes=(60, 20)) for shape in shapes]
    check(images, (60, 20), [num_gt for _, num_gt in shapes], 4)


@pytest.mark.parametrize("num_gts", [[0], [3], [0, 0], [0, 2, 0]], ids=str)
@pytest.mark.parametrize("potential", [0, 5])
def test_nothing_to_select(session, num_gts, potential, rng):
    images = [draw_image(rng, potential if num_gt == 0 else 0, 1) for num_gt in num_gts]
    check(images, LEVEL_SIZES, num_gts)


@pytest.mark.slow
def test_thousands_of_ground_truths(session, rng):
    """More rows than one block of the prefix sum."""
    potential, num_gt = (40, 520) if INTERPRETER else (1200, 1500)
    check([draw_image(rng, potential, num_gt, sizes=(2000, 500))], (2000, 500), [num_gt], 2)


# --- how the inputs lie --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_strided_inputs_and_index_types(session, images, dtype, rng):
    drawn = [draw_image(rng, 100, 3) for _ in range(images)]
    strided = [
        (torch.stack([losses, losses + 1], 1)[:, 0], inds.to(dtype).repeat_interleave(3)[1::3], gts.to(dtype).expand(2, -1)[1])
        for losses, inds, gts in drawn
    ]
    check(strided, LEVEL_SIZES, [3] * images)


def test_offsets_beyond_two_to_the_31(session, rng):
    """Memory that nobody touches costs nothing: the last of nine elements lies 2^31 elements behind the first."""
    stride, potential = 2**28 + 1, 9
    memory = torch.empty(stride * potential, dtype=torch.float16), torch.empty(stride * potential, dtype=torch.int32)
    far = memory[0][::stride], memory[1][::stride], memory[1][1::stride]
    for view, tensor in zip(far, draw_image(rng, potential, 1, torch.float16), strict=True):
        view.copy_(tensor)
    check([far], LEVEL_SIZES, [1])


def test_indices_out_of_range_are_nobodys_candidates(session):
    """Also those that are in range of the next image."""
    inds = torch.tensor([0, -1, 4, 1, 2**40, -(2**62), 2, 3, 2**63 - 1, -(2**63), 2**31, 2**32])
    gts = torch.tensor([0, 0, 0, -1, 0, 0, 2, 1, 0, 0, 0, 0])
    other = torch.tensor([3.0]), torch.tensor([3]), torch.tensor([-(2**63)])
    _, index, count = select([(torch.arange(12.0), inds, gts), other, other], [3, 1] * 3, [2, 3, 0])
    assert count.tolist() == [1, 1, 0, 0, 0]
    assert index[:2].tolist() == [[0, -1, -1, -1], [7, -1, -1, -1]]


def test_a_batch_out_of_range_everywhere(session):
    nowhere = torch.full((700,), 2**62), torch.full((700,), -5)
    for inds, gts in ((nowhere[0], torch.zeros(700, dtype=torch.int64)), (torch.arange(700), nowhere[1])):
        _, index, count = select([(torch.zeros(700), inds, gts)], [700], [2])
        assert count.tolist() == [0, 0] and (index == -1).all()


def test_repeated_anchors_stay_within_the_row(session):
    inds = torch.zeros(200, dtype=torch.int64)
    _, index, count = select([(torch.arange(200.0), inds, inds + gt) for gt in (0, 1)], [1, 1] * 2, [2, 2])
    assert index.tolist() == [[0, 1], [-1, -1], [-1, -1], [200, 201]] and count.tolist() == [2, 0, 0, 2]
    # The row has room for more in an image of more anchors, which the first image has not.
    other = torch.arange(9)
    _, index, count = select([(torch.arange(200.0), inds, inds), (torch.arange(9.0), other, other * 0)], [1, 1, 0, 9], [1, 1])
    assert index.tolist() == [[0, 1, *[-1] * 7], [*range(200, 209)]] and count.tolist() == [2, 9]


# --- repeatability -------------------------------------------------------------------------------------------------------------


def test_order_of_inputs_does_not_matter(session, rng):
    losses, inds, gts = draw_image(rng, 500, 3, special=False)
    plain = select([(losses, inds, gts)], [*LEVEL_SIZES], [3])
    order = torch.from_numpy(rng.permutation(500))
    turned = select([(losses[order], inds[order], gts[order])], [*LEVEL_SIZES], [3])
    assert torch.equal(plain[0], turned[0]) and torch.equal(plain[2], turned[2])
    there = plain[1] >= 0
    assert torch.equal(plain[1][there], order[turned[1][there]])


@compiled_only
def test_any_schedule_gives_the_same_bits(rng):
    """Programs and warps in other orders fill the buckets in other orders; anchors occur twice, with ties."""
    losses, inds, gts = draw_image(rng, 1500, 3)
    inds[700:] = inds[:800].clone()
    results = []
    for seed in (None, 0, 1, 2, 3):
        with execute(90, seed=seed):
            results.append(select([(losses, inds, gts)], [*LEVEL_SIZES], [3], 30))
    for other in results[1:]:
        assert torch.equal(bits(results[0][0]), bits(other[0]))
        assert torch.equal(results[0][1], other[1]) and torch.equal(results[0][2], other[2])


@compiled_only
@pytest.mark.parametrize("capability", [75, 90])
def test_a_ticket_comes_after_all_counts(capability):
    """Programs run one by one here, so that only the code can show it: a barrier between the last count and the ticket."""
    inds, bucket, rank = torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    with execute(capability):
        table = torch.tensor(image_fields([5], [1], [1], [inds], [inds])[0])
        compiled = kernels._count_kernel[(1,)](table, 1, 1, bucket, rank, INDS=tl.int64, GT_INDS=tl.int64, BLOCK=BLOCK)
    assert bucket.tolist() == [0, 5, 1] and sorted(rank.tolist()) == [0, 1, 2, 3, 4]
    atomics = [m.start() for m in re.finditer(r"\batom\.global", compiled.asm["ptx"])]
    assert "acq_rel" in compiled.asm["ptx"][atomics[-1] :].partition("\n")[0]
    assert "bar.sync" in compiled.asm["ptx"][atomics[-2] : atomics[-1]]


# --- helpers -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _key_kernel(x_ptr, key_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    tl.store(key_ptr + offset, ordered_key(x), mask=offset < n)


@triton.jit
def _sort_kernel(key_ptr, tie_ptr, n):
    slot = tl.arange(0, 128)
    key = tl.load(key_ptr + slot, mask=slot < n, other=0)
    tie = tl.load(tie_ptr + slot, mask=slot < n, other=0)
    key, tie = sort_slots(key, tie, slot < n)
    tl.store(key_ptr + slot, key)
    tl.store(tie_ptr + slot, tie)


@triton.jit
def _count_in_both_orders(here_ptr, slots_ptr, order_ptr):
    slot = tl.arange(0, 128)
    here = tl.load(here_ptr + slot) != 0
    tl.store(slots_ptr + slot, count_in_slots(here))
    tl.store(order_ptr + slot, count_in_order(here))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordered_keys(session, dtype):
    info = torch.finfo(dtype)
    groups = [
        [-np.inf], [info.min], [-1.0], [-info.tiny], [-info.smallest_normal * info.eps], [0.0, -0.0],
        [info.smallest_normal * info.eps], [info.tiny], [1 - info.eps / 2], [1.0], [1 + info.eps], [info.max], [np.inf],
        [np.nan, -np.nan],
    ]  # fmt: skip
    x = torch.tensor([value for group in groups for value in group], dtype=torch.float64).to(dtype)
    payload = bits(torch.tensor([np.inf, -np.inf], dtype=dtype)) + 1  # NaN with another payload, of either sign
    x = torch.cat([x, payload.view(dtype)])
    place = [i for i, group in enumerate(groups) for _ in group] + [len(groups) - 1] * 2
    key = torch.empty(len(x), dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    on_device(_key_kernel[(1,)])(x, key, len(x), BLOCK=32, num_warps=1)
    assert np.unique(key.numpy(), return_inverse=True)[1].tolist() == place


def draw_keys(rng, dtype, kind):
    ends = torch.iinfo(dtype)
    keys = {
        "few": rng.choice([ends.min, ends.max, -1, 0, 1], 128),
        "everything": rng.integers(ends.min, ends.max, 128, endpoint=True),
        "one power of two": 1000 + rng.permutation(2**20)[:128],
        "neighbours": rng.choice([ends.min, *range(300)], 128, replace=False),  # their leads are equal: far below the largest
        "equal": np.full(128, 7),
    }
    return torch.from_numpy(keys[kind]).to(dtype)


@pytest.mark.parametrize("kind", ["few", "everything", "one power of two", "neighbours", "equal"])
def test_sorting_of_slots(session, kind, rng):
    for dtype, n in itertools.product((torch.int32, torch.int64), (0, 1, 45, 128)):
        key = draw_keys(rng, dtype, kind)
        tie = torch.from_numpy(rng.choice([-1, 0, 2**31 - 1], 128) << 32 | rng.permutation(128) << 25)
        order = np.lexsort((tie[:n], key[:n]))
        wanted = key[:n][order].tolist(), tie[:n][order].tolist()
        on_device(_sort_kernel[(1,)])(key, tie, n, num_warps=1)
        key, tie = key[LANE_ORDER], tie[LANE_ORDER]
        assert (key[:n].tolist(), tie[:n].tolist()) == wanted
        assert (key[n:] == torch.iinfo(dtype).max).all() and (tie[n:] == 2**63 - 1).all()


def check_sorted(key, tie):
    order = np.lexsort((tie, key))
    wanted = key[order].tolist(), tie[order].tolist()
    on_device(_sort_kernel[(1,)])(key, tie, 128, num_warps=1)
    assert (key[LANE_ORDER].tolist(), tie[LANE_ORDER].tolist()) == wanted


@pytest.mark.parametrize("place", [0, 1, 2, 3, 123, 126])
@pytest.mark.parametrize("apart", [0, 1, -1], ids=["equal", "nearly equal", "nearly equal, anchors in order"])
def test_sorting_with_one_pair_of_equal_leads(session, place, apart, rng):
    """Wherever it is in lane order: within a lane, or the last of one and the first of the next."""
    order = rng.permutation(128)
    key = np.where(order == place + 1, place * 2**40 + apart, order * 2**40)
    check_sorted(torch.from_numpy(key), torch.from_numpy(127 - order) << 32)


@pytest.mark.parametrize("run", [2, 3, 4, 5, 9, 33, *slow_interpreted(64, 129)])
@pytest.mark.parametrize("step", [1, 2**16, 2**17 + 1, 2**24], ids=["near", "far", "apart", "beyond 2^24"])
def test_sorting_of_runs_of_equal_keys(session, run, step, rng):
    """Runs begin at every place of a lane; anchors differ by one, or by more than the words that sort them have room for."""
    key = (np.arange(128) + 1) // run * 2**20
    order = rng.permutation(128)
    check_sorted(torch.from_numpy(key[order]).int(), torch.from_numpy(rng.permutation(128) * step) << 32 | 5)


@pytest.mark.parametrize("anchors", [1, 2, 100])
def test_sorting_of_equal_keys_whose_anchors_occur_twice(session, anchors, rng):
    """The position decides."""
    key, anchor = torch.from_numpy(rng.integers(0, 9, 128)).int(), torch.from_numpy(rng.integers(0, anchors, 128))
    check_sorted(key, anchor << 32 | torch.from_numpy(rng.permutation(128)))


def test_counts_of_slots(session, rng):
    for share in (0.0, 0.1, 0.5, 1.0):
        here = torch.from_numpy(rng.random(128) < share).int()
        slots, order = torch.empty(2, 128, dtype=torch.int32)
        on_device(_count_in_both_orders[(1,)])(here, slots, order, num_warps=1)
        assert torch.equal(slots, here.cumsum(0).int())
        assert torch.equal(order[LANE_ORDER], here[LANE_ORDER].cumsum(0).int())


# --- work ----------------------------------------------------------------------------------------------------------------------


def work(rng, potential, num_gt, ties="few"):
    """Warp instructions less moves, and load sectors over those needed, of each kernel. `ties`: few, many (runs), all."""
    losses, inds, gts = draw_image(rng, potential, num_gt, sizes=(potential, potential // 4), special=False)
    losses = {"few": losses + torch.from_numpy(rng.random(potential)).float(), "many": losses, "all": torch.zeros(potential)}[
        ties
    ]
    with execute(90, seed=None, racecheck=0, count=True) as session:
        select([(losses, inds, gts)], [potential, potential // 4], [num_gt])
    kernels = session.by_kernel()
    instructions = {name: n.warp_instructions - n.warp_classes["mov"] for name, n in kernels.items()}
    return instructions, {name: n.load_sectors / (n.load_bytes / 32) for name, n in kernels.items()}


@compiled_only
@pytest.mark.parametrize("ties", ["few", "many"])
def test_work_grows_with_the_potential_positives(ties, rng):
    """P + G: nine instructions a potential positive, and 2,900 a box, which sorts twice. No term grows with P x G. Ten times the
    boxes cost at most 1.5x."""
    potential, total = 200_000, {}
    for num_gt in (60, 600):
        instructions, sectors = work(rng, potential, num_gt, ties)
        total[num_gt] = sum(instructions.values())
        print(f"{num_gt} boxes, {ties} ties: {instructions}, load sectors of those needed {sectors}")
        assert total[num_gt] <= 9 * potential + 2900 * num_gt
        assert max(*sectors.values()) <= 1.5
    print(f"ten times the boxes, {ties} ties: {total[600] / total[60]:.2f}x")
    assert total[600] <= 1.5 * total[60]


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
def test_work_of_a_box_with_all_anchors(dtype, rng):
    """22,400 candidates in any order. Most of them come after the last candidate of their level, and are read and no more."""
    sizes = (16800, 4200, 1050, 273, 77)
    image = draw_image(rng, sum(sizes), 1, dtype, sizes)
    with execute(90, seed=None, racecheck=0, count=True) as session:
        check([image], sizes, [1])
    counters = session.by_kernel()["_select_kernel"]
    instructions = counters.warp_instructions - counters.warp_classes["mov"]
    print(f"selection of a box with {sum(sizes)} candidates, {dtype}: {instructions:,} warp instructions")
    assert instructions <= 90_000


@compiled_only
@pytest.mark.parametrize(("ties", "budget"), [("few", 900), ("many", 1050), ("all", 1500)])
def test_work_of_the_usual_box(ties, budget, rng):
    """At most 64 candidates, in one block: one sort and nothing more. Reading on costs it nothing.

    Losses that differ take 870, a sort of words. With equal losses, each round of neighbours that change places takes 16 more.
    """
    for potential in (45, 64):
        instructions = work(rng, potential, 1, ties)[0]["_select_kernel"]
        print(f"selection of a box with {potential} candidates, {ties} ties: {instructions:,} warp instructions")
        assert instructions <= budget


def test_fields_of_images():
    """The block of an image's potential positives or anchors begins with it; the last column holds the totals."""
    first, second = torch.zeros(2, 8)[:, ::2], torch.zeros(3, 4)
    fields, blocks, anchor_blocks = image_fields([0, 5, BLOCK + 1], [2, 0, 1], [7, 8, 8 * BLOCK + 1], [first, second, second])
    rows = torch.tensor(fields).view(-1, 4).tolist()
    assert rows[:5] == [[0, 0, 1, 3], [0, 0, 5, BLOCK + 6], [0, 2, 2, 3], [0, 7, 15, 8 * BLOCK + 16], [0, 1, 2, 4]]
    assert rows[5:] == [[first.data_ptr(), second.data_ptr(), second.data_ptr(), 0], [8, 4, 4, 0], [2, 1, 1, 0]]
    assert (blocks, anchor_blocks) == (3, 4)
