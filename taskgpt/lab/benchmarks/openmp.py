"""The programs of `bench programs` in C with OpenMP's tasks: compiled by gcc, where it is there, and called in this process.

BLAS and LAPACK are those that SciPy publishes, by the same addresses as compiled kernels use: both sides multiply with the same code.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numba.extending import get_cython_function_address

COMPILER = "gcc"
FLAGS = ("-O3", "-march=native", "-fopenmp")
SOURCE = Path(__file__).with_name("openmp.c")
ROUTINES = {"dgemm": "cython_blas", "dsyrk": "cython_blas", "dtrsm": "cython_blas", "dpotrf": "cython_lapack"}
PATIENCE_S = 120


class NotBuilt(Exception):
    """There is no C side; the message says why."""


class OpenMP:
    """The compiled programs. Matrices are float64, by rows, without gaps."""

    def __init__(self, threads: int):
        """Compile them, for so many threads. Raises NotBuilt."""
        self.threads = threads
        compiler = shutil.which(COMPILER)
        if compiler is None:
            raise NotBuilt(f"no {COMPILER} on this machine")
        with tempfile.TemporaryDirectory(prefix="taskgpt-") as folder:
            library = Path(folder, "openmp.so")
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False)
                if done.returncode:
                    said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["nothing said"]
                    raise NotBuilt(f"{COMPILER} {' '.join(FLAGS)} ended with exit code {done.returncode}: {said[0]}")
                self._library = ctypes.CDLL(str(library))
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NotBuilt(f"{COMPILER}: {error}") from None
        self._library.fib.restype = self._library.queens.restype = ctypes.c_int64
        self._routines = [ctypes.c_void_p(get_cython_function_address(f"scipy.linalg.{of}", name)) for name, of in ROUTINES.items()]

    def cholesky(self, a: np.ndarray, tile: int) -> None:
        """Make the lower triangle of a (N, N) its Cholesky factor. What is not positive definite gives a wrong one."""
        self._library.cholesky(_address(a), a.shape[0], tile, self.threads, *self._routines)

    def heat(self, u: np.ndarray, block: int, sweeps: int) -> None:
        """Relax what is inside the edge of u (N + 2, N + 2)."""
        self._library.heat(_address(u), u.shape[0] - 2, block, sweeps, self.threads)

    def fib(self, n: int, cut_off: int) -> int:
        return self._library.fib(n, cut_off, self.threads)

    def queens(self, n: int, rows: int) -> int:
        return self._library.queens(n, rows, self.threads)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    if array.dtype != np.float64 or not array.flags.c_contiguous:
        raise ValueError(f"wanted float64 by rows without gaps, got {array.dtype} with strides {array.strides}")
    return ctypes.c_void_p(array.ctypes.data)
