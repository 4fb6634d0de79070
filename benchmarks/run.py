"""Compare codeherd's engine with its peers, and print and store the tables.

    python -m benchmarks.run [--models ...] [--workloads ...] [--systems ...] [--rounds 3] [--write]

Owns: the command line and where results are kept. Progress goes to standard error, the tables to standard
output. With `--write` they also go to `benchmarks/results`, a dated page and one line per figure in
`engine.jsonl`, as each contest ends: all of them take an hour. The exit status is 1 if a system failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from benchmarks.contest import Contest, environment, hold
from benchmarks.models import MODELS, BenchModel, prepare
from benchmarks.protocol import SLOTS
from benchmarks.report import Floor, Run, document, floor_of, rows
from benchmarks.systems import OURS, SYSTEMS, Entry
from benchmarks.workloads import MOST_ROUNDS, WORKLOADS, Builder

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return the exit status."""
    options = _parser().parse_args(argv)
    run = Run(datetime.now(UTC).date(), (), ())
    for part in measure(
        options.models,
        {name: WORKLOADS[name] for name in options.workloads},
        [SYSTEMS[name] for name in options.systems],
        rounds=options.rounds,
        day=run.day,
        tell=_tell_since(time.monotonic()),
    ):
        run = Run(run.day, run.contests + part.contests, run.floors + part.floors)
        if options.write:
            store(run, part, RESULTS)
    print(document(run), end="")
    return 1 if any(_has_failed(contest) for contest in run.contests) else 0


def measure(
    models: Iterable[str],
    builders: Mapping[str, Builder],
    entries: Sequence[Entry],
    *,
    rounds: int,
    day: date,
    tell: Callable[[str], None],
) -> Iterator[Run]:
    """Hold one contest per model and workload, and yield each."""
    for name in models:
        tell(f"{name}: preparing the weights")
        model = prepare(name)
        for workload, builder in builders.items():
            most = MOST_ROUNDS.get((name, workload), rounds)
            contest = hold(model, builder, entries, rounds=min(rounds, most), tell=tell)
            floors: tuple[Floor, ...] = ()
            if workload == "ragged" and OURS in entries:
                floors = (floor_of(contest, _measure_floor(model)),)
            yield Run(day, (contest,), floors)


def store(run: Run, part: Run, folder: Path) -> None:
    """Write the dated page of the run so far, and add the rows of its newest part to `engine.jsonl`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{run.day.isoformat()}-engine-cpu.md").write_text(document(run), encoding="utf-8")
    append(rows(part), folder / "engine.jsonl")


def append(new_rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Add one line per row."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in new_rows)


def _measure_floor(model: BenchModel) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.floor", str(model.folder), str(SLOTS)]
    done = subprocess.run(
        command, env=environment(uses_torch=True), capture_output=True, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _has_failed(contest: Contest) -> bool:
    return any((outcome.missing or "").startswith("failed") for outcome in contest.outcomes)


def _tell_since(started_at: float) -> Callable[[str], None]:
    def tell(text: str) -> None:
        print(f"{time.monotonic() - started_at:6.0f} s  {text}", file=sys.stderr, flush=True)

    return tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Compare codeherd's engine with its peers."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
