r"""Hold existing docstrings back, ask a model for them, and say how near it comes.

Owns: which docstrings are held back, the text without them, the paper's form of the question, two
baselines, and the report. Does not ask: whoever calls has the queue. Does not know the formulas (`metrics`);
a backfill's own question, and what it makes of the answer, are those of `dialog`'s first exchange.

    sampled ──> cases ──> question ──> (a model) ──> graded ──> Report

A case is one docstring. Only its own is taken out of the file, so that the model sees the others as it would
in a backfill. What is compared, spaces made single:

    exact     first line with first line, but for capital and period, which are the renderer's
    BLEU-4    first line with first paragraph, as in the Code Llama paper (appendix E, CodeXGLUE)
    chrF      first paragraph with first paragraph
    length    characters of the whole text to those of the whole docstring
    accepted  whether a backfill would take the text

Two baselines know no model: the name split into words, and the docstring of the nearest documented symbol.

Models have read the standard library and much of what else is public, docstrings included. `new_since` names
a folder with an older version, from before the model; what was written down there already is left out.
"""

from __future__ import annotations

import hashlib
import heapq
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from codeherd_producer.backfill import metrics
from codeherd_producer.backfill.context import QUOTES, FileContext, HeaderTooLong, Hole
from codeherd_producer.backfill.dialog import Answer, Policy, move
from codeherd_producer.backfill.dialog import Ask as FirstAsk
from codeherd_producer.backfill.files import FileReason, find
from codeherd_producer.backfill.interpreters import Interpreter, scanned
from codeherd_producer.backfill.metrics import Column, Interval
from codeherd_producer.backfill.scanner import Scan, Symbol, Unreadable
from codeherd_producer.backfill.selection import Selection, decided, is_generated, is_skipped
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.requests import InfillRequest, Overflow, Sampling
from codeherd_schema.results import FinishReason, Result

#: Words and marks of the shortest docstring that is compared, as in CodeXGLUE.
FEWEST_WORDS = 3
#: Why documented symbols are not in the sample, beside `selection.Reason`.
TOO_SHORT, KNOWN, NOT_REMOVABLE = "too short to compare", "in the older tree", "cannot be taken out"
#: BLEU-4 of the paper's table 13 in per cent. Its functions are CodeXGLUE's, so only the order of size
#: compares.
PAPER_BLEU4 = {"7B": 20.37, "13B": 21.15}
#: Rows of a report.
MODEL, ACCEPTED, NAME, NEIGHBOUR = "model", "model, accepted", "name in words", "nearest neighbour"
#: Columns of a report.
MEASURES = ("exact", "BLEU-4", "chrF", "length", "accepted")
_LINE_END = re.compile(r"\r\n|\r|\n")


class Form(StrEnum):
    """How a docstring is asked for."""

    #: As a backfill asks first.
    OWN = "own"
    #: The Code Llama paper's: the function alone, three quotes and a space before the hole, no quotes after.
    PAPER = "paper"


class NotRemovable(Exception):
    """Without its docstring the file would not be the same one without a docstring."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where one docstring stands."""

    path: str
    #: Of the symbol, and its number among those of the same name.
    name: str
    twin: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Which docstrings are held back."""

    places: tuple[Place, ...]
    seed: int
    #: Documented symbols that were looked at.
    documented: int
    #: How many of them may not be held back, by reason.
    passed_over: Mapping[str, int]
    #: Files that could not be read, in the tree and in the older one.
    unread: int
    #: Whether what an older tree has is left out.
    is_new_only: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One docstring that is held back."""

    place: Place
    #: As it is without its docstring.
    symbol: Symbol
    #: The docstring, without indentation.
    reference: str
    #: What the nearest documented symbol of the file says; empty without one.
    neighbour: str
    #: Of the file.
    encoding: str
    #: The hole of a backfill.
    own: Hole
    #: What stands before and after the paper's hole.
    paper: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one question."""

    text: str
    is_truncated: bool = False
    #: Of the answer.
    tokens: int = 0
    #: That the model spent on prompt and answer, others beside it.
    seconds: float = 0.0
    #: Code of the error if the job failed; the text is empty then.
    error: str | None = None

    @classmethod
    def of(cls, result: Result) -> Self:
        """Take the first candidate of a job's result."""
        first = result.candidates[0]
        return cls(
            text=first.text,
            is_truncated=first.finish_reason is FinishReason.LENGTH,
            tokens=first.completion_tokens,
            seconds=result.timings.prefill_s + result.timings.decode_s,
        )


