from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.layouts import Piece, lay_out_step
from codeherd_worker.engine.slot_classes import SlotClass
from tests.unit.worker.engine.decoding import CHUNK, ids, make_decoder, say, start, step
from tests.unit.worker.engine.misrounding import NUDGE, disturb_attention, disturb_linears
from tests.unit.worker.engine.tiny_llama import generate_alone, random_prompt, tiny_llama

GROUP = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    # With one thread, all rows round alike without our doing.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def rounds_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the last row of products of some row counts differ; the counts are listed later, by the test."""
    faulty: list[int] = []

    def disturb(output: torch.Tensor) -> None:
        if len(output) in faulty:
            output[-1] += NUDGE

    disturb_linears(monkeypatch, disturb)
    return faulty


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_on_this_machine_nothing_changes_a_rows_bits(kv_heads: int, dtype: torch.dtype) -> None:
    decoder = make_decoder(
        tiny_llama(num_key_value_heads=kv_heads).to(dtype),
        slots=5,
        draft_tokens=2,
    )

    checks = decoder.warm_up()

    assert checks.rows_agree
    assert checks.granules_agree
    assert decoder.drafts_are_optional == checks.drafts_agree


@pytest.mark.usefixtures("each_attention")
def test_warm_up_leaves_nothing_behind(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model, draft_tokens=2)
    expected = say(decoder, 1, random_prompt(100), 5)

    decoder.warm_up()

    assert not any(memory.any() for memory in decoder.cache._flat)
    assert not decoder.is_live
    assert say(decoder, 1, random_prompt(100), 5) == expected


