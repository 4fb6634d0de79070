r"""Tell who owns a file of a repository, as its CODEOWNERS file says.

Owns: where that file is looked for, and what its lines mean: GitHub's rules
(docs.github.com, "About code owners"), and of GitLab's as much as makes its files readable: the place
`.gitlab/`, and headers of sections, whose owners are those of lines that name none. The last line that
matches a path decides. Does not ask a host whether an owner exists.

Patterns are those of gitignore(5) but for three things, all GitHub's: `docs/*` is the files in `docs` and
nothing deeper, and lines with `!` before the pattern or brackets in it are passed over. The library
`pathspec` does none of the three, and would have to be told each of them pattern by pattern; what is left is
one expression per line. A test compares it with `git check-ignore`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from codeherd_schema.errors import InvalidRequest

#: From the top of the repository; the first that is there is the one. GitHub's three, in its order.
PLACES: Final = (".github/CODEOWNERS", "CODEOWNERS", "docs/CODEOWNERS", ".gitlab/CODEOWNERS")
#: A word; a backslash makes what follows a part of it, also a space.
_WORD: Final = re.compile(r"(?:\\.|\S)+")
#: `[Documentation][2] @writers`; with `^` before it the section is optional.
_SECTION: Final = re.compile(r"\^?\[[^\]]+\](?:\[\d+\])?(?=\s|\Z)")
#: A character, or a run of wildcards that means the same as one.
_PIECE: Final = re.compile(r"\\.|\*+|.", re.DOTALL)
_BRACKET: Final = re.compile(r"(?<!\\)[\[\]]")


class NoOwnersFile(InvalidRequest):
    """The repository has no CODEOWNERS file."""

    code = "no_owners_file"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line."""

    pattern: re.Pattern[str]
    owners: tuple[str, ...]


class Owners:
    """What one CODEOWNERS file says."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Take the lines of such a file; those that mean nothing are passed over, as the hosts do."""
        # The last that matches decides.
        self._rules = list(_rules(lines))[::-1]

    @classmethod
    def read(cls, top: Path) -> Self:
        """Read the CODEOWNERS file of a repository.

        Args:
            top: its top folder.

        Raises:
            NoOwnersFile: there is none; the hint has the fix.
        """
        for place in PLACES:
            file = top / place
            if file.is_file():
                # Names in it may be no UTF-8, as paths may.
                return cls(os.fsdecode(file.read_bytes()).removeprefix("\ufeff").split("\n"))
        raise NoOwnersFile(
            f"the repository {top} has no CODEOWNERS file",
            hint=f"make one of {', '.join(PLACES)}, or say `--commit per-dir`",
        )

    def of(self, path: str) -> tuple[str, ...]:
        """Return a file's owners, sorted; empty if nobody owns it.

        Args:
            path: from the top of the repository, with `/`.
        """
        return next((rule.owners for rule in self._rules if rule.pattern.fullmatch(path)), ())


def _rules(lines: Iterable[str]) -> Iterator[_Rule]:
    # Owners of what names none itself: those of the section.
    usual: tuple[str, ...] = ()
    for line in map(str.strip, lines):
        section = _SECTION.match(line)
        if section is not None:
            usual = _owners(_words(line[section.end() :]))
            continue
        words = _words(line)
        if words and not words[0].startswith("!") and not _BRACKET.search(words[0]) and words[0].strip("/"):
            yield _Rule(_compiled(words[0]), _owners(words[1:]) or usual)


def _words(line: str) -> list[str]:
    """Return the words of a line up to a comment."""
    words: list[str] = []
    for word in _WORD.findall(line):
        if word.startswith("#"):
            break
        words.append(word)
    return words


def _owners(words: Sequence[str]) -> tuple[str, ...]:
    # `@user`, `@group/team` or an address; hosts pass over what is none.
    return tuple(sorted({word for word in words if "@" in word}))


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the expression that matches the paths of all files that a pattern means."""
    *folders, last = pattern.strip("/").split("/")
    if not folders and not pattern.startswith("/"):
        # Without a slash but at its end it means a name at any depth.
        folders = ["**"]
    parts = ["(?:[^/]+/)*" if one == "**" else f"{_expression(one)}/" for one in folders]
    if last == "**":
        parts.append(".+")
    elif pattern.endswith("/"):
        parts.append(f"{_expression(last)}/.+")
    elif last == "*":
        # What is in the folder and nothing deeper; as the only word it stands for every file.
        parts.append("[^/]+")
    else:
        # A folder means all that is below it.
        parts.append(f"{_expression(last)}(?:/.+)?")
    return re.compile("".join(parts), re.DOTALL)


def _expression(word: str) -> str:
    """Return the expression for one name in a path."""
    return "".join(map(_piece, _PIECE.findall(word)))


def _piece(piece: str) -> str:
    if piece.startswith("*"):
        return "[^/]*"
    if piece == "?":
        return "[^/]"
    return re.escape(piece[-1])
