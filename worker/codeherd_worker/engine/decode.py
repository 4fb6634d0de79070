"""Hold the state of every slot: which token comes next, where, and how it is chosen.

Owns: what is live, each live slot's next input and position on the device and on the host, and which guesses
were right. Does not know when to do what, or when a sequence ends (`scheduler.py`, `stopping.py`), the
shapes of passes (`passes.py`), or how a token is chosen (`sampling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine import probes
from codeherd_worker.engine.layouts import Piece, StepLayout, lay_out_step
from codeherd_worker.engine.passes import Passes
from codeherd_worker.engine.sampling import Sampled, SlotSampler, are_sound
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.tokens import NOT_FINITE, Pending
from codeherd_worker.engine.uploads import upload


class SlotDecoder:
    """A model with places for sequences."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        classes: Sequence[SlotClass],
        prefill_chunk: int,
        draft_tokens: int = 0,
    ) -> None:
        """Allocate the cache and all per-slot state.

        Args:
            model: in eval mode, on its device or devices.
            classes: how many slots of which length, shortest first.
            prefill_chunk: tokens per prefill pass at most; rounded up to whole granules.
            draft_tokens: drafts per step and slot at most.
        """
        self.passes = Passes(model, classes=classes, prefill_chunk=prefill_chunk, draft_tokens=draft_tokens)
        self.cache = self.passes.cache
        self.device = self.passes.device
        self.draft_tokens = draft_tokens
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        #: Per class, its slots; idle rows have a class of their own, which is none's.
        self.slots_of_class = tuple(
            tuple(range(room.start, room.start + part.slots))
            for room, part in zip(self.cache.rooms, classes, strict=False)
        )
        rows = self.passes.rows
        self._sampler = SlotSampler(rows=rows, vocab_size=self.vocab_size, device=self.device)
        # On the device, (slots,) int64 each: a live slot's next input and the position it takes.
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._token_ids)
        # The same positions on the host, of live slots alone.
        self._next_position: dict[int, int] = {}
        # Slots that want log-probabilities, and of how many likely tokens.
        self._asked: dict[int, int] = {}
        # Changes only when a sequence comes or goes.
        self._layout: StepLayout | None = None

    @property
    def facts(self) -> dict[str, str | int]:
        """What of the shapes a text's bytes depend on."""
        passes = self.passes
        return {
            "rows": passes.rows,
            "prefill_chunk": passes.prefill_chunk,
            "granule": passes.granule,
            "query_rows": passes.query_rows,
            "draft_tokens": 0 if passes.drafts_are_optional else self.draft_tokens,
        }

    @property
    def granule(self) -> int:
        """Tokens that are prefilled, and reused, as one."""
        return self.passes.granule

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prefill pass at most."""
        return self.passes.prefill_chunk

    @property
    def can_share_passes(self) -> bool:
        """Whether several prompts may be prefilled in one pass."""
        return self.passes.granule < self.passes.prefill_chunk

    @property
    def drafts_are_optional(self) -> bool:
        """Whether a step without drafts gives the same bits as one with them."""
        return self.passes.drafts_are_optional

    @property
    def is_live(self) -> bool:
        """Whether any slot decodes."""
        return bool(self._next_position)

    def warm_up(self) -> probes.RowChecks:
        """Run every shape once, and use only sound ones from here on; before the first sequence."""
        return probes.warm_up(self.passes)

    def assign(self, slot: int, sampling: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Say how a slot's tokens are chosen, right before the last piece of its prompt is prefilled."""
        self._sampler.assign(slot, sampling, prompt_ids)
        if sampling.logprobs:
            self._asked[slot] = sampling.logprobs

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` tokens that another one has prefilled, whole granules."""
        if source != target:
            self.cache.copy_prefix(source, target, length)

    def prefill(self, pieces: Sequence[Piece]) -> Pending | None:
        """Compute keys and values of parts of prompts, in one pass.

        Args:
            pieces: of different slots, none of them live; padded to whole granules, they fill at most a
                chunk.

        Returns:
            The first new token of each prompt that ends here, which makes its slot live; None if none does.
        """
        logits, rows, slots = self.passes.prefill(pieces)
        ends = {piece.slot: piece.end for piece in pieces if piece.ends}
        if not ends:
            return None
        places = upload([ends[slot] for slot in slots], self.device)
        sampled = self._sample(logits, places[:, None], rows)
        self._token_ids[rows] = sampled.tokens.clamp(min=0)
        self._positions[rows] = places
        self._next_position |= ends
        self._layout = None
        return Pending([*ends, *[-1] * (len(slots) - len(ends))], sampled, self._asked)

    def step(self, drafts: Mapping[int, Sequence[int]] | None = None) -> Pending:
        """Decode all live slots: one token each, and what their drafts got right.

        Args:
            drafts: guesses of the next tokens of some slots, at most `draft_tokens` each.
        """
        drafts = drafts or {}
        self._sampler.observe(self._token_ids[:, None])
        if drafts or not self.passes.drafts_are_optional:
            return self._draft_step(drafts)
        layout = self._laid_out()
        token_ids = self._token_ids.index_select(0, layout.rows)
        positions = self._positions.index_select(0, layout.rows)
        written = torch.where(layout.is_live, positions, layout.spares)
        ends = {slot: position + 1 for slot, position in self._next_position.items()}
        logits = self.passes.step(layout, token_ids[:, None], positions[:, None], written[:, None], ends=ends)
        sampled = self._sample(logits, (positions + 1)[:, None], layout.rows)
        self._token_ids.index_copy_(0, layout.rows, sampled.tokens.clamp(min=0))
        self._positions.index_add_(0, layout.rows, layout.advance)
        self._next_position = ends
        return Pending(layout.slots, sampled, self._asked)

    def rest(self, slot: int) -> None:
        """Decode a slot no more; its row goes idle."""
        if self._next_position.pop(slot, None) is not None:
            self._layout = None

    def release(self, slot: int) -> None:
        """End a slot's sequence."""
        self.rest(slot)
        self._asked.pop(slot, None)
        self._sampler.release(slot)

    def wipe(self, slot: int) -> None:
        """Zero a slot whose numbers went bad, so that they cannot reach its next sequence."""
        self.cache.wipe(slot)

    def _draft_step(self, drafts: Mapping[int, Sequence[int]]) -> Pending:
        """Decode one token and its drafts in every live slot, and wait for what came of them."""
        layout = self._laid_out()
        width = 1 + self.draft_tokens
        guesses = torch.zeros(len(layout.slots), self.draft_tokens, dtype=torch.int64)
        is_real = torch.zeros(len(layout.slots), width, dtype=torch.bool)
        for row, slot in enumerate(layout.slots):
            if slot >= 0:
                own = drafts.get(slot, ())
                is_real[row, : 1 + len(own)] = True
                guesses[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        guesses, is_real = guesses.to(self.device), is_real.to(self.device)
        first = self._positions.index_select(0, layout.rows)
        inputs = torch.cat([self._token_ids.index_select(0, layout.rows)[:, None], guesses], dim=1)
        positions = first[:, None] + torch.arange(width, device=self.device)
        written = torch.where(is_real, positions, layout.spares[:, None])
        ends = {slot: position + width for slot, position in self._next_position.items()}
        logits = self.passes.step(layout, inputs, positions, written, ends=ends)
        logits = logits.view(len(layout.slots), width, -1)
        sampled = self._sample(logits, positions + 1, layout.rows, guesses)
        pending = Pending(layout.slots, sampled, self._asked, drafts)
        self._advance(pending)
        return pending

    def _advance(self, pending: Pending) -> None:
        """Make the accepted tokens part of their sequences."""
        accepted = {slot: [token.id or 0 for token in new] for slot, new in pending.read().items()}
        seen = torch.zeros(self.passes.rows, 1 + self.draft_tokens, dtype=torch.int64)
        is_seen = torch.zeros_like(seen, dtype=torch.bool)
        for slot, ids in accepted.items():
            # The last one is the next step's input, and is observed there.
            seen[slot, : len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int64)
            is_seen[slot, : len(ids) - 1] = True
            self._next_position[slot] += len(ids)
        self._sampler.observe(seen.to(self.device), is_seen.to(self.device))
        slots = upload(list(accepted), self.device)
        self._token_ids[slots] = upload([ids[-1] for ids in accepted.values()], self.device)
        self._positions[slots] = upload([self._next_position[slot] for slot in accepted], self.device)

    def _laid_out(self) -> StepLayout:
        if self._layout is None:
            passes = self.passes
            # Without optional drafts the shapes were not compared at other row counts.
            rows = passes.row_count(len(self._next_position)) if passes.drafts_are_optional else passes.rows
            self._layout = lay_out_step(self._next_position, rows, self.cache, self.device)
        return self._layout

    def _sample(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        drafts: torch.Tensor | None = None,
    ) -> Sampled:
        """Choose tokens; `NOT_FINITE` stands where logits are bad."""
        if drafts is None:
            sampled = self._sampler.sample(logits, positions, rows)
        else:
            sampled = self._sampler.sample(logits, positions, rows, drafts)
        tokens = torch.where(are_sound(logits), sampled.tokens, NOT_FINITE)
        return Sampled(tokens, sampled.chosen_logprob, sampled.top_ids, sampled.top_logprobs)
