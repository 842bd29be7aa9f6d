"""Functions of one value in the loops for the CPU: their digits, against extended precision, and what is not a number."""

from __future__ import annotations

import numpy as np
import pytest
from numba import vectorize

from paa_gpu.cpu import _numeric


def of_arrays(function, real=np.float64):
    name = np.dtype(real).name
    return vectorize([f"{name}({name})"])(lambda x: function(x))


def test_exponential():
    exp = of_arrays(_numeric.exp)
    x = -np.concatenate([np.geomspace(1e-300, 708, 100_001), np.linspace(0, 708, 100_001), [0.0]])
    exact = np.exp(x.astype(np.longdouble))
    assert (np.abs(exp(x) - exact) <= 1.1 * np.spacing(exact.astype(np.float64))).all()
    assert exp(0.0) == 1
    assert exp(-1e300) == exp(-np.inf) == exp(np.nextafter(-708.0, -np.inf)) == 0
    with np.errstate(invalid="ignore"):
        assert np.isnan(exp(np.nan))


@pytest.mark.parametrize(("real", "most"), [(np.float32, 87), (np.float64, 708)])
def test_negative_exponential(real, most):
    exp = of_arrays(_numeric.negative_exp, real)
    x = np.concatenate([np.geomspace(1e-30, most, 100_001), np.linspace(0, most, 100_001)]).astype(real)
    exact = np.exp(-x.astype(np.longdouble))
    assert (np.abs(exp(x) - exact) <= 2 * np.spacing(exact.astype(real))).all()
    assert exp(real(0)) == 1
    assert exp(real(1e30)) == exp(real(np.inf)) == exp(real(most))


@pytest.mark.parametrize(("real", "integer"), [(np.float32, np.int32), (np.float64, np.int64)])
def test_negative_exponential_keeps_every_nan(real, integer):
    """It adds to bits, and a NaN has bits to add to."""
    exp, quiet = of_arrays(_numeric.negative_exp, real), real(np.nan).view(integer)
    x = (quiet | np.arange(2**16, dtype=integer)).view(real)
    with np.errstate(invalid="ignore"):
        assert np.isnan(exp(x)).all()


@pytest.mark.parametrize(("real", "last_places", "most"), [(np.float32, 3, 126), (np.float64, 1.1, 1022)])
def test_power_of_two(real, last_places, most):
    power = of_arrays(_numeric.negative_exp2, real)
    x = np.concatenate([np.geomspace(1e-30, most, 100_001), np.linspace(0, most, 100_001)]).astype(real)
    exact = np.exp2(-x.astype(np.longdouble))
    assert (np.abs(power(x) - exact) <= last_places * np.spacing(exact.astype(real))).all()
    assert power(real(0)) == 1
    tail = power(np.linspace(most, most + 1, 100_001).astype(real))
    assert (tail >= 0).all() and (tail <= np.finfo(real).tiny).all()
    assert power(real(most + 1)) == 0
    with np.errstate(invalid="ignore"):
        assert np.isnan(power(real(np.nan)))


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_logarithm(real):
    log1p = of_arrays(_numeric.log1p_of_part, real)
    x = np.concatenate([np.geomspace(1e-30, 1, 100_001), np.linspace(0, 1, 100_001)]).astype(real)
    exact = np.log1p(x.astype(np.longdouble))
    assert (np.abs(log1p(x) - exact) <= 2 * np.spacing(exact.astype(real))).all()
    assert np.isnan(log1p(real(np.nan)))
