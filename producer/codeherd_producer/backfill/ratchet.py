"""Keep docstring coverage from falling, by a small file that is committed with the code.

Owns: the file's form, and when coverage has fallen, risen or held. Does not count (`coverage`), and does not
decide what a fall costs.

    {
      "ignoring": ["--ignore-magic"],
      "files": {
        "package/a.py": "8/10",
        "package/b.py": "3/3"
      }
    }

A line for each file, covered/total: two branches that document different files merge without a conflict, the
sum of the lines is right afterwards, and after a fall they tell where to look. The totals alone are judged:
symbols move between files and files get new names, and nobody shall be stopped for that.

Coverage has fallen when a smaller share is covered *and* more is missing. Both, because each alone is a false
alarm: documented code that is deleted makes the share smaller, and a large new package with one gap leaves
more missing, yet no one made anything worse. The numbers are compared as they are, never rounded. The file is
written anew only when the share rose or less is missing, so most changes leave it alone.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

from codeherd_producer.backfill.coverage import Count, Coverage, Ignored
from codeherd_schema.errors import InvalidRequest

#: Covered and total symbols of a file.
_NUMBERS = re.compile(r"([0-9]{1,18})/([0-9]{1,18})")


class RatchetUnreadable(InvalidRequest):
    """The ratchet's file is not one: solve its merge conflict, or delete it and start anew."""

    code = "ratchet_unreadable"


class RatchetDiffers(InvalidRequest):
    """The ratchet's numbers are of something else than was measured now."""

    code = "ratchet_differs"


class Verdict(StrEnum):
    """What became of coverage."""

    #: There was no file; there is one now.
    STARTED = "started"
    BETTER = "better"
    HELD = "held"
    FELL = "fell"


@dataclass(frozen=True, slots=True)
class Record:
    """What the file holds."""

    #: `Ignored.flags()`: numbers that were counted otherwise cannot be compared.
    ignoring: tuple[str, ...]
    files: Mapping[str, Count]

    @property
    def total(self) -> Count:
        """The numbers of all files together."""
        counts = self.files.values()
        return Count(sum(count.total for count in counts), sum(count.covered for count in counts))


@dataclass(frozen=True, slots=True)
class Change:
    """A file in which more is missing than was recorded."""

    path: str
    #: None: it is new.
    before: Count | None
    now: Count


@dataclass(frozen=True, slots=True)
class Turn:
    """How coverage stands against the record."""

    verdict: Verdict
    #: None when the ratchet starts.
    before: Count | None
    now: Count
    #: Files with more missing than before, whatever the verdict; the greatest rise first.
    worse: tuple[Change, ...]
    #: What is to be in the file from now on.
    record: Record


def hold(path: Path, coverage: Coverage, ignoring: Ignored) -> Turn:
    """Compare coverage with a ratchet's file, and write it when there is none or coverage is better.

    Raises:
        RatchetUnreadable: the file is broken.
        RatchetDiffers: other flags, or none of the recorded files is there: another folder.
    """
    record = read(path)
    turn = judge(record, coverage, ignoring)
    if turn.record != record:
        write(path, turn.record)
    return turn


def judge(record: Record | None, coverage: Coverage, ignoring: Ignored) -> Turn:
    """Compare coverage with a record; writes nothing.

    A file that is recorded but was skipped now counts as it did: a syntax error hides no gap.

    Raises:
        RatchetDiffers: other flags, or none of the recorded files is there.
    """
    now = Record(
        tuple(ignoring.flags()), {file.path: Count(file.total, file.covered) for file in coverage.files}
    )
    if record is None:
        return Turn(Verdict.STARTED, None, now.total, (), now)
    if record.ignoring != now.ignoring:
        raise RatchetDiffers(
            f"the ratchet counts with {_named(record.ignoring)}, this run with {_named(now.ignoring)}",
            hint="use the same flags, or delete the ratchet's file and start anew",
        )
    skipped = {path: count for path, count in record.files.items() if _is_skipped(path, coverage)}
    now = Record(now.ignoring, {**skipped, **now.files})
    if record.files and not record.files.keys() & now.files.keys():
        raise RatchetDiffers(
            f"none of the {len(record.files)} recorded files is in this folder",
            hint="measure the folder that the ratchet was made for, or delete its file and start anew",
        )
    before, after = record.total, now.total
    share, missing = _share(after) - _share(before), after.missing - before.missing
    if share < 0 and missing > 0:
        verdict = Verdict.FELL
    else:
        verdict = Verdict.BETTER if share > 0 or missing < 0 else Verdict.HELD
    # What is kept is the state that was last written: a record that followed every change would be noise.
    return Turn(verdict, before, after, _worse(record, now), now if verdict is Verdict.BETTER else record)


def read(path: Path) -> Record | None:
    """Return what a ratchet's file holds; None if there is no file.

    Raises:
        RatchetUnreadable: it is not a ratchet's.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise RatchetUnreadable(f"{path}: no JSON: {err}") from err
    flags = document.get("ignoring") if isinstance(document, dict) else None
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(flags, list) or not isinstance(files, dict):
        raise RatchetUnreadable(f"{path}: `ignoring` or `files` is missing")
    return Record(tuple(map(str, flags)), {name: _count(path, name, files[name]) for name in files})


def write(path: Path, record: Record) -> None:
    """Put a record into a ratchet's file, whole or not at all."""
    files = {name: f"{count.covered}/{count.total}" for name, count in sorted(record.files.items())}
    text = json.dumps({"ignoring": record.ignoring, "files": files}, indent=2) + "\n"
    # Beside the file itself: a link stays one.
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(text.encode("ascii"))
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _count(path: Path, name: str, numbers: object) -> Count:
    match = _NUMBERS.fullmatch(numbers) if isinstance(numbers, str) else None
    if match is None or int(match[1]) > int(match[2]):
        raise RatchetUnreadable(f"{path}: `{name}` has no numbers such as 3/4")
    return Count(total=int(match[2]), covered=int(match[1]))


def _is_skipped(path: str, coverage: Coverage) -> bool:
    return any(path == one.path or path.startswith(f"{one.path}/") for one in coverage.skipped)


def _share(count: Count) -> Fraction:
    return Fraction(count.covered, count.total) if count.total else Fraction(1)


def _worse(record: Record, now: Record) -> tuple[Change, ...]:
    changes = [Change(path, record.files.get(path), count) for path, count in now.files.items()]
    risen = [change for change in changes if _rise(change) > 0]
    return tuple(sorted(risen, key=lambda change: (-_rise(change), change.path)))


def _rise(change: Change) -> int:
    return change.now.missing - (change.before.missing if change.before else 0)


def _named(flags: tuple[str, ...]) -> str:
    return " ".join(flags) or "no flags"
