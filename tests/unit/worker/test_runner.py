"""Real store, real broker, real engine on a random model: every end that a job can have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import text

from codeherd_schema.broker import Broker, queue_name
from codeherd_schema.database import Database
from codeherd_schema.errors import DatabaseUnavailable, OutOfMemory
from codeherd_schema.models import TINY
from codeherd_schema.requests import GenerateRequest, InfillRequest, Overflow, Request, Sampling
from codeherd_schema.results import FinishReason
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import JobState
from codeherd_schema.store import Claim, Commit, Job, Store
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.engine.vocabulary import Vocabulary
from codeherd_worker.generator import Generator
from codeherd_worker.runner import (
    JobEnded,
    OperatorStopped,
    Runner,
    backoff_s,
    candidate_seeds,
    is_last_chance,
    told_logprobs,
)
from codeherd_worker.running import Running
from tests.services import wait_until
from tests.unit.worker.engine.small_vocabularies import model_bytes
from tests.unit.worker.engine.tiny_llama import tiny_llama

MAX_LEN = 1024
MAX_CRASHES = 3
LONG = Sampling(max_new_tokens=900, stop=("\0never",))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(model_bytes("control"))
    vocabulary = Vocabulary.from_folder(folder)
    model = tiny_llama(vocab_size=vocabulary.size)
    engine = Engine(model, EngineSettings.uniform(slots=4, max_len=MAX_LEN, prefill_chunk=64))
    engine.start()
    yield Generator(
        model=TINY.model_copy(update={"context_window": MAX_LEN}),
        vocabulary=vocabulary,
        engine=engine,
        revision="r1",
        quantization="none",
    )
    engine.close()


@dataclass
class Bench:
    """A runner, and a thread that stands for the pool's."""

    store: Store
    running: Running
    runner: Runner
    answer: dict[str, Any] | None = None
    error: BaseException | None = None

    def submit(self, request: Request) -> str:
        return self.store.submit([request], queue_of=lambda one: queue_name(one.model))[0].job_id

    def start(self, job_id: str) -> threading.Thread:
        def work() -> None:
            self.running.enter()
            try:
                self.answer = self.runner.run(job_id)
            except BaseException as err:
                self.error = err
            finally:
                self.running.leave()

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def run(self, request: Request) -> Job:
        job_id = self.submit(request)
        self.start(job_id).join(60)
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        job = self.store.get(job_id)
        assert job is not None
        return job


@pytest.fixture
def bench(store: Store, broker_url: str, generator: Generator) -> Iterator[Bench]:
    broker = Broker(SharedSettings(broker_url=Url(broker_url)))
    running = Running()
    runner = Runner(
        store=store,
        broker=broker,
        generator=generator,
        running=running,
        worker_id="w@here",
        lease_s=30.0,
        max_crashes=MAX_CRASHES,
    )
    yield Bench(store, running, runner)
    broker.close()


def test_an_answer_is_stored_with_all_that_is_needed_to_get_it_again(bench: Bench) -> None:
    request = GenerateRequest(
        prompt="def f(", sampling=Sampling(max_new_tokens=5, seed=3, n=2, temperature=1.0)
    )

    job = bench.run(request)

    result = bench.store.result(job.id)
    assert job.state is JobState.SUCCEEDED
    assert result is not None
    assert [c.seed for c in result.candidates] == list(candidate_seeds(request.sampling, job.id))
    assert all(c.finish_reason in set(FinishReason) for c in result.candidates)
    assert result.completion_tokens == sum(c.completion_tokens for c in result.candidates)
    assert (result.attempt, result.model, result.model_revision) == (1, "tiny", "r1")
    assert (result.quantization, result.worker_id) == ("none", "w@here")
    assert result.engine_fingerprint
    assert result.timings.total_s >= result.timings.decode_s > 0
    assert bench.answer is not None
    assert bench.answer["out"] == result.completion_tokens
    assert "def" not in str(bench.answer), "prompt text must not reach Flower"


def test_the_same_request_gives_the_same_text_again(bench: Bench) -> None:
    request = InfillRequest(
        prefix="def f(a):\n",
        suffix="\n    return a",
        sampling=Sampling(max_new_tokens=30, temperature=0.9, seed=5),
    )

    first, second = bench.run(request), bench.run(request)

    one, two = bench.store.result(first.id), bench.store.result(second.id)
    assert one is not None
    assert two is not None
    assert one.text == two.text


