"""Two-component one-dimensional Gaussian mixtures by expectation-maximisation, one program per row.

A row is strided memory, of which the first `count` values are fitted, or a part of flat memory, see `_rows`. The minimum of a row
is subtracted from all its n values x. With weight w, mean m and variance v of each component, q = w / sqrt(v) and
z = (x - m)^2 / 2v,

    E-step   d_k = q_k exp(min z - z_k): 1 for the nearer component and exp(-|z_0 - z_1|) for the other one, times q
             responsibilities r_k = d_k / (d_0 + d_1), accurate when they are tiny
             lower bound          = mean(log(d_0 + d_1) - min z), up to the constant log(2 pi) / 2
    M-step   n_k = sum r_k + 10 eps, m_k = sum(r_k x) / n_k, w_k = n_k / sum n
             v_k = sum(r_k (x - m_k)^2) / n_k + reg_covar, with the new means

until the lower bound changes by less than `tol`.

A row is one tile [BLOCK_K // 2, 2] in registers. A LONG row has several tiles, and every pass reads them again. The two values of
a pair lie in one thread. So one logarithm serves both, and every sum begins inside a thread. This matters. If a sum began with an
exchange between threads, Triton would fuse the products into it. Then the lanes of a warp would differ in the last bit, and
disagree about whether the row has converged. Rows of up to 64 values take one warp, no shared memory and no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu._ops import FIT_OPTIONS, Fit, empty_fit, sum_tolerance
from paa_gpu.kernels._batch import DTYPES, FIRST_POSITION, field
from paa_gpu.kernels._launch import compile_options, device_guard, mixes, stage
from paa_gpu.kernels._numeric import EPS, HALF_LOG_2PI, only_if
from paa_gpu.kernels._rows import check_width, choose_best, given_are_finite, locate, strided, tables, take_given
from paa_gpu.kernels._targets import give_back
from paa_gpu.kernels._tiles import NOBODY, find_range, load_pairs, load_tile, positions, store_pairs, tile_at
from paa_gpu.kernels.em_k import launch_components
from paa_gpu.kernels.em_k import launch_rule as components_rule
from paa_gpu.kernels.em_long import LONG_ROW, launch_long
from paa_gpu.kernels.em_mixed import choose, decide_narrow, e_step, fit_narrow
from paa_gpu.kernels.starts import begin
from paa_gpu.separation import SCHEMES, tie_tolerance


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
def _responsibilities(x, inside, w0, w1, m0, m1, v0, v1):
    """Responsibilities and min z, zero outside; d_0 + d_1, one outside."""
    z0, z1, d0, d1 = e_step(x, (w0, w1, m0, m1, v0, v1))
    share = tl.where(inside, 1 / (d0 + d1), 0.0)
    return d0 * share, d1 * share, tl.where(inside, tl.minimum(z0, z1), 0.0), tl.where(inside, d0 + d1, 1.0)


@triton.jit
def _fit(x, row, valid, w0, w1, m0, m1, v0, v1, options, TIED: tl.constexpr, BLOCK_K: tl.constexpr, LONG: tl.constexpr):
    """Iterate from the given parameters. Leaves at once where the row is not valid."""
    n = row[2]
    end = n if LONG else BLOCK_K
    tol, reg_covar, max_iter = tl.full((), options[0], x.dtype), tl.full((), options[1], x.dtype), options[2]
    per_value = 1 / n.to(x.dtype)
    lower_bound = tl.full((), float("-inf"), x.dtype)
    n_iter = tl.full((), 0, tl.int32)
    converged = tl.full((), False, tl.int1)
    going = valid
    while going:
        zero = tl.zeros([BLOCK_K // 2], x.dtype)
        n0, s0, n1, s1, log_density = zero, zero, zero, zero, zero
        for start in range(0, end, BLOCK_K):
            tile, inside = tile_at(x, row, start, BLOCK_K, LONG)
            r0, r1, nearest, density = _responsibilities(tile, inside, w0, w1, m0, m1, v0, v1)
            pair = tl.reduce((r0, r0 * tile, r1, r1 * tile, nearest, density), 1, _add5_multiply)  # each [BLOCK_K // 2]
            n0, s0, n1, s1 = n0 + pair[0], s0 + pair[1], n1 + pair[2], s1 + pair[3]
            log_density += tl.log(pair[5]) - pair[4]
        n0, s0, n1, s1, log_density = tl.reduce((n0, s0, n1, s1, log_density), 0, _add5)
        n0, n1 = n0 + 10 * EPS, n1 + 10 * EPS
        per_n0, per_n1, per_n = 1 / n0, 1 / n1, 1 / (n0 + n1)
        new_m0, new_m1 = s0 * per_n0, s1 * per_n1

        q0, q1 = zero, zero
        for start in range(0, end, BLOCK_K):
            # In a row of one tile the compiler sees that it has these responsibilities already.
            tile, inside = tile_at(x, row, start, BLOCK_K, LONG)
            r0, r1, _, _ = _responsibilities(tile, inside, w0, w1, m0, m1, v0, v1)
            pair = tl.reduce((r0 * (tile - new_m0) * (tile - new_m0), r1 * (tile - new_m1) * (tile - new_m1)), 1, _add2)
            q0, q1 = q0 + pair[0], q1 + pair[1]
        q0, q1 = tl.reduce((q0, q1), 0, _add2)

        w0, w1, m0, m1 = n0 * per_n, n1 * per_n, new_m0, new_m1
        if TIED:
            v0 = (q0 + q1) * per_n + reg_covar
            v1 = v0
        else:
            v0, v1 = q0 * per_n0 + reg_covar, q1 * per_n1 + reg_covar
        previous = lower_bound
        lower_bound = log_density * per_value - HALF_LOG_2PI
        n_iter += 1
        converged = tl.abs(lower_bound - previous) < tol
        going = (n_iter < max_iter) & (converged == 0)
    return w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged


@triton.jit
def _is_fit(shift, fit):
    """Whether all that a fit ends in is finite, and no component has shrunk to a point."""
    w0, w1, m0, m1, v0, v1, lower_bound, _, _ = fit
    # A sum of magnitudes is finite where every one is, but for what is beyond half of the range: not a fit either.
    total = tl.abs(w0) + tl.abs(w1) + tl.abs(m0 + shift) + tl.abs(m1 + shift) + tl.abs(lower_bound)
    return (total + v0 + v1 < float("inf")) & (v0 > 0) & (v1 > 0)


@triton.jit
def _store_fit(fit_ptrs, g, shift, valid, w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged):
    weights_ptr, means_ptr, variances_ptr, lower_bound_ptr, n_iter_ptr, converged_ptr, valid_ptr = fit_ptrs
    nan = float("nan")
    tl.store(weights_ptr + 2 * g, tl.where(valid, w0, nan))
    tl.store(weights_ptr + 2 * g + 1, tl.where(valid, w1, nan))
    tl.store(means_ptr + 2 * g, tl.where(valid, m0 + shift, nan))
    tl.store(means_ptr + 2 * g + 1, tl.where(valid, m1 + shift, nan))
    tl.store(variances_ptr + 2 * g, tl.where(valid, v0, nan))
    tl.store(variances_ptr + 2 * g + 1, tl.where(valid, v1, nan))
    tl.store(lower_bound_ptr + g, tl.where(valid, lower_bound, nan))
    tl.store(n_iter_ptr + g, tl.where(valid, n_iter, 0).to(tl.int64))
    tl.store(converged_ptr + g, converged & valid)
    tl.store(valid_ptr + g, valid)


@triton.jit
def _start(row, extent, origin, inits, reg_covar, sum_tolerance, INIT: tl.constexpr, TIED: tl.constexpr, BLOCK_K: tl.constexpr):
    """w0, w1, m0, m1, v0, v1 of the first E-step, and whether given values make a mixture. origin: seed, row and start."""
    take = given_are_finite(inits, origin[1], 2, 2)
    weight, mean, variance = begin(row, extent, origin, reg_covar, INIT, TIED, 2, 2, BLOCK_K)
    weight, mean, variance, good = take_given(inits, origin[1], row[3], take, sum_tolerance, weight, mean, variance, 2, 2)
    w0, w1 = tl.split(weight)
    m0, m1 = tl.split(mean)
    v0, v1 = tl.split(variance)
    # A component of weight 0 is infinitely far from every value: the E-step asks which one is nearer before it asks for weights.
    return w0, w1, tl.where(w0 > 0, m0, float("inf")), tl.where(w1 > 0, m1, float("inf")), v0, v1, good


@triton.jit(do_not_specialize=["width", "max_iter", "seed"])
def _fit_rows_kernel(
    source,  # see `_rows.locate`
    width,
    inits,  # weights, means and precisions: each (Tensor[G, 2] or None, its stride over rows)
    fit_ptrs,  # the seven tensors of `empty_fit`, for every start of every row
    tol: tl.float64,
    reg_covar: tl.float64,
    sum_tolerance: tl.float64,
    max_iter,
    n_init,
    seed: tl.int64,
    INIT: tl.constexpr,
    PLAIN: tl.constexpr,
    MIXED: tl.constexpr,
    TIED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LONG: tl.constexpr,
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    g, x_ptr, stride_xk, n = locate(source, width, program // n_init)
    attempt = program % n_init
    end = n if LONG else BLOCK_K
    smallest, largest, valid = find_range(x_ptr, stride_xk, n, end, DTYPE, BLOCK_K)
    row = (x_ptr, stride_xk, n, smallest)
    x, _ = load_tile(row, 0, BLOCK_K)

    if PLAIN:
        half, one = tl.full((), 0.5, DTYPE), tl.full((), 1.0, DTYPE)
        start = (half, half, 0 * half, largest - smallest, one, one)
    else:
        whole = (x_ptr, stride_xk, tl.where(valid, n, 0), tl.where(valid, smallest, 0.0))
        extent = tl.where(valid, largest - smallest, 0.0)
        origin = (seed, g, attempt)
        w0, w1, m0, m1, v0, v1, good = _start(
            whole, extent, origin, inits, tl.full((), reg_covar, DTYPE), sum_tolerance, INIT, TIED, BLOCK_K
        )
        start = (w0, w1, m0, m1, v0, v1)
        valid &= good
    doubtful = valid
    if MIXED:
        narrow, _, sure = fit_narrow(x, row, valid, largest - smallest, (tol, reg_covar, max_iter), BLOCK_K)
        doubtful = valid & (sure == 0)
    fit = _fit(x, row, doubtful, *start, (tol, reg_covar, max_iter), TIED, BLOCK_K, LONG)
    if MIXED:
        fit = choose(doubtful, fit, narrow)
    _store_fit(fit_ptrs, g * n_init + attempt, smallest, valid & _is_fit(smallest, fit), *fit)


@triton.jit
def _score(x, inside, fit, TIE: tl.constexpr):
    """Log-density of the mixture, -inf outside, and whether a candidate is foreground."""
    w0, w1, m0, m1, v0, v1, _, _, _ = fit
    z0, z1, d0, d1 = e_step(x, (w0, w1, m0, m1, v0, v1))
    score = tl.log(d0 + d1) - tl.minimum(z0, z1) - HALF_LOG_2PI
    return tl.where(inside, score, float("-inf")), inside & (tl.log(d0) >= tl.log(d1) - TIE)


@triton.jit
def _first_best(x, row, end, fit, among_foreground, TIE: tl.constexpr, BLOCK_K: tl.constexpr, LONG: tl.constexpr):
    """Position of the first foreground (or background) candidate that ties with the highest score; `NOBODY` without one."""
    best = tl.full((), float("-inf"), x.dtype)
    for start in range(0, end, BLOCK_K):
        tile, inside = tile_at(x, row, start, BLOCK_K, LONG)
        score, foreground = _score(tile, inside, fit, TIE)
        best = tl.maximum(best, tl.max(tl.where(foreground == among_foreground, score, float("-inf"))))
    first = tl.full((), NOBODY, tl.int32)
    for start in range(0, end, BLOCK_K):
        tile, inside = tile_at(x, row, start, BLOCK_K, LONG)
        score, foreground = _score(tile, inside, fit, TIE)
        tied = inside & (foreground == among_foreground) & (score >= best - TIE)
        first = tl.minimum(first, tl.min(tl.where(tied, positions(start, BLOCK_K), NOBODY)))
    return first


@triton.jit
def _best(x, row, end, fit, SCHEME: tl.constexpr, TIE: tl.constexpr, BLOCK_K: tl.constexpr, LONG: tl.constexpr):
    """The first best candidate of the foreground; and of the background, where the scheme asks for it."""
    threshold = _first_best(x, row, end, fit, True, TIE, BLOCK_K, LONG)
    best_background = threshold
    if SCHEME.ignore_before_background:
        best_background = _first_best(x, row, end, fit, False, TIE, BLOCK_K, LONG)
    return threshold, best_background


@triton.jit
def _separate(foreground, inside, position, threshold, best_background, SCHEME: tl.constexpr):
    """`paa_gpu.separation.separate` for a tile."""
    has_foreground = threshold < NOBODY
    positive = inside
    if SCHEME.foreground_only:
        positive = foreground
    if SCHEME.stop_at_threshold:
        positive = positive & (position <= threshold)
    if not SCHEME.all_without_foreground:
        positive = only_if(has_foreground, positive)

    ignored = inside & False
    if SCHEME.ignore_foreground:
        ignored = foreground & (positive == 0)
    if SCHEME.ignore_before_background:
        ignored = only_if(has_foreground, inside & (position > threshold) & (position < best_background))
    return positive, ignored


@triton.jit
def _give_back_tile(images, targets, num_pos_ptr, image_ptr, g, index, positive, ignored, INDS: tl.constexpr):
    """Give the positives of a tile their targets back, where targets are written. index: positions in the batch."""
    if image_ptr is not None:
        image = tl.load(image_ptr + g)
        first_index, second_index = tl.split(index - field(images, image, FIRST_POSITION))
        first_positive, second_positive = tl.split(positive)
        first_ignored, second_ignored = tl.split(ignored)
        give_back(images, targets, num_pos_ptr, image, first_index, first_positive, first_ignored, INDS)
        give_back(images, targets, num_pos_ptr, image, second_index, second_positive, second_ignored, INDS)


@triton.jit(do_not_specialize=["width", "n_images", "max_iter"])
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
    image_ptr,  # Tensor[G]: the row's image, or None: no targets are written
    table_ptr,  # the images, see `_batch`
    n_images,
    targets,  # see `_targets`
    num_pos_ptr,  # Tensor[B]
    tol: tl.float64,
    reg_covar: tl.float64,
    max_iter,
    MIXED: tl.constexpr,
    TIED: tl.constexpr,
    SCHEME: tl.constexpr,
    SINGLETON_POSITIVE: tl.constexpr,
    TIE: tl.constexpr,
    INDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LONG: tl.constexpr,
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    g = tl.program_id(0).to(tl.int64)
    loss_ptr += g * width
    n = tl.minimum(tl.maximum(tl.load(count_ptr + g), 0), width).to(tl.int32)
    end = n if LONG else BLOCK_K
    smallest, largest, valid = find_range(loss_ptr, 1, n, end, DTYPE, BLOCK_K)
    row = (loss_ptr, 1, n, smallest)
    x, _ = load_tile(row, 0, BLOCK_K)

    half, one, zero = tl.full((), 0.5, DTYPE), tl.full((), 1.0, DTYPE), tl.full((), 0.0, DTYPE)
    options = (tol, reg_covar, max_iter)
    doubtful = valid
    if MIXED:
        narrow, error, sure = fit_narrow(x, row, valid, largest - smallest, options, BLOCK_K)
        foreground, threshold, best_background, decided = decide_narrow(
            x, n, narrow, error, SCHEME.ignore_before_background, BLOCK_K
        )
        doubtful = valid & ((sure & decided) == 0)
    fit = _fit(x, row, doubtful, half, half, zero, largest - smallest, one, one, options, TIED, BLOCK_K, LONG)
    if MIXED:
        fit = choose(doubtful, fit, narrow)
        if doubtful:
            threshold, best_background = _best(x, row, end, fit, SCHEME, TIE, BLOCK_K, LONG)
            foreground = _score(x, positions(0, BLOCK_K) < n, fit, TIE)[1]
    elif SCHEME is not None:
        threshold, best_background = _best(x, row, end, fit, SCHEME, TIE, BLOCK_K, LONG)
    valid &= _is_fit(smallest, fit)
    _store_fit(fit_ptrs, g, smallest, valid, *fit)

    for start in range(0, width if LONG else BLOCK_K, BLOCK_K):
        position = positions(start, BLOCK_K)
        tile, inside = tile_at(x, row, start, BLOCK_K, LONG)
        if MIXED:
            foreground = only_if(valid, foreground)
        else:
            score, foreground = _score(tile, only_if(valid, inside), fit, TIE)
        if assignment_ptr is not None:
            store_pairs(assignment_ptr + g * width, position, foreground, position < width)
            store_pairs(score_ptr + g * width, position, score, position < width)
        if SCHEME is not None:
            positive, ignored = _separate(foreground, only_if(valid, inside), position, threshold, best_background, SCHEME)
            if SINGLETON_POSITIVE:
                # The smallest finite value is infinite where the only candidate is not finite.
                positive = positive | only_if((n == 1) & (smallest < float("inf")), inside)
            index = load_pairs(index_ptr + g * width, position, inside, -1)
            store_pairs(positive_ptr, index, positive, positive & (index >= 0))
            store_pairs(ignored_ptr, index, ignored, ignored & (index >= 0))
            _give_back_tile((table_ptr, n_images), targets, num_pos_ptr, image_ptr, g, index, positive, ignored, INDS)


def launch_rule(width: int) -> dict[str, int]:
    """Two values per thread, in at most 512 threads; wider rows are LONG: read tile by tile, in every pass.

    ptxas gives a thread of a kernel of 16 warps 64 registers and spills what needs 68, unless it is told a limit. A LONG
    kernel takes the 72 to 94 it needs, and would spill under the usual limit.
    """
    block = min(max(1 << (width - 1).bit_length(), 64), 1024)
    if width > block:
        return {"BLOCK_K": block, "LONG": True, "num_warps": 16, **compile_options(fuse=True, registers=128)}
    return {"BLOCK_K": block, "LONG": False, "num_warps": block // 64, **compile_options(fuse=True)}


def can_be_mixed(width: int, covariance_type: str) -> bool:
    """Rows of one warp, whose variances are not tied. Other rows are fitted in float64 where the precision is mixed."""
    return width <= 64 and covariance_type != "tied"


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
    n_components: int = 2,
    init: str = "minmax",
    n_init: int = 1,
    seed: int = 0,
) -> Fit:
    """The operator `paa_gpu::fit_gmm_1d`: one launch, and another one to choose where there are several starts of a row; one for
    each iteration of long rows. Flat rows need a copy of their table as well, and two where some are long and some are not."""
    rows = x.shape[0] if lengths is None else len(lengths)
    fit = empty_fit(x, rows, precision, n_components)
    if rows == 0:
        return fit
    launches = [(rows, x.shape[1], None)] if lengths is None else tables(lengths, LONG_ROW)
    check_width(max(width for _, width, _ in launches))
    tried = fit if n_init == 1 else empty_fit(x, rows * n_init, precision, n_components)
    with device_guard(x):
        inits = tuple(strided(given, rows, n_components, fit[0].dtype) for given in (weights_init, means_init, precisions_init))
        options = tol, reg_covar, sum_tolerance(weights_init), max_iter, n_init, seed
        plain, tied = init == "minmax" and weights_init is means_init is precisions_init is None, covariance_type == "tied"
        memory = x, x.stride(0), x.stride(-1), count, 0 if count is None else count.stride(0)
        for number, width, table in launches:
            programs, source = number * n_init, (*memory, None if table is None else stage(table, x))
            if width > LONG_ROW:
                launch_long(programs, source, width, inits, tried, options, init, n_components, TIED=tied)
            elif n_components == 2:
                mixed = mixes(precision, x) and plain and can_be_mixed(width, covariance_type)
                constants = {"INIT": init, "PLAIN": plain, "MIXED": mixed, "TIED": tied, **launch_rule(width)}
                _fit_rows_kernel[(programs,)](source, width, inits, tried, *options, **constants)
            else:
                constants = {"INIT": init, "TIED": tied, **components_rule(n_components)}
                launch_components(programs, source, width, inits, tried, options, **constants)
        if n_init > 1:
            choose_best(tried, fit, n_init)
    return fit


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
    targets: tuple[Any, ...] = (None, None, 0, None, None),
    inds: torch.dtype = torch.int64,
    mixed: bool = False,
) -> None:
    """Fit the candidates of every ground truth in one launch, and separate them.

    Args:
        loss: Tensor[G, K], any floating dtype, contiguous; a row's first `count` losses are its candidates, in order.
        count: Tensor[G] int64, contiguous.
        fit: the result of `empty_fit`, filled here; its dtype is the precision of the fit.
        covariance_type: as for `fit_gmm_1d`.
        assignment, score: Tensor[G, K] bool and of the fit's dtype, contiguous, both or neither. Filled completely: True at
            foreground and the log-density at candidates; False and -inf at padding and in rows that are not valid.
        index: Tensor[G, K] int64, contiguous, where the candidates stand in `positive` and `ignored`; what is negative is left
            out (with `separation`).
        positive, ignored: Tensor[P] bool, zeroed by the caller. They become True where a candidate is positive or ignored, and
            are not touched elsewhere (with `separation`).
        separation: a key of `SCHEMES`, or None.
        singleton: "background" or "positive", what the only candidate of a row becomes (with `separation`).
        targets: with `separation`, the image of each row, the table of the images and their number, the targets that are given
            back to the positives, and the counted positives of each image.
        inds: dtype of the potential positives' anchors in the table.
        mixed: fit in float32 where the decisions are those of float64 for sure. `fit` is of float64.
    """
    rows, width = loss.shape
    if rows == 0:
        return
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
            *targets,
            *FIT_OPTIONS,
            MIXED=mixed and separation is not None and can_be_mixed(width, covariance_type),
            TIED=covariance_type == "tied",
            SCHEME=None if separation is None else SCHEMES[separation],
            SINGLETON_POSITIVE=singleton == "positive",
            TIE=tie_tolerance(fit[0].dtype),
            INDS=DTYPES[inds],
            **launch_rule(width),
        )