@dataclass(frozen=True, slots=True)
class Grade:
    """How near one text comes; all but the lengths in [0, 1]."""

    is_exact: bool
    bleu4: float
    chrf: float
    #: Characters, spaces made single.
    length: int
    wanted_length: int
    #: Why the text would not be written; None if it would.
    reason: str | None


#: Puts questions to a model and yields a reply for each, in the same order.
Ask = Callable[[Sequence[InfillRequest]], Iterable[Reply]]


# Which docstrings


def sampled(
    root: Path,
    count: int,
    *,
    seed: int = 0,
    selection: Selection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    new_since: Path | None = None,
    other: Interpreter | None = None,
) -> Sample:
    """Choose at most `count` docstrings below a folder.

    Those are chosen whose symbols a backfill would take if they had none. The choice hangs on the seed, the
    paths and the names alone, not on the order of files: in a tree that grew, most of it stays the same.

    Args:
        root: a folder, in a repository or not.
        count: docstrings at most.
        seed: another one gives another choice.
        selection: which kinds of symbols; the default is a backfill's.
        include: patterns of paths, as in `files.find`.
        exclude: likewise.
        new_since: a folder with an older version. Docstrings whose first paragraph stands in any docstring
            there are left out.
        other: reads what this interpreter cannot parse.

    Raises:
        InvalidRequest: `count` is not positive, or there is no Python below `new_since`.
    """
    if count < 1:
        raise InvalidRequest(f"a sample of {count} docstrings has nothing to tell")
    wanted = selection or Selection()
    passed_over: Counter[str] = Counter()
    known, unread = (frozenset(), 0) if new_since is None else _known(new_since, other)
    documented = 0
    found: list[tuple[bytes, Place]] = []
    for path, is_test, one in _scans(root, include, exclude, other):
        if one is None:
            unread += 1
            continue
        for symbol, reason in _decided(one, wanted, is_test=is_test, known=known):
            documented += 1
            if reason is not None:
                passed_over[reason] += 1
                continue
            place = Place(path, symbol.name, symbol.twin)
            found.append((_drawn(place, seed), place))
        # As many as are wanted are kept at any time.
        found = heapq.nsmallest(count, found)
    places = sorted(place for _, place in found)
    return Sample(tuple(places), seed, documented, passed_over, unread, is_new_only=new_since is not None)


def _scans(
    root: Path, include: Sequence[str], exclude: Sequence[str], other: Interpreter | None
) -> Iterator[tuple[str, bool, Scan | None]]:
    """Yield every file's path, whether it is a test, and its scan; None for what cannot be read."""
    for file in find(root, include=include, exclude=exclude, allow_dirty=True):
        if file.reason is FileReason.GONE:
            yield file.path, file.is_test, None
        if file.reason is not None:
            continue
        try:
            one = scanned((root / file.path).read_bytes(), other)
        except (OSError, Unreadable):
            yield file.path, file.is_test, None
            continue
        if not is_generated(one) and not is_skipped(one):
            yield file.path, file.is_test, one


def _decided(
    one: Scan, wanted: Selection, *, is_test: bool, known: Collection[bytes]
) -> Iterator[tuple[Symbol, str | None]]:
    """Yield every documented symbol, with the reason why it may not be held back."""
    # As if nothing were documented: what would a backfill take?
    bare = replace(one, symbols=tuple(replace(s, docstring=None) for s in one.symbols))
    reasons = (reason for _, reason in decided(bare, wanted, is_test_file=is_test))
    for symbol, reason in zip(one.symbols, reasons, strict=True):
        if symbol.docstring is None or not symbol.is_documented:
            continue
        paragraph = metrics.first_paragraph(symbol.docstring)
        if reason is not None:
            # `pass` stands for the body of a class that is left empty; such a function is trivial.
            yield symbol, reason.value
        elif len(metrics.words(paragraph)) < FEWEST_WORDS:
            yield symbol, TOO_SHORT
        elif _digest(paragraph) in known:
            yield symbol, KNOWN
        else:
            yield symbol, None if _has_own_lines(one, symbol) else NOT_REMOVABLE


