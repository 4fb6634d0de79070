"""Ask for one symbol's docstring, judge what comes back, and ask again: a pure function of the answers.

Owns: the order of the questions, their sampling, seeds and keys, and what is made of the answers. Knows no
files, no database and no clock, and does not submit: who asked, crashed and asks again gets the same
questions with the same keys. What a text must be like is `texts`' and `docstrings`' business, what the model
sees is that of `context` and `skeletons`.

A docstring without sections (PEP 257, classes, functions that take and give nothing):

    text asked --rejected--> asked with the next round's sampling --none left--> give up
         `--accepted--> accept

One with sections, for Google's, numpy's and Sphinx's convention:

    summary asked --rejected--> next round --none left--> give up
         `--accepted--> each item asked --rejected--> next round --none left--> accept the summary alone
                             `--all accepted--> accept
                             `--the summary is another symbol's by now--> next round of the summary
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from codeherd_producer.backfill.candidates import Score, best, scores
from codeherd_producer.backfill.context import QUOTES, Hole, deeper
from codeherd_producer.backfill.docstrings import (
    Convention,
    Unwritable,
    before_sections,
    composed,
    is_section_head,
    rendered,
)
from codeherd_producer.backfill.scanner import Symbol
from codeherd_producer.backfill.skeletons import Section, Slot, hole_of, sections_of, slots
from codeherd_producer.backfill.texts import (
    Rejection,
    Surroundings,
    is_like,
    rejection,
    restates,
    transliterated,
)
from codeherd_schema.requests import InfillRequest, Overflow, Sampling
from codeherd_schema.results import FinishReason, Result

#: Of what is asked and how; a new one makes every key, and so every text, a new one.
PROMPT_VERSION: Final = 1
#: The reason of a question that nothing is known of.
NO_ANSWER: Final = "no answer"
#: Sampled beside the greedy text if no round says how.
_TEMPERATURE: Final = 0.2
#: Most candidates that one request may ask for.
_MOST_SAMPLES: Final = 16


@dataclass(frozen=True, slots=True)
class Policy:
    """How texts are asked for and chosen.

    Raises:
        ValueError: a field is out of its range.
    """

    #: A name from the model table.
    model: str
    convention: Convention = Convention.PEP257
    #: Temperature, and texts to ask for, of each try; 0 is greedy and gives one text.
    rounds: tuple[tuple[float, int], ...] = ((0.0, 1), (0.2, 2), (0.4, 4))
    #: Texts of the first try; more than one: others are sampled beside the first, and all are ranked.
    candidates: int = 1
    #: Columns of a docstring's lines.
    width: int = 88
    #: 0 runs first, 9 last.
    priority: int = 9
    allow_doctest: bool = False
    #: Characters of the docstrings that the project has.
    usual_lengths: tuple[int, ...] = ()
    #: Makes other keys, so that what was generated before is not taken.
    salt: str = ""
    #: Most tokens of a summary or a description, and of a whole text.
    summary_tokens: int = 64
    full_tokens: int = 192

    def __post_init__(self) -> None:
        if not self.rounds or any(not 1 <= samples <= _MOST_SAMPLES for _, samples in self.rounds):
            raise ValueError(f"there must be rounds, each of 1 to {_MOST_SAMPLES} texts")
        if not 1 <= self.candidates <= _MOST_SAMPLES + 1:
            raise ValueError(f"there must be 1 to {_MOST_SAMPLES + 1} candidates")
        for tokens in (self.summary_tokens, self.full_tokens):
            for temperature, samples in self.rounds:
                sampling = Sampling(max_new_tokens=tokens, temperature=temperature, n=samples)
                # Of a wrong value the first to hear is whoever set it.
                InfillRequest(
                    model=self.model, prefix="", suffix="", priority=self.priority, sampling=sampling
                )


@dataclass(frozen=True, slots=True)
class Answer:
    """One text that a question got, or that there is none."""

    exchange: int
    number: int
    #: Among the question's candidates.
    index: int = 0
    text: str = ""
    #: It ended because its tokens were used up.
    is_truncated: bool = False
    #: Of its tokens, natural logarithms; empty if they were not asked for.
    logprobs: tuple[float, ...] = ()
    tokens: int = 0
    seed: int | None = None
    #: Why there is no text: the code of the job's error.
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """A text that was accepted for another symbol of the file, and may not be given twice."""

    text: str
    #: First exchange whose answers are compared with it: that in which it was accepted if its symbol stands
    #: above, else the next one. What was judged before is not judged otherwise later.
    since: int


@dataclass(frozen=True, slots=True)
class Question:
    """One request; its number tells it from the others of the exchange."""

    number: int
    #: Has a key made of its content: asked again, it is the same job.
    request: InfillRequest


@dataclass(frozen=True, slots=True)
class Ask:
    """Submit these, and come back when all have ended."""

    questions: tuple[Question, ...]
    #: Counts from 0.
    exchange: int


@dataclass(frozen=True, slots=True)
class Accept:
    """This is the docstring."""

    #: For `docstrings.rendered`.
    text: str
    #: As the file will hold them, without indentation.
    lines: tuple[str, ...]
    #: Of the text, or of the summary of one with sections.
    score: Score
    #: Why there are no sections although the convention asks for them: the fault of an item.
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No text is good enough: why the last one was not."""

    reason: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What was thought of an answer."""

    answer: Answer
    #: None for one that may be used; else a `Rejection`, or the error's code.
    reason: str | None
    #: None for one that may not be used.
    score: Score | None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next, and what was thought of each answer so far, in order of exchange and number."""

    next: Ask | Accept | GiveUp
    judged: tuple[Judged, ...]


