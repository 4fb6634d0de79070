"""The runs of a backfill: which files and targets there are, what was asked for each, and what came of it.

Owns: the rows of runs, files, targets, questions and candidates, and every move of them. A question is a
job, known by its id alone: jobs are pruned on their own, and one that is gone has ended. Does not know git,
Python code or prompts.

Every move is one transaction that decides by the rows as they are at that moment, so any number of processes
may work on a run, and whoever was killed between two calls may repeat the last one: what was done already is
left as it is. A file is judged exchange by exchange, and who is late with an exchange changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Self

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    LargeBinary,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)

from codeherd_schema.backfill_rows import (
    MAX_PATH,
    MAX_REASON,
    Candidate,
    File,
    NewFile,
    NewQuestion,
    NewTarget,
    Progress,
    Run,
    Target,
    Verdict,
    candidate_of,
    candidate_row,
    file_of,
    file_row,
    kept_path,
    kept_reason,
    path_bytes,
    run_of,
    target_of,
    target_row,
)
from codeherd_schema.backfill_states import FILE_MOVES, OPEN_FILES, FileState, RunState, TargetState
from codeherd_schema.database import Database, clock, insert_many, insert_or_leave, now
from codeherd_schema.errors import RunNotFound
from codeherd_schema.job_ids import JobIds
from codeherd_schema.states import JobState
from codeherd_schema.tables import (
    backfill_candidates,
    backfill_files,
    backfill_questions,
    backfill_runs,
    backfill_targets,
    jobs,
    state_is,
)

__all__ = [
    "MAX_PATH",
    "MAX_REASON",
    "Backfills",
    "Candidate",
    "File",
    "FileState",
    "NewFile",
    "NewQuestion",
    "NewTarget",
    "Progress",
    "Run",
    "RunState",
    "Target",
    "TargetState",
    "Verdict",
]

#: Files that one transaction of `delete` takes away, so that nobody waits long for the lock.
DELETE_LIMIT: Final = 200

# Built once: a run of many files sends each of these thousands of times.
_FILES: Final[Select[Any]] = select(*backfill_files.c)
_FILE: Final = _FILES.where(
    backfill_files.c.run_id == bindparam("this_run"), backfill_files.c.path == bindparam("this_path")
)
_TARGETS: Final = (
    select(*backfill_targets.c)
    .where(backfill_targets.c.file_id == bindparam("this_file"))
    .order_by(backfill_targets.c.place)
)
_QUESTIONS: Final = (
    select(*backfill_questions.c)
    .where(
        backfill_questions.c.file_id == bindparam("this_file"),
        backfill_questions.c.exchange == bindparam("this_exchange"),
    )
    .order_by(backfill_questions.c.target_id, backfill_questions.c.number)
)
_CANDIDATES: Final = (
    select(*backfill_candidates.c)
    .where(backfill_candidates.c.target_id == bindparam("this_target"))
    .order_by(backfill_candidates.c.exchange, backfill_candidates.c.number, backfill_candidates.c.place)
)


def _are_asked(files: FromClause) -> ColumnElement[bool]:
    return and_(files.c.run_id == bindparam("this_run"), files.c.state == FileState.ASKED.value)


def _pending_jobs(files: FromClause) -> Select[Any]:
    """Select the jobs of a file's last exchange that have not ended, for each of `files`."""
    return (
        select(jobs.c.id)
        .select_from(jobs)
        .join(backfill_questions, backfill_questions.c.job_id == jobs.c.id)
        .where(
            backfill_questions.c.file_id == files.c.id,
            backfill_questions.c.exchange == files.c.exchange,
            state_is(JobState.QUEUED, JobState.RUNNING),
        )
        .correlate(files)
    )


