"""Integer arithmetic and operations on bits as C."""
from .instructions import bits, ctype
from .ptx import PTXError, WIDTH


class Integers:
    def integer(self, ins, a, ty):
        op, mods = ins.op, ins.mods
        if ty in ("u16x2", "s16x2"):
            half = ty[:3]
            x = [self.rd(e, "b32") for e in a[1:]]
            parts = []
            for s in (0, 16):
                p, q = (f"({ctype(half)})(({e})>>{s})" for e in x)
                parts.append({"add": f"{p}+{q}", "sub": f"{p}-{q}", "min": f"{p}<{q}?{p}:{q}", "max": f"{p}>{q}?{p}:{q}"}[op])
            return self.wr(a[0], "b32", f"(uint16_t)({parts[0]})|(uint32_t)(uint16_t)({parts[1]})<<16")
        w, ct = WIDTH[ty], ctype(ty)
        big = {16: "int32_t", 32: "int64_t", 64: "__int128"}[w]
        big = big if ty[0] == "s" else big.replace("int", "uint", 1) if w < 64 else "unsigned __int128"
        x = [self.rd(e, ty) for e in a[1:]]
        lo, hi = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if ty[0] == "s" else (0, (1 << w) - 1)
        if op in ("add", "sub"):
            sign = "+" if op == "add" else "-"
            if "cc" in mods:
                u = f"u{w}"
                x = [self.rd(e, u) for e in a[1:]]
                return f"{{{ctype(u)} x={x[0]},y={x[1]};{self.wr(a[0], u, f'x{sign}y')}R_cc={'(' + ctype(u) + ')(x+y)<x' if op == 'add' else 'x<y'};}}"
            if "sat" in mods:
                return self.wr(a[0], ty, f"({ct})CLAMP(({big}){x[0]}{sign}{x[1]},({big}){lo}ll,({big}){hi}ll)")
            return self.wr(a[0], bits(ty), f"({ctype(bits(ty))})({self.rd(a[1], bits(ty))}{sign}{self.rd(a[2], bits(ty))})")
        if op in ("min", "max"):
            r = f"{x[0]}{'<' if op == 'min' else '>'}{x[1]}?{x[0]}:{x[1]}"
            return self.wr(a[0], ty, f"({ct})CLAMP({r},0,{hi})" if "relu" in mods else r)
        if op == "neg":
            return self.wr(a[0], ty, f"({ct})(0-(u{big.lstrip('u')})({x[0]}))" if w < 64 else f"({ct})(0-(uint64_t){x[0]})")
        if op == "abs":
            return self.wr(a[0], ty, f"({ct})({x[0]}<0?0-({ctype('u%d' % w)}){x[0]}:({ctype('u%d' % w)}){x[0]})")
        if op in ("mul", "mad", "madc", "mul24", "mad24"):
            prod = f"(({big}){x[0]}*({big}){x[1]})"
            if op.endswith("24"):
                ext = lambda e: f"({ct})(({ctype('s32' if ty[0] == 's' else 'u32')})({e}<<8)>>8)"
                prod = f"(({big}){ext(x[0])}*({big}){ext(x[1])})"
            if "wide" in mods:
                wt = f"{ty[0]}{2 * w}"
                r = f"({ctype(wt)}){prod}"
                return self.wr(a[0], wt, f"{r}+{self.rd(a[3], wt)}" if op.startswith("mad") else r)
            r = f"({ct})({prod}>>{w})" if "hi" in mods else f"({ct}){prod}"
            if "cc" in mods or op == "madc":
                u = ctype(f"u{w}")
                carry = f"R_cc=v>>{w}&1;" if "cc" in mods else ""
                return (f"{{{'unsigned __int128' if w == 64 else 'uint64_t'} v={u}_({r});v+={self.rd(a[3], f'u{w}')};{'v+=R_cc;' if op == 'madc' else ''}"
                        f"{self.wr(a[0], f'u{w}', f'({u})v')}{carry}}}").replace(f"{u}_(", f"({u})(")
            return self.wr(a[0], ty, f"({ct})({r}+{x[2]})" if op.startswith("mad") else r)
        if op in ("div", "rem"):
            return self.wr(a[0], ty, f"{op}_{ty}({x[0]},{x[1]})")
        raise PTXError(f"integer {op}")

    def op_addc(self, k, ins, a, ty):
        u = f"u{WIDTH[ty]}"
        big = "unsigned __int128" if WIDTH[ty] == 64 else "uint64_t"
        sign = "+" if ins.op == "addc" else "-"
        cc = f"R_cc=(v>>{WIDTH[ty]})&1;" if "cc" in ins.mods else ""
        return f"{{{big} v=({big}){self.rd(a[1], u)}{sign}{self.rd(a[2], u)}{sign}R_cc;{self.wr(a[0], u, f'({ctype(u)})v')}{cc}}}"

    op_subc = op_addc

    def op_sad(self, k, ins, a, ty):
        x, y, z = (self.rd(e, ty) for e in a[1:])
        return self.wr(a[0], ty, f"({ctype(ty)})(({x}<{y}?{y}-{x}:{x}-{y})+{z})")

    def bitop(self, k, ins, a, ty):
        x = [self.rd(e, ty) for e in a[1:]]
        if ty == "pred":
            x = [f"({int(e[1] != 0)})" if e[0] == "i" else self.rd(e, ty) for e in a[1:]]
            r = {"and": "&", "or": "|", "xor": "^"}
            return self.wr(a[0], ty, f"!{x[0]}" if ins.op == "not" else f"{x[0]}{r[ins.op]}{x[1]}")
        ct = ctype(ty)
        r = {"and": "{0}&{1}", "or": "{0}|{1}", "xor": "{0}^{1}", "not": "~{0}", "cnot": "{0}==0"}[ins.op].format(*x)
        return self.wr(a[0], ty, f"({ct})({r})")

    op_and = op_or = op_xor = op_not = op_cnot = bitop

    def op_shl(self, k, ins, a, ty):
        w, n = WIDTH[ty], self.rd(a[2], "u32")
        return self.wr(a[0], f"b{w}", f"{n}>={w}u?0:({ctype(f'b{w}')})({self.rd(a[1], f'b{w}')}<<({n}&{w - 1}))")

    def op_shr(self, k, ins, a, ty):
        w, n, ct = WIDTH[ty], self.rd(a[2], "u32"), ctype(ty)
        top = f"({ct})({self.rd(a[1], ty)}>>{w - 1})" if ty[0] == "s" else f"({ct})0"
        return self.wr(a[0], ty, f"{n}>={w}u?{top}:({ct})({self.rd(a[1], ty)}>>({n}&{w - 1}))")

    def op_shf(self, k, ins, a, ty):
        return self.wr(a[0], "b32", f"fshift({','.join(self.rd(e, 'u32') for e in a[1:])},{int('l' in ins.mods)},{int('wrap' in ins.mods)})")

    def op_lop3(self, k, ins, a, ty):
        if ins.mods[0] != "b32" or a[0][0] == "p":
            raise PTXError("lop3 with a predicate is not supported")
        return self.wr(a[0], "b32", f"lop3({','.join(self.rd(e, 'b32') for e in a[1:])})")

    def op_prmt(self, k, ins, a, ty):
        if ty != "b32":
            raise PTXError("prmt mode")
        return self.wr(a[0], "b32", f"prmt({','.join(self.rd(e, 'b32') for e in a[1:])})")

    def op_bfe(self, k, ins, a, ty):
        w = WIDTH[ty]
        return self.wr(a[0], f"b{w}", f"({ctype(f'b{w}')})bfe({self.rd(a[1], f'b{w}')},{self.rd(a[2], 'u32')},{self.rd(a[3], 'u32')},{w},{int(ty[0] == 's')})")

    def op_bfi(self, k, ins, a, ty):
        return self.wr(a[0], ty, f"({ctype(ty)})bfi({self.rd(a[1], ty)},{self.rd(a[2], ty)},{self.rd(a[3], 'u32')},{self.rd(a[4], 'u32')},{WIDTH[ty]})")

    def op_szext(self, k, ins, a, ty):
        n, x = self.rd(a[2], "u32"), self.rd(a[1], "b32")
        n = f"({n}&31)" if "wrap" in ins.mods else f"({n}>32?32:{n})"
        return self.wr(a[0], "b32", f"{n}==0?0:(uint32_t)(({ctype(ty)})({x}<<(32-{n}))>>(32-{n}))")

    def op_bfind(self, k, ins, a, ty):
        return self.wr(a[0], "u32", f"bfind({self.rd(a[1], bits(ty))},{WIDTH[ty]},{int(ty[0] == 's')},{int('shiftamt' in ins.mods)})")

    def op_brev(self, k, ins, a, ty):
        return self.wr(a[0], ty, f"({ctype(ty)})brev({self.rd(a[1], ty)},{WIDTH[ty]})")

    def op_popc(self, k, ins, a, ty):
        return self.wr(a[0], "u32", f"__builtin_popcountll({self.rd(a[1], ty)})")

    def op_clz(self, k, ins, a, ty):
        x = self.rd(a[1], ty)
        return self.wr(a[0], "u32", f"({x}?__builtin_clzll({x})-{64 - WIDTH[ty]}:{WIDTH[ty]})")
