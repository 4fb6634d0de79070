from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from codeherd_producer.backfill.coverage import Count, Coverage, FileCount, Ignored, SkippedFile, measure
from codeherd_producer.backfill.ratchet import (
    Change,
    RatchetDiffers,
    RatchetUnreadable,
    Record,
    Verdict,
    hold,
    judge,
    read,
    write,
)


def coverage(*, skipped: tuple[str, ...] = (), **files: tuple[int, int]) -> Coverage:
    """Covered and total of files that are called by one letter."""
    counts = tuple(FileCount(total, covered, f"{name}.py") for name, (covered, total) in files.items())
    return Coverage(
        sum(count.total for count in counts),
        sum(count.covered for count in counts),
        counts,
        tuple(SkippedFile(path, "syntax: invalid") for path in skipped),
    )


def verdict(before: Coverage, now: Coverage) -> Verdict:
    record = judge(None, before, Ignored()).record
    return judge(record, now, Ignored()).verdict


def test_the_first_run_writes_the_file_and_the_next_one_holds(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"

    first = hold(path, coverage(b=(1, 2), a=(3, 3)), Ignored(magic=True))

    assert (first.verdict, first.before, first.now) == (Verdict.STARTED, None, Count(5, 4))
    assert path.read_text() == (
        '{\n  "ignoring": [\n    "--ignore-magic"\n  ],\n'
        '  "files": {\n    "a.py": "3/3",\n    "b.py": "1/2"\n  }\n}\n'
    )
    written = path.stat().st_ino
    second = hold(path, coverage(b=(1, 2), a=(3, 3)), Ignored(magic=True))
    assert (second.verdict, second.before, second.worse) == (Verdict.HELD, Count(5, 4), ())
    assert path.stat().st_ino == written, "a file that holds is not written again"


def test_a_fall_is_told_with_its_files_and_leaves_the_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"
    hold(path, coverage(a=(8, 10), b=(5, 5), c=(1, 3)), Ignored())
    before = path.read_bytes()

    turn = hold(path, coverage(a=(8, 11), b=(5, 5), c=(1, 2), d=(0, 3)), Ignored())

    assert (turn.verdict, turn.before, turn.now) == (Verdict.FELL, Count(18, 14), Count(21, 14))
    assert turn.worse == (
        Change("d.py", None, Count(3, 0)),
        Change("a.py", Count(10, 8), Count(11, 8)),
    )
    assert path.read_bytes() == before


def test_better_coverage_is_written_and_cannot_be_lost_again(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"
    hold(path, coverage(a=(8, 10)), Ignored())

    assert hold(path, coverage(a=(9, 10)), Ignored()).verdict == Verdict.BETTER

    assert read(path) == Record((), {"a.py": Count(10, 9)})
    assert hold(path, coverage(a=(8, 10)), Ignored()).verdict == Verdict.FELL


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (coverage(a=(80, 100)), Verdict.HELD),
        (coverage(a=(79, 100)), Verdict.FELL),
        (coverage(a=(80, 101)), Verdict.FELL),
        (coverage(a=(81, 101)), Verdict.BETTER),
        (coverage(a=(80, 99)), Verdict.BETTER),
        # Deleted: documented code alone, half of everything, everything that was documented.
        (coverage(a=(70, 90)), Verdict.HELD),
        (coverage(a=(40, 50)), Verdict.BETTER),
        (coverage(a=(0, 20)), Verdict.HELD),
        # Grown: fully documented, with one gap, as well as before, and worse.
        (coverage(a=(180, 200)), Verdict.BETTER),
        (coverage(a=(179, 200)), Verdict.BETTER),
        (coverage(a=(160, 200)), Verdict.HELD),
        (coverage(a=(159, 200)), Verdict.FELL),
        # Moved to another file, and a file with another name.
        (coverage(a=(80, 80), b=(0, 20)), Verdict.HELD),
        # A gain in one file pays for a loss in another.
        (coverage(a=(70, 100), b=(60, 60)), Verdict.BETTER),
    ],
)
def test_coverage_fell_when_the_share_is_smaller_and_more_is_missing(
    now: Coverage, expected: Verdict
) -> None:
    assert verdict(coverage(a=(80, 100)), now) == expected


def test_the_record_follows_only_what_is_better() -> None:
    record = judge(None, coverage(a=(8, 10)), Ignored()).record

    assert judge(record, coverage(a=(7, 10)), Ignored()).record == record
    assert judge(record, coverage(a=(7, 9)), Ignored()).record == record
    assert judge(record, coverage(a=(9, 10)), Ignored()).record.files == {"a.py": Count(10, 9)}


def test_a_renamed_file_changes_nothing() -> None:
    assert verdict(coverage(a=(1, 9), b=(5, 5)), coverage(z=(1, 9), b=(5, 5))) == Verdict.HELD


