"""Load a Code Llama from a folder or from the hub's cache, quantized as asked.

Owns: which quantization a device gets, what makes a model folder valid, and the model's revision. The
weights, their classes and their kernels are transformers', bitsandbytes' and accelerate's. Does not know
tokenizer files, slots on the device, or which models codeherd serves (`codeherd_schema.models`).

Quantizations:
    nf4     4 bits, bitsandbytes NF4 with double quantization; for capacity and few slots.
    int8    8 bits, bitsandbytes without outlier decomposition; for throughput on a GPU.
    none    bfloat16 on a GPU, float32 on a CPU.
Every bitsandbytes setting is written out: its defaults are FP4 with float32 arithmetic, and outlier
decomposition, which waits for the device in every layer (0.50.2).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from codeherd_schema.errors import (
    DeviceUnavailable,
    InvalidSetting,
    ModelFilesInvalid,
    OutOfMemory,
)

logger = logging.getLogger(__name__)

AppliedQuantization = Literal["nf4", "int8", "none"]
Quantization = Literal["auto", "nf4", "int8", "none"]
Device = Literal["cpu", "cuda", "cuda-group"]

#: Bytes per parameter with all that belongs to it (engine notes, table of exact memory).
_BYTES_PER_PARAMETER = {"nf4": 0.57, "int8": 1.06}
#: Share of the device's memory that weights may take; the rest is the cache's.
_WEIGHTS_SHARE = 0.5
#: Parameters between 13B and 34B: above, fused NF4 kernels still pay at 16 slots on an H100.
_BIG_MODEL = 20e9
#: Most slots at which fused NF4 kernels beat int8, below and above `_BIG_MODEL`.
_NF4_SLOTS, _NF4_SLOTS_BIG = 7, 16
#: Parameters. Below, a CPU spends more on calling a 4-bit kernel than on the weights it saves
#: (128 x 128 layer, 8 rows: 98 us as NF4, 7 us as float32).
_CPU_NF4_FROM = 500e6
#: Bytes. A weight file is hashed whole up to this size; of a bigger one, its header and its size.
_HASH_WHOLE_UP_TO = 256 * 2**20
_HUB_FILES = ["*.json", "*.safetensors", "*.model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and what it is."""

    model: LlamaForCausalLM
    #: The hub's commit, or a hash of the files.
    revision: str
    quantization: AppliedQuantization
    #: Of activations, cache and what is not quantized.
    dtype: torch.dtype
    #: Where token ids go in and logits come out.
    device: torch.device
    #: Where the files are, the tokenizer's too.
    folder: Path


def load_model(
    source: str, *, quantization: Quantization, device: Device, slots: int, offline: bool = True
) -> LoadedModel:
    """Load a Llama for generation.

    Args:
        source: a folder, or a hub id such as `codellama/CodeLlama-7b-hf`.
        quantization: "auto" chooses by size, slots and device; see `choose_quantization`.
        device: "cuda" is one GPU, "cuda-group" spreads the layers over all visible ones.
        slots: sequences that will decode together.
        offline: look only at local files and the hub's local cache.

    Raises:
        ModelFilesInvalid: something is missing, truncated or not a Llama.
        InvalidSetting: the files are quantized already, and otherwise than asked.
        DeviceUnavailable: no such device here.
        OutOfMemory: the weights do not fit the device.
    """
    if offline:
        _forbid_downloads()
    memory_bytes = _memory_bytes(device)
    folder, commit = _find_folder(source, offline=offline)
    config = _read_config(folder)
    shapes = _read_shapes(folder)
    _check_vocabulary(config, shapes)
    stored = _stored_quantization(config)
    applied = _apply(quantization, stored, count_parameters(config), slots, device, memory_bytes)
    dtype = _dtype(applied, device)
    model = _from_pretrained(folder, config, stored, applied, dtype, device)
    revision = commit or _hash_files(folder)
    logger.info(
        "model_loaded folder=%s revision=%s quantization=%s dtype=%s", folder, revision, applied, dtype
    )
    return LoadedModel(
        model=model,
        revision=revision,
        quantization=applied,
        dtype=dtype,
        device=model.get_input_embeddings().weight.device,
        folder=folder,
    )


