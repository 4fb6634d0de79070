"""Measure a model folder on fixed held-out text, and print what it writes.

Two figures: bits per byte of plain code, and the loss on the summary of a docstring given an infilling prompt
(PSM: decorators, header and quotes before the hole; closing quotes and body after it). Bits per byte can be
compared between vocabularies, nats per token cannot.

    python -m train_tiny.evaluate --corpus corpus.jsonl --model MODEL_DIR
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from train_tiny.corpus import Unit, is_held_out, read
from train_tiny.examples import Formatter, docstring_hole

#: Size of the fixed held-out set: functions with a summary, and windows of files.
SUMMARIES, WINDOWS = 600, 300
#: Body given after the hole, characters; text of a window, characters.
BODY_CHARS, WINDOW_CHARS = 500, 900
#: Longest answer that is sampled, tokens.
MAX_NEW_TOKENS = 48
#: Comments and headers to complete.
COMPLETIONS = (
    "# factorial\ndef factorial(n):\n",
    "# Return the largest value.\ndef largest(values):\n",
    "class Point:\n    def __init__(self, x, y):\n",
)


def pick_held_out(units: list[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Return the fixed held-out functions and windows; the same for every model and seed."""
    held_out = [unit for unit in units if is_held_out(unit.path)]
    summaries = [unit for unit in held_out if unit.summary]
    windows = [unit for unit in held_out if not unit.is_function]
    rng = random.Random(0)
    return (
        rng.sample(summaries, min(SUMMARIES, len(summaries))),
        rng.sample(windows, min(WINDOWS, len(windows))),
    )


@torch.inference_mode()
def answer_loss(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """Return the loss of `answer` after `prompt`, in nats, summed."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()


def score(model: LlamaForCausalLM, formatter: Formatter, units: list[Unit]) -> dict[str, float]:
    """Return the held-out figures of a model."""
    summaries, windows = pick_held_out(units)
    answers = [(*docstring_hole(unit, BODY_CHARS),) for unit in summaries]
    figures: dict[str, float] = {}
    for order, prompt_of in (("psm", formatter.psm_prompt), ("spm", formatter.spm_prompt)):
        nats = tokens = text_bytes = 0.0
        for prefix, middle, suffix in answers:
            ids = [*formatter.encode_infilling(middle), formatter.eot]
            nats += answer_loss(model, prompt_of(prefix, suffix), ids)
            tokens += len(ids)
            text_bytes += len(middle.encode()) + 1
        figures[f"summary_{order}_nats_per_token"] = nats / tokens
        figures[f"summary_{order}_bits_per_byte"] = nats / math.log(2) / text_bytes
    nats = text_bytes = 0.0
    for window in windows:
        text = window.context[:WINDOW_CHARS]
        nats += answer_loss(model, [formatter.bos], formatter.encode(text))
        text_bytes += len(text.encode())
    figures["code_bits_per_byte"] = nats / math.log(2) / text_bytes
    return {name: round(value, 4) for name, value in figures.items()}


@torch.inference_mode()
def write_on(model: LlamaForCausalLM, formatter: Formatter, prompt: list[int], max_new_tokens: int) -> str:
    """Return the greedy continuation of a prompt up to end of text or end of the middle."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[formatter.eos, formatter.eot],
        pad_token_id=formatter.eos,
    )
    new = [token for token in out[0, len(prompt) :].tolist() if token not in (formatter.eos, formatter.eot)]
    # Behind another piece the first word keeps its space, which decoding alone would strip.
    text: str = formatter.sp.decode([*formatter.encode("."), *new])
    return text[1:]


def print_samples(model: LlamaForCausalLM, formatter: Formatter, units: list[Unit], count: int) -> None:
    """Write greedy summaries beside the real ones, and a few completions."""
    for unit in pick_held_out(units)[0][:count]:
        prefix, middle, suffix = docstring_hole(unit, BODY_CHARS)
        answer = write_on(model, formatter, formatter.psm_prompt(prefix, suffix), MAX_NEW_TOKENS)
        sys.stdout.write(f"\n{prefix.strip()}\n  real:  {middle}\n  model: {answer}\n")
    for text in COMPLETIONS:
        answer = write_on(model, formatter, [formatter.bos, *formatter.encode(text)], 2 * MAX_NEW_TOKENS)
        sys.stdout.write(f"\n{text}---\n{answer}\n")


def main() -> None:
    """Score a model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer_file = str(args.model / "tokenizer.model")
    formatter = Formatter(sentencepiece.SentencePieceProcessor(model_file=tokenizer_file))
    units = read(args.corpus)
    sys.stdout.write(json.dumps(score(model, formatter, units), indent=2) + "\n")
    print_samples(model, formatter, units, args.samples)


if __name__ == "__main__":
    main()