def _known(folder: Path, other: Interpreter | None) -> tuple[frozenset[bytes], int]:
    """Return digests of all first paragraphs below a folder, and how many files could not be read."""
    found: set[bytes] = set()
    unread = 0
    # All of them: what git ignores or a backfill leaves alone was published all the same.
    paths = [path for path in folder.rglob("*.py") if path.is_file()]
    if not paths:
        raise InvalidRequest(f"there are no Python files below `{folder}`, so everything would seem new")
    for path in paths:
        try:
            symbols = scanned(path.read_bytes(), other).symbols
        except (OSError, Unreadable):
            unread += 1
            continue
        found |= {_digest(metrics.first_paragraph(s.docstring)) for s in symbols if s.docstring}
    return frozenset(found), unread


def _digest(paragraph: str) -> bytes:
    return hashlib.sha256(paragraph.encode("utf-8", "surrogatepass")).digest()[:16]


def _drawn(place: Place, seed: int) -> bytes:
    """Return the place's lot: the lowest ones are taken."""
    told = f"{seed}\0{place.path}\0{place.name}\0{place.twin}"
    # Names of files need not be UTF-8.
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()


# The text without a docstring


def cases(root: Path, sample: Sample, *, budget: int, other: Interpreter | None = None) -> Iterator[Case]:
    """Yield the sample's docstrings as cases, file by file.

    A file that changed since, and a symbol whose header leaves no room for a hole, have no case.

    Args:
        root: the folder that the sample is from.
        sample: what `sampled` chose.
        budget: most characters of prefix and suffix together.
        other: the one that `sampled` was given.
    """
    by_path: dict[str, list[Place]] = {}
    for place in sample.places:
        by_path.setdefault(place.path, []).append(place)
    for path, places in by_path.items():
        try:
            whole = scanned((root / path).read_bytes(), other)
        except (OSError, Unreadable):
            continue
        symbols = {(symbol.name, symbol.twin): symbol for symbol in whole.symbols}
        for place in places:
            symbol = symbols.get((place.name, place.twin))
            if symbol is None:
                continue
            try:
                yield _case(whole, symbol, place, budget, other)
            except (NotRemovable, HeaderTooLong):
                continue


def _case(whole: Scan, symbol: Symbol, place: Place, budget: int, other: Interpreter | None) -> Case:
    if symbol.docstring is None:
        raise NotRemovable("no docstring")
    rest = without(whole, symbol, other)
    bare = next(s for s in rest.symbols if (s.name, s.twin) == (symbol.name, symbol.twin))
    return Case(
        place=place,
        symbol=bare,
        reference=inspect.cleandoc(symbol.docstring),
        neighbour=_nearest(rest, bare),
        encoding=whole.encoding,
        own=FileContext(rest, budget=budget).hole(bare),
        paper=_alone(rest, bare),
    )


def without(whole: Scan, symbol: Symbol, other: Interpreter | None = None) -> Scan:
    """Return the file without one docstring, nor the blank lines below it; an empty body gets `pass`.

    Raises:
        NotRemovable: something else is on its lines, or what comes after it would become the docstring.
    """
    if symbol.docstring_span is None or not _has_own_lines(whole, symbol):
        raise NotRemovable("something else stands on the docstring's lines")
    text = whole.text
    start, end = _lines_of(text, symbol.docstring_span)
    if symbol.statements:
        blank = re.compile(r"(?:[ \t\f]*(?:\r\n|\r|\n))*").match(text, end)
        middle, end = "", end if blank is None else blank.end()
    else:
        middle = f"{symbol.indent}pass{symbol.newline}"
    try:
        rest = scanned(whole.encoded(text[:start] + middle + text[end:]), other)
    except Unreadable as err:
        raise NotRemovable(str(err)) from err
    name = (symbol.name, symbol.twin)
    expected = [(s.name, s.twin, None if (s.name, s.twin) == name else s.docstring) for s in whole.symbols]
    if [(s.name, s.twin, s.docstring) for s in rest.symbols] != expected:
        raise NotRemovable("what comes after it would become the docstring")
    return rest


