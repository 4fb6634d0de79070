from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from codeherd_producer.client import CHUNK, Client, Job
from codeherd_schema.database import Database
from codeherd_schema.errors import (
    IdempotencyConflict,
    IllegalMove,
    InvalidRequest,
    InvalidSetting,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    PromptTooLong,
    UnknownModel,
    UnsupportedByModel,
    WaitTimeout,
)
from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, Message, Request
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Store
from tests.by_hand import claim, finish, requests
from tests.services import wait_until


def settings_of(database_url: str, **more: object) -> SharedSettings:
    values = {"database_url": database_url, "poll_interval_s": 0.02, **more}
    return SharedSettings.model_validate(values)


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(settings_of(database_url), publish=False) as client:
        yield client


def test_submit_commits_a_queued_row(client: Client, store: Store) -> None:
    request = InfillRequest(prefix="def f():\n", suffix="\n", labels={"team": "docs"})

    job = client.submit(request)

    row = store.get(job.id)
    assert row is not None
    assert (row.state, row.queue, row.request) == (JobState.QUEUED, "codeherd.tiny", request)
    assert (job.state, job.row, job.deduplicated) == (JobState.QUEUED, row, False)


def test_a_model_has_one_name_in_the_rows_however_it_was_spelled(client: Client) -> None:
    jobs = [
        client.submit(GenerateRequest(prompt="x", model=m)) for m in ("codellama/CodeLlama-7b-hf", "TINY")
    ]

    assert [(job.row.model, job.row.queue) for job in jobs] == [
        ("codellama-7b", "codeherd.codellama-7b"),
        ("tiny", "codeherd.tiny"),
    ]
    assert [job.id for job in client.list(model="codellama/CodeLlama-7b-hf")] == [jobs[0].id]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (GenerateRequest(prompt="x", model="nope"), UnknownModel),
        (ChatRequest(messages=(Message(role="user", content="hi"),)), UnsupportedByModel),
        (GenerateRequest(prompt="x" * 100_000), PromptTooLong),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_queued(
    client: Client, request_: Request, error: type[InvalidRequest]
) -> None:
    with pytest.raises(error):
        client.submit(request_)

    assert client.list() == []


def test_faults_are_told_for_every_request_by_its_place(client: Client) -> None:
    good, bad = GenerateRequest(prompt="x"), GenerateRequest(prompt="x", model="nope")

    faults = client.faults([good, bad, good, GenerateRequest(prompt="x" * 100_000)])

    assert {place: type(fault) for place, fault in faults.items()} == {1: UnknownModel, 3: PromptTooLong}


def test_a_list_with_one_wrong_request_queues_nothing(client: Client) -> None:
    many: list[Request] = [*requests(CHUNK + 1), GenerateRequest(prompt="x", model="nope")]

    with pytest.raises(UnknownModel, match=f"request {CHUNK + 1}: .*0 jobs were queued"):
        client.submit_many(many)

    assert client.list() == []


def test_a_stream_with_a_wrong_request_says_how_many_were_queued(client: Client, store: Store) -> None:
    many: list[Request] = [*requests(CHUNK + 1), GenerateRequest(prompt="x", model="nope")]

    with pytest.raises(UnknownModel, match=f"request {CHUNK + 1}: .*{CHUNK} jobs were queued"):
        client.submit_many(iter(many))

    assert store.count_by_state()[JobState.QUEUED] == CHUNK


def test_submit_many_answers_in_order(client: Client, store: Store) -> None:
    many = requests(CHUNK + 50)

    jobs = client.submit_many(iter(many), batch_id="b1")

    rows = store.get_many([job.id for job in jobs])
    assert [rows[job.id].request for job in jobs] == many
    assert {row.batch_id for row in rows.values()} == {"b1"}


def test_a_run_has_its_fair_share_and_is_paused_as_a_whole(client: Client, store: Store) -> None:
    large = client.submit_many(requests(3), run_id="large")
    [small] = client.submit_many(requests(1), run_id="small")
    assert [hint.job_id for hint in store.due("codeherd.tiny", limit=2)] == [large[0].id, small.id]

    client.pause(PauseScope.RUN, "large")
    assert store.due("codeherd.tiny", limit=10) == []
    assert store.claim(large[0].id, worker_id="w", lease_s=60) is None
    client.resume(PauseScope.RUN, "large")

    assert [hint.job_id for hint in store.due("codeherd.tiny", limit=10)] == [job.id for job in large]
    assert (small.row.run_id, small.row.batch_id) == ("small", None)


