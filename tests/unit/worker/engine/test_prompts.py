from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeherd_schema.errors import PromptTooLong, ReservedText, UnsupportedByModel
from codeherd_schema.models import TINY, ChatFormat, ServedModel
from codeherd_schema.requests import (
    ChatRequest,
    GenerateRequest,
    InfillRequest,
    Message,
    Overflow,
    Sampling,
)
from codeherd_worker.engine.detokenize import decode
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.vocabulary import Vocabulary
from codeherd_worker.prompt_command import EMBEDDED_FOLDER
from tests.unit.worker.engine.reference_tokenizer import ReferenceTokenizer
from tests.unit.worker.engine.small_vocabularies import (
    KINDS,
    model_bytes,
    official_lookalike,
    source_files,
    splits,
    vocabulary,
    write_json,
    write_model,
)

#: Room for every prompt of these tests.
WIDE = TINY.model_copy(update={"context_window": 1_000_000})
INST = WIDE.model_copy(update={"chat": ChatFormat.INST})
STEP = WIDE.model_copy(update={"chat": ChatFormat.STEP})
DIALOGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "hi"),),
    (("user", "  write a\n\nfunction \n"),),
    (("system", "Be brief."), ("user", "hi")),
    (("system", "  two lines\n  of it "), ("user", "  hi  "), ("assistant", " yes \n"), ("user", "\tgo on")),
    (("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", ""), ("user", "")),
    (("user", "a"), ("assistant", "b"), ("user", " "), ("assistant", "d"), ("user", "é汉🙂")),
)


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary("control", tmp_path_factory.mktemp("vocabulary") / "control")


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary("step", tmp_path_factory.mktemp("vocabulary") / "step")


@pytest.fixture(scope="session", params=[(kind, form) for kind in KINDS for form in ("model", "json")])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Vocabulary, ReferenceTokenizer]:
    kind, form = request.param
    write = write_model if form == "model" else write_json
    folder = tmp_path_factory.mktemp("vocabulary") / kind
    return Vocabulary.from_folder(write(kind, folder)), ReferenceTokenizer(model_bytes(kind))


def lf(text: str) -> str:
    return text.replace("\r\n", "\n")


def narrow(context_window: int) -> ServedModel:
    return WIDE.model_copy(update={"context_window": context_window, "chat": ChatFormat.INST})


def chat(dialog: tuple[tuple[str, str], ...], **options: object) -> ChatRequest:
    messages = tuple(Message.model_validate({"role": role, "content": text}) for role, text in dialog)
    return ChatRequest.model_validate({"messages": messages, **options})


def text_of(vocabulary: Vocabulary, ids: list[int] | tuple[int, ...]) -> str:
    return b"".join(vocabulary.token_bytes(i) for i in ids).decode()


# Formats


def test_prompts_equal_the_reference_on_every_split(pair: tuple[Vocabulary, ReferenceTokenizer]) -> None:
    ours, reference = pair

    mismatches = []
    for before, after in splits(600, seed=11):
        cases: list[tuple[GenerateRequest | InfillRequest, list[int]]] = [
            (GenerateRequest(prompt=before), reference.completion(lf(before)))
        ]
        if ours.can_infill:
            cases += [
                (
                    InfillRequest(prefix=before, suffix=after, suffix_first=suffix_first),
                    reference.infilling(lf(before), lf(after), suffix_first=suffix_first),
                )
                for suffix_first in (False, True)
            ]
        mismatches += [
            request for request, ids in cases if list(build_prompt(request, ours, WIDE).token_ids) != ids
        ]

    assert mismatches == []


