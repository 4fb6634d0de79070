from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import Engine, delete, event, exc, func, insert, select

from codeherd_schema.backfill_states import FILE_MOVES
from codeherd_schema.backfills import (
    DELETE_LIMIT,
    MAX_PATH,
    MAX_REASON,
    Backfills,
    Candidate,
    File,
    FileState,
    NewFile,
    NewQuestion,
    NewTarget,
    Progress,
    Run,
    RunState,
    Target,
    TargetState,
    Verdict,
)
from codeherd_schema.database import COPY_FROM, Database
from codeherd_schema.errors import InvalidRequest, RunNotFound, SchemaOutdated
from codeherd_schema.store import Store
from codeherd_schema.tables import (
    backfill_candidates,
    backfill_files,
    backfill_questions,
    backfill_runs,
    backfill_targets,
)
from tests.samples import a_request, delete_all_jobs, opened, texts

SHA = "0" * 64
#: Of the code of some target.
CODE = "c" * 64
#: Every table of a run.
TABLES = (backfill_runs, backfill_files, backfill_targets, backfill_questions, backfill_candidates)


@pytest.fixture
def backfills(database_url: str) -> Iterator[Backfills]:
    """All runs of a database that has none."""
    with opened(database_url) as database, database.begin() as connection:
        connection.execute(delete(backfill_runs))
    backfills = Backfills.open(database_url, pool_size=20)
    yield backfills
    backfills.close()


@pytest.fixture
def run(backfills: Backfills) -> Run:
    return backfills.create("/repo", "tiny", {})


def a_file(path: str = "a.py", *names: str, **fields: Any) -> NewFile:
    """A planned file with a target of each name."""
    targets = (
        NewTarget(place, name, 0, 10 * place + 1, "function", CODE) for place, name in enumerate(names)
    )
    return NewFile(path, SHA, encoding="utf-8", targets=tuple(targets), **fields)


def added(backfills: Backfills, run: Run, path: str = "a.py", *names: str) -> tuple[File, list[Target]]:
    """One file that is in the run now, and its targets."""
    backfills.add_files(run.id, [a_file(path, *names)])
    file = backfills.file(run.id, path)
    assert file is not None
    return file, backfills.targets(file.id)


def again(backfills: Backfills, file: File) -> File:
    """The same file as it is now."""
    found = backfills.file(file.run_id, file.path)
    assert found is not None
    return found


def submitted(store: Store, count: int = 1) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request()] * count)]


def asked(
    backfills: Backfills, store: Store, run: Run, path: str = "a.py", *names: str, exchange: int = 0
) -> tuple[File, list[Target], list[str]]:
    """A file with one job asked for each target."""
    file, targets = added(backfills, run, path, *(names or ("f",)))
    ids = submitted(store, len(targets))
    assert ask(backfills, file, exchange, targets, ids)
    return again(backfills, file), targets, ids


def ask(backfills: Backfills, file: File, exchange: int, targets: list[Target], ids: list[str]) -> bool:
    questions = [NewQuestion(target.id, exchange, 0, job) for target, job in zip(targets, ids, strict=True)]
    return backfills.ask(file.id, exchange, questions)


def settle(
    backfills: Backfills,
    file: File,
    *verdicts: Verdict,
    candidates: tuple[Candidate, ...] = (),
    state: FileState | None = None,
    exchange: int | None = None,
) -> bool:
    return backfills.settle(
        file.id,
        file.exchange if exchange is None else exchange,
        candidates=candidates,
        verdicts=verdicts,
        state=state,
    )


def a_candidate(target: Target, text: str = "Do it.", exchange: int = 0, **fields: Any) -> Candidate:
    whole = {"number": 0, "index": 0, "seed": 7, "tokens": 5, **fields}
    return Candidate(target_id=target.id, exchange=exchange, text=text, **whole)


def paths(files: list[File]) -> list[str]:
    return [file.path for file in files]


def row_counts(database_url: str) -> list[int]:
    """How many rows each table of `TABLES` has."""
    with opened(database_url) as database, database.read() as connection:
        return [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in TABLES]


def at_once(count: int, work: Callable[[int], object]) -> list[object]:
    """Run `work` in so many threads that start together; raises what one of them raised."""
    start, found, errors = threading.Barrier(count), list[object](), list[BaseException]()

    def run(number: int) -> None:
        start.wait()
        try:
            found.append(work(number))
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


# Runs.


def test_a_run_is_read_back_as_it_was_made(backfills: Backfills) -> None:
    options = {"rounds": [[0.0, 1]], "salt": "\0é\ud800", "none": None}

    made = backfills.create("/répo/\udcff", "tiny", options)

    assert backfills.get(made.id) == made
    assert (made.root, made.model, made.options) == ("/répo/\udcff", "tiny", options)
    assert (made.state, made.finished_at) == (RunState.PLANNING, None)


def test_runs_are_listed_newest_first(backfills: Backfills) -> None:
    made = [backfills.create("/repo", "tiny", {}) for _ in range(4)]

    assert backfills.list(limit=3) == made[:0:-1]


