"""Models, jobs and engines with which the engine's promises are checked; run, one process's answers.

    python -m tests.acceptance.engine_jobs MODEL SEED JOBS

prints the engine's fingerprint and what the jobs answer in the mix of that seed, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.soak import TINY_FOLDER, Answer, Recipe, Recipes
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.prompts import Prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome
from codeherd_worker.engine.vocabulary import Vocabulary

#: Seconds until a test gives up; nothing is measured against it.
PATIENCE_S = 240.0
#: Tokens of the longest job.
MAX_LEN = 512
#: As many as a worker on the smallest machine has. With one thread, all rows round alike on many machines.
THREADS = 2
#: Heads of keys and values of the random models, which have four query heads.
RANDOM_MODELS = {"mha": 4, "gqa": 2}
VOCABULARY = Vocabulary.from_folder(TINY_FOLDER)


def uniform(**changes: Any) -> EngineSettings:
    """Return the settings that most checks run on."""
    fields: dict[str, Any] = {"slots": 6, "max_len": MAX_LEN, "prefill_chunk": 128, "reuse_prefixes": False}
    return EngineSettings.uniform(**(fields | changes))


def random_llama(name: str) -> LlamaForCausalLM:
    """Return a model with the embedded model's vocabulary and weights of no meaning, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=RANDOM_MODELS[name],
        max_position_embeddings=2048,
        bos_token_id=VOCABULARY.specials.bos,
        eos_token_id=VOCABULARY.specials.eos,
        pad_token_id=None,
        # Five times the usual: with less, a random Llama repeats one token for ever.
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def model_folder(name: str, root: Path) -> Path:
    """Return a folder with the model's files."""
    if name not in RANDOM_MODELS:
        return TINY_FOLDER
    folder = root / name
    random_llama(name).save_pretrained(folder)
    return folder


def load(folder: Path, precision: str = "float32") -> LlamaForCausalLM:
    """Load with transformers alone, so that a reference owes the engine's loader nothing."""
    if precision == "float32":
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
        )
        for module in model.modules():
            # Where the processor has AVX512-BF16, bitsandbytes 0.50 multiplies in bfloat16 whatever the
            # compute dtype is. Without its packed weights it computes in float32, as it was told to.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def recipes(count: int, *, seed: int) -> list[Recipe]:
    """Return jobs of all kinds that fit `MAX_LEN`."""
    supply = Recipes(seed, VOCABULARY)
    fitting = (recipe for recipe in iter(supply.next, None) if _need(recipe) <= MAX_LEN)
    return list(islice(fitting, count))


def read_length_recipes(count: int, *, seed: int, tokens: tuple[int, int]) -> list[Recipe]:
    """Return jobs with prompts of so many tokens and five log-probabilities a token: bits that part show."""
    rng, ids = random.Random(seed), VOCABULARY.encode(Path(textwrap.__file__).read_text(encoding="utf-8"))
    found = []
    for _ in range(count):
        length = rng.randint(*tokens)
        start = rng.randrange(len(ids) - length)
        prompt = Prompt(
            token_ids=tuple(ids[start : start + length]),
            stop_ids=frozenset(),
            stop_strings=(),
            strip_first_space=False,
            newline="\n",
        )
        found.append(Recipe(prompt, SamplingParams(logprobs=5), max_new_tokens=8))
    return found


def _need(recipe: Recipe) -> int:
    return len(recipe.prompt.token_ids) + recipe.max_new_tokens


def answer_alone(engine: Engine, jobs: Iterable[Recipe]) -> list[Answer]:
    """Run jobs one after the other, nobody beside, on an engine that has started."""
    return [Answer.of(engine.submit(job.request(VOCABULARY)).result(timeout=PATIENCE_S)) for job in jobs]


def shuffled(
    jobs: Sequence[Recipe], *, seed: int, noise: Sequence[Recipe] | None = None
) -> list[tuple[int | None, Recipe]]:
    """Put jobs in a random order with others, which have no number, between them: half as many by default."""
    if noise is None:
        noise = recipes(len(jobs) // 2, seed=1000 + seed)
    order: list[tuple[int | None, Recipe]] = [*enumerate(jobs), *((None, job) for job in noise)]
    random.Random(seed).shuffle(order)
    return order


def answer_together(
    engine: Engine, order: Iterable[tuple[int | None, Recipe]]
) -> tuple[dict[int, Answer], dict[int, SequenceOutcome]]:
    """Submit all, then start the engine; return what the numbered jobs answered that it did not fail.

    An engine that breaks in between leaves some without an answer.
    """
    futures = [(number, engine.submit(recipe.request(VOCABULARY))) for number, recipe in order]
    engine.start()
    outcomes = {
        number: future.result()
        for number, future in futures
        if future.exception(timeout=PATIENCE_S) is None and number is not None
    }
    return {number: Answer.of(outcome) for number, outcome in outcomes.items()}, outcomes


def differences(found: Mapping[int, Answer], expected: Sequence[Answer]) -> list[str]:
    """Say which jobs answered otherwise, and where their tokens part."""
    return [
        f"job {number}: {_difference(answer, expected[number])}"
        for number, answer in sorted(found.items())
        if answer != expected[number]
    ]


def _difference(a: Answer, b: Answer) -> str:
    if a.token_ids == b.token_ids:
        names = [name for name in ("text", "logprobs", "finish_reason", "stop_string")
                 if getattr(a, name) != getattr(b, name)]  # fmt: skip
        return f"same tokens, other {' and '.join(names)}"
    place = first_difference(a.token_ids, b.token_ids)
    return f"tokens part at {place} of {len(a.token_ids)} and {len(b.token_ids)}"


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the first place where two sequences differ; the shorter one's length if it begins the other."""
    return next(
        (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def warm(model: LlamaForCausalLM, settings: EngineSettings) -> Engine:
    """Return an engine as a worker makes it, not started."""
    engine = Engine(model, settings)
    engine.warm_up()
    return engine


def bench_model(name: str) -> LlamaForCausalLM:
    """Return a model by its name, in float32."""
    return random_llama(name) if name in RANDOM_MODELS else load(TINY_FOLDER)


def as_json(answer: Answer) -> Any:
    """Return what JSON would give back."""
    return json.loads(json.dumps(asdict(answer)))


def main() -> None:
    """Print one process's answers."""
    name, seed = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(THREADS)
    engine = warm(bench_model(name), uniform())
    jobs = recipes(int(sys.argv[3]), seed=0)
    found, _ = answer_together(engine, shuffled(jobs, seed=seed))
    engine.close()
    answers = [as_json(found[number]) for number in range(len(jobs))]
    print(json.dumps({"fingerprint": engine.fingerprint, "answers": answers}))  # noqa: T201 -- its purpose


if __name__ == "__main__":
    main()
