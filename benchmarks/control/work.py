"""The job that every system runs: a prompt-sized request in, a result of a few hundred bytes out.

Owns: the texts and what a peer's worker does with one. codeherd's own worker does the same with a null engine
(`tests.null_worker`). Knows no queue.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

#: Characters of a request, all ASCII.
PROMPT_CHARS = 1000
#: Characters of the text in a result; with its other fields a result has about 300 bytes as JSON.
TEXT_CHARS = 220
#: Environment variable of a worker: seconds that a job lasts; none if unset.
PAUSE_VARIABLE = "CONTROL_BENCHMARK_PAUSE_S"
#: Environment variable of a worker: file that gets one line per run of a job, so that runs can be counted.
JOURNAL_VARIABLE = "CONTROL_BENCHMARK_JOURNAL"

_FILLER = "def add(a: int, b: int) -> int:\n    return a + b\n\n\n"
_TEXT = (_FILLER * TEXT_CHARS)[:TEXT_CHARS]


def prompts(name: str, count: int) -> list[str]:
    """Return `count` requests; no two of one name are alike, nor those of two names."""
    body = _FILLER * (PROMPT_CHARS // len(_FILLER) + 1)
    return [(f"# {name} {number}\n" + body)[:PROMPT_CHARS] for number in range(count)]


def digest_of(prompt: str) -> str:
    """Return what an answer must hold to be the answer to this request."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def null_job(prompt: str) -> dict[str, Any]:
    """Answer a request, after a pause if one is asked for; the task of peers whose jobs run in threads."""
    answer = answer_to(prompt)
    if pause_s():
        time.sleep(pause_s())
    return answer


def pause_s() -> float:
    """Return the seconds that a job lasts."""
    return float(os.environ.get(PAUSE_VARIABLE, "0"))


def answer_to(prompt: str) -> dict[str, Any]:
    """Answer a request, and note that it was. The clock is read first: the job has started."""
    started_at = time.time()
    digest = digest_of(prompt)
    journal = os.environ.get(JOURNAL_VARIABLE)
    if journal is not None:
        with Path(journal).open("a", encoding="ascii") as file:
            file.write(digest + "\n")
    return {"digest": digest, "text": _TEXT, "started_at": started_at}
