"""A backfill of real code from which everything is killed at half way comes to the same bytes.

Owns: that one story, on each database. Who dies is whoever works on it: the command line, both workers, the
dispatcher, and Redis, which has forgotten everything when it comes back. The database alone remembers.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from codeherd_schema.backfills import Backfills, FileState, RunState, Target, TargetState
from codeherd_schema.states import JobState
from tests.chaos.null_herd import NullHerd
from tests.null_worker import SENTENCES
from tests.services import RedisServer, wait_until

WORKERS, DISPATCHER, SLOTS = ("one", "two"), "dispatcher", 4
#: So slow that half of the work is left when half of it is seen to be done.
STEP_S = 0.006
#: Modules of the standard library, as far as this Python has them: a few hundred symbols without docstring.
TOP = ("calendar", "cmd", "colorsys", "contextlib", "csv", "fileinput", "ftplib", "getopt", "gettext", "gzip")
PACKAGE = (
    *(
        "imghdr",
        "mailcap",
        "mimetypes",
        "netrc",
        "opcode",
        "pkgutil",
        "plistlib",
        "poplib",
        "pprint",
        "quopri",
    ),
    *(
        "reprlib",
        "selectors",
        "shelve",
        "shlex",
        "sndhdr",
        "string",
        "tabnanny",
        "tempfile",
        "trace",
        "weakref",
    ),
)
#: What a symbol ended as.
Decided = dict[tuple[str, str, int], tuple[TargetState, str | None, str | None, int]]


@dataclass(frozen=True)
class Calm:
    """What a run gives that nobody interrupts."""

    patch: bytes
    decided: Decided
    #: How many jobs it took.
    jobs: int


def git(folder: Path, *arguments: str, given: bytes | None = None) -> None:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "core.autocrlf=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, input=given, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all", "--no-verify")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    library = Path(sysconfig.get_path("stdlib"))
    for names, inner in ((TOP, folder), (PACKAGE, folder / "package")):
        inner.mkdir(exist_ok=True)
        for name in names:
            if (library / f"{name}.py").exists():
                shutil.copy(library / f"{name}.py", inner)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@contextlib.contextmanager
def herd_of(
    database_url: str, redis: RedisServer, folder: Path, *, step_s: float
) -> Iterator[tuple[NullHerd, Backfills]]:
    with (
        NullHerd(
            database_url=database_url,
            broker_url=redis.url,
            folder=folder,
            workers=WORKERS,
            dispatchers=(DISPATCHER,),
            slots=SLOTS,
            step_s=step_s,
            variables={SENTENCES: "1"},
        ) as herd,
        contextlib.closing(Backfills.open(database_url)) as rows,
    ):
        yield herd, rows


def start(herd: NullHerd, out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `codeherd backfill ARGUMENTS`; its patch and its talk go to files."""
    with out.open("wb") as stdout, out.with_suffix(".log").open("wb") as stderr:
        command = [sys.executable, "-m", "codeherd_producer.cli", "backfill", *arguments]
        return subprocess.Popen(command, env=herd.environment, stdout=stdout, stderr=stderr)


def patch_of(herd: NullHerd, out: Path, *arguments: str) -> bytes:
    """Run `codeherd backfill ARGUMENTS` to its end and return its patch."""
    process = start(herd, out, *arguments)
    try:
        status = process.wait(200)
    finally:
        process.kill()
    assert status == 0, out.with_suffix(".log").read_text()
    return out.read_bytes()


def targets_of(rows: Backfills, run_id: str) -> list[tuple[str, Target]]:
    files = rows.files(run_id, states=list(FileState), limit=1_000)
    return [(file.path, target) for file in files for target in rows.targets(file.id)]


def decided(rows: Backfills, run_id: str) -> Decided:
    return {
        (path, one.name, one.twin): (one.state, one.text, one.reason, one.exchange)
        for path, one in targets_of(rows, run_id)
        if one.state is not TargetState.OPEN
    }


