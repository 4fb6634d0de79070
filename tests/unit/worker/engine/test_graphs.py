"""What a GPU's engine does differently, on a CPU: recorded steps, and tokens that are read one step late."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.graphs import StepGraphs
from codeherd_worker.engine.layouts import lay_out_step
from codeherd_worker.engine.probes import _Probes
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper
from tests.unit.worker.engine.recorded_graphs import FakeCuda
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

CPU = torch.device("cpu")
#: Seconds.
PATIENCE = 60
UNIFORM = (SlotClass(640, 3),)
MIXED = (SlotClass(96, 2), SlotClass(640, 1))

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture
def start_engine(model: LlamaForCausalLM, torch_operators: None) -> Iterator[StartEngine]:
    """Start an engine that behaves as on a GPU in what is asked for."""
    engines: list[Engine] = []

    def start(
        classes: tuple[SlotClass, ...] = UNIFORM, *, lag: int = 0, draft_tokens: int = 0, graphs: bool = False
    ) -> Engine:
        engine = Engine(model, EngineSettings(classes, prefill_chunk=64, draft_tokens=draft_tokens))
        engines.append(engine)
        passes = engine._decoder.passes
        passes.row_counts = (passes.rows,)
        engine.warm_up()
        if graphs:
            passes.drafts_are_optional = draft_tokens == 0
            with torch.inference_mode():
                _Probes(passes).capture()
                passes.cache.clear()
        engine._scheduler._lag = lag
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


def request(
    number: int, new_tokens: int = 20, *, stop_ids: Sequence[int] = (), cancel: CancelToken | None = None
) -> SequenceRequest:
    """Return one of several very different sequences; every other one is drawn, not greedy."""
    return SequenceRequest(
        random_prompt(4 + 13 * number),
        SamplingParams(temperature=0.9 * (number % 2), top_p=0.9, repetition_penalty=1.1, seed=number),
        Stopper(stop_ids=frozenset(stop_ids), stop_strings=(), max_new_tokens=new_tokens, detokenizer=None),
        cancel or CancelToken(),
    )


def answers(engine: Engine, numbers: Sequence[int], new_tokens: int = 20) -> list[tuple[int, ...]]:
    futures = [engine.submit(request(number, new_tokens)) for number in numbers]
    return [future.result(PATIENCE).token_ids for future in futures]


def test_a_replay_computes_on_the_new_inputs(cuda: FakeCuda) -> None:
    graphs = StepGraphs(CPU)
    ones = torch.ones(2, 1, dtype=torch.int64)
    graphs.capture("shape", lambda ids, positions, written: ids * 100 + positions * 10 + written, (ones,) * 3)

    logits = graphs.replay("shape", (ones * 4, ones * 5, ones * 6))

    assert logits.tolist() == [[456], [456]]
    assert graphs.replay("shape", (ones, ones, ones)) is logits
    assert logits.tolist() == [[111], [111]]


def test_what_only_a_step_refers_to_outlives_its_capture(cuda: FakeCuda) -> None:
    graphs = StepGraphs(CPU)

    def capture() -> weakref.ref[torch.Tensor]:
        table = torch.arange(10) ** 2
        graphs.capture("shape", lambda ids, *_: table[ids], (torch.zeros(3, dtype=torch.int64),) * 3)
        return weakref.ref(table)

    table = capture()

    assert table() is not None
    assert graphs.replay("shape", (torch.tensor([1, 5, 9]),) * 3).tolist() == [1, 25, 81]


def test_all_captures_share_a_stream_and_the_first_ones_pool(cuda: FakeCuda) -> None:
    graphs = StepGraphs(CPU)
    zeros = torch.zeros(1, dtype=torch.int64)
    for shape in range(3):
        graphs.capture(shape, lambda ids, *_: ids + 1, (zeros,) * 3)

    pools, streams = zip(*cuda.captures, strict=True)

    assert len(set(streams)) == 1
    assert pools[0] is None
    assert pools[1] == pools[2] is not None
    assert graphs.captures == 3


def test_a_step_that_asks_the_device_cannot_be_captured(cuda: FakeCuda) -> None:
    graphs = StepGraphs(CPU)
    zeros = torch.zeros(1, dtype=torch.int64)

    with pytest.raises(RuntimeError, match="waits for the device"):
        graphs.capture("shape", lambda ids, *_: ids + int(ids.sum()), (zeros,) * 3)

    assert "shape" not in graphs


@pytest.mark.parametrize("classes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_replayed_steps_say_what_steps_say(
    start_engine: StartEngine,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    classes: tuple[SlotClass, ...],
    draft_tokens: int,
) -> None:
    expected = answers(start_engine(classes, draft_tokens=draft_tokens), range(6))
    engine = start_engine(classes, draft_tokens=draft_tokens, graphs=True)
    graphs = engine._decoder.passes.graphs
    captures, replays, replay = graphs.captures, [], graphs.replay

    def counted(shape: Hashable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        replays.append(shape)
        return replay(shape, inputs)

    monkeypatch.setattr(graphs, "replay", counted)

    found = answers(engine, range(6))

    assert found == expected
    assert captures > 1
    assert graphs.captures == captures
    # Every step had a graph.
    assert len(replays) == engine.stats().steps


def test_every_place_of_a_slot_has_a_graph(start_engine: StartEngine, cuda: FakeCuda) -> None:
    passes = start_engine(MIXED, graphs=True)._decoder.passes
    layout = lay_out_step((), passes.rows, passes.cache, CPU)

    shapes = {
        (torch.Size([passes.rows, 1]), tuple(passes._reads(layout, {slot: tokens})))
        for slot, room in ((0, MIXED[0]), (2, MIXED[1]))
        for tokens in range(1, room.length + 1)
    }

    assert len(shapes) == passes.graphs.captures
    assert all(shape in passes.graphs for shape in shapes)


@pytest.mark.parametrize("graphs", [False, True], ids=["computed", "replayed"])
def test_reading_one_step_late_changes_no_text(
    start_engine: StartEngine, cuda: FakeCuda, graphs: bool
) -> None:
    expected = answers(start_engine(), range(7))

    found = answers(start_engine(lag=1, graphs=graphs), range(7))

    assert found == expected


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_the_last_tokens_arrive_though_no_step_follows(start_engine: StartEngine, new_tokens: int) -> None:
    engine = start_engine(lag=1)

    for number in range(2):
        assert len(engine.submit(request(number, new_tokens)).result(PATIENCE).token_ids) == new_tokens

    assert engine.stats().active == 0


def test_a_stop_id_that_is_read_late_ends_the_text_where_it_stands(start_engine: StartEngine) -> None:
    whole = answers(start_engine(), [2])[0]
    place = next(place for place in range(3, len(whole)) if whole[place] not in whole[:place])
    engine = start_engine(lag=1)
    others = [engine.submit(request(number)) for number in (0, 1)]

    outcome = engine.submit(request(2, stop_ids=[whole[place]])).result(PATIENCE)

    assert outcome.token_ids == whole[:place]
    assert outcome.finish_reason is FinishReason.EOS
    assert [len(other.result(PATIENCE).token_ids) for other in others] == [20, 20]
    # The slot that was left one step late says to the next one what any slot says.
    assert answers(engine, range(5)) == answers(start_engine(), range(5))


def test_a_cancelled_sequence_leaves_no_late_token(start_engine: StartEngine) -> None:
    engine = start_engine(lag=1)
    cancel = CancelToken()
    future = engine.submit(request(1, 500, cancel=cancel))
    other = engine.submit(request(2))
    assert len(other.result(PATIENCE).token_ids) == 20

    cancel.cancel(CancelReason.USER)

    outcome = future.result(PATIENCE)
    assert outcome.cancelled is CancelReason.USER
    assert outcome.completion_tokens == len(outcome.token_ids) < 500
    assert answers(engine, range(4)) == answers(start_engine(), range(4))
