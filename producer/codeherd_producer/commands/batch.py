"""Many requests from a file of JSON lines, checked as a whole before any is queued.

Owns: what a line may hold, what is said about wrong ones, and the keys that make a batch repeatable.
Reads the file twice and holds no more of it than one chunk and the custom ids. Does not know how
jobs are queued.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from codeherd_producer.client import Client
from codeherd_producer.commands.talk import say
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.requests import FILL_MARKER, InfillRequest, JobKind, Request, parse_request

#: Lines that are checked against the model table at a time.
_CHUNK = 500
#: Fields of an infilling whose text is given in two parts.
_SIDES = ("prefix", "suffix")


@dataclass(slots=True)
class Batch:
    """A checked file; `requests` may be read once."""

    name: str
    #: Whether `name` was given, so that the same lines can be told when they come again.
    is_named: bool
    default_model: str
    lines: BinaryIO
    #: Numbers of the lines that are left out.
    wrong: set[int] = field(default_factory=set)

    def requests(self) -> Iterator[Request]:
        """Read the right lines again."""
        self.lines.seek(0)
        for number, line in _numbered(self.lines):
            if number not in self.wrong:
                yield self._request(number, line)

    def check(self, client: Client) -> Iterator[tuple[int, InvalidRequest]]:
        """Yield what is wrong, with the line's number."""
        first_lines: dict[str, int] = {}
        lines = _numbered(self.lines)
        while chunk := list(itertools.islice(lines, _CHUNK)):
            right: dict[int, Request] = {}
            for number, line in chunk:
                try:
                    right[number] = request = self._request(number, line)
                    _check_unique(request.labels.get("custom_id"), number, first_lines)
                except InvalidRequest as err:
                    right.pop(number, None)
                    yield number, err
            numbers = list(right)
            for place, fault in client.faults(list(right.values())).items():
                yield numbers[place], fault

    def _request(self, number: int, line: bytes) -> Request:
        fields = _decoded(line)
        custom_id = fields.pop("custom_id", None)
        if custom_id is not None:
            fields["labels"] = _labelled(fields.get("labels", {}), custom_id)
        if fields.get("kind") == JobKind.INFILL and "text" in fields and fields.keys().isdisjoint(_SIDES):
            marked = InfillRequest.from_text(str(fields.pop("text")), marker=FILL_MARKER)
            fields |= {"prefix": marked.prefix, "suffix": marked.suffix}
        fields.setdefault("model", self.default_model)
        if self.is_named:
            fields.setdefault("idempotency_key", _key(self.name, custom_id or f"line {number}"))
        return parse_request(fields)


@contextlib.contextmanager
def read_batch(
    client: Client, file: str, *, default_model: str, name: str | None, skip_invalid: bool
) -> Iterator[Batch]:
    """Open and check a file of requests.

    Args:
        client: judges whether the models can serve the requests.
        file: a path, or `-` for stdin.
        default_model: of lines that name none.
        name: of the batch; made up if None.
        skip_invalid: whether wrong lines are left out; each is listed on stderr either way.

    Raises:
        InvalidRequest: the file cannot be read, or lines are wrong.
    """
    with _rewindable(file) as lines:
        batch = Batch(name or str(uuid.uuid4()), name is not None, default_model, lines)
        for number, fault in batch.check(client):
            batch.wrong.add(number)
            say(f"line {number}: {fault.message} [{fault.code}]")
        if batch.wrong and not skip_invalid:
            raise InvalidRequest(
                f"{len(batch.wrong)} lines are wrong, nothing was queued",
                hint="--skip-invalid queues the others",
            )
        yield batch


@contextlib.contextmanager
def _rewindable(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield copy
        return
    with contextlib.ExitStack() as stack:
        try:
            lines = stack.enter_context(Path(file).open("rb"))
        except OSError as err:
            raise InvalidRequest(f"`{file}` cannot be read: {err.strerror or type(err).__name__}") from err
        yield lines


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        # Decoded here: json would guess UTF-16 from the first bytes.
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"not UTF-8: byte {err.start} is 0x{line[err.start]:02x}") from err
    except json.JSONDecodeError as err:
        raise InvalidRequest(f"not JSON: {err.msg} at column {err.colno}") from err
    except (ValueError, RecursionError) as err:
        raise InvalidRequest("not JSON that can be read: a number or the nesting is too large") from err
    if not isinstance(fields, dict):
        raise InvalidRequest("not a JSON object")
    return fields


def _labelled(labels: object, custom_id: object) -> dict[str, Any]:
    if not isinstance(custom_id, str):
        raise InvalidRequest("`custom_id`: must be a string")
    if not isinstance(labels, dict):
        raise InvalidRequest("`labels`: must be an object")
    return {**labels, "custom_id": custom_id}


def _check_unique(custom_id: str | None, number: int, first_lines: dict[str, int]) -> None:
    if custom_id is None:
        return
    first = first_lines.setdefault(custom_id, number)
    if first != number:
        raise InvalidRequest(f"`custom_id`: the same as in line {first}")


def _key(batch: str, line: str) -> str:
    return f"{batch}/{hashlib.sha256(line.encode()).hexdigest()[:32]}"
