"""The measurements of scale, on a few rows: that they measure what they say, and lose nothing meanwhile."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.scale import plans, report
from benchmarks.scale.__main__ import QUICK, main, measure
from benchmarks.scale.herd import Herd, Timetable, behind
from benchmarks.scale.stack import DATABASES, DurablePostgres
from tests.services import RedisServer

#: A row of a herd that keeps up.
GOOD = {
    "heartbeat_s": 10.0,
    "late_worst_s": 0.1,
    "claim_p99_ms": 20.0,
    "offered_jobs_per_s": 100.0,
    "claims_per_s": 99.0,
    "lost_leases": 0,
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[DurablePostgres]:
    with DurablePostgres() as server:
        yield server


def measured(part: str, postgres: DurablePostgres, redis_server: RedisServer) -> list[dict[str, Any]]:
    return list(measure(QUICK, [part], postgres, redis_server))


def test_a_herd_loses_neither_jobs_nor_leases(postgres: DurablePostgres, redis_server: RedisServer) -> None:
    found = measured("herds", postgres, redis_server)
    assert [(row["part"], row["database"]) for row in found] == [
        (part, kind) for kind in DATABASES for part in ("leases", "herd")
    ]
    for row in found:
        assert row["lost_leases"] == row["errors"] == 0
        if row["part"] == "leases":
            assert row["states"] == {"running": row["workers"] * row["slots"]}
            assert row["beats"] > 0
        else:
            assert row["submitted"] > 0
            assert row["states"] == {"succeeded": row["submitted"]}
            assert row["claimed"] == row["stored"] == row["submitted"]
    json.dumps(found)


def test_rows_of_both_databases_are_complete(postgres: DurablePostgres, redis_server: RedisServer) -> None:
    found = measured("rows", postgres, redis_server)
    for kind in DATABASES:
        parts = Counter(row["part"] for row in found if row["database"] == kind)
        assert parts["due"] == len(QUICK.queued) + 1
        assert parts["held"] == len(QUICK.held) + (kind == "postgresql")
        assert parts["call"] == 6
        assert parts["plan"] > 50
        [size] = [row for row in found if (row["part"], row["database"]) == ("bytes", kind)]
        assert size["ended_bytes_per_job"] > size["queued_bytes_per_job"] > 500
        calls = {row["call"]: row for row in found if row["part"] == "plan" and row["database"] == kind}
        assert {"claim", "heartbeat, 32 leases", "succeed", "due, 64 hints", "reap, 4 lost"} <= calls.keys()
        # A claim goes by the key, whatever else.
        assert calls["claim"]["faults"] == ()
    json.dumps(found)


def test_idle_connections_are_counted_and_weighed(
    postgres: DurablePostgres, redis_server: RedisServer
) -> None:
    found = measured("connections", postgres, redis_server)
    assert [row["idle_connections"] for row in found] == list(QUICK.idle_connections)
    assert all(row["backend_kb"] > 0 and row["job_ms"] > 0 for row in found)


def test_the_command_prints_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--parts", "messages"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# How far the service scales, ")
    assert "## Redis" in text


def test_a_walk_through_a_growing_table_is_a_fault_and_a_search_is_none() -> None:
    assert plans.faults_of(
        [
            "SCAN jobs USING INDEX ix_jobs_lanes",
            "SEARCH jobs USING INDEX sqlite_autoindex_jobs_1 (id=?)",
            "SCAN pauses",
            "Seq Scan on jobs rows=5",
            "generic: Index Scan on jobs using ix_jobs_lanes rows=900000",
            "Index Scan on jobs using jobs_pkey rows=1",
            "Seq Scan on pauses rows=1",
        ]
    ) == [
        "SCAN jobs USING INDEX ix_jobs_lanes",
        "Seq Scan on jobs rows=5",
        "generic: Index Scan on jobs using ix_jobs_lanes rows=900000",
    ]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"late_worst_s": 5.1}, ["heartbeats"]),
        ({"claim_p99_ms": 1001.0}, ["claims"]),
        ({"claims_per_s": 80.0}, ["rate"]),
        ({"lost_leases": 1}, ["leases"]),
        ({"claim_p99_ms": None, "offered_jobs_per_s": 0.0, "claims_per_s": 0.0}, []),
    ],
)
def test_a_herd_is_behind_in_what_it_says(change: dict[str, Any], found: list[str]) -> None:
    assert behind(GOOD | change) == found


def test_jobs_arrive_as_fast_as_nine_tenths_of_the_slots_need() -> None:
    herd = Herd(8, 32, 4.0, run_s=1, settle_s=0)
    assert herd.jobs_per_s == pytest.approx(57.6)
    assert herd.window == 64
    assert Herd(128, 32, 4.0, run_s=1, settle_s=0).window == 922
    assert Herd(128, 32, None, run_s=1, settle_s=0).jobs_per_s == 0


def test_a_timetable_calls_what_is_due_in_order() -> None:
    table, calls = Timetable(), list[str]()

    def last() -> None:
        calls.append("last")
        table.close()

    table.put(3.0, last)
    table.put(1.0, lambda: calls.append("first"))
    table.put(2.0, lambda: calls.append("second"))
    table.work()
    assert calls == ["first", "second", "last"]


def test_a_table_shows_missing_figures_as_dashes() -> None:
    columns = {"a": "A", "b": "B", "c": "C"}
    text = report.table([{"a": 1.23456, "b": ["x", "y"]}, {"a": 1234.5, "c": {"get": 1.0}}], columns)
    assert text.splitlines()[2:] == ["| 1.23 | x; y | - |", "| 1234 | - | get 1 |"]
