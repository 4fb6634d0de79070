import itertools
import threading

import torch

from codeherd_schema.errors import EngineFailed
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.faults import is_sticky
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.watchdog import HUNG_STATUS, Watchdog
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

#: An activation that a CPU has no compiled loop for: every pass calls the model's own.
CALLED = {"hidden_act": "gelu"}


class Hanging:
    """A detokenizer that never comes back, as a kernel that never ends."""

    def __init__(self) -> None:
        self.entered, self.free = threading.Event(), threading.Event()

    def push(self, token_id: int) -> str:
        self.entered.set()
        self.free.wait(60)
        return ""

    def finish(self) -> str:
        return ""


class Noting:
    """A detokenizer that notes when the engine's last pass was."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.moments: list[float] = []

    def push(self, token_id: int) -> str:
        assert self.engine is not None
        self.moments.append(self.engine.stats().last_step_at)
        return ""

    def finish(self) -> str:
        return ""


def sequence(
    detokenizer: Hanging | Noting | None, *, prompt_tokens: int = 3, new_tokens: int = 2
) -> SequenceRequest:
    stopper = Stopper(
        stop_ids=frozenset(), stop_strings=(), max_new_tokens=new_tokens, detokenizer=detokenizer
    )
    return SequenceRequest(
        prompt_ids=random_prompt(prompt_tokens),
        sampling=SamplingParams(),
        stopper=stopper,
        cancel=CancelToken(),
        deadline=None,
        priority=5,
    )


def test_an_engine_whose_step_never_ends_ends_the_process() -> None:
    engine = Engine(tiny_llama(), EngineSettings.uniform(slots=2, max_len=128))
    engine.start()
    hanging, ended = Hanging(), list[int]()
    now = [0.0]
    watchdog = Watchdog(
        engine, step_timeout_s=5.0, on_broken=lambda: None, on_hung=ended.append, clock=lambda: now[0]
    )

    future = engine.submit(sequence(hanging))
    assert hanging.entered.wait(30)
    now[0] = engine.stats().last_step_at + 4.0
    watchdog.look()
    assert ended == []
    now[0] += 2.0
    watchdog.look()

    assert ended == [HUNG_STATUS]
    hanging.free.set()
    future.result(30)
    engine.close()


def test_an_idle_engine_never_counts_as_hung() -> None:
    engine = Engine(tiny_llama(), EngineSettings.uniform(slots=2, max_len=128))
    engine.start()
    ended = list[int]()
    watchdog = Watchdog(
        engine, step_timeout_s=5.0, on_broken=lambda: None, on_hung=ended.append, clock=lambda: 1e12
    )

    engine.submit(sequence(None)).result(30)
    watchdog.look()

    assert ended == []
    engine.close()


def test_work_that_comes_after_hours_finds_the_engine_alive() -> None:
    now, ended = [0.0], list[int]()
    engine = Engine(tiny_llama(), EngineSettings.uniform(slots=2, max_len=128), clock=lambda: now[0])
    watchdog = Watchdog(
        engine, step_timeout_s=5.0, on_broken=lambda: None, on_hung=ended.append, clock=lambda: now[0]
    )
    now[0] = 36_000.0
    # Seen before the first pass: the engine does not even run yet.
    first = engine.submit(sequence(None))
    watchdog.look()
    assert ended == []

    # What comes later gives nobody more time.
    now[0] += 4.0
    second = engine.submit(sequence(None))
    now[0] += 2.0
    watchdog.look()
    assert ended == [HUNG_STATUS]

    engine.start()
    first.result(30)
    second.result(30)
    engine.close()


def test_a_broken_engine_is_told_once() -> None:
    model = tiny_llama(**CALLED)
    engine = Engine(model, EngineSettings.uniform(slots=2, max_len=128))
    told = list[bool]()
    watchdog = Watchdog(engine, step_timeout_s=5.0, on_broken=lambda: told.append(True))

    engine.start()
    watchdog.look()
    assert told == []
    # What the engine calls in every pass is not what it was.
    model.model.layers[0].mlp.act_fn.forward = lambda *_: None
    assert engine.submit(sequence(None)).exception(30) is not None
    watchdog.look()
    watchdog.look()

    assert told == [True]
    engine.close()


def test_every_pass_moves_the_moment_that_the_watchdog_looks_at() -> None:
    ticks = itertools.count()
    engine = Engine(
        tiny_llama(),
        EngineSettings.uniform(slots=2, max_len=128, prefill_chunk=32),
        clock=lambda: float(next(ticks)),
    )
    engine.start()
    noting = Noting()
    noting.engine = engine
    before = engine.stats().last_step_at

    request = sequence(noting, prompt_tokens=100, new_tokens=4)
    engine.submit(request).result(30)

    # Prefill in four passes came before the first token; each begins and ends with a look at the clock.
    assert noting.moments[0] - before >= 8
    assert noting.moments == sorted(set(noting.moments))
    assert len(noting.moments) == 4
    engine.close()


def test_a_lost_device_breaks_the_engine_and_ends_the_process_in_good_order() -> None:
    model = tiny_llama(**CALLED)
    engine = Engine(model, EngineSettings.uniform(slots=2, max_len=128))

    def lost(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    told, ended = list[bool](), list[int]()
    watchdog = Watchdog(engine, step_timeout_s=5.0, on_broken=lambda: told.append(True), on_hung=ended.append)
    engine.start()
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lost
    error = engine.submit(sequence(None)).exception(30)
    watchdog.look()

    assert isinstance(error, EngineFailed)
    assert is_sticky(error.__cause__ or error)
    assert told == [True]
    assert ended == []
    engine.close()
