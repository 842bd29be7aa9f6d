"""Floating-point arithmetic as C."""
from collections import Counter

from .instructions import APPROX, FE, bits, ctype
from .integers import Integers
from .ptx import Instr, PTXError, WIDTH


def _contractible(ins, op):
    """Whether ptxas may contract this product or sum: no rounding is asked for. Its type, or None."""
    types = [m for m in ins.mods if m in WIDTH]
    plain = ins.op in op and types in (["f32"], ["f64"]) and not set(ins.mods) & {"rn", "rz", "rm", "rp", "sat"}
    return types[0] if plain else None


class Arithmetic(Integers):

    def find_products(self):
        """`products`: of each sum, the operands (1, 2) that are a product, and the product's instruction; `factors`: registers for theirs.

        ptxas knows every register's definition; here one counts if it is the only one, or in the same basic block.
        """
        self.products, self.factors, count = {}, {}, Counter(r for ins in self.code for r in self.defs_uses(ins)[0])
        single = {r: j for j, ins in enumerate(self.code) for r in self.defs_uses(ins)[0] if count[r] == 1}
        block = {}
        for k, ins in enumerate(self.code):
            if ins.op in ("label", "bra"):
                block = {}
            if ty := _contractible(ins, ("add", "sub")):
                for place, e in enumerate(ins.args[1:], 1):
                    j = block.get(e[1], single.get(e[1])) if e[0] == "r" else None
                    if j is None or self.code[j].pred or _contractible(self.code[j], ("mul",)) != ty or ("ftz" in self.code[j].mods) != ("ftz" in ins.mods):
                        continue
                    self.products.setdefault(k, []).append((place, j))
                    self.factors[j] = f"FA{j}", f"FB{j}"
                    self.m.regs.update(dict.fromkeys(self.factors[j], bits(ty)))
            for r in self.defs_uses(ins)[0]:
                block[r] = k
    def halves(self, ty, fn, exprs):
        """Apply fn((prefix, *16-bit expressions)) to each 16-bit half of the operands."""
        p = "Q" if ty.startswith("bf16") else "H"
        if not ty.endswith("x2"):
            return fn((p, *[f"(uint16_t)({e})" for e in exprs]), 0)
        lo, hi = (fn((p, *[f"(uint16_t)(({e})>>{s})" for e in exprs]), s) for s in (0, 16))
        return f"((uint32_t)(uint16_t)({lo})|(uint32_t)(uint16_t)({hi})<<16)"

    def half_op(self, ins, op, a, ty):
        nan, ftz = int("NaN" in ins.mods), "ftz" in ins.mods

        def one(p, shift):
            z = "hz" if ftz and p[0] == "H" else ""
            x = [f"{z}({e})" for e in p[1:]]
            if op == "neg":
                r = f"{x[0]}^0x8000"
            elif op == "abs":
                r = f"{x[0]}&0x7fff"
            elif op in APPROX:
                value = f"{'bf2f' if p[0] == 'Q' else 'h2f'}({x[0]})"
                exact = f"{APPROX[op]}({value})"
                if self.loose and op in ("ex2", "tanh"):
                    most = {("ex2", "H"): f"exp2(-9.9)*{exact}", ("ex2", "Q"): f"0x1p-7*{exact}", ("tanh", "H"): "exp2(-10.987)", ("tanh", "Q"): "0x1p-8"}
                    exact = f"c->approximate?apx_half(c,{10 + (op == 'tanh')},{value},{exact},{most[op, p[0]]}):{exact}"
                r = f"{'f2bf' if p[0] == 'Q' else 'f2h'}((float)({exact}))"
            else:
                r = f"{p[0]}{op}({','.join(x)}{f',{nan}' if op in ('min', 'max') else ''})"
            return f"relu16({r})" if "relu" in ins.mods else f"{z}({r})"

        return self.wr(a[0], bits(ty), self.halves(ty, one, [self.rd(x, bits(ty)) for x in a[1:]]))

    def arith(self, k, ins, a, ty):
        op, mods = ins.op, ins.mods
        types = [m for m in mods if m in WIDTH]
        if types[:-1] == ["f32"] and ty in ("f16", "bf16") and op in ("add", "sub", "fma"):     # mixed precision: all but the last
            wide = {}                                                                            # source are halves
            for i, e in enumerate(a[1:-1]):
                wide[f"w{i}"] = f"uint32_t w{i}=B32({'h2f' if ty == 'f16' else 'bf2f'}({self.rd(e, 'b16')}));"
            self.m.regs.update(dict.fromkeys(wide, "b32"))
            one = Instr(op, tuple(m for m in mods if m != ty))
            return f"{{{''.join(wide.values())}{self.arith(k, one, [a[0]] + [('r', w) for w in wide] + [a[-1]], 'f32')}}}"
        if len(types) != 1:
            raise PTXError(f"operand types {types}")
        if ty in ("f16", "bf16", "f16x2", "bf16x2"):
            return self.half_op(ins, {"mad": "fma"}.get(op, op), a, ty)
        if ty == "f32x2":           # two independent f32 operations on the halves of 64-bit registers
            one = Instr(op, tuple("f32" if m == ty else m for m in mods))
            half = "".join(f"uint32_t x{i}={{h}};".format(h=f"(uint32_t)({self.rd(e, 'b64')}>>SH)") for i, e in enumerate(a[1:]))
            names = [f"x{i}" for i in range(len(a) - 1)]
            self.m.regs.update(dict.fromkeys(names + ["lo", "hi"], "b32"))
            parts = "".join(f"{{{half.replace('SH', sh)}{self.arith(k, one, [('r', out)] + [('r', n) for n in names], 'f32')}}}"
                            for out, sh in (("lo", "0"), ("hi", "32")))
            return f"{{uint32_t lo,hi;{parts}{self.wr(a[0], 'b64', '(uint64_t)hi<<32|lo')}}}"
        if ty in ("f32", "f64"):
            ftz = "ftz" in mods
            z = ("fz" if ty == "f32" else "") if ftz else ""
            x = [f"{z}({self.rd(e, ty)})" for e in a[1:]]
            mode = next((FE[m] for m in mods if m in FE), None)
            name = "fma" if op == "mad" else op
            if op in ("min", "max"):
                r = f"{op}{ty}({x[0]},{x[1]},{int('NaN' in mods)})"
                for e in x[2:]:
                    r = f"{op}{ty}({r},{e},{int('NaN' in mods)})"
            elif op in ("neg", "abs"):
                sign = 1 << (WIDTH[ty] - 1)
                e = f"b{WIDTH[ty]}"
                r = f"{'B32' if ftz else ''}({x[0]})" if ftz else self.rd(a[1], e)
                return self.wr(a[0], e, f"({r})^{sign:#x}ull" if op == "neg" else f"({r})&{sign - 1:#x}ull")
            elif mode:
                r = f"r_{name}_{ty}({','.join((x + ['0', '0'])[:3])},{mode})"
            elif op in ("add", "sub", "mul", "div"):
                r = self.fused(k, op, ty, z, x, f"{x[0]}{dict(add='+', sub='-', mul='*', div='/')[op]}{x[1]}")
            elif name == "fma":
                r = f"fma{'f' if ty == 'f32' else ''}({','.join(x)})"
            elif op == "sqrt":
                r = f"sqrt{'f' if ty == 'f32' else ''}({x[0]})"
            elif op == "rcp":
                r = f"hiword(fz64(1.0/hiword(fz64({x[0]}))))" if ty == "f64" and "approx" in mods else f"1/{x[0]}"
            elif op == "rsqrt" and ty == "f64" and ftz:
                r = f"hiword(fz64(1.0/sqrt(hiword(fz64({x[0]})))))"
            else:
                r = f"({ctype(ty)})({APPROX[op]}((double){x[0]}))"
            if self.loose and ("approx" in mods or "full" in mods):
                r = f"(c->approximate?{self.approximation(op, ty, x, mods)}:({r}))"
            r = f"{z}({r})" if z else r
            return self.factors_of(k) + self.wr(a[0], ty, f"{'satf' if ty == 'f32' else 'satd'}({r})" if "sat" in mods else r)
        return self.integer(ins, a, ty)

    @staticmethod
    def approximation(op, ty, x, mods):
        """The C expression of a result that is as far off as the manual allows."""
        if ty == "f64" and "ftz" not in mods:       # in software; CUDA states one unit in the last place
            return f"off(c,13,B64({x[0]}),1.0/sqrt({x[0]}),0x1p-52/sqrt({x[0]}))"
        if ty == "f64":
            kind, exact = (12, f"1.0/hiword(fz64({x[0]}))") if op == "rcp" else (14, f"1.0/sqrt(hiword(fz64({x[0]})))")
            return f"apx_seed(c,{kind},{x[0]},{exact})"
        return f"apx_{op}({','.join(['c', *x] + [str(int('full' in mods))] * (op == 'div'))})"

    def factors_of(self, k):
        """C statements that remember the factors of a product that an addition may take in."""
        if k not in self.factors:
            return ""
        ins = self.code[k]
        return "".join(self.wr(("r", reg), bits(ins.mods[-1]), self.rd(e, bits(ins.mods[-1]))) for reg, e in zip(self.factors[k], ins.args[1:]))

    def fused(self, k, op, ty, z, x, plain):
        """The sum or difference `plain` of `x`, or one fused multiply-add: `c->fuse[k]` says which operand's product is taken in."""
        r = f"({plain})"
        for place, j in self.products.get(k, ()):
            p, q = (f"{z}({self.rd(('r', reg), ty)})" for reg in self.factors[j])
            other = x[2 - place] if op == "add" or place == 2 else f"-({x[1]})"
            minus = "-" if op == "sub" and place == 2 else ""
            r = f"(c->fuse[{k}]=={place}?fma{'f' if ty == 'f32' else ''}({minus}{p},{q},{other}):{r})"
        return r

    op_add = op_sub = op_mul = op_mad = op_fma = op_div = op_rem = op_min = op_max = op_neg = op_abs = arith
    op_sqrt = op_rcp = op_rsqrt = op_ex2 = op_lg2 = op_sin = op_cos = op_tanh = op_mul24 = op_mad24 = op_madc = arith
