"""Fits in float32 that know when float64 might decide otherwise: rows of one warp, from the usual start.

Beside the parameters of a mixture, the loop keeps a bound for the error of each: e_w of both weights, e_m0, e_m1, e_v0, e_v1.
An iteration multiplies them by the magnitudes of its derivatives, and adds what its own roundings can do. With rho = r_0 r_1 and
the log odds L = log(d_0 / d_1), all derivatives are sums of rho times a polynomial in x of degree 4 or less:

    d w_0 = sum(rho dL) / n        d m_k = +- sum(rho dL (x - m_k)) / n_k        d v_k = +- sum(rho dL ((x - m_k)^2 - v_k)) / n_k
    dL / dw = 1 / w_0 + 1 / w_1    dL / dm_k = +- (x - m_k) / v_k                dL / dv_k = +- (z_k - 1/2) / v_k

So five moments of rho give all 25 of them. They are moments about the mean of the tighter component: rho lies near it.

The roundings of an operation are counted in units of 2^-24, generously. The derivatives describe an error only while it is small.
So a fit is sure if its errors are small, and if every decision is further from its limit than twice the bound. The caller fits
other rows again, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paa_gpu.kernels._numeric import EPS, HALF_LOG_2PI
from paa_gpu.kernels._tiles import NOBODY, positions

UNIT = tl.constexpr(2.0**-24)  # half the distance of 1 and the next float32


@triton.jit
def _add4(a, b, c, d, a_, b_, c_, d_):
    return a + a_, b + b_, c + c_, d + d_


@triton.jit
def _add11(a, b, c, d, e, f, g, h, i, j, k, a_, b_, c_, d_, e_, f_, g_, h_, i_, j_, k_):
    return a + a_, b + b_, c + c_, d + d_, e + e_, f + f_, g + g_, h + h_, i + i_, j + j_, k + k_


@triton.jit
def _add11_multiply(a, b, c, d, e, f, g, h, i, j, k, m, a_, b_, c_, d_, e_, f_, g_, h_, i_, j_, k_, m_):
    return a + a_, b + b_, c + c_, d + d_, e + e_, f + f_, g + g_, h + h_, i + i_, j + j_, k + k_, m * m_


@triton.jit
def e_step(x, theta):
    """z_0, z_1, d_0, d_1 of the docstring of `em`."""
    w0, w1, m0, m1, v0, v1 = theta
    p0, p1 = tl.rsqrt(v0), tl.rsqrt(v1)
    z0 = (x - m0) * (x - m0) * (0.5 * p0 * p0)
    z1 = (x - m1) * (x - m1) * (0.5 * p1 * p1)
    e = tl.exp(-tl.abs(z0 - z1))
    return z0, z1, w0 * p0 * tl.where(z0 <= z1, 1.0, e), w1 * p1 * tl.where(z0 <= z1, e, 1.0)


@triton.jit
def _log_errors(x, theta, error, z0, z1):
    """Bounds of the errors of each value's log-density under component 0 and 1, and what of their sum is rounding alone."""
    w0, w1, m0, m1, v0, v1 = theta
    ew, em0, em1, ev0, ev1 = error
    per_v0, per_v1 = 1 / v0, 1 / v1
    slope0, slope1 = tl.abs(x - m0) * per_v0, tl.abs(x - m1) * per_v1
    rounding0, rounding1 = UNIT * (8 * z0 + slope0 * x + 4), UNIT * (8 * z1 + slope1 * x + 4)
    l0 = slope0 * em0 + z0 * (ev0 * per_v0) + (ew / w0 + (0.5 * ev0 + em0 * em0) * per_v0)
    l1 = slope1 * em1 + z1 * (ev1 * per_v1) + (ew / w1 + (0.5 * ev1 + em1 * em1) * per_v1)
    return l0 + rounding0, l1 + rounding1, rounding0 + rounding1


@triton.jit
def _linear(inside, rho, spread, theta, error):
    """Whether the errors are small enough for derivatives to describe them. spread: of the odds of each value."""
    w0, w1, _, _, v0, v1 = theta
    ew, em0, em1, ev0, ev1 = error
    # Where rho is next to nothing, a large factor is one too.
    worst = tl.max(tl.max(tl.where(inside, tl.where(rho > 1e-13, 64 * spread, spread), 0.0), 1), 0)
    small = (ev0 < v0 / 64) & (ev1 < v1 / 64) & (em0 * em0 < v0 / 64) & (em1 * em1 < v1 / 64) & (64 * ew < tl.minimum(w0, w1))
    return small & (worst < 4)


