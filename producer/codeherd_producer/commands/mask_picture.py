"""Draw what each token of a sequence may attend to, in characters.

Owns: the picture: rows are queries in the order in which they are computed, columns are places of the
slot's cache. Does not ask anybody (`codeherd_producer.commands.inspection` does), and knows of the engine
only the rule that it states itself:
    - A token at place p attends the places 0 to p of its own slot, and nothing else.
    - A pass reads a slot up to one of its class's read lengths: the first that holds the last token that
      the pass attends. What is read beyond a token's own place is hidden from it.
    - Prompts are computed in chunks; padding that fills the last granule, and sometimes the pass, repeats
      the last token's place, and is written to the slot's spare places, which no read covers.
    - A prefix that another slot had computed is copied: its rows are not computed here.
`tests/unit/producer/test_mask_picture.py` compares the picture with the masks of a real engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Final, Self

#: Characters before the cells of a row: what it is, and which places it is about.
_LABEL: Final = 24
#: Characters after them: the border of the spare places and one of these.
_TAIL: Final = 3
#: Columns of cells between two numbers over the picture.
_RULER: Final = 10
#: Fewest columns of cells, however narrow the terminal.
_NARROWEST: Final = 16


class RowKind(StrEnum):
    """What a query is."""

    #: Part of a prefix that was copied from another slot.
    COPIED = "copied"
    PREFILL = "prefill"
    #: A prompt token whose turn has not come.
    WAITING = "waiting"
    #: Fills up the last granule.
    PADDING = "padding"
    DECODE = "decode"


class Cell(StrEnum):
    """What a query may do with a place of the cache; the value is how it is drawn."""

    ATTENDED = "█"
    #: Attended, and copied from another slot.
    REUSED = "▒"
    #: Of a block of tokens, some attend.
    PARTLY = "▄"
    #: Read and masked out.
    HIDDEN = "·"
    #: Where the read ends.
    BORDER = "│"
    UNREAD = " "
    #: In a row that was copied: the other slot attended it.
    ELSEWHERE = "="


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """One slot at one moment, and the shapes of its engine: numbers of tokens."""

    slot: int
    #: What it can hold.
    length: int
    #: First of its spare places.
    spare: int
    prompt_tokens: int
    reused_tokens: int
    #: Prompt tokens that are in the cache, copied ones too.
    prefilled_tokens: int
    new_tokens: int
    #: Of the engine.
    granule: int
    prefill_chunk: int
    #: How far the slot may be read, ascending; empty: as far as it is attended.
    kv_lengths: tuple[int, ...]
    #: Tokens that one decode step computes: one, and its drafts.
    step_width: int = 1

    @classmethod
    def of(cls, figures: Mapping[str, Any], view: Mapping[str, Any]) -> Self:
        """Read one of `slot_views` in the answer to `engine_stats`."""
        shape = next(part for part in figures["classes"] if part["length"] == view["length"])
        always_drafts = not figures["drafts_are_optional"]
        return cls(
            slot=view["slot"],
            length=view["length"],
            spare=shape["spare"],
            prompt_tokens=view["prompt_tokens"],
            reused_tokens=view["reused_tokens"],
            prefilled_tokens=view["prefilled_tokens"],
            new_tokens=view["new_tokens"],
            granule=figures["granule"],
            prefill_chunk=figures["prefill_chunk"],
            kv_lengths=tuple(shape["kv_lengths"]),
            step_width=1 + (figures["draft_tokens"] if always_drafts else 0),
        )

    def kv_len_for(self, tokens: int) -> int:
        """Return how far the slot is read if so many tokens are attended."""
        longest = max(self.kv_lengths, default=tokens)
        return next((length for length in self.kv_lengths if length >= tokens), longest)


@dataclass(frozen=True, slots=True)
class Query:
    """One token that attends."""

    kind: RowKind
    #: Its place in the sequence.
    position: int
    #: How far its pass reads the slot.
    kv_len: int


@dataclass(frozen=True, slots=True)
class Row:
    """Neighbouring queries of one kind, drawn as one line."""

    kind: RowKind
    #: Places of the first query and the last.
    first: int
    last: int
    queries: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A sequence's mask, in blocks of `scale` x `scale` tokens."""

    facts: SlotFacts
    scale: int
    #: Places of the cache that are drawn, the spare ones left out.
    columns: int
    rows: tuple[Row, ...]


