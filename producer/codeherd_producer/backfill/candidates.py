"""Choose among several descriptions of one symbol that all passed the checks.

Owns: the score, a sum of named parts that are kept beside it. Does not judge whether a text may be used at
all (`texts`), and does not generate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from codeherd_producer.backfill.metrics import chrf

#: Weights of the parts.
_CONSENSUS, _LIKELIHOOD, _LENGTH = 1.0, 0.5, 0.25


@dataclass(frozen=True, slots=True)
class Score:
    """What speaks for a text; more is better."""

    #: Mean chrF to the other texts, [0, 1]: what several samples say is rarely made up. 0 if it is alone.
    consensus: float
    #: Mean probability of a token, (0, 1], as the geometric mean; 0 if it is not known.
    likelihood: float
    #: How usual its length is in this repository, (0, 1].
    length: float

    @property
    def total(self) -> float:
        """The weighted sum, which candidates are compared by."""
        return _CONSENSUS * self.consensus + _LIKELIHOOD * self.likelihood + _LENGTH * self.length


def scores(
    texts: Sequence[str], logprobs: Sequence[Sequence[float]], usual_lengths: Sequence[int]
) -> list[Score]:
    """Return each text's score.

    Args:
        texts: of one symbol.
        logprobs: of each text's tokens, natural logarithms; empty where they are not known.
        usual_lengths: characters of the repository's own docstrings; empty if it has none.
    """
    found = []
    for place, text in enumerate(texts):
        others = [other for i, other in enumerate(texts) if i != place]
        consensus = sum(likeness(text, other) for other in others) / len(others) if others else 0.0
        own = logprobs[place]
        likelihood = math.exp(sum(own) / len(own)) if own else 0.0
        found.append(Score(consensus, likelihood, length_score(len(text), usual_lengths)))
    return found


def best(texts: Sequence[str], found: Sequence[Score]) -> int:
    """Return the place of the best text; of equal ones the shortest, then the first."""
    return max(range(len(texts)), key=lambda i: (found[i].total, -len(texts[i]), -i))


def length_score(length: int, usual: Sequence[int]) -> float:
    """Return 1 for a length of the middle half of `usual`, less the farther outside it is."""
    if len(usual) < 4:
        return 1.0
    ordered = sorted(usual)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    # In halvings and doublings: twice as long as usual is as odd as half as long.
    away = max(0.0, math.log2(max(length, 1) / max(high, 1)), math.log2(max(low, 1) / max(length, 1)))
    return 1.0 / (1.0 + away)


def likeness(one: str, two: str) -> float:
    """Return how alike two texts are, [0, 1]: chrF, made symmetric since neither is the reference."""
    if not (one.strip() or two.strip()):
        return 1.0
    return (chrf(one, two) + chrf(two, one)) / 2
