"""What an engine says of itself to people who look: counters, and its slots.

Owns: the fields and their units. Does not know who counts (`engine.py`) or who shows
(`codeherd_worker.telemetry`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot at one moment, for people who look."""

    slot: int
    #: Tokens that it can hold.
    length: int
    #: The request's name; None while the slot is free.
    name: str | None
    prompt_tokens: int
    #: Prompt tokens that were copied from another slot.
    reused_tokens: int
    #: Prompt tokens that are in the cache, copied ones too.
    prefilled_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment."""

    slots: int
    #: Sequences in a slot, prefilling or decoding.
    active: int
    waiting: int
    #: Decode steps and prefill passes since the start.
    steps: int
    passes: int
    #: New tokens since the start.
    tokens: int
    #: Prompt tokens of admitted sequences, and how many of them were copied instead of computed.
    prompt_tokens: int
    reused_tokens: int
    #: Guessed tokens that were tried, and how many of them were right.
    drafted: int
    accepted: int
    #: Seconds in which the engine had something to do.
    busy_s: float
    cache_bytes: int
    #: On the engine's clock: when a pass of the model last began or ended, or work came to an idle engine.
    #: Old while `active` or `waiting` is not 0 means that the device hangs.
    last_step_at: float
