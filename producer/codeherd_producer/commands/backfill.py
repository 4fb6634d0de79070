"""`codeherd backfill`: document a repository, as a patch that changes nothing else.

Owns: the verbs, what each prints, and which run is meant. Does not know how a docstring comes about
(`codeherd_producer.backfill`), how it is handed over (`backfill_gifts`), or what its options mean.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.run import Backfill, Limits, found_files
from codeherd_producer.commands.backfill_check import check
from codeherd_producer.commands.backfill_eval import evaluate
from codeherd_producer.commands.backfill_gifts import Gift, gift_options, give, reported
from codeherd_producer.commands.backfill_options import (
    file_options,
    kind_options,
    make_options,
    text_options,
)
from codeherd_producer.commands.backfill_progress import watched
from codeherd_producer.commands.backfill_runs import Site, meant, opened
from codeherd_producer.commands.backfill_workers import Lookout, served_queues
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.durations import Duration
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json, print_table, print_text
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import note, say
from codeherd_schema.backfills import FileState, Progress, Run, RunState, TargetState
from codeherd_schema.errors import DatabaseUnavailable, InvalidRequest, RunNotFound
from codeherd_schema.models import ModelTable

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_RUN = click.argument("run_id", metavar="[RUN]", required=False)
_limits = options(
    click.option("--budget-jobs", type=click.IntRange(1), help="Stop after so many new questions."),
    click.option("--budget-tokens", type=click.IntRange(1), help="Stop after so many generated tokens."),
    click.option("--budget-time", type=Duration(), metavar="TIME", help="Stop after this long: 90, 10m, 2h."),
)


@click.group(cls=Noun)
def backfill() -> None:
    """Give a repository the docstrings that it lacks.

        codeherd backfill docstrings src > docstrings.patch   ask, wait, print a patch
        git apply docstrings.patch
        codeherd backfill check src --min 80                  fail if too little is documented

    Nothing but docstrings is added: every other byte of a file stays, and the code means the same, which
    is checked before a patch is shown. A run is kept in the database: whatever is killed, `resume` goes on.
    RUN is a run's id, its beginning, or left out: the newest.
    """


@backfill.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@text_options
@file_options
@kind_options
@_limits
@gift_options
@click.option("--dry-run", is_flag=True, help="Only say what would be asked; needs no worker.")
@click.option("--check", "checks", is_flag=True, help="Only measure, as `backfill check`.")
@click.option(
    "--min", "least", type=click.FloatRange(0, 100), help="With --check: share that must be documented."
)
@_as_json
@click.pass_context
def docstrings(ctx: click.Context, /, path: Path, **given: Any) -> None:
    """Write the missing docstrings below PATH.

        codeherd backfill docstrings . --model codellama-7b --convention google > docstrings.patch
        codeherd backfill docstrings . --dry-run
        codeherd backfill docstrings . --branch docstrings --commit per-dir
        codeherd backfill docstrings src --changed-since main --in-place

    Without an option that says where to, the patch goes to stdout.
    """
    if given["checks"]:
        ctx.invoke(check, path=path, least=given["least"], python=given["python"], as_json=given["as_json"])
        return
    if given["least"] is not None:
        raise click.UsageError("--min goes with --check")
    # Whatever is wrong with the command line is said before a run is made and anything is asked.
    gift, limits = Gift.of(given), _limits_of(given)
    gift.check(path)
    settings = settings_of(ctx)
    wanted = make_options(path, ModelTable.from_file(settings.models_file), given)
    if given["dry_run"]:
        _print_plan(path, wanted, as_json=given["as_json"])
        return
    with opened(ctx, publish=True) as site:
        run = site.rows.create(str(path.resolve()), wanted.model, wanted.model_dump(mode="json"))
        try:
            _carry_on(site, run, limits, gift, as_json=given["as_json"])
        except InvalidRequest:
            # It could not even be planned: nobody can take it up.
            if site.rows.get(run.id).state is RunState.PLANNING:
                site.rows.delete(run.id)
            raise


@backfill.command()
@_RUN
@_limits
@gift_options
@_as_json
@click.pass_context
def resume(ctx: click.Context, /, run_id: str | None, as_json: bool, **given: Any) -> None:
    """Go on with a run that was stopped or killed, and hand its patch over.

    codeherd backfill resume > docstrings.patch
    """
    gift, limits = Gift.of(given), _limits_of(given)
    with opened(ctx, publish=True) as site:
        run = meant(site.rows, run_id)
        gift.check(Path(run.root))
        _carry_on(site, run, limits, gift, as_json=as_json)


@backfill.command()
@_RUN
@gift_options
@click.pass_context
def apply(ctx: click.Context, /, run_id: str | None, **given: Any) -> None:
    """Hand over what a run has accepted by now: a patch on stdout, files in place, or commits.

    codeherd backfill apply | git apply
    codeherd backfill apply --branch docstrings --commit per-file
    """
    gift = Gift.of(given)
    with opened(ctx, publish=False) as site:
        run = meant(site.rows, run_id)
        gift.check(Path(run.root))
        give(site.rows, run, gift)


@backfill.command()
@_as_json
@click.pass_context
def runs(ctx: click.Context, as_json: bool) -> None:
    """List the runs, newest first."""
    with opened(ctx, publish=False) as site:
        found = [(run, site.rows.progress(run.id)) for run in site.rows.list()]
    if as_json:
        print_json({"runs": [run_document(run, progress) for run, progress in found]})
        return
    print_table(
        ("id", "state", "model", "targets", "accepted", "rejected", "folder"),
        [
            (
                run.id,
                run.state,
                run.model,
                str(sum(progress.targets.values())),
                str(progress.targets[TargetState.ACCEPTED]),
                str(progress.targets[TargetState.REJECTED]),
                run.root,
            )
            for run, progress in found
        ],
    )


@backfill.command()
@_RUN
@_as_json
@click.pass_context
def status(ctx: click.Context, run_id: str | None, as_json: bool) -> None:
    """Say how far a run is, file by file those that are under way, and why texts and files were left out."""
    with opened(ctx, publish=False) as site:
        run = meant(site.rows, run_id)
        progress = site.rows.progress(run.id)
        reasons = {
            "rejected": site.rows.reasons(run.id),
            "passed_over": site.rows.passed_over(run.id),
            "skipped_files": site.rows.skipped(run.id),
        }
        under_way = site.rows.files(run.id, states=[FileState.ASKED])
    if as_json:
        files = [
            {"path": file.path, "targets": file.targets, "accepted": file.accepted, "rejected": file.rejected}
            for file in under_way
        ]
        print_json({"run": run_document(run, progress), **reasons, "files_asked": files})
        return
    lines = [("state", str(run.state)), ("folder", run.root), ("model", run.model)]
    lines += [(f"files {state}", str(count)) for state, count in progress.files.items() if count]
    lines += [(f"symbols {state}", str(count)) for state, count in progress.targets.items()]
    lines += [
        ("questions", f"{progress.ended} of {progress.asked} answered"),
        ("tokens", str(progress.tokens)),
    ]
    for title, counts in reasons.items():
        lines += [(f"{title.replace('_', ' ')}: {reason}", str(count)) for reason, count in counts.items()]
    lines += [(f"asked: {file.path}", f"{file.accepted} of {file.targets}") for file in under_way]
    print_table((run.id, ""), lines)


@backfill.command()
@click.argument("symbol")
@click.option("--run", "run_id", metavar="RUN", help="Which run [the newest].")
@_as_json
@click.pass_context
def show(ctx: click.Context, symbol: str, run_id: str | None, as_json: bool) -> None:
    """Print every text that a symbol got, with its score or the reason why it was not taken.

    codeherd backfill show Store.claim
    """
    with opened(ctx, publish=False) as site:
        run = meant(site.rows, run_id)
        found = [
            (file, target, site.rows.candidates(target.id))
            for file, target in site.rows.targets_named(run.id, symbol)
        ]
    if not found:
        raise RunNotFound(
            f"run {run.id} has no symbol `{symbol}`", hint="only symbols that lacked a docstring"
        )
    if as_json:
        print_json(
            {
                "symbols": [
                    {
                        "path": file.path,
                        "name": target.name,
                        "line": target.line,
                        "state": target.state,
                        "reason": target.reason,
                        "text": target.text,
                        "candidates": [
                            {
                                "exchange": one.exchange,
                                "text": one.text,
                                "seed": one.seed,
                                "tokens": one.tokens,
                                "reason": one.reason,
                                "scores": dict(one.score_parts),
                            }
                            for one in candidates
                        ],
                    }
                    for file, target, candidates in found
                ]
            }
        )
        return
    for file, target, candidates in found:
        print_text(f"{file.path}:{target.line} {target.name}: {target.state}\n")
        for one in candidates:
            verdict = one.reason or ", ".join(f"{name} {part:.2f}" for name, part in one.score_parts.items())
            print_text(f"--- exchange {one.exchange}, seed {one.seed}: {verdict or 'passed'}\n{one.text}\n")


@backfill.command()
@_RUN
@click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "json", "sarif", "rdjson"]),
    default="markdown",
    help="[markdown]",
)
@click.pass_context
def report(ctx: click.Context, run_id: str | None, form: str) -> None:
    """Write what became of each symbol, and what is left for a human."""
    with opened(ctx, publish=False) as site:
        print_text(reported(site.rows, meant(site.rows, run_id), form))


@backfill.command()
@click.argument("run_id", metavar="RUN")
@click.pass_context
def delete(ctx: click.Context, run_id: str) -> None:
    """Forget a run; its jobs stay until they are pruned."""
    with opened(ctx, publish=False) as site:
        site.rows.delete(meant(site.rows, run_id).id)


def _limits_of(given: dict[str, Any]) -> Limits:
    time: timedelta | None = given["budget_time"]
    return Limits(
        given["budget_jobs"], given["budget_tokens"], None if time is None else time.total_seconds()
    )


def _carry_on(site: Site, run: Run, limits: Limits, gift: Gift, *, as_json: bool) -> None:
    work = Backfill(site.client, site.rows, run)
    again = f"codeherd backfill resume {run.id}"
    try:
        with watched() as meter:
            if run.state is RunState.PLANNING:
                work.plan(meter.planned)
            lookout = Lookout(run.model, lambda: served_queues(site.settings), meter.tell)

            def heard(progress: Progress) -> None:
                meter.show(progress)
                lookout.show(progress)

            state = work.work(limits=limits, told=heard)
    except KeyboardInterrupt:
        # One that is still being planned has to be planned to the end.
        if site.rows.get(run.id).state is not RunState.PLANNING:
            site.rows.set_state(run.id, RunState.STOPPED)
        say(f"\nstopped; what is queued goes on; `{again}` takes it up")
        raise
    except DatabaseUnavailable as err:
        raise DatabaseUnavailable(err.message, hint=f"`{again}` goes on when it is back") from err
    progress = site.rows.progress(run.id)
    if not as_json:
        note(told(run, progress))
        if state is RunState.STOPPED:
            say(f"the budget is used up; `{again}` goes on")
    if not as_json or gift.has_place:
        give(site.rows, run, gift)
    if as_json:
        # Last, so that stdout holds one document, this one or that of an error.
        print_json({"run": run_document(site.rows.get(run.id), site.rows.progress(run.id))})


def told(run: Run, progress: Progress) -> str:
    """Say in one line how a run stands."""
    counts, changed = progress.targets, progress.files[FileState.CHANGED]
    still_open = counts[TargetState.OPEN]
    parts = [
        f"{counts[TargetState.ACCEPTED]} docstrings",
        f"{counts[TargetState.REJECTED]} symbols left for a human",
        *([f"{still_open} still open"] if still_open else []),
        f"{progress.documented} documented before",
        f"{progress.tokens} tokens",
        *([f"files changed meanwhile: {changed}"] if changed else []),
    ]
    return f"run {run.id}: {', '.join(parts)}"


def run_document(run: Run, progress: Progress) -> dict[str, Any]:
    """Return what the command line tells of a run."""
    return {
        "id": run.id,
        "state": run.state,
        "folder": run.root,
        "model": run.model,
        "created_at": run.created_at.isoformat(timespec="milliseconds"),
        "finished_at": run.finished_at and run.finished_at.isoformat(timespec="milliseconds"),
        "files": {state.value: count for state, count in progress.files.items()},
        "symbols": {state.value: count for state, count in progress.targets.items()},
        "documented": progress.documented,
        "questions": {"asked": progress.asked, "answered": progress.ended},
        "tokens": progress.tokens,
    }


def _print_plan(path: Path, wanted: Options, *, as_json: bool) -> None:
    files, left, passed = 0, Counter[str](), Counter[str]()
    targets = 0
    for planned in found_files(path, wanted):
        files += 1
        targets += len(planned.targets)
        passed.update(planned.passed_over)
        if planned.reason is not None:
            left[planned.reason.partition(":")[0]] += 1
    if as_json:
        print_json({"files": files, "targets": targets, "left_files": left, "passed_over": passed})
        return
    rows = [("files", str(files)), ("symbols to document", str(targets))]
    rows += [(f"file left alone: {reason}", str(count)) for reason, count in left.most_common()]
    rows += [(f"symbol passed over: {reason}", str(count)) for reason, count in passed.most_common()]
    print_table(("plan", ""), rows)


backfill.add_command(check)
backfill.add_command(evaluate)
