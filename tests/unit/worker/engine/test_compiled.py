from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from codeherd_worker.engine import compiled


def _double(number):  # type: ignore[no-untyped-def]
    return number + number


def misses() -> int:
    """Return how often a new process would have to compile."""
    function = compiled.part(_double)
    assert function(2.0) == 4.0
    return sum(function.stats.cache_misses.values())


def test_a_loop_is_kept_until_any_file_of_loops_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    assert [misses(), misses()] == [1, 0]
    monkeypatch.setattr(compiled, "SOURCES_DIGEST", "of other files")
    assert [misses(), misses()] == [1, 0]


def test_a_loop_that_cannot_be_kept_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_dispatcher: object) -> None:
        raise RuntimeError("cannot cache")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    caplog.set_level("INFO")

    assert compiled.part(_double)(2.0) == 4.0
    assert "kernel_not_kept name=_double" in caplog.text


def test_threads_that_torch_was_given_are_those_that_loops_use() -> None:
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "import numpy as np\n"
        "from codeherd_worker.engine import compiled, kernels\n"
        "kernels.norm(np.ones((4, 16), np.float32), np.ones(16, np.float32), np.float32(1), "
        "np.empty((4, 16), np.float32))\n"
        "print(torch.get_num_threads(), compiled.usable_threads(), compiled.MOST_THREADS)\n"
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}

    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout

    assert output.split() == ["1", "1", "2"]