def _has_own_lines(whole: Scan, symbol: Symbol) -> bool:
    """Whether nothing else stands on a docstring's lines but a comment, which is about it."""
    if symbol.docstring_span is None or symbol.insert_at is None:
        return False
    first, last = symbol.docstring_span
    start, end = _lines_of(whole.text, symbol.docstring_span)
    behind = whole.text[last:end].strip()
    return not whole.text[start:first].strip(" \t\f") and (not behind or behind.startswith("#"))


def _lines_of(text: str, span: tuple[int, int]) -> tuple[int, int]:
    first, last = span
    line_end = _LINE_END.search(text, last)
    return (
        max(text.rfind("\n", 0, first), text.rfind("\r", 0, first)) + 1,
        line_end.end() if line_end is not None else len(text),
    )


def _nearest(rest: Scan, symbol: Symbol) -> str:
    """Return what the nearest documented symbol of a file says, one of the same kind and class at best."""

    def distance(other: Symbol) -> tuple[bool, bool, int]:
        is_same_kind = (other.kind == "class") == (symbol.kind == "class")
        is_same_place = other.name.rpartition(".")[0] == symbol.name.rpartition(".")[0]
        return not is_same_kind, not is_same_place, abs(other.line - symbol.line)

    # Twins of one name often have one docstring; the prompt does not show it either.
    others = [s for s in rest.symbols if s.name not in ("", symbol.name) and s.is_documented]
    nearest = min(others, key=distance, default=None)
    return inspect.cleandoc(nearest.docstring or "") if nearest is not None else ""


def _alone(rest: Scan, symbol: Symbol) -> tuple[str, str]:
    """Return a symbol as CodeXGLUE has it: alone, from `def` on, without decorators, indented as it is."""
    text = rest.text
    starts = [0, *(found.end() for found in _LINE_END.finditer(text))]
    end = starts[symbol.end_line] if symbol.end_line < len(starts) else len(text)
    header = text[starts[symbol.line - 1] : symbol.insert_at].lstrip()
    return f"{_unix(header)}{symbol.indent}{QUOTES} ", f"\n{_unix(text[symbol.insert_at : end])}"


def _unix(text: str) -> str:
    return _LINE_END.sub("\n", text)


# Questions and grades


def question(case: Case, policy: Policy, form: Form) -> InfillRequest:
    """Return the one greedy request for a case; a prompt that is too long is cut far from the hole.

    Its key is made of its content: an evaluation that is done again takes the answers that are there.
    `Policy.salt` asks anew.
    """
    if form is Form.OWN:
        first = move(case.symbol, case.own, _once(policy), (), (), encoding=case.encoding).next
        assert isinstance(first, FirstAsk), "nothing is judged before it is asked"  # noqa: S101
        return first.questions[0].request
    prefix, suffix = case.paper
    request = InfillRequest(
        prefix=prefix,
        suffix=suffix,
        model=policy.model,
        sampling=Sampling(max_new_tokens=policy.summary_tokens, stop=(QUOTES,), seed=0),
        overflow=Overflow.TRUNCATE,
        priority=policy.priority,
    )
    digest = hashlib.sha256(f"{policy.salt}\0{request.content_sha256()}".encode()).hexdigest()
    return request.model_copy(update={"idempotency_key": f"backfill-eval:{digest}"})


def graded(case: Case, text: str, policy: Policy, *, is_truncated: bool = False) -> Grade:
    """Return how near a text comes to the docstring that was held back.

    Args:
        case: what was held back.
        text: without quotes; the measures see all of it even if it would be rejected.
        policy: what a text must be like to be accepted.
        is_truncated: it ended because its tokens were used up.
    """
    paragraph = metrics.first_paragraph(case.reference)
    answer = Answer(exchange=0, number=0, text=text, is_truncated=is_truncated)
    step = move(case.symbol, case.own, _once(policy), [answer], (), encoding=case.encoding)
    return Grade(
        is_exact=metrics.is_same(text, case.reference),
        bleu4=metrics.bleu4(metrics.first_line(text), paragraph),
        chrf=metrics.chrf(metrics.first_paragraph(text), paragraph),
        length=len(" ".join(text.split())),
        wanted_length=len(" ".join(case.reference.split())),
        reason=step.judged[0].reason,
    )


def _once(policy: Policy) -> Policy:
    return replace(policy, rounds=((0.0, 1),), candidates=1)


