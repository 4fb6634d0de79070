"""Who gets a slot, what runs next, and what came of it: one turn of the engine at a time.

Owns: the waiting line, the slots, prefixes that can be reused, and each sequence's way through them. Does
not know threads, locks or futures (`engine.py`), tensors (`decode.py`), sampling rules (`sampling.py`) or
stop rules (`stopping.py`).

A sequence's life, each arrow taken between two passes of the model:
    waiting -> prefilling      a slot of its length is free; priority, then arrival, grouped by prefix
    prefilling -> decoding     its last granule is done, and the first token did not end it
    any -> ended               stopped, cancelled, past its deadline, or failed

A turn: end what was cancelled, admit, prefill at most one chunk, decode one step, read what is ready. One
chunk is therefore the most that the decoding sequences wait for new ones.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

from codeherd_schema.errors import CodeherdError, GenerationError, OutOfMemory
from codeherd_worker.engine.admission import WaitingLine
from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.faults import is_out_of_memory, release_memory
from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.prefixes import Match, PrefixIndex
from codeherd_worker.engine.sequences import Sequence
from codeherd_worker.engine.slot_classes import SlotClass, length_class, place
from codeherd_worker.engine.stopping import CancelReason, FinishReason
from codeherd_worker.engine.tokens import Pending, Token

logger = logging.getLogger(__name__)

#: Waiting sequences per slot that are looked at for a shared prefix.
_WINDOW_PER_SLOT = 2
#: Turns after which a long waiting line is looked through for sequences that were cancelled.
_LOOK_THROUGH_EVERY = 32
#: Rows with drafts that a CPU multiplies in the time of one: below this, weights are what it waits for.
_CPU_DRAFT_ROWS = 16


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that needs the scheduler no more."""

    sequence: Sequence
    #: Why, by its own rules; None if cancelled or failed.
    reason: FinishReason | None = None
    error: CodeherdError | None = None


@dataclass(slots=True)
class Counters:
    """What was done since the start."""

    steps: int = 0
    passes: int = 0
    #: New tokens.
    tokens: int = 0
    #: Prompt tokens of admitted sequences, and how many of them were copied instead of computed.
    prompt_tokens: int = 0
    reused_tokens: int = 0
    #: Guessed tokens that were tried, and how many of them were right.
    drafted: int = 0
    accepted: int = 0