def test_a_run_has_an_end_while_it_is_done_or_stopped(backfills: Backfills, run: Run) -> None:
    ends = {}
    for state in (RunState.RUNNING, RunState.STOPPED, RunState.RUNNING, RunState.DONE):
        backfills.set_state(run.id, state)
        now = backfills.get(run.id)
        assert now.state is state
        ends[state] = now.finished_at

    stopped_at, done_at = ends[RunState.STOPPED], ends[RunState.DONE]
    assert ends[RunState.RUNNING] is None
    assert stopped_at is not None
    assert done_at is not None
    assert run.created_at <= stopped_at <= done_at


def test_a_run_that_is_said_to_be_done_twice_ended_the_first_time(
    backfills: Backfills, run: Run, database_url: str
) -> None:
    backfills.set_state(run.id, RunState.DONE)
    with opened(database_url) as database, database.begin() as connection:
        connection.execute(backfill_runs.update().values(finished_at=1.0))

    backfills.set_state(run.id, RunState.DONE)

    finished_at = backfills.get(run.id).finished_at
    assert finished_at is not None
    assert finished_at.timestamp() == 1.0


def test_a_run_that_is_done_keeps_its_end_when_it_is_taken_up_again_and_one_that_stopped_does_not(
    backfills: Backfills, run: Run, database_url: str
) -> None:
    def ended_at(*states: RunState) -> float | None:
        """When the run ended that came to these states after it had ended at second 1."""
        with opened(database_url) as database, database.begin() as connection:
            connection.execute(backfill_runs.update().values(finished_at=1.0))
        for state in states:
            backfills.set_state(run.id, state)
        finished_at = backfills.get(run.id).finished_at
        return None if finished_at is None else finished_at.timestamp()

    done, running, stopped = RunState.DONE, RunState.RUNNING, RunState.STOPPED
    backfills.set_state(run.id, done)

    assert ended_at(running, done) == 1.0
    assert ended_at(running, running, done, running, done) == 1.0
    # A budget or somebody ended it now.
    assert (ended_at(running, stopped) or 0) > 1.0
    assert ended_at(running) is None
    assert (ended_at(stopped, running, done) or 0) > 1.0


def test_a_run_that_does_not_exist_is_said_so(backfills: Backfills) -> None:
    calls: list[Callable[[], object]] = [
        lambda: backfills.get("nope"),
        lambda: backfills.set_state("nope", RunState.DONE),
        lambda: backfills.add_files("nope", [a_file()]),
    ]

    for call in calls:
        with pytest.raises(RunNotFound, match="`nope`"):
            call()
    assert backfills.progress("nope").asked == 0
    assert backfills.delete("nope") is False


def test_a_deleted_run_leaves_nothing_but_its_jobs(
    backfills: Backfills, store: Store, run: Run, database_url: str
) -> None:
    file, [target], ids = asked(backfills, store, run)
    settle(backfills, file, candidates=(a_candidate(target),))
    other = backfills.create("/other", "tiny", {})
    added(backfills, other, "b.py", "g")

    assert backfills.delete(run.id) is True

    assert backfills.list() == [other]
    assert row_counts(database_url) == [1, 1, 1, 0, 0]
    assert store.pending(ids) == set(ids)
    assert backfills.delete(run.id) is False


def test_a_run_of_many_files_is_deleted_whole(backfills: Backfills, run: Run, database_url: str) -> None:
    count = 2 * DELETE_LIMIT + 1
    backfills.add_files(run.id, [a_file(f"{number:04}.py", "f") for number in range(count)])

    backfills.delete(run.id)

    assert row_counts(database_url) == [0] * len(TABLES)


def test_ids_of_a_deleted_run_are_not_given_again(backfills: Backfills, run: Run) -> None:
    file, [target] = added(backfills, run, "a.py", "f")
    backfills.delete(run.id)

    newer, [newer_target] = added(backfills, backfills.create("/repo", "tiny", {}), "a.py", "f")

    assert newer.id > file.id
    assert newer_target.id > target.id


# Files and targets.


def test_a_planned_file_is_read_back_with_its_targets_in_order(backfills: Backfills, run: Run) -> None:
    targets = (
        NewTarget(place=7, name="A.f", twin=1, line=30, kind="method", code_sha256=SHA),
        NewTarget(place=2, name="", twin=0, line=1, kind="module", code_sha256=CODE),
    )
    planned = NewFile(
        "pkg/a.py", SHA, encoding="latin-1", documented=3, passed_over={"private": 2}, targets=targets
    )

    assert backfills.add_files(run.id, [planned]) == 1

    file = backfills.file(run.id, "pkg/a.py")
    assert file is not None
    assert file == File(
        id=file.id,
        run_id=run.id,
        path="pkg/a.py",
        sha256=SHA,
        encoding="latin-1",
        state=FileState.PLANNED,
        reason=None,
        exchange=-1,
        documented=3,
        passed_over={"private": 2},
        targets=2,
        accepted=0,
        rejected=0,
    )
    module, method = backfills.targets(file.id)
    assert [module.place, method.place] == [2, 7]
    assert method == Target(
        id=method.id,
        file_id=file.id,
        place=7,
        name="A.f",
        twin=1,
        line=30,
        kind="method",
        code_sha256=SHA,
        state=TargetState.OPEN,
        text=None,
        reason=None,
        score=None,
        exchange=-1,
    )
    assert backfills.file(run.id, "pkg/b.py") is None


