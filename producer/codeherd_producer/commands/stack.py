"""`codeherd up`, `worker`, `dispatcher`, `flower`: the commands that stay until they are stopped.

Owns: their options. Does not know how a stack is kept alive (`codeherd_producer.local`), what a
worker does (`codeherd_worker`), or how Flower is set up (`codeherd_producer.monitor`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from codeherd_producer.commands.configuration import service_settings
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import say
from codeherd_producer.heartbeat import BeatingFlag
from codeherd_schema.errors import BrokerUnavailable, ConfigurationError, DatabaseUnavailable
from codeherd_schema.models import ModelTable
from codeherd_schema.redis_facts import check_start
from codeherd_schema.settings import PREFIX, SharedSettings

logger = logging.getLogger(__name__)

worker_options = options(
    click.option("--model", metavar="NAME", help="A name of `codeherd models` [tiny]."),
    click.option("--gpus", metavar="WHICH", help="`all`, `0,1`, `0+1` for one model on two, or `cpu`."),
    click.option(
        "--quantization",
        metavar="HOW",
        help="`auto`, `none`, `nf4`, `int8`, `bf16`, `fp16`, `torchao-int8` or `torchao-int4` [auto].",
    ),
    click.option("--slots", type=int, metavar="N", help="Jobs decoded together [8]."),
    click.option("--max-len", type=int, metavar="N", help="Tokens per slot [as many as fit]."),
    click.option("--slot-lengths", metavar="LIST", help="Slots by length: `2048x12,16384x1` [computed]."),
    click.option("--draft-tokens", metavar="N", help="Tokens guessed and tried in one step [auto]."),
    click.option("--threads", type=int, metavar="N", help="CPU threads per process [an even share]."),
)


@click.command(cls=Verb)
@worker_options
@click.option("--name", metavar="NAME", help="Name in Flower [gpu0, gpu1, …, cpu0]; several get a suffix.")
def worker(**given: Any) -> None:
    """Run one model on this machine's devices: one process per GPU, restarted when it dies.

        codeherd worker --model codellama-7b --gpus all
        codeherd worker --model codellama-34b --gpus 0+1 --quantization nf4
        codeherd worker --model tiny --gpus cpu

    SIGTERM or Ctrl-C lets running jobs finish for CODEHERD_WORKER_DRAIN_TIMEOUT_S seconds and gives
    the rest back; a second one does not wait. All CODEHERD_WORKER_* settings hold.
    """
    _need_worker_package()
    command = [sys.executable, "-P", "-m", "codeherd_worker", *_worker_arguments(given)]
    os.execv(sys.executable, command)  # noqa: S606 -- our own module, no shell


@click.command(cls=Verb)
@click.pass_context
def dispatcher(ctx: click.Context) -> None:
    """Publish waiting jobs to the workers and take back the jobs of lost ones.

    Run one beside the workers; several do no harm.
    """
    # Celery and SQL: too much for the commands that share this file.
    from codeherd_producer.dispatcher import Dispatcher
    from codeherd_schema.broker import Broker
    from codeherd_schema.store import Store

    settings = service_settings(ctx)
    # Its heartbeat is what `codeherd health dispatcher` reads.
    stop = BeatingFlag()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = Store.open(settings.database, max_attempts=settings.max_attempts, **settings.database_options)
    try:
        store.check_schema()
    except DatabaseUnavailable as err:
        # As when it goes away later: the dispatcher goes on when it is back.
        logger.warning("database_away reason=%s", err)
    _check_redis(settings)
    broker = Broker(settings)
    # Not in the main thread: its signal handler takes the event's lock, which `run` may hold.
    with ThreadPoolExecutor(1, thread_name_prefix="dispatcher") as executor:
        executor.submit(Dispatcher(store, broker, settings).run, stop).result()
    broker.close()
    store.close()


@click.command(cls=Verb)
@click.option(
    "--port", type=click.IntRange(0, 65_535), metavar="N", help="Port to listen on (CODEHERD_FLOWER_PORT)."
)
@click.pass_context
def flower(ctx: click.Context, port: int | None) -> None:
    """Run Flower, the monitor for workers and tasks, on this machine's loopback.

    Name and password are CODEHERD_FLOWER_USER and CODEHERD_FLOWER_PASSWORD; without a password one
    is made and printed. Whoever logs in may stop jobs and workers. `/metrics` and `/healthcheck` ask
    for no password. Flower's own options are FLOWER_* variables.
    """
    from codeherd_producer.monitor import run_flower

    settings = service_settings(ctx)
    if port is not None:
        settings = settings.model_copy(update={"flower_port": port})
    password = settings.flower_password or secrets.token_urlsafe(12)
    if not settings.flower_password:
        say(f"flower: user `{settings.flower_user}`, password `{password}`")
    run_flower(settings, password, os.environ)


@click.command(cls=Verb)
@worker_options
@click.option("--workers", type=click.IntRange(1, 64), default=1, metavar="N", help="How many workers [1].")
@click.option("--no-flower", is_flag=True, help="Leave Flower out.")
@click.option(
    "--flower-port", type=click.IntRange(0, 65_535), metavar="N", help="Port of Flower; 0 is any [5555]."
)
@click.pass_context
def up(ctx: click.Context, /, workers: int, no_flower: bool, flower_port: int | None, **given: Any) -> None:
    """Run the whole stack in this terminal until Ctrl-C.

        codeherd up
        codeherd up --model codellama-7b --gpus all

    Redis (embedded, unless CODEHERD_BROKER_URL names one), the database schema, the dispatcher,
    Flower and the workers (the embedded model `tiny`, in nf4 on the CPU). A part that dies is started again.
    Ctrl-C lets running jobs finish; a second one does not wait. The data stays in the data folder.
    """
    from codeherd_producer.local import Plan, Stack, only_stack
    from codeherd_producer.monitor import is_installed
    from codeherd_schema.migrations import upgrade

    settings = service_settings(ctx)
    if flower_port is not None:
        settings = settings.model_copy(update={"flower_port": flower_port})
    _need_worker_package()
    name = given["model"] or os.environ.get(f"{PREFIX}WORKER_MODEL") or "tiny"
    model = ModelTable.from_file(settings.models_file).find(name)
    given["model"] = name
    if model.source == "embedded":
        # On the CPU `auto` would leave so small a model unquantized; here it shows how the big ones run.
        for option, value in (("gpus", "cpu"), ("quantization", "nf4")):
            if f"{PREFIX}WORKER_{option.upper()}" not in os.environ:
                given[option] = given[option] or value
    if not no_flower and not is_installed():
        say("flower: not installed, `pip install 'codeherd[monitor]'` brings it")
    plan = Plan(
        workers=workers,
        worker_arguments=tuple(_worker_arguments(given)),
        flower=is_installed() and not no_flower,
    )
    if settings.broker_url is not None:
        _check_redis(settings)
    with only_stack(settings.data_dir):
        Stack(settings, plan, os.environ, say).run(lambda: upgrade(settings.database))


def _check_redis(settings: SharedSettings) -> None:
    """Refuse a Redis that cannot do, warn of one that may lose or delay; one that is away is waited for."""
    from codeherd_schema.broker import Broker

    broker = Broker(settings)
    try:
        facts = broker.check()
    except BrokerUnavailable as err:
        logger.warning("broker_away reason=%s", err)
        return
    finally:
        broker.close()
    for fault in check_start(facts, settings.broker.masked()):
        logger.warning("redis_doubtful part=%s reason=%s fix=%s", fault.part, fault.message, fault.hint)


def _worker_arguments(given: dict[str, Any]) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None)
    return [word for flag, value in pairs for word in (flag, str(value))]


def _need_worker_package() -> None:
    if importlib.util.find_spec("torch") is None:
        raise ConfigurationError("the worker is not installed", hint="pip install 'codeherd[worker]'")
