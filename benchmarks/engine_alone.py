"""The engine as a worker uses it, without queue, broker and database: what the service is measured against.

    python -m benchmarks.engine_alone FOLDER MAX_LEN

Reads one JSON line per round, a list of requests; prints one with the seconds and each job's text and tokens.
Prompts, stop rules and text are built as a worker builds them. The first round warms up.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.systems.codeherd import engine_settings, start_engine
from codeherd_schema.models import TINY
from codeherd_schema.requests import Request, parse_request
from codeherd_worker.engine.detokenize import Detokenizer
from codeherd_worker.engine.engine import Engine
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.engine.vocabulary import Vocabulary


def main() -> None:
    """Answer rounds until the input ends."""
    folder, max_len = Path(sys.argv[1]), int(sys.argv[2])
    vocabulary = Vocabulary.from_folder(folder)
    engine = start_engine(folder, engine_settings(max_len=max_len, reuse_prefixes=True, draft_tokens=0))
    for line in sys.stdin:
        requests = [parse_request(fields) for fields in json.loads(line)]
        print(json.dumps(_run(engine, vocabulary, requests)), flush=True)
    engine.close()


def _run(engine: Engine, vocabulary: Vocabulary, requests: list[Request]) -> dict[str, Any]:
    started_at = time.perf_counter()
    futures = [_submit(engine, vocabulary, request) for request in requests]
    outcomes = [future.result() for future in futures]
    wall_s = time.perf_counter() - started_at
    return {
        "wall_s": wall_s,
        "tokens": [outcome.completion_tokens for outcome in outcomes],
        "texts": [outcome.text for outcome in outcomes],
    }


def _submit(engine: Engine, vocabulary: Vocabulary, request: Request) -> Future[SequenceOutcome]:
    # Every model here has the embedded model's vocabulary; the jobs are shorter than its window.
    prompt = build_prompt(request, vocabulary, TINY)
    stopper = Stopper(
        stop_ids=prompt.stop_ids,
        stop_strings=prompt.stop_strings,
        max_new_tokens=request.sampling.max_new_tokens,
        detokenizer=Detokenizer(
            vocabulary, strip_first_space=prompt.strip_first_space, newline=prompt.newline
        ),
    )
    params = SamplingParams(seed=request.sampling.seed or 0)
    return engine.submit(SequenceRequest(prompt.token_ids, params, stopper, CancelToken()))


if __name__ == "__main__":
    main()
