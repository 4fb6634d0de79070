"""`codeherd doctor`: check every part that a job needs, and say what to do about it.

Owns: how findings are shown. Does not know what is checked: `codeherd_producer.health` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import click

from codeherd_producer.commands.configuration import load_settings, settings_of
from codeherd_producer.commands.failures import ExitCode
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json
from codeherd_producer.findings import Finding, Verdict
from codeherd_producer.health import examine
from codeherd_schema.settings import user_file

_COLORS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


@click.command(cls=Verb)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--answer-s", type=float, default=1.0, metavar="S", help="Seconds that workers get to answer [1]."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1.0),
    default=10.0,
    metavar="S",
    help="Seconds that the database gets to answer, and Redis [10].",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, answer_s: float, timeout_s: float) -> None:
    """Check every part that a job needs: one line each, OK, WARN or FAIL. Exit status 1 if any FAIL."""
    findings = []
    looks = examine(
        settings_of(ctx),
        origins=_files(load_settings(ctx).origins),
        user_id=os.geteuid(),
        clock=time.time,
        answer_s=answer_s,
        timeout_s=timeout_s,
    )
    for finding in looks:
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        print_json({"findings": [_document(finding) for finding in findings]})
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        ctx.exit(ExitCode.SERVICE)


def _files(origins: Mapping[str, str]) -> dict[str, Path | None]:
    """Return the file that each setting came from."""
    places = {"user file": user_file(), "project file": Path("pyproject.toml").absolute()}
    return {name: places.get(origin) for name, origin in origins.items()}


def _print(finding: Finding) -> None:
    verdict = click.style(f"{finding.verdict:<4}", fg=_COLORS[finding.verdict])
    click.echo(f"{verdict}  {finding.part}: {finding.message}")
    if finding.hint:
        click.echo(f"      hint: {finding.hint}")


def _document(finding: Finding) -> dict[str, str | None]:
    return {
        "part": finding.part,
        "verdict": finding.verdict,
        "message": finding.message,
        "hint": finding.hint,
    }
