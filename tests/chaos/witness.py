"""A witness in the database: triggers note every move of a job and every change of a result.

Owns: the triggers, the two tables that they write, and whether what they noted can be true. Shares no
line with the store: it knows the tables' names and the legal moves (`codeherd_schema.states`) alone.
A note is made in the transaction of what it notes, so nothing is noted that did not happen.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from codeherd_schema.states import MOVES, JobState, Move

_SQLITE: Final = """
CREATE TABLE witnessed_moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, job_id TEXT, source TEXT, target TEXT,
    lease_before TEXT, lease_after TEXT, until_before REAL, attempt_before INTEGER, attempt_after INTEGER
);
CREATE TABLE witnessed_results (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT, what TEXT, attempt INTEGER
);
CREATE TRIGGER witness_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO witnessed_moves (at, job_id, source, target, lease_after, attempt_after)
    VALUES ({now}, NEW.id, '', NEW.state, NEW.lease_id, NEW.attempt);
END;
CREATE TRIGGER witness_update AFTER UPDATE ON jobs
WHEN OLD.state IS NOT NEW.state OR OLD.lease_id IS NOT NEW.lease_id OR OLD.attempt IS NOT NEW.attempt BEGIN
    INSERT INTO witnessed_moves (
        at, job_id, source, target, lease_before, lease_after, until_before, attempt_before, attempt_after
    ) VALUES (
        {now}, NEW.id, OLD.state, NEW.state, OLD.lease_id, NEW.lease_id, OLD.lease_until, OLD.attempt,
        NEW.attempt
    );
END;
CREATE TRIGGER witness_delete AFTER DELETE ON jobs BEGIN
    INSERT INTO witnessed_moves (at, job_id, source, target) VALUES ({now}, OLD.id, OLD.state, '');
END;
CREATE TRIGGER witness_result AFTER INSERT ON results BEGIN
    INSERT INTO witnessed_results (job_id, what, attempt) VALUES (NEW.job_id, 'insert', NEW.attempt);
END;
CREATE TRIGGER witness_result_change AFTER UPDATE ON results BEGIN
    INSERT INTO witnessed_results (job_id, what, attempt) VALUES (NEW.job_id, 'update', NEW.attempt);
END;
CREATE TRIGGER witness_result_loss AFTER DELETE ON results BEGIN
    INSERT INTO witnessed_results (job_id, what, attempt) VALUES (OLD.job_id, 'delete', OLD.attempt);
END;
""".replace("{now}", "(julianday('now') - 2440587.5) * 86400.0")

_POSTGRESQL: Final = """
CREATE TABLE witnessed_moves (
    id BIGSERIAL PRIMARY KEY, at FLOAT8, job_id TEXT, source TEXT, target TEXT,
    lease_before TEXT, lease_after TEXT, until_before FLOAT8, attempt_before INT, attempt_after INT
);
CREATE TABLE witnessed_results (id BIGSERIAL PRIMARY KEY, job_id TEXT, what TEXT, attempt INT);
CREATE FUNCTION witness_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witnessed_moves (
        at, job_id, source, target, lease_before, lease_after, until_before, attempt_before, attempt_after
    ) VALUES (
        extract(epoch from clock_timestamp()), coalesce(NEW.id, OLD.id), coalesce(OLD.state, ''),
        coalesce(NEW.state, ''), OLD.lease_id, NEW.lease_id, OLD.lease_until, OLD.attempt, NEW.attempt
    );
    RETURN NULL;
END $$;
CREATE FUNCTION witness_result() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witnessed_results (job_id, what, attempt) VALUES (
        coalesce(NEW.job_id, OLD.job_id), lower(TG_OP), coalesce(NEW.attempt, OLD.attempt)
    );
    RETURN NULL;
