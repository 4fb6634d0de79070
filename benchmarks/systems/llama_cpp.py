"""llama.cpp with 16 parallel sequences, scheduled the way its own server does.

Each pass decodes one token of every running sequence and fills the rest of the batch with prompt tokens. A
sequence that ended leaves its cache in its slot; a new prompt takes the free slot with the longest common
beginning and computes only the rest. Weights and cache are float32.

llama.cpp rotates neighbouring elements where transformers rotates halves, so the rows of the query and key
weights are reordered (`_interleaved`), as in llama.cpp's own convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.protocol import SLOTS, THREADS
from benchmarks.records import JobRecord
from benchmarks.workloads import Arrival, Job, Workload

#: Tokens per pass, llama-server's own figures: `--batch-size` and `--ubatch-size`.
_BATCH, _MICRO_BATCH = 2048, 512

_GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


class System:
    """llama.cpp through the functions that llama-cpp-python binds."""

    def prepare(self, folder: Path, converted: Path) -> None:
        unfinished = converted.with_suffix(".unfinished")
        _write_gguf(folder, unfinished)
        unfinished.rename(converted)

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(converted).encode(), model_settings)
        if not model:
            raise RuntimeError("the model could not be loaded")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = SLOTS * longest
        settings.n_seq_max = SLOTS
        settings.n_batch, settings.n_ubatch = _BATCH, _MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.kv_unified = False
        # Its flash attention turns float32 keys and values into float16 first: 8 of 32 jobs then had other
        # tokens, and none without it.
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError("the context could not be made")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._free = [_Slot(number) for number in range(SLOTS)]

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        if workload.arrival is Arrival.ONE_BY_ONE:
            return [self._generate((job,))[0] for job in workload.jobs]
        return self._generate(workload.jobs)

    def _generate(self, jobs: tuple[Job, ...]) -> list[JobRecord]:
        submitted_at = time.perf_counter()
        sequences = [_Sequence(job) for job in jobs]
        waiting = deque(sequences)
        running: list[_Sequence] = []
        while waiting or running:
            while waiting and self._free:
                running.append(self._admit(waiting.popleft()))
            self._pass(running)
            for sequence in [s for s in running if s.has_ended]:
                running.remove(sequence)
                self._free.append(sequence.slot)
        return [JobRecord(tuple(s.new_ids), submitted_at, tuple(s.times)) for s in sequences]

    def _admit(self, sequence: _Sequence) -> _Sequence:
        prompt_ids = sequence.job.prompt_ids
        sequence.slot = max(self._free, key=lambda slot: _common(slot.cached, prompt_ids))
        self._free.remove(sequence.slot)
        # The last prompt token is always computed: its logits give the first new token.
        kept = min(_common(sequence.slot.cached, prompt_ids), len(prompt_ids) - 1)
        llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot.number, kept, -1)
        del sequence.slot.cached[kept:]
        return sequence

    def _pass(self, running: list[_Sequence]) -> None:
        """Compute one batch, and give every sequence whose logits are in it its next token."""
        self._batch.n_tokens = 0
        rows: list[tuple[_Sequence, int]] = []
        for sequence in running:
            if sequence.new_ids:
                rows.append((sequence, self._add(sequence.slot, sequence.new_ids[-1], wants_logits=True)))
        for sequence in running:
            prompt_ids = sequence.job.prompt_ids
            while len(sequence.slot.cached) < len(prompt_ids) and self._batch.n_tokens < _BATCH:
                position = len(sequence.slot.cached)
                is_last = position == len(prompt_ids) - 1
                row = self._add(sequence.slot, prompt_ids[position], wants_logits=is_last)
                if is_last:
                    rows.append((sequence, row))
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for sequence, row in rows:
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            token = int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab_size,))))
            sequence.new_ids.append(token)
            sequence.times.append(time.perf_counter())

    def _add(self, slot: _Slot, token: int, *, wants_logits: bool) -> int:
        """Put a token at the end of a slot's sequence into the batch; return its row."""
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = len(slot.cached)
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = slot.number
        batch.logits[row] = wants_logits
        batch.n_tokens += 1
        slot.cached.append(token)
        return row


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    #: The tokens whose keys and values it holds.
    cached: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Sequence:
    job: Job
    slot: _Slot = field(default_factory=lambda: _Slot(-1))
    new_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return len(self.new_ids) >= self.job.new_tokens


def _common(left: list[int], right: tuple[int, ...]) -> int:
    """Return how many tokens both begin with."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))


def _write_gguf(folder: Path, path: Path) -> None:
    # Only the conversion needs these; the measured process must not hold them.
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    # Ids go in and ids come out.
    writer.add_tokenizer_model("no_vocab")
    for name, weight in load_file(folder / "model.safetensors").items():
        values = weight.to(torch.float32).numpy()
        writer.add_tensor(_gguf_name(name), _interleaved(name, values, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, _, layer, rest = name.split(".", maxsplit=3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def _interleaved(name: str, values: np.ndarray[Any, Any], config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return query and key weights with each head's two halves interleaved, others as they are."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = next((number for part, number in heads.items() if part in name), None)
    if count is None:
        return values
    rows, columns = values.shape
    halves = values.reshape(count, 2, rows // count // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
