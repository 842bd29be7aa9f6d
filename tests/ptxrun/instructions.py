"""The instructions that ptxrun knows: their modifiers, numbers of operands, classes and C types."""
import re

from .ptx import WIDTH

FE = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
APPROX = {"ex2": "exp2", "lg2": "log2", "sin": "sin", "cos": "cos", "tanh": "tanh", "rsqrt": "1.0/sqrt"}
WARP = {"shfl", "vote", "redux", "match", "activemask", "elect", "ldmatrix", "stmatrix"}
IGNORED = {"prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "griddepcontrol",
           "setmaxnreg", "brkpt"}
# modifiers (beside types) that each instruction may carry, and its numbers of operands: anything else is refused
_CMP = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"
_MEM = "ca cg cs lu cv wb wt weak volatile relaxed acquire release mmio cta cluster gpu sys nc global shared shared::cta local param const v2 v4 v8 L*"
_ATOM = "relaxed acquire release acq_rel cta cluster gpu sys global shared shared::cta noftz add min max inc dec and or xor exch cas v2 v4 v8 L*"
ALLOWED = {
    **dict.fromkeys(("add", "sub"), ("rn rz rm rp ftz sat cc", 3)), "mul": ("rn rz rm rp ftz sat lo hi wide", 3),
    "mad": ("rn rz rm rp ftz sat lo hi wide cc", 4), "fma": ("rn rz rm rp ftz sat relu", 4), "div": ("rn rz rm rp approx full ftz", 3),
    "rem": ("", 3), **dict.fromkeys(("min", "max"), ("ftz NaN relu", 3, 4)), **dict.fromkeys(("neg", "abs"), ("ftz", 2)),
    **dict.fromkeys(("sqrt", "rcp"), ("rn rz rm rp approx ftz", 2)), "rsqrt": ("approx ftz", 2),
    **dict.fromkeys(("ex2", "lg2", "sin", "cos", "tanh"), ("approx ftz", 2)), **dict.fromkeys(("mul24", "mad24"), ("lo hi", 3, 4)),
    "madc": ("lo hi cc", 4), **dict.fromkeys(("addc", "subc"), ("cc", 3)), "sad": ("", 4), **dict.fromkeys(("and", "or", "xor", "shl", "shr"), ("", 3)),
    **dict.fromkeys(("not", "cnot", "brev", "popc", "clz"), ("", 2)), "shf": ("l r wrap clamp", 4), "lop3": ("", 5), "prmt": ("", 4),
    "bfe": ("", 4), "bfi": ("", 5), "szext": ("wrap clamp", 3), "bfind": ("shiftamt", 2), "setp": (_CMP, 3, 4), "set": (_CMP, 3),
    "selp": ("", 4), "slct": ("ftz", 4), "copysign": ("", 3), "testp": ("finite infinite number notanumber normal subnormal", 2),
    "cvt": ("rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu", 2, 3), "mov": ("", 2), "cvta": ("to global shared shared::cta local const", 2),
    "isspacep": ("global shared shared::cta local", 2), "ld": (_MEM, 2, 3), "ldu": (_MEM, 2), "st": (_MEM, 2, 3), "atom": (_ATOM, 3, 4, 5), "red": (_ATOM, 2, 3),
    "shfl": ("sync up down bfly idx", 5), "vote": ("sync all any uni ballot", 3), "redux": ("sync add min max and or xor abs NaN", 3),
    "match": ("any all sync", 3), "activemask": ("", 1), "elect": ("sync", 2), "bra": ("uni", 1), "ret": ("uni", 0), "exit": ("", 0), "trap": ("", 0),
    **dict.fromkeys(("bar", "barrier"), ("cta warp sync red aligned popc and or", 1, 2, 3, 4)),
    **dict.fromkeys(("ldmatrix", "stmatrix"), ("sync aligned m8n8 x1 x2 x4 trans shared shared::cta", 2)),
}


def ctype(ty):
    if ty in ("f32", "f64"):
        return {"f32": "float", "f64": "double"}[ty]
    if ty == "pred":
        return "uint8_t"
    if ty == "b128":
        return "unsigned __int128"
    return ("int" if re.fullmatch(r"s\d+", ty) else "uint") + f"{WIDTH[ty]}_t"


def bits(ty):
    return ty if ty == "pred" else f"b{WIDTH[ty]}"


def classify(ins):
    op, mods = ins.op, ins.mods
    if op in WARP or (op, mods[:1]) == ("bar", ("warp",)):
        return "warp"
    if op in ("bar", "barrier"):
        return "barrier"
    if op in ("ld", "st", "cp", "ldu"):
        return next((s for s in ("shared", "local") if any(m.startswith(s) for m in mods)),
                    "mov" if "param" in mods else "global")
    if op in ("atom", "red"):
        return "atomic"
    if op in ("bra", "ret", "exit", "call", "trap", "membar", "fence") or op in IGNORED:
        return "control"
    if op in APPROX or (op in ("rcp", "sqrt", "div") and mods[-1][0] == "f"):
        return "special"
    if op == "cvt":
        return "cvt"
    if op in ("mov", "cvta", "selp", "createpolicy", "isspacep"):
        return "mov"
    ty = mods[-1] if mods else ""
    return {"f64": "fp64", "f32": "fp32", "f32x2": "fp32", "f16": "fp16", "bf16": "fp16", "f16x2": "fp16", "bf16x2": "fp16"}.get(ty, "int")
