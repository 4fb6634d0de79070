from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType

import llvmlite
import numba
import pytest

from codeherd_worker.engine.kept_loops import KeptLoops

NAME = "tiles.multiply-1.py311"
KEY, OTHER = ("array(float32, 2d, C)", "skylake"), ("array(float32, 2d, A)", "skylake")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_kind_of_arguments_has_its_own_code(tmp_path: Path) -> None:
    loops = KeptLoops(tmp_path, NAME, "sources")
    assert loops.load(KEY) is None

    loops.save(KEY, "code")
    loops.save(OTHER, "other code")

    again = KeptLoops(tmp_path, NAME, "sources")
    assert (again.load(KEY), again.load(OTHER)) == ("code", "other code")
    assert len(files(tmp_path)) == 2


def test_two_processes_that_begin_with_nothing_leave_each_its_own_code(tmp_path: Path) -> None:
    """Both looked before either wrote, and wrote kinds of arguments in another order."""
    one, two = KeptLoops(tmp_path, NAME, "sources"), KeptLoops(tmp_path, NAME, "sources")
    assert [loops.load(key) for loops in (one, two) for key in (KEY, OTHER)] == [None] * 4

    one.save(KEY, "code")
    two.save(OTHER, "other code")
    two.save(KEY, "code")
    one.save(OTHER, "other code")

    assert (one.load(KEY), two.load(OTHER)) == ("code", "other code")


def test_code_of_other_sources_is_not_run_and_goes_with_the_next_that_is_kept(tmp_path: Path) -> None:
    KeptLoops(tmp_path, NAME, "sources").save(KEY, "yesterday's")
    KeptLoops(tmp_path, "kernels.norm-1.py311", "sources").save(KEY, "another loop's")
    today = KeptLoops(tmp_path, NAME, "other sources")

    assert today.load(KEY) is None
    today.save(OTHER, "today's")

    assert today.load(KEY) is None
    assert KeptLoops(tmp_path, NAME, "sources").load(KEY) is None
    assert KeptLoops(tmp_path, "kernels.norm-1.py311", "sources").load(KEY) == "another loop's"


@pytest.mark.parametrize("compiler", [numba, llvmlite])
def test_a_version_of_a_compiler_reads_its_own_files_alone(
    compiler: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeptLoops(tmp_path, NAME, "sources").save(KEY, "code")
    monkeypatch.setattr(compiler, "__version__", "99")

    assert KeptLoops(tmp_path, NAME, "sources").load(KEY) is None


def test_a_file_that_holds_another_loops_code_is_not_believed(tmp_path: Path) -> None:
    loops = KeptLoops(tmp_path, NAME, "sources")
    loops.save(KEY, "code")
    (mine,) = tmp_path.iterdir()
    loops.save(OTHER, "other code")
    (others,) = set(tmp_path.iterdir()) - {mine}

    others.replace(mine)

    assert loops.load(KEY) is None


@pytest.mark.parametrize("left", [b"", b"\x80\x04", b"no pickle"])
def test_a_damaged_file_is_said_and_written_anew(
    tmp_path: Path, left: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    loops = KeptLoops(tmp_path, NAME, "sources")
    loops.save(KEY, "code")
    (file,) = tmp_path.iterdir()
    file.write_bytes(left)
    caplog.set_level(logging.WARNING)

    assert loops.load(KEY) is None
    assert f"loop_unreadable name={NAME}" in caplog.text
    loops.save(KEY, "code")
    assert loops.load(KEY) == "code"


def test_a_full_disk_costs_the_next_start_a_compilation_and_this_one_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop_halfway(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", stop_halfway)
    caplog.set_level(logging.WARNING)

    KeptLoops(tmp_path, NAME, "sources").save(KEY, "code")

    assert f"loop_not_kept name={NAME} error=no space" in caplog.text
    assert files(tmp_path) == []


def test_all_kinds_of_one_loop_can_be_forgotten(tmp_path: Path) -> None:
    loops, others = KeptLoops(tmp_path, NAME, "sources"), KeptLoops(tmp_path, "kernels.norm", "sources")
    for key in (KEY, OTHER):
        loops.save(key, "code")
        others.save(key, "code")

    loops.flush()

    assert (loops.load(KEY), loops.load(OTHER)) == (None, None)
    assert (others.load(KEY), others.load(OTHER)) == ("code", "code")
