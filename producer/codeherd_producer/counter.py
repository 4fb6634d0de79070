"""Count a prompt's tokens where they decide whether it is accepted.

Owns: the middle zone between prompts that surely fit and prompts that surely do not. Only the
model's own tokenizer can tell there, and it belongs to the worker package: it is asked in a process
of its own, if that package and the model's folder are on this machine. Where it cannot be asked the
prompt is accepted, and the worker refuses it with the same code. Does not know tokenizers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codeherd_schema.errors import InvalidRequest
from codeherd_schema.models import ServedModel, most_prompt_tokens
from codeherd_schema.requests import Overflow, Request, dump_request

logger = logging.getLogger(__name__)

#: Seconds that one count may take before the prompts are accepted uncounted: to begin, and per prompt.
TIMEOUT_S = 20.0
TIMEOUT_PER_PROMPT_S = 0.02
#: Seconds to accept a model's prompts uncounted after its tokenizer could not be asked.
REST_S = 60.0
#: `-P` keeps the current folder off the path: it may hold anybody's `codeherd_worker`.
PROMPT_COMMAND = (sys.executable, "-P", "-m", "codeherd_worker.prompt_command")
#: A model's source that stands for the folder inside the worker package.
EMBEDDED = "embedded"


class PromptCounter:
    """Refuses prompts that are too long for their model; threads may share it."""

    def __init__(
        self,
        command: Sequence[str] = PROMPT_COMMAND,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count with `command`, which gets `timeout_s` seconds to begin; `clock` gives seconds."""
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._clock = clock
        # Model source -> when to ask its tokenizer again.
        self._rests_until: dict[str, float] = {}

    def faults(self, pairs: Sequence[tuple[Request, ServedModel]]) -> dict[int, InvalidRequest]:
        """Return why requests are refused by their models, by their places in `pairs`."""
        doubtful: dict[str, list[int]] = {}
        for place, (request, model) in enumerate(pairs):
            if is_doubtful(request, model):
                doubtful.setdefault(model.name, []).append(place)
        faults: dict[int, InvalidRequest] = {}
        for places in doubtful.values():
            model = pairs[places[0]][1]
            answers = self._count([pairs[place][0] for place in places], model)
            faults.update(
                (place, fault)
                for place, answer in zip(places, answers, strict=False)
                if (fault := _fault(answer)) is not None
            )
        return faults

    def _count(self, requests: Sequence[Request], model: ServedModel) -> Sequence[Mapping[str, Any]]:
        folder = tokenizer_folder(model)
        if folder is None or self._clock() < self._rests_until.get(model.source, float("-inf")):
            return ()
        question = {
            "requests": [dump_request(request) for request in requests],
            "folder": folder,
            "model": model.model_dump(mode="json"),
            "count_only": True,
        }
        try:
            return self._ask(question)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as err:
            self._rests_until[model.source] = self._clock() + REST_S
            logger.warning("prompts_uncounted model=%s reason=%s", model.name, _reason(err))
            return ()

    def _ask(self, question: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        done = subprocess.run(  # noqa: S603 -- our own interpreter and module
            self._command,
            input=json.dumps(question),
            capture_output=True,
            encoding="utf-8",
            timeout=self._timeout_s + TIMEOUT_PER_PROMPT_S * len(question["requests"]),
            check=True,
        )
        answers: Sequence[Mapping[str, Any]] = json.loads(done.stdout)["prompts"]
        return answers


def is_doubtful(request: Request, model: ServedModel) -> bool:
    """Return whether only a tokenizer can tell if `request`, passed by the model table, fits."""
    # What may be truncated always fits.
    room = model.context_window - request.sampling.max_new_tokens
    return request.overflow is Overflow.REFUSE and most_prompt_tokens(request) > room


def tokenizer_folder(model: ServedModel) -> str | None:
    """Return where this machine has the model's tokenizer, as the prompt command calls it."""
    # The worker package is always installed; what it needs to tokenize is an extra.
    if importlib.util.find_spec("sentencepiece") is None:
        return None
    if model.source == EMBEDDED:
        return EMBEDDED
    return str(Path(model.source).resolve()) if Path(model.source).is_dir() else None


def _fault(answer: Mapping[str, Any]) -> InvalidRequest | None:
    error = answer.get("error")
    if error is None:
        return None
    kinds = {kind.code: kind for kind in _family(InvalidRequest)}
    kind = kinds.get(error["code"], InvalidRequest)
    return kind(error["message"], hint=error.get("hint"))


def _family(kind: type[InvalidRequest]) -> Iterator[type[InvalidRequest]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _reason(err: Exception) -> str:
    # Its stderr is not repeated: a trace may hold a piece of the prompt.
    if isinstance(err, subprocess.TimeoutExpired):
        return f"no answer within {err.timeout:g} s"
    if isinstance(err, subprocess.CalledProcessError):
        return f"exit status {err.returncode}"
    return type(err).__name__
