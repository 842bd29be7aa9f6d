"""Sorting of pairs of integers within one warp, four pairs to a lane, without shared memory or barriers.

Slot i of 128 belongs to lane i % 32. In lane order, the four slots of a lane follow each other, and then come those of the next
lane: slot i has place i % 32 * 4 + i // 32. So 13 of the 28 steps of a sort stay within a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paa_gpu.kernels._numeric import smallest_integer


@triton.jit
def _side(axis: tl.constexpr):
    """0 and 1 along one axis of the hypercube."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (6 - axis))


@triton.jit
def _to_cube(x):
    """Slots [128] as a hypercube, whose last axis has the neighbours in lane order."""
    return tl.reshape(tl.trans(tl.reshape(x, [4, 32])), [2] * 7)


@triton.jit
def _to_slots(cube):
    return tl.reshape(tl.trans(tl.reshape(cube, [32, 4])), [128])


@triton.jit
def _turn(cube, stage: tl.constexpr):
    """Complement every other run of 2 ** stage: where it ascends, the run descends. Done twice, nothing has changed.

    A direction for each comparison would be more masks than AMD has scalar registers.
    """
    return cube ^ -_side(6 - stage) if stage < 7 else cube


@triton.jit
def _other(cube, axis: tl.constexpr):
    """The other value along an axis of two: the sum less one's own, as integers wrap around."""
    return tl.sum(cube, axis, keep_dims=True) - cube


@triton.jit
def _after(key, tie, other_key, other_tie):
    """Whether a pair (key, tie) comes after another one."""
    return (key > other_key) | ((key == other_key) & (tie > other_tie))


@triton.jit
def _sort_pairs(key, tie):
    """Sort the pairs (key, tie) [128], ascending by key, then by tie: a bitonic network."""
    key, tie = _to_cube(key), _to_cube(tie)
    for stage in tl.static_range(1, 8):
        key, tie = _turn(key, stage), _turn(tie, stage)
        for axis in tl.static_range(7 - stage, 7):
            other_key, other_tie = _other(key, axis), _other(tie, axis)
            after = _after(key, tie, other_key, other_tie)
            swap = after.to(tl.int32) != _side(axis)  # integers: as masks, AMD would spill scalar registers
            key, tie = tl.where(swap, other_key, key), tl.where(swap, other_tie, tie)
        key, tie = _turn(key, stage), _turn(tie, stage)
    return _to_slots(key), _to_slots(tie)


@triton.jit
def _sort_words(word):
    """Sort integers [128], ascending: the same network."""
    cube = _to_cube(word)
    for stage in tl.static_range(1, 8):
        cube = _turn(cube, stage)
        for axis in tl.static_range(7 - stage, 7):
            other = _other(cube, axis)
            cube = tl.where((cube > other).to(tl.int32) != _side(axis), other, cube)
        cube = _turn(cube, stage)
    return _to_slots(cube)


@triton.jit
def _words(key, inside):
    """int32 [128] that begin with the key's lead and end with the number of the slot, in seven bits.

    The lead is 23 bits of the key's distance from the least key, from the first bit on that the largest distance has. What is not
    inside comes last: it has the bit above the leads, and there a lead of its own.
    """
    UNSIGNED: tl.constexpr = tl.uint64 if key.dtype == tl.int64 else tl.uint32
    largest = ~smallest_integer(key.dtype)
    least = tl.min(tl.where(inside, key, largest), 0)
    most = tl.max(tl.where(inside, key, ~largest), 0)
    spread = (most - least).to(UNSIGNED, bitcast=True).to(tl.float32)
    digits = (spread.to(tl.int32, bitcast=True) >> 23) - 126  # from the exponent; rounding up may count one more
    shift = tl.maximum(digits - 23, 0).to(UNSIGNED)
    lead = ((key - least).to(UNSIGNED, bitcast=True) >> shift).to(tl.int32)
    slot = tl.arange(0, 128)
    return (tl.where(inside, lead, (1 << 23) + slot) << 7) | slot


