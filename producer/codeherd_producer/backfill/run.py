"""Carry a backfill from its plan to its last text, however often it is interrupted.

Owns: the order plan, ask, judge, and how many jobs are under way. Everything that is decided follows from
the file's bytes, the run's options and the jobs' results, so whoever goes on after a kill comes to the same
end, and asks for nothing twice: a job's idempotency key is made of its content. Does not decide which symbol
(`planner`), what is asked or good enough (`dialog`), nor what becomes of the texts (`outcome`).

The unit is the file. Its symbols go in step: an exchange is judged when every job of it has ended, and the
next one asked for those that are still open.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from codeherd_producer.backfill import dialog, planner
from codeherd_producer.backfill.context import FileContext, HeaderTooLong
from codeherd_producer.backfill.dialog import Accept, Answer, Ask, GiveUp, Judged, Other, Question
from codeherd_producer.backfill.git import Git
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.outcome import opened_view, unsafe, unwritable
from codeherd_producer.backfill.own_code import OwnCode
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
from codeherd_schema.errors import IllegalMove, InvalidRequest, JobNotFound
from codeherd_schema.states import FINAL_STATES, JobState

logger = logging.getLogger(__name__)

#: Jobs that are queued or running at a time: enough for every slot, few enough to stop soon.
WINDOW: Final = 1_000
#: Files that are inserted, opened or judged between two looks.
_AT_A_TIME: Final = 50
#: Seconds until the next look, if no job's end is heard of before.
TURN_S: Final = 1.0


class NoPythonFiles(InvalidRequest):
    """There are no Python files here."""

    code = "no_python_files"


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop asking; None is never."""

    jobs: int | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class _Judgement:
    """What was thought of a file's answers."""

    verdicts: list[Verdict]
    judged: list[tuple[int, Judged]] = field(default_factory=list)
    #: By target.
    asks: dict[int, Sequence[Question]] = field(default_factory=dict)

    def reject(self, target: Target, reason: str) -> None:
        self.verdicts.append(Verdict(target.id, TargetState.REJECTED, reason=reason))

    def accept(self, target: Target, accept: Accept) -> None:
        self.verdicts.append(
            Verdict(
                target.id,
                TargetState.ACCEPTED,
                text=accept.text,
                reason=accept.left_out,
                score=accept.score.total,
            )
        )


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
        # Jobs that nobody had asked for before, since the work began.
        self._asked = 0

    def plan(self, told: Callable[[int], None] = lambda _: None) -> None:
        """Find every file and symbol; what was found before a kill is left as it is.

        Args:
            told: hears how many files there are by now.

        Raises:
            NoPythonFiles: there are none.
            InvalidRequest: an option of the run cannot be followed, such as a commit that is not there.
        """
        files = found_files(self._root, self._options)
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
        began, self._asked = self._clock(), 0
        tokens_before = self._rows.progress(self._run.id).tokens
        look_at = began
        with self._client.watch() as watch:
            while not stop.is_set():
                moved, jobs = self._turn(limits.jobs)
                watch.add(jobs)
                if moved and self._clock() < look_at:
                    continue
                look_at = self._clock() + self._turn_s
                progress = self._rows.progress(self._run.id)
                told(progress)
                if not any(progress.files[state] for state in OPEN_FILES):
                    return self._ended(RunState.DONE)
                if _is_reached(limits, self._asked, progress.tokens - tokens_before, self._clock() - began):
                    break
                if not moved:
                    watch.wait(self._turn_s)
        # What was asked is judged when the run is resumed.
        return self._ended(RunState.STOPPED)

    def _ended(self, state: RunState) -> RunState:
        self._rows.set_state(self._run.id, state)
        return state

    def _turn(self, most: int | None) -> tuple[int, list[str]]:
        """Judge the files that are answered, and open more while there is room and not yet `most` are asked.

        Returns:
            How many files were taken up, and the new jobs.
        """
        moved, jobs = 0, list[str]()
        for file in self._rows.ready(self._run.id, _AT_A_TIME):
            jobs += self._advance(file)
            moved += 1
        room = len(jobs) + WINDOW - self._rows.waiting(self._run.id)
        for file in self._rows.files(self._run.id, states=[FileState.PLANNED], limit=_AT_A_TIME):
            if len(jobs) >= room or (most is not None and self._asked >= most):
                break
            jobs += self._advance(file)
            moved += 1
        return moved, jobs

    def _advance(self, file: File) -> list[str]:
        """Judge what was answered for a file, and ask what is still open; return the new jobs."""
        source = read_planned(self._root, file, self._options)
        if source is None:
            self._plan_again(file)
            return []
        found = self._judged(file, source.scan, self._rows.targets(file.id))
        self._rows.settle(
            file.id,
            file.exchange,
            candidates=[
                _candidate(target_id, one) for target_id, one in found.judged if one.answer.error is None
            ],
            verdicts=found.verdicts,
            state=None if found.asks else FileState.DONE,
        )
        return self._ask(file, found.asks) if found.asks else []

    def _plan_again(self, file: File) -> None:
        """Plan a file anew that was changed before anything was asked for it; leave others alone.

        What was asked was asked of the old code, so answers would be judged by what they do not describe.
        Texts that were accepted by then may still be handed over (`outcome`).
        """
        planned = planner.plan_again(self._root, file.path, self._options.wanted())
        reason = planned.reason or "while its texts were asked for"
        if planned.reason is None and self._rows.replan(file, new_file(planned)):
            return
        self._rows.set_file_state(file.id, FileState.CHANGED, f"changed since it was planned; {reason}")

    def _judged(self, file: File, scan: Scan, targets: Sequence[Target]) -> _Judgement:
        """Judge what was answered for a file. The same answers give the same, however often this is done."""
        if file.exchange < 0 and (fault := unwritable(scan, self._options)) is not None:
            return _Judgement([Verdict(target.id, TargetState.REJECTED, reason=fault) for target in targets])
        symbols = {target.id: scan.symbols[target.place] for target in targets}
        answers, faults = self._answers(file), dict[int, str]()
        while True:
            found = self._judged_but(faults, file, scan, targets, answers)
            accepted = [one for one in found.verdicts if one.state is TargetState.ACCEPTED]
            texts = [(symbols[one.target_id], one.text or "") for one in accepted]
            unsafe_ones = unsafe(scan, texts, self._options)
            if not unsafe_ones:
                return found
            # Nobody may be compared with a text that nobody gets.
            faults |= {accepted[place].target_id: why for place, why in unsafe_ones.items()}

    def _judged_but(
        self,
        faults: Mapping[int, str],
        file: File,
        scan: Scan,
        targets: Sequence[Target],
        answers: Mapping[int, Sequence[Answer]],
    ) -> _Judgement:
        """Judge all targets but those with a fault, which are rejected."""
        # Shown with lines of its own, where a body has none.
        view = opened_view(scan, [scan.symbols[target.place] for target in targets], self._options)
        context = FileContext(view, budget=self._options.context_chars)
        policy = self._options.policy(usual_lengths=_usual_lengths(scan))
        accepted = {
            (t.exchange, t.place): t.text
            for t in targets
            if t.state is TargetState.ACCEPTED and t.text is not None
        }
        found = _Judgement([])
        for target in targets:
            if target.state is not TargetState.OPEN:
                continue
            if target.id in faults:
                found.reject(target, faults[target.id])
                continue
            symbol = view.symbols[target.place]
            if symbol.insert_at is None:
                found.reject(target, "its body cannot be given lines of its own")
                continue
            others = [
                Other(text, since=exchange if place < target.place else exchange + 1)
                for (exchange, place), text in sorted(accepted.items())
            ]
            try:
                hole = context.hole(symbol)
            except HeaderTooLong as err:
                found.reject(target, str(err))
                continue
            step = dialog.move(
                symbol, hole, policy, answers.get(target.id, ()), others, encoding=scan.encoding
            )
            found.judged += [(target.id, one) for one in step.judged]
            match step.next:
                case Ask(questions=questions):
                    found.asks[target.id] = questions
                case Accept() as accept:
                    accepted[file.exchange, target.place] = accept.text
                    found.accept(target, accept)
                case GiveUp(reason):
                    found.reject(target, reason)
        return found

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
        # Asked before by another run, whose jobs may have ended without a text. Once each: two symbols may
        # have asked for the same.
        for job in {job.id: job for job in jobs}.values():
            if not job.deduplicated:
                self._asked += 1
            elif job.state in FINAL_STATES - {JobState.SUCCEEDED}:
                # Somebody else may have been faster.
                with contextlib.suppress(IllegalMove):
                    job.retry()
                    self._asked += 1
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


