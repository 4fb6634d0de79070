"""One process of the GPU benchmark: makes one model, and measures cases of it until one fails.

    python -m benchmarks.gpu_cases CASES

Owns: how each figure is taken. CASES is a JSON list; one line of JSON per case comes out, a list of rows or
an error. After an error the process ends, so that the next case meets a clean device. Does not know which
cases there are, nor what becomes of the rows (`benchmarks.gpu`).

    decode     new tokens/s of all slots while all of them decode, context as said, prefills left out
    batch      new tokens/s of as many equal jobs as there are slots, from submission to the last token
    prefill    prompt tokens/s of the same jobs with one new token each
    ceilings   what the device can do at most; a profile lists the kernels of some decode steps
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

# Before torch is imported; the second is for the model library, which must not look for anything.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.gpu_models import build_model, config_of, dtype_of
from benchmarks.roofline import Ceilings, Roofline, measure_ceilings
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.graphs import StepGraphs
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper

#: Seconds that any answer may take.
_PATIENCE_S = 600.0
#: Steps that a profile looks at, and lines of its table.
_PROFILED_STEPS, _PROFILED_KERNELS = 5, 25


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured together, on one model."""

    system: str
    shape: str
    quantization: str
    slots: int
    prompt: int = 1024
    new: int = 96
    chunk: int = 256
    is_sampled: bool = False
    device: str = "cuda"

    @property
    def name(self) -> str:
        """What the case is called, also in filters."""
        sampled = ", sampled" if self.is_sampled else ""
        chunk = "" if self.chunk == 256 else f", chunk {self.chunk}"
        return f"{self.system} {self.shape} {self.quantization} {self.slots}{sampled}{chunk}"


