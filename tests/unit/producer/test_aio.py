from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import pytest

from codeherd_producer.aio import AsyncClient, AsyncJob
from codeherd_schema.errors import (
    JobCancelled,
    JobFailed,
    JobNotFound,
    SchemaOutdated,
    ServiceUnavailable,
    UnknownModel,
    WaitTimeout,
)
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.by_hand import claim, finish, requests
from tests.services import wait_until


def settings_of(database_url: str) -> SharedSettings:
    return SharedSettings.model_validate({"database_url": database_url, "poll_interval_s": 0.02})


@asynccontextmanager
async def client_of(database_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings_of(database_url), publish=False) as client:
        yield client


def run(test: Coroutine[object, object, None]) -> None:
    """Run a test, and give up if it hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def lookouts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "codeherd-lookout"]


async def until_waiting() -> None:
    """Let the other coroutines run until the lookout is there for them."""
    while not lookouts():
        await asyncio.sleep(0)


def test_every_verb_has_its_coroutine(database_url: str, store: Store) -> None:
    async def test() -> None:
        async with client_of(database_url) as client:
            job = await client.submit(GenerateRequest(prompt="x", labels={"k": "v"}))
            more = await client.submit_many(requests(3), batch_id="b")
            assert (await client.get(job.id)).row == await job.refresh() == await client.row(job.id)
            assert [j.id for j in await client.list(batch_id="b", limit=2)] == [more[2].id, more[1].id]
            assert await more[0].cancel() is JobState.CANCELLED
            await more[0].retry()
            store.fail(claim(store, more[0].id), code="engine_failed", message="it broke")
            assert len(await client.attempts(more[0].id)) == 1
            stored = finish(store, job.id)
            assert await job.result(0) == stored

    run(test())


def test_what_cannot_be_served_is_refused(sqlite_url: str) -> None:
    async def test() -> None:
        async with client_of(sqlite_url) as client:
            with pytest.raises(UnknownModel):
                await client.submit(GenerateRequest(prompt="x", model="nope"))
            assert set(await client.faults(requests(2, model="nope"))) == {0, 1}

    run(test())


def test_a_result_is_returned_when_it_comes(database_url: str, store: Store) -> None:
    async def test() -> None:
        async with client_of(database_url) as client:
            job = await client.submit(GenerateRequest(prompt="x"))
            waiting = asyncio.create_task(job.result())
            await until_waiting()

            stored = await asyncio.to_thread(finish, store, job.id)

            assert await waiting == stored

    run(test())


def test_a_job_without_a_result_says_why(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)

    async def test() -> None:
        async with client_of(sqlite_url) as client:
            failed, cancelled = await client.submit_many(requests(2))
            store.fail(claim(store, failed.id), code="engine_failed", message="it broke")
            await cancelled.cancel()

            with pytest.raises(JobFailed, match="it broke"):
                await failed.result()
            with pytest.raises(JobCancelled):
                await cancelled.result()
            with pytest.raises(JobNotFound):
                await client.result("nobody")
            with pytest.raises(JobNotFound):
                await client.wait(["nobody"])

    run(test())
    store.close()


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_a_wait_that_ends_first_says_that_the_job_goes_on(sqlite_url: str, timeout_s: float) -> None:
    async def test() -> None:
        async with client_of(sqlite_url) as client:
            ended, alive = await client.submit_many(requests(2))
            await ended.cancel()

            with pytest.raises(WaitTimeout):
                await alive.result(timeout_s)
            with pytest.raises(WaitTimeout, match=r"go on: 1$"):
                await client.wait([ended, alive], timeout_s)
            await ended.wait(timeout_s)

    run(test())


def test_jobs_come_in_the_order_of_their_ends(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)

    async def test() -> None:
        async with client_of(sqlite_url) as client:
            jobs = await client.submit_many(requests(3))
            finish(store, jobs[2].id)

            ended = client.as_completed([jobs[0], jobs[1].id, jobs[2]])

            assert (await anext(ended)).id == jobs[2].id
            finish(store, jobs[1].id)
            assert (await anext(ended)).id == jobs[1].id
            finish(store, jobs[0].id)
            assert [job.id async for job in ended] == [jobs[0].id]

    run(test())
    store.close()


def test_many_coroutines_wait_in_one_thread(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)

    async def test() -> None:
        async with client_of(sqlite_url) as client:
            jobs = await client.submit_many(requests(60))
            waiting = [asyncio.create_task(job.result()) for job in [*jobs, jobs[0]]]
            await until_waiting()

            for job in jobs:
                finish(store, job.id, text=job.id)
                assert len(lookouts()) <= 1

            texts = [result.text for result in await asyncio.gather(*waiting)]
            assert texts == [job.id for job in [*jobs, jobs[0]]]

    run(test())
    store.close()


def test_a_coroutine_that_is_cancelled_leaves_no_thread(sqlite_url: str) -> None:
    async def test() -> None:
        async with client_of(sqlite_url) as client:
            job = await client.submit(GenerateRequest(prompt="x"))
            waiting = asyncio.create_task(job.wait())
            await until_waiting()

            waiting.cancel()

            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.to_thread(wait_until, lambda: not lookouts(), "the thread to end")
            assert (await job.refresh()).state is JobState.QUEUED

    run(test())


def test_those_who_still_wait_keep_the_thread(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)

    async def test() -> None:
        async with client_of(sqlite_url) as client:
            job = await client.submit(GenerateRequest(prompt="x"))
            impatient, patient = (asyncio.create_task(job.result()) for _ in range(2))
            await until_waiting()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient

            stored = finish(store, job.id)

            assert await patient == stored

    run(test())
    store.close()


def test_a_wait_after_all_waits_have_ended_begins_anew(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)

    async def test() -> None:
        async with client_of(sqlite_url) as client:
            for request in requests(5):
                job = await client.submit(request)
                waiting = asyncio.create_task(job.result())
                await until_waiting()
                stored = finish(store, job.id)
                assert await waiting == stored

    run(test())
    store.close()


def test_what_breaks_the_lookout_is_told_to_everybody(sqlite_url: str) -> None:
    async def test() -> None:
        async with client_of(sqlite_url) as client:
            jobs = await client.submit_many(requests(3))
            waiting = [asyncio.create_task(job.wait()) for job in jobs]
            await until_waiting()

            with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as connection:
                connection.execute("ALTER TABLE jobs RENAME TO gone")
            connection.close()

            for told in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(told, SchemaOutdated)

    run(test())


def test_closing_the_client_ends_the_waits(sqlite_url: str) -> None:
    async def test() -> None:
        async with client_of(sqlite_url) as client:
            job: AsyncJob = await client.submit(GenerateRequest(prompt="x"))
            waiting = asyncio.create_task(job.wait())
            await until_waiting()

        with pytest.raises(ServiceUnavailable, match="closed"):
            await waiting
        assert not lookouts()

    run(test())


def test_threads_with_their_own_loops_share_a_client(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)
    client = AsyncClient(settings_of(sqlite_url), publish=False)

    async def work() -> str:
        job = await client.submit(GenerateRequest(prompt="x"))
        waiting = asyncio.create_task(job.result(60))
        await until_waiting()
        finish(store, job.id, text=job.id)
        return (await waiting).text

    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(asyncio.run(work()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(texts)) == len(threads)
    run(client.close())
    store.close()