def queries(facts: SlotFacts) -> Iterator[Query]:
    """Return every query of a sequence up to now, in the order of their computation.

    Read lengths are those of the sequence alone: a longer neighbour in the same step makes a decode step
    read further, which hides more and changes nothing else.
    """
    prompt, reused = facts.prompt_tokens, facts.reused_tokens
    for position in range(reused):
        yield Query(RowKind.COPIED, position, 0)
    for start in range(reused, prompt, facts.prefill_chunk):
        end = min(start + facts.prefill_chunk, prompt)
        kv_len = facts.kv_len_for(end)
        for position in range(start, end):
            is_done = position < facts.prefilled_tokens
            yield Query(RowKind.PREFILL if is_done else RowKind.WAITING, position, kv_len)
        if end == prompt <= facts.prefilled_tokens:
            for _ in range(-(end - start) % facts.granule):
                yield Query(RowKind.PADDING, end - 1, kv_len)
    for position in range(prompt, prompt + facts.new_tokens):
        yield Query(RowKind.DECODE, position, facts.kv_len_for(position + facts.step_width))


def picture(facts: SlotFacts, width: int) -> Picture:
    """Return the picture that fits a terminal of `width` characters: token by token if it can."""
    asked = list(queries(facts))
    room = max(_NARROWEST, width - _LABEL - _TAIL)
    used = facts.prompt_tokens + facts.new_tokens
    # One more than is read, for the border; a short sequence is drawn exactly even if that is cut off.
    columns = max((query.kv_len for query in asked), default=used) + 1
    if used <= room:
        columns = min(columns, room)
    scale = -(-columns // room)
    # Queries that wait for the same pass are one block at most; kinds are never mixed.
    rows = [
        _row(facts, block, columns, scale)
        for _, same in groupby(asked, key=lambda query: (query.kind, query.kv_len))
        for block in _blocks(list(same), scale)
    ]
    return Picture(facts, scale, columns, tuple(rows))


def draw(shown: Picture) -> list[str]:
    """Return the lines of a picture, with its scale and a legend."""
    facts, scale = shown.facts, shown.scale
    cells = -(-shown.columns // scale)
    unit = "1 token" if scale == 1 else f"{scale} tokens"
    prompt = (
        f"prompt {facts.prompt_tokens} ({facts.reused_tokens} reused, {facts.prefilled_tokens} in the cache)"
    )
    shapes = f"granule {facts.granule}, chunk {facts.prefill_chunk}; spare places from {facts.spare}"
    lines = [
        f"slot {facts.slot} of {facts.length} tokens: {prompt}, {facts.new_tokens} new",
        f"1 character = {unit}; {shapes}",
        "",
        " " * _LABEL + _ruler(cells, scale),
    ]
    for row in shown.rows:
        is_padding = row.kind is RowKind.PADDING
        places = f"{row.first}" if row.first == row.last else f"{row.first}-{row.last}"
        label = f"{row.kind:<8}{f'{row.queries} x {places}' if is_padding else places:>{_LABEL - 10}}  "
        lines.append(f"{label}{''.join(row.cells)} ┆{'x' if is_padding else '░'}")
    return [*lines, "", *_legend(shown)]


def _blocks(same: Sequence[Query], scale: int) -> Iterator[Sequence[Query]]:
    # Padding is all at one place.
    step = len(same) if same[0].kind is RowKind.PADDING else scale
    for start in range(0, len(same), step):
        yield same[start : start + step]


def _row(facts: SlotFacts, block: Sequence[Query], columns: int, scale: int) -> Row:
    cells = (
        _cell(facts, block, first, min(first + scale, columns) - 1) for first in range(0, columns, scale)
    )
    return Row(block[0].kind, block[0].position, block[-1].position, len(block), tuple(cells))


def _cell(facts: SlotFacts, block: Sequence[Query], first: int, last: int) -> Cell:
    """Say what a block of queries, places ascending, does with the places `first` to `last`."""
    lowest, highest = block[0].position, block[-1].position
    if block[0].kind is RowKind.COPIED:
        return Cell.ELSEWHERE if first <= highest else Cell.UNREAD
    if last <= lowest:
        return Cell.REUSED if last < facts.reused_tokens else Cell.ATTENDED
    if first <= highest:
        return Cell.PARTLY
    kv_len = block[-1].kv_len
    if first <= kv_len <= last:
        return Cell.BORDER
    return Cell.HIDDEN if first < kv_len else Cell.UNREAD


def _ruler(cells: int, scale: int) -> str:
    # The last number would lose its end.
    marks = [f"{n * scale:<{_RULER}}" for n in range(0, cells - _RULER // 2, _RULER)]
    return "".join(marks).rstrip()


def _legend(shown: Picture) -> list[str]:
    words = {
        Cell.ATTENDED: "attended",
        Cell.REUSED: "attended, copied from another slot",
        Cell.PARTLY: "attended by some of the block",
        Cell.HIDDEN: "read, but hidden: it comes later",
        Cell.BORDER: "the read ends",
        Cell.ELSEWHERE: "computed in another slot",
    }
    seen = {cell for row in shown.rows for cell in row.cells}
    lines = [f"{cell.value} {text}" for cell, text in words.items() if cell in seen]
    return [*lines, "░ spare places, read by nobody; x: padding is written there"]
