from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path

import pytest

from codeherd_producer.backfill.owners import PLACES, NoOwnersFile, Owners


def owners(text: str) -> Owners:
    return Owners(text.split("\n"))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        # As GitHub's page about code owners describes its examples.
        ("*", ["a.py", "a/b/c.py"], []),
        ("*.py", ["a.py", "a/b.py"], ["a.pyi", "py"]),
        ("/build/logs/", ["build/logs/a.py", "build/logs/a/b.py"], ["a/build/logs/b.py", "build/logs"]),
        ("docs/*", ["docs/a.py"], ["docs/a/b.py", "a/docs/b.py"]),
        ("apps/", ["apps/a.py", "a/apps/b/c.py"], ["apps"]),
        ("/docs/", ["docs/a/b.py"], ["a/docs/b.py"]),
        ("**/logs", ["logs/a.py", "deeply/nested/logs/a.py"], ["logs2/a.py"]),
        ("/apps/github", ["apps/github", "apps/github/a.py"], ["apps/github.py", "a/apps/github"]),
        # What gitignore says about slashes and wildcards.
        ("a", ["a", "a/b.py", "b/a", "b/a/c.py"], ["a.py"]),
        ("a/b", ["a/b", "a/b/c.py"], ["c/a/b"]),
        ("/*", ["a.py"], ["a/b.py"]),
        ("/*/", ["a/b.py", "a/b/c.py"], ["a.py"]),
        ("*/", ["a/b.py"], ["a.py"]),
        ("/*.py", ["a.py"], ["a/b.py"]),
        ("a/**", ["a/b.py", "a/b/c.py"], ["a", "b/a/c.py"]),
        ("a/**/", ["a/b.py", "a/b/c.py"], ["a", "b/a/c.py"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b/c.py"], ["x/a/b", "ab"]),
        ("**", ["a.py", "a/b.py"], []),
        ("a?b*", ["axb.py", "c/axby/d.py"], ["ab.py", "a/b.py"]),
        ("a**b", ["axxb"], ["a/b"]),
        # Letters are what they are.
        ("a.py", ["a.py"], ["axpy", "A.py"]),
        ("a(1)+{b}|c$.py", ["a(1)+{b}|c$.py"], ["a1b.py"]),
        (r"a\ b.py", ["a b.py"], ["a", "b.py"]),
        (r"a\*.py", ["a*.py"], ["ab.py"]),
        (r"\#a.py", ["#a.py"], ["a.py"]),
        ("a#b.py", ["a#b.py"], ["a"]),
        ("a\nb", ["a", "b"], []),
        ("é.py", ["é.py"], ["e.py"]),
    ],
)
def test_a_pattern_means_these_paths_and_not_those(pattern: str, yes: list[str], no: list[str]) -> None:
    both = "\n".join(f"{one} @x" for one in pattern.split("\n"))
    found = owners(both)

    assert [path for path in (*yes, *no) if found.of(path) == ("@x",)] == yes


def test_patterns_mean_what_git_means_by_them_but_where_github_says_otherwise(
    tmp_path: Path, rng: random.Random
) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    words = ["a", "b", "*", "**", "a*", "?", "*.py", "x.py"]
    patterns = [
        f"{head}{'/'.join(inner)}{tail}"
        for count in (1, 2, 3)
        for inner in itertools.product(words, repeat=count)
        for head in ("", "/")
        for tail in ("", "/")
        # A folder's files and no deeper; and what no two programs agree on.
        if not (inner[-1] == "*" and not tail and (head or count > 1)) and not (inner[-1] == "**" and tail)
    ]
    names = ["a", "b", "ab", "x.py", "a.py"]
    paths = ["/".join(inner) for count in (1, 2, 3, 4) for inner in itertools.product(names, repeat=count)]
    ignored = tmp_path / ".git" / "ignored"

    for pattern in rng.sample(patterns, 100):
        ignored.write_text(f"{pattern}\n")
        done = subprocess.run(
            ["git", "-c", f"core.excludesFile={ignored}", "check-ignore", "--no-index", "-z", "--stdin"],
            cwd=tmp_path,
            input="\0".join(paths).encode(),
            capture_output=True,
            check=False,
        )
        assert done.stderr == b""
        theirs = set(done.stdout.decode().split("\0")) - {""}
        ours = {path for path in paths if owners(f"{pattern} @x").of(path)}
        assert ours == theirs, pattern


def test_the_last_line_that_matches_decides_also_that_nobody_owns_a_file() -> None:
    found = owners("* @all\n/a/ @b @a\n/a/b/\n/a/b/c.py @c @c # both\n")

    assert found.of("x.py") == ("@all",)
    assert found.of("a/x.py") == ("@a", "@b")
    assert found.of("a/b/x.py") == ()
    assert found.of("a/b/c.py") == ("@c",)
    assert owners("").of("x.py") == ()


def test_owners_are_users_groups_and_addresses_up_to_a_comment() -> None:
    found = owners(
        "# * @nobody\r\n\r\n  /a.py\t@org/team  me@example.org #@not\r\n/b.py and words @b\r\n/c.py #@not\r\n"
    )

    assert found.of("a.py") == ("@org/team", "me@example.org")
    assert found.of("b.py") == ("@b",)
    assert found.of("c.py") == ()


@pytest.mark.parametrize("line", ["!/a.py @x", "/[ab].py @x", "/ @x", "a/] @x", "#"])
def test_lines_that_the_hosts_do_not_know_are_passed_over(line: str) -> None:
    found = owners(f"* @all\n{line}\n")

    assert [found.of(path) for path in ("a.py", "a/b.py", "[ab].py")] == [("@all",)] * 3


def test_headers_of_gitlabs_sections_are_no_patterns_and_their_owners_are_those_of_lines_without() -> None:
    found = owners(
        "* @all\n[Documentation]\n/docs/\n"
        "^[Data Base][2] @db @dba # two\n/model/\n/model/x.py @x\n[Last]\n/y.py\n"
    )

    assert found.of("docs/a.py") == ()
    assert found.of("model/a.py") == ("@db", "@dba")
    assert found.of("model/x.py") == ("@x",)
    assert found.of("y.py") == ()
    assert found.of("Documentation") == ("@all",)


def test_the_first_of_the_places_is_read_and_none_is_told_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(NoOwnersFile, match="no CODEOWNERS file") as missing:
        Owners.read(tmp_path)
    assert ".github/CODEOWNERS" in (missing.value.hint or "")
    assert "per-dir" in (missing.value.hint or "")

    for place in reversed(PLACES):
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"* @{file.parent.name}\n")
        assert Owners.read(tmp_path).of("a.py") == (f"@{file.parent.name}",)
    assert PLACES[0] == ".github/CODEOWNERS"


def test_names_that_are_no_utf_8_are_found_and_a_mark_at_the_beginning_is_none_of_the_pattern(
    tmp_path: Path,
) -> None:
    (tmp_path / "CODEOWNERS").write_bytes(b"\xef\xbb\xbf/\xe9.py @x\r\n")

    assert Owners.read(tmp_path).of(os.fsdecode(b"\xe9.py")) == ("@x",)
