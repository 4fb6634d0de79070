"""Judge whether a generated description may stand in somebody's code.

Owns: the reasons to reject a text, each with a name that is kept and counted. Does not know how the text
is written down (`docstrings`) or how another one is asked for (`candidates`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

from codeherd_producer.backfill.scanner import Symbol

#: Share of equal text from which on two descriptions count as the same (difflib's ratio).
COPIED = 0.8
#: Repetitions of a run of words that make a loop.
LOOPS = 3
#: Share of characters that only code has, from which on a text counts as code.
CODE_SHARE = 0.12
#: Characters of a text that is worth a look; 99 of 100 docstrings that people write have fewer than 1,640.
LONGEST = 4_000
#: Lines of the code around that a text may repeat at most.
_ECHO_LENGTH = 20


class Rejection(StrEnum):
    """Why a text is not good enough."""

    TRUNCATED = "truncated"
    TOO_LONG = "too long"
    EMPTY = "empty"
    TOO_SHORT = "fewer than two words"
    NAME_RESTATED = "restates the name"
    SIGNATURE = "shows the signature"
    MARKUP = "fences or control tokens"
    PLACEHOLDER = "placeholder"
    CODE = "code"
    CONTROL = "control characters"
    ENCODING = "characters that the file's encoding lacks"
    LOOP = "repeats itself"
    COPIED = "copied from another docstring"
    ECHO = "repeats the code after it"
    MEMORIZED = "address, link, date or copyright"
    LANGUAGE = "another script than English"
    DOCTEST = "doctest"
    UNKNOWN_PARAMETER = "names a parameter that is not there"
    UNKNOWN_ERROR = "names an error that is not raised"
    NO_RESULT = "tells a result that there is not"
    UNWRITABLE = "cannot be written as a docstring"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a text must not repeat."""

    #: Code after the hole.
    suffix: str
    #: Descriptions that the prompt showed, and those accepted for other symbols of the same file.
    others: Collection[str] = ()
    allow_doctest: bool = False
    #: The file's own.
    encoding: str = "utf-8"


#: What stands for typographic characters where an encoding lacks them.
_SUBSTITUTES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u2014\u2015", "--"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
        "\u2026": "...",
    }
)
_MARKUP = re.compile(
    r"```|~~~|<\s*/?\s*(?:EOT|PRE|SUF|MID|FILL_ME|s|step|code|summary)\s*>|\[/?INST\]|<<SYS>>|▁<|<SLOT>"
)
_PLACEHOLDER = re.compile(
    r"\b(?:TODO|FIXME|XXX|TBD|lorem ipsum|placeholder|write me|add (?:a )?description"
    r"|description (?:here|goes)|_summary_|_description_|_type_)",
    re.IGNORECASE,
)
_MEMORIZED = re.compile(
    r"https?://|www\.|\w@\w+\.\w|copyright|©|all rights reserved|licen[cs]ed under"
    r"|(?:^|\n)\s*:?(?:authors?|date|created (?:on|by)|since|version)\s*:|\b(?:19|20)\d\d-\d\d-\d\d\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}|\b[aAI]\b")
_DOCTEST = re.compile(r"^\s*(?:>>>|In \[\d+\]:)", re.MULTILINE)
_STATEMENT = re.compile(
    r"^\s*(?:def |class |return\b(?! (?:a|an|the|all|each|whether|if|true|false|none|self)\b)[^.]*[\[({=]"
    r"|import \w|from \w+ import|if .*:$|for .* in .*:$|while .*:$|else:|try:|except\b.*:|self\.\w+ ?=|@\w+)",
    re.MULTILINE,
)
#: A comment, or a call and nothing else, for a first line.
_EXPRESSION = re.compile(r"\s*(?:#|[\w.]+\([^()\n]*\)\.?[ \t]*(?:\n|\Z))")
_PARAMETER = re.compile(
    r"^\s*(?::param(?:eter)?\s+(?:[\w.\[\], ]+\s+)?\*{0,2}(\w+)\s*:|@param\s+(\w+))", re.MULTILINE
)
_TITLE = re.compile(r"(\s*)(Args|Arguments|Parameters|Raises|Returns|Yields):?\s*$")
_RAISES = re.compile(r"^\s*:raises?\s+([\w.]+)\s*:", re.MULTILINE)
_RETURNS = re.compile(r"^\s*(?::returns?:|Returns?:)", re.MULTILINE)
_YIELDS = re.compile(r"^\s*(?::yields?:|Yields?:)", re.MULTILINE)
_ITEM = re.compile(r"\*{0,2}([\w.]+)\s*(?:\([^)]*\))?\s*:(?:\s|$)")


def rejection(text: str, symbol: Symbol, around: Surroundings, *, is_truncated: bool) -> Rejection | None:
    """Return why a text must not be used; None if nothing speaks against it.

    Args:
        text: as generated, without quotes.
        symbol: what it describes.
        around: what it must not repeat.
        is_truncated: it ended because its tokens were used up.
    """
    return next((reason for reason, is_met in _faults(text, symbol, around, is_truncated) if is_met), None)


def transliterated(text: str, encoding: str) -> str:
    """Return a text with plain quotes, dashes and spaces for those that an encoding lacks."""
    if _is_encodable(text, encoding):
        return text
    return "".join(one if _is_encodable(one, encoding) else one.translate(_SUBSTITUTES) for one in text)