@triton.jit
def _column(q0, q1, q2, moments, k0, k1, v0, v1, e):
    """What an error e of a parameter does to the sums, for dL / dparameter = q0 + q1 t + q2 t^2."""
    t0, t1, t2, t3, t4 = moments
    a, b, c = q0 * t0 + q1 * t1 + q2 * t2, q0 * t1 + q1 * t2 + q2 * t3, q0 * t2 + q1 * t3 + q2 * t4
    of_v0, of_v1 = c - 2 * k0 * b + (k0 * k0 - v0) * a, c - 2 * k1 * b + (k1 * k1 - v1) * a
    return e * tl.abs(a), e * tl.abs(b - k0 * a), e * tl.abs(b - k1 * a), e * tl.abs(of_v0), e * tl.abs(of_v1)


@triton.jit
def _propagate(theta, error, moments, centre, m0_, m1_, v0_, v1_):
    """The errors of the five sums of the next M-step by those of the parameters. With an underscore: the next parameters."""
    w0, w1, m0, m1, v0, v1 = theta
    ew, em0, em1, ev0, ev1 = error
    k0, k1, j0, j1, per_v0, per_v1 = m0_ - centre, m1_ - centre, m0 - centre, m1 - centre, 1 / v0, 1 / v1
    zero = 0 * v0
    half0, half1 = 0.5 * per_v0 * per_v0, 0.5 * per_v1 * per_v1
    by_w = _column(1 / w0 + 1 / w1, zero, zero, moments, k0, k1, v0_, v1_, ew)
    by_m0 = _column(-j0 * per_v0, per_v0, zero, moments, k0, k1, v0_, v1_, em0)
    by_m1 = _column(-j1 * per_v1, per_v1, zero, moments, k0, k1, v0_, v1_, em1)
    by_v0 = _column(j0 * j0 * half0 - 0.5 * per_v0, -2 * j0 * half0, half0, moments, k0, k1, v0_, v1_, ev0)
    by_v1 = _column(j1 * j1 * half1 - 0.5 * per_v1, -2 * j1 * half1, half1, moments, k0, k1, v0_, v1_, ev1)
    return (
        by_w[0] + by_m0[0] + by_m1[0] + by_v0[0] + by_v1[0],
        by_w[1] + by_m0[1] + by_m1[1] + by_v0[1] + by_v1[1],
        by_w[2] + by_m0[2] + by_m1[2] + by_v0[2] + by_v1[2],
        by_w[3] + by_m0[3] + by_m1[3] + by_v0[3] + by_v1[3],
        by_w[4] + by_m0[4] + by_m1[4] + by_v0[4] + by_v1[4],
    )


@triton.jit
def _bound_error(theta, error, sums, m0_, m1_, n):
    """A bound of the error of the lower bound: by its gradient, which vanishes where EM converges; squares; rounding."""
    w0, w1, m0, m1, v0, v1 = theta
    ew, em0, em1, ev0, ev1 = error
    n0, n1, q0, q1 = sums
    per_v0, per_v1 = 1 / v0, 1 / v1
    # The sums of r_k (x - m_k)^2 about the means before the M-step.
    about0, about1 = q0 + n0 * (m0_ - m0) * (m0_ - m0), q1 + n1 * (m1_ - m1) * (m1_ - m1)
    gradient = tl.abs(n0 / w0 - n1 / w1) * ew + (n0 * tl.abs(m0_ - m0) * em0 + 0.5 * tl.abs(about0 * per_v0 - n0) * ev0) * per_v0
    gradient += (n1 * tl.abs(m1_ - m1) * em1 + 0.5 * tl.abs(about1 * per_v1 - n1) * ev1) * per_v1
    squares = n0 * (em0 * em0 + ev0 * ev0 * per_v0) * per_v0 + n1 * (em1 * em1 + ev1 * ev1 * per_v1) * per_v1
    squares += n * ew * ew / (w0 * w1)
    rounding = 8 * (about0 * per_v0 + about1 * per_v1) + (m0 * tl.sqrt(n0 * about0) * per_v0 + m1 * tl.sqrt(n1 * about1) * per_v1)
    logs = tl.abs(tl.log(w0 * tl.rsqrt(v0))) + tl.abs(tl.log(w1 * tl.rsqrt(v1)))
    return (gradient + squares + UNIT * rounding) / n + UNIT * (20 + 12 * logs)


