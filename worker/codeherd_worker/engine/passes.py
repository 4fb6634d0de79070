"""Run a model over the slots of a cache: prefill passes and decode steps, of sound shapes only.

Owns: the cache, and the shapes of every forward pass. Does not know which slots are in use, what their
tokens mean, or how a token is chosen (`decode.py`); what may run together is its caller's business.

What a row computes must not depend on its neighbours, so only shapes are used whose rows round alike:
    prefill   granules of a fixed number of tokens, each attended by itself; a pass has one of
              `pass_lengths` tokens, of one prompt or of several.
    decode    one of `row_counts` rows, one token each, or a token and its drafts; idle rows compute a token
              that nobody reads.
    reads     a slot is attended up to one of its class's `kv_lengths`, which the longest neighbour decides.
`rounding.py` finds out which matrix products round alike on this device, `probes.py` tries the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine import rounding
from codeherd_worker.engine.attention import DecodeAttention, PrefillAttention, Run
from codeherd_worker.engine.cache import KV_BLOCK, SlotCache
from codeherd_worker.engine.cpu_attention import CpuAttention
from codeherd_worker.engine.forward import Attend, LlamaForward
from codeherd_worker.engine.graphs import StepGraphs
from codeherd_worker.engine.layouts import PassLayout, Piece, StepLayout, kv_lengths, lay_out_pass
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.uploads import upload

#: Tokens. A granule is the first of these whose bits do not depend on its place in a pass.
GRANULES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes in use, for people who look."""

    granule: int
    prefill_chunk: int
    draft_tokens: int
    drafts_are_optional: bool
    #: Per class: how far its slots may be read, ascending, nothing if as far as they are attended, and where
    #: their spare places begin.
    kv_lengths: tuple[tuple[int, ...], ...]
    spares: tuple[int, ...]


