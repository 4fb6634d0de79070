"""A short run of `benchmarks/soak.py`: what it looks for in minutes, looked for in seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.soak import GROWTH_BYTES, Soak, open_soak, resident_bytes
from tests.acceptance.engine_jobs import THREADS

#: Jobs before the first look at the memory, and between two looks.
SETTLING, JOBS = 150, 300
#: Looks at most: an allocator may take room once or twice, a leak takes it every time.
LOOKS = 4


@pytest.fixture(scope="module")
def soak() -> Iterator[Soak]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    soak = open_soak(seed=0)
    yield soak
    soak.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def growth_bytes(soak: Soak) -> int:
    """How much the process grew between the last two looks: the first two that saw it flat, if any did."""
    soak.run(jobs=SETTLING)
    for _ in range(LOOKS):
        before = resident_bytes()
        soak.run(jobs=JOBS)
        grown = resident_bytes() - before
        if grown < GROWTH_BYTES:
            break
    return grown


def test_a_mixed_load_moves_no_cache_makes_no_new_shape_and_ends_every_job_once(
    soak: Soak, growth_bytes: int
) -> None:
    counts, stats = soak.counts, soak.engine.stats()

    assert soak.problems() == []
    assert counts.submitted >= SETTLING + JOBS
    # Else it was no mixed load.
    assert {"eos", "stop", "length"} <= set(counts.finished)
    assert counts.cancelled["user"] > 0
    assert min(stats.reused_tokens, stats.drafted, stats.accepted) > 0
    assert (stats.active, stats.waiting) == (0, 0)


def test_memory_stays_flat(growth_bytes: int) -> None:
    assert growth_bytes < GROWTH_BYTES


def test_finished_jobs_answer_the_same_alone(soak: Soak, growth_bytes: int) -> None:
    assert len(soak.answers) > 50
    assert soak.compare() == 0
