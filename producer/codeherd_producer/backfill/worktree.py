"""A checkout of its own beside the user's, where commits are made as the user would make them.

Owns: the folder from its making to its removal, also after a kill, and the commands inside it. The user's
index, working tree, HEAD and stash stay as they are. Hooks run, and the user's name and signature are used.
Does not decide what is committed (`commits`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from codeherd_producer.backfill.git import Git, GitFailed, run

#: Begins the name of the folder that holds a checkout and its lock.
_HOLDER: Final = "codeherd-backfill-"
#: Hooks run in the user's environment.
_AS_USER: Final[Mapping[str, str]] = {}


class CommitRefused(GitFailed):
    """A hook or setting of the repository refused the commit; nothing of it was kept."""

    code = "commit_refused"


@contextlib.contextmanager
def worktree(git: Git, commit: str, *, within: Path | None = None) -> Iterator[Worktree]:
    """Lend a checkout of a commit, on no branch; it is removed at the end, whatever happened.

    Args:
        git: the user's repository.
        commit: id.
        within: where to make its folder; the system's place for temporary files by default.

    Raises:
        GitFailed: git refused, or a hook for checkouts did.
    """
    _remove_leftovers(git)
    holder = Path(tempfile.mkdtemp(prefix=_HOLDER, dir=within)).absolute()
    try:
        with (holder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tree = Worktree(holder / "tree", git.hooks_folder())
            try:
                tree.add(git, commit)
                yield tree
            finally:
                _remove(git, tree.top)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


class Worktree:
    """A checkout; `worktree` lends one. Paths are from its top, with `/`."""

    def __init__(self, top: Path, hooks: Path | None) -> None:
        """Name the folder.

        Args:
            top: of the checkout.
            hooks: the folder that the user has set for them; seen from here it might not be there, since
                only what is tracked is.
        """
        self.top = top
        self._git = Git(top)
        self._settings = [] if hooks is None else ["-c", f"core.hooksPath={hooks}"]

    def add(self, git: Git, commit: str) -> None:
        """Make the checkout."""
        self._run(["worktree", "add", "--quiet", "--detach", str(self.top), commit], folder=git.top)

    def switch(self, branch: str, *, is_new: bool) -> None:
        """Go on a branch.

        Raises:
            GitFailed: the name is none, or the branch is checked out elsewhere.
        """
        self._run(["switch", "--quiet", *(["--no-track", "--create"] if is_new else ["--no-guess"]), branch])

    def branch(self) -> str | None:
        """Return the branch's name; None if it is on none."""
        try:
            found = run(self.top, ["symbolic-ref", "--quiet", "HEAD"])
        except GitFailed:
            return None
        return os.fsdecode(found.removesuffix(b"\n")).removeprefix("refs/heads/")

    def content(self, path: str) -> bytes | None:
        """Return what a file holds; None if there is no such file."""
        file = self.top / path
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return file.read_bytes() if stat.S_ISREG(file.lstat().st_mode) else None
        return None

    def committed_id(self, path: str) -> str | None:
        """Return the id of what git holds for a path; None if it knows no such file."""
        line = run(self.top, ["--literal-pathspecs", "ls-files", "-z", "--stage", "--", path])
        return line.split(b" ")[1].decode() if line else None

    def blob_id(self, content: bytes, path: str) -> str:
        """Return the id that the content would have at this path."""
        return self._git.blob_id(content, path)

    def commit(self, contents: Mapping[str, bytes], message: str) -> str:
        """Write files that are there, commit them, and return the commit's id.

        Raises:
            CommitRefused: the hint has the last of what git and its hooks said.
            OSError: the disk refused; as in every error, the checkout is as before.
        """
        try:
            for path, content in contents.items():
                (self.top / path).write_bytes(content)
            paths = b"".join(os.fsencode(path) + b"\0" for path in contents)
            # Literal: a name may look like a pattern. Nobody asked about line ends, so no warnings of them.
            self._run(
                [
                    "--literal-pathspecs",
                    "-c",
                    "core.safecrlf=false",
                    "add",
                    "--pathspec-from-file=-",
                    "--pathspec-file-nul",
                ],
                given=paths,
            )
            try:
                # Our message is UTF-8, whatever the user's are.
                self._run(
                    ["-c", "i18n.commitEncoding=UTF-8", "commit", "--quiet", "--file=-"],
                    given=message.encode(),
                )
            except GitFailed as err:
                raise CommitRefused(hint=_said(err)) from err
        except Exception:
            # If a hook broke the checkout, the refusal tells more than this would.
            with contextlib.suppress(GitFailed):
                self._run(["reset", "--quiet", "--hard"])
            raise
        return self.head()

    def head(self) -> str:
        """Return the id of the last commit."""
        return run(self.top, ["rev-parse", "HEAD"]).strip().decode()

    def commits(self, since: str, line: str) -> list[str]:
        """Return the commits after one, first first, whose message has a line with these words in it."""
        found = run(
            self.top,
            ["log", "--reverse", "--format=%H", "--fixed-strings", f"--grep={line}", f"{since}..HEAD"],
        )
        return found.decode().split()

    def format_patches(self, since: str, folder: Path) -> list[Path]:
        """Write the commits after one as mails into a folder, and return their files."""
        plain = ["--no-color", "--src-prefix=a/", "--dst-prefix=b/"]
        names = run(
            self.top,
            ["format-patch", *plain, f"--output-directory={folder.absolute()}", f"{since}..HEAD"],
        )
        return [Path(os.fsdecode(name)) for name in names.split(b"\n") if name]

    def _run(
        self, arguments: Sequence[str], *, given: bytes | None = None, folder: Path | None = None
    ) -> bytes:
        """Run a command that may run hooks."""
        return run(
            folder or self.top, [*self._settings, *arguments], given=given, plain=_AS_USER, timeout_s=None
        )


def delete_branch(git: Git, name: str, commit: str) -> None:
    """Delete a branch that is still at a commit."""
    run(git.top, ["update-ref", "-d", f"refs/heads/{name}", commit])


def _said(err: GitFailed) -> str:
    lines = [err.message, *(err.hint or "").splitlines()]
    return "\n".join(lines[-20:])


def _remove(git: Git, top: Path) -> None:
    # Without the folder git has no reason to keep its entry, whatever hooks did in there.
    shutil.rmtree(top, ignore_errors=True)
    with contextlib.suppress(GitFailed):
        # Twice: it may be locked too.
        run(git.top, ["worktree", "remove", "--force", "--force", str(top)])


def _remove_leftovers(git: Git) -> None:
    """Remove the checkouts of runs that were killed: git would say that their branch is in use."""
    for top in git.worktrees():
        if top.parent.name.startswith(_HOLDER) and not _is_alive(top.parent):
            _remove(git, top)
            shutil.rmtree(top.parent, ignore_errors=True)


def _is_alive(holder: Path) -> bool:
    try:
        with (holder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
