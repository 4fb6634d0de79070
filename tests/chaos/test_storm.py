"""A storm: jobs of every kind while everything that can fail does, then every promise at once.

CHAOS_JOBS sets the number of jobs; CHAOS_SEED replays one seed. `make chaos` is the long version.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from codeherd_schema.migrations import upgrade
from codeherd_schema.store import Store
from tests.chaos.storm import Answer, PostgresDatabase, SqliteFile, Storm, answers_in_calm
from tests.chaos.storm_plan import make_plan
from tests.chaos.witness import Witness
from tests.samples import a_request, a_result
from tests.services import PostgresServer, RedisServer

JOBS = int(os.environ.get("CHAOS_JOBS", "150"))
#: The short one's plan has a fault of every place, and both kinds of kills.
SEEDS = (1, 2, 3) if "CHAOS_JOBS" in os.environ else (16,)
SEEDS = (int(os.environ["CHAOS_SEED"]),) if "CHAOS_SEED" in os.environ else SEEDS
#: Far above what a run takes, which is about 0.1 s per job and 5 s per fault.
TIMEOUT_S = 600 + JOBS

Calm = Callable[[int], dict[int, Answer]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, redis_server: RedisServer) -> Calm:
    """Answers of a seed's plan without faults, found once."""

    @functools.cache
    def answers(seed: int) -> dict[int, Answer]:
        folder = tmp_path_factory.mktemp("calm")
        file = shutil.copy(migrated_sqlite, folder / "codeherd.db")
        return answers_in_calm(
            make_plan(seed, JOBS),
            database_url=f"sqlite:///{file}",
            broker_url=redis_server.url,
            folder=folder,
        )

    return answers


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_storm_loses_doubles_and_changes_nothing(
    kind: str, seed: int, tmp_path: Path, migrated_sqlite: Path, calm: Calm
) -> None:
    plan = make_plan(seed, JOBS)
    print(f"seed {seed}: CHAOS_SEED={seed} CHAOS_JOBS={JOBS} make chaos")  # noqa: T201
    expected = calm(seed)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        if kind == "sqlite":
            database = SqliteFile(f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'codeherd.db')}")
            storm = stack.enter_context(Storm(plan, database=database, server=server, folder=tmp_path))
        else:
            postgres = stack.enter_context(PostgresServer())
            of_server = PostgresDatabase(postgres, postgres.create_database())
            upgrade(of_server.url)
            storm = stack.enter_context(Storm(plan, database=of_server, server=server, folder=tmp_path))
        storm.run()
        print(storm.summary())  # noqa: T201
        storm.check(expected)


@pytest.fixture
def witness(
    tmp_path: Path, migrated_sqlite: Path, postgres_server: PostgresServer, kind: str
) -> Iterator[Witness]:
    """A witness of a database of its own, which has seen one job succeed."""
    with ExitStack() as stack:
        url = f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'codeherd.db')}"
        if kind == "postgresql":
            url = stack.enter_context(postgres_server.database())
            upgrade(url)
        witness = Witness(url)
        witness.start()
        store = Store.open(url)
        stack.callback(store.close)
        [submitted] = store.submit([a_request()])
        claim = store.claim(submitted.job_id, worker_id="w", lease_s=60)
        assert claim is not None
        store.succeed(claim, a_result(claim))
        yield witness


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE jobs SET state = 'queued', finished_at = NULL", "succeeded -> queued is no legal move"),
        ("UPDATE jobs SET attempt = 2", "succeeded -> succeeded is no legal move"),
        ("UPDATE results SET payload = ''", "update of a result"),
        ("DELETE FROM results", "delete of a result"),
        ("UPDATE attempts SET outcome = 'fail'", "history says fail, but the job went to succeeded"),
        ("UPDATE attempts SET attempt = 2", "says attempt 2"),
        ("UPDATE witnessed_moves SET lease_before = 'x' WHERE lease_before IS NOT NULL", "does not follow"),
        (
            "UPDATE witnessed_moves SET attempt_after = 2 WHERE target = 'running'",
            "attempt and lease should be",
        ),
        ("DELETE FROM witnessed_moves WHERE target = 'succeeded'", "but its last move was to running"),
    ],
)
def test_the_witness_tells_what_breaks_a_rule(witness: Witness, statement: str, problem: str) -> None:
    assert witness.problems() == []

    witness.execute(statement)

    assert any(problem in found for found in witness.problems()), witness.problems()


def test_a_plan_is_a_pure_function_of_its_seed() -> None:
    assert make_plan(7, 300) == make_plan(7, 300)
    assert make_plan(7, 300) != make_plan(8, 300)
