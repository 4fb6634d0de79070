"""Run every shape of a model's passes once, and drop those that change a row's bits.

Owns: what is tried before the first sequence, and what follows from it. Does not know slots in use.

Nothing documents how kernels round. So the start tries the whole model with the same tokens at the same
places in all slots: where bits differ that must not, the shape is not used from here on.
"""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass

import torch

from codeherd_worker.engine import rounding
from codeherd_worker.engine.attention import Stretch
from codeherd_worker.engine.layouts import PassLayout, Piece, lay_out_step
from codeherd_worker.engine.passes import Passes
from codeherd_worker.engine.uploads import upload

logger = logging.getLogger(__name__)

#: The token of all tries.
_TOKEN = 1
#: Places per read length.
_PLACES = 4
#: Hexadecimal digits of `RowChecks.bits`.
_DIGITS = 16


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
    #: A short hash of the tries' logits: two processes that compute alike have the same.
    bits: str


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
    if passes.device.type == "cuda" and passes.is_on_one_device:
        probes.capture()
    passes.cache.clear()
    return RowChecks(
        rows_agree=rows_agree,
        kv_lengths_agree=kv_lengths_agree,
        granules_agree=granules_agree,
        drafts_agree=drafts_agree,
        bits=probes.bits,
    )


class _Probes:
    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._random = random.Random(0)  # noqa: S311 -- places to try, no secret
        # On the device: drawing a whole cache on the host would take minutes for a long one.
        self._generator = torch.Generator(passes.device).manual_seed(0)
        lengths = [reads[-1] for reads in passes.kv_lengths]
        #: The class that all others are compared with.
        self._longest = lengths.index(max(lengths))
        self._seen = hashlib.sha256()

    @property
    def bits(self) -> str:
        """A short hash of what one granule and one token in all rows came to."""
        return self._seen.hexdigest()[:_DIGITS]

    def fill(self) -> None:
        """Give all slots the same random past."""
        self._passes.cache.fill_alike(self._generator)

    def check_granules(self) -> bool:
        """Try one granule alone, beside others of its own and of another slot, in passes of every length."""
        passes = self._passes
        granule, last_slot = passes.granule, passes.rows - 1
        tokens = [_TOKEN + place for place in range(granule)]
        alone = self._prefill(Piece(0, tokens, 0, ends=True))
        self._see(alone)
        agree = True
        for length in passes.pass_lengths[1:]:
            if length <= passes.cache.room_of(0).readable_len:
                # The last granule is computed beside those before it, and again by itself.
                long = (tokens * (length // granule))[:length]
                together = self._prefill(Piece(0, long, 0, ends=True))
                start = length - granule
                agree &= torch.equal(self._prefill(Piece(0, tokens, start, ends=True)), together)
                if last_slot > 0:
                    beside = Piece(0, long[:start], 0, ends=False)
                    shared = self._prefill(beside, Piece(last_slot, tokens, 0, ends=True))
                    agree &= torch.equal(shared, alone)
        if not agree:
            logger.warning("granules_disagree granule=%d: prompts share no pass", granule)
            passes.granule, passes.pass_lengths = passes.prefill_chunk, (passes.prefill_chunk,)
        return agree

    def check_kv_lengths(self) -> bool:
        """Drop the read lengths at which attention has other bits than at the longest of all classes."""
        passes = self._passes
        if not passes.reads_vary:
            return True
        unsound = {
            kv_len
            for number, lengths in enumerate(passes.kv_lengths)
            for kv_len in lengths
            if not self._reads_alike(number, kv_len)
        }
        kept = []
        for lengths in passes.kv_lengths:
            longest = lengths[-1]
            if longest in unsound:
                logger.warning("class_disagrees length=%d: a text can depend on its slot", longest)
            # A length that fails in one class fails in all: a few places are a sample.
            kept.append(tuple(n for n in lengths if n == longest or n not in unsound))
        agree = not unsound
        if not agree:
            logger.info("kv_lengths_dropped from=%s to=%s", passes.kv_lengths, kept)
        passes.kv_lengths = tuple(kept)
        return agree

    def check_rows(self) -> bool:
        """Compare all rows, and the numbers of rows that a step may have."""
        passes = self._passes
        place = min(lengths[-1] for lengths in passes.kv_lengths) - 1
        alike = self._step(place, 1)
        self._see(alike)
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

    def _see(self, logits: torch.Tensor) -> None:
        # As bytes: numpy has no bfloat16.
        self._seen.update(logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _reads_alike(self, number: int, kv_len: int) -> bool:
        """Whether attention has the bits of the longest class and read, for steps and for granules.

        Its own output is compared: whatever comes after it in 16-bit numbers hides most of what differs.
        """
        passes = self._passes
        room, longest = passes.cache.rooms[number], passes.cache.rooms[self._longest]
        farthest = passes.kv_lengths[self._longest][-1]
        places = [kv_len - 1, *(self._random.randrange(kv_len) for _ in range(_PLACES - 1))]
        queries = self._random_heads(_PLACES, passes.heads)
        apart = torch.cat(
            [
                self._attend_step(longest.start, 1, queries[row : row + 1], [place], farthest)
                for row, place in enumerate(places)
            ]
        )
        for count in {1, room.end - room.start}:
            rows = [row % _PLACES for row in range(count)]
            together = self._attend_step(
                room.start, count, queries[rows], [places[row] for row in rows], kv_len
            )
            if not torch.equal(together, apart[rows]):
                return False
        granule = passes.granule
        last = (kv_len // granule - 1) * granule
        if last < 0:
            return True
        queries = self._random_heads(granule, passes.heads)
        for start in {last, self._random.randrange(last // granule + 1) * granule}:
            near = self._attend_granule(room.start, queries, start, kv_len)
            if not torch.equal(near, self._attend_granule(longest.start, queries, start, farthest)):
                return False
        return True

    def _random_heads(self, tokens: int, heads: int) -> torch.Tensor:
        passes = self._passes
        shape = (tokens, heads, passes.head_size)
        return torch.randn(shape, generator=self._generator, device=passes.device).to(passes.cache.dtype)

    def _attend_step(
        self, start: int, count: int, queries: torch.Tensor, places: list[int], kv_len: int
    ) -> torch.Tensor:
        """Attend one token per slot of a run, in the first layer; return (count, H * D)."""
        passes = self._passes
        slots = range(start, start + count)
        layout = lay_out_step(slots, count, passes.cache, passes.device)
        positions = upload(places, passes.device)[:, None]
        attention = passes.decode_attention(layout, [kv_len], positions, layout.spares[:, None])
        return attention(0, self._joined(queries)).clone()

    def _attend_granule(self, slot: int, queries: torch.Tensor, start: int, kv_len: int) -> torch.Tensor:
        """Attend one granule of a slot, in the first layer; return (G, H * D)."""
        passes = self._passes
        granule = passes.granule
        layout = PassLayout(
            token_ids=[_TOKEN] * granule,
            positions=[*range(start, start + granule)],
            written=[passes.cache.spare_of(slot)] * granule,
            slots=[slot] * granule,
            stretches=[Stretch(slot, 0, granule, kv_len)],
        )
        attention = passes.prefill_attention(layout, upload(layout.positions, passes.device))
        return attention(0, self._joined(queries)).clone()

    def _joined(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries with keys and values that are written where nothing is read."""
        passes = self._passes
        queries = queries.to(passes.first_layer_device)
        keys = queries.new_zeros(len(queries), 2 * passes.key_heads, passes.head_size)
        return torch.cat([queries, keys], dim=1).flatten(1)

    def _prefill(self, *pieces: Piece) -> torch.Tensor:
        """Return the logits after the last piece, (1, V)."""
        logits, _, _ = self._passes.prefill(pieces)
        return logits[:1].clone()

    def _step(self, place: int, width: int, rows: int | None = None) -> torch.Tensor:
        """Run a step with the same tokens at the same places in all rows; return (rows * width, V).

        Args:
            place: of the first token.
            width: tokens per row.
            rows: how many.
        """
        passes = self._passes
        layout = lay_out_step((), rows or passes.rows, passes.cache, passes.device)
        places = torch.full((len(layout.slots), 1), place, device=passes.device)
        places = places + torch.arange(width, device=passes.device)
        written = torch.minimum(places, layout.spares[:, None])
        reads = [passes.kv_lengths[passes.room_number(start)][-1] for start, _ in layout.runs]
        tokens = torch.full_like(places, _TOKEN)
        return passes.run(layout, tokens, places, written, reads).clone()
