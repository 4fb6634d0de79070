"""How many tokens each slot of the static cache can hold on this device.

Owns: the sum of weights, cache and headroom. Does not allocate anything.
"""

from __future__ import annotations

import torch

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.models import ServedModel
from codeherd_worker.engine.loading import LoadedModel
from codeherd_worker.settings import WorkerSettings

#: Share of the free device memory that the cache may take; the rest is for activations.
CACHE_SHARE = 0.85
#: Fewest tokens per slot that are worth starting for.
SMALLEST_SLOT = 256


def slot_length(model: ServedModel, loaded: LoadedModel, settings: WorkerSettings) -> int:
    """Return the tokens per slot: as asked, or as many as fit, at most the context window.

    Raises:
        InvalidSetting: more was asked than the window, or too little fits.
    """
    asked = settings.worker_max_len
    if asked is not None and asked > model.context_window:
        raise InvalidSetting(
            f"worker_max_len={asked} is more than the context window of `{model.name}`, "
            f"{model.context_window}"
        )
    if asked is not None or loaded.device.type != "cuda":
        return asked or model.context_window
    free_bytes = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return fitting_length(model, slots=settings.worker_slots, free_bytes=free_bytes)


def fitting_length(model: ServedModel, *, slots: int, free_bytes: int, dtype_bytes: int = 2) -> int:
    """Return the most tokens per slot that fit `free_bytes`, at most the context window.

    Raises:
        InvalidSetting: fewer than `SMALLEST_SLOT` fit; take fewer slots.
    """
    fitting = int(free_bytes * CACHE_SHARE) // (slots * model.kv_bytes_per_token(dtype_bytes))
    if fitting < SMALLEST_SLOT:
        raise InvalidSetting(
            f"{slots} slots leave {fitting} tokens each on this device, fewer than {SMALLEST_SLOT}",
            hint="lower worker_slots, or hold the weights in nf4",
        )
    return min(fitting, model.context_window)
