"""BLAS on one thread while tasks run: they are what runs in parallel, and one thread always gives the same bits."""

import sys
from threading import Lock

from threadpoolctl import LibController, ThreadpoolController


class _OneThread:
    """Holds every BLAS of this process to one thread while anyone asks for it, by `with` or between `acquire` and `release`.

    The number of threads is a setting of the process: the first to come changes it, the last to go undoes that. Held by someone else
    already, it costs 0.9 us, else 15. (threadpoolctl's own limit, which looks for the libraries every time: 3,000.)
    """

    def __init__(self):
        self._lock = Lock()
        self._holders = 0
        self._modules = 0
        self._libraries: list[LibController] = []
        self._changed: list[tuple[LibController, int]] = []

    def acquire(self) -> None:
        with self._lock:
            if not self._holders:
                self._limit()
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                for library, threads in self._changed:
                    _set_threads(library, threads)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _limit(self) -> None:
        if len(sys.modules) != self._modules:  # what was imported since may have brought another BLAS
            import scipy.linalg  # noqa: F401  brings SciPy's, so that it is there to be limited; numba or a kernel would load it later

            self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
            self._modules = len(sys.modules)
        before = [(library, library.get_num_threads()) for library in self._libraries]
        self._changed = [(library, threads) for library, threads in before if threads != 1]
        for library, _ in self._changed:
            _set_threads(library, 1)


def _set_threads(library: LibController, threads: int) -> None:
    """Set the number of threads of a BLAS, from any thread: threadpoolctl obeys only the first that ever asks, and is silent to others."""
    let_go = getattr(library, "clear_controlling_thread", None)  # OpenBLAS, since threadpoolctl 3.8
    if let_go:
        let_go(force=True)
    library.set_num_threads(threads)
    if let_go:
        let_go(force=True)


one_blas_thread = _OneThread()
