"""Tell what a quantization costs: the same text and the same prompts under two settings of one model.

Owns: the two measures. Does not know text or tokenizers (token ids come in) or the engine: each setting runs
through transformers' own forward pass and greedy decoding, so that what differs is the weights alone.

    perplexity     e to the mean of -ln p(token), over each window's tokens but the first
    agreement      share of those tokens at which both settings would have chosen the same next one
    same_tokens    greedy tokens from the start that both settings give alike, mean over the prompts

Rounding alone can part two continuations: one setting compared with itself shows how much of it there is.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM

from codeherd_schema.errors import GenerationError
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.progress import Progress
from codeherd_worker.engine.quantization import Device, Quantization
from codeherd_worker.footprint import weight_bytes

#: Greedy tokens per prompt.
NEW_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting."""

    #: What was applied, and the dtype of the rest.
    quantization: str
    dtype: str
    #: Of all weights and their scales, in the device's memory.
    weight_bytes: int
    load_s: float
    #: Mean of -ln p(token).
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two settings of one model on the same input."""

    a: Measured
    b: Measured
    #: Tokens that were predicted.
    tokens: int
    #: [0, 1].
    agreement: float
    #: Prompts that were continued, and how many of their `new_tokens` were alike, [0, new_tokens].
    prompts: int
    same_tokens: float
    new_tokens: int


@dataclass(frozen=True, slots=True)
class _Answers:
    measured: Measured
    #: (tokens,) int64 on the CPU: the most likely token at each place.
    choices: torch.Tensor
    continuations: list[list[int]]


def cut_windows(token_ids: Sequence[int], *, bos: int, length: int) -> list[list[int]]:
    """Cut a text into windows that each begin with BOS.

    Args:
        token_ids: of the text, without BOS.
        bos: its id.
        length: tokens of a window, with BOS; the last one may be shorter.
    """
    step = length - 1
    return [[bos, *token_ids[start : start + step]] for start in range(0, len(token_ids), step)]


def compare(
    source: str,
    settings: tuple[Quantization, Quantization],
    windows: Sequence[Sequence[int]],
    *,
    device: Device,
    slots: int,
    prompts: int,
    progress: Progress,
) -> Comparison:
    """Measure two settings, one after the other, so that memory for one is enough.

    Args:
        source: as in `load_model`; looked for on this machine only.
        settings: the quantizations.
        windows: token ids with BOS, at least two each; the prompts are the first halves of the first ones.
        device: where to run.
        slots: prompts continued together, and what `auto` chooses for.
        prompts: how many windows to continue.
        progress: is told of the steps `check`, `load`, `read` and `continue`, after the setting's name.

    Raises:
        GenerationError: a setting's logits are not finite.
        ModelFilesInvalid, InvalidSetting, PackageMissing, OutOfMemory, DeviceUnavailable: as in `load_model`.
    """
    beginnings = _beginnings(windows[:prompts])
    a, b = (
        _answer(
            source,
            setting,
            windows,
            beginnings,
            device=device,
            slots=slots,
            progress=_named(setting, progress),
        )
        for setting in settings
    )
    alike = [same_start(one, other) for one, other in zip(a.continuations, b.continuations, strict=True)]
    return Comparison(
        a=a.measured,
        b=b.measured,
        tokens=len(a.choices),
        agreement=float((a.choices == b.choices).double().mean()),
        prompts=len(beginnings),
        same_tokens=sum(alike) / len(alike),
        new_tokens=NEW_TOKENS,
    )


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _named(setting: str, progress: Progress) -> Progress:
    return lambda step, share: progress(f"{setting}: {step}", share)


def _beginnings(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the first halves, all of the same length: a batch without padding."""
    length = max(1, min(len(window) for window in windows) // 2)
    return [list(window[:length]) for window in windows]


def _answer(
    source: str,
    setting: Quantization,
    windows: Sequence[Sequence[int]],
    beginnings: list[list[int]],
    *,
    device: Device,
    slots: int,
    progress: Progress,
) -> _Answers:
    started = time.monotonic()
    loaded = load_model(
        source, quantization=setting, device=device, slots=slots, offline=True, progress=progress
    )
    load_s = time.monotonic() - started
    # Before the first pass: on some CPUs it packs NF4 weights anew.
    total_bytes = sum(weight_bytes(loaded.model).values())
    with torch.inference_mode():
        nats, choices = _read(loaded.model, windows, loaded.device, progress)
        if not math.isfinite(nats):
            raise GenerationError(
                f"with {loaded.quantization} the model's logits are not finite",
                hint="use another quantization; float16 cannot hold every model's activations",
            )
        continuations = _continue(loaded.model, beginnings, loaded.device, slots, progress)
    measured = Measured(
        quantization=loaded.quantization,
        dtype=str(loaded.dtype).removeprefix("torch."),
        weight_bytes=total_bytes,
        load_s=load_s,
        nats_per_token=nats,
    )
    # The next model needs the room.
    del loaded
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    return _Answers(measured, choices, continuations)


def _read(
    model: LlamaForCausalLM, windows: Sequence[Sequence[int]], device: torch.device, progress: Progress
) -> tuple[float, torch.Tensor]:
    """Return nats per token and the most likely tokens."""
    nats, choices = 0.0, []
    for done, window in enumerate(windows, start=1):
        ids = torch.tensor([window], device=device)
        # (S - 1, V): what each token says of the next.
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        nats += float(functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        choices.append(logits.argmax(-1).cpu())
        progress("read", done / len(windows))
    all_choices = torch.cat(choices)
    return nats / len(all_choices), all_choices


def _continue(
    model: LlamaForCausalLM,
    beginnings: list[list[int]],
    device: torch.device,
    slots: int,
    progress: Progress,
) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    found: list[list[int]] = []
    for start in range(0, len(beginnings), slots):
        ids = torch.tensor(beginnings[start : start + slots], device=device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found += output[:, ids.shape[1] :].tolist()
        progress("continue", len(found) / len(beginnings))
    return found
