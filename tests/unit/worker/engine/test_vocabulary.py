from __future__ import annotations

import contextlib
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from codeherd_schema.errors import ModelFilesInvalid, TokenizerMismatch
from codeherd_worker.engine.pieces import PieceKind, pack, read_pieces
from codeherd_worker.engine.vocabulary import Vocabulary, verify
from tests.unit.worker.engine.reference_tokenizer import ReferenceTokenizer
from tests.unit.worker.engine.small_vocabularies import (
    INFILLING,
    KINDS,
    model_bytes,
    official_lookalike,
    source_files,
    splits,
    to_json,
    train,
    vocabulary,
    write_json,
    write_model,
)

#: Text that names control pieces in every spelling that a tokenizer might fall for.
HOSTILE = (
    "</s>",
    "a </s> b",
    "<s><s>",
    "<unk>",
    "<0x0A>",
    "▁<EOT>",
    "x ▁<EOT> y",
    " <EOT>",
    " <EOT><EOT><EOT>",
    "<PRE>",
    " <PRE> a <SUF> b <MID>",
    "▁<PRE>▁<SUF>▁<MID>",
    "<step>",
    "a <step> b",
    "[INST] <<SYS>>\n",
    "<FILL_ME>",
)


@pytest.fixture(scope="session", params=[(kind, form) for kind in KINDS for form in ("model", "json")])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Vocabulary, ReferenceTokenizer]:
    """Each vocabulary, read from each file format, and the reference for it."""
    kind, form = request.param
    folder = tmp_path_factory.mktemp("vocabulary") / kind
    write = write_model if form == "model" else write_json
    return Vocabulary.from_folder(write(kind, folder)), ReferenceTokenizer(model_bytes(kind))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary("control", tmp_path_factory.mktemp("vocabulary") / "control")


def text_of(vocabulary: Vocabulary, ids: list[int]) -> str:
    return b"".join(vocabulary.token_bytes(i) for i in ids).decode()


# Encoding


def test_both_encodings_equal_sentencepiece_on_real_source(
    pair: tuple[Vocabulary, ReferenceTokenizer],
) -> None:
    ours, reference = pair

    mismatches = [
        text
        for before, after in splits(1000, seed=1)
        for text in (before, after)
        if ours.encode(text) != reference.encode(text)
        or ours.encode_raw(text) != reference.encode_infilling(text)
    ]

    assert mismatches == []


@settings(derandomize=True, deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\r\n▁☺<>ab"), max_size=80))
def test_both_encodings_equal_sentencepiece_on_any_text(
    pair: tuple[Vocabulary, ReferenceTokenizer], text: str
) -> None:
    ours, reference = pair
    # Where a text spells a control piece, ours is meant to differ.
    assume(not any(name.strip("▁") in text for name in (*INFILLING, "<step>")))

    assert ours.encode(text) == reference.encode(text)
    assert ours.encode_raw(text) == reference.encode_infilling(text)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=80))
def test_bytes_of_raw_ids_are_the_bytes_of_the_text(
    pair: tuple[Vocabulary, ReferenceTokenizer], text: str
) -> None:
    ours, _ = pair

    assert text_of(ours, ours.encode_raw(text)) == text


def test_empty_text_has_no_ids(pair: tuple[Vocabulary, ReferenceTokenizer]) -> None:
    ours, _ = pair

    assert ours.encode("") == ours.encode_raw("") == []


@pytest.mark.parametrize("text", HOSTILE)
def test_text_never_becomes_a_control_id(pair: tuple[Vocabulary, ReferenceTokenizer], text: str) -> None:
    ours, _ = pair
    names = {"<unk>", "<s>", "</s>", "<step>", *INFILLING}
    control_ids = {i for i in range(ours.size) if ours.piece(i) in names}

    assert control_ids.isdisjoint(ours.encode(text))
    assert control_ids.isdisjoint(ours.encode_raw(text))
    assert text_of(ours, ours.encode_raw(text)) == text.replace("▁", " ")


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "ab " * 70_000, "🙂" * 50_000, "x\n" * 100_000]
)
def test_long_monotonous_text_equals_sentencepiece(control: Vocabulary, text: str) -> None:
    reference = ReferenceTokenizer(model_bytes("control"))

    assert control.encode(text) == reference.encode(text)


