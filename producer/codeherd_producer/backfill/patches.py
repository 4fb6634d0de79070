"""Write the difference between two versions of a file as a patch that `git apply` takes.

Owns: the form (git's extended unified diff) and git's quoting of paths. Its matching of lines is made for
files that gained lines: then nothing is ever taken out and put back. Knows nothing of repositories.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

#: Unchanged lines around each change.
_CONTEXT: Final = 3
_NO_NEWLINE: Final = b"\n\\ No newline at end of file\n"
#: What git writes with a letter (quote.c, `cq_lookup`); other bytes outside printable ASCII go as octals.
_LETTERS: Final = dict(zip(b'\a\b\t\n\v\f\r"\\', b'abtnvfr"\\', strict=True))


def unified(path: str, before: bytes, after: bytes, *, mode: int = 0o644) -> bytes:
    r"""Return the patch from one content of a file to the other; empty if they are equal.

    A line ends at `\n` only, as in git: `\r` is an ordinary byte.

    Args:
        path: from the top of the repository, with `/`; bytes that are no UTF-8 as in `os.fsdecode`.
        before: without NUL, as any text.
        after: likewise.
        mode: the file's, as `os.stat` has it.
    """
    if before == after:
        return b""
    raw = os.fsencode(path)
    # Git ends a name with a tab if there is a space in it: older tools would cut it there.
    old, new, end = quoted(b"a/" + raw), quoted(b"b/" + raw), b"\t\n" if b" " in raw else b"\n"
    parts = [
        b"diff --git %s %s\n" % (old, new),
        b"index %s..%s 10%s\n"
        % (_blob_id(before), _blob_id(after), b"0755" if mode & stat.S_IXUSR else b"0644"),
        b"--- " + old + end,
        b"+++ " + new + end,
    ]
    lines, others = _lines(before), _lines(after)
    for group in _hunks(lines, others):
        parts += _hunk(lines, others, group)
    return b"".join(parts)


def quoted(name: bytes) -> bytes:
    """Return a name as git writes it in a patch: with C's escapes, in quotes, if it is not plain."""
    plain = bytes(byte for byte in name if 0x20 <= byte < 0x7F and byte not in _LETTERS)
    if plain == name:
        return name
    return b'"' + b"".join(map(_escaped, name)) + b'"'


def _escaped(byte: int) -> bytes:
    if byte in _LETTERS:
        return b"\\%c" % _LETTERS[byte]
    return b"%c" % byte if 0x20 <= byte < 0x7F else b"\\%03o" % byte


def _blob_id(content: bytes) -> bytes:
    # Lets `git apply --3way` find the old version; a repository that counts by SHA-256 does without.
    head = b"blob %d\0" % len(content)
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest().encode()


def _lines(content: bytes) -> list[bytes]:
    return io.BytesIO(content).readlines()


#: A stretch of old lines and the new ones in its place: (first, end, first, end), from 0.
_Change = tuple[int, int, int, int]


def _hunks(before: Sequence[bytes], after: Sequence[bytes]) -> Iterator[list[_Change]]:
    """Yield the changes, together where their context would overlap or touch."""
    group: list[_Change] = []
    for change in _changes(before, after):
        if group and change[0] - group[-1][1] > 2 * _CONTEXT:
            yield group
            group = []
        group.append(change)
    yield group


def _changes(before: Sequence[bytes], after: Sequence[bytes]) -> Iterator[_Change]:
    i = j = 0
    for x, y in (*_pairs(before, after, 0, len(before), 0, len(after)), (len(before), len(after))):
        if (x, y) != (i, j):
            yield i, x, j, y
        i, j = x + 1, y + 1


def _hunk(before: Sequence[bytes], after: Sequence[bytes], group: Sequence[_Change]) -> Iterator[bytes]:
    first, last = group[0], group[-1]
    lead = min(_CONTEXT, first[0])
    tail = min(_CONTEXT, len(before) - last[1])
    yield b"@@ -%s +%s @@\n" % (
        _range(first[0] - lead, last[1] + tail),
        _range(first[2] - lead, last[3] + tail),
    )
    at = first[0] - lead
    for old_start, old_end, new_start, new_end in group:
        yield from _marked(b" ", before[at:old_start])
        yield from _marked(b"-", before[old_start:old_end])
        yield from _marked(b"+", after[new_start:new_end])
        at = old_end
    yield from _marked(b" ", before[at : at + tail])


def _range(start: int, end: int) -> bytes:
    # Nothing at all is "after line 0"; one line goes without its count, as git writes it.
    if start == end:
        return b"%d,0" % start
    return b"%d" % (start + 1) if end - start == 1 else b"%d,%d" % (start + 1, end - start)


def _marked(mark: bytes, lines: Sequence[bytes]) -> Iterator[bytes]:
    return (mark + line if line.endswith(b"\n") else mark + line + _NO_NEWLINE for line in lines)


def _pairs(
    before: Sequence[bytes], after: Sequence[bytes], i: int, i_end: int, j: int, j_end: int
) -> Iterator[tuple[int, int]]:
    """Yield which old line is which new one, in order: between lines that occur once, again and again.

    If the new lines are the old ones and more, every old line finds its place. `difflib` would too, but
    it compares each blank line with every other: minutes for a large file.
    """
    while i < i_end and j < j_end and before[i] == after[j]:
        yield i, j
        i, j = i + 1, j + 1
    tail = 0
    while i < i_end and j < j_end and before[i_end - 1] == after[j_end - 1]:
        i_end, j_end, tail = i_end - 1, j_end - 1, tail + 1
    anchors = _anchors(before, after, i, i_end, j, j_end)
    if not anchors:
        yield from _in_order(before, after, i, i_end, j, j_end)
    for x, y in (*anchors, (i_end, j_end)) if anchors else ():
        yield from _pairs(before, after, i, x, j, y)
        if x < i_end:
            yield x, y
        i, j = x + 1, y + 1
    yield from ((i_end + n, j_end + n) for n in range(tail))


def _anchors(
    before: Sequence[bytes], after: Sequence[bytes], i: int, i_end: int, j: int, j_end: int
) -> list[tuple[int, int]]:
    """Return the lines that occur once in both stretches: the most that are in the same order."""
    counts = Counter(before[i:i_end])
    others = Counter(after[j:j_end])
    places = {line: y for y, line in enumerate(after[j:j_end], j) if others[line] == 1}
    shared = [
        (x, places[line]) for x, line in enumerate(before[i:i_end], i) if counts[line] == 1 and line in places
    ]
    # The longest rising run of new places: piles of patience, each card knows the one to its left.
    tops: list[int] = []
    piles: list[tuple[int, int]] = []
    left: dict[tuple[int, int], tuple[int, int] | None] = {}
    for pair in shared:
        pile = bisect.bisect_left(tops, pair[1])
        left[pair] = piles[pile - 1] if pile else None
        tops[pile : pile + 1] = [pair[1]]
        piles[pile : pile + 1] = [pair]
    run: list[tuple[int, int]] = []
    pair_or_none = piles[-1] if piles else None
    while pair_or_none is not None:
        run.append(pair_or_none)
        pair_or_none = left[pair_or_none]
    return run[::-1]


def _in_order(
    before: Sequence[bytes], after: Sequence[bytes], i: int, i_end: int, j: int, j_end: int
) -> list[tuple[int, int]]:
    """Return the first place for each old line if all have one, else nothing."""
    found = []
    for y in range(j, j_end):
        if i == i_end:
            break
        if before[i] == after[y]:
            found.append((i, y))
            i += 1
    return found if i == i_end else []
