from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer.backfill.docstrings import Convention
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.outcome import EditedFile, LeftAlone, Loss, edited_file, edited_files
from codeherd_producer.backfill.run import Backfill, Limits
from codeherd_producer.backfill.selection import Selection
from codeherd_producer.client import Client
from codeherd_schema.backfills import Backfills, FileState, Progress, Run, RunState, TargetState
from codeherd_schema.requests import InfillRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from codeherd_schema.store import Commit, Store
from tests.by_hand import claim, result_of
from tests.null_engine import sentence

FILES = {
    "one.py": "def first(a, b):\n    return a + b\n\n\nclass Second:\n    def third(self):\n"
    "        return 3\n",
    "two.py": "def fourth(x):\r\n    return x\r\n",
    "sub/three.py": '"""Documented."""\n\n\ndef fifth():\n    """Say five."""\n    return 5\n',
    "broken.py": "def (:\n",
}
#: Of the above, those that lack a docstring and are wanted.
TARGETS = 4
Source = Callable[[InfillRequest, int], str]


def fine(request: InfillRequest, seed: int) -> str:
    """Give a sentence that follows from the prompt."""
    return sentence(f"{request.prefix}{request.suffix}{seed}")


def hopeless(request: InfillRequest, seed: int) -> str:
    return "Description here."


def fine_when_sampled(request: InfillRequest, seed: int) -> str:
    return fine(request, seed) if request.sampling.temperature else "Description here."


class Killed(BaseException):
    """What ends a process."""


@dataclass
class Bench:
    """A folder, a database, and a worker that runs whatever is queued when it is told to."""

    client: Client
    store: Store
    rows: Backfills
    root: Path
    source: Source = fine
    fails: bool = False
    #: Jobs that were run.
    ran: list[str] = field(default_factory=list)

    def options(self, **more: Any) -> Options:
        return Options(model="tiny", context_chars=2_000, **more)

    def create(self, options: Options | None = None) -> Run:
        chosen = options or self.options()
        return self.rows.create(str(self.root), chosen.model, chosen.model_dump(mode="json"))

    def carry(self, run: Run, rows: Backfills | None = None, **how: Any) -> RunState:
        work = Backfill(self.client, rows or self.rows, self.rows.get(run.id), turn_s=0.0)
        if self.rows.get(run.id).state is RunState.PLANNING:
            work.plan()
        return work.work(told=self.work, **how)

    def work(self, _: Progress | None = None) -> None:
        """Run every queued job."""
        for job in self.store.list(state=JobState.QUEUED, limit=1_000):
            claimed = claim(self.store, job.id)
            self.ran.append(job.id)
            if self.fails:
                self.store.fail(claimed, code="out_of_memory", message="no room")
                continue
            request = claimed.job.request
            assert isinstance(request, InfillRequest)
            seed = request.sampling.seed or 0
            texts = [self.source(request, seed + index) for index in range(request.sampling.n)]
            whole = result_of(claimed, "")
            [one] = whole.candidates
            candidates = [
                one.model_copy(update={"index": i, "text": text, "seed": seed + i})
                for i, text in enumerate(texts)
            ]
            result = whole.model_copy(update={"candidates": tuple(candidates)})
            assert self.store.succeed(claimed, result) is Commit.STORED

    def edited(self, run: Run) -> dict[str, bytes]:
        found = {}
        for one in edited_files(self.rows, run):
            assert isinstance(one, EditedFile)
            found[one.file.path] = one.after
        return found

    def states(self, run: Run) -> dict[str, FileState]:
        return {file.path: file.state for file in self.rows.files(run.id, states=list(FileState))}


@pytest.fixture
def bench(database_url: str, store: Store, tmp_path: Path) -> Iterator[Bench]:
    root = tmp_path / "project"
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    settings = SharedSettings.model_validate({"database_url": database_url, "poll_interval_s": 0.02})
    with Client(settings, publish=False) as client, contextlib.closing(Backfills.open(database_url)) as rows:
        yield Bench(client, store, rows, root)


