from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeherd_schema.errors import InvalidRequest
from codeherd_worker.engine.detokenize import Detokenizer
from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper

EOS = 999


class Pieces:
    """A detokenizer whose token `n` is the n-th piece, and which holds back `tail`."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self._pieces = pieces
        self._tail = tail

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def finish(self) -> str:
        return self._tail


def make_stopper(
    pieces: list[str],
    *stop_strings: str,
    tail: str = "",
    max_new_tokens: int = 100,
    on_text: Callable[[str], None] | None = None,
) -> Stopper:
    return Stopper(
        stop_ids=frozenset({EOS}),
        stop_strings=stop_strings,
        max_new_tokens=max_new_tokens,
        detokenizer=Pieces(pieces, tail),
        on_text=on_text,
    )


def push_all(stopper: Stopper, count: int) -> FinishReason | None:
    for token_id in range(count):
        reason = stopper.push(token_id)
        if reason is not None:
            return reason
    return None


def test_a_stop_id_ends_the_sequence_and_leaves_no_trace() -> None:
    stopper = make_stopper(["a", "b"])

    assert [stopper.push(0), stopper.push(1)] == [None, None]
    assert stopper.push(EOS) is FinishReason.EOS

    assert (stopper.text, stopper.token_ids, stopper.stop_string) == ("ab", [0, 1], None)


def test_the_length_limit_counts_tokens() -> None:
    stopper = make_stopper(["a", "b", "c"], max_new_tokens=2)

    assert push_all(stopper, 3) is FinishReason.LENGTH

    assert (stopper.text, stopper.token_ids) == ("ab", [0, 1])


def test_a_stop_string_across_tokens_is_cut() -> None:
    stopper = make_stopper(["x = 1", "\n", "\nde", "f f"], "\n\ndef")

    assert push_all(stopper, 4) is FinishReason.STOP

    assert (stopper.text, stopper.stop_string) == ("x = 1", "\n\ndef")
    assert stopper.token_ids == [0, 1, 2, 3]


def test_the_stop_string_that_is_complete_first_wins() -> None:
    stopper = make_stopper(["abcd"], "abcd", "bc")

    assert push_all(stopper, 1) is FinishReason.STOP

    assert (stopper.text, stopper.stop_string) == ("a", "bc")


def test_held_back_text_is_added_at_the_end() -> None:
    stopper = make_stopper(["a"], tail="�", max_new_tokens=1)

    assert push_all(stopper, 1) is FinishReason.LENGTH

    assert stopper.text == "a�"


def test_held_back_text_can_complete_a_stop_string() -> None:
    stopper = make_stopper(["ab"], "bc", tail="c")

    stopper.push(0)

    assert stopper.push(EOS) is FinishReason.STOP
    assert stopper.text == "a"


def test_close_completes_the_text_once() -> None:
    stopper = make_stopper(["a"], tail="z")
    stopper.push(0)

    stopper.close()
    stopper.close()

    assert stopper.text == "az"


def test_close_adds_nothing_after_a_stop_string() -> None:
    stopper = make_stopper(["ab"], "b", tail="z")
    stopper.push(0)

    stopper.close()

    assert stopper.text == "a"


def test_without_a_detokenizer_only_ids_are_kept() -> None:
    stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=2, detokenizer=None)

    assert [stopper.push(5), stopper.push(6)] == [None, FinishReason.LENGTH]

    assert (stopper.text, stopper.token_ids) == ("", [5, 6])


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_the_result_does_not_depend_on_how_text_is_split_into_tokens(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    by_pieces = make_stopper(pieces, *stops)
    by_characters = make_stopper(list(text), *stops)

    reasons = push_all(by_pieces, len(pieces)), push_all(by_characters, len(text))

    assert reasons[0] == reasons[1]
    assert by_pieces.text == by_characters.text
    assert by_pieces.stop_string == by_characters.stop_string
    assert not any(stop in by_pieces.text for stop in stops)


# Text as it comes.


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    told: list[str] = []
    stopper = make_stopper(["x\n", "\n", "y", "\n\nde", "f g"], "\n\ndef", "\n\n\n", on_text=told.append)

    push_all(stopper, 5)

    assert told == ["x", "\n\ny"]
    assert stopper.text == "x\n\ny"


def test_what_was_held_back_is_told_at_the_end() -> None:
    for end in ("stop id", "length", "close"):
        told: list[str] = []
        limit = 2 if end == "length" else 100
        stopper = make_stopper(["a", "b"], "bc", tail="!", max_new_tokens=limit, on_text=told.append)

        push_all(stopper, 2)
        if end == "stop id":
            stopper.push(EOS)
        stopper.close()

        assert told == ["a", "b!"], end


def test_no_empty_piece_is_told() -> None:
    told: list[str] = []
    stopper = make_stopper(["", "a", ""], on_text=told.append)

    push_all(stopper, 3)
    stopper.close()

    assert told == ["a"]


@settings(max_examples=300)
@given(
    text=st.text("ab\né🐑", max_size=30),
    stops=st.lists(st.text("ab\né🐑", min_size=1, max_size=5), max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    limit=st.integers(1, 10),
    tail=st.sampled_from(["", "a", "\N{REPLACEMENT CHARACTER}"]),
)
def test_told_pieces_are_the_text_and_nothing_is_taken_back(
    text: str, stops: list[str], cuts: list[int], limit: int, tail: str
) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    told: list[str] = []
    stopper = make_stopper(pieces, *stops, tail=tail, max_new_tokens=limit, on_text=told.append)
    silent = make_stopper(pieces, *stops, tail=tail, max_new_tokens=limit)

    reasons = push_all(stopper, len(pieces)), push_all(silent, len(pieces))
    unheld = stopper.text[len("".join(told)) :]
    stopper.close()
    silent.close()

    assert "".join(told) == stopper.text == silent.text
    assert reasons[0] == reasons[1]
    # Held back no longer than a stop string might still come.
    assert len(unheld) < max(map(len, stops), default=1)
    assert not any(unheld == stop for stop in stops)


@settings(max_examples=100)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=12),
    stops=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3), max_size=2),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_a_character_of_many_tokens_is_told_whole(text: str, stops: list[str], newline: str) -> None:
    told: list[str] = []
    data = text.encode()
    stopper = Stopper(
        stop_ids=frozenset({EOS}),
        stop_strings=tuple(stops),
        max_new_tokens=100,
        detokenizer=Detokenizer(Bytes(), strip_first_space=True, newline=newline),  # type: ignore[arg-type]
        on_text=told.append,
    )

    for byte in (*data, EOS):
        if stopper.push(byte) is not None:
            break

    assert "".join(told) == stopper.text
    assert not any(
        "\N{REPLACEMENT CHARACTER}" in piece for piece in told if "\N{REPLACEMENT CHARACTER}" not in text
    )


class Bytes:
    """A vocabulary of 256 bytes."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def test_a_listener_that_raises_is_told_nothing_twice() -> None:
    told: list[str] = []

    def listen(piece: str) -> None:
        told.append(piece)
        if piece == "b":
            raise OSError("gone")

    stopper = make_stopper(["a", "b", "c"], on_text=listen)
    stopper.push(0)

    with pytest.raises(OSError, match="gone"):
        stopper.push(1)
    stopper.close()

    assert told == ["a", "b"]
    assert stopper.text == "ab"