def test_fifty_racing_submits_with_one_key_give_one_job(database_url: str, store: Store) -> None:
    racers = 50
    barrier = threading.Barrier(racers)
    request = GenerateRequest(prompt="x", idempotency_key="k")

    with (
        Client(settings_of(database_url), publish=False) as client,
        ThreadPoolExecutor(racers) as pool,
    ):

        def race() -> Job:
            barrier.wait()
            return client.submit(request)

        jobs = [future.result() for future in [pool.submit(race) for _ in range(racers)]]

    assert len({job.id for job in jobs}) == 1
    assert sum(not job.deduplicated for job in jobs) == 1
    assert store.count_by_state()[JobState.QUEUED] == 1


def test_another_request_under_a_used_key_is_refused(client: Client) -> None:
    client.submit(GenerateRequest(prompt="x", idempotency_key="k"))

    with pytest.raises(IdempotencyConflict):
        client.submit(GenerateRequest(prompt="y", idempotency_key="k"))


def test_a_job_lives_and_dies_with_the_callers_transaction(database_url: str) -> None:
    database = Database.open(database_url)
    with Client(settings_of(database_url), publish=False) as client:
        with database.begin() as connection:
            lost = client.submit(GenerateRequest(prompt="x"), connection=connection)
            connection.rollback()
        with database.begin() as connection:
            kept = client.submit(GenerateRequest(prompt="x"), connection=connection)

        with pytest.raises(JobNotFound):
            client.get(lost.id)
        assert client.get(kept.id).state is JobState.QUEUED
    database.close()


def test_list_shows_the_own_tenants_jobs(database_url: str) -> None:
    with (
        Client(settings_of(database_url, tenant="a"), publish=False) as ours,
        Client(settings_of(database_url, tenant="b"), publish=False) as theirs,
    ):
        mine = ours.submit(GenerateRequest(prompt="x", labels={"k": "v"}))
        theirs.submit(GenerateRequest(prompt="x"))

        assert [job.id for job in ours.list()] == [mine.id]
        assert [job.id for job in ours.list(labels={"k": "v"}, state=JobState.QUEUED)] == [mine.id]
        assert ours.list(state=JobState.DEAD) == []


def fail(store: Store, job_id: str) -> None:
    store.fail(claim(store, job_id), code="engine_failed", message="it broke")


def bury(store: Store, job_id: str) -> None:
    for _ in range(5):
        store.retry(claim(store, job_id), code="out_of_memory", message="too big", delay_s=0)


def expire(store: Store, job_id: str) -> None:
    store.expire_running(claim(store, job_id))


def cancel(store: Store, job_id: str) -> None:
    store.request_cancel(job_id)


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (fail, JobFailed, "is failed: engine_failed: it broke"),
        (bury, JobFailed, "is dead: out_of_memory: too big"),
        (expire, JobExpired, "passed its deadline"),
        (cancel, JobCancelled, "was cancelled"),
    ],
)
def test_a_job_without_a_result_says_why(
    client: Client, store: Store, end: Callable[[Store, str], None], error: type[Exception], words: str
) -> None:
    job = client.submit(GenerateRequest(prompt="x"))

    end(store, job.id)

    with pytest.raises(error, match=words):
        job.result(timeout_s=60)


def test_an_unknown_job_is_not_found(client: Client) -> None:
    unknown = "00000000-0000-7000-8000-000000000000"

    for call in (client.get, client.result, client.cancel, client.retry, client.row):
        with pytest.raises(JobNotFound, match=unknown):
            call(unknown)
    with pytest.raises(JobNotFound, match=unknown):
        client.wait([unknown], timeout_s=0)
    with pytest.raises(JobNotFound, match=unknown):
        client.as_completed([unknown])


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_a_wait_that_ends_first_says_that_the_job_goes_on(client: Client, timeout_s: float) -> None:
    job = client.submit(GenerateRequest(prompt="x"))

    with pytest.raises(WaitTimeout):
        job.result(timeout_s)
    with pytest.raises(WaitTimeout, match=r"go on: 1$"):
        job.wait(timeout_s)
    assert job.state is JobState.QUEUED


def test_a_result_is_returned_when_it_comes(client: Client, store: Store) -> None:
    job = client.submit(GenerateRequest(prompt="x"))

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(job.result, 60)
        stored = finish(store, job.id, "y = 1\0é🙂")

        assert waiting.result() == stored
    assert job.result(timeout_s=0).text == "y = 1\0é🙂"


