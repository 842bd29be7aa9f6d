"""Moves, loads, stores and atomics as C."""
from .instructions import bits, ctype
from .ptx import PTXError, WIDTH


class Memory:
    def op_mov(self, k, ins, a, ty):
        dst, src = a
        if dst[0] == "v":
            n = len(dst[1])
            w = WIDTH[ty] // n
            return f"{{{ctype(bits(ty))} x={self.rd(src, bits(ty))};" + "".join(
                self.wr(d, f"b{w}", f"(uint{w}_t)(x>>{w * i})") for i, d in enumerate(dst[1])) + "}"
        if src[0] == "v":
            w, ct = WIDTH[ty] // len(src[1]), ctype(bits(ty))
            return self.wr(dst, bits(ty), "|".join(f"({ct})(({ct}){self.rd(s, f'b{w}')}<<{w * i})" for i, s in enumerate(src[1])))
        if ty == "pred" and src[0] == "i":
            return self.wr(dst, ty, str(int(src[1] != 0)))
        return self.wr(dst, bits(ty), self.rd(src, bits(ty)))

    def op_cvta(self, k, ins, a, ty):
        window = {"shared": "c->smem", "local": "t->local"}.get(self.space(ins))
        if window:          # addresses in these spaces are offsets, generic ones are host addresses
            sign = "-" if "to" in ins.mods else "+"
            return self.wr(a[0], ty, f"{self.rd(a[1], ty)}{sign}(uint64_t){window}")
        return self.wr(a[0], ty, self.rd(a[1], ty))

    def op_isspacep(self, k, ins, a, ty):
        x = self.rd(a[1], "u64")
        shared, local = f"({x}-(uint64_t)c->smem<c->smem_bytes)", f"({x}-(uint64_t)t->local<LOCAL_BYTES)"
        return self.wr(a[0], "pred", {"shared": shared, "local": local, "global": f"!{shared}&&!{local}"}[self.space(ins)])

    @staticmethod
    def order(ins):
        """Weak memory: the C expression of what a load, store or atomic of global memory promises to other CTAs."""
        mods = set(ins.mods)
        wide = "cta" not in mods
        strong = ins.op in ("atom", "red") or mods & {"cg", "cv", "volatile", "mmio"} or wide and mods & {"relaxed", "acquire", "release"}
        order = ["W_STALE" if "nc" in mods else "W_STRONG" if strong else "W_CACHED"]
        order += ["W_ACQUIRE"] * bool(wide and mods & {"acquire", "acq_rel"}) + ["W_RELEASE"] * bool(wide and mods & {"release", "acq_rel"})
        return "|".join(order)

    def op_fence(self, k, ins, a, ty):
        return "weak_fence(c,t);" if self.weak and "cta" not in ins.mods and not any(m.startswith("proxy") for m in ins.mods) else ""

    op_membar = op_fence

    def op_createpolicy(self, k, ins, a, ty):
        return self.wr(a[0], "b64", "0")

    def op_ld(self, k, ins, a, ty):
        dsts = a[0][1] if a[0][0] == "v" else [a[0]]
        size, space, bt = WIDTH[ty] // 8, self.space(ins), ty if ty[0] in "su" else bits(ty)
        if space == "param":
            base = a[1][1]
            if base[0] == "r" and base[1] in self.m.call_params:
                return self.wr(dsts[0], bt, self.rd(base, bt))
            if base[0] == "r":      # an address that was chosen among those of parameters
                q = f"const uint8_t*q=c->params+({base[1]}+{a[1][2]});"
                return f"{{{q}" + "".join(self.wr(d, bt, f"*(const {ctype(bt)}*)(q+{i * size})") for i, d in enumerate(dsts)) + "}"
            off, limit = self.m.params[base[1]]
            return "".join(self.wr(d, bt, f"*(const {ctype(bt)}*)(c->params+{off + base[2] + a[1][2] + i * size})")
                           for i, d in enumerate(dsts))
        weak = f"q=weak_load(c,t,q,{size * len(dsts)},{self.order(ins)});" if self.weak and space in ("global", "generic") else ""
        return f"{{{self.mem(a[1], space, size * len(dsts), 'A_LOAD', k)}{weak}" + "".join(
            self.wr(d, bt, f"*(volatile {ctype(bt)}*)(q+{i * size})") for i, d in enumerate(dsts)) + "}"

    op_ldu = op_ld

    def op_st(self, k, ins, a, ty):
        srcs = a[1][1] if a[1][0] == "v" else [a[1]]
        size, space = WIDTH[ty] // 8, self.space(ins)
        if space == "param":
            return self.wr(a[0][1], bits(ty), self.rd(srcs[0], bits(ty)))
        into, done = "q", ""
        if self.weak and space in ("global", "generic"):
            into, done = "w", f"weak_stored(c,t,q,{size * len(srcs)},{self.order(ins)});"
        return f"{{{self.mem(a[0], space, size * len(srcs), 'A_STORE', k)}{'uint8_t*w=weak_store(c,t,q);' if done else ''}" + "".join(
            f"*(volatile {ctype(bits(ty))}*)({into}+{i * size})={self.rd(s, bits(ty))};" for i, s in enumerate(srcs)) + done + (
                f"if(c->shadow&&race_store(c,t,q,{size * len(srcs)},{k}))return;" if space in ("shared", "generic") else "") + "}"

    def op_cp(self, k, ins, a, ty):
        if ins.mods[:1] != ("async",) or "bulk" in ins.mods:
            raise PTXError("only cp.async is supported")
        if "shared" not in {m.split("::")[0] for m in ins.mods}:
            return ""               # commit_group, wait_group: the copy was done at once
        n = a[2][1]
        weak = f"g=weak_load(c,t,g,n,{self.order(ins)});" if self.weak else ""
        size = self.rd(a[3], "u32") if len(a) > 3 and a[3][0] in "ri" and (a[3][0] == "i" or WIDTH[self.m.regs[a[3][1]]] == 32) else str(n)
        return (f"{{uint32_t n={size};if(n>{n})n={n};uint8_t buf[{n}]={{0}};if(n){{uint8_t*g=mem_global(c,t,{self.addr(a[1], 'global')},{n},A_LOAD,{k});"
                f"if(!g)return;{weak}memcpy(buf,g,n);}}uint8_t*s=mem_shared(c,t,{self.addr(a[0], 'shared')},{n},A_STORE,{k});if(!s)return;memcpy(s,buf,{n});if(c->shadow&&race_store(c,t,s,{n},{k}))return;}}")

    def op_atom(self, k, ins, a, ty):
        """An update of one value, or of each value of a vector, which is not one atomic access."""
        dst, (at, *src) = (("_",), a) if ins.op == "red" else (a[0], a[1:])
        if at[0] != "m":
            raise PTXError("an atomic needs an address")
        values = src[0][1] if src[0][0] == "v" else [src[0]]
        into = dst[1] if dst[0] == "v" else [dst] * len(values)
        size = WIDTH[ty] // 8
        x = f"{ctype(ty)} xs[]={{{','.join(self.rd(value, ty) for value in values)}}};"     # before a result overwrites one
        each = "".join(f"{{uint8_t*q=first+{i * size};{ctype(ty)} x=xs[{i}];{self.atomic(k, ins, d, src[1:], ty)}}}" for i, d in enumerate(into))
        return f"{{{self.mem(at, self.space(ins), size * len(values), 'A_ATOM', k)}{x}uint8_t*first=q;{each}}}"

    def atomic(self, k, ins, dst, src, ty):
        """The update of the value at `q` by `x`."""
        ops = {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"}
        op = next(m for m in ins.mods if m in ops)
        ut, size = bits(ty), WIDTH[ty] // 8
        o = {"f32": "F32(o)", "f64": "F64(o)"}.get(ty, f"({ctype(ty)})o")
        if ty in ("f16", "bf16", "f16x2", "bf16x2"):
            new = self.halves(ty, lambda p, q: f"{p[0]}{op}({p[1]},{p[2]}{'' if op == 'add' else ',0'})", ["o", "x"])
        elif ty in ("f32", "f64"):
            new = {"add": f"B{WIDTH[ty]}({o}+x)", "min": f"B{WIDTH[ty]}(min{ty}({o},x,0))", "max": f"B{WIDTH[ty]}(max{ty}({o},x,0))",
                   "exch": f"B{WIDTH[ty]}(x)"}[op]
        else:
            new = {"add": "o+x", "min": f"{o}<x?{o}:x", "max": f"{o}>x?{o}:x", "inc": "o>=x?0:o+1", "dec": "o==0||o>x?x:o-1",
                   "and": "o&x", "or": "o|x", "xor": "o^x", "exch": "x", "cas": f"o==x?{self.rd(src[0], ut) if op == 'cas' else 0}:o"}[op]
        update = f"ATOMIC({ctype(ut)},q,o,{new})"
        if not self.weak or self.space(ins) == "shared":
            return f"{update}{self.wr(dst, ut, 'o')}"
        order = self.order(ins)
        now = f"weak_atomic(c,t,q,{size},{order});{update}weak_atomic_done(c,t,q,{size},{order});{self.wr(dst, ut, 'o')}"
        if op == "cas" or dst[0] == "r" and dst[1] in self.members(self.out[k]):
            return now
        late = f"static void A{k}(uint8_t*q,uint64_t v){{{ctype(ty)} x;memcpy(&x,&v,{size});{update}(void)o;}}"
        if late not in self.functions:
            self.functions.append(late)
        return f"uint64_t v=0;memcpy(&v,&x,{size});if(!weak_late(c,t,q,{size},{order},A{k},v)){{{now}}}"

    op_red = op_atom