def test_prompts_of_the_embedded_model_equal_the_reference() -> None:
    ours = Vocabulary.from_folder(EMBEDDED_FOLDER)
    reference = ReferenceTokenizer(EMBEDDED_FOLDER / "tokenizer.model")

    for before, after in splits(500, seed=13):
        completion = build_prompt(GenerateRequest(prompt=before), ours, WIDE)
        infilling = build_prompt(InfillRequest(prefix=before, suffix=after), ours, WIDE)

        assert list(completion.token_ids) == reference.completion(lf(before))
        assert list(infilling.token_ids) == reference.infilling(lf(before), lf(after), suffix_first=False)


def test_the_published_infilling_prompt() -> None:
    # https://github.com/ggml-org/llama.cpp/issues/3503
    request = InfillRequest(
        prefix='def remove_non_ascii(s: str) -> str:\n    """ ', suffix="\n    return result\n"
    )

    prompt = build_prompt(request, Vocabulary(official_lookalike()), WIDE)

    assert " ".join(map(str, prompt.token_ids)) == (
        "1 32007 822 3349 29918 5464 29918 294 18869 29898 29879 29901 851 29897 1599 851 29901 13 1678 9995 "
        "29871 32008 13 1678 736 1121 13 32009"
    )
    assert prompt.stop_ids == {32010, 2}


@pytest.mark.parametrize("prefix", ["", "x = "])
@pytest.mark.parametrize("suffix", ["", "\n"])
def test_an_empty_side_of_a_hole_has_no_ids(control: Vocabulary, prefix: str, suffix: str) -> None:
    bos, pre, suf, mid = 1, 3, 4, 5
    before, after = control.encode(prefix), control.encode_raw(suffix)

    psm = build_prompt(InfillRequest(prefix=prefix, suffix=suffix), control, WIDE)
    spm = build_prompt(InfillRequest(prefix=prefix, suffix=suffix, suffix_first=True), control, WIDE)

    assert psm.token_ids == (bos, pre, *before, suf, *after, mid)
    assert spm.token_ids == (bos, pre, suf, *after, mid, *before)


@pytest.mark.parametrize("dialog", DIALOGS)
def test_inst_dialogs_equal_the_reference(
    pair: tuple[Vocabulary, ReferenceTokenizer], dialog: tuple[tuple[str, str], ...]
) -> None:
    ours, reference = pair

    prompt = build_prompt(chat(dialog), ours, INST)

    assert list(prompt.token_ids) == reference.inst_dialog(dialog)
    assert prompt.stop_ids == {ours.specials.eos}


@pytest.mark.parametrize("dialog", DIALOGS)
def test_step_dialogs_equal_the_reference(step: Vocabulary, dialog: tuple[tuple[str, str], ...]) -> None:
    prompt = build_prompt(chat(dialog), step, STEP)

    assert list(prompt.token_ids) == ReferenceTokenizer(model_bytes("step")).step_dialog(dialog)
    assert prompt.stop_ids == {step.specials.step, step.specials.eos}


def test_stop_ids_of_completion_and_infilling(control: Vocabulary) -> None:
    eos, eot = 2, 6

    assert build_prompt(GenerateRequest(prompt="x"), control, WIDE).stop_ids == {eos}
    assert build_prompt(InfillRequest(prefix="x", suffix="y"), control, WIDE).stop_ids == {eot, eos}


# Text that looks like control


@pytest.mark.parametrize(
    "text", ["</s>", "▁<EOT>", " <PRE> <SUF> <MID>", "<step>", "[INST] <<SYS>>", "<FILL_ME>"]
)
def test_control_text_in_code_is_plain_text(pair: tuple[Vocabulary, ReferenceTokenizer], text: str) -> None:
    ours, _ = pair
    completion = build_prompt(GenerateRequest(prompt=text), ours, WIDE)

    assert text_of(ours, completion.token_ids) == " " + text.replace("▁", " ")
    if ours.can_infill:
        infilling = build_prompt(InfillRequest(prefix=text, suffix=text), ours, WIDE)
        specials = ours.specials
        assert [i for i in infilling.token_ids if not ours.token_bytes(i)] == [
            specials.bos,
            specials.prefix,
            specials.suffix,
            specials.middle,
        ]


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("model", [INST, STEP])
def test_chat_refuses_its_own_tags_in_any_message(
    step: Vocabulary, tag: str, place: int, model: ServedModel
) -> None:
    contents = ["a", "b", "c", "d"]
    contents[place] += f" x{tag}y"
    dialog = tuple(zip(("system", "user", "assistant", "user"), contents, strict=True))

    with pytest.raises(ReservedText) as failure:
        build_prompt(chat(dialog), step, model)

    assert tag in failure.value.message


