"""Quantize a model once and keep it: a folder that loads as it is, several times smaller.

Owns: what such a folder holds, and that it is there whole or not at all. Does not know how weights are
quantized or loaded (`loading.py`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from codeherd_schema.errors import CodeherdError, InvalidRequest, InvalidSetting
from codeherd_worker.engine.checkpoint import (
    find_folder,
    hash_files,
    read_config,
    stored_quantization,
    weight_files,
)
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.progress import Progress, counted
from codeherd_worker.engine.quantization import Device, SavedQuantization

#: What a model needs beside weights and configuration, and the terms it comes with.
_COPIED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
)
#: Largest weight file.
_SHARD_SIZE = "4GB"


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What was written."""

    folder: Path
    quantization: SavedQuantization
    #: A hash of the new files: what results made with them will name.
    revision: str
    #: Of the weight files that were read, and of those written.
    source_bytes: int
    saved_bytes: int


def save_quantized(
    source: str, out: Path, *, quantization: SavedQuantization, device: Device, progress: Progress
) -> SavedModel:
    """Load a model with this quantization and write it to a new folder.

    Args:
        source: as in `load_model`; looked for on this machine only.
        out: must not exist, or be empty.
        quantization: what to hold the weights in.
        device: does the quantizing; the files can be loaded on any.
        progress: is told of the steps `check`, `load` and `save`.

    Raises:
        InvalidRequest: `out` holds something.
        InvalidSetting: the source is quantized already.
        CodeherdError: the disk is full, or the folder cannot be written; nothing is left there.
        ModelFilesInvalid, OutOfMemory, DeviceUnavailable: as in `load_model`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"`{out}` exists already", hint="name a new folder, or remove this one")
    folder, _ = find_folder(source, offline=True)
    stored = stored_quantization(read_config(folder))
    if stored is not None:
        raise InvalidSetting(
            f"the files are quantized as {stored} already", hint="give the unquantized model"
        )
    loaded = load_model(
        source, quantization=quantization, device=device, slots=1, offline=True, progress=progress
    )
    # What the author wished for generating may not pass transformers' checks; it is copied as it is.
    loaded.model.generation_config = GenerationConfig.from_model_config(loaded.model.config)
    # Beside its place, so that the renaming is one step within one file system.
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        with counted(progress):
            loaded.model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        for path in (path for pattern in _COPIED for path in folder.glob(pattern)):
            shutil.copyfile(path, partial / path.name)
        for path in partial.glob("*.safetensors"):
            # safetensors writes for its user alone; a worker may be another.
            shutil.copymode(partial / "config.json", path)
        partial.rename(out)
    except OSError as err:
        raise CodeherdError(
            f"`{out}` cannot be written: {err.strerror}", hint="choose a folder on a disk with room"
        ) from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SavedModel(
        folder=out,
        quantization=quantization,
        revision=hash_files(out),
        source_bytes=_weight_bytes(folder),
        saved_bytes=_weight_bytes(out),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
