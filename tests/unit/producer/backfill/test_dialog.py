from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codeherd_producer.backfill.context import FileContext, Hole
from codeherd_producer.backfill.dialog import (
    NO_ANSWER,
    Accept,
    Answer,
    Ask,
    GiveUp,
    Judged,
    Other,
    Policy,
    Step,
    answers_of,
    move,
    unanswered,
)
from codeherd_producer.backfill.docstrings import Convention, rendered
from codeherd_producer.backfill.editor import Insertion, edited
from codeherd_producer.backfill.scanner import Scan, Symbol, scan
from codeherd_producer.backfill.texts import LONGEST, Rejection
from codeherd_schema.requests import InfillRequest, Overflow
from codeherd_schema.results import Candidate, FinishReason, LikelyToken, Result, Timings, TokenLogprob

CODE = '''\
"""Count things."""

import os


class Store:
    def __init__(self, path, *, size=10):
        self.path = path
        self.size = size

    def read(self, name):
        if name not in os.listdir(self.path):
            raise KeyError(name)
        return name

    def all_names(self):
        for name in os.listdir(self.path):
            yield name

    def close(self):
        os.sync()


def mean_of(values, *more):
    return sum([*values, *more]) / len(values)
'''
FAIR = "Return the mean of all numbers."
SKELETONS = [Convention.GOOGLE, Convention.NUMPY, Convention.SPHINX]

#: Says which text an answer has.
Source = Callable[[InfillRequest, int], str]


def symbol(name: str, code: str = CODE) -> Symbol:
    return next(s for s in scan(code.encode()).symbols if s.name == name)


def hole(name: str, code: str = CODE) -> Hole:
    return FileContext(scan(code.encode()), budget=4000).hole(symbol(name, code))


def policy(convention: Convention = Convention.PEP257, **fields: object) -> Policy:
    return Policy(model="tiny", convention=convention, **fields)  # type: ignore[arg-type]


def stepped(
    name: str, of: Policy, answers: Sequence[Answer], others: Sequence[Other] = (), code: str = CODE
) -> Step:
    return move(symbol(name, code), hole(name, code), of, answers, others)


def asked(step: Step) -> Ask:
    assert isinstance(step.next, Ask)
    return step.next


def accepted(step: Step) -> Accept:
    assert isinstance(step.next, Accept)
    return step.next


def answers_to(ask: Ask, source: Source) -> list[Answer]:
    return [
        Answer(ask.exchange, question.number, index, source(question.request, index), tokens=5, seed=1)
        for question in ask.questions
        for index in range(question.request.sampling.n)
    ]


def talked(
    name: str, of: Policy, source: Source, others: Sequence[Other] = (), code: str = CODE
) -> list[Step]:
    """Carry a dialog to its end; return all its steps."""
    answers: list[Answer] = []
    steps = [stepped(name, of, answers, others, code)]
    while isinstance(steps[-1].next, Ask):
        answers += answers_to(steps[-1].next, source)
        steps.append(stepped(name, of, answers, others, code))
    return steps


def always(text: str) -> Source:
    return lambda request, index: text


def last_line(request: InfillRequest) -> str:
    return request.prefix.rpartition("\n")[2].strip()


# What is asked.


def test_a_text_without_sections_is_asked_for_in_one_hole() -> None:
    [question] = asked(stepped("mean_of", policy(priority=7), [])).questions

    request, where = question.request, hole("mean_of")
    assert (request.prefix, request.suffix) == (where.prefix, where.suffix)
    assert request.sampling.stop == ('"""',)
    assert (request.sampling.temperature, request.sampling.n, request.sampling.logprobs) == (0.0, 1, 0)
    assert request.sampling.max_new_tokens == 192
    assert (request.model, request.priority, request.overflow) == ("tiny", 7, Overflow.TRUNCATE)


