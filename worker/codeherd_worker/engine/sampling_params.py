"""How one sequence's tokens are to be chosen. Knows no tensors: `sampling.py` does it.

Owns: the parameters, their ranges and what each alone means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codeherd_schema.errors import InvalidRequest

#: Below this, a temperature is greedy: the quotient of a float32 logit would overflow.
SMALLEST_TEMPERATURE = 1e-4
#: The most likely alternatives that can be asked for, as in OpenAI's completions.
MOST_LOGPROBS = 5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen."""

    #: 0 is greedy; else the divisor of the logits.
    temperature: float = 0.0
    #: Smallest set of tokens whose probability reaches this, (0, 1]; 1 keeps all.
    top_p: float = 1.0
    #: Keep this many of the likeliest tokens; 0 keeps all.
    top_k: int = 0
    #: Keep tokens at least this fraction as likely as the likeliest, [0, 1]; 0 keeps all.
    min_p: float = 0.0
    #: Divides the logits of tokens already seen (CTRL, arXiv 1909.05858); 1 is off.
    repetition_penalty: float = 1.0
    #: Any integer; its low 64 bits count.
    seed: int = 0
    #: Report each token's log-probability and those of this many of the likeliest, 0 to 5; 0 is off.
    logprobs: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature is {self.temperature}, must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}, must be in (0, 1]")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k is {self.top_k}, must be 0 or more")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p is {self.min_p}, must be in [0, 1]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InvalidRequest(f"repetition_penalty is {self.repetition_penalty}, must be above 0")
        if not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InvalidRequest(f"logprobs is {self.logprobs}, must be 0 to {MOST_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < SMALLEST_TEMPERATURE

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens are never taken."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
