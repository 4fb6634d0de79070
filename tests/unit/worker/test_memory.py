"""The plan alone: numbers in, classes or a refusal out."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codeherd_schema.errors import InvalidSetting, OutOfMemory
from codeherd_schema.models import ModelTable
from codeherd_worker.engine.cache import KV_BLOCK, SPARE_TOKENS
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.memory import (
    CPU_RESERVE,
    GPU_RESERVE,
    STEP,
    Card,
    MemoryPlan,
    ModelShape,
    activation_bytes,
    cache_tokens,
    choose_classes,
    plan_memory,
    spell,
)

GB, GIB = 10**9, 2**30
#: Bytes of weights, computed from the published configurations (architecture, not measured): GB.
WEIGHTS = {
    ("7b", "nf4"): 3.87, ("7b", "int8"): 7.01, ("7b", "none"): 13.48,
    ("13b", "nf4"): 7.20, ("13b", "int8"): 13.35, ("13b", "none"): 26.03,
    ("34b", "nf4"): 18.19, ("34b", "int8"): 34.28, ("34b", "none"): 67.49,
    ("70b", "nf4"): 36.36, ("70b", "int8"): 69.53,
}  # fmt: skip
#: Slots of 2k, 4k and 16k tokens that one 80 GB card then holds, at 92 % and 2 GiB of activations.
SLOTS = {
    ("7b", "nf4"): (62, 31, 7), ("7b", "int8"): (59, 29, 7), ("7b", "none"): (53, 26, 6),
    ("13b", "nf4"): (38, 19, 4), ("13b", "int8"): (34, 17, 4), ("13b", "none"): (26, 13, 3),
    ("34b", "nf4"): (131, 65, 16), ("34b", "int8"): (91, 45, 11), ("34b", "none"): (9, 4, 1),
    ("70b", "nf4"): (51, 25, 6), ("70b", "int8"): (2, 1, 0),
}  # fmt: skip
SHAPES = {
    "7b": ModelShape(4096, 11008, 32, 32, 128, 32_016, 2),
    "13b": ModelShape(5120, 13824, 40, 40, 128, 32_016, 2),
    "34b": ModelShape(8192, 22016, 64, 8, 128, 32_000, 2),
    "70b": ModelShape(8192, 28672, 64, 8, 128, 32_016, 2),
}


def card(size: str, quantization: str, *, activations: int = 2 * GIB, available: int = 80 * GB) -> Card:
    return Card(
        name="cuda:0",
        total_bytes=80 * GB,
        available_bytes=available,
        reserve=GPU_RESERVE,
        weight_bytes=int(WEIGHTS[size, quantization] * GB),
        activation_bytes=activations,
        kv_bytes_per_token=ModelTable().find(f"codellama-{size}").kv_bytes_per_token(),
    )


def plain_card(tokens: int, *, others: int = 0) -> Card:
    """A card with room for exactly so many tokens of one byte."""
    return Card("cuda:0", tokens + others, tokens, 0.0, 0, 0, 1)


@pytest.mark.parametrize(("size", "quantization"), list(SLOTS))
def test_equal_slots_on_80_gb_are_as_many_as_the_table_says(size: str, quantization: str) -> None:
    tokens = card(size, quantization).tokens

    fitting = [tokens // (length + SPARE_TOKENS) for length in (2048, 4096, 16_384)]

    # Rounded weights in the table: one slot more or less.
    assert all(abs(found - said) <= 1 for found, said in zip(fitting, SLOTS[size, quantization], strict=True))


@pytest.mark.parametrize(
    ("size", "quantization", "slots", "classes"),
    [
        ("7b", "nf4", 4, "16384x4"),
        ("7b", "none", 8, "12800x6,16384x2"),
        ("7b", "none", 32, "1536x24,7680x7,16384x1"),
        ("13b", "int8", 32, "1024x24,4096x7,16384x1"),
        ("34b", "nf4", 16, "16384x16"),
        ("34b", "int8", 32, "3072x24,13824x7,16384x1"),
        ("70b", "nf4", 16, "3584x12,15360x3,16384x1"),
        # No window fits beside the others: the longest slot gets half.
        ("70b", "int8", 4, "1024x3,2560x1"),
    ],
)
def test_real_models_on_80_gb(size: str, quantization: str, slots: int, classes: str) -> None:
    plan = plan_memory([card(size, quantization)], slots=slots, window=16_384)

    assert spell(plan.classes) == classes
    assert plan.slots == slots


@given(
    tokens=st.integers(1, 3_000_000),
    slots=st.integers(1, 512),
    window=st.sampled_from([300, 512, 2048, 4096, 16_384, 100_000]),
    idle_rows=st.integers(0, 16),
)
# Half of this cache is less than one step.
@example(tokens=576, slots=2, window=300, idle_rows=0)
def test_whatever_is_computed_fits_and_uses_the_memory(
    tokens: int, slots: int, window: int, idle_rows: int
) -> None:
    classes = choose_classes(tokens, slots=slots, window=window, idle_rows=idle_rows)

    rows = slots + idle_rows
    if not classes:
        assert tokens < rows * (max(STEP, min(window, STEP)) + SPARE_TOKENS)
        return
    lengths = [part.length for part in classes]
    used = cache_tokens(classes, idle_rows)
    assert used <= tokens
    assert sum(part.slots for part in classes) == slots
    assert lengths == sorted(set(lengths))
    assert all(length == window or length % STEP == 0 for length in lengths)
    assert lengths[-1] <= window
    if window >= 4096 and tokens >= rows * 2048 and lengths != [window] and slots > 1 and idle_rows == 0:
        assert used >= 0.8 * min(tokens, rows * (window + SPARE_TOKENS))


@given(tokens=st.integers(20_000, 500_000), slots=st.integers(2, 64))
def test_one_slot_holds_the_window_if_the_others_can_live_beside_it(tokens: int, slots: int) -> None:
    window = 16_384
    classes = choose_classes(tokens, slots=slots, window=window)

    left = tokens - window - SPARE_TOKENS * slots
    # If the short ones have one step, the others take two on average: a quarter have four.
    if left >= (slots - 1) * 2 * STEP:
        assert classes[-1].length == window


def test_a_window_that_fits_everywhere_gives_one_class() -> None:
    assert choose_classes(8 * (2048 + SPARE_TOKENS), slots=8, window=2048) == (SlotClass(2048, 8),)
    assert len(choose_classes(8 * (2048 + SPARE_TOKENS) - 1, slots=8, window=2048)) > 1


def test_an_odd_window_is_kept_and_its_whole_blocks_counted() -> None:
    needed = 1024 + SPARE_TOKENS

    assert choose_classes(needed, slots=1, window=1000) == (SlotClass(1000, 1),)
    assert choose_classes(needed - 1, slots=1, window=1000) == (SlotClass(512, 1),)
    assert cache_tokens((SlotClass(1000, 2),)) == 2 * needed


@pytest.mark.parametrize("length", [256, 512, 2048])
def test_an_idle_row_takes_one_block_however_long_slots_are(length: int) -> None:
    classes = (SlotClass(length, 3), SlotClass(4096, 1))
    idle = 2 * (KV_BLOCK + SPARE_TOKENS)
    needed = 4 * (4096 + SPARE_TOKENS)

    assert cache_tokens(classes, idle_rows=2) - cache_tokens(classes) == idle
    assert choose_classes(needed + idle, slots=4, window=4096, idle_rows=2) == (SlotClass(4096, 4),)
    assert len(choose_classes(needed + idle - 1, slots=4, window=4096, idle_rows=2)) > 1


def test_the_card_with_the_least_room_decides() -> None:
    roomy, tight = plain_card(100_000), plain_card(10_000)

    plan = plan_memory([roomy, tight], slots=4, window=16_384)

    assert plan.tokens <= 10_000
    assert plan.classes == plan_memory([tight], slots=4, window=16_384).classes


def test_own_classes_are_taken_as_they_are() -> None:
    own = (SlotClass(2048, 12), SlotClass(4096, 3), SlotClass(16_384, 1))

    plan = plan_memory([card("34b", "nf4")], slots=16, window=16_384, classes=own)

    assert plan.classes == own
    assert plan.cache_bytes == 196_608 * (2048 * 12 + 4096 * 3 + 16_384 + 16 * SPARE_TOKENS)


def test_own_classes_that_do_not_fit_are_refused_with_some_that_do() -> None:
    own = (SlotClass(16_384, 16),)

    with pytest.raises(InvalidSetting) as caught:
        plan_memory([card("7b", "none")], slots=16, window=16_384, classes=own)

    message, hint = caught.value.message, caught.value.hint or ""
    assert "16384x16 slots do not fit cuda:0" in message
    for part in (
        "weights 13.48 GB",
        "cache 137.71 GB",
        "activations 2.15 GB",
        "reserve 6.40 GB",
        "of 80.00 GB",
    ):
        assert part in message
    assert hint == "worker_slot_lengths=3584x12,16384x4 would fit"


def test_what_a_hint_names_does_fit() -> None:
    lighter = {name: int(WEIGHTS["70b", name] * GB) for name in ("int8", "nf4")}

    with pytest.raises(InvalidSetting) as caught:
        plan_memory([card("70b", "int8")], slots=64, window=16_384, lighter=lighter)

    assert caught.value.hint == (
        "worker_slots=10 (as 512x10) or worker_quantization=nf4 (weights of 36.36 GB) would fit"
    )
    assert plan_memory([card("70b", "int8")], slots=10, window=16_384).slots == 10
    assert plan_memory([card("70b", "nf4")], slots=64, window=16_384).slots == 64
    with pytest.raises(InvalidSetting):
        plan_memory([card("70b", "int8")], slots=11, window=16_384)


def test_weights_that_leave_nothing_ask_for_more_gpus() -> None:
    too_heavy = Card("cuda:0", 24 * GB, 24 * GB, GPU_RESERVE, 36 * GB, GIB, 327_680)

    with pytest.raises(InvalidSetting) as caught:
        plan_memory([too_heavy], slots=1, window=4096)

    assert "--gpus 0+1" in (caught.value.hint or "")


def test_memory_that_others_hold_may_come_back() -> None:
    with pytest.raises(OutOfMemory) as caught:
        plan_memory([plain_card(1000, others=100_000)], slots=8, window=2048)

    assert caught.value.retryable
    assert "other programs hold 0.10 MB" in (caught.value.hint or "")


def test_a_cpu_worker_leaves_memory_to_others() -> None:
    # 16 GB, tiny weights, one mebibyte per token (7B in float32).
    machine = Card("cpu", 16 * GB, 16 * GB, CPU_RESERVE, GB, 100_000_000, 2**20)

    plan = plan_memory([machine], slots=4, window=16_384)

    assert plan.cache_bytes <= (1 - CPU_RESERVE) * 16 * GB - GB
    assert 0.8 <= plan.used_share <= 1


def test_activations_grow_with_what_a_pass_holds() -> None:
    def needed(**changes: int) -> int:
        sizes = {"rows": 8, "draft_tokens": 0, "prefill_chunk": 256, "window": 16_384} | changes
        return activation_bytes(SHAPES["34b"], has_head=True, **sizes)

    usual = needed()

    assert needed(prefill_chunk=1024) > usual
    assert needed(rows=512) > usual
    assert needed(draft_tokens=3) > usual
    assert needed(window=2048) < usual
    # The table's 2 GB cover every published shape at the default chunk.
    for shape in SHAPES.values():
        widest = activation_bytes(
            shape, rows=64, draft_tokens=0, prefill_chunk=256, window=16_384, has_head=True
        )
        assert 10**7 < widest < 2 * GIB


def test_the_plan_is_logged_as_a_table() -> None:
    lines = plan_memory([card("7b", "nf4")], slots=16, window=16_384).log_lines()

    events = [line.split()[0] for line in lines]
    fields = dict(pair.split("=") for pair in lines[0].split()[1:])
    assert events == ["memory_plan", "slot_class", "slot_class"]
    parts = ("weight_bytes", "cache_bytes", "activation_bytes", "reserve_bytes", "left_bytes")
    assert sum(int(fields[name]) for name in parts) == int(fields["available_bytes"]) == 80 * GB
    assert lines[2] == "slot_class length=16384 slots=4"


def test_a_plan_tells_its_cards_and_classes_in_json_types() -> None:
    plan = MemoryPlan((SlotClass(256, 2),), 256, 0, (plain_card(1000),))

    document = plan.document()

    assert document["classes"] == [{"length": 256, "slots": 2}]
    assert document["cards"][0]["cache_bytes"] == plan.cache_bytes == 2 * (KV_BLOCK + SPARE_TOKENS)
