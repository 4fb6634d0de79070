"""The one door to git: what a repository says of its files, and the few things that are done to it.

Owns: the commands, their quoting and their errors. Does not decide anything, never touches the user's index
or working tree, and never skips a hook.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from codeherd_schema.errors import InvalidRequest

#: Seconds for any one command.
TIMEOUT_S: Final = 300.0
#: Nothing of the user's own taste may change what is read.
_PLAIN: Final = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat", "GIT_TERMINAL_PROMPT": "0"}


class GitFailed(InvalidRequest):
    """Git refused; the message is its own first line."""

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
            top = _run(folder, ["rev-parse", "--show-toplevel"])
        except (GitFailed, FileNotFoundError):
            return None
        return cls(Path(os.fsdecode(top.rstrip(b"\n"))))

    def files(self) -> list[str]:
        """Return the paths of tracked files, and of others that are not ignored; submodules are left out."""
        staged = _run(self.top, ["ls-files", "-z", "--stage"])
        tracked = [line.split(b"\t", 1) for line in staged.split(b"\0") if line]
        # Mode 160000 is a submodule's commit.
        names = {name for facts, name in tracked if not facts.startswith(b"160000")}
        others = _run(self.top, ["ls-files", "-z", "--others", "--exclude-standard"])
        return sorted(os.fsdecode(name) for name in names | set(filter(None, others.split(b"\0"))))

    def dirty(self) -> set[str]:
        """Return the paths of files that differ from the last commit, untracked ones too."""
        fields = iter(
            _run(self.top, ["status", "-z", "--porcelain=v1", "--untracked-files=all"]).split(b"\0")
        )
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
        answer = _run(
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
        base = _run(self.top, ["merge-base", "--end-of-options", reference, "HEAD"]).strip().decode()
        names = _run(self.top, ["diff", "-z", "--name-only", "--diff-filter=d", base])
        return {os.fsdecode(name) for name in names.split(b"\0") if name} | self.dirty()

    def blob_id(self, content: bytes) -> str:
        """Return the id that git gives to this content."""
        return _run(self.top, ["hash-object", "--stdin"], given=content).strip().decode()

    def applies(self, patch: bytes) -> bool:
        """Whether a patch would apply to the working tree."""
        try:
            _run(self.top, ["apply", "--check", "--whitespace=nowarn"], given=patch)
        except GitFailed:
            return False
        return True


def _by_three(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
    return ((fields[i], fields[i + 1], fields[i + 2]) for i in range(0, len(fields) - 2, 3))


def _run(folder: Path, arguments: Sequence[str], *, given: bytes | None = None) -> bytes:
    done = subprocess.run(  # noqa: S603 -- our own words, and paths and references that cannot be options
        ["git", *arguments],  # noqa: S607 -- the user's own git
        cwd=folder,
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        env=os.environ | _PLAIN,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise GitFailed(f"git {arguments[0]}: {said or f'status {done.returncode}'}")
    return done.stdout
