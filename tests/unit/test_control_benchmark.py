"""The control-plane benchmark: a small contest runs from end to end, and the tables say what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from benchmarks.control.contest import Outcome, hold
from benchmarks.control.faults import FLUSH, KILL, FaultRecord
from benchmarks.control.processes import Herd, cpu_s, memory_mb
from benchmarks.control.protocol import QUICK, Command
from benchmarks.control.report import Run, document, rows, targets
from benchmarks.control.run import QUICK_SYSTEMS, measure, store
from benchmarks.control.systems import OURS, PLAIN_CELERY, SYSTEMS
from benchmarks.control.turn import Backlog, TurnRecord
from benchmarks.control.work import JOURNAL_VARIABLE, PROMPT_CHARS, digest_of, null_job, prompts
from tests.services import wait_until

TURN = TurnRecord(
    checked=10,
    start_p50_s=0.020,
    start_p99_s=0.040,
    single_jobs_per_s=100.0,
    many_jobs_per_s=100.0,
    read_jobs_per_s=1000.0,
    worker_cpu_ms=7.0,
    server_cpu_ms=1.0,
    client_cpu_ms=0.5,
    bulk_jobs_per_s=12_000.0,
    backlog=None,
)
BACKLOG = Backlog(
    jobs=100_000, submit_s=10.0, broker_mb=1.0, database_mb=200.0, worker_mb=100.0, urgent_start_s=0.1
)


def run_of(*outcomes: Outcome, faults: dict[tuple[str, str], FaultRecord] | None = None) -> Run:
    return Run(date(2026, 1, 2), QUICK, 1, 0.5, outcomes, faults or {})


def test_codeherd_and_celery_do_every_job_of_a_small_contest(tmp_path: Path) -> None:
    told: list[str] = []

    run = measure(
        [SYSTEMS[name] for name in QUICK_SYSTEMS], QUICK, rounds=1, has_faults=False, tell=told.append
    )

    assert [outcome.missing for outcome in run.outcomes] == [None, None]
    read_back = 2 * QUICK.warm + QUICK.idle + QUICK.single + QUICK.read
    assert [outcome.turns[0].checked for outcome in run.outcomes] == [read_back + 1, read_back]
    assert len(told) == 2
    for outcome in run.outcomes:
        [turn] = outcome.turns
        assert turn.start_p50_s <= turn.start_p99_s
        assert min(turn.single_jobs_per_s, turn.bulk_jobs_per_s, turn.many_jobs_per_s) > 0
        assert turn.worker_cpu_ms > 0
        assert TurnRecord.from_json(json.loads(json.dumps(turn.to_json()))) == turn
    backlog = run.outcomes[0].turns[0].backlog
    assert backlog is not None
    assert (backlog.jobs, backlog.worker_mb > 1) == (QUICK.backlog, True)

    store(run, tmp_path)

    written = [json.loads(line) for line in (tmp_path / "control.jsonl").read_text().splitlines()]
    assert [row["system"] for row in written] == list(QUICK_SYSTEMS)
    assert written == rows(run)
    assert {"celery", "redis-server", "postgresql", "sqlite"} <= written[0]["versions"].keys()
    [page] = tmp_path.glob("*-control-cpu.md")
    assert all(name in page.read_text() for name in QUICK_SYSTEMS)


def test_a_system_that_fails_has_no_figures_and_costs_no_other_one() -> None:
    nobody = replace(PLAIN_CELERY[0], name="nobody")
    absent = replace(PLAIN_CELERY[0], name="absent", packages=("no-such-distribution",))

    outcomes, _ = hold([nobody, absent], QUICK, rounds=1, tell=lambda _: None)

    assert [outcome.turns for outcome in outcomes] == [[], []]
    assert (outcomes[0].missing or "").startswith("failed: KeyError")
    assert outcomes[1].missing == "not installed"
    page = document(run_of(*outcomes))
    assert "not installed" in page
    assert rows(run_of(*outcomes)) == []


def test_targets_compare_with_celery_on_the_same_database() -> None:
    mine = Outcome(OURS[0], [TURN])
    slower, faster = (
        Outcome(peer, [replace(TURN, many_jobs_per_s=rate)])
        for peer, rate in zip(PLAIN_CELERY[:2], (80.0, 125.0), strict=True)
    )
    elsewhere = Outcome(PLAIN_CELERY[3], [replace(TURN, many_jobs_per_s=1.0)])

    lines = targets(run_of(mine, slower, faster, elsewhere)).splitlines()[2:]

    assert [line.split("|")[3].strip() for line in lines] == ["12000", "20.0 ms", "1.25x", "0.80x"]
    assert [line.split("|")[4].strip() for line in lines] == ["met", "met", "met", "not met"]


def test_the_page_holds_medians_ranges_backlog_and_faults() -> None:
    rates = (90.0, 110.0, 100.0)
    turns = [replace(TURN, many_jobs_per_s=rate) for rate in rates]
    turns[0] = replace(turns[0], backlog=BACKLOG)
    name = OURS[0].name
    faults = {(name, KILL): FaultRecord(24, 24, 8, 31.0), (name, FLUSH): FaultRecord(24, 0, 0, 0.0)}

    run = run_of(Outcome(OURS[0], turns), faults=faults)

    page = document(run)
    assert "90.0 to 110.0" in page
    assert "| 100.0 (1.00x) |" in page
    assert f"| {name} | 24 of 24 | 8 | 31.0 | 0 of 24 | - |" in page
    [row] = rows(run)
    assert (row["end_to_end_jobs_per_s"], row["end_to_end_range"]) == (100.0, [90.0, 110.0])
    assert (row["backlog_urgent_start_s"], row["kill_done"], row["flush_done"]) == (0.1, 24, 0)


def test_requests_differ_and_an_answer_says_which_one_it_is_for() -> None:
    first, second = prompts("one", 2)

    answer = null_job(first)

    assert len(first) == PROMPT_CHARS
    assert {first, second}.isdisjoint(prompts("two", 2))
    assert answer["digest"] == digest_of(first) != digest_of(second)
    assert 250 <= len(json.dumps(answer)) <= 350


def test_the_journal_has_a_line_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setenv(JOURNAL_VARIABLE, str(journal))

    for prompt in prompts("again", 2) * 2:
        null_job(prompt)

    assert sorted(journal.read_text().split()) == sorted(2 * [digest_of(p) for p in prompts("again", 2)])


def test_a_herd_leaves_no_child_behind(tmp_path: Path) -> None:
    # The child loses its parent, and changes its process group.
    child = "import os, time; os.setpgid(0, 0); open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    parent = (
        f"import os, subprocess, sys, time; os.chdir({str(tmp_path)!r}); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    )
    pid_file = tmp_path / "pid"

    with Herd([Command("parent", [sys.executable, "-c", parent])], tmp_path) as herd:
        wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()), "the child")
        herd.check()
        child_dir = Path("/proc") / pid_file.read_text()
        assert child_dir.exists()
        assert cpu_s(herd.pids) > 0
        assert memory_mb(herd.pids) > memory_mb([int(child_dir.name)]) > 0

    assert not child_dir.exists() or "\nState:\tZ" in (child_dir / "status").read_text()


def test_a_process_that_ended_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    with Herd([Command("brief", [sys.executable, "-c", "raise SystemExit('enough')"])], tmp_path) as herd:
        [pid] = herd.pids
        wait_until(lambda: "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(), "its end")

        with pytest.raises(RuntimeError, match="enough"):
            herd.check()