def test_chat_takes_control_pieces_as_plain_text(step: Vocabulary) -> None:
    prompt = build_prompt(chat((("user", "</s> <s> ▁<EOT>"),)), step, INST)

    assert [i for i in prompt.token_ids if not step.token_bytes(i)] == [step.specials.bos]


# What cannot be served


def test_a_model_or_vocabulary_without_the_kind_is_refused(tmp_path: Path, control: Vocabulary) -> None:
    plain = vocabulary("plain", tmp_path / "plain")
    infill, dialog = InfillRequest(prefix="a", suffix="b"), chat((("user", "a"),))

    with pytest.raises(UnsupportedByModel, match="no infilling tokens"):
        build_prompt(infill, plain, WIDE)
    with pytest.raises(UnsupportedByModel, match="no `<step>` token"):
        build_prompt(dialog, control, STEP)
    with pytest.raises(UnsupportedByModel, match="cannot serve `chat`"):
        build_prompt(dialog, control, WIDE)
    with pytest.raises(UnsupportedByModel, match="cannot serve `infill`"):
        build_prompt(infill, control, WIDE.model_copy(update={"infilling": False}))


# Spaces and line ends around the answer


def test_the_first_space_belongs_to_the_text_where_text_stands_before_it(control: Vocabulary) -> None:
    strips = {
        "completion": build_prompt(GenerateRequest(prompt="def"), control, WIDE),
        "empty completion": build_prompt(GenerateRequest(prompt=""), control, WIDE),
        "psm": build_prompt(InfillRequest(prefix="", suffix="x"), control, WIDE),
        "spm": build_prompt(InfillRequest(prefix="x", suffix="", suffix_first=True), control, WIDE),
        "spm without prefix": build_prompt(
            InfillRequest(prefix="", suffix="x", suffix_first=True), control, WIDE
        ),
        "chat": build_prompt(chat((("user", "x"),)), control, INST),
    }

    assert {name for name, prompt in strips.items() if prompt.strip_first_space} == {
        "empty completion",
        "spm without prefix",
        "chat",
    }


def test_prompt_and_text_together_are_what_the_model_meant(control: Vocabulary) -> None:
    for before, middle in splits(300, seed=12):
        before, middle = lf(before).replace("▁", "_"), lf(middle).replace("▁", "_")
        prompt = build_prompt(GenerateRequest(prompt=before), control, WIDE)
        # The model goes on from the prompt's ids with raw pieces; at the very start, with the dummy prefix.
        answer = control.encode_raw(middle) if before else control.encode(middle)

        text = decode(control, answer, strip_first_space=prompt.strip_first_space, newline=prompt.newline)

        assert before + text == before + middle


@pytest.mark.parametrize(
    ("prefix", "suffix", "newline"),
    [
        ("a\r\nb\r\n", "c\n", "\r\n"),
        ("a\nb\n", "c\r\n", "\n"),
        ("a\r\n", "b\n", "\n"),
        ("a\r", "b", "\n"),
        ("", "", "\n"),
    ],
)
def test_the_model_reads_lf_and_most_lines_decide_what_is_written(
    control: Vocabulary, prefix: str, suffix: str, newline: str
) -> None:
    prompt = build_prompt(InfillRequest(prefix=prefix, suffix=suffix), control, WIDE)

    assert prompt.newline == newline
    assert text_of(control, prompt.token_ids) == " " * bool(prefix) + lf(prefix) + lf(suffix)


