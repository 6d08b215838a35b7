"""Room 1: kernels, accesses, tiles and graphs. It has heard of neither transformers nor threads.

access.py           In / Out / InOut / Commutative / Concurrent / Reduction / Scratch: what a kernel declares of a tile
combiners.py        what a reduction combines by
spawn.py            what tasks spawn tasks with, in programs without a graph
events.py           what a task waits for after its body
results.py          kernels return nothing, unless they declare it
kernel.py           @kernel: a NumPy body, its declaration, and its compiled twin
shapes.py           what the names of dimensions stand for in a call
nested.py           spawn in compiled twins, and in frames.py what it calls there
rows.py             rows of tiles in compiled twins
sources.py          what a compiled twin is made from, as far as bytecode.py can tell
cache.py            compiled twins are kept on disk, as long as nothing of that has changed
symbols.py          functions that are compiled once for all twins, in linked.py what sources.py knows of them
tensor.py           tensors cut into grids, tiles, arenas (also shared between processes)
task.py             calls, and tasks of one or more of them
dependencies.py     cells, and paths through a graph
grids.py            the cells of a graph's tensors
known_calls.py      what calls of a kernel on tiles of the same shapes have in common
lines.py            the line of a program that spawned a task
each.py             a loop's index and its tiles, in all iterations at once
joined.py           several iterations in one task
loops.py            the calls of a loop that is spawned as one
columns.py          what was spawned, in flat arrays
recorded.py         the tasks of these, made when somebody looks
waits.py            what each task waits for, from the cells that it accesses
edges.py            which task waits for which, without what other edges imply
recorded_edges.py   the edges of what was spawned
parts.py            parts of a graph that are recorded again
reductions.py       copies of reduced tiles, and the kernels that combine them
lowered.py          the calls of what was spawned as native code takes them, in native_entry.py one by one
task_graph.py       spawn and spawn_each: calls become tasks with dependencies
coarsen.py          fewer, larger tasks
scratch.py          working memory of kernels
check.py            the declaration, enforced
fortran.py          how compiled kernels call SciPy's BLAS and LAPACK
blas.py             products and triangular systems inside compiled kernels
lapack.py           Cholesky, LU and QR factors of a tile there
blas_threads.py     BLAS on one thread while tasks run
dask_graph.py       the graph as a Dask graph
dask_collection.py  the graph as a Dask collection
picture.py          the graph as a picture
graph.py            Graph, all of that: what programs use
"""

from taskgpt.tasks.access import Commutative, Concurrent, In, InOut, Out, Reduction, Scratch, Several, WeakIn, WeakInOut, WeakOut, dims
from taskgpt.tasks.blas_threads import one_blas_thread
from taskgpt.tasks.check import check
from taskgpt.tasks.coarsen import by_section, coarsen, part
from taskgpt.tasks.combiners import Combiner
from taskgpt.tasks.events import event
from taskgpt.tasks.graph import Graph
from taskgpt.tasks.kernel import AccessError, Kernel, TwinError, compile_kernels, kernel
from taskgpt.tasks.rows import dense
from taskgpt.tasks.shapes import ShapeError
from taskgpt.tasks.spawn import ProgramError, Spawn
from taskgpt.tasks.task import Call, Section, Task, TaskError, run_now
from taskgpt.tasks.tensor import Arena, GridError, Tensor, TensorSpec, Tile, wrap

__all__ = [
    "AccessError",
    "Arena",
    "Call",
    "Combiner",
    "Commutative",
    "Concurrent",
    "Graph",
    "GridError",
    "In",
    "InOut",
    "Kernel",
    "Out",
    "ProgramError",
    "Reduction",
    "Scratch",
    "Section",
    "Several",
    "ShapeError",
    "Spawn",
    "Task",
    "TaskError",
    "Tensor",
    "TensorSpec",
    "Tile",
    "TwinError",
    "WeakIn",
    "WeakInOut",
    "WeakOut",
    "by_section",
    "check",
    "coarsen",
    "compile_kernels",
    "dense",
    "dims",
    "event",
    "kernel",
    "one_blas_thread",
    "part",
    "run_now",
    "wrap",
]
