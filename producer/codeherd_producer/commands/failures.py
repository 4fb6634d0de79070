"""How a failure leaves the command line: one line, one hint, one exit code.

Owns: the exit codes and the only map from the error tree to them; the two shapes of an error, a line
on stderr or JSON on stdout. Does not know what any command does.
"""

from __future__ import annotations

import json
import logging
from enum import IntEnum

import click

from codeherd_schema.errors import (
    CodeherdError,
    IllegalMove,
    InvalidRequest,
    InvalidSetting,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    RunNotFound,
    WaitTimeout,
)

logger = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """What a script can tell from the exit status; never renumbered."""

    #: All went well.
    OK = 0
    #: A service did not answer, the configuration cannot work, or codeherd broke.
    SERVICE = 1
    #: The command line, the request or a setting is wrong; nothing was queued.
    USAGE = 2
    #: The wait ended before the job did; the job goes on.
    STILL_ALIVE = 3
    #: No job, or no run, has this id.
    NOT_FOUND = 4
    #: The job ended without a result.
    JOB_FAILED = 5
    #: The job was cancelled, or its time ran out.
    WITHDRAWN = 6
    #: Several jobs were asked for and some ended without a result.
    SOME_FAILED = 7
    #: A gate was not met, or a dry run would change something.
    GATE = 8
    #: Ctrl-C: detached, the job goes on.
    INTERRUPTED = 130
    #: The reader of stdout went away, as with `head`.
    READER_GONE = 141


#: From the error tree to exit codes; the nearest ancestor that is listed decides.
_EXIT_CODES: dict[type[BaseException], ExitCode] = {
    CodeherdError: ExitCode.SERVICE,
    InvalidRequest: ExitCode.USAGE,
    InvalidSetting: ExitCode.USAGE,
    IllegalMove: ExitCode.USAGE,
    WaitTimeout: ExitCode.STILL_ALIVE,
    JobNotFound: ExitCode.NOT_FOUND,
    RunNotFound: ExitCode.NOT_FOUND,
    JobFailed: ExitCode.JOB_FAILED,
    JobCancelled: ExitCode.WITHDRAWN,
    JobExpired: ExitCode.WITHDRAWN,
}


def exit_code(error: type[BaseException]) -> ExitCode:
    """Return the exit code of an error class."""
    return next((_EXIT_CODES[kind] for kind in error.__mro__ if kind in _EXIT_CODES), ExitCode.SERVICE)


def report(err: Exception, *, as_json: bool) -> ExitCode:
    """Tell the user about `err` and return the exit code.

    Args:
        err: ours, click's, or one that nobody expected; the last kind is logged with its trace at
            level debug only.
        as_json: whether stdout gets one JSON document instead of a line on stderr.
    """
    code, word, message, hint = _describe(err)
    if as_json:
        document = {"schema": 1, "error": {"code": word, "message": message, "hint": hint}}
        click.echo(json.dumps(document))
        return code
    click.echo(f"error: {message} [{word}]", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return code


def _describe(err: Exception) -> tuple[ExitCode, str, str, str | None]:
    match err:
        case CodeherdError():
            return exit_code(type(err)), err.code, err.message, err.hint
        case click.ClickException():
            hint = None
            if isinstance(err, click.UsageError) and err.ctx is not None:
                hint = f"`{err.ctx.command_path} --help`"
            return ExitCode.USAGE, "usage", _sentence(err.format_message()), hint
        case _:
            logger.debug("unexpected_error", exc_info=err)
            message = f"unexpected {type(err).__name__}: {err}".partition("\n")[0]
            hint = None
            if not logger.isEnabledFor(logging.DEBUG):
                hint = "set CODEHERD_LOG_LEVEL=debug for the trace"
            return ExitCode.SERVICE, "internal_error", message, hint


def _sentence(text: str) -> str:
    # click ends its sentences with a full stop and begins them in upper case.
    text = " ".join(text.split())
    if text.count(". ") == 0:
        text = text.removesuffix(".")
    return text[:1].lower() + text[1:]
