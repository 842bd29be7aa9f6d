"""What ptxas and the hardware may do to the last places: fused products, approximations at their worst."""
import math

import pytest
import torch
import triton
import triton.language as tl

import ptxrun


@triton.jit
def difference_kernel(x, y, o, MUL: tl.constexpr, TYPES: tl.constexpr, B: tl.constexpr):
    """Broken: takes x * x - y * y == 0 for x == y.  Triton cannot see that the products are some; ptxas can."""
    c = tl.arange(0, B)
    a, b = tl.load(x + c), tl.load(y + c)
    square = tl.inline_asm_elementwise(MUL, TYPES, [a], dtype=a.dtype, is_pure=True, pack=1)
    other = tl.inline_asm_elementwise(MUL, TYPES, [b], dtype=a.dtype, is_pure=True, pack=1)
    tl.store(o + c, square - other == 0)


def equal(dtype, rounding="", **settings):
    x, out = torch.linspace(0.1, 3, 128, dtype=dtype), torch.zeros(128, dtype=torch.bool)
    mul = f"mul{rounding}.f{8 * x.element_size()} $0, $1, $1;"
    with ptxrun.active(**settings):
        difference_kernel[(1,)](x, x.clone(), out, mul, "=f,f" if dtype == torch.float32 else "=d,d", B=128, enable_fp_fusion=True)
    return int(out.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_products(dtype):
    assert equal(dtype) == 128
    assert equal(dtype, fuse="all") < 64
    assert equal(dtype, ".rn", fuse="all") == 128       # is not contracted
    halves = [equal(dtype, fuse="half", seed=seed) for seed in range(8)]
    assert len(set(halves)) > 1                         # some instructions, other ones with another seed
    assert halves == [equal(dtype, fuse="half", seed=seed) for seed in range(8)]


PTX = """
.version 8.6
.target sm_90
.address_size 64
.visible .entry k(.param .u64 .ptr .global .align 8 k_0, .param .u64 .ptr .global .align 8 k_1)
.reqntid 128
{
  .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [k_0];
  ld.param.b64 %rd2, [k_1];
  mov.u32 %r1, %tid.x;
  mad.wide.u32 %rd1, %r1, SIZE, %rd1;
  mad.wide.u32 %rd2, %r1, SIZE, %rd2;
  BODY
  ret;
}
"""


def run(body, x, **settings):
    size, name = x.element_size(), {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16"}[x.dtype]
    launcher, out = ptxrun.Launcher.from_ptx(PTX.replace("SIZE", str(size)).replace("BODY", body), [name, name]), torch.zeros_like(x)
    with ptxrun.active(**settings):
        launcher.launch((1, 1, 1), (x, out))
    return out


F32 = "ld.global.b32 %r2, [%rd1]; OP st.global.b32 [%rd2], %r3;"


@pytest.mark.parametrize("op", ["add", "sub"])
@pytest.mark.parametrize("place", [1, 2])
def test_which_product(op, place):
    """x * x and c, in either place: the fused result in float32."""
    x = torch.linspace(0.1, 3, 128)
    operands = ["%r4", "0f40490FDB"][:: 1 if place == 1 else -1]
    body = F32.replace("OP", f"mul.f32 %r4, %r2, %r2; {op}.f32 %r3, {', '.join(operands)};")
    c = torch.tensor(math.pi, dtype=torch.float32).double()
    square = x.double() ** 2
    exact = {("add", 1): square + c, ("add", 2): c + square, ("sub", 1): square - c, ("sub", 2): c - square}[op, place]
    assert torch.equal(run(body, x, fuse="all"), exact.float())
    rounded = (x * x).double()
    plain = {("add", 1): rounded + c, ("add", 2): c + rounded, ("sub", 1): rounded - c, ("sub", 2): c - rounded}[op, place].float()
    assert torch.equal(run(body, x), plain) and not torch.equal(plain, exact.float())
    for pinned in (body.replace("mul.", "mul.rn."), body.replace(f"{op}.f32", f"{op}.rn.f32")):
        assert torch.equal(run(pinned, x, fuse="all"), plain)


def nearest_exp2(x):
    """What the manual counts the units of `ex2` from."""
    return torch.exp2(x).float().double()


ULP = 2.0**-23
WORST = {       # instruction: exact value, bound of the error as a function of input and value
    "ex2.approx.f32": (nearest_exp2, lambda x, y: 2.0 ** torch.floor(torch.log2(y)) * 2 * ULP),
    "ex2.approx.ftz.f32": (nearest_exp2, lambda x, y: 2.0 ** torch.floor(torch.log2(y)) * 2 * ULP),
    "lg2.approx.f32": (torch.log2, lambda x, y: torch.where((x > 0.5) & (x < 2), 2**-22, y.abs() * 2**-22)),
    "sqrt.approx.f32": (torch.sqrt, lambda x, y: y * 2**-23),
    "rsqrt.approx.f32": (torch.rsqrt, lambda x, y: y * 2**-22.9),
    "rcp.approx.f32": (torch.reciprocal, lambda x, y: 2.0 ** torch.floor(torch.log2(y)) * ULP),
    "sin.approx.f32": (torch.sin, lambda x, y: torch.full_like(x, 2**-20.5)),
    "cos.approx.f32": (torch.cos, lambda x, y: torch.full_like(x, 2**-20.5)),
    "tanh.approx.f32": (torch.tanh, lambda x, y: y * 2**-11),
}


@pytest.mark.parametrize("op", WORST)
def test_approximations(op):
    """Off by what the manual allows, but not more, up or down by the seed; without the mode the nearest float."""
    exact, bound = WORST[op]
    x = torch.linspace(0.06, 6, 128)
    body = F32.replace("OP", f"{op} %r3, %r2;")
    wanted, most = exact(x.double()), bound(x.double(), exact(x.double()))
    assert ((run(body, x).double() - wanted).abs() <= 0.51 * ULP * 2.0 ** torch.floor(torch.log2(wanted.abs()))).all()
    errors = torch.stack([run(body, x, approximate=True, seed=seed).double() - wanted for seed in range(6)])
    assert (errors.abs() <= most).all()
    unit = ULP * 2.0 ** torch.floor(torch.log2(wanted.abs()))
    assert (errors.abs() >= most - 2 * unit).all() and errors.abs().mean() > 0.4 * most.mean()
    assert 0.3 < (errors > 0).float().mean() < 0.7 and (errors.sign() != errors[:1].sign()).any()


@pytest.mark.parametrize("op", ["div.full.f32", "div.approx.f32"])
def test_divisions(op):
    x = torch.linspace(0.06, 6, 128)
    wanted = 1 / 3.0 * x.double()
    body = F32.replace("OP", f"{op} %r3, %r2, 0f40400000;")
    unit = ULP * 2.0 ** torch.floor(torch.log2(wanted))
    assert ((run(body, x).double() - wanted).abs() <= 0.51 * unit).all()
    errors = (run(body, x, approximate=True).double() - wanted) / unit
    assert (errors.abs() <= 2).all() and (errors.abs() > 1).all() and 0.3 < (errors > 0).float().mean() < 0.7


@pytest.mark.parametrize(("op", "exact"), [("rcp.approx.ftz.f64", torch.reciprocal), ("rsqrt.approx.ftz.f64", torch.rsqrt)])
def test_seeds_in_double_precision(op, exact):
    x = torch.linspace(0.06, 6, 128, dtype=torch.float64)
    body = f"ld.global.b64 %rd3, [%rd1]; {op} %rd4, %rd3; st.global.b64 [%rd2], %rd4;"
    wanted = exact(x)
    plain, off = ((run(body, x, **settings) - wanted).abs() / wanted for settings in ({}, {"approximate": True}))
    assert (plain < 2**-19).all() and (off < 2**-18).all() and off.mean() > 1.4 * plain.mean()


def test_special_values_are_exact():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan] + [1.0] * 123)
    for op in WORST:
        body = F32.replace("OP", f"{op} %r3, %r2;")
        plain, off = run(body, x)[:5], run(body, x, approximate=True)[:5]
        exact = plain.isnan() | plain.isinf() | (plain == 0) | (x[:5] == 0) & torch.tensor(not op.startswith("cos"))
        torch.testing.assert_close(off[exact], plain[exact], rtol=0, atol=0, equal_nan=True)


