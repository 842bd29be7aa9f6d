"""Two-component one-dimensional Gaussian mixtures by expectation-maximisation, one program per row.

A row is strided memory of which the first `count` values are fitted, or a stretch of flat memory between two offsets. Its n
values x stay in registers, shifted by their minimum. With weight w, mean m and variance v of each component, q = w / sqrt(v) and
z = (x - m)^2 / 2v,

    E-step   e = exp(-|z_0 - z_1|), times q of the farther component and 1 times q of the nearer one; d is their sum
             responsibilities r = these two divided by d, accurate when they are tiny
             lower bound      = mean(log d - min z), up to the constant log(2 pi) / 2
    M-step   n_k = sum r_k + 10 eps, m_k = sum(r_k x) / n_k, w_k = n_k / sum n
             v_k = sum(r_k (x - m_k)^2) / n_k + reg_covar, with the new means

until the lower bound changes by less than `tol`.

A row is a block [BLOCK_K // 2, 2] whose pairs lie in one thread: one logarithm serves both, and every sum begins inside a thread.
Were it to begin with an exchange between threads, Triton would fuse the products into it, and the lanes of a warp would
disagree in the last bit about whether the row has converged. Rows of up to 64 values take one warp, no shared memory, no barrier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import Fit, empty_fit
from paa_gpu.kernels._launch import device_guard, keep, stage
from paa_gpu.separation import SCHEMES, tie_tolerance

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
EPS = tl.constexpr(2.220446049250313e-16)  # of float64, in every precision, as scikit-learn has it


@triton.jit
def _add2(a, b, a_, b_):
    return a + a_, b + b_


@triton.jit
def _add5(a, b, c, d, e, a_, b_, c_, d_, e_):
    return a + a_, b + b_, c + c_, d + d_, e + e_


@triton.jit
def _add5_multiply(a, b, c, d, e, f, a_, b_, c_, d_, e_, f_):
    return a + a_, b + b_, c + c_, d + d_, e + e_, f * f_


@triton.jit
def _joint(x, w0, w1, m0, m1, v0, v1):
    """Both components' densities times exp(nearest), and nearest: the smaller half squared distance in deviations."""
    p0, p1 = tl.rsqrt(v0), tl.rsqrt(v1)
    z0 = (x - m0) * (x - m0) * (0.5 * p0 * p0)
    z1 = (x - m1) * (x - m1) * (0.5 * p1 * p1)
    e = tl.exp(-tl.abs(z0 - z1))
    return w0 * p0 * tl.where(z0 <= z1, 1.0, e), w1 * p1 * tl.where(z0 <= z1, e, 1.0), tl.minimum(z0, z1)


@triton.jit
def _expectation(x, inside, w0, w1, m0, m1, v0, v1):
    """Responsibilities, zero outside; over the row, their sums, those of their products with x, and of the log-density."""
    d0, d1, nearest = _joint(x, w0, w1, m0, m1, v0, v1)
    share = tl.where(inside, 1 / (d0 + d1), 0.0)
    r0, r1 = d0 * share, d1 * share
    n0, s0, n1, s1, nearest, density = tl.reduce(
        (r0, r0 * x, r1, r1 * x, tl.where(inside, nearest, 0.0), tl.where(inside, d0 + d1, 1.0)), 1, _add5_multiply
    )  # [BLOCK_K // 2]
    n0, s0, n1, s1, log_density = tl.reduce((n0, s0, n1, s1, tl.log(density) - nearest), 0, _add5)
    return r0, r1, n0 + 10 * EPS, n1 + 10 * EPS, s0, s1, log_density


@triton.jit
def _fit(x, inside, n, valid, w0, w1, m0, m1, v0, v1, tol, reg_covar, max_iter, TIED: tl.constexpr):
    """Iterate from the given parameters; `n` is the number of values inside. Leaves at once where the row is not valid."""
    tol = tl.full((), tol, x.dtype)
    reg_covar = tl.full((), reg_covar, x.dtype)
    lower_bound = tl.full((), float("-inf"), x.dtype)
    n_iter = tl.full((), 0, tl.int32)
    converged = tl.full((), False, tl.int1)
    going = valid
    while going:
        r0, r1, n0, n1, s0, s1, log_density = _expectation(x, inside, w0, w1, m0, m1, v0, v1)
        w0, w1 = n0 / (n0 + n1), n1 / (n0 + n1)
        m0, m1 = s0 / n0, s1 / n1
        q0, q1 = tl.reduce((r0 * (x - m0) * (x - m0), r1 * (x - m1) * (x - m1)), 1, _add2)  # [BLOCK_K // 2]
        q0, q1 = tl.reduce((q0, q1), 0, _add2)
        if TIED:
            v0 = (q0 + q1) / (n0 + n1) + reg_covar
            v1 = v0
        else:
            v0, v1 = q0 / n0 + reg_covar, q1 / n1 + reg_covar
        previous = lower_bound
        lower_bound = log_density / n.to(x.dtype) - HALF_LOG_2PI
        n_iter += 1
        converged = tl.abs(lower_bound - previous) < tol
        going = (n_iter < max_iter) & (converged == 0)
    return w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged


