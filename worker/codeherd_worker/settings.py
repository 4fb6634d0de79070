"""What a worker needs to know beside the shared settings.

Owns: names, defaults, units and ranges of the worker's settings. Does not read the environment:
`codeherd_schema.settings.load` does, at the entry points.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from codeherd_schema.settings import SharedSettings

#: How the weights are held: `nf4` is 4-bit NormalFloat with double quantization, `int8` is LLM.int8
#: without the outlier split (no step waits for the host), `none` is bfloat16 on a GPU and float32 on a
#: CPU, `auto` chooses by model size, slots and memory.
Quantization = Literal["auto", "nf4", "int8", "none"]


class WorkerSettings(SharedSettings):
    """One worker process, or the launcher of several."""

    #: Model to hold: a name or hub id from the model table.
    worker_model: str = "tiny"
    #: `all`, GPU numbers such as `0,1`, groups such as `0+1`, or `cpu`.
    worker_gpus: str = "all"
    #: How the weights are held: `auto`, `nf4`, `int8` or `none`.
    worker_quantization: Quantization = "auto"
    #: Sequences decoded together; also the number of jobs taken at a time.
    worker_slots: int = Field(default=8, ge=1, le=512)
    #: Tokens per slot, prompt and completion together; empty is as many as fit.
    worker_max_len: int | None = Field(default=None, ge=16)
    #: Tokens per prefill step; decoding waits for at most one such step.
    worker_prefill_chunk: int = Field(default=256, ge=16, le=4096)
    #: CPU threads per process; empty shares the cores evenly.
    worker_threads: int | None = Field(default=None, ge=1)
    #: Name before the `@` in Flower; empty is `gpu0`, `gpu1`, …, `cpu0`, ….
    worker_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._+-]{1,32}$")
    #: Seconds that running jobs may go on after a stop was asked for.
    worker_drain_timeout_s: float = Field(default=30.0, ge=0, le=3600)
    #: Seconds without a finished step after which the engine counts as hung and the process ends.
    worker_step_timeout_s: float = Field(default=300.0, gt=0, le=86_400)
