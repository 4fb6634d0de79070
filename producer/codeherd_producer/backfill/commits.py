"""Put edited files on a branch, in commits that say where their texts come from.

Owns: which files make one commit, the words of its message, and whether a file is still the one that was
edited. Does not know how a commit is made without touching the user's files (`worktree`).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from codeherd_producer.backfill.git import Git, GitFailed
from codeherd_producer.backfill.patches import quoted
from codeherd_producer.backfill.worktree import Worktree, delete_branch, worktree

#: Owners that a title names.
_NAMED: Final = 3


class Grouping(StrEnum):
    """Which files share a commit."""

    FILE = "per-file"
    FOLDER = "per-dir"
    OWNER = "per-owner"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one commit."""

    #: A commit's first line.
    title: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One edited file."""

    #: From the top of the repository, with `/`.
    path: str
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Made:
    """What became of the files of one commit, by path."""

    #: The commit's id; None if there was nothing to commit.
    commit: str | None
    committed: tuple[str, ...]
    #: On the branch already, as an earlier try put them there.
    known: tuple[str, ...]
    #: On the branch as something else, or not at all: left alone.
    changed: tuple[str, ...]
    #: Those of the committed that a hook has altered: not what was proven to be safe.
    altered: tuple[str, ...]


def grouped(
    gains: Mapping[str, int],
    by: Grouping,
    *,
    owners_of: Callable[[str], tuple[str, ...]] = lambda _: (),
    most_files: int | None = None,
    most_lines: int | None = None,
) -> list[Group]:
    """Say which files are committed together, in order of their paths.

    Args:
        gains: the lines that each path gains.
        by: what shares a commit, as far as the limits let it.
        owners_of: who owns a path, for `Grouping.OWNER`; see `owners.Owners.of`.
        most_files: in one commit.
        most_lines: gained in one commit; a file that gains more has one of its own.
    """
    key_of: dict[Grouping, Callable[[str], Hashable]] = {
        Grouping.FILE: lambda path: path,
        Grouping.FOLDER: posixpath.dirname,
        Grouping.OWNER: owners_of,
        Grouping.SINGLE: lambda _: None,
    }
    together: dict[Hashable, list[str]] = {}
    for path in sorted(gains, key=os.fsencode):
        together.setdefault(key_of[by](path), []).append(path)
    groups = []
    for paths in together.values():
        title = _title(by, paths[0], owners_of)
        parts = list(_parts(paths, gains, most_files, most_lines))
        for number, part in enumerate(parts, 1):
            which = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            groups.append(Group(title + which, tuple(part)))
    return groups


def message(group: Group, *, run: str, model: str, docstrings: int, prefix: str = "") -> str:
    """Return the message of a commit.

    Args:
        group: what is in it.
        run: the run's id.
        model: that wrote the texts.
        docstrings: how many.
        prefix: begins the first line, such as `docs: `.
    """
    texts, files = _counted(docstrings, "docstring"), _counted(len(group.paths), "file")
    title = group.title if not prefix else prefix + group.title[:1].lower() + group.title[1:]
    return (
        f"{title}\n\n"
        f"{texts} in {files}, written by a model. Nothing but docstrings was added.\n\n"
        f"Backfill-Run: {_one_line(run)}\nBackfill-Model: {_one_line(model)}\n"
    )


def blame_ignore_lines(run: str, commits: Sequence[str]) -> str:
    """Return lines for `.git-blame-ignore-revs`; empty without commits.

    They serve where the body of a one-line function was moved: lines that are only added stay with the
    commit that added them, ignored or not. After a squash or a rebase the ids are others.
    """
    if not commits:
        return ""
    return "\n".join((f"# Docstrings of backfill {run}", *commits, ""))


class Branch:
    """A branch that takes commits; `branch` lends one."""

    def __init__(self, tree: Worktree, start: str) -> None:
        """Take a checkout that is on it.

        Args:
            tree: where commits are made.
            start: the commit's id where the branch begins.
        """
        self._tree = tree
        self._start = start

    def commit(self, changes: Sequence[Change], text: str) -> Made:
        """Commit the files that are on the branch as they were before they were edited.

        Args:
            changes: of different paths.
            text: the message.

        Raises:
            CommitRefused: a hook or a signature failed. The branch is as before, and may take others.
        """
        states = [(change, self._state(change)) for change in changes]
        wanted = {change.path: change.after for change, state in states if state is _State.BEFORE}
        commit = self._tree.commit(wanted, text) if wanted else None
        return Made(
            commit,
            tuple(wanted),
            tuple(change.path for change, state in states if state is _State.AFTER),
            tuple(change.path for change, state in states if state is _State.OTHER),
            tuple(path for path, after in wanted.items() if self._tree.content(path) != after),
        )

    def commits(self, run: str) -> list[str]:
        """Return the ids of a run's commits on this branch, first first, those of earlier tries too."""
        return self._tree.commits(self._start, f"Backfill-Run: {_one_line(run)}")

    def patches(self, folder: Path) -> list[Path]:
        r"""Write what the branch has more than its base into a folder, one mail for each commit.

        `git am` takes them; with `--keep-cr` if files have `\r\n`.
        """
        return self._tree.format_patches(self._start, folder)

    def _state(self, change: Change) -> _State:
        found = self._tree.content(change.path)
        if found is None:
            return _State.OTHER
        # Mostly this decides; else the user's file may differ by line ends that git does not keep.
        if found in (change.before, change.after):
            return _State.BEFORE if found == change.before else _State.AFTER
        held = self._tree.committed_id(change.path)
        for content, state in ((change.before, _State.BEFORE), (change.after, _State.AFTER)):
            if self._tree.blob_id(content, change.path) == held:
                return state
        return _State.OTHER


