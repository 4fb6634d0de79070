from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from benchmarks.soak import TINY_FOLDER, Recipe
from codeherd_producer.backfill.dialog import Accept, Answer, Policy, move
from codeherd_producer.backfill.dialog import Ask as FirstAsk
from codeherd_producer.backfill.evaluation import (
    ACCEPTED,
    KNOWN,
    MODEL,
    NAME,
    NEIGHBOUR,
    NOT_REMOVABLE,
    TOO_SHORT,
    Case,
    Form,
    NotRemovable,
    Reply,
    Report,
    Sample,
    cases,
    evaluate,
    graded,
    name_in_words,
    question,
    sampled,
    without,
)
from codeherd_producer.backfill.interpreters import Interpreter
from codeherd_producer.backfill.scanner import DEFINITIONS, Scan, Symbol, scan
from codeherd_producer.backfill.selection import Selection
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.models import TINY
from codeherd_schema.requests import InfillRequest, Overflow
from codeherd_schema.results import Candidate, FinishReason, Result, Timings
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.vocabulary import Vocabulary

BUDGET = 4000
POLICY = Policy("tiny")
SHOP = '''"""Sell things to people."""

import os


class Shop(Base):
    """A place that sells things."""

    def __init__(self, stock):
        """Open with what there is to sell."""
        self.stock = stock

    @retried(3)
    async def sell(self, name):
        """Take one thing out of the stock.

        It must be there.
        """

        # Never twice.
        return self.stock.pop(name)

    def _count(self):
        """Return how many there are."""
        return len(self.stock)


class Closed(Exception):
    """Nobody sells anything any more."""


def is_open(hour):
    """Short."""
    return 8 <= hour


def later(hour):
    """Return the hour after this one."""
    return hour + 1
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "shop.py").write_text(SHOP)
    return root


def scanned(code: str, name: str = "f") -> tuple[Scan, Symbol]:
    whole = scan(code.encode())
    return whole, next(symbol for symbol in whole.symbols if symbol.name == name)


def held_back(root: Path, *, count: int = 100, budget: int = BUDGET) -> dict[str, Case]:
    return {one.place.name: one for one in cases(root, sampled(root, count), budget=budget)}


# The text without a docstring


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('def f():\n    """Do it."""\n    x = 1\n', "def f():\n    x = 1\n"),
        ('def f():\n\t"""Do it.\n\n\tTwice.\n\t"""\n\n \n\n\tx = 1\n', "def f():\n\tx = 1\n"),
        ("def f():\n    # Why.\n    r'Do it.'  # noqa\n    x = 1\n", "def f():\n    # Why.\n    x = 1\n"),
        ("def f():\n    ('Do'\n     ' it.')\n    # How.\n    x = 1", "def f():\n    # How.\n    x = 1"),
        ("class f:\n    'Do it.'\n\n    x = 1\n", "class f:\n    x = 1\n"),
        ("class f:\n    'Do it.'\n\nx = 1\n", "class f:\n    pass\n\nx = 1\n"),
        ("def f():\n  'Do it.'", "def f():\n  pass\n"),
    ],
)
def test_a_docstring_is_taken_out_with_its_lines_and_nothing_else(
    before: str, after: str, newline: str
) -> None:
    whole, symbol = scanned(before.replace("\n", newline))

    rest = without(whole, symbol)

    assert rest.text.rstrip("\r\n") == after.replace("\n", newline).rstrip("\r\n")


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    'Do it.'; x = 1\n",
        "def f(): 'Do it.'\n",
        "def f():\n    'Do it.'\n    'And this would be one.'\n",
        "def f():\n    x = 1\n",
    ],
)
def test_what_cannot_be_taken_out_cleanly_is_left(code: str) -> None:
    with pytest.raises(NotRemovable):
        without(*scanned(code))


def test_only_the_docstring_is_gone_from_any_file_of_the_standard_library(tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("textwrap.py", "contextlib.py", "queue.py"):
        shutil.copy(library / name, tmp_path / name)
    everything = Selection(magic=True, nested=True, private=True, semiprivate=True, visible=True)
    found = sampled(tmp_path, 1000, selection=everything)

    wholes = {path: scan((tmp_path / path).read_bytes()) for path in {one.path for one in found.places}}
    for place in found.places:
        whole = wholes[place.path]
        symbol = next(s for s in whole.symbols if (s.name, s.twin) == (place.name, place.twin))
        tree = ast.parse(whole.text)
        node = next(n for n in ast.walk(tree) if isinstance(n, DEFINITIONS) and n.lineno == symbol.line)
        node.body = node.body[1:] or [ast.Pass()]
        assert ast.dump(ast.parse(without(whole, symbol).text)) == ast.dump(tree)

    assert len(found.places) > 50


# Which docstrings


def test_those_are_held_back_that_a_backfill_would_write(tree: Path) -> None:
    found = sampled(tree, 100)

    assert [place.name for place in found.places] == ["Closed", "Shop", "Shop.__init__", "Shop.sell", "later"]
    assert found.documented == 8
    assert found.passed_over == {"module": 1, "semiprivate": 1, TOO_SHORT: 1}


def test_what_stands_among_other_things_on_its_line_is_counted_and_left(tree: Path) -> None:
    (tree / "shop.py").write_text('def f(a):\n    """Say what it is."""; return a\n')

    found = sampled(tree, 100)

    assert found.places == ()
    assert found.passed_over == {NOT_REMOVABLE: 1}


def test_the_choice_hangs_on_the_seed_and_not_on_what_else_is_there(tree: Path) -> None:
    for number in range(12):
        (tree / f"more_{number}.py").write_text(SHOP)
    first = sampled(tree, 10, seed=1)

    assert len(first.places) == 10
    assert sampled(tree, 10, seed=1) == first
    assert sampled(tree, 10, seed=2).places != first.places
    assert set(first.places) < set(sampled(tree, 20, seed=1).places)
    (tree / "more_3.py").unlink()
    kept = {place for place in first.places if place.path != "more_3.py"}
    assert kept <= set(sampled(tree, 10, seed=1).places)


def test_paths_are_chosen_by_patterns_and_tests_are_left_out(tree: Path) -> None:
    (tree / "test_shop.py").write_text(SHOP)
    (tree / "old.py").write_text(SHOP)

    assert {place.path for place in sampled(tree, 100).places} == {"old.py", "shop.py"}
    assert {place.path for place in sampled(tree, 100, exclude=["old*"]).places} == {"shop.py"}
    assert {place.path for place in sampled(tree, 100, include=["old*"]).places} == {"old.py"}


def test_what_an_older_tree_says_anywhere_is_not_held_back(tree: Path, tmp_path: Path) -> None:
    old = tmp_path / "old" / "deep"
    old.mkdir(parents=True)
    (old / "test_other.py").write_text(
        'def other():\n    """Return the hour\n    after this one.\n\n    There was more.\n    """\n'
        'class _Place:\n    "A place  that sells things."\n'
    )
    (old / "broken.py").write_text("def :\n")

    found = sampled(tree, 100, new_since=tmp_path / "old")

    assert [place.name for place in found.places] == ["Closed", "Shop.__init__", "Shop.sell"]
    assert found.passed_over[KNOWN] == 2
    assert found.unread == 1
    assert found.is_new_only


def test_an_older_tree_that_git_ignores_counts_too(tree: Path) -> None:
    git = Path(shutil.which("git") or "git")
    subprocess.run([git, "init", "--quiet"], cwd=tree, check=True)
    (tree / ".gitignore").write_text("old\n")
    (tree / "old").mkdir()
    (tree / "old" / "shop.py").write_text(SHOP)

    assert {place.path for place in sampled(tree, 100).places} == {"shop.py"}
    assert sampled(tree, 100, new_since=tree / "old").places == ()


def test_an_older_tree_without_python_is_a_mistake(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(InvalidRequest, match="no Python files"):
        sampled(tree, 100, new_since=tmp_path / "empty")
    with pytest.raises(InvalidRequest, match="sample of 0"):
        sampled(tree, 0)


def test_a_file_that_cannot_be_read_ends_nothing(tree: Path) -> None:
    (tree / "broken.py").write_text("def :\n")

    found = sampled(tree, 100)

    assert found.unread == 1
    assert len(found.places) == 5


def test_newer_syntax_is_held_back_by_the_interpreter_that_knows_it(
    tree: Path, tmp_path: Path, newer_python: Path
) -> None:
    expected, plain = held_back(tree), sampled(tree, 100)
    # An assignment for all but the newer one, and of the same length: whatever is found, is found there.
    (tree / "shop.py").write_text(SHOP.replace("import os\n", "newtype X = int\n"))
    old = tmp_path / "old"
    old.mkdir()
    (old / "shop.py").write_text('newtype X = int\nclass Shop:\n    """A place that sells things."""\n')

    assert (sampled(tree, 100).places, sampled(tree, 100).unread) == ((), 1)
    with Interpreter(newer_python) as other:
        found = sampled(tree, 100, other=other)
        held = {one.place.name: one for one in cases(tree, found, budget=BUDGET, other=other)}
        new = sampled(tree, 100, new_since=old, other=other)

    assert found == plain
    assert list(cases(tree, found, budget=BUDGET)) == []
    assert held.keys() == expected.keys()
    for name, one in held.items():
        then = expected[name]
        assert (one.reference, one.neighbour, one.paper) == (then.reference, then.neighbour, then.paper)
        assert one.own.suffix == then.own.suffix
        assert one.own.prefix.endswith(then.own.prefix.removeprefix("import os\n\n\n"))
        assert graded(one, one.reference, POLICY) == graded(then, then.reference, POLICY)
    assert {place.name for place in found.places} - {place.name for place in new.places} == {"Shop"}
    assert new.unread == 0


def test_what_changed_after_the_choice_has_no_case(tree: Path) -> None:
    found = sampled(tree, 100)
    (tree / "shop.py").write_text(
        SHOP.replace("def later", "def soon").replace('    """A place that sells things."""\n', "")
    )

    assert [one.place.name for one in cases(tree, found, budget=BUDGET)] == [
        "Closed",
        "Shop.__init__",
        "Shop.sell",
    ]

    (tree / "shop.py").unlink()
    assert list(cases(tree, found, budget=BUDGET)) == []


def test_a_header_that_leaves_no_room_has_no_case(tree: Path) -> None:
    parameters = ", ".join(f"parameter_{number}" for number in range(300))
    (tree / "shop.py").write_text(f'def wide({parameters}):\n    """Do it all."""\n    return 1\n')

    assert held_back(tree) == {}
    assert list(held_back(tree, budget=40_000)) == ["wide"]


# Questions


@pytest.mark.parametrize("form", Form)
def test_a_question_does_not_hold_its_own_docstring(tree: Path, form: Form) -> None:
    for one in held_back(tree).values():
        request = question(one, POLICY, form)

        assert one.reference.partition("\n")[0] not in request.prefix + request.suffix
        assert request.model == "tiny"
        assert request.sampling.temperature == 0
        assert request.overflow is Overflow.TRUNCATE


def test_the_own_question_is_the_first_one_of_a_backfill(tree: Path) -> None:
    one = held_back(tree)["Shop.sell"]

    request = question(one, POLICY, Form.OWN)

    first = move(one.symbol, one.own, POLICY, (), ()).next
    assert isinstance(first, FirstAsk)
    assert request == first.questions[0].request
    assert '"""Open with what there is to sell."""' in request.prefix, "others are shown"
    assert request.prefix.endswith('    @retried(3)\n    async def sell(self, name):\n        """')
    assert request.suffix.startswith('"""\n        # Never twice.\n        return self.stock.pop(name)\n')
    assert one.symbol.docstring is None


def test_several_candidates_and_rounds_change_nothing_about_the_one_question(tree: Path) -> None:
    one = held_back(tree)["later"]
    rich = Policy("tiny", rounds=((0.0, 1), (0.8, 4)), candidates=5)

    assert question(one, rich, Form.OWN) == question(one, POLICY, Form.OWN)
    assert graded(one, "Return the next hour.", rich) == graded(one, "Return the next hour.", POLICY)


def test_the_papers_question_is_the_symbol_alone_with_a_space_and_no_closing_quotes(tree: Path) -> None:
    found = held_back(tree)

    sell = question(found["Shop.sell"], POLICY, Form.PAPER)
    closed = question(found["Closed"], POLICY, Form.PAPER)

    assert sell.prefix == 'async def sell(self, name):\n        """ '
    assert sell.suffix == "\n        # Never twice.\n        return self.stock.pop(name)\n"
    assert closed.prefix == 'class Closed(Exception):\n    """ '
    assert closed.suffix == "\n    pass\n"
    assert not sell.suffix_first


def test_the_same_question_has_the_same_key_until_the_salt_changes(tree: Path) -> None:
    one, other = held_back(tree)["later"], held_back(tree)["Closed"]

    for form in Form:
        key = question(one, POLICY, form).idempotency_key
        assert key is not None
        assert question(one, POLICY, form).idempotency_key == key
        assert question(other, POLICY, form).idempotency_key != key
        assert question(one, Policy("tiny", salt="again"), form).idempotency_key != key
    assert (
        question(one, POLICY, Form.PAPER).idempotency_key != question(one, POLICY, Form.OWN).idempotency_key
    )


# Grades and baselines


def test_what_was_held_back_is_as_near_as_can_be(tree: Path) -> None:
    one = held_back(tree)["Shop.sell"]

    found = graded(one, one.reference, POLICY)

    assert (found.is_exact, found.chrf, found.length) == (True, 1.0, found.wanted_length)
    assert found.bleu4 == pytest.approx(1)
    assert found.reason is None


def test_a_text_is_accepted_when_a_backfill_would_accept_it(tree: Path) -> None:
    one = held_back(tree)["later"]

    for text in ("Return the next hour.", "later", "", "Return it\\", "Return '''é''' and \"\"\".", "Later."):
        answer = Answer(exchange=0, number=0, text=text)
        step = move(one.symbol, one.own, Policy("tiny", rounds=((0.0, 1),)), [answer], ())
        assert (graded(one, text, POLICY).reason is None) == isinstance(step.next, Accept)
    assert graded(one, "Return the next", POLICY, is_truncated=True).reason == "truncated"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("get_user_name", "Get user name."),
        ("A.readHTTPHeader2", "Read HTTP header 2."),
        ("f.<locals>.inner", "Inner."),
        ("Shop.__init__", "Init."),
        ("_", "_."),
        ("élan", "Élan."),
    ],
)
def test_a_name_becomes_a_sentence(name: str, sentence: str) -> None:
    own = name.rpartition(".")[2]
    _, symbol = scanned(f"def {own}():\n    pass\n", own)

    assert name_in_words(symbol) == sentence


def test_the_nearest_neighbour_is_of_the_same_kind_and_class_at_best(tree: Path) -> None:
    found = held_back(tree)

    assert found["Shop.__init__"].neighbour == "Take one thing out of the stock.\n\nIt must be there."
    assert found["Shop"].neighbour == "Nobody sells anything any more."
    assert found["later"].neighbour == "Short."

    (tree / "shop.py").write_text('def alone(a):\n    """Be the only one here."""\n    return a\n')
    assert held_back(tree)["alone"].neighbour == ""


def test_a_twin_is_no_neighbour(tree: Path) -> None:
    (tree / "shop.py").write_text(
        'def far():\n    """Be far away from it."""\n    return 1\n\n\n'
        "if MODERN:\n"
        '    def near():\n        """Return what is near."""\n        return 2\n'
        "else:\n"
        '    def near():\n        """Return what was near."""\n        return 3\n'
    )

    found = [one for one in cases(tree, sampled(tree, 100), budget=BUDGET) if one.place.name == "near"]

    assert [one.place.twin for one in found] == [0, 1]
    assert {one.neighbour for one in found} == {"Be far away from it."}
    assert [one.reference for one in found] == ["Return what is near.", "Return what was near."]


# Reports


def report(root: Path, said: dict[str, Reply], *, form: Form = Form.OWN) -> Report:
    """Evaluate a source that says what the script has, and nothing to the rest."""
    found = sampled(root, 100, seed=3)
    names = iter(found.places)

    def ask(requests: Sequence[InfillRequest]) -> Iterator[Reply]:
        assert all(isinstance(request, InfillRequest) for request in requests)
        return (said.get(next(names).name, Reply("")) for _ in requests)

    return evaluate(
        cases(root, found, budget=BUDGET), ask, sample=found, policy=POLICY, form=form, resamples=200
    )


def value(found: Report, row: str, measure: str) -> float | None:
    interval = found.scores[row][measure]
    return None if interval is None else interval.value


def test_a_source_that_knows_all_is_better_than_both_baselines(tree: Path) -> None:
    texts = {name: one.reference for name, one in held_back(tree).items()}

    found = report(tree, {name: Reply(text, tokens=7, seconds=0.5) for name, text in texts.items()})

    assert [value(found, MODEL, m) for m in ("exact", "chrF", "length", "accepted")] == [1, 1, 1, 1]
    assert value(found, MODEL, "BLEU-4") == pytest.approx(1)
    for baseline in (NAME, NEIGHBOUR):
        lead = found.leads[baseline]["chrF"]
        assert lead is not None
        assert lead.low > 0
        assert lead.value == pytest.approx(1 - (value(found, baseline, "chrF") or 0))
    assert found.rejected == {}
    assert (found.tokens, found.seconds) == (35, 2.5)


def test_a_source_that_copies_its_neighbours_leads_them_by_nothing(tree: Path) -> None:
    texts = {name: one.neighbour for name, one in held_back(tree).items()}

    found = report(tree, {name: Reply(text) for name, text in texts.items()})

    lead = found.leads[NEIGHBOUR]["BLEU-4"]
    assert lead is not None
    assert (lead.value, lead.low, lead.high) == (0, 0, 0)
    assert found.scores[MODEL] == found.scores[NEIGHBOUR]


def test_rejected_texts_and_failed_jobs_are_counted_by_reason(tree: Path) -> None:
    good = "Return the hour that comes next."

    found = report(
        tree,
        {
            "later": Reply(good),
            "Shop": Reply("", error="prompt_too_long"),
            "Closed": Reply("Closed.", tokens=2),
            "Shop.sell": Reply("Sell.", tokens=2),
            "Shop.__init__": Reply("Make it what it", is_truncated=True),
        },
    )

    assert found.rejected == {
        "fewer than two words": 2,
        "failed: prompt_too_long": 1,
        "truncated": 1,
    }
    assert value(found, MODEL, "accepted") == pytest.approx(1 / 5)
    later = held_back(tree)["later"]
    assert value(found, ACCEPTED, "chrF") == pytest.approx(graded(later, good, POLICY).chrf)
    assert value(found, ACCEPTED, "accepted") == 1
    assert (value(found, MODEL, "chrF") or 0) < (value(found, ACCEPTED, "chrF") or 0)


def test_without_an_accepted_text_that_row_is_empty(tree: Path) -> None:
    found = report(tree, {})

    assert found.scores[ACCEPTED]["chrF"] is None
    assert found.rejected == {"empty": 5}
    assert re.search(r"^model, accepted(\s+-){5}$", found.to_text(), re.MULTILINE)


def test_in_the_papers_form_the_first_line_counts_whatever_follows(tree: Path) -> None:
    line = "Return the hour after this one."
    said = Reply(f"\n   {line}\n    And on and on and", is_truncated=True)

    paper, own = report(tree, {"later": said}, form=Form.PAPER), report(tree, {"later": said})

    row = next(row for row in paper.rows if row.case.place.name == "later")
    assert (row.grade.reason, row.grade.is_exact, row.grade.length) == (None, True, len(line))
    assert next(row for row in own.rows if row.case.place.name == "later").grade.reason == "truncated"
    assert "Code Llama paper" in paper.to_text()
    assert "Code Llama paper" not in own.to_text()


def test_replies_must_be_as_many_as_questions(tree: Path) -> None:
    found = sampled(tree, 100)

    for replies in ([], [Reply("")] * 4, [Reply("")] * 6):
        held = cases(tree, found, budget=BUDGET)
        with pytest.raises(ValueError, match="zip"):
            evaluate(held, partial(_answered, replies), sample=found, policy=POLICY)


def _answered(replies: Sequence[Reply], _: Sequence[InfillRequest]) -> Sequence[Reply]:
    return replies


def test_a_report_is_told_as_text_and_as_json(tree: Path) -> None:
    found = report(tree, {"later": Reply("Return the hour after this one.", tokens=8, seconds=0.25)})

    text = found.to_text()
    document = json.loads(json.dumps(found.to_json()))

    assert text.startswith("5 docstrings of 1 files held back, seed 3; tiny, form own\n")
    assert re.search(r"^model +20\.0 \[0\.0, \d+\.\d\] ", text, re.MULTILINE)
    assert re.search(r"^nearest neighbour +\+20\.0 \[", text, re.MULTILINE)
    assert "rejected: empty 4\n8 tokens in 0.2 s" in text
    assert "may have read these very docstrings" in text
    assert document["scores"][MODEL]["exact"]["value"] == pytest.approx(0.2)
    assert document["cases"] == 5
    assert document["rejected"] == {"empty": 4}
    assert document["passed_over"] == {"module": 1, "semiprivate": 1, TOO_SHORT: 1}
    rows = [json.loads(json.dumps(row.to_json())) for row in found.rows]
    assert [(row["name"], row["exact"]) for row in rows if row["exact"]] == [("later", True)]
    assert {row["wanted"] for row in rows} >= {"A place that sells things."}
    assert all(len(line) < 140 for line in text.splitlines())


def test_a_report_of_new_docstrings_says_so(tree: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "a.py").write_text("x = 1\n")
    found = sampled(tree, 100, new_since=old)

    done = evaluate([], lambda _: [], sample=found, policy=POLICY)

    assert "absent from the older tree" in done.to_text()
    assert done.to_json()["new_only"] is True


@pytest.mark.parametrize(
    ("finish_reason", "is_truncated"),
    [(FinishReason.LENGTH, True), (FinishReason.STOP, False), (FinishReason.EOS, False)],
)
def test_a_reply_is_a_jobs_first_candidate(finish_reason: FinishReason, is_truncated: bool) -> None:
    first, second = (
        Candidate(index=n, text=text, finish_reason=reason, completion_tokens=9 + n, seed=n)
        for n, (text, reason) in enumerate([("Do it.", finish_reason), ("No.", FinishReason.EOS)])
    )
    result = Result(
        job_id="a",
        attempt=1,
        candidates=(first, second),
        prompt_tokens=100,
        completion_tokens=19,
        model="tiny",
        model_revision="a",
        quantization="none",
        engine_fingerprint="a",
        worker_id="a",
        timings=Timings(queue_s=50, admit_s=20, prefill_s=1.5, decode_s=2, total_s=23.5),
        created_at=datetime.now(UTC),
    )

    assert Reply.of(result) == Reply("Do it.", is_truncated=is_truncated, tokens=9, seconds=3.5)


@pytest.mark.parametrize("form", Form)
def test_the_embedded_model_is_evaluated(tree: Path, form: Form) -> None:
    vocabulary = Vocabulary.from_folder(TINY_FOLDER)
    loaded = load_model(str(TINY_FOLDER), quantization="none", device="cpu", slots=2)
    engine = Engine(loaded.model, EngineSettings((SlotClass(1024, 2),), prefill_chunk=128))

    def ask(requests: Sequence[InfillRequest]) -> Iterator[Reply]:
        futures = []
        for request in requests:
            recipe = Recipe(
                build_prompt(request, vocabulary, TINY), SamplingParams(), request.sampling.max_new_tokens
            )
            futures.append(engine.submit(recipe.request(vocabulary)))
        for future in futures:
            outcome = future.result(timeout=240)
            is_cut = outcome.finish_reason is not None and outcome.finish_reason.value == "length"
            yield Reply(outcome.text, is_cut, outcome.completion_tokens, outcome.prefill_s + outcome.decode_s)

    engine.start()
    try:
        found: Sample = sampled(tree, 3)
        done = evaluate(
            cases(tree, found, budget=1500),
            ask,
            sample=found,
            policy=Policy("tiny", full_tokens=48),
            form=form,
        )
    finally:
        engine.close()

    assert len(done.rows) == 3
    assert done.tokens > 0
    assert done.seconds > 0
    for row in done.rows:
        assert row.reply.text.strip()
        assert '"""' not in row.reply.text