class Scheduler:
    """The sequences of one engine; used by one thread."""

    def __init__(
        self,
        decoder: SlotDecoder,
        classes: Many[SlotClass],
        *,
        reuse_prefixes: bool,
        clock: Callable[[], float],
        on_pass: Callable[[], None],
    ) -> None:
        """Start with free slots.

        Args:
            decoder: warmed up.
            classes: its slots.
            reuse_prefixes: copy what another slot has computed.
            clock: seconds, monotonic.
            on_pass: called when a pass of the model begins or ends.
        """
        self._decoder, self._classes = decoder, classes
        self._reuse, self._clock, self._on_pass = reuse_prefixes, clock, on_pass
        slots = sum(part.slots for part in classes)
        self.counters = Counters()
        self._line: WaitingLine[Sequence] = WaitingLine(_WINDOW_PER_SLOT * slots)
        # Class -> its free slots, the longest unused first.
        self._free = {number: list(part) for number, part in enumerate(decoder.slots_of_class)}
        self._class_of = {slot: number for number, part in self._free.items() for slot in part}
        #: In a slot, by slot.
        self.running: dict[int, Sequence] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._decoding: dict[int, Sequence] = {}
        # What slots hold, and what those that prefill are going to hold.
        self._held, self._planned = PrefixIndex(decoder.granule), PrefixIndex(decoder.granule)
        self._pending: deque[tuple[Pending, Mapping[int, Sequence]]] = deque()
        # The host reads a GPU's tokens one step late, so that neither waits for the other. Drafts are made
        # from the last token, so they cannot wait.
        self._lag = int(decoder.device.type == "cuda" and not decoder.draft_tokens)
        self._ended: list[Ended] = []
        self._turns = 0

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._line)

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._line or self.running or self._pending)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line; some class holds it."""
        request = sequence.request
        number = length_class(request.need, self._classes)
        self._line.push(sequence, priority=request.priority, length_class=number or 0)

    def turn(self) -> list[Ended]:
        """Do what is next; return what ended."""
        self._end_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        # Once nothing is live no further step comes, after which the last one would be read.
        lag = self._lag if self._decoder.is_live else 0
        while len(self._pending) > lag:
            self._collect()
        ended, self._ended = self._ended, []
        return ended

    def end_all(self, reason: CancelReason) -> list[Ended]:
        """Cancel everything that is left."""
        for sequence in [*self.running.values(), *self._line]:
            sequence.request.cancel.cancel(reason)
        self._turns = -1  # look through the whole line
        self._end_cancelled()
        self._pending.clear()
        ended, self._ended = self._ended, []
        return ended

    def _end_cancelled(self) -> None:
        now = self._clock()
        for sequence in list(self.running.values()):
            if _is_cancelled(sequence, now):
                self._complete(sequence, None)
        self._turns += 1
        is_long = len(self._line) > _LOOK_THROUGH_EVERY
        if is_long and self._turns % _LOOK_THROUGH_EVERY and self.running:
            return
        gone = [sequence for sequence in self._line if _is_cancelled(sequence, now)]
        self._line.remove(gone)
        for sequence in gone:
            self._complete(sequence, None)

    def _admit(self) -> None:
        while any(self._free.values()) and self._line:
            sequence = self._line.take(self._savings, room=self._room)
            if sequence is None:
                return
            self._place(sequence)

    def _room(self, sequence: Sequence) -> int | None:
        return place(sequence.request.need, self._classes, self._free)

    def _savings(self, sequence: Sequence) -> int | None:
        """Return how many prompt tokens could be copied now; None while more are being computed."""
        match = self._longest(self._held, sequence)
        length = match.length if match else 0
        coming = self._longest(self._planned, sequence)
        if coming is not None and coming.length > length:
            return None
        return length

    def _longest(
        self, index: PrefixIndex, sequence: Sequence, among: Collection[int] | None = None
    ) -> Match | None:
        if not self._reuse:
            return None
        prompt_ids = sequence.request.prompt_ids
        # The last token is computed in any case: it is where the first new one comes from.
        return index.longest(prompt_ids, limit=len(prompt_ids) - 1, among=among)

    def _place(self, sequence: Sequence) -> None:
        request = sequence.request
        number = place(request.need, self._classes, self._free)
        if number is None:  # `take` asked the same a moment ago
            raise AssertionError("a sequence was admitted without a slot")
        free = self._free[number]
        match = self._longest(self._held, sequence)
        own = self._longest(self._held, sequence, among=free)
        if match is not None and own is not None and own.length == match.length:
            match = own
            slot = own.slot
        else:
            # A slot that holds nothing, else the one whose prefix was left alone for longest.
            slot = next((slot for slot in free if not self._held.held(slot)), free[0])
        free.remove(slot)
        length = 0
        if match is not None:
            length = match.length
            self._decoder.copy_prefix(match.slot, slot, length)
        self._hold(slot, sequence, length)
        if self._reuse:
            self._planned.hold(slot, request.prompt_ids)
        sequence.slot, sequence.prefilled, sequence.reused = slot, length, length
        sequence.admitted_at = self._clock()
        self.counters.prompt_tokens += len(request.prompt_ids)
        self.counters.reused_tokens += length
        self.running[slot] = sequence
        self._prefilling[sequence] = None

    def _hold(self, slot: int, sequence: Sequence, length: int) -> None:
        if self._reuse:
            self._held.hold(slot, sequence.request.prompt_ids, length=length)

    def _prefill(self) -> None:
        pieces, chosen = self._pieces()
        if not pieces:
            return
        for sequence, piece in zip(chosen, pieces, strict=True):
            if piece.ends:
                # Not earlier: a row that waits for its prompt would learn the tokens of idle steps.
                request = sequence.request
                self._decoder.assign(piece.slot, request.sampling, request.prompt_ids)
        self._on_pass()
        try:
            pending = self._decoder.prefill(pieces)
        except Exception as err:
            self._survive(err, chosen)
            return
        self._on_pass()
        self.counters.passes += 1
        started: dict[int, Sequence] = {}
        for sequence, piece in zip(chosen, pieces, strict=True):
            sequence.prefilled += len(piece.token_ids)
            self._hold(
                piece.slot, sequence, sequence.prefilled // self._decoder.granule * self._decoder.granule
            )
            if piece.ends:
                del self._prefilling[sequence]
                self._planned.drop(piece.slot)
                sequence.launched = 1
                started[piece.slot] = sequence
        self._decoding |= started
        if pending is not None:
            self._pending.append((pending, started))
            # Without lag nobody decodes on before its first token was looked at.
            if not self._lag:
                self._collect()

    def _pieces(self) -> tuple[list[Piece], list[Sequence]]:
        """Fill a pass: best priority first, then who has its slot for longest."""
        decoder = self._decoder
        granule, budget = decoder.granule, decoder.prefill_chunk
        pieces: list[Piece] = []
        chosen: list[Sequence] = []
        for sequence in sorted(self._prefilling, key=lambda sequence: sequence.request.priority):
            prompt_ids, start = sequence.request.prompt_ids, sequence.prefilled
            length = min(len(prompt_ids) - start, budget)
            slot = sequence.slot
            if slot is None:  # never: what prefills has a slot
                continue
            ends = start + length == len(prompt_ids)
            pieces.append(Piece(slot, prompt_ids[start : start + length], start, ends))
            chosen.append(sequence)
            budget -= -(-length // granule) * granule
            if budget < granule or not decoder.can_share_passes:
                break
        return pieces, chosen

    def _decode(self) -> None:
        if self._lag:
            self._rest_those_that_are_done()
        if not self._decoder.is_live:
            return
        drafts = self._drafts()
        self._on_pass()
        try:
            pending = self._decoder.step(drafts)
        except Exception as err:
            self._survive(err, list(self._decoding.values()))
            return
        self._on_pass()
        self.counters.steps += 1
        self.counters.drafted += sum(map(len, drafts.values()))
        for sequence in self._decoding.values():
            sequence.launched += 1
        self._pending.append((pending, dict(self._decoding)))

    def _rest_those_that_are_done(self) -> None:
        """Ask no more of sequences whose last token is on its way."""
        for slot, sequence in self._decoding.items():
            if sequence.launched >= sequence.request.stopper.max_new_tokens:
                self._decoder.rest(slot)

    def _drafts(self) -> dict[int, list[int]]:
        decoder = self._decoder
        if not decoder.draft_tokens:
            return {}
        width = 1 + decoder.draft_tokens
        if decoder.drafts_are_optional and len(self._decoding) * width > _CPU_DRAFT_ROWS:
            return {}
        drafts = {}
        for slot, sequence in self._decoding.items():
            stopper = sequence.request.stopper
            room = stopper.max_new_tokens - len(stopper.token_ids) - 1
            count = min(decoder.draft_tokens, room)
            if sequence.lookup is not None and count > 0:
                guesses = sequence.lookup.propose(count)
                if guesses:
                    drafts[slot] = guesses
        return drafts

    def _collect(self) -> None:
        pending, owners = self._pending.popleft()
        self._on_pass()
        tokens = pending.read()
        self._on_pass()
        now = self._clock()
        for slot, new in tokens.items():
            sequence = owners[slot]
            self.counters.accepted += len(new) - 1
            for token in new:
                # A step that was launched before its sequence ended has nothing more to say to it.
                if self._decoding.get(slot) is not sequence:
                    if token.id is None and slot not in self.running:
                        self._wipe(slot)
                    break
                if sequence.decoding_at is None:
                    sequence.decoding_at = now
                self._take(slot, sequence, token)

    def _take(self, slot: int, sequence: Sequence, token: Token) -> None:
        """Give a sequence its next token."""
        if token.id is None:
            sequence.is_sound = False
            self._fail(sequence, GenerationError("the model's logits are not finite"))
            return
        self.counters.tokens += 1
        sequence.is_sound = True
        if sequence.lookup is not None:
            sequence.lookup.extend((token.id,))
        try:
            reason = sequence.request.stopper.push(token.id, token.logprobs)
        except Exception as err:  # foreign code: its sequence fails, the others go on
            self._fail_text(sequence, err)
            return
        if reason is not None:
            self._complete(sequence, reason)

    def _complete(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """End a sequence with an outcome; without a reason it was cancelled."""
        try:
            sequence.request.stopper.close()
        except Exception as err:  # as in _take
            self._fail_text(sequence, err)
            return
        self._leave(sequence)
        self._ended.append(Ended(sequence, reason))

    def _fail_text(self, sequence: Sequence, cause: Exception) -> None:
        logger.error("stopper_failed error=%s", type(cause).__name__, exc_info=cause)
        error = GenerationError("the text could not be put together")
        error.__cause__ = cause
        self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: CodeherdError) -> None:
        self._leave(sequence)
        self._ended.append(Ended(sequence, error=error))

    def _survive(self, cause: Exception, involved: Many[Sequence]) -> None:
        """Fail those whose pass ran out of memory; anything else is for the engine to break on."""
        if not is_out_of_memory(cause):
            raise cause
        release_memory(cause)
        logger.error("pass_out_of_memory sequences=%d", len(involved))
        for sequence in involved:
            error = OutOfMemory("the device ran out of memory in a step")
            error.__cause__ = cause
            self._fail(sequence, error)

    def _leave(self, sequence: Sequence) -> None:
        """Give back a sequence's slot, if it has one; what it prefilled soundly can still be reused."""
        slot = sequence.slot
        if slot is None or self.running.get(slot) is not sequence:
            return
        del self.running[slot]
        self._prefilling.pop(sequence, None)
        self._decoding.pop(slot, None)
        self._planned.drop(slot)
        self._decoder.release(slot)
        if not sequence.is_sound and not self._decoder.cache.is_finite(slot):
            self._wipe(slot)
        self._free[self._class_of[slot]].append(slot)

    def _wipe(self, slot: int) -> None:
        """Forget what may hold numbers that are not finite: masked ones still spread."""
        self._decoder.wipe(slot)
        self._held.drop(slot)


def _is_cancelled(sequence: Sequence, now: float) -> bool:
    request = sequence.request
    if request.deadline is not None and now >= request.deadline:
        request.cancel.cancel(CancelReason.DEADLINE)
    return request.cancel.reason is not None
