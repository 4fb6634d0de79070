from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

#: Lets `ast` take `newtype X = int` for an assignment of the same length, so that all positions hold.
_NEWER = """
import ast, runpy, sys
parse = ast.parse
ast.parse = lambda text: parse(text.replace("newtype X = ", "X         = "))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def newer_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return this interpreter with one more kind of statement, `newtype X = int`."""
    folder = tmp_path_factory.mktemp("newer")
    script, python = folder / "newer.py", folder / "python"
    script.write_text(_NEWER)
    # Comes as `python -I -S scanner.py ...`.
    python.write_text(
        f'#!/bin/sh\nshift 2\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n'
    )
    python.chmod(0o755)
    return python