def test_a_run_documents_what_lacks_a_docstring_and_leaves_the_rest(bench: Bench) -> None:
    run = bench.create()

    assert bench.carry(run) is RunState.DONE

    assert bench.states(run) == {
        "broken.py": FileState.SKIPPED,
        "one.py": FileState.DONE,
        "sub/three.py": FileState.DONE,
        "two.py": FileState.DONE,
    }
    progress = bench.rows.progress(run.id)
    assert progress.targets == {TargetState.OPEN: 0, TargetState.ACCEPTED: TARGETS, TargetState.REJECTED: 0}
    assert (progress.asked, progress.ended, len(bench.ran)) == (TARGETS, TARGETS, TARGETS)
    edited = bench.edited(run)
    assert list(edited) == ["one.py", "two.py"]
    assert edited["two.py"].count(b"\r\n") == edited["two.py"].count(b"\n") == 3
    assert edited["one.py"].count(b'"""') == 6
    [job] = {bench.client.row(job_id).run_id for job_id in bench.ran}
    assert job == run.id


def test_a_second_run_over_what_was_given_asks_nothing(bench: Bench) -> None:
    first = bench.create()
    bench.carry(first)
    for path, content in bench.edited(first).items():
        (bench.root / path).write_bytes(content)
    ran = len(bench.ran)

    second = bench.create()
    assert bench.carry(second) is RunState.DONE

    assert len(bench.ran) == ran
    assert bench.rows.progress(second.id).asked == 0
    assert bench.edited(second) == {}


def test_a_run_over_the_same_code_takes_the_texts_that_are_there(bench: Bench) -> None:
    first, second, third = bench.create(), bench.create(), bench.create(bench.options(salt="anew"))
    bench.carry(first)
    bench.carry(second)
    assert len(bench.ran) == TARGETS
    bench.carry(third)

    assert len(bench.ran) == 2 * TARGETS
    assert bench.edited(first) == bench.edited(second)


class Fragile(Backfills):
    """Dies before or after the n-th write."""

    def prepare(self, n: int, *, is_after: bool) -> None:
        self.left, self.is_after = n, is_after

    def _through(self, call: Callable[[], Any]) -> Any:
        self.left -= 1
        if self.left == 0 and not self.is_after:
            raise Killed
        answer = call()
        if self.left == 0:
            raise Killed
        return answer

    def add_files(self, *a: Any, **k: Any) -> Any:
        return self._through(lambda: super(Fragile, self).add_files(*a, **k))

    def ask(self, *a: Any, **k: Any) -> Any:
        return self._through(lambda: super(Fragile, self).ask(*a, **k))

    def settle(self, *a: Any, **k: Any) -> Any:
        return self._through(lambda: super(Fragile, self).settle(*a, **k))

    def set_state(self, *a: Any, **k: Any) -> Any:
        return self._through(lambda: super(Fragile, self).set_state(*a, **k))

    def replan(self, *a: Any, **k: Any) -> Any:
        return self._through(lambda: super(Fragile, self).replan(*a, **k))


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_a_run_killed_at_any_write_comes_to_the_same_end_and_asks_nothing_twice(
    bench: Bench, database_url: str, is_after: bool
) -> None:
    bench.source = fine_when_sampled
    calm = bench.create(bench.options(convention=Convention.GOOGLE))
    bench.carry(calm)
    expected, questions = bench.edited(calm), len(bench.ran)
    assert questions > 2 * TARGETS
    kills = 0
    with contextlib.closing(Fragile.open(database_url)) as fragile:
        while True:
            bench.ran.clear()
            run = bench.create(bench.options(convention=Convention.GOOGLE, salt=f"{kills}"))
            fragile.prepare(kills + 1, is_after=is_after)
            try:
                bench.carry(run, fragile)
            except Killed:
                kills += 1
                assert bench.carry(run) is RunState.DONE
            else:
                break
            assert len(bench.ran) == len(set(bench.ran)) == questions
            assert {path: len(after) for path, after in bench.edited(run).items()}.keys() == expected.keys()
            again = bench.create(bench.options(convention=Convention.GOOGLE, salt=f"{kills - 1}"))
            bench.carry(again)
            assert len(bench.ran) == questions
            assert bench.edited(again) == bench.edited(run)
    # Plan, start, two files of two questions and verdicts each at the least.
    assert kills >= 8


def test_a_text_that_is_rejected_is_asked_for_again_and_all_are_kept(bench: Bench) -> None:
    bench.source = fine_when_sampled
    run = bench.create()

    bench.carry(run)

    assert bench.rows.progress(run.id).targets[TargetState.ACCEPTED] == TARGETS
    [(_, target)] = bench.rows.targets_named(run.id, "Second.third")
    texts = bench.rows.candidates(target.id)
    assert (texts[0].exchange, texts[0].reason) == (0, "placeholder")
    assert [one.exchange for one in texts[1:]] == [1, 1]
    assert target.text in {one.text for one in texts}