def test_what_needs_no_work_is_never_open(backfills: Backfills, run: Run) -> None:
    backfills.add_files(run.id, [a_file("left.py", reason="symbolic link"), a_file("full.py")])

    left, full = backfills.file(run.id, "left.py"), backfills.file(run.id, "full.py")
    assert left is not None
    assert full is not None
    assert (left.state, left.reason) == (FileState.SKIPPED, "symbolic link")
    assert (full.state, full.reason) == (FileState.DONE, None)


def test_a_repeated_plan_leaves_what_is_there(backfills: Backfills, run: Run, database_url: str) -> None:
    file, _ = added(backfills, run, "a.py", "f", "g")
    backfills.set_file_state(file.id, FileState.SKIPPED, "why not")
    before = again(backfills, file)

    repeated = [a_file("b.py", "h"), a_file("a.py", "x", "y", "z"), a_file("b.py", "h")]
    assert backfills.add_files(run.id, repeated) == 1

    assert again(backfills, file) == before
    assert [target.name for target in backfills.targets(file.id)] == ["f", "g"]
    assert row_counts(database_url)[:3] == [1, 2, 3]
    assert backfills.add_files(run.id, []) == 0


def test_planners_of_the_same_run_add_each_file_once(
    backfills: Backfills, run: Run, database_url: str
) -> None:
    files = [a_file(f"{number}.py", "f", "g") for number in range(60)]

    counts = at_once(4, lambda number: backfills.add_files(run.id, files[::-1] if number % 2 else files))

    assert sorted(map(str, counts)) == ["0", "0", "0", "60"]
    assert row_counts(database_url)[:3] == [1, 60, 120]
    assert backfills.progress(run.id).targets[TargetState.OPEN] == 120


def test_any_number_of_files_and_targets_comes_in_at_once(backfills: Backfills, run: Run) -> None:
    files = [a_file(f"{number:05}.py", *["f"] * (number % 3)) for number in range(3_000)]

    assert backfills.add_files(run.id, files) == 3_000

    progress = backfills.progress(run.id)
    assert progress.files[FileState.PLANNED] == 2_000
    assert progress.targets[TargetState.OPEN] == 3_000
    file = backfills.file(run.id, "02999.py")
    assert file is not None
    assert len(backfills.targets(file.id)) == 2999 % 3


def test_a_path_that_is_too_long_is_refused_and_nothing_is_added(backfills: Backfills, run: Run) -> None:
    longest = "é" * (MAX_PATH // 2)

    assert backfills.add_files(run.id, [a_file(longest)]) == 1
    with pytest.raises(InvalidRequest, match=f"{MAX_PATH + 1} bytes"):
        backfills.add_files(run.id, [a_file("a.py"), a_file(longest + "x")])

    assert backfills.file(run.id, longest) is not None
    assert backfills.file(run.id, "a.py") is None


def test_long_reasons_and_odd_characters_are_kept_as_both_databases_can(
    backfills: Backfills, run: Run
) -> None:
    backfills.add_files(run.id, [a_file("a.py", reason="syntax: \0\udcff" + "x" * MAX_REASON)])

    [reason] = backfills.skipped(run.id)

    assert reason.startswith("syntax: \\0\\udcffxxx")
    assert len(reason) == MAX_REASON


def test_files_come_in_order_of_their_bytes_whatever_the_collation(backfills: Backfills, run: Run) -> None:
    names = [
        "a/b.py",
        "B.py",
        "_a.py",
        "a-b.py",
        "a.py",
        "ä.py",
        "Z/a.py",
        "\udcff.py",
        "z.py",
        "\U0001f600.py",
    ]
    backfills.add_files(run.id, [a_file(name, "f") for name in names])
    ordered = sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))

    assert paths(backfills.files(run.id, states=[FileState.PLANNED])) == ordered
    page = backfills.files(run.id, states=[FileState.PLANNED], limit=4)
    assert paths(page) == ordered[:4]
    rest = backfills.files(run.id, states=[FileState.PLANNED], after=page[-1].path)
    assert paths(rest) == ordered[4:]


def test_files_of_several_states_come_in_one_order(backfills: Backfills, run: Run) -> None:
    backfills.add_files(run.id, [a_file(f"{number}.py", *["f"] * (number % 2)) for number in range(6)])
    backfills.add_files(run.id, [a_file("3a.py", reason="generated")])
    other = backfills.create("/other", "tiny", {})
    added(backfills, other, "2a.py", "f")
    open_or_done = [FileState.DONE, FileState.PLANNED]

    assert paths(backfills.files(run.id, states=open_or_done)) == [f"{number}.py" for number in range(6)]
    assert paths(backfills.files(run.id, states=open_or_done, after="1.py", limit=2)) == ["2.py", "3.py"]
    assert paths(backfills.files(run.id, states=[FileState.PLANNED])) == ["1.py", "3.py", "5.py"]
    assert paths(backfills.files(run.id, states=[FileState.SKIPPED, FileState.SKIPPED])) == ["3a.py"]


# Planning anew.


