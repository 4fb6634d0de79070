"""Find a model's files, and refuse those that cannot become a correct model.

Owns: where a source's folder is, its revision, and every check that needs no device: configuration, names,
shapes and values of the tensors, how they are quantized already. Does not know devices or how weights are
loaded (`loading.py`), tokenizers, or which models codeherd serves (`codeherd_schema.models`).

transformers fills a missing tensor with random numbers and drops one that it does not know, each with a
table on stderr; NaN passes unseen, and bitsandbytes' kernels can turn it into a number. So all of it is
checked here, before the weights are loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from codeherd_schema.errors import InvalidSetting, ModelFilesInvalid, PackageMissing

#: Bytes. A weight file is hashed whole up to this size; of a bigger one, its header and its size.
_HASH_WHOLE_UP_TO = 256 * 2**20
_HUB_FILES = ["*.json", "*.safetensors", "*.model"]
#: Threads that look at values; one reads 6 to 9 GB/s of bfloat16 that is in memory already.
_MOST_READERS = 8
#: RoPE types whose table is fixed when the model is loaded. That of `dynamic` and `longrope` changes with the
#: length of the sequence, for all rows of a batch at once.
_ROPE_TYPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
#: Formats that are loaded as they are, and the packages that read them: (import name, name to install).
_STORED_FORMATS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "awq": (("gptqmodel", "gptqmodel"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "torchao": (("torchao", "torchao"),),
}
#: What each class of torchao is called here.
_TORCHAO_NAMES = {"Int8WeightOnlyConfig": "torchao-int8", "Int4WeightOnlyConfig": "torchao-int4"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a weight file."""

    path: Path
    shape: tuple[int, ...]
    #: As safetensors writes it: `BF16`, `F32`, `U8`.
    dtype: str

    @property
    def is_floating(self) -> bool:
        """Whether it can hold numbers that are not finite."""
        return self.dtype.startswith(("F", "BF"))


def find_folder(source: str, *, offline: bool) -> tuple[Path, str | None]:
    """Return a model's folder, and its commit if it is the hub's.

    Args:
        source: a folder, or a hub id, `owner/name` or `owner/name@revision` with a branch, tag or commit.
        offline: look only in the hub's local cache.

    Raises:
        ModelFilesInvalid: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    name, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelFilesInvalid(f"no folder `{source}`", hint="give a model folder or a hub id")
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=_HUB_FILES, local_files_only=offline
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as err:
        where = "in the hub's local cache" if offline else "on the hub"
        raise ModelFilesInvalid(
            f"`{source}` is no folder, and no model {where}", hint="download the model, or give its folder"
        ) from err
    return Path(snapshot), Path(snapshot).name


def read_config(folder: Path) -> LlamaConfig:
    """Return the configuration of a Llama that this engine can run.

    Raises:
        ModelFilesInvalid: none, another architecture, or a RoPE table that depends on the length.
    """
    fields = _read_json(folder / "config.json")
    if fields.get("model_type") != "llama":
        raise ModelFilesInvalid(
            f"model_type in config.json is {fields.get('model_type')!r}, must be 'llama'",
            hint="codeherd serves Code Llama and models of the same architecture",
        )
    try:
        config = LlamaConfig.from_dict(fields)
    except Exception as err:  # its validators raise many kinds
        raise ModelFilesInvalid(
            f"config.json is not a Llama's: {type(err).__name__}", hint="download the file again"
        ) from err
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ModelFilesInvalid(
            f"rope_type in config.json is {rope_type!r}, whose table depends on the length of the text",
            hint=f"use a model whose rope_type is one of {', '.join(sorted(_ROPE_TYPES))}",
        )
    return config


def check_context(config: LlamaConfig, context: int | None) -> None:
    """Refuse more tokens per sequence than the model has positions for.

    Raises:
        InvalidSetting: with both figures.
    """
    positions = config.max_position_embeddings
    if context is not None and context > positions:
        raise InvalidSetting(
            f"{context} tokens per sequence are asked for, the model has {positions} positions",
            hint=f"ask for {positions} or fewer",
        )


def stored_quantization(config: LlamaConfig) -> str | None:
    """Return how the files are quantized: a name of `quantization.py`, a format's name, None if they are not.

    Raises:
        ModelFilesInvalid: in a way that cannot be served.
        PackageMissing: the package that reads the format is not installed.
    """
    fields = quantization_fields(config)
    if fields is None:
        return None
    method = str(fields.get("quant_method"))
    name = described_quantization(fields)
    if name is None:
        raise ModelFilesInvalid(
            f"the files are quantized with {method!r}, which cannot be served",
            hint=f"give the unquantized model, or one in bitsandbytes' nf4 or int8, "
            f"{', '.join(_STORED_FORMATS)}",
        )
    require_packages(name, _STORED_FORMATS.get(method, ()))
    return name


def quantization_fields(config: LlamaConfig) -> dict[str, Any] | None:
    """Return what a configuration says of quantization."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def described_quantization(fields: dict[str, Any]) -> str | None:
    """Return the name of a quantization that is written in a configuration, None if it is not known."""
    # transformers turns the method into a member of an enumeration of strings.
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    if method == "bitsandbytes":
        if fields.get("load_in_8bit"):
            return "int8"
        is_nf4 = fields.get("load_in_4bit") and fields.get("bnb_4bit_quant_type") == "nf4"
        return "nf4" if is_nf4 else None
    if method == "torchao":
        kind = fields.get("quant_type", {}).get("default", {}).get("_type")
        return _TORCHAO_NAMES.get(kind, "torchao")
    return method if method in _STORED_FORMATS else None


