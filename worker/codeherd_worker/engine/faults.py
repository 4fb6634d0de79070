"""Say what an exception of torch means for the engine.

Owns: which failures leave the device usable. Does not decide what follows (`scheduler.py`, `engine.py`).
"""

from __future__ import annotations

import traceback

import torch

#: What libraries on top of CUDA say, in plain RuntimeErrors.
_STICKY_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the device's or the host's way to say that memory ran out; the device lives on."""
    # torch has a class for accelerators only; its CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def is_sticky(error: BaseException) -> bool:
    """Whether every later call to the device will fail as well: only a new process helps.

    A CUDA error that is not about memory leaves the context unusable: an illegal address, a failed
    device-side assert, a lost or hung GPU (CUDA programming guide, error handling).
    """
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _STICKY_WORDS)


def release_memory(error: BaseException) -> None:
    """Give back what a pass held that ran out of memory: the frames of its traceback hold its tensors."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