def test_a_file_of_which_nothing_was_asked_can_be_planned_anew(
    backfills: Backfills, run: Run, database_url: str
) -> None:
    file, [target, _] = added(backfills, run, "a.py", "f", "g")
    added(backfills, run, "b.py", "h")
    # Judged without a question.
    settle(backfills, file, Verdict(target.id, TargetState.REJECTED, reason="too long"))

    assert backfills.replan(file, a_file("a.py", "x", "y", "z", documented=4)) is True

    anew = again(backfills, file)
    assert anew.id > file.id
    assert (anew.state, anew.documented, anew.targets, anew.rejected) == (FileState.PLANNED, 4, 3, 0)
    assert [target.name for target in backfills.targets(anew.id)] == ["x", "y", "z"]
    assert row_counts(database_url)[:3] == [1, 2, 4]
    assert backfills.replan(anew, a_file("a.py", documented=7)) is True
    assert again(backfills, file).state is FileState.DONE


def test_who_works_by_an_old_plan_changes_nothing(backfills: Backfills, store: Store, run: Run) -> None:
    file, targets = added(backfills, run, "a.py", "f")
    backfills.replan(file, a_file("a.py", "g"))
    anew = again(backfills, file)

    assert backfills.replan(file, a_file("a.py", "h")) is False
    assert (
        settle(backfills, file, Verdict(targets[0].id, TargetState.REJECTED), state=FileState.DONE) is False
    )
    assert ask(backfills, file, 0, targets, submitted(store)) is False
    assert backfills.set_file_state(file.id, FileState.CHANGED) is False

    assert again(backfills, file) == anew
    assert [target.state for target in backfills.targets(anew.id)] == [TargetState.OPEN]


def test_what_was_asked_is_not_planned_anew(backfills: Backfills, store: Store, run: Run) -> None:
    file, targets, _ = asked(backfills, store, run)
    done, _ = added(backfills, run, "b.py")

    # As it was read before somebody asked.
    assert backfills.replan(file, a_file("a.py", "g")) is False
    assert backfills.replan(done, a_file("b.py", "g")) is False
    with pytest.raises(ValueError, match=r"`b\.py` is none of `a\.py`"):
        backfills.replan(file, a_file("b.py"))

    assert backfills.targets(file.id) == targets
    assert again(backfills, file) == file


def test_a_file_is_planned_anew_once_however_many_do_it(
    backfills: Backfills, run: Run, database_url: str
) -> None:
    file, _ = added(backfills, run, "a.py", "f")

    taken = at_once(4, lambda number: backfills.replan(file, a_file("a.py", "g", "h")))

    assert sorted(map(bool, taken)) == [False, False, False, True]
    assert row_counts(database_url)[:3] == [1, 1, 2]


# Asking.


def test_an_asked_file_knows_its_jobs(backfills: Backfills, store: Store, run: Run) -> None:
    file, [first, second] = added(backfills, run, "a.py", "f", "g")
    ids = submitted(store, 3)
    questions = [
        NewQuestion(first.id, 0, 0, ids[0]),
        NewQuestion(first.id, 0, 1, ids[1]),
        NewQuestion(second.id, 0, 0, ids[2]),
    ]

    assert backfills.ask(file.id, 0, questions[::-1]) is True

    assert (again(backfills, file).state, again(backfills, file).exchange) == (FileState.ASKED, 0)
    assert backfills.questions(file.id, 0) == questions
    assert backfills.questions(file.id, 1) == []


def test_a_repeated_ask_changes_nothing(backfills: Backfills, store: Store, run: Run) -> None:
    file, targets, ids = asked(backfills, store, run, "a.py", "f", "g")
    before = backfills.questions(file.id, 0)

    assert ask(backfills, file, 0, targets, ids) is False
    assert ask(backfills, file, 0, targets[:1], submitted(store)) is False

    assert backfills.questions(file.id, 0) == before
    assert backfills.progress(run.id).asked == 2


def test_who_is_late_cannot_take_an_exchange_back(backfills: Backfills, store: Store, run: Run) -> None:
    file, targets, ids = asked(backfills, store, run)
    assert ask(backfills, file, 1, targets, submitted(store)) is True

    assert ask(backfills, file, 0, targets, ids) is False
    settle(backfills, again(backfills, file), state=FileState.DONE)
    assert ask(backfills, file, 2, targets, ids) is False

    assert (again(backfills, file).state, again(backfills, file).exchange) == (FileState.DONE, 1)
    assert backfills.questions(file.id, 2) == []


@pytest.mark.parametrize("count", [1, COPY_FROM + 1])
def test_only_one_of_many_asks_at_once_is_taken(
    backfills: Backfills, store: Store, run: Run, count: int
) -> None:
    file, targets = added(backfills, run, "a.py", *["f"] * count)
    ids = submitted(store, 4 * count)

    taken = at_once(4, lambda n: ask(backfills, file, 0, targets, ids[n * count : (n + 1) * count]))

    assert sorted(map(bool, taken)) == [False, False, False, True]
    assert len(backfills.questions(file.id, 0)) == count
    assert backfills.progress(run.id).asked == count


def test_questions_of_another_exchange_are_refused(backfills: Backfills, store: Store, run: Run) -> None:
    file, [target] = added(backfills, run, "a.py", "f")

    with pytest.raises(ValueError, match="exchange 1"):
        backfills.ask(file.id, 1, [NewQuestion(target.id, 0, 0, "j")])


# Waiting.


