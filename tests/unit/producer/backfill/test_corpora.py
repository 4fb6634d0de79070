"""A short part of `python -m tests.corpora`, and whether its proofs see what they are there for."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from tests.corpora import __main__ as command
from tests.corpora.passes import over_file
from tests.corpora.proofs import faults
from tests.corpora.sources import SOURCES

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = (
    *(
        "_collections_abc",
        "abc",
        "base64",
        "bisect",
        "cmd",
        "code",
        "codeop",
        "colorsys",
        "contextlib",
        "copy",
    ),
    *("copyreg", "csv", "fileinput", "fnmatch", "getopt", "getpass", "glob", "graphlib", "gzip", "heapq"),
    *("hmac", "json/decoder", "keyword", "linecache", "numbers", "operator", "queue", "quopri", "reprlib"),
    *("sched", "selectors", "shelve", "shlex", "socketserver", "string", "textwrap", "this", "timeit"),
    *("token", "types", "wsgiref/util", "zipapp"),
)

BEFORE = b"""\
# c
class A:
    x = 1
    def f(self): return 1  # d

def g():
    '''Old.'''
    return 2
"""
AFTER = b'''\
# c
class A:
    """Say A."""

    x = 1
    def f(self):
        """Say f."""
        return 1  # d

def g():
    \'\'\'Old.\'\'\'
    return 2
'''
TEXTS = ("Say A.", "Say f.")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("module", MODULES)
def test_all_of_a_module_is_documented_and_nothing_else_changes(module: str, source: str) -> None:
    passed = over_file(STDLIB, source, f"{module}.py")

    assert (passed.skipped, passed.crash, passed.faults) == (None, None, ())
    if source == "accepting":
        assert passed.inserted == passed.wanted


def test_a_good_file_has_no_faults() -> None:
    assert list(faults(BEFORE, AFTER, TEXTS)) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (b"# c\n", b"# e\n", "bytes changed"),
        (b"# c\n", b"", "bytes changed"),
        (b"  # d", b"", "bytes changed"),
        (b"  # d", b" # d", "bytes changed"),
        (b"return 2\n", b"return 2", "bytes at the end"),
        (b"return 2\n", b"return 2\n\n", "bytes changed"),
        (b"x = 1\n", b"x = 1\r\n", "bytes changed"),
        (b'"""Say f."""', b'"""Say f."""; ', "more than a docstring"),
        (b'"""Say A."""\n\n', b'"""Say A."""\n\n\n', "bytes changed"),
        (b'"""Say A."""', b'"""Say A."""  # e', "more than a docstring"),
        (b"x = 1", b"x = 2", "another syntax tree"),
        (b"return 2", b"return None", "another syntax tree"),
        (b"def g", b"def h", "other definitions"),
        (b"def g", b"async def g", "other definitions"),
        (b"Old", b"New", "has changed"),
        (b"    '''Old.'''\n", b"", "has changed"),
        (b"Say f", b"Say no", "something else"),
        (b'        """Say f."""\n', b"", "something else"),
        (b"return 1", b"return return", "does not parse"),
        (b"# c\n", b"\xef\xbb\xbf# c\n", "another encoding"),
        (b"    x = 1\n", b"    x = 1\n    return\n", "does not compile"),
    ],
)
def test_every_other_change_is_a_fault(old: bytes, new: bytes, fault: str) -> None:
    assert old in AFTER

    found = list(faults(BEFORE, AFTER.replace(old, new), TEXTS))

    assert any(fault in one for one in found), found


def test_the_command_tells_what_it_tried_and_what_it_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_bytes(BEFORE)
    (tmp_path / "bad.py").write_text("def\n")
    (tmp_path / "old_pb2.py").write_text("x = 1\n")

    status = command.main([str(tmp_path), "--processes", "1"])

    told = capsys.readouterr().out
    assert status == 0
    assert "files 3, symbols 4, wanted 3, inserted 3, opened 1, crashes 0, faults 0" in told
    assert "skipped, generated 1, skipped, syntax 1" in told
    assert (tmp_path / "good.py").read_bytes() == BEFORE


def test_the_command_fails_at_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "good.py").write_bytes(BEFORE)
    # Goes away between the look at the folder and the reading.
    passed = over_file(tmp_path, "accepting", "gone.py")

    assert passed.crash is not None
    assert "FileNotFoundError" in passed.crash
    assert command.main([str(tmp_path), "--processes", "1"]) == 0
    assert "files 1," in capsys.readouterr().out


def test_lint_counts_findings_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.py").write_bytes(BEFORE)

    status = command.main([str(tmp_path), "--processes", "1", "--lint"])

    told = capsys.readouterr().out.split("\n")
    assert status == 0
    assert told[0].endswith(": 1 files")
    assert [line.split() for line in told[1:] if line] == [
        ["D100", "1", "0"],
        ["D101", "1", "0"],
        ["D102", "1", "0"],
    ]
