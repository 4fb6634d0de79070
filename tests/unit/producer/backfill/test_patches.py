from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codeherd_producer.backfill.git import Git
from codeherd_producer.backfill.patches import unified


def git(folder: Path, *arguments: str, given: bytes | None = None) -> bytes:
    return subprocess.run(
        ["git", *arguments], cwd=folder, input=given, capture_output=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    git(folder, "init", "--quiet")
    return folder


def applied(repository: Path, path: str, before: bytes, patch: bytes) -> bytes:
    file = repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(before)
    try:
        git(repository, "apply", "--check", given=patch)
        git(repository, "apply", given=patch)
        return file.read_bytes()
    finally:
        file.unlink()


#: What files are made of: all line ends, a form feed, Latin-1, a byte order mark, and what diffs are made of.
PIECES = (
    *(b"\n", b"\r\n", b"\r", b"\n\n", b"    x = 1\n", b"    x = 1\r\n", b"\tpass\n", b"\x0c", b"\xe9"),
    *(b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x85", b"-- \n", b"+++ b/a\n", b"@@ -1 +1 @@\n", b"\\ No newline"),
    *(b" ", b"def f():\n", b"diff --git a/x b/x\n"),
)
contents = st.lists(
    st.one_of(st.sampled_from(PIECES), st.binary(max_size=4).map(lambda raw: raw.replace(b"\0", b"0"))),
    max_size=40,
)
insertions = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.sampled_from(PIECES), max_size=5)), max_size=5
)
#: Names of one part that a file can have, as `os.fsdecode` gives them.
names = (
    st.binary(min_size=1, max_size=40)
    .filter(
        lambda raw: not {0, ord("/")} & set(raw) and raw not in (b".", b"..") and b"git" not in raw.lower()
    )
    .map(os.fsdecode)
)


@given(contents, insertions)
@example([], [(0, [b"x"])])
@example([b"\xef\xbb\xbf", b"a\rb\rc"], [(2, [b"\r", b"d"])])
def test_git_makes_exactly_the_new_file_of_any_insertions(
    repository: Path, pieces: list[bytes], more: list[tuple[int, list[bytes]]]
) -> None:
    before = b"".join(pieces)
    for place, inserted in more:
        pieces = [*pieces[:place], *inserted, *pieces[place:]]
    after = b"".join(pieces)

    patch = unified("pkg/module.py", before, after)

    assert bool(patch) == (before != after)
    if patch:
        assert applied(repository, "pkg/module.py", before, patch) == after


@given(contents, contents)
def test_git_makes_exactly_the_new_file_of_any_two(
    repository: Path, before: list[bytes], after: list[bytes]
) -> None:
    old, new = b"".join(before), b"".join(after)
    # Without any line, git would take the file away; no edit of ours empties one.
    if old != new and new:
        assert applied(repository, "a.py", old, unified("a.py", old, new)) == new


@given(names)
@example("with space.py")
@example(' "quoted" \\ back.py')
@example("zwei\nzeilen\t.py")
@example("déjà.py")
@example("b -> c.py")
@example("\udce9.py")
def test_files_with_any_name_are_found(repository: Path, name: str) -> None:
    patch = unified(f"sub folder/{name}", b"a\nb\n", b"a\nnew\nb\n")

    assert applied(repository, f"sub folder/{name}", b"a\nb\n", patch) == b"a\nnew\nb\n"


@pytest.mark.parametrize(
    "name",
    [
        "a.py",
        "with space.py",
        'say "hi".py',
        "tab\there.py",
        "back\\slash.py",
        "déjà vu.py",
        "\udce9.py",
        "\x7f.py",
    ],
)
@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_the_head_is_the_one_that_git_writes(tmp_path: Path, name: str, mode: int) -> None:
    git(tmp_path, "init", "--quiet")
    file = tmp_path / name
    file.write_bytes(b"a\n")
    file.chmod(mode)
    git(tmp_path, "add", ".")
    file.write_bytes(b"a\nb")

    ours = unified(name, b"a\n", b"a\nb", mode=file.stat().st_mode)

    theirs = git(tmp_path, "-c", "core.quotePath=true", "diff", "--no-color", "--full-index")
    assert ours == theirs


def test_an_empty_file_is_filled_after_its_line_0(repository: Path) -> None:
    patch = unified("a.py", b"", b"new\n")

    assert patch.endswith(b"--- a/a.py\n+++ b/a.py\n@@ -0,0 +1 @@\n+new\n")
    assert applied(repository, "a.py", b"", patch) == b"new\n"


def test_modes_are_kept(repository: Path) -> None:
    file = repository / "run.py"
    file.write_bytes(b"a\n")
    file.chmod(0o755)

    git(repository, "apply", given=unified("run.py", b"a\n", b"b\na\n", mode=0o755))

    assert file.read_bytes() == b"b\na\n"
    assert file.stat().st_mode & 0o777 == 0o755
    file.unlink()


def test_patches_of_several_files_are_one_patch(repository: Path) -> None:
    names = ["a.py", "pkg/b c.py", "pkg/empty.py"]
    before = [b"a", b"b\r\n", b""]
    after = [b"new\na", b"b\r\nnew\r\n", b"new"]
    for name, content in zip(names, before, strict=True):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(content)
    together = b"".join(unified(*one) for one in zip(names, before, after, strict=True))

    assert Git(repository).applies(together)
    git(repository, "apply", given=together)

    assert [(repository / name).read_bytes() for name in names] == after
    for name in names:
        (repository / name).unlink()


@given(
    st.lists(st.sampled_from("abcd"), max_size=30),
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.sampled_from("abcd"), min_size=1, max_size=4)), max_size=5
    ),
)
def test_nothing_is_taken_out_where_lines_were_only_put_in(
    lines: list[str], more: list[tuple[int, list[str]]]
) -> None:
    longer = list(lines)
    for place, inserted in more:
        longer[place:place] = inserted

    patch = unified("a.py", joined(lines), joined(longer))

    body = patch.split(b"\n")[4:]
    assert sum(line.startswith(b"+") for line in body) == len(longer) - len(lines)
    assert not any(line.startswith(b"-") for line in body)


def test_large_files_of_equal_lines_take_no_longer() -> None:
    # 80,000 blank lines: comparing each with every other would take an hour.
    lines = [line for number in range(80_000) for line in ("", "pass" if number % 7 else f"x{number // 900}")]
    longer = [
        line
        for at, line in enumerate(lines)
        for line in ((line, "", '"""New."""') if at % 50 == 9 else (line,))
    ]

    patch = unified("a.py", joined(lines), joined(longer))

    body = patch.split(b"\n")[4:]
    assert sum(line.startswith(b"+") for line in body) == len(longer) - len(lines)
    assert not any(line.startswith(b"-") for line in body)


def test_a_changed_line_takes_only_its_neighbours_along(repository: Path) -> None:
    before = "".join(f"line {number}\n" for number in range(40)).encode()
    after = before.replace(b"line 20\n", b"line twenty\n").replace(b"line 27\n", b"")

    patch = unified("a.py", before, after)

    assert patch.count(b"@@ -") == 1
    assert b"@@ -18,14 +18,13 @@\n line 17\n line 18\n line 19\n-line 20\n+line twenty\n line 21\n" in patch
    assert applied(repository, "a.py", before, patch) == after


def joined(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()