def test_a_file_is_ready_when_none_of_its_jobs_is_queued_or_running(
    backfills: Backfills, store: Store, run: Run
) -> None:
    file, _, [first, second] = asked(backfills, store, run, "a.py", "f", "g")
    assert backfills.ready(run.id, 9) == []
    assert backfills.waiting(run.id) == 2

    claim = store.claim(first, worker_id="w", lease_s=60)
    assert claim is not None
    store.request_cancel(second)
    assert backfills.ready(run.id, 9) == []
    assert backfills.waiting(run.id) == 1

    store.fail(claim, code="internal_error", message="no")
    assert backfills.ready(run.id, 9) == [file]
    assert backfills.waiting(run.id) == 0


def test_jobs_that_are_gone_have_ended(
    backfills: Backfills, store: Store, run: Run, database_url: str
) -> None:
    file, _, _ = asked(backfills, store, run)
    assert backfills.ready(run.id, 9) == []

    delete_all_jobs(database_url)

    assert backfills.ready(run.id, 9) == [file]
    assert backfills.waiting(run.id) == 0


def test_a_file_that_asked_nothing_is_ready(backfills: Backfills, run: Run) -> None:
    file, _ = added(backfills, run, "a.py", "f")

    backfills.ask(file.id, 0, [])

    assert paths(backfills.ready(run.id, 9)) == ["a.py"]


def test_only_the_last_exchange_is_waited_for(backfills: Backfills, store: Store, run: Run) -> None:
    file, targets, _ = asked(backfills, store, run)
    [later] = submitted(store)
    ask(backfills, file, 1, targets, [later])
    assert backfills.waiting(run.id) == 1

    store.request_cancel(later)

    assert paths(backfills.ready(run.id, 9)) == ["a.py"]


def test_ready_files_of_this_run_come_in_order_and_no_more_than_wanted(
    backfills: Backfills, store: Store, run: Run
) -> None:
    other = backfills.create("/other", "tiny", {})
    for where, name in ((run, "c.py"), (other, "a.py"), (run, "B.py"), (run, "a.py")):
        _, _, ids = asked(backfills, store, where, name)
        store.request_cancel(ids[0])
    asked(backfills, store, run, "A.py")
    added(backfills, run, "0.py", "f")

    assert paths(backfills.ready(run.id, 9)) == ["B.py", "a.py", "c.py"]
    assert paths(backfills.ready(run.id, 2)) == ["B.py", "a.py"]


def test_files_that_are_no_longer_asked_wait_for_nothing(
    backfills: Backfills, store: Store, run: Run
) -> None:
    changed, _, _ = asked(backfills, store, run, "a.py")
    done, _, _ = asked(backfills, store, run, "b.py")
    backfills.set_file_state(changed.id, FileState.CHANGED)
    settle(backfills, done, state=FileState.DONE)

    assert backfills.ready(run.id, 9) == []
    assert backfills.waiting(run.id) == 0


# Settling.


def test_what_an_exchange_brought_is_kept(backfills: Backfills, store: Store, run: Run) -> None:
    file, [good, bad, later], _ = asked(backfills, store, run, "a.py", "f", "g", "h")
    candidates = (
        a_candidate(good, "Say\0 \udc80 it.", logprob=-0.5, score_parts={"length": 0.25, "consensus": 1.0}),
        a_candidate(bad, "TODO", reason="placeholder", index=1, seed=2**63 - 1),
        a_candidate(bad, "", reason="empty"),
    )

    taken = settle(
        backfills,
        file,
        Verdict(good.id, TargetState.ACCEPTED, text="Say\0 \udc80 it.", score=1.5),
        Verdict(bad.id, TargetState.REJECTED, reason="empty"),
        Verdict(later.id, TargetState.OPEN, reason="truncated"),
        candidates=candidates,
    )

    assert taken is True
    now = backfills.targets(file.id)
    assert [target.state for target in now] == [
        TargetState.ACCEPTED,
        TargetState.REJECTED,
        TargetState.OPEN,
    ]
    assert [target.text for target in now] == ["Say\0 \udc80 it.", None, None]
    assert [target.reason for target in now] == [None, "empty", "truncated"]
    assert [target.score for target in now] == [1.5, None, None]
    assert [target.exchange for target in now] == [0, 0, 0]
    assert backfills.candidates(good.id) == [candidates[0]]
    assert backfills.candidates(bad.id) == [candidates[2], candidates[1]]
    assert backfills.candidates(later.id) == []
    after = again(backfills, file)
    assert (after.state, after.accepted, after.rejected) == (FileState.ASKED, 1, 1)


def test_a_repeated_settle_changes_nothing(
    backfills: Backfills, store: Store, run: Run, database_url: str
) -> None:
    file, [target, _], _ = asked(backfills, store, run, "a.py", "f", "g")
    verdict = Verdict(target.id, TargetState.ACCEPTED, text="Do it.")

    def once() -> bool:
        return settle(backfills, file, verdict, candidates=(a_candidate(target),))

    once()
    before = backfills.targets(file.id), again(backfills, file), backfills.progress(run.id)

    assert once() is True

    assert (backfills.targets(file.id), again(backfills, file), backfills.progress(run.id)) == before
    assert before[2].tokens == 5
    assert row_counts(database_url)[-1] == 1


def test_more_candidates_join_those_that_are_there(backfills: Backfills, store: Store, run: Run) -> None:
    file, [target], _ = asked(backfills, store, run)
    settle(backfills, file, candidates=(a_candidate(target, "first"),))

    settle(backfills, file, candidates=(a_candidate(target, "other"), a_candidate(target, "new", number=1)))

    assert [candidate.text for candidate in backfills.candidates(target.id)] == ["first", "new"]
    assert backfills.progress(run.id).tokens == 10


