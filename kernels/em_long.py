"""Long rows: EM of any number of components, with several programs for a row. Launch follows launch, and nothing waits.

A launch is one pass over the values. Each program stores the results for its part of a row, and takes a ticket. The program with
the last ticket of a row adds up the parts in order. It decides what the next launch does for this row, the phase. A launch for a
finished row returns at once. So the host can queue as many launches as a row may need, without looking.

    RANGE      the smallest and the largest value, and the sum
    QUANTILE   the number of values up to the middle of the range where a quantile can still lie, by halving
    LLOYD      the number of values that belong to each centre, and their sum
    DIVISION   the moments of the values of each centre: the first parameters
    EM         the moments of the values of each component, weighted by responsibility: an iteration

The moments are the number, the mean and the sum of squares about this mean. Those of tiles are merged to those of parts, and then
to those of the row (`starts.merge`). Nothing cancels in them, so every iteration reads each value once.

Programs of a launch exchange data in this order. The writer stores its partial sums, passes a barrier of the program, and takes
the ticket (release). The last one takes the ticket (acquire), then reads the sums past the first-level cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels._launch import compile_options
from paa_gpu.kernels._numeric import HALF_LOG_2PI
from paa_gpu.kernels._rows import given_are_finite, locate, store_fit, take_given
from paa_gpu.kernels.em_k import expectation, row_range
from paa_gpu.kernels.starts import (
    EXACT_VALUES,
    MOST_PASSES,
    ascending,
    belongs,
    boundaries,
    draw,
    even_spread,
    key_of,
    load_at,
    load_values,
    maximisation,
    mean_of,
    members,
    merge,
    moments,
    quantile_ranks,
    two_means,
    value_of,
)

#: Rows of more values are long. One program takes 16 tiles of 1,024 for them, in every pass.
LONG_ROW = 16_384

#: Values of a program at least, and programs of a row at most: one for each multiprocessor of a large GPU.
PART, MOST_PROGRAMS = 2048, 128

RANGE, QUANTILE, LLOYD, DIVISION, EM, DONE = (tl.constexpr(phase) for phase in range(6))

# Numbers that a row keeps from launch to launch: integers, and floats; each is [KP] but for the first two kinds of integers.
CONTROL = tl.constexpr(4)  # phase, passes of the phase, tickets
SPAN, WEIGHT, MEAN, VARIANCE, CENTRE, FLOATS = (tl.constexpr(part) for part in range(6))
LOW, HIGH, BEFORE, KEYS = (tl.constexpr(part) for part in range(4))


@triton.jit
def _load_state(ptr, part, KP: tl.constexpr):
    return tl.load(ptr + part * KP + tl.arange(0, KP))


@triton.jit
def _store_state(ptr, part, value, KP: tl.constexpr):
    tl.store(ptr + part * KP + tl.arange(0, KP), value)


@triton.jit
def _middle(keys_ptr, KP: tl.constexpr):
    """Half way between what each quantile is at least and at most."""
    least, most = _load_state(keys_ptr, LOW, KP), _load_state(keys_ptr, HIGH, KP)
    return least + ((most - least) >> 1)


@triton.jit
def _not_above(part, middle, KP: tl.constexpr, BLOCK: tl.constexpr):
    """How many values of the part have a key that is not above each of `middle`."""
    count = tl.zeros([KP], tl.int32)
    for start in range(0, part[2], BLOCK):
        x, inside = load_values(part, start, BLOCK)
        count += tl.sum((inside[:, None] & (key_of(x)[:, None] <= middle[None, :])).to(tl.int32), 0)
    return count


@triton.jit
def _scan(part, origin, phase, floats_ptr, keys_ptr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """What one program finds in its part of a row: three blocks [KP] and a number."""
    DTYPE: tl.constexpr = origin.dtype
    zero = tl.zeros([KP], DTYPE)
    j = tl.arange(0, KP)
    number, mean, square = zero, zero, zero
    log_density = tl.full((), 0.0, DTYPE)
    if phase == RANGE:
        smallest, largest, finite = row_range((part[0], part[1], part[2], origin * 0), BLOCK)
        number, mean, square = zero + smallest, zero + largest, zero + finite.to(DTYPE)
        everything = tl.where(j == 0, float("-inf"), zero + float("inf"))
        _, total = members((part[0], part[1], part[2], origin), everything, zero + float("inf"), KP, BLOCK)
        log_density = tl.sum(total, 0)
    elif phase == QUANTILE:
        number = _not_above(part, _middle(keys_ptr, KP).to(key_of(origin).dtype), KP, BLOCK).to(DTYPE)
    else:
        low, high = boundaries(_load_state(floats_ptr, CENTRE, KP), K, KP)
        if phase == LLOYD:
            count, mean = members(part, low, high, KP, BLOCK)
            number = count.to(DTYPE)
        else:
            weight, peak = _load_state(floats_ptr, WEIGHT, KP), _load_state(floats_ptr, MEAN, KP)
            variance = _load_state(floats_ptr, VARIANCE, KP)
            for start in range(0, part[2], BLOCK):
                x, inside = load_values(part, start, BLOCK)
                if phase == DIVISION:
                    resp, log_p = belongs(x, inside, low, high).to(DTYPE), x * 0
                else:
                    resp, log_p = expectation(x, inside, weight, peak, variance)
                number, mean, square = merge(number, mean, square, *moments(x, resp))
                log_density += tl.sum(log_p, 0)
    return number, mean, square, log_density


@triton.jit
def _load_parts(ptr, part: tl.constexpr, other, PROGRAMS: tl.constexpr, PP: tl.constexpr, KP: tl.constexpr):
    """One of the blocks [KP] of all programs of a row, [PP, KP], past the first-level cache."""
    program, j = tl.arange(0, PP)[:, None], tl.arange(0, KP)[None, :]
    return tl.load(ptr + (program * 4 + part) * KP + j, mask=(program < PROGRAMS) & (j < KP), other=other, cache_modifier=".cg")


@triton.jit
def _after_range(
    row, parts_ptr, origin, source, floats_ptr, keys_ptr, INIT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """The phase after the first one, whether the row can be fitted, and its smallest value."""
    n = row[2]
    DTYPE: tl.constexpr = origin.dtype
    j = tl.arange(0, KP)
    smallest = tl.min(tl.min(_load_parts(parts_ptr, 0, float("inf"), PROGRAMS, PP, KP), 0), 0)
    largest = tl.max(tl.max(_load_parts(parts_ptr, 1, float("-inf"), PROGRAMS, PP, KP), 0), 0)
    finite = tl.max(tl.sum(_load_parts(parts_ptr, 2, 0.0, PROGRAMS, PP, KP).to(tl.int64), 0), 0)
    total = tl.max(tl.sum(_load_parts(parts_ptr, 3, 0.0, PROGRAMS, PP, KP), 0), 0)
    valid = (n >= 2) & (n >= K) & (finite == n)
    smallest = tl.where(valid, smallest, 0.0)
    extent = tl.where(valid, largest - smallest, 0.0)
    row = (row[0], row[1], tl.where(valid, n, 0), smallest)
    phase = tl.full((), EM, tl.int32)
    weight, mean, variance = even_spread(extent, K, KP)
    _store_state(floats_ptr, WEIGHT, weight, KP)
    _store_state(floats_ptr, MEAN, mean, KP)
    _store_state(floats_ptr, VARIANCE, variance, KP)
    if INIT == "random":
        centre = ascending(load_at(row, draw(source[0], source[1], source[2], n, K, KP)), K, KP)
        _store_state(floats_ptr, CENTRE, centre, KP)
        phase = tl.full((), DIVISION, tl.int32)
    elif INIT == "kmeans" and K == 2:
        average = total / tl.maximum(n, 1).to(DTYPE) + (origin - smallest)
        centre = tl.where(j == 1, 2 * average, 0.0)
        if n <= EXACT_VALUES:
            centre = two_means(row, centre, KP, BLOCK)
        _store_state(floats_ptr, CENTRE, centre, KP)
        phase = tl.where(n <= EXACT_VALUES, DIVISION, LLOYD)
    elif INIT != "minmax":
        _store_state(keys_ptr, LOW, tl.zeros([KP], tl.int64), KP)
        _store_state(keys_ptr, HIGH, key_of(extent).to(tl.int64) + tl.zeros([KP], tl.int64), KP)
        phase = tl.full((), QUANTILE, tl.int32)
    _store_state(keys_ptr, BEFORE, tl.full([KP], -1, tl.int64), KP)
    return phase, valid, smallest


@triton.jit
def _after_quantile(
    n, parts_ptr, floats_ptr, keys_ptr, DTYPE: tl.constexpr, INIT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PROGRAMS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    count = tl.sum(_load_parts(parts_ptr, 0, 0.0, PROGRAMS, PP, KP).to(tl.int64), 0)
    low, high = _load_state(keys_ptr, LOW, KP), _load_state(keys_ptr, HIGH, KP)
    middle = _middle(keys_ptr, KP)
    enough = count > quantile_ranks(n, K, KP)
    high, low = tl.where(enough, middle, high), tl.where(enough, low, tl.minimum(middle + 1, high))
    tl.debug_barrier()  # every thread has loaded what is stored now; likewise below
    _store_state(keys_ptr, LOW, low, KP)
    _store_state(keys_ptr, HIGH, high, KP)
    if tl.float64 == DTYPE:
        _store_state(floats_ptr, CENTRE, value_of(high, DTYPE), KP)
    else:
        _store_state(floats_ptr, CENTRE, value_of(high.to(tl.int32), DTYPE), KP)
    following = LLOYD if INIT == "kmeans" else DIVISION
    return tl.where(tl.max(high - low, 0) > 0, QUANTILE, following)


@triton.jit
def _after_lloyd(passes, parts_ptr, floats_ptr, keys_ptr, KP: tl.constexpr, PROGRAMS: tl.constexpr, PP: tl.constexpr):
    number = tl.sum(_load_parts(parts_ptr, 0, 0.0, PROGRAMS, PP, KP).to(tl.int64), 0)
    total = tl.sum(_load_parts(parts_ptr, 1, 0.0, PROGRAMS, PP, KP), 0)
    moved = tl.max((number != _load_state(keys_ptr, BEFORE, KP)).to(tl.int32), 0) > 0
    centre = mean_of(number, total, _load_state(floats_ptr, CENTRE, KP))
    tl.debug_barrier()
    _store_state(floats_ptr, CENTRE, centre, KP)
    _store_state(keys_ptr, BEFORE, number, KP)
    return tl.where(moved & (passes < MOST_PASSES), LLOYD, DIVISION)


@triton.jit
def _maximise(
    parts_ptr, reg_covar, TIED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PROGRAMS: tl.constexpr, PP: tl.constexpr
):
    """Weights, means and variances [KP] from the moments of the parts."""
    numbers, means = _load_parts(parts_ptr, 0, 0.0, PROGRAMS, PP, KP), _load_parts(parts_ptr, 1, 0.0, PROGRAMS, PP, KP)
    number = tl.sum(numbers, 0)
    mean = tl.sum(numbers * means, 0) / tl.where(number > 0, number, 1.0)
    apart = means - mean[None, :]
    square = tl.sum(_load_parts(parts_ptr, 2, 0.0, PROGRAMS, PP, KP) + numbers * apart * apart, 0)
    return maximisation(number, mean, square, reg_covar, K, TIED)


@triton.jit(do_not_specialize=["width", "max_iter", "seed"])
def _pass_kernel(
    source,  # see `_rows.locate`
    width,
    inits,  # weights, means and precisions: each (Tensor[G, K] or None, its stride over rows)
    fit_ptrs,  # the seven tensors of `empty_fit`, for every start of every row: R
    control_ptr,  # Tensor[L, CONTROL] int32, zeros before the first launch; L: the starts of the rows of this launch
    floats_ptr,  # Tensor[L, FLOATS, KP], of the fit's dtype
    keys_ptr,  # Tensor[L, KEYS, KP] int64
    parts_ptr,  # Tensor[L, PROGRAMS, 4, KP], of the fit's dtype
    tol: tl.float64,
    reg_covar: tl.float64,
    sum_tolerance: tl.float64,
    max_iter,
    n_init,
    seed: tl.int64,
    INIT: tl.constexpr,
    TIED: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PP: tl.constexpr,
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    control_ptr += slot * CONTROL
    phase = tl.load(control_ptr)
    if phase != DONE:
        floats_ptr += slot * FLOATS * KP
        keys_ptr += slot * KEYS * KP
        parts_ptr += slot * PROGRAMS * 4 * KP
        g, x_ptr, stride_xk, n = locate(source, width, slot // n_init)
        attempt = slot % n_init
        number = g * n_init + attempt
        origin = tl.load(x_ptr, mask=n > 0, other=0.0).to(DTYPE)
        smallest = tl.load(floats_ptr + SPAN * KP, mask=phase != RANGE, other=0.0)
        # Whole tiles for each program, the last ones of a row perhaps none.
        share = tl.cdiv(tl.cdiv(n, PROGRAMS), BLOCK) * BLOCK
        first = tl.minimum(program * share, n)
        part = (x_ptr + first.to(tl.int64) * stride_xk, stride_xk, tl.minimum(n - first, share), smallest)
        a, b, c, d = _scan(part, origin, phase, floats_ptr, keys_ptr, K, KP, BLOCK)
        mine = parts_ptr + program * 4 * KP + tl.arange(0, KP)
        tl.store(mine, a)
        tl.store(mine + KP, b)
        tl.store(mine + 2 * KP, c)
        tl.store(mine + 3 * KP, d + tl.zeros([KP], DTYPE))
        tl.debug_barrier()
        ticket = tl.atomic_add(control_ptr + 2, 1, sem="acq_rel")
        if ticket == PROGRAMS - 1:
            passes = tl.load(control_ptr + 1) + 1
            take = given_are_finite(inits, g, K, KP)
            valid = tl.full((), True, tl.int1)
            following = phase
            converged = tl.full((), False, tl.int1)
            lower_bound = tl.full((), float("-inf"), DTYPE)
            if phase == RANGE:
                row = (x_ptr, stride_xk, n, origin)
                origins = (seed, g, attempt)
                following, valid, smallest = _after_range(
                    row, parts_ptr, origin, origins, floats_ptr, keys_ptr, INIT, K, KP, BLOCK, PROGRAMS, PP
                )
                _store_state(floats_ptr, SPAN, smallest + tl.zeros([KP], DTYPE), KP)
            elif phase == QUANTILE:
                following = _after_quantile(n, parts_ptr, floats_ptr, keys_ptr, DTYPE, INIT, K, KP, PROGRAMS, PP)
            elif phase == LLOYD:
                following = _after_lloyd(passes, parts_ptr, floats_ptr, keys_ptr, KP, PROGRAMS, PP)
            else:
                weight, mean, variance = _maximise(parts_ptr, tl.full((), reg_covar, DTYPE), TIED, K, KP, PROGRAMS, PP)
                _store_state(floats_ptr, WEIGHT, weight, KP)
                _store_state(floats_ptr, MEAN, mean, KP)
                _store_state(floats_ptr, VARIANCE, variance, KP)
                following = tl.full((), EM, tl.int32)
                if phase == EM:
                    total = tl.max(tl.sum(_load_parts(parts_ptr, 3, 0.0, PROGRAMS, PP, KP), 0), 0)
                    lower_bound = total / n.to(DTYPE) - HALF_LOG_2PI
                    previous = tl.where(passes > 1, tl.load(fit_ptrs[3] + number), float("-inf"))
                    converged = tl.abs(lower_bound - previous) < tl.full((), tol, DTYPE)
                    following = tl.where((passes < max_iter) & (converged == 0), EM, DONE)
                    tl.debug_barrier()
                    tl.store(fit_ptrs[3] + number, lower_bound)
            tl.debug_barrier()
            weight, mean = _load_state(floats_ptr, WEIGHT, KP), _load_state(floats_ptr, MEAN, KP)
            variance = _load_state(floats_ptr, VARIANCE, KP)
            if (following == EM) & (phase != EM):
                weight, mean, variance, good = take_given(inits, g, smallest, take, sum_tolerance, weight, mean, variance, K, KP)
                valid &= good
                tl.debug_barrier()
                _store_state(floats_ptr, WEIGHT, weight, KP)
                _store_state(floats_ptr, MEAN, mean, KP)
                _store_state(floats_ptr, VARIANCE, variance, KP)
            following = tl.where(valid, following, DONE)
            if following == DONE:
                store_fit(fit_ptrs, number, smallest, valid, weight, mean, variance, lower_bound, passes, converged, K, KP)
            tl.store(control_ptr, following)
            tl.store(control_ptr + 1, tl.where(following == phase, passes, 0))
            tl.store(control_ptr + 2, 0)


def launch_rule(width: int, n_components: int) -> dict[str, Any]:
    """Programs that share a row, and what they are compiled for: tiles of 256 numbers for 4 warps, products not fused."""
    programs = min(triton.cdiv(width, PART), MOST_PROGRAMS)
    components = triton.next_power_of_2(n_components)
    return {
        "K": n_components,
        "KP": components,
        "BLOCK": 256 // components,
        "PROGRAMS": programs,
        "PP": triton.next_power_of_2(programs),
        "num_warps": 4,
        **compile_options(fuse=False),
    }


def passes_at_most(init: str, n_components: int, max_iter: int, dtype: torch.dtype) -> int:
    """Launches that a row may take: the range, the start, the iterations."""
    passes = 1 + max_iter
    if init != "minmax":
        passes += 1
    if init == "quantile" or (init == "kmeans" and n_components != 2):
        passes += 8 * dtype.itemsize - 1
    if init == "kmeans":
        passes += MOST_PASSES.value
    return passes


def launch_long(
    starts: int, source: tuple[Any, ...], width: int, inits: tuple[Any, ...], fit: tuple[Tensor, ...], options: tuple[Any, ...],
    init: str, n_components: int, **constants: Any,
) -> None:  # fmt: skip
    """All launches for all starts of some rows. `options`: tol, reg_covar, tolerance of sums, max_iter, n_init, seed."""
    rule = launch_rule(width, n_components)
    like = fit[0]
    control = torch.zeros((starts, CONTROL.value), dtype=torch.int32, device=like.device)
    floats = like.new_empty((starts, FLOATS.value, rule["KP"]))
    keys = like.new_empty((starts, KEYS.value, rule["KP"]), dtype=torch.int64)
    parts = like.new_empty((starts, rule["PROGRAMS"], 4, rule["KP"]))
    for _ in range(passes_at_most(init, n_components, options[3], like.dtype)):
        _pass_kernel[(starts, rule["PROGRAMS"])](
            source, width, inits, fit, control, floats, keys, parts, *options, INIT=init, **constants, **rule
        )
