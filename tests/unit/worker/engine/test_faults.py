from __future__ import annotations

import weakref

import pytest
import torch

from codeherd_worker.engine.faults import is_out_of_memory, is_sticky, release_memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
]
STICKY = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
]
HARMLESS = [RuntimeError("shape mismatch"), ValueError("CUDA error"), KeyError(3)]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_leaves_the_device_usable(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_sticky(error)


@pytest.mark.parametrize("error", STICKY, ids=str)
def test_a_broken_context_stays_broken(error: BaseException) -> None:
    assert is_sticky(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", HARMLESS, ids=repr)
def test_other_errors_are_neither(error: BaseException) -> None:
    assert not is_sticky(error)
    assert not is_out_of_memory(error)


def test_the_real_allocator_says_it_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_out_of_memory(caught.value)


def test_a_failed_pass_gives_back_its_tensors_while_the_error_lives_on() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def run_layer(hidden: torch.Tensor) -> None:
        scores = hidden * 2
        held.append(weakref.ref(scores))
        raise OUT_OF_MEMORY[0]

    def run_pass() -> None:
        hidden = torch.ones(8)
        held.append(weakref.ref(hidden))
        run_layer(hidden)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_pass()
    assert all(tensor() is not None for tensor in held)

    release_memory(caught.value)

    assert [tensor() for tensor in held] == [None, None]
    assert is_out_of_memory(caught.value)


def test_an_error_that_was_never_raised_holds_nothing() -> None:
    error = MemoryError()

    release_memory(error)

    assert error.__traceback__ is None