def test_an_accepted_text_is_never_taken_back(backfills: Backfills, store: Store, run: Run) -> None:
    file, [good, bad], _ = asked(backfills, store, run, "a.py", "f", "g")
    settle(
        backfills,
        file,
        Verdict(good.id, TargetState.ACCEPTED, text="Do it."),
        Verdict(bad.id, TargetState.REJECTED, reason="loop"),
    )
    before = backfills.targets(file.id)

    settle(
        backfills,
        file,
        Verdict(good.id, TargetState.REJECTED, reason="copied"),
        Verdict(bad.id, TargetState.OPEN),
    )

    assert backfills.targets(file.id) == before


def test_who_is_late_with_an_exchange_changes_nothing(backfills: Backfills, store: Store, run: Run) -> None:
    file, [target], _ = asked(backfills, store, run)
    settle(backfills, file, Verdict(target.id, TargetState.OPEN, reason="empty"))
    ask(backfills, file, 1, [target], submitted(store))
    settle(backfills, file, Verdict(target.id, TargetState.OPEN, reason="loop"), exchange=1)
    before = backfills.targets(file.id)

    late = settle(
        backfills,
        file,
        Verdict(target.id, TargetState.REJECTED, reason="empty"),
        candidates=(a_candidate(target),),
        state=FileState.DONE,
    )

    assert late is False
    assert backfills.targets(file.id) == before
    assert before[0].exchange == 1
    assert backfills.candidates(target.id) == []
    assert again(backfills, file).state is FileState.ASKED


def test_a_file_that_is_done_is_judged_no_more(backfills: Backfills, store: Store, run: Run) -> None:
    file, [target], _ = asked(backfills, store, run)
    assert settle(backfills, file, state=FileState.DONE) is True

    assert settle(backfills, file, Verdict(target.id, TargetState.REJECTED)) is False

    assert backfills.targets(file.id) == [target]
    assert again(backfills, file).state is FileState.DONE


def test_what_is_known_before_anything_is_asked_can_be_settled(backfills: Backfills, run: Run) -> None:
    file, [target, _] = added(backfills, run, "a.py", "f", "g")

    assert settle(backfills, file, Verdict(target.id, TargetState.REJECTED, reason="too long"))

    after = again(backfills, file)
    assert (after.state, after.exchange, after.rejected) == (FileState.PLANNED, -1, 1)
    assert settle(backfills, file, state=FileState.DONE)
    assert again(backfills, file).state is FileState.DONE


def test_a_verdict_on_another_files_target_is_not_taken(backfills: Backfills, store: Store, run: Run) -> None:
    file, _, _ = asked(backfills, store, run, "a.py")
    other, [stranger], _ = asked(backfills, store, run, "b.py")

    settle(backfills, file, Verdict(stranger.id, TargetState.REJECTED))

    assert backfills.targets(other.id) == [stranger]


def test_many_settle_the_same_exchange_at_once(
    backfills: Backfills, store: Store, run: Run, database_url: str
) -> None:
    file, targets, _ = asked(backfills, store, run, "a.py", *["f"] * 40)
    verdicts = [Verdict(target.id, TargetState.ACCEPTED, text="Do it.") for target in targets]
    candidates = tuple(a_candidate(target) for target in targets)

    taken = at_once(
        4,
        lambda number: settle(
            backfills,
            file,
            *verdicts[:: -1 if number % 2 else 1],
            candidates=candidates[:: -1 if number % 2 else 1],
            state=FileState.DONE,
        ),
    )

    assert sorted(map(bool, taken)) == [False, False, False, True]
    after = again(backfills, file)
    assert (after.accepted, after.rejected) == (40, 0)
    assert row_counts(database_url)[-1] == 40
    assert backfills.progress(run.id).tokens == 200


@pytest.mark.parametrize(
    ("state", "text"), [(TargetState.ACCEPTED, None), (TargetState.OPEN, "x"), (TargetState.REJECTED, "x")]
)
def test_a_text_belongs_to_accepted_targets_alone(
    backfills: Backfills, store: Store, run: Run, state: TargetState, text: str | None
) -> None:
    file, [target], _ = asked(backfills, store, run)

    with pytest.raises(exc.IntegrityError):
        settle(backfills, file, Verdict(target.id, state, text=text), candidates=(a_candidate(target),))

    assert backfills.targets(file.id) == [target]
    assert backfills.candidates(target.id) == []


def test_a_file_is_settled_as_done_or_not_at_all(backfills: Backfills, store: Store, run: Run) -> None:
    file, _, _ = asked(backfills, store, run)

    for state in set(FileState) - {FileState.DONE}:
        with pytest.raises(ValueError, match=f"`{state}`"):
            settle(backfills, file, state=state)


@given(text=texts)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_back_as_it_was(backfills: Backfills, text: str) -> None:
    run = backfills.create("/repo", "tiny", {})
    file, [target] = added(backfills, run, "a.py", "f")

    settle(
        backfills,
        file,
        Verdict(target.id, TargetState.ACCEPTED, text=text),
        candidates=(a_candidate(target, text),),
    )

    assert [found.text for found in backfills.targets(file.id)] == [text]
    assert [found.text for found in backfills.candidates(target.id)] == [text]


