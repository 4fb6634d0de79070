"""Show what a model would read for a request: `python -m codeherd_worker.prompt_command`.

Owns: the JSON form in which a producer, which has no tokenizer, asks for prompts and token counts. Reads
one object from stdin, writes one to stdout, and exits with 0 if the command could do its work:

    {"requests": [...], "folder": "embedded" or a model folder, "model": {...}, "count_only": false}
    {"prompts": [{"token_ids", "pieces", "text", "prompt_tokens", "stop_ids", "cut"} or {"error"}, ...]}

`error` is `{"code", "message", "hint"}`; where the question itself or the model folder is wrong, it stands
instead of `prompts`, with exit status 2. Never imports torch or transformers: a person waits for the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from pydantic import ValidationError

from codeherd_schema.errors import CodeherdError, InvalidRequest
from codeherd_schema.models import ServedModel
from codeherd_schema.requests import Frozen, first_fault, parse_request
from codeherd_worker.engine.pieces import SPACE_MARK
from codeherd_worker.engine.prompts import Prompt, build_prompt
from codeherd_worker.engine.vocabulary import Vocabulary, verify

#: The folder of the model inside this package, and the word for it.
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "tiny"


class Question(Frozen):
    """What a producer wants to know."""

    #: Requests as `dump_request` writes them; each is judged on its own.
    requests: tuple[dict[str, Any], ...]
    #: The folder that holds the model's tokenizer, or `embedded`.
    folder: str = EMBEDDED
    model: ServedModel
    #: Leave out everything but `prompt_tokens`.
    count_only: bool = False


def main(source: BinaryIO, target: TextIO) -> int:
    """Answer the question in `source`, JSON in UTF-8 whatever the locale; return the exit status."""
    try:
        answer, status = {"prompts": answers(_read(source))}, 0
    except CodeherdError as err:
        answer, status = _error(err), 2
    json.dump(answer, target)
    target.write("\n")
    return status


def answers(question: Question) -> list[dict[str, Any]]:
    """Return one answer for each request, in their order.

    Raises:
        ModelFilesInvalid: the folder has no usable tokenizer.
        TokenizerMismatch: the folder's tokenizer is not the official one that it claims to be.
    """
    folder = EMBEDDED_FOLDER if question.folder == EMBEDDED else Path(question.folder)
    vocabulary = Vocabulary.from_folder(folder)
    verify(vocabulary)
    return [_answer(data, vocabulary, question) for data in question.requests]


def _read(source: BinaryIO) -> Question:
    try:
        return Question.model_validate_json(source.read())
    except ValidationError as err:
        raise InvalidRequest(first_fault(err)) from err


def _answer(data: dict[str, Any], vocabulary: Vocabulary, question: Question) -> dict[str, Any]:
    try:
        prompt = build_prompt(parse_request(data), vocabulary, question.model)
    except InvalidRequest as err:
        return _error(err)
    count = {"prompt_tokens": len(prompt.token_ids)}
    return count if question.count_only else count | _details(prompt, vocabulary)


def _details(prompt: Prompt, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "token_ids": list(prompt.token_ids),
        "pieces": [vocabulary.piece(i) for i in prompt.token_ids],
        "text": _visible(prompt.token_ids, vocabulary),
        "stop_ids": sorted(prompt.stop_ids),
        "cut": [cut.model_dump(mode="json") for cut in prompt.cut],
    }


def _visible(token_ids: Iterable[int], vocabulary: Vocabulary) -> str:
    """Return what the model reads, with control pieces spelled out."""
    parts = (
        vocabulary.token_bytes(i) or vocabulary.piece(i).replace(SPACE_MARK, " ").encode() for i in token_ids
    )
    return b"".join(parts).decode(errors="replace")


def _error(err: CodeherdError) -> dict[str, Any]:
    return {"error": {"code": err.code, "message": err.message, "hint": err.hint}}


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer, sys.stdout))