@triton.jit
def fit_narrow(x, row, valid, extent, options, BLOCK_K: tl.constexpr):
    """Fit a tile x [BLOCK_K // 2, 2] of float64 from the usual start. row: see `_tiles`; extent: the largest value of the tile.

    Returns w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged; the error bounds; and whether `n_iter` is that of float64.
    """
    tol, reg_covar, max_iter = tl.full((), options[0], tl.float32), tl.full((), options[1], tl.float32), options[2]
    inside, n = positions(0, BLOCK_K) < row[2], row[2].to(tl.float32)
    x, largest = x.to(tl.float32), extent.to(tl.float32)
    half, one, zero = tl.full((), 0.5, tl.float32), tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    w0, w1, m0, m1, v0, v1 = half, half, zero, largest, one, one
    ew, em0, em1, ev0, ev1 = zero, zero, 2 * UNIT * largest, zero, zero
    lower_bound, bound_error = tl.full((), float("-inf"), tl.float32), zero
    n_iter = tl.full((), 0, tl.int32)
    converged = tl.full((), False, tl.int1)
    sure = valid
    going = valid
    while going:
        theta, error = (w0, w1, m0, m1, v0, v1), (ew, em0, em1, ev0, ev1)
        z0, z1, d0, d1 = e_step(x, theta)
        share = tl.where(inside, 1 / (d0 + d1), 0.0)
        r0, r1 = d0 * share, d1 * share
        rho = r0 * r1
        l0, l1, rounding = _log_errors(x, theta, error, z0, z1)
        linear = _linear(inside, rho, l0 + l1, theta, error)
        centre = tl.where(v0 < v1, m0, m1)
        t = x - centre
        rounding = rho * rounding
        nearest, density = tl.where(inside, tl.minimum(z0, z1), 0.0), tl.where(inside, d0 + d1, 1.0)
        first, second = rho * t, rho * t * t
        moments = (rho, first, second, first * (t * t), second * (t * t))
        sums = (r0, r0 * x, r1, r1 * x, nearest, moments[0], moments[1], moments[2], moments[3], moments[4], rounding, density)
        pair = tl.reduce(sums, 1, _add11_multiply)
        log_density = tl.log(pair[11]) - pair[4]
        n0, s0, n1, s1, log_density, t0, t1, t2, t3, t4, rounded = tl.reduce(
            (pair[0], pair[1], pair[2], pair[3], log_density, pair[5], pair[6], pair[7], pair[8], pair[9], pair[10]), 0, _add11
        )
        n0, n1 = n0 + 10 * EPS, n1 + 10 * EPS
        per_n0, per_n1, per_n = 1 / n0, 1 / n1, 1 / (n0 + n1)
        m0_, m1_ = s0 * per_n0, s1 * per_n1
        square0, square1 = (x - m0_) * (x - m0_), (x - m1_) * (x - m1_)
        pair = tl.reduce((r0 * square0, r1 * square1, rounding * square0, rounding * square1), 1, _add4)
        q0, q1, rounded0, rounded1 = tl.reduce(pair, 0, _add4)
        v0_, v1_ = q0 * per_n0, q1 * per_n1

        previous, previous_error = lower_bound, bound_error
        lower_bound = log_density / n - HALF_LOG_2PI
        bound_error = _bound_error(theta, error, (n0, n1, q0, q1), m0_, m1_, n)
        change = tl.abs(lower_bound - previous)
        # Not true of what is not a number.
        clear = tl.abs(change - tol) > 2 * (bound_error + previous_error)

        by_w, by_m0, by_m1, by_v0, by_v1 = _propagate(theta, error, (t0, t1, t2, t3, t4), centre, m0_, m1_, v0_, v1_)
        w0, w1, m0, m1, v0, v1 = n0 * per_n, n1 * per_n, m0_, m1_, v0_ + reg_covar, v1_ + reg_covar
        rounded_n0, rounded_n1 = rounded + 4 * UNIT * n0, rounded + 4 * UNIT * n1
        rounded_q0, rounded_q1 = rounded0 + 4 * UNIT * q0, rounded1 + 4 * UNIT * q1
        ew = (by_w + 2 * tl.maximum(rounded_n0, rounded_n1)) * per_n + 24 * UNIT * tl.maximum(w0, w1)
        em0 = (by_m0 + 2 * tl.sqrt(rounded_n0 * rounded_q0)) * per_n0 + 40 * UNIT * m0
        em1 = (by_m1 + 2 * tl.sqrt(rounded_n1 * rounded_q1)) * per_n1 + 40 * UNIT * m1
        ev0 = (by_v0 + 2 * (rounded_q0 + v0_ * rounded_n0)) * per_n0 + UNIT * (44 * v0 + 4 * m0 * tl.sqrt(v0)) + em0 * em0
        ev1 = (by_v1 + 2 * (rounded_q1 + v1_ * rounded_n1)) * per_n1 + UNIT * (44 * v1 + 4 * m1 * tl.sqrt(v1)) + em1 * em1
        n_iter += 1
        converged = change < tol
        sure = linear & clear
        going = sure & (n_iter < max_iter) & (converged == 0)
    return (w0, w1, m0, m1, v0, v1, lower_bound, n_iter, converged), (ew, em0, em1, ev0, ev1), sure