def test_a_rejected_text_is_asked_for_again_with_other_sampling() -> None:
    steps = talked("mean_of", policy(rounds=((0.0, 1), (0.2, 2), (0.4, 4))), always("TODO: say it."))

    samplings = [q.request.sampling for step in steps[:-1] for q in asked(step).questions]
    assert [(s.temperature, s.n) for s in samplings] == [(0.0, 1), (0.2, 2), (0.4, 4)]
    assert [asked(step).exchange for step in steps[:-1]] == [0, 1, 2]
    assert steps[-1].next == GiveUp(Rejection.PLACEHOLDER)
    assert [j.reason for j in steps[-1].judged] == [Rejection.PLACEHOLDER] * 7


def test_a_greedy_round_asks_for_one_text_whatever_it_says() -> None:
    [question] = asked(stepped("mean_of", policy(rounds=((0.0, 3),)), [])).questions

    assert question.request.sampling.n == 1


def test_reasons_are_plain_strings_for_rows() -> None:
    last = talked("mean_of", policy(), always(""))[-1]

    assert isinstance(last.next, GiveUp)
    assert {type(last.next.reason), *(type(j.reason) for j in last.judged)} == {str}


def test_a_text_that_passes_is_taken_at_once() -> None:
    last = talked("mean_of", policy(), always("return the mean of all numbers"))[-1]

    assert accepted(last).text == "return the mean of all numbers"
    assert accepted(last).lines == (f'"""{FAIR}"""',)
    assert [(j.reason, j.answer.index) for j in last.judged] == [(None, 0)]


def test_the_same_question_has_the_same_key_and_another_one_has_another() -> None:
    def keys(of: Policy, name: str = "mean_of") -> list[str | None]:
        return [
            q.request.idempotency_key
            for step in talked(name, of, always(""))[:-1]
            for q in asked(step).questions
        ]

    plain = keys(policy())
    assert plain == keys(policy())
    assert len(set(plain)) == len(plain) == 3
    variants = [keys(policy(salt="again")), keys(policy(priority=3)), keys(policy(), "Store.close")]
    assert not set(plain) & {key for variant in variants for key in variant}
    assert all(key is not None and key.startswith("backfill:") for key in plain)


def test_a_key_never_belongs_to_two_contents() -> None:
    of = policy(Convention.GOOGLE, candidates=3)
    steps = talked("Store.read", of, lambda r, _: FAIR if last_line(r) == '"""' else "")
    contents: dict[str, str] = {}

    for question in (q for step in steps[:-1] for q in asked(step).questions):
        key = question.request.idempotency_key or ""
        assert (
            contents.setdefault(key, question.request.content_sha256()) == question.request.content_sha256()
        )


def test_rounds_that_are_alike_still_sample_something_new() -> None:
    steps = talked("mean_of", policy(rounds=((0.3, 2), (0.3, 2))), always(""))

    seeds = [q.request.sampling.seed for step in steps[:-1] for q in asked(step).questions]
    assert len(set(seeds)) == 2
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_the_greedy_question_is_the_same_whatever_the_round() -> None:
    first, second = (
        talked("mean_of", policy(rounds=rounds), always(""))[-2]
        for rounds in (((0.0, 1),), ((0.2, 1), (0.0, 1)))
    )

    assert asked(first).questions == asked(second).questions


def test_questions_do_not_depend_on_the_process() -> None:
    code = "from tests.unit.producer.backfill.test_dialog import fingerprint\nprint(fingerprint())\n"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(["", *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "77")
    }

    assert found == {fingerprint()}


def fingerprint() -> str:
    """Hash every question and end of some dialogs."""
    digest = hashlib.sha256()
    for convention in Convention:
        for name in ("Store.read", "Store", "mean_of"):
            of = policy(convention, candidates=3)
            for step in talked(name, of, lambda r, i: f"{FAIR[:-1]} {i}." if i else ""):
                digest.update(repr(step).encode())
    return digest.hexdigest()


# Candidates.


