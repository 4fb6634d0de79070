"""Show contests as tables for readers and as rows for machines.

Owns: the words, columns and fields, and the targets. Does not know how figures come about
(`benchmarks.figures`).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from benchmarks.contest import Contest, Outcome
from benchmarks.figures import Figures, decode_step_s, figures_of
from benchmarks.protocol import SLOTS, THREADS
from benchmarks.systems import OURS

PRECISION = "float32"

#: How many times a peer's tokens per second ours must be on `ragged`.
TARGETS: Mapping[str, float] = MappingProxyType(
    {
        "generate_static": 10.0,
        "padded_batches": 2.0,
        "generate_batch": 1.5,
        "llama_cpp": 1.0,
        "ctranslate2": 1.0,
    }
)

#: A column with a ratio to ours: its head, how a figure is taken, how it is written.
_COLUMNS: tuple[tuple[str, Callable[[Figures], float | None], str], ...] = (
    ("tokens/s", lambda f: f.tokens_per_s, "{:.1f}"),
    ("jobs/s", lambda f: f.jobs_per_s, "{:.2f}"),
    ("first token p50, s, queue included", lambda f: f.ttft_p50_s, "{:.3f}"),
    ("gap p99, ms", lambda f: None if f.gap_p99_s is None else f.gap_p99_s * 1000, "{:.1f}"),
    ("peak memory, MB", lambda f: f.peak_rss_mb, "{:.0f}"),
    ("CPU ms/token", lambda f: f.cpu_ms_per_token, "{:.2f}"),
)

_NOTES = """\
- Figures are medians of the rounds; in brackets the ratio to codeherd's in the same table. Tokens/s count new
  tokens only, from the first submission to the last answer; *lowest to highest* is over the rounds.
- First token, queue included: from the submission, which for all but `single` is the start of the workload:
  the wait for a slot counts. Gap: between two tokens of one job. Peak memory: of the whole process, libraries
  too. CPU ms/token: time on all cores of the process per new token.
- `-`: cannot be observed. Systems that take one job, or one batch, after the other may run an even sample of
  the jobs, which the table names: their tokens/s do not depend on how many wait, their first token would.
- Same tokens: the share of a system's jobs whose greedy tokens are exactly codeherd's. Systems add numbers in
  different orders, so two words of nearly equal score can change places; from there on a text differs.
- Every system: the same checkpoint in float32, float32 cache, 2 threads, a process of its own, one at a time.
  padded_batches drops the tokens that a row generates beyond its own job's. ctranslate2 is told each job's
  length; it has no cache of prompts that differ from job to job. llama_cpp keeps each slot's last prompt and
  reuses its beginning, as its server does. No round repeats a prompt of another round."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What a decode step of ours takes, and the least that its work takes on this machine."""

    model: str
    decode_step_ms: float | None
    #: Its matrix multiplications alone, by torch.
    matmul_ms: float
    #: Of large matrices, and of reading memory.
    flops_per_s: float
    bytes_per_s: float
    #: New tokens, if all prompts were multiplied at that rate, and full steps did nothing but read weights.
    ceiling_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that one call measured."""

    day: date
    contests: tuple[Contest, ...]
    floors: tuple[Floor, ...]


def machine() -> str:
    """Return the processor, its cores and its widest vectors."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    vectors = next((v for v in ("avx512_bf16", "avx512f", "avx2") if v in text), "no AVX2")
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {vectors}"


def reference_of(contest: Contest) -> Outcome | None:
    """Return codeherd's outcome, if it took part."""
    return next((o for o in contest.outcomes if o.entry.name == OURS.name), None)


def floor_of(contest: Contest, measured: Mapping[str, Any]) -> Floor:
    """Return the floor beside codeherd's own decode step in this contest.

    Args:
        contest: of one model.
        measured: the fields of `benchmarks.floor.MachineFloor`.
    """
    ours = reference_of(contest)
    step_s = decode_step_s(ours, SLOTS) if ours is not None else None
    workload = contest.asked[0]
    flops = 2 * (workload.prompt_tokens * measured["terms"] + len(workload.jobs) * measured["head_terms"])
    # Each prompt brings the first of its new tokens with it.
    steps = (workload.new_tokens - len(workload.jobs)) / SLOTS
    step_flops = 2 * SLOTS * (measured["terms"] + measured["head_terms"])
    least_step_s = max(
        measured["weight_bytes"] / measured["bytes_per_s"], step_flops / measured["flops_per_s"]
    )
    least_s = flops / measured["flops_per_s"] + steps * least_step_s
    return Floor(
        model=contest.model.name,
        decode_step_ms=None if step_s is None else step_s * 1000,
        matmul_ms=median(measured["step_ms"]),
        flops_per_s=measured["flops_per_s"],
        bytes_per_s=measured["bytes_per_s"],
        ceiling_tokens_per_s=workload.new_tokens / least_s,
    )


