"""The weights that all systems run: folders in the format of transformers, made once.

Owns: the models' shapes, and the folder `.cache` where the random one and every converted copy lie. The
random model speaks the embedded model's vocabulary: its further ids stand for pieces that no text becomes.
Does not know the formats of other systems.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import codeherd_worker
from codeherd_worker.engine.pieces import Piece, PieceKind, pack, read_pieces
from codeherd_worker.engine.vocabulary import Vocabulary

MODELS = ("tiny", "random-110m")

#: Everything here can be deleted: the next run makes it again.
CACHE = Path(__file__).parent / ".cache"

_TINY_FOLDER = Path(codeherd_worker.__file__).parent / "tiny"
#: A small Llama with Code Llama's proportions, heads and positions; 110,119,680 parameters.
_RANDOM_SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
}
_RANDOM_VOCABULARY = 16_384
_ROPE_THETA = 1e6


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A checkpoint that every system can load, or a converted copy of it."""

    name: str
    folder: Path
    #: Of the weights, 12 hexadecimal digits.
    digest: str
    #: Tokens of prompt and answer together.
    window: int
    vocab_size: int
    bos_id: int
    #: Ids that only a prompt format places.
    control_ids: frozenset[int]


def prepare(name: str) -> BenchModel:
    """Return the model of this name; the first time, make its files.

    Raises:
        KeyError: no such model.
    """
    folder = {"tiny": _TINY_FOLDER, "random-110m": CACHE / "random-110m"}[name]
    if not folder.exists():
        _make_random_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    specials = Vocabulary.from_folder(folder).specials
    ids = (getattr(specials, field.name) for field in fields(specials))
    return BenchModel(
        name=name,
        folder=folder,
        digest=_digest(folder / "model.safetensors"),
        window=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        bos_id=specials.bos,
        control_ids=frozenset(i for i in ids if i is not None),
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _make_random_model(folder: Path) -> None:
    # Imported here: the process that only hands out turns needs no torch.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **_RANDOM_SHAPE,
            vocab_size=_RANDOM_VOCABULARY,
            rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
            pad_token_id=None,
        )
    )
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    pieces = list(read_pieces(_TINY_FOLDER))
    pieces += [Piece(f"<unused_{i}>", 0.0, PieceKind.UNUSED) for i in range(len(pieces), _RANDOM_VOCABULARY)]
    (unfinished / "tokenizer.model").write_bytes(pack(pieces))
    unfinished.rename(folder)