@triton.jit
def _row_positions(BLOCK_K: tl.constexpr):
    """Positions in a row, [BLOCK_K // 2, 2]: the pairs (i, i + BLOCK_K // 2), each in one thread."""
    first = tl.arange(0, BLOCK_K // 2)
    return tl.join(first, first + BLOCK_K // 2)


@triton.jit
def _load_block(ptr, offset, mask, other):
    """Load [BLOCK_K // 2, 2] as two blocks [BLOCK_K // 2], so that the pairs stay in one thread."""
    first, second = tl.split(offset)
    first_inside, second_inside = tl.split(mask)
    return tl.join(
        tl.load(ptr + first, mask=first_inside, other=other), tl.load(ptr + second, mask=second_inside, other=other)
    )


@triton.jit
def _store_block(ptr, offset, value, mask):
    """The counterpart of `_load_block`."""
    first, second = tl.split(offset)
    first_value, second_value = tl.split(value)
    first_inside, second_inside = tl.split(mask)
    tl.store(ptr + first, first_value, mask=first_inside)
    tl.store(ptr + second, second_value, mask=second_inside)


@triton.jit
def _load_row(ptr, offset, inside, n, DTYPE: tl.constexpr):
    """The row less its minimum, zero outside; its minimum and maximum; whether it can be fitted."""
    x = _load_block(ptr, offset, inside, 0.0)
    if x.dtype != tl.float64:
        x = x.to(DTYPE)
    finite = inside & (tl.abs(x) < float("inf"))
    valid = (n >= 2) & (tl.sum(finite.to(tl.int32)) == n)
    smallest = tl.min(tl.where(finite, x, float("inf")))
    largest = tl.max(tl.where(finite, x, float("-inf")))
    # Subtracted in the wider of the two precisions.
    return tl.where(inside, x - smallest, 0.0).to(DTYPE), smallest, largest, valid


@triton.jit
def _store_fit(fit_ptrs, row, shift, valid, w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged):
    weights_ptr, means_ptr, variances_ptr, lower_bound_ptr, n_iter_ptr, converged_ptr, valid_ptr = fit_ptrs
    nan = float("nan")
    tl.store(weights_ptr + 2 * row, tl.where(valid, w0, nan))
    tl.store(weights_ptr + 2 * row + 1, tl.where(valid, w1, nan))
    tl.store(means_ptr + 2 * row, tl.where(valid, m0 + shift, nan).to(w0.dtype))
    tl.store(means_ptr + 2 * row + 1, tl.where(valid, m1 + shift, nan).to(w0.dtype))
    tl.store(variances_ptr + 2 * row, tl.where(valid, v0, nan))
    tl.store(variances_ptr + 2 * row + 1, tl.where(valid, v1, nan))
    tl.store(lower_bound_ptr + row, tl.where(valid, lower_bound, nan))
    tl.store(n_iter_ptr + row, n_iter.to(tl.int64))
    tl.store(converged_ptr + row, converged)
    tl.store(valid_ptr + row, valid)


@triton.jit
def _load_pair(pair, row, first, second):
    """The two initial values of a row, from a pointer and its strides over rows and components; the defaults without one."""
    ptr, stride_g, stride_c = pair
    if ptr is not None:
        first = tl.load(ptr + row * stride_g).to(first.dtype)
        second = tl.load(ptr + row * stride_g + stride_c).to(first.dtype)
    return first, second


@triton.jit(do_not_specialize=["width", "max_iter"])
def _fit_rows_kernel(
    x_ptr,  # Tensor[G, K], or Tensor[N] with offsets
    stride_xg,
    stride_xk,
    count_ptr,  # Tensor[G] or None: all K values count
    stride_cg,
    offset_ptr,  # Tensor[G + 1] or None: rows are strided
    width,
    weights_init,  # each of the three: (Tensor[G, 2] or None, its strides)
    means_init,
    precisions_init,
    fit_ptrs,  # the seven tensors of `empty_fit`
    tol: tl.float64,
    reg_covar: tl.float64,
    max_iter,
    TIED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    position = _row_positions(BLOCK_K)  # [BLOCK_K // 2, 2]
    if offset_ptr is not None:
        start = tl.load(offset_ptr + row)
        n = tl.load(offset_ptr + row + 1) - start
        x_ptr += start * stride_xk
    else:
        n = width.to(tl.int64)
        if count_ptr is not None:
            n = tl.minimum(tl.maximum(tl.load(count_ptr + row * stride_cg).to(tl.int64), 0), n)
        x_ptr += row * stride_xg
    inside = position < n
    x, smallest, largest, valid = _load_row(x_ptr, position.to(tl.int64) * stride_xk, inside, n, DTYPE)

    half, one = tl.full((), 0.5, DTYPE), tl.full((), 1.0, DTYPE)
    w0, w1 = _load_pair(weights_init, row, half, half)
    m0, m1 = _load_pair(means_init, row, smallest, largest)
    precision0, precision1 = _load_pair(precisions_init, row, one, one)
    m0, m1 = (m0 - smallest).to(DTYPE), (m1 - smallest).to(DTYPE)
    fit = _fit(x, inside, n, valid, w0, w1, m0, m1, 1 / precision0, 1 / precision1, tol, reg_covar, max_iter, TIED)
    _store_fit(fit_ptrs, row, smallest, valid, *fit)


@triton.jit
def _first_best(score, among, position, TIE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Position of the first candidate of `among` that ties with the highest score; BLOCK_K where there is none."""
    score = tl.where(among, score, float("-inf"))
    tied = among & (score >= tl.max(score) - TIE)
    return tl.min(tl.where(tied, position, BLOCK_K))


@triton.jit
def _separate(
    foreground, inside, score, position, SCHEME: tl.constexpr, TIE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`paa_gpu.separation.separate` for one row."""
    threshold = _first_best(score, foreground, position, TIE, BLOCK_K)
    has_foreground = threshold < BLOCK_K
    positive = inside
    if SCHEME.foreground_only:
        positive = foreground
    if SCHEME.stop_at_threshold:
        positive = positive & (position <= threshold)
    if not SCHEME.all_without_foreground:
        positive = positive & has_foreground

    ignored = inside & False
    if SCHEME.ignore_foreground:
        ignored = foreground & (positive == 0)
    if SCHEME.ignore_before_background:
        best_background = _first_best(score, inside & (foreground == 0), position, TIE, BLOCK_K)
        ignored = inside & has_foreground & (position > threshold) & (position < best_background)
    return positive, ignored


@triton.jit(do_not_specialize=["width", "max_iter"])
def _fit_candidates_kernel(
    loss_ptr,  # Tensor[G, K], contiguous like all [G, K] here
    count_ptr,  # Tensor[G]
    width,
    fit_ptrs,  # the seven tensors of `empty_fit`
    assignment_ptr,  # Tensor[G, K] or None
    score_ptr,  # Tensor[G, K] or None
    index_ptr,  # Tensor[G, K] or None
    positive_ptr,  # Tensor[P] or None
    ignored_ptr,  # Tensor[P] or None
    tol: tl.float64,
    reg_covar: tl.float64,
    max_iter,
    TIED: tl.constexpr,
    SCHEME: tl.constexpr,
    SINGLETON_POSITIVE: tl.constexpr,
    TIE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    position = _row_positions(BLOCK_K)  # [BLOCK_K // 2, 2]
    element = row * width + position
    n = tl.minimum(tl.maximum(tl.load(count_ptr + row), 0), width)
    inside = position < n
    x, smallest, largest, valid = _load_row(loss_ptr, element, inside, n, DTYPE)

    half, one, zero = tl.full((), 0.5, DTYPE), tl.full((), 1.0, DTYPE), tl.full((), 0.0, DTYPE)
    spread = (largest - smallest).to(DTYPE)
    fit = _fit(x, inside, n, valid, half, half, zero, spread, one, one, tol, reg_covar, max_iter, TIED)
    _store_fit(fit_ptrs, row, smallest, valid, *fit)

    w0, w1, m0, m1, v0, v1, _, _, _ = fit
    d0, d1, nearest = _joint(x, w0, w1, m0, m1, v0, v1)
    score = tl.log(d0 + d1) - nearest - HALF_LOG_2PI
    fitted = inside & valid
    foreground = fitted & (tl.log(d0) >= tl.log(d1) - TIE)
    if assignment_ptr is not None:
        _store_block(assignment_ptr, element, foreground, position < width)
        _store_block(score_ptr, element, tl.where(fitted, score, float("-inf")), position < width)
    if SCHEME is not None:
        positive, ignored = _separate(foreground, fitted, score, position, SCHEME, TIE, BLOCK_K)
        if SINGLETON_POSITIVE:
            # The smallest finite value is infinite where the only candidate is not finite.
            positive = positive | (inside & (n == 1) & (smallest < float("inf")))
        index = _load_block(index_ptr, element, inside, -1)
        _store_block(positive_ptr, index, positive, positive & (index >= 0))
        _store_block(ignored_ptr, index, ignored, ignored & (index >= 0))


def launch_rule(width: int) -> tuple[int, int]:
    """BLOCK_K and warps for rows of at most `width` values: two to eight values per thread."""
    block = max(64, triton.next_power_of_2(width))
    return block, min(max(block // 64, 1), 16)


def fit_gmm_1d(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights_init: Tensor | None,
    means_init: Tensor | None,
    precisions_init: Tensor | None,
    covariance_type: str,
    tol: float,
    reg_covar: float,
    max_iter: int,
    precision: str,
) -> Fit:
    """The operator `paa_gpu::fit_gmm_1d`: one launch; flat rows need one copy of their offsets as well."""
    rows, width = (len(lengths), max(lengths, default=0)) if lengths is not None else x.shape
    fit = empty_fit(x, rows, precision)
    if rows == 0:
        return fit
    block_k, num_warps = launch_rule(width)
    with device_guard(x):
        offset = None
        if lengths is not None:
            offset = stage([0, *itertools.accumulate(lengths)], x)
            keep(fit[0], offset)
        _fit_rows_kernel[(rows,)](
            x,
            x.stride(0),
            x.stride(-1),
            count,
            0 if count is None else count.stride(0),
            offset,
            width,
            _pair(weights_init, rows),
            _pair(means_init, rows),
            _pair(precisions_init, rows),
            fit,
            tol,
            reg_covar,
            max_iter,
            TIED=covariance_type == "tied",
            BLOCK_K=block_k,
            num_warps=num_warps,
        )
    return fit


def _pair(init: Tensor | None, rows: int) -> tuple[Tensor | None, int, int]:
    if init is None:
        return None, 0, 0
    init = init.expand(rows, 2)
    return init, init.stride(0), init.stride(1)


def launch_fit(
    loss: Tensor,
    count: Tensor,
    fit: Fit,
    covariance_type: str,
    *,
    assignment: Tensor | None = None,
    score: Tensor | None = None,
    index: Tensor | None = None,
    positive: Tensor | None = None,
    ignored: Tensor | None = None,
    separation: str | None = None,
    singleton: str = "background",
) -> None:
    """Fit the candidates of every ground truth in one launch, and separate them.

    Args:
        loss: Tensor[G, K], any floating dtype, contiguous; a row's first `count` losses are its candidates, in order.
        count: Tensor[G] int64, contiguous.
        fit: the result of `empty_fit`, filled here; its dtype is the precision of the fit.
        covariance_type: as for `fit_gmm_1d`.
        assignment, score: Tensor[G, K] bool and of the fit's dtype, contiguous, both or neither. Filled completely: True at
            foreground and the log-density at candidates; False and -inf at padding and in rows that are not valid.
        separation: a key of `SCHEMES`, or None. With it come `index`, Tensor[G, K] int64, contiguous, where the candidates
            stand in `positive` and `ignored` (what is negative is left out), and these two, Tensor[P] bool, zeroed by the
            caller: they become True where a candidate is positive or ignored, and are not touched elsewhere.
        singleton: "background" or "positive", what the only candidate of a row becomes (with `separation`).
    """
    rows, width = loss.shape
    if rows == 0:
        return
    block_k, num_warps = launch_rule(width)
    with device_guard(loss):
        _fit_candidates_kernel[(rows,)](
            loss,
            count,
            width,
            fit,
            assignment,
            score,
            index,
            positive,
            ignored,
            1e-3,
            1e-6,
            100,
            TIED=covariance_type == "tied",
            SCHEME=None if separation is None else SCHEMES[separation],
            SINGLETON_POSITIVE=singleton == "positive",
            TIE=tie_tolerance(fit[0].dtype),
            BLOCK_K=block_k,
            num_warps=num_warps,
        )
