from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_schema.errors import InvalidRequest
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


def make_stopper(pieces: list[str], *stop_strings: str, tail: str = "", max_new_tokens: int = 100) -> Stopper:
    return Stopper(
        stop_ids=frozenset({EOS}),
        stop_strings=stop_strings,
        max_new_tokens=max_new_tokens,
        detokenizer=Pieces(pieces, tail),
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


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_new_tokens"):
        make_stopper([], max_new_tokens=0)
    with pytest.raises(InvalidRequest, match="empty"):
        make_stopper([], "")
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