def test_where_granules_disagree_a_prompt_has_its_pass_alone(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = rounds_late(monkeypatch)
    decoder = make_decoder(model)
    assert decoder.can_share_passes
    faulty += [64, 96]

    checks = decoder.warm_up()

    assert not checks.granules_agree
    assert not decoder.can_share_passes
    assert (decoder.granule, decoder.passes.pass_lengths) == (CHUNK, (CHUNK,))
    assert decoder.facts["granule"] == CHUNK
    assert "granules_disagree" in caplog.text
    prompt = random_prompt(CHUNK + 40)
    assert ids(say(decoder, 0, prompt, 3)) == generate_alone(model, prompt, 3)


@pytest.mark.usefixtures("torch_attention")
def test_granules_of_one_slot_must_agree_as_well(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a prefix is reused, or a pass is shared, the same granule is attended beside fewer of its own.
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        is_prefill = output.shape[2] == 32 * GROUP
        if is_prefill and len(keys) == 2:
            output[1] += NUDGE

    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model)

    assert not decoder.warm_up().granules_agree
    assert not decoder.can_share_passes


@pytest.mark.usefixtures("torch_attention")
def test_read_lengths_that_change_bits_are_dropped(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        is_decode = output.shape[2] == GROUP
        if is_decode and keys.shape[2] == 512:
            output += NUDGE

    classes = (SlotClass(600, 2), SlotClass(1100, 1))
    sound = sound_kv_lengths(model, classes)
    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, classes=classes)

    checks = decoder.warm_up()

    assert not checks.kv_lengths_agree
    assert decoder.passes.kv_lengths == tuple(
        tuple(length for length in lengths if length != 512) for lengths in sound
    )
    assert_a_neighbour_changes_nothing(decoder)


@pytest.mark.usefixtures("torch_attention")
def test_read_lengths_that_change_bits_of_a_prefill_are_dropped_too(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        if output.shape[2] == 32 * GROUP and keys.shape[2] == 512:
            output += NUDGE

    classes = (SlotClass(600, 3),)
    (sound,) = sound_kv_lengths(model, classes)
    assert 512 in sound
    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, classes=classes)

    checks = decoder.warm_up()

    assert not checks.kv_lengths_agree
    assert decoder.passes.kv_lengths == (tuple(length for length in sound if length != 512),)


@pytest.mark.usefixtures("torch_attention")
def test_where_all_shorter_reads_differ_slots_are_read_whole(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        output += keys.shape[2] * NUDGE

    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, max_len=600)

    assert not decoder.warm_up().kv_lengths_agree

    assert decoder.passes.kv_lengths == ((1024,),)
    assert_a_neighbour_changes_nothing(decoder)


@pytest.mark.usefixtures("torch_attention")
def test_a_class_that_differs_from_the_longest_is_read_whole_and_named(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        output += keys.shape[2] * NUDGE

    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, classes=(SlotClass(300, 2), SlotClass(600, 1)))

    assert not decoder.warm_up().kv_lengths_agree

    assert decoder.passes.kv_lengths == ((512,), (1024,))
    assert "class_disagrees length=512" in caplog.text
    # The longest one is what all are compared with.
    assert "class_disagrees length=1024" not in caplog.text


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_whole_blocks_round_alike_in_slots_of_all_classes(
    kv_heads: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads, max_position_embeddings=2048).to(dtype)
    decoder = make_decoder(model, classes=(SlotClass(512, 2), SlotClass(1024, 1), SlotClass(2048, 1)))

    decoder.warm_up()

    assert decoder.passes.kv_lengths[:3] == ((512,), (512, 1024), (512, 1024, 2048))
    assert "class_disagrees" not in caplog.text


@pytest.mark.usefixtures("torch_attention")
def test_row_counts_that_change_bits_are_dropped(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        if output.shape[2] == GROUP and len(keys) == 2:
            output += NUDGE

    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, slots=4)
    assert 2 in decoder.passes.row_counts

    checks = decoder.warm_up()

    assert checks.rows_agree
    assert 2 not in decoder.passes.row_counts
    assert decoder.passes.row_counts[-1] == decoder.passes.rows
    assert_a_neighbour_changes_nothing(decoder)


@pytest.mark.usefixtures("torch_attention")
def test_warm_up_says_when_rows_differ(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def disturb(output: torch.Tensor, keys: torch.Tensor) -> None:
        if output.shape[2] == GROUP:
            output += NUDGE * torch.arange(len(keys)).view(-1, 1, 1, 1)

    disturb_attention(monkeypatch, disturb)

    assert not make_decoder(model).warm_up().rows_agree
    assert "rows_disagree" in caplog.text


@pytest.mark.usefixtures("torch_attention")
def test_drafts_that_change_bits_are_part_of_every_step(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor, _keys: torch.Tensor) -> None:
        if output.shape[2] == GROUP * 3:
            output += NUDGE

    disturb_attention(monkeypatch, disturb)
    decoder = make_decoder(model, draft_tokens=2)

    checks = decoder.warm_up()

    assert not checks.drafts_agree
    assert not decoder.drafts_are_optional
    assert decoder.facts["draft_tokens"] == 2
    widths: set[int] = set()
    disturb_attention(monkeypatch, lambda output, _keys: widths.add(output.shape[2]))
    start(decoder, 0, random_prompt(20))
    widths.clear()
    step(decoder, 0)
    assert widths == {GROUP * 3}


def test_matrices_that_multiply_drafts_otherwise_make_them_part_of_every_step(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = rounds_late(monkeypatch)
    decoder = make_decoder(model, slots=3, draft_tokens=2)
    # A step of one live slot with its drafts, where a smaller step is allowed.
    assert decoder.passes.row_counts[0] == 1
    faulty += [3 * decoder.passes.rows]

    assert not decoder.warm_up().drafts_agree
    assert not decoder.drafts_are_optional


def sound_kv_lengths(model: LlamaForCausalLM, classes: tuple[SlotClass, ...]) -> tuple[tuple[int, ...], ...]:
    """What holds on this machine without our doing."""
    decoder = make_decoder(model, classes=classes)
    decoder.warm_up()
    return decoder.passes.kv_lengths


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_at_lengths_that_are_kept_every_place_has_the_same_bits(kv_heads: int, dtype: torch.dtype) -> None:
    decoder = make_decoder(tiny_llama(num_key_value_heads=kv_heads).to(dtype))
    decoder.warm_up()
    passes = decoder.passes
    (lengths,) = passes.kv_lengths
    prompt = random_prompt(690)
    for slot in range(3):
        say(decoder, slot, prompt, 1)
    layout = lay_out_step((), passes.rows, passes.cache, passes.device)

    differing = []
    for place in (0, 20, 63, 64, 150, 300, 440, 511, 600):
        places = torch.full((passes.rows, 1), place)
        tokens = torch.full_like(places, prompt[place])
        for number, read in enumerate([length for length in lengths if length > place]):
            logits = passes.run(layout, tokens, places, places, [read] * len(layout.runs)).clone()
            if number == 0:
                expected = logits
            elif not torch.equal(logits, expected):
                differing.append(("step", place, read))
    for first in (0, 32, 96, 224, 416, 448, 640):
        piece = Piece(1, prompt[first : first + passes.granule], first, ends=True)
        for number, read in enumerate([length for length in lengths if length >= piece.end]):
            logits = passes.prefill([piece], read)[0][:1].clone()
            if number == 0:
                expected = logits
            elif not torch.equal(logits, expected):
                differing.append(("granule", first, read))

    assert differing == []


@pytest.mark.usefixtures("torch_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_which_read_lengths_are_kept_depends_on_no_models_dtype_and_on_no_class(dtype: torch.dtype) -> None:
    # Attention is computed in float32 for all of them: rounding its result must not hide what differs.
    model = tiny_llama(num_key_value_heads=4)
    classes = (SlotClass(512, 3), SlotClass(600, 2))

    short, long = sound_kv_lengths(model, classes)
    found = sound_kv_lengths(model.to(dtype), classes)

    assert tuple(length for length in long if length <= 512) == short
    assert found == (short, long)


def assert_a_neighbour_changes_nothing(decoder: SlotDecoder) -> None:
    prompt = random_prompt(30)
    alone = say(decoder, 0, prompt, 3)

    start(decoder, 1, random_prompt(80))

    assert say(decoder, 0, prompt, 3) == alone
