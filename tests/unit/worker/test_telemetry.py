from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.memory import Card, MemoryPlan
from codeherd_worker.telemetry import Identity, RateMeter, Rates, Telemetry
from tests.unit.worker.engine.misrounding import NUDGE, disturb_linears
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

CLASSES = (SlotClass(128, 2), SlotClass(600, 1))
PLAN = MemoryPlan(CLASSES, 600, 0, (Card("cpu", 10**9, 10**9, 0.4, 123, 456, 1024),))
IDENTITY = Identity("cpu0@host", "tiny", "codeherd.tiny", "revision", "none")
PATIENCE_S = 60


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Looking:
    """A detokenizer that looks at the figures when the third token comes."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self.seen: dict[str, Any] = {}
        self._count = 0

    def push(self, token_id: int) -> str:
        self._count += 1
        if self._count == 3 and self.telemetry is not None:
            self.seen = self.telemetry.figures()
        return "secret text"

    def finish(self) -> str:
        return ""


@contextmanager
def observed(**options: Any) -> Iterator[tuple[Engine, Telemetry]]:
    engine = Engine(tiny_llama(), EngineSettings(CLASSES, prefill_chunk=64, **options))
    engine.warm_up()
    engine.start()
    try:
        yield engine, Telemetry(engine, PLAN, IDENTITY)
    finally:
        engine.close()


def request(
    prompt_ids: tuple[int, ...], detokenizer: Looking | None = None, *, count: int = 5, name: str = ""
) -> SequenceRequest:
    return SequenceRequest(
        prompt_ids=prompt_ids,
        sampling=SamplingParams(),
        stopper=Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=count, detokenizer=detokenizer),
        cancel=CancelToken(),
        name=name,
    )


def test_rates_are_those_of_the_last_seconds() -> None:
    clock = Clock()
    meter = RateMeter(clock, window_s=10)

    for second in range(31):
        clock.now_s = 100.0 + second
        # 10 tokens a second at first, 50 in the last ten seconds, and busy for half of these.
        late = max(0, second - 20)
        meter.sample(10 * second + 40 * late, 0.5 * late)

    assert meter.rates() == Rates(50.0, 0.5, 10.0)


def test_rates_of_rare_samples_are_those_since_the_last() -> None:
    clock = Clock()
    meter = RateMeter(clock, window_s=10)
    meter.sample(0, 0.0)
    clock.now_s += 1000
    meter.sample(100, 1.0)
    clock.now_s += 50
    meter.sample(200, 51.0)

    assert meter.rates() == Rates(2.0, 1.0, 50.0)


def test_there_are_no_rates_without_time_and_none_below_zero() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    assert meter.rates() == Rates(0.0, 0.0, 0.0)
    meter.sample(500, 9.0)
    assert meter.rates() == Rates(0.0, 0.0, 0.0)

    # The engine broke and counts from 0.
    clock.now_s += 5
    meter.sample(0, 9.0)

    assert meter.rates() == Rates(0.0, 0.0, 5.0)


def test_figures_count_what_the_engine_did() -> None:
    prompt = random_prompt(70)
    with observed() as (engine, telemetry):
        engine.submit(request(prompt)).result(PATIENCE_S)
        engine.submit(request((*prompt[:64], 5, 6, 7))).result(PATIENCE_S)
        figures = telemetry.figures()

    assert (figures["slots"], figures["active"], figures["waiting"]) == (3, 0, 0)
    assert figures["tokens"] == 10
    assert (figures["prompt_tokens"], figures["reused_tokens"]) == (137, 64)
    assert figures["reuse_rate"] == round(64 / 137, 3)
    assert (figures["drafted"], figures["acceptance_rate"]) == (0, None)
    assert figures["passes"] >= 3
    assert figures["cache_bytes"] == engine.stats().cache_bytes
    assert figures["weight_bytes"] == 123
    assert figures["fingerprint"] == engine.fingerprint
    assert figures["tokens_per_s"] > 0
    assert 0 < figures["busy_share"] <= 1
    assert figures["memory_bytes"] > 10**6
    assert [part["length"] for part in figures["classes"]] == [128, 600]
    assert [part["spare"] for part in figures["classes"]] == [512, 1024]
    assert all(view["name"] is None for view in figures["slot_views"])


def test_drafts_that_were_right_are_counted() -> None:
    # A prompt that repeats itself: the model need not agree, but guesses are made.
    with observed(draft_tokens=3) as (engine, telemetry):
        engine.submit(request(random_prompt(8) * 6, count=40)).result(PATIENCE_S)
        figures = telemetry.figures()

    assert figures["draft_tokens"] == 3
    assert 0 <= figures["accepted"] <= figures["drafted"]
    assert figures["drafted"] > 0
    assert figures["acceptance_rate"] == round(figures["accepted"] / figures["drafted"], 3)


def test_a_running_sequence_is_seen_by_its_numbers_and_name_alone() -> None:
    looking = Looking()
    with observed() as (engine, telemetry):
        looking.telemetry = telemetry
        engine.submit(request(random_prompt(40), looking, name="job-1")).result(PATIENCE_S)

    [view] = [view for view in looking.seen["slot_views"] if view["name"] is not None]
    assert view["name"] == "job-1"
    assert (view["prompt_tokens"], view["prefilled_tokens"], view["reused_tokens"]) == (40, 40, 0)
    assert 2 <= view["new_tokens"] <= 3
    assert view["length"] == 128
    # As Celery sends it, and without a word of the text.
    assert "secret" not in json.dumps(looking.seen)


def test_idle_rows_are_no_class_that_figures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def disturb(output: torch.Tensor) -> None:
        if len(output) == 3:
            output[-1] += NUDGE

    disturb_linears(monkeypatch, disturb)
    with observed() as (engine, telemetry):
        figures = telemetry.figures()

    assert engine.facts["rows"] == 4
    assert [(part["length"], part["slots"]) for part in figures["classes"]] == [(128, 2), (600, 1)]
    assert [view["slot"] for view in figures["slot_views"]] == [0, 1, 2]


@pytest.mark.parametrize("name", ["granule", "prefill_chunk", "drafts_are_optional", "plan", "uptime_s"])
def test_figures_hold_the_shapes_that_masks_depend_on(name: str) -> None:
    with observed() as (_, telemetry):
        assert name in telemetry.figures()
