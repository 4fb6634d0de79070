"""The table of what can be served: every Code Llama, the embedded `tiny`, and a user's own entries.

Owns: names, hub ids, shapes, context windows, what each model can do. Does not know weights,
devices or quantization. Shapes and windows: Code Llama paper (arXiv 2308.12950) section 2 and the
published config files; 70B-Python and 70B-Instruct had no long-context fine-tuning (MODEL_CARD.md).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from codeherd_schema.errors import InvalidSetting, PromptTooLong, UnknownModel, UnsupportedByModel
from codeherd_schema.requests import (
    ChatRequest,
    Frozen,
    GenerateRequest,
    InfillRequest,
    JobKind,
    Overflow,
    Request,
    first_fault,
)


class ChatFormat(StrEnum):
    """How an Instruct model reads a conversation."""

    #: `[INST] ... [/INST]` with `<<SYS>>`: 7B, 13B, 34B (Meta's generation.py).
    INST = "inst"
    #: `Source: ...` turns ended by `<step>`: 70B (Meta's dialog_prompt_tokens).
    STEP = "step"


class ServedModel(Frozen):
    """One model that workers may hold and requests may name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=r"^[A-Za-z0-9._:/@+-]{1,64}$")
    #: Hub id or folder that the worker loads; `embedded` is the one inside the worker package.
    source: str
    parameters: int = Field(gt=0)
    layers: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    #: Tokens of prompt and completion together.
    context_window: int = Field(gt=0)
    infilling: bool = False
    chat: ChatFormat | None = None
    #: Longest piece of the vocabulary in characters: gives a sure lower bound of a prompt's tokens.
    longest_piece: int = Field(default=16, gt=0)

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of KV cache that one token of one sequence takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    def can(self, kind: JobKind) -> bool:
        """Whether the model serves this kind of job."""
        return {
            JobKind.GENERATE: True,
            JobKind.INFILL: self.infilling,
            JobKind.CHAT: self.chat is not None,
        }[kind]


@dataclass(frozen=True, slots=True)
class _Size:
    label: str
    parameters: int
    layers: int
    kv_heads: int
    vocab_size: int


_SIZES = (
    _Size("7b", 6_739_000_000, 32, 32, 32_016),
    _Size("13b", 13_016_000_000, 40, 40, 32_016),
    _Size("34b", 33_744_000_000, 48, 8, 32_000),
    _Size("70b", 68_977_000_000, 80, 8, 32_016),
)
#: Infilling as the model pages say it: base 7B and 13B. The Python models never saw it, 34B neither.
_INFILLING = frozenset({"codellama-7b", "codellama-13b"})
_SHORT_CONTEXT = frozenset({"codellama-70b-python", "codellama-70b-instruct"})


def _published(size: _Size, variant: str) -> ServedModel:
    name = f"codellama-{size.label}" + (f"-{variant.lower()}" if variant else "")
    chat = None
    if variant == "Instruct":
        chat = ChatFormat.STEP if size.label == "70b" else ChatFormat.INST
    return ServedModel(
        name=name,
        source=f"codellama/CodeLlama-{size.label}" + (f"-{variant}" if variant else "") + "-hf",
        parameters=size.parameters,
        layers=size.layers,
        kv_heads=size.kv_heads,
        head_dim=128,
        # The 7B and 13B Python models kept Llama 2's vocabulary, without the infilling tokens.
        vocab_size=32_000 if variant == "Python" and size.label != "70b" else size.vocab_size,
        context_window=4_096 if name in _SHORT_CONTEXT else 16_384,
        infilling=name in _INFILLING,
        chat=chat,
    )


#: The embedded model: `codeherd_worker/tiny/README.md`.
TINY = ServedModel(
    name="tiny",
    source="embedded",
    parameters=2_557_632,
    layers=4,
    kv_heads=3,
    head_dim=64,
    vocab_size=4_096,
    context_window=2_048,
    infilling=True,
)
#: The embedded weights again, under the terms of a Python model: shows what a refusal looks like.
TINY_PYTHON = TINY.model_copy(update={"name": "tiny-python", "infilling": False})


