"""Everything that submits jobs and fetches answers. Never imports torch or the worker."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job"]

#: Public name to the module that owns it.
_OWNERS = {
    "AsyncClient": "codeherd_producer.aio",
    "AsyncJob": "codeherd_producer.aio",
    "Client": "codeherd_producer.client",
    "Job": "codeherd_producer.client",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use (PEP 562): `codeherd --help` needs none of them, and SQL costs 0.3 s.
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OWNERS[name]), name)
