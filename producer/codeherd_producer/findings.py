"""The words in which `codeherd doctor` speaks: one part, how it stands, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from codeherd_schema.errors import CodeherdError


class Verdict(StrEnum):
    """How a part stands."""

    OK = "OK"
    #: Works, but a person should know.
    WARN = "WARN"
    #: Jobs will not run, or may be lost.
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One part and how it stands."""

    part: str
    verdict: Verdict
    message: str
    hint: str | None = None


def broken(part: str, err: CodeherdError) -> Finding:
    """Turn an error into a finding."""
    return Finding(part, Verdict.FAIL, err.message, err.hint)