def test_with_candidates_others_are_sampled_beside_the_first_and_all_are_ranked() -> None:
    texts = ["Connect to the server now.", "Return the mean of values.", "Return a mean of values."]
    of = policy(candidates=3)

    ask = asked(stepped("mean_of", of, []))
    samplings = [q.request.sampling for q in ask.questions]
    assert [(s.temperature, s.n, s.logprobs) for s in samplings] == [(0.0, 1, 1), (0.2, 2, 1)]
    answers = [
        Answer(0, 0, 0, texts[0], logprobs=(-0.1,)),
        Answer(0, 1, 0, texts[1], logprobs=(-0.1,)),
        Answer(0, 1, 1, texts[2], logprobs=(-0.5,)),
    ]
    step = stepped("mean_of", of, answers)

    assert accepted(step).text == texts[1]
    assert accepted(step).score.likelihood == pytest.approx(math.exp(-0.1))
    assert [j.score is not None for j in step.judged] == [True] * 3


def test_a_candidate_that_fails_is_not_ranked() -> None:
    answers = [Answer(0, 0, 0, "TODO: later."), Answer(0, 1, 0, FAIR), Answer(0, 1, 1, "", error="dead")]

    step = stepped("mean_of", policy(candidates=3), answers)

    assert accepted(step).text == FAIR
    assert [(j.reason, j.score is None) for j in step.judged] == [
        (Rejection.PLACEHOLDER, True),
        (None, False),
        ("dead", True),
    ]


def test_answers_are_heard_in_any_order_and_repeated_ones_once() -> None:
    answers = [
        Answer(0, 0, 0, ""),
        Answer(1, 0, 0, ""),
        Answer(1, 0, 1, FAIR),
        Answer(0, 5, 0, "Unasked for."),
    ]

    forward = stepped("mean_of", policy(), answers)

    assert forward == stepped("mean_of", policy(), [*reversed(answers), *answers])
    assert [(j.answer.exchange, j.answer.index) for j in forward.judged] == [(0, 0), (1, 0), (1, 1)]


# Judging.


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(0, 0, text=FAIR, is_truncated=True), Rejection.TRUNCATED),
        (Answer(0, 0, error="out_of_memory"), "out_of_memory"),
        (unanswered(0, 0, "job_pruned"), "job_pruned"),
        (Answer(0, 0, text="Is this the mean of them all?"), Rejection.UNWRITABLE),
        (Answer(0, 0, text="Call mean_of(values) to get it."), Rejection.SIGNATURE),
        (Answer(0, 0, text="word " * LONGEST), Rejection.TOO_LONG),
        (Answer(0, 0, text="Lone \ud800 surrogate here."), Rejection.CONTROL),
        (Answer(0, 0, text="Return the mean of " + "very " * 30 + "many."), Rejection.LOOP),
        (Answer(0, 0, text="Return it, " + "y" * 99), Rejection.UNWRITABLE),
    ],
)
def test_an_answer_that_is_of_no_use_says_why(answer: Answer, reason: str) -> None:
    step = stepped("mean_of", policy(rounds=((0.0, 1),)), [answer])

    assert step == Step(GiveUp(reason), (Judged(answer, reason, None),))


def test_a_question_whose_answers_are_missing_counts_as_unanswered() -> None:
    ask = asked(stepped("mean_of", policy(Convention.GOOGLE), [Answer(0, 0, text=FAIR)]))
    assert [q.number for q in ask.questions] == [2, 4, 6]

    one = [Answer(0, 0, text=FAIR), Answer(1, 2, text="The numbers to use.")]
    step = stepped("mean_of", policy(Convention.GOOGLE, rounds=((0.0, 1),)), one)

    assert accepted(step).left_out == NO_ANSWER


def test_other_symbols_texts_and_the_examples_are_not_given_again() -> None:
    code = f'def first(a):\n    """{FAIR}"""\n    return a\n\n\ndef second(a):\n    return a.mean\n'
    of = policy(rounds=((0.0, 1),))

    shown = stepped("second", of, [Answer(0, 0, text="Return the mean of all  numbers")], code=code)
    other = [Other("Say what the mean is.\n\nArgs:\n    a: What.", since=0)]
    told = stepped("second", of, [Answer(0, 0, text="Say what the mean is")], other, code)

    assert shown.next == GiveUp(Rejection.COPIED)
    assert told.next == GiveUp(Rejection.COPIED), "a summary is compared with summaries"