def table(contest: Contest) -> str:
    """Return one contest as a Markdown table."""
    heads = [
        "system",
        "version",
        *(head for head, _, _ in _COLUMNS),
        "lowest to highest tokens/s",
        "same tokens",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    reference = reference_of(contest)
    ours = figures_of(reference, contest, reference) if reference is not None else None
    lines += [_line(outcome, contest, ours, len(heads)) for outcome in contest.outcomes]
    return "\n".join(lines)


def targets(contests: Sequence[Contest]) -> str:
    """Return what was aimed at and what was measured, as a Markdown table."""
    lines = ["| model | codeherd against, on `ragged` | target | measured | |", "|---|---|---|---|---|"]
    for contest in contests:
        rates = {row["system"]: row["tokens_per_s"] for row in rows_of(contest)}
        if contest.workload != "ragged" or OURS.name not in rates:
            continue
        for name, target in TARGETS.items():
            if name not in rates:
                lines.append(f"| {contest.model.name} | {name} | at least {target:g}x | - | not measured |")
                continue
            measured = rates[OURS.name] / rates[name]
            verdict = "met" if measured >= target else "not met"
            lines.append(
                f"| {contest.model.name} | {name} | at least {target:g}x | {measured:.2f}x | {verdict} |"
            )
    return "\n".join(lines)


def document(run: Run) -> str:
    """Return the whole run as Markdown."""
    parts = [f"# codeherd's engine and its peers on a CPU, {run.day.isoformat()}", _facts(run)]
    for contest in run.contests:
        parts += [f"## {contest.model.name}, {contest.workload}", _describe(contest), table(contest)]
    if any(contest.workload == "ragged" for contest in run.contests):
        parts += ["## Targets", targets(run.contests)]
    if run.floors:
        parts += ["## Floor and ceiling", *(_floor_line(floor) for floor in run.floors)]
    return "\n\n".join([*parts, "## How to read this", _NOTES]) + "\n"


def rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per system, workload and model that was measured."""
    shared = {"machine": machine(), "date": run.day.isoformat()}
    return [row | shared for contest in run.contests for row in rows_of(contest)]


def rows_of(contest: Contest) -> list[dict[str, Any]]:
    """Return the measured rows of one contest, without what is the same for a whole run."""
    reference = reference_of(contest)
    ours = figures_of(reference, contest, reference) if reference is not None else None
    found = []
    for outcome in contest.outcomes:
        figures = figures_of(outcome, contest, reference)
        if figures is None:
            continue
        found.append(
            {
                "system": outcome.entry.name,
                "version": outcome.entry.version,
                "workload": contest.workload,
                "model": contest.model.name,
                "precision": PRECISION,
                "slots": outcome.entry.group or SLOTS,
                "tokens_per_s": round(figures.tokens_per_s, 2),
                "tokens_per_s_range": [round(rate, 2) for rate in figures.tokens_per_s_range],
                "ratio_to_ours": None if ours is None else round(figures.tokens_per_s / ours.tokens_per_s, 4),
                "jobs_per_s": round(figures.jobs_per_s, 4),
                "jobs": len(outcome.asked[0].jobs),
                "ttft_p50_s": _rounded(figures.ttft_p50_s),
                "gap_p99_s": _rounded(figures.gap_p99_s),
                "peak_rss_mb": round(figures.peak_rss_mb, 1),
                "cpu_s": round(figures.cpu_s, 2),
                "identical_share": _rounded(figures.identical_share),
                "rounds": len(contest.asked),
                "load_average": round(contest.load_average, 2),
            }
        )
    return found


def _line(outcome: Outcome, contest: Contest, ours: Figures | None, columns: int) -> str:
    figures = figures_of(outcome, contest, reference_of(contest))
    name = outcome.entry.name
    if figures is None:
        cells = [name, outcome.entry.version or "-", outcome.missing or "-"]
        return "| " + " | ".join([*cells, *["-"] * (columns - len(cells))]) + " |"
    given, all_jobs = len(outcome.asked[0].jobs), len(contest.asked[0].jobs)
    cells = [
        name if given == all_jobs else f"{name} ({given} of {all_jobs} jobs)",
        str(outcome.entry.version),
    ]
    for _, take, form in _COLUMNS:
        cells.append(_cell(take(figures), None if ours is None else take(ours), form))
    low, high = figures.tokens_per_s_range
    share = figures.identical_share
    cells += [f"{low:.1f} to {high:.1f}", "-" if share is None else f"{share:.0%}"]
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None, ours: float | None, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) + (f" ({value / ours:.2f}x)" if ours else "")


def _facts(run: Run) -> str:
    loads = [contest.load_average for contest in run.contests]
    facts = {
        "machine": machine(),
        "Python": platform.python_version(),
        "threads per system": str(THREADS),
        "slots, or rows of a batch": str(SLOTS),
        "precision": f"{PRECISION} weights and cache",
        "load average before each contest": ", ".join(f"{load:.1f}" for load in loads),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _describe(contest: Contest) -> str:
    workload = contest.asked[0]
    prompts = [len(job.prompt_ids) for job in workload.jobs]
    answers = [job.new_tokens for job in workload.jobs]
    return (
        f"{len(workload.jobs)} jobs, {workload.arrival}. Rounds: {len(contest.asked)}. "
        f"Tokens in: {min(prompts)} to {max(prompts)}, {workload.prompt_tokens} in all. "
        f"Tokens out: {min(answers)} to {max(answers)}, {workload.new_tokens} in all."
    )


def _floor_line(floor: Floor) -> str:
    step = "not observed" if floor.decode_step_ms is None else f"{floor.decode_step_ms:.2f} ms"
    share = "" if floor.decode_step_ms is None else f", {floor.matmul_ms / floor.decode_step_ms:.0%} of it"
    return (
        f"{floor.model}: a decode step of codeherd with {SLOTS} live rows takes {step}; the model's linear "
        f"layers alone, as one loop over all weights by torch, take {floor.matmul_ms:.2f} ms{share}.\n\n"
        f"This machine multiplies large matrices at {floor.flops_per_s / 1e9:.0f} GFLOP/s, and reads as much "
        f"as the weights at {floor.bytes_per_s / 1e9:.1f} GB/s. With all prompts multiplied at that rate, "
        f"every step of {SLOTS} rows full, and no longer than reading the weights or multiplying them takes, "
        f"`ragged` would run at {floor.ceiling_tokens_per_s:.0f} tokens/s."
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
