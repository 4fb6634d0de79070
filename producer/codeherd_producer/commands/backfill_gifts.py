"""Hand over what a backfill has accepted: as a patch, in place, as patch files, or as commits on a branch.

Owns: the options that say which, and what is said about files that were left alone. Does not know how
docstrings get into a file (`backfill.outcome`), or how any of these is made.
"""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

import click

from codeherd_producer.backfill import reports
from codeherd_producer.backfill.commits import (
    Change,
    Grouping,
    blame_ignore_lines,
    branch,
    grouped,
    message,
)
from codeherd_producer.backfill.git import Git
from codeherd_producer.backfill.outcome import EditedFile, LeftAlone, Loss, edited_file, edited_files
from codeherd_producer.backfill.owners import Owners
from codeherd_producer.backfill.patches import unified
from codeherd_producer.backfill.worktree import CommitRefused
from codeherd_producer.backfill.writing import NotWritten, replace
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import note, say
from codeherd_schema.backfills import Backfills, File, FileState, Run
from codeherd_schema.errors import InvalidRequest

gift_options = options(
    click.option("--in-place", is_flag=True, help="Write the files themselves, each whole or not at all."),
    click.option(
        "--patches",
        type=click.Path(file_okay=False, path_type=Path),
        help="One patch per file in this folder.",
    ),
    click.option(
        "--branch", "branch_name", metavar="NAME", help="Commit to this branch, in a worktree of its own."
    ),
    click.option(
        "--format-patch",
        type=click.Path(file_okay=False, path_type=Path),
        help="Commits as mails for `git am` in this folder.",
    ),
    click.option(
        "--commit",
        "grouping",
        type=click.Choice([one.value for one in Grouping]),
        help="What shares a commit [per-file].",
    ),
    click.option("--max-files", type=click.IntRange(1), help="Most files of a commit."),
    click.option(
        "--max-lines", type=click.IntRange(1), help="Most new lines of a commit; a file is never divided."
    ),
    click.option("--commit-prefix", default="", metavar="TEXT", help="Begins each commit's first line."),
)


