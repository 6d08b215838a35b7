"""The environments in which peers run: as installed, and as fast as we could make them without changing the library.

What was tried with PyTorch 2.13 besides, and gained nothing: a padded vocabulary, flushed denormals, tcmalloc and jemalloc beside
glibc's own settings.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Freed memory stays with the process, in huge pages. Else tensors of more than 32 MiB, such as logits, come from the system anew in each
# step: 0.3 of 3.4 s of CPU time of PyTorch's step (GPT-2 124M, B=4, T=64) were page faults.
GLIBC_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
COMPILERS = ("cc", "gcc", "clang")
# MKL asks this before it uses AVX-512, or its best code for AVX2. The counter says whether it did.
INTEL_C = "int taskgpt_times_asked;\nint mkl_serv_intel_cpu_true(void) { taskgpt_times_asked++; return 1; }\n"


@dataclass(frozen=True)
class Setup:
    """A name, what it changes in the environment, and that in words."""

    name: str
    changes: Mapping[str, str]
    said: str

    def environment(self) -> dict[str, str]:
        """Return the environment of this process with the changes; where it has such lists, they come first in them."""
        lists = {key: f"{value}:{os.environ[key]}" for key, value in self.changes.items() if os.environ.get(key)}
        return {**os.environ, **self.changes, **lists}


def setups(library: str, folder: Path) -> Iterator[Setup]:
    """Yield those of a library. `folder` takes what they need to be compiled."""
    yield Setup("as installed", {}, "")
    changes, said = {"GLIBC_TUNABLES": GLIBC_TUNABLES}, "memory kept, in huge pages"
    if library == "torch" and vendor() not in ("", "GenuineIntel"):
        try:
            changes["LD_PRELOAD"] = str(compiled(INTEL_C, folder / "intel.so"))
        except OSError as error:
            said += f"; nothing to tell MKL ({error})"
    yield Setup("tuned", changes, said)


def vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the vendor of an x86 processor under Linux, elsewhere an empty word."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def compiled(source: str, path: Path) -> Path:
    """Compile C to a shared object at `path`, and return it. Raises OSError if there is no compiler, or it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C compiler: {', '.join(COMPILERS)}")
    words = [compiler, "-shared", "-fPIC", "-O2", "-x", "c", "-o", str(path), "-"]
    done = subprocess.run(words, input=source, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{compiler}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return path
