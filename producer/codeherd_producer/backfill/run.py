"""Carry a backfill from its plan to its last text, however often it is interrupted.

Owns: the order plan, ask, judge, and how many jobs are under way. Everything that is decided follows from
the file's bytes, the run's options and the jobs' results, so whoever goes on after a kill comes to the same
end, and asks for nothing twice: a job's idempotency key is made of its content. Does not decide which symbol
(`planner`), what is asked or good enough (`dialog`), nor what becomes of the texts (`outcome`).

The unit is the file. Its symbols go in step: an exchange is judged when every job of it has ended, and the
next one asked for those that are still open.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codeherd_producer.backfill import dialog, planner
from codeherd_producer.backfill.context import FileContext, HeaderTooLong
from codeherd_producer.backfill.dialog import Accept, Answer, Ask, GiveUp, Judged, Other, Question
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.outcome import unsafe
from codeherd_producer.backfill.planner import PlannedFile
from codeherd_producer.backfill.scanner import Scan, Symbol
from codeherd_producer.backfill.sources import read_planned
from codeherd_producer.client import Client
from codeherd_schema.backfill_rows import path_bytes
from codeherd_schema.backfill_states import OPEN_FILES
from codeherd_schema.backfills import (
    MAX_PATH,
    Backfills,
    Candidate,
    File,
    FileState,
    NewFile,
    NewQuestion,
    NewTarget,
    Progress,
    Run,
    RunState,
    Target,
    TargetState,
    Verdict,
)
from codeherd_schema.errors import JobNotFound
from codeherd_schema.states import FINAL_STATES, JobState

logger = logging.getLogger(__name__)

#: Jobs that are queued or running at a time: enough for every slot, few enough to stop soon.
WINDOW: Final = 1_000
#: Files that are inserted, opened or judged between two looks.
_AT_A_TIME: Final = 50
#: Seconds until the next look, if no job's end is heard of before.
TURN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop asking; None is never."""

    jobs: int | None = None
    tokens: int | None = None
    seconds: float | None = None