END $$;
CREATE TRIGGER witness_insert AFTER INSERT OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION witness_move();
CREATE TRIGGER witness_update AFTER UPDATE ON jobs FOR EACH ROW WHEN (
    OLD.state IS DISTINCT FROM NEW.state OR OLD.lease_id IS DISTINCT FROM NEW.lease_id
    OR OLD.attempt IS DISTINCT FROM NEW.attempt
) EXECUTE FUNCTION witness_move();
CREATE TRIGGER witness_result AFTER INSERT OR UPDATE OR DELETE ON results
FOR EACH ROW EXECUTE FUNCTION witness_result();
"""

_LEGAL: Final = {(source.value, target.value) for (_, source), target in MOVES.items()}


@dataclass(frozen=True, slots=True)
class Noted:
    """One move of one job, as the triggers saw it."""

    #: The database's clock, seconds since 1970.
    at: float
    job_id: str
    #: States before and after; empty before the job was there, and after it was deleted.
    source: str
    target: str
    lease_before: str | None
    lease_after: str | None
    #: End of the lease that was held before.
    until_before: float | None
    attempt_before: int | None
    attempt_after: int | None

    @property
    def is_claim(self) -> bool:
        """Whether a worker took the job."""
        return (self.source, self.target) == (JobState.QUEUED, JobState.RUNNING)

    @property
    def is_late(self) -> bool:
        """Whether a lease that nobody had taken back yet was over."""
        return self.until_before is not None and self.at > self.until_before


class Witness:
    """Notes of one database."""

    def __init__(self, database_url: str) -> None:
        """Remember where; `start` makes the triggers."""
        self._url = database_url

    def start(self) -> None:
        """Note everything from now on; the database holds no jobs yet."""
        if self._url.startswith("sqlite"):
            with contextlib.closing(self._sqlite()) as connection:
                connection.executescript(_SQLITE)
        else:
            with psycopg.connect(self._url) as connection:
                connection.execute(_POSTGRESQL.encode())

    def execute(self, statement: str) -> None:
        """Change the database behind everybody's back."""
        if self._url.startswith("sqlite"):
            with contextlib.closing(self._sqlite()) as file, file:
                file.execute(statement)
        else:
            with psycopg.connect(self._url) as connection:
                connection.execute(statement.encode())

    def problems(self) -> list[str]:
        """Return what cannot be true of jobs that follow the rules, one sentence each."""
        moves: defaultdict[str, list[Noted]] = defaultdict(list)
        for noted in self.moves():
            moves[noted.job_id].append(noted)
        endings = {
            row[0]: row[1:] for row in self._rows("SELECT lease_id, job_id, attempt, outcome FROM attempts")
        }
        found = [problem for history in moves.values() for problem in _of_one_job(history, endings)]
        found += _of_leases([noted for history in moves.values() for noted in history], endings)
        found += self._of_results(moves)
        ends = {job_id: history[-1].target for job_id, history in moves.items()}
        for job_id, state in self._rows("SELECT id, state FROM jobs"):
            if ends.get(job_id) != state:
                found.append(f"{job_id} is {state}, but its last move was to {ends.get(job_id)}")
        return found

    def late_commits(self) -> int:
        """Return how many results were stored after the lease's end, while it was still the job's own."""
        return sum(noted.is_late for noted in self.moves() if noted.target == JobState.SUCCEEDED)

    def moves(self) -> list[Noted]:
        """Return all moves in their order."""
        columns = "at, job_id, source, target, lease_before, lease_after, until_before"
        statement = f"SELECT {columns}, attempt_before, attempt_after FROM witnessed_moves ORDER BY id"
        return [Noted(*row) for row in self._rows(statement)]

    def _of_results(self, moves: dict[str, list[Noted]]) -> Iterator[str]:
        inserted: Counter[str] = Counter()
        for job_id, what, attempt in self._rows(
            "SELECT job_id, what, attempt FROM witnessed_results ORDER BY id"
        ):
            inserted[job_id] += 1
            won = [noted for noted in moves[job_id] if noted.target == JobState.SUCCEEDED]
            if what != "insert":
                yield f"{job_id}: {what} of a result"
            elif [noted.attempt_before for noted in won] != [attempt]:
                yield f"{job_id}: a result of attempt {attempt}, but the attempt did not succeed"
        for job_id, history in moves.items():
            succeeded = sum(noted.target == JobState.SUCCEEDED for noted in history)
            if succeeded != inserted[job_id] or succeeded > 1:
                yield f"{job_id}: succeeded {succeeded} times with {inserted[job_id]} results"

    def _rows(self, statement: str) -> list[tuple[Any, ...]]:
        if self._url.startswith("sqlite"):
            with contextlib.closing(self._sqlite()) as connection:
                return list(connection.execute(statement))
        with psycopg.connect(self._url) as connection:
            return list(connection.execute(statement.encode()))

    def _sqlite(self) -> sqlite3.Connection:
        return sqlite3.connect(self._url.removeprefix("sqlite:///"), timeout=60)


def _of_one_job(history: list[Noted], endings: dict[str, tuple[Any, ...]]) -> Iterator[str]:
    first, name = history[0], history[0].job_id
    if (first.source, first.target, first.lease_after, first.attempt_after) != ("", "queued", None, 0):
        yield f"{name}: did not begin queued: {first}"
    for before, noted in itertools.pairwise(history):
        if (noted.source, noted.target) not in _LEGAL:
            yield f"{name}: {noted.source} -> {noted.target} is no legal move"
        known = (before.target, before.lease_after, before.attempt_after)
        if (noted.source, noted.lease_before, noted.attempt_before) != known:
            yield f"{name}: {noted} does not follow {before}"
        expected, reason = _expected(noted, endings)
        if (noted.attempt_after, noted.lease_after is not None) != expected:
            yield f"{name}: {noted}, but after {reason} attempt and lease should be {expected}"


def _expected(noted: Noted, endings: dict[str, tuple[Any, ...]]) -> tuple[tuple[int, bool], str]:
    """Return the attempt's number and whether there is a lease, after a move; and the move's name."""
    attempt = noted.attempt_before or 0
    if noted.is_claim:
        return (attempt + 1, True), Move.CLAIM
    if noted.source == JobState.RUNNING:
        move = endings.get(noted.lease_before or "", ("", 0, "no ending"))[2]
        return (attempt - (move == Move.RELEASE), False), str(move)
    if noted.target == JobState.QUEUED:
        return (0, False), Move.REQUEUE
    return (attempt, False), noted.target


def _of_leases(moves: list[Noted], endings: dict[str, tuple[Any, ...]]) -> Iterator[str]:
    given = Counter(noted.lease_after for noted in moves if noted.is_claim)
    yield from (f"lease {lease} was given {count} times" for lease, count in given.items() if count > 1)
    ended = {noted.lease_before: noted for noted in moves if noted.source == JobState.RUNNING}
    yield from (
        f"attempt of lease {lease} ended, but the job did not move" for lease in endings.keys() - ended
    )
    for lease, noted in ended.items():
        job_id, attempt, outcome = endings.get(lease or "", ("", 0, ""))
        if (job_id, attempt) != (noted.job_id, noted.attempt_before):
            yield f"{noted.job_id}: history of lease {lease} says attempt {attempt} of {job_id or 'no job'}"
        elif MOVES.get((Move(outcome), JobState.RUNNING)) != noted.target:
            yield f"{noted.job_id}: history says {outcome}, but the job went to {noted.target}"
        if outcome == Move.REAP and not noted.is_late:
            yield f"{noted.job_id}: taken back {noted.until_before} before its lease ended at {noted.at}"