def test_logprobs_are_stored_with_what_each_token_stands_for(bench: Bench, generator: Generator) -> None:
    asked = Sampling(max_new_tokens=6, seed=3, n=2, temperature=1.0, min_p=0.001, logprobs=3)
    with_logprobs = bench.run(GenerateRequest(prompt="def f(", sampling=asked))
    without = bench.run(GenerateRequest(prompt="def f(", sampling=asked.model_copy(update={"logprobs": 0})))

    told, silent = bench.store.result(with_logprobs.id), bench.store.result(without.id)
    assert told is not None
    assert silent is not None
    assert [c.text for c in told.candidates] == [c.text for c in silent.candidates]
    assert [c.logprobs for c in silent.candidates] == [None, None]
    for candidate in told.candidates:
        assert candidate.logprobs is not None
        assert len(candidate.logprobs) == candidate.completion_tokens
        for token in candidate.logprobs:
            assert token.piece == generator.vocabulary.piece(token.token_id)
            assert token.text_bytes == generator.vocabulary.token_bytes(token.token_id)
            assert len(token.top) == 3
            assert token.top[0].logprob >= token.logprob
            assert [t.logprob for t in token.top] == sorted((t.logprob for t in token.top), reverse=True)


def test_an_id_without_a_piece_is_told_by_its_number(generator: Generator) -> None:
    beyond = generator.vocabulary.size
    [told] = told_logprobs([TokenLogprobs(beyond, -1.0, ((0, -0.5),))], generator.vocabulary)

    assert (told.token_id, told.piece, told.text_bytes) == (beyond, "", b"")
    assert told.top[0].piece == generator.vocabulary.piece(0)


def test_a_hint_whose_job_is_gone_is_dropped(bench: Bench) -> None:
    job = bench.run(GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=2)))

    bench.start(job.id).join(30)

    assert bench.answer == {"outcome": "not claimable"}
    assert len(bench.store.attempts(job.id)) == 1


def test_a_draining_worker_leaves_the_job_queued(bench: Bench) -> None:
    bench.runner.drain()

    job = bench.run(GenerateRequest(prompt="x"))

    assert (job.state, job.attempt) == (JobState.QUEUED, 0)


def test_a_prompt_that_does_not_fit_fails_for_good(bench: Bench) -> None:
    words = "word " * MAX_LEN

    refused = bench.run(GenerateRequest(prompt=words, sampling=Sampling(max_new_tokens=8)))
    cut = bench.run(
        GenerateRequest(prompt=words, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=8))
    )

    assert (refused.state, refused.error_code) == (JobState.FAILED, "context_length_exceeded")
    assert isinstance(bench.error, JobEnded)
    assert "word" not in (refused.error_message or "")
    result = bench.store.result(cut.id)
    assert result is not None
    assert result.cut[0].part == "prompt"
    assert 0 < result.cut[0].removed < result.cut[0].total


@pytest.mark.parametrize(
    ("reason", "state", "attempt", "outcome"),
    [
        (CancelReason.USER, JobState.CANCELLED, 1, "cancel"),
        (CancelReason.OPERATOR, JobState.CANCELLED, 1, "cancel"),
        (CancelReason.DRAIN, JobState.QUEUED, 0, "release"),
        (CancelReason.DEADLINE, JobState.EXPIRED, 1, "expire"),
    ],
)
def test_a_stop_ends_the_job_as_its_reason_says(
    bench: Bench, reason: CancelReason, state: JobState, attempt: int, outcome: str
) -> None:
    job_id = bench.submit(GenerateRequest(prompt="def f(", sampling=LONG))
    thread = bench.start(job_id)
    wait_until(lambda: bool(bench.running.held()), "the claim")

    bench.running.cancel_job(job_id, reason)
    thread.join(60)

    job = bench.job(job_id)
    assert (job.state, job.attempt) == (state, attempt)
    assert [a.outcome for a in bench.store.attempts(job_id)] == [outcome]
    assert bench.store.result(job_id) is None
    if reason is CancelReason.OPERATOR:
        assert isinstance(bench.error, OperatorStopped)


