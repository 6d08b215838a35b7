"""Eleven small programs of tasks, a file each: what the task-based runtimes show themselves with.

Each file has kernels and a class of one problem: `begin()` fills its arrays, `program(spawn)` makes its tasks, `result()` is what they
made, and `wanted()` is NumPy's word for it. `python -m examples` runs them.

    cholesky.py       tiles of a matrix, by LAPACK and BLAS
    cholesky_on_a_cluster.py   the same where no process has the whole matrix; of itself it runs in one
    gauss_seidel.py   in place, with halos: a wave from corner to corner
    heat.py           Jacobi with halos, to and fro between two arrays
    nbody.py          forces as reductions
    sparse_lu.py      a matrix most of whose tiles are not there
    dot.py            a sum that is the same to the bit however it runs
    stream.py         copy, scale, add and triad, bound by memory
    histogram.py      bytes to integers, into bins that tasks share
    merge_sort.py     recursion, and lists of tiles
    conjugate_gradient.py   a loop that ends when the residual is small
"""
