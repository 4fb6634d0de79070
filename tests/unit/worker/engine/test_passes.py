from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.passes import Passes, _row_counts, has_kernels
from codeherd_worker.engine.slot_classes import SlotClass
from tests.unit.worker.engine.misrounding import NUDGE, disturb_linears
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

CHUNK = 128


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def make_passes(model: LlamaForCausalLM, *, slots: int = 5, draft_tokens: int = 0) -> Passes:
    classes = (SlotClass(300, slots),)
    return Passes(model, classes=classes, prefill_chunk=CHUNK, draft_tokens=draft_tokens)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
    ],
)
def test_steps_have_powers_of_two_multiples_of_eight_or_all_rows(rows: int, counts: list[int]) -> None:
    assert _row_counts(rows) == counts


def test_row_counts_at_which_matrices_round_otherwise_are_left_out(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor) -> None:
        if len(output) in (2, 8):
            output += NUDGE

    disturb_linears(monkeypatch, disturb)
    passes = make_passes(model, slots=9)

    assert not {2, 8} & set(passes.row_counts)
    assert set(passes.row_counts) <= {1, 4, passes.rows}
    assert passes.row_counts[-1] == passes.rows
    assert passes.row_count(2) >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_holds_keys_in_float32_whatever_the_model(dtype: torch.dtype) -> None:
    passes = make_passes(tiny_llama().to(dtype))

    assert passes.dtype == dtype
    assert passes.cache.dtype == torch.float32
    logits, _, _ = passes.prefill([Piece(0, random_prompt(20), 0, ends=True)])
    assert logits.dtype == dtype


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize(
    ("draft_tokens", "kv_heads", "query_rows"),
    [(0, 2, 2), (2, 2, 6), (3, 2, 8), (0, 4, 2), (2, 4, 4), (4, 4, 6)],
)
def test_query_rows_hold_a_token_and_its_drafts_and_are_even(
    draft_tokens: int, kv_heads: int, query_rows: int
) -> None:
    # Always even: see `attention.py`.
    passes = make_passes(tiny_llama(num_key_value_heads=kv_heads), draft_tokens=draft_tokens)

    assert passes.query_rows == query_rows


@pytest.mark.parametrize(
    ("device", "head_size", "expected"),
    [("cpu", 4, True), ("cpu", 128, True), ("cpu", 6, False), ("cpu", 66, False), ("cuda", 64, False)],
)
def test_a_cpu_has_kernels_for_heads_of_whole_fours(device: str, head_size: int, expected: bool) -> None:
    assert has_kernels(torch.device(device), head_size) == expected


def test_kernels_read_what_a_token_has_and_have_no_shapes(model: LlamaForCausalLM) -> None:
    classes = (SlotClass(300, 1), SlotClass(900, 1))
    passes = Passes(model, classes=classes, prefill_chunk=CHUNK, draft_tokens=0)

    assert passes.kv_lengths[:2] == ((512,), (1024,))
    assert not passes.reads_vary
    assert passes.query_rows == 0


@pytest.mark.usefixtures("torch_attention")
def test_torchs_attention_reads_as_far_as_one_of_few_lengths(model: LlamaForCausalLM) -> None:
    classes = (SlotClass(300, 1), SlotClass(900, 1))
    passes = Passes(model, classes=classes, prefill_chunk=CHUNK, draft_tokens=0)

    assert passes.kv_lengths[:2] == ((512,), (512, 1024))
    assert passes.reads_vary
    assert [passes.kv_len_for(tokens, 1) for tokens in (1, 512, 513)] == [512, 512, 1024]


def test_a_prefill_says_which_slot_each_row_of_its_logits_belongs_to(model: LlamaForCausalLM) -> None:
    passes = make_passes(model)
    pieces = [Piece(slot, random_prompt(20, slot), 0, ends=slot != 2) for slot in (4, 2, 0, 1)]
    alone = {
        slot: passes.prefill([Piece(slot, random_prompt(20, slot), 0, ends=True)])[0][0] for slot in (4, 0, 1)
    }

    logits, rows, slots = passes.prefill(pieces)

    assert rows.dtype == torch.int64
    assert rows.tolist() == slots
    assert slots[:3] == [4, 0, 1]
    assert len(slots) == len(logits) == passes.row_count(3)
    # Whatever fills up to a sound number of rows repeats the first one.
    assert set(slots[3:]) <= {4}
    for slot, row in zip(slots, logits, strict=True):
        assert torch.equal(row, alone[slot])


def test_a_prefill_where_no_prompt_ends_still_has_a_row(model: LlamaForCausalLM) -> None:
    logits, rows, slots = make_passes(model).prefill([Piece(3, random_prompt(CHUNK), 0, ends=False)])

    assert slots[0] == 3
    assert rows.tolist() == slots
    assert len(logits) == len(slots)
