"""Small SentencePiece vocabularies of Code Llama's kind, trained in a moment, and real source files to split.

One for each way in which the infilling pieces are found in the wild, and a look-alike of the official one.
Training is deterministic; nothing is kept between runs.
"""

from __future__ import annotations

import functools
import io
import json
import random
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from codeherd_worker.engine.pieces import Piece, PieceKind, pack, read_pieces
from codeherd_worker.engine.vocabulary import Vocabulary

INFILLING = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
#: control: as a careful author marks them. user_defined: SentencePiece finds them in text before any merge.
#: merged: ordinary pieces with ordinary merges, and runs of spaces of equal score, as in Code Llama's files.
#: step: those of 70B-Instruct. plain: none, as 34B and the Python models.
KINDS = ("control", "user_defined", "merged", "step", "plain")
#: Pieces 32000 to 32015 of Code Llama 7B, from its tokenizer.json.
OFFICIAL_TAIL = (
    *("▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT"),
    *INFILLING,
    *("▁<EOT>" + "<EOT>" * more for more in range(1, 6)),
)


@functools.cache
def source_files() -> tuple[str, ...]:
    """Python files of the running interpreter, with some rewritten to hold tabs, CRLF and other scripts."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]
    files = [path.read_bytes().decode("utf-8").replace("\r\n", "\n") for path in paths]
    rng = random.Random(5)
    others = "éßЖא汉字🙂😀👩‍👩‍👧\u200b\u0300\ufeff\x00\x1f\u2028ﬁ①"
    for i in range(0, len(files), 5):
        files[i] = files[i].replace("    ", "\t")
    for i in range(1, len(files), 5):
        files[i] = "".join(rng.choice(others) if rng.random() < 0.1 else c for c in files[i][:20_000])
    for i in range(2, len(files), 5):
        files[i] = files[i].replace("\n", "\r\n")
    return tuple(files)


def splits(count: int, seed: int, longest: int = 400) -> list[tuple[str, str]]:
    """Pairs of text before and after a hole, at random places; some are empty."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text = rng.choice(source_files())
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.randrange(100))
        before, after = rng.choice((0, longest)), rng.choice((0, longest))
        found.append((text[max(0, start - before) : start], text[stop : stop + after]))
    return found


@functools.cache
def model_bytes(kind: str) -> bytes:
    """The `tokenizer.model` of this kind."""
    if kind == "merged":
        return pack(_merged())
    symbols: dict[str, dict[str, Any]] = {
        "control": {"control_symbols": list(INFILLING)},
        "user_defined": {"user_defined_symbols": list(INFILLING)},
        "step": {"control_symbols": [*INFILLING, "<step>"]},
    }
    return train(**symbols.get(kind, {}))


def train(**options: Any) -> bytes:
    """Train on our source files, with Llama's options unless `options` say otherwise."""
    lines = [line for text in source_files()[:40] for line in text.split("\n") if len(line) < 200]
    random.Random(1).shuffle(lines)
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 1000,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "required_chars": "☺",
        "character_coverage": 0.9995,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:5000]), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


def write_model(kind: str, folder: Path) -> Path:
    """Write `tokenizer.model` into a new folder."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model_bytes(kind))
    return folder


def write_json(kind: str, folder: Path) -> Path:
    """Write the same vocabulary as a `tokenizer.json` in the layout that Code Llama's has."""
    pieces = _pieces(model_bytes(kind), folder / "model")
    (folder / "tokenizer.json").write_text(json.dumps(to_json(pieces)), encoding="utf-8")
    return folder


def vocabulary(kind: str, folder: Path) -> Vocabulary:
    return Vocabulary.from_folder(write_model(kind, folder))


def to_json(pieces: Sequence[Piece]) -> dict[str, object]:
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    special = (PieceKind.CONTROL, PieceKind.UNKNOWN, PieceKind.USER_DEFINED)
    added = [i for i, piece in enumerate(pieces) if piece.kind in special or piece.text in INFILLING]
    return {
        "version": "1.0",
        "added_tokens": [
            # Code Llama's own file does not call its infilling pieces special.
            {"id": i, "content": pieces[i].text, "special": pieces[i].text not in INFILLING}
            for i in added
        ],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(pieces, vocab),
        },
    }


