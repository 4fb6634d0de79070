"""Two or more who want the same job at the same moment, on SQLite and PostgreSQL.

Every race is run many times from a barrier; who wins is left to chance, what must be true afterwards is
not. Calls one after the other are the matter of test_store_machine.py.

CODEHERD_TEST_EXAMPLES multiplies the number of rounds, for long runs.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from codeherd_producer.client import Client
from codeherd_producer.dispatcher import Dispatcher
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import CodeherdError, IdempotencyConflict, IllegalMove, JobNotFound
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import FINAL_STATES, JobState, Move, PauseScope
from codeherd_schema.store import Claim, Commit, Job, Store
from tests.integration.redis_variants import messages
from tests.samples import a_request, a_result, opened
from tests.services import RedisServer

ROUNDS = 5 * int(os.environ.get("CODEHERD_TEST_EXAMPLES", "1"))
#: A lease that ran out at once; one that outlasts every test.
LAPSED_S, LONG_S = -1.0, 6000.0

Act = Callable[[], Any]


def at_once(*acts: Act) -> list[Any]:
    """Start all acts at the same moment; return their answers in order, our own errors among them."""
    start = threading.Barrier(len(acts))

    def run(act: Act) -> Any:
        start.wait()
        try:
            return act()
        except CodeherdError as err:
            return err

    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result() for future in [pool.submit(run, act) for act in acts]]


def submit(store: Store, count: int = 1, **options: Any) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request(**options) for _ in range(count)])]


def claim(store: Store, job_id: str, *, lease_s: float = LONG_S) -> Claim:
    claimed = store.claim(job_id, worker_id="w", lease_s=lease_s)
    assert claimed is not None
    return claimed


def get(store: Store, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


def outcomes(store: Store, job_id: str) -> list[Move]:
    return [attempt.outcome for attempt in store.attempts(job_id)]


def succeed(store: Store, claimed: Claim) -> Act:
    return lambda: store.succeed(claimed, a_result(claimed, text=claimed.lease_id))


#: How a worker ends an attempt, and where that leads when nobody else wants the job.
ENDINGS: dict[Move, tuple[Callable[[Store, Claim], Act], JobState]] = {
    Move.SUCCEED: (succeed, JobState.SUCCEEDED),
    Move.FAIL: (lambda store, c: lambda: store.fail(c, code="c", message="m"), JobState.FAILED),
    Move.RETRY: (lambda store, c: lambda: store.retry(c, code="c", message="m", delay_s=0), JobState.QUEUED),
    Move.RELEASE: (lambda store, c: lambda: store.release(c), JobState.QUEUED),
    Move.CANCEL: (lambda store, c: lambda: store.cancel_running(c), JobState.CANCELLED),
    Move.EXPIRE: (lambda store, c: lambda: store.expire_running(c), JobState.EXPIRED),
}


# Cancel (F18).


def test_a_cancel_that_races_a_claim_is_never_forgotten(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        state, claimed = at_once(
            partial(store.request_cancel, job_id),
            partial(store.claim, job_id, worker_id="w", lease_s=LONG_S),
        )

        if claimed is None:
            assert (state, get(store, job_id).state) == (JobState.CANCELLED, JobState.CANCELLED)
        else:
            assert (state, get(store, job_id).state) == (JobState.RUNNING, JobState.RUNNING)
            assert store.heartbeat([claimed], lease_s=LONG_S)[claimed.lease_id].cancel_requested


@pytest.mark.parametrize("move", ENDINGS)
def test_a_cancel_that_races_an_end_leaves_one_ending(store: Store, move: Move) -> None:
    end, usual = ENDINGS[move]
    for job_id in submit(store, ROUNDS):
        claimed = claim(store, job_id)

        state, commit = at_once(partial(store.request_cancel, job_id), end(store, claimed))

        job = get(store, job_id)
        assert commit is Commit.STORED
        [outcome] = outcomes(store, job_id)
        if usual is JobState.QUEUED:
            # Given back: whoever came first, the job does not run again.
            assert job.state is JobState.CANCELLED
            assert (state, outcome) in {(JobState.CANCELLED, move), (JobState.RUNNING, Move.CANCEL)}
        else:
            assert (job.state, outcome) == (usual, move)
            assert state in {JobState.RUNNING, usual}
        assert (store.result(job_id) is not None) == (job.state is JobState.SUCCEEDED)


def test_a_cancel_that_races_the_reaper_leaves_the_job_cancelled(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        claim(store, job_id, lease_s=LAPSED_S)

        state, reaped = at_once(partial(store.request_cancel, job_id), lambda: store.reap(max_crashes=3))

        # The reaper passes by a row that another holds.
        later = store.reap(max_crashes=3)
        assert get(store, job_id).state is JobState.CANCELLED
        assert reaped.requeued + reaped.cancelled + later.cancelled == (job_id,)
        assert state is (JobState.CANCELLED if reaped.requeued else JobState.RUNNING)


def test_a_cancel_that_races_a_requeue_never_leaves_the_job_waiting_unnoticed(store: Store) -> None:
    for job_id in submit(store, 2 * ROUNDS):
        store.fail(claim(store, job_id), code="c", message="m")

        state, requeued = at_once(partial(store.request_cancel, job_id), partial(store.requeue, job_id))

        # Either the cancel found the failed job and left it, or it cancelled the waiting one.
        assert requeued is None
        assert (state, get(store, job_id).state) in {
            (JobState.FAILED, JobState.QUEUED),
            (JobState.CANCELLED, JobState.CANCELLED),
        }


# Claims and leases.


def test_many_claims_of_one_job_give_one_lease(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        claims = at_once(*[partial(store.claim, job_id, worker_id="w", lease_s=LONG_S)] * 6)

        [claimed] = [answer for answer in claims if answer is not None]
        assert get(store, job_id).lease_id == claimed.lease_id
        assert get(store, job_id).attempt == 1


def test_a_claim_that_races_a_release_gets_the_next_lease_or_none(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        first = claim(store, job_id)

        released, second = at_once(
            partial(store.release, first),
            partial(store.claim, job_id, worker_id="w", lease_s=LONG_S),
        )

        job = get(store, job_id)
        assert released is Commit.STORED
        assert (job.attempt, job.lease_id) == ((0, None) if second is None else (1, second.lease_id))
        assert succeed(store, first)() is Commit.LOST


def test_of_repeated_calls_of_one_end_one_is_stored(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        claimed = claim(store, job_id)

        commits = at_once(*[succeed(store, claimed)] * 4)

        assert Counter(commits) == {Commit.STORED: 1, Commit.ALREADY: 3}
        assert outcomes(store, job_id) == [Move.SUCCEED]


def test_a_heartbeat_that_races_the_commit_gives_no_lease_back_to_an_ended_job(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        claimed = claim(store, job_id)

        commit, beats = at_once(succeed(store, claimed), partial(store.heartbeat, [claimed], lease_s=LONG_S))

        job = get(store, job_id)
        assert commit is Commit.STORED
        assert set(beats) <= {claimed.lease_id}
        assert (job.state, job.lease_id, job.lease_until) == (JobState.SUCCEEDED, None, None)


# Janitors.


@pytest.mark.parametrize("move", ENDINGS)
def test_an_end_that_races_the_reaper_leaves_one_ending(store: Store, move: Move) -> None:
    end, usual = ENDINGS[move]
    for job_id in submit(store, ROUNDS):
        claimed = claim(store, job_id, lease_s=LAPSED_S)

        commit, reaped = at_once(end(store, claimed), lambda: store.reap(max_crashes=3))

        job = get(store, job_id)
        if commit is Commit.STORED:
            assert (reaped.requeued, job.state, outcomes(store, job_id)) == ((), usual, [move])
        else:
            assert commit is Commit.LOST
            assert (reaped.requeued, job.state) == ((job_id,), JobState.QUEUED)
            assert outcomes(store, job_id) == [Move.REAP]
        assert (store.result(job_id) is not None) == (job.state is JobState.SUCCEEDED)


def test_a_heartbeat_that_races_the_reaper_tells_the_truth(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        claimed = claim(store, job_id, lease_s=LAPSED_S)

        beats, reaped = at_once(
            partial(store.heartbeat, [claimed], lease_s=LONG_S),
            lambda: store.reap(max_crashes=3),
        )

        assert (claimed.lease_id in beats) == (reaped.requeued == ())
        assert (claimed.lease_id in beats) == (get(store, job_id).lease_id == claimed.lease_id)


def test_many_reapers_take_each_lost_job_back_once(store: Store) -> None:
    for _ in range(ROUNDS // 3):
        ids = submit(store, 12)
        for job_id in ids:
            claim(store, job_id, lease_s=LAPSED_S)

        answers = at_once(*[lambda: store.reap(max_crashes=3)] * 4)
        answers.append(store.reap(max_crashes=3))

        assert sorted(job_id for reaped in answers for job_id in reaped.requeued) == ids
        assert {get(store, job_id).crash_count for job_id in ids} == {1}
        assert all(outcomes(store, job_id) == [Move.REAP] for job_id in ids)


def test_a_requeue_that_races_prune_brings_the_job_back_or_says_that_it_is_gone(store: Store) -> None:
    for job_id in submit(store, ROUNDS):
        store.fail(claim(store, job_id), code="c", message="m")

        pruned, requeued = at_once(lambda: store.prune(keep_s=LAPSED_S), partial(store.requeue, job_id))

        job = store.get(job_id)
        if job is None:
            assert pruned == 1
            assert isinstance(requeued, JobNotFound)
        else:
            assert (pruned, requeued, job.state) == (0, None, JobState.QUEUED)
            store.request_cancel(job_id)
            store.prune(keep_s=LAPSED_S)


def test_a_repeated_submit_that_races_prune_answers_with_a_job_that_was_there(store: Store) -> None:
    for turn in range(2 * ROUNDS):
        [old] = submit(store, idempotency_key=f"k{turn}")
        store.request_cancel(old)

        pruned, [again] = at_once(
            lambda: store.prune(keep_s=LAPSED_S),
            partial(submit, store, idempotency_key=f"k{turn}"),
        )

        assert pruned == 1
        assert again == old or get(store, again).state is JobState.QUEUED


# Hints and pauses.


def test_racing_dispatchers_and_submitters_hint_at_each_job_once(store: Store) -> None:
    for _ in range(ROUNDS // 3):
        ids = submit(store, 30)

        answers = at_once(
            *[lambda: store.due("tiny", limit=12)] * 3,
            partial(store.mark_published, ids[:10]),
            partial(store.mark_published, ids[5:20]),
        )
        answers.append(store.due("tiny", limit=100))

        assert sorted(hint.job_id for hints in answers for hint in hints) == ids
        assert {hint.publish_no for hints in answers for hint in hints} == {1}


def test_a_pause_that_races_claims_holds_once_it_is_there(store: Store) -> None:
    for turn in range(ROUNDS):
        ids = submit(store, 4)

        paused, *claims = at_once(
            lambda: store.pause(PauseScope.QUEUE, "tiny"),
            *(partial(store.claim, i, worker_id="w", lease_s=LONG_S) for i in ids),
        )

        assert paused, turn
        taken = {claimed.job.id for claimed in claims if claimed is not None}
        for job_id in ids:
            assert store.claim(job_id, worker_id="w", lease_s=LONG_S) is None
            assert (get(store, job_id).state is JobState.RUNNING) == (job_id in taken)
        assert store.due("tiny", limit=9) == []
        store.resume(PauseScope.QUEUE, "tiny")
        for job_id in set(ids) - taken:
            store.cancel_running(claim(store, job_id))


def test_a_resume_that_races_a_worker_leaves_no_job_without_a_hint(store: Store) -> None:
    for _ in range(ROUNDS):
        [job_id] = submit(store)
        store.mark_published([job_id])
        store.pause(PauseScope.QUEUE, "tiny")

        resumed, claimed = at_once(
            lambda: store.resume(PauseScope.QUEUE, "tiny"),
            partial(store.claim, job_id, worker_id="w", lease_s=LONG_S),
        )

        assert resumed
        owed = [hint.job_id for hint in store.due("tiny", limit=1)]
        assert owed == ([job_id] if claimed is None else [])
        store.request_cancel(job_id)


# Submits with a key (F22).


def test_fifty_submits_with_one_key_give_one_job(store: Store) -> None:
    for turn in range(2):
        answers = at_once(*[partial(submit, store, idempotency_key=f"k{turn}")] * 50)

        assert len({job_id for [job_id] in answers}) == 1
    assert store.count_by_state()[JobState.QUEUED] == 2


def test_fifty_submits_with_one_key_and_two_requests_tell_one_side_of_the_conflict(store: Store) -> None:
    for turn in range(2):
        answers = at_once(
            *(partial(submit, store, prompt=f"body {i % 2}", idempotency_key=f"k{turn}") for i in range(50))
        )

        sides = [answers[side::2] for side in (0, 1)]
        refused = [side for side in sides if all(isinstance(answer, IdempotencyConflict) for answer in side)]
        accepted = [side for side in sides if side not in refused]
        assert (len(refused), len(accepted)) == (1, 1)
        assert len({job_id for [job_id] in accepted[0]}) == 1
    assert store.count_by_state()[JobState.QUEUED] == 2


def test_submits_of_the_same_keys_in_any_order_wait_for_each_other(store: Store) -> None:
    for turn in range(ROUNDS // 3):
        keys = [f"{turn}.{i}" for i in range(20)]

        def submit_all(keys: Sequence[str]) -> dict[str, str]:
            answers = store.submit([a_request(idempotency_key=key) for key in keys])
            return {key: answer.job_id for key, answer in zip(keys, answers, strict=True)}

        answers = at_once(*(partial(submit_all, part) for part in (keys, keys[::-1], keys[10:] + keys[:10])))

        assert answers[0] == answers[1] == answers[2]


# The caller's own transaction.


def settings_of(database_url: str, broker_url: str) -> SharedSettings:
    return SharedSettings.model_validate({"database_url": database_url, "broker_url": broker_url})


@pytest.fixture
def settings(database_url: str, broker_url: str) -> SharedSettings:
    return settings_of(database_url, broker_url)


@pytest.fixture
def client(settings: SharedSettings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with opened(database_url) as database:
        yield database


def dispatch(store: Store, settings: SharedSettings) -> int:
    broker = Broker(settings)
    try:
        return Dispatcher(store, broker, settings).run_once().published
    finally:
        broker.close()


def test_a_job_of_a_transaction_is_published_by_the_dispatcher_after_the_commit_alone(
    store: Store, client: Client, database: Database, settings: SharedSettings, redis_server: RedisServer
) -> None:
    with database.begin() as connection:
        job = client.submit(GenerateRequest(prompt="x"), connection=connection)
        # Nobody sees it: neither the dispatcher, nor a worker whom somebody told the id.
        assert store.queues_with_work() == []
        assert store.get(job.id) is None
    assert messages(redis_server) == []

    assert dispatch(store, settings) == 1

    assert messages(redis_server) == [f"{job.id}.1"]
    assert store.claim(job.id, worker_id="w", lease_s=LONG_S) is not None


def test_a_transaction_that_is_rolled_back_leaves_nothing_and_publishes_nothing(
    store: Store, client: Client, database: Database, settings: SharedSettings, redis_server: RedisServer
) -> None:
    with database.begin() as connection:
        job = client.submit(GenerateRequest(prompt="x", idempotency_key="k"), connection=connection)
        connection.rollback()

    assert store.get(job.id) is None
    assert dispatch(store, settings) == 0
    assert messages(redis_server) == []
    # Its key is free.
    assert not client.submit(GenerateRequest(prompt="y", idempotency_key="k")).deduplicated


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_a_submit_with_the_key_of_an_open_transaction_waits_for_its_end(
    store: Store, database: Database, commits: bool
) -> None:
    for turn in range(ROUNDS // 3):
        request = a_request(idempotency_key=f"k{turn}")
        is_inserted = threading.Event()

        def in_own_transaction(
            request: GenerateRequest = request, done: threading.Event = is_inserted
        ) -> str:
            with database.begin() as connection:
                [answer] = store.submit([request], connection=connection)
                done.set()
                if not commits:
                    connection.rollback()
            return answer.job_id

        def alone(request: GenerateRequest = request, done: threading.Event = is_inserted) -> Any:
            assert done.wait(60)
            return store.submit([request])[0]

        first, second = at_once(in_own_transaction, alone)

        assert second.deduplicated is commits
        assert (second.job_id == first) is commits
        assert get(store, second.job_id).state is JobState.QUEUED


# Everything at once.


def test_nothing_is_lost_or_done_twice_when_all_act_on_the_same_jobs(
    store: Store, rng: random.Random
) -> None:
    ids = submit(store, 6)
    threads = 6
    given: list[list[tuple[Claim, Move | None]]] = [[] for _ in range(threads)]
    seeds = [rng.random() for _ in range(threads)]

    def act_at_random(number: int) -> None:
        chance, own = random.Random(seeds[number]), given[number]
        for _ in range(8 * ROUNDS):
            act_once(store, chance, ids, own)

    answers = at_once(*(partial(act_at_random, n) for n in range(threads)))

    assert answers == [None] * threads
    claims = [entry for own in given for entry in own]
    jobs = store.get_many(ids)
    for job_id, job in jobs.items():
        leases = {claimed.lease_id: end for claimed, end in claims if claimed.job.id == job_id}
        stored = Counter(end for end in leases.values() if end is not None)
        ended = Counter(outcomes(store, job_id))
        # Each lease ended once, in the history too, or is held still.
        assert ended.total() == len(leases) - (job.lease_id is not None)
        assert stored - ended <= Counter(dict.fromkeys((Move.RETRY, Move.RELEASE), len(leases)))
        assert ended[Move.SUCCEED] == stored[Move.SUCCEED] <= 1
        assert job.lease_id is None or leases[job.lease_id] is None
        assert (job.finished_at is not None) == (job.state in FINAL_STATES)
        result = store.result(job_id)
        assert (result is not None) == (job.state is JobState.SUCCEEDED)
        if result is not None:
            assert leases[result.candidates[0].text] is Move.SUCCEED


def act_once(
    store: Store, chance: random.Random, ids: Sequence[str], own: list[tuple[Claim, Move | None]]
) -> None:
    """Do one of the things that workers, janitors and people do; note claims and ends in `own`."""
    job_id = chance.choice(ids)
    kind = chance.choice(["claim", "claim", "end", "end", "beat", "reap", "cancel", "requeue", "hint"])
    match kind:
        case "claim":
            lease_s = chance.choice([LAPSED_S, LONG_S])
            claimed = store.claim(job_id, worker_id="w", lease_s=lease_s)
            if claimed is not None:
                own.append((claimed, None))
        case "end" if own:
            place = chance.randrange(len(own))
            claimed, before = own[place]
            # Rarely the end of it all: else nothing would be left to fight for.
            move = chance.choice([Move.RETRY, Move.RELEASE, Move.FAIL, Move.RELEASE, Move.SUCCEED])
            if ENDINGS[move][0](store, claimed)() is Commit.STORED:
                assert before is None
                own[place] = (claimed, move)
        case "beat":
            store.heartbeat([claimed for claimed, _ in own], lease_s=chance.choice([LAPSED_S, LONG_S]))
        case "reap":
            store.reap(max_crashes=1000)
        case "cancel":
            store.request_cancel(job_id)
        case "requeue":
            try:
                store.requeue(job_id)
            except IllegalMove:
                return
        case _:
            store.unpublish(store.due("tiny", limit=3))
