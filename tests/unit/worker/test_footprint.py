"""Measured numbers against what is really there: a loaded model, an engine's cache, a machine's files."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from codeherd_worker.embedded import EMBEDDED_FOLDER
from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.loading import LoadedModel, load_model
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.footprint import (
    held_bytes,
    host_bytes,
    idle_rows,
    lighter_weights,
    measure_cards,
    packed_bytes,
    shape_of,
    weight_bytes,
)
from codeherd_worker.memory import activation_bytes, plan_memory
from tests.unit.worker.engine.tiny_llama import MAX_POSITIONS, tiny_llama

GIB = 2**30
CPU = torch.device("cpu")


def loaded(quantization: str = "none", **changes: int) -> LoadedModel:
    model = tiny_llama(**changes)
    return LoadedModel(model, "revision", quantization, torch.float32, CPU, Path())


@pytest.mark.parametrize(
    "classes",
    [
        (SlotClass(MAX_POSITIONS, 3),),
        # A length that is no multiple of the alignment, beside others.
        (SlotClass(100, 2), SlotClass(256, 3), SlotClass(700, 1)),
    ],
)
def test_the_planned_cache_is_the_one_that_is_allocated(classes: tuple[SlotClass, ...]) -> None:
    model = loaded()
    slots = sum(part.slots for part in classes)
    idle = idle_rows(model.model, slots)
    cards = measure_cards(
        model, rows=slots + idle, draft_tokens=0, prefill_chunk=64, window=classes[-1].length
    )

    plan = plan_memory(cards, slots=slots, window=classes[-1].length, classes=classes, idle_rows=idle)

    engine = Engine(model.model, EngineSettings(classes=plan.classes, prefill_chunk=64))
    assert engine.stats().cache_bytes == plan.cache_bytes
    engine.close()


def test_dense_weights_count_once_and_shared_ones_not_again() -> None:
    model = tiny_llama()
    tied = tiny_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight

    total = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())

    assert sum(weight_bytes(model).values()) == total
    assert total - sum(weight_bytes(tied).values()) == embedding.nbytes


def test_a_cpu_counts_the_packed_copy_of_dense_matrices() -> None:
    model = loaded()
    matrices = sum(p.nbytes for name, p in model.model.named_parameters() if "norm" not in name)

    [card] = measure_cards(model, rows=2, draft_tokens=0, prefill_chunk=64, window=256)

    # The embedding is looked up, not multiplied.
    assert packed_bytes(model.model) == matrices - model.model.model.embed_tokens.weight.nbytes
    assert card.weight_bytes == weight_bytes(model.model)[CPU] + packed_bytes(model.model)
    assert card.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_quantized_weights_count_with_their_scales() -> None:
    model = load_model(str(EMBEDDED_FOLDER), quantization="nf4", device="cpu", slots=2).model
    packed = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())

    found = sum(weight_bytes(model).values())

    linear = sum(2 * p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    # A scale per 64 weights: one byte each, or four where they are not quantized again.
    assert packed + linear // 64 <= found <= packed + linear // 16 + 4096
    assert lighter_weights(model)["nf4"] < lighter_weights(model)["int8"]


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the most bytes that torch and numpy had allocated at a time, beyond what they had before.

    Each at its own time: both together had no more.
    """
    tracemalloc.start()
    try:
        with (
            torch.inference_mode(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            # What Python has allocated to get here is no pass's.
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            action()
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    results = profiler.profiler.kineto_results
    changes: list[int] = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) + peak - before


@pytest.mark.parametrize(("slots", "chunk"), [(2, 256), (12, 64)])
def test_a_pass_allocates_no_more_than_is_planned_for_it(slots: int, chunk: int) -> None:
    model = loaded(hidden_size=256, intermediate_size=688)
    decoder = SlotDecoder(model.model, classes=(SlotClass(MAX_POSITIONS, slots),), prefill_chunk=chunk)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=1)
    for slot in range(slots):
        decoder.assign(slot, sampled, (1,))
    shape = shape_of(model.model, is_quantized=False)
    planned = activation_bytes(
        shape,
        rows=decoder.passes.rows,
        draft_tokens=0,
        prefill_chunk=chunk,
        window=MAX_POSITIONS,
        has_head=True,
    )

    # The last chunk of a full slot reads farthest.
    start = MAX_POSITIONS - 2 * chunk
    prefill = peak_bytes(lambda: decoder.prefill([Piece(0, [5] * chunk, start, ends=True)]))
    step = peak_bytes(decoder.step)

    assert max(prefill, step) <= planned
    # Nor is it a multiple of what is needed.
    assert planned <= 8 * max(prefill, step)


def test_memory_is_held_at_most_as_much_as_at_the_peak() -> None:
    now, peak = held_bytes(["cpu"])

    assert 10 * 2**20 < now <= peak + 2**20


def machine(
    tmp_path: Path, *, available_gib: int, groups: dict[str, str], membership: str
) -> tuple[int, int]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    kib = available_gib * 2**20
    (proc / "meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {kib} kB\n")
    (proc / "self" / "cgroup").write_text(membership)
    for name, text in groups.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host_bytes(proc, cgroups)


def test_a_machine_without_limits_has_what_is_available(tmp_path: Path) -> None:
    assert machine(tmp_path, available_gib=48, groups={}, membership="0::/\n") == (64 * GIB, 48 * GIB)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    groups = {
        "memory.max": str(8 * GIB),
        "memory.current": str(6 * GIB),
        # Cached files go when memory is wanted.
        "memory.stat": f"anon {2 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\n",
    }

    assert machine(tmp_path, available_gib=48, groups=groups, membership="0::/\n") == (8 * GIB, 6 * GIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    groups = {
        "user.slice/memory.max": str(16 * GIB),
        "user.slice/memory.current": str(10 * GIB),
        "user.slice/me.scope/memory.max": "max",
        "user.slice/me.scope/memory.current": str(GIB),
    }

    found = machine(tmp_path, available_gib=48, groups=groups, membership="0::/user.slice/me.scope\n")

    assert found == (16 * GIB, 6 * GIB)


def test_control_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    groups = {
        "memory/job/memory.limit_in_bytes": str(4 * GIB),
        "memory/job/memory.usage_in_bytes": str(GIB),
    }
    membership = "8:pids:/\n4:memory:/job\n0::/\n"

    assert machine(tmp_path, available_gib=2, groups=groups, membership=membership) == (4 * GIB, 2 * GIB)


def test_a_machine_without_proc_has_its_physical_memory(tmp_path: Path) -> None:
    total, available = host_bytes(tmp_path / "nowhere", tmp_path)

    assert total == available > GIB // 4
