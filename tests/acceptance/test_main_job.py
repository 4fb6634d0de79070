"""From submit to text, through Redis, two worker processes and SQL."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from codeherd_producer.client import Client
from codeherd_schema.requests import (
    GenerateRequest,
    InfillRequest,
    Request,
    Sampling,
    dump_request,
)
from codeherd_schema.results import Result
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.acceptance.herd import JOBS_TIMEOUT_S, QUICK, Herd
from tests.services import RedisServer

#: The main job runs on quantized weights, as it would on a GPU.
QUANTIZED = QUICK | {"CODEHERD_WORKER_QUANTIZATION": "nf4"}
SOURCE = Path(__file__).read_text()
LINES = SOURCE.splitlines(keepends=True)


def mixed_requests(count: int) -> list[Request]:
    """Jobs of every sort, each with a seed: greedy and sampled, PSM and SPM, long and short, n > 1."""
    requests: list[Request] = []
    for number in range(count):
        at = (number * 7) % (len(LINES) - 6)
        before, middle = "".join(LINES[max(0, at - 6) : at]), "".join(LINES[at + 1 : at + 5])
        sampling = Sampling(
            max_new_tokens=4 + number % 13,
            temperature=(0.0, 0.7, 1.0)[number % 3],
            top_p=(1.0, 0.9)[number % 2],
            top_k=(0, 40)[number % 2],
            repetition_penalty=(1.0, 1.1)[number % 5 == 0],
            stop=((), ("\n\n",))[number % 4 == 0],
            seed=number,
            n=1 + (number % 10 == 0),
        )
        labels = {"number": str(number)}
        if number % 2:
            requests.append(GenerateRequest(prompt=before or "def", sampling=sampling, labels=labels))
        else:
            requests.append(
                InfillRequest(
                    prefix=before,
                    suffix=middle,
                    suffix_first=number % 4 == 0,
                    sampling=sampling,
                    labels=labels,
                )
            )
    return requests


def answers(store: Store) -> dict[str, tuple[str, ...]]:
    """Return the texts of every succeeded job by its number."""
    jobs = store.list(limit=10_000)
    results: dict[str, Result] = store.results([job.id for job in jobs])
    return {
        job.labels["number"]: tuple(c.text for c in results[job.id].candidates)
        for job in jobs
        if job.state is JobState.SUCCEEDED
    }


def test_200_jobs_on_two_workers_are_answered_once_and_as_one_worker_answers(
    tmp_path: Path, database_url: str, broker_url: str, migrated_sqlite: Path
) -> None:
    requests = mixed_requests(200)
    by_cli = "".join(json.dumps(dump_request(r)) + "\n" for r in requests[:100])

    with Herd(
        database_url=database_url,
        broker_url=broker_url,
        folder=tmp_path,
        launchers={"two": "cpu,cpu"},
        variables=QUANTIZED,
    ) as herd:
        done = herd.cli("submit", "jsonl", "-", stdin=by_cli)
        assert done.returncode == 0, done.stderr
        with Client(herd.settings) as client:
            by_sdk = client.submit_many(requests[100:])
            ids = [*done.stdout.split(), *(job.id for job in by_sdk)]
            client.wait([client.get(job_id) for job_id in ids], timeout_s=JOBS_TIMEOUT_S)

    store = Store.open(database_url)
    assert len(set(ids)) == 200
    assert store.count_by_state()[JobState.SUCCEEDED] == 200
    results = store.results(ids)
    assert set(results) == set(ids)
    assert {result.quantization for result in results.values()} == {"nf4"}
    histories = [store.attempts(job_id) for job_id in ids]
    assert [[a.outcome for a in history] for history in histories] == [["succeed"]] * 200
    assert len(Counter(history[0].worker_id for history in histories)) == 2, "one worker did everything"
    two = answers(store)
    store.close()

    alone_url = f"sqlite:///{tmp_path / 'alone.db'}"
    (tmp_path / "alone.db").write_bytes(migrated_sqlite.read_bytes())
    with (
        Herd(
            database_url=alone_url,
            broker_url=broker_url,
            folder=tmp_path,
            launchers={"one": "cpu"},
            variables=QUANTIZED,
        ) as herd,
        Client(herd.settings) as client,
    ):
        # In another order, so that every job meets other neighbours in another slot.
        client.wait(client.submit_many(requests[::-1]), timeout_s=JOBS_TIMEOUT_S)
    store = Store.open(alone_url)
    assert answers(store) == two
    store.close()


def test_what_the_models_cannot_do_is_refused_and_nothing_is_queued(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    herd = Herd(database_url=sqlite_url, broker_url=broker_url, folder=tmp_path, launchers={})

    refused = [
        herd.cli("submit", "infill", "a<FILL_ME>b", "--model", "codellama-34b"),
        herd.cli("submit", "chat", "hello", "--model", "tiny"),
        herd.cli("submit", "generate", "a", "--model", "gpt-9"),
        herd.cli("submit", "generate", "a", "--max-new-tokens", "2048"),
        herd.cli("submit", "infill", "a<FILL_ME>b<FILL_ME>c"),
        herd.cli("submit", "generate", "a", "--temperature", "nan"),
    ]

    codes = [
        "unsupported_by_model",
        "unsupported_by_model",
        "model_not_found",
        "context_length_exceeded",
        "fill_marker",
        "invalid_request",
    ]
    for done, code in zip(refused, codes, strict=True):
        assert (done.returncode, done.stdout) == (2, ""), done
        assert f"[{code}]" in done.stderr
        assert "Traceback" not in done.stderr
    store = Store.open(sqlite_url)
    assert sum(store.count_by_state().values()) == 0
    store.close()


def test_jobs_survive_a_redis_that_stops_and_forgets(tmp_path: Path, sqlite_url: str) -> None:
    requests = mixed_requests(40)

    with RedisServer(aof=False) as redis:
        herd = Herd(
            database_url=sqlite_url, broker_url=redis.url, folder=tmp_path, launchers={"two": "cpu,cpu"}
        )
        with herd, Client(herd.settings) as client:
            jobs = client.submit_many(requests)
            next(iter(client.as_completed(jobs, timeout_s=JOBS_TIMEOUT_S)))
            redis.kill()
            late = client.submit_many(mixed_requests(4))
            redis.start()
            client.wait([*jobs, *late], timeout_s=JOBS_TIMEOUT_S)

            assert {job.refresh().state for job in [*jobs, *late]} == {JobState.SUCCEEDED}