# Log-probabilities.


def test_logprobs_stand_beside_their_tokens() -> None:
    stopper = make_stopper(["a", "b"], max_new_tokens=2)
    given_ = [TokenLogprobs(i, -0.5 * i, ((i, -0.5 * i), (7, -3.0))) for i in range(2)]

    for i in range(2):
        stopper.push(i, given_[i])

    assert stopper.logprobs == given_
    assert [entry.token_id for entry in stopper.logprobs] == stopper.token_ids


def test_the_stop_id_has_no_logprob() -> None:
    stopper = make_stopper(["a"])
    stopper.push(0, TokenLogprobs(0, -1.0, ()))

    stopper.push(EOS, TokenLogprobs(EOS, -2.0, ()))

    assert [entry.token_id for entry in stopper.logprobs] == stopper.token_ids == [0]


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_new_tokens"):
        make_stopper([], max_new_tokens=0)
    with pytest.raises(InvalidRequest, match="empty") as caught:
        make_stopper([], "")
    assert caught.value.hint == "leave it out"
    with pytest.raises(InvalidRequest, match="detokenizer"):
        Stopper(stop_ids=frozenset(), stop_strings=("x",), max_new_tokens=1, detokenizer=None)


def test_the_first_cancel_reason_wins() -> None:
    token = CancelToken()
    assert token.reason is None

    token.cancel(CancelReason.LEASE_LOST)
    token.cancel(CancelReason.USER)

    assert token.reason is CancelReason.LEASE_LOST


def test_racing_cancels_agree_on_one_reason() -> None:
    token = CancelToken()
    barrier = threading.Barrier(len(CancelReason))
    seen: list[CancelReason | None] = []

    def cancel(reason: CancelReason) -> None:
        barrier.wait(timeout=10)
        token.cancel(reason)
        seen.append(token.reason)

    threads = [threading.Thread(target=cancel, args=(reason,)) for reason in CancelReason]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert len(seen) == len(CancelReason)
    assert len(set(seen)) == 1