def test_what_was_judged_is_not_judged_otherwise_when_more_is_known() -> None:
    answers = [Answer(0, 0, text=""), Answer(1, 0, index=0, text=FAIR)]

    before = stepped("mean_of", policy(), answers, [Other(FAIR, since=2)])
    after = stepped("mean_of", policy(), answers, [Other(FAIR, since=1)])

    assert accepted(before).text == FAIR
    assert asked(after).exchange == 2


@pytest.mark.parametrize(
    ("text", "encoding", "end"),
    [
        (
            "Return the caller\u2019s \u201cmean\u201d \u2014 if any\u2026",
            "latin-1",
            'caller\'s "mean" -- if any...',
        ),
        ("Return the caller\u2019s mean.", "utf-8", "caller\u2019s mean."),
        ("Return the caller\u2019s mean.", "cp1252", "caller\u2019s mean."),
        ("Return the na\u00efve mean.", "latin-1", "na\u00efve mean."),
        ("Return the na\u00efve mean.", "ascii", None),
        ("Return the mean \u2192 always.", "latin-1", None),
    ],
)
def test_a_text_uses_the_files_own_characters(text: str, encoding: str, end: str | None) -> None:
    of = policy(rounds=((0.0, 1),))
    step = move(symbol("mean_of"), hole("mean_of"), of, [Answer(0, 0, text=text)], [], encoding=encoding)

    if end is None:
        assert step.next == GiveUp(Rejection.ENCODING)
    else:
        assert accepted(step).text == f"Return the {end}"


@pytest.mark.parametrize("convention", Convention)
def test_a_plain_text_ends_before_sections_that_the_model_made_up(convention: Convention) -> None:
    text = "Sync all disks.\n\nIt takes a while.\n\n    Returns:\n        None\n"
    cut = Answer(0, 0, text=text, is_truncated=True)

    step = stepped("Store.close", policy(convention), [cut])

    # What is kept was complete before the tokens were used up.
    assert accepted(step).lines == ('"""Sync all disks.', "", "It takes a while.", '"""')


# Sections.


def google_source(request: InfillRequest, index: int) -> str:
    return {
        '"""': "Read one thing by its name.",
        "name:": " What it is called here.",
        "": "str: The thing itself.\n",
        "KeyError:": " If there is no such thing.",
    }[last_line(request)]


def test_a_docstring_with_sections_is_asked_for_piece_by_piece() -> None:
    steps = talked("Store.read", policy(Convention.GOOGLE), google_source)

    summary, items = asked(steps[0]), asked(steps[1])
    assert [q.request.sampling.stop for q in (*summary.questions, *items.questions)] == [("\n", '"""')] * 4
    assert all(q.request.sampling.max_new_tokens == 64 for q in (*summary.questions, *items.questions))
    base = hole("Store.read")
    assert summary.questions[0].request.prefix == base.prefix
    assert [q.request.prefix.removeprefix(base.prefix) for q in items.questions] == [
        "Read one thing by its name.\n\n        Args:\n            name:",
        "Read one thing by its name.\n\n        Returns:\n            ",
        "Read one thing by its name.\n\n        Raises:\n            KeyError:",
    ]
    assert {q.request.suffix for q in items.questions} == {f"\n        {base.suffix}"}
    assert accepted(steps[2]).lines == (
        '"""Read one thing by its name.',
        "",
        "Args:",
        "    name: What it is called here.",
        "",
        "Returns:",
        "    The thing itself.",
        "",
        "Raises:",
        "    KeyError: If there is no such thing.",
        '"""',
    )
    assert accepted(steps[2]).left_out is None
    assert len(steps[2].judged) == 4