def test_what_gets_no_good_text_is_left_with_the_reason(bench: Bench) -> None:
    bench.source = hopeless
    run = bench.create()

    assert bench.carry(run) is RunState.DONE

    assert bench.rows.reasons(run.id) == {"placeholder": TARGETS}
    assert bench.edited(run) == {}


def test_a_job_that_failed_is_a_reason_and_runs_again_for_the_next_run(bench: Bench) -> None:
    bench.fails = True
    run = bench.create()
    assert bench.carry(run) is RunState.DONE
    assert bench.rows.reasons(run.id) == {"out_of_memory": TARGETS}

    bench.fails = False
    again = bench.create()
    bench.carry(again)

    assert bench.rows.progress(again.id).targets[TargetState.ACCEPTED] == TARGETS


def test_a_file_that_changes_while_its_jobs_run_is_left_alone(bench: Bench) -> None:
    run = bench.create()
    Backfill(bench.client, bench.rows, run).plan()
    assert bench.carry(run, limits=Limits(jobs=TARGETS)) is RunState.STOPPED
    (bench.root / "two.py").write_bytes(b"def other(): ...\n")

    assert bench.carry(run) is RunState.DONE

    assert bench.states(run)["two.py"] is FileState.CHANGED
    assert list(bench.edited(run)) == ["one.py"]


def test_a_file_that_changes_before_anything_is_asked_for_it_is_planned_anew(
    bench: Bench,
) -> None:
    run = bench.create()
    Backfill(bench.client, bench.rows, run).plan()
    before = bench.rows.file(run.id, "two.py")
    (bench.root / "one.py").write_bytes(b'def first(a, b):\n    """Add them."""\n    return a + b\n')
    (bench.root / "two.py").write_bytes(b"\r\n\r\ndef fifth(y):\r\n    return y\r\n")
    (bench.root / "sub" / "three.py").unlink()

    assert bench.carry(run) is RunState.DONE

    assert bench.states(run) == {
        "broken.py": FileState.SKIPPED,
        "one.py": FileState.DONE,
        # Without a target it was done when it was planned.
        "sub/three.py": FileState.DONE,
        "two.py": FileState.DONE,
    }
    after = bench.rows.file(run.id, "two.py")
    assert before is not None
    assert after is not None
    assert after.sha256 != before.sha256
    [target] = bench.rows.targets(after.id)
    assert (target.name, target.line) == ("fifth", 3)
    assert len(bench.ran) == bench.rows.progress(run.id).asked == 1
    assert bench.edited(run)["two.py"].startswith(b'\r\n\r\ndef fifth(y):\r\n    """')
    # What a new run makes of it.
    anew = bench.create()
    bench.carry(anew)
    assert bench.edited(anew) == bench.edited(run)


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_a_run_killed_where_a_file_is_planned_anew_comes_to_the_same_end(
    bench: Bench, database_url: str, is_after: bool
) -> None:
    run = bench.create()
    Backfill(bench.client, bench.rows, run).plan()
    (bench.root / "two.py").write_bytes(b"def fifth(y):\n    return y\n")
    with contextlib.closing(Fragile.open(database_url)) as fragile:
        # To be running, and the verdicts and questions of one.py, come before.
        fragile.prepare(4, is_after=is_after)
        with pytest.raises(Killed):
            bench.carry(run, fragile)
    file = bench.rows.file(run.id, "two.py")
    assert file is not None
    assert [one.name for one in bench.rows.targets(file.id)] == ["fifth" if is_after else "fourth"]

    assert bench.carry(run) is RunState.DONE

    assert bench.states(run)["two.py"] is FileState.DONE
    assert len(bench.ran) == len(set(bench.ran)) == TARGETS
    assert b'def fifth(y):\n    """' in bench.edited(run)["two.py"]


def test_a_file_that_is_gone_before_anything_is_asked_is_left_alone(bench: Bench) -> None:
    run = bench.create()
    Backfill(bench.client, bench.rows, run).plan()
    (bench.root / "two.py").unlink()

    assert bench.carry(run) is RunState.DONE

    gone = bench.rows.file(run.id, "two.py")
    assert gone is not None
    assert (gone.state, gone.reason) == (FileState.CHANGED, "changed since it was planned; cannot be read")


# Files that were changed when all texts were there.

