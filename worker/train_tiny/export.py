"""Write the folder that the worker ships: 16-bit weights, configuration, and both tokenizer files.

The folder is complete or untouched: files are written beside it and moved in one by one, weights last.

    python -m train_tiny.export --checkpoint RUN_DIR/checkpoint.pt --tokenizer TOKENIZER_DIR --out MODEL_DIR
"""

import argparse
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from train_tiny.tokenizer import INFILLING_PIECES

#: Largest weights file that is shipped, bytes.
MAX_WEIGHT_BYTES = 16_000_000
#: Moved in this order, so that new weights never stand beside an old configuration for long.
FILES = ("tokenizer.model", "tokenizer.json", "generation_config.json", "config.json", "model.safetensors")


def export(checkpoint: Path, tokenizer: Path, out: Path) -> int:
    """Write the model folder from a checkpoint; return the size of the weights in bytes.

    Raises ValueError: the weights are larger than what we ship; train a smaller model.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig(**state["config"]))
    model.load_state_dict(state["model"])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    end_ids = [sp.eos_id(), sp.piece_to_id(INFILLING_PIECES[-1])]
    model.generation_config = GenerationConfig(
        bos_token_id=sp.bos_id(), eos_token_id=end_ids, pad_token_id=sp.eos_id(), do_sample=False
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tiny-") as folder:
        fresh = Path(folder)
        model.to(torch.bfloat16).save_pretrained(fresh)
        for name in FILES[:2]:
            fresh.joinpath(name).write_bytes(tokenizer.joinpath(name).read_bytes())
        size = fresh.joinpath("model.safetensors").stat().st_size
        if size > MAX_WEIGHT_BYTES:
            raise ValueError(f"weights have {size} bytes, room for {MAX_WEIGHT_BYTES}")
        for name in FILES:
            fresh.joinpath(name).chmod(0o644)
            fresh.joinpath(name).replace(out / name)
    return size


def main() -> None:
    """Export a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.stderr.write(f"exported weight_bytes={export(args.checkpoint, args.tokenizer, args.out)}\n")


if __name__ == "__main__":
    main()
