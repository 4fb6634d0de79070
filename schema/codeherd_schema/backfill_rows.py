"""What `codeherd_schema.backfills` takes and gives, and how each becomes a row or is read back from one.

Owns: the values and their columns: paths as bytes, generated text as JSON. Does not know how rows are found
or changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row

from codeherd_schema.backfill_states import FileState, RunState, TargetState
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.jobs import instant, moment, storable

#: Bytes of a path, as UTF-8; PostgreSQL's indexes hold no more than 2,700.
MAX_PATH: Final = 2_000
#: Characters of a reason that are kept.
MAX_REASON: Final = 500


@dataclass(frozen=True, slots=True)
class Run:
    """One backfill of one folder; times are by the database's clock, in UTC."""

    id: str
    #: The folder, as the one who made the run names it.
    root: str
    model: str
    #: JSON.
    options: Mapping[str, Any]
    state: RunState
    created_at: datetime
    #: When it was done or stopped; one that was done has it also while it is taken up again.
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewTarget:
    """A symbol that is to get a docstring."""

    #: Number of the symbol in the scan of its file.
    place: int
    #: Qualified name; "" is the module.
    name: str
    #: Number among the symbols of this name.
    twin: int
    line: int
    kind: str
    #: Of its own code, in hexadecimal: by it a target is known again in another version of the file.
    code_sha256: str


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file as it was planned."""

    #: From the root, with `/`; what is no UTF-8 in it as `os.fsdecode` gives it.
    path: str
    #: Of its bytes; empty if they were not read.
    sha256: str
    encoding: str | None = None
    #: Why it is not worked on.
    reason: str | None = None
    #: Symbols that have a docstring.
    documented: int = 0
    #: How many of the other symbols are no targets, by reason.
    passed_over: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[NewTarget, ...] = ()


@dataclass(frozen=True, slots=True)
class File:
    """One file of a run at the moment it was read."""

    id: int
    run_id: str
    path: str
    sha256: str
    encoding: str | None
    state: FileState
    reason: str | None
    #: Number of the exchange that was asked last; -1 before the first.
    exchange: int
    documented: int
    passed_over: Mapping[str, int]
    #: How many, and how many of them are accepted and rejected.
    targets: int
    accepted: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Target:
    """One target of a file at the moment it was read."""

    id: int
    file_id: int
    place: int
    name: str
    twin: int
    line: int
    kind: str
    code_sha256: str
    state: TargetState
    #: The accepted docstring, before it is rendered.
    text: str | None
    #: Of the last rejection.
    reason: str | None
    score: float | None
    #: In which it was judged last; -1 before.
    exchange: int


@dataclass(frozen=True, slots=True)
class NewQuestion:
    """One job for one target; a target may ask several in one exchange."""

    target_id: int
    exchange: int
    number: int
    job_id: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One judged text."""

    target_id: int
    #: With `number`: the question that it answers.
    exchange: int
    number: int
    #: Among the texts of one answer.
    index: int
    text: str
    #: Gives this text again; below 2**63.
    seed: int
    #: That were generated.
    tokens: int
    #: Mean of its tokens, natural logarithm; None if not known.
    logprob: float | None = None
    #: Why it was not taken; None for a text that passed.
    reason: str | None = None
    score_parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an exchange made of one target."""

    target_id: int
    state: TargetState
    #: Of an accepted target and only there.
    text: str | None = None
    reason: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands at one moment; every state is there, zeros included."""

    files: Mapping[FileState, int]
    targets: Mapping[TargetState, int]
    #: Symbols that had a docstring before.
    documented: int
    #: Questions asked, and those of them that nothing is waited for any more.
    asked: int
    ended: int
    #: Of all candidates.
    tokens: int


def path_bytes(path: str) -> bytes:
    """Return a path as its column holds it: UTF-8, and the bytes that were none as they were."""
    return path.encode("utf-8", "surrogateescape")


