"""Valid requests, results and rows to start a test from, and strategies that draw any valid request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import delete, update

from codeherd_schema.database import Database
from codeherd_schema.models import ModelTable
from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, Request
from codeherd_schema.results import (
    Candidate,
    Cut,
    FinishReason,
    LikelyToken,
    Result,
    Timings,
    TokenLogprob,
)
from codeherd_schema.store import Claim
from codeherd_schema.tables import jobs


def a_request(**options: Any) -> GenerateRequest:
    """A small valid request."""
    return GenerateRequest(**{"prompt": "def f():", **options})


def a_result(claim: Claim, text: str = "    return 1", **fields: Any) -> Result:
    """A valid result of this attempt."""
    whole = {
        "job_id": claim.job.id,
        "attempt": claim.attempt,
        "candidates": (
            Candidate(index=0, text=text, finish_reason=FinishReason.EOS, completion_tokens=4, seed=7),
        ),
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "model": claim.job.model,
        "model_revision": "abc123",
        "quantization": "none",
        "engine_fingerprint": "f00",
        "worker_id": "w@host",
        "timings": Timings(queue_s=0.1, admit_s=0.2, prefill_s=0.3, decode_s=0.4, total_s=1.0),
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    }
    return Result(**{**whole, **fields})


def rewrite(database_url: str, job_id: str, **columns: Any) -> None:
    """Change a job's row behind the store's back, as only time could."""
    with opened(database_url) as database, database.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**columns))


def delete_all_jobs(database_url: str) -> None:
    """Empty the database."""
    with opened(database_url) as database, database.begin() as connection:
        connection.execute(delete(jobs))


@contextmanager
def opened(database_url: str) -> Iterator[Database]:
    """Open a database and close it whatever happens."""
    database = Database.open(database_url)
    try:
        yield database
    finally:
        database.close()


#: Any text that UTF-8 can carry: NUL, controls, emoji, every line end.
texts = st.text(st.characters(codec="utf-8"), max_size=200)
words = st.text("abcXYZ019._:/@+-", min_size=1, max_size=64)
short_texts = st.text(st.characters(codec="utf-8"), max_size=50)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.one_of(
    st.datetimes(datetime(1990, 1, 1), datetime(9000, 1, 1), timezones=zones),  # noqa: DTZ001
    st.timedeltas(timedelta(0), timedelta(days=100_000)),
)
samplings = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(1, 100_000),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(0, 32_016),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(1, 2),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), max_size=16),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "n": st.integers(1, 16),
        "logprobs": st.integers(0, 5),
    },
)
_options: dict[str, st.SearchStrategy[Any]] = {
    "model": words,
    "sampling": samplings,
    "overflow": st.sampled_from(["refuse", "truncate"]),
    "priority": st.integers(0, 9),
    "run_at": st.none() | moments,
    "expires_at": st.none() | moments,
    "deadline": st.none() | moments,
    "labels": st.dictionaries(words, short_texts, max_size=16),
    "metadata": st.dictionaries(words, short_texts, max_size=16),
}


def _conversation(turns: list[str], system: str | None) -> list[dict[str, str]]:
    odd = turns if len(turns) % 2 else turns[:-1]
    spoken = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(odd)]
    return [{"role": "system", "content": system}, *spoken] if system is not None else spoken


generate_requests = st.builds(
    lambda options, prompt: GenerateRequest(prompt=prompt, **options),
    st.fixed_dictionaries({}, optional=_options),
    texts,
)
infill_requests = st.builds(
    lambda options, prefix, suffix, first: InfillRequest(
        prefix=prefix, suffix=suffix, suffix_first=first, **options
    ),
    st.fixed_dictionaries({}, optional=_options),
    texts,
    texts,
    st.booleans(),
)
chat_requests = st.builds(
    lambda options, turns, system: ChatRequest.model_validate(
        {"messages": _conversation(turns, system), **options}
    ),
    st.fixed_dictionaries({}, optional=_options),
    st.lists(texts, min_size=1, max_size=5),
    st.none() | texts,
)
#: Any valid request.
requests: st.SearchStrategy[Request] = st.one_of(generate_requests, infill_requests, chat_requests)

_a_likely_token: dict[str, st.SearchStrategy[Any]] = {
    "token_id": st.integers(0, 32_015),
    "piece": short_texts,
    "text_hex": st.binary(max_size=8).map(bytes.hex),
    "logprob": st.floats(-9999, 0),
}
_token_logprobs = st.builds(
    TokenLogprob,
    **_a_likely_token,
    top=st.lists(st.builds(LikelyToken, **_a_likely_token), max_size=2).map(tuple),
)
candidates = st.builds(
    Candidate,
    index=st.integers(0, 15),
    text=texts,
    finish_reason=st.sampled_from(FinishReason),
    completion_tokens=st.integers(0, 100_000),
    stop_string=st.none() | short_texts,
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.lists(_token_logprobs, max_size=2).map(tuple),
)
cuts = st.builds(
    Cut,
    part=st.sampled_from(["prompt", "prefix", "suffix", "messages"]),
    removed=st.integers(0, 10**6),
    total=st.integers(0, 10**6),
)
_seconds = st.floats(0, 1e6)
timings = st.builds(
    Timings, queue_s=_seconds, admit_s=_seconds, prefill_s=_seconds, decode_s=_seconds, total_s=_seconds
)
#: Every published model by name.
PUBLISHED = {model.name: model for model in ModelTable()}
