"""Help that keeps its examples as they are written.

Owns: the rule that an indented paragraph of a command's docstring is shown line by line. Does not
know any command.
"""

from __future__ import annotations

import textwrap
from typing import Any

import click

#: click's mark for a paragraph that it must not wrap.
_VERBATIM = "\b\n"


class Verb(click.Command):
    """A command whose docstring may hold indented examples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = keep_examples(self.help)


class Noun(click.Group):
    """A group whose docstring may hold indented examples, and whose commands are verbs."""

    command_class = Verb

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = keep_examples(self.help)


def keep_examples(text: str | None) -> str | None:
    """Mark the indented paragraphs of a docstring, so that click shows them as they are."""
    if text is None:
        return None
    paragraphs = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(
        _VERBATIM + textwrap.dedent(paragraph) if paragraph.startswith("    ") else paragraph
        for paragraph in paragraphs
    )
