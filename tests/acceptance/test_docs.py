"""The README's commands and the demo, run as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Seconds for anything here on a busy machine.
PATIENCE_S = 240


def block(mark: str) -> str:
    """Return the code block after a `<!-- run: mark -->` line."""
    found = re.search(rf"<!-- run: {mark} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"no block marked {mark}"
    return found[1]


def environment(folder: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    return clean | {"CODEHERD_DATA_DIR": str(folder), "CODEHERD_FLOWER_PORT": "0"}


@contextmanager
def stack(folder: Path) -> Iterator[None]:
    """`codeherd up`, until the block ends; it must stop with status 0 on Ctrl-C."""
    log = folder / "up.log"
    with log.open("w") as sink:
        up = subprocess.Popen(
            [sys.executable, "-m", "codeherd_producer.cli", "up"],
            env=environment(folder),
            stderr=subprocess.PIPE,
            stdout=sink,
            text=True,
        )
    assert up.stderr is not None
    said = []
    for line in up.stderr:
        said.append(line)
        if line.startswith("ready"):
            break
    else:
        pytest.fail("".join(said))
    try:
        yield
    finally:
        up.send_signal(signal.SIGINT)
        rest = up.communicate(timeout=PATIENCE_S)[1]
    assert up.returncode == 0, rest


def test_the_ten_lines_run(tmp_path: Path) -> None:
    commands = re.findall(r"^\$ (.*)$", block("up"), re.MULTILINE)
    scripts = str(Path(sys.executable).parent)

    with stack(tmp_path):
        for command in commands:
            done = subprocess.run(
                ["bash", "-c", command.replace(".venv/bin", scripts)],
                cwd=ROOT,
                env=environment(tmp_path),
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, (command, done)
            assert done.stdout, command
        done = subprocess.run(
            [sys.executable, "-c", block("python")],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    assert len(commands) == 5
    assert not (tmp_path / "redis.sock").exists(), "Redis was left behind"


def test_the_demo_ends_well_and_leaves_its_answers_in_sql(tmp_path: Path) -> None:
    folder = tmp_path / "demo"

    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "demo.py")],
        cwd=tmp_path,
        env=environment(folder) | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "[unsupported_by_model]" in done.stdout
    assert re.search(r"(\d+) succeeded, 1 cancelled", done.stdout)
    assert (folder / "codeherd.db").exists()


def test_every_promise_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([GF]\d+) \|(.*)$", page, re.MULTILINE)
    assert [name for name, _ in rows] == [f"G{n}" for n in range(1, 19)] + [f"F{n}" for n in range(1, 23)]
    for name, row in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert tests, name
        for file, test in tests:
            folder = ROOT / "tests" / ("chaos" if name.startswith("F") else "")
            assert f"def {test}(" in (folder / file).read_text(encoding="utf-8"), (name, file, test)