def test_only_a_rejected_description_is_asked_for_again() -> None:
    def source(request: InfillRequest, index: int) -> str:
        is_first = request.sampling.temperature == 0
        return "TODO: it." if last_line(request) == "name:" and is_first else google_source(request, index)

    steps = talked("Store.read", policy(Convention.GOOGLE), source)

    assert [[q.number for q in asked(step).questions] for step in steps[:-1]] == [[0], [2, 4, 6], [2]]
    assert "    name: What it is called here." in accepted(steps[-1]).lines


@pytest.mark.parametrize("convention", SKELETONS)
def test_a_description_that_cannot_be_had_leaves_the_summary(convention: Convention) -> None:
    steps = talked(
        "Store.read", policy(convention), lambda r, _: "Read one thing." if last_line(r) == '"""' else "name"
    )

    accept = accepted(steps[-1])
    assert accept.lines == ('"""Read one thing."""',)
    assert accept.left_out == Rejection.TOO_SHORT
    assert len(steps) == 1 + 1 + 3


def test_a_description_that_restates_its_name_says_nothing() -> None:
    def source(request: InfillRequest, index: int) -> str:
        return " The name." if last_line(request) == "name:" else google_source(request, index)

    last = talked("Store.read", policy(Convention.GOOGLE), source)[-1]

    assert accepted(last).left_out == Rejection.NAME_RESTATED


def test_a_description_may_be_longer_than_a_line_and_the_same_as_in_another_function() -> None:
    said = "What it is called, " + "or would be called if there were any other way to call things, " * 2

    def source(request: InfillRequest, index: int) -> str:
        return said if last_line(request) == "name:" else google_source(request, index)

    last = talked("Store.read", policy(Convention.GOOGLE), source, [Other(said, 0)])[-1]

    assert accepted(last).left_out is None
    assert next(line for line in accepted(last).lines if "would be" in line).startswith("    name: What")


def test_a_parameter_may_be_called_like_a_section() -> None:
    code = "def f(notes, returns):\n    raise Error(notes, returns)\n"

    accept = accepted(
        talked("f", policy(Convention.NUMPY), always("Something to be written down"), code=code)[-1]
    )

    assert accept.left_out is None
    assert [line for line in accept.lines if not line.startswith(" ")][4:-1] == [
        "notes", "returns", "", "Raises", "------", "Error",
    ]  # fmt: skip


def test_a_description_that_reads_as_a_section_is_not_taken() -> None:
    def source(request: InfillRequest, index: int) -> str:
        return "See also:" if last_line(request) == "" else google_source(request, index)

    accept = accepted(talked("Store.read", policy(Convention.GOOGLE), source)[-1])

    assert accept.left_out == Rejection.UNWRITABLE
    assert accept.lines == ('"""Read one thing by its name."""',)


@pytest.mark.parametrize("convention", Convention)
def test_numpy_alone_does_not_begin_with_this(convention: Convention) -> None:
    answer = Answer(0, 0, text="This, by the way, syncs all disks.")

    step = stepped("Store.close", policy(convention, rounds=((0.0, 1),)), [answer])

    assert isinstance(step.next, GiveUp) is (convention is Convention.NUMPY)


def test_a_summary_that_another_symbol_took_meanwhile_is_asked_for_again() -> None:
    def source(request: InfillRequest, index: int) -> str:
        is_again = request.sampling.temperature > 0
        if last_line(request) == '"""' and is_again:
            return "Look a thing up in the folder."
        return google_source(request, index)

    # Accepted above this symbol, in the exchange in which its own descriptions came.
    other = Other("Read one thing by its name.\n\nMore.", since=1)
    steps = talked("Store.read", policy(Convention.GOOGLE), source, [other])

    assert [len(asked(step).questions) for step in steps[:-1]] == [1, 3, 1, 3]
    assert accepted(steps[-1]).lines[0] == '"""Look a thing up in the folder.'