@dataclass(frozen=True, slots=True)
class Gift:
    """Where the docstrings go; to stdout without anything."""

    in_place: bool
    patches: Path | None
    branch: str | None
    mails: Path | None
    grouping: Grouping
    max_files: int | None
    max_lines: int | None
    prefix: str

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Take the options of this module, by the names of their parameters.

        Raises:
            UsageError: more than one place is named, or commits are described and none is made.
        """
        places = [given["in_place"], given["patches"], given["branch_name"] or given["format_patch"]]
        if sum(bool(place) for place in places) > 1:
            raise click.UsageError("--in-place, --patches and --branch do not go together")
        of_commits = [given[name] for name in ("grouping", "max_files", "max_lines", "commit_prefix")]
        if any(of_commits) and not places[-1]:
            raise click.UsageError(
                "--commit, --max-files, --max-lines and --commit-prefix go with --branch or --format-patch"
            )
        return cls(
            in_place=given["in_place"],
            patches=given["patches"],
            branch=given["branch_name"],
            mails=given["format_patch"],
            grouping=Grouping(given["grouping"] or Grouping.FILE),
            max_files=given["max_files"],
            max_lines=given["max_lines"],
            prefix=given["commit_prefix"],
        )

    def check(self, root: Path) -> None:
        """See whether there is such a place, before hours are spent on what goes there.

        Raises:
            InvalidRequest: commits are asked for outside of a repository, or before its first commit.
            NoOwnersFile: they are by owner, and no file says who owns what.
        """
        if self.branch is None and self.mails is None:
            return
        git = Git.of(root)
        if git is None:
            raise InvalidRequest(
                f"{root} is in no git repository", hint="--in-place writes the files themselves"
            )
        if git.commit_id("HEAD") is None:
            raise InvalidRequest(f"the repository {git.top} has no commit to begin a branch at")
        if self.grouping is Grouping.OWNER:
            Owners.read(git.top)

    @property
    def has_place(self) -> bool:
        """Whether it goes anywhere but to stdout."""
        return self.in_place or any((self.patches, self.branch, self.mails))


def give(rows: Backfills, run: Run, gift: Gift) -> None:
    """Hand over every file that is done.

    Raises:
        GitFailed: the branch cannot be made, or a hook refused a commit.
        InvalidRequest: commits are asked for outside of a repository.
    """
    if gift.in_place:
        _write(rows, run)
    elif gift.branch or gift.mails:
        _commit(rows, run, gift)
    else:
        _print(rows, run, gift.patches)


def reported(rows: Backfills, run: Run, form: str) -> str:
    """Return the report of a run in one of the forms of `backfill.reports`."""
    about = reports.About(run=run.id, model=run.model, version=version("codeherd"))
    write = {
        "markdown": reports.as_markdown,
        "json": reports.as_json,
        "sarif": reports.as_sarif,
        "rdjson": reports.as_rdjson,
    }[form]
    return write(_rows(rows, run), about)


def _rows(rows: Backfills, run: Run) -> Iterator[reports.Row]:
    after = ""
    while files := rows.files(run.id, states=list(FileState), after=after):
        for file in files:
            for target in rows.targets(file.id):
                status, reason = reports.Status(target.state.value), target.reason
                if file.state is FileState.CHANGED:
                    status, reason = reports.Status.SKIPPED, file.reason
                yield reports.Row(
                    path=file.path,
                    line=target.line,
                    name=target.name,
                    kind=target.kind,
                    status=status,
                    reason=None if status is reports.Status.ACCEPTED else reason,
                    score=target.score if status is reports.Status.ACCEPTED else None,
                    text=target.text if status is reports.Status.ACCEPTED else None,
                )
        after = files[-1].path


#: Also what was handed over or had changed: the planned bytes may be back, and they alone decide.
_JUDGED: Final = (FileState.DONE, FileState.CHANGED, FileState.APPLIED, FileState.COMMITTED)


def _done(rows: Backfills, run: Run) -> Iterator[EditedFile]:
    """Yield the files that can be handed over; say what was carried over, and of the others why not."""
    for found in edited_files(rows, run, states=_JUDGED):
        match found:
            case EditedFile(file, is_carried=True):
                say(
                    f"{file.path} was changed since it was planned: "
                    f"{_counted(len(found.names), 'docstring')} carried over{_told(', ', found.lost)}"
                )
                yield found
            case EditedFile():
                yield found
            case LeftAlone(file, has_docstrings=True):
                rows.set_file_state(file.id, FileState.APPLIED)
                note(f"{file.path} has its docstrings already")
            case LeftAlone(file, fault=str(fault)):
                say(f"{file.path} is left alone: {fault}")
            case LeftAlone(file, reason=reason, lost=lost):
                changed = f"changed since it was planned; {reason}"
                rows.set_file_state(file.id, FileState.CHANGED, changed)
                say(
                    f"{file.path} was changed since it was planned, and is left alone: "
                    f"{reason}{_told('; ', lost)}"
                )


def _told(before: str, lost: Mapping[Loss, int]) -> str:
    """Say how many texts nobody gets; nothing if there are none."""
    if not lost:
        return ""
    reasons = ", ".join(f"{count} {loss}" for loss, count in sorted(lost.items()))
    return f"{before}{sum(lost.values())} left ({reasons}): a new run asks for what still lacks one"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _print(rows: Backfills, run: Run, folder: Path | None) -> None:
    inside = _inside(run)
    for found in _done(rows, run):
        mode = stat.S_IMODE((Path(run.root) / found.file.path).stat().st_mode)
        patch = unified(inside + found.file.path, found.before, found.after, mode=mode)
        if folder is None:
            sys.stdout.buffer.write(patch)
            continue
        target = folder / f"{found.file.path}.patch"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(patch)
    sys.stdout.buffer.flush()


def _write(rows: Backfills, run: Run) -> None:
    for found in _done(rows, run):
        try:
            replace(Path(run.root) / found.file.path, hashlib.sha256(found.before).hexdigest(), found.after)
        except NotWritten as err:
            say(f"left alone: {err.message}")
        else:
            rows.set_file_state(found.file.id, FileState.APPLIED)


def _commit(rows: Backfills, run: Run, gift: Gift) -> None:
    git, inside = Git.of(Path(run.root)), _inside(run)
    if git is None:
        raise InvalidRequest(f"{run.root} is in no git repository any more")
    files: dict[str, File] = {}
    gains: dict[str, int] = {}
    for found in _done(rows, run):
        files[inside + found.file.path] = found.file
        gains[inside + found.file.path] = found.after.count(b"\n") - found.before.count(b"\n")
    owners = Owners.read(git.top) if gift.grouping is Grouping.OWNER else Owners(())
    groups = grouped(
        gains,
        gift.grouping,
        owners_of=owners.of,
        most_files=gift.max_files,
        most_lines=gift.max_lines,
    )
    refused: CommitRefused | None = None
    with branch(git, gift.branch) as target:
        for group in groups:
            # Read again: all contents at once may be more than memory holds.
            edits = [(path, edited_file(rows, run, files[path])) for path in group.paths]
            edited = {path: edit for path, edit in edits if isinstance(edit, EditedFile)}
            count = sum(len(edit.names) for edit in edited.values())
            text = message(group, run=run.id, model=run.model, docstrings=count, prefix=gift.prefix)
            try:
                made = target.commit([Change(path, e.before, e.after) for path, e in edited.items()], text)
            except CommitRefused as err:
                refused = err
                say(f"{group.title}: {err.message}")
                continue
            for path in made.changed:
                say(f"{path} is another one on the branch, and is left alone")
            for path in made.altered:
                say(f"{path} was altered by a hook: look at it")
            for path in (*made.committed, *made.known):
                rows.set_file_state(files[path].id, FileState.COMMITTED)
        commits = target.commits(run.id)
        if gift.mails is not None:
            target.patches(gift.mails)
    if refused is not None:
        raise refused
    note(
        f"{len(commits)} commit{'' if len(commits) == 1 else 's'}"
        + (f" on {gift.branch}" if gift.branch else "")
    )
    if commits:
        note("for .git-blame-ignore-revs:\n" + blame_ignore_lines(run.id, commits))


def _inside(run: Run) -> str:
    """Return the path of a run's folder from the top of its repository, with a slash; mostly empty."""
    git = Git.of(Path(run.root))
    return "" if git is None else git.prefix(Path(run.root))