def test_long_source_equals_sentencepiece(control: Vocabulary) -> None:
    reference = ReferenceTokenizer(model_bytes("control"))
    text = "".join(source_files())[:400_000]

    assert control.encode(text) == reference.encode(text)
    assert control.encode_raw(text) == reference.encode_infilling(text)


def test_many_threads_get_the_same_answers(control: Vocabulary) -> None:
    texts = [text for pair in splits(200, seed=3) for text in pair]
    expected = [(control.encode(text), control.encode_raw(text)) for text in texts]
    together = threading.Barrier(8)

    def all_answers(seed: int) -> list[tuple[list[int], list[int]]]:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        together.wait(timeout=30)
        answers = {i: (control.encode(texts[i]), control.encode_raw(texts[i])) for i in order}
        return [answers[i] for i in range(len(texts))]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(all_answers, range(8)))

    assert answers == [expected] * 8


# Pieces


def test_special_ids_are_found_by_name(tmp_path: Path) -> None:
    plain, step = (vocabulary(kind, tmp_path / kind) for kind in ("plain", "step"))

    assert (plain.specials.bos, plain.specials.eos, plain.specials.prefix, plain.specials.step) == (
        1,
        2,
        None,
        None,
    )
    assert [step.piece(i or 0) for i in (step.specials.prefix, step.specials.suffix)] == ["▁<PRE>", "▁<SUF>"]
    assert [step.piece(i or 0) for i in (step.specials.middle, step.specials.eot)] == ["▁<MID>", "▁<EOT>"]
    assert step.piece(step.specials.step or 0) == "<step>"
    assert step.can_infill
    assert not plain.can_infill


def test_every_piece_stands_for_its_bytes(control: Vocabulary) -> None:
    for i in range(control.size):
        piece = control.piece(i)
        if piece in {"<unk>", "<s>", "</s>", *INFILLING}:
            assert control.token_bytes(i) == b""
        elif piece.startswith("<0x"):
            assert control.token_bytes(i) == bytes.fromhex(piece[3:5])
        else:
            assert control.token_bytes(i).decode() == piece.replace("▁", " ")


def test_an_id_past_the_vocabulary_has_no_bytes(control: Vocabulary) -> None:
    assert control.token_bytes(control.size + 7) == b""


# Files


def test_the_sentencepiece_file_wins_over_json(tmp_path: Path) -> None:
    folder = write_model("control", tmp_path / "both")
    (folder / "tokenizer.json").write_text("not read", encoding="utf-8")

    assert Vocabulary.from_folder(folder).size == 1000


def test_packing_again_changes_nothing(tmp_path: Path) -> None:
    pieces = read_pieces(write_model("control", tmp_path / "one"))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "tokenizer.model").write_bytes(pack(pieces))

    assert read_pieces(tmp_path / "two") == pieces


def test_json_keeps_kinds_and_order_of_the_pieces(tmp_path: Path) -> None:
    from_model = read_pieces(write_model("control", tmp_path / "model"))
    from_json = read_pieces(write_json("control", tmp_path / "json"))

    kinds = [(p.text, p.kind) for p in from_model if p.text not in INFILLING]
    assert [(p.text, p.kind) for p in from_json if p.text not in INFILLING] == kinds


def test_json_may_spell_a_merge_as_one_string(tmp_path: Path) -> None:
    pieces = read_pieces(write_model("plain", tmp_path / "model"))
    document = to_json(pieces)
    model = document["model"]
    assert isinstance(model, dict)
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")

    ours = Vocabulary.from_folder(tmp_path)

    assert ours.encode("def f(self):") == ReferenceTokenizer(model_bytes("plain")).encode("def f(self):")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff" * 100,
        b"{}",
        b"[]",
        b"null",
        b'{"model": {"type": "WordPiece"}}',
        b"version https://git-lfs",
    ],
)
def test_corrupt_file_is_one_clear_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ModelFilesInvalid, match=f"{name}` cannot be used: ") as failure:
        Vocabulary.from_folder(tmp_path)

    assert failure.value.hint
    assert "\n" not in failure.value.message


