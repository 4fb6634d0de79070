from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from codeherd_producer.backfill.interpreters import Interpreter, InterpreterFailed, borrowed, scanned
from codeherd_producer.backfill.scanner import Unreadable, scan

HERE = Path(sys.executable)


def script(folder: Path, text: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_one_process_reads_many_files_and_finds_what_this_one_does() -> None:
    files = [
        b"def f():\n    return 1\n",
        b"",
        "# coding: latin-1\nx = '\xe9'\nclass A(B, C): x = 1\r\n".encode("latin-1"),
        b"\xef\xbb\xbfimport a.b as c\nfrom . import d\n",
        b"x = '\\ud800'\ndef f():\n    '\\ud800'\n",
        b"x = '" + b"x" * 200_000 + b"'\n",
    ]

    with Interpreter(HERE) as other:
        other.check()
        for raw in files:
            assert replace(other.scan(raw), shape=None) == scan(raw)


def test_a_shape_stands_for_the_code_without_its_docstrings() -> None:
    bare = b"class A:\n    def f(self):\n        return 1\n"
    with Interpreter(HERE) as other:
        shape = other.scan(bare).shape
        documented = b'"""M."""\n' + bare.replace(b"class A:\n", b"class A:\n    '''A.'''\n\n")
        assert other.scan(documented).shape == shape
        for changed in (bare.replace(b"1", b"2"), bare + b"A()\n", bare.replace(b"A:", b"A(B):")):
            assert other.scan(changed).shape != shape


def test_a_file_that_the_other_cannot_read_either_has_its_reason_and_the_next_one_is_read() -> None:
    with Interpreter(HERE) as other:
        with pytest.raises(Unreadable, match=r"^syntax: "):
            other.scan(b"def f(:")
        assert other.scan(b"def f(): pass").symbols[1].name == "f"


def test_only_what_is_unreadable_here_goes_to_the_other(newer_python: Path, tmp_path: Path) -> None:
    never = Interpreter(tmp_path / "no-python")

    assert scanned(b"x = 1", never) == scan(b"x = 1")
    with pytest.raises(Unreadable):
        scanned(b"newtype X = int", None)
    with Interpreter(newer_python) as other:
        assert scanned(b"newtype X = int", other).text == "newtype X = int"


def test_a_file_that_ends_the_other_is_unreadable_and_the_next_one_gets_a_new_process(tmp_path: Path) -> None:
    # The first process ends on its first file, which may still be under way.
    once = script(tmp_path, f'[ -e "{tmp_path}/mark" ] && exec {HERE} "$@"\ntouch "{tmp_path}/mark"')

    with Interpreter(once) as other:
        with pytest.raises(Unreadable, match="ended"):
            other.scan(b"#" * 1_000_000)
        assert other.scan(b"def f(): pass").symbols[1].name == "f"


def test_a_file_that_keeps_the_other_too_long_is_unreadable(tmp_path: Path) -> None:
    with Interpreter(script(tmp_path, "exec sleep 600"), timeout_s=0.2) as other:
        with pytest.raises(Unreadable, match="too long"):
            other.scan(b"x = 1")
        with pytest.raises(InterpreterFailed, match="timed out"):
            other.check()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo no module >&2; echo last words >&2; exit 1", "last words"),
        ("exit 3", "status 3"),
        ("echo hello", "no answer"),
    ],
)
def test_what_is_no_python_is_refused_with_its_own_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InterpreterFailed, match=words) as caught:
        Interpreter(script(tmp_path, text)).check()

    assert caught.value.hint is not None


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    other = Interpreter(tmp_path / "no-python")

    with pytest.raises(InterpreterFailed, match="no-python"):
        other.check()
    with pytest.raises(InterpreterFailed, match="no-python"):
        other.scan(b"")


def test_an_interpreter_is_lent_if_one_is_named_and_is_seen_to_work(tmp_path: Path) -> None:
    with borrowed(None) as other:
        assert other is None
    with borrowed(str(HERE)) as other:
        assert scanned(b"x = 1", other) == scan(b"x = 1")
    with pytest.raises(InterpreterFailed, match="status 3"), borrowed(script(tmp_path, "exit 3")):
        pytest.fail("lent what does not work")
