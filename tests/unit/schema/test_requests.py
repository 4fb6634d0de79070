from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeherd_schema.errors import FillMarkerError, InvalidRequest
from codeherd_schema.requests import (
    FILL_MARKER,
    MAX_TEXT,
    ChatRequest,
    GenerateRequest,
    InfillRequest,
    Request,
    Sampling,
    dump_request,
    parse_request,
)
from tests import samples

texts_without_marker = samples.texts.filter(lambda text: FILL_MARKER not in text)
GENERATE = {"kind": "generate", "prompt": "SECRET TEXT"}


@given(samples.requests)
def test_any_request_is_read_back_equal(request_: Request) -> None:
    dumped = json.loads(json.dumps(dump_request(request_)))

    again = parse_request(dumped)

    assert again == request_
    assert type(again) is type(request_)
    assert again.content_sha256() == request_.content_sha256()


@given(samples.requests)
def test_row_form_is_ascii(request_: Request) -> None:
    text = request_.model_dump_json(ensure_ascii=True)

    assert text.isascii()
    assert "\0" not in text
    assert parse_request(json.loads(text)) == request_


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "SECRET TEXT\udc80"}, "prompt"),
        ({"prompt": "SECRET TEXT" * MAX_TEXT}, "prompt"),
        ({"surprise": "SECRET TEXT"}, "surprise"),
        ({"SECRET TEXT\n": 1}, "..."),
        ({"model": ""}, "model"),
        ({"model": "SECRET TEXT"}, "model"),
        ({"model": "a\n"}, "model"),
        ({"priority": 10}, "priority"),
        ({"priority": -1}, "priority"),
        ({"sampling": {"max_new_tokens": 0}}, "sampling.max_new_tokens"),
        ({"sampling": {"temperature": 2.1}}, "sampling.temperature"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"sampling": {"temperature": float("inf")}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"min_p": -0.1}}, "sampling.min_p"),
        ({"sampling": {"min_p": 1.1}}, "sampling.min_p"),
        ({"sampling": {"repetition_penalty": 0.5}}, "sampling.repetition_penalty"),
        ({"sampling": {"stop": [""]}}, "sampling.stop.0"),
        ({"sampling": {"stop": ["x"] * 17}}, "sampling.stop"),
        ({"sampling": {"seed": 2**63}}, "sampling.seed"),
        ({"sampling": {"seed": -1}}, "sampling.seed"),
        ({"sampling": {"n": 0}}, "sampling.n"),
        ({"sampling": {"logprobs": -1}}, "sampling.logprobs"),
        ({"sampling": {"logprobs": 6}}, "sampling.logprobs"),
        ({"sampling": {"logprobs": None}}, "sampling.logprobs"),
        ({"sampling": {"stop": ["SECRET TEXT" * 30]}}, "sampling.stop.0"),
        ({"overflow": "SECRET TEXT"}, "overflow"),
        ({"run_at": "SECRET TEXT"}, "run_at"),
        ({"deadline": "2026-01-01T00:00:00"}, "deadline"),
        ({"expires_at": timedelta(seconds=-1)}, "expires_at"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "x" * 256}, "idempotency_key"),
        ({"idempotency_key": "a\0b"}, "idempotency_key"),
        ({"labels": {"SECRET TEXT": "x"}}, "labels"),
        ({"labels": {"a": "SECRET TEXT" * 100}}, "labels.a"),
        ({"labels": {str(i): "x" for i in range(17)}}, "labels"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"schema_version": 2}, "schema_version"),
        ({"kind": "SECRET TEXT"}, "kind"),
        ({"kind": None}, "kind"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_field_is_named_in_one_line_without_its_text(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({**GENERATE, **fields})

    message = caught.value.message
    assert message.startswith(f"`{place}")
    assert "\n" not in message
    assert "SECRET TEXT" not in message
    assert len(message) < 300


@pytest.mark.parametrize("data", [None, "SECRET TEXT", [], 5, {}, {"prompt": "SECRET TEXT"}])
def test_what_is_no_request_is_refused(data: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(data)

    assert "SECRET TEXT" not in caught.value.message
    assert "\n" not in caught.value.message


def test_an_empty_stop_string_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match=r"`sampling.stop.1`: is empty.*leave it out"):
        parse_request({**GENERATE, "sampling": {"stop": ["#", ""]}})


def test_a_payload_from_before_a_field_was_added_is_read_with_its_default() -> None:
    payload = dump_request(GenerateRequest(prompt="p"))
    del payload["sampling"]["min_p"], payload["sampling"]["logprobs"]

    assert parse_request(payload) == GenerateRequest(prompt="p")


def test_further_faults_are_counted() -> None:
    with pytest.raises(InvalidRequest, match=r"\(and 1 more\)$"):
        parse_request({**GENERATE, "priority": 10, "model": ""})


@settings(max_examples=30)
@given(st.none() | st.integers() | texts_without_marker | st.dictionaries(st.text(), st.text()))
def test_unknown_field_is_refused_whatever_it_holds(data: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_request({**GENERATE, "surprise": data})


# Infilling.


@given(texts_without_marker, texts_without_marker)
def test_text_is_split_at_its_marker(prefix: str, suffix: str) -> None:
    request = InfillRequest.from_text(prefix + FILL_MARKER + suffix, model="codellama-7b")

    assert (request.prefix, request.suffix, request.model) == (prefix, suffix, "codellama-7b")


@pytest.mark.parametrize("text", ["SECRET TEXT", FILL_MARKER * 2])
def test_text_has_one_marker(text: str) -> None:
    with pytest.raises(FillMarkerError, match=r"holds [02] fill markers") as caught:
        InfillRequest.from_text(text)

    assert "SECRET TEXT" not in caught.value.message
    assert caught.value.hint is not None


def test_marker_can_be_chosen() -> None:
    assert InfillRequest.from_text("a<FILL_ME>b|c", marker="|").prefix == "a<FILL_ME>b"
    with pytest.raises(FillMarkerError):
        InfillRequest.from_text("abc", marker="")


def test_wrong_option_beside_a_marker_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="`priority`"):
        InfillRequest.from_text("a<FILL_ME>b", priority=10)


# Chat.


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["assistant"],
        ["system"],
        ["user", "user"],
        ["user", "assistant"],
        ["user", "system", "user"],
        ["system", "system", "user"],
    ],
    ids=str,
)
def test_turns_in_another_order_are_refused(roles: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=r"`(messages|request)`") as caught:
        parse_request({"kind": "chat", "messages": [{"role": r, "content": "SECRET TEXT"} for r in roles]})

    assert "SECRET TEXT" not in caught.value.message


