"""What a user may choose for a backfill, as it is kept with the run.

Owns: the fields, their defaults and limits, and how they become the values that the parts take. Does not
read the command line (`commands.backfill`) or a project's own settings (`project_settings`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from codeherd_producer.backfill.dialog import Policy
from codeherd_producer.backfill.docstrings import Convention
from codeherd_producer.backfill.planner import Wanted
from codeherd_producer.backfill.selection import Selection
from codeherd_schema.models import ServedModel
from codeherd_schema.requests import Frozen

#: Characters that a token of code stands for, at the least of what is usual.
CHARS_PER_TOKEN: Final = 2.5
#: Tokens of prompt and docstring together: more context makes a description slower, hardly better.
MOST_TOKENS: Final = 2_048


class Options(Frozen):
    """Everything that decides what a run gives; kept with it, so that a later day gives the same."""

    model: str
    kinds: Selection = Selection()
    #: Patterns of paths, from the folder that was asked for.
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    changed_since: str | None = None
    allow_dirty: bool = False
    #: An interpreter that knows newer syntax.
    python: str | None = None
    convention: Convention = Convention.PEP257
    #: Columns of a docstring's lines.
    width: int = Field(default=88, ge=40, le=400)
    #: Texts per symbol to choose from; 1 takes the first that passes.
    candidates: int = Field(default=1, ge=1, le=8)
    allow_doctest: bool = False
    #: 0 runs first, 9 last.
    priority: int = Field(default=9, ge=0, le=9)
    #: Makes this run ask for texts of its own instead of sharing those of earlier runs.
    salt: str = ""
    #: Characters around a hole that are sent.
    context_chars: int = Field(ge=200)

    def wanted(self) -> Wanted:
        """Return what the planner looks for."""
        return Wanted(
            selection=self.kinds,
            include=self.include,
            exclude=self.exclude,
            changed_since=self.changed_since,
            allow_dirty=self.allow_dirty,
            python=None if self.python is None else Path(self.python),
        )

    def policy(self, *, usual_lengths: tuple[int, ...]) -> Policy:
        """Return how texts are asked for and chosen in one file.

        Args:
            usual_lengths: characters of the docstrings that the file has.
        """
        return Policy(
            model=self.model,
            convention=self.convention,
            candidates=self.candidates,
            width=self.width,
            priority=self.priority,
            allow_doctest=self.allow_doctest,
            salt=self.salt,
            usual_lengths=usual_lengths,
        )


def context_chars_of(model: ServedModel) -> int:
    """Return how much text around a hole a model is shown: a part of its window, in characters."""
    tokens = min(model.context_window, MOST_TOKENS)
    # An eighth stays free for the docstring.
    return int(tokens * 7 / 8 * CHARS_PER_TOKEN)