def kept_path(path: str) -> bytes:
    """Return a file's path as its column holds it.

    Raises:
        InvalidRequest: it is longer than `MAX_PATH`.
    """
    found = path_bytes(path)
    if len(found) > MAX_PATH:
        raise InvalidRequest(f"a path has {len(found)} bytes, {MAX_PATH} are kept")
    return found


def path_text(path: bytes) -> str:
    """Read back what `path_bytes` gave."""
    return path.decode("utf-8", "surrogateescape")


def kept_reason(words: str | None) -> str | None:
    """Return a reason as its column holds it."""
    return None if words is None else storable(words, most=MAX_REASON)


def file_row(run_id: str, path: bytes, file: NewFile) -> dict[str, Any]:
    """Return the columns of a new file; its state is told by its reason and its targets."""
    state = FileState.PLANNED if file.targets else FileState.DONE
    return {
        "run_id": run_id,
        "path": path,
        "sha256": file.sha256,
        "encoding": file.encoding,
        "state": (state if file.reason is None else FileState.SKIPPED).value,
        "reason": kept_reason(file.reason),
        "exchange": -1,
        "documented": file.documented,
        # Sorted: equal counts are equal texts, which `passed_over` groups by.
        "passed_over": json.dumps(dict(file.passed_over), sort_keys=True),
        "targets": len(file.targets),
    }


def target_row(file_id: int, target: NewTarget) -> dict[str, Any]:
    """Return the columns of a new target."""
    return {
        "file_id": file_id,
        "place": target.place,
        "name": target.name,
        "twin": target.twin,
        "line": target.line,
        "kind": target.kind,
        "code_sha256": target.code_sha256,
        "state": TargetState.OPEN.value,
    }


def candidate_row(candidate: Candidate) -> dict[str, Any]:
    """Return the columns of a candidate."""
    return {
        "target_id": candidate.target_id,
        "exchange": candidate.exchange,
        "number": candidate.number,
        "place": candidate.index,
        "text": json.dumps(candidate.text),
        "seed": candidate.seed,
        "tokens": candidate.tokens,
        "logprob": candidate.logprob,
        "reason": kept_reason(candidate.reason),
        "score_parts": json.dumps(dict(candidate.score_parts)),
    }


def run_of(row: Row[Any]) -> Run:
    """Decode a row that holds every column of `tables.backfill_runs`."""
    return Run(
        id=row.id,
        root=path_text(row.root),
        model=row.model,
        options=json.loads(row.options),
        state=RunState(row.state),
        created_at=instant(row.created_at),
        finished_at=moment(row.finished_at),
    )


def file_of(row: Row[Any]) -> File:
    """Decode a row that holds every column of `tables.backfill_files`."""
    return File(
        id=row.id,
        run_id=row.run_id,
        path=path_text(row.path),
        sha256=row.sha256,
        encoding=row.encoding,
        state=FileState(row.state),
        reason=row.reason,
        exchange=row.exchange,
        documented=row.documented,
        passed_over=json.loads(row.passed_over),
        targets=row.targets,
        accepted=row.accepted,
        rejected=row.rejected,
    )


def target_of(row: Row[Any]) -> Target:
    """Decode a row that holds every column of `tables.backfill_targets`."""
    return Target(
        id=row.id,
        file_id=row.file_id,
        place=row.place,
        name=row.name,
        twin=row.twin,
        line=row.line,
        kind=row.kind,
        code_sha256=row.code_sha256,
        state=TargetState(row.state),
        text=None if row.text is None else json.loads(row.text),
        reason=row.reason,
        score=row.score,
        exchange=row.exchange,
    )


def candidate_of(row: Row[Any]) -> Candidate:
    """Decode a row that holds every column of `tables.backfill_candidates`."""
    return Candidate(
        target_id=row.target_id,
        exchange=row.exchange,
        number=row.number,
        index=row.place,
        text=json.loads(row.text),
        seed=row.seed,
        tokens=row.tokens,
        logprob=row.logprob,
        reason=row.reason,
        score_parts=json.loads(row.score_parts),
    )
