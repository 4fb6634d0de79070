"""What a run of a backfill, its files and their targets can be, and which moves are legal.

Owns: the words and what each promises. Does not know how a move is made (`codeherd_schema.backfills`).

    PLANNED -> ASKED -> DONE -> APPLIED -> COMMITTED
    PLANNED -> DONE                 nothing could be asked
    PLANNED -> SKIPPED
    PLANNED -> PLANNED | DONE       changed before anything was asked: planned anew, as another row
    PLANNED | ASKED | DONE -> CHANGED
    CHANGED -> APPLIED | COMMITTED  the planned bytes are back, or texts were carried over to the new ones
    DONE -> COMMITTED               on a branch; the working tree was never touched
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class RunState(StrEnum):
    """Where a run is; any may be taken up again."""

    #: Files are still being added.
    PLANNING = "planning"
    RUNNING = "running"
    #: Nothing is left to ask.
    DONE = "done"
    #: Somebody or a budget ended it early.
    STOPPED = "stopped"


class FileState(StrEnum):
    """Where one file of a run is."""

    #: Nothing was asked yet.
    PLANNED = "planned"
    #: There are jobs for its last exchange; its targets are judged when they have ended.
    ASKED = "asked"
    #: Every target is judged.
    DONE = "done"
    #: Never worked on; the reason says why.
    SKIPPED = "skipped"
    #: Its bytes are not the planned ones, and nothing could be asked or handed over; the reason says why.
    CHANGED = "changed"
    #: The accepted texts are in the working tree, as far as their symbols still are what they were.
    APPLIED = "applied"
    #: The accepted texts are in a commit, likewise.
    COMMITTED = "committed"


class TargetState(StrEnum):
    """Where one symbol without a docstring is."""

    OPEN = "open"
    #: Has a text. Never left.
    ACCEPTED = "accepted"
    #: Gets no text in this run; the reason says why. Never left.
    REJECTED = "rejected"


#: Files whose targets are still judged.
OPEN_FILES: Final = frozenset({FileState.PLANNED, FileState.ASKED})

#: From which states a file may come to each; what is not here cannot happen.
FILE_MOVES: Final[dict[FileState, frozenset[FileState]]] = {
    FileState.PLANNED: frozenset(),
    FileState.ASKED: OPEN_FILES,
    FileState.DONE: OPEN_FILES,
    FileState.SKIPPED: frozenset({FileState.PLANNED}),
    FileState.CHANGED: frozenset({*OPEN_FILES, FileState.DONE}),
    FileState.APPLIED: frozenset({FileState.DONE, FileState.CHANGED}),
    FileState.COMMITTED: frozenset({FileState.DONE, FileState.CHANGED, FileState.APPLIED}),
}
