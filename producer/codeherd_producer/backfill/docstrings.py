"""Write a description as the lines of a docstring: quotes, period, width, blank lines, escapes.

Owns: PEP 257's form, and that of sections in three conventions. What comes out passes ruff's D rules of
form (D200 to D215, D300, D301, D400 to D415 but D401, which judges words). Does not judge what a text
says (`texts`), and knows no files.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

#: The end of a first sentence: not after "e.g." or one letter, and a capital follows.
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\b[A-Za-z])(?<!etc)[.!?](?=\s+[A-Z`\"'(])")


#: Of a field list, at the beginning of a line.
_FIELD = re.compile(
    r":(?:param|parameter|arg|argument|key|keyword|type|raises?|except|exception|[ic]?var"
    r"|returns?|rtype|yields?|ytype|meta)\b[^:]*:"
)


class Unwritable(Exception):
    """No docstring can be made of this text; the message is the reason, in a few words."""


class Convention(StrEnum):
    """How parameters, results and errors are listed; the names are ruff's."""

    #: No sections.
    PEP257 = "pep257"
    GOOGLE = "google"
    NUMPY = "numpy"
    #: Field lists, as in Sphinx's own guide.
    SPHINX = "sphinx"


#: What ruff takes for the head of a section, in both conventions and in one of them.
_COMMON_HEADS = frozenset(
    {
        *("attributes", "examples", "methods", "notes", "raises", "references", "returns", "see also"),
        *("warnings", "warns", "yields", "other params", "other parameters"),
    }
)
_GOOGLE_HEADS = _COMMON_HEADS | {
    *("args", "arguments", "attention", "caution", "danger", "error", "example", "hint", "important"),
    *("keyword args", "keyword arguments", "note", "other args", "other arguments", "return", "tip"),
    *("todo", "warning", "yield"),
}
_NUMPY_HEADS = _COMMON_HEADS | {"extended summary", "parameters", "receives", "short summary"}
_HEADS = {
    # Two have none, and ruff guesses whose they are.
    Convention.PEP257: _GOOGLE_HEADS | _NUMPY_HEADS,
    Convention.GOOGLE: _GOOGLE_HEADS,
    Convention.NUMPY: _NUMPY_HEADS,
    Convention.SPHINX: _GOOGLE_HEADS | _NUMPY_HEADS,
}


@dataclass(frozen=True, slots=True)
class Item:
    """One parameter, result or error of a section."""

    #: Empty for what has no name.
    name: str
    description: str
    #: As written in the signature; None without.
    annotation: str | None = None


@dataclass(frozen=True, slots=True)
class Sections:
    """What a function takes, gives and raises."""

    parameters: Sequence[Item] = ()
    returns: Item | None = None
    yields: Item | None = None
    raises: Sequence[Item] = ()


def rendered(text: str, *, indent: str, width: int) -> tuple[str, ...]:
    """Return the lines of a docstring literal, without indentation.

    Args:
        text: summary, then anything; indented or not.
        indent: white space that the file will put before each line.
        width: most columns of a line, indentation included; a tab counts eight.

    Raises:
        Unwritable: empty, or with something in it that no docstring can hold or no line has room for.
    """
    room = width - len(indent.expandtabs(8))
    summary, rest = _parted(_cleaned(text))
    prefix = 'r"""' if "\\" in text else '"""'
    if "\\" in text and any(line.endswith("\\") for line in (summary, *rest)):
        raise Unwritable("a line ends with a backslash")
    closing = 0 if rest else 3
    if len(prefix) + _columns(summary) + closing > room:
        raise Unwritable("the summary does not fit on a line")
    if not rest:
        return (f'{prefix}{summary}"""',)
    lines = [part for line in rest for part in _wrapped(line, room)]
    return (prefix + summary, "", *lines, '"""')


def composed(summary: str, sections: Sections, convention: Convention) -> str:
    """Return a summary with its sections as text for `rendered`."""
    body = {
        Convention.PEP257: lambda _: [],
        Convention.GOOGLE: _google,
        Convention.NUMPY: _numpy,
        Convention.SPHINX: _sphinx,
    }[convention](sections)
    return "\n\n".join([summary, *body])


def is_section_head(line: str, convention: Convention) -> bool:
    """Whether a convention reads a line as the head of a section."""
    return line.strip().removesuffix(":").rstrip().casefold() in _HEADS[convention]


def before_sections(text: str) -> str:
    """Return a text, whose lines end as on Unix, up to its first section or field list of any convention."""
    lines = text.split("\n")
    for place, line in enumerate(lines):
        if is_section_head(line, Convention.PEP257) or _FIELD.match(line.strip()):
            return "\n".join(lines[:place])
    return text


