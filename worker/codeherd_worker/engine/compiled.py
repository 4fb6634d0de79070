"""Compile loops for a CPU, and run them with as many threads as torch uses.

Owns: how numba compiles here, and the threads. Does not know what the loops compute (`kernels.py`,
`tiles.py`, `fused.py`), or how a compiled loop is kept on disk (`kept_loops.py`).

The compiler may contract a product and a sum (`contract`), and may not reorder (`reassoc`) or assume that all
is finite: a number is the result of the same operations in the same order, whatever shares the pass.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba
import torch

from codeherd_worker.engine.kept_loops import KeptLoops

logger = logging.getLogger(__name__)

# OpenMP first: its threads may be used by several threads of a process, and spin while they wait.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

#: Threads that were started for kernels in this process.
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def _start_threads() -> None:
    """Start numba's threads and leave torch as many as it has.

    numba tells OpenMP how many there are at most, which is torch's too: a worker with `--threads 1` would
    compute on all cores from its first loop on.
    """
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


_start_threads()

#: Files whose code becomes part of a loop, and numbers that loops were compiled with.
_SOURCES = ("cache.py", "compiled.py", "fused.py", "kernels.py", "tiles.py")
#: Of these files: a loop is what all of them say.
SOURCES_DIGEST: Final = hashlib.sha256(
    b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)
).hexdigest()

#: What numba was told last, by the thread that told it.
_calling = threading.local()
#: Where there is no OpenMP, numba's own threads end the process when two calls meet.
_one_at_a_time = threading.Lock()


def usable_threads() -> int:
    """Return how many threads kernels use: as many as torch does."""
    return min(torch.get_num_threads(), MOST_THREADS)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return a compiled function, kept on disk between starts where a folder can be written."""
    # Python's errors would need a branch at each division, and such loops are not vectorized.
    options |= {"fastmath": {"contract"}, "nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError as err:
        logger.info("kernel_not_kept name=%s reason=%s", function.__name__, err)
        return numba.njit(**options)(function)
    # The names are not public, which is one reason why numba's minor version is pinned.
    cache = compiled._cache  # noqa: SLF001
    name = cache._impl.filename_base  # noqa: SLF001
    cache._cache_file = KeptLoops(Path(cache.cache_path), name, SOURCES_DIGEST)  # noqa: SLF001
    return compiled


def part(function: Callable[..., Any]) -> Any:
    """Make a function a part of the compiled ones that call it."""
    return _compiled(function)


class Kernel:
    """One compiled kernel."""

    __slots__ = ("compiled",)

    def __init__(self, function: Callable[..., Any], *, parallel: bool = True) -> None:
        """Compile it when it is first called.

        Args:
            function: fills arrays that it is given.
            parallel: whether it shares out work itself; else functions that it calls may.
        """
        #: For functions that are compiled themselves.
        self.compiled = _compiled(function, parallel=parallel)

    def __call__(self, *arguments: Any) -> None:
        """Fill the arrays that the kernel fills."""
        # Always the same number: OpenMP ends a thread that one call does not need, and starts another for
        # the next.
        threads = usable_threads()
        if getattr(_calling, "threads", None) != threads:
            numba.set_num_threads(threads)
            _calling.threads = threads
        with _one_at_a_time:
            self.compiled(*arguments)