def test_summaries_are_asked_for_where_the_project_writes_them() -> None:
    first = 'def first(a):\n    """\n    Say the first.\n    """\n    return a\n'
    code = f"{first}\n\ndef second(of):\n    return of\n"

    steps = talked("second", policy(Convention.GOOGLE), always("Take what comes in."), code=code)

    assert asked(steps[0]).questions[0].request.prefix.endswith('def second(of):\n    """\n    ')
    assert accepted(steps[-1]).lines[0] == '"""Take what comes in.'


def test_a_model_that_begins_a_line_first_is_given_one() -> None:
    def source(request: InfillRequest, index: int) -> str:
        # Stopped at the line's end at once.
        return "" if request.prefix.endswith('"""') else "Take what comes in."

    steps = talked("mean_of", policy(Convention.GOOGLE), source)

    assert asked(steps[1]).questions[0].request.prefix.endswith('"""\n    ')
    assert accepted(steps[-1]).left_out is None


def test_what_is_written_is_what_others_render_from_the_text() -> None:
    for convention in Convention:
        accept = accepted(talked("mean_of", policy(convention), always("Take \\d of it. And so on."))[-1])
        assert accept.lines == rendered(accept.text, indent="    ", width=88)


# Values.


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rounds": ()}, "there must be rounds"),
        ({"rounds": ((0.0, 0),)}, "each of 1 to 16 texts"),
        ({"rounds": ((3.0, 1),)}, "temperature"),
        ({"candidates": 0}, "1 to 17 candidates"),
        ({"candidates": 18}, "1 to 17 candidates"),
        ({"priority": 10}, "priority"),
        ({"summary_tokens": 0}, "max_new_tokens"),
        ({"model": "two words"}, "model"),
    ],
)
def test_a_policy_that_nobody_can_follow_is_refused_at_once(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Policy(**{"model": "tiny", **fields})  # type: ignore[arg-type]


def test_a_result_becomes_answers() -> None:
    token = TokenLogprob(
        token_id=1,
        piece="a",
        text_hex="61",
        logprob=-0.5,
        top=(LikelyToken(token_id=1, piece="a", text_hex="61", logprob=-0.5),),
    )
    ends = [(FinishReason.EOS, None), (FinishReason.STOP, (token, token)), (FinishReason.LENGTH, None)]
    result = Result(
        job_id="j",
        attempt=1,
        candidates=tuple(
            Candidate(
                index=i,
                text=f"t{i}",
                finish_reason=end,
                completion_tokens=2 + i,
                seed=40 + i,
                logprobs=logprobs,
            )
            for i, (end, logprobs) in enumerate(ends)
        ),
        prompt_tokens=1,
        completion_tokens=9,
        model="tiny",
        model_revision="r",
        quantization="none",
        engine_fingerprint="e",
        worker_id="w",
        timings=Timings(queue_s=0, admit_s=0, prefill_s=0, decode_s=0, total_s=0),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )

    assert answers_of(result, 3, 2) == [
        Answer(3, 2, 0, "t0", is_truncated=False, logprobs=(), tokens=2, seed=40),
        Answer(3, 2, 1, "t1", is_truncated=False, logprobs=(-0.5, -0.5), tokens=3, seed=41),
        Answer(3, 2, 2, "t2", is_truncated=True, logprobs=(), tokens=4, seed=42),
    ]


# Whatever a model says.

PIECES = st.sampled_from(
    [
        *(
            "Return the mean",
            " of all",
            "values",
            "name",
            " thing",
            ".",
            ". And",
            "The ",
            "this ",
            "This ",
            "  ",
        ),
        *(
            "\n",
            "\n\n",
            "\n    ",
            "\r",
            "\r\n",
            "\t",
            "\x0c",
            "\0",
            "\x07",
            "\x1b[0m",
            "\u2028",
            "\u202e",
            "\u200b",
        ),
        *(
            '"',
            '"""',
            "'",
            "'''",
            "\\",
            "\\N{x}",
            "`",
            "```",
            ":",
            ": ",
            "- ",
            "* ",
            "-----",
            "=",
            "(",
            ")",
            "?",
        ),
        *(
            "Args:",
            "Returns",
            "Notes",
            "Note:",
            "Raises:\n",
            "Parameters\n----------\n",
            "See Also",
            ":param x: ",
        ),
        *(
            ">>> ",
            "TODO",
            "def f(a):",
            "return 1",
            "<EOT>",
            "read(",
            "mean_of(x) ",
            "e.g. ",
            "int: ",
            "x" * 95,
        ),
        *(
            "\u2019",
            "\u2026",
            "\xa0",
            "\ud800",
            "\u6c49",
            "\U0001f600",
            "\uff0c",
            "\u0301",
            "\xe9",
            "\u0130",
            "\xdf",
        ),
    ]
)
WORDS = st.lists(
    st.sampled_from(
        ["read", "every", "thing", "that", "lies", "below", "it", "once", "Notes", "This", "e.g."]
    ),
    min_size=2,
    max_size=40,
).map(" ".join)
TEXTS = (
    WORDS
    | st.lists(PIECES, max_size=12).map("".join)
    | st.tuples(WORDS, PIECES, WORDS).map("".join)
    | st.text(max_size=60)
    | st.sampled_from(["", "\n" * 5000, "a " * 30_000, '"' * 4000, " " * 4000, "\\" * 301, "for x in " * 900])
)
POLICIES = st.builds(
    Policy,
    model=st.just("tiny"),
    convention=st.sampled_from(Convention),
    rounds=st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 1.5]), st.integers(1, 3)), min_size=1, max_size=3
    ).map(tuple),
    candidates=st.sampled_from([1, 1, 4]),
    width=st.sampled_from([60, 88, 120]),
    usual_lengths=st.lists(st.integers(0, 300), max_size=6).map(tuple),
)
#: Names that read like heads of sections.
ODD = """\
class Notes:
    def this(self, args: 'A', returns, *notes: int, _x=1, **raises) -> Warning:
        if args:
            raise Error
        raise a.b.Warning(1)
        return 2

    @property
    def see(self):
        return 1

    async def one(self, parameters):
        yield parameters
"""
MODULES = [
    CODE,
    CODE.replace("\n", "\r\n"),
    CODE.replace("    ", "  "),
    "# coding: latin-1\n" + CODE.replace("numbers", "n\xfcmbers"),
    ODD,
]


