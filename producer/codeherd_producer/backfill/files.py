"""Find the Python files of a folder or repository, and say which are left alone.

Owns: where files are looked for and the reasons by file. Does not read code: files that say in their head
that they are generated, or to be left alone, are told by `selection`.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from codeherd_producer.backfill.git import Git, run

#: Begins a file whose content is elsewhere (git-lfs specification, version 1).
_LFS = b"version https://git-lfs"
#: Larger files are no code that people wrote.
MOST_BYTES = 4_000_000
#: Folders of other people's code.
VENDORED = frozenset({"vendor", "vendored", "_vendor", "_vendored", "third_party", "extern", "site-packages"})
#: Folders that are looked into only if git lists their files.
_PRIVATE = frozenset({"__pycache__", "node_modules", "build", "dist", "venv", "env", "__pypackages__"})
#: Names that generators give.
_GENERATED = ("*_pb2.py", "*_pb2_grpc.py", "*_thrift.py", "ui_*.py", "*_rc.py", "_version.py")
_ATTRIBUTES = ("linguist-generated", "linguist-vendored")


class FileReason(StrEnum):
    """Why a file is left alone."""

    SYMLINK = "symbolic link"
    GENERATED = "generated"
    VENDORED = "vendored"
    LFS = "content is in git-lfs"
    LARGE = "too large"
    DIRTY = "has changes that are not committed"
    UNCHANGED = "not changed since the reference"
    EXCLUDED = "excluded by path"
    MARKED = "marked in its head"
    NAME = "name is not UTF-8"
    GONE = "cannot be read"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Python file."""

    #: From the folder that was asked for, with `/`.
    path: str
    #: None for files to be worked on.
    reason: FileReason | None
    is_test: bool


def find(
    root: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    changed_since: str | None = None,
    allow_dirty: bool = False,
) -> list[SourceFile]:
    """Return every `.py` file below `root`, in order of their paths.

    Args:
        root: a folder, in a repository or not.
        include: patterns of paths; without any all are in.
        exclude: patterns of paths; `**` and `*` match `/` too.
        changed_since: only files that were changed after this commit branched off.
        allow_dirty: take files too that have changes which are not committed.

    Raises:
        GitFailed: there is no commit `changed_since`.
    """
    git = Git.of(root)
    if git is None:
        paths, marked = sorted(_walked(root)), dict[str, FileReason]()
    else:
        inside = _inside(git, root)
        paths = [path for path in map(inside.inner, git.files()) if path is not None and path.endswith(".py")]
        marked = _marks(git, inside, paths, changed_since, allow_dirty=allow_dirty)
    return [
        SourceFile(path, _reason(root, path, include, exclude, marked.get(path)), _is_test(path))
        for path in paths
    ]


def look(root: Path, path: str) -> SourceFile:
    """Return one file that `find` returned before, as it is now; what was changed or not is not asked."""
    git = Git.of(root)
    marked = {} if git is None else _marks(git, _inside(git, root), [path], None, allow_dirty=True)
    return SourceFile(path, _reason(root, path, (), (), marked.get(path)), _is_test(path))


def is_dirty(root: Path, path: str) -> bool:
    """Whether a file has changes that are not committed; outside of a repository nothing has."""
    git = Git.of(root)
    if git is None:
        return False
    outer = _inside(git, root).outer(path)
    status = ["--literal-pathspecs", "status", "-z", "--porcelain=v1", "--untracked-files=all", "--", outer]
    return run(git.top, status) != b""


@dataclass(frozen=True, slots=True)
class _Inside:
    """A folder of a repository: paths of one and of the other."""

    prefix: str

    def inner(self, path: str) -> str | None:
        return path[len(self.prefix) :] if path.startswith(self.prefix) else None

    def outer(self, path: str) -> str:
        return self.prefix + path


def _inside(git: Git, root: Path) -> _Inside:
    relative = root.resolve().relative_to(git.top.resolve()).as_posix()
    return _Inside("" if relative == "." else f"{relative}/")


def _marks(
    git: Git, inside: _Inside, paths: Sequence[str], changed_since: str | None, *, allow_dirty: bool
) -> dict[str, FileReason]:
    outer = {inside.outer(path): path for path in paths}
    marks: dict[str, FileReason] = {}
    for attribute, reason in zip(_ATTRIBUTES, (FileReason.GENERATED, FileReason.VENDORED), strict=True):
        marks |= {outer[path]: reason for path in git.marked(list(outer), [attribute])}
    if not allow_dirty:
        marks |= {outer[path]: FileReason.DIRTY for path in git.dirty() & outer.keys()}
    if changed_since is not None:
        changed = git.changed_since(changed_since)
        marks |= {inner: FileReason.UNCHANGED for path, inner in outer.items() if path not in changed}
    return marks


def _walked(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _PRIVATE and not name.startswith(".") and not name.endswith(".egg-info")
        ]
        for name in names:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _reason(
    root: Path, path: str, include: Sequence[str], exclude: Sequence[str], mark: FileReason | None
) -> FileReason | None:
    pure = PurePosixPath(path)
    if any("\udc80" <= character <= "\udcff" for character in path):
        return FileReason.NAME
    if mark is not None:
        return mark
    if any(fnmatch.fnmatch(path, pattern) for pattern in exclude) or (
        include and not any(fnmatch.fnmatch(path, pattern) for pattern in include)
    ):
        return FileReason.EXCLUDED
    if any(fnmatch.fnmatch(pure.name, pattern) for pattern in _GENERATED):
        return FileReason.GENERATED
    if VENDORED & set(pure.parts[:-1]):
        return FileReason.VENDORED
    file = root / path
    try:
        if file.is_symlink():
            return FileReason.SYMLINK
        if not file.is_file():
            # A named pipe would keep whoever reads it.
            return FileReason.GONE
        if file.stat().st_size > MOST_BYTES:
            return FileReason.LARGE
        with file.open("rb") as stream:
            return FileReason.LFS if stream.read(len(_LFS)) == _LFS else None
    except OSError:
        return FileReason.GONE


def _is_test(path: str) -> bool:
    pure = PurePosixPath(path)
    is_named = pure.name.startswith("test_") or pure.name.endswith("_test.py") or pure.name == "conftest.py"
    return is_named or bool({"test", "tests"} & set(pure.parts[:-1]))
