"""Generate for many sequences at once: who gets a slot, what runs next, what came of it.

Owns: the waiting line, the slots, the one thread that may touch the model, and each sequence's end. Does
not know tensors (`decode.py`), sampling rules (`sampling.py`), stop rules (`stopping.py`), or anything of
queues, tables, processes and requests: token ids come in, text and token ids go out.

A sequence's life, each arrow taken by the engine thread between two passes of the model:
    waiting -> prefilling      a slot is free and nothing else is prefilling; priority, then arrival
    prefilling -> decoding     its last chunk is done, and the first token did not end it
    any -> ended               stopped, cancelled, past its deadline, or failed; its future is complete

A turn of the loop: end what was cancelled, admit one sequence, prefill one chunk, decode one step. One
chunk is therefore the most that the decoding sequences wait for a new one.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib.metadata
import logging
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM

from codeherd_schema.errors import (
    CodeherdError,
    EngineFailed,
    GenerationError,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
    PromptTooLong,
)
from codeherd_worker.engine.decode import RowChecks, SlotDecoder
from codeherd_worker.engine.loading import is_out_of_memory, quantization_of
from codeherd_worker.engine.sampling import SamplingParams
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper

logger = logging.getLogger(__name__)

#: Hexadecimal digits of a fingerprint.
_FINGERPRINT_LENGTH = 16
#: Packages whose version decides which kernels run.
_KERNEL_PACKAGES = ("torch", "transformers", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The size of an engine; fixed for its life."""

    #: Sequences that decode together.
    slots: int
    #: Tokens per slot, prompt and new ones.
    max_len: int
    #: Tokens of a prompt that are computed between two decode steps.
    prefill_chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("slots", "max_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} is {getattr(self, name)}, must be at least 1")


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stopper: Stopper
    cancel: CancelToken
    #: On the engine's clock, `time.monotonic()` unless it was given another; None: no deadline.
    deadline: float | None = None
    #: 0 gets a slot first.
    priority: int = 5


