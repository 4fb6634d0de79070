"""Try the backfill's mechanics on other people's code: `python -m tests.corpora FOLDER...`.

Owns: the command line and what it prints. Each folder is one corpus; nothing in it is changed. Exit status
1 tells of a crash, of a fault, or of a lint finding that was not there before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.corpora import lint
from tests.corpora.passes import Passed, over_folder, table
from tests.corpora.sources import SOURCES

#: Faults that are printed at most, of one corpus.
_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpora", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--text", choices=sorted(SOURCES), default="accepting", help="what is put in")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth file only")
    parser.add_argument("--lint", action="store_true", help="compare ruff and interrogate before and after")
    parser.add_argument("--interrogate", type=Path, help="interrogate's command; without it only ruff is run")
    options = parser.parse_args(arguments)
    is_good = True
    for folder in options.folders:
        if options.lint:
            compared = lint.compare(
                folder, options.interrogate, processes=options.processes, every=options.every
            )
            _print_lint(folder.name, compared)
            is_good &= not compared.new
        else:
            began = time.monotonic()
            passed = over_folder(folder, options.text, processes=options.processes, every=options.every)
            _print(folder.name, passed, time.monotonic() - began)
            is_good &= not any(one.crash or one.faults for one in passed)
    return 0 if is_good else 1


def _print(name: str, passed: Sequence[Passed], seconds: float) -> None:
    sums = table(passed)
    _say(f"{name}: {', '.join(f'{what} {count:,}' for what, count in sums.items())} ({seconds:.0f} s)")
    bad = [(one.path, fault) for one in passed for fault in (*one.faults, *([one.crash] * bool(one.crash)))]
    for path, fault in bad[:_SHOWN]:
        _say(f"  {path}: {fault}")


def _print_lint(name: str, compared: lint.Compared) -> None:
    _say(f"{name}: {compared.files:,} files")
    if compared.coverage is not None:
        _say("  interrogate {:.1f} % -> {:.1f} %".format(*compared.coverage))
    for rule, (before, after) in compared.rules.items():
        _say(f"  {rule:8} {before:>8,} {after:>8,}{'   new' if rule in compared.new else ''}")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 -- its purpose


if __name__ == "__main__":
    sys.exit(main())