def _merges(pieces: Sequence[Piece], vocab: dict[str, int]) -> list[list[str]]:
    """Every pair that makes a piece: best piece first, of equals the longer, as in transformers."""
    ranked = []
    for piece in pieces:
        if piece.kind is not PieceKind.NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocab and right in vocab:
                ranked.append((piece.score, len(left), len(right), [left, right]))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3] for merge in ranked]


def _pieces(model: bytes, folder: Path) -> tuple[Piece, ...]:
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    return read_pieces(folder)


@functools.cache
def _merged() -> tuple[Piece, ...]:
    with tempfile.TemporaryDirectory() as temporary:
        pieces = [
            piece
            for piece in _pieces(train(), Path(temporary, "plain"))
            if len(piece.text) == 1 or piece.text.strip("▁")
        ]
    spaces = [Piece("▁" * n, -1e9, PieceKind.NORMAL) for n in range(2, 17)]
    tail = [Piece(text, -1000.0 - i, PieceKind.NORMAL) for i, text in enumerate(OFFICIAL_TAIL)]
    return (*pieces, *spaces, *tail)


#: Pieces of the official vocabulary that the published texts use.
_OFFICIAL_PIECES = {
    13: "<0x0A>", 259: "▁▁", 263: "▁a", 294: "as", 304: "▁to", 306: "▁I", 338: "▁is", 366: "▁you",
    411: "▁with", 518: "▁[", 526: "▁are", 626: "▁am", 736: "▁return", 822: "▁def", 825: "▁what", 829: "</",
    851: "▁str", 881: "▁should", 910: "▁This", 1074: "▁see", 1121: "▁result", 1128: "▁How", 1234: "▁answer",
    1243: "▁test", 1599: "▁->", 1678: "▁▁▁", 1994: "ways", 2499: "Al", 2599: "▁doing", 2675: "▁going",
    3349: "▁remove", 3532: "▁<<", 3681: "▁Paris", 5464: "non", 5952: "▁Ha", 6324: "▁Hi", 6778: ">>",
    9995: '▁"""', 14816: "SY", 15043: "▁Hello", 18282: "iku", 18869: "cii", 25580: "INST", 29871: "▁",
    29879: "s", 29892: ",", 29897: ")", 29898: "(", 29901: ":", 29902: "I", 29903: "S", 29914: "/",
    29918: "_", 29961: "[", 29962: "]", 29966: "<", 29973: "?", 30210: "的", 30392: "是", 30486: "生",
    30848: "真", 31704: "活",
}  # fmt: skip


@functools.cache
def official_lookalike() -> tuple[Piece, ...]:
    """Pieces that give the published ids of the published texts; the rest is made up."""
    texts = {**{i: f"<unused {i}>" for i in range(3, 32_000)}, 0: "<unk>", 1: "<s>", 2: "</s>"}
    texts |= {value + 3: f"<0x{value:02X}>" for value in range(256)} | _OFFICIAL_PIECES
    texts |= dict(enumerate(OFFICIAL_TAIL, start=32_000))
    known = set(_OFFICIAL_PIECES.values())
    # The beginnings of the known pieces take unused ids, so that merges can reach them letter by letter.
    begun = {text[:n] for text in known if not text.startswith("<0x") for n in range(1, len(text))}
    letters = {letter for text in known if not text.startswith("<0x") for letter in text}
    texts |= dict(enumerate(sorted((begun | letters) - known), start=20_000))
    return tuple(_official_piece(i, texts[i]) for i in range(len(texts)))


def _official_piece(token_id: int, text: str) -> Piece:
    kind = {0: PieceKind.UNKNOWN, 1: PieceKind.CONTROL, 2: PieceKind.CONTROL}.get(token_id, PieceKind.NORMAL)
    if text.startswith("<0x"):
        kind = PieceKind.BYTE
    return Piece(text, -1e9 if not text.strip("▁") else -float(token_id), kind)