@st.composite
def given_answers(draw: st.DrawFn, ask: Ask) -> list[Answer]:
    answers = []
    for question in ask.questions:
        if draw(st.integers(0, 19)) == 0:
            answers.append(unanswered(ask.exchange, question.number, "dead"))
            continue
        for index in range(question.request.sampling.n):
            logprobs = tuple(draw(st.lists(st.floats(-9999, 0), max_size=3)))
            is_cut = draw(st.integers(0, 9)) == 0
            answers.append(Answer(ask.exchange, question.number, index, draw(TEXTS), is_cut, logprobs))
    return answers


def scanned(module: str) -> Scan:
    return scan(module.encode("latin-1" if "latin-1" in module else "utf-8"))


def carried(data: st.DataObject, found: Scan, name: str, of: Policy, others: list[Other]) -> Step:
    """Carry one symbol's dialog to its end, whatever is answered."""
    one = next(s for s in found.symbols if s.name == name)
    where = FileContext(found, budget=3000).hole(one)
    answers: list[Answer] = []
    most = len(of.rounds) * (len(of.rounds) + 1)
    for exchange in range(most + 1):
        step = move(one, where, of, answers, others, encoding=found.encoding)
        assert step == move(one, where, of, answers[::-1], others[::-1], encoding=found.encoding)
        assert [j.answer for j in step.judged] == sorted(
            answers, key=lambda a: (a.exchange, a.number, a.index)
        ), "each answer is judged once"
        if not isinstance(step.next, Ask):
            return step
        assert step.next.exchange == exchange
        assert len({q.number for q in step.next.questions}) == len(step.next.questions) > 0
        answers += data.draw(given_answers(step.next))
    raise AssertionError(f"more than {most} exchanges")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(MODULES), POLICIES)
