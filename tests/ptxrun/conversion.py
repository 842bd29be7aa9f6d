"""Comparisons, selection and conversions as C."""
from .instructions import FE, bits, ctype
from .ptx import PTXError, WIDTH

ENC = {"rn": 0, "rz": 1, "rna": 2, "rm": 3, "rp": 4}
ORDER = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


class Conversion:
    # ---- comparisons and selection ------------------------------------------------------------------------------
    def compare(self, cmp, x, y, is_float):
        if cmp in ("num", "nan"):
            r = "(x_!=x_||y_!=y_)"
            return ("!" if cmp == "num" else "") + r
        if is_float and cmp == "ne":
            return "(x_<y_||x_>y_)"
        if is_float and cmp.endswith("u"):
            op = ORDER[cmp[:-1]]
            return f"(!(x_==x_&&y_==y_)||x_{op}y_)"
        return f"(x_{ORDER[cmp]}y_)"

    def op_setp(self, k, ins, a, ty):
        cmp, combine = ins.mods[0], next((m for m in ins.mods[1:-1] if m in ("and", "or", "xor")), None)
        dst, other = (a[0][1], a[0][2]) if a[0][0] == "p" else (a[0], ("_",))
        flt = ty in ("f32", "f64") or "f16" in ty
        if "f16" in ty:
            conv = "bf2f" if ty.startswith("bf16") else "h2f"
            x, y = (f"{conv}((uint16_t)({self.rd(e, bits(ty))}))" for e in a[1:3])
            xs, ys = (f"{conv}((uint16_t)(({self.rd(e, bits(ty))})>>16))" for e in a[1:3])
            if ty.endswith("x2"):
                if combine:
                    raise PTXError("setp on pairs with a boolean operator")
                ct = "float"
                r = self.compare(cmp, "", "", True)
                return (f"{{uint8_t r0,r1;{{{ct} x_={x},y_={y};r0={r};}}{{{ct} x_={xs},y_={ys};r1={r};}}{self.wr(dst, 'pred', 'r0')}{self.wr(other, 'pred', 'r1')}}}")
            ct = "float"
        else:
            z = "fz" if "ftz" in ins.mods and ty == "f32" else ""
            x, y, ct = f"{z}({self.rd(a[1], ty)})", f"{z}({self.rd(a[2], ty)})", ctype(ty)
        r = self.compare(cmp, "", "", flt)
        out = f"{{{ct} x_={x},y_={y};uint8_t r_={r},n_=!r_;(void)n_;"
        if combine:
            sym = {"and": "&", "or": "|", "xor": "^"}[combine]
            out += f"uint8_t c_={self.rd(a[3], 'pred')};r_=r_{sym}c_;n_=n_{sym}c_;"
        return out + self.wr(dst, "pred", "r_") + self.wr(other, "pred", "n_") + "}"

    def op_set(self, k, ins, a, ty):
        if any(m in ("and", "or", "xor") for m in ins.mods):
            raise PTXError("set with a boolean operator")
        dt, ct = ins.mods[-2], ctype(ty)
        if "f16" in ty:
            raise PTXError("set on fp16")
        r = self.compare(ins.mods[0], "", "", ty[0] == "f")
        yes, no = ("1.0f", "0.0f") if dt == "f32" else (f"({ctype(dt)})~0ull", "0")
        return f"{{{ct} x_={self.rd(a[1], ty)},y_={self.rd(a[2], ty)};{self.wr(a[0], dt, f'{r}?{yes}:{no}')}}}"

    def op_selp(self, k, ins, a, ty):
        b = bits(ty)
        return self.wr(a[0], b, f"{self.rd(a[3], 'pred')}?{self.rd(a[1], b)}:{self.rd(a[2], b)}")

    def op_slct(self, k, ins, a, ty):
        b = bits(ins.mods[-2])
        return self.wr(a[0], b, f"{self.rd(a[3], ty)}>=0?{self.rd(a[1], b)}:{self.rd(a[2], b)}")

    def op_copysign(self, k, ins, a, ty):
        b, s = bits(ty), 1 << (WIDTH[ty] - 1)
        return self.wr(a[0], b, f"({self.rd(a[1], b)}&{s:#x}ull)|({self.rd(a[2], b)}&{s - 1:#x}ull)")

    def op_testp(self, k, ins, a, ty):
        fn = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan", "number": "!isnan", "normal": "isnormal",
              "subnormal": "FP_SUBNORMAL==fpclassify"}[ins.mods[0]]
        return self.wr(a[0], "pred", f"{fn}({self.rd(a[1], ty)})")

    # ---- conversions --------------------------------------------------------------------------------------------
    def op_cvt(self, k, ins, a, ty):
        mods, src = ins.mods, ty
        dst = mods[-2]
        rnd = next((m for m in mods if m in ENC), None)
        rint = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
        sat, ftz = "sat" in mods, "ftz" in mods
        if dst in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and src == "f32":     # two sources: the first is the upper half
            conv = lambda e: self.small(dst, f"(double){self.rd(e, 'f32')}", rnd, mods)
            n = WIDTH[dst] // 2
            return self.wr(a[0], f"b{2 * n}", f"(uint{2 * n}_t)({conv(a[2])})|(uint{2 * n}_t)({conv(a[1])})<<{n}")
        if src in ("e4m3x2", "e5m2x2") and dst == "f16x2":
            e, m = (4, 3) if src[1] == "4" else (5, 2)
            v = self.rd(a[1], "b16")
            return self.wr(a[0], "b32", f"(uint32_t)f2h(dec8({v}&255,{e},{m}))|(uint32_t)f2h(dec8({v}>>8,{e},{m}))<<16")
        if dst in ("e4m3x2", "e5m2x2") and src == "f16x2":
            e, m = (4, 3) if dst[1] == "4" else (5, 2)
            v = self.rd(a[1], "b32")
            return self.wr(a[0], "b16", f"(uint16_t)(enc8(h2f((uint16_t)({v})),{e},{m})|enc8(h2f((uint16_t)(({v})>>16)),{e},{m})<<8)")
        if dst == "tf32":
            return self.wr(a[0], "b32", f"enc({self.rd(a[1], 'f32')},8,10,{ENC[rnd]})<<13")
        fsrc, fdst = src in ("f16", "bf16", "f32", "f64"), dst in ("f16", "bf16", "f32", "f64")
        if not fsrc and not fdst:
            x = self.rd(a[1], src)
            if sat:
                big = "__int128"
                w = WIDTH[dst]
                lo, hi = (f"-(({big})1<<{w - 1})", f"(({big})1<<{w - 1})-1") if dst[0] == "s" else (f"({big})0", f"(({big})1<<{w})-1")
                x = f"({ctype(dst)})CLAMP(({big}){x},{lo},{hi})"
            return self.wr(a[0], dst, f"({ctype(dst)}){x}")
        if fsrc:
            x = {"f16": "h2f({})", "bf16": "bf2f({})"}.get(src, "{}").format(self.rd(a[1], bits(src) if "16" in src else src))
            if ftz and src == "f32":
                x = f"fz({x})"
            rint_fn = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}.get(rint)
            if not fdst:
                w = WIDTH[dst]
                wide = src == "f64" or w == 64
                nan = (f"(uint64_t)1<<{w - 1}" if dst[0] == "u" else f"(int64_t)((uint64_t)-1<<{w - 1})") if wide else "0"
                return self.wr(a[0], dst, f"({ctype(dst)})f2{dst[0]}({rint_fn or 'trunc'}({x}),{w},{nan})")
            if rint_fn:
                x = f"{rint_fn}({x})"
                if src == dst == "f32":
                    return self.wr(a[0], "f32", f"{'satf' if sat else ''}((float){x})")
            if dst in ("f16", "bf16"):
                if src == dst and not rint_fn:
                    return self.wr(a[0], "b16", self.rd(a[1], "b16"))
                r = self.small(dst, f"(double)({x})", rnd, mods, single=src != "f64")
                return self.wr(a[0], "b16", r)
            if dst == "f32" and src == "f64":
                x = f"c_f64_f32({x},{FE[rnd]})" if rnd in FE else f"(float)({x})"
            x = f"({ctype(dst)})({x})"
            if ftz and dst == "f32":
                x = f"fz({x})"
            if sat:
                x = f"{'satf' if dst == 'f32' else 'satd'}({x})"
            return self.wr(a[0], dst, x)
        x = self.rd(a[1], src)                                                  # integer to float
        if dst in ("f16", "bf16"):
            odd = f"fma_odd((double)(({x})>>11),2048.0,(double)(({x})&2047))" if WIDTH[src] == 64 else f"(double)({x})"
            return self.wr(a[0], "b16", self.small(dst, odd, rnd, mods, single=False))
        if rnd in FE:
            s = "s" if src[0] == "s" else "u"
            return self.wr(a[0], dst, f"c_{s}64_{dst}({x},{FE[rnd]})")
        return self.wr(a[0], dst, f"({ctype(dst)})({x})")

    def small(self, dst, x, rnd, mods, single=True):
        mode = ENC[rnd or "rn"]
        if dst.startswith("e"):
            e, m = (4, 3) if dst[1] == "4" else (5, 2)
            return f"(uint8_t)enc8({x},{e},{m})"
        if mode == 0 and single:
            r = f"{'f2bf' if dst[0] == 'b' else 'f2h'}((float)({x}))"
        else:
            r = f"(uint16_t)enc({x},{'8,7' if dst[0] == 'b' else '5,10'},{mode})"
        if "satfinite" in mods or "sat" in mods:
            raise PTXError("saturating conversion to fp16")
        return f"relu16({r})" if "relu" in mods else r