# States of files.


def brought_to(backfills: Backfills, run: Run, state: FileState) -> File:
    """A new file in this state."""
    file, _ = added(backfills, run, f"{state}.py", "f")
    match state:
        case FileState.PLANNED:
            pass
        case FileState.ASKED:
            backfills.ask(file.id, 0, [])
        case FileState.DONE | FileState.SKIPPED | FileState.CHANGED:
            backfills.set_file_state(file.id, state)
        case FileState.APPLIED | FileState.COMMITTED:
            backfills.set_file_state(file.id, FileState.DONE)
            backfills.set_file_state(file.id, state)
    found = again(backfills, file)
    assert found.state is state
    return found


@pytest.mark.parametrize("source", FileState)
@pytest.mark.parametrize("target", [state for state in FileState if state is not FileState.ASKED])
def test_a_file_moves_only_as_the_table_says(
    backfills: Backfills, run: Run, source: FileState, target: FileState
) -> None:
    file = brought_to(backfills, run, source)

    moved = backfills.set_file_state(file.id, target, "why")

    assert moved is (source in FILE_MOVES[target])
    after = again(backfills, file)
    assert (after.state, after.reason) == ((target, "why") if moved else (source, None))


def test_a_file_is_asked_by_asking_alone(backfills: Backfills, run: Run) -> None:
    file, _ = added(backfills, run, "a.py", "f")

    with pytest.raises(ValueError, match="asking"):
        backfills.set_file_state(file.id, FileState.ASKED)


# Reports.


def test_progress_counts_everything_of_this_run(backfills: Backfills, store: Store, run: Run) -> None:
    backfills.add_files(
        run.id,
        [a_file("p.py", "f", "g", documented=2), a_file("s.py", reason="generated"), a_file("d.py")],
    )
    file, [good, bad, later], [first, *_] = asked(backfills, store, run, "a.py", "f", "g", "h")
    store.request_cancel(first)
    settle(
        backfills,
        file,
        Verdict(good.id, TargetState.ACCEPTED, text="Do it."),
        Verdict(bad.id, TargetState.REJECTED, reason="loop"),
        candidates=(a_candidate(good, tokens=3), a_candidate(bad, tokens=4), a_candidate(later, tokens=5)),
    )
    other = backfills.create("/other", "tiny", {})
    asked(backfills, store, other, "a.py")

    assert backfills.progress(run.id) == Progress(
        files={
            FileState.PLANNED: 1,
            FileState.ASKED: 1,
            FileState.DONE: 1,
            FileState.SKIPPED: 1,
            FileState.CHANGED: 0,
            FileState.APPLIED: 0,
            FileState.COMMITTED: 0,
        },
        targets={TargetState.OPEN: 3, TargetState.ACCEPTED: 1, TargetState.REJECTED: 1},
        documented=2,
        asked=3,
        ended=1,
        tokens=12,
    )


def test_reasons_are_counted_the_most_first(backfills: Backfills, run: Run) -> None:
    skipped = ["generated", "vendored", "vendored"]
    backfills.add_files(
        run.id,
        [
            *(a_file(f"{number}.py", reason=reason) for number, reason in enumerate(skipped)),
            a_file("x.py", passed_over={"private": 1, "magic": 2}),
            a_file("y.py", passed_over={"magic": 2, "private": 1}),
            a_file("z.py", passed_over={"test": 1}),
        ],
    )
    file, targets = added(backfills, run, "a.py", *"abcd")
    reasons = ["loop", "empty", "loop", None]
    settle(
        backfills,
        file,
        *(
            Verdict(target.id, TargetState.REJECTED, reason=reason)
            for target, reason in zip(targets, reasons, strict=True)
        ),
    )
    other = backfills.create("/other", "tiny", {})
    backfills.add_files(other.id, [a_file("a.py", reason="generated", passed_over={"magic": 1})])

    assert list(backfills.skipped(run.id).items()) == [("vendored", 2), ("generated", 1)]
    assert list(backfills.passed_over(run.id).items()) == [("magic", 4), ("private", 2), ("test", 1)]
    assert list(backfills.reasons(run.id).items()) == [("loop", 2), ("", 1), ("empty", 1)]


def test_a_target_is_found_by_its_name_or_the_end_of_it(backfills: Backfills, run: Run) -> None:
    added(backfills, run, "b.py", "A.f", "BA.f", "B.A.f", "f", "", "a.f", "A.ff", "é.A.f")
    added(backfills, run, "a.py", "A.f")
    other = backfills.create("/other", "tiny", {})
    added(backfills, other, "b.py", "A.f")

    def named(name: str, **options: Any) -> list[tuple[str, str]]:
        return [(file.path, target.name) for file, target in backfills.targets_named(run.id, name, **options)]

    assert named("A.f") == [("a.py", "A.f"), ("b.py", "A.f"), ("b.py", "B.A.f"), ("b.py", "é.A.f")]
    assert named("A.f", limit=2) == [("a.py", "A.f"), ("b.py", "A.f")]
    assert named("a.f") == [("b.py", "a.f")]
    assert named("") == [("b.py", "")]
    assert named("g") == []


