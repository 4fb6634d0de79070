"""The main job on real code, from an empty folder: `make demo`.

Starts the embedded stack, asks for a docstring for every undocumented function of one of this
repository's own files, continues a few prompts, cancels a job, is refused one, and prints the answers
as they stand in SQL. Everything it does goes through the public command line and SDK.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from codeherd_producer.client import Client, Job
from codeherd_schema.errors import UnsupportedByModel
from codeherd_schema.requests import GenerateRequest, InfillRequest, Sampling
from codeherd_schema.settings import SharedSettings, load
from codeherd_schema.states import JobState

ROOT = Path(__file__).resolve().parent.parent
#: Data of the demo: kept after it, removed by the next one.
DATA_DIR = Path(os.environ.get("CODEHERD_DATA_DIR", ROOT / ".codeherd" / "demo"))
#: A real file with many undocumented functions.
SOURCE = ROOT / "producer" / "codeherd_producer" / "local.py"
#: Seconds to wait for the stack, and for all jobs.
START_TIMEOUT_S, JOBS_TIMEOUT_S = 120.0, 150.0
PROMPTS = (
    "# factorial\ndef factorial(n):",
    "def is_even(number):\n    return",
    "import os\n\ndef read_file(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)


def main() -> int:
    """Run the demo; return the exit status."""
    console = Console(highlight=False, markup=False)
    shutil.rmtree(DATA_DIR, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    environment |= {"CODEHERD_DATA_DIR": str(DATA_DIR), "CODEHERD_LOG_LEVEL": "warning"}
    settings = load(SharedSettings, environment={"CODEHERD_DATA_DIR": str(DATA_DIR)}).settings
    console.rule("starting: Redis, SQLite, dispatcher, one worker with the embedded model, Flower")
    with stack(environment), Client(settings) as client:
        jobs = submit_all(client, console)
        follow(client, jobs, console)
    status = show(console)
    console.print(f"\nThe data is in {DATA_DIR}/codeherd.db; start the stack on it in one terminal")
    console.print(f"  CODEHERD_DATA_DIR={DATA_DIR} .venv/bin/codeherd up")
    console.print("and look at it, or submit more, from another:")
    console.print(f"  export CODEHERD_DATA_DIR={DATA_DIR}")
    console.print("  .venv/bin/codeherd ls")
    console.print('  echo -e "# factorial\\ndef factorial(n):" | .venv/bin/codeherd submit generate - --wait')
    return status


@contextmanager
def stack(environment: dict[str, str]) -> Iterator[None]:
    """Run `codeherd up` until the block ends."""
    command = [sys.executable, "-m", "codeherd_producer.cli", "up", "--flower-port", "0"]
    up = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    ready = threading.Event()
    threading.Thread(target=_relay, args=(up, ready), daemon=True).start()
    try:
        if not ready.wait(START_TIMEOUT_S):
            raise SystemExit("error: the stack did not start in time")
        yield
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(60)


def _relay(up: subprocess.Popen[str], ready: threading.Event) -> None:
    for line in up.stderr or ():
        sys.stderr.write("  " + line)
        if line.startswith("ready"):
            ready.set()


def submit_all(client: Client, console: Console) -> list[Job]:
    """Submit everything; return the jobs."""
    name = SOURCE.relative_to(ROOT)
    holes = list(undocumented(SOURCE.read_text(encoding="utf-8")))
    console.rule(f"submitting: docstrings for {len(holes)} functions of {name}, {len(PROMPTS)} completions")
    docstrings = [
        InfillRequest(
            prefix=prefix,
            suffix=suffix,
            labels={"what": "docstring", "name": function},
            sampling=Sampling(max_new_tokens=40, stop=('"""',)),
        )
        for function, prefix, suffix in holes
    ]
    completions = [
        GenerateRequest(
            prompt=prompt,
            labels={"what": "completion", "name": prompt.splitlines()[-1].strip()[:32] or "completion"},
            sampling=Sampling(max_new_tokens=48, temperature=0.2, top_p=0.95, seed=7),
        )
        for prompt in PROMPTS
    ]
    # Urgent, so that it runs at once; many long candidates, so that it has not ended when it is cancelled.
    long = GenerateRequest(
        prompt="import ",
        priority=0,
        labels={"what": "cancelled", "name": "(cancelled)"},
        sampling=Sampling(max_new_tokens=1900, temperature=1.5, n=16, seed=1),
    )
    jobs = [client.submit(long), *client.submit_many([*docstrings, *completions])]
    try:
        client.submit(InfillRequest(model="tiny-python", prefix="def f():\n", suffix="\n"))
    except UnsupportedByModel as err:
        console.print(f"refused as it should be: {err.message} [{err.code}]")
    _wait_until_running(jobs[0])
    console.print(f"cancelled while running: {jobs[0].id}")
    jobs[0].cancel()
    return jobs


def _wait_until_running(job: Job) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while job.refresh().state is JobState.QUEUED and time.monotonic() < end:
        time.sleep(0.05)


def follow(client: Client, jobs: list[Job], console: Console) -> None:
    """Show how the jobs come in."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("jobs", total=len(jobs))
        for _ in client.as_completed(jobs, timeout_s=JOBS_TIMEOUT_S):
            progress.advance(task)


def show(console: Console) -> int:
    """Print what SQL says, read from the file by a connection of our own; return the exit status."""
    query = """
        SELECT j.id, j.kind, j.state, j.attempt, j.labels ->> '$.name',
               r.payload ->> '$.candidates[0].text', r.payload ->> '$.candidates[0].finish_reason'
        FROM jobs j LEFT JOIN results r ON r.job_id = j.id ORDER BY j.id
    """
    with sqlite3.connect(f"file:{DATA_DIR / 'codeherd.db'}?mode=ro", uri=True) as connection:
        rows = connection.execute(query).fetchall()
    table = Table("job", "kind", "state", "for", "answer", "finish", title="answers, as SQL keeps them")
    for job_id, kind, state, _, name, text, finish in rows:
        answer = " ".join((text or "").split())
        table.add_row(job_id[-8:], kind, state, name or "", answer[:70], finish or "")
    console.print(table)
    states = [state for _, _, state, *_ in rows]
    succeeded, cancelled = states.count("succeeded"), states.count("cancelled")
    console.print(f"{succeeded} succeeded, {cancelled} cancelled, {len(states)} in all")
    return 0 if succeeded == len(states) - 1 and cancelled == 1 else 1


def undocumented(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, text before the docstring's place, text after it) of each undocumented function."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node):
            continue
        body = node.body[0].lineno - 1
        indent = " " * node.body[0].col_offset
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        prefix = "".join(lines[start:body]) + f'{indent}"""'
        suffix = f'"""\n{"".join(lines[body : node.end_lineno])}'
        yield node.name, prefix, suffix


if __name__ == "__main__":
    sys.exit(main())