def choose_quantization(
    parameters: int, slots: int, device: Device, memory_bytes: int
) -> AppliedQuantization:
    """Choose what `auto` means.

    On a GPU: NF4 while bitsandbytes' fused kernels carry it, which is up to 7 slots, or 16 for 34B and
    70B; with more slots int8 if it leaves half of the memory to the cache, else NF4. On a CPU: NF4 for
    models of 0.5B parameters and more, where it saves most of the memory and, with AVX512-BF16, is no
    slower at eight rows (2 to 3 times slower at one); "none" for small ones, which NF4 makes slower. The
    border is a judgement between two measured layer sizes.

    Args:
        parameters: of the whole model.
        slots: sequences that decode together.
        device: the kind of device.
        memory_bytes: of the device, or of all in the group.
    """
    if device == "cpu":
        return "nf4" if parameters >= _CPU_NF4_FROM else "none"
    fused_up_to = _NF4_SLOTS_BIG if parameters >= _BIG_MODEL else _NF4_SLOTS
    int8_fits = parameters * _BYTES_PER_PARAMETER["int8"] <= memory_bytes * _WEIGHTS_SHARE
    return "int8" if slots > fused_up_to and int8_fits else "nf4"


def count_parameters(config: LlamaConfig) -> int:
    """Return how many weights a Llama of this configuration has, norms and biases left out."""
    hidden = config.hidden_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 2 * hidden * head_size * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return int(config.num_hidden_layers * layer + embeddings)


def quantization_of(model: LlamaForCausalLM) -> AppliedQuantization:
    """Return how a loaded model is quantized."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    return "int8" if getattr(model, "is_loaded_in_8bit", False) else "none"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the device's or the host's way to say that memory ran out."""
    # torch has a class for accelerators only; its CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _forbid_downloads() -> None:
    # For this whole process: on a CPU with AVX512-BF16, importing bitsandbytes 0.50.2 fetches a kernel
    # from the hub if the `kernels` package is there. The variable is for what is imported later, the
    # constant for what has read the variable already.
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def _memory_bytes(device: Device) -> int:
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"device is {device}, torch sees no GPU", hint="set the device to cpu")
    count = torch.cuda.device_count() if device == "cuda-group" else 1
    return sum(torch.cuda.get_device_properties(index).total_memory for index in range(count))


def _find_folder(source: str, *, offline: bool) -> tuple[Path, str | None]:
    """Return the folder, and the commit if it is the hub's."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelFilesInvalid(f"no folder `{source}`", hint="give a model folder or a hub id")
    try:
        snapshot = huggingface_hub.snapshot_download(
            source, allow_patterns=_HUB_FILES, local_files_only=offline
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as err:
        where = "in the hub's local cache" if offline else "on the hub"
        raise ModelFilesInvalid(
            f"`{source}` is no folder, and no model {where}", hint="download the model, or give its folder"
        ) from err
    return Path(snapshot), Path(snapshot).name


def _read_config(folder: Path) -> LlamaConfig:
    fields = _read_json(folder / "config.json")
    if fields.get("model_type") != "llama":
        raise ModelFilesInvalid(
            f"model_type in config.json is {fields.get('model_type')!r}, must be 'llama'",
            hint="codeherd serves Code Llama and models of the same architecture",
        )
    try:
        return LlamaConfig.from_dict(fields)
    except Exception as err:  # its validators raise many kinds
        raise ModelFilesInvalid(
            f"config.json is not a Llama's: {type(err).__name__}", hint="download the file again"
        ) from err


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ModelFilesInvalid(
            f"no {path.name} in `{path.parent}`", hint="give the folder that holds the model's files"
        ) from err
    except (OSError, ValueError) as err:
        raise ModelFilesInvalid(f"{path.name} cannot be read", hint="download the file again") from err
    if not isinstance(fields, dict):
        raise ModelFilesInvalid(f"{path.name} holds no object", hint="download the file again")
    return fields


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFilesInvalid(f"{index.name} names no files", hint="download the file again")
        return [folder / name for name in sorted(set(weight_map.values()))]
    single = folder / "model.safetensors"
    if not single.exists():
        raise ModelFilesInvalid(
            f"no model.safetensors in `{folder}`",
            hint="download the weights; other formats have to be converted to safetensors",
        )
    return [single]


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return each stored tensor's shape; opening a file checks its header against its size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                    shapes[name] = tuple(weights.get_slice(name).get_shape())
        except FileNotFoundError as err:
            raise ModelFilesInvalid(
                f"{path.name} is missing, the index names it", hint="download the file"
            ) from err
        except (SafetensorError, OSError) as err:
            raise ModelFilesInvalid(
                f"{path.name} is truncated or corrupt", hint="download the file again"
            ) from err
    return shapes


def _check_vocabulary(config: LlamaConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored = shapes.get(name)
        if stored is not None and stored[0] != config.vocab_size:
            raise ModelFilesInvalid(
                f"{name} has {stored[0]} rows, vocab_size in config.json is {config.vocab_size}",
                hint="config.json and the weights are of different models",
            )


def _stored_quantization(config: LlamaConfig) -> AppliedQuantization | None:
    """Return how the files are quantized, None if they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("quant_method") == "bitsandbytes":
        if fields.get("load_in_8bit"):
            return "int8"
        if fields.get("load_in_4bit") and fields.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
    raise ModelFilesInvalid(
        f"the files are quantized with {fields.get('quant_method')!r}, not with bitsandbytes nf4 or int8",
        hint="give the unquantized model",
    )