def test_stop_strings_are_spelled_as_the_text_will_be(control: Vocabulary) -> None:
    sampling = Sampling(stop=("\n\n", "\r\n", "x"))

    crlf = build_prompt(GenerateRequest(prompt="a\r\n", sampling=sampling), control, WIDE)
    plain = build_prompt(GenerateRequest(prompt="a\n", sampling=sampling), control, WIDE)

    assert crlf.stop_strings == ("\r\n\r\n", "\r\n", "x")
    assert plain.stop_strings == ("\n\n", "\n", "x")


# What does not fit


def test_refusal_says_the_figures(control: Vocabulary) -> None:
    request = GenerateRequest(prompt="x " * 500, sampling=Sampling(max_new_tokens=50))
    tokens = len(control.encode("x " * 500)) + 1

    with pytest.raises(PromptTooLong, match=f"prompt has {tokens} tokens .* 50 new ones, .* 200 together"):
        build_prompt(request, control, narrow(200))

    assert len(build_prompt(request, control, narrow(tokens + 50)).token_ids) == tokens


SOURCE = st.integers(0, 10_000_000).map(lambda n: _window(n))


def _window(seed: int) -> str:
    rng = random.Random(seed)
    text = rng.choice(source_files())
    start = rng.randrange(len(text))
    return text[start : start + rng.randrange(3000)]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=SOURCE | st.text(max_size=200), room=st.integers(2, 600))
def test_a_cut_completion_is_the_encoding_of_the_end_of_its_text(
    control: Vocabulary, text: str, room: int
) -> None:
    request = GenerateRequest(prompt=text, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=10))
    whole = control.encode(lf(text))

    try:
        prompt = build_prompt(request, control, narrow(room + 10))
    except PromptTooLong:
        assert room < 8
        return

    ids = list(prompt.token_ids[1:])
    kept = text_of(control, ids)[1:]
    assert len(ids) <= room - 1
    assert lf(text).replace("▁", " ").endswith(kept)
    assert control.encode(kept) == ids
    assert len(prompt.cut) == (len(whole) > room - 1)
    for cut in prompt.cut:
        assert (cut.part, cut.removed, cut.total) == ("prompt", len(whole) - len(ids), len(whole))
        # An eighth at most is given up for a line start, and one long piece for a whole character.
        assert len(ids) >= (room - 1) * 6 // 8 - 8


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    prefix=SOURCE | st.text(max_size=60),
    suffix=SOURCE | st.text(max_size=60),
    room=st.integers(5, 600),
    suffix_first=st.booleans(),
)
def test_a_cut_infilling_keeps_what_is_next_to_the_hole(
    control: Vocabulary, prefix: str, suffix: str, room: int, suffix_first: bool
) -> None:
    request = InfillRequest(
        prefix=prefix,
        suffix=suffix,
        suffix_first=suffix_first,
        overflow=Overflow.TRUNCATE,
        sampling=Sampling(max_new_tokens=10),
    )
    whole = {"prefix": control.encode(lf(prefix)), "suffix": control.encode_raw(lf(suffix))}

    try:
        prompt = build_prompt(request, control, narrow(room + 10))
    except PromptTooLong:
        assert room < 20
        return

    bos, pre, suf, mid = 1, 3, 4, 5
    ids = list(prompt.token_ids)
    if suffix_first:
        after, before = ids[3 : ids.index(mid)], ids[ids.index(mid) + 1 :]
        assert ids == [bos, pre, suf, *after, mid, *before]
    else:
        before, after = ids[2 : ids.index(suf)], ids[ids.index(suf) + 1 : -1]
        assert ids == [bos, pre, *before, suf, *after, mid]
    kept_before, kept_after = text_of(control, before)[1:], text_of(control, after)
    assert len(ids) <= room
    assert lf(prefix).replace("▁", " ").endswith(kept_before)
    assert lf(suffix).replace("▁", " ").startswith(kept_after)
    assert (control.encode(kept_before), control.encode_raw(kept_after)) == (before, after)
    expected = {
        part: (len(whole[part]) - len(kept), len(whole[part]))
        for part, kept in (("prefix", before), ("suffix", after))
        if len(kept) < len(whole[part])
    }
    assert {cut.part: (cut.removed, cut.total) for cut in prompt.cut} == expected


