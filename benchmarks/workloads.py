"""The jobs that every system runs: token ids in, a fixed number of new tokens out.

Owns: the four workloads and their sizes. Does not know who runs them or how time is taken.

    ragged     many jobs at once, prompts and answers of very different lengths
    backfill   holes in real files, each with all that stands before it and a body's length of what follows:
               prompts of one file share their beginnings
    long       few long prompts, short answers: mostly prefill
    single     one job at a time, each waits for the one before: latency

Every round asks for other prompts of the same shape, so that no system can answer a round from what it kept
of the round before. The same name, model and round give the same jobs on every machine; the holes are those
of the running Python's own standard library.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.models import BenchModel
from codeherd_schema.models import TINY
from codeherd_schema.requests import InfillRequest, Sampling
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.vocabulary import Vocabulary

#: The round that warms a system up; measured rounds count from 1.
WARM_UP_ROUND = 0

#: Files of the standard library with functions of many sizes, none of them huge.
_FILES = ("textwrap.py", "queue.py", "shlex.py", "calendar.py")
#: Token ids before these are control and byte pieces, which random prompts leave out.
_FIRST_ORDINARY_ID = 259
#: Tokens after a hole: the body that a docstring belongs to, and a little more.
_SUFFIX_TOKENS = 128
#: Tokens that the infilling format adds at most to a file's own: control ids and dummy prefixes.
_FORMAT_TOKENS = 8


class Arrival(StrEnum):
    """When the jobs of a workload are submitted."""

    AT_ONCE = "at once"
    ONE_BY_ONE = "one by one"


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and how many tokens must follow it; the end-of-text token does not end it."""

    prompt_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs in order of arrival."""

    name: str
    arrival: Arrival
    jobs: tuple[Job, ...]

    @property
    def new_tokens(self) -> int:
        """Tokens to generate in all."""
        return sum(job.new_tokens for job in self.jobs)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(job.prompt_ids) for job in self.jobs)

    @property
    def longest(self) -> int:
        """Tokens of the longest job, prompt and answer together."""
        return max(len(job.prompt_ids) + job.new_tokens for job in self.jobs)

    def sample(self, count: int) -> Workload:
        """Return every n-th job, `count` in all: for systems that take jobs one at a time anyway."""
        if count >= len(self.jobs):
            return self
        stride = len(self.jobs) / count
        return Workload(self.name, self.arrival, tuple(self.jobs[int(i * stride)] for i in range(count)))

    def brief(self, count: int, *, prompt_tokens: int, new_tokens: int) -> Workload:
        """Return a sample of `count` jobs, each with at most so many tokens in and out."""
        jobs = tuple(
            Job(job.prompt_ids[:prompt_tokens], min(job.new_tokens, new_tokens))
            for job in self.sample(count).jobs
        )
        return Workload(self.name, self.arrival, jobs)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        jobs = [[list(job.prompt_ids), job.new_tokens] for job in self.jobs]
        return {"name": self.name, "arrival": str(self.arrival), "jobs": jobs}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Workload:
        """Build a workload from `to_json`'s fields."""
        jobs = tuple(Job(tuple(prompt_ids), new_tokens) for prompt_ids, new_tokens in fields["jobs"])
        return cls(fields["name"], Arrival(fields["arrival"]), jobs)


#: Makes the jobs of one round for a model.
Builder = Callable[[BenchModel, int], Workload]


#: Most rounds by model and workload: one prompt of 4,096 tokens takes some systems a minute.
MOST_ROUNDS = {("random-110m", "long"): 1}


@dataclass(frozen=True, slots=True)
class _Size:
    """How much of each workload a model runs; the whole suite has to end within an hour."""

    ragged_jobs: int
    backfill_files: int
    holes_per_file: int
    #: Tokens of a file's longest prompt; a backfill shows a model of 2,048 tokens or more about as many.
    file_tokens: int
    long_jobs: int
    single_jobs: int