# The jobs are looked for file by file, in scalar subqueries: of `NOT EXISTS` or a join PostgreSQL would make
# one reading of all questions and jobs for a few files.
_READY: Final = (
    _FILES.where(
        _are_asked(backfill_files), _pending_jobs(backfill_files).limit(1).scalar_subquery().is_(None)
    )
    .order_by(backfill_files.c.path)
    .limit(bindparam("most", type_=Integer))
)
_ASKED: Final = backfill_files.alias("asked")
_WAITING: Final = select(
    func.coalesce(func.sum(_pending_jobs(_ASKED).with_only_columns(func.count()).scalar_subquery()), 0)
).where(_are_asked(_ASKED))
_ASK: Final = (
    update(backfill_files)
    .where(
        backfill_files.c.id == bindparam("this_file"),
        backfill_files.c.state.in_(sorted(FILE_MOVES[FileState.ASKED])),
        backfill_files.c.exchange < bindparam("this_exchange"),
    )
    .values(
        state=FileState.ASKED.value,
        exchange=bindparam("this_exchange"),
        questions=backfill_files.c.questions + bindparam("more"),
    )
)
_SETTLE: Final = (
    update(backfill_files)
    .where(
        backfill_files.c.id == bindparam("this_file"),
        backfill_files.c.state.in_(sorted(OPEN_FILES)),
        backfill_files.c.exchange == bindparam("this_exchange"),
    )
    .values(state=func.coalesce(bindparam("new_state"), backfill_files.c.state))
)
_JUDGE: Final = (
    update(backfill_targets)
    .where(
        backfill_targets.c.id == bindparam("this_target"),
        backfill_targets.c.file_id == bindparam("this_file"),
        backfill_targets.c.state == TargetState.OPEN.value,
    )
    .values(
        state=bindparam("new_state"),
        text=bindparam("new_text"),
        reason=bindparam("new_reason"),
        score=bindparam("new_score"),
        exchange=bindparam("this_exchange"),
    )
)


def _targets_that_are(state: TargetState) -> Any:
    return (
        select(func.count())
        .select_from(backfill_targets)
        .where(backfill_targets.c.file_id == backfill_files.c.id, backfill_targets.c.state == state.value)
        .scalar_subquery()
    )


_COUNT: Final = (
    update(backfill_files)
    .where(backfill_files.c.id == bindparam("this_file"))
    .values(
        accepted=_targets_that_are(TargetState.ACCEPTED),
        rejected=_targets_that_are(TargetState.REJECTED),
        # Counted anew, not up: a repeat brings candidates that are there.
        tokens=select(func.coalesce(func.sum(backfill_candidates.c.tokens), 0))
        .join(backfill_targets, backfill_targets.c.id == backfill_candidates.c.target_id)
        .where(backfill_targets.c.file_id == backfill_files.c.id)
        .scalar_subquery(),
    )
)
_PROGRESS: Final = (
    select(
        backfill_files.c.state,
        func.count().label("files"),
        *(
            func.sum(column).label(column.name)
            for column in (
                backfill_files.c.documented,
                backfill_files.c.targets,
                backfill_files.c.accepted,
                backfill_files.c.rejected,
                backfill_files.c.questions,
                backfill_files.c.tokens,
            )
        ),
        # In the same statement, else more could be waited for than was asked.
        _WAITING.scalar_subquery().label("waiting"),
    )
    .where(backfill_files.c.run_id == bindparam("this_run"))
    .group_by(backfill_files.c.state)
)


