"""Measure what a loaded model takes and what its devices have, for the memory plan.

Owns: bytes of weights as they are held, bytes that are available on GPUs and on this machine or held there,
and how many idle rows the engine will add. Does not decide anything: `codeherd_worker.memory` does. Allocates
nothing that stays.
"""

from __future__ import annotations

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import LlamaForCausalLM

from codeherd_worker.engine.cpu_attention import workspace_bytes
from codeherd_worker.engine.linears import can_pack, is_dense, join
from codeherd_worker.engine.loading import LoadedModel, size_of
from codeherd_worker.engine.rounding import even_rows
from codeherd_worker.memory import (
    CPU_KERNEL_BYTES,
    CPU_RESERVE,
    GPU_KERNEL_BYTES,
    GPU_RESERVE,
    Card,
    ModelShape,
    activation_bytes,
)

#: Where Linux tells of memory, and of the limits of containers.
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Bytes in a unit of `ru_maxrss` (getrusage(2) of Linux and of macOS).
_MAXRSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024
#: Quantizations to be offered when weights are too heavy, the lightest loss first.
_LIGHTER: Final = ("int8", "nf4")


def measure_cards(
    loaded: LoadedModel, *, rows: int, draft_tokens: int, prefill_chunk: int, window: int
) -> list[Card]:
    """Return the devices that hold layers of a model, as they are before its engine is made.

    Args:
        loaded: on its device or devices.
        rows: slots and idle rows.
        draft_tokens: that each row may try in a step.
        prefill_chunk: tokens of the longest prefill pass.
        window: tokens of the longest slot.
    """
    model = loaded.model
    shape = shape_of(model, is_quantized=loaded.quantization not in ("none", "bf16", "fp16"))
    weights = weight_bytes(model)
    cards = []
    for device, layers in _layers_of_devices(model).items():
        activations = activation_bytes(
            shape,
            rows=rows,
            draft_tokens=draft_tokens,
            prefill_chunk=prefill_chunk,
            window=window,
            has_head=device == loaded.device,
        )
        is_cuda = device.type == "cuda"
        total, available = _gpu_bytes(device) if is_cuda else host_bytes()
        cards.append(
            Card(
                name=str(device),
                total_bytes=total,
                available_bytes=available if is_cuda else available + weights[device],
                reserve=GPU_RESERVE if is_cuda else CPU_RESERVE,
                weight_bytes=weights[device] + (0 if is_cuda else packed_bytes(model)),
                activation_bytes=activations + (GPU_KERNEL_BYTES if is_cuda else _cpu_kernel_bytes(window)),
                kv_bytes_per_token=2 * layers * shape.key_heads * shape.head_size * shape.dtype_bytes,
            )
        )
    return cards


def _cpu_kernel_bytes(window: int) -> int:
    return CPU_KERNEL_BYTES + workspace_bytes(threads=torch.get_num_threads(), window=window)


def shape_of(model: LlamaForCausalLM, *, is_quantized: bool) -> ModelShape:
    """Return what of a model decides how wide a pass is."""
    config = model.config
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        # The cache is held in the head's type; on a CPU in float32, as all that attention needs.
        dtype_bytes=4 if model.lm_head.weight.device.type == "cpu" else model.lm_head.weight.dtype.itemsize,
        is_quantized=is_quantized,
    )


def weight_bytes(model: nn.Module) -> dict[torch.device, int]:
    """Return the bytes of all weights and their scales on each device, shared ones once."""
    found: dict[torch.device, int] = defaultdict(int)
    seen = set()
    for tensor in _tensors(model):
        place = (tensor.device, tensor.data_ptr())
        if tensor.nbytes and place not in seen:
            seen.add(place)
            found[tensor.device] += tensor.nbytes
    return found


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the second copy that a CPU's engine makes of dense weights (`engine.linears`)."""
    return sum(
        module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_dense(module) and can_pack(module.weight)
    )


def idle_rows(model: LlamaForCausalLM, slots: int) -> int:
    """Return how many rows the engine will add to `slots` so that all round alike."""
    # One layer stands for all: what counts is the shape of its matrices.
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    together = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
        [model.lm_head],
    )
    return even_rows([join(modules) for modules in together], slots) - slots


def lighter_weights(model: LlamaForCausalLM) -> dict[str, int]:
    """Return what all weights would take in stronger quantizations, by name."""
    size = size_of(model.config)
    return {name: size.weight_bytes(name) for name in _LIGHTER}


def held_bytes(devices: Iterable[str]) -> tuple[int, int]:
    """Return what this process holds of its devices' memory now, and what it held at most."""
    cards = [device for device in devices if device != "cpu"]
    if cards:
        now = sum(torch.cuda.memory_reserved(card) for card in cards)
        return now, sum(torch.cuda.max_memory_reserved(card) for card in cards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    try:
        pages = int((_PROC / "self" / "statm").read_text().split()[1])
    except OSError:
        return peak, peak
    return pages * os.sysconf("SC_PAGE_SIZE"), peak


def host_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> tuple[int, int]:
    """Return this machine's memory, and what of it is available; a container's limit counts too.

    Args:
        proc: where `meminfo` and `self/cgroup` lie.
        cgroups: where the control groups are mounted, version 1 or 2.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    figures = {name: int(value.split()[0]) * 1024 for name, value in (x.split(":", 1) for x in lines)}
    total, available = figures["MemTotal"], figures["MemAvailable"]
    for limit, used in _cgroup_limits(proc, cgroups):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of this process's control group and of each one above it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, used_name = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, used_name = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path may be the host's, and the container's own group is the root.
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None:
                yield limit, used - _file_cache(group / "memory.stat")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or `max`
        return None


def _file_cache(path: Path) -> int:
    """Return the bytes of cached files, which the kernel gives back when memory is wanted."""
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return sum(int(value) for name, value in pairs if name in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


def _gpu_bytes(device: torch.device) -> tuple[int, int]:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total, free + torch.cuda.memory_reserved(device)


def _layers_of_devices(model: LlamaForCausalLM) -> Mapping[torch.device, int]:
    layers: dict[torch.device, int] = defaultdict(int)
    for layer in model.model.layers:
        layers[layer.input_layernorm.weight.device] += 1
    return layers


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield everything that a model's modules hold, down to the tensors that quantized ones are made of."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from _parts(tensor)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flatten = getattr(tensor.data, "__tensor_flatten__", None)
    if flatten is not None:  # torchao: a tensor subclass around several plain ones
        for name in flatten()[0]:
            yield from _parts(getattr(tensor.data, name))
        return
    yield tensor
    # bitsandbytes keeps the scales beside the weight, as attributes of it.
    holder = getattr(tensor, "quant_state", None)
    scales = [getattr(tensor, "SCB", None)]
    while holder is not None:
        scales += [getattr(holder, "absmax", None), getattr(holder, "code", None)]
        holder = getattr(holder, "state2", None)
    yield from (part for part in scales if isinstance(part, torch.Tensor))
