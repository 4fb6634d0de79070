"""Times on the command line: `90`, `10m`, `1h30m`, `2d`, or a moment such as `2026-05-01T09:00Z`.

Owns: both spellings. Does not know what a time is for.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import click

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


class Duration(click.ParamType[timedelta]):
    """A length of time; a bare number is in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Read `value`, or say how to write it."""
        if isinstance(value, timedelta):
            return value
        duration = parse_duration(value)
        if duration is None:
            self.fail(f"`{value}` is no duration, write 90, 10m, 1h30m or 2d", param, ctx)
        return duration


class Moment(click.ParamType[timedelta | datetime]):
    """A length of time from now, or a moment with its time zone."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta | datetime:
        """Read `value`, or say how to write it."""
        if isinstance(value, timedelta | datetime):
            return value
        duration = parse_duration(value)
        if duration is not None:
            return duration
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"`{value}` is no time, write 10m, 1h30m or 2026-05-01T09:00Z", param, ctx)
        if moment.tzinfo is None:
            self.fail(f"`{value}` has no time zone, add Z or +02:00", param, ctx)
        return moment


def parse_duration(text: str) -> timedelta | None:
    """Return the duration that `text` spells, or None."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        text += "s"
    if not _DURATION.fullmatch(text):
        return None
    try:
        return sum(
            (timedelta(**{_UNITS[unit]: float(number)}) for number, unit in _PART.findall(text)),
            start=timedelta(0),
        )
    except OverflowError:
        return None
