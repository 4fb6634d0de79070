"""Run a mixed load on one engine for minutes, and look for what only time shows: leaks, and bits that drift.

    python benchmarks/soak.py --minutes 10 --write

Owns: the random load, what is watched while it runs, and the bounds. Does not know queues or SQL (requests
become token ids as in a worker, and go to the engine), and says nothing about speed: it watches.

The load is seeded: completions and infilled holes of the standard library's own source, some of which share
their beginning, with every sampling setting, stop strings, several candidates, cancellations and deadlines.
When a cancellation or a deadline falls is the clock's, so its text is not compared; all others' could be,
and some of them are, alone, at the end.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import queue
import random
import shlex
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from codeherd_worker.device import SPIN_COUNT

# As a worker has it, and before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import codeherd_worker
from codeherd_schema.models import TINY
from codeherd_schema.requests import GenerateRequest, InfillRequest, Sampling
from codeherd_worker.engine.detokenize import Detokenizer
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.passes import Passes
from codeherd_worker.engine.prompts import Prompt, build_prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stopping import CancelReason, CancelToken, Stopper
from codeherd_worker.engine.vocabulary import Vocabulary

TINY_FOLDER = Path(codeherd_worker.__file__).parent / "tiny"
#: Short and long slots, so that a job may land in either. The longest holds any job: a character is at most
#: a token.
SETTINGS = EngineSettings((SlotClass(512, 5), SlotClass(1024, 3)), prefill_chunk=128, draft_tokens=3)
#: Jobs that wait or run at any time, per slot.
_LOAD_PER_SLOT = 2
#: New tokens of a job at most.
_MOST_NEW = 48
#: Prompts start with one of so many beginnings if they share theirs, of up to so many characters.
_SHARED, _SHARED_CHARS = 6, 500
#: One in so many jobs is cancelled, has a deadline, or has several candidates.
_CANCELLED_EVERY, _DEADLINE_EVERY, _CANDIDATES_EVERY = 11, 13, 9
#: One in so many passes is watched for allocations: to watch takes as long as to compute.
_WATCHED_EVERY = 40
#: Finished jobs that are run again alone at the end.
RERUN = 60
#: Seconds until a job that says nothing counts as lost.
_PATIENCE_S = 120.0
#: Bytes by which the process may grow between two idle moments. A finished sequence that stays takes 9 KB
#: (measured), which is this much after 280 of them; the allocator's own wavering was 0.5 MB in 1,525 jobs.
GROWTH_BYTES = 2_500_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one sequence is asked, as often as it runs: a `Stopper` serves one run only."""

    prompt: Prompt
    sampling: SamplingParams
    max_new_tokens: int

    def request(
        self,
        vocabulary: Vocabulary,
        *,
        cancel: CancelToken | None = None,
        deadline: float | None = None,
        priority: int = 5,
    ) -> SequenceRequest:
        """Return a new request for an engine."""
        prompt = self.prompt
        stopper = Stopper(
            stop_ids=prompt.stop_ids,
            stop_strings=prompt.stop_strings,
            max_new_tokens=self.max_new_tokens,
            detokenizer=Detokenizer(
                vocabulary, strip_first_space=prompt.strip_first_space, newline=prompt.newline
            ),
        )
        token = cancel or CancelToken()
        return SequenceRequest(prompt.token_ids, self.sampling, stopper, token, deadline, priority)


