"""How much of the engine's speed is left when the whole service is around it.

    python -m benchmarks.service [--models tiny random-110m] [--threads 2] [--rounds 3] [--write]

Owns: a real Redis, a real Celery worker process, a dispatcher and a SQLite file, the client that submits and
waits, and the comparison with the engine alone on the same jobs. Both generate the same texts, or the run
fails; they take turns, and the share is the median over the rounds. With `--write` it goes to
`benchmarks/results/service.jsonl`. With as many threads as the machine has cores both share them; with fewer,
as on a machine whose engine computes on a GPU, the service has cores that the engine does not use.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contest import environment
from benchmarks.models import MODELS, BenchModel, prepare
from benchmarks.protocol import SLOTS, THREADS
from benchmarks.report import PRECISION, machine
from benchmarks.run import RESULTS, append
from benchmarks.systems import OURS
from codeherd_producer.client import Client
from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest, Sampling, dump_request
from codeherd_schema.settings import SharedSettings, load
from codeherd_worker.engine.vocabulary import Vocabulary
from tests.services import RedisServer, wait_until

#: Part of the engine's tokens per second that the service should reach.
TARGET = 0.95
#: Jobs per round; a round should last long enough that its first and last second do not decide.
JOBS = {"tiny": 256, "random-110m": 64}
#: Tokens in and out, both ends included: the shape of the workload `ragged`.
PROMPT_TOKENS, NEW_TOKENS = (32, 256), (16, 128)
MAX_LEN = PROMPT_TOKENS[1] + NEW_TOKENS[1]
#: Seconds for a worker to load its model, and for a round.
START_TIMEOUT_S, ROUND_TIMEOUT_S = 300.0, 1800.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a round."""

    wall_s: float
    tokens: tuple[int, ...]
    texts: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, from the first submission to the last answer."""
        return sum(self.tokens) / self.wall_s

    @property
    def outcomes(self) -> list[tuple[int, str]]:
        """How many tokens each job got, and its text."""
        return list(zip(self.tokens, self.texts, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and store if asked to; return the exit status."""
    options = _parser().parse_args(argv)
    print("| model | threads | jobs | service, tokens/s | engine alone, tokens/s | share | target | |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.models:
        row = measure(
            prepare(name), jobs=options.jobs or JOBS[name], threads=options.threads, rounds=options.rounds
        )
        verdict = "met" if row["share"] >= TARGET else "not met"
        print(
            f"| {name} | {row['threads']} | {row['jobs']} | {row['service_tokens_per_s']:.1f} "
            f"| {row['engine_tokens_per_s']:.1f} | {row['share']:.1%} | {TARGET:.0%} | {verdict} |",
            flush=True,
        )
        if options.write:
            append([row], RESULTS / "service.jsonl")
    return 0


def measure(model: BenchModel, *, jobs: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return the row of one model; the engine computes on so many threads, alone and in the service.

    Raises:
        RuntimeError: service and engine generated different texts.
    """
    vocabulary = Vocabulary.from_folder(model.folder)
    shares, service_rates, engine_rates = [], [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(_engine_alone(model, threads))
        client = stack.enter_context(_service(model, threads, folder))
        load_average = os.getloadavg()[0]
        for number in range(rounds + 1):
            # Round 0 warms both up.
            requests = make_requests(model, vocabulary, jobs if number else SLOTS, number)
            by_service, by_engine = _ask_service(client, requests), _ask_engine(engine, requests)
            if by_service.outcomes != by_engine.outcomes:
                raise RuntimeError(f"{model.name}, round {number}: {_difference(by_service, by_engine)}")
            if number:
                service_rates.append(by_service.tokens_per_s)
                engine_rates.append(by_engine.tokens_per_s)
                shares.append(by_service.tokens_per_s / by_engine.tokens_per_s)
                _tell(f"{model.name}, round {number}: {shares[-1]:.1%} of {engine_rates[-1]:.1f} tokens/s")
    return {
        "system": OURS.name,
        "version": OURS.version,
        "model": model.name,
        "precision": PRECISION,
        "slots": SLOTS,
        "threads": threads,
        "jobs": jobs,
        "service_tokens_per_s": round(statistics.median(service_rates), 2),
        "engine_tokens_per_s": round(statistics.median(engine_rates), 2),
        "share": round(statistics.median(shares), 4),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "load_average": round(load_average, 2),
    }


def _difference(service: Answer, engine: Answer) -> str:
    """Say everything about jobs whose answers differ: it may not happen a second time."""
    pairs = enumerate(zip(service.outcomes, engine.outcomes, strict=True))
    differing = [f"job {number}: {one!r} and {other!r}" for number, (one, other) in pairs if one != other]
    return f"service and engine disagree about {len(differing)} jobs: {'; '.join(differing)}"


def make_requests(
    model: BenchModel, vocabulary: Vocabulary, count: int, number: int
) -> list[GenerateRequest]:
    """Return greedy completions of random words; every round has other words."""
    source = random.Random(f"service {number}")
    words = [
        vocabulary.piece(i)[1:]
        for i in range(vocabulary.size)
        if vocabulary.piece(i)[0] == "▁" and vocabulary.piece(i)[1:].isalpha() and i not in model.control_ids
    ]
    requests = []
    for index in range(count):
        length, new = source.randint(*PROMPT_TOKENS), source.randint(*NEW_TOKENS)
        # One token per word, and one for the beginning.
        prompt = " ".join(source.choices(words, k=length - 1))
        sampling = Sampling(max_new_tokens=new, seed=index)
        requests.append(GenerateRequest(prompt=prompt, model=model.name, sampling=sampling))
    return requests


def _ask_service(client: Client, requests: Sequence[GenerateRequest]) -> Answer:
    started_at = time.perf_counter()
    jobs = client.submit_many(requests)
    client.wait(jobs, timeout_s=ROUND_TIMEOUT_S)
    wall_s = time.perf_counter() - started_at
    candidates = [job.result().candidates[0] for job in jobs]
    return Answer(wall_s, tuple(c.completion_tokens for c in candidates), tuple(c.text for c in candidates))


def _ask_engine(engine: subprocess.Popen[str], requests: Sequence[GenerateRequest]) -> Answer:
    if engine.stdin is None or engine.stdout is None:
        raise RuntimeError("the engine's process has no pipes")
    engine.stdin.write(json.dumps([dump_request(request) for request in requests]) + "\n")
    engine.stdin.flush()
    line = engine.stdout.readline()
    if not line:
        raise RuntimeError("the engine's process ended")
    fields = json.loads(line)
    return Answer(fields["wall_s"], tuple(fields["tokens"]), tuple(fields["texts"]))


@contextmanager
def _engine_alone(model: BenchModel, threads: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.engine_alone", str(model.folder), str(MAX_LEN)]
    with subprocess.Popen(
        command,
        env=environment(uses_torch=True, threads=threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@contextmanager
def _service(model: BenchModel, threads: int, folder: Path) -> Iterator[Client]:
    """Start Redis, a worker and a dispatcher; give a client when the worker answers."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        database_url = f"sqlite:///{folder / 'codeherd.db'}"
        upgrade(database_url)
        variables = {
            "CODEHERD_DATABASE_URL": database_url,
            "CODEHERD_BROKER_URL": redis.url,
            "CODEHERD_LOG_LEVEL": "warning",
        }
        if model.name != "tiny":
            variables["CODEHERD_MODELS_FILE"] = str(_models_file(model, folder))
        size = ["--slots", str(SLOTS), "--max-len", str(MAX_LEN), "--threads", str(threads)]
        worker = ["codeherd_worker", "--model", model.name, "--gpus", "cpu", "--quantization", "none", *size]
        for arguments in (worker, ["codeherd_producer.cli", "dispatcher"]):
            stack.enter_context(_process(arguments, variables, folder / f"{arguments[0]}.log"))
        settings = load(SharedSettings, environment=variables).settings
        broker = Broker(settings)
        stack.callback(broker.close)
        wait_until(lambda: _answers(broker), "the worker", timeout_s=START_TIMEOUT_S)
        yield stack.enter_context(Client(settings))


@contextmanager
def _process(arguments: Sequence[str], variables: dict[str, str], log: Path) -> Iterator[None]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=clean | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            _tell(log.read_text(errors="replace")[-4000:])


def _answers(broker: Broker) -> bool:
    try:
        return bool(broker.workers(1.0))
    except BrokerUnavailable:
        return False


def _models_file(model: BenchModel, folder: Path) -> Path:
    """Write the entry that lets a worker serve the random model."""
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    facts = {
        "source": str(model.folder),
        "parameters": 110_000_000,
        "layers": config["num_hidden_layers"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": model.vocab_size,
        "context_window": model.window,
    }
    # JSON's numbers and strings are TOML's too.
    lines = [f"[models.{model.name}]", *(f"{name} = {json.dumps(value)}" for name, value in facts.items())]
    path = folder / "models.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service", description="Compare the whole service with the engine alone."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--jobs", type=int, help="per round (default: 256 with tiny, else 64)")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="add the rows to benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