class ModelTable:
    """Finds models by name or hub id, and refuses what they cannot serve."""

    def __init__(self, own: Iterable[ServedModel] = ()) -> None:
        """Start from the published models; an entry of `own` replaces one of the same name."""
        published = [_published(size, variant) for size in _SIZES for variant in ("", "Python", "Instruct")]
        self._by_name = {m.name: m for m in [TINY, TINY_PYTHON, *published, *own]}
        self._by_source = {m.source.lower(): m for m in self._by_name.values() if m.source != "embedded"}

    @classmethod
    def from_file(cls, path: Path | None) -> ModelTable:
        """Read a user's own entries: a TOML file with one `[models.NAME]` table each.

        Raises:
            InvalidSetting: the file or an entry is wrong; says which and why.
        """
        if path is None:
            return cls()
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
            raise InvalidSetting(
                f"models_file `{path}` cannot be read: {err}", hint="see `codeherd models --help`"
            ) from err
        entries = data.get("models", {})
        if not isinstance(entries, dict):
            raise InvalidSetting(f"models_file `{path}`: `models` must be a table of tables")
        return cls(_own_entry(path, name, entry) for name, entry in entries.items())

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterate over the models in table order."""
        return iter(self._by_name.values())

    def find(self, name: str) -> ServedModel:
        """Return the model of this name or hub id.

        Raises:
            UnknownModel: with the nearest names as a hint.
        """
        model = (
            self._by_name.get(name.lower()) or self._by_name.get(name) or self._by_source.get(name.lower())
        )
        if model is None:
            near = difflib.get_close_matches(name.lower(), self._by_name, n=3, cutoff=0.4)
            raise UnknownModel(
                f"no model `{name}`",
                hint=("did you mean " + " or ".join(f"`{n}`" for n in near) + "? " if near else "")
                + "`codeherd models` lists all",
            )
        return model

    def able(self, kind: JobKind) -> tuple[str, ...]:
        """Return the names of all models that serve this kind of job."""
        return tuple(m.name for m in self._by_name.values() if m.can(kind))

    def check(self, request: Request) -> ServedModel:
        """Return the model that will serve `request`, or refuse it.

        Judges what is certain without a tokenizer: the kind, `max_new_tokens`, and prompts that
        cannot fit even if every token were the longest piece.

        Raises:
            UnknownModel: no such model.
            UnsupportedByModel: with the models that can.
            PromptTooLong: shorten the prompt or ask for fewer new tokens.
        """
        model = self.find(request.model)
        if not model.can(request.kind):
            raise UnsupportedByModel(
                f"model `{model.name}` cannot serve `{request.kind}` jobs",
                hint="these can: " + ", ".join(self.able(request.kind)),
            )
        fewest = fewest_prompt_tokens(request, model.longest_piece)
        check_fit(model, request, fewest if request.overflow is Overflow.REFUSE else 1, qualifier="at least ")
        return model


def check_fit(model: ServedModel, request: Request, prompt_tokens: int, *, qualifier: str = "") -> None:
    """Refuse a prompt that leaves no room for its new tokens.

    Raises:
        PromptTooLong: with the figures.
    """
    room = model.context_window - request.sampling.max_new_tokens
    if prompt_tokens > room:
        raise PromptTooLong(
            f"prompt has {qualifier}{prompt_tokens} tokens and asks for "
            f"{request.sampling.max_new_tokens} new ones, `{model.name}` has room for "
            f"{model.context_window} together",
            hint="shorten the prompt, ask for fewer new tokens, or submit with overflow=truncate",
        )


def texts(request: Request) -> tuple[str, ...]:
    """Return every piece of user text in `request`."""
    match request:
        case GenerateRequest():
            return (request.prompt,)
        case InfillRequest():
            return (request.prefix, request.suffix)
        case ChatRequest():
            return tuple(message.content for message in request.messages)


def fewest_prompt_tokens(request: Request, longest_piece: int) -> int:
    """Return a number of tokens that the prompt surely reaches: BOS and the longest pieces."""
    return 1 + sum(math.ceil(len(text) / longest_piece) for text in texts(request))


def most_prompt_tokens(request: Request) -> int:
    """Return a number of tokens that the prompt surely does not pass: its bytes and the control ids."""
    # Byte fallback never takes more than one token a byte; 32 covers the control ids of one turn.
    return sum(len(text.encode()) + 32 for text in texts(request))


def _own_entry(path: Path, name: str, entry: Mapping[str, Any]) -> ServedModel:
    try:
        return ServedModel(name=name, **entry)
    except (ValidationError, TypeError) as err:
        reason = first_fault(err) if isinstance(err, ValidationError) else str(err)
        raise InvalidSetting(f"model `{name}` in `{path}`: {reason}") from err
