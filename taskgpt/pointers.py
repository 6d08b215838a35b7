"""What compiled code that runs beside others needs of C: memory by address, atomics, the clock, threads that sleep, and cores.

State that threads share lies in NumPy arrays of int64 and is reached by address: no reference is counted, and the array may be replaced
behind a table while the loop runs. Atomics are sequentially consistent: every thread sees them in one order.
"""

import platform
import sys
import time

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

WORDS = types.CPointer(types.int64)  # words[i] reads and writes, as in C
WORD_BYTES = 8
CACHE_LINE_WORDS = 16  # two lines: processors fetch them in pairs

# By name, so that compiled code can be cached on disk: the process has them all.
sched_yield = types.ExternalFunction("sched_yield", types.int32())
mutex_init = types.ExternalFunction("pthread_mutex_init", types.int32(types.int64, types.int64))
mutex_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(types.int64))
mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))
condition_init = types.ExternalFunction("pthread_cond_init", types.int32(types.int64, types.int64))
condition_wait = types.ExternalFunction("pthread_cond_wait", types.int32(types.int64, types.int64))
condition_timedwait = types.ExternalFunction("pthread_cond_timedwait", types.int32(types.int64, types.int64, types.int64))
condition_signal = types.ExternalFunction("pthread_cond_signal", types.int32(types.int64))
condition_broadcast = types.ExternalFunction("pthread_cond_broadcast", types.int32(types.int64))
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
sched_setaffinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 5))

MONOTONIC, REALTIME = getattr(time, "CLOCK_MONOTONIC", 1), getattr(time, "CLOCK_REALTIME", 0)  # pthread waits until a real time
_IS_X86 = binding.get_process_triple().startswith(("x86", "i686"))
OPAQUE_WORDS = 16  # room for a pthread mutex or condition on any system

# Linux's futex: threads of several processes sleep on a word of memory that they share. Its number is another on each kind of processor.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98, "ppc64le": 221}.get(platform.machine(), 0)
HAS_FUTEX = sys.platform == "linux" and sys.byteorder == "little" and _FUTEX != 0
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


@intrinsic
def words_at(typing_context, address):
    """Return the memory at an address as words."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(WORDS))

    return WORDS(types.int64), codegen


@intrinsic
def address_of(typing_context, words, index):
    """Return the address of words[index]."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))

    return types.int64(WORDS, types.int64), codegen


@intrinsic
def load(typing_context, words, index):
    """Return words[index], read from memory now and not before."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "seq_cst", WORD_BYTES)

    return types.int64(WORDS, types.int64), codegen


def _write(ordering: str, meaning: str):
    def typed(typing_context, words, index, value):
        def codegen(context, builder, signature, args):
            builder.store_atomic(args[2], builder.gep(args[0], [args[1]]), ordering, WORD_BYTES)
            return context.get_dummy_value()

        return types.void(WORDS, types.int64, types.int64), codegen

    typed.__doc__ = f"Write words[index]; {meaning}."
    return intrinsic(typed)


store = _write("seq_cst", "every thread sees it before what this thread reads next")
store_last = _write("release", "whoever sees it sees all that this thread wrote before")


def _read_modify_write(operation: str, meaning: str):
    def typed(typing_context, words, index, value):
        def codegen(context, builder, signature, args):
            return builder.atomic_rmw(operation, builder.gep(args[0], [args[1]]), args[2], "seq_cst")

        return types.int64(WORDS, types.int64, types.int64), codegen

    typed.__doc__ = f"Return words[index] and {meaning}, in one step."
    return intrinsic(typed)


fetch_add = _read_modify_write("add", "add the value")
fetch_or = _read_modify_write("or", "set the bits of the value")
fetch_and = _read_modify_write("and", "keep only the bits of the value")
exchange = _read_modify_write("xchg", "write the value")


@intrinsic
def compare_exchange(typing_context, words, index, expected, value):
    """Return words[index] and, if that is what was expected, write the value, in one step."""

    def codegen(context, builder, signature, args):
        found = builder.cmpxchg(builder.gep(args[0], [args[1]]), args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(found, 0)

    return types.int64(WORDS, types.int64, types.int64, types.int64), codegen


@intrinsic
def relax(typing_context):
    """Tell the processor that this thread waits in a loop: it saves power, and leaves the core to the other hyper-thread."""

    def codegen(context, builder, signature, args):
        if _IS_X86:
            pause = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_entry(typing_context, entry, words, scratch, error):
    """Call a kernel's native entry (tasks/native_entry.py): `int32 entry(int64 *words, char *scratch, void **error)`."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.IntType(32), [word, word, word]).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), list(args[1:]))

    return types.int32(types.int64, types.int64, types.int64, types.int64), codegen


@njit(nogil=True)
def futex_wait(address, value, timeout):
    """Sleep while the low half of the word at an address is that of `value`: until woken, or for the seconds and ns at `timeout`."""
    _syscall(_FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF, timeout)


@njit(nogil=True)
def futex_wake(address, most):
    """Wake so many that sleep at an address."""
    _syscall(_FUTEX, address, _FUTEX_WAKE, most, 0)
