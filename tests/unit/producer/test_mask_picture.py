"""The picture of a mask against the masks with which a real engine attends, where masks are tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from codeherd_producer.commands.mask_picture import Cell, RowKind, SlotFacts, draw, picture, queries
from codeherd_worker.engine import passes
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.memory import MemoryPlan
from codeherd_worker.telemetry import Identity, Telemetry
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

LENGTH, CHUNK, LAYERS, NEW = 600, 64, 2, 6
#: Wide enough for every token of these tests to be a character.
WIDE = 1200
PATIENCE_S = 60


class Watching:
    """A detokenizer that keeps the slot's figures and the masks so far when the last token comes."""

    def __init__(self, telemetry: Telemetry, masks: list[torch.Tensor]) -> None:
        self._telemetry, self._masks = telemetry, masks
        self._count = 0
        self.facts: SlotFacts | None = None
        self.masks: list[torch.Tensor] = []

    def push(self, token_id: int) -> str:
        self._count += 1
        if self._count == NEW:
            figures = self._telemetry.figures()
            [view] = [view for view in figures["slot_views"] if view["name"] is not None]
            self.facts = SlotFacts.of(figures, view)
            self.masks = list(self._masks)
        return ""

    def finish(self) -> str:
        return ""


class Attended:
    """A real engine with one slot, and every mask that its kernels get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = EngineSettings.uniform(slots=1, max_len=LENGTH, prefill_chunk=CHUNK)
        self.engine = Engine(tiny_llama(), settings)
        self.engine.warm_up()
        self.engine.start()
        self.masks: list[torch.Tensor] = []
        plan = MemoryPlan(settings.classes, LENGTH, 0, ())
        self._telemetry = Telemetry(self.engine, plan, Identity("w", "m", "q", "r", "none"))
        real = functional.scaled_dot_product_attention

        def noting(*tensors: Any, **options: Any) -> torch.Tensor:
            self.masks.append(options["attn_mask"].clone())
            return real(*tensors, **options)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)

    def run(self, prompt_ids: tuple[int, ...]) -> tuple[SlotFacts, list[torch.Tensor]]:
        """Return the slot at its last token, and what each query until then was given: (kv_len,) each."""
        self.masks.clear()
        watching = Watching(self._telemetry, self.masks)
        stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=NEW, detokenizer=watching)
        self.engine.submit(
            SequenceRequest(prompt_ids, SamplingParams(), stopper, CancelToken(), name="job")
        ).result(PATIENCE_S)
        assert watching.facts is not None
        granule = watching.facts.granule
        # Every layer attends with the same mask.
        given = [
            row
            for mask in watching.masks[::LAYERS]
            for row in (mask[:, 0, :granule].flatten(0, 1) if mask.shape[2] > 1 else mask[:1, 0, 0])
        ]
        return watching.facts, given


@pytest.fixture(scope="module")
def attended() -> Iterator[Attended]:
    with pytest.MonkeyPatch.context() as patch:
        # A CPU's own kernels have no masks.
        patch.setattr(passes, "has_kernels", lambda _device, _head_size: False)
        attended = Attended(patch)
        yield attended
        attended.engine.close()


def assert_drawn_as_given(facts: SlotFacts, given: list[torch.Tensor]) -> None:
    asked = [query for query in queries(facts) if query.kind is not RowKind.COPIED]
    drawn: dict[tuple[RowKind, int], tuple[Cell, ...]] = {
        (row.kind, row.first): row.cells
        for row in picture(facts, WIDE).rows
        if row.kind is not RowKind.COPIED
    }
    # The last token is known and not yet computed with.
    assert len(given) in (len(asked), len(asked) - 1)
    for query, mask in zip(asked, given, strict=False):
        assert query.kv_len == len(mask)
        cells = drawn[query.kind, query.position]
        assert cells[query.kv_len] is Cell.BORDER
        is_seen = [cell in (Cell.ATTENDED, Cell.REUSED) for cell in cells[: query.kv_len]]
        assert is_seen == (mask == 0).tolist()
        assert set(cells[query.kv_len + 1 :]) <= {Cell.UNREAD}


@pytest.mark.parametrize("prompt_tokens", [1, 31, 32, 40, 64, 100, 130, 509])
def test_each_drawn_cell_is_what_the_engine_attends(attended: Attended, prompt_tokens: int) -> None:
    facts, given = attended.run(random_prompt(prompt_tokens))

    assert (facts.prompt_tokens, facts.reused_tokens, facts.new_tokens) == (
        prompt_tokens,
        0,
        facts.new_tokens,
    )
    assert facts.new_tokens >= NEW - 1
    assert_drawn_as_given(facts, given)


def test_a_reused_prefix_is_drawn_as_it_is_attended(attended: Attended) -> None:
    prompt = random_prompt(100)
    attended.run(prompt)

    facts, given = attended.run((*prompt[:64], *random_prompt(11, seed=1)))

    assert facts.reused_tokens == 64
    assert_drawn_as_given(facts, given)
    row = next(row for row in picture(facts, WIDE).rows if row.kind is RowKind.PREFILL)
    assert row.cells[:65] == (Cell.REUSED,) * 64 + (Cell.ATTENDED,)


def facts(**changes: Any) -> SlotFacts:
    values: dict[str, Any] = {
        "slot": 3, "length": 16_384, "spare": 16_384, "prompt_tokens": 3000, "reused_tokens": 512,
        "prefilled_tokens": 3000, "new_tokens": 200, "granule": 32, "prefill_chunk": 256,
        "kv_lengths": tuple(range(512, 16_385, 512)),
    }  # fmt: skip
    return SlotFacts(**(values | changes))


@pytest.mark.parametrize("width", [40, 80, 100, 237])
def test_a_long_sequence_is_scaled_to_the_terminal(width: int) -> None:
    shown = picture(facts(), width)

    lines = draw(shown)

    assert shown.scale > 1
    assert f"1 character = {shown.scale} tokens" in lines[1]
    body = lines[3 : 4 + len(shown.rows)]
    assert max(map(len, body)) <= max(width, 24 + 16 + 3)
    # No query is left out, and each is in the row of its kind.
    assert sum(row.queries for row in shown.rows) == len(list(queries(facts())))


def test_a_block_is_full_partial_or_empty_as_its_tokens_are() -> None:
    sized = {"prompt_tokens": 700, "reused_tokens": 160, "prefilled_tokens": 700, "new_tokens": 20}
    asked = facts(**sized, kv_lengths=(256, 512, 768))
    exact, scaled = picture(asked, 800), picture(asked, 60)
    assert exact.scale == 1 < scaled.scale
    seen = {
        (row.first, column)
        for row in exact.rows
        if row.kind is RowKind.PREFILL
        for column, cell in enumerate(row.cells)
        if cell in (Cell.ATTENDED, Cell.REUSED)
    }

    for row in (row for row in scaled.rows if row.kind is RowKind.PREFILL):
        for number, cell in enumerate(row.cells):
            columns = range(number * scaled.scale, min((number + 1) * scaled.scale, scaled.columns))
            block = [(q, c) in seen for q in (row.first, row.last) for c in (columns[0], columns[-1])]
            is_full, is_empty = all(block), not any(block)
            assert (cell in (Cell.ATTENDED, Cell.REUSED)) == is_full
            assert (cell in (Cell.HIDDEN, Cell.BORDER, Cell.UNREAD)) == is_empty


def test_a_short_sequence_is_exact_though_its_read_is_longer_than_the_terminal() -> None:
    short = facts(prompt_tokens=40, reused_tokens=0, prefilled_tokens=40, new_tokens=3, kv_lengths=(512,))

    shown = picture(short, 80)

    assert shown.scale == 1
    assert [row.first for row in shown.rows if row.kind is RowKind.DECODE] == [40, 41, 42]


def test_prompt_tokens_whose_turn_has_not_come_wait() -> None:
    half = facts(prompt_tokens=100, reused_tokens=32, prefilled_tokens=64, new_tokens=0)

    kinds = [query.kind for query in queries(half)]

    assert kinds == [RowKind.COPIED] * 32 + [RowKind.PREFILL] * 32 + [RowKind.WAITING] * 36


def test_padding_is_one_line_and_written_to_the_spare_places() -> None:
    shown = picture(facts(prompt_tokens=40, reused_tokens=0, prefilled_tokens=40, new_tokens=1), 600)

    lines = draw(shown)

    [padding] = [line for line in lines if line.startswith("padding")]
    assert "24 x 39" in padding
    assert padding.endswith("┆x")
    assert all(line.endswith("┆░") for line in lines if line.startswith(("prefill", "decode")))
    assert lines[-1].startswith("░ spare places")


def test_drafts_that_are_always_tried_read_as_far_as_they_reach() -> None:
    sized = {"prompt_tokens": 509, "reused_tokens": 0, "prefilled_tokens": 509, "new_tokens": 1}

    reads = [list(queries(facts(**sized, step_width=width)))[-1].kv_len for width in (1, 4)]

    assert reads == [512, 1024]
