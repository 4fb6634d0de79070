"""What docs/cli.md says of the documents that `--json` writes, to be held against real ones.

Owns: reading the page. In it a document is written as its fields, of which those that are no plain value or
list of such have one more thing behind them:

    {"id", "jobs": [job], "error": {"code"}, "labels": {name: value}, …}

`job` is described elsewhere on the page; `{name: value}` has any names; after `…` come fields that are not
described. `job and "attempts": [attempt]` is a job with one field more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
_WORD = re.compile(r'"\w+"|\w+|[{}\[\]:,…]')
#: In the place of a field's name: any name, fields that are not described, the fields of something else.
_ANY, _MORE, _ALL_OF = "*", "…", "&"


class Documents:
    """The documents of the page."""

    def __init__(self, page: str | None = None) -> None:
        """Read the page, or a text in its place."""
        text = _PAGE.read_text(encoding="utf-8") if page is None else page
        described = re.findall(r"\b[Aa]n? (\w+)(?: is)? `(\{[^`]*\})`", text)
        described += re.findall(r"^(\w+) +(\{.*?\})(?:, or null)?$", text, re.MULTILINE | re.DOTALL)
        self._nouns = {noun: _Reader(fields).shape() for noun, fields in described}
        self._of_command: dict[str, Any] = {}
        for commands, document in re.findall(r"^\| (`.+?) \| (?:.*?)`([^`]+)`.*\|$", text, re.MULTILINE):
            if document.startswith("{") or " and " in document:
                shape = _Reader(document).shape()
                self._of_command |= dict.fromkeys(re.findall(r"`([^`]+)`", commands), shape)

    @property
    def commands(self) -> frozenset[str]:
        """Every command whose document is described."""
        return frozenset(self._of_command)

    def faults(self, command: str, document: object) -> list[str]:
        """Return where a command's document is another than the one that is described."""
        return list(self._faults(document, self._of_command[command], "document"))

    def _faults(self, found: object, shape: Any, where: str) -> Iterator[str]:
        match shape:
            case str():
                yield from self._faults_of_noun(found, shape, where)
            case [inner]:
                if not isinstance(found, list) or not found:
                    yield f"{where} is no list, or has nothing to compare"
                    return
                for one in found:
                    yield from self._faults(one, inner, f"{where}[]")
            case {"*": inner}:
                if not isinstance(found, dict):
                    yield f"{where} is no object"
                    return
                for name, one in found.items():
                    yield from self._faults(one, inner, f"{where}.{name}")
            case _:
                yield from self._faults_of_fields(found, shape, where)

    def _faults_of_noun(self, found: object, noun: str, where: str) -> Iterator[str]:
        is_plain = not isinstance(found, dict) and not (
            isinstance(found, list) and any(isinstance(one, (dict, list)) for one in found)
        )
        if is_plain and (noun not in self._nouns or found is None or where.endswith(f".{noun}")):
            return
        if noun not in self._nouns:
            yield f"{where} has parts that are not described"
            return
        yield from self._faults(found, self._nouns[noun], where)

    def _faults_of_fields(self, found: object, shape: Mapping[str, Any], where: str) -> Iterator[str]:
        if not isinstance(found, dict):
            yield f"{where} is no object"
            return
        fields = self._fields(shape)
        yield from (f"{where} lacks {name}" for name in sorted(fields.keys() - found.keys() - {_MORE}))
        if _MORE not in fields:
            yield from (f"{where}.{name} is not described" for name in sorted(found.keys() - fields.keys()))
        for name in fields.keys() & found.keys():
            yield from self._faults(found[name], fields[name], f"{where}.{name}")

    def _fields(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: inner for name, inner in shape.items() if name != _ALL_OF}
        return self._fields(self._nouns[shape[_ALL_OF]]) | own if _ALL_OF in shape else own


class _Reader:
    """Reads one document's description."""

    def __init__(self, text: str) -> None:
        self._words = _WORD.findall(text)

    def shape(self) -> Any:
        """Return a dict by fields, a list of one thing, or the name of one."""
        word = self._take()
        if word == "{":
            fields: dict[str, Any] = {}
            while word != "}":
                fields |= self._field()
                word = self._take()
            return fields
        if word == "[":
            inner = [self.shape()]
            assert self._take() == "]"
            return inner
        if self._words[:1] != ["and"]:
            return word
        self._take()
        return {_ALL_OF: word} | self._field()

    def _field(self) -> dict[str, Any]:
        word = self._take()
        if word == _MORE:
            return {_MORE: _MORE}
        name = word.strip('"') if word.startswith('"') else _ANY
        if self._words[:1] != [":"]:
            # What is a thing of its own is called by its name.
            return {name: name}
        self._take()
        return {name: self.shape()}

    def _take(self) -> str:
        return str(self._words.pop(0))
