"""Make a model ready to generate: load, check, plan memory, warm up.

Owns: the order of these steps, and what is logged of them. Does not know jobs, queues or SQL.

    weights -> tokenizer -> memory plan -> engine (warmed up, started) -> telemetry
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import asdict

import torch

from codeherd_schema.errors import InvalidSetting, ModelFilesInvalid
from codeherd_schema.models import ServedModel
from codeherd_schema.queues import queue_name
from codeherd_worker.device import Device
from codeherd_worker.draft_rule import choose_draft_tokens
from codeherd_worker.embedded import EMBEDDED_FOLDER
from codeherd_worker.engine.compute_thread import ComputeThread
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import LoadedModel, load_model
from codeherd_worker.engine.vocabulary import Vocabulary, verify
from codeherd_worker.footprint import idle_rows, lighter_weights, measure_cards
from codeherd_worker.generator import Generator, Prepared
from codeherd_worker.memory import MemoryPlan, plan_memory
from codeherd_worker.settings import WorkerSettings
from codeherd_worker.telemetry import Identity, Telemetry

logger = logging.getLogger(__name__)

#: Tokens. Shorter slots than this take few jobs: somebody should know.
SHORT_SLOT = 1024


def prepare(settings: WorkerSettings, model: ServedModel, *, device: Device, worker_id: str) -> Prepared:
    """Load a model and start its engine.

    Raises:
        ModelFilesInvalid, TokenizerMismatch, InvalidSetting, OutOfMemory: the process must not take jobs.
    """
    if device == "cpu":
        torch.set_num_threads(settings.worker_threads or max(1, (os.cpu_count() or 1)))
    with ExitStack() as stack:
        thread = ComputeThread()
        stack.callback(thread.close)
        preparation = _Preparation(settings, model, device, thread)
        generator, engine, plan = thread.run(preparation.run)
        stack.callback(engine.close)
        identity = Identity(
            worker_id,
            model.name,
            queue_name(model.name),
            generator.revision,
            quantization=generator.quantization,
        )
        return Prepared(generator, Telemetry(engine, plan, identity), close=stack.pop_all().close)


class _Preparation:
    """The steps, and what they share."""

    def __init__(
        self, settings: WorkerSettings, model: ServedModel, device: Device, thread: ComputeThread
    ) -> None:
        self._settings = settings
        self._model = model
        self._device = device
        self._thread = thread

    def run(self) -> tuple[Generator, Engine, MemoryPlan]:
        """Do all of it; on the thread that will decode."""
        settings, model = self._settings, self._model
        started = time.monotonic()
        window = self._window()
        loaded = load_model(
            str(EMBEDDED_FOLDER) if model.source == "embedded" else model.source,
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
        logger.info(
            "model_ready model=%s quantization=%s device=%s slots=%d max_len=%d cache_bytes=%d load_s=%.1f",
            model.name, loaded.quantization, loaded.device, plan.slots, plan.classes[-1].length,
            engine.stats().cache_bytes, time.monotonic() - started,
        )  # fmt: skip
        generator = Generator(model, vocabulary, engine, loaded.revision, loaded.quantization)
        return generator, engine, plan

    def _window(self) -> int:
        """Return the tokens of the longest sequence that this worker may hold."""
        asked, classes = self._settings.worker_max_len, self._settings.slot_classes
        wanted = classes[-1].length if classes else asked or self._model.context_window
        if wanted > self._model.context_window:
            name = "a slot of worker_slot_lengths" if classes else "worker_max_len"
            raise InvalidSetting(
                f"{name} has {wanted} tokens, more than the context window of `{self._model.name}`, "
                f"{self._model.context_window}"
            )
        return wanted

    def _warm_engine(self, loaded: LoadedModel, window: int) -> tuple[Engine, MemoryPlan]:
        """Plan, allocate and warm up; what was found out is logged."""
        settings = self._settings
        drafts = choose_draft_tokens(
            settings.worker_draft_tokens,
            device=self._device,
            quantization=loaded.quantization,
            parameters=self._model.parameters,
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
        settings = self._settings
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
        settings = self._settings
        return Engine(
            loaded.model,
            EngineSettings(
                classes=plan.classes,
                prefill_chunk=settings.worker_prefill_chunk,
                reuse_prefixes=settings.worker_reuse_prefixes,
                draft_tokens=draft_tokens,
            ),
            thread=self._thread,
        )
