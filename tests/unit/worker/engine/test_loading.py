from __future__ import annotations

import json
import os
import sys
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
    PackageMissing,
)
from codeherd_worker.engine import checkpoint
from codeherd_worker.engine.loading import (
    Device,
    LoadedModel,
    Quantization,
    count_parameters,
    load_model,
    quantization_of,
)
from codeherd_worker.engine.progress import LogProgress
from tests.unit.worker.engine.tiny_llama import tiny_config, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def load(
    folder: Path | str, quantization: Quantization = "none", device: Device = "cpu", **options: Any
) -> LoadedModel:
    return load_model(str(folder), quantization=quantization, device=device, slots=4, **options)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
        ("bf16", "none", {torch.bfloat16}),
        ("fp16", "none", {torch.float16}),
        ("torchao-int8", "torchao-int8", {torch.float32}),
    ],
)
def test_a_folder_loads_as_asked(
    folder: Path, quantization: Quantization, applied: str, dtypes: set[torch.dtype]
) -> None:
    loaded = load(folder, quantization)

    assert loaded.quantization == (applied if quantization == "auto" else quantization)
    assert quantization_of(loaded.model) == applied
    assert loaded.dtype in dtypes
    assert loaded.model.lm_head.weight.dtype == loaded.dtype
    assert (loaded.device.type, loaded.folder) == ("cpu", folder)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("quantization", ["none", "bf16", "nf4", "int8", "torchao-int8"])
def test_every_linear_module_can_be_called_alone(folder: Path, quantization: Quantization) -> None:
    loaded = load(folder, quantization)
    plain = tiny_llama()

    for (name, module), reference in zip(_linears(loaded.model), _linears(plain), strict=True):
        vector = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(1))
        output = module(vector.to(loaded.dtype))
        assert output.dtype == loaded.dtype, name
        error = (output.float() - reference[1](vector)).norm() / reference[1](vector).norm()
        assert error < (0.15 if quantization == "nf4" else 0.03), name


def _linears(model: LlamaForCausalLM) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def test_a_model_in_several_files_loads(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="100KB")

    ids = torch.tensor([[5, 6, 7]])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path).model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"tie_word_embeddings": True}])
def test_unusual_configurations_load(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "torchao-int8"])
def test_a_quantized_folder_loads_without_being_asked(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, quantization: Quantization
) -> None:
    first = load(folder, quantization)
    stored = tmp_path_factory.mktemp("quantized")
    first.model.save_pretrained(stored)
    if quantization != "torchao-int8":
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
    monkeypatch.setattr(checkpoint, "_HASH_WHOLE_UP_TO", 1)

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

    loaded, pinned = load("owner/some-llama"), load("owner/some-llama@v1.0")

    assert (loaded.revision, loaded.folder) == (commit, snapshot)
    assert pinned.revision == commit
    assert [(find["source"], find["revision"]) for find in asked] == [
        ("owner/some-llama", None),
        ("owner/some-llama", "v1.0"),
    ]
    assert all(find["local_files_only"] for find in asked)


MISSING = ["/no/such/folder", "./nowhere", "owner/no-such-model", "owner/no-such-model@v1", "a b/c"]


@pytest.mark.parametrize("source", MISSING)
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


def lose_the_norms(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "norm" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def change_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def narrow_a_norm(folder: Path) -> None:
    change_tensor(folder, "model.layers.0.input_layernorm.weight", torch.ones(63))


def add_a_bias(folder: Path) -> None:
    change_tensor(folder, "model.layers.0.self_attn.q_proj.bias", torch.ones(64))


def vary_the_rope_table(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


def choose_rope_by_length(folder: Path) -> None:
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": factors, "short_factor": factors}
    change_config(folder, rope_parameters=rope | {"original_max_position_embeddings": 512})


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def quantize_otherwise(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "aqlm"})


def quantize_as_fp4(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_config, "no config.json"),
        (break_config, "config.json cannot be read"),
        (list_config, "config.json holds no object"),
        (make_another_architecture, "model_type in config.json is 'gpt2'"),
        (make_heads_impossible, "config.json"),
        (widen_vocabulary, "has 320 rows, vocab_size in config.json is 321"),
        (widen_layers, "model.layers.0.mlp.gate_proj.weight is (128, 64), must be (256, 64)"),
        (narrow_a_norm, "model.layers.0.input_layernorm.weight is (63,), must be (64,)"),
        (add_a_bias, "1 weights belong to no part of a Llama, the first is model.layers.0.self_attn.q_proj"),
        (vary_the_rope_table, "rope_type in config.json is 'dynamic'"),
        (choose_rope_by_length, "rope_type in config.json is 'longrope'"),
        (remove_weights, "no model.safetensors"),
        (truncate_weights, "model.safetensors is truncated or corrupt"),
        (empty_weights, "model.safetensors is truncated or corrupt"),
        (lose_a_tensor, "1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"),
        (lose_the_norms, "5 weights are missing, the first is model.layers.0.input_layernorm.weight"),
        (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
        (empty_index, "names no files"),
        (quantize_otherwise, "quantized with 'aqlm'"),
        (quantize_as_fp4, "quantized with 'bitsandbytes'"),
    ],
)
def test_damaged_files_are_one_clear_sentence(folder: Path, damage: Any, sentence: str) -> None:
    damage(folder)

    with pytest.raises(ModelFilesInvalid) as caught:
        load(folder)

    assert sentence in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_before_it_is_quantized(
    folder: Path, quantization: Quantization, bad: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].to(torch.bfloat16)
    weight[3, 5] = bad
    change_tensor(folder, name, weight)

    with pytest.raises(ModelFilesInvalid, match=f"{name} in model.safetensors holds NaN or Inf"):
        load(folder, quantization)