@triton.jit
def doubled_kernel(x, o, B: tl.constexpr):
    """Broken: takes exp2(x) == 2 * exp2(x - 1) for granted, which holds for the nearest floats only."""
    c = tl.arange(0, B)
    v = tl.load(x + c)
    tl.store(o + c, tl.exp2(v) == 2 * tl.exp2(v - 1))


def test_a_decision_that_an_approximation_turns():
    x = torch.linspace(1, 2, 129)[:128]

    def decide(**settings):
        out = torch.zeros(128, dtype=torch.bool)
        with ptxrun.active(**settings):
            doubled_kernel[(1,)](x, out, B=128)
        return int(out.sum())

    assert decide() == 128
    assert all(decide(approximate=True, seed=seed) < 128 for seed in range(3))


def test_the_same_in_every_lane():
    """A GPU gives all lanes one result for one input, however far off: a loop on it does not come apart."""
    body = F32.replace("OP", "ex2.approx.f32 %r3, 0f3F000000;")
    out = run(body, torch.zeros(128), approximate=True)
    assert (out == out[0]).all() and out[0] != 2**0.5


def test_unknown_fusion():
    with pytest.raises(ValueError, match="fuse must be None, \"all\" or \"half\", got 'some'"), ptxrun.active(fuse="some"):
        pass