class Backfills:
    """All runs of one database; threads may share it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ids = JobIds()

    @classmethod
    def open(cls, url: str, **options: Any) -> Self:
        """Open the database at `url`; `options` are those of `Database.open`."""
        return cls(Database.open(url, **options))

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def create(self, root: str, model: str, options: Mapping[str, Any]) -> Run:
        """Make a run that is being planned.

        Args:
            root: the folder.
            model: which is asked, at most 64 characters.
            options: whatever JSON can hold.
        """

        def work(connection: Connection) -> Run:
            now_s = clock(connection)
            values = {
                "id": self._ids.take(1, now_s=now_s)[0],
                "root": path_bytes(root),
                "model": model,
                "options": json.dumps(dict(options)),
                "state": RunState.PLANNING.value,
                "created_at": now_s,
            }
            row = connection.execute(
                backfill_runs.insert().values(**values).returning(*backfill_runs.c)
            ).one()
            return run_of(row)

        return self._database.write(work)

    def get(self, run_id: str) -> Run:
        """Return the run as it is now.

        Raises:
            RunNotFound: there is none of this id.
        """
        with self._database.read() as connection:
            row = connection.execute(
                select(*backfill_runs.c).where(backfill_runs.c.id == run_id)
            ).one_or_none()
        if row is None:
            raise _no_run(run_id)
        return run_of(row)

    def set_state(self, run_id: str, state: RunState) -> None:
        """Say where the run is; a repeat leaves the time of the first, as a look at a run that is done does.

        Raises:
            RunNotFound: there is no such run.
        """
        was, ended_at = backfill_runs.c.state, backfill_runs.c.finished_at
        is_kept = was == state.value
        if state is RunState.RUNNING:
            # Taken up again there is nothing left to do in it, so that it is done at once.
            is_kept = or_(is_kept, was == RunState.DONE.value)
        elif state is RunState.DONE:
            is_kept = or_(is_kept, and_(was == RunState.RUNNING.value, ended_at.is_not(None)))
        ends = state in {RunState.DONE, RunState.STOPPED}
        finished_at = case((is_kept, ended_at), else_=now() if ends else None)
        statement = (
            update(backfill_runs)
            .where(backfill_runs.c.id == run_id)
            .values(state=state.value, finished_at=finished_at)
        )
        if self._database.write(lambda connection: connection.execute(statement).rowcount) == 0:
            raise _no_run(run_id)

    def delete(self, run_id: str) -> bool:
        """Delete the run with everything of it but its jobs; return whether it was there.

        Takes many short transactions: who is killed meanwhile may call it again.
        """
        some = (
            select(backfill_files.c.id)
            .where(backfill_files.c.run_id == run_id)
            .limit(DELETE_LIMIT)
            .scalar_subquery()
        )
        files = delete(backfill_files).where(backfill_files.c.id.in_(some))
        while self._database.write(lambda connection: connection.execute(files).rowcount):
            pass
        run = delete(backfill_runs).where(backfill_runs.c.id == run_id)
        return self._database.write(lambda connection: connection.execute(run).rowcount) == 1

    def add_files(self, run_id: str, files: Iterable[NewFile]) -> int:
        """Add files with their targets in one transaction; return how many were new.

        A file with a reason is `SKIPPED`, one without targets is `DONE`, the others are `PLANNED`. A path
        that is there already is left as it is, with its targets: planning may be repeated.

        Args:
            run_id: whose.
            files: some hundreds at a time, not all of a large repository.

        Raises:
            InvalidRequest: a path is longer than `MAX_PATH`; nothing was added.
            RunNotFound: there is no such run.
        """
        # Racing planners take the same paths in the same order, so that none waits in a circle.
        planned = {
            kept_path(file.path): file for file in sorted(files, key=lambda file: path_bytes(file.path))
        }
        if not planned:
            return 0

        def work(connection: Connection) -> int:
            # Held until the end, so that a delete waits.
            run = select(backfill_runs.c.id).where(backfill_runs.c.id == run_id)
            if connection.scalar(run.with_for_update(read=True, key_share=True)) is None:
                raise _no_run(run_id)
            return _add(connection, run_id, planned)

        return self._database.write(work)

    def replan(self, file: File, planned: NewFile) -> bool:
        """Put a new plan of a file in the place of one of which nothing was asked.

        It is a new row with another id: whoever still works by the old plan changes nothing any more.

        Args:
            file: as it was read.
            planned: of the same path.

        Returns:
            Whether it was done. If not, something was asked, or the file was planned anew before.
        """
        if planned.path != file.path:
            raise ValueError(f"a plan of `{planned.path}` is none of `{file.path}`")
        gone = delete(backfill_files).where(
            backfill_files.c.id == file.id,
            backfill_files.c.state == FileState.PLANNED.value,
        )

        def work(connection: Connection) -> bool:
            if connection.execute(gone).rowcount == 0:
                return False
            _add(connection, file.run_id, {kept_path(planned.path): planned})
            return True

        return self._database.write(work)

    def files(
        self, run_id: str, *, states: Collection[FileState], after: str = "", limit: int = 100
    ) -> list[File]:
        """Return the run's files in these states in order of their paths' bytes.

        Args:
            run_id: whose.
            states: at least one.
            after: only paths after this one: the last of the page before.
            limit: most files.
        """
        # A part for each state: together they would be read in no order, or without the states' index.
        parts = (
            _FILES.where(
                backfill_files.c.run_id == run_id,
                backfill_files.c.state == state.value,
                backfill_files.c.path > literal(path_bytes(after), LargeBinary),
            )
            .order_by(backfill_files.c.path)
            .limit(limit)
            .subquery()
            for state in sorted(set(states))
        )
        every = union_all(*(select(part) for part in parts)).subquery()
        statement = select(every).order_by(every.c.path).limit(limit)
        with self._database.read() as connection:
            return [file_of(row) for row in connection.execute(statement)]

    def file(self, run_id: str, path: str) -> File | None:
        """Return the run's file at this path."""
        with self._database.read() as connection:
            row = connection.execute(_FILE, {"this_run": run_id, "this_path": path_bytes(path)}).one_or_none()
        return None if row is None else file_of(row)

    def targets(self, file_id: int) -> list[Target]:
        """Return the targets of a file in the order of the source."""
        with self._database.read() as connection:
            return [target_of(row) for row in connection.execute(_TARGETS, {"this_file": file_id})]

    def questions(self, file_id: int, exchange: int) -> list[NewQuestion]:
        """Return what was asked for a file in one exchange, by target and number."""
        values = {"this_file": file_id, "this_exchange": exchange}
        with self._database.read() as connection:
            return [
                NewQuestion(row.target_id, row.exchange, row.number, row.job_id)
                for row in connection.execute(_QUESTIONS, values)
            ]

    def candidates(self, target_id: int) -> list[Candidate]:
        """Return every judged text of a target, in the order in which they were asked for."""
        with self._database.read() as connection:
            return [candidate_of(row) for row in connection.execute(_CANDIDATES, {"this_target": target_id})]

    def ask(self, file_id: int, exchange: int, questions: Sequence[NewQuestion]) -> bool:
        """Keep which jobs were submitted for the next exchange of a file, which is then `ASKED`.

        Args:
            file_id: whose.
            exchange: greater than that of the file, from 0.
            questions: all of this exchange.

        Returns:
            Whether they were taken. If not, this exchange or a later one is asked already, or the file is
            no longer open; nothing was changed.
        """
        if any(question.exchange != exchange for question in questions):
            raise ValueError(f"a question is not of exchange {exchange}")
        rows = [
            {
                "file_id": file_id,
                "exchange": exchange,
                "target_id": question.target_id,
                "number": question.number,
                "job_id": question.job_id,
            }
            for question in questions
        ]
        values = {"this_file": file_id, "this_exchange": exchange, "more": len(rows)}

        def work(connection: Connection) -> bool:
            if connection.execute(_ASK, values).rowcount == 0:
                return False
            if rows:
                insert_many(connection, backfill_questions, rows)
            return True

        return self._database.write(work)

    def ready(self, run_id: str, limit: int) -> list[File]:
        """Return `ASKED` files of whose last exchange no job is queued or running, in order of their paths.

        Costs a look at the jobs of the files that are asked at this moment, however large the run is.
        """
        with self._database.read() as connection:
            return [file_of(row) for row in connection.execute(_READY, {"this_run": run_id, "most": limit})]

    def waiting(self, run_id: str) -> int:
        """Return how many questions `ASKED` files wait for."""
        with self._database.read() as connection:
            return int(connection.execute(_WAITING, {"this_run": run_id}).scalar_one())

    def settle(
        self,
        file_id: int,
        exchange: int,
        *,
        candidates: Iterable[Candidate],
        verdicts: Iterable[Verdict],
        state: FileState | None,
    ) -> bool:
        """Keep what an exchange brought, in one transaction; a repeat changes nothing.

        Candidates that are there are left, and so is every target that was accepted or rejected before.

        Args:
            file_id: whose.
            exchange: that was judged; -1 for what is known before anything is asked.
            candidates: texts of the file's targets.
            verdicts: at most one for each of its targets.
            state: `DONE` when nothing more will be asked; None leaves it.

        Returns:
            Whether the file was open and at this exchange. If not, nothing was changed: another process
            did it before and went on.
        """
        if state not in {None, FileState.DONE}:
            raise ValueError(f"a file cannot be settled as `{state}`")
        texts = [candidate_row(candidate) for candidate in candidates]
        judged = [
            {
                "this_file": file_id,
                "this_exchange": exchange,
                "this_target": verdict.target_id,
                "new_state": verdict.state.value,
                "new_text": None if verdict.text is None else json.dumps(verdict.text),
                "new_reason": kept_reason(verdict.reason),
                "new_score": verdict.score,
            }
            for verdict in verdicts
        ]
        values = {"this_file": file_id, "this_exchange": exchange, "new_state": state and state.value}

        def work(connection: Connection) -> bool:
            # Also the lock under which the rest is done.
            if connection.execute(_SETTLE, values).rowcount == 0:
                return False
            if texts:
                keys = list(backfill_candidates.primary_key.columns)
                connection.execute(insert_or_leave(connection, backfill_candidates, keys), texts)
            if judged:
                connection.execute(_JUDGE, judged)
            connection.execute(_COUNT, {"this_file": file_id})
            return True

        return self._database.write(work)

    def set_file_state(self, file_id: int, state: FileState, reason: str | None = None) -> bool:
        """Move a file, if `backfill_states.FILE_MOVES` allows it from the state that it is in.

        Args:
            file_id: which.
            state: where to; what is `ASKED` has been asked (`ask`).
            reason: kept with it, at most `MAX_REASON` characters.

        Returns:
            Whether it was moved.
        """
        if state is FileState.ASKED:
            raise ValueError("a file is `asked` by asking")
        statement = (
            update(backfill_files)
            .where(backfill_files.c.id == file_id, backfill_files.c.state.in_(sorted(FILE_MOVES[state])))
            .values(state=state.value, reason=kept_reason(reason))
        )
        return self._database.write(lambda connection: connection.execute(statement).rowcount) == 1

    def progress(self, run_id: str) -> Progress:
        """Return how the run stands; costs a look at each of its files, not at the targets."""
        with self._database.read() as connection:
            rows = connection.execute(_PROGRESS, {"this_run": run_id}).all()
        files = {row.state: row.files for row in rows}
        # PostgreSQL's sums of large integers are Decimals.
        total = {
            name: int(sum(getattr(row, name) for row in rows))
            for name in ("documented", "targets", "accepted", "rejected", "questions", "tokens")
        }
        waiting = int(rows[0].waiting) if rows else 0
        return Progress(
            files={state: files.get(state.value, 0) for state in FileState},
            targets={
                TargetState.OPEN: total["targets"] - total["accepted"] - total["rejected"],
                TargetState.ACCEPTED: total["accepted"],
                TargetState.REJECTED: total["rejected"],
            },
            documented=total["documented"],
            asked=total["questions"],
            ended=total["questions"] - waiting,
            tokens=total["tokens"],
        )

    def reasons(self, run_id: str) -> dict[str, int]:
        """Return how many targets were rejected, by the reason of the last rejection; the most first."""
        reason = func.coalesce(backfill_targets.c.reason, "")
        statement = (
            select(reason.label("reason"), func.count().label("found"))
            .join(backfill_files, backfill_files.c.id == backfill_targets.c.file_id)
            .where(backfill_files.c.run_id == run_id, backfill_targets.c.state == TargetState.REJECTED.value)
            .group_by(reason)
        )
        return self._by_reason(statement)

    def skipped(self, run_id: str) -> dict[str, int]:
        """Return how many files are `SKIPPED`, by reason; the most first."""
        reason = func.coalesce(backfill_files.c.reason, "")
        statement = (
            select(reason.label("reason"), func.count().label("found"))
            .where(backfill_files.c.run_id == run_id, backfill_files.c.state == FileState.SKIPPED.value)
            .group_by(reason)
        )
        return self._by_reason(statement)

    def passed_over(self, run_id: str) -> dict[str, int]:
        """Return how many symbols of all files are no targets, by reason; the most first."""
        counts: dict[str, int] = {}
        statement = (
            select(backfill_files.c.passed_over, func.count().label("found"))
            .where(backfill_files.c.run_id == run_id)
            .group_by(backfill_files.c.passed_over)
        )
        with self._database.read() as connection:
            for row in connection.execute(statement):
                for reason, count in json.loads(row.passed_over).items():
                    counts[reason] = counts.get(reason, 0) + count * row.found
        return _the_most_first(counts)

    def targets_named(self, run_id: str, name: str, *, limit: int = 50) -> list[tuple[File, Target]]:
        """Return targets of this qualified name, or whose name ends with it, by path and place.

        Reads every target of the run.

        Args:
            run_id: whose.
            name: `A.f` finds `A.f` and `B.A.f`, but not `BA.f`.
            limit: most targets.
        """
        end = f".{name}"
        found = backfill_targets.c.name
        statement = (
            select(*backfill_targets.c)
            .join(backfill_files, backfill_files.c.id == backfill_targets.c.file_id)
            .where(
                backfill_files.c.run_id == run_id,
                # No LIKE: SQLite's ignores case.
                or_(found == name, func.substr(found, func.length(found) - (len(end) - 1)) == end),
            )
            .order_by(backfill_files.c.path, backfill_targets.c.place)
            .limit(limit)
        )
        with self._database.read() as connection:
            targets = [target_of(row) for row in connection.execute(statement)]
            files = {
                row.id: file_of(row)
                for row in connection.execute(
                    _FILES.where(backfill_files.c.id.in_({target.file_id for target in targets}))
                )
            }
        return [(files[target.file_id], target) for target in targets if target.file_id in files]

    def _by_reason(self, statement: Select[Any, Any]) -> dict[str, int]:
        with self._database.read() as connection:
            return _the_most_first({row.reason: row.found for row in connection.execute(statement)})

    # The last method: after it, `list` in this class is no longer the type.
    def list(self, limit: int = 50) -> list[Run]:
        """Return the newest runs, newest first."""
        statement = select(*backfill_runs.c).order_by(backfill_runs.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            return [run_of(row) for row in connection.execute(statement)]


def _add(connection: Connection, run_id: str, planned: Mapping[bytes, NewFile]) -> int:
    """Insert files with their targets, but for those whose path is there; return how many."""
    statement = insert_or_leave(
        connection, backfill_files, [backfill_files.c.run_id, backfill_files.c.path]
    ).returning(backfill_files.c.id, backfill_files.c.path)
    rows = [file_row(run_id, path, file) for path, file in planned.items()]
    added = connection.execute(statement, rows).all()
    targets = [target_row(row.id, target) for row in added for target in planned[row.path].targets]
    if targets:
        insert_many(connection, backfill_targets, targets)
    return len(added)


def _no_run(run_id: str) -> RunNotFound:
    return RunNotFound(f"no run has the id `{run_id}`")


def _the_most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