def main() -> None:
    """Measure the cases that the command line names."""
    answers = _claim_stdout()
    cases = [Case(**fields) for fields in json.loads(sys.argv[1])]
    device = torch.device("cuda:0" if cases[0].device == "cuda" else "cpu")
    model: LlamaForCausalLM | None = None
    for case in cases:
        try:
            if model is None and case.system != "ceilings":
                model = build_model(case.shape, case.quantization, device)
            answer: dict[str, Any] = {"rows": _MEASURES[case.system](model, case, device)}
        except Exception as err:
            traceback.print_exc()
            answer = {"error": f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            break
        _forget(device)
    # Not by way of destructors, which a dead device or a library's thread can keep busy.
    os._exit(0)


def machine(device: torch.device) -> str:
    """Return the device's name and what it has."""
    if device.type == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def version_of(package: str) -> str:
    """Return an installed version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class _Clock:
    """A detokenizer that makes no text and notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def push(self, token_id: int) -> str:
        self.times.append(time.perf_counter())
        return ""

    def finish(self) -> str:
        return ""


class _Streamer:
    """The same for transformers; the first call brings the prompt."""

    def __init__(self) -> None:
        self._calls: list[float] = []

    def put(self, _: object) -> None:
        self._calls.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def times(self) -> list[float]:
        return self._calls[1:]


def _ceilings(_: object, case: Case, device: torch.device) -> list[dict[str, Any]]:
    found = measure_ceilings(device)
    packages = ("torch", "transformers", "bitsandbytes", "triton")
    return [
        {
            "system": case.system,
            "workload": "ceilings",
            "machine": machine(device),
            "versions": {name: version_of(name) for name in packages},
            **asdict(found),
        }
    ]


def _engine(model: LlamaForCausalLM, case: Case, device: torch.device) -> list[dict[str, Any]]:
    _reset_peak(device)
    engine, facts = _start(model, case)
    try:
        jobs = _prompts(case, "warm")
        _finish([_submit(engine, case, ids, 2)[0] for ids in jobs[:2]])
        prefill_s = _round_s(engine, case, "prefill", new=1)
        batch_s = _round_s(engine, case, "batch", new=case.new)
        tokens_per_s, context = _steady(engine, case)
    finally:
        engine.close()
    facts |= {"peak_bytes": _peak_bytes(device), "reserved_bytes": _reserved_bytes(device)}
    return [
        _row(
            case,
            "decode",
            tokens_per_s,
            ms_per_step=1000 * case.slots / tokens_per_s,
            context=context,
            **facts,
        ),
        _row(case, "batch", case.slots * case.new / batch_s, seconds=batch_s, **facts),
        _row(case, "prefill", case.slots * case.prompt / prefill_s, seconds=prefill_s, **facts),
    ]


def _start(model: LlamaForCausalLM, case: Case) -> tuple[Engine, dict[str, Any]]:
    """Return a running engine, and what its start found out."""
    longest = case.prompt + case.new + _passes(case) * case.slots + 8
    settings = EngineSettings.uniform(
        slots=case.slots, max_len=longest, prefill_chunk=case.chunk, reuse_prefixes=False
    )
    engine = Engine(model, settings)
    started_at = time.perf_counter()
    checks = engine.warm_up()
    warm_s = time.perf_counter() - started_at
    passes = engine._decoder.passes  # noqa: SLF001 -- to be looked at and to be slowed down
    if case.system == "codeherd, graphs off":
        passes.graphs = StepGraphs(passes.device)
    engine.start()
    return engine, {
        "warm_s": round(warm_s, 1),
        "graphs": passes.graphs.captures,
        "checks": asdict(checks),
        "rows": passes.rows,
        "granule": passes.granule,
        "kv_lengths": [list(lengths) for lengths in passes.kv_lengths],
        "cache_bytes": passes.cache.cache_bytes,
    }


def _round_s(engine: Engine, case: Case, name: str, *, new: int) -> float:
    """Return the seconds of one job per slot, all submitted at once."""
    prompts = _prompts(case, name)
    started_at = time.perf_counter()
    _finish([_submit(engine, case, ids, new)[0] for ids in prompts])
    return time.perf_counter() - started_at


def _steady(engine: Engine, case: Case) -> tuple[float, float]:
    """Return tokens/s while every slot decodes and none prefills, and the mean context then."""
    futures, clocks = _submit_staggered(engine, case, "decode")
    _finish(futures)
    begin, end = max(clock.times[0] for clock in clocks), min(clock.times[-1] for clock in clocks)
    inside = [sum(begin < t <= end for t in clock.times) for clock in clocks]
    if min(inside) < max(2, case.new // 4):
        raise RuntimeError(f"only {min(inside)} steps were steady")
    before = [sum(t <= begin for t in clock.times) for clock in clocks]
    contexts = [case.prompt + b + i / 2 for b, i in zip(before, inside, strict=True)]
    return sum(inside) / (end - begin), sum(contexts) / len(contexts)


def _submit_staggered(
    engine: Engine, case: Case, name: str
) -> tuple[list[Future[SequenceOutcome]], list[_Clock]]:
    """Submit one job per slot, so that all of them end together."""
    jobs = []
    for place, ids in enumerate(_prompts(case, name)):
        # One prompt after the other is prefilled, with a step after every pass: the first get more tokens.
        more = _passes(case) * (case.slots - 1 - place)
        jobs.append(_submit(engine, case, ids, case.new + more))
    return [future for future, _ in jobs], [clock for _, clock in jobs]


def _profile(model: LlamaForCausalLM, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Return which kernels some decode steps ran, and for how long."""
    engine, _ = _start(model, case)
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA] if device.type == "cuda" else [activity.CPU]
    try:
        futures, clocks = _submit_staggered(engine, case, "profile")
        while min(len(clock.times) for clock in clocks) < 2 and not any(f.done() for f in futures):
            time.sleep(0.0005)
        first = engine.stats().steps
        with torch.profiler.profile(activities=activities) as profile:
            while engine.stats().steps < first + _PROFILED_STEPS and not any(f.done() for f in futures):
                time.sleep(0.0005)
            steps = max(1, engine.stats().steps - first)
        _finish(futures)
    finally:
        engine.close()
    averages = profile.key_averages()
    kernels = sorted(averages, key=_kernel_us, reverse=True)[:_PROFILED_KERNELS]
    lines = [
        f"{_kernel_us(k) / steps / 1000:9.3f} ms  {k.count / steps:7.1f} calls  {k.key[:90]}" for k in kernels
    ]
    calls = sum(k.count for k in averages) / steps
    return [_row(case, "profile", 0.0, kernels_per_step=round(calls, 1), table=lines)]


def _generate_static(model: LlamaForCausalLM, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Measure transformers' `generate` with a static cache, which it compiles unless told not to."""
    _reset_peak(device)
    settings = GenerationConfig(
        max_new_tokens=case.new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile="compiled" not in case.system,
    )
    times: list[float] = []
    started_at = time.perf_counter()
    for name in ("warm", "warm again", "decode"):
        streamer = _Streamer()
        ids = torch.tensor(_prompts(case, name)[:1], device=device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
        )
        if name == "warm again":
            started_at, warm_s = time.perf_counter(), time.perf_counter() - started_at
        times = streamer.times
    seconds = time.perf_counter() - started_at
    rate = (len(times) - 1) / (times[-1] - times[0])
    facts = {"peak_bytes": _peak_bytes(device), "warm_s": round(warm_s, 1)}
    return [
        _row(case, "decode", rate, ms_per_step=1000 / rate, context=case.prompt + case.new / 2, **facts),
        _row(case, "batch", case.new / seconds, seconds=seconds, **facts),
    ]


def _generate_batch(model: LlamaForCausalLM, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Measure transformers' continuous batching with the settings that it chooses itself."""
    _reset_peak(device)
    settings = GenerationConfig(max_new_tokens=case.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    seconds = 0.0
    for name in ("warm", "batch"):
        started_at = time.perf_counter()
        outputs = model.generate_batch(
            inputs=[list(ids) for ids in _prompts(case, name)],
            generation_config=settings,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - started_at
        counts = [len(output.generated_tokens) for output in outputs.values()]
        if counts != [case.new] * case.slots:
            raise RuntimeError(f"generated {sum(counts)} tokens of {case.new * case.slots}")
    return [
        _row(case, "batch", case.slots * case.new / seconds, seconds=seconds, peak_bytes=_peak_bytes(device))
    ]


_MEASURES: Mapping[str, Callable[[Any, Case, torch.device], list[dict[str, Any]]]] = {
    "ceilings": _ceilings,
    "codeherd": _engine,
    "codeherd, graphs off": _engine,
    "codeherd, profile": _profile,
    "generate_static": _generate_static,
    "generate_static, compiled": _generate_static,
    "generate_batch": _generate_batch,
}


def _row(case: Case, workload: str, tokens_per_s: float, **more: Any) -> dict[str, Any]:
    package = "codeherd" if case.system.startswith("codeherd") else "transformers"
    dtype = dtype_of(case.quantization, torch.device(case.device))
    return {
        "system": case.system,
        "version": version_of(package),
        "workload": workload,
        "model": case.shape,
        "precision": case.quantization,
        "dtype": str(dtype).removeprefix("torch."),
        "slots": case.slots,
        "tokens_per_s": round(tokens_per_s, 2),
        "prompt_tokens": case.prompt,
        "new_tokens": case.new,
        "prefill_chunk": case.chunk,
        "sampled": case.is_sampled,
        **more,
    }


def floor_of(row: Mapping[str, Any], ceilings: Ceilings) -> float | None:
    """Return the roofline's tokens/s for a row of decode or prefill; None for others."""
    line = Roofline(config_of(row["model"]), row["precision"], ceilings)
    if row["workload"] == "decode":
        return float(row["slots"] / line.step_s(row["slots"], row["context"]))
    if row["workload"] == "prefill":
        return float(row["prompt_tokens"] / line.prefill_s(row["prompt_tokens"]))
    return None


def _submit(
    engine: Engine, case: Case, prompt_ids: tuple[int, ...], new: int
) -> tuple[Future[SequenceOutcome], _Clock]:
    clock = _Clock()
    stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=new, detokenizer=clock)
    sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=len(prompt_ids))
    sampling = sampled if case.is_sampled else SamplingParams()
    return engine.submit(SequenceRequest(prompt_ids, sampling, stopper, CancelToken())), clock


def _finish(futures: Sequence[Future[SequenceOutcome]]) -> None:
    for future in futures:
        future.result(_PATIENCE_S)


def _prompts(case: Case, name: str) -> list[tuple[int, ...]]:
    """Return one random prompt per slot; another name, other prompts."""
    source = random.Random(f"{name} {case.name}")
    size = config_of(case.shape).vocab_size
    return [tuple(source.choices(range(3, size), k=case.prompt)) for _ in range(case.slots)]


def _passes(case: Case) -> int:
    return -(-case.prompt // case.chunk)


def _kernel_us(kernel: Any) -> float:
    return float(getattr(kernel, "self_device_time_total", 0.0) or kernel.self_cpu_time_total)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss, which starts from the memory of whoever started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _reserved_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def _forget(device: torch.device) -> None:
    """Give back what the last case held; an engine and its graphs refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _claim_stdout() -> TextIO:
    """Return the real standard output; whatever a library prints goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
