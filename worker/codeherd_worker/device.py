"""Which processes to start on which devices, and how each is pinned.

Owns: the `--gpus` language, CUDA_VISIBLE_DEVICES, thread counts. Does not import torch: a process
must be pinned before torch first looks at the devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from codeherd_schema.errors import DeviceUnavailable

#: Counts GPUs in a process of its own, so that this one never touches CUDA.
_COUNT = "import torch; print(torch.cuda.device_count())"


Device = Literal["cpu", "cuda", "cuda-group"]


#: How long a thread of GNU's OpenMP spins before it sleeps, some 30 microseconds. Measured with the tiny
#: model on two cores, 64 jobs over 16 slots: 2,700 tokens/s, as with endless spinning; 1,600 without any.
#: Where two other processes want both cores, spinning starves them and itself: 3,000 turns cost 1.7 times
#: what sleeping does, GNU's own 300,000 up to 6 times.
SPIN_COUNT = "3000"


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """The devices of one worker process."""

    #: `gpu0`, `gpu0+1` or `cpu0`: the worker's name before the `@`.
    name: str
    #: Value of CUDA_VISIBLE_DEVICES; empty hides every GPU.
    visible: str
    #: `cpu`, `cuda` (one GPU) or `cuda-group` (sharded over several).
    device: Device

    def environment(self) -> dict[str, str]:
        """Return the variables that pin a process to this group."""
        pinned = {"CUDA_VISIBLE_DEVICES": self.visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.device == "cpu":
            pinned["GOMP_SPINCOUNT"] = SPIN_COUNT
        else:
            # Weights are joined after loading, which leaves holes that nothing else would fit.
            pinned["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        return pinned


def parse_gpus(text: str, *, available: int, visible: str | None = None) -> tuple[DeviceGroup, ...]:
    """Read `all`, `0,1`, `0+1`, `cpu` or `cpu,cpu` into one group per process.

    Args:
        text: what the user asked for; numbers count within the GPUs this process may see.
        available: how many GPUs there are.
        visible: CUDA_VISIBLE_DEVICES of this process, whose entries are handed on.

    Raises:
        DeviceUnavailable: a GPU that is not there, one named twice, or text that says nothing.
    """
    names = visible.split(",") if visible else [str(i) for i in range(available)]
    if text == "all":
        if available == 0:
            raise DeviceUnavailable("no GPU found", hint="`--gpus cpu` runs on the CPU")
        text = ",".join(str(i) for i in range(available))
    groups: list[DeviceGroup] = []
    taken: set[int] = set()
    for number, part in enumerate(text.split(",")):
        if part == "cpu":
            groups.append(DeviceGroup(f"cpu{number}", "", "cpu"))
            continue
        members = _members(part, text)
        for member in members:
            if member >= available:
                raise DeviceUnavailable(
                    f"GPU {member} is not there, {available} found", hint="`--gpus all` takes every GPU"
                )
            if member in taken:
                raise DeviceUnavailable(f"GPU {member} is named twice in `{text}`")
            taken.add(member)
        groups.append(
            DeviceGroup(
                name="gpu" + "+".join(str(m) for m in members),
                visible=",".join(names[m] for m in members),
                device="cuda" if len(members) == 1 else "cuda-group",
            )
        )
    return tuple(groups)


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that torch would see, without loading torch here.

    Raises:
        DeviceUnavailable: torch is not installed or does not start.
    """
    done = subprocess.run(  # noqa: S603 -- our own interpreter and a constant
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, env=dict(environment), check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DeviceUnavailable(f"torch does not start: {reason}", hint="pip install 'codeherd[worker]'")
    return int(done.stdout)


def _members(part: str, text: str) -> tuple[int, ...]:
    try:
        members = tuple(int(number) for number in part.split("+"))
    except ValueError:
        members = ()
    if not members or any(member < 0 for member in members):
        raise DeviceUnavailable(
            f"`{text}` names no devices", hint="use `all`, `0,1`, `0+1` for one model on two GPUs, or `cpu`"
        )
    return members
