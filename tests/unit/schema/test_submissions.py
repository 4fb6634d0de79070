from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import create_engine, event, text

from codeherd_schema.database import COPY_FROM, Database
from codeherd_schema.errors import IdempotencyConflict, InvalidRequest
from codeherd_schema.requests import GenerateRequest, InfillRequest, Request
from codeherd_schema.states import JobState
from codeherd_schema.store import Store, Submitted
from tests import samples
from tests.samples import a_request, rewrite


def test_submitted_job_is_queued_with_everything_it_was_given(store: Store) -> None:
    request = InfillRequest(
        prefix="a", suffix="b", model="codellama-7b", priority=2, labels={"team": "docs"}, idempotency_key="k"
    )

    [submitted] = store.submit([request], tenant="acme", custom_ids=["line-1"], batch_id="batch_1")

    job = store.get(submitted.job_id)
    assert job is not None
    assert job.request == request
    assert (job.state, job.attempt, job.crash_count, job.publish_no) == (JobState.QUEUED, 0, 0, 0)
    assert (job.tenant, job.custom_id, job.batch_id, job.queue) == (
        "acme",
        "line-1",
        "batch_1",
        "codellama-7b",
    )
    assert (job.kind, job.model, job.priority, job.labels) == (
        "infill",
        "codellama-7b",
        2,
        {"team": "docs"},
    )
    assert job.run_at == job.created_at


def test_answers_and_ids_are_in_the_order_of_the_requests(store: Store) -> None:
    requests = [a_request(prompt=str(i), priority=i % 10) for i in range(1500)]

    submitted = store.submit(requests)

    ids = [answer.job_id for answer in submitted]
    found = store.get_many(ids)
    assert ids == sorted(ids)
    assert [found[job_id].request for job_id in ids] == requests


def test_nothing_submitted_is_nothing_done(store: Store) -> None:
    assert store.submit([]) == []


def test_queue_of_names_the_queue(store: Store) -> None:
    [submitted] = store.submit([a_request()], queue_of=lambda request: f"own-{request.model}")

    job = store.get(submitted.job_id)
    assert job is not None
    assert job.queue == "own-tiny"


