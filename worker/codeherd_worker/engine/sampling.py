"""Turn logits into the next token id. Knows nothing of text, jobs or the cache.

Every row has its own parameters and its own random numbers. A random number is a hash of (seed,
position, token id), not the next draw of a shared generator, so it depends neither on the slot nor on
the neighbours nor on how often a step was repeated. The token is the argmax of logits plus Gumbel noise,
which is a sample of their softmax (Gumbel-max trick).

The order of the steps and each step's rule are those of transformers 5.23 `generate`: repetition
penalty, temperature, top_k, top_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from codeherd_schema.errors import InvalidRequest

#: Below this, a temperature is greedy: the quotient of a float32 logit would overflow.
SMALLEST_TEMPERATURE = 1e-4
#: splitmix64 (Steele, Lea, Flood 2014): its increment and multipliers, as signed 64-bit numbers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685
#: Random bits per number. With 53, adding a half would round up to exactly 1, whose noise is infinite.
_BITS = 52


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen."""

    #: 0 is greedy; else the divisor of the logits.
    temperature: float = 0.0
    #: Smallest set of tokens whose probability reaches this, (0, 1]; 1 keeps all.
    top_p: float = 1.0
    #: Keep this many of the likeliest tokens; 0 keeps all.
    top_k: int = 0
    #: Divides the logits of tokens already seen (CTRL, arXiv 1909.05858); 1 is off.
    repetition_penalty: float = 1.0
    #: Any integer; its low 64 bits count.
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature is {self.temperature}, must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}, must be in (0, 1]")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k is {self.top_k}, must be 0 or more")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InvalidRequest(f"repetition_penalty is {self.repetition_penalty}, must be above 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < SMALLEST_TEMPERATURE


class SlotSampler:
    """Chooses tokens for rows whose parameters change as sequences come and go."""

    def __init__(self, *, rows: int, vocab_size: int, device: torch.device) -> None:
        self._params = [SamplingParams()] * rows
        self._temperature = torch.ones(rows, 1, device=device)
        self._is_greedy = torch.ones(rows, dtype=torch.bool, device=device)
        self._tail = torch.zeros(rows, 1, device=device)
        self._top_k = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._penalty = torch.ones(rows, 1, device=device)
        self._seed = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._token_ids = torch.arange(vocab_size, device=device)
        self._find_needs()

    def assign(self, row: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Give a row to a sequence. Only once its prompt is prefilled: `observe` marks idle rows too."""
        self._params[row] = params
        self._temperature[row] = 1.0 if params.is_greedy else params.temperature
        self._is_greedy[row] = params.is_greedy
        # Subtracted here, in double precision, as transformers does.
        self._tail[row] = 1 - params.top_p
        self._top_k[row] = params.top_k
        self._penalty[row] = params.repetition_penalty
        self._seed[row] = _signed(params.seed)
        self._seen[row] = False
        if params.repetition_penalty != 1.0:
            self._seen[row, torch.tensor(prompt_ids, dtype=torch.int64, device=self._seen.device)] = True
        self._find_needs()

    def release(self, row: int) -> None:
        """Take a row back; it is greedy until the next `assign`."""
        self.assign(row, SamplingParams(), ())

    def observe(self, token_ids: torch.Tensor) -> None:
        """Remember the tokens of all rows, (rows, 1) int64, for their repetition penalty."""
        if self._needs_penalty:
            self._seen.scatter_(1, token_ids, True)

    def sample(self, logits: torch.Tensor, positions: torch.Tensor, rows: slice) -> torch.Tensor:
        """Choose one token for each of `rows`.

        Args:
            logits: (B, V), any float type.
            positions: (B, 1) int64, the place in its sequence that each new token will take.
            rows: the B rows the logits belong to.

        Returns:
            (B,) int64 token ids.
        """
        scores = logits.float()
        if self._needs_penalty:
            scores = penalize(scores, self._seen[rows], self._penalty[rows])
        # The lowest id wins a tie, here and below, as in torch.argmax on the raw logits.
        likeliest = scores.argmax(-1)
        if not self._needs_noise:
            return likeliest
        # Every step leaves a row that does not ask for it exactly as it was: what the neighbours
        # ask for decides which steps run, and must not decide what comes out.
        scores = scores / self._temperature[rows]
        if self._largest_top_k:
            scores = keep_top_k(scores, self._top_k[rows], self._largest_top_k)
        if self._needs_top_p:
            scores = drop_tail(scores, self._tail[rows])
        noise = gumbel_noise(self._seed[rows], positions, self._token_ids)
        return torch.where(self._is_greedy[rows], likeliest, (scores.double() + noise).argmax(-1))

    def _find_needs(self) -> None:
        self._needs_noise = any(not params.is_greedy for params in self._params)
        self._needs_penalty = any(params.repetition_penalty != 1.0 for params in self._params)
        self._needs_top_p = any(params.top_p < 1.0 for params in self._params)
        vocab_size = self._seen.shape[1]
        self._largest_top_k = min(vocab_size, max(params.top_k for params in self._params))


def penalize(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Make seen tokens less likely, once each however often they were seen.

    Args:
        scores: (B, V) float.
        seen: (B, V) bool.
        penalty: (B, 1) float; 1 changes nothing.
    """
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalized, scores)


def keep_top_k(scores: torch.Tensor, top_k: torch.Tensor, largest: int) -> torch.Tensor:
    """Put all but the `top_k` highest scores of each row to -inf; ties with the last one stay.

    Args:
        scores: (B, V) float.
        top_k: (B, 1) int64; 0 keeps all.
        largest: the highest `top_k` of any row, at most V, known to the host.
    """
    highest = scores.topk(largest).values
    last_kept = highest.gather(1, (top_k - 1).clamp(0, largest - 1))
    return scores.masked_fill((scores < last_kept) & (top_k > 0), -math.inf)


def drop_tail(scores: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Put the least likely tokens to -inf, up to a probability of `tail`; the likeliest token stays.

    Args:
        scores: (B, V) float.
        tail: (B, 1) float, `1 - top_p`; 0 keeps all.
    """
    ascending, order = scores.sort(dim=-1)
    is_tail = ascending.softmax(-1).cumsum(-1) <= tail
    # Without this, tokens so unlikely that their probability is 0 in float32 would go as well.
    is_tail &= tail > 0
    is_tail[:, -1] = False
    return scores.masked_fill(is_tail.scatter(1, order, is_tail), -math.inf)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise, (B, V) float64, that depends on nothing but its arguments.

    Args:
        seed: (B, 1) int64.
        position: (B, 1) int64.
        token_ids: (V,) int64.
    """
    stream = _mix(_mix(seed) + position * _GOLDEN)
    bits = (_mix(stream + token_ids * _GOLDEN) >> (64 - _BITS)) & ((1 << _BITS) - 1)
    uniform = bits.double().add_(0.5).mul_(2.0**-_BITS)
    return uniform.log_().neg_().log_().neg_()


def _mix(number: torch.Tensor) -> torch.Tensor:
    """Scramble int64 numbers with splitmix64's finalizer; products wrap around."""
    number = (number ^ _shift_right(number, 30)) * _MIX_1
    number = (number ^ _shift_right(number, 27)) * _MIX_2
    return number ^ _shift_right(number, 31)


def _shift_right(number: torch.Tensor, bits: int) -> torch.Tensor:
    # torch has no unsigned shift: drop the copies of the sign bit.
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def _signed(seed: int) -> int:
    low_bits = seed & (2**64 - 1)
    return low_bits - 2**64 if low_bits >= 2**63 else low_bits