@dataclass(frozen=True, slots=True)
class SequenceOutcome:
    """What came of a sequence that did not fail."""

    text: str
    token_ids: tuple[int, ...]
    #: None when cancelled.
    finish_reason: FinishReason | None
    #: None when it ended by its own rules.
    cancelled: CancelReason | None
    stop_string: str | None
    prompt_tokens: int
    #: Tokens in `token_ids`: a stop id does not count.
    completion_tokens: int
    #: From `submit` to the slot.
    queue_s: float
    #: From the slot to the first token.
    prefill_s: float
    #: From the first token to the end.
    decode_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment."""

    slots: int
    #: Sequences in a slot, prefilling or decoding.
    active: int
    waiting: int
    #: Decode steps since the start.
    steps: int
    #: New tokens since the start.
    tokens: int
    cache_bytes: int
    #: On the engine's clock: when a pass of the model last began or ended. Old while `active` is not
    #: 0 means that the device hangs.
    last_step_at: float


@dataclass(slots=True, eq=False)
class _Sequence:
    request: SequenceRequest
    submitted_at: float
    future: Future[SequenceOutcome] = field(default_factory=Future)
    prefilled: int = 0
    admitted_at: float | None = None
    decoding_at: float | None = None


class Engine:
    """A model, its slots and the thread that runs them.

    `submit` and `stats` may be called from any thread; `warm_up` only before `start`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        settings: EngineSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocate all memory that the engine will ever need.

        Args:
            model: loaded, in eval mode; nobody else may call it while the engine lives.
            settings: the size.
            clock: seconds, monotonic.

        Raises:
            InvalidSetting: `max_len` is more than the model has positions for.
            OutOfMemory: the cache does not fit; use fewer slots or a smaller `max_len`.
        """
        positions = model.config.max_position_embeddings
        if settings.max_len > positions:
            raise InvalidSetting(
                f"max_len is {settings.max_len}, the model has {positions} positions",
                hint=f"set max_len to {positions} or less",
            )
        self._settings = settings
        self._clock = clock
        try:
            self._decoder = SlotDecoder(
                model,
                slots=settings.slots,
                max_len=settings.max_len,
                prefill_chunk=min(settings.prefill_chunk, settings.max_len),
            )
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            raise OutOfMemory(
                f"no memory for {settings.slots} slots of {settings.max_len} tokens",
                hint="use fewer slots, a smaller max_len or a stronger quantization",
            ) from err
        #: What the produced bytes depend on beside weights and request.
        self.facts = _facts(model, self._decoder, settings)
        #: A short stable hash of `facts`.
        self.fingerprint = _digest(self.facts)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards what other threads touch: the next five.
        self._wake = threading.Condition()
        self._waiting: list[tuple[int, int, _Sequence]] = []
        # Every sequence without an outcome, in order of arrival: nobody may wait for ever.
        self._open: dict[_Sequence, None] = {}
        self._arrivals = 0
        self._is_closing = False
        self._failure: CodeherdError | None = None
        # Touched by the engine thread alone; `stats` reads sizes.
        self._free_slots = list(range(settings.slots))
        self._slot_of: dict[_Sequence, int] = {}
        self._prefilling: _Sequence | None = None
        self._decoding: dict[int, _Sequence] = {}
        self._steps = 0
        self._tokens = 0
        self._last_step_at = clock()

    @property
    def broken(self) -> bool:
        """Whether a pass of the model failed; nothing can be submitted any more."""
        return self._failure is not None

    def warm_up(self) -> RowChecks:
        """Run every shape once, so that the first sequence pays for nothing; before `start`."""
        return self._decoder.warm_up()

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def close(self) -> None:
        """Cancel what is left with `DRAIN`, complete its futures, and end the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is None:
            self._drain()
        else:
            self._thread.join()

    def submit(self, request: SequenceRequest) -> Future[SequenceOutcome]:
        """Put a sequence in line.

        The future cannot be cancelled; use the request's `CancelToken`.

        Raises:
            PromptTooLong: never retry; shorten the prompt or `max_new_tokens`.
            InvalidRequest: the prompt is empty or holds ids that the model does not have.
            EngineFailed: the engine broke or is closed; another process has to take over.
        """
        self._check(request)
        sequence = _Sequence(request, submitted_at=self._clock())
        sequence.future.set_running_or_notify_cancel()
        with self._wake:
            if self._failure is not None:
                raise EngineFailed(f"the engine broke: {self._failure}") from self._failure
            if self._is_closing:
                raise EngineFailed("the engine is closed")
            heapq.heappush(self._waiting, (request.priority, self._arrivals, sequence))
            self._arrivals += 1
            self._open[sequence] = None
            self._wake.notify()
        return sequence.future

    def stats(self) -> EngineStats:
        """Return how busy the engine is."""
        return EngineStats(
            slots=self._settings.slots,
            active=len(self._slot_of),
            waiting=len(self._waiting),
            steps=self._steps,
            tokens=self._tokens,
            cache_bytes=self._decoder.cache.cache_bytes,
            last_step_at=self._last_step_at,
        )

    def _check(self, request: SequenceRequest) -> None:
        prompt_ids = request.prompt_ids
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens")
        # An id outside the embedding is a device-side assert on CUDA, which kills the process.
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._decoder.vocab_size:
            raise InvalidRequest(f"a token id is not in [0, {self._decoder.vocab_size})")
        new, room = request.stopper.max_new_tokens, self._settings.max_len
        if len(prompt_ids) + new > room:
            raise PromptTooLong(
                f"prompt has {len(prompt_ids)} tokens and asks for {new} more, a slot holds {room}"
            )

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
            self._drain()
        except BaseException as err:  # whatever it is, somebody waits for the futures
            self._fail_all(err)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine is to close."""
        with self._wake:
            while not (self._is_closing or self._waiting or self._slot_of):
                self._wake.wait()
            return not self._is_closing

    def _turn(self) -> None:
        self._end_cancelled()
        self._admit()
        if self._prefilling is not None:
            self._prefill_chunk(self._prefilling)
        if self._decoding:
            self._decode_step()

    def _end_cancelled(self) -> None:
        now = self._clock()
        ended = [sequence for sequence in self._slot_of if _is_cancelled(sequence.request, now)]
        with self._wake:
            gone = [entry for entry in self._waiting if _is_cancelled(entry[2].request, now)]
            if gone:
                self._waiting = [entry for entry in self._waiting if entry not in gone]
                heapq.heapify(self._waiting)
        for sequence in ended + [sequence for _, _, sequence in gone]:
            self._complete(sequence, None)

    def _admit(self) -> None:
        if self._prefilling is not None or not self._free_slots:
            return
        with self._wake:
            if not self._waiting:
                return
            _, _, sequence = heapq.heappop(self._waiting)
        sequence.admitted_at = self._clock()
        self._slot_of[sequence] = self._free_slots.pop()
        self._prefilling = sequence

    def _prefill_chunk(self, sequence: _Sequence) -> None:
        slot, request = self._slot_of[sequence], sequence.request
        start = sequence.prefilled
        chunk = request.prompt_ids[start : start + self._decoder.prefill_chunk]
        self._last_step_at = self._clock()
        logits = self._decoder.prefill(slot, chunk, start)
        self._last_step_at = self._clock()
        sequence.prefilled += len(chunk)
        if sequence.prefilled < len(request.prompt_ids):
            return
        self._prefilling = None
        self._decoding[slot] = sequence
        token = self._decoder.begin(slot, request.sampling, request.prompt_ids, logits)
        self._last_step_at = sequence.decoding_at = self._clock()
        self._take(sequence, token)

    def _decode_step(self) -> None:
        self._last_step_at = self._clock()
        tokens = self._decoder.step()
        self._last_step_at = self._clock()
        self._steps += 1
        for slot, token in tokens.items():
            self._take(self._decoding[slot], token)

    def _take(self, sequence: _Sequence, token: int | None) -> None:
        """Give a sequence its next token; None means that the model produced none."""
        if token is None:
            self._decoder.wipe(self._slot_of[sequence])
            self._fail(sequence, GenerationError("the model's logits are not finite"))
            return
        self._tokens += 1
        try:
            reason = sequence.request.stopper.push(token)
        except Exception as err:  # foreign code: its sequence fails, the others go on
            self._fail_text(sequence, err)
            return
        if reason is not None:
            self._complete(sequence, reason)

    def _complete(self, sequence: _Sequence, reason: FinishReason | None) -> None:
        """End a sequence with an outcome; without a reason it was cancelled."""
        try:
            sequence.request.stopper.close()
        except Exception as err:  # as in _take
            self._fail_text(sequence, err)
            return
        self._free(sequence)
        sequence.future.set_result(_outcome(sequence, reason, self._clock()))

    def _fail_text(self, sequence: _Sequence, cause: Exception) -> None:
        logger.error("stopper_failed error=%s", type(cause).__name__, exc_info=cause)
        self._fail(sequence, GenerationError("the text could not be put together"), cause)

    def _fail(self, sequence: _Sequence, error: CodeherdError, cause: BaseException | None = None) -> None:
        self._free(sequence)
        error.__cause__ = cause
        sequence.future.set_exception(error)

    def _free(self, sequence: _Sequence) -> None:
        """Forget a sequence and give back its slot, if it has one."""
        with self._wake:
            self._open.pop(sequence, None)
        if self._prefilling is sequence:
            self._prefilling = None
        slot = self._slot_of.pop(sequence, None)
        if slot is None:
            return
        if self._decoding.pop(slot, None) is not None:
            self._decoder.release(slot)
        self._free_slots.append(slot)

    def _drain(self) -> None:
        """Complete everything that is left as cancelled; nothing new can come in any more."""
        for sequence in list(self._open):
            sequence.request.cancel.cancel(CancelReason.DRAIN)
            self._complete(sequence, None)
        self._waiting.clear()

    def _fail_all(self, cause: BaseException) -> None:
        """Break: whatever state the device is in, nobody may wait for it."""
        logger.error("engine_broke error=%s", type(cause).__name__, exc_info=cause)
        with self._wake:
            self._failure = _failure(cause)
            self._waiting.clear()
            sequences, self._open = list(self._open), {}
        self._slot_of.clear()
        for sequence in sequences:
            # A new error for each: raising one adds to its traceback.
            if not sequence.future.done():
                sequence.future.set_exception(_failure(cause))


def _failure(cause: BaseException) -> CodeherdError:
    error: CodeherdError
    if is_out_of_memory(cause):
        error = OutOfMemory("the device ran out of memory in a step")
    else:
        error = EngineFailed(f"a step failed with {type(cause).__name__}")
    error.__cause__ = cause
    return error


def _outcome(sequence: _Sequence, reason: FinishReason | None, now: float) -> SequenceOutcome:
    request = sequence.request
    admitted_at = now if sequence.admitted_at is None else sequence.admitted_at
    decoding_at = now if sequence.decoding_at is None else sequence.decoding_at
    return SequenceOutcome(
        text=request.stopper.text,
        token_ids=tuple(request.stopper.token_ids),
        finish_reason=reason,
        cancelled=request.cancel.reason if reason is None else None,
        stop_string=request.stopper.stop_string,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=len(request.stopper.token_ids),
        queue_s=admitted_at - sequence.submitted_at,
        prefill_s=decoding_at - admitted_at,
        decode_s=now - decoding_at,
    )


def _is_cancelled(request: SequenceRequest, now: float) -> bool:
    if request.deadline is not None and now >= request.deadline:
        request.cancel.cancel(CancelReason.DEADLINE)
    return request.cancel.reason is not None


def _facts(model: LlamaForCausalLM, decoder: SlotDecoder, settings: EngineSettings) -> dict[str, str | int]:
    device = decoder.device
    is_cuda = device.type == "cuda"
    facts: dict[str, str | int] = {name: importlib.metadata.version(name) for name in _KERNEL_PACKAGES}
    facts |= {
        "quantization": quantization_of(model),
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "slots": settings.slots,
        "rows": decoder.rows,
        "max_len": settings.max_len,
        "prefill_chunk": decoder.prefill_chunk,
    }
    if not is_cuda:
        # CPU kernels differ by instruction set, and share rows among threads.
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = torch.get_num_threads()
    return facts


def _digest(facts: dict[str, str | int]) -> str:
    text = "\n".join(f"{name}={value}" for name, value in sorted(facts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_LENGTH]
