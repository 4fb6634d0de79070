"""What Flower shows of a job: one compact line, without a word of its text.

Owns: the words and their order. Everyone who may log in to Flower sees them.
"""

from __future__ import annotations

from typing import Any

from codeherd_schema.results import Result


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
