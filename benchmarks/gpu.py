"""Measure the engine on a GPU with random models of real sizes, beside its floor and its peers.

    python -m benchmarks.gpu [--minutes 9] [--only REGEX] [--plan] [--write NAME [--folder DIR]]

Owns: which cases there are and in which order, the time that they may take, the targets, and the tables.
Needs no file and no network. Every group of cases is a process of its own, and one that fails goes on with
the next case in a new one. The cases that targets ask for come first; when the time is over, what is left is
named and left out. With `--write`, a page `DATE-gpu-NAME.md` and rows in `gpu.jsonl` are written after every
answer, so that nothing measured is lost. `--device cpu --shapes toy` tries all of this without a GPU.

Does not know how a figure is taken (`benchmarks.gpu_cases`).
"""

from __future__ import annotations

import argparse
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import Case, floor_of
from benchmarks.gpu_models import SHAPES
from benchmarks.roofline import Ceilings

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent

#: Sequences that decode together.
SLOTS = (1, 4, 8, 16, 32, 64)
#: GB of weights and cache that a case may take; what needs more is not tried.
_CARD_GB = 76
#: Seconds before the end in which no case is started.
_LEAST_S = 20.0
#: What a large model's cache and weights take, in GB: weights by quantization, and 1,500 tokens of a slot.
_WEIGHTS_GB: Mapping[str, Mapping[str, float]] = {
    "7b": {"bf16": 13.5, "int8": 7.0, "nf4": 3.9},
    "13b": {"bf16": 26.0, "int8": 13.4, "nf4": 7.2},
    "34b": {"bf16": 67.5, "int8": 34.3, "nf4": 18.2},
}
_SLOT_GB: Mapping[str, float] = {"7b": 0.8, "13b": 1.25, "34b": 0.3}


@dataclass(frozen=True, slots=True)
class Target:
    """What a row must reach."""

    says: str
    #: Of our row: workload, quantization, slots.
    workload: str
    quantization: str
    slots: int
    at_least: float
    #: A peer's system, `roofline`, or None: tokens per second as they are.
    against: str | None


TARGETS = (
    Target("share of the roofline, bf16, 32 slots", "decode", "bf16", 32, 0.6, "roofline"),
    Target("tokens/s, nf4, one slot", "decode", "nf4", 1, 400, None),
    Target("times compiled static generate, nf4", "decode", "nf4", 1, 3, "generate_static, compiled"),
    Target("times generate_batch, bf16, 32 jobs", "batch", "bf16", 32, 1, "generate_batch"),
)


