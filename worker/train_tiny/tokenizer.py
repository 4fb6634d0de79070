"""Train the tokenizer of the tiny model, and write it in both formats that Code Llama has.

`tokenizer.model` is a SentencePiece BPE model like Llama's: byte fallback, identity normalization, a dummy
prefix, digits apart. `tokenizer.json` has the same vocabulary and merges for the `tokenizers` library. The
four infilling pieces stand at the end of the vocabulary as control pieces, which no text can produce.

    python -m train_tiny.tokenizer --corpus corpus.jsonl --out TOKENIZER_DIR
"""

import argparse
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, processors

from train_tiny.corpus import Unit, is_held_out, read

#: Vocabulary size, infilling pieces included.
VOCAB_SIZE = 4096
#: Meta's names of the infilling pieces (codellama/llama/tokenizer.py).
INFILLING_PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
#: The character that Meta's `encode_infilling` puts in front and cuts off again.
INFILLING_GUARD = "☺"
#: Units that the vocabulary is learned from.
SAMPLE_UNITS = 40_000


def sample_lines(units: list[Unit], seed: int) -> Iterable[str]:
    """Yield ASCII lines of training text; summaries come twice, because writing them is the model's work."""
    rng = random.Random(seed)
    units = [unit for unit in units if not is_held_out(unit.path) and (unit.summary or not unit.is_function)]
    for unit in rng.sample(units, min(SAMPLE_UNITS, len(units))):
        text = unit.head + unit.body if unit.is_function else unit.context
        for line in text.split("\n"):
            if line.strip() and line.isascii():
                yield line
        if unit.summary:
            yield unit.summary
            yield unit.summary


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece model with room for the infilling pieces, and append them."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(prefix),
            model_type="bpe",
            vocab_size=vocab_size - len(INFILLING_PIECES),
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=INFILLING_GUARD,
            max_sentence_length=1000,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
        return append_control_pieces(prefix.with_suffix(".model").read_bytes(), INFILLING_PIECES)


def append_control_pieces(model: bytes, pieces: Iterable[str]) -> bytes:
    """Return the SentencePiece model with control pieces added at the end of its vocabulary."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def to_fast(model: bytes) -> tokenizers.Tokenizer:
    """Build the `tokenizers` twin of a SentencePiece BPE model, laid out as Llama's tokenizer.json is."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    kinds = proto.SentencePiece
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    bpe = models.BPE(vocab, find_merges(vocab, normal), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = tokenizers.Tokenizer(bpe)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    fast.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in control])
    return fast


def find_merges(vocab: dict[str, int], normal: dict[str, float]) -> list[tuple[str, str]]:
    """List the pairs that make each piece, best piece first.

    SentencePiece stores no merges; these are the ones of `generate_merges` in transformers 5.23
    (convert_slow_tokenizer.py), restricted to the pieces that text can produce.
    """
    merges: list[tuple[str, str, float]] = []
    for piece, score in normal.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in normal and right in normal]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((left, right, score) for left, right in pairs)
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def main() -> None:
    """Train the tokenizer and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(sample_lines(read(args.corpus), args.seed), args.vocab_size)
    (args.out / "tokenizer.model").write_bytes(model)
    to_fast(model).save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