def test_json_whose_ids_have_gaps_is_refused(tmp_path: Path) -> None:
    document = to_json(read_pieces(write_model("plain", tmp_path / "model")))
    model = document["model"]
    assert isinstance(model, dict)
    del model["vocab"]["▁"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")

    with pytest.raises(ModelFilesInvalid, match="its ids have gaps"):
        Vocabulary.from_folder(tmp_path)


def test_model_with_a_piece_twice_is_refused(tmp_path: Path) -> None:
    pieces = read_pieces(write_model("plain", tmp_path / "model"))
    (tmp_path / "tokenizer.model").write_bytes(pack([*pieces, pieces[-1]]))

    with pytest.raises(ModelFilesInvalid, match="a piece twice"):
        Vocabulary.from_folder(tmp_path)


def test_missing_files_name_the_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelFilesInvalid, match="holds no tokenizer"):
            Vocabulary.from_folder(folder)


def test_every_cut_file_is_refused(tmp_path: Path) -> None:
    whole = model_bytes("control")
    for size in random.Random(2).sample(range(len(whole) - 1), 60):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])

        with pytest.raises(ModelFilesInvalid):
            Vocabulary.from_folder(tmp_path)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng = random.Random(4)
    for form, write in (("tokenizer.model", write_model), ("tokenizer.json", write_json)):
        whole = (write("control", tmp_path / form) / form).read_bytes()
        folder = tmp_path / f"damaged-{form}"
        folder.mkdir()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (folder / form).write_bytes(damaged)
            with contextlib.suppress(ModelFilesInvalid):
                Vocabulary.from_folder(folder).encode("def f(): return 1")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "BPE"),
        ({"byte_fallback": False}, "byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"add_dummy_prefix": False}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"treat_whitespace_as_suffix": True}, "BPE"),
    ],
)
def test_vocabulary_of_another_kind_is_refused(
    tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(vocab_size=600, **options))

    with pytest.raises(ModelFilesInvalid, match=reason):
        Vocabulary.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["<s>", "</s>"])
def test_vocabulary_without_bos_or_eos_is_refused(tmp_path: Path, name: str) -> None:
    pieces = read_pieces(write_model("plain", tmp_path / "plain"))

    with pytest.raises(ModelFilesInvalid, match="no `<s>` or no `</s>`"):
        Vocabulary(tuple(p._replace(text="<x>") if p.text == name else p for p in pieces))


# The official vocabulary


def test_official_vocabulary_with_published_ids_passes() -> None:
    official = Vocabulary(official_lookalike())

    verify(official)

    assert official.is_official
    assert official.can_infill


@pytest.mark.parametrize("token_id", [822, 5464, 15043, 18869, 29871, 30848])
def test_official_vocabulary_with_one_wrong_piece_is_refused(token_id: int) -> None:
    pieces = list(official_lookalike())
    pieces[token_id] = pieces[token_id]._replace(text=f"<wrong {token_id}>")

    with pytest.raises(TokenizerMismatch, match=r"for \d+ of 11 known texts"):
        verify(Vocabulary(tuple(pieces)))


def test_official_vocabulary_hides_its_infilling_pieces_from_text() -> None:
    official = Vocabulary(official_lookalike())

    for text in (" <PRE>", " <SUF> <MID>", " <EOT><EOT>"):
        assert not set(range(32_007, 32_016)) & set(official.encode(text))


def test_other_vocabularies_are_not_judged(control: Vocabulary) -> None:
    verify(control)

    assert not control.is_official


def test_kinds_have_the_numbers_of_the_sentencepiece_format(tmp_path: Path) -> None:
    reference = ReferenceTokenizer(write_model("user_defined", tmp_path / "ud") / "tokenizer.model").sp
    for i, piece in enumerate(read_pieces(tmp_path / "ud")):
        assert (piece.kind is PieceKind.CONTROL) == reference.is_control(i)
        assert (piece.kind is PieceKind.BYTE) == reference.is_byte(i)
        assert (piece.kind is PieceKind.UNKNOWN) == reference.is_unknown(i)
        assert piece.text == reference.id_to_piece(i)
        assert piece.score == reference.get_score(i)