#: `one.py` with another function first, and another body of the method.
OTHER_ONE = "import os\n\n\ndef zeroth():\n    return os.sep\n\n\n" + FILES["one.py"].replace("3\n", "4\n")


def text_of(bench: Bench, run: Run, name: str) -> str:
    [(_, target)] = bench.rows.targets_named(run.id, name)
    assert target.text is not None
    return target.text


def handed(bench: Bench, run: Run, path: str) -> EditedFile | LeftAlone:
    """What becomes of one file now."""
    file = bench.rows.file(run.id, path)
    assert file is not None
    return edited_file(bench.rows, run, file)


def test_texts_are_carried_over_to_symbols_whose_code_is_the_same(bench: Bench) -> None:
    run = bench.create()
    bench.carry(run)
    (bench.root / "one.py").write_text(OTHER_ONE)

    found = handed(bench, run, "one.py")

    assert isinstance(found, EditedFile)
    assert found.before == OTHER_ONE.encode()
    header = "def first(a, b):\n"
    text = text_of(bench, run, "first")
    assert found.after.decode() == OTHER_ONE.replace(header, f'{header}    """{text}"""\n')
    assert (found.is_carried, found.names) == (True, ("first",))
    # The class around another method is another class.
    assert found.lost == {Loss.CHANGED: 2}
    assert handed(bench, run, "one.py") == found


def test_what_was_carried_over_is_there_the_next_time_and_the_rest_is_still_left(bench: Bench) -> None:
    run = bench.create()
    bench.carry(run)
    (bench.root / "one.py").write_text(OTHER_ONE)
    first = handed(bench, run, "one.py")
    assert isinstance(first, EditedFile)
    (bench.root / "one.py").write_bytes(first.after)

    again = handed(bench, run, "one.py")

    assert isinstance(again, LeftAlone)
    assert not again.has_docstrings
    assert again.lost == {Loss.DOCUMENTED: 1, Loss.CHANGED: 2}


def test_another_order_other_line_ends_and_blank_lines_are_no_other_code(bench: Bench) -> None:
    run = bench.create()
    bench.carry(run)
    function, _, rest = FILES["one.py"].partition("\n\n\n")
    turned = f"{rest}\n\n\n\n{function}\n".replace("\n", "\r\n")
    (bench.root / "one.py").write_bytes(turned.encode())

    found = handed(bench, run, "one.py")

    assert isinstance(found, EditedFile)
    assert (found.names, found.lost) == (("Second", "Second.third", "first"), {})
    assert found.after.count(b"\n") == found.after.count(b"\r\n") == turned.count("\n") + 4
    (bench.root / "one.py").write_bytes(found.after)
    assert handed(bench, run, "one.py") == LeftAlone(found.file, has_docstrings=True)


def test_a_symbol_that_got_a_docstring_meanwhile_keeps_it_and_the_class_around_gets_its_own(
    bench: Bench,
) -> None:
    run = bench.create()
    bench.carry(run)
    mine = FILES["one.py"].replace("        return 3", '        """Mine."""\n        return 3')
    (bench.root / "one.py").write_text(mine)

    found = handed(bench, run, "one.py")

    assert isinstance(found, EditedFile)
    assert (found.names, found.lost) == (("first", "Second"), {Loss.DOCUMENTED: 1})
    assert b'        """Mine."""\n        return 3\n' in found.after


def test_twins_are_told_apart_by_number_and_code(bench: Bench) -> None:
    (bench.root / "two.py").unlink()
    twins = "if 1:\n    def f(x):\n        return x\nelse:\n    def f(x):\n        return -x\n"
    (bench.root / "one.py").write_text(twins)
    run = bench.create()
    bench.carry(run)
    texts = [target.text for _, target in bench.rows.targets_named(run.id, "f")]

    (bench.root / "one.py").write_text(f"import os\n{twins}")
    moved = handed(bench, run, "one.py")
    (bench.root / "one.py").write_text(twins.replace("return x", "return 1"))
    changed = handed(bench, run, "one.py")
    (bench.root / "one.py").write_text(f"def f(x):\n    return 0\n{twins}")
    shifted = handed(bench, run, "one.py")
    (bench.root / "one.py").write_text("if 1:\n    def f(x):\n        return x\n")
    shorter = handed(bench, run, "one.py")

    assert isinstance(moved, EditedFile)
    assert re.findall('"""(.*)"""', moved.after.decode()) == texts
    assert isinstance(changed, EditedFile)
    assert re.findall('"""(.*)"""', changed.after.decode()) == texts[1:]
    assert changed.lost == {Loss.CHANGED: 1}
    # Numbers are another's now: nobody gets what was written for somebody else.
    assert isinstance(shifted, LeftAlone)
    assert shifted.lost == {Loss.CHANGED: 2}
    assert isinstance(shorter, EditedFile)
    assert shorter.lost == {Loss.GONE: 1}
    assert re.findall('"""(.*)"""', shorter.after.decode()) == texts[:1]


