import threading

from codeherd_worker.engine.detokenize import Detokenizer
from codeherd_worker.engine.engine import Engine, EngineSettings, SequenceRequest
from codeherd_worker.engine.sampling import SamplingParams
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.watchdog import HUNG_STATUS, Watchdog
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama


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


def sequence(detokenizer: Detokenizer | Hanging | None) -> SequenceRequest:
    stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=2, detokenizer=detokenizer)
    return SequenceRequest(
        prompt_ids=random_prompt(3),
        sampling=SamplingParams(),
        stopper=stopper,
        cancel=CancelToken(),
        deadline=None,
        priority=5,
    )


def test_an_engine_whose_step_never_ends_ends_the_process() -> None:
    engine = Engine(tiny_llama(), EngineSettings(slots=2, max_len=64))
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
    engine = Engine(tiny_llama(), EngineSettings(slots=2, max_len=64))
    engine.start()
    ended = list[int]()
    watchdog = Watchdog(
        engine, step_timeout_s=5.0, on_broken=lambda: None, on_hung=ended.append, clock=lambda: 1e12
    )

    engine.submit(sequence(None)).result(30)
    watchdog.look()

    assert ended == []
    engine.close()


def test_a_broken_engine_is_told_once() -> None:
    model = tiny_llama()
    engine = Engine(model, EngineSettings(slots=2, max_len=64))
    told = list[bool]()
    watchdog = Watchdog(engine, step_timeout_s=5.0, on_broken=lambda: told.append(True))

    engine.start()
    watchdog.look()
    assert told == []
    # A model without its layers cannot make a step.
    del model.model.layers
    assert engine.submit(sequence(None)).exception(30) is not None
    watchdog.look()
    watchdog.look()

    assert told == [True]
    engine.close()
