"""The launcher: `python -m codeherd_worker --model M --gpus all`, one process per GPU.

Owns: the worker's command line. `codeherd worker` starts this file with the same options.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from codeherd_schema.errors import CodeherdError
from codeherd_schema.models import ModelTable
from codeherd_schema.settings import PREFIX, load, user_file
from codeherd_worker.device import count_gpus, parse_gpus
from codeherd_worker.serve import configure_logging, print_error
from codeherd_worker.settings import Quantization, WorkerSettings
from codeherd_worker.supervisor import WORKER_MODULE, Supervisor


def main(argv: Sequence[str] | None = None, *, module: str = WORKER_MODULE) -> int:
    """Launch the workers and wait for them; return the exit status.

    Args:
        argv: the command line's arguments.
        module: what each worker process runs.
    """
    options = _parser().parse_args(argv)
    flags = {f"worker_{name}": value for name, value in vars(options).items()}
    try:
        settings = load(
            WorkerSettings,
            flags=flags,
            environment=os.environ,
            project_file=Path("pyproject.toml"),
            user_file=user_file(),
        ).settings
        configure_logging(settings.log_level)
        ModelTable.from_file(settings.models_file).find(settings.worker_model)
        wants_gpu = settings.worker_gpus.replace(",", "").replace("cpu", "") != ""
        groups = parse_gpus(
            settings.worker_gpus,
            available=count_gpus() if wants_gpu else 0,
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
    except CodeherdError as err:
        print_error(err)
        return 1
    if settings.worker_name is not None:
        groups = tuple(
            replace(g, name=f"{settings.worker_name}-{g.name}" if len(groups) > 1 else settings.worker_name)
            for g in groups
        )
    # The children read the same sources; what was given by flag reaches them by environment.
    environment = dict(os.environ)
    environment |= {f"{PREFIX}{name.upper()}": str(v) for name, v in flags.items() if v is not None}
    if settings.worker_threads is None:
        share = max(1, (os.cpu_count() or 1) // len(groups))
        environment[f"{PREFIX}WORKER_THREADS"] = str(share)
    return min(Supervisor(groups, environment=environment, module=module).run(), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="codeherd worker", description="Take jobs, one process per GPU, each holding one model."
    )
    parser.add_argument("--model", help="name or hub id from the model table (default: tiny)")
    parser.add_argument("--gpus", help="all, GPU numbers 0,1, groups 0+1 for one model on two, or cpu")
    parser.add_argument("--quantization", choices=get_args(Quantization))
    parser.add_argument("--slots", type=int, help="sequences decoded together (default: 8)")
    parser.add_argument("--max-len", type=int, help="tokens per slot (default: as many as fit)")
    parser.add_argument("--slot-lengths", help="slots by length, such as 2048x12,16384x1 (default: computed)")
    parser.add_argument("--draft-tokens", help="tokens guessed and tried in one step, 0 to 8, or auto")
    parser.add_argument("--threads", type=int, help="CPU threads per process")
    parser.add_argument("--name", help="name before the @ in Flower (default: gpu0, gpu1, ..., cpu0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
