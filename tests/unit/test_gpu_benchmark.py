"""The GPU benchmark itself, tried on a CPU with a toy, and what it makes of figures."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import Results, main, measure, plan, ratio, verdicts
from benchmarks.gpu_models import config_of
from benchmarks.roofline import Ceilings, Roofline

#: Of an H100: bytes and operations per second.
H100 = Ceilings(3.0e12, 790e12)


def row(system: str, tokens_per_s: float, **changes: Any) -> dict[str, Any]:
    fields = {
        "system": system,
        "workload": "decode",
        "model": "7b",
        "precision": "nf4",
        "slots": 1,
        "prefill_chunk": 256,
        "sampled": False,
        "tokens_per_s": tokens_per_s,
    }
    return fields | changes


def test_a_toy_is_measured_from_weights_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = "ceilings|codeherd toy (bf16 [18]|nf4 1),|(off|profile) toy nf4|compiled"
    arguments = ["--device", "cpu", "--shapes", "toy", "--minutes", "4.5", "--only", cases]

    status = main([*arguments, "--write", "toy", "--folder", str(tmp_path)])

    page = next(tmp_path.glob("*-gpu-toy.md")).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert status == 0, page
    assert page == capsys.readouterr().out.removesuffix("\n")
    ours = [r for r in rows if r["system"] == "codeherd"]
    assert {(r["workload"], r["precision"], r["slots"]) for r in ours} == {
        (workload, *model)
        for workload in ("decode", "batch", "prefill")
        for model in (("bf16", 1), ("bf16", 8), ("nf4", 1))
    }
    assert all(r["ratio_to_ours"] == 1 and r["tokens_per_s"] > 0 for r in ours)
    assert all(r["roofline_share"] > 0 for r in ours if r["workload"] == "decode")
    (peer,) = [r for r in rows if r["system"] == "generate_static, compiled" and r["workload"] == "decode"]
    assert peer["ratio_to_ours"] > 0
    assert "| times compiled static generate, nf4 | 3 |" in page


def test_without_time_nothing_starts_and_everything_is_named() -> None:
    results = Results(day=date(2026, 1, 1))
    cases = plan(["7b"], "cuda")

    assert list(measure(cases, time.monotonic(), results)) == [None]

    assert results.left == [case.name for case in cases]
    assert not results.rows


def test_a_case_that_fails_costs_no_other_one() -> None:
    results = Results(day=date(2026, 1, 1))
    good = next(case for case in plan(["toy"], "cpu") if case.name == "codeherd toy bf16 1, chunk 32")
    too_short = replace(good, new=1)

    list(measure([too_short, good], time.monotonic() + 240, results))

    assert list(results.failures) == [too_short.name]
    assert {r["workload"] for r in results.rows} == {"decode", "batch", "prefill"}


def test_the_plan_begins_with_what_the_targets_ask_for() -> None:
    names = [case.name for case in plan(["7b", "34b"], "cuda")]

    for name in ("codeherd 7b bf16 32", "codeherd 7b nf4 1", "generate_static, compiled 7b nf4 1"):
        assert name in names[:11]
    assert len(set(names)) == len(names)
    assert "codeherd 34b bf16 64" not in names


def test_the_roofline_is_the_published_sum() -> None:
    # 7B: 6.739e9 weights less an embedding of 131e6, and 512 KiB of keys and values a token.
    line = Roofline(config_of("7b"), "bf16", H100)

    assert line.step_s(1, 1024) == pytest.approx(4.58e-3, rel=2e-3)
    assert line.step_s(32, 1024) == pytest.approx(10.13e-3, rel=2e-3)
    assert Roofline(config_of("34b"), "nf4", H100).step_s(8, 1024) == pytest.approx(6.42e-3, rel=2e-3)


def test_many_rows_are_bound_by_arithmetic() -> None:
    slow = Ceilings(3.0e12, 1e12)

    assert Roofline(config_of("7b"), "bf16", slow).step_s(64, 0) == pytest.approx(
        64 * 2 * 6.607e9 / 1e12, rel=1e-2
    )


def test_a_target_is_met_by_the_row_that_it_names() -> None:
    rows = [
        row("codeherd", 300.0),
        row("generate_static, compiled", 90.0),
        row("codeherd", 9.0, slots=32, precision="bf16", roofline_share=0.61),
        row("codeherd", 2000.0, slots=32, precision="bf16", workload="batch"),
        row("generate_batch", 2500.0, slots=32, precision="bf16", workload="batch"),
    ]

    measured = [(at_least, value) for _, at_least, value in verdicts(rows)]

    assert measured == [(0.6, 0.61), (400, 300.0), (3, pytest.approx(3.33, rel=1e-2)), (1, 0.8)]
    assert [value for *_, value in verdicts(rows[:1])] == [None, 300.0, None, None]


def test_a_ratio_compares_equal_work_alone() -> None:
    rows = [row("codeherd", 100.0, slots=8), row("codeherd", 50.0)]

    assert ratio(row("generate_static", 25.0), rows) == 0.5
    assert ratio(row("generate_static", 25.0, workload="batch"), rows) is None