def test_jobs_come_in_the_order_of_their_ends(client: Client, store: Store) -> None:
    jobs = client.submit_many(requests(3))
    finish(store, jobs[2].id)

    ended = client.as_completed([jobs[0], jobs[1].id, jobs[2]], timeout_s=60)

    assert next(ended).id == jobs[2].id
    fail(store, jobs[1].id)
    assert next(ended).id == jobs[1].id
    finish(store, jobs[0].id)
    assert [job.id for job in ended] == [jobs[0].id]


def test_thousands_of_jobs_are_waited_for_at_once(client: Client, store: Store) -> None:
    late = client.submit_many(requests(2500, expires_at=timedelta(milliseconds=50)))
    [last] = client.submit_many(requests(1))

    ended = client.as_completed([last, *late], timeout_s=60)

    expired = 0
    while expired < len(late):
        expired += len(store.expire_due())
    assert {next(ended).id for _ in late} == {job.id for job in late}
    finish(store, last.id)
    assert [job.id for job in ended] == [last.id]


def test_interrupting_a_wait_leaves_the_job_alone(client: Client) -> None:
    job = client.submit(GenerateRequest(prompt="x"))
    main = threading.get_ident()

    def wait_and_be_interrupted() -> None:
        threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT)).start()
        job.wait(timeout_s=60)

    with pytest.raises(KeyboardInterrupt):
        wait_and_be_interrupted()

    assert job.state is JobState.QUEUED


def test_cancel_ends_a_queued_job_and_asks_a_running_one(client: Client, store: Store) -> None:
    queued, running, ended = client.submit_many(requests(3))
    claim(store, running.id)
    finish(store, ended.id)

    assert [job.cancel() for job in (queued, running, ended)] == [
        JobState.CANCELLED,
        JobState.RUNNING,
        JobState.SUCCEEDED,
    ]
    assert queued.cancel() is JobState.CANCELLED
    assert running.refresh().cancel_requested_at is not None


def test_retry_queues_an_ended_job_again(client: Client, store: Store) -> None:
    job = client.submit(GenerateRequest(prompt="x"))
    with pytest.raises(IllegalMove):
        job.retry()
    fail(store, job.id)

    job.retry()

    assert job.state is JobState.QUEUED
    assert finish(store, job.id) == job.result(timeout_s=60)
    assert len(client.attempts(job.id)) == 2


def test_a_time_limit_in_the_past_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="expires_at"):
        client.submit(GenerateRequest(prompt="x", expires_at=timedelta(0)))


def test_one_client_serves_many_threads(client: Client, store: Store) -> None:
    def work(i: int) -> str:
        job = client.submit(GenerateRequest(prompt=f"x = {i}"))
        finish(store, job.id, f"{i}")
        return job.result(timeout_s=60).text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(64))) == [f"{i}" for i in range(64)]


def test_a_wrong_database_url_is_refused_at_once() -> None:
    with pytest.raises(InvalidSetting):
        Client(SharedSettings(database_url=Url("mysql://localhost/x")), publish=False)


ONE_SHOT = """
from codeherd_producer import Client
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
with Client(SharedSettings(database_url=sys.argv[1]), publish=False) as client:
    client.submit(GenerateRequest(prompt="x"))
"""


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import codeherd_producer", {"sqlalchemy", "pydantic", "celery"}),
        (ONE_SHOT, {"celery", "kombu", "redis", "torch", "codeherd_worker"}),
    ],
    ids=["import", "submit"],
)
def test_a_one_shot_submit_imports_no_more_than_it_needs(
    sqlite_url: str, program: str, absent: set[str], tmp_path: Path
) -> None:
    script = f"import sys\n{program}\nprint(*{absent!r} & sys.modules.keys())"

    done = subprocess.run(
        [sys.executable, "-c", script, sqlite_url], check=True, cwd=tmp_path, capture_output=True
    )

    assert done.stdout.split() == []


def test_a_job_that_expired_in_the_queue_says_so(client: Client, store: Store) -> None:
    job = client.submit(GenerateRequest(prompt="x", expires_at=timedelta(milliseconds=20)))

    wait_until(lambda: store.expire_due() == (job.id,), "the job to expire")

    with pytest.raises(JobExpired):
        job.result()
