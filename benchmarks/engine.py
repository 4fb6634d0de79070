"""Compare the engine with three ways to run the same ragged jobs in transformers, in one run.

    python benchmarks/engine.py [--write]

The model is a random Llama and no sequence ends by itself; every contender must return exactly the tokens
that were asked for, or the run fails. Contenders take turns, and each figure is the median of the rounds.
Tokens per second are of the clock on the wall, and fall when the machine is busy with other things;
tokens per CPU second count only this process's own time, on all its threads.
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
JOBS = 16
SLOTS = 4
#: Tokens, both ends included.
PROMPT_LENGTHS, NEW_LENGTHS = (16, 128), (8, 64)
MAX_LEN = 256
VOCAB_SIZE = 4096

#: Prompt ids and how many new tokens to generate.
Job = tuple[tuple[int, ...], int]
#: New tokens per second of the clock, and per second of CPU time.
Rates = tuple[float, float]


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


def run_engine(engine: Engine, jobs: list[Job]) -> int:
    futures = []
    for prompt_ids, count in jobs:
        stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=count, detokenizer=None)
        futures.append(engine.submit(SequenceRequest(prompt_ids, SamplingParams(), stopper, CancelToken())))
    return sum(future.result().completion_tokens for future in futures)


def run_one_by_one(model: LlamaForCausalLM, jobs: list[Job]) -> int:
    generated = 0
    for prompt_ids, count in jobs:
        output = model.generate(
            torch.tensor([prompt_ids]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        generated += output.shape[1] - len(prompt_ids)
    return generated


def run_padded_batches(model: LlamaForCausalLM, jobs: list[Job]) -> int:
    useful = 0
    for start in range(0, len(jobs), SLOTS):
        batch = jobs[start : start + SLOTS]
        longest = max(len(prompt_ids) for prompt_ids, _ in batch)
        input_ids = torch.tensor([(0,) * (longest - len(ids)) + ids for ids, _ in batch])
        output = model.generate(
            input_ids,
            attention_mask=(input_ids != 0).long(),
            max_new_tokens=max(count for _, count in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        useful += sum(min(count, output.shape[1] - longest) for _, count in batch)
    return useful


def run_continuous_batching(model: LlamaForCausalLM, jobs: list[Job]) -> int:
    settings = GenerationConfig(
        max_new_tokens=NEW_LENGTHS[1], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # No inference mode here: its thread would not share it, and fails on tensors that were made in it.
    with model.continuous_batching_context_manager(settings) as manager:
        for prompt_ids, count in jobs:
            manager.add_request(list(prompt_ids), max_new_tokens=count)
        generated = 0
        for _ in jobs:
            result = manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError("continuous batching did not answer a request")
            generated += len(result.generated_tokens)
    return generated


def measure(contenders: dict[str, Callable[[], int]], new_tokens: int) -> dict[str, list[Rates]]:
    """Return each contender's speed, one figure per round."""
    figures: dict[str, list[Rates]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name, contender in contenders.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            generated = contender()
            rates = (
                new_tokens / (time.perf_counter() - wall_s),
                new_tokens / (time.process_time() - cpu_s),
            )
            if generated != new_tokens:
                raise RuntimeError(f"{name} generated {generated} tokens, not {new_tokens}")
            figures[name].append(rates)
            print(f"round {number + 1}  {name:<38} {rates[0]:7.1f} /s  {rates[1]:7.1f} /CPU s", flush=True)
    return figures


def make_table(figures: dict[str, list[Rates]]) -> str:
    lines = [
        "| contender | tokens/s (lowest to highest) | tokens per CPU s (lowest to highest) |",
        "|---|---|---|",
    ]
    for name, rounds in figures.items():
        cells = [
            f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
            for rates in zip(*rounds, strict=True)
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def make_facts(jobs: list[Job]) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    facts = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}",
        "load average at the end": load,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "model": "random Llama, float32, 6 layers, hidden 512, 8 heads",
        "jobs": f"{len(jobs)}, prompts of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[1]} tokens, "
        f"{NEW_LENGTHS[0]} to {NEW_LENGTHS[1]} new tokens each, {sum(count for _, count in jobs)} in all",
        "batches": f"{SLOTS} slots, {SLOTS} rows per padded batch",
        "figures": f"medians of {ROUNDS} rounds, contenders take turns",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


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
    contenders: dict[str, Callable[[], int]] = {
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
