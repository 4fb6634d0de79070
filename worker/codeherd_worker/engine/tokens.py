"""Bring new tokens from the device to the host, and count which drafts were right.

Owns: when the host waits for the device. Does not know how tokens were chosen (`sampling.py`) or what
becomes of them (`scheduler.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.sampling import Sampled

#: What a step says on the device when a row's logits are not finite.
NOT_FINITE = -1


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of one slot."""

    #: None if the model's logits are not finite: wipe and release the slot then.
    id: int | None
    logprobs: TokenLogprobs | None = None


class Pending:
    """New tokens that the device may still be computing."""

    __slots__ = ("_asked", "_drafts", "_event", "_sampled", "_slots")

    def __init__(
        self,
        slots: Sequence[int],
        sampled: Sampled,
        asked: Mapping[int, int],
        drafts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Start to bring them to the host.

        Args:
            slots: (B), whose tokens they are; -1 for idle rows.
            sampled: tokens of shape (B,) or (B, S), `NOT_FINITE` where logits are not.
            asked: how many likely tokens are reported, for slots that asked for log-probabilities.
            drafts: what was assumed, for slots that had drafts.
        """
        self._slots = slots
        self._drafts, self._asked = drafts or {}, dict(asked)
        self._sampled, self._event = _to_host(sampled)

    def read(self) -> dict[int, list[Token]]:
        """Wait for the device and return each slot's new tokens, in order."""
        if self._event is not None:
            self._event.synchronize()
        tokens = self._sampled.tokens.reshape(len(self._slots), -1).tolist()
        return {
            slot: self._accepted(row, slot, tokens[row]) for row, slot in enumerate(self._slots) if slot >= 0
        }

    def _accepted(self, row: int, slot: int, tokens: list[int]) -> list[Token]:
        drafts = self._drafts.get(slot, ())
        count = 1
        # A token that was sampled after a wrong draft was sampled after the wrong text.
        while count <= len(drafts) and tokens[count - 1] == drafts[count - 1]:
            count += 1
        return [
            Token(None) if token == NOT_FINITE else Token(token, self._logprobs(row, place, token))
            for place, token in enumerate(tokens[:count])
        ]

    def _logprobs(self, row: int, place: int, token: int) -> TokenLogprobs | None:
        count = self._asked.get(self._slots[row], 0)
        sampled = self._sampled
        chosen, ids, values = sampled.chosen_logprob, sampled.top_ids, sampled.top_logprobs
        if not count or chosen is None or ids is None or values is None:
            return None
        rows, width = len(self._slots), ids.shape[-1]
        top_ids = ids.reshape(rows, -1, width)[row, place, :count].tolist()
        top_values = values.reshape(rows, -1, width)[row, place, :count].tolist()
        logprob = float(chosen.reshape(rows, -1)[row, place])
        return TokenLogprobs(token, logprob, tuple(zip(top_ids, top_values, strict=True)))


def _to_host(sampled: Sampled) -> tuple[Sampled, torch.cuda.Event | None]:
    if sampled.tokens.device.type != "cuda":
        return sampled, None
    parts = (sampled.tokens, sampled.chosen_logprob, sampled.top_ids, sampled.top_logprobs)
    copies = [None if part is None else _copy_to_pinned(part) for part in parts]
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    tokens = copies[0]
    if tokens is None:  # there are always tokens
        raise AssertionError("a step without tokens")
    return Sampled(tokens, copies[1], copies[2], copies[3]), event


def _copy_to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    # Pinned memory lets the copy run while the host goes on.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