def require_packages(quantization: str, packages: tuple[tuple[str, str], ...]) -> None:
    """Check that what a quantization needs is installed.

    Args:
        quantization: for the message.
        packages: pairs of import name and name to install.

    Raises:
        PackageMissing: the hint says what to install.
    """
    missing = [name for module, name in packages if importlib.util.find_spec(module) is None]
    if missing:
        raise PackageMissing(
            f"quantization {quantization} needs the package {' and '.join(missing)}",
            hint=f"pip install {' '.join(missing)}",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder; whether they exist is seen when they are opened.

    Raises:
        ModelFilesInvalid: there is neither one safetensors file nor an index of several.
    """
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


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return what the weight files hold; opening a file checks its header against its size.

    Raises:
        ModelFilesInvalid: a file is missing, truncated or corrupt.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                    part = weights.get_slice(name)
                    tensors[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError as err:
            raise ModelFilesInvalid(
                f"{path.name} is missing, the index names it", hint="download the file"
            ) from err
        except (SafetensorError, OSError) as err:
            raise ModelFilesInvalid(
                f"{path.name} is truncated or corrupt", hint="download the file again"
            ) from err
    return tensors


def check_tensors(config: LlamaConfig, tensors: dict[str, StoredTensor], stored: str | None) -> None:
    """Compare the tensors' names and shapes with those of the model that config.json describes.

    Args:
        config: of the model.
        tensors: what the files hold.
        stored: how they are quantized. In files of nf4 and int8 the shapes of packed weights, and the names
            of what belongs to them, are not compared; in those of other formats, nothing is.

    Raises:
        ModelFilesInvalid: one is missing, has another shape, or belongs to no part of the model.
    """
    _check_vocabulary(config, tensors)
    if stored not in (None, "nf4", "int8"):
        return
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ModelFilesInvalid(
            f"{len(missing)} weights are missing, the first is {missing[0]}", hint="download the model again"
        )
    for name, shape in expected.items():
        if tensors[name].is_floating and tensors[name].shape != shape:
            raise ModelFilesInvalid(
                f"the weights do not fit config.json: {name} is {tensors[name].shape}, must be {shape}",
                hint="config.json and the weights are of different models",
            )
    # Old exports keep the RoPE table, which is computed; a tied head may be stored a second time.
    unknown = sorted(
        name
        for name in tensors.keys() - expected.keys()
        if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"
    )
    if stored is None and unknown:
        raise ModelFilesInvalid(
            f"{len(unknown)} weights belong to no part of a Llama, the first is {unknown[0]}",
            hint="config.json and the weights are of different models",
        )


def check_values(
    tensors: dict[str, StoredTensor], dtype: torch.dtype, progress: Callable[[str, float], None]
) -> None:
    """Read every floating-point tensor and refuse numbers that are not finite, or not so in `dtype`.

    Costs one reading of the files, which loading then finds in memory.

    Args:
        tensors: what the files hold.
        dtype: what they will be converted to.
        progress: is told the step `check` and how much of it is done.

    Raises:
        ModelFilesInvalid: names the tensor.
    """
    limit = torch.finfo(dtype).max
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating}
    with ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1)) as pool:
        extremes = _extremes(floating, pool)
        for done, (name, (low, high)) in enumerate(extremes, start=1):
            # A comparison with NaN is false.
            if not -limit <= low <= high <= limit:
                pool.shutdown(cancel_futures=True)
                is_finite = torch.tensor([low, high]).isfinite().all()
                what = f"numbers too large for {dtype}".replace("torch.", "") if is_finite else "NaN or Inf"
                raise ModelFilesInvalid(
                    f"{name} in {floating[name].path.name} holds {what}",
                    hint="use another quantization" if is_finite else "download the file again",
                )
            progress("check", done / len(floating))


def hash_files(folder: Path) -> str:
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


def _check_vocabulary(config: LlamaConfig, tensors: dict[str, StoredTensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored = tensors.get(name)
        if stored is not None and stored.shape[0] != config.vocab_size:
            raise ModelFilesInvalid(
                f"{name} has {stored.shape[0]} rows, vocab_size in config.json is {config.vocab_size}",
                hint="config.json and the weights are of different models",
            )


def _extremes(
    tensors: dict[str, StoredTensor], pool: ThreadPoolExecutor
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each tensor's smallest and largest number; NaN if it holds one."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.path, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as weights:
            yield from zip(names, pool.map(_extreme, repeat(weights), names), strict=True)


def _extreme(weights: Any, name: str) -> tuple[float, float]:
    tensor: torch.Tensor = weights.get_tensor(name)
    if not tensor.numel():
        return 0.0, 0.0
    if tensor.element_size() == 1:
        # 8-bit floats know no comparison.
        tensor = tensor.float()
    # Faster than isfinite, and without a second tensor: both ends are NaN if any number is.
    low, high = tensor.aminmax()
    return float(low), float(high)