class _State(StrEnum):
    """What a file is on the branch."""

    BEFORE = "before"
    AFTER = "after"
    OTHER = "other"


@contextlib.contextmanager
def branch(git: Git, name: str | None, base: str = "HEAD", *, within: Path | None = None) -> Iterator[Branch]:
    """Lend a branch for commits, in a checkout of its own that is gone afterwards.

    A branch that is there is gone on with. A new one that got no commit is deleted.

    Args:
        git: the user's repository; index, working tree, HEAD and stash stay as they are.
        name: None for commits that are on no branch: they serve for `Branch.patches`.
        base: where a new branch begins.
        within: where to make the checkout; the system's place for temporary files by default.

    Raises:
        GitFailed: there is no such commit, the name is none for a branch, or the branch is checked out.
    """
    start = git.commit_id(base)
    if start is None:
        raise GitFailed(f"there is no commit `{base}`")
    tip = None if name is None else git.commit_id(f"refs/heads/{name}")
    is_new = False
    try:
        with worktree(git, tip or start, within=within) as tree:
            if name is not None:
                try:
                    tree.switch(name, is_new=tip is None)
                finally:
                    # A hook may fail when the branch is made already.
                    is_new = tip is None and tree.branch() == name
            yield Branch(tree, start)
    finally:
        if name is not None and is_new and git.commit_id(f"refs/heads/{name}") == start:
            delete_branch(git, name, start)


def _parts(
    paths: Sequence[str], gains: Mapping[str, int], most_files: int | None, most_lines: int | None
) -> Iterator[list[str]]:
    part: list[str] = []
    lines = 0
    for path in paths:
        is_full = most_files is not None and len(part) >= most_files
        if part and (is_full or (most_lines is not None and lines + gains[path] > most_lines)):
            yield part
            part, lines = [], 0
        part.append(path)
        lines += gains[path]
    yield part


def _title(by: Grouping, path: str, owners_of: Callable[[str], tuple[str, ...]]) -> str:
    """Return the first line of a commit, as any of its files tells it."""
    match by:
        case Grouping.FILE:
            return f"Add docstrings to {_shown(path)}"
        case Grouping.FOLDER:
            return f"Add docstrings to {_shown(posixpath.dirname(path)) or '.'}/"
        case Grouping.OWNER:
            owners = [_shown(one) for one in owners_of(path)]
            if not owners:
                return "Add docstrings to files without an owner"
            more = [f"and {_counted(len(owners) - _NAMED, 'other')}"] if len(owners) > _NAMED else []
            return " ".join(["Add docstrings for", ", ".join(owners[:_NAMED]), *more])
        case Grouping.SINGLE:
            return "Add docstrings"


def _shown(path: str) -> str:
    """Return a path or a name as one line of text."""
    return path if path.isprintable() else quoted(os.fsencode(path)).decode()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _one_line(value: str) -> str:
    return " ".join(value.split())
