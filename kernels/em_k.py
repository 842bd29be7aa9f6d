"""One-dimensional Gaussian mixtures of any number K of components by expectation-maximisation, one program per start and row.

Tiles are [BLOCK, KP] and parameters [KP]. KP is the next power of two of K. Each tile gives the moments of each component about
the tile's own mean. Merging these moments makes one pass over the values an iteration (see `starts.merge`). Two components have a
kernel of their own, `em`. Several programs share a long row in `em_long`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from paa_gpu.kernels._launch import compile_options
from paa_gpu.kernels._numeric import HALF_LOG_2PI
from paa_gpu.kernels._rows import given_are_finite, locate, store_fit, take_given
from paa_gpu.kernels.starts import begin, load_values, maximisation, merge, moments


@triton.jit
def expectation(x, inside, weight, mean, variance):
    """Responsibilities [BLOCK, KP] and log-densities [BLOCK] up to a constant; zero outside."""
    distance = x[:, None] - mean[None, :]
    log_p = (tl.log(weight) - 0.5 * tl.log(variance))[None, :] - distance * distance * (0.5 / variance)[None, :]
    top = tl.max(log_p, 1)
    density = tl.exp(log_p - top[:, None])
    total = tl.sum(density, 1)
    resp = tl.where(inside[:, None], density / total[:, None], 0.0)
    return resp, tl.where(inside, tl.log(total) + top, 0.0)


@triton.jit
def row_range(row, BLOCK: tl.constexpr):
    """The smallest and the largest finite value of a row, and how many are finite; `row` has 0 for its smallest."""
    DTYPE: tl.constexpr = row[3].dtype
    smallest, largest = tl.full((), float("inf"), DTYPE), tl.full((), float("-inf"), DTYPE)
    finite = tl.full((), 0, tl.int32)
    for start in range(0, row[2], BLOCK):
        x, inside = load_values(row, start, BLOCK)
        inside = inside & (tl.abs(x) < float("inf"))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), 0))
        finite += tl.sum(inside.to(tl.int32), 0)
    return smallest, largest, finite


@triton.jit(do_not_specialize=["width", "max_iter", "seed"])
def _fit_components_kernel(
    source,  # see `_rows.locate`
    width,
    inits,  # weights, means and precisions: each (Tensor[G, K] or None, its stride over rows)
    fit_ptrs,  # the seven tensors of `empty_fit`, for every start of every row
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
):
    DTYPE: tl.constexpr = fit_ptrs[0].dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    g, x_ptr, stride_xk, n = locate(source, width, program // n_init)
    attempt = program % n_init
    smallest, largest, finite = row_range((x_ptr, stride_xk, n, tl.full((), 0.0, DTYPE)), BLOCK)
    valid = (n >= 2) & (n >= K) & (finite == n)
    row = (x_ptr, stride_xk, tl.where(valid, n, 0), tl.where(valid, smallest, 0.0))
    extent = tl.where(valid, largest - smallest, 0.0)
    floor, change = tl.full((), reg_covar, DTYPE), tl.full((), tol, DTYPE)

    weight, mean, variance = begin(row, extent, (seed, g, attempt), floor, INIT, TIED, K, KP, BLOCK)
    take = given_are_finite(inits, g, K, KP)
    weight, mean, variance, good = take_given(inits, g, row[3], take, sum_tolerance, weight, mean, variance, K, KP)
    valid &= good

    lower_bound = tl.full((), float("-inf"), DTYPE)
    n_iter = tl.full((), 0, tl.int32)
    converged = tl.full((), False, tl.int1)
    going = valid
    while going:
        zero = tl.zeros([KP], DTYPE)
        sums = (zero, zero, zero)
        log_density = tl.zeros([BLOCK], DTYPE)
        for start in range(0, n, BLOCK):
            x, inside = load_values(row, start, BLOCK)
            resp, log_p = expectation(x, inside, weight, mean, variance)
            sums = merge(*sums, *moments(x, resp))
            log_density += log_p
        weight, mean, variance = maximisation(*sums, floor, K, TIED)
        previous = lower_bound
        lower_bound = tl.sum(log_density, 0) / n.to(DTYPE) - HALF_LOG_2PI
        n_iter += 1
        converged = tl.abs(lower_bound - previous) < change
        going = (n_iter < max_iter) & (converged == 0)
    store_fit(fit_ptrs, g * n_init + attempt, row[3], valid, weight, mean, variance, lower_bound, n_iter, converged, K, KP)


def launch_rule(n_components: int) -> dict[str, Any]:
    """Tiles of 256 numbers for 4 warps: two would spill on sm_75 and AMD.

    Lanes must agree in every bit on whether a row has converged: products are not fused.
    """
    components = triton.next_power_of_2(n_components)
    options = compile_options(fuse=False)
    return {"K": n_components, "KP": components, "BLOCK": 256 // components, "num_warps": 4, **options}


def launch_components(
    programs: int, source: tuple[Any, ...], width: int, inits: tuple[Any, ...], fit: tuple[Any, ...], options: tuple[Any, ...],
    **constants: Any,
) -> None:  # fmt: skip
    """One launch for all starts of all rows. `options`: tol, reg_covar, tolerance of sums, max_iter, n_init, seed."""
    _fit_components_kernel[(programs,)](source, width, inits, fit, *options, **constants)
