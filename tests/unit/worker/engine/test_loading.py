from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from codeherd_schema.errors import (
    DeviceUnavailable,
    InvalidSetting,
    ModelFilesInvalid,
    OutOfMemory,
)
from codeherd_worker.engine import loading
from codeherd_worker.engine.loading import (
    AppliedQuantization,
    Device,
    Quantization,
    choose_quantization,
    count_parameters,
    is_out_of_memory,
    load_model,
    quantization_of,
)
from tests.unit.worker.engine.tiny_llama import tiny_config, tiny_llama

GIB = 2**30
SIZES = {"7B": 6_738_546_688, "13B": 13_015_866_880, "34B": 33_743_970_304, "70B": 68_976_653_312}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def load(
    folder: Path | str, quantization: Quantization = "none", device: Device = "cpu"
) -> loading.LoadedModel:
    return load_model(str(folder), quantization=quantization, device=device, slots=4)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("size", "slots", "device", "memory_gib", "expected"),
    [
        ("7B", 1, "cuda", 80, "nf4"),
        ("7B", 7, "cuda", 80, "nf4"),
        ("7B", 8, "cuda", 80, "int8"),
        ("7B", 8, "cuda", 12, "nf4"),
        ("13B", 4, "cuda", 80, "nf4"),
        ("13B", 32, "cuda", 80, "int8"),
        ("13B", 8, "cuda", 24, "nf4"),
        ("34B", 16, "cuda", 80, "nf4"),
        ("34B", 32, "cuda", 80, "int8"),
        ("34B", 32, "cuda", 48, "nf4"),
        ("70B", 8, "cuda", 80, "nf4"),
        ("70B", 32, "cuda", 80, "nf4"),
        ("70B", 32, "cuda-group", 160, "int8"),
        ("7B", 4, "cpu", 64, "nf4"),
    ],
)
def test_auto_follows_size_slots_and_memory(
    size: str, slots: int, device: Device, memory_gib: int, expected: AppliedQuantization
) -> None:
    assert choose_quantization(SIZES[size], slots, device, memory_gib * GIB) == expected


def test_a_small_model_stays_as_it_is_on_a_cpu() -> None:
    assert choose_quantization(50_000_000, 4, "cpu", 8 * GIB) == "none"


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 32}])
def test_parameters_are_counted_from_the_configuration(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)

    assert count_parameters(tiny_config(**changes)) == model.num_parameters() - norms


@pytest.mark.parametrize(
    ("quantization", "applied", "dtypes"),
    [
        ("none", "none", {torch.float32}),
        ("auto", "none", {torch.float32}),
        ("nf4", "nf4", {torch.float32, torch.bfloat16}),
        ("int8", "int8", {torch.float16}),
    ],
)
def test_a_folder_loads_as_asked(
    folder: Path, quantization: Quantization, applied: str, dtypes: set[torch.dtype]
) -> None:
    loaded = load(folder, quantization)

    assert loaded.quantization == quantization_of(loaded.model) == applied
    assert loaded.dtype in dtypes
    assert loaded.model.lm_head.weight.dtype == loaded.dtype
    assert (loaded.device.type, loaded.folder) == ("cpu", folder)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"tie_word_embeddings": True}])
def test_unusual_configurations_load(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_folder_loads_without_being_asked(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, quantization: Quantization
) -> None:
    first = load(folder, quantization)
    stored = tmp_path_factory.mktemp("quantized")
    first.model.save_pretrained(stored)
    # What bitsandbytes writes when nobody chose: arithmetic in float32.
    config = json.loads((stored / "config.json").read_text())
    fields = config["quantization_config"] | {"bnb_4bit_compute_dtype": "float32"}
    change_config(stored, quantization_config=fields)

    second = load(stored, "auto")

    ids = torch.tensor([[5, 6, 7]])
    assert second.quantization == quantization
    assert second.dtype == first.dtype
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    with pytest.raises(InvalidSetting, match=f"quantized as {quantization}"):
        load(stored, "none")


def test_nf4_is_double_quantized_and_computes_as_loaded(folder: Path) -> None:
    loaded = load(folder, "nf4")

    layer = loaded.model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == loaded.dtype


def test_the_revision_names_the_files(folder: Path) -> None:
    before = load(folder).revision
    again = load(folder).revision
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert before == again
    assert len(before) == 64
    assert load(folder).revision != before


def test_a_big_file_is_named_by_header_and_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(folder).revision
    monkeypatch.setattr(loading, "_HASH_WHOLE_UP_TO", 1)

    assert load(folder).revision == load(folder).revision != whole


def test_the_hub_cache_gives_its_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.parent / commit
    folder.rename(snapshot)
    asked: list[dict[str, Any]] = []

    def find(source: str, **options: Any) -> str:
        asked.append({"source": source} | options)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", find)

    loaded = load("owner/some-llama")

    assert (loaded.revision, loaded.folder) == (commit, snapshot)
    assert asked[0]["source"] == "owner/some-llama"
    assert asked[0]["local_files_only"]


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "owner/no-such-model", "a b/c"])
def test_a_missing_model_is_one_clear_sentence(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelFilesInvalid) as caught:
        load(source)

    assert source in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def make_another_architecture(folder: Path) -> None:
    change_config(folder, model_type="gpt2")


def make_heads_impossible(folder: Path) -> None:
    change_config(folder, num_attention_heads=7, head_dim=None)


def widen_vocabulary(folder: Path) -> None:
    change_config(folder, vocab_size=321)


def widen_layers(folder: Path) -> None:
    change_config(folder, intermediate_size=256)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def quantize_otherwise(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_config, "no config.json"),
        (break_config, "config.json cannot be read"),
        (list_config, "config.json holds no object"),
        (make_another_architecture, "model_type in config.json is 'gpt2'"),
        (make_heads_impossible, "config.json"),
        (widen_vocabulary, "has 320 rows, vocab_size in config.json is 321"),
        (widen_layers, "the weights do not fit config.json"),
        (remove_weights, "no model.safetensors"),
        (truncate_weights, "model.safetensors is truncated or corrupt"),
        (empty_weights, "model.safetensors is truncated or corrupt"),
        (lose_a_tensor, "1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"),
        (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
        (empty_index, "names no files"),
        (quantize_otherwise, "quantized with 'gptq'"),
    ],
)
def test_damaged_files_are_one_clear_sentence(folder: Path, damage: Any, sentence: str) -> None:
    damage(folder)

    with pytest.raises(ModelFilesInvalid) as caught:
        load(folder)

    assert sentence in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda-group"])
def test_a_missing_gpu_is_said(folder: Path, device: Device) -> None:
    with pytest.raises(DeviceUnavailable, match=f"device is {device}"):
        load(folder, device=device)


def test_weights_that_do_not_fit_are_out_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", run_out)

    with pytest.raises(OutOfMemory):
        load(folder)


def test_loading_forbids_downloads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    load(folder)

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_both_allocators_can_say_that_memory_ran_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