@dataclass(slots=True)
class Results:
    """What was measured until now."""

    day: date
    rows: list[dict[str, Any]] = field(default_factory=list)
    #: Case -> why it has no rows.
    failures: dict[str, str] = field(default_factory=dict)
    #: Cases for which there was no time.
    left: list[str] = field(default_factory=list)

    @property
    def ceilings(self) -> dict[str, Any] | None:
        """The device's row."""
        return next((row for row in self.rows if row["workload"] == "ceilings"), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return the exit status, 1 if a case failed."""
    options = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    cases = [case for case in plan(options.shapes, options.device) if re.search(options.only, case.name)]
    if options.plan:
        print("\n".join(case.name for case in cases))
        return 0
    results = Results(datetime.now(UTC).date())
    for _ in measure(cases, deadline, results):
        if options.write:
            store(results, options.folder, options.write)
    print(document(results))
    return 1 if results.failures else 0


def plan(shapes: Iterable[str], device: str) -> list[Case]:
    """Return all cases, the most telling first."""
    shapes = tuple(shapes)
    first, others = shapes[0], shapes[1:]
    case = Case("codeherd", first, "bf16", 32, device=device)
    if first == "toy":
        # Small enough for any machine, and still several passes a prompt.
        case = replace(case, prompt=48, new=16, chunk=32)
    cases = [replace(case, system="ceilings", slots=1)]
    cases += [replace(case, slots=slots) for slots in (32, 1, 8, 64)]
    cases += [replace(case, quantization="nf4", slots=slots) for slots in (1, 4, 8)]
    cases += [
        replace(case, system=f"generate_static{mode}", quantization="nf4", slots=1)
        for mode in (", compiled", "")
    ]
    cases += [replace(case, system="generate_batch")]
    cases += [replace(case, system="codeherd, profile", quantization=q, slots=s) for q, s in _PROFILED]
    cases += [replace(case, system="codeherd, graphs off", quantization=q, slots=s) for q, s in _PROFILED]
    cases += [replace(case, quantization="int8", slots=slots) for slots in (32, 8, 1, 64)]
    cases += [replace(case, chunk=4 * case.chunk), replace(case, is_sampled=True)]
    for shape in others:
        cases += [replace(case, shape=shape, quantization=q, slots=s) for q, s in _LARGE]
    cases += [replace(case, quantization="nf4", slots=slots) for slots in (16, 32, 64)]
    cases += [replace(case, slots=slots) for slots in (4, 16)]
    cases += [replace(case, quantization="int8", slots=slots) for slots in (4, 16)]
    return [case for case in cases if device == "cpu" or _fits(case)]


_PROFILED = (("bf16", 32), ("nf4", 1))
_LARGE = tuple(("nf4", s) for s in (1, 8, 16, 32)) + tuple(("int8", s) for s in (32, 64)) + (("bf16", 8),)


def _fits(case: Case) -> bool:
    return _WEIGHTS_GB[case.shape][case.quantization] + case.slots * _SLOT_GB[case.shape] <= _CARD_GB


def measure(cases: Sequence[Case], deadline: float, results: Results) -> Iterator[None]:
    """Run cases and keep what comes out; yield after every answer.

    Args:
        cases: in order; neighbours of one model share a process.
        deadline: of `time.monotonic()`.
        results: is added to.
    """
    for _, group in groupby(cases, key=lambda case: (case.shape, case.quantization, _family(case))):
        left = list(group)
        while left and time.monotonic() < deadline - _LEAST_S:
            for case, answer in _run(tuple(left), deadline):
                left.remove(case)
                _keep(case, answer, results)
                yield
        results.left += [case.name for case in left]
    yield


def _family(case: Case) -> str:
    """Return which cases may follow each other in one process: a peer leaves threads and caches behind."""
    return "codeherd" if case.system.startswith(("codeherd", "ceilings")) else case.system


def _run(cases: Sequence[Case], deadline: float) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Run cases in a process of their own until one fails; yield each with its answer."""
    command = [sys.executable, "-m", "benchmarks.gpu_cases", json.dumps([asdict(case) for case in cases])]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE)
    stdout = process.stdout
    if stdout is None:  # never: it was asked for
        raise AssertionError("no pipe")
    try:
        for case in cases:
            started_at = time.monotonic()
            ready, _, _ = select.select([stdout], [], [], max(0, deadline - time.monotonic()))
            line = stdout.readline() if ready else b""
            seconds = time.monotonic() - started_at
            print(f"{seconds:6.1f} s  {case.name}", file=sys.stderr, flush=True)
            if not line:
                yield case, {"error": "the process ended" if ready else "the time was over"}
                return
            answer: dict[str, Any] = json.loads(line)
            yield case, answer
            if "error" in answer:
                return
    finally:
        process.kill()
        process.wait()
        stdout.close()


def _keep(case: Case, answer: Mapping[str, Any], results: Results) -> None:
    if "error" in answer:
        results.failures[case.name] = answer["error"]
        return
    ceilings = results.ceilings
    for row in answer["rows"]:
        if ceilings is not None:
            floor = floor_of(row, Ceilings(ceilings["bytes_per_s"], ceilings["flops_per_s"]))
            row["roofline_tokens_per_s"] = None if floor is None else round(floor, 1)
            row["roofline_share"] = None if floor is None else round(row["tokens_per_s"] / floor, 4)
            row["machine"] = ceilings["machine"]
        results.rows.append(row | {"date": results.day.isoformat()})


def store(results: Results, folder: Path, name: str) -> None:
    """Write the page, and the rows in place of those that an earlier call of this run wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{results.day.isoformat()}-gpu-{name}.md").write_text(document(results), encoding="utf-8")
    path = folder / "gpu.jsonl"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    run = f"{results.day.isoformat()} {name}"
    kept = [line for line in known if json.loads(line).get("run") != run]
    lines = [
        json.dumps(row | {"run": run, "ratio_to_ours": ratio(row, results.rows)}) for row in results.rows
    ]
    path.write_text("".join(line + "\n" for line in [*kept, *lines]), encoding="utf-8")


def ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return a row's tokens/s as a multiple of codeherd's on the same work; None where there are none."""
    same = ("workload", "model", "precision", "slots", "prefill_chunk", "sampled")
    for ours in rows:
        if ours.get("system") == "codeherd" and all(ours.get(name) == row.get(name) for name in same):
            return round(float(row["tokens_per_s"] / ours["tokens_per_s"]), 4)
    return None


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float | None]]:
    """Return each target's words, what it asks for, and what was measured of the first model."""
    model = next((row["model"] for row in rows if row["workload"] != "ceilings"), None)

    def find(system: str, target: Target) -> Mapping[str, Any] | None:
        wanted = {
            "system": system,
            "workload": target.workload,
            "model": model,
            "precision": target.quantization,
            "slots": target.slots,
            "sampled": False,
        }
        return next((row for row in rows if wanted.items() <= row.items()), None)

    found: list[tuple[str, float, float | None]] = []
    for target in TARGETS:
        ours = find("codeherd", target)
        measured: float | None = None
        if ours is not None and target.against is None:
            measured = ours["tokens_per_s"]
        elif ours is not None and target.against == "roofline":
            measured = ours.get("roofline_share")
        elif ours is not None and (peer := find(str(target.against), target)) is not None:
            measured = ours["tokens_per_s"] / peer["tokens_per_s"]
        found.append((target.says, target.at_least, measured))
    return found


