"""Flower for a herd: which tasks and queues it shows, who may look, and how it is started.

Owns: Flower's options, each with its reason. Does not know what a task does. Tried with flower 2.2.0.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import MutableMapping
from typing import Final

from celery import Celery

from codeherd_schema.broker import make_app, queue_name, task_name
from codeherd_schema.errors import ConfigurationError, InvalidSetting, ServiceUnavailable
from codeherd_schema.models import ModelTable
from codeherd_schema.requests import JobKind
from codeherd_schema.settings import SharedSettings

#: Upper bounds of the runtime histogram in seconds; Flower's own end at 10 s.
RUNTIME_BUCKETS: Final = "0.5,1,2,5,10,30,60,120,300,600"
#: Lets anyone use the API, and any web page with it.
_OPEN_API: Final = "FLOWER_UNAUTHENTICATED_API"


def is_installed() -> bool:
    """Whether Flower is here."""
    return importlib.util.find_spec("flower") is not None


def monitor_app(settings: SharedSettings) -> Celery:
    """Build the app that Flower looks through: every model's queue, one task name per job kind."""
    models = ModelTable.from_file(settings.models_file)
    app = make_app(settings, [queue_name(model.name) for model in models])
    for kind in JobKind:
        app.task(_runs_in_a_worker, name=task_name(kind), shared=False)
    return app


def flower_arguments(settings: SharedSettings, password: str) -> list[str]:
    """Return Flower's options.

    The list is handed over inside this process, so the password shows in no process table.

    Raises:
        InvalidSetting: the name or the password holds a character that Flower would split it at.
    """
    if ":" in settings.flower_user or "," in settings.flower_user + password:
        raise InvalidSetting("`flower_user` must hold no `:` or `,`, and `flower_password` no `,`")
    return [
        # Flower's own default is every interface, without a password.
        f"--address={settings.flower_address}",
        f"--port={settings.flower_port}",
        f"--basic_auth={settings.flower_user}:{password}",
        f"--task_runtime_metric_buckets={RUNTIME_BUCKETS}",
        # The worker's compact result says more than Flower's own columns; there is no text in it.
        "--tasks_columns=name,uuid,state,result,received,runtime,worker",
        # A file flowerconfig.py in the current folder would be run as Python.
        "--conf=/dev/null",
        # Workers come and go; their metrics must not stay for ever.
        "--purge_offline_workers=3600",
        f"--logging={settings.log_level}",
    ]


def run_flower(settings: SharedSettings, password: str, environment: MutableMapping[str, str]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        settings: where to listen and which broker to watch.
        password: what to ask for.
        environment: the process's own, from which Flower reads `FLOWER_*`; loses the variable that
            would open the API.

    Raises:
        ConfigurationError: Flower is not installed.
        InvalidSetting: see `flower_arguments`.
        ServiceUnavailable: something else listens on its port.
    """
    if not is_installed():
        raise ConfigurationError("Flower is not installed", hint="pip install 'codeherd[monitor]'")
    environment.pop(_OPEN_API, None)
    # It warns of every inspection that no worker answers, which is what it looks like before a start.
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
    app = monitor_app(settings)
    arguments = flower_arguments(settings, password)
    try:
        app.start(["--quiet", "flower", *arguments])
    except OSError as err:
        where = f"{settings.flower_address}:{settings.flower_port}"
        raise ServiceUnavailable(f"Flower cannot listen on {where}: {err.strerror or err}") from err


def _runs_in_a_worker(job_id: str) -> None:
    """Stand for a task that only a worker can run."""
    raise NotImplementedError(job_id)