# Identity.


def test_key_is_no_part_of_the_content() -> None:
    one, other = (GenerateRequest(prompt="p", idempotency_key=key) for key in ("a", None))

    assert one.content_sha256() == other.content_sha256()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q"},
        {"model": "other"},
        {"priority": 1},
        {"sampling": Sampling(seed=1)},
        {"sampling": Sampling(min_p=0.1)},
        {"sampling": Sampling(logprobs=1)},
        {"labels": {"a": "b"}},
        {"metadata": {"a": "b"}},
        {"deadline": timedelta(1)},
    ],
    ids=str,
)
def test_everything_else_is_part_of_the_content(fields: dict[str, Any]) -> None:
    assert (
        GenerateRequest(**{"prompt": "p", **fields}).content_sha256()
        != GenerateRequest(prompt="p").content_sha256()
    )


def test_order_of_labels_is_no_part_of_the_content() -> None:
    one = GenerateRequest(prompt="p", labels={"a": "1", "b": "2"})
    other = GenerateRequest(prompt="p", labels={"b": "2", "a": "1"})

    assert one.content_sha256() == other.content_sha256()


def test_kinds_with_the_same_text_differ() -> None:
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "p"}]})

    assert chat.content_sha256() != GenerateRequest(prompt="p").content_sha256()


def test_moment_is_absolute_or_a_duration() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)

    request = GenerateRequest(prompt="p", run_at=moment, deadline=timedelta(hours=1))

    assert parse_request(dump_request(request)) == request
