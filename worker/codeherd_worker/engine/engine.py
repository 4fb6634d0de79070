"""Generate for many sequences at once: the one thread that may touch the model, and who waits for it.

Owns: the thread, what other threads may call, futures, and the facts that a text's bytes depend on. Does
not know who gets a slot when (`scheduler.py`), tensors (`decode.py`), or anything of queues, tables,
processes and requests: token ids come in, text and token ids go out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import LlamaForCausalLM

from codeherd_schema.errors import (
    CodeherdError,
    EngineFailed,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
    PromptTooLong,
)
from codeherd_worker.engine.compute_thread import ComputeThread
from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.drafts import PromptLookup
from codeherd_worker.engine.faults import is_out_of_memory, is_sticky
from codeherd_worker.engine.loading import quantization_of
from codeherd_worker.engine.passes import Shapes
from codeherd_worker.engine.probes import RowChecks
from codeherd_worker.engine.scheduler import Ended, Scheduler
from codeherd_worker.engine.sequences import Sequence, SequenceOutcome, SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stats import EngineStats, SlotView
from codeherd_worker.engine.stopping import CancelReason

logger = logging.getLogger(__name__)

#: Hexadecimal digits of a fingerprint.
_FINGERPRINT_LENGTH = 16
#: Packages whose version decides which kernels run.
_KERNEL_PACKAGES = ("torch", "transformers", "bitsandbytes")
#: Packages whose version decides how a CPU's loops are compiled.
_COMPILERS = ("numba", "llvmlite")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The size of an engine; fixed for its life."""

    #: How many slots of which length, shortest first.
    classes: tuple[SlotClass, ...]
    #: Tokens of prompts that are computed between two decode steps, at most.
    prefill_chunk: int = 256
    #: Copy a prompt's beginning from a slot that has computed the same tokens.
    reuse_prefixes: bool = True
    #: Tokens that are guessed from the prompt and tried in one step; 0 is off.
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.classes:
            raise InvalidSetting("an engine needs at least one slot")
        lengths = [part.length for part in self.classes]
        if sorted(set(lengths)) != lengths:
            raise InvalidSetting(f"slot lengths are {lengths}, must ascend")
        if self.prefill_chunk < 1:
            raise InvalidSetting(f"prefill_chunk is {self.prefill_chunk}, must be at least 1")
        if self.draft_tokens < 0:
            raise InvalidSetting(f"draft_tokens is {self.draft_tokens}, must be 0 or more")

    @classmethod
    def uniform(
        cls,
        *,
        slots: int,
        max_len: int,
        prefill_chunk: int = 256,
        reuse_prefixes: bool = True,
        draft_tokens: int = 0,
    ) -> Self:
        """Return the settings of an engine whose slots all hold `max_len` tokens."""
        return cls((SlotClass(max_len, slots),), prefill_chunk, reuse_prefixes, draft_tokens)

    @property
    def slots(self) -> int:
        """Sequences that decode together."""
        return sum(part.slots for part in self.classes)

    @property
    def max_len(self) -> int:
        """Tokens of the longest slot, prompt and new ones."""
        return self.classes[-1].length


