"""Turn text into token ids and token ids into bytes, exactly as Meta's tokenizer does.

Owns: the two encodings (with and without the dummy prefix), the bytes of each piece, the ids of the
control pieces, and the proof that an official vocabulary gives its published ids. Knows nothing of
prompt formats (`codeherd_worker.engine.prompts`) or of file formats (`codeherd_worker.engine.pieces`).

The work is done by SentencePiece itself, the library that Meta used, over two immutable processors. The
Rust `tokenizers` gave the same ids in our trials, three times slower on 100 KB. Control pieces are hidden
from both processors: in Code Llama's own files `▁<PRE>` and its like are ordinary pieces, which the text
` <PRE>` would reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from sentencepiece import SentencePieceProcessor

from codeherd_schema.errors import ModelFilesInvalid, TokenizerMismatch
from codeherd_worker.engine.pieces import Piece, PieceKind, pack, read_pieces, without_dummy_prefix

_BOS, _EOS = "<s>", "</s>"
# Names: Meta's llama/tokenizer.py in github.com/meta-llama/codellama.
_PREFIX, _SUFFIX, _MIDDLE, _EOT, _STEP = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>"
_HIDDEN = (_PREFIX, _SUFFIX, _MIDDLE, _EOT, _STEP)

#: Pieces of the 7B, 13B and 70B vocabularies, and the ids of `▁<PRE>`, `▁<SUF>`, `▁<MID>`, `▁<EOT>` in them:
#: https://github.com/ggml-org/llama.cpp/issues/3503 and the model's own tokenizer.json.
_OFFICIAL_SIZE = 32_016
_OFFICIAL_INFILLING = (32_007, 32_008, 32_009, 32_010)

#: What Meta's own code makes of the first infilling example of github.com/meta-llama/codellama, from
#: https://github.com/ggml-org/llama.cpp/issues/3503: the prefix with the dummy prefix, the suffix without.
_PUBLISHED_PREFIX = (
    'def remove_non_ascii(s: str) -> str:\n    """ ',
    "822 3349 29918 5464 29918 294 18869 29898 29879 29901 851 29897 1599 851 29901 13 1678 9995 29871",
)
_PUBLISHED_SUFFIX = ("\n    return result\n", "13 1678 736 1121 13")
#: With the dummy prefix. All but the first and last: test_simple_encode_decode and test_spm_edge_cases in
#: tests/models/code_llama/test_tokenization_code_llama.py of transformers. The last: a dialog of Llama 2,
#: whose 32,000 pieces Code Llama kept, from https://github.com/meta-llama/llama-cookbook/pull/125.
_PUBLISHED_TEXTS = (
    _PUBLISHED_PREFIX,
    ("This is a test", "910 338 263 1243"),
    ("生活的真谛是", "29871 30486 31704 30210 30848 235 179 158 30392"),
    ("Hi  Hello", "6324 29871 15043"),
    ("Hi   Hello", "6324 259 15043"),
    (" ", "259"),
    ("  ", "1678"),
    (" Hello", "29871 15043"),
    ("[INST] How are you doing?", "518 25580 29962 1128 526 366 2599 29973"),
    (
        (
            "[INST] <<SYS>>\nAlways answer with Haiku\n<</SYS>>\n\n"
            "I am going to Paris, what should I see? [/INST] Haiku "
        ),
        (
            "518 25580 29962 3532 14816 29903 6778 13 2499 1994 1234 411 5952 18282 13 29966 829 14816 29903 "
            "6778 13 13 29902 626 2675 304 3681 29892 825 881 306 1074 29973 518 29914 25580 29962 5952 "
            "18282 29871"
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids that a prompt format places and that no user text ever becomes."""

    bos: int
    eos: int
    prefix: int | None = None
    suffix: int | None = None
    middle: int | None = None
    eot: int | None = None
    #: Ends a turn of the 70B chat format.
    step: int | None = None


class Vocabulary:
    """The pieces of one model, immutable: any number of threads may share it."""

    __slots__ = ("_bytes", "_pieces", "_raw", "_with_dummy_prefix", "specials")

    specials: Final[SpecialIds]

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        """Build both encodings.

        Raises:
            ModelFilesInvalid: the pieces have no BOS or EOS, or SentencePiece refuses them.
        """
        self._pieces = tuple(_hidden(piece) for piece in pieces)
        self._bytes = tuple(piece.to_bytes() for piece in self._pieces)
        self.specials = _find_specials(self._pieces)
        # Two processors, because the dummy prefix is a property of a processor, not of a call.
        model = pack(self._pieces)
        self._with_dummy_prefix = _processor(model)
        self._raw = _processor(without_dummy_prefix(model))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the tokenizer of a model folder.

        Raises:
            ModelFilesInvalid: missing or corrupt files, or not a vocabulary of Code Llama's kind.
        """
        return cls(read_pieces(folder))

    @property
    def size(self) -> int:
        """Number of pieces."""
        return len(self._pieces)

    @property
    def can_infill(self) -> bool:
        """Whether the four infilling pieces are there."""
        ids = self.specials
        return None not in (ids.prefix, ids.suffix, ids.middle, ids.eot)

    @property
    def is_official(self) -> bool:
        """Whether this claims to be the vocabulary of Code Llama 7B, 13B and 70B, by size and special ids."""
        ids = self.specials
        infilling = (ids.prefix, ids.suffix, ids.middle, ids.eot)
        return self.size >= _OFFICIAL_SIZE and infilling == _OFFICIAL_INFILLING

    def encode(self, text: str) -> list[int]:
        """Encode with the dummy prefix: as if a space stood before `text`. Empty text gives no ids."""
        ids: list[int] = self._with_dummy_prefix.encode(text)
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Encode without the dummy prefix: what follows other text, such as an infilling suffix."""
        ids: list[int] = self._raw.encode(text)
        return ids

    def piece(self, token_id: int) -> str:
        """Return the piece as the vocabulary writes it, with `▁` for a space."""
        return self._pieces[token_id].text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that this token adds to a text: none for control pieces.

        An id past the vocabulary adds none either: embeddings may have more rows than there are pieces.
        """
        return self._bytes[token_id] if token_id < len(self._bytes) else b""


def verify(vocabulary: Vocabulary) -> None:
    """Check an official vocabulary against ids that were published; others pass unchecked.

    Raises:
        TokenizerMismatch: the files are not what their size and special ids claim; replace them.
    """
    if not vocabulary.is_official:
        return
    found = [(vocabulary.encode(text), published) for text, published in _PUBLISHED_TEXTS]
    found.append((vocabulary.encode_raw(_PUBLISHED_SUFFIX[0]), _PUBLISHED_SUFFIX[1]))
    wrong = sum(ids != [int(word) for word in published.split()] for ids, published in found)
    if wrong:
        raise TokenizerMismatch(
            f"the tokenizer has Code Llama's special ids, but gives other ids than the published ones for "
            f"{wrong} of {len(found)} known texts",
            hint="download the model's `tokenizer.model` again",
        )


def _hidden(piece: Piece) -> Piece:
    # By the beginning: the official vocabulary also has `▁<EOT><EOT>` and longer.
    return piece._replace(kind=PieceKind.CONTROL) if piece.text.startswith(_HIDDEN) else piece


def _find_specials(pieces: tuple[Piece, ...]) -> SpecialIds:
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.kind is PieceKind.CONTROL}
    if _BOS not in ids or _EOS not in ids:
        raise ModelFilesInvalid("the tokenizer has no `<s>` or no `</s>`", hint="use the model's own files")
    return SpecialIds(
        bos=ids[_BOS],
        eos=ids[_EOS],
        prefix=ids.get(_PREFIX),
        suffix=ids.get(_SUFFIX),
        middle=ids.get(_MIDDLE),
        eot=ids.get(_EOT),
        step=ids.get(_STEP),
    )


def _processor(model: bytes) -> Any:
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as err:
        raise ModelFilesInvalid(
            "SentencePiece refuses the tokenizer's pieces",
            hint="download the model's `tokenizer.model` again",
        ) from err
