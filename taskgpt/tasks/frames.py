"""Frames: what a compiled body that spawns has while it runs, words on the stack of its entry (native_entry.py).

In it are the place of its task in the scheduler that runs it, and where that has its functions, which take and return words:

    spawn(frame, entry, words, described, line)   the place of a task that was spawned; RAN, with its result in the frame; or a status
    wait(frame, place)                            a status: 0, with the result of a task in the frame; OVER; TOO_DEEP
    wait_for_all(frame)                           a status, when all that the body has spawned is done
    end(frame)                                    after the body

`described` says of a kernel how many words a call has, whether it has a result, and how many tiles; then of each tile where in the words it
begins, its axes, the bytes of an element, and whether it is written.
"""

from llvmlite import ir
from numba.core import cgutils

CARRIED, FRAME_PLACE, NESTING, VALUE, FREE_IN_FRAME = range(5)  # CARRIED: an exception that goes on as that of this body
SPAWN, WAIT, WAIT_FOR_ALL, END, FUNCTIONS = range(5)  # in the words at NESTING
CALLED_WORDS, HAS_RESULT, TILES, FIRST_TILE = range(4)  # in what describes a kernel
TILE_WORDS = 4
MOST_AXES = 8  # of a tile that a body passes on
RAN, OVER, TOO_DEEP = -1, -2, -3
_FRAME_WORDS = FREE_IN_FRAME + 2  # the scheduler has two of its own
WORD = ir.IntType(64)


def new_frame(builder, place, nesting):
    """Return a frame, for a task at a place, with where the scheduler has its functions."""
    frame = cgutils.alloca_once(builder, WORD, _FRAME_WORDS)
    for at in range(_FRAME_WORDS):
        builder.store({FRAME_PLACE: place, NESTING: nesting}.get(at, ir.Constant(WORD, 0)), cgutils.gep_inbounds(builder, frame, at))
    return frame


def in_frame(builder, frame, which: int):
    """Return a word of a frame."""
    return builder.load(cgutils.gep_inbounds(builder, frame, which))


def call_scheduler(builder, frame, which: int, args: list):
    """Call a function of the frame's scheduler with words, the frame before them; return the word that it returns."""
    functions = builder.inttoptr(in_frame(builder, frame, NESTING), WORD.as_pointer())
    kind = ir.FunctionType(WORD, [WORD] * (1 + len(args))).as_pointer()
    function = builder.inttoptr(in_frame(builder, functions, which), kind)
    return builder.call(function, [builder.ptrtoint(frame, WORD), *args])
