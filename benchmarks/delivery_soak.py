"""Run the whole service for half an hour, kill a process every 30 s, and look for what is lost or left.

    python -m benchmarks.delivery_soak --minutes 30 --database sqlite|postgresql --write

Owns: real launchers with the embedded model, a dispatcher, a Redis with an append-only file and a database;
the load, the kills, what is sampled while they go on, and the bounds. Says nothing about speed. With
`--write` the report goes to `benchmarks/results/DATE-delivery-soak-cpu.md`, one per database.

What must hold. Every job ends, with one result each if it was not cancelled. Results of a sample are the
same bytes when their requests run again, alone, on a worker that has nothing else to do. Nothing grows:
within the life of each process, and of the herd, the median of the last third of the looks is not above
that of the middle third by more than `BOUNDS`; the first third is for warming up, and a worker is not looked
at before it takes jobs: on a busy machine it loads for longer than a third of its life. What depends on the
load is divided by it (rows and bytes by the jobs that are kept), and what depends on how many processes there
are (connections) is looked at while all are there: the machine's other guests come and go within half an
hour. No ended job is older than the retention allows. At the end Redis holds no more keys than a herd at rest
has, and no process is left.
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import redis
from sqlalchemy import func, select

from benchmarks.report import machine
from codeherd_producer.client import Client, Job
from codeherd_producer.dispatcher import DAY_S
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest, InfillRequest, Request, Sampling
from codeherd_schema.settings import SharedSettings, load
from codeherd_schema.states import FINAL_STATES, JobState
from codeherd_schema.store import Store
from codeherd_schema.tables import metadata
from tests.chaos.null_herd import children
from tests.chaos.storm import Answer, processes_with
from tests.services import PostgresServer, RedisServer, wait_until

RESULTS: Final = Path(__file__).parent / "results"
LAUNCHERS: Final = ("one", "two")
DISPATCHER: Final = "dispatcher"
#: Jobs decoded together by each worker.
SLOTS: Final = 4
#: Jobs that were submitted and have not ended.
BACKLOG: Final = 48
#: Seconds between two kills, between two looks at everything, and between two looks at the jobs.
KILL_S, LOOK_S, POLL_S = 30.0, 10.0, 0.25
#: Ended jobs are kept for this part of the run, so that most of the run sees as many rows deleted as made.
KEPT: Final = 0.25
#: Seconds by which deletion may be late.
PRUNE_SLACK_S: Final = 60.0
#: One in so many jobs is cancelled.
CANCELLED_EVERY: Final = 20
#: Succeeded jobs that run again alone.
SAMPLE: Final = 200
#: Seconds for a worker to load its model, and for the last jobs, some of which wait for a lease to run out.
START_S, REST_S = 300.0, 300.0
#: A life with fewer looks than this is not judged.
FEWEST_LOOKS: Final = 6
#: By how much a figure may grow, from the middle third of its looks to the last: part of it, and absolute.
BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    # A worker's memory follows the longest prompts of the moment.
    "memory, MB": (0.03, 8.0),
    "file handles": (0.0, 6.0),
    "threads": (0.0, 3.0),
    "Redis memory, MB": (0.0, 1.0),
    "Redis keys": (0.0, 2.0),
    "Redis clients": (0.0, 8.0),
    # Of all tables: an orphan is a row whose job is gone.
    "rows a job": (0.05, 0.0),
    # Of the most jobs that were kept so far: files seldom shrink.
    "database, kB a job": (0.3, 0.0),
}
#: Those that are looked at in each process; the others are the herd's.
PROCESS_FIGURES: Final = frozenset(("memory, MB", "file handles", "threads"))
#: Whose the figures of the whole are.
HERD: Final = "the herd"
#: Processes when all are there: launchers, a worker each, the dispatcher.
WHOLE: Final = 2 * len(LAUNCHERS) + 1
#: Every process of the herd has it, with the folder of this run.
MARK: Final = "CODEHERD_TEST_SOAK"
#: Keys of a herd at rest: kombu's bindings.
MOST_KEYS: Final = 8


@dataclass(slots=True)
class Track:
    """One figure over one life."""

    values: list[float] = field(default_factory=list)

    def growth(self) -> tuple[float, float] | None:
        """Return the medians of the middle and the last third; None if there were too few looks."""
        if len(self.values) < FEWEST_LOOKS:
            return None
        third = len(self.values) // 3
        return statistics.median(self.values[-2 * third : -third]), statistics.median(self.values[-third:])

    def grew(self, name: str) -> bool:
        """Whether the figure `name` grew beyond its bound."""
        medians = self.growth()
        part, absolute = BOUNDS[name]
        return medians is not None and medians[1] > medians[0] * (1 + part) + absolute


@dataclass(slots=True)
class Seen:
    """What was found out so far."""

    submitted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    #: Requests and answers of succeeded jobs: an even sample of all.
    sample: list[tuple[Request, Answer]] = field(default_factory=list)
    #: By what it is a figure of (a process's name and pid, or the herd) and its name.
    tracks: dict[tuple[str, str], Track] = field(default_factory=lambda: defaultdict(Track))
    #: One line per minute.
    minutes: list[dict[str, object]] = field(default_factory=list)


class Herd:
    """The processes under test, and what may be done to them."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._environment = dict(environment)
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_all(self) -> None:
        """Start the dispatcher and the launchers."""
        self.start_dispatcher()
        for name in LAUNCHERS:
            self._start(
                name, ["worker", "--gpus", "cpu", "--slots", str(SLOTS), "--threads", "1", "--name", name]
            )

    def start_dispatcher(self) -> None:
        """Start the dispatcher, as a service manager would each time it ended."""
        self._start(DISPATCHER, ["dispatcher"])

    def processes(self) -> dict[str, int]:
        """Return process ids by name: launchers, dispatcher, and each launcher's worker if it has one."""
        found = {name: process.pid for name, process in self._processes.items()}
        for name in LAUNCHERS:
            found |= {f"worker {name}": pid for pid in children(found[name])} if name in found else {}
        return found

    def started(self) -> dict[str, int]:
        """Return those of `processes` that do not load any more: of workers, those that take jobs."""
        found = self.processes()
        for name in LAUNCHERS:
            worker = f"worker {name}"
            if worker in found and not self._takes_jobs(name, found[worker]):
                del found[worker]
        return found

    def _takes_jobs(self, launcher: str, pid: int) -> bool:
        log = (self._folder / f"{launcher}.log").read_text(encoding="utf-8", errors="replace")
        _, spawned, since = log.rpartition(f"worker_spawned name={launcher} pid={pid}\n")
        return bool(spawned) and "worker_ready" in since

    def kill(self, name: str) -> bool:
        """Kill a worker process, whose launcher starts another, or the dispatcher, and start it anew.

        Returns:
            False if there is no such process: its launcher waits before it starts the next.
        """
        pid = self.processes().get(name)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        if name == DISPATCHER:
            self._processes.pop(name).wait()
            self.start_dispatcher()
        return True

    def stop(self, name: str) -> int:
        """Stop in good order; return the exit status."""
        process = self._processes.pop(name)
        process.terminate()
        return process.wait(REST_S)

    def close(self) -> None:
        """Kill what is left."""
        for process in self._processes.values():
            for pid in children(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()

    def tails(self) -> str:
        """Return the ends of all logs."""
        parts = [(path.name, path.read_text(errors="replace")) for path in sorted(self._folder.glob("*.log"))]
        return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-10:]) for name, text in parts)

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "codeherd_producer.cli", *arguments],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class Requests:
    """An endless supply of random requests over the standard library's own source."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        files = (Path(str(module.__file__)) for module in (textwrap, queue, shlex))
        self._source = "".join(path.read_text(encoding="utf-8") for path in files)

    def next(self) -> Request:
        """Return one more."""
        rng = self._rng
        start = rng.randrange(len(self._source) - 600)
        text = self._source[start : start + rng.randint(1, 600)]
        options: dict[str, Any] = {"sampling": self._sampling(), "priority": rng.choice((0, 5, 5, 5, 9))}
        if rng.random() < 0.4:
            middle = rng.randrange(len(text) + 1)
            return InfillRequest(prefix=text[:middle], suffix=text[middle:], **options)
        return GenerateRequest(prompt=text, **options)

    def _sampling(self) -> Sampling:
        rng = self._rng
        return Sampling(
            max_new_tokens=rng.randint(1, 48),
            temperature=rng.choice((0.0, round(rng.uniform(0.2, 1.2), 2))),
            top_p=rng.choice((1.0, 0.95)),
            stop=rng.choice(((), (), ("\n\n",), ("self",))),
            n=rng.choice((1, 1, 1, 1, 2)),
            # The same text again needs the same seed; without one it comes from the job's id.
            seed=rng.randrange(2**63),
        )


class Soak:
    """The service under load."""

    def __init__(
        self,
        herd: Herd,
        client: Client,
        store: Store,
        settings: SharedSettings,
        *,
        minutes: float,
        seed: int,
    ) -> None:
        self.seen = Seen()
        self._herd, self._client, self._store = herd, client, store
        self._settings = settings
        self._redis = redis.Redis.from_url(str(settings.broker))
        facts: Any = self._redis.info("server")
        self._redis_pid = int(facts["process_id"])
        self._seconds = minutes * 60
        self._requests = Requests(seed)
        self._rng = random.Random(seed + 1)
        self._victims: list[str] = []
        #: Jobs that have not ended, with what they ask and whether they are to be cancelled.
        self._open: dict[str, tuple[Job, Request, bool]] = {}
        self._pause = threading.Event()
        self._database = Database.open(str(settings.database), pool_size=1)
        self._most_kept = 1.0

    def run(self) -> None:
        """Keep the herd busy and kill its processes until the time is over; then wait for the last jobs."""
        start = time.monotonic()
        # Between two kills, when all processes are there.
        kill_at, look_at, minute_at = start + KILL_S, start + LOOK_S / 2, start + 60
        while (now := time.monotonic()) < start + self._seconds:
            self._collect()
            self._submit(BACKLOG - len(self._open))
            if now >= kill_at:
                kill_at += KILL_S
                self._kill()
            if now >= look_at:
                look_at += LOOK_S
                figures = self._look()
                if now >= minute_at:
                    minute_at += 60
                    self._note_minute((now - start) / 60, figures)
            self._pause.wait(POLL_S)
        end = time.monotonic() + REST_S
        while self._open and time.monotonic() < end:
            self._collect()
            self._pause.wait(POLL_S)
        if self._open:
            states = Counter(row.state.value for row in self._store.get_many(list(self._open)).values())
            self.seen.problems.append(f"{len(self._open)} jobs have not ended: {dict(states)}")

    def compare(self) -> int:
        """Run the sample again, one job at a time; return how many answered otherwise."""
        different = 0
        for request, answer in self.seen.sample:
            again = Answer.of(self._client.submit(request).result(REST_S))
            different += again != answer
        if different:
            self.seen.problems.append(f"{different} of {len(self.seen.sample)} jobs answered otherwise alone")
        return different

    def judge(self) -> None:
        """Note what grew, what could not be judged, and what is left in Redis and SQL."""
        seen = self.seen
        for name in sorted(BOUNDS.keys() - PROCESS_FIGURES):
            if seen.tracks[HERD, name].growth() is None:
                seen.problems.append(f"too few looks at {name} to say whether it grew")
        for (owner, name), track in sorted(seen.tracks.items()):
            if track.grew(name):
                seen.problems.append(f"{owner}: {name} grew, median {track.growth()}")
        if sum(seen.ended.values()) != seen.submitted:
            seen.problems.append(f"{seen.submitted} jobs were submitted, {sum(seen.ended.values())} ended")
        keys = sorted(key.decode() for key in self._redis.scan_iter())
        if len(keys) > MOST_KEYS:
            seen.problems.append(f"keys stay in Redis: {keys}")
        counts = self._store.count_by_state()
        alive = {state.value: count for state, count in counts.items() if count and state not in FINAL_STATES}
        if alive:
            seen.problems.append(f"rows of jobs that have not ended: {alive}")

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._database.close()

    def _submit(self, count: int) -> None:
        if count <= 0:
            return
        requests = [self._requests.next() for _ in range(count)]
        for job, request in zip(self._client.submit_many(requests), requests, strict=True):
            is_cancelled = self._rng.randrange(CANCELLED_EVERY) == 0
            self._open[job.id] = (job, request, is_cancelled)
            self.seen.submitted += 1
            if is_cancelled:
                job.cancel() if self._rng.random() < 0.5 else None

    def _collect(self) -> None:
        """Take note of the jobs that have ended, and cancel some of those that run."""
        ended = self._open.keys() - self._store.pending(list(self._open))
        rows, results = self._store.get_many(ended), self._store.results(ended)
        for job_id in ended:
            _, request, is_cancelled = self._open.pop(job_id)
            row = rows.get(job_id)
            if row is None:
                self.seen.problems.append(f"{job_id} is lost")
                continue
            self.seen.ended[row.state.value] += 1
            history = [attempt.outcome.value for attempt in self._store.attempts(job_id)]
            self.seen.attempts.update(history)
            result = results.get(job_id)
            is_good = row.state is JobState.SUCCEEDED or (is_cancelled and row.state is JobState.CANCELLED)
            has_one = (result is not None, history.count("succeed"))
            wanted = (True, 1) if row.state is JobState.SUCCEEDED else (False, 0)
            if not is_good or has_one != wanted:
                self.seen.problems.append(f"{job_id} is {row.state} after {history}: {row.error_message}")
            if result is not None:
                self._keep(request, Answer.of(result))
        for job, _, is_cancelled in list(self._open.values()):
            if is_cancelled and self._rng.random() < 0.05:
                job.cancel()

    def _keep(self, request: Request, answer: Answer) -> None:
        # Algorithm R (Vitter 1985): each succeeded job is in the sample with the same probability.
        sample, number = self.seen.sample, self.seen.ended[JobState.SUCCEEDED.value]
        if len(sample) < SAMPLE:
            sample.append((request, answer))
        elif (place := self._rng.randrange(number)) < SAMPLE:
            sample[place] = (request, answer)

    def _kill(self) -> None:
        if not self._victims:
            # Each in turn, in any order: a life must be long enough to see what grows.
            self._victims = [DISPATCHER, *(f"worker {name}" for name in LAUNCHERS)]
            self._rng.shuffle(self._victims)
        victim = self._victims.pop()
        if self._herd.kill(victim):
            self.seen.kills[victim] += 1

    def _look(self) -> dict[str, float]:
        """Sample everything; return the herd's own figures."""
        started = self._herd.started()
        processes = {**started, "this client": os.getpid()}
        clients: Any = self._redis.client_list()
        is_whole = len(started) == WHOLE
        if is_whole:
            # One connection, one file handle: it has as many as the herd's processes make.
            processes["Redis"] = self._redis_pid
        for name, pid in processes.items():
            for figure, value in figures_of(pid).items():
                self.seen.tracks[f"{name} (pid {pid})", figure].values.append(value)
        memory: Any = self._redis.info("memory")
        keys: Any = self._redis.dbsize()
        kept, rows = self._rows()
        self._most_kept = max(self._most_kept, kept)
        size = database_bytes(str(self._settings.database))
        figures = {
            "Redis memory, MB": memory["used_memory"] / 1e6,
            "Redis keys": float(keys),
            "Redis clients": float(len(clients)),
            "jobs kept": kept,
            "rows a job": rows / max(kept, 1.0),
            "database, MB": size / 1e6,
            "database, kB a job": size / 1e3 / self._most_kept,
        }
        for figure in figures.keys() & BOUNDS.keys():
            if is_whole or figure != "Redis clients":
                self.seen.tracks[HERD, figure].values.append(figures[figure])
        late_s = self._settings.retention_days * DAY_S + PRUNE_SLACK_S
        if late := self._store.count_old(keep_s=late_s):
            self.seen.problems.append(f"{late} ended jobs are older than the retention allows")
        return figures

    def _rows(self) -> tuple[float, float]:
        """Return the number of jobs, and of rows in all tables."""
        with self._database.read() as connection:
            counts = {
                table.name: float(connection.scalar(select(func.count()).select_from(table)) or 0)
                for table in metadata.sorted_tables
            }
        return counts["jobs"], sum(counts.values())

    def _note_minute(self, minutes: float, figures: Mapping[str, float]) -> None:
        processes = self._herd.processes()
        workers = [figures_of(pid) for name, pid in processes.items() if name.startswith("worker")]
        client = figures_of(os.getpid())
        line: dict[str, object] = {
            "minute": round(minutes),
            "jobs ended": sum(self.seen.ended.values()),
            "kills": self.seen.kills.total(),
            **{name: round(value, 2) for name, value in figures.items()},
            "processes": len(processes),
            "workers: MB": " ".join(f"{of['memory, MB']:.0f}" for of in workers if of),
            "handles": " ".join(f"{of['file handles']:.0f}" for of in workers if of),
            "threads": " ".join(f"{of['threads']:.0f}" for of in workers if of),
            "client: MB": round(client["memory, MB"], 1),
            "client: handles": client["file handles"],
        }
        self.seen.minutes.append(line)
        print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)


