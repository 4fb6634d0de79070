"""What goes into an engine, what comes out, and a sequence on its way between.

Owns: the fields and their units. Does not know what is done with them (`scheduler.py`).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from codeherd_worker.engine.drafts import PromptLookup
from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper


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
    #: Whose sequence it is, for people who look at the engine: a job's id.
    name: str = ""

    @property
    def need(self) -> int:
        """Tokens that its slot must hold."""
        return len(self.prompt_ids) + self.stopper.max_new_tokens


@dataclass(frozen=True, slots=True)
class SequenceOutcome:
    """What came of a sequence that did not fail."""

    text: str
    token_ids: tuple[int, ...]
    #: One per token id if the request asked for them, else none.
    logprobs: tuple[TokenLogprobs, ...]
    #: None when cancelled.
    finish_reason: FinishReason | None
    #: None when it ended by its own rules.
    cancelled: CancelReason | None
    stop_string: str | None
    prompt_tokens: int
    #: Prompt tokens whose keys and values were copied instead of computed.
    reused_tokens: int
    #: Tokens in `token_ids`: a stop id does not count.
    completion_tokens: int
    #: From `submit` to the slot.
    queue_s: float
    #: From the slot to the first token.
    prefill_s: float
    #: From the first token to the end.
    decode_s: float


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence from `submit` to its outcome."""

    request: SequenceRequest
    submitted_at: float
    lookup: PromptLookup | None = None
    future: Future[SequenceOutcome] = field(default_factory=Future)
    slot: int | None = None
    #: Prompt tokens whose keys and values are in the slot, copied ones too.
    prefilled: int = 0
    reused: int = 0
    #: Whether the last token that came of it was a number; not before there was one.
    is_sound: bool = False
    #: New tokens that were asked from the device.
    launched: int = 0
    admitted_at: float | None = None
    decoding_at: float | None = None

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt was sent to the device."""
        return self.prefilled >= len(self.request.prompt_ids)

    def outcome(self, reason: FinishReason | None, now: float) -> SequenceOutcome:
        """Return what came of it; without a reason it was cancelled."""
        request, stopper = self.request, self.request.stopper
        admitted_at = now if self.admitted_at is None else self.admitted_at
        decoding_at = now if self.decoding_at is None else self.decoding_at
        return SequenceOutcome(
            text=stopper.text,
            token_ids=tuple(stopper.token_ids),
            logprobs=tuple(stopper.logprobs),
            finish_reason=reason,
            cancelled=request.cancel.reason if reason is None else None,
            stop_string=stopper.stop_string,
            prompt_tokens=len(request.prompt_ids),
            reused_tokens=self.reused,
            completion_tokens=len(stopper.token_ids),
            queue_s=admitted_at - self.submitted_at,
            prefill_s=decoding_at - admitted_at,
            decode_s=now - decoding_at,
        )
