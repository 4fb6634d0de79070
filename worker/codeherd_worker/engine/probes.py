"""Run every shape of a model's passes once, and drop those that change a row's bits.

Owns: what is tried before the first sequence, and what follows from it. Does not know slots in use.

Nothing documents how kernels round. So the start tries the whole model with the same tokens at the same
places in all slots: where bits differ that must not, the shape is not used from here on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from codeherd_worker.engine import rounding
from codeherd_worker.engine.layouts import Piece, lay_out_step
from codeherd_worker.engine.passes import Passes

logger = logging.getLogger(__name__)

#: The token of all tries.
_TOKEN = 1


@dataclass(frozen=True, slots=True)
class RowChecks:
    """What `warm_up` measured about rounding."""

    #: All slots gave the same bits for the same input.
    rows_agree: bool
    #: A row's bits did not depend on how far the cache was read.
    kv_lengths_agree: bool
    #: A granule's bits did not depend on what shares its pass.
    granules_agree: bool
    #: A token's bits did not depend on whether drafts were tried beside it.
    drafts_agree: bool


@torch.inference_mode()
def warm_up(passes: Passes) -> RowChecks:
    """Try all shapes, and leave only sound ones.

    Read lengths and row counts that change bits are dropped; else a granule becomes a whole chunk that
    shares its pass with nobody, and every step has room for drafts.
    """
    probes = _Probes(passes)
    granules_agree = probes.check_granules()
    probes.fill()
    kv_lengths_agree = probes.check_kv_lengths()
    probes.fill()
    rows_agree = probes.check_rows()
    drafts_agree = probes.check_drafts()
    if passes.device.type == "cuda":
        probes.capture()
    passes.cache.clear()
    return RowChecks(
        rows_agree=rows_agree,
        kv_lengths_agree=kv_lengths_agree,
        granules_agree=granules_agree,
        drafts_agree=drafts_agree,
    )


class _Probes:
    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def fill(self) -> None:
        """Give all slots the same random past."""
        self._passes.cache.fill_alike(torch.Generator().manual_seed(0))

    def check_granules(self) -> bool:
        """Try one granule alone, beside others, and in passes of every length."""
        passes = self._passes
        granule, last_slot = passes.granule, passes.rows - 1
        alone = self._prefill(Piece(0, [_TOKEN] * granule, 0, ends=True))
        agree = True
        for length in passes.pass_lengths[1:]:
            beside = Piece(0, [_TOKEN] * (length - granule), 0, ends=False)
            if last_slot > 0 and beside.end <= passes.cache.room_of(0).readable_len:
                shared = self._prefill(beside, Piece(last_slot, [_TOKEN] * granule, 0, ends=True))
                agree &= torch.equal(shared, alone)
        if not agree:
            logger.warning("granules_disagree granule=%d: prompts share no pass", granule)
            passes.granule, passes.pass_lengths = passes.prefill_chunk, (passes.prefill_chunk,)
        return agree

    def check_kv_lengths(self) -> bool:
        """Drop the read lengths at which a step or a granule has other bits than at the longest."""
        passes = self._passes
        kept = tuple(
            tuple(kv_len for kv_len in lengths if self._reads_alike(number, kv_len))
            for number, lengths in enumerate(passes.kv_lengths)
        )
        agree = kept == passes.kv_lengths
        if not agree:
            logger.info("kv_lengths_dropped from=%s to=%s", passes.kv_lengths, kept)
        passes.kv_lengths = kept
        return agree

    def check_rows(self) -> bool:
        """Compare all rows, and the numbers of rows that a step may have."""
        passes = self._passes
        place = passes.kv_lengths[0][-1] - 1
        alike = self._step(place, 1)
        agree = bool((alike == alike[:1]).all())
        passes.row_counts = tuple(
            count
            for count in passes.row_counts
            if count == passes.rows or torch.equal(self._step(place, 1, rows=count), alike[:count])
        )
        if not agree:
            logger.warning("rows_disagree rows=%d: a text can depend on its slot", passes.rows)
        return agree

    def check_drafts(self) -> bool:
        """Find out whether drafts may come and go."""
        passes = self._passes
        width = 1 + passes.draft_tokens
        if width == 1:
            return True
        beside = self._step(0, width).view(passes.rows, width, -1)
        alone = [self._step(place, 1) for place in range(width)]
        agree = all(torch.equal(beside[:, place], logits) for place, logits in enumerate(alone))
        counts = [count * width for count in passes.row_counts]
        agree &= rounding.agreeing_rows(passes.linears, passes.rows, counts) == counts
        # On a GPU both shapes would be captured, for little: rows cost it next to nothing.
        passes.drafts_are_optional = agree and passes.device.type == "cpu"
        return agree

    def capture(self) -> None:
        """Record the decode step at every read length."""
        passes = self._passes
        width = 1 if passes.drafts_are_optional else 1 + passes.draft_tokens
        layout = lay_out_step((), passes.rows, passes.cache, passes.device)
        seen = set()
        for tokens in sorted({length for lengths in passes.kv_lengths for length in lengths}):
            reads = passes.reads_of(layout, tokens)
            if tuple(reads) not in seen:
                seen.add(tuple(reads))
                passes.capture(layout, width, reads)

    def _reads_alike(self, number: int, kv_len: int) -> bool:
        passes = self._passes
        slot, longest = passes.cache.rooms[number].start, passes.kv_lengths[number][-1]
        place = kv_len - 1
        if not torch.equal(self._step(place, 1, {number: kv_len}), self._step(place, 1)):
            return False
        start = (kv_len // passes.granule - 1) * passes.granule
        if start < 0:
            return True
        piece = Piece(slot, [_TOKEN] * passes.granule, start, ends=True)
        return torch.equal(self._prefill(piece, kv_len=kv_len), self._prefill(piece, kv_len=longest))

    def _prefill(self, *pieces: Piece, kv_len: int | None = None) -> torch.Tensor:
        """Return the logits after the last piece, (1, V)."""
        logits, _ = self._passes.prefill(pieces, kv_len)
        return logits[:1].clone()

    def _step(
        self, place: int, width: int, reads: dict[int, int] | None = None, rows: int | None = None
    ) -> torch.Tensor:
        """Run a step with the same tokens at the same places in all rows; return (rows * width, V).

        Args:
            place: of the first token.
            width: tokens per row.
            reads: how far the slots of some classes are read; the others as far as they can.
            rows: how many.
        """
        passes = self._passes
        layout = lay_out_step((), rows or passes.rows, passes.cache, passes.device)
        places = torch.full((len(layout.slots), 1), place, device=passes.device)
        places = places + torch.arange(width, device=passes.device)
        written = torch.minimum(places, layout.spares[:, None])
        numbers = [passes.room_number(start) for start, _ in layout.runs]
        lengths = [(reads or {}).get(number, passes.kv_lengths[number][-1]) for number in numbers]
        tokens = torch.full_like(places, _TOKEN)
        return passes.run(layout, tokens, places, written, lengths).clone()