def document(results: Results) -> str:
    """Return the whole run as Markdown."""
    parts = [f"# The engine on a GPU, {results.day.isoformat()}", _facts(results), "## Targets"]
    lines = ["| target | at least | measured | |", "|---|---|---|---|"]
    for says, at_least, measured in verdicts(results.rows):
        verdict = "not measured" if measured is None else "met" if measured >= at_least else "not met"
        shown = "-" if measured is None else f"{measured:.2f}"
        lines.append(f"| {says} | {at_least:g} | {shown} | {verdict} |")
    parts.append("\n".join(lines))
    for workload in ("decode", "batch", "prefill"):
        rows = [row for row in results.rows if row["workload"] == workload]
        if rows:
            parts += [f"## {_HEADS[workload]}", _table(rows, results.rows)]
    for row in results.rows:
        if row["workload"] == "profile":
            head = f"## Kernels of a step: {row['model']} {row['precision']}, {row['slots']} slots"
            table = "\n".join(row["table"])
            parts += [head, f"{row['kernels_per_step']} kernels a step.", f"```\n{table}\n```"]
    if results.failures:
        parts += ["## Failed", "\n".join(f"- {name}: {why}" for name, why in results.failures.items())]
    if results.left:
        parts += ["## Not tried, the time was over", "\n".join(f"- {name}" for name in results.left)]
    return "\n\n".join([*parts, "## How to read this", _NOTES]) + "\n"


_HEADS = {
    "decode": "Decode: all slots decode, none prefills",
    "batch": "Batch: as many equal jobs as slots, from submission to the last token",
    "prefill": "Prefill: the same jobs with one new token each",
}
_NOTES = """\
- Random weights of the named size; greedy unless *sampled* (temperature 0.8, top_p 0.95); no sequence ends
  early; no prompt begins like another.
- Roofline: the least time in which the weights and the attended keys and values can be read, or the products
  computed, at the rates measured above (`benchmarks/roofline.py`). Share: measured of possible tokens/s.
- generate_static, compiled: transformers compiles the step of a static cache by itself, but not for a model
  that bitsandbytes quantized when it was loaded; here it is made to. generate_static without that is what
  users get. generate_batch: transformers' continuous batching with the settings that it chooses.
- Peak: allocated by torch at most, weights, cache and activations. In brackets: times codeherd's tokens/s."""


def _facts(results: Results) -> str:
    ceilings = results.ceilings
    if ceilings is None:
        return "No ceilings were measured."
    versions = ", ".join(f"{name} {version}" for name, version in ceilings["versions"].items())
    copied, multiplied = ceilings["bytes_per_s"] / 1e12, ceilings["flops_per_s"] / 1e12
    return (
        f"- machine: {ceilings['machine']}\n"
        f"- measured: {copied:.2f} TB/s copied (read and written), {multiplied:.1f} TFLOP/s in bfloat16\n"
        f"- versions: {versions}"
    )


#: Column -> how it is written; a row may lack it.
_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("system", lambda r: r["system"] + (", sampled" if r["sampled"] else "")),
    ("model", lambda r: r["model"]),
    ("weights", lambda r: r["precision"]),
    ("slots", lambda r: str(r["slots"])),
    ("chunk", lambda r: str(r["prefill_chunk"])),
    ("ms a step", lambda r: f"{r['ms_per_step']:.2f}" if "ms_per_step" in r else "-"),
    ("roofline", lambda r: f"{r['roofline_tokens_per_s']:.0f}" if r.get("roofline_tokens_per_s") else "-"),
    ("share", lambda r: f"{r['roofline_share']:.0%}" if r.get("roofline_share") else "-"),
    ("peak, GB", lambda r: f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "-"),
    ("graphs", lambda r: str(r.get("graphs", "-"))),
)


def _table(rows: Sequence[Mapping[str, Any]], all_rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [head for head, _ in _COLUMNS]
    heads.insert(5, "tokens/s")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [write(row) for _, write in _COLUMNS]
        multiple = ratio(row, all_rows)
        is_ours = row["system"] == "codeherd"
        shown = "" if multiple is None or is_ours else f" ({multiple:.2f}x)"
        cells.insert(5, f"{row['tokens_per_s']:.1f}{shown}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=("7b", "34b"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, loading included")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--plan", action="store_true", help="print the cases and end")
    parser.add_argument("--write", metavar="NAME", help="store page and rows")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
