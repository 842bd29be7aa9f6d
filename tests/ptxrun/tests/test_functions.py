"""Functions of one value, each compared with torch or numpy, on two targets."""
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


def gen(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@triton.jit
def math_kernel(x, o, n, B: tl.constexpr, OP: tl.constexpr):
    c = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + c, mask=c < n, other=1.0)
    if OP == "exp":
        r = tl.exp(v)
    elif OP == "log":
        r = tl.log(tl.abs(v))
    elif OP == "exp2":
        r = tl.exp2(v)
    elif OP == "log2":
        r = tl.log2(tl.abs(v))
    elif OP == "sqrt":
        r = tl.sqrt(tl.abs(v))
    elif OP == "rsqrt":
        r = tl.rsqrt(tl.abs(v))
    elif OP == "sin":
        r = tl.sin(v)
    elif OP == "cos":
        r = tl.cos(v)
    elif OP == "erf":
        r = tl.erf(v)
    elif OP == "sigmoid":
        r = tl.sigmoid(v)
    elif OP == "floor":
        r = tl.floor(v)
    elif OP == "ceil":
        r = tl.ceil(v)
    elif OP == "tanh":
        r = libdevice.tanh(v)
    elif OP == "log1p":
        r = libdevice.log1p(tl.abs(v))
    elif OP == "atan":
        r = libdevice.atan(v)
    elif OP == "pow":
        r = libdevice.pow(tl.abs(v), v)
    elif OP == "lgamma":
        r = libdevice.lgamma(tl.abs(v) + 0.1)
    elif OP == "round":
        r = libdevice.rint(v)
    elif OP == "div":
        r = 1.0 / v
    elif OP == "fma":
        r = tl.fma(v, v, v)
    elif OP == "divrn":
        r = tl.div_rn(v, v + 3.0)
    tl.store(o + c, r, mask=c < n)


TORCH = {"exp": torch.exp, "log": lambda v: v.abs().log(), "exp2": torch.exp2, "log2": lambda v: v.abs().log2(),
         "sqrt": lambda v: v.abs().sqrt(), "rsqrt": lambda v: v.abs().rsqrt(), "sin": torch.sin, "cos": torch.cos,
         "erf": torch.erf, "sigmoid": torch.sigmoid, "floor": torch.floor, "ceil": torch.ceil, "tanh": torch.tanh,
         "log1p": lambda v: v.abs().log1p(), "atan": torch.atan, "pow": lambda v: v.abs() ** v,
         "lgamma": lambda v: torch.lgamma(v.abs() + 0.1), "round": torch.round, "div": lambda v: 1 / v,
         "fma": lambda v: v * v + v, "divrn": lambda v: v / (v + 3)}


@pytest.mark.parametrize("op", list(TORCH))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_math(session, op, dtype):
    if op == "divrn" and dtype == torch.float64:
        pytest.skip("div_rn is for float32")
    x = torch.cat([gen(300, dtype=dtype), gen(300, dtype=dtype) * 30, torch.tensor([1e-30, 1.0, -1.0, 0.5, 40.0], dtype=dtype)])
    if op in ("pow",):
        x = x.clamp(-20, 20)
    if dtype == torch.float64 and op in ("sin", "cos"):
        x = torch.cat([x, torch.tensor([1e6, 1e22, 3e150], dtype=dtype)])
    o = torch.zeros_like(x)
    math_kernel[(triton.cdiv(len(x), 128),)](x, o, len(x), B=128, OP=op)
    want = TORCH[op](x.double()).to(dtype)
    rtol, atol = (2e-5, 2e-6) if dtype == torch.float32 else (2e-15 if op != "pow" else 1e-14, 2e-16)
    if dtype == torch.float32 and op == "exp":
        rtol = 1e-4
    if op == "lgamma":
        rtol, atol = rtol * 10, atol * 20
    torch.testing.assert_close(o, want, rtol=rtol, atol=atol)


@triton.jit
def special_values_kernel(x, e, lg, mn, mx, n, B: tl.constexpr):
    c = tl.arange(0, B)
    m = c < n
    v = tl.load(x + c, mask=m, other=1.0)
    tl.store(e + c, tl.exp(v), mask=m)
    tl.store(lg + c, tl.log(v), mask=m)
    tl.store(mn + c, tl.minimum(v, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=m)
    tl.store(mx + c, tl.maximum(v, 1.0), mask=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(session, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -1.0, 1000.0, -1000.0, 5e-324 if dtype == torch.float64 else 1.0], dtype=dtype)
    e, lg, mn, mx = (torch.zeros_like(x) for _ in range(4))
    special_values_kernel[(1,)](x, e, lg, mn, mx, len(x), B=16)
    torch.testing.assert_close(e, x.exp(), equal_nan=True)
    torch.testing.assert_close(lg, x.log(), equal_nan=True)
    torch.testing.assert_close(mn, torch.minimum(x, torch.ones_like(x)), equal_nan=True)
    torch.testing.assert_close(mx, torch.fmax(x, torch.ones_like(x)))


@triton.jit
def int_kernel(x, y, o, n, B: tl.constexpr):
    c = tl.arange(0, B)
    m = c < n
    a, b = tl.load(x + c, mask=m, other=1), tl.load(y + c, mask=m, other=1)
    tl.store(o + c, a + b, mask=m)
    tl.store(o + n + c, a * b, mask=m)
    tl.store(o + 2 * n + c, a // b, mask=m)
    tl.store(o + 3 * n + c, a % b, mask=m)
    tl.store(o + 4 * n + c, (a & b) | (a ^ 0x55), mask=m)
    tl.store(o + 5 * n + c, a << 3, mask=m)
    tl.store(o + 6 * n + c, a >> 2, mask=m)
    tl.store(o + 7 * n + c, tl.where(a < b, a - b, ~a), mask=m)
    tl.store(o + 8 * n + c, tl.minimum(tl.abs(a), b), mask=m)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers(session, dtype):
    info, n = np.iinfo(str(dtype)[6:]), 200
    rng = np.random.default_rng(0)
    a, b = (rng.integers(info.min, info.max, n, dtype=info.dtype, endpoint=True) for _ in range(2))
    a[::3] = rng.integers(-100, 100, len(a[::3]))
    b[::2] = rng.integers(1, 100, len(b[::2]))
    b[b == 0] = 3
    o = torch.zeros(9, n, dtype=dtype)
    int_kernel[(1,)](torch.from_numpy(a), torch.from_numpy(b), o, n, B=256)
    trunc = np.array([int(abs(int(p)) // abs(int(q))) * (1 if (p < 0) == (q < 0) else -1) for p, q in zip(a, b)]).astype(a.dtype)
    with np.errstate(over="ignore"):
        want = [a + b, a * b, trunc, a - trunc * b, (a & b) | (a ^ a.dtype.type(0x55)), a << 3, a >> 2, np.where(a < b, a - b, ~a),
                np.minimum(np.abs(a), b)]
    for i, w in enumerate(want):
        assert (o[i].numpy() == w.astype(a.dtype)).all(), i
