"""Say how near a generated description is to the one that a person wrote.

Owns: the measures of one pair of texts, and intervals for their totals over many pairs. Knows no symbols,
files or models. Own code, since what is wanted is not in a library: sacrebleu has no BLEU of single lines as
CodeXGLUE computes it, which the Code Llama paper's table is in. Its chrF is the same as this one (tested).
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Longest run of words that BLEU-4 compares.
MOST_WORDS = 4
#: Longest run of characters that chrF compares (Popović 2015).
MOST_CHARACTERS = 6
#: chrF's beta: recall counts this many times as much as precision (Popović 2016).
BETA = 2.0
#: Samples that an interval is taken from.
RESAMPLES = 1000
#: Letters and digits, or one other mark: what CodeXGLUE's two splits come to, one after the other.
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Interval:
    """A total, and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Column:
    """One measure of all pairs, as fractions: its total is sum over sum.

    A mean has ones below. A pair that does not count has a zero above and below.
    """

    above: Sequence[float]
    below: Sequence[float]

    @classmethod
    def mean(cls, values: Sequence[float]) -> Column:
        """Take the plain mean."""
        return cls(values, [1.0] * len(values))


def first_line(text: str) -> str:
    """Return the first line that is not blank, with single spaces; empty without one."""
    return next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")


def first_paragraph(text: str) -> str:
    """Return the lines up to a blank one as one line with single spaces; empty without any."""
    return " ".join(re.split(r"\n[^\S\n]*\n", text.strip(), maxsplit=1)[0].split())


def is_same(text: str, reference: str) -> bool:
    """Whether both begin with the same line, but for the form that `docstrings` gives: capital and period."""
    return _formless(first_line(text)) == _formless(first_line(reference)) != ""


def _formless(line: str) -> str:
    line = line.removesuffix(".")
    return line[:1].lower() + line[1:]


def bleu4(text: str, reference: str) -> float:
    """Return the smoothed BLEU-4 of a line, [0, 1], as CodeXGLUE's code summarization counts it.

    Runs of two to four words have one added above and below (Lin and Och 2004), both lengths of the brevity
    penalty have one added, and case does not count. As there, a line too short for runs of a length loses
    nothing for them. Unlike there, a line without words has 0, not a remnant of the penalty. A corpus has the
    mean of its lines.
    """
    said, wanted = words(text), words(reference)
    logs = 0.0
    for length in range(1, MOST_WORDS + 1):
        mine, theirs = _runs(said, length), _runs(wanted, length)
        added = int(length > 1)
        matched = (mine & theirs).total() + added
        if not matched:
            return 0.0
        logs += math.log(matched / (mine.total() + added))
    brevity = min(0.0, 1 - (len(wanted) + 1) / (len(said) + 1))
    return math.exp(logs / MOST_WORDS + brevity)


def words(text: str) -> tuple[str, ...]:
    """Split a text as CodeXGLUE does: small letters, marks and underscores apart."""
    return tuple(_WORD.findall(text.lower()))


def chrf(text: str, reference: str) -> float:
    """Return the chrF of a text, [0, 1]: the F-score of its runs of 1 to 6 characters, without spaces.

    Runs longer than one of the texts do not count, as in sacrebleu. A corpus has the mean of its texts.
    """
    said, wanted = tuple("".join(text.split())), tuple("".join(reference.split()))
    precisions, recalls = [], []
    for length in range(1, min(MOST_CHARACTERS, len(said), len(wanted)) + 1):
        mine, theirs = _runs(said, length), _runs(wanted, length)
        common = (mine & theirs).total()
        precisions.append(common / mine.total())
        recalls.append(common / theirs.total())
    if not any(precisions):
        return 0.0
    precision, recall = statistics.fmean(precisions), statistics.fmean(recalls)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _runs(parts: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(parts[start:] for start in range(length)), strict=False))


def intervals(
    columns: Mapping[str, Column], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval | None]:
    """Return each column's total with its interval; None where no pair counts.

    The bounds are percentiles of totals over as many pairs drawn with replacement (bootstrap). All columns
    share the draws. A column of differences has the interval of a paired comparison.

    Args:
        columns: of equal lengths.
        seed: the same one gives the same bounds.
        resamples: how often all pairs are drawn.
    """
    count = len(next(iter(columns.values())).above) if columns else 0
    rng = random.Random(seed)  # noqa: S311 -- draws, not secrets
    drawn: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(resamples if count else 0):
        rows = rng.choices(range(count), k=count)
        for name, column in columns.items():
            below = sum(map(column.below.__getitem__, rows))
            if below:
                drawn[name].append(sum(map(column.above.__getitem__, rows)) / below)
    return {name: _interval(column, drawn[name]) for name, column in columns.items()}


def _interval(column: Column, drawn: Sequence[float]) -> Interval | None:
    below = sum(column.below)
    if not below:
        return None
    value = sum(column.above) / below
    if len(drawn) < 2:
        return Interval(value, value, value)
    cuts = statistics.quantiles(drawn, n=40, method="inclusive")
    return Interval(value, cuts[0], cuts[-1])
