"""What a producer may ask for: frozen requests that are valid from birth.

Owns: the job kinds, their fields, ranges and defaults, the fill marker, the content hash.
Does not know: which model can do what (`codeherd_schema.models`), token counts (only the model's
own tokenizer does), or rows. A value that passes here can be stored and read back unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from codeherd_schema.errors import FillMarkerError, InvalidRequest

#: Marks the hole in a text, as on the Code Llama model page.
FILL_MARKER = "<FILL_ME>"
#: Version of the payload that is stored with a job; a worker refuses a newer one than its own.
SCHEMA_VERSION: Final = 1
#: Characters of prompt text in one request: a bound on rows, far above any context window.
MAX_TEXT = 4_000_000

#: A moment with its time zone, or a duration counted from the database's clock at submit.
Moment = AwareDatetime | timedelta
#: A name for people and filters: no spaces, no control characters.
Word = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:/@+-]+$")]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
#: Kept as it is in a text column, where PostgreSQL has no room for NUL.
Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
ShortText = Annotated[str, StringConstraints(max_length=512)]


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("is empty, and every text begins with nothing: leave it out")
    return text


StopString = Annotated[str, StringConstraints(max_length=256), AfterValidator(_not_empty)]


class JobKind(StrEnum):
    """What kind of text a job asks for."""

    GENERATE = "generate"
    INFILL = "infill"
    CHAT = "chat"


class Overflow(StrEnum):
    """What to do with a prompt that does not fit the context window."""

    REFUSE = "refuse"
    #: Keep what is nearest to the hole (or the end), and say in the result what was cut.
    TRUNCATE = "truncate"


class Frozen(BaseModel):
    """A value that cannot change and has no unknown fields."""

    # Errors leave the input out: it may be a prompt, and a trace may be logged.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Sampling(Frozen):
    """How the next token is chosen and when to stop."""

    #: Most new tokens per candidate.
    max_new_tokens: int = Field(default=256, ge=1, le=100_000)
    #: 0 is greedy; else the divisor of the logits, [0, 2].
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    #: Smallest set of tokens whose probability reaches this, (0, 1]; 1 keeps all.
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    #: Keep this many of the likeliest tokens; 0 keeps all.
    top_k: int = Field(default=0, ge=0, le=32_016)
    #: Keep tokens at least this fraction as likely as the likeliest, [0, 1]; 0 keeps all.
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    #: Divides the logits of tokens already seen, [1, 2]; 1 is off.
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=2.0)
    #: Generation ends before the first of these strings.
    stop: tuple[StopString, ...] = Field(default=(), max_length=16)
    #: Same request and seed, same text. Left out: derived from the job id, and told in the result.
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    #: Candidates, each with its own seed derived from `seed`.
    n: int = Field(default=1, ge=1, le=16)
    #: Report the log-probability of each token and of this many of the likeliest in its place, [0, 5];
    #: 0 reports nothing. They are the model's own, before the repetition penalty, the temperature and the
    #: filters. A result grows by about 600 bytes a token with 5.
    logprobs: int = Field(default=0, ge=0, le=5)


class JobOptions(Frozen):
    """What every kind of job has beside its text."""

    #: A name from the model table, such as `codellama-7b` or `tiny`.
    model: Word = "tiny"
    sampling: Sampling = Sampling()
    overflow: Overflow = Overflow.REFUSE
    #: 0 runs first, 9 last.
    priority: int = Field(default=5, ge=0, le=9)
    #: Not started before this.
    run_at: Moment | None = None
    #: Not started after this.
    expires_at: Moment | None = None
    #: Stopped if not finished by this.
    deadline: Moment | None = None
    #: Same key and same request give the same job; same key and another request are refused.
    idempotency_key: Key | None = None
    #: For filters: `codeherd ls --label team=docs`.
    labels: dict[Word, ShortText] = Field(default_factory=dict, max_length=16)
    #: Kept and given back, never looked at.
    metadata: dict[Word, ShortText] = Field(default_factory=dict, max_length=16)
    schema_version: Literal[1] = SCHEMA_VERSION

    def content_sha256(self) -> str:
        """Hash everything that makes two requests the same, for idempotent submits."""
        content = self.model_dump(mode="json", exclude={"idempotency_key"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @field_validator("run_at", "expires_at", "deadline")
    @classmethod
    def _not_in_the_past(cls, moment: Moment | None) -> Moment | None:
        # An absolute moment is judged by the database's clock at submit, not by this machine's.
        if isinstance(moment, timedelta) and moment < timedelta(0):
            raise ValueError("a duration must not be negative")
        return moment


class GenerateRequest(JobOptions):
    """Continue a text."""

    kind: Literal[JobKind.GENERATE] = JobKind.GENERATE
    prompt: Text


class InfillRequest(JobOptions):
    """Fill the hole between a prefix and a suffix; either may be empty."""

    kind: Literal[JobKind.INFILL] = JobKind.INFILL
    prefix: Text
    suffix: Text
    #: Suffix-prefix-middle order instead of prefix-suffix-middle (paper, section 2.3).
    suffix_first: bool = False

    @classmethod
    def from_text(cls, text: str, *, marker: str = FILL_MARKER, **options: Any) -> Self:
        """Split `text` at its one fill marker.

        Raises:
            FillMarkerError: there is no marker, or more than one.
            InvalidRequest: any other field is wrong.
        """
        found = text.count(marker) if marker else 0
        if found != 1:
            raise FillMarkerError(
                f"the text holds {found} fill markers `{marker}`, it must hold exactly one",
                hint="give the two sides of the hole apart, as prefix and suffix, or choose another marker",
            )
        prefix, suffix = text.split(marker)
        try:
            return cls(prefix=prefix, suffix=suffix, **options)
        except ValidationError as err:
            raise InvalidRequest(first_fault(err)) from err


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(JobOptions):
    """Answer the last user turn; Instruct models only."""

    kind: Literal[JobKind.CHAT] = JobKind.CHAT
    messages: tuple[Message, ...] = Field(min_length=1, max_length=256)

    @model_validator(mode="after")
    def _turns_alternate(self) -> Self:
        # Meta's dialog format has no other shape: (system)? (user assistant)* user.
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
        if turns != expected or not turns or turns[-1] != "user":
            raise ValueError("turns must be: system (optional), user, assistant, ..., user")
        return self


Request = GenerateRequest | InfillRequest | ChatRequest
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])


def parse_request(data: object) -> Request:
    """Turn decoded JSON (or a dict from a row) into a request.

    Raises:
        InvalidRequest: names the first wrong field; never retry unchanged.
    """
    try:
        return _REQUEST.validate_python(data, strict=False)
    except ValidationError as err:
        raise InvalidRequest(first_fault(err, skip=1)) from err


def dump_request(request: Request) -> dict[str, Any]:
    """Return the JSON-ready form that `parse_request` reads back to an equal request."""
    return request.model_dump(mode="json")


def first_fault(err: ValidationError, *, skip: int = 0) -> str:
    """Say the first fault of a validation in one line, without the offending text.

    Args:
        err: what pydantic raised.
        skip: leading parts of the place that the sender never wrote, such as a union's tag.
    """
    fault = err.errors(include_url=False, include_input=False)[0]
    place = ".".join(_place_part(part) for part in fault["loc"][skip:]) or "request"
    if fault["type"] == "union_tag_invalid":
        # Pydantic's own message repeats the tag that was sent.
        return f"`kind`: must be one of {', '.join(JobKind)}"
    reason = fault["msg"].removeprefix("Value error, ")
    more = err.error_count() - 1
    return f"`{place}`: {reason[:1].lower()}{reason[1:]}" + (f" (and {more} more)" if more else "")


def _place_part(part: int | str) -> str:
    # A key of a mapping, or an unknown field's name, is the sender's own text.
    return str(part) if re.fullmatch(r"[A-Za-z0-9_.:/@+\[\]-]{1,64}", str(part)) else "..."