def name_in_words(symbol: Symbol) -> str:
    """Return a symbol's name as a sentence: `readHTTPHeader2` is "Read HTTP header 2."."""
    own = symbol.name.rpartition(".")[2]
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+", own) or [own]
    # Abbreviations keep their capitals.
    told = " ".join(part if len(part) > 1 and part.isupper() else part.lower() for part in parts)
    return f"{told[:1].upper()}{told[1:]}."


# The report


@dataclass(frozen=True, slots=True)
class Row:
    """One case with what was said."""

    case: Case
    reply: Reply
    grade: Grade

    def to_json(self) -> dict[str, Any]:
        """Return it for people who want to look at single answers."""
        place, grade = self.case.place, self.grade
        return {
            "path": place.path, "name": place.name, "twin": place.twin,
            "wanted": self.case.reference, "text": self.reply.text,
            "exact": grade.is_exact, "bleu4": grade.bleu4, "chrf": grade.chrf, "reason": grade.reason,
            "tokens": self.reply.tokens, "seconds": self.reply.seconds,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """How near a model comes, beside the baselines."""

    sample: Sample
    policy: Policy
    form: Form
    #: In the order of the cases.
    rows: tuple[Row, ...] = field(repr=False)
    #: By row, then by measure; None where nothing counts.
    scores: Mapping[str, Mapping[str, Interval | None]]
    #: The model less each baseline, case by case.
    leads: Mapping[str, Mapping[str, Interval | None]]
    #: Why texts of the model would not be written, most frequent first.
    rejected: Mapping[str, int]
    tokens: int
    #: Sum over all answers; they are given side by side.
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything but the single cases."""
        sample, policy = self.sample, self.policy
        return {
            "cases": len(self.rows), "files": self._files(),
            "model": policy.model, "form": self.form.value, "convention": policy.convention.value,
            "seed": sample.seed, "new_only": sample.is_new_only,
            "documented": sample.documented, "passed_over": dict(sample.passed_over),
            "unread_files": sample.unread,
            "scores": {row: _listed(found) for row, found in self.scores.items()},
            "leads": {row: _listed(found) for row, found in self.leads.items()},
            "rejected": dict(self.rejected), "tokens": self.tokens, "seconds": self.seconds,
            "notes": list(self._notes()),
        }  # fmt: skip

    def to_text(self) -> str:
        """Return a table for people; in per cent but for the length, a ratio."""
        head = f"{len(self.rows)} docstrings of {self._files()} files held back, seed {self.sample.seed}"
        lines = [
            f"{head}; {self.policy.model}, form {self.form}",
            "",
            _line("95 % intervals", MEASURES),
            *(_line(row, [_cell(found[m], m) for m in MEASURES]) for row, found in self.scores.items()),
            "",
            _line("model less", [m if m in _LEADS else "" for m in MEASURES]),
            *(
                _line(row, [_cell(found[m], m, sign="+") if m in found else "" for m in MEASURES])
                for row, found in self.leads.items()
            ),
            "",
            f"rejected: {', '.join(f'{why} {n}' for why, n in self.rejected.items()) or 'none'}",
            f"{self.tokens} tokens in {self.seconds:.1f} s of all answers together",
            *self._notes(),
        ]
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def _files(self) -> int:
        return len({row.case.place.path for row in self.rows})

    def _notes(self) -> Iterator[str]:
        if self.sample.is_new_only:
            yield "note: all are absent from the older tree; some may be in what the model has read even so."
        else:
            yield (
                "note: if this code is public the model may have read these very docstrings; "
                "`--new-since` takes only what an older tree lacks."
            )
        if self.sample.unread:
            yield f"note: {self.sample.unread} files could not be read."
        if self.form is Form.PAPER:
            told = ", ".join(f"{size} {bleu}" for size, bleu in PAPER_BLEU4.items())
            yield f"note: BLEU-4 in the Code Llama paper, on CodeXGLUE's functions: {told}."


def evaluate(
    held_back: Iterable[Case],
    ask: Ask,
    *,
    sample: Sample,
    policy: Policy,
    form: Form = Form.OWN,
    resamples: int = metrics.RESAMPLES,
) -> Report:
    """Ask for every case, grade the replies and the baselines, and count.

    A job that failed counts as an empty text.

    Args:
        held_back: from `cases`.
        ask: puts the questions to a model.
        sample: where the cases come from.
        policy: the model, and what a text must be like.
        form: how the questions are put.
        resamples: draws for an interval.

    Raises:
        ValueError: there are more replies than questions, or fewer.
    """
    all_cases = list(held_back)
    replies = list(ask([question(case, policy, form) for case in all_cases]))
    rows = tuple(
        Row(case, reply, _grade_of(case, reply, policy, form))
        for case, reply in zip(all_cases, replies, strict=True)
    )
    grades = {
        MODEL: [row.grade for row in rows],
        NAME: [graded(case, name_in_words(case.symbol), policy) for case in all_cases],
        NEIGHBOUR: [graded(case, case.neighbour, policy) for case in all_cases],
    }
    columns = {(row, m): column for row, given in grades.items() for m, column in _columns(given).items()}
    # What people would see; its cases are not the same for every model.
    columns |= {(ACCEPTED, m): column for m, column in _columns(grades[MODEL], accepted_only=True).items()}
    for baseline in (NAME, NEIGHBOUR):
        columns |= {
            (f"lead:{baseline}", m): _difference(columns[MODEL, m], columns[baseline, m]) for m in _LEADS
        }
    found = metrics.intervals(
        {f"{row}\0{m}": column for (row, m), column in columns.items()},
        seed=sample.seed,
        resamples=resamples,
    )
    reasons = Counter(row.grade.reason for row in rows if row.grade.reason is not None)
    return Report(
        sample=sample,
        policy=policy,
        form=form,
        rows=rows,
        scores={
            row: {m: found[f"{row}\0{m}"] for m in MEASURES} for row in (MODEL, ACCEPTED, NAME, NEIGHBOUR)
        },
        leads={row: {m: found[f"lead:{row}\0{m}"] for m in _LEADS} for row in (NAME, NEIGHBOUR)},
        rejected=dict(sorted(reasons.items(), key=lambda one: (-one[1], one[0]))),
        tokens=sum(row.reply.tokens for row in rows),
        seconds=sum(row.reply.seconds for row in rows),
    )


#: Measures that a model is compared with a baseline by.
_LEADS = ("exact", "BLEU-4", "chrF")


def _grade_of(case: Case, reply: Reply, policy: Policy, form: Form) -> Grade:
    if reply.error is not None:
        return replace(graded(case, "", policy), reason=f"failed: {reply.error}")
    if form is Form.OWN:
        return graded(case, reply.text, policy, is_truncated=reply.is_truncated)
    # The paper's prompt asks for a line; what the model says after it is cut.
    line, more, _ = reply.text.lstrip().partition("\n")
    return graded(case, line, policy, is_truncated=reply.is_truncated and not more)


def _columns(grades: Sequence[Grade], *, accepted_only: bool = False) -> dict[str, Column]:
    counted = [float(not accepted_only or grade.reason is None) for grade in grades]

    def mean(values: Iterable[float]) -> Column:
        return Column([v * c for v, c in zip(values, counted, strict=True)], counted)

    return {
        "exact": mean(grade.is_exact for grade in grades),
        "BLEU-4": mean(grade.bleu4 for grade in grades),
        "chrF": mean(grade.chrf for grade in grades),
        "length": Column(
            [g.length * c for g, c in zip(grades, counted, strict=True)],
            [g.wanted_length * c for g, c in zip(grades, counted, strict=True)],
        ),
        "accepted": mean(grade.reason is None for grade in grades),
    }


def _difference(one: Column, other: Column) -> Column:
    return Column.mean([a - b for a, b in zip(one.above, other.above, strict=True)])


def _listed(found: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {
        measure: None if one is None else {"value": one.value, "low": one.low, "high": one.high}
        for measure, one in found.items()
    }


def _line(head: str, cells: Sequence[str]) -> str:
    return f"{head:<18}" + "".join(f"{cell:>21}" for cell in cells)


def _cell(one: Interval | None, measure: str, *, sign: str = "") -> str:
    if one is None:
        return "-"
    numbers = (one.value, one.low, one.high)
    if measure == "length":
        value, low, high = (f"{number:.2f}" for number in numbers)
    else:
        value, low, high = (f"{100 * number:{sign}.1f}" for number in numbers)
    return f"{value} [{low}, {high}]"