@dataclass(frozen=True, slots=True)
class Answer:
    """What must be the same whenever a recipe runs: everything but times and reuse."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    stop_string: str | None

    @classmethod
    def of(cls, outcome: SequenceOutcome) -> Self:
        """Take it from an outcome that was not cancelled."""
        reason = outcome.finish_reason
        return cls(
            outcome.text,
            outcome.token_ids,
            outcome.logprobs,
            None if reason is None else str(reason),
            outcome.stop_string,
        )


class Recipes:
    """An endless supply of random recipes."""

    def __init__(self, seed: int, vocabulary: Vocabulary) -> None:
        self._rng = random.Random(seed)
        self._vocabulary = vocabulary
        files = (Path(str(module.__file__)) for module in (textwrap, queue, shlex))
        self._source = "".join(path.read_text(encoding="utf-8") for path in files)
        self._heads = [self._excerpt(_SHARED_CHARS // 2, _SHARED_CHARS) for _ in range(_SHARED)]

    def next(self) -> Recipe:
        """Return one more."""
        rng = self._rng
        head = rng.choice(self._heads) if rng.random() < 0.4 else ""
        text = head + self._excerpt(1, 400)
        sampling = self.sampling()
        if rng.random() < 0.4:
            middle = rng.randrange(len(text) + 1)
            request: GenerateRequest | InfillRequest = InfillRequest(
                prefix=text[:middle],
                suffix=text[middle:],
                suffix_first=rng.random() < 0.5,
                sampling=sampling,
            )
        else:
            request = GenerateRequest(prompt=text, sampling=sampling)
        return Recipe(
            build_prompt(request, self._vocabulary, TINY), _params(sampling), sampling.max_new_tokens
        )

    def sampling(self) -> Sampling:
        """Return random settings, a quarter of them greedy."""
        rng = self._rng
        return Sampling(
            max_new_tokens=rng.randint(1, _MOST_NEW),
            temperature=0.0 if rng.random() < 0.25 else round(rng.uniform(0.2, 1.2), 2),
            top_p=rng.choice((1.0, 1.0, 0.95, 0.7)),
            top_k=rng.choice((0, 0, 1, 20, 200)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.1, 1.5)),
            stop=rng.choice(((), (), ("\n\n",), ("self", "return"), (":",))),
            logprobs=rng.choice((0, 0, 1, 5)),
            seed=rng.randrange(2**63),
        )

    def _excerpt(self, shortest: int, longest: int) -> str:
        start = self._rng.randrange(len(self._source) - longest)
        return self._source[start : start + self._rng.randint(shortest, longest)]


def _params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed or 0,
        logprobs=sampling.logprobs,
    )


class _NewStorage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest memory that an operation allocates, the cache's own aside."""

    def __init__(self, known: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self.largest_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._known:
                self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
        return result


class Watch:
    """Sees every pass of one engine's model; nothing it does changes one."""

    def __init__(self, engine: Engine) -> None:
        """Start to look, before the warm-up."""
        # The one place that reaches inside: what it looks for, no caller of an engine is told.
        self.passes: Passes = engine._decoder.passes  # noqa: SLF001
        self._forward = self.passes._forward  # noqa: SLF001
        self.passes._forward = self._watched  # type: ignore[assignment]  # noqa: SLF001
        #: Tokens of the passes so far.
        self.token_counts: Counter[int] = Counter()
        self.watched = 0
        self._storage = _NewStorage({*self.passes.cache.addresses, *_weight_addresses(engine)})

    @property
    def largest_bytes(self) -> int:
        """The largest memory that a watched pass allocated."""
        return self._storage.largest_bytes

    def tried_token_counts(self) -> set[int]:
        """Return the tokens of all passes whose bits were compared before the first sequence."""
        passes = self.passes
        widths = (1, 1 + passes.draft_tokens)
        return {*passes.pass_lengths, *(rows * width for rows in passes.row_counts for width in widths)}

    def _watched(self, token_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        self.token_counts[len(token_ids)] += 1
        if self.token_counts.total() % _WATCHED_EVERY:
            return self._forward(token_ids, *args)
        self.watched += 1
        with self._storage:
            return self._forward(token_ids, *args)


def _weight_addresses(engine: Engine) -> Iterator[int]:
    for tensor in engine._model.state_dict().values():  # noqa: SLF001 -- see `Watch`
        yield tensor.untyped_storage().data_ptr()


@dataclass(slots=True)
class Counts:
    """What became of the jobs: each must be counted once."""

    submitted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    #: Times that a job's future was completed.
    completions: Counter[int] = field(default_factory=Counter)

    @property
    def ended(self) -> int:
        """Jobs with an outcome."""
        return self.finished.total() + self.cancelled.total() + self.failed.total()


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    recipe: Recipe
    cancel: CancelToken
    #: Jobs that must have ended before this one is cancelled; None: it never is.
    cancel_after: int | None


class Soak:
    """One engine under load, and what was seen."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, *, seed: int) -> None:
        """Prepare.

        Args:
            engine: not warmed up; `close` closes it.
            vocabulary: the model's.
            seed: of the load.
        """
        self.engine = engine
        self.watch = Watch(engine)
        engine.warm_up()
        passes = self.watch.passes
        self._addresses, self._captures = passes.cache.addresses, passes.graphs.captures
        self.watch.token_counts.clear()
        engine.start()
        self.counts = Counts()
        #: Finished jobs and what they answered: an even sample of all, for `compare`.
        self.answers: list[tuple[Recipe, Answer]] = []
        self._vocabulary = vocabulary
        self._recipes = Recipes(seed, vocabulary)
        self._rng = random.Random(seed + 1)
        self._sampled = 0

    def run(self, *, jobs: int | None = None, seconds: float | None = None) -> None:
        """Keep the engine busy with so many jobs, or for so long; return when all have ended.

        Raises:
            TimeoutError: a job got no outcome.
        """
        end = None if seconds is None else time.monotonic() + seconds
        last = None if jobs is None else self.counts.submitted + jobs
        open_jobs: dict[Future[SequenceOutcome], _Job] = {}
        is_over = False
        while open_jobs or not is_over:
            is_over = is_over or (last is not None and self.counts.submitted >= last)
            is_over = is_over or (end is not None and time.monotonic() >= end)
            if not is_over and len(open_jobs) < _LOAD_PER_SLOT * self.engine.stats().slots:
                open_jobs |= self._submit_some()
                continue
            self._cancel_due(open_jobs.values())
            done, _ = wait(open_jobs, timeout=_PATIENCE_S, return_when=FIRST_COMPLETED)
            if open_jobs and not done:
                raise TimeoutError(f"{len(open_jobs)} jobs got no outcome")
            for future in done:
                self._end(open_jobs.pop(future), future)

    def compare(self) -> int:
        """Run the sample of finished jobs again, each alone; return how many answered otherwise."""
        different = 0
        for recipe, answer in self.answers:
            outcome = self.engine.submit(recipe.request(self._vocabulary)).result(_PATIENCE_S)
            different += Answer.of(outcome) != answer
        return different

    @property
    def moved(self) -> int:
        """Layers whose cache lies elsewhere than after the warm-up."""
        now = self.watch.passes.cache.addresses
        return sum(old != new for old, new in zip(self._addresses, now, strict=True))

    @property
    def captured(self) -> int:
        """Graphs captured since the warm-up."""
        return self.watch.passes.graphs.captures - self._captures

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def problems(self) -> list[str]:
        """Return what is wrong so far, one sentence each; `compare` is on its own."""
        counts, watch, passes = self.counts, self.watch, self.watch.passes
        layer_bytes = passes.cache.cache_bytes // len(passes.cache.addresses)
        untried = set(watch.token_counts) - watch.tried_token_counts()
        checks = {
            "the cache moved": bool(self.moved),
            "a graph was captured after the warm-up": bool(self.captured),
            f"passes of {sorted(untried)} tokens were never tried": bool(untried),
            "no pass was watched for allocations": not watch.watched,
            f"a pass allocated {watch.largest_bytes} bytes, a layer's cache has {layer_bytes}": (
                watch.largest_bytes >= layer_bytes
            ),
            f"jobs failed: {dict(counts.failed)}": bool(counts.failed),
            f"{counts.submitted} jobs were submitted, {counts.ended} ended": (
                counts.ended != counts.submitted or len(counts.completions) != counts.submitted
            ),
            "a job ended twice": any(times != 1 for times in counts.completions.values()),
        }
        return [problem for problem, is_wrong in checks.items() if is_wrong]

    def _submit_some(self) -> dict[Future[SequenceOutcome], _Job]:
        """Submit one job, or several candidates of one."""
        recipe, rng = self._recipes.next(), self._rng
        is_many = rng.randrange(_CANDIDATES_EVERY) == 0
        return dict(self._submit(recipe, seed) for seed in range(rng.randint(2, 4) if is_many else 1))

    def _submit(self, recipe: Recipe, candidate: int) -> tuple[Future[SequenceOutcome], _Job]:
        rng, counts = self._rng, self.counts
        if candidate:
            recipe = Recipe(
                recipe.prompt, _with_seed(recipe.sampling, recipe.sampling.seed + candidate),
                recipe.max_new_tokens,
            )  # fmt: skip
        cancel_after = counts.ended + rng.randrange(8) if rng.randrange(_CANCELLED_EVERY) == 0 else None
        has_deadline = rng.randrange(_DEADLINE_EVERY) == 0
        job = _Job(counts.submitted, recipe, CancelToken(), cancel_after)
        request = recipe.request(
            self._vocabulary,
            cancel=job.cancel,
            deadline=time.monotonic() + rng.uniform(0.0, 0.3) if has_deadline else None,
            priority=rng.choice((0, 5, 5, 9)),
        )
        counts.submitted += 1
        future = self.engine.submit(request)
        future.add_done_callback(lambda _future: counts.completions.update((job.number,)))
        return future, job

    def _cancel_due(self, jobs: Iterable[_Job]) -> None:
        for job in jobs:
            if job.cancel_after is not None and job.cancel_after <= self.counts.ended:
                job.cancel.cancel(CancelReason.USER)

    def _end(self, job: _Job, future: Future[SequenceOutcome]) -> None:
        counts = self.counts
        error = future.exception()
        if error is not None:
            counts.failed[type(error).__name__] += 1
            return
        outcome = future.result()
        if outcome.finish_reason is None:
            counts.cancelled[str(outcome.cancelled)] += 1
            return
        counts.finished[str(outcome.finish_reason)] += 1
        self._keep(job.recipe, Answer.of(outcome))

    def _keep(self, recipe: Recipe, answer: Answer) -> None:
        # Algorithm R (Vitter 1985): each finished job is in the sample with the same probability.
        self._sampled += 1
        if len(self.answers) < RERUN:
            self.answers.append((recipe, answer))
            return
        place = self._rng.randrange(self._sampled)
        if place < RERUN:
            self.answers[place] = (recipe, answer)


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=seed,
        logprobs=params.logprobs,
    )


def resident_bytes() -> int:
    """Return the memory that this process holds now, garbage collected (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_soak(*, seed: int) -> Soak:
    """Return the embedded model under load, in float32 on this machine's CPU."""
    loaded = load_model(str(TINY_FOLDER), quantization="none", device="cpu", slots=SETTINGS.slots)
    engine = Engine(loaded.model, SETTINGS)
    return Soak(engine, Vocabulary.from_folder(TINY_FOLDER), seed=seed)


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(
        ["| what | seen |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def _rows(soak: Soak, resident: list[int], different: int) -> dict[str, object]:
    counts, stats, watch = soak.counts, soak.engine.stats(), soak.watch
    cache, settings = watch.passes.cache, SETTINGS
    return {
        "jobs": f"{counts.submitted}, each with one outcome: {counts.ended == counts.submitted}",
        "finished": ", ".join(f"{name} {count}" for name, count in sorted(counts.finished.items())),
        "cancelled": ", ".join(f"{name} {count}" for name, count in sorted(counts.cancelled.items())),
        "failed": counts.failed.total(),
        "new tokens": stats.tokens,
        "decode steps, prefill passes": f"{stats.steps}, {stats.passes}",
        "prompt tokens, of these copied": f"{stats.prompt_tokens}, {stats.reused_tokens}",
        "drafts tried, of these right": f"{stats.drafted}, {stats.accepted}",
        "cache": f"{cache.cache_bytes / 1e6:.1f} MB in {len(cache.addresses)} allocations, "
        f"{soak.moved} of them moved",
        "largest allocation of a pass": f"{watch.largest_bytes / 1e6:.2f} MB, {watch.watched} passes watched",
        "graphs captured after the warm-up": soak.captured,
        "numbers of tokens in a pass": f"{len(watch.token_counts)}, "
        f"{len(watch.tried_token_counts())} were tried",
        "resident memory, MB": ", ".join(f"{value / 1e6:.1f}" for value in resident)
        + " (after the first tenth; then at each tenth, idle)",
        "growth, MB": f"{growth(resident) / 1e6:.1f} (at most {GROWTH_BYTES / 1e6:.1f})",
        "run again alone, of these different": f"{len(soak.answers)}, {different}",
        "engine": f"{' '.join(f'{part.slots}x{part.length}' for part in settings.classes)} slots, "
        f"chunk {settings.prefill_chunk}, drafts {settings.draft_tokens}, "
        f"fingerprint {soak.engine.fingerprint}",
    }


def growth(resident: list[int]) -> int:
    """Return by how many bytes the later half of the looks is above the first look."""
    return int(statistics.median(resident[len(resident) // 2 :])) - resident[0]


def _facts(minutes: float, seed: int) -> dict[str, object]:
    return {
        "time": f"{minutes:g} minutes, seed {seed}",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()}, GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "model": "tiny, float32",
    }


def _tenths(soak: Soak, minutes: float, say: Callable[[str], None]) -> list[int]:
    """Run for so long; return the resident memory at each tenth, with nothing in flight."""
    resident = []
    for tenth in range(1, 11):
        soak.run(seconds=minutes * 6)
        resident.append(resident_bytes())
        say(f"{tenth * minutes / 10:.1f} min  {soak.counts.ended} jobs  {resident[-1] / 1e6:.1f} MB")
    return resident


def main() -> int:
    """Run, print the table, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="store the table in benchmarks/results")
    arguments = parser.parse_args()
    soak = open_soak(seed=arguments.seed)
    resident = _tenths(soak, arguments.minutes, lambda line: print(line, flush=True))
    problems = soak.problems()
    if growth(resident) > GROWTH_BYTES:
        problems.append(f"the process grew by {growth(resident) / 1e6:.1f} MB")
    different = soak.compare()
    if different:
        problems.append(f"{different} of {len(soak.answers)} jobs answered otherwise alone")
    soak.close()
    table = _table(_rows(soak, resident, different) | _facts(arguments.minutes, arguments.seed))
    print(f"\n{table}\n", *problems, sep="\n")
    if arguments.write:
        day = datetime.now(UTC).date().isoformat()
        path = Path(__file__).parent / "results" / f"{day}-soak-cpu.md"
        found = "".join(f"- {problem}\n" for problem in problems) or "Nothing was wrong.\n"
        path.write_text(f"# The engine under a mixed load, {day}\n\n{table}\n\n{found}", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
