"""Do with a model what needs its weights: `python -m codeherd_worker.model_command quantize|compare`.

Owns: the JSON form in which a producer, which has no torch, asks for it, and the bar that is drawn on stderr
meanwhile, on a terminal only. Reads one object from stdin and writes one to stdout:

    quantize  {"source", "out", "quantization"}
              {"folder", "quantization", "revision", "source_bytes", "saved_bytes"}
    compare   {"source", "a", "b", "texts", "slots", "prompts", "tokens"}
              {"a": {...}, "b": {...}, "tokens", "agreement", "prompts", "same_tokens", "new_tokens"}

Both may have "device" (a GPU if there is one) and "quiet". A failure is `{"error": {"code", "message",
"hint"}}` with exit status 2. Does not know what is measured or written: `engine.saving`, `comparison`.
torch is imported by the work itself: it takes seconds, and talks, which a wrong question need not wait for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from codeherd_schema.errors import CodeherdError, InvalidRequest
from codeherd_schema.requests import Frozen, first_fault
from codeherd_worker.engine.quantization import Device, Quantization, SavedQuantization
from codeherd_worker.engine.vocabulary import Vocabulary, verify
from codeherd_worker.prompt_command import EMBEDDED, EMBEDDED_FOLDER

#: Tokens of a window of text, BOS among them, if the model has as many positions.
_WINDOW = 512
#: Files of the standard library that are read where no text is given: plain Python of several hands.
_DEFAULT_TEXTS = ("argparse.py", "heapq.py", "shlex.py", "statistics.py", "textwrap.py", "zipfile.py")


class _Question(Frozen):
    #: A folder, a hub id, or `embedded`.
    source: str
    #: None is a GPU if there is one.
    device: Device | None = None
    quiet: bool = False


_Q = TypeVar("_Q", bound=_Question)


class QuantizeQuestion(_Question):
    """Write a quantized copy of a model."""

    out: Path
    quantization: SavedQuantization


class CompareQuestion(_Question):
    """Measure two settings of a model."""

    a: Quantization
    b: Quantization
    #: Files to read; none is what Python brings along.
    texts: tuple[Path, ...] = ()
    slots: int = Field(default=8, ge=1, le=512)
    #: Prompts to continue.
    prompts: int = Field(default=16, ge=1)
    #: Most tokens of text to read.
    tokens: int = Field(default=8192, ge=2)


def main(arguments: Sequence[str], source: BinaryIO, target: TextIO) -> int:
    """Answer the question in `source`; return the exit status."""
    # What libraries tell of themselves is not for a person who waits: torchao 0.18, if it is there, warns of
    # kernels for other machines, and torch of torchao.
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # Nobody else may write between our braces.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer, status = _WORK[arguments[0]](source.read()), 0
        except CodeherdError as err:
            error = {"code": err.code, "message": err.message, "hint": err.hint}
            answer, status = {"error": error}, 2
    json.dump(answer, target)
    target.write("\n")
    return status


def quantize(text: bytes) -> dict[str, Any]:
    """Answer a `QuantizeQuestion`."""
    question = _read(QuantizeQuestion, text)
    from codeherd_worker.engine.saving import save_quantized

    with _shown(question) as progress:
        saved = save_quantized(
            _source(question),
            question.out,
            quantization=question.quantization,
            device=_device(question),
            progress=progress,
        )
    return dataclasses.asdict(saved) | {"folder": str(saved.folder)}


def measure(text: bytes) -> dict[str, Any]:
    """Answer a `CompareQuestion`."""
    question = _read(CompareQuestion, text)
    from codeherd_worker.comparison import compare, cut_windows
    from codeherd_worker.engine.checkpoint import find_folder, read_config

    source = _source(question)
    folder, _ = find_folder(source, offline=True)
    vocabulary = Vocabulary.from_folder(folder)
    verify(vocabulary)
    windows = cut_windows(
        _token_ids(question, vocabulary),
        bos=vocabulary.specials.bos,
        length=min(_WINDOW, read_config(folder).max_position_embeddings),
    )
    with _shown(question) as progress:
        comparison = compare(
            source,
            (question.a, question.b),
            windows,
            device=_device(question),
            slots=question.slots,
            prompts=question.prompts,
            progress=progress,
        )
    document = dataclasses.asdict(comparison)
    for side in ("a", "b"):
        document[side]["perplexity"] = getattr(comparison, side).perplexity
    return document


_WORK = {"quantize": quantize, "compare": measure}


def _read(kind: type[_Q], text: bytes) -> _Q:
    try:
        return kind.model_validate_json(text)
    except ValidationError as err:
        raise InvalidRequest(first_fault(err)) from err


def _source(question: _Question) -> str:
    return str(EMBEDDED_FOLDER) if question.source == EMBEDDED else question.source


def _device(question: _Question) -> Device:
    import torch  # not at the top, see there

    return question.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _token_ids(question: CompareQuestion, vocabulary: Vocabulary) -> list[int]:
    """Return the tokens of the text.

    Raises:
        InvalidRequest: a file cannot be read, or all are empty.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = question.texts or tuple(library / name for name in _DEFAULT_TEXTS if (library / name).is_file())
    token_ids: list[int] = []
    for path in paths:
        token_ids += vocabulary.encode(_text(path))
    if not token_ids:
        raise InvalidRequest("there is no text to read", hint="give a file with --text")
    return token_ids[: question.tokens]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequest(
            f"`{path}` cannot be read: {getattr(err, 'strerror', None) or 'it is not UTF-8'}"
        ) from err


@contextlib.contextmanager
def _shown(question: _Question) -> Iterator[Callable[[str, float], None]]:
    """Draw a bar for each step on stderr, if that is a terminal and nobody asked for quiet."""
    if question.quiet or not sys.stderr.isatty():
        yield lambda step, share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, share: float) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=1.0)
            bar.update(tasks[step], completed=share)

        yield show


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], sys.stdin.buffer, sys.stdout))
    except KeyboardInterrupt:
        # Whoever asked says so.
        sys.exit(130)