def test_a_zombie_stores_nothing(bench: Bench) -> None:
    job_id = bench.submit(GenerateRequest(prompt="def f(", sampling=LONG))
    thread = bench.start(job_id)
    wait_until(lambda: bool(bench.running.held()), "the claim")

    bench.running.cancel_job(job_id, CancelReason.LEASE_LOST)
    thread.join(60)

    assert bench.job(job_id).state is JobState.RUNNING, "only the reaper may take it now"
    assert bench.store.attempts(job_id) == []


def test_a_deadline_stops_the_engine_by_itself(bench: Bench) -> None:
    from datetime import timedelta

    job = bench.run(GenerateRequest(prompt="def f(", sampling=LONG, deadline=timedelta(milliseconds=300)))

    assert job.state is JobState.EXPIRED


class Poor:
    """An engine whose device is full."""

    broken = False

    def submit(self, request: object) -> object:
        raise OutOfMemory("no room")


def test_an_error_that_may_pass_is_tried_again_later(bench: Bench, generator: Generator) -> None:
    bench.runner._generator = replace(generator, engine=Poor())  # type: ignore[arg-type]

    job = bench.run(GenerateRequest(prompt="x"))

    assert (job.state, job.attempt, job.error_code) == (JobState.QUEUED, 1, "out_of_memory")
    assert job.run_at > job.created_at, "without a pause the next attempt meets the same full device"
    assert isinstance(bench.error, JobEnded)


class Broken:
    """An engine that refuses everything."""

    broken = True


def test_a_broken_engine_burns_no_attempt(bench: Bench, generator: Generator) -> None:
    bench.runner._generator = replace(generator, engine=Broken())  # type: ignore[arg-type]

    job = bench.run(GenerateRequest(prompt="x"))

    assert (job.state, job.attempt) == (JobState.QUEUED, 0)


def crashed(bench: Bench, request: Request, *, times: int) -> str:
    """Submit a job and have it lose this many workers."""
    job_id = bench.submit(request)
    for _ in range(times):
        assert bench.store.claim(job_id, worker_id="lost", lease_s=-1.0) is not None
        bench.store.reap(max_crashes=MAX_CRASHES)
    return job_id


def test_a_job_that_one_more_crash_would_bury_runs_alone(bench: Bench) -> None:
    suspect = crashed(bench, GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=2)), times=2)
    neighbour = bench.submit(GenerateRequest(prompt="def f(", sampling=LONG))
    late = bench.submit(GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=2)))

    first = bench.start(neighbour)
    wait_until(lambda: bench.job(neighbour).state is JobState.RUNNING, "the neighbour's claim")
    second = bench.start(suspect)
    wait_until(lambda: bench.runner._quarantine._waiting_to_be_alone == 1, "it to be set apart")
    third = bench.start(late)
    set_apart, waiting = bench.job(suspect), bench.job(late)
    bench.running.cancel_job(neighbour, CancelReason.USER)
    for thread in (first, second, third):
        thread.join(60)

    assert (set_apart.state, set_apart.attempt, waiting.state) == (JobState.QUEUED, 2, JobState.QUEUED)
    assert [a.outcome for a in bench.store.attempts(suspect)] == ["reap", "reap", "release", "succeed"]
    assert bench.job(late).state is JobState.SUCCEEDED
    [done], [after] = bench.store.attempts(suspect)[-1:], bench.store.attempts(late)
    assert bench.store.attempts(neighbour)[0].ended_at <= done.started_at
    assert done.ended_at <= after.started_at


def test_a_job_that_lost_fewer_workers_runs_beside_others(bench: Bench) -> None:
    suspect = crashed(bench, GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=2)), times=1)
    neighbour = bench.submit(GenerateRequest(prompt="def f(", sampling=LONG))

    first = bench.start(neighbour)
    wait_until(lambda: bench.job(neighbour).state is JobState.RUNNING, "the neighbour's claim")
    bench.start(suspect).join(60)

    assert bench.job(suspect).state is JobState.SUCCEEDED
    assert bench.job(neighbour).state is JobState.RUNNING
    bench.running.cancel_job(neighbour, CancelReason.USER)
    first.join(60)