def _faults(
    text: str, symbol: Symbol, around: Surroundings, is_truncated: bool
) -> Iterator[tuple[Rejection, bool]]:
    yield Rejection.TRUNCATED, is_truncated
    yield Rejection.TOO_LONG, len(text) > LONGEST
    yield Rejection.EMPTY, not text.strip()
    yield Rejection.CONTROL, any(_is_control(character) for character in text)
    yield Rejection.MARKUP, bool(_MARKUP.search(text))
    yield Rejection.LANGUAGE, any(_is_foreign(character) for character in text)
    yield Rejection.ENCODING, not _is_encodable(text, around.encoding)
    yield Rejection.TOO_SHORT, len(_WORD.findall(text)) < 2
    yield Rejection.PLACEHOLDER, bool(_PLACEHOLDER.search(text))
    yield Rejection.MEMORIZED, bool(_MEMORIZED.search(text))
    yield Rejection.NAME_RESTATED, restates(text, symbol.name)
    yield Rejection.DOCTEST, bool(_DOCTEST.search(text)) and not around.allow_doctest
    yield Rejection.CODE, looks_like_code(text)
    yield Rejection.LOOP, loops(text)
    yield Rejection.ECHO, _echoes(text, around.suffix)
    yield Rejection.COPIED, any(is_like(text, other) for other in around.others)
    yield from _untrue(text, symbol)


def restates(text: str, name: str) -> bool:
    """Whether a text says no more than the name it describes: "The foo bar function." of `foo_bar`."""
    said = {word.casefold() for word in re.findall(r"[A-Za-z]+", text)}
    own = name.rpartition(".")[2]
    named = {part.casefold() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", own)}
    filler = {"a", "an", "the", "this", "is", "function", "method", "class", "of", "for", "to"}
    return said <= named | filler | {own.replace("_", "").casefold()}


def looks_like_code(text: str) -> bool:
    """Whether a text is code rather than words about it."""
    if _STATEMENT.search(_told(text)) or _EXPRESSION.match(text):
        return True
    # What stands in backquotes, and the parameters of a section, may look as they like.
    prose = re.sub(r"`[^`]*`", "", _told(text))
    marks = sum(character in "=(){}[]<>;+%&|^~$\\@" for character in prose)
    return marks > CODE_SHARE * max(40, len(prose))


def _told(text: str) -> str:
    """Return a text without its doctests."""
    return re.sub(r"^[ \t]*>>>.*(?:\n(?![ \t]*$).*)*", "", text, flags=re.MULTILINE)


def loops(text: str) -> bool:
    """Whether a line, or a run of words, comes again and again."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    if lines and Counter(lines).most_common(1)[0][1] >= LOOPS:
        return True
    words = text.casefold().split()
    for length in range(1, 9):
        for start in range(len(words) - length * LOOPS + 1):
            run = words[start : start + length]
            if all(words[start + n * length : start + (n + 1) * length] == run for n in range(1, LOOPS)):
                return True
    return False


def is_like(text: str, other: str) -> bool:
    """Whether two descriptions are nearly the same."""
    one, two = _plain(text), _plain(other)
    # By their lengths alone the ratio is no more than this; most pairs end here.
    if not one or not two or 2 * min(len(one), len(two)) < COPIED * (len(one) + len(two)):
        return False
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    return matcher.quick_ratio() >= COPIED and matcher.ratio() >= COPIED


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Cn") and character not in "\n\r\t"


def _is_foreign(character: str) -> bool:
    if character.isascii() or not character.isalpha():
        return False
    return not unicodedata.name(character, "").startswith(("LATIN", "GREEK", "MICRO"))


def _echoes(text: str, suffix: str) -> bool:
    lines = {line.strip() for line in suffix.splitlines() if len(line.strip()) >= _ECHO_LENGTH}
    return any(line.strip() in lines for line in text.splitlines())


def _untrue(text: str, symbol: Symbol) -> Iterator[tuple[Rejection, bool]]:
    if symbol.kind not in ("function", "method"):
        return
    # D402 asks it of the first line, which the first paragraph becomes.
    summary = re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]
    yield Rejection.SIGNATURE, symbol.name.rpartition(".")[2] + "(" in summary
    sections = dict(_sections(text))
    known = {parameter.name for parameter in symbol.parameters}
    told = {a or b for a, b in _PARAMETER.findall(text)}
    told |= sections.get("Args", set()) | sections.get("Arguments", set()) | sections.get("Parameters", set())
    yield Rejection.UNKNOWN_PARAMETER, not told <= known
    raised = {one.rpartition(".")[2] for one in symbol.raises}
    errors = {one.rpartition(".")[2] for one in {*_RAISES.findall(text), *sections.get("Raises", set())}}
    yield Rejection.UNKNOWN_ERROR, not errors <= raised
    gives = symbol.gives_value and not symbol.yields
    tells_result = bool(_RETURNS.search(text)) or "Returns" in sections
    tells_yield = bool(_YIELDS.search(text)) or "Yields" in sections
    yield Rejection.NO_RESULT, (tells_result and not gives) or (tells_yield and not symbol.yields)


def _sections(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each section's title and the names of its items, in Google's form or numpy's."""
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if not (found := _TITLE.match(line)):
            continue
        is_numpy = place + 1 < len(lines) and set(lines[place + 1].strip()) == {"-"}
        names = set()
        indent: int | None = None
        for item in lines[place + 1 + is_numpy :]:
            if not item.strip():
                if is_numpy:
                    continue
                break
            depth = len(item) - len(item.lstrip())
            if is_numpy and _TITLE.match(item):
                break
            if depth < len(found[1]) or (not is_numpy and depth <= len(found[1])):
                break
            indent = depth if indent is None else indent
            if depth != indent:
                continue
            if is_numpy:
                names.add(item.strip().partition(" ")[0].lstrip("*"))
            elif named := _ITEM.match(item.strip()):
                names.add(named[1])
        yield found[2], names
