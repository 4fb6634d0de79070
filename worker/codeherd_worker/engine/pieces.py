"""Read a vocabulary's pieces from `tokenizer.model` or `tokenizer.json`, and pack them for SentencePiece.

Owns: the two file formats, as far as a byte-fallback BPE vocabulary needs them. Does not know how
text is encoded or what a piece means in a prompt (`codeherd_worker.engine.vocabulary`).

`tokenizer.model` is a protobuf message (sentencepiece_model.proto of google/sentencepiece). It is
walked by hand: sentencepiece ships generated protobuf classes, but transformers 5.23 registers its own
copy of them, and the second one imported into a process raises "duplicate file name".
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from codeherd_schema.errors import ModelFilesInvalid

#: Stands for a space inside a piece.
SPACE_MARK = "▁"

_HINT = "point to a model folder that holds the `tokenizer.model` (or `tokenizer.json`) of a Code Llama"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
#: Score of a piece that no merge of a `tokenizer.json` makes: below every rank.
_UNMERGED_SCORE = -1e9

#: Numbers of sentencepiece_model.proto: fields of ModelProto, then of its parts.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _SQUEEZE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2
#: Protobuf wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceKind(IntEnum):
    """What a piece is; the numbers are those of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    #: Never found in a text.
    CONTROL = 3
    #: Found in a text before any merge.
    USER_DEFINED = 4
    UNUSED = 5
    #: One byte of a character that has no piece of its own.
    BYTE = 6


class Piece(NamedTuple):
    """One entry of a vocabulary; its place in the list is its token id."""

    text: str
    #: Of two possible merges, the one with the higher score goes first.
    score: float
    kind: PieceKind

    def to_bytes(self) -> bytes:
        """Return the bytes of text that this piece stands for: none for control pieces."""
        match self.kind:
            case PieceKind.CONTROL | PieceKind.UNKNOWN:
                return b""
            case PieceKind.BYTE:
                return bytes([int(self.text[3:5], 16)])
            case _:
                return self.text.replace(SPACE_MARK, " ").encode()


def read_pieces(folder: Path) -> tuple[Piece, ...]:
    """Return the pieces in the order of their ids; `tokenizer.model` wins over `tokenizer.json`.

    Raises:
        ModelFilesInvalid: no such file, or not a byte-fallback BPE vocabulary as Code Llama has.
    """
    path = next((p for p in (folder / name for name in _PARSERS) if p.is_file()), None)
    if path is None:
        raise ModelFilesInvalid(f"`{folder}` holds no tokenizer", hint=_HINT)
    try:
        pieces = tuple(_PARSERS[path.name](path.read_bytes()))
        _check(pieces)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as err:
        reason = str(err) if type(err) in (OSError, ValueError) else "its content has another shape"
        raise ModelFilesInvalid(f"`{path}` cannot be used: {reason}", hint=_HINT) from err
    return pieces


def pack(pieces: Iterable[Piece]) -> bytes:
    """Return the SentencePiece model of these pieces, with Llama's way to treat spaces."""
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, 1)
    normalizer = _number(_DUMMY_PREFIX, 1) + _number(_SQUEEZE_SPACES, 0) + _number(_ESCAPE_SPACES, 1)
    packed = [_chunk(_PIECES, _pack_piece(piece)) for piece in pieces]
    return b"".join([*packed, _chunk(_TRAINER, trainer), _chunk(_NORMALIZER, normalizer)])


def without_dummy_prefix(model: bytes) -> bytes:
    """Return the same SentencePiece model, but it puts no space in front of a text."""
    # Protobuf merges a message that comes twice; of a field that comes twice, the last one counts.
    return model + _chunk(_NORMALIZER, _number(_DUMMY_PREFIX, 0))


def _check(pieces: tuple[Piece, ...]) -> None:
    byte_values = sorted(piece.to_bytes() for piece in pieces if piece.kind is PieceKind.BYTE)
    if byte_values != [bytes([value]) for value in range(256)]:
        raise ValueError("it has no byte pieces to fall back to")
    if sum(piece.kind is PieceKind.UNKNOWN for piece in pieces) != 1:
        raise ValueError("it has no unknown piece, or more than one")
    if len({piece.text for piece in pieces}) != len(pieces) or not all(piece.text for piece in pieces):
        raise ValueError("it has empty pieces or a piece twice")


# tokenizer.model


def _parse_model(data: bytes) -> Iterator[Piece]:
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            yield _parse_piece(_as_bytes(value))
        elif number == _TRAINER:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_as_bytes(value)))
    if trainer.get(_MODEL_TYPE) != _BPE or trainer.get(_SPACE_AS_SUFFIX, 0):
        raise ValueError("it is not a SentencePiece BPE model")
    # Left out, these three switches are on.
    switches = tuple(normalizer.get(n, 1) for n in (_DUMMY_PREFIX, _SQUEEZE_SPACES, _ESCAPE_SPACES))
    if normalizer.get(_CHARSMAP, b"") != b"" or switches != (1, 0, 1):
        raise ValueError("it changes text before it encodes it, which no Code Llama does")


def _parse_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for number, value in _fields(data):
        if number == _PIECE_TEXT:
            text = _as_bytes(value).decode()
        elif number == _PIECE_SCORE:
            (score,) = struct.unpack("<f", _as_bytes(value))
        elif number == _PIECE_KIND:
            kind = PieceKind(int(value))
    return Piece(text, score, kind)


def _pack_piece(piece: Piece) -> bytes:
    score = _varint((_PIECE_SCORE << 3) | _FIXED32) + struct.pack("<f", piece.score)
    return _chunk(_PIECE_TEXT, piece.text.encode()) + score + _number(_PIECE_KIND, piece.kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, at = _read_varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError("it is not a SentencePiece model")
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it ends too early")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it is not a SentencePiece model")  # noqa: TRY004 - wrong data, not a wrong call
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint((field << 3) | _VARINT) + _varint(value)


def _chunk(field: int, data: bytes) -> bytes:
    return _varint((field << 3) | _BYTES) + _varint(len(data)) + data


# tokenizer.json


def _parse_json(data: bytes) -> Iterator[Piece]:
    try:
        document = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise ValueError("it is not JSON") from err
    model = document["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ValueError("it is not a byte-fallback BPE vocabulary")
    added = {token["content"]: token for token in document.get("added_tokens", ())}
    ids: dict[str, int] = {text: token["id"] for text, token in added.items()} | model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise ValueError("its ids have gaps")
    scores = _scores(model["merges"])
    for text in texts:
        kind = _kind_in_json(text, added.get(text), model)
        yield Piece(text, scores.get(text, _UNMERGED_SCORE), kind)


def _scores(merges: Iterable[str | list[str]]) -> dict[str, float]:
    # All merges that make one piece stand together, ranked by its score in the SentencePiece model
    # they came from: the order of the pieces is the order of their scores.
    scores: dict[str, float] = {}
    for merge in merges:
        text = "".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge)
        scores.setdefault(text, -float(len(scores)))
    return scores


def _kind_in_json(text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> PieceKind:
    if text == (model.get("unk_token") or "<unk>"):
        return PieceKind.UNKNOWN
    if _BYTE_PIECE.fullmatch(text):
        return PieceKind.BYTE
    if added is None:
        return PieceKind.NORMAL
    if added.get("special"):
        return PieceKind.CONTROL
    return PieceKind.NORMAL if text in model["vocab"] else PieceKind.USER_DEFINED


#: The first file that is there is read.
_PARSERS = {"tokenizer.model": _parse_model, "tokenizer.json": _parse_json}