def _apply(
    asked: Quantization,
    stored: AppliedQuantization | None,
    parameters: int,
    slots: int,
    device: Device,
    memory_bytes: int,
) -> AppliedQuantization:
    if stored is not None:
        if asked not in ("auto", stored):
            raise InvalidSetting(
                f"quantization is {asked}, the files are quantized as {stored}",
                hint=f"set quantization to auto or {stored}, or give the unquantized model",
            )
        return stored
    if asked == "auto":
        return choose_quantization(parameters, slots, device, memory_bytes)
    return asked


def _dtype(applied: AppliedQuantization, device: Device) -> torch.dtype:
    if applied == "int8":
        # The 8-bit kernels take float16; anything else is cast in every layer, with a log line each.
        return torch.float16
    if device != "cpu":
        return torch.bfloat16
    if applied == "none":
        return torch.float32
    # Imported this late because importing it may download, see `_forbid_downloads`.
    from bitsandbytes.functional import has_avx512bf16

    # Where bitsandbytes has a CPU kernel for NF4 it computes in bfloat16: a 1024 x 1024 layer took
    # 0.24 ms for one row and 1.6 ms for 256, against 0.53 and 4.6 ms in float32.
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def _from_pretrained(
    folder: Path,
    config: LlamaConfig,
    stored: AppliedQuantization | None,
    applied: AppliedQuantization,
    dtype: torch.dtype,
    device: Device,
) -> LlamaForCausalLM:
    settings = _bitsandbytes_config(applied, dtype)
    if stored is not None and settings is not None:
        # What is stored decides the format; the arithmetic is ours, not that of whoever stored it.
        fields = config.quantization_config
        fields = dict(fields if isinstance(fields, dict) else fields.to_dict())
        fields["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        fields["llm_int8_threshold"] = settings.llm_int8_threshold
        config.quantization_config = fields
        settings = None
    try:
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=settings,
            device_map={"cpu": {"": "cpu"}, "cuda": {"": 0}, "cuda-group": "auto"}[device],
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
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
    places = set(getattr(model, "hf_device_map", {}).values())
    if device != "cpu" and places & {"cpu", "disk"}:
        raise OutOfMemory("the weights do not fit the GPUs", hint="use a stronger quantization or more GPUs")
    return model.eval().requires_grad_(False)


def _bitsandbytes_config(applied: AppliedQuantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if applied == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if applied == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def _hash_files(folder: Path) -> str:
    """Return a hash of what decides the model's answers: configuration, tokenizer, weights."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in _HUB_FILES for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            # A safetensors file begins with its header's length in 8 bytes, little-endian.
            whole = size <= _HASH_WHOLE_UP_TO
            rest = size if whole else 8 + int.from_bytes(file.peek(8)[:8], "little")
            while rest and (block := file.read(min(rest, 2**20))):
                digest.update(block)
                rest -= len(block)
    return digest.hexdigest()
