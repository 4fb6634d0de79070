r"""Turn one sequence's token ids into text as they come, without ever changing a byte.

Owns: the way from bytes to UTF-8 text (characters whose bytes come in several tokens are held back), the
one leading space that a prompt may take away, and line ends. Knows nothing of stop strings
(`codeherd_worker.engine.stopping`) or of how a prompt was made (`codeherd_worker.engine.prompts`).

    token ids -> bytes -> characters -> without the dummy space -> "\n" as the request's line ends
"""

from __future__ import annotations

import codecs

from codeherd_worker.engine.vocabulary import Vocabulary


class Detokenizer:
    """The text of one sequence; pushed ids and `finish` together give what all ids at once would give."""

    __slots__ = ("_after_cr", "_decoder", "_newline", "_strips_space", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, *, strip_first_space: bool, newline: str) -> None:
        r"""Start a sequence.

        Args:
            vocabulary: shared, never changed.
            strip_first_space: whether a first character that is a space belongs to the encoding, not to the
                text; `Prompt.strip_first_space` says so.
            newline: what `"\n"` becomes: `"\n"` or `"\r\n"`.
        """
        self._vocabulary = vocabulary
        self._strips_space = strip_first_space
        self._newline = newline
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._after_cr = False

    def push(self, token_id: int) -> str:
        """Take the next id; return the characters that are complete now, often none."""
        return self._finished(self._decoder.decode(self._vocabulary.token_bytes(token_id)))

    def finish(self) -> str:
        """Return what was held back: one U+FFFD for a character whose last bytes never came."""
        return self._finished(self._decoder.decode(b"", final=True))

    def _finished(self, text: str) -> str:
        if not text:
            return ""
        if self._strips_space:
            self._strips_space = False
            text = text.removeprefix(" ")
        if self._newline == "\n" or not text:
            return text
        # A model may say "\r\n" itself: its "\r" must not be doubled, not even across tokens.
        starts_after_cr, self._after_cr = self._after_cr, text.endswith("\r")
        head, tail = (text[:1], text[1:]) if starts_after_cr and text.startswith("\n") else ("", text)
        return head + tail.replace("\r\n", "\n").replace("\n", self._newline)


def decode(vocabulary: Vocabulary, token_ids: list[int], *, strip_first_space: bool, newline: str) -> str:
    """Return the text of a whole sequence."""
    detokenizer = Detokenizer(vocabulary, strip_first_space=strip_first_space, newline=newline)
    return "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])
