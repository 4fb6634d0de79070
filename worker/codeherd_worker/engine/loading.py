"""Load a Code Llama from a folder or from the hub's cache, quantized as asked.

Owns: how a quantization is applied, in which dtype, and the loaded model. The weights, their classes and
their kernels are transformers', bitsandbytes', torchao's and accelerate's. Does not know what makes files
valid (`checkpoint.py`), which quantization `auto` is (`quantization.py`), where layers go (`placement.py`),
tokenizer files, or which models codeherd serves (`codeherd_schema.models`).

Every bitsandbytes setting is written out: its defaults are FP4 with float32 arithmetic, and outlier
decomposition, which waits for the device in every layer (0.50.2). Code that comes with a model is never run.
"""

from __future__ import annotations

import difflib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from codeherd_schema.errors import (
    DeviceUnavailable,
    InvalidSetting,
    ModelFilesInvalid,
    OutOfMemory,
    PackageMissing,
)
from codeherd_worker.engine.checkpoint import (
    check_context,
    check_tensors,
    check_values,
    described_quantization,
    find_folder,
    hash_files,
    quantization_fields,
    read_config,
    read_tensors,
    require_packages,
    stored_quantization,
    weight_files,
)
from codeherd_worker.engine.faults import is_out_of_memory
from codeherd_worker.engine.placement import device_map, spread_layers
from codeherd_worker.engine.progress import LogProgress, Progress, counted
from codeherd_worker.engine.quantization import (
    AppliedQuantization,
    Device,
    ModelSize,
    Quantization,
    choose_quantization,
)

__all__ = [
    "AppliedQuantization",
    "Device",
    "LoadedModel",
    "Quantization",
    "choose_quantization",
    "count_parameters",
    "is_out_of_memory",
    "load_model",
    "quantization_of",
    "size_of",
]

logger = logging.getLogger(__name__)

#: Weights that share two numbers in torchao-int4. 64 lost little: perplexity 12.84, bfloat16 12.21 (Llama 2
#: 7B, torchao's README).
_INT4_GROUP = 64


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and what it is."""

    model: LlamaForCausalLM
    #: The hub's commit, or a hash of the files.
    revision: str
    #: A name of `quantization.py`, or the format of files that are quantized already, such as `gptq`.
    quantization: str
    #: Of activations, cache and what is not quantized.
    dtype: torch.dtype
    #: Where token ids go in and logits come out.
    device: torch.device
    #: Where the files are, the tokenizer's too.
    folder: Path


def load_model(
    source: str,
    *,
    quantization: Quantization,
    device: Device,
    slots: int,
    offline: bool = True,
    memory_bytes: int | None = None,
    context: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a Llama for generation.

    Args:
        source: a folder, or a hub id such as `codellama/CodeLlama-7b-hf`, with `@` and a branch, tag or
            commit if it is pinned.
        quantization: "auto" keeps what the files have, or chooses; see `choose_quantization`.
        device: "cuda" is one GPU, "cuda-group" spreads the layers over all visible ones.
        slots: sequences that will decode together.
        offline: look only at local files and the hub's local cache.
        memory_bytes: of the device, or of all in the group; None asks the device.
        context: tokens that a sequence may have, to be refused here rather than after loading.
        progress: is told of the steps `check` and `load`; None writes log lines.

    Raises:
        ModelFilesInvalid: something is missing, truncated, not finite or not a Llama.
        InvalidSetting: the files are quantized already, and otherwise than asked; no such quantization, or
            not on this device; more context than the model has positions.
        PackageMissing: the quantization needs one that is not installed.
        DeviceUnavailable: no such device here.
        OutOfMemory: the weights do not fit the device.
    """
    started = time.monotonic()
    if offline:
        _forbid_downloads()
    _check_name(quantization)
    card_bytes = _card_bytes(device)
    memory_bytes = memory_bytes or sum(card_bytes)
    folder, commit = find_folder(source, offline=offline)
    config = read_config(folder)
    check_context(config, context)
    stored = stored_quantization(config)
    tensors = read_tensors(folder)
    check_tensors(config, tensors, stored)
    size = size_of(config)
    applied = _apply(quantization, stored, size, slots, device, memory_bytes)
    dtype = _dtype(applied, device)
    files_bytes = sum(path.stat().st_size for path in weight_files(folder))
    is_packed = stored not in (None, "compressed-tensors")
    weight_bytes = files_bytes if is_packed else size.weight_bytes(applied, dtype.itemsize)
    _check_fit(weight_bytes, memory_bytes)
    places = _places(device, size, weight_bytes, dtype, card_bytes)
    progress = progress or LogProgress(files_bytes)
    check_values(tensors, dtype, progress)
    with counted(progress):
        model = _from_pretrained(folder, config, stored, applied, dtype, places)
    revision = commit or hash_files(folder)
    logger.info(
        "model_loaded folder=%s revision=%s quantization=%s dtype=%s weight_bytes=%d load_s=%.1f",
        folder, revision, applied, dtype, weight_bytes, time.monotonic() - started,
    )  # fmt: skip
    return LoadedModel(
        model=model,
        revision=revision,
        quantization=applied,
        dtype=dtype,
        device=model.get_input_embeddings().weight.device,
        folder=folder,
    )


