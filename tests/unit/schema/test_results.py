from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from codeherd_schema.results import Candidate, FinishReason, LikelyToken, Result
from tests import samples

results = st.builds(
    Result,
    job_id=st.uuids().map(str),
    attempt=st.integers(1, 99),
    candidates=st.lists(samples.candidates, min_size=1, max_size=3).map(tuple),
    prompt_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    cut=st.lists(samples.cuts, max_size=2).map(tuple),
    model=samples.words,
    model_revision=samples.short_texts,
    quantization=st.sampled_from(["nf4", "int8", "none"]),
    engine_fingerprint=samples.short_texts,
    worker_id=samples.short_texts,
    timings=samples.timings,
    created_at=st.datetimes(datetime(1990, 1, 1), datetime(9000, 1, 1), timezones=samples.zones),  # noqa: DTZ001
)


@given(results)
def test_any_result_is_read_back_equal(result: Result) -> None:
    text = result.model_dump_json(ensure_ascii=True)

    assert Result.model_validate_json(text) == result
    assert text.isascii()


@given(results)
def test_text_is_the_first_candidates(result: Result) -> None:
    assert result.text == result.candidates[0].text


@pytest.mark.parametrize("fields", [{"finish_reason": "tired"}, {"seed": "x"}, {"extra": 1}])
def test_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    whole = {"index": 0, "text": "x", "finish_reason": "eos", "completion_tokens": 1, "seed": 1}

    assert Candidate.model_validate(whole).finish_reason is FinishReason.EOS
    with pytest.raises(ValidationError):
        Candidate.model_validate({**whole, **fields})


@given(st.binary(max_size=6))
def test_bytes_of_a_token_survive_json_even_if_they_are_no_text(data: bytes) -> None:
    token = LikelyToken(token_id=3, piece="<0xE9>", text_hex=data.hex(), logprob=-0.5)

    again = LikelyToken.model_validate_json(token.model_dump_json())

    assert again.text_bytes == data


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan")])
def test_a_logprob_is_a_number_that_json_can_write(logprob: float) -> None:
    with pytest.raises(ValidationError):
        LikelyToken(token_id=3, piece="x", text_hex="78", logprob=logprob)


def test_a_result_from_before_logprobs_is_read_without_them() -> None:
    old = {"index": 0, "text": "x", "finish_reason": "eos", "completion_tokens": 1, "seed": 1}

    assert Candidate.model_validate(old).logprobs is None


@given(results)
def test_result_cannot_change_and_knows_its_time_zone(result: Result) -> None:
    with pytest.raises(ValidationError):
        result.attempt = 2
    with pytest.raises(ValidationError):
        Result.model_validate({**result.model_dump(), "created_at": datetime(2026, 1, 1)})  # noqa: DTZ001
    assert result.created_at.utcoffset() is not None
    assert result.timings.total_s >= 0
    assert timedelta(seconds=result.timings.total_s) >= timedelta(0)
