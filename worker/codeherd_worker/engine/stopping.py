"""Decide after each token whether a sequence has ended, and hold what it has said so far.

Owns: stop ids, stop strings, the length limit, what of a text is certain before its end, and the word with
which someone else ends a sequence early. Does not know how ids become bytes (a `Detokenizer` is given) or
who generates the ids.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from codeherd_schema.errors import InvalidRequest
from codeherd_worker.engine.logprobs import TokenLogprobs


class FinishReason(StrEnum):
    """Why a sequence ended by its own rules."""

    #: The model said a stop token.
    EOS = "eos"
    #: The text reached a stop string.
    STOP = "stop"
    #: `max_new_tokens` were generated.
    LENGTH = "length"


class CancelReason(StrEnum):
    """Why a sequence was ended from outside."""

    #: Whoever submitted the job does not want it any more.
    USER = "user"
    #: The job's deadline passed.
    DEADLINE = "deadline"
    #: Another worker owns the job now.
    LEASE_LOST = "lease_lost"
    #: The worker is shutting down.
    DRAIN = "drain"
    #: The operator of the worker ended the task.
    OPERATOR = "operator"
    #: A sibling candidate of the same job failed.
    ABANDONED = "abandoned"


class Detokenizer(Protocol):
    """Turns token ids into text, one at a time."""

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is complete now, often none."""
        ...

    def finish(self) -> str:
        """Return the text of what was held back."""
        ...


class CancelToken:
    """Ends a sequence from another thread; the first reason wins."""

    __slots__ = ("_lock", "_reason")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: CancelReason | None = None

    def cancel(self, reason: CancelReason) -> None:
        """Ask for the end; takes effect before the next token."""
        with self._lock:
            if self._reason is None:
                self._reason = reason

    @property
    def reason(self) -> CancelReason | None:
        """The first reason given, None while nobody has cancelled."""
        return self._reason


class Stopper:
    """Takes a sequence's tokens one by one and says when it has ended.

    Attributes:
        text: the text so far, without stop id and stop string; "" without a detokenizer.
        token_ids: the ids so far, without the stop id; those that spelled a stop string are kept.
        logprobs: the log-probabilities of `token_ids` if they were pushed with each, else empty.
        stop_string: the stop string that ended the text.
        max_new_tokens: the most ids that `token_ids` can have.
    """

    def __init__(
        self,
        *,
        stop_ids: frozenset[int],
        stop_strings: tuple[str, ...],
        max_new_tokens: int,
        detokenizer: Detokenizer | None,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Set the rules.

        Args:
            stop_ids: tokens that end the sequence and add no text.
            stop_strings: the text ends before the first of them.
            max_new_tokens: the most tokens, at least 1.
            detokenizer: of this sequence alone; None if only ids matter.
            on_text: called within `push` and `close` with each piece of text that no later token can take
                back; the pieces joined are `text`. What it raises, `push` or `close` raises.

        Raises:
            InvalidRequest: a stop string is empty, there is no detokenizer to find stop strings
                with, or `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise InvalidRequest(f"max_new_tokens is {max_new_tokens}, must be at least 1")
        if "" in stop_strings:
            raise InvalidRequest("a stop string is empty", hint="leave it out")
        if stop_strings and detokenizer is None:
            raise InvalidRequest("stop strings need text, and there is no detokenizer")
        self.max_new_tokens = max_new_tokens
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.stop_string: str | None = None
        self._stop_ids = stop_ids
        self._stop_strings = stop_strings
        self._longest_stop = max(map(len, stop_strings), default=0)
        self._detokenizer = detokenizer
        self._is_closed = False
        self._on_text = on_text
        #: Characters of the text that `on_text` has been given.
        self._told = 0

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> FinishReason | None:
        """Take the next token; return why the sequence ends here, None if it goes on."""
        if token_id in self._stop_ids:
            return FinishReason.STOP if self._flush() else FinishReason.EOS
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self._detokenizer is not None and self._append(self._detokenizer.push(token_id)):
            self._is_closed = True
            self._tell(len(self.text))
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_new_tokens:
            return FinishReason.STOP if self._flush() else FinishReason.LENGTH
        if self._on_text is not None:
            self._tell(self._certain_length())
        return None

    def close(self) -> None:
        """Complete the text of a sequence that was ended from outside."""
        if not self._is_closed:
            self._flush()

    def _flush(self) -> bool:
        """Add what was held back; return True if that completes a stop string."""
        self._is_closed = True
        is_stopped = self._detokenizer is not None and self._append(self._detokenizer.finish())
        self._tell(len(self.text))
        return is_stopped

    def _tell(self, length: int) -> None:
        """Give `on_text` what is new in the first `length` characters."""
        start, self._told = self._told, length
        if self._on_text is not None and length > start:
            self._on_text(self.text[start:length])

    def _certain_length(self) -> int:
        """Return how many characters stand before anything that may yet become a stop string."""
        certain = len(self.text)
        for stop in self._stop_strings:
            start = self.text.find(stop[0], max(self._told, len(self.text) - len(stop) + 1), certain)
            while start >= 0 and not stop.startswith(self.text[start:]):
                start = self.text.find(stop[0], start + 1, certain)
            if start >= 0:
                certain = start
        return certain

    def _append(self, piece: str) -> bool:
        """Add text; cut it and return True if a stop string is complete."""
        search_from = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        if not piece:
            return False
        # The string that is complete first ends the text, as if characters came one by one: the
        # result does not depend on how the text is split into tokens.
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop_strings
            if (start := self.text.find(stop, search_from)) >= 0
        ]
        if not found:
            return False
        _, start, self.stop_string = min(found)
        self.text = self.text[:start]
        return True