def size_of(config: LlamaConfig) -> ModelSize:
    """Return what of a Llama of this configuration takes memory."""
    hidden = config.hidden_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 2 * hidden * head_size * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    return ModelSize(
        linear_weights=int(config.num_hidden_layers * layer),
        kept_weights=int(config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)),
        kv_bytes_per_token=int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size),
        layers=int(config.num_hidden_layers),
    )


def count_parameters(config: LlamaConfig) -> int:
    """Return how many weights a Llama of this configuration has, norms and biases left out."""
    return size_of(config).parameters


def quantization_of(model: LlamaForCausalLM) -> str:
    """Return how a loaded model is quantized, `none` in any dtype that is not."""
    fields = quantization_fields(model.config)
    return "none" if fields is None else described_quantization(fields) or str(fields.get("quant_method"))


def _forbid_downloads() -> None:
    # For this whole process: on a CPU with AVX512-BF16, importing bitsandbytes 0.50.2 fetches a kernel
    # from the hub if the `kernels` package is there. The variable is for what is imported later, the
    # constant for what has read the variable already.
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def _check_name(quantization: str) -> None:
    names = get_args(Quantization)
    if quantization not in names:
        near = difflib.get_close_matches(quantization, names, n=1)
        raise InvalidSetting(
            f"no quantization `{quantization}`",
            hint=(f"did you mean `{near[0]}`? " if near else "") + f"there are {', '.join(names)}",
        )


def _card_bytes(device: Device) -> list[int]:
    """Return the memory of each device that the model may use."""
    if device == "cpu":
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"device is {device}, torch sees no GPU", hint="set the device to cpu")
    count = torch.cuda.device_count() if device == "cuda-group" else 1
    return [torch.cuda.get_device_properties(index).total_memory for index in range(count)]


def _apply(
    asked: Quantization, stored: str | None, size: ModelSize, slots: int, device: Device, memory_bytes: int
) -> str:
    if stored is not None:
        if asked not in ("auto", stored):
            raise InvalidSetting(
                f"quantization is {asked}, the files are quantized as {stored}",
                hint="set quantization to auto, or give the unquantized model",
            )
        applied = stored
    elif asked == "auto":
        applied = choose_quantization(size, slots, device, memory_bytes)
    else:
        applied = asked
    if applied.startswith("torchao"):
        require_packages(applied, (("torchao", "torchao"),))
    if applied == "torchao-int4" and device == "cpu":
        raise InvalidSetting(
            "torchao 0.18 has no kernels for torchao-int4 on a CPU", hint="use nf4 or torchao-int8"
        )
    return applied