def test_every_dialog_ends_and_what_it_accepts_can_be_put_into_the_file(
    data: st.DataObject, module: str, of: Policy
) -> None:
    found = scanned(module)
    name = data.draw(st.sampled_from([s.name for s in found.symbols if s.name]))
    others = [Other(text, since) for since, text in enumerate(data.draw(st.lists(WORDS, max_size=2)))]

    step = carried(data, found, name, of, others)

    if isinstance(step.next, Accept):
        one = next(s for s in found.symbols if s.name == name)
        after = edited(found, [Insertion(one, step.next.lines)])
        assert step.next.lines == rendered(step.next.text, indent=one.indent, width=of.width)
        assert next(s for s in scan(after).symbols if s.name == name).is_documented
        assert any(j.reason is None and j.score == step.next.score for j in step.judged)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(MODULES), POLICIES)
def test_ruff_finds_no_fault_with_what_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, module: str, of: Policy
) -> None:
    found = scanned(module)
    insertions = []
    for one in found.symbols:
        if one.name:
            step = carried(data, found, one.name, of, [])
            if isinstance(step.next, Accept):
                insertions.append(Insertion(one, step.next.lines))
    path = tmp_path_factory.mktemp("ruff") / "a.py"
    # Ruff reads UTF-8 alone.
    text = edited(found, insertions).decode(found.encoding)
    path.write_bytes(text.replace("# coding: latin-1\n", "").encode())

    assert faults(path, of.convention, of.width) == ""


def faults(path: Path, convention: Convention, width: int, *more: str) -> str:
    """Return what ruff says of the docstrings' form; which are missing and D401, a wording, do not count."""
    named = Convention.PEP257 if convention is Convention.SPHINX else convention
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--quiet", *more),
            *("--output-format=concise", f"--config=lint.pydocstyle.convention='{named}'"),
            *("--select=D,W505", "--ignore=D1,D401", f"--line-length={width}"),
            *(f"--config=lint.pycodestyle.max-doc-length={width}", str(path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout + answer.stderr


# End to end.


@pytest.mark.parametrize("convention", SKELETONS)
def test_a_module_gets_docstrings_that_ruff_finds_complete(convention: Convention, tmp_path: Path) -> None:
    said = {
        "Store": "Keep things in a folder.",
        "__init__": "Open the folder with a limit.",
        "read": "Look one thing up.",
        "all_names": "List everything in the folder.",
        "close": "Write everything to the disk.",
        "mean_of": FAIR,
    }

    def source(request: InfillRequest, index: int) -> str:
        header = request.prefix.rpartition('"""')[0].rstrip().rpartition("\n")[2]
        own = header.replace("(", " ").replace(":", " ").split()[1]
        return said[own] if last_line(request) == '"""' else " What it is about, in some words."

    found = scan(CODE.encode())
    others: list[Other] = []
    insertions = []
    for one in found.symbols[1:]:
        accept = accepted(talked(one.name, policy(convention), source, others)[-1])
        assert accept.left_out is None
        others.append(Other(accept.text, since=0))
        insertions.append(Insertion(one, accept.lines))
    after = edited(found, insertions)
    path = tmp_path / "a.py"
    path.write_bytes(after)

    assert len(insertions) == 6
    # Whatever the code takes, gives and raises is there, and nothing else.
    is_known = convention is not Convention.SPHINX
    assert faults(path, convention, 88, *(["--preview", "--extend-select=DOC"] if is_known else [])) == ""
    if convention is Convention.GOOGLE:
        assert after.decode().partition("def mean_of")[2] == MEAN_OF


MEAN_OF = '''(values, *more):
    """Return the mean of all numbers.

    Args:
        values: What it is about, in some words.
        *more: What it is about, in some words.

    Returns:
        What it is about, in some words.
    """
    return sum([*values, *more]) / len(values)
'''