def move(
    symbol: Symbol,
    hole: Hole,
    policy: Policy,
    answers: Iterable[Answer],
    others: Iterable[Other],
    *,
    encoding: str = "utf-8",
) -> Step:
    """Return what follows from all answers so far; without any, the first questions.

    An exchange is over when one of its questions has an answer: come with those of all its jobs. The same
    answers, in any order, always give the same step. A dialog ends after at most n * (n + 1) exchanges,
    n being the number of rounds.

    Args:
        symbol: what the docstring describes.
        hole: where it goes.
        policy: the same one in all calls for a symbol.
        answers: to all exchanges so far; those to questions that were never asked are passed over.
        others: texts for other symbols.
        encoding: of the file.
    """
    given: dict[tuple[int, int, int], Answer] = {}
    for answer in sorted(answers, key=_order):
        given.setdefault((answer.exchange, answer.number, answer.index), answer)
    dialog = _Dialog(symbol, hole, policy, tuple(others), encoding)
    talk = dialog.talk()
    try:
        ask = next(talk)
        while True:
            asked = {(ask.exchange, question.number) for question in ask.questions}
            heard = [answer for key, answer in given.items() if key[:2] in asked]
            if not heard:
                return Step(ask, tuple(dialog.judged))
            ask = talk.send(heard)
    except StopIteration as end:
        return Step(end.value, tuple(dialog.judged))


def answers_of(result: Result, exchange: int, number: int) -> list[Answer]:
    """Return what a job gave to a question."""
    return [
        Answer(
            exchange=exchange,
            number=number,
            index=one.index,
            text=one.text,
            is_truncated=one.finish_reason is FinishReason.LENGTH,
            logprobs=tuple(token.logprob for token in one.logprobs or ()),
            tokens=one.completion_tokens,
            seed=one.seed,
        )
        for one in result.candidates
    ]


def unanswered(exchange: int, number: int, error: str) -> Answer:
    """Return the answer to a question whose job ended without a text, with its error's code."""
    return Answer(exchange, number, error=error)


def _order(answer: Answer) -> tuple[int, int, int, str, str]:
    return answer.exchange, answer.number, answer.index, answer.error or "", answer.text


@dataclass(frozen=True, slots=True)
class _Gap:
    """Something to ask for."""

    #: 0 is the text or the summary, others are the items: questions are numbered by it.
    place: int
    hole: Hole
    stop: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Choice:
    """A text that may be used."""

    text: str
    score: Score


#: Says what to ask, and is sent the answers.
_Talk = Generator[Ask, list[Answer], Accept | GiveUp]
#: Turns an answer into a text, and says what is wrong with it.
_Judge = Callable[[Answer], tuple[str, str | None]]


