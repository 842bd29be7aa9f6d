"""Functions of one value that use vector registers. Those of the mathematical library do not."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.extending import overload

from ._loops import EXACT_SUMS, inner

# log(2) in two parts, the first with so few bits that its product with any exponent is exact.
LOG2_HIGH, LOG2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12, C13 = (1 / math.factorial(i) for i in range(2, 14))


@inner
def exp(x: float) -> Any:
    """The exponential of x <= 0 to 1.1 units in the last place; 0 below -708, where float64 loses its bits.

    exp(x) = 2^n exp(r) with |r| <= log(2) / 2, and the Taylor series of exp(r) up to the last term above a rounding error. The
    mathematical library's function takes one value at a time, and half of the time of a fit; this one fills vector registers:
    2 ns instead of 8.
    """
    power = -708.0 if x < -708.0 else x
    n = math.floor(power / math.log(2) + 0.5)
    r = (power - n * LOG2_HIGH) - n * LOG2_LOW
    high = C8 + r * (C9 + r * (C10 + r * (C11 + r * (C12 + r * C13))))
    series = 1 + r * (1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * (C7 + r * high)))))))
    # Times 2^n, by the bits of its exponent. Through int32, which every processor converts in vector registers.
    return 0.0 if x < -708.0 else series * np.int64((np.int64(np.int32(n)) + 1023) << 52).view(np.float64)


def negative_exp(x: Any) -> Any:
    """exp(-x) for x >= 0 to 2 units in the last place; that of 87 (float64: 708) above, where bits are lost. NaN stays NaN."""
    return np.exp(-x)


@overload(negative_exp, jit_options=EXACT_SUMS)
def _negative_exp(x: Any) -> Any:
    single = x == numba.float32
    real: Any = np.float32 if single else np.float64
    integer: Any = np.int32 if single else np.int64
    digits, degree, most = (23, 7, 87) if single else (52, 13, 708)  # the last term above a rounding error
    high = real(0.693359375 if single else LOG2_HIGH)
    low = real(math.log(2) - 0.693359375 if single else LOG2_LOW)
    shift, places, limit, log2_e = real(1.5 * 2**digits), integer(digits), real(most), real(1 / math.log(2))
    terms = tuple(real((-1) ** k / math.factorial(k)) for k in range(degree, -1, -1))

    def power(x: Any) -> Any:
        x = limit if x > limit else x
        shifted = shift - x * log2_e  # its last bits are the whole number nearest to -x / log(2)
        n = shift - shifted
        rest = (x - n * high) - n * low
        series = terms[0]
        for k in range(1, len(terms)):
            series = series * rest + terms[k]
        # Without the zero at the end, the bits of some NaN would add up to a number.
        return integer(real(series).view(integer) + (real(shifted).view(integer) << places)).view(real) + (x - x)

    return power


def log1p_of_part(x: Any) -> Any:
    """The logarithm of 1 + x = 2 atanh(x / (2 + x)) of 0 <= x <= 1, to 2 units in the last place."""
    return np.log1p(x)


@overload(log1p_of_part, jit_options=EXACT_SUMS)
def _log1p_of_part(x: Any) -> Any:
    single = x == numba.float32
    real: Any = np.float32 if single else np.float64
    # The terms of even and of odd powers apart: the compiler unrolls loops of up to 16 rounds, and these two do not wait for each
    # other. The first term, 1, comes last: what the others round away is small beside it.
    degree = 7 if single else 16
    even = tuple(real(1 / (2 * k + 1)) for k in range(degree // 2 * 2, 0, -2))
    odd = tuple(real(1 / (2 * k + 1)) for k in range((degree - 1) // 2 * 2 + 1, 0, -2))
    two = real(2)

    def logarithm(x: Any) -> Any:
        s = x / (two + x)
        t = s * s
        square, of_even, of_odd = t * t, even[0], odd[0]
        for k in range(1, len(even)):
            of_even = of_even * square + even[k]
        for k in range(1, len(odd)):
            of_odd = of_odd * square + odd[k]
        return two * s + two * s * (t * (of_odd + t * of_even))

    return logarithm


def negative_exp2(x: Any) -> Any:
    """2^-x for 0 <= x < 126 (float64: 1022) to 3 (float64: 1.1) units in the last place.

    From there to 127 (1023), it is less than the smallest normal number. At 127 (1023) it is 0: no bit is left. So a value far
    from a component leaves it nothing. Otherwise the variance of a component that is a point would not be 0.
    """
    return np.exp2(-x)


# exp(-x) = 2^(-x / log 2), and 0 from here on.
PER_LOG2, STOP, STOP_SINGLE = 1 / math.log(2), 1023.0, 127.0


@overload(negative_exp2, jit_options=EXACT_SUMS)
def _negative_exp2(x: Any) -> Any:
    single = x == numba.float32
    real: Any = np.float32 if single else np.float64
    integer: Any = np.int32 if single else np.int64
    digits, degree = (23, 6) if single else (52, 13)  # the last term above a rounding error
    shift, places = real(1.5 * 2**digits), integer(digits)
    terms = tuple(real((-math.log(2)) ** k / math.factorial(k)) for k in range(degree, -1, -1))

    def power(x: Any) -> Any:
        shifted = shift - x  # its last bits are the whole number nearest to -x
        rest = x + (shifted - shift)
        series = terms[0]
        for k in range(1, len(terms)):
            series = series * rest + terms[k]
        return integer(real(series).view(integer) + (real(shifted).view(integer) << places)).view(real)

    return power
