"""Train the tiny model within a fixed time, on the CPU or on a GPU; stop and go on at will.

Matrices are trained with Muon, the embedding and the norms with AdamW. The learning rate follows the time
used, so that the run is annealed when its minutes are over. Knows how to train; `examples` knows on what.

    python -m train_tiny.train --corpus corpus.jsonl --tokenizer TOKENIZER_DIR --out RUN_DIR --minutes 110
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from train_tiny.corpus import is_held_out, read
from train_tiny.examples import Example, Formatter, Stream
from train_tiny.model import MAX_POSITIONS, build_model

#: Share of the time in which the learning rate rises, and from which on it falls; its last share of the peak.
WARMUP_SHARE, DECAY_FROM, LAST_LR_SHARE = 0.015, 0.45, 0.02
#: Longest example by share of the time used, tokens: short functions first, the full length at the end.
LENGTHS = ((0.0, 128), (0.4, 192), (0.7, 384), (0.95, MAX_POSITIONS))
#: Gradient norm at which it is clipped.
MAX_GRADIENT_NORM = 1.0
#: Seconds between checkpoints, and steps between lines of progress.
CHECKPOINT_S, REPORT_STEPS = 300, 25


@dataclass
class Progress:
    """Where a run stands; all that a resumed run needs beside weights and optimizers."""

    #: Training time used, over all resumptions.
    elapsed_s: float = 0.0
    step: int = 0
    #: Tokens seen, padding excluded.
    tokens: int = 0
    #: Round of the stream, next batch within it, and the length limit the round was made with.
    round: int = 0
    batch: int = 0
    max_tokens: int = LENGTHS[0][1]


def lr_share(used: float) -> float:
    """Return the share of the peak learning rate after the share `used` of the time, both in [0, 1]."""
    rising = min(1.0, (used + 1e-4) / WARMUP_SHARE)
    falling = (1.0 - used) / (1.0 - DECAY_FROM) * (1.0 - LAST_LR_SHARE) + LAST_LR_SHARE
    return max(LAST_LR_SHARE, min(rising, falling, 1.0))


def length_limit(used: float) -> int:
    """Return the longest example allowed after the share `used` of the time."""
    return [tokens for start, tokens in LENGTHS if used >= start][-1]


def collate(batch: list[Example], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad a batch on the right to a multiple of `step`; padding has weight 0.

    Returns: ids (B, S) int64 and weights (B, S) float32.
    """
    length = -(-max(len(example.ids) for example in batch) // step) * step
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    weights = torch.zeros(len(batch), length)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.weights)] = torch.tensor(example.weights)
    return ids, weights


def weighted_loss(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted mean of the next-token loss in nats; positions without weight cost nothing.

    Args:
        hidden: (B, S, width), the model's last hidden states.
        head: (V, width), the output embedding.
        ids: (B, S) int64.
        weights: (B, S) float32, the weight of each token as a target.
    """
    targets, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    wanted = weights.nonzero().squeeze(1)
    states = hidden[:, :-1].flatten(0, 1)[wanted]
    logits = functional.linear(states, head).float()
    losses = functional.cross_entropy(logits, targets[wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


def make_optimizers(model: LlamaForCausalLM, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest; each group knows its peak rate."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    embedding = [model.model.embed_tokens.weight]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others + embedding, lr=adamw_lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Run:
    """One training run in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model"))
        torch.manual_seed(args.seed)
        self.device, self.out, self.limit_s = torch.device(args.device), args.out, args.minutes * 60.0
        self.model = build_model(sp, args.width, args.layers, args.heads, args.inner).to(self.device)
        self.optimizers = make_optimizers(self.model, args.muon_lr, args.adamw_lr)
        units = [unit for unit in read(args.corpus) if not is_held_out(unit.path)]
        self.stream = Stream(units, Formatter(sp), args.seed, args.batch_tokens)
        self.progress = Progress()
        if self.device.type == "cpu":
            # Measured at 128 tokens: the fused CPU kernel's backward costs a quarter of the whole step.
            self.model.set_attn_implementation("eager")
        decoder: Any = self.model.model
        self.decoder = torch.compile(decoder, dynamic=True) if args.compile else decoder
        if args.resume:
            self.load()

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` reads."""
        return Path(self.out, "checkpoint.pt")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "config": self.model.config.to_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        temporary = self.checkpoint.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def load(self) -> None:
        """Take up the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.progress = Progress(**state["progress"])

    def batches(self) -> Iterator[list[Example]]:
        """Yield batches from where the run stands, and keep its place."""
        place = self.progress
        while True:
            batches = self.stream.round(place.round, place.max_tokens)
            while place.batch < len(batches):
                place.batch += 1
                yield batches[place.batch - 1]
            place.round, place.batch = place.round + 1, 0
            place.max_tokens = length_limit(place.elapsed_s / self.limit_s)

    def step(self, batch: list[Example]) -> float:
        """Take one optimizer step; return the loss in nats."""
        ids, weights = (tensor.to(self.device) for tensor in collate(batch, Stream.LENGTH_STEP))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            loss = weighted_loss(hidden, self.model.lm_head.weight, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        share = lr_share(self.progress.elapsed_s / self.limit_s)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train(self) -> None:
        """Train until the time is over, and leave a checkpoint."""
        place, mean = self.progress, 0.0
        self.save()
        started, saved = time.monotonic() - place.elapsed_s, time.monotonic()
        for batch in self.batches():
            loss = self.step(batch)
            mean = loss if not mean else 0.98 * mean + 0.02 * loss
            place.step += 1
            place.tokens += sum(len(example.ids) for example in batch)
            place.elapsed_s = time.monotonic() - started
            if place.step % REPORT_STEPS == 0:
                say(
                    f"trained step={place.step} loss={mean:.3f} minutes={place.elapsed_s / 60:.1f} "
                    f"tokens_m={place.tokens / 1e6:.2f} tokens_per_s={place.tokens / place.elapsed_s:.0f} "
                    f"round={place.round} max_tokens={place.max_tokens} "
                    f"lr_share={lr_share(place.elapsed_s / self.limit_s):.2f}"
                )
            if time.monotonic() - saved > CHECKPOINT_S or place.elapsed_s > self.limit_s:
                self.save()
                saved = time.monotonic()
            if place.elapsed_s > self.limit_s:
                return


def say(line: str) -> None:
    """Write one line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=110.0, help="training time, over all resumptions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile; measured: no gain on a CPU"
    )
    parser.add_argument("--batch-tokens", type=int, help="per step; 4096 on a CPU, 65536 on a GPU")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=0.003)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.batch_tokens = args.batch_tokens or (65_536 if args.device.startswith("cuda") else 4_096)
    return args


def main() -> None:
    """Train."""
    args = read_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    Run(args).train()


if __name__ == "__main__":
    main()
