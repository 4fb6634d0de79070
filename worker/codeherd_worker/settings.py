"""What a worker needs to know beside the shared settings.

Owns: names, defaults, units and ranges of the worker's settings. Does not read the environment:
`codeherd_schema.settings.load` does, at the entry points.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.settings import SharedSettings
from codeherd_worker.engine.quantization import Quantization as Quantization
from codeherd_worker.engine.slot_classes import SlotClass


class WorkerSettings(SharedSettings):
    """One worker process, or the launcher of several."""

    #: Model to hold: a name or hub id from the model table.
    worker_model: str = "tiny"
    #: `all`, GPU numbers such as `0,1`, groups such as `0+1`, or `cpu`.
    worker_gpus: str = "all"
    #: How the weights are held: `auto` (by model size, slots and memory), `nf4`, `int8`, `none` (the
    #: device's own dtype), `bf16`, `fp16`, `torchao-int8` or `torchao-int4`.
    worker_quantization: Quantization = "auto"
    #: Sequences decoded together; also the number of jobs taken at a time.
    worker_slots: int = Field(default=8, ge=1, le=512)
    #: Tokens of the longest slot, prompt and completion together; empty is the model's context window,
    #: or as much of it as fits.
    worker_max_len: int | None = Field(default=None, ge=16)
    #: How many slots of which length, such as `2048x12,4096x3,16384x1`, best in multiples of 512; empty
    #: computes them from the device's memory. Their number is then `worker_slots`, which may be left out.
    worker_slot_lengths: str = Field(default="", pattern=r"^([0-9]+x[0-9]+(,[0-9]+x[0-9]+)*)?$")
    #: Tokens guessed from the prompt and tried in one step: 0 to 8, or `auto` (by device, quantization
    #: and slots).
    worker_draft_tokens: str = Field(default="auto", pattern=r"^(auto|[0-8])$", coerce_numbers_to_str=True)
    #: Copy a prompt's beginning from a slot that has computed the same tokens.
    worker_reuse_prefixes: bool = True
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

    @property
    def slot_classes(self) -> tuple[SlotClass, ...]:
        """Return the slots that `worker_slot_lengths` asks for, shortest first; empty if it is."""
        counts: dict[int, int] = {}
        for length, slots in _pairs(self.worker_slot_lengths):
            counts[length] = counts.get(length, 0) + slots
        return tuple(SlotClass(length, slots) for length, slots in sorted(counts.items()))

    @model_validator(mode="before")
    @classmethod
    def _count_slots(cls, values: Any) -> Any:
        # `worker_slots` is what the pool and the broker go by, wherever the number came from.
        total = sum(slots for _, slots in _pairs(str(values.get("worker_slot_lengths", ""))))
        return values if "worker_slots" in values or not total else values | {"worker_slots": total}

    def model_post_init(self, context: Any) -> None:
        """Refuse slot settings that contradict each other."""
        super().model_post_init(context)
        classes = self.slot_classes
        if not classes:
            return
        total, longest = sum(part.slots for part in classes), classes[-1].length
        if total != self.worker_slots:
            raise InvalidSetting(
                f"worker_slot_lengths names {total} slots, worker_slots is {self.worker_slots}",
                hint="leave worker_slots out",
            )
        if self.worker_max_len is not None and longest > self.worker_max_len:
            raise InvalidSetting(
                f"worker_slot_lengths has a slot of {longest} tokens, worker_max_len is "
                f"{self.worker_max_len}",
                hint="leave worker_max_len out",
            )


def _pairs(text: str) -> list[tuple[int, int]]:
    """Read `LENGTHxSLOTS,…`; nothing of a text that is not written so, which its field refuses."""
    words = (part.partition("x") for part in text.split(","))
    return [(int(a), int(b)) for a, _, b in words if a.isdecimal() and b.isdecimal()]