_SIZES = {
    "tiny": _Size(
        ragged_jobs=64, backfill_files=4, holes_per_file=12, file_tokens=1440, long_jobs=8, single_jobs=8
    ),
    "random-110m": _Size(
        ragged_jobs=48, backfill_files=1, holes_per_file=12, file_tokens=1440, long_jobs=1, single_jobs=4
    ),
}


def ragged(model: BenchModel, number: int) -> Workload:
    """Return jobs of 32 to 256 tokens in and 16 to 128 out; every round has the same lengths."""
    lengths, ids = random.Random("ragged"), random.Random(f"ragged {number}")
    jobs = []
    for _ in range(_SIZES[model.name].ragged_jobs):
        prompt, new = lengths.randint(32, 256), lengths.randint(16, 128)
        jobs.append(Job(_random_prompt(ids, model, prompt), new))
    return Workload("ragged", Arrival.AT_ONCE, tuple(jobs))


def backfill(model: BenchModel, number: int) -> Workload:
    """Return holes of 16 to 32 tokens, file by file and from top to bottom as a backfill submits them."""
    size = _SIZES[model.name]
    vocabulary = Vocabulary.from_folder(model.folder)
    lengths = random.Random("backfill")
    jobs = []
    for name in _FILES[: size.backfill_files]:
        source = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
        # The first line makes the round's prompts new from their beginning on.
        lines = [f"# Copy {number}.\n", *source.splitlines(keepends=True)]
        for prefix, suffix in _holes(lines, vocabulary, size.file_tokens, size.holes_per_file):
            new = lengths.randint(16, 32)
            request = InfillRequest(prefix=prefix, suffix=suffix, sampling=Sampling(max_new_tokens=new))
            jobs.append(Job(build_prompt(request, vocabulary, TINY).token_ids, new))
    return Workload("backfill", Arrival.AT_ONCE, tuple(jobs))


def long(model: BenchModel, number: int) -> Workload:
    """Return prompts of 4,096 tokens, or as many as the model's window leaves, with 32 new ones each."""
    new = 32
    prompt = min(4096, model.window - 128)
    ids = random.Random(f"long {number}")
    jobs = tuple(Job(_random_prompt(ids, model, prompt), new) for _ in range(_SIZES[model.name].long_jobs))
    return Workload("long", Arrival.AT_ONCE, jobs)


def single(model: BenchModel, number: int) -> Workload:
    """Return jobs of 64 tokens in and 64 out that come one after the other."""
    ids = random.Random(f"single {number}")
    jobs = tuple(Job(_random_prompt(ids, model, 64), 64) for _ in range(_SIZES[model.name].single_jobs))
    return Workload("single", Arrival.ONE_BY_ONE, jobs)


#: By name, in the order of the tables.
WORKLOADS: Mapping[str, Builder] = MappingProxyType(
    {"ragged": ragged, "backfill": backfill, "long": long, "single": single}
)


def _random_prompt(source: random.Random, model: BenchModel, length: int) -> tuple[int, ...]:
    """Return BOS and ordinary ids, `length` in all."""
    ids: list[int] = []
    while len(ids) < length - 1:
        token = source.randrange(_FIRST_ORDINARY_ID, model.vocab_size)
        if token not in model.control_ids:
            ids.append(token)
    return (model.bos_id, *ids)


def _holes(lines: list[str], vocabulary: Vocabulary, tokens: int, count: int) -> list[tuple[str, str]]:
    """Return prefix and suffix of `count` holes; the last has `tokens` of prompt at most."""
    shown = _fitting(lines, vocabulary, tokens - _SUFFIX_TOKENS - _FORMAT_TOKENS)
    stride = len(shown) / count
    borders = [int((i + 1) * stride) for i in range(count)]
    return [
        ("".join(shown[:at]), "".join(_fitting(lines[at:], vocabulary, _SUFFIX_TOKENS))) for at in borders
    ]


def _fitting(lines: list[str], vocabulary: Vocabulary, tokens: int) -> list[str]:
    """Return the first lines that have so many tokens together at most."""
    fitting: list[str] = []
    for line in lines:
        tokens -= len(vocabulary.encode_raw(line))
        if tokens < 0:
            break
        fitting.append(line)
    return fitting
