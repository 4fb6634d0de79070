"""How much memory `codeherd backfill` takes for many targets.

    python -m benchmarks.backfill_memory [--targets 10000 100000 1000000] [--jobs 1000] [--write]

Owns: folders full of made-up functions, a real Redis, SQLite, a dispatcher and a worker whose engine says
sentences at once, and the peak of the command's own memory. Every target is planned and kept in SQL; a budget
then ends the run after so many jobs, since a million of them would take a day. Says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from benchmarks.run import RESULTS, append
from codeherd_schema.backfills import Backfills
from codeherd_schema.migrations import upgrade
from tests.chaos.null_herd import NullHerd
from tests.null_worker import SENTENCES
from tests.services import RedisServer

#: Functions in a file, files in a folder.
FUNCTIONS, FILES = 200, 100
_FUNCTION = """

def step_{number}_{place}(value, other):
    result = value + other * {place}
    if result > {number}:
        result = os.path.join(str(result), "{place}")
    return result
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and store if asked to; return the exit status."""
    options = _parser().parse_args(argv)
    print("| targets | files | jobs | plan only, MB | plan and run, MB | database, MB |")
    print("|---|---|---|---|---|---|", flush=True)
    for targets in options.targets:
        row = measure(targets, jobs=options.jobs)
        print(
            f"| {targets} | {row['files']} | {row['jobs']} | {row['plan_mb']} | {row['run_mb']} "
            f"| {row['database_mb']} |",
            flush=True,
        )
        if options.write:
            append([row], RESULTS / "backfill-memory.jsonl")
    return 0


def measure(targets: int, *, jobs: int) -> dict[str, Any]:
    """Return the figures of one folder.

    Raises:
        RuntimeError: the command failed, or planned another number of targets.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = folder / "source"
        write_source(source, targets)
        redis = stack.enter_context(RedisServer(aof=False))
        database = folder / "codeherd.db"
        upgrade(f"sqlite:///{database}")
        herd = stack.enter_context(
            NullHerd(
                database_url=f"sqlite:///{database}",
                broker_url=redis.url,
                folder=folder,
                variables={SENTENCES: "1", "CODEHERD_LEASE_S": "60", "CODEHERD_LOG_LEVEL": "warning"},
            )
        )
        environment = {k: v for k, v in herd.environment.items() if not k.startswith("CODEHERD_WORKER_")}
        command = ["backfill", "docstrings", str(source), "--model", "tiny"]
        plan_mb = _peak_mb([*command, "--dry-run"], folder, environment)
        run_mb = _peak_mb([*command, "--budget-jobs", str(jobs)], folder, environment)
        rows = stack.enter_context(closing(Backfills.open(f"sqlite:///{database}")))
        progress = rows.progress(rows.list()[0].id)
        planned = sum(progress.targets.values())
        if planned != targets:
            raise RuntimeError(f"{planned} targets were planned, not {targets}")
        return {
            "targets": targets,
            "files": sum(progress.files.values()),
            "jobs": progress.ended,
            "plan_mb": plan_mb,
            "run_mb": run_mb,
            "database_mb": round(database.stat().st_size / 1e6),
            "machine": machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }


def _peak_mb(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run the command line; return the most memory that the process had, in MB."""
    command = [sys.executable, "-m", "codeherd_producer.cli", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with process, (folder / "said").open("wb") as said:
        if process.stderr is None:
            raise RuntimeError("the command has no standard error")
        shutil.copyfileobj(process.stderr, said)
        # `wait` would lose what the kernel says of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError((folder / "said").read_text(errors="replace")[-2000:])
    return round(usage.ru_maxrss / 1000)


def write_source(folder: Path, functions: int) -> None:
    """Write so many functions without a docstring."""
    for first in range(0, functions, FUNCTIONS):
        number = first // FUNCTIONS
        file = folder / f"part{number // FILES}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        places = range(first, min(first + FUNCTIONS, functions))
        made = (_FUNCTION.format(number=number, place=place) for place in places)
        file.write_text("import os\n" + "".join(made), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backfill_memory", description="Measure what many targets take."
    )
    parser.add_argument("--targets", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--jobs", type=int, default=1000, help="budget of each run")
    parser.add_argument("--write", action="store_true", help="add the rows to benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