# The database.


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        (backfill_runs, {"state": "nonsense"}),
        (backfill_runs, {"state": "done"}),
        (backfill_runs, {"finished_at": 1.0}),
        (backfill_files, {"state": "nonsense"}),
        (backfill_targets, {"state": "nonsense"}),
        (backfill_targets, {"state": "accepted"}),
    ],
    ids=str,
)
def test_database_refuses_rows_that_make_no_sense(
    backfills: Backfills, run: Run, database_url: str, table: Any, columns: dict[str, object]
) -> None:
    added(backfills, run, "a.py", "f")

    with (
        opened(database_url) as database,
        pytest.raises(exc.IntegrityError),
        database.begin() as connection,
    ):
        connection.execute(table.update().values(**columns))


def test_a_database_without_the_tables_is_said_to_be_outdated(tmp_path: Any) -> None:
    backfills = Backfills.open(f"sqlite:///{tmp_path / 'empty.db'}")

    with pytest.raises(SchemaOutdated, match="lacks"):
        backfills.list()
    backfills.close()


# How rows are found. Plans of full tables, since small ones are read whole whatever the indexes.

#: Files and targets of the full run: many times what is asked at one moment.
FULL_FILES, FULL_TARGETS = 2_000, 5


def fill(database: Database, backfills: Backfills, store: Store) -> tuple[Run, File]:
    """A run of many judged files, a few asked ones, and one of those."""
    run = backfills.create("/repo", "tiny", {})
    names = "abcdefg"[:FULL_TARGETS]
    backfills.add_files(run.id, [a_file(f"{number:05}.py", *names) for number in range(FULL_FILES)])
    jobs_of_run = submitted(store, FULL_FILES)
    with database.begin() as connection:
        first_file, first_target = connection.execute(
            select(func.min(backfill_targets.c.file_id), func.min(backfill_targets.c.id)).join(
                backfill_files, backfill_files.c.id == backfill_targets.c.file_id
            )
        ).one()
        count = FULL_FILES * FULL_TARGETS
        connection.execute(
            insert(backfill_questions),
            [
                {
                    "file_id": first_file + place // FULL_TARGETS,
                    "exchange": 0,
                    "target_id": first_target + place,
                    "number": 0,
                    "job_id": jobs_of_run[place // FULL_TARGETS],
                }
                for place in range(count)
            ],
        )
        connection.execute(
            insert(backfill_candidates),
            [
                {
                    "target_id": first_target + place,
                    "exchange": 0,
                    "number": 0,
                    "place": 0,
                    "text": json.dumps("Do it."),
                    "seed": place,
                    "tokens": 5,
                    "score_parts": "{}",
                }
                for place in range(count)
            ],
        )
        connection.execute(backfill_files.update().values(state=FileState.DONE.value, exchange=0))
        connection.execute(
            backfill_files.update()
            .where(backfill_files.c.id < first_file + 5)
            .values(state=FileState.ASKED.value)
        )
    with database.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    file = backfills.file(run.id, "00000.py")
    assert file is not None
    return run, file


def plans(database: Database, call: Callable[[], object]) -> list[str]:
    """What the database says about how it finds the rows of every statement of a call."""
    sent: list[tuple[str, Any]] = []

    def catch(_c: object, _cursor: object, words: str, parameters: Any, _x: object, many: bool) -> None:
        if re.match(r"SELECT|UPDATE|DELETE", words):
            sent.append((words, parameters[0] if many else parameters))

    event.listen(Engine, "before_cursor_execute", catch)
    try:
        call()
    finally:
        event.remove(Engine, "before_cursor_execute", catch)
    verb = "EXPLAIN QUERY PLAN" if database.dialect == "sqlite" else "EXPLAIN"
    with database.read() as connection:
        rows = [
            row for words, values in sent for row in connection.exec_driver_sql(f"{verb} {words}", values)
        ]
    assert rows
    return [str(row[-1]) for row in rows]


def test_no_call_of_a_long_run_reads_a_table_from_end_to_end(
    backfills: Backfills, store: Store, database_url: str
) -> None:
    with opened(database_url) as database:
        run, file = fill(database, backfills, store)
        [target, *_] = backfills.targets(file.id)
        calls: dict[str, Callable[[], object]] = {
            "ready": lambda: backfills.ready(run.id, 10),
            "waiting": lambda: backfills.waiting(run.id),
            "files": lambda: backfills.files(run.id, states=[FileState.PLANNED, FileState.ASKED], limit=10),
            "file": lambda: backfills.file(run.id, "00005.py"),
            "targets": lambda: backfills.targets(file.id),
            "questions": lambda: backfills.questions(file.id, 0),
            "candidates": lambda: backfills.candidates(target.id),
            "settle": lambda: settle(
                backfills,
                file,
                Verdict(target.id, TargetState.OPEN, reason="loop"),
                candidates=(a_candidate(target, exchange=1),),
            ),
            "ask": lambda: backfills.ask(file.id, 1, [NewQuestion(target.id, 1, 0, "j")]),
            "set_file_state": lambda: backfills.set_file_state(file.id, FileState.CHANGED),
        }

        found = {name: plans(database, call) for name, call in calls.items()}

    for name in ("ready", "waiting", "files"):
        assert any("ix_backfill_files_state" in line for line in found[name]), (name, found[name])
    scans = re.compile(r"\bSCAN (jobs|backfill_\w+)|Seq Scan on (jobs|backfill_\w+)")
    assert {name: plan for name, plan in found.items() if any(map(scans.search, plan))} == {}
