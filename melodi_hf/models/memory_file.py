"""Save the memory of a document in one safetensors file, and load it without the model.

A file is written completely or not at all. Whether it fits a model is checked when the model reads
with it, by the fields of the configuration. A checksum covers all tensors and all metadata.

    metadata   format, version, sha256, content: JSON of
                   config    the fields of the configuration that shape a memory or its meaning
                   fields    per layer, the names of its tensors
                   dtypes    of the tensors while they were held; a file may hold fewer bits
                   columns, fill, weights
    tensors    tokens_read (B), layers.<i>.<field> (B ...), extras.<name>
"""

import copy
import hashlib
import json
import os
import secrets
from collections import namedtuple
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .validation import require

FORMAT, VERSION = "melodi_hf memory", "1"
# Fields of a configuration that do not change a memory or its meaning; all others count.
FREE_FIELDS = {
    *("dropout", "attention_dropout", "initial_embedding_std", "initial_temperature"),
    *("logit_scale", "tie_word_embeddings", "use_cache", "schedule"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}
WEIGHT_TOLERANCE = 2**-7  # relative: weights rounded to bfloat16 are still the same weights
# Fields whose names in files are older. torch.export confuses a field with another one whose name
# begins with its own, so no field may be called "long" beside "long_keys".
NAMES_IN_FILES = {"long_tokens": "long", "state_vectors": "state"}
FIELDS = {in_file: name for name, in_file in NAMES_IN_FILES.items()}


class SavedMemory(NamedTuple):
    """The content of a memory file."""

    config: dict[str, Any]  # the fields that a model must share
    layers: list[Any]  # per layer, a NamedTuple of tensors, rows first
    tokens_read: Tensor  # B, int64
    fill: int | None  # tokens of the open window if all rows hold as many, else None
    columns: int  # read so far, padding included
    extras: dict[str, Tensor]  # other tensors that were saved
    weights: dict[str, float] | None  # a sample of the weights that wrote the memory


def memory_fields(config) -> dict[str, Any]:
    """Return the fields of a configuration that shape a memory or its meaning, as in JSON."""
    held = vars(config)  # not getattr, which is slow on a configuration
    values = {name: held[name] for name in _relevant_names(type(config))}  # type: ignore[arg-type]
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
    return {"model_type": config.model_type, **plain}


@cache
def _relevant_names(config_class):
    free = PreTrainedConfig.__dataclass_fields__.keys() | FREE_FIELDS | {*config_class.free_fields}
    return sorted(config_class.__dataclass_fields__.keys() - free)


@cache
def _defaults(config_class):
    fields = config_class.__dataclass_fields__
    return {name: fields[name].default for name in _relevant_names(config_class)}


def check_memory_of(fields, config):
    """Raise `ValueError` if `memory_fields` of the model that wrote a memory differ from config.

    A field that they lack, because an earlier version wrote them, counts as its default.
    """
    own = memory_fields(config)
    if fields == own:  # soon, since each call of a model checks it
        return
    fields = {**_defaults(type(config)), **fields}  # type: ignore[arg-type]
    if fields == own:
        return
    differ = [name for name in {**own, **fields} if fields.get(name) != own.get(name)]
    differ = ["model_type"] if "model_type" in differ else differ  # the others follow from it
    theirs, ours = (
        ", ".join(f"{name}={have.get(name)!r}" for name in differ) for have in (fields, own)
    )
    raise ValueError(
        f"the memory was written by a model with {theirs} and this one has {ours}: it is that of "
        f"another model; continue with that one, or read the document again with this one"
    )


def unwrap_decoder(model):
    """Return the decoder, such as `MelodiModel`, inside a language model and its wrappers.

    Wrappers are PEFT's models, `DistributedDataParallel`, FSDP's, and compiled modules.
    """
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    require(
        inside,
        f"model is a {type(model).__name__} without a transformers model inside: pass a model of "
        f"this library, or one that wraps it",
    )
    return inside[0].base_model


def weights_sample(model) -> dict[str, float]:
    """Take one number of each matrix that writes memories, with adapters of PEFT merged.

    That is enough to distinguish checkpoints, not to trust them. Names do not depend on whether
    adapters are merged, nor on the head.
    """
    return _sample(merged_weights(unwrap_decoder(model), "model."))


def _sample(named_weights):
    return {
        name: float(weight.detach().flatten()[weight.numel() // 2])
        for name, weight in named_weights
        if weight.dim() > 1 and weight.is_floating_point()
    }


def merged_weights(module, prefix=""):
    """Yield the name and the value of each parameter, as if active adapters were merged.

    Adapters are merged in copies, one layer at a time, as PEFT's `merge_and_unload` does it.
    """
    module = _merge(module)
    for name, weight in module.named_parameters(recurse=False):
        yield prefix + name, weight
    for name, child in module.named_children():
        yield from merged_weights(child, f"{prefix}{name}.")


@torch.no_grad()
def _merge(module):
    if hasattr(module, "unload_and_optionally_merge_module"):  # such as `modules_to_save`
        if module.disable_adapters:
            return module.original_module
        return copy.deepcopy(module).unload_and_optionally_merge_module(True, False, None)
    if not (hasattr(module, "base_layer") and hasattr(module, "merge")):
        return module
    if not (module.merged or module.disable_adapters):
        module = copy.deepcopy(module)
        module.merge()
    return _merge(module.base_layer)


def check_weights(sample, model):
    """Raise `ValueError` if a model's weights differ from a sample by more than rounding."""
    own = _sample(model.named_parameters())
    if not own.keys() <= sample.keys():  # as in files from before adapters were merged
        own = weights_sample(model)
    nan = float("nan")
    differ = [name for name in own if not _is_near(own[name], sample.get(name, nan))]
    require(
        not differ,
        f"the memory was written by other weights than this model's: {len(differ)} of {len(own)} "
        f"matrices differ, such as {differ[:1]}; load the checkpoint that wrote it, or read the "
        f"document again with this one",
    )


def _is_near(a, b):
    return abs(a - b) <= WEIGHT_TOLERANCE * max(abs(a), abs(b))


def save_memory_file(memory_cache, path, dtype: torch.dtype | None = None, model=None, extras=None):
    """Write the memories in a cache into one file, completely or not at all.

    Args:
        path: missing folders are made; an existing file is replaced once the new one is complete.
        dtype: of floating-point numbers in the file, such as torch.bfloat16, which halves it;
            loading restores their present type, but not the bits.
        model: the one that wrote the memory; a sample of its weights is then saved.
        extras: further tensors, by name.

    Raises `ValueError` for a cache that has read nothing, `OSError` where nothing can be written.
    """
    layers = memory_cache.layers
    is_empty = not layers or layers[0].memory is None
    require(not is_empty, f"nothing to write into {path}: the cache has read no token yet")
    check_dtype(dtype)
    state = layers[0].state
    fields = [
        {NAMES_IN_FILES.get(n, n): t for n, t in layer.memory._asdict().items()} for layer in layers
    ]
    tensors = {"tokens_read": state.progress.tokens_read}
    tensors |= {f"layers.{i}.{n}": t for i, held in enumerate(fields) for n, t in held.items()}
    tensors |= {f"extras.{name}": tensor for name, tensor in (extras or {}).items()}
    content = {
        "config": memory_cache.config_fields,
        "fields": [list(held) for held in fields],
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        "columns": int(state.columns),
        "fill": state.progress.offset,
        "weights": None if model is None else weights_sample(model),
    }
    tensors = {n: _copy(t.detach(), "cpu", dtype).contiguous() for n, t in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    metadata["sha256"] = _checksum(tensors, metadata)
    _write_atomically(save(tensors, metadata), path)


def check_dtype(dtype):
    """Raise `ValueError` for a type that is not of floating-point numbers; None is allowed."""
    is_allowed = dtype is None or dtype.is_floating_point
    require(is_allowed, f"dtype is {dtype}: a memory is made of floating-point numbers")


def _copy(tensor, device, dtype):
    return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)


def _write_atomically(data, path):
    # The file is written beside the target, so that the last step is a rename.
    target = Path(os.path.realpath(path))  # a link stays a link
    example = target / "memory"
    require(not target.is_dir(), f"{path} is a folder: name a file in it, such as {example}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def load_memory_file(path, device=None, dtype: torch.dtype | None = None, model=None):
    """Read a memory file -> `SavedMemory`.

    Args:
        device: where the tensors go, by default the CPU.
        dtype: of floating-point numbers; None restores the type of each when it was saved.
        model: the one that is to continue. Device and dtype default to its own, and it is refused
            at once if its configuration or, where the file has a sample of them, its weights
            differ. A model that reads always checks the configuration, but not the weights.

    Raises `FileNotFoundError`, and `ValueError` for anything but a complete memory file.
    """
    check_dtype(dtype)
    content, tensors = _read(path)
    if model is not None:
        check_memory_of(content["config"], model.config)
        if content["weights"] is not None:
            check_weights(content["weights"], model)
        device, dtype = device or model.device, dtype or model.dtype
    types = {name: dtype or getattr(torch, held) for name, held in content["dtypes"].items()}
    # Copies, since what was read may lie in the mapped file, which others may change.
    tensors = {name: _copy(tensor, device, types[name]) for name, tensor in tensors.items()}
    layers = []
    for i, names in enumerate(content.pop("fields")):
        memory_type: Any = namedtuple("Memory", [FIELDS.get(name, name) for name in names])  # type: ignore[misc]
        layers.append(memory_type(*(tensors[f"layers.{i}.{name}"] for name in names)))
    extras = {n.removeprefix("extras."): t for n, t in tensors.items() if n.startswith("extras.")}
    del content["dtypes"]
    return SavedMemory(layers=layers, tokens_read=tensors["tokens_read"], extras=extras, **content)


def _read(path):
    # The content and the tensors of a complete file.
    is_broken_link = os.path.lexists(path) and not os.path.exists(path)
    link = f"{path} is a link to {os.path.realpath(path)}, which does not exist"
    require(not is_broken_link, link, FileNotFoundError)
    require(not os.path.isdir(path), f"{path} is a folder: name the file that save() wrote")
    missing = f"there is no memory file {path}: name one that save() wrote"
    require(os.path.isfile(path), missing, FileNotFoundError)
    remedy = "copy it again, or read the document again"
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or a part of one ({error}): {remedy}"
        ) from error
    kind, version = metadata.get("format"), metadata.get("version")
    require(
        kind == FORMAT,
        f"{path} is a safetensors file without a memory (its format is {kind!r}, not {FORMAT!r}): "
        f"name a file that MelodiCache.save() wrote; a model is loaded by from_pretrained",
    )
    require(
        version == VERSION,
        f"{path} is of version {version} of the format and this library reads version {VERSION}: "
        f"use the library that wrote it, or read the document again",
    )
    require(
        metadata.pop("sha256", None) == _checksum(tensors, metadata),
        f"{path} was changed after it was written (its checksum does not hold): {remedy}",
    )
    return json.loads(metadata["content"]), tensors


def _checksum(tensors, metadata) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
