"""Meta's published way from text to prompt ids, on the `sentencepiece` library: what our prompts must equal.

Follows llama/tokenizer.py and llama/generation.py of github.com/meta-llama/codellama step by step, including
the steps that ours does not take (a guard character instead of a second processor). Shares no code with the
worker, and hides nothing from SentencePiece: compare on texts that name no control piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

GUARD = "☺"


class ReferenceTokenizer:
    """One SentencePiece model, used as Meta uses it."""

    def __init__(self, model: bytes | Path) -> None:
        data = model.read_bytes() if isinstance(model, Path) else model
        self.sp = SentencePieceProcessor(model_proto=data)

    def id_of(self, piece: str) -> int:
        found: int = self.sp.piece_to_id(piece)
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.sp.encode(text)
        return ids

    def encode_infilling(self, text: str) -> list[int]:
        # The guard takes the dummy prefix; both are cut off again.
        return self.encode(GUARD + text)[2:]

    def decode_infilling(self, ids: Sequence[int]) -> str:
        text: str = self.sp.decode([self.id_of(GUARD), *ids])
        return text[1:]

    def completion(self, prompt: str) -> list[int]:
        return [self.sp.bos_id(), *self.encode(prompt)]

    def infilling(self, prefix: str, suffix: str, *, suffix_first: bool) -> list[int]:
        pre, suf, mid = (self.id_of(f"▁<{name}>") for name in ("PRE", "SUF", "MID"))
        before, after = self.encode(prefix), self.encode_infilling(suffix)
        if suffix_first:
            return [self.sp.bos_id(), pre, suf, *after, mid, *before]
        return [self.sp.bos_id(), pre, *before, suf, *after, mid]

    def inst_dialog(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        turns = [content for _, content in messages]
        if messages[0][0] == "system":
            turns = ["<<SYS>>\n" + turns[0] + "\n<</SYS>>\n\n" + turns[1], *turns[2:]]
        ids: list[int] = []
        for i in range(0, len(turns) - 1, 2):
            ids.append(self.sp.bos_id())
            ids.extend(self.encode("[INST] " + turns[i].strip() + " [/INST] " + turns[i + 1].strip() + " "))
            ids.append(self.sp.eos_id())
        ids.append(self.sp.bos_id())
        ids.extend(self.encode("[INST] " + turns[-1].strip() + " [/INST]"))
        return ids

    def step_dialog(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if messages[0][0] != "system":
            messages = [("system", ""), *messages]
        ids: list[int] = [self.sp.bos_id()]
        for role, content in messages:
            ids.extend(self.encode(" Source: " + role))
            if content:
                ids.extend(self.encode("\n\n " + content.strip()))
            ids.append(self.id_of("<step>"))
        ids.extend(self.encode(" Source: assistant\nDestination: user"))
        ids.extend(self.encode("\n\n "))
        return ids