def figures_of(pid: int) -> dict[str, float]:
    """Return memory, file handles and threads of a process; empty if it has ended (Linux)."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
        if pages == 0:
            return {}
        return {
            "memory, MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            "file handles": float(sum(1 for _ in (folder / "fd").iterdir())),
            "threads": float(sum(1 for _ in (folder / "task").iterdir())),
        }
    except (FileNotFoundError, ProcessLookupError):
        return {}


def database_bytes(url: str) -> int:
    """Return what the database takes on the disk."""
    if url.startswith("sqlite"):
        file = Path(url.removeprefix("sqlite:///"))
        return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
    with psycopg.connect(url) as connection:
        [row] = connection.execute("SELECT pg_database_size(current_database())")
        return int(row[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the report, and return 1 if anything was wrong."""
    options = _parser().parse_args(argv)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        server = stack.enter_context(RedisServer(aof=True))
        url = stack.enter_context(_database(options.database, folder))
        environment = _environment(url, server.url, folder, options.minutes)
        herd = Herd(environment, folder)
        stack.callback(herd.close)
        shared = {k: v for k, v in environment.items() if not k.startswith("CODEHERD_WORKER_")}
        settings = load(SharedSettings, environment=shared).settings
        store = Store.open(settings.database)
        stack.callback(store.close)
        client = stack.enter_context(Client(settings))
        herd.start_all()
        _wait_ready(settings, LAUNCHERS)
        soak = Soak(herd, client, store, settings, minutes=options.minutes, seed=options.seed)
        stack.callback(soak.close)
        soak.run()
        problems = soak.seen.problems
        # One worker is enough for the comparison, and the other shows what a stop leaves.
        _stop(herd, LAUNCHERS[1], problems)
        _wait_ready(settings, LAUNCHERS[:1])
        soak.compare()
        soak.judge()
        for name in (LAUNCHERS[0], DISPATCHER):
            _stop(herd, name, problems)
        left = processes_with(f"{MARK}={folder}".encode())
        problems += [f"processes are left: {left}"] if left else []
        report = _report(soak.seen, options, settings)
        print(f"\n{report}")
        if problems:
            print(herd.tails(), file=sys.stderr)
        if options.write:
            day = datetime.now(UTC).date().isoformat()
            path = RESULTS / f"{day}-delivery-soak-{options.database}-cpu.md"
            path.write_text(report, encoding="utf-8")
    return 1 if problems else 0


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    """Give the URL of a migrated, empty database."""
    if kind == "sqlite":
        url = f"sqlite:///{folder}/codeherd.db"
        upgrade(url)
        yield url
        return
    with PostgresServer() as server, server.database() as url:
        upgrade(url)
        yield url


