"""Compare what a job costs beside its text, and print and store the tables.

    python -m benchmarks.control.run [--systems ...] [--rounds 3] [--no-faults] [--quick] [--write]

Owns: the command line and where results are kept. Progress goes to standard error, the tables to standard
output. With `--write` they also go to `benchmarks/results`: a dated page, and one line per system in
`control.jsonl`. The exit status is 1 if a system failed. `--quick` shows in half a minute that it works: few
jobs, codeherd and Celery with SQLite, figures that mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.control.contest import hold
from benchmarks.control.faults import show
from benchmarks.control.protocol import QUICK, Scale
from benchmarks.control.report import Run, document, rows
from benchmarks.control.systems import OURS, PLAIN_CELERY, SYSTEMS, Entry
from benchmarks.run import RESULTS, append

#: Who takes part in `--quick`.
QUICK_SYSTEMS = (OURS[0].name, PLAIN_CELERY[0].name)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return the exit status."""
    options = _parser().parse_args(argv)
    names = options.systems or (QUICK_SYSTEMS if options.quick else list(SYSTEMS))
    run = measure(
        [SYSTEMS[name] for name in names],
        QUICK if options.quick else Scale(),
        rounds=1 if options.quick else options.rounds,
        has_faults=not (options.quick or options.no_faults),
        tell=_tell_since(time.monotonic()),
    )
    print(document(run), end="")
    if options.write:
        store(run, RESULTS)
    return 1 if any((outcome.missing or "").startswith("failed") for outcome in run.outcomes) else 0


def measure(
    entries: Sequence[Entry], scale: Scale, *, rounds: int, has_faults: bool, tell: Callable[[str], None]
) -> Run:
    """Give every system its turns, then show what the faults leave."""
    day = datetime.now(UTC).date()
    outcomes, load_average = hold(entries, scale, rounds=rounds, tell=tell)
    faults = show(entries, tell) if has_faults else {}
    return Run(day, scale, rounds, load_average, tuple(outcomes), faults)


def store(run: Run, folder: Path) -> None:
    """Write the dated page and add the rows to `control.jsonl`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{run.day.isoformat()}-control-cpu.md").write_text(document(run), encoding="utf-8")
    append(rows(run), folder / "control.jsonl")


def _tell_since(started_at: float) -> Callable[[str], None]:
    def tell(text: str) -> None:
        print(f"{time.monotonic() - started_at:6.0f} s  {text}", file=sys.stderr, flush=True)

    return tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control.run", description="Compare codeherd's queue with its peers."
    )
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), metavar="NAME", help="as in the tables"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-faults", action="store_true", help="leave out the demonstrations")
    parser.add_argument("--quick", action="store_true", help="few jobs, to see that it works")
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
