"""The one door to git: what a repository says of its files, and the few things that are done to it.

Owns: the commands, their quoting and their errors. Does not decide anything, and never touches the user's
index or working tree: commits are made in a `worktree` of their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from codeherd_schema.errors import InvalidRequest

#: Seconds for any one command that runs no hook.
TIMEOUT_S: Final = 300.0
#: Nothing of the user's own taste may change what is read.
PLAIN: Final = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat", "GIT_TERMINAL_PROMPT": "0"}
#: Would put another repository or index in place of the folder's: git sets them where it runs a hook
#: (git-rev-parse(1), --local-env-vars).
_ELSEWHERE: Final = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_DIR",
        "GIT_GRAFT_FILE",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_SHALLOW_FILE",
        "GIT_WORK_TREE",
    }
)


class GitFailed(InvalidRequest):
    """Git refused; the message is its own first line, the hint what else it or a hook said."""

    code = "git_failed"


class Git:
    """One repository."""

    def __init__(self, top: Path) -> None:
        """Take the top folder of a working tree; `of` finds it."""
        self.top = top

    @classmethod
    def of(cls, folder: Path) -> Git | None:
        """Return the repository around a folder; None if there is none, or no git."""
        try:
            top = run(folder, ["rev-parse", "--show-toplevel"])
        except (GitFailed, FileNotFoundError):
            return None
        return cls(Path(os.fsdecode(top.rstrip(b"\n"))))

    def files(self) -> list[str]:
        """Return the paths of tracked files, and of others that are not ignored; submodules are left out."""
        staged = run(self.top, ["ls-files", "-z", "--stage"])
        tracked = [line.split(b"\t", 1) for line in staged.split(b"\0") if line]
        # Mode 160000 is a submodule's commit.
        names = {name for facts, name in tracked if not facts.startswith(b"160000")}
        others = run(self.top, ["ls-files", "-z", "--others", "--exclude-standard"])
        return sorted(os.fsdecode(name) for name in names | set(filter(None, others.split(b"\0"))))

    def dirty(self) -> set[str]:
        """Return the paths of files that differ from the last commit, untracked ones too."""
        fields = iter(run(self.top, ["status", "-z", "--porcelain=v1", "--untracked-files=all"]).split(b"\0"))
        found = set()
        for field in fields:
            if not field:
                continue
            found.add(os.fsdecode(field[3:]))
            if field[:1] in b"RC":
                found.add(os.fsdecode(next(fields)))
        return found

    def marked(self, paths: Sequence[str], attributes: Collection[str]) -> set[str]:
        """Return those of the paths that have one of these attributes set (gitattributes)."""
        if not paths:
            return set()
        answer = run(
            self.top,
            ["check-attr", "-z", "--stdin", *attributes],
            given=b"".join(os.fsencode(path) + b"\0" for path in paths),
        )
        triples = _by_three(answer.split(b"\0")[:-1])
        return {os.fsdecode(path) for path, _, value in triples if value in (b"set", b"true")}

    def changed_since(self, reference: str) -> set[str]:
        """Return the paths of files that were changed after a commit branched off, uncommitted ones too.

        Raises:
            GitFailed: there is no such commit.
        """
        base = run(self.top, ["merge-base", "--end-of-options", reference, "HEAD"]).strip().decode()
        names = run(self.top, ["diff", "-z", "--name-only", "--diff-filter=d", base])
        return {os.fsdecode(name) for name in names.split(b"\0") if name} | self.dirty()

    def blob_id(self, content: bytes, path: str | None = None) -> str:
        """Return the id that git gives to this content; with a path, after the conversions set for it."""
        where = [] if path is None else [f"--path={path}"]
        return run(self.top, ["hash-object", "--stdin", *where], given=content).strip().decode()

    def commit_id(self, reference: str) -> str | None:
        """Return the commit that a reference names; None if there is none."""
        try:
            found = run(self.top, ["rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}"])
        except GitFailed:
            return None
        return found.strip().decode()

    def prefix(self, folder: Path) -> str:
        """Return what paths below a folder begin with, seen from the top: "" or such as `pkg/`."""
        return os.fsdecode(run(folder, ["rev-parse", "--show-prefix"]).removesuffix(b"\n"))

    def hooks_folder(self) -> Path | None:
        """Return the folder of hooks that the user has set; None for git's own."""
        try:
            found = run(self.top, ["config", "-z", "--type=path", "--get", "core.hooksPath"])
        except GitFailed:
            return None
        return self.top / os.fsdecode(found.removesuffix(b"\0"))

    def worktrees(self) -> list[Path]:
        """Return the folders of all working trees of the repository; some may be gone."""
        lines = run(self.top, ["worktree", "list", "--porcelain"]).split(b"\n")
        return [Path(os.fsdecode(line[9:])) for line in lines if line.startswith(b"worktree ")]

    def applies(self, patch: bytes) -> bool:
        """Whether a patch would apply to the working tree."""
        try:
            run(self.top, ["apply", "--check", "--whitespace=nowarn"], given=patch)
        except GitFailed:
            return False
        return True


def _by_three(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
    return ((fields[i], fields[i + 1], fields[i + 2]) for i in range(0, len(fields) - 2, 3))


def run(
    folder: Path,
    arguments: Sequence[str],
    *,
    given: bytes | None = None,
    plain: Mapping[str, str] = PLAIN,
    timeout_s: float | None = TIMEOUT_S,
) -> bytes:
    """Run one command in a folder and return what it printed.

    Args:
        folder: decides which repository; the environment has no say in that.
        arguments: without `git`.
        given: its input.
        plain: set in its environment, and in that of the hooks that it runs.
        timeout_s: None for commands that run the user's hooks, which know best how long they take.

    Raises:
        GitFailed: its status was not 0, or it took too long.
    """
    verb = next(word for word in arguments if not word.startswith("-") and "=" not in word)
    try:
        done = subprocess.run(  # noqa: S603 -- our own words, and paths and references that cannot be options
            ["git", *arguments],  # noqa: S607 -- the user's own git
            cwd=folder,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            env={name: value for name, value in os.environ.items() if name not in _ELSEWHERE} | dict(plain),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise GitFailed(f"git {verb}: not done after {err.timeout:g} s") from err
    if done.returncode != 0:
        said, _, more = done.stderr.decode(errors="replace").strip().partition("\n")
        raise GitFailed(f"git {verb}: {said or f'status {done.returncode}'}", hint=more.strip() or None)
    return done.stdout
