"""How many slots of which length a worker gets, from numbers alone, before anything is allocated.

Owns: the sum of weights, cache, activations and reserve on every card, the rule that turns what is left
into length classes, and what to say when it does not fit. Does not know torch, devices or files: whoever
calls has measured them (`codeherd_worker.footprint`).

The sum, for each card of the worker:
    available     what the card has free and what this process holds there
    reserve       a share of it that is left alone: `GPU_RESERVE`, `CPU_RESERVE`
    weights       as they are held; on a CPU dense weights also in a packed copy
    activations   the widest moment of a pass; see `activation_bytes`
    cache         what is left; the card with the fewest tokens decides for all

The rule. Jobs need slots of different lengths, and a long slot is cheap to have and dear to leave empty:
    1. If every slot can hold the whole window, every slot does: one class.
    2. Else one slot holds the whole window, if each of the others then keeps `STEP` tokens; if not, it
       holds half of the cache.
    3. A quarter of the other slots are `MIDDLE` times as long as the rest, but no longer than the longest.
    4. Lengths are whole multiples of `STEP`; what rounding leaves goes to the middle ones.
    5. If the short ones or the longest would be shorter than `STEP`, all are alike, some of them one
       `STEP` longer; if even that is less than `STEP` each, the plan does not fit.
A job may use a slot of any longer class, so the order of lengths costs no job its turn.

Every slot takes `SPARE_TOKENS` beyond its length, which nobody reads (`engine.cache`); idle rows, where
the device needs some to round alike, take a block of `KV_BLOCK` and the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from codeherd_schema.errors import CodeherdError, InvalidSetting, OutOfMemory
from codeherd_worker.engine.cache import KV_BLOCK, SPARE_TOKENS
from codeherd_worker.engine.slot_classes import SlotClass

#: Share of a GPU's memory that is left alone: the CUDA context, fragments, other small programs.
GPU_RESERVE: Final = 0.08
#: Share of a machine's memory that is left alone: other programs live there, and files want to be cached.
CPU_RESERVE: Final = 0.40
#: Tokens. Lengths are multiples of this, unless the window itself is not. CPU attention sums blocks of so
#: many keys: among such lengths a text's bits do not depend on its slot's class, among others they may
#: (256 and 2048 differed on the machine that this was written on).
STEP: Final = KV_BLOCK
#: How much longer middle slots are than short ones.
MIDDLE: Final = 4
#: Of the slots beside the longest, one in so many is a middle one.
MIDDLE_EVERY: Final = 4
#: Bytes per logit beside the model's own dtype: float32 scores and probabilities, and of the noise its
#: 64-bit hashes, the float64 noise and one intermediate (`engine.sampling`).
_BYTES_PER_LOGIT: Final = 4 + 4 + 8 + 8 + 8
#: Bytes that kernels keep for themselves: cuBLAS and attention workspaces, captured graphs; on a CPU
#: oneDNN's and attention's scratch buffers.
GPU_KERNEL_BYTES: Final = 2**30
CPU_KERNEL_BYTES: Final = 2**26


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how wide a pass is."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocab: int
    #: Of activations and cache.
    dtype_bytes: int
    #: Whether kernels may write out a whole weight in `dtype_bytes` each before they multiply.
    is_quantized: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """One device before its cache is allocated."""

    #: `cpu`, `cuda:0`.
    name: str
    #: If nobody else used it.
    total_bytes: int
    #: What is free, and what this process holds.
    available_bytes: int
    #: Share of `available_bytes` that is left alone.
    reserve: float
    weight_bytes: int
    activation_bytes: int
    #: Of the layers on this card, for one token of one slot.
    kv_bytes_per_token: int

    @property
    def reserve_bytes(self) -> int:
        """What is left alone."""
        return math.ceil(self.available_bytes * self.reserve)

    @property
    def tokens(self) -> int:
        """Tokens that the cache may hold here; negative if weights and activations alone do not fit."""
        fixed = self.reserve_bytes + self.weight_bytes + self.activation_bytes
        return (self.available_bytes - fixed) // self.kv_bytes_per_token

    def emptied(self) -> Card:
        """Return the same card without other programs."""
        return replace(self, available_bytes=self.total_bytes)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a worker will allocate."""

    #: How many slots of which length, shortest first.
    classes: tuple[SlotClass, ...]
    #: Tokens of one sequence at most: the model's window, or what was asked for.
    window: int
    #: Rows beside the slots, one block each.
    idle_rows: int
    cards: tuple[Card, ...]

    @property
    def slots(self) -> int:
        """Sequences that decode together."""
        return sum(part.slots for part in self.classes)

    @property
    def tokens(self) -> int:
        """Tokens that are allocated, spare ones too."""
        return cache_tokens(self.classes, self.idle_rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on all cards."""
        return self.tokens * sum(card.kv_bytes_per_token for card in self.cards)

    @property
    def used_share(self) -> float:
        """How much of what the tightest card has for its cache is used, [0, 1]."""
        return self.tokens / min(card.tokens for card in self.cards)

    def document(self) -> dict[str, Any]:
        """Return the plan as `engine_stats` tells it."""
        return {
            "window": self.window,
            "idle_rows": self.idle_rows,
            "classes": [asdict(part) for part in self.classes],
            "cards": [self._card(card) for card in self.cards],
        }

    def log_lines(self) -> list[str]:
        """Return the plan as a table: one event a line, cards first."""
        rows = [("memory_plan", self._card(card)) for card in self.cards]
        rows += [("slot_class", asdict(part)) for part in self.classes]
        return [" ".join([event, *(f"{k}={v}" for k, v in fields.items())]) for event, fields in rows]

    def _card(self, card: Card) -> dict[str, Any]:
        cache_bytes = self.tokens * card.kv_bytes_per_token
        used = card.reserve_bytes + card.weight_bytes + card.activation_bytes + cache_bytes
        return {
            "card": card.name,
            "total_bytes": card.total_bytes,
            "available_bytes": card.available_bytes,
            "weight_bytes": card.weight_bytes,
            "cache_bytes": cache_bytes,
            "activation_bytes": card.activation_bytes,
            "reserve_bytes": card.reserve_bytes,
            "left_bytes": card.available_bytes - used,
        }


def plan_memory(
    cards: Sequence[Card],
    *,
    slots: int,
    window: int,
    classes: tuple[SlotClass, ...] = (),
    idle_rows: int = 0,
    lighter: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Return what to allocate.

    Args:
        cards: those that have layers.
        slots: sequences that decode together.
        window: tokens of the longest sequence.
        classes: the slots as the user wants them; empty: by the rule at the top.
        idle_rows: rows that the engine adds, one block each.
        lighter: quantization -> bytes of all weights, to be named if it would help.

    Raises:
        InvalidSetting: it would not fit even if nobody else used the cards; change a setting.
        OutOfMemory: it does not fit beside what else runs there; another start may succeed.
    """
    tokens = min(card.tokens for card in cards)
    chosen = classes or choose_classes(tokens, slots=slots, window=window, idle_rows=idle_rows)
    if chosen and cache_tokens(chosen, idle_rows) <= tokens:
        return MemoryPlan(chosen, window, idle_rows, tuple(cards))
    raise _refusal(cards, slots, window, classes, idle_rows, lighter or {})


def choose_classes(tokens: int, *, slots: int, window: int, idle_rows: int = 0) -> tuple[SlotClass, ...]:
    """Divide a cache by the rule at the top; empty if not even `STEP` tokens for each slot fit.

    Args:
        tokens: that the cache may hold, spare ones too.
        slots: how many sequences share it.
        window: tokens of the longest one.
        idle_rows: further rows, which hold nothing.
    """
    room = tokens - slots * SPARE_TOKENS - idle_rows * (KV_BLOCK + SPARE_TOKENS)
    if slots * _aligned(window) <= room:
        return (SlotClass(window, slots),)
    has_room_beside = room - _aligned(window) >= (slots - 1) * STEP
    longest = window if has_room_beside else _whole_steps(room // 2)
    middles = (slots - 1) // MIDDLE_EVERY
    shorts = slots - 1 - middles
    left = room - _aligned(longest)
    short = _whole_steps(left // (shorts + MIDDLE * middles)) if shorts else 0
    if min(short, longest) < STEP:
        return _alike(room, slots, window)
    middle = short
    if middles:
        middle = min(_whole_steps((left - short * shorts) // middles), longest)
    short = min(_whole_steps((left - _aligned(middle) * middles) // shorts), longest)
    counts = Counter({longest: 1})
    counts[middle] += middles
    counts[short] += shorts
    return tuple(SlotClass(length, count) for length, count in sorted(counts.items()) if count)


def _alike(room: int, slots: int, window: int) -> tuple[SlotClass, ...]:
    length = min(_whole_steps(room // slots), window)
    if length < STEP:
        return ()
    longer = min((room - length * slots) // STEP, slots - 1) if length + STEP <= window else 0
    classes = (SlotClass(length, slots - longer),)
    return (*classes, SlotClass(length + STEP, longer)) if longer else classes


def cache_tokens(classes: Sequence[SlotClass], idle_rows: int = 0) -> int:
    """Return how many tokens a cache of these classes allocates, spare ones and idle rows too."""
    own = sum((_aligned(part.length) + SPARE_TOKENS) * part.slots for part in classes)
    return own + (KV_BLOCK + SPARE_TOKENS) * idle_rows


def activation_bytes(
    shape: ModelShape, *, rows: int, draft_tokens: int, prefill_chunk: int, window: int, has_head: bool
) -> int:
    """Return what a pass needs beside weights and cache, at its widest, kernels' own buffers left out.

    Counted: a layer's tensors for all tokens of the largest pass, the masks of that pass at full length,
    a written-out weight if weights are quantized, the rotary table, and on the card with the head logits
    and what sampling makes of them.

    Args:
        shape: of the model.
        rows: slots and idle rows.
        draft_tokens: that each row may try in a step.
        prefill_chunk: tokens of the longest prefill pass.
        window: tokens of the longest slot.
        has_head: whether logits come out on this card.
    """
    step_tokens = rows * (1 + draft_tokens)
    tokens = max(prefill_chunk, step_tokens)
    joined = (shape.heads + 2 * shape.key_heads) * shape.head_size
    # Residual and norm beside the joined projection, its rotated copy and its contiguous queries; or
    # beside gate, up and what the activation made of them.
    layer = tokens * max(2 * shape.hidden + 3 * joined, 3 * shape.hidden + 3 * shape.intermediate)
    # Once for the tokens, as bool and as numbers, and once for each query head of a group.
    masks = tokens * window * (1 + shape.heads // shape.key_heads)
    written_out = shape.hidden * max(shape.intermediate, joined) if shape.is_quantized else 0
    rotary = 2 * window * shape.head_size
    total = (layer + masks + written_out + rotary) * shape.dtype_bytes + tokens * window
    if has_head:
        total += step_tokens * shape.vocab * (shape.dtype_bytes + _BYTES_PER_LOGIT)
    return total


def spell(classes: Sequence[SlotClass]) -> str:
    """Write classes as the setting `worker_slot_lengths` takes them."""
    return ",".join(f"{part.length}x{part.slots}" for part in classes)


def _aligned(length: int) -> int:
    return -(-length // KV_BLOCK) * KV_BLOCK


def _whole_steps(tokens: int) -> int:
    return tokens // STEP * STEP


def _refusal(
    cards: Sequence[Card],
    slots: int,
    window: int,
    classes: tuple[SlotClass, ...],
    idle_rows: int,
    lighter: Mapping[str, int],
) -> CodeherdError:
    card = min(cards, key=lambda card: card.tokens)
    wanted = classes or (SlotClass(STEP, slots),)
    needed = cache_tokens(wanted, idle_rows)
    cache_bytes = needed * card.kv_bytes_per_token
    total = card.weight_bytes + cache_bytes + card.activation_bytes + card.reserve_bytes
    message = (
        f"{'' if classes else 'at least '}{spell(wanted)} slots do not fit {card.name}: "
        f"weights {_gb(card.weight_bytes)} + cache {_gb(cache_bytes)} + "
        f"activations {_gb(card.activation_bytes)} + reserve {_gb(card.reserve_bytes)} = {_gb(total)} "
        f"of {_gb(card.available_bytes)}"
    )
    fits_alone = min(card.emptied().tokens for card in cards) >= needed
    if fits_alone:
        others = card.total_bytes - card.available_bytes
        return OutOfMemory(message, hint=f"other programs hold {_gb(others)} there; stop them or wait")
    return InvalidSetting(message, hint=_way_out(cards, slots, window, bool(classes), idle_rows, lighter))


def _way_out(
    cards: Sequence[Card],
    slots: int,
    window: int,
    is_own_choice: bool,
    idle_rows: int,
    lighter: Mapping[str, int],
) -> str:
    """Name settings that would fit."""
    tokens = min(card.tokens for card in cards)
    ways = []
    if is_own_choice and (found := choose_classes(tokens, slots=slots, window=window, idle_rows=idle_rows)):
        ways.append(f"worker_slot_lengths={spell(found)}")
    for fewer in range(0 if ways else slots - 1, 0, -1):
        if found := choose_classes(tokens, slots=fewer, window=window, idle_rows=idle_rows):
            ways.append(f"worker_slots={fewer} (as {spell(found)})")
            break
    held = sum(card.weight_bytes for card in cards)
    for quantization, weight_bytes in lighter.items():
        lightened = [replace(card, weight_bytes=card.weight_bytes * weight_bytes // held) for card in cards]
        tokens = min(card.tokens for card in lightened)
        if weight_bytes < held and choose_classes(tokens, slots=slots, window=window, idle_rows=idle_rows):
            ways.append(f"worker_quantization={quantization} (weights of {_gb(weight_bytes)})")
            break
    if not ways:
        return "use more GPUs for one model, such as `--gpus 0+1`, or a smaller model"
    return " or ".join(ways) + " would fit"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.2f} MB"
