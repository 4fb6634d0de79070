"""The containers' health check: `healthcheck.py worker|dispatcher|flower`, exit status 0 or 1.

Owns: what each service must be able to do to count as healthy. A worker answers for its engine, and
ends itself when the engine hangs; a dispatcher leaves no due job without a message.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

from codeherd_producer.health import Verdict, examine
from codeherd_schema.broker import Broker
from codeherd_schema.errors import CodeherdError
from codeherd_schema.settings import SharedSettings, load, user_file

#: Seconds that a worker gets to answer; its main loop is busy for at most a few of them.
ANSWER_S = 3.0
#: What a dispatcher needs, in the words of `codeherd doctor`: missing workers are not its fault.
DISPATCHER_PARTS = frozenset({"database", "schema", "broker", "eviction", "dispatcher"})


def main(service: str) -> str | None:
    """Return what is wrong with `service`, None if nothing is."""
    try:
        settings = load(SharedSettings, environment=os.environ, user_file=user_file()).settings
        match service:
            case "worker":
                return worker_fault(settings)
            case "dispatcher":
                return dispatcher_fault(settings)
            case "flower":
                return flower_fault(settings)
    except (CodeherdError, OSError) as err:
        return f"{service}: {err}"
    return f"unknown service `{service}`: worker, dispatcher or flower"


def worker_fault(settings: SharedSettings) -> str | None:
    """Ask every worker of this container for its engine's figures."""
    broker = Broker(settings)
    try:
        answers = {name for name in broker.workers(ANSWER_S) if name.endswith(f"@{socket.gethostname()}")}
    finally:
        broker.close()
    expected = max(started_workers(), 1)
    return None if len(answers) >= expected else f"{len(answers)} of {expected} worker processes answer"


def started_workers() -> int:
    """Count the worker processes that the launcher keeps running."""
    lines = (p.read_bytes().split(b"\0") for p in Path("/proc").glob("[0-9]*/cmdline"))
    return sum(b"codeherd_worker.serve" in line for line in lines)


def dispatcher_fault(settings: SharedSettings) -> str | None:
    """Look at everything between SQL and Redis, and at whether due jobs are published."""
    findings = examine(settings, user_id=os.geteuid(), clock=time.time, answer_s=0.1)
    faults = [f for f in findings if f.verdict is Verdict.FAIL and f.part in DISPATCHER_PARTS]
    return "; ".join(f"{f.part}: {f.message}" for f in faults) or None


def flower_fault(settings: SharedSettings) -> str | None:
    """Ask Flower itself; this page needs no password."""
    url = f"http://127.0.0.1:{settings.flower_port}/healthcheck"
    with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
        return None if answer.status == 200 else f"flower answered {answer.status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else ""))