class Backfill:
    """One run, carried on by this process. Several at once do no harm, and no good."""

    def __init__(
        self,
        client: Client,
        rows: Backfills,
        run: Run,
        *,
        turn_s: float = TURN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take up a run.

        Args:
            client: submits the jobs.
            rows: on the client's database.
            run: in any state.
            turn_s: longest wait for a job's end before the run is looked at again, seconds.
            clock: seconds, from any start.
        """
        self._turn_s = turn_s
        self._client = client
        self._rows = rows
        self._run = run
        self._root = Path(run.root)
        self._options = Options.model_validate(run.options)
        self._clock = clock

    def plan(self, told: Callable[[int], None] = lambda _: None) -> None:
        """Find every file and symbol; what was found before a kill is left as it is.

        Args:
            told: hears how many files there are by now.

        Raises:
            GitFailed: the reference to compare with does not exist.
        """
        files = planner.plan(self._root, self._options.wanted())
        count = 0
        while part := list(itertools.islice(files, _AT_A_TIME)):
            self._rows.add_files(self._run.id, [new_file(one) for one in part if has_room_for(one.path)])
            count += len(part)
            told(count)
        self._rows.set_state(self._run.id, RunState.RUNNING)

    def work(
        self,
        *,
        stop: threading.Event | None = None,
        limits: Limits = Limits(),
        told: Callable[[Progress], None] = lambda _: None,
    ) -> RunState:
        """Ask and judge until every file is done, a limit is reached, or `stop` is set.

        Args:
            stop: ends the work soon; jobs that are queued go on, and are found when the run is resumed.
            limits: of what this call may ask for.
            told: hears how far the run is, every second or so.

        Returns:
            The run's state now: done or stopped.

        Raises:
            DatabaseUnavailable: resume the run later.
        """
        stop = stop or threading.Event()
        self._rows.set_state(self._run.id, RunState.RUNNING)
        began, asked = self._clock(), 0
        tokens_before = self._rows.progress(self._run.id).tokens
        look_at = began
        with self._client.watch() as watch:
            while not stop.is_set():
                jobs = [
                    job for file in self._rows.ready(self._run.id, _AT_A_TIME) for job in self._advance(file)
                ]
                jobs += self._open()
                asked += len(jobs)
                watch.add(jobs)
                if not jobs:
                    watch.wait(self._turn_s)
                elif self._clock() < look_at:
                    continue
                look_at = self._clock() + self._turn_s
                progress = self._rows.progress(self._run.id)
                told(progress)
                if not any(progress.files[state] for state in OPEN_FILES):
                    return self._ended(RunState.DONE)
                if _is_reached(limits, asked, progress.tokens - tokens_before, self._clock() - began):
                    break
        # What was asked is judged when the run is resumed.
        return self._ended(RunState.STOPPED)

    def _ended(self, state: RunState) -> RunState:
        self._rows.set_state(self._run.id, state)
        return state

    def _open(self) -> list[str]:
        """Ask the first exchange of more files, as far as there is room."""
        room = WINDOW - self._rows.waiting(self._run.id)
        jobs: list[str] = []
        if room <= 0:
            return jobs
        for file in self._rows.files(self._run.id, states=[FileState.PLANNED], limit=_AT_A_TIME):
            jobs += self._advance(file)
            if len(jobs) >= room:
                break
        return jobs

    def _advance(self, file: File) -> list[str]:
        """Judge what was answered for a file, and ask what is still open; return the new jobs."""
        source = read_planned(self._root, file, self._options)
        if source is None:
            self._rows.set_file_state(file.id, FileState.CHANGED, reason="changed since it was planned")
            return []
        verdicts, judged, asks = self._judged(file, source.scan, self._rows.targets(file.id))
        self._rows.settle(
            file.id,
            file.exchange,
            candidates=[_candidate(target_id, one) for target_id, one in judged if one.answer.error is None],
            verdicts=verdicts,
            state=None if asks else FileState.DONE,
        )
        return self._ask(file, asks) if asks else []

    def _judged(
        self, file: File, scan: Scan, targets: Sequence[Target]
    ) -> tuple[list[Verdict], list[tuple[int, Judged]], dict[int, Sequence[Question]]]:
        context = FileContext(scan, budget=self._options.context_chars)
        policy = self._options.policy(usual_lengths=_usual_lengths(scan))
        answers = self._answers(file)
        accepted = {
            (t.exchange, t.place): t.text
            for t in targets
            if t.state is TargetState.ACCEPTED and t.text is not None
        }
        verdicts: list[Verdict] = []
        judged: list[tuple[int, Judged]] = []
        asks: dict[int, Sequence[Question]] = {}
        for target in targets:
            if target.state is not TargetState.OPEN:
                continue
            symbol = scan.symbols[target.place]
            others = [
                Other(text, since=exchange if place < target.place else exchange + 1)
                for (exchange, place), text in sorted(accepted.items())
            ]
            try:
                hole = context.hole(symbol)
            except HeaderTooLong as err:
                verdicts.append(Verdict(target.id, TargetState.REJECTED, reason=str(err)))
                continue
            step = dialog.move(
                symbol, hole, policy, answers.get(target.id, ()), others, encoding=scan.encoding
            )
            judged += [(target.id, one) for one in step.judged]
            match step.next:
                case Ask(questions=questions):
                    asks[target.id] = questions
                case Accept() as accept:
                    fault = unsafe(scan, symbol, accept.text, self._options)
                    if fault is None:
                        accepted[file.exchange, target.place] = accept.text
                        verdicts.append(
                            Verdict(
                                target.id,
                                TargetState.ACCEPTED,
                                text=accept.text,
                                reason=accept.left_out,
                                score=accept.score.total,
                            )
                        )
                    else:
                        verdicts.append(Verdict(target.id, TargetState.REJECTED, reason=fault))
                case GiveUp(reason):
                    verdicts.append(Verdict(target.id, TargetState.REJECTED, reason=reason))
        return verdicts, judged, asks

    def _answers(self, file: File) -> dict[int, list[Answer]]:
        exchanges = range(file.exchange + 1)
        questions = [q for exchange in exchanges for q in self._rows.questions(file.id, exchange)]
        results = self._client.results([q.job_id for q in questions])
        answers: dict[int, list[Answer]] = {}
        for question in questions:
            result = results.get(question.job_id)
            if result is None:
                found = [dialog.unanswered(question.exchange, question.number, self._fault(question.job_id))]
            else:
                found = dialog.answers_of(result, question.exchange, question.number)
            answers.setdefault(question.target_id, []).extend(found)
        return answers

    def _fault(self, job_id: str) -> str:
        try:
            row = self._client.row(job_id)
        except JobNotFound:
            return "job_pruned"
        return row.error_code or row.state.value

    def _ask(self, file: File, asks: Mapping[int, Sequence[Question]]) -> list[str]:
        flat = [(target_id, question) for target_id, part in asks.items() for question in part]
        jobs = self._client.submit_many([q.request for _, q in flat], run_id=self._run.id)
        # Asked before by another run, whose jobs may have ended without a text.
        for job in jobs:
            if job.deduplicated and job.state in FINAL_STATES - {JobState.SUCCEEDED}:
                job.retry()
        exchange = file.exchange + 1
        self._rows.ask(
            file.id,
            exchange,
            [
                NewQuestion(target_id, exchange, question.number, job.id)
                for (target_id, question), job in zip(flat, jobs, strict=True)
            ],
        )
        return [job.id for job in jobs]


def has_room_for(path: str) -> bool:
    """Whether a path can be kept; a longer one is no file's that people work on."""
    if len(path_bytes(path)) <= MAX_PATH:
        return True
    logger.warning("path_too_long path=%.80s", path)
    return False


def new_file(planned: PlannedFile) -> NewFile:
    """Return the rows of a planned file."""
    scan = planned.scan
    symbols = () if scan is None else scan.symbols
    places = {(symbol.name, symbol.twin): place for place, symbol in enumerate(symbols)}
    return NewFile(
        path=planned.path,
        sha256=planned.sha256,
        encoding=None if scan is None else scan.encoding,
        reason=planned.reason,
        documented=sum(symbol.is_documented for symbol in symbols),
        passed_over=planned.passed_over,
        targets=tuple(
            NewTarget(places[one.name, one.twin], one.name, one.twin, one.line, one.kind)
            for one in planned.targets
        ),
    )


def _usual_lengths(scan: Scan) -> tuple[int, ...]:
    return tuple(len(symbol.docstring) for symbol in _documented(scan) if symbol.docstring is not None)


def _documented(scan: Scan) -> Iterator[Symbol]:
    return (symbol for symbol in scan.symbols if symbol.is_documented and symbol.name)


def _is_reached(limits: Limits, jobs: int, tokens: int, seconds: float) -> bool:
    pairs = ((limits.jobs, jobs), (limits.tokens, tokens), (limits.seconds, seconds))
    return any(limit is not None and value >= limit for limit, value in pairs)


def _candidate(target_id: int, judged: Judged) -> Candidate:
    answer, score = judged.answer, judged.score
    return Candidate(
        target_id=target_id,
        exchange=answer.exchange,
        number=answer.number,
        index=answer.index,
        text=answer.text,
        seed=answer.seed or 0,
        tokens=answer.tokens,
        logprob=sum(answer.logprobs) / len(answer.logprobs) if answer.logprobs else None,
        reason=judged.reason,
        score_parts={}
        if score is None
        else {"consensus": score.consensus, "likelihood": score.likelihood, "length": score.length},
    )
