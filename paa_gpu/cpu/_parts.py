"""How numba compiles the parts of a loop: without machine code of their own.

A part is inlined wherever it is called, so nobody calls its machine code. numba makes it nevertheless. A first call takes a tenth
longer by that. So a part keeps what numba makes before: the intermediate representation, which the loop is linked with. A part
cannot call itself.

These names are not public. If a later numba has no such names to import, `_loops` does without this module. Sums of two loops may
then differ in the last bit.
"""

from __future__ import annotations

import re
from typing import Any

from llvmlite.binding import parse_assembly
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class PartLibrary(JITCodeLibrary):
    """The intermediate representation of a part, which never goes to the compiler of machine code."""

    #: What allows LLVM to add up in any order, in its text: flags of an addition or subtraction.
    ANY_ORDER = re.compile(r"(?<== f(?:add|sub)) reassoc nsz arcp(?= )")

    def _optimize_final_module(self) -> None:
        """Choose the order of sums.

        Loops that share the part would each choose an order of their own, and a batch would not get the bits of its images. All
        else is optimised in the loop.
        """
        if self.ANY_ORDER.search(str(self._final_module)):
            super()._optimize_final_module()
            self._final_module = parse_assembly(self.ANY_ORDER.sub("", str(self._final_module)))

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class PartLowering(NativeLowering):
    """numba's lowering, to a `PartLibrary`."""

    _name = "part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        # Loops find the part by its entry for Python. It has none: any built-in function that no other part has will do.
        entry = list[Any]().append
        state.cr = state.cr._replace(cfunc=entry)
        state.targetctx.insert_user_function(entry, state.cr.fndesc, [state.library])
        return True


class PartCompiler(CompilerBase):
    """numba's compiler, with `PartLowering` for its own."""

    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [(PartLowering if step is NativeLowering else step, text) for step, text in manager.passes]
        manager.finalize()
        return [manager]
