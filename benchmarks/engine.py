"""Compare the engine with three ways to run the same ragged jobs in transformers, in one run.

    python benchmarks/engine.py [--write]

The model is a random Llama and no sequence ends by itself, so every contender computes the same number
of new tokens. Contenders take turns, the figure is the median of the rounds. A busy machine shows in
all of them alike, but not in the same proportion: read ratios, and read them twice.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

# Before torch is imported: threads that spin at barriers starve each other on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from codeherd_worker.engine.engine import Engine, EngineSettings, SequenceRequest
from codeherd_worker.engine.sampling import SamplingParams
from codeherd_worker.engine.stopping import CancelToken, Stopper

ROUNDS = 3
JOBS = 24
SLOTS = 8
#: Tokens, both ends included.
PROMPT_LENGTHS, NEW_LENGTHS = (16, 160), (8, 80)
MAX_LEN = 512
VOCAB_SIZE = 4096

#: Prompt ids and how many new tokens to generate.
Job = tuple[tuple[int, ...], int]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_jobs() -> list[Job]:
    source = random.Random(0)
    return [
        (
            tuple(source.randrange(3, VOCAB_SIZE) for _ in range(source.randint(*PROMPT_LENGTHS))),
            source.randint(*NEW_LENGTHS),
        )
        for _ in range(JOBS)
    ]


def run_engine(engine: Engine, jobs: list[Job]) -> None:
    futures = []
    for prompt_ids, count in jobs:
        stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=count, detokenizer=None)
        futures.append(engine.submit(SequenceRequest(prompt_ids, SamplingParams(), stopper, CancelToken())))
    for future in futures:
        future.result()


def run_one_by_one(model: LlamaForCausalLM, jobs: list[Job]) -> None:
    for prompt_ids, count in jobs:
        model.generate(
            torch.tensor([prompt_ids]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


def run_padded_batches(model: LlamaForCausalLM, jobs: list[Job]) -> None:
    for start in range(0, len(jobs), SLOTS):
        batch = jobs[start : start + SLOTS]
        longest = max(len(prompt_ids) for prompt_ids, _ in batch)
        input_ids = torch.tensor([(0,) * (longest - len(ids)) + ids for ids, _ in batch])
        model.generate(
            input_ids,
            attention_mask=(input_ids != 0).long(),
            max_new_tokens=max(count for _, count in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


def run_continuous_batching(model: LlamaForCausalLM, jobs: list[Job]) -> None:
    settings = GenerationConfig(
        max_new_tokens=NEW_LENGTHS[1], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with torch.inference_mode(), model.continuous_batching_context_manager(settings) as manager:
        for prompt_ids, count in jobs:
            manager.add_request(list(prompt_ids), max_new_tokens=count)
        finished = 0
        while finished < len(jobs):
            result = manager.get_result(timeout=60)
            if result is None:
                raise TimeoutError("continuous batching gave no result for 60 s")
            finished += result.is_finished()


def measure(contenders: dict[str, Callable[[], None]], new_tokens: int) -> dict[str, list[float]]:
    """Return each contender's tokens per second, one figure per round."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name, contender in contenders.items():
            started_s = time.perf_counter()
            contender()
            rate = new_tokens / (time.perf_counter() - started_s)
            figures[name].append(rate)
            print(f"round {number + 1}  {name:<36} {rate:8.1f} tokens/s", flush=True)
    return figures


def make_table(figures: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(rates) for name, rates in figures.items()}
    first = next(iter(medians.values()))
    lines = ["| contender | tokens/s, median | lowest | highest | engine is |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {median:.1f} | {min(figures[name]):.1f} | {max(figures[name]):.1f} | {first / median:.2f}x |"
        for name, median in medians.items()
    ]
    return "\n".join(lines)


def make_facts(jobs: list[Job]) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            f"- {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
            f" {torch.backends.cpu.get_cpu_capability()}, load average at the end {load}",
            f"- Python {platform.python_version()}, torch {torch.__version__},"
            f" transformers {transformers.__version__}, float32",
            f"- random Llama, 6 layers, hidden 512, 8 heads; {len(jobs)} jobs, {SLOTS} slots or rows per batch",
            f"- prompts of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[1]} tokens,"
            f" {NEW_LENGTHS[0]} to {NEW_LENGTHS[1]} new tokens, {sum(count for _, count in jobs)} in all",
            f"- medians of {ROUNDS} rounds, contenders take turns; OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results")
    arguments = parser.parse_args()
    jobs = make_jobs()
    # Two models of the same weights: the engine puts its own attention into the one it runs.
    reference = make_model()
    engine = Engine(make_model(), EngineSettings(slots=SLOTS, max_len=MAX_LEN))
    engine.warm_up()
    engine.start()
    contenders: dict[str, Callable[[], None]] = {
        "codeherd engine": lambda: run_engine(engine, jobs),
        "transformers generate, one by one": lambda: run_one_by_one(reference, jobs),
        "transformers generate, padded batches": lambda: run_padded_batches(reference, jobs),
        "transformers continuous batching": lambda: run_continuous_batching(reference, jobs),
    }
    figures = measure(contenders, sum(count for _, count in jobs))
    engine.close()
    table, facts = make_table(figures), make_facts(jobs)
    print(f"\n{table}\n\n{facts}")
    if arguments.write:
        day = datetime.now(UTC).date().isoformat()
        path = Path(__file__).parent / "results" / f"{day}-engine-cpu.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# The engine on a CPU, {day}\n\n{table}\n\n{facts}\n")


if __name__ == "__main__":
    main()