def test_as_many_custom_ids_as_requests(store: Store) -> None:
    with pytest.raises(ValueError, match="2 requests, but 1 custom ids"):
        store.submit([a_request(), a_request()], custom_ids=["one"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=samples.requests)
def test_any_request_is_read_back_unchanged(store: Store, request: Request) -> None:
    request = request.model_copy(update={"run_at": None, "expires_at": None, "deadline": None})

    [submitted] = store.submit([request])

    job = store.get(submitted.job_id)
    assert job is not None
    assert job.request == request
    assert job.labels == request.labels


@pytest.mark.parametrize(
    "prompt",
    ["\0", "a\0b\x01\x7f\ufffe", "\r\n\r \u2028\u2029", "😀🧑\u200d🚀", "𐍈" * 10, "x" * 1_000_000],
    ids=["nul", "controls", "line ends", "emoji", "astral", "1 MB"],
)
def test_hard_text_is_read_back_unchanged(store: Store, prompt: str) -> None:
    [submitted] = store.submit([a_request(prompt=prompt)])

    job = store.get(submitted.job_id)
    assert job is not None
    assert isinstance(job.request, GenerateRequest)
    assert job.request.prompt == prompt
    assert job.payload.isascii()


# Idempotency.


def test_same_key_and_request_give_the_same_job(store: Store) -> None:
    request = a_request(idempotency_key="k")

    [first] = store.submit([request])
    [second] = store.submit([request])

    assert first == Submitted(first.job_id, deduplicated=False)
    assert second == Submitted(first.job_id, deduplicated=True)
    assert store.count_by_state()[JobState.QUEUED] == 1


def test_same_key_twice_in_one_submit_gives_one_job(store: Store) -> None:
    request = a_request(idempotency_key="k")

    first, second, other = store.submit([request, request, a_request()])

    assert (first.deduplicated, second.deduplicated, other.deduplicated) == (False, True, False)
    assert first.job_id == second.job_id != other.job_id


def test_same_key_and_other_request_are_refused_and_nothing_is_inserted(store: Store) -> None:
    store.submit([a_request(idempotency_key="k")])

    with pytest.raises(IdempotencyConflict, match="`k`") as caught:
        store.submit([a_request(), a_request(prompt="SECRET", idempotency_key="k"), a_request()])

    assert "SECRET" not in caught.value.message
    assert store.count_by_state()[JobState.QUEUED] == 1


def test_two_requests_of_one_submit_with_the_same_key_conflict(store: Store) -> None:
    with pytest.raises(IdempotencyConflict):
        store.submit([a_request(prompt="a", idempotency_key="k"), a_request(prompt="b", idempotency_key="k")])

    assert store.count_by_state()[JobState.QUEUED] == 0


def test_keys_belong_to_a_tenant(store: Store) -> None:
    [one] = store.submit([a_request(prompt="a", idempotency_key="k")], tenant="one")
    [two] = store.submit([a_request(prompt="b", idempotency_key="k")], tenant="two")

    assert one.job_id != two.job_id


def test_many_keys_are_looked_up(store: Store) -> None:
    requests = [a_request(prompt=str(i), idempotency_key=f"key {i}") for i in range(2_100)]

    first = store.submit(requests)
    second = store.submit(requests)

    assert [answer.job_id for answer in first] == [answer.job_id for answer in second]
    assert all(answer.deduplicated for answer in second)


def test_fifty_racing_submitters_get_one_job(store: Store) -> None:
    start = threading.Barrier(50)
    answers: list[Submitted] = []

    def submit() -> None:
        start.wait()
        answers.extend(store.submit([a_request(idempotency_key="k")]))

    threads = [threading.Thread(target=submit) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(answers) == 50
    assert len({answer.job_id for answer in answers}) == 1
    assert [answer.deduplicated for answer in answers].count(False) == 1
    assert store.count_by_state()[JobState.QUEUED] == 1


def test_key_of_a_job_that_is_pruned_meanwhile_gives_a_new_job(postgres_url: str) -> None:
    # On SQLite nobody writes while a submit does.
    store = Store.open(postgres_url)
    [old] = store.submit([a_request(idempotency_key="k")])
    store.request_cancel(old.job_id)
    engine = create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))

    @event.listens_for(engine, "after_cursor_execute")
    def prune(_1: object, _2: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO jobs"):
            store.prune(keep_s=-60)

    with engine.begin() as connection:
        [new] = store.submit([a_request(idempotency_key="k")], connection=connection)

    assert (new.job_id == old.job_id, new.deduplicated) == (False, False)
    assert list(store.get_many([old.job_id, new.job_id])) == [new.job_id]
    engine.dispose()
    store.close()


def test_repeated_submit_is_told_of_its_job_even_when_it_is_too_late(store: Store, database_url: str) -> None:
    [first] = store.submit([a_request(idempotency_key="k")])
    past = datetime(2001, 1, 1, tzinfo=UTC)
    late = a_request(expires_at=past, deadline=past, idempotency_key="k")
    # As if it had been submitted in time.
    rewrite(database_url, first.job_id, content_sha256=late.content_sha256(), deadline=past.timestamp())

    [second] = store.submit([late])

    assert second == Submitted(first.job_id, deduplicated=True)


# Moments.


def test_durations_count_from_the_databases_clock(store: Store) -> None:
    request = a_request(
        run_at=timedelta(seconds=10), expires_at=timedelta(seconds=20), deadline=timedelta(seconds=30)
    )

    [submitted] = store.submit([request])

    job = store.get(submitted.job_id)
    assert job is not None
    assert job.expires_at is not None
    assert job.deadline is not None
    waits = [
        (moment - job.created_at).total_seconds() for moment in (job.run_at, job.expires_at, job.deadline)
    ]
    assert waits == pytest.approx([10, 20, 30], abs=1e-3)


def test_absolute_moments_are_kept(store: Store) -> None:
    moment = datetime(2100, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)

    [submitted] = store.submit([a_request(run_at=moment, deadline=moment + timedelta(seconds=1))])

    job = store.get(submitted.job_id)
    assert job is not None
    assert (job.run_at, job.deadline) == (moment, moment + timedelta(seconds=1))


def test_a_start_in_the_past_is_now(store: Store) -> None:
    [submitted] = store.submit([a_request(run_at=datetime(2001, 1, 1, tzinfo=UTC))])

    job = store.get(submitted.job_id)
    assert job is not None
    assert job.run_at == job.created_at


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"expires_at": datetime(2001, 1, 1, tzinfo=UTC)}, "`expires_at` is .* s in the past"),
        ({"deadline": datetime(2001, 1, 1, tzinfo=UTC)}, "`deadline` is .* s in the past"),
        ({"deadline": timedelta(0)}, "`deadline` is 0.000 s in the past"),
        ({"run_at": timedelta(9), "expires_at": timedelta(9)}, "`expires_at` is not after `run_at`"),
        ({"run_at": timedelta(9), "deadline": timedelta(8)}, "`deadline` is not after `run_at`"),
        ({"run_at": timedelta.max}, "`run_at` is after the year 9999"),
    ],
)
def test_impossible_moments_are_refused_and_nothing_is_inserted(
    store: Store, times: dict[str, datetime | timedelta], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        store.submit([a_request(), a_request(**times)])

    assert store.count_by_state()[JobState.QUEUED] == 0


# The caller's own transaction.


def test_jobs_are_part_of_the_callers_transaction(store: Store, database_url: str) -> None:
    database = Database.open(database_url)
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE orders (job_id VARCHAR(36))"))

    with database.begin() as connection:
        [submitted] = store.submit([a_request()], connection=connection)
        connection.execute(text("INSERT INTO orders VALUES (:id)"), {"id": submitted.job_id})
        assert store.get(submitted.job_id) is None

    assert store.get(submitted.job_id) is not None
    with database.begin() as connection:
        connection.execute(text("DROP TABLE orders"))
    database.close()


def test_rolled_back_transaction_leaves_nothing(store: Store, database_url: str) -> None:
    database = Database.open(database_url)

    def change_of_mind() -> None:
        with database.begin() as connection:
            store.submit([a_request(), a_request(idempotency_key="k")], connection=connection)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change_of_mind()

    assert store.list() == []
    database.close()


def test_a_plain_sqlalchemy_connection_will_do(store: Store, database_url: str) -> None:
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))

    with engine.connect() as connection:
        [kept] = store.submit([a_request()], connection=connection)
        connection.commit()
        [dropped] = store.submit([a_request()], connection=connection)
        connection.rollback()

    assert store.get(kept.job_id) is not None
    assert store.get(dropped.job_id) is None
    engine.dispose()