def test_a_scale_that_is_no_number_is_found_in_quantized_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = tmp_path_factory.mktemp("quantized")
    load(folder, "int8").model.save_pretrained(stored)
    name = "model.layers.0.self_attn.q_proj.SCB"
    change_tensor(stored, name, torch.full_like(load_file(stored / "model.safetensors")[name], torch.nan))

    with pytest.raises(ModelFilesInvalid, match=f"{name} in model.safetensors holds NaN or Inf"):
        load(stored, "auto")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.linspace(-2, 2, 12)
    tensors = {"good": numbers, "empty": numbers[:0], "ids": torch.arange(3), "bad": numbers.clone()}
    tensors["bad"][7] = torch.nan
    save_file(
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()},
        tmp_path / "model.safetensors",
    )

    with pytest.raises(ModelFilesInvalid, match=r"^bad in model\.safetensors holds NaN or Inf$"):
        checkpoint.check_values(checkpoint.read_tensors(tmp_path), torch.float32, lambda step, share: None)


def test_a_number_that_float16_cannot_hold_is_refused_for_it_alone(folder: Path) -> None:
    name = "model.norm.weight"
    change_tensor(folder, name, torch.full((64,), 1e5))

    with pytest.raises(ModelFilesInvalid, match=f"{name} in .* holds numbers too large for float16"):
        load(folder, "int8")
    assert load(folder, "none").quantization == "none"


def test_a_stored_rope_table_is_computed_all_the_same(folder: Path) -> None:
    change_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8))

    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load(folder).model(ids).logits, tiny_llama()(ids).logits)


@pytest.mark.parametrize(
    ("method", "fields", "packages"),
    [
        ("gptq", {"bits": 4, "group_size": 128}, "gptqmodel optimum"),
        ("awq", {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "gptqmodel"),
        ("compressed-tensors", {"format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
    ],
)
def test_a_quantized_format_names_the_package_that_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, fields: dict[str, Any], packages: str
) -> None:
    for module in ("gptqmodel", "optimum", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, module, None)
    change_config(folder, quantization_config={"quant_method": method, **fields})

    with pytest.raises(PackageMissing, match=f"quantization {method} needs the package") as caught:
        load(folder, "auto")

    assert caught.value.hint == f"pip install {packages}"


def test_a_package_that_lacks_another_is_named_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def need_more(*_args: Any, **_kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'loguru'", name="loguru")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", need_more)

    with pytest.raises(PackageMissing, match="missing or too old: No module named 'loguru'") as caught:
        load(folder)

    assert caught.value.hint == "pip install loguru"


def test_packed_weights_of_compressed_tensors_are_unpacked_before_anyone_calls_them(folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    plain = load_file(folder / "model.safetensors")
    packed = dict(plain)
    for name, weight in plain.items():
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            packed[name], packed[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "format": "int-quantized", "weights": weights}
    change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )

    loaded = load(folder, "auto")

    assert loaded.quantization == "compressed-tensors"
    for name, module in _linears(loaded.model):
        assert torch.allclose(module.weight, plain[f"{name}.weight"], atol=0.01)


@pytest.mark.parametrize("quantization", ["torchao-int8", "torchao-int4"])
def test_torchao_is_named_where_it_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)

    with pytest.raises(PackageMissing, match="torchao") as caught:
        load(folder, quantization)

    assert caught.value.hint == "pip install torchao"


def test_four_bits_of_torchao_are_refused_on_a_cpu(folder: Path) -> None:
    with pytest.raises(InvalidSetting, match="no kernels for torchao-int4 on a CPU") as caught:
        load(folder, "torchao-int4")

    assert caught.value.hint


def test_an_unknown_quantization_is_refused_with_the_nearest_one(folder: Path) -> None:
    with pytest.raises(InvalidSetting, match="no quantization `nf-4`") as caught:
        load(folder, "nf-4")  # type: ignore[arg-type]

    assert "did you mean `nf4`?" in (caught.value.hint or "")


def test_more_context_than_positions_is_refused_before_loading(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(InvalidSetting, match="1025 tokens per sequence are asked for, the model has 1024"):
        load(folder, context=1025)


def test_weights_that_cannot_fit_are_refused_before_loading(folder: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"the weights take 0\.0 GB, the device has 0\.0 GB"):
        load(folder, memory_bytes=1000)


def test_progress_is_told_step_by_step(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float]] = []
    capfd.readouterr()

    load(folder, progress=lambda step, share: told.append((step, share)))

    shares = {step: [share for s, share in told if s == step] for step in ("check", "load")}
    assert [step for step, share in told if share == 1] == ["check", "load"]
    assert all(part == sorted(part) and len(part) == 21 for part in shares.values())
    # transformers draws no bar of its own.
    assert capfd.readouterr().err == ""


def test_a_process_without_a_terminal_logs_how_far_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        load(folder)

    size = (folder / "model.safetensors").stat().st_size
    lines = [record.getMessage() for record in caplog.records]
    assert f"model_progress step=check percent=100 bytes={size} total_bytes={size}" in lines
    assert f"model_progress step=load percent=100 bytes={size} total_bytes={size}" in lines
    assert any(line.startswith("model_loaded ") and "load_s=" in line for line in lines)


def test_a_slow_step_is_logged_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    progress = LogProgress(1000, clock=lambda: now)

    with caplog.at_level("INFO"):
        for percent in range(1, 51):
            now += 0.25
            progress("load", percent / 100)

    logged = [record.getMessage() for record in caplog.records]
    assert logged == [
        "model_progress step=load percent=20 bytes=200 total_bytes=1000",
        "model_progress step=load percent=40 bytes=400 total_bytes=1000",
    ]


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
