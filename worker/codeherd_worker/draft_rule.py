"""How many tokens a worker tries to guess per step when the setting says `auto`.

Owns: the rule. Does not know how tokens are guessed (`engine.drafts`) or when (`engine.scheduler`).

A step with K drafts multiplies slots x (K + 1) rows. That costs nothing as long as reading the weights is
what takes the time; beyond, every wrong guess is work that somebody waits for:
    CPU             3: drafts are tried only while few rows are live, and change no bits.
    GPU, nf4        3 as long as the fused kernels take all rows: up to the slots at which
                    `quantization.RULES` would have chosen it; past that they write out every weight.
    GPU, torchao-int4   the same; its kernels are made for few rows too.
    GPU, others     3 up to 128 rows, where 16-bit and 8-bit products stop being bound by memory (H100).
    else            0, and for files quantized in formats that were not looked at.
Computed from published kernels, not measured here.
"""

from __future__ import annotations

from typing import Final

from codeherd_worker.engine.quantization import RULES, Device

#: Tokens. More are rarely right: functions of the standard library took 1.5 tokens a step with 3.
_DRAFTS: Final = 3
#: Rows up to which dense products are bound by memory.
_DENSE_ROWS: Final = 128
_FEW_ROWS_FORMATS: Final = frozenset({"nf4", "torchao-int4"})
_DENSE_FORMATS: Final = frozenset({"none", "bf16", "fp16", "int8", "torchao-int8"})


def choose_draft_tokens(asked: str, *, device: Device, quantization: str, parameters: int, slots: int) -> int:
    """Return the drafts per step and slot.

    Args:
        asked: the setting: `auto`, or a number.
        device: the kind of device.
        quantization: as applied.
        parameters: of the model.
        slots: sequences that decode together.
    """
    if asked != "auto":
        return int(asked)
    if device == "cpu":
        return _DRAFTS
    if quantization in _FEW_ROWS_FORMATS:
        most = next(rule.nf4_slots for rule in RULES if parameters < rule.below)
    elif quantization in _DENSE_FORMATS:
        most = _DENSE_ROWS
    else:
        return 0
    return _DRAFTS if slots * (1 + _DRAFTS) <= most else 0
