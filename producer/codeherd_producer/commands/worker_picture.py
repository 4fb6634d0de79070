"""Say in lines of text what one worker does: slots, speed, memory.

Owns: the words and bars of `codeherd inspect`. Draws what `engine_stats` told, asks nobody, and sees no
prompt or text: there is none in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from codeherd_producer.commands.output import age

Figures = Mapping[str, Any]

#: The parts of a bar, in order; the last is what is left of the slot.
_BAR: Final = {"reused": "▒", "prompt": "█", "to come": "░", "new": "▓", "free": "·"}
#: Characters around a slot's bar.
_AROUND_BAR: Final = 66
_NARROWEST_BAR: Final = 10
#: Characters of a class's bar.
_CLASS_BAR: Final = 20

#: The columns of `summary_row`.
SUMMARY: Final = (
    "worker",
    "model",
    "quantization",
    "device",
    "active",
    "slots",
    "waiting",
    "tokens/s",
    "busy",
    "reused",
    "accepted",
    "memory",
    "fingerprint",
)


def summary_row(figures: Figures) -> tuple[str, ...]:
    """Return one worker as one row, numbers without units: tokens a second, shares, bytes."""
    return tuple(
        "" if value is None else str(value)
        for value in (
            figures["worker"],
            figures["model"],
            figures["quantization"],
            figures["device"],
            figures["active"],
            figures["slots"],
            figures["waiting"],
            figures["tokens_per_s"],
            figures["busy_share"],
            figures["reuse_rate"],
            figures["acceptance_rate"],
            figures["memory_bytes"],
            figures["fingerprint"],
        )
    )


def describe(figures: Figures, width: int) -> Iterator[str]:
    """Return a worker's lines for a terminal of `width` characters."""
    yield (
        f"{figures['worker']}  {figures['model']}  {figures['quantization']} ({figures['dtype']}) "
        f"on {figures['device']}"
    )
    yield f"  up {age(figures['uptime_s'])}, fingerprint {figures['fingerprint']}"
    yield (
        f"  {figures['active']} of {figures['slots']} slots used, {figures['waiting']} waiting; "
        f"{figures['tokens_per_s']:g} tokens/s, {_percent(figures['busy_share'])} busy"
    )
    yield (
        f"  prompts: {_percent(figures['reuse_rate'])} of {figures['prompt_tokens']} tokens reused; "
        f"drafts: {_drafts(figures)}"
    )
    yield from _memory(figures)
    busy = [view for view in figures["slot_views"] if view["name"] is not None]
    for part in figures["plan"]["classes"]:
        used = sum(view["length"] == part["length"] for view in busy)
        bar = _bar((used, part["slots"] - used), "█·", _CLASS_BAR)
        yield f"  {part['length']:>6} tokens |{bar}| {used} of {part['slots']} used"
    room = max(_NARROWEST_BAR, width - _AROUND_BAR)
    for view in busy:
        yield _slot(view, room)
    if busy:
        yield "  " + ", ".join(f"{glyph} {name}" for name, glyph in _BAR.items())


def _slot(view: Mapping[str, Any], room: int) -> str:
    reused, filled = view["reused_tokens"], view["prefilled_tokens"]
    parts = (reused, filled - reused, view["prompt_tokens"] - filled, view["new_tokens"])
    free = max(0, view["length"] - sum(parts))
    bar = _bar((*parts, free), "".join(_BAR.values()), room)
    counts = f"{view['prompt_tokens']}+{view['new_tokens']}"
    return f"  slot {view['slot']:>3} |{bar}| {counts:>11}  {view['name']}"


def _bar(parts: Sequence[int], glyphs: str, room: int) -> str:
    """Divide `room` characters among parts, as far as whole characters can."""
    total, done, drawn = max(1, sum(parts)), 0, ""
    for part, glyph in zip(parts, glyphs, strict=True):
        done += part
        drawn += glyph * (round(done * room / total) - len(drawn))
    return drawn


def _drafts(figures: Figures) -> str:
    if not figures["draft_tokens"]:
        return "off"
    return f"{_percent(figures['acceptance_rate'])} of {figures['drafted']} tokens accepted"


def _memory(figures: Figures) -> Iterator[str]:
    for card in figures["plan"]["cards"]:
        parts = ", ".join(
            f"{name} {_gb(card[f'{name}_bytes'])}"
            for name in ("weight", "cache", "activation", "reserve", "left")
        )
        yield f"  memory of {card['card']}: {parts}, available {_gb(card['available_bytes'])}"
    yield f"  held {_gb(figures['memory_bytes'])}, at most {_gb(figures['memory_peak_bytes'])}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
