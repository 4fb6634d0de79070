from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from codeherd_producer.backfill.metrics import (
    Column,
    bleu4,
    chrf,
    first_line,
    first_paragraph,
    intervals,
    is_same,
    words,
)

#: Few characters, so that much is shared; marks, spaces of several kinds, and letters beyond ASCII.
texts = st.text("ab AB_.,-\t\n'é𝒳09", max_size=40)


@given(texts, texts)
def test_measures_are_between_none_and_all(text: str, reference: str) -> None:
    for measure in (bleu4, chrf):
        assert 0 <= measure(text, reference) <= 1 + 1e-12


@given(texts.filter(words))
def test_a_text_is_all_like_itself(text: str) -> None:
    assert bleu4(text, text) == pytest.approx(1)
    assert chrf(text, text) == pytest.approx(1)


def test_bleu_adds_one_to_longer_runs_and_to_both_lengths() -> None:
    # Shared: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 run of four; 4 words against 6.
    found = bleu4("return the mean now", "Return the mean of all values")

    precisions = [3 / 4, 3 / 4, 2 / 3, 1 / 2]
    assert found == pytest.approx(math.prod(precisions) ** 0.25 * math.exp(1 - 7 / 5))


def test_bleu_splits_marks_and_underscores_from_words_and_knows_no_case() -> None:
    assert " ".join(words("Read foo_Bar2, it's 3.5")) == "read foo _ bar2 , it ' s 3 . 5"
    assert bleu4("READ IT.", "read it .") == pytest.approx(1)


def test_bleu_of_no_shared_word_or_of_no_word_is_zero() -> None:
    assert bleu4("one two three", "four five six") == 0
    assert bleu4("", "four five six") == 0
    assert bleu4(" \n", "four") == 0


def test_a_longer_text_has_no_brevity_penalty() -> None:
    said, wanted = "a b c d e f g h", "a b c d"

    assert bleu4(said, wanted) == pytest.approx((4 / 8 * 4 / 8 * 3 / 7 * 2 / 6) ** 0.25)
    assert bleu4(wanted, said) == pytest.approx(math.exp(1 - 9 / 5))


def test_chrf_counts_recall_more_than_precision_and_no_spaces() -> None:
    part, whole = "Return it", "Return it to whoever asked"

    assert chrf(part, whole) < chrf(whole, part)
    assert chrf("a b\nc", "abc") == 1
    assert chrf("", "abc") == chrf("abc", "") == chrf(" ", "") == 0
    # One run of one character: precision 1/1, recall 1/2, weighed 1 to 4.
    assert chrf("a", "ab") == pytest.approx(5 * 1 * 0.5 / (4 * 1 + 0.5))


def test_chrf_is_that_of_sacrebleu() -> None:
    official = CHRF()

    for text, reference in pairs():
        assert 100 * chrf(text, reference) == pytest.approx(
            official.sentence_score(text, [reference]).score, abs=1e-9
        )


def test_bleu_is_that_of_sacrebleu_where_no_penalty_tells_them_apart() -> None:
    official = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=False)
    compared = 0

    for text, reference in pairs():
        said, wanted = words(text), words(reference)
        if len(said) < max(4, len(wanted)) or not wanted:
            continue
        score = official.corpus_score([" ".join(said)], [[" ".join(wanted)]]).score
        assert 100 * bleu4(text, reference) == pytest.approx(score, abs=1e-9)
        compared += 1

    assert compared > 100


def pairs() -> list[tuple[str, str]]:
    """Texts that share some, all or nothing."""
    rng = random.Random(5)
    supply = re.findall(r"\S+", "return the mean of all values, or None; read_file it's x-1 é (default: 3.5)")
    found = []
    for _ in range(1500):
        reference = rng.choices(supply, k=rng.randrange(12))
        text = list(reference)
        for _ in range(rng.randrange(4)):
            text.insert(rng.randrange(len(text) + 1), rng.choice(supply))
            rng.random() < 0.5 and text.pop(rng.randrange(len(text)))
        found.append((" ".join(text), "\n".join(reference)))
    return found


def test_first_lines_and_paragraphs_have_single_spaces() -> None:
    text = "\n \n  Read  the\tfile\n  and close it.  \n \t\n  Twice.\n"

    assert first_line(text) == "Read the file"
    assert first_paragraph(text) == "Read the file and close it."
    assert first_line(" \n") == first_paragraph(" \n") == ""


def test_lines_are_the_same_whatever_their_capital_and_period() -> None:
    assert is_same("read  the file", "Read the file.\n\nTwice.")
    assert is_same("\nRead the file.", "Read the file")
    assert not is_same("Read the File.", "Read the file.")
    assert not is_same("Read the file..", "Read the file.")
    assert not is_same("", "")


def mean(values: Sequence[float]) -> Column:
    return Column.mean(values)


def test_an_interval_holds_its_total_and_shrinks_with_more_pairs(rng: random.Random) -> None:
    values = [rng.random() for _ in range(900)]

    few, many = intervals({"few": mean(values[:36])}, seed=1), intervals({"many": mean(values)}, seed=1)

    few_one, many_one = few["few"], many["many"]
    assert few_one is not None
    assert many_one is not None
    assert few_one.low < few_one.value < few_one.high
    # A fifth of the width, as the root of 25 tells.
    assert 3 < (few_one.high - few_one.low) / (many_one.high - many_one.low) < 8


def test_an_interval_is_as_wide_as_theory_says() -> None:
    # 400 coin tosses: two standard errors are 2 * 0.025.
    found = intervals({"coin": mean([0.0, 1.0] * 200)}, seed=3, resamples=2000)["coin"]

    assert found is not None
    assert found.value == 0.5
    assert found.low == pytest.approx(0.451, abs=0.008)
    assert found.high == pytest.approx(0.549, abs=0.008)


def test_the_same_seed_gives_the_same_bounds() -> None:
    values = mean([random.Random(n).random() for n in range(50)])
    column = {"a": values}

    assert intervals(column, seed=1) == intervals(column, seed=1)
    both = intervals({"a": values, "b": values}, seed=1)
    assert both["a"] == both["b"], "columns share the draws"
    assert intervals(column, seed=1) != intervals(column, seed=2)


def test_a_paired_difference_is_surer_than_its_two_sides(rng: random.Random) -> None:
    first = [rng.random() for _ in range(200)]
    second = [value + 0.05 + 0.01 * rng.random() for value in first]
    columns = {
        "first": mean(first),
        "second": mean(second),
        "difference": mean([b - a for a, b in zip(first, second, strict=True)]),
    }

    found = intervals(columns, seed=1)

    assert found["first"] is not None
    assert found["second"] is not None
    assert found["difference"] is not None
    assert found["second"].low < found["first"].high, "apart, they overlap"
    assert found["difference"].low > 0.05


def test_a_ratio_is_one_of_sums_and_rows_that_do_not_count_change_nothing() -> None:
    found = intervals({"ratio": Column([2, 6, 0], [4, 4, 0])}, seed=1)["ratio"]

    assert found is not None
    assert found.value == statistics.fmean([2, 6]) / 4
    assert (found.low, found.high) == (0.5, 1.5)


def test_without_a_row_that_counts_there_is_no_total() -> None:
    assert intervals({"none": Column([0, 0], [0, 0]), "one": mean([1, 1])}, seed=1)["none"] is None
    assert intervals({"empty": mean([])}, seed=1) == {"empty": None}
    assert intervals({}, seed=1) == {}
