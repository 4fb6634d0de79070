"""What operators see of a worker: one compact line per job, and the engine's figures on request.

Owns: the words and units of both. Never holds prompt or completion text: Flower shows these to
everyone who may log in.
"""

from __future__ import annotations

from typing import Any

from codeherd_schema.results import Result
from codeherd_worker.engine.engine import Engine


def job_summary(result: Result) -> dict[str, Any]:
    """Return a finished job in the shape of Flower's result column; the task's id names the job."""
    decode_s = result.timings.decode_s
    # Flower cuts long columns: what operators look for comes first.
    return {
        "in": result.prompt_tokens,
        "out": result.completion_tokens,
        "tps": round(result.completion_tokens / decode_s, 1) if decode_s > 0 else None,
        "finish": ",".join(sorted({str(c.finish_reason) for c in result.candidates})),
        "s": round(result.timings.total_s, 3),
        "model": result.model,
    }


def no_result(outcome: str) -> dict[str, Any]:
    """Return a task that stored no result: a repeated hint, a cancelled or released job."""
    return {"outcome": outcome}


def engine_figures(engine: Engine, *, worker_id: str, model: str, queue: str) -> dict[str, Any]:
    """Return the answer to the `engine_stats` inspection."""
    stats = engine.stats()
    return {
        "worker": worker_id,
        "model": model,
        "queue": queue,
        "slots": stats.slots,
        "active": stats.active,
        "waiting": stats.waiting,
        "steps": stats.steps,
        "tokens": stats.tokens,
        "cache_bytes": stats.cache_bytes,
        "fingerprint": engine.fingerprint,
    }
