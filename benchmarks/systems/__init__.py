"""Every way to generate that takes part, and how it is started.

Owns: the names in the tables, the packages that must be installed, and the jobs that a system is given. A
module in this package holds one system as a class `System` that follows `benchmarks.contender.System`; it is
imported only in that system's own process.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tables."""

    name: str
    #: Module in this package.
    module: str
    #: Distributions that must be installed; the first one's version is reported.
    packages: tuple[str, ...]
    #: Arguments of the module's `System`.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Workloads it takes part in; None means all.
    workloads: frozenset[str] | None = None
    #: Jobs that it runs together before it looks at the next ones; a few such groups tell the speed of all.
    #: None where a job may start whenever another one ends.
    group: int | None = None
    #: Whether it reads weights in a format of its own.
    has_own_format: bool = False
    #: Whether it computes with torch.
    uses_torch: bool = True

    @property
    def version(self) -> str | None:
        """The first package's version; None if one of them is missing."""
        try:
            versions = [importlib.metadata.version(package) for package in self.packages]
        except importlib.metadata.PackageNotFoundError:
            return None
        return versions[0]


OURS = Entry("codeherd", "codeherd", ("codeherd",))

_ENTRIES = (
    OURS,
    Entry(
        "codeherd, prefix reuse off",
        "codeherd",
        ("codeherd",),
        options={"reuse_prefixes": False},
        workloads=frozenset({"backfill"}),
    ),
    Entry(
        "codeherd, speculation 3",
        "codeherd",
        ("codeherd",),
        options={"draft_tokens": 3},
        workloads=frozenset({"ragged", "single"}),
    ),
    Entry("generate_static", "generate_static", ("transformers",), group=1),
    Entry("pipeline", "pipeline", ("transformers",), group=1),
    Entry("padded_batches", "padded_batches", ("transformers",), group=16),
    Entry("generate_batch", "generate_batch", ("transformers",)),
    Entry("llama_cpp", "llama_cpp", ("llama-cpp-python", "gguf"), has_own_format=True, uses_torch=False),
    Entry("ctranslate2", "ctranslate2", ("ctranslate2",), has_own_format=True, uses_torch=False),
)

#: By name, in the order of the tables.
SYSTEMS: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
