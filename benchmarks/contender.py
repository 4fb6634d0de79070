"""One system's own process: loads, warms up, then runs a round whenever it is told to.

    python -m benchmarks.contender NAME FOLDER CONVERTED

Owns: the conversation over stdin and stdout, one JSON object per line, one answer per question, and the clock
around a round. Blocks on stdin between its turns, so that it does not disturb the others.

    {"ask": "prepare"}                      convert the model, once per machine
    {"ask": "load", "longest": tokens}      read the weights, allocate
    {"ask": "warm", "workload": ...}        run every shape once
    {"ask": "run", "workload": ...}         one measured round; the answer is a `RoundRecord`
    {"ask": "quit"}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from benchmarks.protocol import System
from benchmarks.records import RoundRecord
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import Workload


def main() -> None:
    """Answer questions until told to quit."""
    name, folder, converted = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    answers = _claim_stdout()
    entry = SYSTEMS[name]
    system: System | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["ask"] == "quit":
            break
        try:
            if system is None:
                module = importlib.import_module(f"benchmarks.systems.{entry.module}")
                system = module.System(**entry.options)
            answer = _answer(system, question, folder, converted)
        except Exception as err:  # the other side decides what a failure means
            traceback.print_exc()
            answer = {"error": f"{type(err).__name__}: {err}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(system: System, question: dict[str, Any], folder: Path, converted: Path) -> dict[str, Any]:
    match question["ask"]:
        case "prepare":
            converted.parent.mkdir(parents=True, exist_ok=True)
            system.prepare(folder, converted)
        case "load":
            system.load(folder, converted, question["longest"])
        case "warm":
            system.warm(Workload.from_json(question["workload"]))
        case "run":
            return _measure(system, Workload.from_json(question["workload"])).to_json()
        case other:
            raise ValueError(f"cannot `{other}`")
    return {}


def _measure(system: System, workload: Workload) -> RoundRecord:
    cpu_s, started_at = time.process_time(), time.perf_counter()
    jobs = system.run(workload)
    wall_s = time.perf_counter() - started_at
    return RoundRecord(tuple(jobs), wall_s, time.process_time() - cpu_s, _peak_rss_mb())


def _peak_rss_mb() -> float:
    # Not ru_maxrss: that one starts from the memory of whoever started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _claim_stdout() -> TextIO:
    """Return the real standard output; whatever a library prints goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
