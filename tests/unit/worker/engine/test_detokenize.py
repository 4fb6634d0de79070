from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeherd_worker.engine.detokenize import Detokenizer, decode
from codeherd_worker.engine.vocabulary import Vocabulary
from tests.unit.worker.engine.reference_tokenizer import ReferenceTokenizer
from tests.unit.worker.engine.small_vocabularies import model_bytes, splits, vocabulary

#: Ids of the byte pieces of the "control" vocabulary start here: <unk> <s> </s> and four infilling pieces.
FIRST_BYTE = 7


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary("control", tmp_path_factory.mktemp("vocabulary") / "control")


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in data]


def pushed(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    # Half of them bytes, so that characters are often broken.
    ids=st.lists(st.integers(0, 999) | st.integers(FIRST_BYTE, FIRST_BYTE + 255), max_size=40),
    strip_first_space=st.booleans(),
)
def test_tokens_one_by_one_give_the_text_of_all_at_once(
    control: Vocabulary, ids: list[int], strip_first_space: bool
) -> None:
    whole = b"".join(control.token_bytes(i) for i in ids).decode(errors="replace")
    text = whole.removeprefix(" ") if strip_first_space else whole

    lf = Detokenizer(control, strip_first_space=strip_first_space, newline="\n")
    crlf = Detokenizer(control, strip_first_space=strip_first_space, newline="\r\n")

    assert "".join(pushed(lf, ids)) == text
    assert "".join(pushed(crlf, ids)) == re.sub(r"(?<!\r)\n", "\r\n", text)


def test_a_middle_equals_the_reference_and_keeps_its_indentation(control: Vocabulary) -> None:
    reference = ReferenceTokenizer(model_bytes("control"))
    texts = ["    return 1", " x", "  ", "\tx", "\n", *(after for _, after in splits(500, seed=7))]

    for text in texts:
        ids = reference.encode_infilling(text)
        assert decode(control, ids, strip_first_space=False, newline="\n") == text.replace("▁", " ")
        assert decode(control, ids, strip_first_space=False, newline="\n") == reference.decode_infilling(ids)


def test_a_completion_goes_on_where_its_prompt_ends(control: Vocabulary) -> None:
    for before, after in splits(500, seed=8):
        text = (before + after).replace("▁", "_")
        # What the model read and wrote together, cut at any token that starts a character.
        ids = control.encode(text)
        data = [control.token_bytes(i) for i in ids]
        cut = next(n for n in range(len(ids) // 2, -1, -1) if is_utf8(b"".join(data[:n])))

        head = decode(control, ids[:cut], strip_first_space=True, newline="\n")
        tail = decode(control, ids[cut:], strip_first_space=cut == 0, newline="\n")

        assert head + tail == text


def is_utf8(data: bytes) -> bool:
    return "�" not in data.replace("�".encode(), b"").decode(errors="replace")


def test_only_one_space_is_stripped_and_only_at_the_start(control: Vocabulary) -> None:
    for text in ("  x  y", " x", "   "):
        ids = control.encode_raw(text)

        assert decode(control, ids, strip_first_space=True, newline="\n") == text[1:]

    assert decode(control, control.encode_raw("x y"), strip_first_space=True, newline="\n") == "x y"


def test_control_ids_add_nothing_and_do_not_end_the_stripping(control: Vocabulary) -> None:
    ids = [1, 3, *control.encode(" x"), 6, 2, 0]

    assert decode(control, ids, strip_first_space=True, newline="\n") == " x"


def test_a_character_appears_only_when_its_last_byte_is_there(control: Vocabulary) -> None:
    detokenizer = Detokenizer(control, strip_first_space=False, newline="\n")

    assert pushed(detokenizer, byte_ids("a🙂".encode())) == ["a", "", "", "", "🙂", ""]


def test_a_character_without_its_last_bytes_ends_as_one_replacement(control: Vocabulary) -> None:
    detokenizer = Detokenizer(control, strip_first_space=False, newline="\n")

    assert pushed(detokenizer, byte_ids("🙂".encode()[:3])) == ["", "", "", "�"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\nb\n", "a\r\nb\r\n"),
        (b"a\r\nb", "a\r\nb"),
        (b"a\rb\r\rc", "a\rb\r\rc"),
        (b"\n\n\r\n", "\r\n\r\n\r\n"),
        (b"\r", "\r"),
    ],
)
def test_lf_becomes_the_line_end_of_the_request_once(control: Vocabulary, data: bytes, text: str) -> None:
    # One byte a token: every line end is split over tokens.
    assert decode(control, byte_ids(data), strip_first_space=False, newline="\r\n") == text
