"""What becomes of an engine whose device fails: out of memory, and errors that only a new process mends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from codeherd_schema.errors import OutOfMemory
from tests.gpu.gpu_models import MARKS, PATIENCE, answers, forget, load, make_engine, running, sequence

pytestmark = MARKS

ROOT = Path(__file__).parents[2]
#: Exit status of the process below when everything went as designed.
AS_DESIGNED = 43

BREAK_AN_ENGINE = """
    import sys
    import torch
    from codeherd_schema.errors import EngineFailed
    from codeherd_worker.engine.faults import is_out_of_memory, is_sticky
    from codeherd_worker.watchdog import Watchdog
    from tests.gpu.gpu_models import load, make_engine, sequence

    engine = make_engine(load().model, slots=2)
    decoder, step = engine._decoder, engine._decoder.step

    def failing(drafts=None):
        table = torch.zeros(4, device="cuda")
        table[torch.tensor([9], device="cuda")]  # a device-side assert
        return step(drafts)

    decoder.step = failing
    engine.start()
    futures = [engine.submit(sequence(number)) for number in range(4)]
    errors = [future.exception(100) for future in futures]
    assert all(isinstance(error, EngineFailed) for error in errors), errors
    cause = errors[0].__cause__
    assert is_sticky(cause) and not is_out_of_memory(cause), repr(cause)
    assert engine.broken
    try:
        engine.submit(sequence(0))
    except EngineFailed:
        pass
    else:
        raise AssertionError("a broken engine took a sequence")
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError as err:
        assert is_sticky(err), repr(err)
    else:
        raise AssertionError("the device lives, so this test tests nothing")
    told = []
    Watchdog(engine, step_timeout_s=60, on_broken=lambda: told.append(1)).look()
    assert told == [1]
    engine.close()
    # From here on as a worker ends: destructors meet a dead device.
    sys.exit(AS_DESIGNED)
"""


@contextmanager
def full_card() -> Iterator[None]:
    """Leave this process no memory on the card, neither free nor in the allocator's keeping."""
    torch.cuda.empty_cache()
    litter: list[torch.Tensor] = []
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        for size in (2**26, 2**24, 2**21, 2**19, 2**16, 2**12, 2**9):
            while True:
                try:
                    litter.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    break
        yield
    finally:
        litter.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_cache_that_does_not_fit_says_so_and_leaves_the_card_usable() -> None:
    model = load().model

    with pytest.raises(OutOfMemory, match="no memory for"):
        make_engine(model, slots=20_000)

    forget()
    with running(make_engine(model)) as engine:
        assert len(answers(engine, [1])[1]) == 24


def test_a_pass_without_memory_costs_its_own_sequences_alone() -> None:
    engine = make_engine(load().model)
    with running(engine):
        expected = answers(engine, range(4))

        with full_card():
            error = engine.submit(sequence(6)).exception(PATIENCE)

        assert isinstance(error, OutOfMemory)
        assert not engine.broken
        assert answers(engine, range(4)) == expected


def test_a_dead_device_breaks_the_engine_and_lets_the_process_end() -> None:
    script = textwrap.dedent(BREAK_AN_ENGINE).replace("AS_DESIGNED", str(AS_DESIGNED))

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert done.returncode == AS_DESIGNED, done.stderr[-4000:]