@pytest.mark.parametrize(
    ("now", "reason", "lost"),
    [
        (None, "cannot be read", {}),
        (b"def (:\n", "syntax: invalid syntax", {}),
        (b"# backfill: skip-file\ndef fourth(x):\n    return x\n", "marked in its head", {}),
        (
            b"# backfill: skip\ndef fourth(x):\n    return x\n",
            "none of its symbols can take a text",
            {Loss.UNWANTED: 1},
        ),
        (b"def fifth(x):\n    return x\n", "none of its symbols can take a text", {Loss.GONE: 1}),
        (
            # Latin-1 has no Ω.
            b"# coding: latin-1\ndef fourth(x):\n    return x\n",
            "none of its symbols can take a text",
            {Loss.UNSAFE: 1},
        ),
    ],
    ids=["gone", "broken", "file marked", "marked", "renamed", "other encoding"],
)
def test_a_file_without_a_place_for_any_text_is_left_alone(
    bench: Bench, now: bytes | None, reason: str, lost: dict[Loss, int]
) -> None:
    bench.source = lambda request, seed: fine(request, seed).replace(".", " of Ω.")
    run = bench.create()
    bench.carry(run)
    if now is None:
        (bench.root / "two.py").unlink()
    else:
        (bench.root / "two.py").write_bytes(now)

    found = handed(bench, run, "two.py")

    assert found == LeftAlone(found.file, reason=reason, lost=lost)


def test_files_that_only_the_other_interpreter_reads_are_carried_over_by_it(
    bench: Bench, newer_python: Path
) -> None:
    function = "\n\ndef sixth():\n    return os.sep\n"
    (bench.root / "newer.py").write_text(f"import os\nnewtype X = int\n{function}")
    run = bench.create(bench.options(python=str(newer_python)))
    bench.carry(run)
    text = text_of(bench, run, "sixth")
    (bench.root / "newer.py").write_text(f"import os\nnewtype X = int\nnewtype X = str\n{function}")
    # One that both read has become one of the other's.
    (bench.root / "two.py").write_text("newtype X = int\n\n\n" + FILES["two.py"].replace("\r\n", "\n"))

    found = handed(bench, run, "newer.py")
    other = handed(bench, run, "two.py")

    assert isinstance(found, EditedFile)
    assert found.after.decode().endswith(
        f'newtype X = str\n\n\ndef sixth():\n    """{text}"""\n    return os.sep\n'
    )
    assert isinstance(other, EditedFile)
    assert other.names == ("fourth",)


def test_a_file_that_changes_after_its_texts_came_is_left_alone_unless_it_has_them(bench: Bench) -> None:
    run = bench.create()
    bench.carry(run)
    edited = bench.edited(run)
    (bench.root / "one.py").write_bytes(edited["one.py"])
    (bench.root / "two.py").write_bytes(b"def fourth(x):\n    return x + 1\n")

    found = list(edited_files(bench.rows, run))

    assert [(one.file.path, one.has_docstrings) for one in found if isinstance(one, LeftAlone)] == [
        ("one.py", True),
        ("two.py", False),
    ]
    assert len(found) == 2


def test_a_budget_ends_the_work_and_a_resumed_run_asks_only_the_rest(bench: Bench) -> None:
    run = bench.create()
    assert bench.carry(run, limits=Limits(jobs=1)) is RunState.STOPPED
    assert bench.rows.get(run.id).state is RunState.STOPPED
    # One file was begun, and is asked as a whole.
    assert list(bench.states(run).values()).count(FileState.ASKED) == 1
    bench.work()

    assert bench.carry(run) is RunState.DONE

    assert len(bench.ran) == len(set(bench.ran)) == TARGETS


def test_texts_of_earlier_runs_cost_nothing_of_a_budget(bench: Bench) -> None:
    bench.carry(bench.create())
    again = bench.create()

    assert bench.carry(again, limits=Limits(jobs=1)) is RunState.DONE

    assert len(bench.ran) == TARGETS
    assert bench.rows.progress(again.id).targets[TargetState.ACCEPTED] == TARGETS