class Engine:
    """A model, its slots and the thread that runs them.

    `submit`, `stats` and `views` may be called from any thread; `warm_up` only before `start`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        settings: EngineSettings,
        *,
        thread: ComputeThread | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocate all memory that the engine will ever need.

        Args:
            model: loaded, in eval mode; nobody else may call it while the engine lives.
            settings: the size.
            thread: on which to decode, the one that loaded the model if it is to be fast on a CPU; ended by
                whoever made it. None: one of the engine's own.
            clock: seconds, monotonic.

        Raises:
            InvalidSetting: a slot is longer than the model has positions for.
            ModelFilesInvalid: the model's rotary angles change with the length of a sequence.
            OutOfMemory: the cache does not fit; use fewer slots or shorter ones.
        """
        positions = model.config.max_position_embeddings
        if settings.max_len > positions:
            raise InvalidSetting(
                f"max_len is {settings.max_len}, the model has {positions} positions",
                hint=f"set max_len to {positions} or less",
            )
        self._settings = settings
        self._clock = clock
        self._model = model
        try:
            self._decoder = SlotDecoder(
                model,
                classes=settings.classes,
                prefill_chunk=min(settings.prefill_chunk, settings.max_len),
                draft_tokens=settings.draft_tokens,
            )
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            raise OutOfMemory(
                f"no memory for {settings.slots} slots of up to {settings.max_len} tokens",
                hint="use fewer slots, a smaller max_len or a stronger quantization",
            ) from err
        #: What the produced bytes depend on beside weights and request; settled by `warm_up`.
        self.facts = _facts(model, self._decoder, settings)
        #: A short stable hash of `facts`.
        self.fingerprint = _digest(self.facts)
        self._thread, self._owns_thread = thread, thread is None
        self._loop: Future[None] | None = None
        # Guards what other threads touch: the next four.
        self._wake = threading.Condition()
        self._arrived: list[Sequence] = []
        # Every sequence without an outcome, in order of arrival: nobody may wait for ever.
        self._open: dict[Sequence, None] = {}
        self._is_closing = False
        self._failure: CodeherdError | None = None
        # Touched by the engine thread alone; `stats` reads sizes. Made anew by `warm_up`, which may find
        # that fewer shapes are sound.
        self._scheduler = self._new_scheduler()
        self._busy_s = 0.0
        self._last_step_at = clock()

    @property
    def broken(self) -> bool:
        """Whether a pass of the model failed; nothing can be submitted any more."""
        return self._failure is not None

    @property
    def shapes(self) -> Shapes:
        """The shapes of passes and steps; settled by `warm_up`."""
        return self._decoder.passes.shapes

    def warm_up(self) -> RowChecks:
        """Run every shape once, so that the first sequence pays for nothing; before `start`."""
        checks = self._decoder.warm_up()
        self._scheduler = self._new_scheduler()
        # What is known of versions and devices does not say how they compute; what they computed does.
        self.facts = _facts(self._model, self._decoder, self._settings) | {"bits": checks.bits}
        self.fingerprint = _digest(self.facts)
        return checks

    def start(self) -> None:
        """Start to decode."""
        if self._thread is None:
            self._thread = ComputeThread()
        self._loop = self._thread.submit(self._run)

    def close(self) -> None:
        """Cancel what is left with `DRAIN`, complete its futures, and decode no more."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._loop is None:
            self._drain()
            return
        self._loop.result()
        if self._thread is not None and self._owns_thread:
            self._thread.close()

    def submit(self, request: SequenceRequest) -> Future[SequenceOutcome]:
        """Put a sequence in line.

        The future cannot be cancelled; use the request's `CancelToken`.

        Raises:
            PromptTooLong: never retry; shorten the prompt or `max_new_tokens`.
            InvalidRequest: the prompt is empty or holds ids that the model does not have.
            EngineFailed: the engine broke or is closed; another process has to take over.
        """
        self._check(request)
        lookup = PromptLookup(request.prompt_ids) if self._settings.draft_tokens else None
        sequence = Sequence(request, submitted_at=self._clock(), lookup=lookup)
        sequence.future.set_running_or_notify_cancel()
        with self._wake:
            if self._failure is not None:
                raise EngineFailed(f"the engine broke: {self._failure}") from self._failure
            if self._is_closing:
                raise EngineFailed("the engine is closed")
            if not self._open:
                # Before anybody can see that there is work: how long it was idle is nobody's fault.
                self._last_step_at = sequence.submitted_at
            self._arrived.append(sequence)
            self._open[sequence] = None
            self._wake.notify()
        return sequence.future

    def stats(self) -> EngineStats:
        """Return how busy the engine is, and what it did since the start."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            slots=self._settings.slots,
            active=len(scheduler.running),
            waiting=len(self._arrived) + scheduler.waiting,
            steps=counters.steps,
            passes=counters.passes,
            tokens=counters.tokens,
            prompt_tokens=counters.prompt_tokens,
            reused_tokens=counters.reused_tokens,
            drafted=counters.drafted,
            accepted=counters.accepted,
            busy_s=self._busy_s,
            cache_bytes=self._decoder.cache.cache_bytes,
            last_step_at=self._last_step_at,
        )

    def views(self) -> list[SlotView]:
        """Return all slots, shortest class first; a moment's picture, taken without stopping anything."""
        running = dict(self._scheduler.running)
        return [
            _view(slot, part.length, running.get(slot))
            for part, slots in zip(self._settings.classes, self._decoder.slots_of_class, strict=True)
            for slot in slots
        ]

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self._decoder,
            self._settings.classes,
            reuse_prefixes=self._settings.reuse_prefixes,
            clock=self._clock,
            on_pass=self._on_pass,
        )

    def _on_pass(self) -> None:
        self._last_step_at = self._clock()

    def _check(self, request: SequenceRequest) -> None:
        prompt_ids = request.prompt_ids
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens")
        # An id outside the embedding is a device-side assert on CUDA, which kills the process.
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._decoder.vocab_size:
            raise InvalidRequest(f"a token id is not in [0, {self._decoder.vocab_size})")
        new, room = request.stopper.max_new_tokens, self._settings.max_len
        if request.need > room:
            raise PromptTooLong(
                f"prompt has {len(prompt_ids)} tokens and asks for {new} more, a slot holds {room}"
            )

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    started = self._clock()
                    for ended in self._scheduler.turn():
                        self._complete(ended)
                    self._busy_s += self._clock() - started
            self._drain()
        except BaseException as err:  # whatever it is, somebody waits for the futures
            self._fail_all(err)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine is to close."""
        with self._wake:
            while not (self._is_closing or self._arrived or self._scheduler.has_work):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            is_closing = self._is_closing
        for sequence in arrived:
            self._scheduler.add(sequence)
        return not is_closing

    def _complete(self, ended: Ended) -> None:
        sequence = ended.sequence
        with self._wake:
            self._open.pop(sequence, None)
        if ended.error is not None:
            sequence.future.set_exception(ended.error)
        else:
            sequence.future.set_result(sequence.outcome(ended.reason, self._clock()))

    def _drain(self) -> None:
        """Complete everything that is left as cancelled; nothing new can come in any more."""
        for sequence in self._arrived:
            self._scheduler.add(sequence)
        self._arrived = []
        for ended in self._scheduler.end_all(CancelReason.DRAIN):
            self._complete(ended)

    def _fail_all(self, cause: BaseException) -> None:
        """Break: whatever state the device is in, nobody may wait for it."""
        logger.error(
            "engine_broke error=%s sticky=%s", type(cause).__name__, is_sticky(cause), exc_info=cause
        )
        with self._wake:
            self._failure = _failure(cause)
            self._arrived = []
            sequences, self._open = list(self._open), {}
        self._scheduler = self._new_scheduler()
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


def _view(slot: int, length: int, sequence: Sequence | None) -> SlotView:
    if sequence is None:
        return SlotView(slot, length, None, 0, 0, 0, 0)
    request = sequence.request
    return SlotView(
        slot=slot,
        length=length,
        name=request.name,
        prompt_tokens=len(request.prompt_ids),
        reused_tokens=sequence.reused,
        prefilled_tokens=sequence.prefilled,
        new_tokens=len(request.stopper.token_ids),
    )


def _facts(model: LlamaForCausalLM, decoder: SlotDecoder, settings: EngineSettings) -> dict[str, str | int]:
    device = decoder.device
    is_cuda = device.type == "cuda"
    facts: dict[str, str | int] = {name: importlib.metadata.version(name) for name in _KERNEL_PACKAGES}
    facts |= {
        "quantization": quantization_of(model),
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "slots": " ".join(f"{part.slots}x{part.length}" for part in settings.classes),
        **decoder.facts,
    }
    if is_cuda:
        facts["cuda"] = str(torch.version.cuda)
    else:
        # CPU kernels differ by instruction set, and share rows among threads.
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = torch.get_num_threads()
        facts |= {name: importlib.metadata.version(name) for name in _COMPILERS}
        if decoder.passes.has_loops:
            # Imported here: a GPU's worker needs no compiler.
            from codeherd_worker.engine.compiled import SOURCES_DIGEST

            facts["loops"] = SOURCES_DIGEST
    return facts


def _cpu_name() -> str:
    """Return what the processor calls itself: libraries choose kernels by maker and model too."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _digest(facts: dict[str, str | int]) -> str:
    text = "\n".join(f"{name}={value}" for name, value in sorted(facts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_LENGTH]
