"""Run an unmodified `LlamaForCausalLM` over fixed slots: prefill one prompt, decode all slots together.

Owns: the shapes of every forward pass, positions, masks, and which numbers a row may depend on. Does not
know when to do what, or when a sequence ends (`engine.py`, `stopping.py`), or how a token is chosen
(`sampling.py`).

What a row computes must not depend on its neighbours, so every shape is fixed:
    decode    always all rows, one token each; an idle row computes a token that nobody reads.
    prefill   one slot at a time, chunks that begin at multiples of `prefill_chunk`, the last one padded
              to a length of `LAST_CHUNK_LENGTHS`.
    reads     the cache is attended up to one of `kv_lengths`, which the longest neighbour decides.
Fixed shapes alone are not enough: CPU kernels split rows among threads, and the last rows of a thread's
share can round differently (measured with torch 2.13 and two threads, float32: 5, 6, 7, 9, 10 and 11
rows). `count_rows` therefore tries the model's layers and adds idle rows until all rows round alike;
`attention.py` does its part; `warm_up` tries the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM

from codeherd_worker.engine import attention
from codeherd_worker.engine.cache import SlotCache
from codeherd_worker.engine.sampling import SamplingParams, SlotSampler

logger = logging.getLogger(__name__)

#: Tokens. The last chunk of a prompt is padded to the first of these that holds it, or to a whole chunk.
LAST_CHUNK_LENGTHS = (32, 64, 128)
#: Tokens; reads are this long or twice, four times ... as long. CPU attention sums blocks of 512 keys:
#: a block that is masked as a whole adds exactly nothing, while a shorter read (256, head size 128)
#: rounded differently.
KV_BLOCK = 512
#: Rows beyond the slots that `count_rows` tries.
_MOST_IDLE_ROWS = 16
#: What a step says on the device when a row's logits are not finite.
_NOT_FINITE = -1


@dataclass(frozen=True, slots=True)
class RowChecks:
    """What `warm_up` measured about rounding."""

    #: All rows gave the same bits for the same input.
    rows_agree: bool
    #: A row's bits did not depend on how far the cache was read.
    kv_lengths_agree: bool


class SlotDecoder:
    """A model with `slots` places for sequences, and the state of those places on the device."""

    def __init__(self, model: LlamaForCausalLM, *, slots: int, max_len: int, prefill_chunk: int) -> None:
        """Allocate the cache and all per-row state.

        Args:
            model: in eval mode, on its device or devices.
            slots: sequences that decode together.
            max_len: tokens per slot, prompt and new ones.
            prefill_chunk: tokens per prefill pass.
        """
        attention.install(model)
        config = model.config
        embedding = model.get_input_embeddings().weight
        self.device = embedding.device
        self.vocab_size = embedding.shape[0]
        self.slots = slots
        self.rows = count_rows(model, slots)
        self.prefill_chunk = prefill_chunk
        self._model = model
        self._dtype = model.lm_head.weight.dtype
        self.cache = SlotCache(
            config,
            rows=self.rows,
            max_len=max_len,
            dtype=self._dtype,
            layer_devices=[next(layer.parameters()).device for layer in model.model.layers],
        )
        self.kv_lengths = tuple(_kv_lengths(self.cache.readable_len))
        self._chunk_lengths = (*(n for n in LAST_CHUNK_LENGTHS if n < prefill_chunk), prefill_chunk)
        self._sampler = SlotSampler(rows=self.rows, vocab_size=model.lm_head.out_features, device=self.device)
        self._all_rows = slice(0, self.rows)
        # All (rows, 1) int64: each row's next input, its place, and where idle rows write instead.
        self._token_ids = torch.zeros(self.rows, 1, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._token_ids)
        self._is_live = torch.zeros_like(self._token_ids, dtype=torch.bool)
        self._next_position: dict[int, int] = {}
        self._key_positions = torch.arange(self.cache.readable_len, device=self.device)

    def prefill(self, slot: int, chunk_ids: Sequence[int], start: int) -> torch.Tensor:
        """Compute keys and values of one chunk of a prompt.

        Args:
            slot: must not be live.
            chunk_ids: 1 to `prefill_chunk` token ids.
            start: position of the first of them, a multiple of `prefill_chunk`.

        Returns:
            Logits after the chunk's last token, (1, V).
        """
        count = len(chunk_ids)
        padded = next(length for length in self._chunk_lengths if length >= count)
        token_ids = torch.zeros(1, padded, dtype=torch.int64)
        token_ids[0, :count] = torch.tensor(chunk_ids)
        places = torch.arange(start, start + padded)[None]
        written = places.clone()
        written[0, count:] = self.cache.spare_position
        # Padding sits at the position of the last token: it may attend what that may, so no row of the
        # mask is empty, and its place stays inside the model's range.
        places[0, count:] = start + count - 1
        return self._forward(
            slice(slot, slot + 1),
            token_ids.to(self.device),
            places.to(self.device),
            written.to(self.device),
            self._kv_len_for(start + count),
            last=torch.tensor([count - 1], device=self.device),
        )

    def begin(
        self, slot: int, sampling: SamplingParams, prompt_ids: Sequence[int], logits: torch.Tensor
    ) -> int | None:
        """Make a prefilled slot live.

        Args:
            slot: the slot whose whole prompt is prefilled.
            sampling: how its tokens are chosen.
            prompt_ids: the whole prompt.
            logits: what the last chunk's `prefill` returned, (1, V).

        Returns:
            The first new token; None if the logits are not finite: `wipe` and release the slot then.
        """
        rows = slice(slot, slot + 1)
        position = len(prompt_ids)
        self._sampler.assign(slot, sampling, prompt_ids)
        positions = torch.tensor([[position]], device=self.device)
        token = int(_sample(self._sampler, logits, positions, rows)[1])
        if token == _NOT_FINITE:
            return None
        self._token_ids[slot] = token
        self._positions[slot] = position
        self._is_live[slot] = True
        self._next_position[slot] = position
        return token

    def step(self) -> dict[int, int | None]:
        """Decode one token in every live slot.

        Returns:
            The new token of each live slot; None if its logits are not finite: `wipe` and release it then.
        """
        self._sampler.observe(self._token_ids)
        written = torch.where(self._is_live, self._positions, self.cache.spare_position)
        kv_len = self._kv_len_for(max(self._next_position.values()) + 1)
        logits = self._forward(self._all_rows, self._token_ids, self._positions, written, kv_len)
        self._positions += self._is_live
        chosen, checked = _sample(self._sampler, logits, self._positions, self._all_rows)
        self._token_ids.copy_(chosen[:, None])
        # The only time a step waits for the device.
        tokens = checked.tolist()
        answers: dict[int, int | None] = {}
        for slot in self._next_position:
            self._next_position[slot] += 1
            answers[slot] = None if tokens[slot] == _NOT_FINITE else tokens[slot]
        return answers

    def release(self, slot: int) -> None:
        """Take a slot out of the running; its cache is overwritten by whoever comes next."""
        self._sampler.release(slot)
        self._token_ids[slot] = 0
        self._positions[slot] = 0
        self._is_live[slot] = False
        self._next_position.pop(slot, None)

    def wipe(self, slot: int) -> None:
        """Zero a slot whose numbers went bad, so that they cannot reach its next sequence."""
        self.cache.wipe(slot)

    @torch.inference_mode()
    def warm_up(self) -> RowChecks:
        """Run every shape once and measure whether rounding depends on the row or on the read length.

        If reading less of the cache changes a row's bits, reads are of full length from here on.
        """
        self.cache.fill_alike(torch.Generator().manual_seed(0))
        for length in self._chunk_lengths:
            for kv_len in self.kv_lengths:
                if kv_len >= length:
                    self.prefill(0, [0] * length, kv_len - length)
        self.cache.fill_alike(torch.Generator().manual_seed(0))
        rows_agree = kv_lengths_agree = True
        for kv_len in self.kv_lengths:
            for place in (kv_len // 2, kv_len - 1):
                logits = self._probe(place, kv_len)
                rows_agree &= bool((logits == logits[:1]).all())
                kv_lengths_agree &= torch.equal(logits, self._probe(place, self.kv_lengths[-1]))
        self.cache.clear()
        if not kv_lengths_agree:
            logger.warning("kv_lengths_disagree lengths=%s: reading the whole cache", self.kv_lengths)
            self.kv_lengths = self.kv_lengths[-1:]
        if not rows_agree:
            logger.warning("rows_disagree rows=%d: a text can depend on its slot", self.rows)
        return RowChecks(rows_agree=rows_agree, kv_lengths_agree=kv_lengths_agree)

    def _probe(self, place: int, kv_len: int) -> torch.Tensor:
        """Run one step with the same token at the same place in every row; return (rows, V)."""
        places = torch.full_like(self._positions, place)
        return self._forward(self._all_rows, torch.ones_like(places), places, places, kv_len)

    def _forward(
        self,
        rows: slice,
        token_ids: torch.Tensor,
        places: torch.Tensor,
        written: torch.Tensor,
        kv_len: int,
        last: torch.Tensor | int = 1,
    ) -> torch.Tensor:
        """Return the logits of one token per row, (B, V).

        Args:
            rows: the B rows to compute.
            token_ids: (B, S) int64.
            places: (B, S) int64, rotary position; a token attends this place and all before it.
            written: (B, S) int64, where its keys and values go.
            kv_len: how far the cache is read.
            last: which of the S tokens the logits are for, as transformers' `logits_to_keep`.
        """
        self.cache.point(rows, written, kv_len)
        is_hidden = self._key_positions[:kv_len] > places[:, None, :, None]
        # Additive, because SDPA would turn a bool mask into this in every layer.
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype, device=self.device)
        mask.masked_fill_(is_hidden, -torch.inf)
        output = self._model(
            input_ids=token_ids,
            position_ids=places,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: torch.Tensor = output.logits[:, -1].to(self.device)
        return logits

    def _kv_len_for(self, tokens: int) -> int:
        return next(length for length in self.kv_lengths if length >= tokens)


def count_rows(model: LlamaForCausalLM, slots: int) -> int:
    """Return how many rows to decode so that every row rounds alike, `slots` or a few more.

    Tries one layer of each kind and shape with the same vector in all rows; `slots` if nothing helps.
    """
    layers = list(_different_linears(model))
    for rows in range(slots, slots + _MOST_IDLE_ROWS + 1):
        if all(_rounds_alike(layer, rows) for layer in layers):
            if rows > slots:
                logger.info("idle_rows_added slots=%d rows=%d", slots, rows)
            return rows
    return slots


def _different_linears(model: LlamaForCausalLM) -> Iterator[nn.Linear]:
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kind = (type(module), module.in_features, module.out_features, module.bias is None)
            if kind not in seen:
                seen.add(kind)
                yield module


@torch.inference_mode()
def _rounds_alike(layer: nn.Linear, rows: int) -> bool:
    vector = torch.randn(1, 1, layer.in_features, generator=torch.Generator().manual_seed(0))
    # Quantized weights are integers; what goes in has the dtype of what comes out of the layer before.
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else _compute_dtype(layer)
    output = layer(vector.to(layer.weight.device, dtype).expand(rows, -1, -1).contiguous())
    return bool((output == output[:1]).all())


def _compute_dtype(layer: nn.Linear) -> torch.dtype:
    return getattr(layer, "compute_dtype", None) or torch.float16


def _kv_lengths(readable_len: int) -> Iterator[int]:
    length = KV_BLOCK
    while length < readable_len:
        yield length
        length *= 2
    yield readable_len


def _sample(
    sampler: SlotSampler, logits: torch.Tensor, positions: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B,) tokens that are valid ids, and the same with `_NOT_FINITE` where logits are bad."""
    tokens = sampler.sample(logits, positions, rows)
    # The maximum is NaN or infinite if any logit is NaN or +inf; -inf alone does no harm.
    return tokens, torch.where(logits.amax(-1).isfinite(), tokens, _NOT_FINITE)