def test_two_processes_on_one_run_do_no_harm(bench: Bench, database_url: str) -> None:
    run = bench.create()
    work = Backfill(bench.client, bench.rows, run, turn_s=0.0)
    work.plan()

    with contextlib.closing(Backfills.open(database_url)) as rows:
        other = Backfill(bench.client, rows, run, turn_s=0.0)

        def both(progress: Progress) -> None:
            bench.work(progress)
            other.work(limits=Limits(seconds=0))

        assert work.work(told=both) is RunState.DONE

    assert len(bench.ran) == len(set(bench.ran)) == TARGETS
    assert bench.rows.progress(run.id).asked == TARGETS


def test_several_candidates_are_ranked_and_kept_with_their_scores(bench: Bench) -> None:
    run = bench.create(bench.options(candidates=3))

    bench.carry(run)

    [(_, target)] = bench.rows.targets_named(run.id, "first")
    texts = bench.rows.candidates(target.id)
    assert len(texts) == 3
    assert all({*one.score_parts} == {"consensus", "likelihood", "length"} for one in texts)
    assert target.score is not None


def test_options_are_the_same_after_they_were_kept() -> None:
    kinds = Selection(magic=True, min_lines=3, include=(re.compile("^a"), re.compile("(?i)b")))
    options = Options(model="tiny", context_chars=500, kinds=kinds, convention=Convention.NUMPY)

    kept = options.model_dump(mode="json")
    again = Options.model_validate(json.loads(json.dumps(kept)))
    assert again.model_dump(mode="json") == kept
    assert (again.kinds.magic, again.kinds.min_lines) == (True, 3)
    assert list(again.kinds.include) == list(kinds.include)
    assert again.convention is Convention.NUMPY


def test_syntax_that_is_unknown_here_is_documented_and_proven_by_the_other_interpreter(
    bench: Bench, newer_python: Path
) -> None:
    (bench.root / "newer.py").write_bytes(
        b"import os\nnewtype X = int\n\n\ndef sixth():\n    return os.sep\n"
    )
    without = bench.create()
    bench.carry(without)
    assert bench.states(without)["newer.py"] is FileState.SKIPPED

    run = bench.create(bench.options(python=str(newer_python)))
    bench.carry(run)

    assert bench.states(run)["newer.py"] is FileState.DONE
    after = bench.edited(run)["newer.py"]
    assert after.startswith(b'import os\nnewtype X = int\n\n\ndef sixth():\n    """')
    assert after.endswith(b'"""\n    return os.sep\n')


def test_a_body_on_its_headers_line_is_shown_and_written_with_lines_of_its_own(bench: Bench) -> None:
    (bench.root / "one.py").write_bytes(b"def first(a): return a  # noqa\n\n\nclass Second: x = 1\n")
    (bench.root / "two.py").unlink()
    run = bench.create(bench.options(kinds={"one_liners": True}))

    assert bench.carry(run) is RunState.DONE

    lines = bench.edited(run)["one.py"].decode().splitlines()
    assert [line for line in lines if '"""' not in line] == [
        "def first(a):",
        "    return a  # noqa",
        "",
        "",
        "class Second:",
        "",
        "    x = 1",
    ]
    # The newest job is run first.
    request = bench.client.row(bench.ran[-1]).request
    assert isinstance(request, InfillRequest)
    assert request.prefix.endswith('def first(a):\n    """')
    assert request.suffix.startswith('"""\n    return a  # noqa\n')


def test_a_text_that_cannot_be_put_into_its_file_is_rejected_and_the_others_are_written(bench: Bench) -> None:
    # Latin-1 has no character for what the second one says; the dialog sees that, the proof would too.
    (bench.root / "one.py").write_bytes(
        "# coding: latin-1\ndef first(a):\n    return 'é'\n\n\ndef second(a):\n    return 2\n".encode(
            "latin-1"
        )
    )
    (bench.root / "two.py").unlink()
    bench.source = lambda request, seed: (
        "Return the Ω of it all." if "def second(a):\n" in request.prefix[-40:] else fine(request, seed)
    )
    run = bench.create()

    bench.carry(run)

    counts = bench.rows.progress(run.id).targets
    assert (counts[TargetState.ACCEPTED], counts[TargetState.REJECTED]) == (1, 1)
    assert bench.edited(run)["one.py"].count(b'"""') == 2