class _Dialog:
    """One symbol's dialog. It is told all answers anew at each move, and keeps nothing between them."""

    def __init__(
        self, symbol: Symbol, hole: Hole, policy: Policy, others: tuple[Other, ...], encoding: str
    ) -> None:
        self.judged: list[Judged] = []
        self._symbol = symbol
        self._hole = hole
        self._policy = policy
        self._others = others
        self._encoding = encoding
        room = policy.width - len(hole.indent.expandtabs(8))
        self._slots = slots(symbol, policy.convention, room=room)
        #: Of the exchange that is asked or judged; and why nothing was taken from the last one.
        self._exchange = -1
        self._reason: str = NO_ANSWER
        #: Whether summaries are written below the quotes, as some projects do.
        self._is_below = any(not one.partition("\n")[0].strip() for one in hole.examples if one.strip())

    def talk(self) -> _Talk:
        if self._slots:
            return (yield from self._with_sections())
        gap = _Gap(0, self._hole, (QUOTES,), self._policy.full_tokens)
        for place in range(len(self._policy.rounds)):
            heard = yield self._ask([gap], place)
            choice = self._chosen(heard, gap, self._text, self._policy.usual_lengths)
            if choice is not None:
                return self._accepted(choice)
        return GiveUp(self._reason)

    def _with_sections(self) -> _Talk:
        for place in range(len(self._policy.rounds)):
            gap = _Gap(0, self._opened(), ("\n", QUOTES), self._policy.summary_tokens)
            heard = yield self._ask([gap], place)
            choice = self._chosen(heard, gap, self._summary)
            if choice is None:
                # Some models begin a line first: the next try does it for them.
                self._is_below |= self._reason == Rejection.EMPTY
                continue
            accept = yield from self._items(choice)
            if not self._is_copied(choice.text):
                return accept
            self._reason = Rejection.COPIED
        return GiveUp(self._reason)

    def _items(self, summary: _Choice) -> Generator[Ask, list[Answer], Accept]:
        """Ask for all descriptions, and again for those that are rejected."""
        found: dict[Slot, str] = {}
        shown = self._opening(summary.text)
        gaps = {
            slot: _Gap(
                place,
                hole_of(self._hole, slot, shown, self._policy.convention),
                ("\n", QUOTES),
                self._policy.summary_tokens,
            )
            for place, slot in enumerate(self._slots, start=1)
        }
        for place in range(len(self._policy.rounds)):
            heard = yield self._ask(list(gaps.values()), place)
            for slot, gap in list(gaps.items()):
                choice = self._chosen(heard, gap, functools.partial(self._description, slot))
                if choice is not None:
                    found[slot] = choice.text
                    del gaps[slot]
            if not gaps:
                break
        if gaps:
            return self._accepted(summary, left_out=self._reason)
        sections = sections_of({slot: found[slot] for slot in self._slots})
        text = composed(summary.text, sections, self._policy.convention)
        fault = self._misread(text, *self._slots)
        if fault is not None:
            return self._accepted(summary, left_out=str(fault))
        return self._accepted(_Choice(text, summary.score))

    def _accepted(self, choice: _Choice, *, left_out: str | None = None) -> Accept:
        return Accept(choice.text, self._lines(choice.text), choice.score, left_out)

    def _lines(self, text: str) -> tuple[str, ...]:
        return rendered(text, indent=self._hole.indent, width=self._policy.width)

    def _opened(self) -> Hole:
        """Return the hole of the summary."""
        return deeper(self._hole, [QUOTES, ""]) if self._is_below else self._hole

    def _opening(self, summary: str) -> list[str]:
        """Return the docstring's lines up to the end of the summary, without closing quotes."""
        first, *more = self._lines(summary)
        return [first, *more[:-1]] if more else [first.removesuffix(QUOTES)]

    # What is asked.

    def _ask(self, gaps: Sequence[_Gap], place: int) -> Ask:
        """Return the next exchange's questions, with the sampling of one round."""
        self._exchange += 1
        self._reason = NO_ANSWER
        temperature, samples = self._policy.rounds[place]
        samplings = [(temperature, samples if temperature else 1)]
        more = self._policy.candidates - samplings[0][1]
        if place == 0 and more > 0:
            warm = next((one for one, _ in self._policy.rounds if one), _TEMPERATURE)
            samplings = [*samplings, (warm, min(more, _MOST_SAMPLES))]
        questions = [
            self._question(gap, 2 * gap.place + number, *sampling)
            for gap in gaps
            for number, sampling in enumerate(samplings)
        ]
        return Ask(tuple(questions), self._exchange)

    def _question(self, gap: _Gap, number: int, temperature: float, samples: int) -> Question:
        policy = self._policy
        sampling = Sampling(
            max_new_tokens=gap.tokens,
            temperature=temperature,
            stop=gap.stop,
            n=samples,
            seed=0,
            logprobs=1 if policy.candidates > 1 else 0,
        )
        request = InfillRequest(
            model=policy.model,
            prefix=gap.hole.prefix,
            suffix=gap.hole.suffix,
            sampling=sampling,
            # Characters are only a guess at tokens; what is farthest from the hole is cut.
            overflow=Overflow.TRUNCATE,
            priority=policy.priority,
        )
        if temperature:
            # Rounds that are alike but for their place still say something new.
            digest = _sha256(PROMPT_VERSION, self._exchange, request.content_sha256())
            seed = int(digest[:16], 16) >> 1
            sampling = sampling.model_copy(update={"seed": seed})
            request = request.model_copy(update={"sampling": sampling})
        key = f"backfill:{_sha256(PROMPT_VERSION, policy.salt, request.content_sha256())}"
        return Question(number, request.model_copy(update={"idempotency_key": key}))

    # What is thought of the answers.

    def _chosen(
        self, heard: Sequence[Answer], gap: _Gap, judge: _Judge, usual_lengths: Sequence[int] = ()
    ) -> _Choice | None:
        """Judge the answers to one gap; return the best that passes."""
        verdicts = [
            (answer, *(("", answer.error) if answer.error else judge(answer)))
            for answer in heard
            if answer.number // 2 == gap.place
        ]
        passed = [(answer, text) for answer, text, fault in verdicts if fault is None]
        texts = [text for _, text in passed]
        found = scores(texts, [answer.logprobs for answer, _ in passed], usual_lengths)
        score_of = {answer: score for (answer, _), score in zip(passed, found, strict=True)}
        self.judged += [
            # A plain string: what is kept in rows.
            Judged(answer, None if fault is None else str(fault), score_of.get(answer))
            for answer, _, fault in verdicts
        ]
        if not passed:
            self._reason = str(verdicts[-1][2]) if verdicts else NO_ANSWER
            return None
        taken = best(texts, found)
        return _Choice(texts[taken], found[taken])

    def _text(self, answer: Answer) -> tuple[str, str | None]:
        """Judge a whole docstring."""
        raw = transliterated(answer.text, self._encoding).replace("\r\n", "\n").replace("\r", "\n")
        # Sections that a model begins by itself list what it makes up.
        text = before_sections(raw)
        # What stands before one is complete, wherever it ends.
        is_truncated = answer.is_truncated and text == raw
        fault = rejection(text, self._symbol, self._surroundings(), is_truncated=is_truncated)
        return text, fault or self._misread(text)

    def _summary(self, answer: Answer) -> tuple[str, str | None]:
        raw = transliterated(answer.text, self._encoding)
        fault = rejection(raw, self._symbol, self._surroundings(), is_truncated=answer.is_truncated)
        text = " ".join(raw.split())
        return text, fault or self._misread(text)

    def _description(self, slot: Slot, answer: Answer) -> tuple[str, str | None]:
        raw = transliterated(answer.text, self._encoding)
        if slot.section in (Section.RETURNS, Section.YIELDS):
            # "int: The sum." tells again what the header does.
            raw = _TYPE.sub("", raw, count=1)
        # Functions of one file take the same things: a description may come twice.
        around = Surroundings(self._hole.suffix, encoding=self._encoding)
        fault = rejection(raw, self._symbol, around, is_truncated=answer.is_truncated)
        text = " ".join(raw.split())
        if fault is None and restates(text, slot.name.lstrip("*")):
            fault = Rejection.NAME_RESTATED
        alone = composed(_ANY_SUMMARY, sections_of({slot: text}), self._policy.convention)
        return text, fault or self._misread(alone, slot)

    def _misread(self, text: str, *listed: Slot) -> Rejection | None:
        """Return what is wrong with a docstring's form; None if nothing is.

        Args:
            text: summary and all.
            listed: what its sections list.
        """
        policy = self._policy
        try:
            lines = self._lines(text)
            "\n".join(lines).encode(self._encoding)
        except Unwritable:
            return Rejection.UNWRITABLE
        except UnicodeEncodeError:
            return Rejection.ENCODING
        # Where lines are broken anew, one may begin with what is no prompt, or look like a section's head.
        if not policy.allow_doctest and any(line.lstrip().startswith(">>>") for line in lines):
            return Rejection.DOCTEST
        sections = {slot.section for slot in listed} if policy.convention is not Convention.SPHINX else ()
        # Numpy's convention has a parameter's name on a line of its own, also if it is `notes`.
        names = {slot.name for slot in listed if slot.name.islower()}
        heads = [line for line in lines if is_section_head(line, policy.convention) and line not in names]
        if len(heads) != len(sections):
            return Rejection.UNWRITABLE
        if policy.convention is Convention.NUMPY and _first_word(lines[0]) == "this":
            # D404, which the other conventions leave out.
            return Rejection.UNWRITABLE
        return None

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            self._hole.suffix, self._told(), self._policy.allow_doctest, encoding=self._encoding
        )

    def _told(self) -> tuple[str, ...]:
        """Return what may not be said again: docstrings, and their summaries."""
        known = [*self._hole.examples, *(one.text for one in self._others if one.since <= self._exchange)]
        return tuple(dict.fromkeys(itertools.chain(known, (_first_paragraph(one) for one in known))))

    def _is_copied(self, summary: str) -> bool:
        return any(is_like(summary, other) for other in self._told())


#: Stands above a description that is looked at alone.
_ANY_SUMMARY = "Do it."
#: A type before a result's description.
_TYPE = re.compile(r"\A\s*[\w.]+(?:\[[^\]]*\])?\s*:\s+(?=\S)")


def _first_word(line: str) -> str:
    """Return a docstring's first word as ruff compares it: letters and digits."""
    word = line.partition(QUOTES)[2].lstrip().partition(" ")[0]
    return "".join(one for one in word if one.isalnum()).casefold()


def _first_paragraph(text: str) -> str:
    return re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]


def _sha256(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "backslashreplace")).hexdigest()
