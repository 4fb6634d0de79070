from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.decode import KV_BLOCK, SlotDecoder, count_rows
from codeherd_worker.engine.sampling import SamplingParams
from tests.unit.worker.engine.tiny_llama import generate_alone, random_prompt, tiny_llama

SLOTS = 3
CHUNK = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # Threads that wait for each other are slow on a busy machine: two only where they matter.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def _two_threads(_inference: None) -> None:
    # With one thread, all rows round alike without our doing.
    torch.set_num_threads(2)


def make_decoder(model: LlamaForCausalLM, *, slots: int = SLOTS, max_len: int = 700) -> SlotDecoder:
    return SlotDecoder(model, slots=slots, max_len=max_len, prefill_chunk=CHUNK)


def start(
    decoder: SlotDecoder, slot: int, prompt: tuple[int, ...], sampling: SamplingParams | None = None
) -> int:
    for first in range(0, len(prompt), CHUNK):
        logits = decoder.prefill(slot, prompt[first : first + CHUNK], first)
    token = decoder.begin(slot, sampling or SamplingParams(), prompt, logits)
    assert token is not None
    return token


def record_steps(decoder: SlotDecoder, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Keep the logits of every decode step."""
    recorded: list[torch.Tensor] = []
    forward = decoder._forward

    def recording(rows: slice, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = forward(rows, *args, **kwargs)
        if rows == slice(0, decoder.rows):
            recorded.append(logits)
        return logits

    monkeypatch.setattr(decoder, "_forward", recording)
    return recorded


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_slot_says_what_generate_says(kv_heads: int) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    decoder = make_decoder(model)
    prompt = random_prompt(CHUNK + 5)
    expected = generate_alone(model, prompt, 12)

    for slot in range(SLOTS):
        tokens = [start(decoder, slot, prompt)]
        tokens += [decoder.step()[slot] for _ in range(11)]  # type: ignore[misc]
        decoder.release(slot)

        assert tokens == expected


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("slots", "kv_heads", "dtype"),
    [
        (3, 4, torch.float32),
        (5, 4, torch.float32),
        (6, 2, torch.float32),
        (3, 4, torch.bfloat16),
        (5, 2, torch.bfloat16),
        (3, 4, torch.float16),
    ],
)
def test_logits_are_the_same_bits_in_every_slot_beside_any_neighbour(
    slots: int, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(tiny_llama(num_key_value_heads=kv_heads).to(dtype), slots=slots)
    recorded = record_steps(decoder, monkeypatch)
    prompt = random_prompt(70)
    rows: list[torch.Tensor] = []

    for slot in range(slots):
        neighbour = (slot + 1) % slots
        if neighbour != slot:
            start(decoder, neighbour, random_prompt(1 + 20 * slot))
        start(decoder, slot, prompt)
        for _ in range(2):
            decoder.step()
        rows.append(torch.stack([logits[slot] for logits in recorded[-2:]]))
        decoder.release(slot)

    assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.usefixtures("_two_threads")
def test_a_long_neighbour_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1))
    recorded = record_steps(decoder, monkeypatch)
    prompt = random_prompt(300)
    start(decoder, 0, prompt)
    alone = decoder.step()[0], recorded[-1][0]
    decoder.release(0)

    start(decoder, 1, random_prompt(KV_BLOCK + 100))
    start(decoder, 0, prompt)
    beside = decoder.step()[0], recorded[-1][0]

    assert len(decoder.kv_lengths) > 1
    assert alone[0] == beside[0]
    assert torch.equal(alone[1], beside[1])


@pytest.mark.usefixtures("_two_threads")
def test_warm_up_finds_that_rounding_depends_on_nothing(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model)

    checks = decoder.warm_up()

    assert checks.rows_agree
    assert checks.kv_lengths_agree
    assert not any(layer.keys.any() for layer in decoder.cache.layers)


def test_reads_are_of_full_length_where_shorter_ones_round_differently(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(model)
    probe = decoder._probe
    monkeypatch.setattr(decoder, "_probe", lambda place, kv_len: probe(place, kv_len) + kv_len)

    checks = decoder.warm_up()

    assert not checks.kv_lengths_agree
    assert decoder.kv_lengths == (decoder.cache.readable_len,)


def test_warm_up_says_when_rows_differ(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = make_decoder(model)
    probe = decoder._probe
    monkeypatch.setattr(
        decoder, "_probe", lambda place, kv_len: probe(place, kv_len) + torch.arange(decoder.rows)[:, None]
    )

    assert not decoder.warm_up().rows_agree
    assert "rows_disagree" in caplog.text


@pytest.mark.usefixtures("_two_threads")
def test_rows_are_added_until_all_round_alike(model: LlamaForCausalLM) -> None:
    for slots in (1, 4, 5, 9):
        rows = count_rows(model, slots)

        vector = torch.randn(1, 1, 64).expand(rows, -1, -1).contiguous()
        output = model.model.layers[0].self_attn.q_proj(vector)
        assert rows >= slots
        assert torch.equal(output, output[:1].expand_as(output))


def test_every_pass_has_one_of_few_shapes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(model)
    shapes: set[tuple[int, ...]] = set()
    hook: Callable[..., None] = lambda _module, _args, kwargs: shapes.add(  # noqa: E731
        tuple(kwargs["input_ids"].shape)
    )
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    for length in (1, 31, 32, 33, 63, 64, 65, 100, 128):
        start(decoder, 0, random_prompt(length))
        decoder.step()
        decoder.release(0)
    handle.remove()

    assert shapes == {(1, 32), (1, 64), (decoder.rows, 1)}


def test_decoding_beside_a_prefill_leaves_it_untouched(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model)
    prompt = random_prompt(3 * CHUNK)
    sampling = SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=3)
    first = start(decoder, 1, prompt, sampling)
    expected = [first, *(decoder.step()[1] for _ in range(5))]
    decoder.release(1)

    start(decoder, 0, random_prompt(20), SamplingParams(temperature=1.0, repetition_penalty=1.5))
    for chunk_start in range(0, len(prompt), CHUNK):
        decoder.step()
        logits = decoder.prefill(1, prompt[chunk_start : chunk_start + CHUNK], chunk_start)
    token = decoder.begin(1, sampling, prompt, logits)

    assert [token, *(decoder.step()[1] for _ in range(5))] == expected


def test_numbers_that_are_not_finite_stay_in_their_row() -> None:
    bad_id = 9
    model = tiny_llama()
    model.model.embed_tokens.weight[bad_id] = torch.nan
    decoder = make_decoder(model)
    good = tuple(token for token in random_prompt(40) if token != bad_id)
    expected = generate_alone(model, good, 3)

    tokens = [start(decoder, 0, good)]
    logits = decoder.prefill(1, (5, bad_id, 6), 0)
    token = decoder.begin(1, SamplingParams(), (5, bad_id, 6), logits)
    tokens += [decoder.step()[0] for _ in range(2)]  # type: ignore[misc]

    assert token is None
    assert tokens == expected


def test_a_slot_is_clean_again_after_wipe() -> None:
    bad_id = 9
    model = tiny_llama()
    model.model.embed_tokens.weight[bad_id] = torch.nan
    decoder = make_decoder(model)
    good = tuple(token for token in random_prompt(40) if token != bad_id)
    bad = (*good[:20], bad_id, *good, *good)
    for first in range(0, len(bad), CHUNK):
        decoder.prefill(0, bad[first : first + CHUNK], first)

    decoder.wipe(0)

    assert start(decoder, 0, good) == generate_alone(model, good, 1)[0]


def test_a_step_says_which_slot_has_no_token() -> None:
    model = tiny_llama()
    decoder = make_decoder(model)
    start(decoder, 0, random_prompt(5))
    token = start(decoder, 2, random_prompt(6))
    model.model.embed_tokens.weight[token] = torch.nan

    answers = decoder.step()

    assert answers.keys() == {0, 2}
    assert answers[2] is None


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"tie_word_embeddings": True}])
def test_unusual_configurations_decode_like_generate(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    decoder = make_decoder(model)
    prompt = random_prompt(10)

    tokens = [start(decoder, 0, prompt)]
    tokens += [decoder.step()[0] for _ in range(5)]  # type: ignore[misc]

    assert tokens == generate_alone(model, prompt, 6)