def test_a_drain_sends_away_what_waits_to_run_alone(bench: Bench) -> None:
    suspect = crashed(bench, GenerateRequest(prompt="x"), times=2)
    neighbour = bench.submit(GenerateRequest(prompt="def f(", sampling=LONG))
    first = bench.start(neighbour)
    wait_until(lambda: bench.job(neighbour).state is JobState.RUNNING, "the neighbour's claim")
    second = bench.start(suspect)
    wait_until(lambda: len(bench.store.attempts(suspect)) == 3, "it to be set apart")

    bench.runner.drain()
    second.join(60)

    assert (bench.job(suspect).state, bench.job(suspect).crash_count) == (JobState.QUEUED, 2)
    bench.running.cancel_job(neighbour, CancelReason.USER)
    first.join(60)


@pytest.mark.parametrize(
    ("crashes", "attempt", "max_crashes", "expected"),
    [
        (0, 1, 1, False),
        (0, 5, 3, False),
        (1, 2, 2, True),
        (1, 2, 3, False),
        (2, 3, 3, True),
        (1, 5, 3, True),
    ],
)
def test_only_a_job_that_lost_a_worker_can_be_on_its_last_chance(
    store: Store, crashes: int, attempt: int, max_crashes: int, expected: bool
) -> None:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    claim = store.claim(submitted.job_id, worker_id="w", lease_s=30.0)
    assert claim is not None

    claim = replace(claim, attempt=attempt, job=replace(claim.job, crash_count=crashes, max_attempts=5))

    assert is_last_chance(claim, max_crashes=max_crashes) is expected


def test_an_unexpected_error_costs_one_attempt_and_no_thread(bench: Bench, generator: Generator) -> None:
    bench.runner._generator = replace(generator, vocabulary=None)  # type: ignore[arg-type]

    job = bench.run(GenerateRequest(prompt="secret words"))

    assert (job.state, job.error_code) == (JobState.QUEUED, "engine_failed")
    assert "secret" not in (job.error_message or "")


def test_an_outcome_is_stored_when_the_database_comes_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    succeed = Store.succeed

    def away_twice(store: Store, claim: Claim, result: Any) -> Commit:
        calls.append(1)
        if len(calls) <= 2:
            raise DatabaseUnavailable
        return succeed(store, claim, result)

    monkeypatch.setattr(Store, "succeed", away_twice)

    job = bench.run(GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=2)))

    assert (job.state, len(calls)) == (JobState.SUCCEEDED, 3)


def test_a_payload_of_a_later_version_waits_for_a_later_worker(bench: Bench, database_url: str) -> None:
    job_id = bench.submit(GenerateRequest(prompt="x"))
    database = Database.open(database_url)
    database.write(lambda c: c.execute(text("UPDATE jobs SET schema_version = 99")))
    database.close()

    bench.start(job_id).join(30)

    assert bench.job(job_id).state is JobState.QUEUED
    assert bench.answer == {"outcome": "not claimable"}


def test_a_job_of_another_model_is_not_run_whatever_the_hint_says(bench: Bench) -> None:
    [other] = bench.store.submit([GenerateRequest(prompt="x")], queue_of=lambda _: queue_name("other"))

    bench.start(other.job_id).join(30)

    assert (bench.job(other.job_id).state, bench.answer) == (JobState.QUEUED, {"outcome": "not claimable"})


def test_seeds_differ_by_candidate_and_do_not_depend_on_the_attempt() -> None:
    job_id = "0199d5f0-7c1e-7a30-8f2e-0123456789ab"

    derived = candidate_seeds(Sampling(n=3), job_id)
    given = candidate_seeds(Sampling(n=3, seed=7), job_id)

    assert given[0] == 7
    assert len({*derived, *given}) == 6
    assert candidate_seeds(Sampling(n=3), job_id) == derived
    assert all(0 <= seed < 2**63 for seed in (*derived, *given))


def test_waits_between_attempts_double_up_to_a_bound() -> None:
    longest = [backoff_s(attempt, jitter=lambda _low, high: high) for attempt in range(1, 9)]
    shortest = [backoff_s(attempt, jitter=lambda low, _high: low) for attempt in range(1, 9)]

    assert longest == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert shortest == [wait / 2 for wait in longest]
