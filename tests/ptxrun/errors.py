"""What can go wrong in a launch."""
import ctypes as C


class LaunchError(RuntimeError):
    """A kernel failed while it ran.  Attributes: kernel, ctaid, tid, where (the PTX line and the Triton source line)."""


class IllegalAddress(LaunchError):
    """An access outside the tensors of the launch, outside shared memory or outside the thread's local memory."""


class MisalignedAddress(LaunchError):
    """An access whose address is not a multiple of its size."""


class DeviceAssert(LaunchError):
    """tl.device_assert failed."""


class Trap(LaunchError):
    """The kernel executed a trap."""


class Deadlock(LaunchError):
    """Threads wait for one another for ever: a barrier or a warp collective that not all of its threads reach."""


class Divergence(LaunchError):
    """Threads meet at two different instructions that wait for the same threads: their control flow has come apart."""


class OutOfFuel(LaunchError):
    """More backward branches than the session's `fuel`: most likely an endless loop."""


class SharedRace(LaunchError):
    """Two warps touch the same byte of shared memory, at least one of them to write, with no barrier between."""


ERRORS = {1: IllegalAddress, 2: MisalignedAddress, 3: IllegalAddress, 4: IllegalAddress, 5: DeviceAssert, 6: Trap,
          7: Deadlock, 8: OutOfFuel, 9: SharedRace, 10: Divergence, 11: MemoryError, 12: Divergence, 13: Divergence}


def launch_error(program, ctx, ranges):
    """The exception for what `ctx` says went wrong; `ranges` are (address, bytes, tensor)."""
    err, x, ins = ctx.err, list(ctx.err_x), program.code[ctx.err_ins]
    kind = {0: "load", 1: "store", 2: "atomic"}
    if err == 1:
        text = f"global {kind.get(x[2])} of {x[1]} bytes at {x[0]:#x}, outside every tensor of the launch"
        near = min(ranges, key=lambda r: max(r[0] - x[0], x[0] - r[0] - r[1]), default=None)
        if near:
            t = near[2]
            text += (f"; nearest: byte offset {x[0] - near[0]} of the {near[1]}-byte storage of a {tuple(t.shape)} "
                     f"{t.dtype} tensor")
    elif err == 2:
        text = f"{kind.get(x[2])} of {x[1]} bytes at the misaligned {('global', 'shared', 'local')[x[3]]} address {x[0]:#x}"
    elif err in (3, 4):
        text = f"{'shared' if err == 3 else 'local'} {kind.get(x[2])} of {x[1]} bytes at offset {C.c_int64(x[0]).value} of {x[3]}"
    elif err == 5:
        msg, file, func = (C.string_at(x[i]).decode(errors="replace") if x[i] else "" for i in (0, 1, 3))
        text = f"device-side assertion failed: {msg} ({file}:{x[2]}, {func})"
    elif err == 7:
        text = f"deadlock: {x[0]} threads at a CTA barrier, {x[1]} at a warp collective (mask {x[3]:#x}), {x[2]} exited; one waits"
    elif err == 9:
        other = "read" if x[3] else "written"
        text = f"race: shared {kind.get(x[2])} of byte {x[0]} that warp {x[1]} has {other} since the last barrier"
    elif err == 10:
        text = f"lane {x[1]} executes a warp collective whose mask {x[0]:#x} does not name it"
    elif err == 12:
        text = f"threads of one collective are at different instructions; thread {x[1]} of the warp or CTA is at {program.code[x[0]].where()}"
    elif err == 13:
        text = f"a shuffle reads lane {x[0]}, which has exited or is not in its mask"
    else:
        text = {6: "trap", 8: "out of fuel (an endless loop?)", 11: "out of memory"}[err]
    nx, ny = ctx.ntid[0], ctx.ntid[1]
    tid = (ctx.err_tid % nx, ctx.err_tid // nx % ny, ctx.err_tid // nx // ny)
    e = ERRORS[err](f"{program.module.kernel}: {text}, CTA {tuple(ctx.err_cta)}, thread {tid}, {ins.where()}")
    e.kernel, e.ctaid, e.tid, e.where = program.module.kernel, tuple(ctx.err_cta), tid, ins.where()
    return e
