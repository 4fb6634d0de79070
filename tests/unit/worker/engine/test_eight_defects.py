"""Why prompts and text are ours: eight defects of transformers 5.23's CodeLlamaTokenizer, beside our answer.

Each test first shows the defect, so that it fails, and can go, when upstream has repaired it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CodeLlamaTokenizer, GenerationConfig, LlamaConfig

from codeherd_schema.errors import FillMarkerError
from codeherd_schema.models import TINY
from codeherd_schema.requests import GenerateRequest, InfillRequest
from codeherd_worker.engine.detokenize import decode
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.vocabulary import Vocabulary
from tests.unit.worker.engine.reference_tokenizer import ReferenceTokenizer
from tests.unit.worker.engine.small_vocabularies import model_bytes, splits, write_model

BOS, EOS, PRE, SUF, MID, EOT = 1, 2, 3, 4, 5, 6
WIDE = TINY.model_copy(update={"context_window": 100_000})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("control", tmp_path_factory.mktemp("defects") / "control")


@pytest.fixture(scope="session")
def ours(folder: Path) -> Vocabulary:
    return Vocabulary.from_folder(folder)


@pytest.fixture(scope="session")
def reference() -> ReferenceTokenizer:
    return ReferenceTokenizer(model_bytes("control"))


@pytest.fixture
def theirs(folder: Path) -> Any:
    """A fresh tokenizer for each test: defect 4 would spoil it for the next."""
    return CodeLlamaTokenizer.from_pretrained(folder)


def infilling(ours: Vocabulary, prefix: str, suffix: str) -> list[int]:
    return list(build_prompt(InfillRequest(prefix=prefix, suffix=suffix), ours, WIDE).token_ids)


def test_1_a_suffix_gets_a_space_that_is_not_there(
    theirs: Any, ours: Vocabulary, reference: ReferenceTokenizer
) -> None:
    prefix, suffix = "def f():\n    ", "\n    return 1\n"
    right = reference.infilling(prefix, suffix, suffix_first=False)

    wrong = theirs(prefix, suffix=suffix)["input_ids"]

    assert theirs.convert_ids_to_tokens(wrong[wrong.index(SUF) :])[:3] == ["▁<SUF>", "▁", "<0x0A>"]
    assert ours.piece(right[right.index(SUF) + 1]) == "<0x0A>"
    assert infilling(ours, prefix, suffix) == right


def test_1_most_prompts_are_wrong(theirs: Any, ours: Vocabulary, reference: ReferenceTokenizer) -> None:
    pairs = [(a.replace("\r", ""), b.replace("\r", "")) for a, b in splits(400, seed=21)]
    pairs = [(before, after) for before, after in pairs if before and after]
    right = [reference.infilling(before, after, suffix_first=False) for before, after in pairs]

    wrong = [theirs(before, suffix=after)["input_ids"] for before, after in pairs]

    assert sum(a != b for a, b in zip(wrong, right, strict=True)) > len(pairs) / 2
    assert [infilling(ours, before, after) for before, after in pairs] == right


def test_2_decoding_takes_a_space_from_the_indentation(theirs: Any, ours: Vocabulary) -> None:
    ids = ours.encode_raw("    return 1")

    assert theirs.decode(ids) == "   return 1"
    assert decode(ours, ids, strip_first_space=False, newline="\n") == "    return 1"


def test_3_indented_prompts_lose_the_dummy_prefix(
    theirs: Any, ours: Vocabulary, reference: ReferenceTokenizer
) -> None:
    prompt = "    return"
    right = reference.completion(prompt)

    assert theirs(prompt)["input_ids"] != right
    assert list(build_prompt(GenerateRequest(prompt=prompt), ours, WIDE).token_ids) == right


def test_4_one_infilling_changes_how_later_prompts_are_read(theirs: Any, ours: Vocabulary) -> None:
    prompt = "    return"
    before = theirs(prompt)["input_ids"]
    own_before = build_prompt(GenerateRequest(prompt=prompt), ours, WIDE)

    theirs("a", suffix="b")
    infilling(ours, "a", "b")

    assert theirs(prompt)["input_ids"] != before
    assert build_prompt(GenerateRequest(prompt=prompt), ours, WIDE) == own_before


def test_5_the_marker_in_a_batch_reaches_the_model_as_an_id_past_the_embedding(
    theirs: Any, ours: Vocabulary, reference: ReferenceTokenizer
) -> None:
    wrong = theirs(["a<FILL_ME>b"])["input_ids"][0]
    request = InfillRequest.from_text("a<FILL_ME>b")

    assert ours.size in wrong
    assert MID not in wrong
    assert list(build_prompt(request, ours, WIDE).token_ids) == reference.infilling(
        "a", "b", suffix_first=False
    )


def test_6_an_empty_side_changes_the_format(
    theirs: Any, ours: Vocabulary, reference: ReferenceTokenizer
) -> None:
    without_suffix = theirs("a = ", suffix="")["input_ids"]
    without_prefix = theirs("<FILL_ME>b")["input_ids"]

    assert MID not in without_suffix
    assert theirs.convert_ids_to_tokens(without_prefix)[:3] == ["<s>", "▁<PRE>", "▁"]
    for prefix, suffix in (("a = ", ""), ("", "b"), ("", "")):
        right = reference.infilling(prefix, suffix, suffix_first=False)
        assert infilling(ours, prefix, suffix) == right
    assert infilling(ours, "", "") == [BOS, PRE, SUF, MID]


def test_6_two_markers_fail_without_an_explanation(theirs: Any) -> None:
    with pytest.raises(ValueError, match="too many values to unpack"):
        theirs("a<FILL_ME>b<FILL_ME>c")
    with pytest.raises(FillMarkerError, match="2 fill markers"):
        InfillRequest.from_text("a<FILL_ME>b<FILL_ME>c")


def test_7_text_becomes_control_tokens(theirs: Any, ours: Vocabulary) -> None:
    text = "a </s> ▁<EOT> ▁<MID> b"

    wrong = theirs(text)["input_ids"]
    right = build_prompt(GenerateRequest(prompt=text), ours, WIDE).token_ids

    assert {EOS, EOT, MID} <= set(wrong)
    assert {i for i in right if not ours.token_bytes(i)} == {BOS}


def test_8_the_end_of_a_middle_does_not_end_generation(theirs: Any, ours: Vocabulary) -> None:
    generation = GenerationConfig.from_model_config(LlamaConfig(eos_token_id=theirs.eos_token_id))

    assert generation.eos_token_id == EOS
    assert theirs.eot_id == EOT
    prompt = build_prompt(InfillRequest(prefix="a", suffix="b"), ours, WIDE)
    assert prompt.stop_ids == {EOT, EOS}


def test_our_reader_takes_the_json_that_transformers_writes(
    theirs: Any, ours: Vocabulary, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()

    again = Vocabulary.from_folder(tmp_path)

    # The one more is the fill marker, which transformers adds.
    assert (again.size, again.specials) == (ours.size + 1, ours.specials)
    for before, after in splits(300, seed=22):
        assert again.encode(before) == ours.encode(before)
        assert again.encode_raw(after) == ours.encode_raw(after)
    assert ours.size not in again.encode("a <FILL_ME> b")
