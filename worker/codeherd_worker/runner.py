"""Run one job: claim it, generate, store the outcome. The one place where errors become outcomes.

Owns: the order of the steps, and which failure leads to which move of the job. Does not know Celery
(`codeherd_worker.app`), SQL (`codeherd_schema.store`) or tensors (`codeherd_worker.engine`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random  # jitter only: never for tokens
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable, CodeherdError, DatabaseUnavailable, EngineFailed
from codeherd_schema.queues import queue_name
from codeherd_schema.requests import Request, Sampling
from codeherd_schema.results import Candidate, FinishReason, LikelyToken, Result, Timings, TokenLogprob
from codeherd_schema.store import Claim, Commit, Store
from codeherd_worker.engine.detokenize import Detokenizer
from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.prompts import Prompt, build_prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelReason, Stopper
from codeherd_worker.engine.vocabulary import Vocabulary
from codeherd_worker.generator import Generator
from codeherd_worker.lease import SAFE_SHARE
from codeherd_worker.quarantine import Quarantine
from codeherd_worker.running import Held, Run, Running
from codeherd_worker.summary import job_summary, no_result

logger = logging.getLogger(__name__)

#: Seconds between two tries to store an outcome while the database is away.
STORE_RETRY_S = 0.5
#: Longest wait before another attempt of a job, in seconds.
MAX_BACKOFF_S = 60.0


class JobEnded(CodeherdError):
    """The job ended without a result."""

    code = "job_ended"


class OperatorStopped(CodeherdError):
    """An operator terminated the task."""

    code = "operator_stopped"


class Runner:
    """Runs jobs on the pool's threads, one per call."""

    def __init__(
        self,
        *,
        store: Store,
        broker: Broker,
        generator: Generator,
        running: Running,
        worker_id: str,
        lease_s: float,
        max_crashes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wire the parts together; nothing starts.

        Args:
            store: where jobs are.
            broker: hears of every end.
            generator: makes the text.
            running: the busy threads; the caller's is one of them.
            worker_id: kept in each attempt.
            lease_s: how long a claim lasts without a heartbeat, seconds.
            max_crashes: lost workers after which a job is buried.
            clock: monotonic seconds.
        """
        self._store = store
        self._broker = broker
        self._generator = generator
        self._running = running
        self._worker_id = worker_id
        self._queues = (queue_name(generator.model.name),)
        self._lease_s = lease_s
        self._max_crashes = max_crashes
        self._clock = clock
        self._pause = threading.Event()
        self._quarantine = Quarantine()
        self.draining = False

    def drain(self) -> None:
        """Claim no more jobs."""
        self.draining = True
        self._quarantine.close()

    def run(self, job_id: str) -> dict[str, Any]:
        """Run the job if it can be claimed, and say what happened in a few words.

        Raises:
            JobEnded: the job failed, expired or goes to another attempt; already stored.
            OperatorStopped: the job was terminated from outside; already stored.
            DatabaseUnavailable: the claim could not be made; the job stays queued.
        """
        run = self._running.current()
        with self._quarantine.beside_others() as may:
            if not may or self._generator.engine.broken:
                # Left to other workers: an engine that refuses everything would burn an attempt of each.
                return no_result("draining")
            claim = self._claim(run, job_id)
            if claim is None:
                return no_result("not claimable")
            if not is_last_chance(claim, max_crashes=self._max_crashes):
                return self._attempt(run, claim)
            if self._set_apart(run, claim) is Commit.LOST:
                return no_result("lease lost")
        with self._quarantine.alone() as may:
            claim = self._claim(run, job_id) if may else None
            return no_result("not claimable") if claim is None else self._attempt(run, claim)

    def _claim(self, run: Run, job_id: str) -> Claim | None:
        asked_at = self._clock()
        # A forged hint may name a job of another model.
        claim = self._store.claim(
            job_id, worker_id=self._worker_id, lease_s=self._lease_s, queues=self._queues
        )
        if claim is None:
            logger.debug("hint_dropped job_id=%s", job_id)
            return None
        run.held = Held(claim, asked_at + self._lease_s * SAFE_SHARE)
        logger.info(
            "job_claimed job_id=%s kind=%s attempt=%d queue_wait_s=%.3f",
            job_id, claim.job.kind, claim.attempt, claim.queue_s,
        )  # fmt: skip
        return claim

    def _set_apart(self, run: Run, claim: Claim) -> Commit:
        # Back in the queue while it waits for its turn: what happens here meanwhile is not its fault.
        return self._commit(run, claim, lambda: self._store.release(claim), "set apart")

    def _attempt(self, run: Run, claim: Claim) -> dict[str, Any]:
        claimed_at = self._clock()
        try:
            request = claim.job.request
            prompt = build_prompt(request, self._generator.vocabulary, self._generator.model)
            outcomes = self._generate(run, claim, request.sampling, prompt, request.priority)
        except CodeherdError as err:
            return self._failed(run, claim, err)
        except BaseException as err:
            # Whatever else breaks, a SystemExit too, breaks this attempt alone; the log holds the trace.
            logger.exception("attempt_broken job_id=%s attempt=%d", claim.job.id, claim.attempt)
            return self._failed(run, claim, EngineFailed(f"unexpected {type(err).__name__}"))
        stopped = next((o.cancelled for o in outcomes if o.cancelled is not None), None)
        if stopped is not None:
            return self._stopped(run, claim, stopped)
        result = self._result(claim, request, prompt, outcomes, self._clock() - claimed_at)
        return self._succeeded(run, claim, result)

    def _generate(
        self, run: Run, claim: Claim, sampling: Sampling, prompt: Prompt, priority: int
    ) -> list[SequenceOutcome]:
        deadline = None if claim.deadline_in_s is None else self._clock() + claim.deadline_in_s
        futures: list[Future[SequenceOutcome]] = []
        try:
            for seed in candidate_seeds(sampling, claim.job.id):
                sequence = SequenceRequest(
                    prompt_ids=prompt.token_ids,
                    sampling=SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                        min_p=sampling.min_p,
                        repetition_penalty=sampling.repetition_penalty,
                        seed=seed,
                        logprobs=sampling.logprobs,
                    ),
                    stopper=Stopper(
                        stop_ids=prompt.stop_ids,
                        stop_strings=prompt.stop_strings,
                        max_new_tokens=sampling.max_new_tokens,
                        detokenizer=Detokenizer(
                            self._generator.vocabulary,
                            strip_first_space=prompt.strip_first_space,
                            newline=prompt.newline,
                        ),
                    ),
                    cancel=run.token,
                    deadline=deadline,
                    priority=priority,
                    name=claim.job.id,
                )
                futures.append(self._generator.engine.submit(sequence))
            return [future.result() for future in futures]
        except BaseException:
            # One candidate failed: the others would only hold slots.
            run.token.cancel(CancelReason.ABANDONED)
            raise

    def _result(
        self, claim: Claim, request: Request, prompt: Prompt, outcomes: list[SequenceOutcome], total_s: float
    ) -> Result:
        generator = self._generator
        seeds = candidate_seeds(request.sampling, claim.job.id)
        return Result(
            job_id=claim.job.id,
            attempt=claim.attempt,
            candidates=tuple(
                Candidate(
                    index=index,
                    text=outcome.text,
                    finish_reason=FinishReason(str(outcome.finish_reason)),
                    completion_tokens=outcome.completion_tokens,
                    stop_string=outcome.stop_string,
                    seed=seeds[index],
                    logprobs=(
                        told_logprobs(outcome.logprobs, generator.vocabulary)
                        if request.sampling.logprobs
                        else None
                    ),
                )
                for index, outcome in enumerate(outcomes)
            ),
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=sum(o.completion_tokens for o in outcomes),
            cut=prompt.cut,
            model=generator.model.name,
            model_revision=generator.revision,
            quantization=generator.quantization,
            engine_fingerprint=generator.engine.fingerprint,
            worker_id=self._worker_id,
            timings=Timings(
                queue_s=max(claim.queue_s, 0.0),
                admit_s=min(o.queue_s for o in outcomes),
                prefill_s=max(o.prefill_s for o in outcomes),
                decode_s=max(o.decode_s for o in outcomes),
                total_s=total_s,
            ),
            # By the database's clock, as all that is kept.
            created_at=claim.claimed_at + timedelta(seconds=total_s),
        )

    def _succeeded(self, run: Run, claim: Claim, result: Result) -> dict[str, Any]:
        commit = self._commit(run, claim, lambda: self._store.succeed(claim, result), "succeeded")
        return job_summary(result) if commit is not Commit.LOST else no_result("lease lost")

    def _stopped(self, run: Run, claim: Claim, reason: CancelReason) -> dict[str, Any]:
        job_id = claim.job.id
        match reason:
            case CancelReason.USER:
                self._commit(run, claim, lambda: self._store.cancel_running(claim), "cancelled")
                return no_result("cancelled")
            case CancelReason.OPERATOR:
                self._commit(run, claim, lambda: self._store.cancel_running(claim), "cancelled")
                raise OperatorStopped
            case CancelReason.DEADLINE:
                self._commit(run, claim, lambda: self._store.expire_running(claim), "expired")
                raise JobEnded(f"job {job_id} passed its deadline")
            case CancelReason.DRAIN:
                self._commit(run, claim, lambda: self._store.release(claim), "released")
                return no_result("released")
            case _:
                logger.warning("attempt_dropped job_id=%s reason=%s", job_id, reason)
                return no_result(str(reason))

    def _failed(self, run: Run, claim: Claim, err: CodeherdError) -> dict[str, Any]:
        # A token that was cancelled meanwhile says more than the error that followed from it.
        reason = run.token.reason
        if reason is not None and reason is not CancelReason.ABANDONED:
            return self._stopped(run, claim, reason)
        if err.retryable:
            delay_s = backoff_s(claim.attempt)
            move = "to be retried"
            self._commit(
                run, claim,
                lambda: self._store.retry(claim, code=err.code, message=err.message, delay_s=delay_s),
                move,
            )  # fmt: skip
        else:
            move = "failed"
            self._commit(
                run, claim, lambda: self._store.fail(claim, code=err.code, message=err.message), move
            )
        raise JobEnded(f"job {claim.job.id} {move}: {err.message} [{err.code}]") from err

    def _commit(self, run: Run, claim: Claim, move: Callable[[], Commit], outcome: str) -> Commit:
        """Store an outcome, trying as long as the lease surely holds; then another worker runs the job."""
        held = run.held
        if held is None or held.claim is not claim:
            raise ValueError("a claim that this thread does not hold")
        held.is_ending = True
        while True:
            try:
                commit = move()
                break
            except DatabaseUnavailable as err:
                if self._clock() >= held.safe_until:
                    logger.error("outcome_lost job_id=%s outcome=%s reason=%s", claim.job.id, outcome, err)
                    commit = Commit.LOST
                    break
                self._pause.wait(STORE_RETRY_S)
        run.held = None
        logger.info(
            "job_stored job_id=%s attempt=%d outcome=%s commit=%s",
            claim.job.id, claim.attempt, outcome.replace(" ", "_"), commit,
        )  # fmt: skip
        with contextlib.suppress(BrokerUnavailable):
            self._broker.announce(claim.job.id)
        return commit


def is_last_chance(claim: Claim, *, max_crashes: int) -> bool:
    """Whether this job has lost a worker before, and would be buried if it lost this one too."""
    crashes, job = claim.job.crash_count, claim.job
    return crashes > 0 and (crashes + 1 >= max_crashes or claim.attempt >= job.max_attempts)


def candidate_seeds(sampling: Sampling, job_id: str) -> tuple[int, ...]:
    """Return one seed per candidate: the request's own first, or one derived from the job's id."""
    first = sampling.seed if sampling.seed is not None else uuid.UUID(job_id).int & (2**63 - 1)
    return (first, *(_derived(first, index) for index in range(1, sampling.n)))


def told_logprobs(logprobs: Sequence[TokenLogprobs], vocabulary: Vocabulary) -> tuple[TokenLogprob, ...]:
    """Return log-probabilities as a result tells them, with what each token stands for."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token_id": token_id,
            # Embeddings may have more rows than there are pieces.
            "piece": vocabulary.piece(token_id) if token_id < vocabulary.size else "",
            "text_hex": vocabulary.token_bytes(token_id).hex(),
            "logprob": logprob,
        }

    return tuple(
        TokenLogprob(
            **described(token.token_id, token.logprob),
            top=tuple(LikelyToken(**described(*likely)) for likely in token.top),
        )
        for token in logprobs
    )


def backoff_s(attempt: int, jitter: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait before the attempt after `attempt`: doubling, with jitter."""
    return jitter(0.5, 1.0) * min(MAX_BACKOFF_S, 2.0**attempt)


def _derived(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)