def _dtype(applied: str, device: Device) -> torch.dtype:
    if applied == "bf16":
        return torch.bfloat16
    # The 8-bit kernels of bitsandbytes take float16; anything else is cast in every layer, with a log line
    # each. Those for GPTQ and AWQ were written for it.
    if applied in ("fp16", "int8") or (applied in ("gptq", "awq") and device != "cpu"):
        return torch.float16
    if device != "cpu":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    if applied != "nf4":
        return torch.float32
    # Imported this late because importing it may download, see `_forbid_downloads`.
    from bitsandbytes.functional import has_avx512bf16

    # Where bitsandbytes has a CPU kernel for NF4 it computes in bfloat16: a 1024 x 1024 layer took
    # 0.24 ms for one row and 1.6 ms for 256, against 0.53 and 4.6 ms in float32.
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def _check_fit(weight_bytes: int, memory_bytes: int) -> None:
    if weight_bytes > memory_bytes:
        raise OutOfMemory(
            f"the weights take {weight_bytes / 1e9:.1f} GB, the device has {memory_bytes / 1e9:.1f} GB",
            hint="use a stronger quantization or a GPU group",
        )


def _places(
    device: Device, size: ModelSize, weight_bytes: int, dtype: torch.dtype, card_bytes: list[int]
) -> dict[str, int | str]:
    """Return accelerate's map from modules to devices."""
    if device == "cpu":
        return {"": "cpu"}
    if device == "cuda":
        return {"": 0}
    ends_bytes = size.kept_weights * dtype.itemsize
    cards = spread_layers(
        size.layers,
        layer_bytes=(weight_bytes - ends_bytes) // size.layers,
        ends_bytes=ends_bytes,
        card_bytes=card_bytes,
    )
    return {**device_map(cards)}


def _from_pretrained(
    folder: Path,
    config: LlamaConfig,
    stored: str | None,
    applied: str,
    dtype: torch.dtype,
    places: dict[str, int | str],
) -> LlamaForCausalLM:
    settings = None
    if stored is None:
        settings = _quantization_config(applied, dtype)
    elif stored in ("nf4", "int8"):
        # What is stored decides the format; the arithmetic is ours, not that of whoever stored it.
        config.quantization_config = (quantization_fields(config) or {}) | {
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "llm_int8_threshold": 0.0,
        }
    elif stored == "compressed-tensors":
        # transformers unpacks these weights before it computes in any case, by default in the model's first
        # pass; our engine calls the layers themselves.
        config.quantization_config = (quantization_fields(config) or {}) | {"dequantize": True}
    try:
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=settings,
            device_map=places,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as err:
        # Of the package that reads the format, or of one that it needs in turn.
        raise PackageMissing(
            f"quantization {applied} needs a package that is missing or too old: {str(err).splitlines()[0]}",
            hint=f"pip install {err.name}" if err.name else "install what the message names",
        ) from err
    except Exception as err:
        if is_out_of_memory(err):
            raise OutOfMemory(
                "the weights do not fit the device", hint="use a stronger quantization or a GPU group"
            ) from err
        raise ModelFilesInvalid(
            f"the weights do not fit config.json: {type(err).__name__}", hint="download the model again"
        ) from err
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelFilesInvalid(
            f"{len(missing)} weights are missing, the first is {missing[0]}", hint="download the model again"
        )
    return model.eval().requires_grad_(False)


def _quantization_config(applied: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig | None:
    match applied:
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case "torchao-int8" | "torchao-int4":
            return TorchAoConfig(_torchao_config(applied))
        case _:
            return None


def _torchao_config(applied: str) -> Any:
    # Imported this late because it is an optional package. The inductor settings are this process's to set.
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if applied == "torchao-int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    # The format of torch's own kernel; the other ones need further packages.
    return Int4WeightOnlyConfig(
        group_size=_INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
