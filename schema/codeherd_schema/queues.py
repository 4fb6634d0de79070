"""Name the queues.

Owns: the name, apart from the broker, so that `codeherd submit` can write it into a row without
importing Celery. Does not know brokers.
"""

from __future__ import annotations


def queue_name(model: str) -> str:
    """Return the queue of a model: one per model, so that a worker takes only what it can serve."""
    return f"codeherd.{model}"
