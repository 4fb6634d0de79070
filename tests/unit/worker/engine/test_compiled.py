from __future__ import annotations

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