class Passes:
    """The forward passes of one model over one cache.

    Attributes:
        device: where token ids go in and logits come out.
        cache: keys and values of all slots.
        granule: tokens that are prefilled, and reused, as one.
        pass_lengths: tokens that a prefill pass may have, ascending.
        row_counts: rows that a decode step may have, ascending.
        kv_lengths: per class, how far its slots may be read, ascending.
        drafts_are_optional: whether a token has the same bits with drafts beside it and without.
        graphs: the captured decode steps.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        classes: Sequence[SlotClass],
        prefill_chunk: int,
        draft_tokens: int,
    ) -> None:
        """Allocate the cache, and find the shapes of matrix products that round alike.

        Args:
            model: in eval mode, on its device or devices.
            classes: how many slots of which length, shortest first.
            prefill_chunk: tokens per prefill pass at most; rounded up to whole granules.
            draft_tokens: drafts per step and slot at most.
        """
        positions = classes[-1].length + draft_tokens + KV_BLOCK
        self._forward = forward = LlamaForward(model, positions=positions)
        self.device = forward.device
        self.draft_tokens = draft_tokens
        self.linears = forward.linears
        slots = sum(part.slots for part in classes)
        #: Rows of the widest step: the slots and, where that makes all rows round alike, a few idle ones.
        self.rows = rounding.even_rows(self.linears, slots)
        self.prefill_chunk = -(-prefill_chunk // GRANULES[0]) * GRANULES[0]
        fitting = [size for size in GRANULES if self.prefill_chunk % size == 0]
        self.granule, self.pass_lengths = rounding.pass_lengths(self.linears, self.prefill_chunk, fitting)
        # On a GPU one row costs what many do, and a captured graph has one shape.
        is_cpu, compiled = self.device.type == "cpu", has_kernels(self.device, forward.head_size)
        counts = _row_counts(self.rows) if is_cpu else [self.rows]
        self.row_counts = tuple(rounding.agreeing_rows(self.linears, self.rows, counts))
        if self.rows not in self.row_counts:
            self.row_counts = (self.rows,)
        # Idle rows need a place too, as small as can be.
        idle = [SlotClass(KV_BLOCK, self.rows - slots)] if self.rows > slots else []
        self.cache = SlotCache(
            [*classes, *idle],
            key_heads=forward.key_heads,
            head_size=forward.head_size,
            # A CPU attends in float32, whatever the weights are.
            dtype=torch.float32 if is_cpu else forward.dtype,
            layer_devices=forward.layer_devices,
            blocked_keys=compiled,
        )
        self._scale = forward.head_size**-0.5
        self._on_cpu: CpuAttention | None = None
        if compiled:
            self._on_cpu = CpuAttention(self.cache, heads=forward.heads, scale=self._scale)
        readable = [room.readable_len for room in self.cache.rooms]
        # Compiled loops read what each token has.
        self.kv_lengths = tuple((n,) if self._on_cpu else kv_lengths(n) for n in readable)
        self.drafts_are_optional = True
        self.graphs = StepGraphs(self.device)
        self.heads, self.key_heads, self.head_size = forward.heads, forward.key_heads, forward.head_size
        #: Of the model's own numbers; keys and values may be held in another.
        self.dtype = forward.dtype
        self._group = forward.heads // forward.key_heads
        #: Query rows per key head of every decode step; compiled loops have no such shape.
        self.query_rows = 0 if self._on_cpu else -(-self._group * (1 + draft_tokens) // 2) * 2
        self.first_layer_device = forward.layer_devices[0]
        #: Copies between devices cannot be captured.
        self.is_on_one_device = set(forward.layer_devices) == {self.device}
        if self.device.type == "cuda":
            # Its plans are chosen per shape, and would round accordingly.
            torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def shapes(self) -> Shapes:
        """What is in use now; settled by the warm-up."""
        return Shapes(
            granule=self.granule,
            prefill_chunk=self.prefill_chunk,
            draft_tokens=self.draft_tokens,
            drafts_are_optional=self.drafts_are_optional,
            kv_lengths=self.kv_lengths if self.reads_vary else tuple(() for _ in self.kv_lengths),
            spares=tuple(room.readable_len for room in self.cache.rooms),
        )

    @property
    def has_loops(self) -> bool:
        """Whether attention is our own compiled loops."""
        return self._on_cpu is not None

    @property
    def reads_vary(self) -> bool:
        """Whether slots are read farther than their tokens need."""
        return not self.has_loops

    def row_count(self, rows: int) -> int:
        """Return how many rows a step has that needs so many."""
        return next(count for count in self.row_counts if count >= rows)

    def kv_len_for(self, tokens: int, slot: int) -> int:
        """Return how far a slot is read whose first `tokens` are attended."""
        lengths = self.kv_lengths[self.room_number(slot)]
        return next((length for length in lengths if length >= tokens), lengths[-1])

    def room_number(self, slot: int) -> int:
        """Return the number of a slot's class."""
        return self.cache.rooms.index(self.cache.room_of(slot))

    def prefill(
        self, pieces: Sequence[Piece], kv_len: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Compute keys and values of parts of prompts, in one pass.

        Args:
            pieces: of different slots; padded to whole granules, they fill at most a chunk.
            kv_len: how far every slot is read; None: as far as it must be.

        Returns:
            The logits after each piece that ends, (B, V), and the (B,) slots they belong to, on the device
            and on the host; B is one of `row_counts`, the last rows repeat the first. If no piece ends,
            those of some token.
        """
        layout = lay_out_pass(
            pieces,
            self.cache,
            granule=self.granule,
            pass_lengths=self.pass_lengths,
            kv_len_for=self.kv_len_for if kv_len is None else lambda _tokens, _slot: kv_len,
        )
        positions = upload(layout.positions, self.device)
        attention = self.prefill_attention(layout, positions)
        ending = [piece.slot for piece in pieces if piece.ends] or [pieces[0].slot]
        last = layout.last or [0]
        # The head multiplies as many rows as a decode step has: then it rounds as one.
        missing = self.row_count(len(ending)) - len(ending)
        wanted = upload([*last, *[last[0]] * missing], self.device)
        token_ids = upload(layout.token_ids, self.device)
        logits = self._forward(token_ids, positions, attention, wanted)
        slots = [*ending, *[ending[0]] * missing]
        return logits, upload(slots, self.device), slots

    def prefill_attention(self, layout: PassLayout, positions: torch.Tensor) -> Attend:
        """Return the attention of one prefill pass; `positions` are the layout's, on the device."""
        if self._on_cpu is not None:
            return self._on_cpu.over(layout.slots, positions, layout.written)
        written = upload(layout.written, self.device)
        return PrefillAttention(
            self.cache,
            destination=self.cache.destinations(written[:, None], upload(layout.slots, self.device)),
            positions=positions,
            stretches=layout.stretches,
            granule=self.granule,
            group=self._group,
            scale=self._scale,
        )

    def step(
        self,
        layout: StepLayout,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        written: torch.Tensor,
        *,
        ends: Mapping[int, int],
    ) -> torch.Tensor:
        """Compute one token, or a token and its drafts, in every row.

        Args:
            layout: the B rows.
            token_ids: (B, S) int64.
            positions: (B, S) int64, each token's place in its sequence.
            written: (B, S) int64, where in the slot it goes.
            ends: of live slots, how many tokens are attended.

        Returns:
            The logits after each token, (B * S, V); overwritten by the next step.
        """
        return self.run(layout, token_ids, positions, written, self._reads(layout, ends))

    def run(
        self,
        layout: StepLayout,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        written: torch.Tensor,
        reads: Sequence[int],
    ) -> torch.Tensor:
        """Do what `step` does, reading each run of slots as far as `reads` says."""
        shape = (token_ids.shape, tuple(reads))
        if shape in self.graphs:
            return self.graphs.replay(shape, (token_ids, positions, written))
        return self._compute(layout, reads, token_ids, positions, written)

    def capture(self, layout: StepLayout, width: int, reads: Sequence[int]) -> None:
        """Record the step of this shape; it writes where only idle rows do."""
        spares = layout.spares[:, None].expand(-1, width).contiguous()
        zeros = torch.zeros_like(spares)

        def step(ids: torch.Tensor, positions: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
            return self._compute(layout, reads, ids, positions, written)

        self.graphs.capture((zeros.shape, tuple(reads)), step, (zeros, zeros, spares))

    def reads_of(self, layout: StepLayout, tokens: int) -> list[int]:
        """Return how far each run is read if all of them have so many tokens."""
        return [self.kv_len_for(tokens, start) for start, _ in layout.runs]

    def _reads(self, layout: StepLayout, ends: Mapping[int, int]) -> list[int]:
        """Say how far each run of slots is read: its longest live slot decides."""
        if self.graphs.captures:
            # One measure for all classes: else every combination would be a graph of its own.
            return self.reads_of(layout, max(ends.values(), default=1))
        reads, row = [], 0
        for start, count in layout.runs:
            slots = layout.slots[row : row + count]
            row += count
            longest = max((ends[slot] for slot in slots if slot >= 0), default=1)
            reads.append(self.kv_len_for(longest, start))
        return reads

    def _compute(
        self,
        layout: StepLayout,
        reads: Sequence[int],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        written: torch.Tensor,
    ) -> torch.Tensor:
        attention = self.decode_attention(layout, reads, positions, written)
        return self._forward(token_ids.flatten(), positions.flatten(), attention)

    def decode_attention(
        self, layout: StepLayout, reads: Sequence[int], positions: torch.Tensor, written: torch.Tensor
    ) -> Attend:
        """Return the attention of one decode step, reading each run of slots as far as `reads` says."""
        if self._on_cpu is not None:
            # The layout's own rows if they can be: what follows from them is known from the step before.
            width = positions.shape[1]
            slots = layout.rows if width == 1 else layout.rows.repeat_interleave(width)
            return self._on_cpu.over(slots, positions.flatten(), written.flatten())
        return DecodeAttention(
            self.cache,
            destination=self.cache.destinations(written, layout.rows),
            positions=positions,
            runs=[Run(*run, kv_len) for run, kv_len in zip(layout.runs, reads, strict=True)],
            group=self._group,
            # The same whether drafts are tried or not, so that they change no bits.
            rows=self.query_rows,
            scale=self._scale,
        )


def has_kernels(device: torch.device, head_size: int) -> bool:
    """Whether attention has compiled loops of its own here, instead of torch's."""
    return device.type == "cpu" and head_size % 4 == 0


def _row_counts(rows: int) -> list[int]:
    """Return the numbers of rows that are tried: each costs a try of every matrix."""
    powers = {1 << exponent for exponent in range(rows.bit_length())}
    return sorted({count for count in powers | {*range(8, rows, 8), rows} if count <= rows})