def test_conflict_leaves_nothing_in_a_transaction_that_goes_on(store: Store, database_url: str) -> None:
    database = Database.open(database_url)
    store.submit([a_request(idempotency_key="k")])

    with database.begin() as connection:
        with pytest.raises(IdempotencyConflict):
            store.submit([a_request(), a_request(prompt="b", idempotency_key="k")], connection=connection)
        [submitted] = store.submit([a_request()], connection=connection)

    assert {job.id for job in store.list()} >= {submitted.job_id}
    assert store.count_by_state()[JobState.QUEUED] == 2
    database.close()


def test_labels_are_stored_sorted(store: Store, database_url: str) -> None:
    [submitted] = store.submit([a_request(labels={"b": "2", "a": 'é"\0'})])

    database = Database.open(database_url)
    with database.read() as connection:
        stored = connection.scalar(text("SELECT labels FROM jobs WHERE id = :id"), {"id": submitted.job_id})
    database.close()
    assert list(json.loads(stored)) == ["a", "b"]


def test_many_jobs_come_in_as_one_would(store: Store) -> None:
    odd = 'tab\t line\n backslash \\N quote " comma , é 漢 \u2028'
    requests = [a_request(labels={"odd": odd}) for _ in range(2 * COPY_FROM)]

    many = store.submit(requests, custom_ids=[f"{n} {odd}" for n in range(len(requests))], batch_id="b")
    [one] = store.submit(requests[:1], custom_ids=[f"0 {odd}"], batch_id="b")

    rows = store.get_many([answer.job_id for answer in (*many, one)])
    assert [rows[answer.job_id].custom_id for answer in many] == [f"{n} {odd}" for n in range(len(many))]
    alone, first = rows[one.job_id], rows[many[0].job_id]
    assert replace(first, id=alone.id, run_at=alone.run_at, created_at=alone.created_at) == alone
    assert first.labels == {"odd": odd}


def test_one_bad_name_among_many_leaves_none_of_them(postgres_url: str) -> None:
    store = Store.open(postgres_url)
    requests = [a_request() for _ in range(2 * COPY_FROM)]

    with pytest.raises(InvalidRequest, match="NUL"):
        store.submit(requests, custom_ids=[*(["x"] * (len(requests) - 1)), "a\0b"])

    assert store.list() == []
    store.close()
