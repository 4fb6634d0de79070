"""Put a file's new bytes in place of its old ones, all at once or not at all.

Owns: that only planned bytes are replaced, and that a kill or a power cut leaves the old file or the new
one. Does not know what is in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from codeherd_schema.errors import CodeherdError


class NotWritten(CodeherdError):
    """The file was left as it is."""

    code = "file_not_written"


class ChangedMeanwhile(NotWritten):
    """The file's bytes are not those that were planned; plan it again."""

    code = "file_changed"


def replace(path: Path, before_sha256: str, after: bytes) -> bool:
    """Write a file that is still what it was; its mode stays, and its owner as far as we may set it.

    Args:
        path: a regular file; the folders above it may be links.
        before_sha256: of its bytes now, hexadecimal.
        after: its bytes then.

    Returns:
        False if the file holds `after` already.

    Raises:
        ChangedMeanwhile: it holds something else, or is gone.
        NotWritten: it is a link or no file, must not be written, or the disk refused.
    """
    try:
        with _opened(path) as old:
            facts = os.fstat(old)
            before = _read(old)
        if before == after:
            return False
        if hashlib.sha256(before).hexdigest() != before_sha256:
            raise ChangedMeanwhile(f"`{path}` is not what it was when it was planned")
        if not os.access(path, os.W_OK):
            raise NotWritten(f"`{path}` is read-only")
        with _draft(path) as (draft, new):
            _fill(new, after, facts)
            # Somebody may have saved the file while ours was written; what is left is the time of a rename.
            if _version(path.lstat()) != _version(facts):
                raise ChangedMeanwhile(f"`{path}` was changed while it was written")
            draft.replace(path)
        _sync_folder(path.parent)
    except FileNotFoundError as err:
        raise ChangedMeanwhile(f"`{path}` is gone") from err
    except OSError as err:
        raise NotWritten(f"`{path}` cannot be written: {err.strerror}") from err
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    if path.is_symlink():
        raise NotWritten(f"`{path}` is a symbolic link")
    # NONBLOCK: a pipe would wait for its other end.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise NotWritten(f"`{path}` is no file")
        yield file
    finally:
        os.close(file)


def _read(file: int) -> bytes:
    with os.fdopen(file, "rb", closefd=False) as stream:
        return stream.read()


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[tuple[Path, int]]:
    """Lend a file beside `path`, to be renamed; it is gone if that fails.

    Its name is made of the other's: what a kill leaves behind is taken up when the file is written again.
    The lock is for two that write the same file, who would rename each other's halves.
    """
    draft = path.with_name(f".codeherd-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = draft.lstat().st_ino == os.fstat(file).st_ino
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise NotWritten(f"`{path}` is being written by another process")
        try:
            yield draft, file
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    finally:
        os.close(file)


def _fill(file: int, content: bytes, facts: os.stat_result) -> None:
    os.ftruncate(file, 0)
    with os.fdopen(file, "wb", closefd=False) as stream:
        stream.write(content)
    with contextlib.suppress(PermissionError):
        os.fchown(file, facts.st_uid, facts.st_gid)
    # After the owner: a change of owner takes bits away.
    os.fchmod(file, stat.S_IMODE(facts.st_mode))
    os.fsync(file)


def _version(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _sync_folder(folder: Path) -> None:
    # Without this a power cut may bring the old file back after we said that it is written.
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