def _google(sections: Sections) -> list[str]:
    def listed(title: str, items: Sequence[Item]) -> list[str]:
        lines = [
            f"    {item.name}: {item.description}" if item.name else f"    {item.description}"
            for item in items
        ]
        return ["\n".join([f"{title}:", *lines])] if items else []

    return [
        *listed("Args", sections.parameters),
        *listed("Returns", _named(sections.returns, name="")),
        *listed("Yields", _named(sections.yields, name="")),
        *listed("Raises", sections.raises),
    ]


def _numpy(sections: Sections) -> list[str]:
    def listed(title: str, items: Sequence[Item]) -> list[str]:
        lines = [line for item in items for line in (_numpy_head(item), f"    {item.description}")]
        return ["\n".join([title, "-" * len(title), *lines])] if items else []

    return [
        *listed("Parameters", sections.parameters),
        *listed("Returns", _named(sections.returns, name=None)),
        *listed("Yields", _named(sections.yields, name=None)),
        *listed("Raises", sections.raises),
    ]


def _numpy_head(item: Item) -> str:
    if item.name and item.annotation:
        return f"{item.name} : {item.annotation}"
    return item.name or item.annotation or "object"


def _sphinx(sections: Sections) -> list[str]:
    lines = [f":param {item.name.lstrip('*')}: {item.description}" for item in sections.parameters]
    lines += [f":return: {sections.returns.description}"] if sections.returns else []
    lines += [f":yields: {sections.yields.description}"] if sections.yields else []
    lines += [f":raises {item.name}: {item.description}" for item in sections.raises]
    return ["\n".join(lines)] if lines else []


def _named(item: Item | None, *, name: str | None) -> Sequence[Item]:
    """Return an unnamed result as a list; with `name` None it is told by its annotation."""
    if item is None:
        return ()
    return (item,) if name is None else (Item(name, item.description),)


def _cleaned(text: str) -> list[str]:
    text = inspect.cleandoc(text.replace("\r\n", "\n").replace("\r", "\n"))
    if '"""' in text:
        raise Unwritable("three quotes in the text")
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not lines[0]:
        raise Unwritable("empty")
    if any(not character.isprintable() for line in lines for character in line.replace("\t", " ")):
        raise Unwritable("a character that cannot be printed")
    return lines


def _parted(lines: list[str]) -> tuple[str, list[str]]:
    """Return the summary, one sentence on one line, and the lines after it."""
    end = next((place for place, line in enumerate(lines) if not line), len(lines))
    paragraph = " ".join(line.strip() for line in lines[:end])
    # As far to the left as the summary is.
    rest = textwrap.dedent("\n".join(lines[end:])).lstrip("\n").split("\n") if lines[end:] else []
    sentence = _SENTENCE.search(paragraph)
    if sentence is not None:
        more = paragraph[sentence.end() :].strip()
        paragraph = paragraph[: sentence.end()]
        rest = [more, "", *rest] if rest else [more]
    return _finished(paragraph), _single_blanks(rest)


def _finished(summary: str) -> str:
    summary = summary.rstrip(" ,;:-!")
    if not summary:
        raise Unwritable("empty")
    if summary.endswith("?"):
        raise Unwritable("the summary is a question")
    if not summary.endswith("."):
        summary += "."
    first = summary.split(" ", 1)[0].rstrip(".,:;!?").replace("'", "")
    # D403 asks it of words of ASCII letters only.
    if first.isascii() and first.isalpha() and first[0].islower():
        if not first.islower():
            # A name such as `iPhone`, which is right as it is, and wrong in this place.
            raise Unwritable("begins with a name that is not capitalized")
        summary = summary[0].upper() + summary[1:]
    if summary.startswith('"') or summary.endswith('"'):
        raise Unwritable("a quote beside the quotes")
    return summary


def _single_blanks(lines: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return kept


def _wrapped(line: str, room: int) -> list[str]:
    if _columns(line) <= room:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    is_item = bool(re.match(r"\s*(\S+: |:\w[^:]*: |[-*] |\d+[.)] )", line))
    parts = textwrap.wrap(
        line.strip(),
        width=room,
        initial_indent=indent,
        subsequent_indent=indent + ("    " if is_item else ""),
        break_long_words=False,
        break_on_hyphens=False,
    )
    if any(_columns(part) > room for part in parts):
        raise Unwritable("a word is longer than a line")
    return parts


def _columns(line: str) -> int:
    return len(line.expandtabs(8)) + sum(unicodedata.east_asian_width(one) in "WF" for one in line)
