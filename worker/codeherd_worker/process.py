"""Everything one worker process holds, opened and closed in order.

Owns: what is loaded before the first job, what runs beside the jobs, how a stop proceeds. Does not
know Celery: `codeherd_worker.app` starts it, `codeherd_worker.pool` tells it when to drain and close.

    open:  store -> weights -> tokenizer -> memory plan -> engine (warmed up) -> heartbeat, rescuer, watchdog
    drain: take no more jobs -> let the running ones finish -> release what is left
    close: watchdog, rescuer, heartbeat -> engine -> broker, store
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import uniform
from typing import Any

import torch

from codeherd_schema.broker import Broker, queue_name
from codeherd_schema.errors import InvalidSetting, ModelFilesInvalid
from codeherd_schema.models import ModelTable, ServedModel
from codeherd_schema.store import Store
from codeherd_worker.device import Device
from codeherd_worker.draft_rule import choose_draft_tokens
from codeherd_worker.engine.compute_thread import ComputeThread
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import LoadedModel, load_model
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.engine.vocabulary import Vocabulary, verify
from codeherd_worker.footprint import idle_rows, lighter_weights, measure_cards
from codeherd_worker.lease import Heartbeat
from codeherd_worker.memory import MemoryPlan, plan_memory
from codeherd_worker.periodic import Periodic
from codeherd_worker.rescuer import Rescuer
from codeherd_worker.runner import Generator, Runner
from codeherd_worker.running import Running
from codeherd_worker.settings import WorkerSettings
from codeherd_worker.telemetry import Identity, Telemetry
from codeherd_worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

#: Where the embedded model lies.
EMBEDDED_FOLDER = Path(__file__).parent / "tiny"
#: Seconds between two looks at whether the drain is over.
DRAIN_CHECK_S = 0.1
#: Seconds between two looks of the watchdog.
WATCH_INTERVAL_S = 1.0
#: Exit status after the engine broke: the launcher starts the process anew.
ENGINE_BROKEN_STATUS = 70
#: Tokens. Shorter slots than this take few jobs: somebody should know.
SHORT_SLOT = 1024


class WorkerProcess:
    """One process, one device group, one model."""

    def __init__(self, settings: WorkerSettings, *, name: str, device: Device) -> None:
        """Look up the model; load nothing yet.

        Args:
            settings: this worker's settings.
            name: the worker's name before the `@`.
            device: `cpu`, `cuda` or `cuda-group`; the process is pinned already.

        Raises:
            UnknownModel: the model table has no such model.
        """
        self.settings = settings
        self.model: ServedModel = ModelTable.from_file(settings.models_file).find(settings.worker_model)
        self.queue = queue_name(self.model.name)
        self.worker_id = f"{name}@{socket.gethostname()}"
        self.running = Running()
        #: Set by a second stop signal: do not wait for the drain.
        self.hurry = False
        #: What the process ends with when Celery has no other wish.
        self.exit_status = 0
        self._device = device
        self._drained = threading.Event()
        self._stack = contextlib.ExitStack()

    def open(self) -> None:
        """Load, check and warm up everything; the first job may come after this.

        Raises:
            SchemaOutdated, ModelFilesInvalid, TokenizerMismatch, InvalidSetting, OutOfMemory,
            DatabaseUnavailable, BrokerUnavailable: the process must not take jobs.
        """
        settings = self.settings
        stack = self._stack
        store = Store.open(settings.database, max_attempts=settings.max_attempts)
        stack.callback(store.close)
        store.check_schema()
        broker = Broker(settings)
        stack.callback(broker.close)
        _check_broker(broker)
        if self._device == "cpu":
            torch.set_num_threads(settings.worker_threads or max(1, (os.cpu_count() or 1)))
        self._compute = ComputeThread()
        stack.callback(self._compute.close)
        generator = self._compute.run(self._load)
        stack.callback(generator.engine.close)
        self._engine = generator.engine
        self._runner = Runner(
            store=store,
            broker=broker,
            generator=generator,
            running=self.running,
            worker_id=self.worker_id,
            lease_s=settings.lease_s,
        )
        heartbeat = Heartbeat(store, self.running, lease_s=settings.lease_s)
        rescuer = Rescuer(store, max_crashes=settings.max_crashes)
        watchdog = Watchdog(
            generator.engine, step_timeout_s=settings.worker_step_timeout_s, on_broken=self._engine_broke
        )
        for part in (
            Periodic("heartbeat", heartbeat.beat, pause_s=lambda: settings.heartbeat_s),
            Periodic("rescuer", rescuer.look, pause_s=lambda: _spread(settings.reap_interval_s)),
            Periodic("watchdog", self._watch(watchdog), pause_s=lambda: WATCH_INTERVAL_S),
        ):
            part.start()
            stack.callback(part.close)

    def run(self, job_id: str) -> dict[str, Any]:
        """Run one job on the calling pool thread; see `Runner.run`."""
        return self._runner.run(job_id)

    def cancel(self, job_id: str) -> bool:
        """Stop one job if it runs here: SQL says already that somebody wants it stopped."""
        return self.running.cancel_job(job_id, CancelReason.USER)

    def terminate(self, ident: int) -> None:
        """Stop what runs on one pool thread, as an operator asked."""
        self.running.cancel_thread(ident, CancelReason.OPERATOR)

    def figures(self) -> dict[str, Any]:
        """Return the engine's figures for `engine_stats`."""
        return self._telemetry.figures()

    def drain(self) -> None:
        """Take no more jobs, and release what still runs when the drain's time is over."""
        self._runner.draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def close(self) -> None:
        """Close everything that is open, last opened first."""
        self._drained.set()
        self._stack.close()

    def _load(self) -> Generator:
        settings, model = self.settings, self.model
        source = str(EMBEDDED_FOLDER) if model.source == "embedded" else model.source
        started = time.monotonic()
        window = self._window()
        loaded = load_model(
            source,
            quantization=settings.worker_quantization,
            device=self._device,
            slots=settings.worker_slots,
            context=window,
        )
        vocabulary = Vocabulary.from_folder(loaded.folder)
        verify(vocabulary)
        if model.infilling and not vocabulary.can_infill:
            raise ModelFilesInvalid(
                f"model `{model.name}` is listed as able to infill, its tokenizer has no infilling tokens",
                hint="set `infilling = false` in its entry of the models file, or use the base 7B or 13B",
            )
        engine, plan = self._warm_engine(loaded, window)
        engine.start()
        identity = Identity(
            self.worker_id, model.name, self.queue, loaded.revision, quantization=loaded.quantization
        )
        self._telemetry = Telemetry(engine, plan, identity)
        logger.info(
            "model_ready model=%s quantization=%s device=%s slots=%d max_len=%d cache_bytes=%d load_s=%.1f",
            model.name, loaded.quantization, loaded.device, plan.slots, plan.classes[-1].length,
            engine.stats().cache_bytes, time.monotonic() - started,
        )  # fmt: skip
        return Generator(model=model, loaded=loaded, vocabulary=vocabulary, engine=engine)

    def _window(self) -> int:
        """Return the tokens of the longest sequence that this worker may hold."""
        asked, classes = self.settings.worker_max_len, self.settings.slot_classes
        wanted = classes[-1].length if classes else asked or self.model.context_window
        if wanted > self.model.context_window:
            name = "a slot of worker_slot_lengths" if classes else "worker_max_len"
            raise InvalidSetting(
                f"{name} has {wanted} tokens, more than the context window of `{self.model.name}`, "
                f"{self.model.context_window}"
            )
        return wanted

    def _warm_engine(self, loaded: LoadedModel, window: int) -> tuple[Engine, MemoryPlan]:
        """Plan, allocate and warm up; what was found out is logged."""
        settings = self.settings
        drafts = choose_draft_tokens(
            settings.worker_draft_tokens,
            device=self._device,
            quantization=loaded.quantization,
            parameters=self.model.parameters,
            slots=settings.worker_slots,
        )
        plan = self._plan(loaded, window, drafts)
        engine = self._engine_of(loaded, plan, drafts)
        checks = engine.warm_up()
        is_auto = settings.worker_draft_tokens == "auto"
        if drafts and not checks.drafts_agree and is_auto and self._device == "cpu":
            # Drafts would be tried in every step, however many rows are live: on a CPU that costs more
            # than it saves.
            logger.info("drafts_switched_off draft_tokens=%d", drafts)
            drafts = 0
            engine.close()
            del engine  # its cache, before the next one is allocated
            engine = self._engine_of(loaded, plan, drafts)
            checks = engine.warm_up()
        logger.info(
            "engine_warm fingerprint=%s draft_tokens=%d %s",
            engine.fingerprint, drafts, " ".join(f"{k}={v}" for k, v in asdict(checks).items()),
        )  # fmt: skip
        return engine, plan

    def _plan(self, loaded: LoadedModel, window: int, draft_tokens: int) -> MemoryPlan:
        settings = self.settings
        idle = idle_rows(loaded.model, settings.worker_slots)
        cards = measure_cards(
            loaded,
            rows=settings.worker_slots + idle,
            draft_tokens=draft_tokens,
            prefill_chunk=settings.worker_prefill_chunk,
            window=window,
        )
        plan = plan_memory(
            cards,
            slots=settings.worker_slots,
            window=window,
            classes=settings.slot_classes,
            idle_rows=idle,
            lighter=lighter_weights(loaded.model),
        )
        for line in plan.log_lines():
            logger.info("%s", line)
        shortest = plan.classes[0].length
        if shortest < min(window, SHORT_SLOT) and not settings.slot_classes:
            logger.warning(
                "slots_are_short tokens=%d slots=%d: fewer worker_slots are longer",
                shortest, plan.classes[0].slots,
            )  # fmt: skip
        return plan

    def _engine_of(self, loaded: LoadedModel, plan: MemoryPlan, draft_tokens: int) -> Engine:
        settings = self.settings
        return Engine(
            loaded.model,
            EngineSettings(
                classes=plan.classes,
                prefill_chunk=settings.worker_prefill_chunk,
                reuse_prefixes=settings.worker_reuse_prefixes,
                draft_tokens=draft_tokens,
            ),
            thread=self._compute,
        )

    def _watch(self, watchdog: Watchdog) -> Callable[[], None]:
        def look() -> None:
            watchdog.look()
            self._telemetry.sample()

        return look

    def _drain(self) -> None:
        end = time.monotonic() + self.settings.worker_drain_timeout_s
        while not self.hurry and time.monotonic() < end and self.running.claimed():
            if self._drained.wait(DRAIN_CHECK_S):
                return
        released = self.running.cancel_all(CancelReason.DRAIN)
        logger.info("drained released=%d", released)

    def _engine_broke(self) -> None:
        self.exit_status = ENGINE_BROKEN_STATUS
        self._runner.draining = True
        os.kill(os.getpid(), 15)


def _spread(interval_s: float) -> float:
    # A herd must not look all at once.
    return interval_s * uniform(0.5, 1.5)  # noqa: S311 -- no secret


def _check_broker(broker: Broker) -> None:
    facts = broker.check()
    if facts["maxmemory_policy"].startswith("allkeys"):
        # No job is lost by it, but every evicted hint waits for the dispatcher to send it again.
        logger.warning("redis_evicts_hints policy=%s use=noeviction", facts["maxmemory_policy"])
