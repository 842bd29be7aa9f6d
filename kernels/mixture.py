"""Reading mixtures out: one pass over the values, without memory of their size besides the result.

For a value x and components of weight w_k, mean m_k and variance v_k,

    log p_k = log w_k - log(2 pi v_k) / 2 - (x - m_k)^2 / (2 v_k)
    responsibility r_k = exp(log p_k - max log p) / total      total = sum_j exp(log p_j - max log p)
    log-density = max log p + log total                        label = the first k of the largest log p_k

A row is strided memory, of which the first `count` values are read, or a part of flat memory between two offsets. A row is cut
into blocks, and each block has a program. So the terms of a row's components are scalars of the program, and a long row has many
programs. The log-likelihood of a row is the sum over its blocks. A second launch adds them in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import empty_answer
from paa_gpu.kernels._batch import image_of
from paa_gpu.kernels._launch import compile_options, device_guard, stage
from paa_gpu.kernels._numeric import HALF_LOG_2PI


@triton.jit
def _log_p(x, component, weights_ptr, means_ptr, variances_ptr):
    """Log p of a component for the values x, [BLOCK]; `component` counts those of all rows."""
    weight, mean = tl.load(weights_ptr + component), tl.load(means_ptr + component)
    variance = tl.load(variances_ptr + component)
    return tl.log(weight) - 0.5 * tl.log(variance) - HALF_LOG_2PI - (x - mean) * (x - mean) * (0.5 / variance)


@triton.jit
def _best(x, first, parameters, N_COMPONENTS: tl.constexpr):
    """The largest log p and its first component; -inf and 0 where none has a density, -inf and -1 where they are no numbers."""
    best = tl.full(x.shape, float("-inf"), x.dtype)
    label = tl.full(x.shape, -1, tl.int32)
    # Two at a time: the terms of eight components at once would take 100 registers.
    for k in tl.range(N_COMPONENTS, loop_unroll_factor=2):
        log_p = _log_p(x, first + k, *parameters)
        label = tl.where((log_p > best) | ((k == 0) & (log_p == best)), k, label)
        best = tl.where(log_p > best, log_p, best)
    return best, label


@triton.jit
def _best_and_total(x, first, parameters, N_COMPONENTS: tl.constexpr):
    """The largest log p, and the sum of the densities over that; NaN where none has a density."""
    best, _ = _best(x, first, parameters, N_COMPONENTS)
    total = tl.zeros(x.shape, x.dtype)
    for k in tl.static_range(N_COMPONENTS):
        total += tl.exp(_log_p(x, first + k, *parameters) - best)
    return best, total


@triton.jit
def _score(x, first, parameters, N_COMPONENTS: tl.constexpr):
    """The log-density: -inf where no component has one, NaN where x or the parameters are."""
    best, total = _best_and_total(x, first, parameters, N_COMPONENTS)
    return tl.where(best > float("-inf"), best + tl.log(total), _log_p(x, first, *parameters))


@triton.jit
def _lowest(first, means_ptr, N_COMPONENTS: tl.constexpr):
    """The first component of the smallest mean, counted among those of all rows."""
    lowest, smallest = first, tl.load(means_ptr + first)
    # Unrolled, it would spill on AMD: more than six scalar registers would lie in vector registers.
    for k in range(1, N_COMPONENTS):
        mean = tl.load(means_ptr + first + k)
        lowest = tl.where(mean < smallest, first + k, lowest)
        smallest = tl.minimum(mean, smallest)
    return lowest


@triton.jit
def _share_of_two(x, component, first, parameters):
    """The responsibility of a component of two: the difference of their log p needs one exponential."""
    own, other = _log_p(x, component, *parameters), _log_p(x, 2 * first + 1 - component, *parameters)
    return 1 / (1 + tl.exp(other - own))


# The compiler is told whether 16 divides the width: then two values are one access.
@triton.jit(do_not_specialize=["n_rows"])
def _read_kernel(
    x_ptr,  # Tensor[G, K], or Tensor[N] with offsets
    stride_xg,
    stride_xk,
    count_ptr,  # Tensor[G] or None: all K values count
    stride_cg,
    start_ptr,  # Tensor[2, G + 1]: first block and first value of each row, and their totals; None: rows are strided
    n_rows,
    width,
    weights_ptr,  # Tensor[G, N_COMPONENTS], contiguous like all that follow
    means_ptr,
    variances_ptr,
    answer_ptr,  # shape of x; with N_COMPONENTS behind it for "predict_proba"; for "log_likelihood" one of each program
    WHAT: tl.constexpr,
    N_COMPONENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if start_ptr is not None:
        row = image_of(start_ptr, n_rows, program).to(tl.int64)
        begin = tl.load(start_ptr + n_rows + 1 + row)
        end = tl.load(start_ptr + n_rows + 2 + row) - begin
        n = end
        block = program - tl.load(start_ptr + row)
        x_ptr += begin * stride_xk
    else:
        blocks = tl.cdiv(width, BLOCK)
        row, block = program // blocks, program % blocks
        begin = row * width
        end = tl.full((), width, tl.int64)
        n = end
        if count_ptr is not None:
            n = tl.minimum(tl.maximum(tl.load(count_ptr + row * stride_cg).to(tl.int64), 0), end)
        x_ptr += row * stride_xg
    position = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    exists, inside = position < end, position < n
    x = tl.load(x_ptr + position * stride_xk, mask=inside, other=float("nan")).to(weights_ptr.dtype.element_ty)

    first = row * N_COMPONENTS
    parameters = (weights_ptr, means_ptr, variances_ptr)
    place = answer_ptr + begin + position
    if WHAT == "predict":
        _, label = _best(x, first, parameters, N_COMPONENTS)
        label = tl.where(tl.abs(x) < float("inf"), label, -1)
        tl.store(place, label.to(tl.int64), mask=exists)
    elif WHAT == "predict_proba":
        place = answer_ptr + (begin + position) * N_COMPONENTS
        if N_COMPONENTS == 2:
            tl.store(place, _share_of_two(x, first, first, parameters), mask=exists)
            tl.store(place + 1, _share_of_two(x, first + 1, first, parameters), mask=exists)
        else:
            best, total = _best_and_total(x, first, parameters, N_COMPONENTS)
            for k in tl.static_range(N_COMPONENTS):
                tl.store(place + k, tl.exp(_log_p(x, first + k, *parameters) - best) / total, mask=exists)
    elif WHAT == "low_probability":
        lowest = _lowest(first, means_ptr, N_COMPONENTS)
        if N_COMPONENTS == 2:
            low = _share_of_two(x, lowest, first, parameters)
        else:
            best, total = _best_and_total(x, first, parameters, N_COMPONENTS)
            low = tl.exp(_log_p(x, lowest, *parameters) - best) / total
        tl.store(place, low, mask=exists)
    elif WHAT == "score_samples":
        tl.store(place, _score(x, first, parameters, N_COMPONENTS), mask=exists)
    else:
        score = _score(x, first, parameters, N_COMPONENTS)
        tl.store(answer_ptr + program, tl.sum(tl.where(inside, score, 0.0)))


@triton.jit(do_not_specialize=["n_blocks"])
def _sum_kernel(
    piece_ptr,  # Tensor[blocks], contiguous like the one below
    start_ptr,  # Tensor[2, G + 1] as above, or None: every row has n_blocks
    n_blocks,
    sum_ptr,  # Tensor[G]
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if start_ptr is not None:
        begin, end = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    else:
        begin = row * n_blocks
        end = begin + n_blocks
    total = tl.zeros([BLOCK], piece_ptr.dtype.element_ty)
    while begin < end:
        piece = begin + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.load(piece_ptr + piece, mask=piece < end, other=0.0)
        begin += BLOCK
    tl.store(sum_ptr + row, tl.sum(total))


def launch_rule(rows: int, values: int) -> dict[str, int]:
    """Blocks as long as a row is in the mean, of 64 to 1,024 values, two to four to a thread."""
    block = min(max(triton.next_power_of_2(-(-values // max(rows, 1))), 64), 1024)
    return {"BLOCK": block, "num_warps": max(block // 128, 1), **compile_options(fuse=True)}


def read_mixture(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights: Tensor,
    means: Tensor,
    variances: Tensor,
    what: str,
) -> Tensor:
    answer = empty_answer(x, weights, what)
    rows, components = weights.shape
    rule = launch_rule(rows, x.numel())
    block = rule["BLOCK"]
    with device_guard(x):
        start, width = None, 0
        if lengths is None:
            width = x.shape[1]
            blocks = -(-width // block)
            programs = rows * blocks
        else:
            starts = list(itertools.accumulate((-(-length // block) for length in lengths), initial=0))
            blocks, programs = 0, starts[-1]
            start = stage([*starts, *itertools.accumulate(lengths, initial=0)], x)
        summed = what == "log_likelihood"
        pieces = answer.new_empty(programs) if summed else answer
        if programs > 0:
            _read_kernel[(programs,)](
                x,
                x.stride(0),
                x.stride(-1),
                count,
                0 if count is None else count.stride(0),
                start,
                rows,
                width,
                weights.contiguous(),
                means.contiguous(),
                variances.contiguous(),
                pieces,
                WHAT=what,
                N_COMPONENTS=components,
                **rule,
            )
        if summed and rows > 0:
            _sum_kernel[(rows,)](pieces, start, blocks, answer, BLOCK=64, num_warps=1, **compile_options(fuse=True))
    return answer