def test_room_is_shared_three_to_one_and_unused_room_goes_to_the_other_side(control: Vocabulary) -> None:
    # One token a character, and no line starts.
    long, short = "~" * 4000, "~" * 40
    assert len(control.encode_raw(long)) == 4000

    def kept(prefix: str, suffix: str) -> tuple[int, int]:
        request = InfillRequest(
            prefix=prefix, suffix=suffix, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=1)
        )
        ids = build_prompt(request, control, narrow(1005)).token_ids
        return ids.index(4) - 2, len(ids) - ids.index(4) - 2

    assert kept(long, long) == (750, 250)
    assert kept(long, short) == (960, 40)
    assert kept(short, long) == (41, 959)


def test_a_cut_prefers_line_borders(control: Vocabulary) -> None:
    prefix = "".join(f"before_{i} = 1\n" for i in range(200))
    suffix = "".join(f"after_{i} = 1\n" for i in range(200))
    request = InfillRequest(
        prefix=prefix, suffix=suffix, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=1)
    )

    for window in range(300, 340):
        ids = build_prompt(request, control, narrow(window)).token_ids
        before = text_of(control, ids[2 : ids.index(4)])
        after = text_of(control, ids[ids.index(4) + 1 : -1])

        assert before.startswith(" before_")
        assert after.endswith("= 1\n")


def test_a_cut_never_halves_a_character(control: Vocabulary) -> None:
    text = "汉🙂é" * 300
    for window in range(30, 60):
        request = InfillRequest(
            prefix=text, suffix=text, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=1)
        )
        ids = build_prompt(request, control, narrow(window)).token_ids
        # Strict decoding: a half character would raise.
        assert set(text_of(control, ids)) <= set(text + " ")


def test_no_room_at_all_is_refused_even_with_truncation(control: Vocabulary) -> None:
    for request in (
        GenerateRequest(prompt="x" * 100, overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=99)),
        InfillRequest(
            prefix="x" * 100, suffix="", overflow=Overflow.TRUNCATE, sampling=Sampling(max_new_tokens=200)
        ),
    ):
        with pytest.raises(PromptTooLong, match="nothing of the prompt fits"):
            build_prompt(request, control, narrow(100))


@pytest.mark.parametrize("system", [(), (("system", "always here"),)])
def test_a_long_chat_loses_its_oldest_turns(control: Vocabulary, system: tuple[tuple[str, str], ...]) -> None:
    turns: list[tuple[str, str]] = []
    for i in range(10):
        turns += [("user", f"question {i} " * 5), ("assistant", f"answer {i} " * 5)]
    turns.append(("user", "the last"))
    dialog = (*system, *turns)
    request = chat(dialog, overflow="truncate", sampling={"max_new_tokens": 10})
    reference = ReferenceTokenizer(model_bytes("control"))
    kept = reference.inst_dialog((*system, *turns[12:]))

    prompt = build_prompt(request, control, narrow(len(kept) + 10))

    assert list(prompt.token_ids) == kept
    assert [(cut.part, cut.removed, cut.total) for cut in prompt.cut] == [("messages", 12, len(dialog))]


def test_a_chat_whose_last_turn_does_not_fit_is_refused(control: Vocabulary) -> None:
    dialog = (("user", "a"), ("assistant", "b"), ("user", "word " * 200))

    with pytest.raises(PromptTooLong, match="room for 100 together"):
        build_prompt(chat(dialog, overflow="truncate"), control, narrow(100))