def job_ids(rows: Backfills, run_id: str) -> set[str]:
    """Return the jobs that a run asked for."""
    return {
        question.job_id
        for file in rows.files(run_id, states=list(FileState), limit=1_000)
        for exchange in range(file.exchange + 1)
        for question in rows.questions(file.id, exchange)
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, repository: Path) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    url = f"sqlite:///{shutil.copy(migrated_sqlite, folder / 'codeherd.db')}"
    with RedisServer() as redis, herd_of(url, redis, folder, step_s=0.0) as (herd, rows):
        patch = patch_of(herd, folder / "patch", "docstrings", str(repository), "--convention", "google")
        [run] = rows.list()
        found = Calm(patch, decided(rows, run.id), len(job_ids(rows, run.id)))
    assert len(found.decided) > 200
    assert found.jobs > len(found.decided), "each was asked once only: nothing hangs on earlier answers"
    return found


def is_half_way(herd: NullHerd, rows: Backfills) -> bool:
    """Whether half of the newest run is decided, and workers are at the rest."""
    runs = rows.list(1)
    if not runs or runs[0].state is RunState.PLANNING:
        return False
    counts = rows.progress(runs[0].id).targets
    is_half = counts[TargetState.OPEN] * 2 <= sum(counts.values())
    return is_half and len(herd.store.list(state=JobState.RUNNING, limit=SLOTS)) == SLOTS


@pytest.mark.timeout(600)
def test_a_run_from_which_everything_is_killed_at_half_way_comes_to_the_same_bytes(
    database_url: str, repository: Path, calm: Calm, tmp_path: Path
) -> None:
    # Remembers nothing once it is killed.
    with (
        RedisServer(aof=False) as redis,
        herd_of(database_url, redis, tmp_path, step_s=STEP_S) as (herd, rows),
    ):
        cli = start(herd, tmp_path / "killed", "docstrings", str(repository), "--convention", "google")
        try:
            wait_until(lambda: is_half_way(herd, rows) or cli.poll() is not None, "half of it", timeout_s=150)
            for name in (*WORKERS, DISPATCHER):
                herd.kill(name)
        finally:
            cli.kill()
            cli.wait()
        redis.kill()

        [run] = rows.list()
        before = decided(rows, run.id)
        assert run.state is RunState.RUNNING
        assert len(calm.decided) / 2 <= len(before) < len(calm.decided), "nothing was interrupted"
        assert (tmp_path / "killed").read_bytes() == b""
        lost = {job.id for job in herd.store.list(state=JobState.RUNNING, limit=1_000)}
        assert 0 < len(lost) <= SLOTS * len(WORKERS)

        redis.start()
        herd.start_dispatcher(DISPATCHER)
        for name in WORKERS:
            herd.start_worker(name)
        herd.wait_ready(WORKERS)
        patch = patch_of(herd, tmp_path / "patch", "resume", run.id)

        assert patch == calm.patch
        # Decided once: all that was before stands, and the rest is what it would have been.
        after = decided(rows, run.id)
        assert after == calm.decided
        assert before.items() <= after.items()
        assert rows.get(run.id).state is RunState.DONE
        # Asked once: not a job more than without the kill, and run again was only what had been running.
        jobs = job_ids(rows, run.id)
        everything = {job.id: job for job in herd.store.list(limit=10 * calm.jobs)}
        assert jobs == everything.keys()
        assert len(jobs) == calm.jobs
        assert {job.id for job in everything.values() if job.attempt > 1} <= lost
        assert max(job.attempt for job in everything.values()) <= 2
        herd.check(jobs)

        patched = tmp_path / "patched"
        shutil.copytree(repository, patched)
        git(patched, "apply", "--check", given=patch)
        git(patched, "apply", given=patch)
        commit(patched)
        assert patch_of(herd, tmp_path / "again", "docstrings", str(patched), "--convention", "google") == b""
        assert rows.progress(rows.list(1)[0].id).asked == 0
        assert len(herd.store.list(limit=10 * calm.jobs)) == len(jobs)
