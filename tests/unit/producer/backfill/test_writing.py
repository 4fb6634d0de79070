from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from codeherd_producer.backfill.writing import ChangedMeanwhile, NotWritten, replace

BEFORE = b"\xef\xbb\xbfdef f():\r\n    pass"
AFTER = b'\xef\xbb\xbfdef f():\r\n    """Do it."""\r\n    pass'


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pkg" / "a.py"
    path.parent.mkdir()
    path.write_bytes(BEFORE)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o600, 0o664])
def test_the_new_bytes_are_there_and_the_mode_is_the_old_one(file: Path, mode: int) -> None:
    file.chmod(mode)

    assert replace(file, sha(BEFORE), AFTER)

    assert file.read_bytes() == AFTER
    assert file.stat().st_mode & 0o7777 == mode
    assert list(file.parent.iterdir()) == [file]


def test_a_second_time_nothing_is_written(file: Path) -> None:
    replace(file, sha(BEFORE), AFTER)
    facts = file.stat()

    assert not replace(file, sha(BEFORE), AFTER)

    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns)


def test_a_file_that_was_changed_is_left_alone(file: Path) -> None:
    file.write_bytes(BEFORE + b"\n")

    with pytest.raises(ChangedMeanwhile):
        replace(file, sha(BEFORE), AFTER)

    assert file.read_bytes() == BEFORE + b"\n"
    file.unlink()
    with pytest.raises(ChangedMeanwhile, match="gone"):
        replace(file, sha(BEFORE), AFTER)
    assert list(file.parent.iterdir()) == []


def test_what_is_no_file_is_refused(file: Path) -> None:
    link, pipe = file.with_name("link.py"), file.with_name("pipe.py")
    link.symlink_to(file)
    os.mkfifo(pipe)

    for path in (link, pipe, file.parent):
        with pytest.raises(NotWritten) as refused:
            replace(path, sha(BEFORE), AFTER)
        assert not isinstance(refused.value, ChangedMeanwhile)

    assert link.is_symlink()
    assert file.read_bytes() == BEFORE
    assert sorted(file.parent.iterdir()) == [file, link, pipe]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_what_must_not_be_written_is_not(file: Path) -> None:
    file.chmod(0o444)
    with pytest.raises(NotWritten, match="read-only"):
        replace(file, sha(BEFORE), AFTER)

    file.chmod(0o644)
    file.parent.chmod(0o555)
    try:
        with pytest.raises(NotWritten, match="Permission"):
            replace(file, sha(BEFORE), AFTER)
    finally:
        file.parent.chmod(0o755)
    assert file.read_bytes() == BEFORE


def test_what_is_saved_while_we_write_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def saved_now(descriptor: int) -> None:
        # Of the same length, as a corrected letter is.
        file.write_bytes(BEFORE.replace(b"f", b"g"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", saved_now)
    with pytest.raises(ChangedMeanwhile):
        replace(file, sha(BEFORE), AFTER)

    assert file.read_bytes() == BEFORE.replace(b"f", b"g")
    assert list(file.parent.iterdir()) == [file]


def test_of_two_that_write_a_file_one_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, refused = os.fsync, []

    def another_now(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(NotWritten, match="another process"):
            replace(file, sha(BEFORE), b"other")
        refused.append(True)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", another_now)
    replace(file, sha(BEFORE), AFTER)

    assert refused
    assert file.read_bytes() == AFTER
    assert list(file.parent.iterdir()) == [file]


def killed_at_sync(file: Path, number: int) -> None:
    """Write the file in a process that is killed at its sync of this number."""
    code = f"""
import os, pathlib, signal
from codeherd_producer.backfill.writing import replace
syncs = []
def sync(descriptor):
    syncs.append(descriptor)
    if len(syncs) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = sync
replace(pathlib.Path({str(file)!r}), {sha(BEFORE)!r}, {AFTER!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_before_the_rename_leaves_the_old_file_and_the_next_try_clears_up(file: Path) -> None:
    killed_at_sync(file, 1)
    assert file.read_bytes() == BEFORE
    [draft] = set(file.parent.iterdir()) - {file}
    # Another plan may have been longer.
    draft.write_bytes(AFTER * 2)

    assert replace(file, sha(BEFORE), AFTER)

    assert file.read_bytes() == AFTER
    assert list(file.parent.iterdir()) == [file]


def test_a_kill_after_the_rename_leaves_the_new_file(file: Path) -> None:
    killed_at_sync(file, 2)

    assert file.read_bytes() == AFTER
    assert list(file.parent.iterdir()) == [file]
    assert not replace(file, sha(BEFORE), AFTER)


def test_a_full_disk_leaves_the_old_file(file: Path) -> None:
    # No file of this process may be longer than 8 bytes.
    code = f"""
import pathlib, resource
from codeherd_producer.backfill.writing import NotWritten, replace
resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
try:
    replace(pathlib.Path({str(file)!r}), {sha(BEFORE)!r}, {AFTER!r})
except NotWritten as err:
    raise SystemExit(err.message)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)

    assert "cannot be written: File too large" in done.stderr
    assert file.read_bytes() == BEFORE
    assert list(file.parent.iterdir()) == [file]
