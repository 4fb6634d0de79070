"""An engine without a model: texts are made up from the request alone, and a prompt may ask for trouble.

Owns: what stands in for decoding where delivery is tested or measured. It keeps the contract of
`codeherd_worker.engine.engine.Engine` (slots, steps, cancels, deadlines, one text per request and seed),
needs no torch, and starts at once. Its tokens are hashes of prompt, seed and position.

The first line of a prompt may be an order, which the engine sees as ordinary tokens and reads back:

    #! hold PATH          no token comes while the file PATH exists
    #! steps N            a token comes only with every Nth step
    #! kill [PATH]        the process is killed, as by a power cut; with a PATH while that file exists
    #! hang               the engine's thread never comes back
    #! raise NAME         the sequence fails with this exception: built in, of `codeherd_schema.errors`, or
                          `Unspeakable`
    #! break              the engine refuses this and all further work

It can say sentences instead of hashes: what it then gives for a hole may stand in a docstring.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import signal
import threading
import time
from array import array
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeherd_schema import errors
from codeherd_schema.errors import EngineFailed
from codeherd_schema.models import ServedModel
from codeherd_schema.queues import queue_name
from codeherd_worker.device import Device
from codeherd_worker.embedded import EMBEDDED_FOLDER
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stats import EngineStats
from codeherd_worker.engine.stopping import CancelReason, FinishReason
from codeherd_worker.engine.vocabulary import Vocabulary
from codeherd_worker.generator import Generator, Prepared
from codeherd_worker.settings import WorkerSettings

#: Starts an order.
ORDER = "#! "
#: Seconds between two looks at a file that holds a sequence.
LOOK_S = 0.005
#: Made-up tokens come from this many ordinary pieces.
PIECES = 200
#: Sentences are put together of these.
_VERBS = (
    *("Return", "Collect", "Compare", "Remove", "Update"),
    *("Measure", "Rewrite", "Describe", "Sort", "Join"),
)
_KINDS = (
    *("open", "older", "nearest", "remaining", "broken"),
    *("marked", "quiet", "shared", "hidden", "cheap"),
)
_THINGS = (
    *("rows", "windows", "readers", "bridges", "letters"),
    *("engines", "parcels", "roads", "voices", "maps"),
)


@dataclass(slots=True, eq=False)
class _Sequence:
    request: SequenceRequest
    order: tuple[str, str]
    submitted_at: float
    admitted_at: float = 0.0
    steps: int = 0
    #: Of prompt and seed; all that is made up follows from it.
    digest: bytes = b""
    #: What it says, token by token; None makes them up.
    script: list[int] | None = None
    future: Future[SequenceOutcome] = field(default_factory=Future)


class NullEngine:
    """Takes as many sequences as it has slots, and gives each one token per step."""

    fingerprint = "null"

    def __init__(
        self, vocabulary: Vocabulary, *, slots: int, step_s: float, in_sentences: bool = False
    ) -> None:
        """Start.

        Args:
            vocabulary: to read orders with, and to choose tokens from.
            slots: sequences at a time; more wait.
            step_s: pause after a step, seconds.
            in_sentences: give a sentence for each prompt and seed, then closing quotes.
        """
        self._in_sentences = in_sentences
        self._vocabulary = vocabulary
        self._slots = slots
        self._step_s = step_s
        ordinary = (i for i in range(vocabulary.size) if vocabulary.token_bytes(i).isalnum())
        self._ordinary = [i for i, _ in zip(ordinary, range(PIECES), strict=False)]
        #: Without one of these a prompt holds no order, and reading it costs more than all else here.
        mark = ORDER[:1].encode()
        self._marks = frozenset(i for i in range(vocabulary.size) if mark in vocabulary.token_bytes(i))
        self.broken = False
        self._turn = threading.Condition()
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._closed = False
        self._steps = self._tokens = 0
        self._last_step_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: SequenceRequest) -> Future[SequenceOutcome]:
        """Put a sequence in line."""
        sequence = _Sequence(request, self._order_of(request), time.monotonic())
        seen = array("q", request.prompt_ids).tobytes() + repr(request.sampling.seed).encode()
        sequence.digest = hashlib.blake2b(seen, digest_size=16).digest()
        if self._in_sentences:
            text = sentence(repr((request.prompt_ids, request.sampling.seed)))
            sequence.script = self._vocabulary.encode_raw(f'{text}"""\n')
        with self._turn:
            if self.broken or self._closed:
                raise EngineFailed("the engine is broken")
            if not (self._active or self._waiting):
                self._last_step_at = sequence.submitted_at
            self._waiting.append(sequence)
            self._turn.notify()
        return sequence.future

    def stats(self) -> EngineStats:
        """Return the counters."""
        with self._turn:
            return EngineStats(
                slots=self._slots,
                active=len(self._active),
                waiting=len(self._waiting),
                steps=self._steps,
                passes=0,
                tokens=self._tokens,
                prompt_tokens=0,
                reused_tokens=0,
                drafted=0,
                accepted=0,
                busy_s=0.0,
                cache_bytes=0,
                last_step_at=self._last_step_at,
            )

    def close(self) -> None:
        """Stop; what runs has failed."""
        with self._turn:
            self._closed = True
            self._turn.notify()
        self._thread.join()

    def _order_of(self, request: SequenceRequest) -> tuple[str, str]:
        if self._marks.isdisjoint(request.prompt_ids):
            return "", ""
        text = b"".join(map(self._vocabulary.token_bytes, request.prompt_ids)).decode(errors="replace")
        _, found, rest = text.partition(ORDER)
        verb, _, argument = rest.partition("\n")[0].partition(" ")
        return (verb, argument) if found else ("", "")

    def _run(self) -> None:
        while self._admit():
            is_busy = False
            for sequence in list(self._active):
                is_busy |= self._step(sequence)
            self._steps += 1
            self._last_step_at = time.monotonic()
            pause_s = self._step_s if is_busy else max(self._step_s, LOOK_S)
            if pause_s:
                time.sleep(pause_s)
        for sequence in (*self._active, *self._waiting):
            sequence.future.set_exception(EngineFailed("the engine was closed"))

    def _admit(self) -> bool:
        with self._turn:
            while not (self._active or self._waiting or self._closed):
                self._turn.wait()
            while self._waiting and len(self._active) < self._slots:
                sequence = self._waiting.popleft()
                sequence.admitted_at = time.monotonic()
                self._active.append(sequence)
            return not self._closed

    def _step(self, sequence: _Sequence) -> bool:
        """Give a sequence its next token; return whether there was one."""
        request = sequence.request
        sequence.steps += 1
        if request.deadline is not None and time.monotonic() >= request.deadline:
            request.cancel.cancel(CancelReason.DEADLINE)
        if request.cancel.reason is not None:
            self._end(sequence, None)
            return True
        if not self._may_go_on(sequence):
            return False
        self._tokens += 1
        reason = request.stopper.push(self._token(sequence))
        if reason is None and len(request.stopper.token_ids) >= request.stopper.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._end(sequence, reason)
        return True

    def _may_go_on(self, sequence: _Sequence) -> bool:
        match sequence.order:
            case "hold", path:
                return not Path(path).exists()
            case "steps", count:
                return sequence.steps % int(count) == 0
            case "kill", path:
                if not path or Path(path).exists():
                    os.kill(os.getpid(), signal.SIGKILL)
            case "hang", _:
                threading.Event().wait()
            case "raise", name:
                self._fail(sequence, _error(name))
                return False
            case "break", _:
                self.broken = True
                self._fail(sequence, EngineFailed("the engine broke"))
                return False
        return True

    def _token(self, sequence: _Sequence) -> int:
        if sequence.script:
            return sequence.script.pop(0)
        place = len(sequence.request.stopper.token_ids).to_bytes(8, "big")
        digest = hashlib.blake2b(sequence.digest + place, digest_size=4).digest()
        return self._ordinary[int.from_bytes(digest, "big") % len(self._ordinary)]

    def _fail(self, sequence: _Sequence, err: BaseException) -> None:
        with self._turn:
            self._active.remove(sequence)
        sequence.future.set_exception(err)

    def _end(self, sequence: _Sequence, reason: FinishReason | None) -> None:
        now, stopper = time.monotonic(), sequence.request.stopper
        stopper.close()
        with self._turn:
            self._active.remove(sequence)
        sequence.future.set_result(
            SequenceOutcome(
                text=stopper.text,
                token_ids=tuple(stopper.token_ids),
                logprobs=(),
                finish_reason=reason,
                cancelled=sequence.request.cancel.reason if reason is None else None,
                stop_string=stopper.stop_string,
                prompt_tokens=len(sequence.request.prompt_ids),
                reused_tokens=0,
                completion_tokens=len(stopper.token_ids),
                queue_s=sequence.admitted_at - sequence.submitted_at,
                prefill_s=0.0,
                decode_s=now - sequence.admitted_at,
            )
        )


