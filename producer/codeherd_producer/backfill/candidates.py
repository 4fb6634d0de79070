"""Choose among several descriptions of one symbol that all passed the checks.

Owns: the score, a sum of named parts that are kept beside it. Does not judge whether a text may be used at
all (`texts`), and does not generate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: Longest run of characters that is compared, as in chrF (Popović 2015).
LONGEST_RUN = 6
#: chrF's beta: recall counts this many times as much as precision.
BETA = 2.0
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
        consensus = sum(chrf(text, other) for other in others) / len(others) if others else 0.0
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


def chrf(one: str, two: str) -> float:
    """Return how alike two texts are, [0, 1]: the F-score of their runs of 1 to 6 characters.

    Spaces do not count, as in chrF. Made symmetric, since neither text is the reference.
    """
    return (_chrf(one, two) + _chrf(two, one)) / 2


def _chrf(text: str, reference: str) -> float:
    said, wanted = "".join(text.split()), "".join(reference.split())
    precisions, recalls = [], []
    for length in range(1, LONGEST_RUN + 1):
        mine, theirs = _runs(said, length), _runs(wanted, length)
        if not mine or not theirs:
            continue
        common = (mine & theirs).total()
        precisions.append(common / mine.total())
        recalls.append(common / theirs.total())
    if not precisions:
        return float(said == wanted)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _runs(text: str, length: int) -> Counter[str]:
    return Counter(text[start : start + length] for start in range(len(text) - length + 1))