def found_files(root: Path, options: Options) -> Iterator[PlannedFile]:
    """Yield what there is to do below a folder, file by file.

    Raises:
        NoPythonFiles: there is none; a run of nothing would look like one where nothing is left to do.
        InvalidRequest: as `planner.plan`.
    """
    files = planner.plan(root, options.wanted())
    first = next(files, None)
    if first is None:
        if Git.of(root) is None:
            raise NoPythonFiles(f"there are no Python files below {root}")
        raise NoPythonFiles(
            f"there are no Python files that git knows of below {root}",
            hint="ignored files are left alone; `git check-ignore --verbose PATH` says by which rule",
        )
    yield first
    yield from files


def has_room_for(path: str) -> bool:
    """Whether a path can be kept; a longer one is no file's that people work on."""
    if len(path_bytes(path)) <= MAX_PATH:
        return True
    logger.warning("path_too_long path=%.80s", path)
    return False


def new_file(planned: PlannedFile) -> NewFile:
    """Return the rows of a planned file."""
    scan = planned.scan
    return NewFile(
        path=planned.path,
        sha256=planned.sha256,
        encoding=None if scan is None else scan.encoding,
        reason=planned.reason,
        documented=0 if scan is None else sum(symbol.is_documented for symbol in scan.symbols),
        passed_over=planned.passed_over,
        targets=() if scan is None else tuple(_new_targets(scan, planned.targets)),
    )


def _new_targets(scan: Scan, wanted: Sequence[Symbol]) -> Iterator[NewTarget]:
    code = OwnCode(scan)
    places = {(symbol.name, symbol.twin): place for place, symbol in enumerate(scan.symbols)}
    for one in wanted:
        yield NewTarget(places[one.name, one.twin], one.name, one.twin, one.line, one.kind, code.sha256(one))


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