def sentence(of: str) -> str:
    """Return a sentence that follows from a text; two texts hardly give the same one."""
    digest = hashlib.blake2b(of.encode()).digest()
    words = [
        words[digest[place] % len(words)]
        for place, words in enumerate((_VERBS, _KINDS, _THINGS, _VERBS, _KINDS, _THINGS, _KINDS, _THINGS))
    ]
    words[3] = f"and {words[3].lower()}"
    words[6] = f"of the {words[6]}"
    return " ".join(words) + "."


class Unspeakable(Exception):
    """Has nothing to say, and breaks whoever asks."""

    def __str__(self) -> str:
        raise RuntimeError("unspeakable")

    __repr__ = __str__


class NullObserver:
    """Tells of a null engine what telemetry tells of a real one, as far as it has it."""

    def __init__(self, engine: NullEngine, model: ServedModel, worker_id: str) -> None:
        self._engine = engine
        self._who = {"worker": worker_id, "model": model.name, "queue": queue_name(model.name)}

    def sample(self) -> None:
        """Do nothing: no rates are told."""

    def figures(self) -> dict[str, Any]:
        """Return the counters."""
        stats = self._engine.stats()
        counts = {name: getattr(stats, name) for name in ("slots", "active", "waiting", "steps", "tokens")}
        age_s = round(time.monotonic() - stats.last_step_at, 3)
        return self._who | counts | {"last_step_age_s": age_s}


def prepare_null(
    settings: WorkerSettings,
    model: ServedModel,
    *,
    device: Device,
    worker_id: str,
    step_s: float = 0.0,
    in_sentences: bool = False,
) -> Prepared:
    """Make a null engine in the shape of a real one; it serves any model with the tokenizer of `tiny`."""
    vocabulary = Vocabulary.from_folder(EMBEDDED_FOLDER)
    engine = NullEngine(vocabulary, slots=settings.worker_slots, step_s=step_s, in_sentences=in_sentences)
    generator = Generator(model, vocabulary, engine, revision="null", quantization="none")
    return Prepared(generator, NullObserver(engine, model, worker_id), close=engine.close)


def _error(name: str) -> BaseException:
    if name == "CancelledError":
        return CancelledError()
    kind = Unspeakable if name == "Unspeakable" else getattr(errors, name, None) or getattr(builtins, name)
    error: BaseException = kind("asked for by the prompt")
    return error
