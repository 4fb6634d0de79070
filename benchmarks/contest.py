"""Let systems take turns on one workload, each in a process of its own.

Owns: starting and ending the processes, whose turn it is, and the check that everybody did all of the work.
Only one system computes at a time: the others block on their input. Turns interleave, so that a machine that
slows down slows everybody down. Does not know what the records mean (`benchmarks.figures`).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.models import CACHE, BenchModel
from benchmarks.protocol import SLOTS, THREADS
from benchmarks.records import RoundRecord
from benchmarks.systems import Entry
from benchmarks.workloads import WARM_UP_ROUND, Builder, Workload
from codeherd_worker.device import SPIN_COUNT

#: Seconds that a system may take to answer anything.
PATIENCE_S = 1800.0
#: Jobs per round for a system that takes them group by group, by size of the group: its tokens per second do
#: not depend on how many wait. Enough to be sure of, few enough that all of `make bench` takes half an hour.
GROUPED_JOBS = {("tiny", 1): 16, ("random-110m", 1): 4, ("random-110m", 16): 32}

#: Tokens in and out of each job of the warm-up, at most.
WARM_UP_PROMPT, WARM_UP_TOKENS = 512, 8

_ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class Outcome:
    """What one system made of one workload."""

    entry: Entry
    #: The jobs of each round that it was given: maybe fewer than the workload has where it takes groups.
    asked: list[Workload] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    #: Why there are no rounds: not installed, or what went wrong.
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """All systems on one workload of one model."""

    model: BenchModel
    workload: str
    #: The jobs of each measured round.
    asked: tuple[Workload, ...]
    outcomes: tuple[Outcome, ...]
    #: Of the last minute, before the first system was warmed up.
    load_average: float


def hold(
    model: BenchModel, builder: Builder, entries: Iterable[Entry], *, rounds: int, tell: Callable[[str], None]
) -> Contest:
    """Run the workload `rounds` times on each system and return all records.

    A system that is not installed, or fails, has no rounds; its outcome's `missing` says why.

    Args:
        model: the weights for everybody.
        builder: makes each round's jobs.
        entries: who takes part; those that do not take this workload are left out.
        rounds: measured rounds.
        tell: is told of the progress.
    """
    warm_up = builder(model, WARM_UP_ROUND)
    asked = tuple(builder(model, number) for number in range(1, rounds + 1))
    outcomes = [Outcome(e) for e in entries if e.workloads is None or warm_up.name in e.workloads]
    installed = []
    for outcome in outcomes:
        if outcome.entry.version is None:
            outcome.missing = "not installed"
        else:
            _convert(outcome, model, tell)
            installed.append(outcome)
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(outcome, model)) for outcome in installed]
        # Loading is not measured: everybody at the same time.
        for contender in contenders:
            contender.send("load", longest=max(workload.longest for workload in (warm_up, *asked)))
        for contender in contenders:
            contender.receive()
        load_average = os.getloadavg()[0]
        brief = warm_up.brief(SLOTS, prompt_tokens=WARM_UP_PROMPT, new_tokens=WARM_UP_TOKENS)
        for contender in contenders:
            tell(f"{model.name}, {warm_up.name}: warming up {contender.outcome.entry.name}")
            contender.warm(brief)
        for number, workload in enumerate(asked, start=1):
            for contender in contenders:
                contender.run(workload)
                tell(f"{model.name}, {warm_up.name}, round {number}: {contender.says()}")
    return Contest(model, warm_up.name, asked, tuple(outcomes), load_average)


class Contender:
    """A system's process, seen from outside. One that failed stays silent from then on."""

    def __init__(self, outcome: Outcome, model: BenchModel) -> None:
        """Describe the process; it starts on entry."""
        self.outcome = outcome
        self._model = model

    def __enter__(self) -> Self:
        entry = self.outcome.entry
        command = [sys.executable, "-m", "benchmarks.contender", entry.name, str(self._model.folder)]
        self._log = tempfile.TemporaryFile("w+b")
        self._process = subprocess.Popen(
            [*command, str(converted(entry, self._model))],
            cwd=_ROOT,
            env=environment(uses_torch=entry.uses_torch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.send("quit")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def send(self, ask: str, **fields: Any) -> None:
        """Ask; the answer is awaited by `receive`."""
        if self.outcome.missing is not None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(json.dumps({"ask": ask, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail("its process ended")

    def receive(self) -> dict[str, Any] | None:
        """Return the answer; None if there is none."""
        if self.outcome.missing is not None or self._process.stdout is None:
            return None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._fail("its process ended" if ready else f"no answer within {PATIENCE_S:.0f} s")
            return None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self._fail(answer["error"])
            return None
        return answer

    def convert(self) -> None:
        """Write the model in the system's own format."""
        self.send("prepare")
        self.receive()

    def warm(self, workload: Workload) -> None:
        """Let the system run a short workload that is not measured."""
        self.send("warm", workload=self._share(workload).to_json())
        self.receive()

    def run(self, workload: Workload) -> None:
        """Run a measured round and keep its record, if all tokens are there."""
        share = self._share(workload)
        self.send("run", workload=share.to_json())
        answer = self.receive()
        if answer is None:
            return
        record = RoundRecord.from_json(answer)
        fault = fault_in(record, share)
        if fault is not None:
            self._fail(fault)
            return
        self.outcome.asked.append(share)
        self.outcome.rounds.append(record)

    def says(self) -> str:
        """Return the last round, or the failure, in a few words."""
        name = self.outcome.entry.name
        if self.outcome.missing is not None:
            return f"{name} {self.outcome.missing}"
        record, share = self.outcome.rounds[-1], self.outcome.asked[-1]
        return f"{name} {share.new_tokens / record.wall_s:.1f} tokens/s in {record.wall_s:.1f} s"

    def _share(self, workload: Workload) -> Workload:
        group = self.outcome.entry.group
        if group is None:
            return workload
        return workload.sample(GROUPED_JOBS.get((self._model.name, group), len(workload.jobs)))

    def _fail(self, reason: str) -> None:
        self._log.seek(0)
        sys.stderr.write(self._log.read().decode(errors="replace")[-4000:])
        self.outcome.missing = f"failed: {reason}"
        # A figure of a system that failed later on is no figure.
        self.outcome.rounds.clear()
        self._process.kill()


def fault_in(record: RoundRecord, asked: Workload) -> str | None:
    """Return what is wrong with a round: every job must have exactly the tokens that were asked for."""
    if len(record.jobs) != len(asked.jobs):
        return f"{len(record.jobs)} of {len(asked.jobs)} jobs came back"
    for number, (done, job) in enumerate(zip(record.jobs, asked.jobs, strict=True)):
        if len(done.token_ids) != job.new_tokens:
            return f"job {number} has {len(done.token_ids)} new tokens, {job.new_tokens} were asked for"
    return None


def environment(*, uses_torch: bool, threads: int = THREADS) -> dict[str, str]:
    """Return the environment of a measured process that computes on so many threads."""
    mine = {
        "HF_HUB_OFFLINE": "1",
        "MKL_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if uses_torch:
        # As codeherd's workers have it: the default of torch's OpenMP is no faster on an idle machine, and
        # starves itself on any other. The systems without torch keep their own default.
        mine["GOMP_SPINCOUNT"] = SPIN_COUNT
    return os.environ | mine


def converted(entry: Entry, model: BenchModel) -> Path:
    """Return where the model lies in the system's own format, for systems that have one."""
    return CACHE / "converted" / f"{model.name}-{model.digest}" / entry.module


def _convert(outcome: Outcome, model: BenchModel, tell: Callable[[str], None]) -> None:
    # In a process of its own: the memory that it takes is not the system's.
    if outcome.entry.has_own_format and not converted(outcome.entry, model).exists():
        tell(f"{model.name}: converting for {outcome.entry.name}")
        with Contender(outcome, model) as contender:
            contender.convert()