def _environment(url: str, broker_url: str, folder: Path, minutes: float) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    return clean | {
        "CODEHERD_DATABASE_URL": url,
        "CODEHERD_BROKER_URL": broker_url,
        "CODEHERD_RETENTION_DAYS": str(minutes * KEPT * 60 / DAY_S),
        MARK: str(folder),
    }


def _wait_ready(settings: SharedSettings, names: Collection[str]) -> None:
    """Return when these workers, and as many as these, take jobs."""
    broker = Broker(settings)

    def is_ready() -> bool:
        try:
            found = {name.partition("@")[0] for name in broker.workers(2.0)}
        except BrokerUnavailable:
            return False
        return found == set(names)

    try:
        wait_until(is_ready, f"{', '.join(names)} to take jobs", timeout_s=START_S)
    finally:
        broker.close()


def _stop(herd: Herd, name: str, problems: list[str]) -> None:
    status = herd.stop(name)
    if status:
        problems.append(f"{name} was told to stop and ended with {status}")


def _report(seen: Seen, options: argparse.Namespace, settings: SharedSettings) -> str:
    judged = [track for track in seen.tracks.values() if track.growth() is not None]
    rows = {
        "jobs": f"{seen.submitted} submitted; " + _counts(seen.ended),
        "ends of attempts": _counts(seen.attempts),
        "kills (-9)": f"{seen.kills.total()}: {_counts(seen.kills)}",
        "run again alone": f"{len(seen.sample)} succeeded jobs, byte for byte",
        "tracks judged for growth": f"{len(judged)} of {len(seen.tracks)} (the others lived too short)",
        "time": f"{options.minutes:g} minutes, seed {options.seed}, a kill every {KILL_S:g} s",
        "herd": f"{len(LAUNCHERS)} launchers with the tiny model and {SLOTS} slots each, one dispatcher, "
        f"Redis with an append-only file, {options.database}",
        "settings": f"lease {settings.lease_s:g} s, heartbeat {settings.heartbeat_s:g} s, ended jobs kept "
        f"for {settings.retention_days * DAY_S / 60:g} minutes; all others as they come",
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, Redis and {options.database} of this machine",
    }
    facts = "\n".join(["| what | seen |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
    found = "".join(f"- {problem}\n" for problem in seen.problems)
    verdict = found or "Nothing was lost, nothing was doubled, nothing grew.\n"
    day = datetime.now(UTC).date().isoformat()
    return (
        f"# The service under load while its processes are killed, {day}, {options.database}\n\n"
        f"{facts}\n\n{verdict}\n{_minutes(seen)}"
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"


def _minutes(seen: Seen) -> str:
    if not seen.minutes:
        return ""
    names = list(seen.minutes[0])
    lines = [names, ["---"] * len(names), *([str(line[name]) for name in names] for line in seen.minutes)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="store the report in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
