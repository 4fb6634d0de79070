"""The benchmark suite: what is asked is fixed, and one small contest runs from end to end."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from benchmarks.contest import Contest, Outcome, fault_in, hold
from benchmarks.figures import decode_step_s, percentile
from benchmarks.models import BenchModel, prepare
from benchmarks.records import JobRecord, RoundRecord
from benchmarks.report import Run, document, floor_of, rows, targets
from benchmarks.run import store
from benchmarks.systems import SYSTEMS, Entry
from benchmarks.workloads import WORKLOADS, Arrival, Job, Workload


@pytest.fixture(scope="module")
def tiny() -> BenchModel:
    return prepare("tiny")


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_each_time_and_new_each_round(tiny: BenchModel, name: str) -> None:
    first, again, other = (WORKLOADS[name](tiny, number) for number in (1, 1, 2))

    assert first == again
    assert Workload.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert {job.prompt_ids for job in first.jobs}.isdisjoint(job.prompt_ids for job in other.jobs)
    assert [job.new_tokens for job in first.jobs] == [job.new_tokens for job in other.jobs]


@pytest.mark.parametrize(
    ("name", "count", "prompts", "answers"),
    [
        ("ragged", 64, range(32, 257), range(16, 129)),
        ("backfill", 48, range(128, 1441), range(16, 33)),
        ("long", 8, range(1900, 1921), range(32, 33)),
        ("single", 8, range(64, 65), range(64, 65)),
    ],
)
def test_a_workload_stays_within_its_bounds(
    tiny: BenchModel, name: str, count: int, prompts: range, answers: range
) -> None:
    workload = WORKLOADS[name](tiny, 1)

    assert len(workload.jobs) == count
    assert all(len(job.prompt_ids) in prompts for job in workload.jobs)
    assert all(job.new_tokens in answers for job in workload.jobs)
    assert all(0 <= i < tiny.vocab_size for job in workload.jobs for i in job.prompt_ids)
    assert workload.longest <= tiny.window


def test_holes_of_one_file_share_all_that_stands_before_them(tiny: BenchModel) -> None:
    first, second = WORKLOADS["backfill"](tiny, 1).jobs[10:12]

    shared = 0
    while first.prompt_ids[shared] == second.prompt_ids[shared]:
        shared += 1

    assert shared > len(first.prompt_ids) / 2


def test_a_sample_is_spread_over_all_jobs() -> None:
    workload = Workload("w", Arrival.AT_ONCE, tuple(Job((1, i), 1) for i in range(10)))

    assert [job.prompt_ids[1] for job in workload.sample(4).jobs] == [0, 2, 5, 7]
    assert workload.sample(10) is workload


def test_a_decode_step_counts_only_while_all_rows_decode() -> None:
    def job(*times: float) -> JobRecord:
        return JobRecord(tuple(range(len(times))), 0.0, times)

    # The second job's first token comes in the middle of the first job's slow step.
    record = RoundRecord((job(1.0, 2.0, 12.0, 13.0, 14.0), job(11.0, 12.0, 13.0)), 14.0, 1.0, 1.0)
    outcome = Outcome(SYSTEMS["codeherd"], rounds=[record])

    assert decode_step_s(outcome, 2) == 1.0
    assert decode_step_s(outcome, 3) is None


@pytest.mark.parametrize(
    ("flops_per_s", "step_s"),
    [
        # 4 bytes for each of 250 numbers, at 1,000 a second.
        (1e9, 1.0),
        # 16 rows times 250 multiply-adds.
        (4000.0, 2.0),
    ],
)
def test_no_system_makes_more_tokens_than_the_ceiling(flops_per_s: float, step_s: float) -> None:
    model = BenchModel("m", Path(), "", 100, 100, 1, frozenset())
    jobs = tuple(Job((1,) * 10, 9) for _ in range(4))
    asked = Workload("ragged", Arrival.AT_ONCE, jobs)
    measured = {
        "step_ms": [3.0, 1.0, 2.0],
        "terms": 200,
        "head_terms": 50,
        "weight_bytes": 1000,
        "bytes_per_s": 1000.0,
        "flops_per_s": flops_per_s,
    }

    floor = floor_of(Contest(model, "ragged", (asked,), (), 0.0), measured)

    # 40 tokens of prompts and 4 heads; then 32 tokens in two steps of 16.
    prompts_s = 2 * (40 * 200 + 4 * 50) / flops_per_s
    assert floor.ceiling_tokens_per_s == pytest.approx(36 / (prompts_s + 2 * step_s))
    assert (floor.matmul_ms, floor.decode_step_ms) == (2.0, None)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(i) for i in range(1, 101)]

    assert (percentile(values, 0.99), percentile(values, 0.5), percentile([7.0], 0.99)) == (99.0, 50.0, 7.0)


def mini(model: BenchModel, number: int) -> Workload:
    """Four jobs of different lengths."""
    jobs = tuple(Job((1, *(300 + 7 * number + i for i in range(10 * n))), 3 + n) for n in range(1, 5))
    return Workload("ragged", Arrival.AT_ONCE, jobs)


def test_two_systems_generate_the_same_tokens_and_fill_table_and_rows(
    tiny: BenchModel, tmp_path: Path
) -> None:
    absent = Entry("absent", "absent", ("no-such-package",))
    told: list[str] = []

    contest = hold(
        tiny, mini, [SYSTEMS["codeherd"], SYSTEMS["padded_batches"], absent], rounds=1, tell=told.append
    )
    run = Run(date(2026, 1, 2), (contest,), ())
    store(run, run, tmp_path)
    # A later part adds its own rows alone.
    store(run, Run(run.day, (), ()), tmp_path)

    assert [outcome.missing for outcome in contest.outcomes] == [None, None, "not installed"], told
    ours, theirs = (json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines())
    assert {
        "system", "version", "workload", "model", "precision", "slots", "tokens_per_s", "ratio_to_ours",
        "jobs_per_s", "ttft_p50_s", "gap_p99_s", "peak_rss_mb", "cpu_s", "machine", "date", "rounds",
        "load_average",
    } <= ours.keys() == theirs.keys()  # fmt: skip
    assert (ours["system"], ours["ratio_to_ours"], theirs["system"]) == ("codeherd", 1.0, "padded_batches")
    assert theirs["identical_share"] == 1.0
    assert all(row["peak_rss_mb"] > 50 and row["cpu_s"] > 0 for row in (ours, theirs))
    assert rows(run) == [ours, theirs]
    page = (tmp_path / "2026-01-02-engine-cpu.md").read_text()
    assert page == document(run)
    assert "| absent | - | not installed |" in page
    measured = ours["tokens_per_s"] / theirs["tokens_per_s"]
    verdict = "met" if measured >= 2 else "not met"
    assert f"| tiny | padded_batches | at least 2x | {measured:.2f}x | {verdict} |" in targets([contest])


def test_a_system_that_fails_has_no_figures(tiny: BenchModel, capfd: pytest.CaptureFixture[str]) -> None:
    nobody = Entry("nobody", "nobody", ("codeherd",))

    contest = hold(tiny, mini, [nobody], rounds=1, tell=lambda _: None)

    [outcome] = contest.outcomes
    assert outcome.missing == "failed: its process ended"
    assert rows(Run(date(2026, 1, 2), (contest,), ())) == []
    assert "nobody" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ((4, 5, 6, 7), None),
        ((4, 5, 6), "3 of 4 jobs came back"),
        ((5, 4, 6, 7), "job 0 has 5 new tokens, 4 were asked for"),
    ],
)
def test_every_job_must_have_the_tokens_it_was_asked_for(
    tiny: BenchModel, counts: tuple[int, ...], fault: str | None
) -> None:
    jobs = tuple(JobRecord((9,) * count, 0.0, None) for count in counts)

    assert fault_in(RoundRecord(jobs, 1.0, 1.0, 1.0), mini(tiny, 1)) == fault