@triton.jit
def _of_lanes(x):
    """The four slots [32] of each lane, in lane order."""
    even, odd = tl.split(tl.reshape(tl.trans(tl.reshape(x, [4, 32])), [32, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _from_lane(x, step: tl.constexpr):
    """What the lane `step` further has, around the end."""
    return tl.gather(x, (tl.arange(0, 32) + step) & 31, 0)


@triton.jit
def _equal_leads(word):
    """Whether neighbours among sorted words [128] have the same lead."""
    first, second, third, fourth = _of_lanes(word)
    following = _from_lane(first, 1)  # behind the last the first: equal only if all are
    within = tl.minimum(tl.minimum(first ^ second, second ^ third), third ^ fourth)
    return tl.min(tl.minimum(within, fourth ^ following), 0) < 128


@triton.jit
def _same_lead(word, following):
    """Whether the following word has the same lead. Around the end it has not: there it is the lesser one."""
    return (following - word).to(tl.uint32, bitcast=True) < (128 - (word & 127)).to(tl.uint32, bitcast=True)


@triton.jit
def _exchange(a, b, same):
    """The two in order where they have the same lead, and where they were not."""
    swap = same & (a > b)
    return tl.where(swap, b, a), tl.where(swap, a, b), swap


@triton.jit
def _order_equal_leads(word, anchor):
    """The slots [128] of sorted words: where leads are equal, in the order of the slots' anchors [128], if these are below 2^24.

    Neighbours change places until none does. So this takes as many rounds as half the longest run of equal leads has words.
    """
    first, second, third, fourth = _of_lanes(word)
    same_1, same_2, same_3 = _same_lead(first, second), _same_lead(second, third), _same_lead(third, fourth)
    same_4 = _same_lead(fourth, _from_lane(first, 1))
    same_0 = _from_lane(same_4.to(tl.int32), -1) != 0
    slot = word & 127
    first, second, third, fourth = _of_lanes((tl.gather(anchor, slot, 0) << 7) | slot)
    moving = True
    while moving:
        first, second, _ = _exchange(first, second, same_1)
        third, fourth, _ = _exchange(third, fourth, same_3)
        second, third, moved = _exchange(second, third, same_2)
        before, following = _from_lane(fourth, -1), _from_lane(first, 1)
        swap = same_4 & (fourth > following)
        fourth = tl.where(swap, following, fourth)
        first = tl.where(same_0 & (before > first), before, first)
        moving = tl.max((moved | swap).to(tl.int32), 0) > 0
    ordered = tl.join(tl.join(first, third), tl.join(second, fourth))
    return _to_slots(ordered) & 127


@triton.jit
def _out_of_order(key, tie):
    """Whether any of the pairs (key, tie) [128] comes after the next one, in lane order."""
    key_1, key_2, key_3, key_4 = _of_lanes(key)
    tie_1, tie_2, tie_3, tie_4 = _of_lanes(tie)
    within = _after(key_1, tie_1, key_2, tie_2) | _after(key_2, tie_2, key_3, tie_3) | _after(key_3, tie_3, key_4, tie_4)
    last = _after(key_4, tie_4, _from_lane(key_1, 1), _from_lane(tie_1, 1))
    # Nothing follows the last lane: its factor is 0. A mask would be one more than AMD has scalar registers.
    return tl.max(within.to(tl.int32) | (last.to(tl.int32) * (31 - tl.arange(0, 32))), 0) > 0


@triton.jit
def sort_slots(key, tie, inside):
    """Sort the pairs (key, tie), integers [128], into lane order: ascending by key, then by tie.

    What is not inside goes to the end, where both are the largest integers.
    """
    key = tl.where(inside, key, ~smallest_integer(key.dtype))
    tie = tl.where(inside, tie, ~smallest_integer(tie.dtype))
    # Words take a quarter of the instructions of pairs. Keys that are equal, or nearly so, may have equal leads.
    word = _sort_words(_words(key, inside))
    slot = word & 127  # what is not inside has the largest integers there
    equal = _equal_leads(word)
    high = (tie >> 32).to(tl.int32)
    if equal:
        slot = _order_equal_leads(word, high)
    # Ties first, and by halves: all at once would take more registers than there are.
    high, low = tl.gather(high, slot, 0), tl.gather(tie.to(tl.int32), slot, 0)
    tie = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    key = tl.gather(key, slot, 0)
    if equal:  # noqa: SIM102 -- Triton would evaluate both sides of `and`
        if _out_of_order(key, tie):  # nearly equal keys, anchors that occur twice, or 2^24 and more of them
            key, tie = _sort_pairs(key, tie)
    return key, tie


@triton.jit
def count_in_order(here):
    """How many slots [128] are set, up to and including each, in lane order."""
    here = tl.reshape(here.to(tl.int32), [4, 32])
    of_lane = tl.sum(here, 0)
    before = tl.cumsum(of_lane, 0) - of_lane
    return tl.reshape(tl.cumsum(here, 0) + before[None, :], [128])


@triton.jit
def count_in_slots(here):
    """How many slots [128] are set, up to and including each, in the order of their numbers."""
    shift = 8 * tl.arange(0, 4)[:, None]  # a byte for each 32 slots: one prefix sum for all
    counts = tl.sum(tl.reshape(here.to(tl.uint32), [4, 32]) << shift, 0)
    before = tl.sum(counts, 0) * tl.full((), 0x01010100, tl.uint32)
    return tl.reshape(((tl.cumsum(counts, 0) + before)[None, :] >> shift) & 0xFF, [128]).to(tl.int32)