@triton.jit
def _first_of(wide, position, among, score, error):
    """The first position of the best score among some values, and whether it is that of float64.

    It is where all that may be best are equal: wide, the values in float64.
    """
    least = tl.max(tl.max(tl.where(among, score - error, float("-inf")), 1), 0)
    rival = among & (score + error >= least - 1e-8)
    lowest = tl.min(tl.min(tl.where(rival, wide, float("inf")), 1), 0)
    highest = tl.max(tl.max(tl.where(rival, wide, float("-inf")), 1), 0)
    first = tl.min(tl.min(tl.where(rival, position, NOBODY), 1), 0)
    return first, lowest >= highest


@triton.jit
def decide_narrow(wide, n, fit, error, BACKGROUND: tl.constexpr, BLOCK_K: tl.constexpr):
    """The foreground of a tile, the first best position in it and in the background, and whether they are those of float64.

    wide: the tile in float64, of which n values are there. BACKGROUND: whether the best one of it is asked for.
    """
    x, position = wide.to(tl.float32), positions(0, BLOCK_K)
    inside = position < n
    w0, w1, m0, m1, v0, v1, _, _, _ = fit
    theta = (w0, w1, m0, m1, v0, v1)
    z0, z1, d0, d1 = e_step(x, theta)
    l0, l1, _ = _log_errors(x, theta, error, z0, z1)
    odds = tl.log(w0 * tl.rsqrt(v0)) - tl.log(w1 * tl.rsqrt(v1)) - (z0 - z1)
    foreground = inside & (odds >= 0)
    open_ = inside & ((tl.abs(odds) > 2 * (l0 + l1) + 1e-8) == 0)
    share = 1 / (d0 + d1)
    sure = _linear(inside, d0 * share * (d1 * share), l0 + l1, theta, error)
    sure = sure & (tl.max(tl.max(open_.to(tl.int32), 1), 0) == 0)
    score = tl.log(d0 + d1) - tl.minimum(z0, z1)
    spread = 2 * (d0 * share * l0 + d1 * share * l1 + 8 * UNIT * (1 + tl.abs(score)))
    threshold, alone = _first_of(wide, position, foreground, score, spread)
    sure = sure & (alone | (threshold == NOBODY))
    background = threshold
    if BACKGROUND:
        background, alone = _first_of(wide, position, inside & (foreground == 0), score, spread)
        sure = sure & (alone | (background == NOBODY))
    return foreground, threshold, background, sure


@triton.jit
def choose(doubtful, wide, narrow):
    """The fit in float64 where it is asked for, otherwise that in float32."""
    return (
        tl.where(doubtful, wide[0], narrow[0].to(tl.float64)),
        tl.where(doubtful, wide[1], narrow[1].to(tl.float64)),
        tl.where(doubtful, wide[2], narrow[2].to(tl.float64)),
        tl.where(doubtful, wide[3], narrow[3].to(tl.float64)),
        tl.where(doubtful, wide[4], narrow[4].to(tl.float64)),
        tl.where(doubtful, wide[5], narrow[5].to(tl.float64)),
        tl.where(doubtful, wide[6], narrow[6].to(tl.float64)),
        tl.where(doubtful, wide[7], narrow[7]),
        tl.where(doubtful, wide[8], narrow[8]),
    )
