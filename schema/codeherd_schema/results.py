"""What a finished job gives back.

Owns: the result's fields and their units. Does not know where results are kept
(`codeherd_schema.store`) or how text is made (`codeherd_worker`).
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime

from codeherd_schema.requests import Frozen


class FinishReason(StrEnum):
    """Why a candidate ended."""

    #: The model ended by itself: EOS, EOT of an infilling, or `<step>` of the 70B chat format.
    EOS = "eos"
    #: A stop string was met; it is not part of the text.
    STOP = "stop"
    #: `max_new_tokens` were generated.
    LENGTH = "length"


class LikelyToken(Frozen):
    """A token and how likely the model found it."""

    token_id: int
    #: As the vocabulary writes it: `▁` for a space, `<0x0A>` for a byte; empty for an id without a piece.
    piece: str
    #: The bytes that it adds to a text, in hexadecimal: a character may be spread over several tokens.
    text_hex: str
    #: Natural logarithm of the model's own probability, before penalty, temperature and filters;
    #: -9999 stands for anything below.
    logprob: float

    @property
    def text_bytes(self) -> bytes:
        """The bytes that it adds to a text; none for a control token."""
        return bytes.fromhex(self.text_hex)


class TokenLogprob(LikelyToken):
    """One token of a candidate, and the likeliest ones in its place."""

    #: As many as were asked for, likeliest first; the token itself may be among them.
    top: tuple[LikelyToken, ...]


class Candidate(Frozen):
    """One generated text."""

    index: int
    text: str
    finish_reason: FinishReason
    completion_tokens: int
    #: Which stop string ended it.
    stop_string: str | None = None
    #: The seed that gives this text again.
    seed: int
    #: One for each of the `completion_tokens`, those of a stop string included; None if not asked for.
    #: Their joined bytes are the text but for a first space that belongs to the encoding, line ends that
    #: follow the prompt's, and what stood from the stop string on.
    logprobs: tuple[TokenLogprob, ...] | None = None


class Cut(Frozen):
    """What truncation took away from one part of the prompt."""

    #: `prompt`, `prefix`, `suffix` or `messages`.
    part: str
    #: Tokens (turns for `messages`) that the model did not see, and how many the part had.
    removed: int
    total: int


class Timings(Frozen):
    """Where the time of the last attempt went, in seconds."""

    #: From being due until the claim.
    queue_s: float
    #: From the claim until the first prefill.
    admit_s: float
    prefill_s: float
    decode_s: float
    #: From the claim until just before the commit.
    total_s: float


class Result(Frozen):
    """The one committed answer of a job, with what is needed to get it again."""

    job_id: str
    attempt: int
    candidates: tuple[Candidate, ...]
    prompt_tokens: int
    completion_tokens: int
    cut: tuple[Cut, ...] = ()
    model: str
    #: Identifies the weights: a hub commit, or a hash of the files.
    model_revision: str
    #: How the weights are held: `nf4`, `int8`, `none`, `bf16`, …, or the format they were stored in.
    quantization: str
    #: Identifies what else the bytes depend on: versions, device, slots, shapes, and how it all computes.
    engine_fingerprint: str
    worker_id: str
    timings: Timings
    created_at: AwareDatetime

    @property
    def text(self) -> str:
        """The first candidate's text."""
        return self.candidates[0].text
