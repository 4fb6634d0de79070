"""Compare what ruff and interrogate say of a corpus before and after every symbol got a docstring.

Owns: the copy that is edited, the rules, and which findings are new. Files that one of the tools cannot
read are left out of both copies: interrogate gives up altogether at a byte order mark.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.corpora.passes import WIDTH, Passed, over_folder

#: D203 and D213 contradict D211 and D212.
_RULES: Final = ("--select", "D,E,W,F", "--ignore", "D203,D213")
#: A blank line after a header stands after the docstring now; it is the file's own, and stays.
_OF_BLANK_LINES: Final = frozenset({"D202"})
#: A docstring is indented as its file is: with tabs, where there were tabs before.
_OF_TABS: Final = frozenset({"D206", "W191"})
_FINDING: Final = re.compile(r"(?P<path>.+?):\d+:\d+: (?P<rule>[A-Z]+\d+|invalid-syntax)")
_ACTUAL: Final = re.compile(r"actual: ([\d.]+)%")


@dataclass(frozen=True)
class Compared:
    """One corpus."""

    files: int
    #: Findings before and after, by rule.
    rules: Mapping[str, tuple[int, int]]
    #: Rules with more findings than before, but for those of blank lines, and those of tabs in files of tabs.
    new: frozenset[str]
    #: interrogate's percentages before and after; None where it was not asked.
    coverage: tuple[float, float] | None


def compare(folder: Path, interrogate: Path | None, *, processes: int, every: int = 1) -> Compared:
    """Document all of a corpus in a copy, and ask the linters.

    Args:
        folder: of Python files; stays as it is.
        interrogate: its command; None leaves it out.
        processes: how many work at a time.
        every: as for `over_folder`.

    Raises:
        subprocess.CalledProcessError: a linter failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch, "before"), Path(scratch, "after")

        def keep(passed: Passed) -> None:
            if passed.after and _is_readable(passed.after):
                _write(before / passed.path, (folder / passed.path).read_bytes())
                _write(after / passed.path, passed.after)

        over_folder(folder, "accepting", processes=processes, every=every, keep=keep)
        old, new = _findings(before), _findings(after)
        was, now = _by_rule(old), _by_rule(new)
        rules = {rule: (was[rule], now[rule]) for rule in sorted(was | now)}
        return Compared(
            files=sum(1 for _ in after.rglob("*.py")),
            rules={rule: pair for rule, pair in rules.items() if pair[0] != pair[1]},
            new=_new(old, new),
            coverage=None
            if interrogate is None
            else (_coverage(interrogate, before), _coverage(interrogate, after)),
        )


def _is_readable(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not raw.startswith(b"\xef\xbb\xbf")


def _write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def _findings(folder: Path) -> Counter[tuple[str, str]]:
    """Count ruff's findings by file and rule."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--no-respect-gitignore"]
    command += ["--exit-zero", "--target-version", "py311", "--line-length", str(WIDTH), *_RULES]
    done = subprocess.run(
        [*command, "--output-format", "concise", "."], check=True, capture_output=True, text=True, cwd=folder
    )
    found = (_FINDING.match(line) for line in done.stdout.splitlines())
    return Counter((one["path"], one["rule"]) for one in found if one)


def _by_rule(findings: Counter[tuple[str, str]]) -> Counter[str]:
    rules: Counter[str] = Counter()
    for (_, rule), count in findings.items():
        rules[rule] += count
    return rules


def _new(old: Counter[tuple[str, str]], new: Counter[tuple[str, str]]) -> frozenset[str]:
    """Return the rules that some file broke more often than before."""
    return frozenset(
        rule
        for (path, rule), count in new.items()
        if count > old[path, rule]
        and rule not in _OF_BLANK_LINES
        and not (rule in _OF_TABS and old[path, "W191"])
    )


def _coverage(interrogate: Path, folder: Path) -> float:
    command = [str(interrogate), "--fail-under", "0", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = _ACTUAL.search(done.stdout)
    if found is None:
        raise ValueError(f"interrogate says nothing of coverage: {done.stdout[-200:]}")
    return float(found[1])