def test_shares_are_compared_exactly_and_not_as_rounded_percentages() -> None:
    many = 10**17

    assert verdict(coverage(a=(many, many)), coverage(a=(many, many + 1))) == Verdict.FELL
    assert verdict(coverage(a=(many, many + 1)), coverage(a=(many, many))) == Verdict.BETTER


def test_nothing_to_count_is_all_covered() -> None:
    assert verdict(coverage(a=(0, 0)), coverage(a=(0, 1))) == Verdict.FELL
    assert verdict(coverage(a=(0, 1)), coverage(a=(0, 0))) == Verdict.BETTER
    assert verdict(coverage(), coverage(a=(0, 1))) == Verdict.FELL


def test_a_file_that_can_no_longer_be_read_counts_as_it_did(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"
    hold(path, coverage(a=(0, 10), b=(9, 10)), Ignored())

    broken = hold(path, coverage(skipped=("a.py",), b=(9, 10)), Ignored())
    better = hold(path, coverage(skipped=("a.py",), b=(10, 10)), Ignored())

    assert (broken.verdict, broken.now) == (Verdict.HELD, Count(20, 9))
    assert better.verdict == Verdict.BETTER
    assert read(path) == Record((), {"a.py": Count(10, 0), "b.py": Count(10, 10)})


def test_a_folder_that_can_no_longer_be_listed_keeps_its_files() -> None:
    record = Record((), {"pkg/a.py": Count(2, 1), "pkg2/a.py": Count(2, 1), "b.py": Count(2, 2)})

    turn = judge(record, coverage(skipped=("pkg",), b=(2, 2)), Ignored())

    assert turn.now == Count(4, 3)


def test_other_flags_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"
    hold(path, coverage(a=(1, 2)), Ignored(magic=True, regex=[re.compile("get")]))

    with pytest.raises(RatchetDiffers) as caught:
        hold(path, coverage(a=(1, 2)), Ignored())

    assert caught.value.message == (
        "the ratchet counts with --ignore-magic --ignore-regex=get, this run with no flags"
    )


@pytest.mark.parametrize("now", [coverage(), coverage(z=(5, 5))])
def test_another_folder_is_an_error_and_never_a_better_coverage(tmp_path: Path, now: Coverage) -> None:
    path = tmp_path / "docstrings.json"
    hold(path, coverage(a=(1, 2)), Ignored())
    before = path.read_bytes()

    with pytest.raises(RatchetDiffers, match="none of the 1 recorded files"):
        hold(path, now, Ignored())

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<<<<<<< HEAD\n{}",
        "\xff\xfe",
        "[]",
        "{}",
        '{"ignoring": [], "files": []}',
        '{"ignoring": "", "files": {}}',
        '{"ignoring": [], "files": {"a.py": 3}}',
        '{"ignoring": [], "files": {"a.py": "3"}}',
        '{"ignoring": [], "files": {"a.py": "4/3"}}',
        '{"ignoring": [], "files": {"a.py": "-1/3"}}',
        '{"ignoring": [], "files": {"a.py": "1/3 "}}',
    ],
)
def test_a_broken_file_is_an_error_and_is_not_written_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "docstrings.json"
    path.write_text(text, encoding="latin-1")

    with pytest.raises(RatchetUnreadable):
        hold(path, coverage(a=(1, 2)), Ignored())

    assert path.read_text(encoding="latin-1") == text


def test_any_path_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "docstrings.json"
    names = ['q"uo\\te.py', "ä.py", "raw\udcff.py", "line\nbreak.py"]

    write(path, Record(("--ignore-regex=ä",), {name: Count(2, 1) for name in names}))

    assert read(path) == Record(("--ignore-regex=ä",), {name: Count(2, 1) for name in sorted(names)})
    assert path.read_bytes().isascii()
    assert list(json.loads(path.read_bytes())["files"]) == sorted(names)


def test_a_link_stays_a_link_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("real/docstrings.json")

    hold(link, coverage(a=(1, 2)), Ignored())
    hold(link, coverage(a=(2, 2)), Ignored())

    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["docstrings.json"]
    assert read(link) == Record((), {"a.py": Count(2, 2)})


def test_a_file_that_cannot_be_written_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()

    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder.json", Record((), {}))

    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_branches_that_document_different_files_merge_without_a_conflict(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        settings = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, capture_output=True, check=True)

    def document(name: str) -> None:
        (tmp_path / name).write_text("'''Doc.'''\n")
        hold(tmp_path / "docstrings.json", measure(tmp_path, Ignored()), Ignored())
        git("add", ".")
        git("commit", "-m", name)

    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    git("init", "--initial-branch=main")
    hold(tmp_path / "docstrings.json", measure(tmp_path, Ignored()), Ignored())
    git("add", ".")
    git("commit", "-m", "start")

    git("checkout", "-b", "other")
    document("a.py")
    git("checkout", "main")
    document("d.py")
    git("merge", "other")

    turn = hold(tmp_path / "docstrings.json", measure(tmp_path, Ignored()), Ignored())
    assert (turn.verdict, turn.before) == (Verdict.HELD, Count(4, 2))
