"""The memory of a document in one file: read once, stored, shared, gone on with elsewhere.

A safetensors file whose metadata say what a memory is made of. It is written whole or not at all,
and loads without the model; that it fits is checked when a model reads with it, field by field of
the configuration. A checksum covers all tensors and all metadata.

    metadata   format, version, sha256, content: JSON of
                   config    the fields of the configuration that shape a memory or its meaning
                   fields    per layer, the names of its tensors
                   dtypes    of the tensors while they were held; a file may hold fewer bits
                   columns, fill, weights
    tensors    tokens_read (B), layers.<i>.<field> (B ...), extras.<name>
"""

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
from transformers import PreTrainedConfig

from .adapters import merged_weights, unwrap_decoder

FORMAT = "melodi_hf memory"
VERSION = "1"

# Fields of a configuration that leave a memory and its meaning as they are; all others count.
FREE_FIELDS = {
    "dropout",
    "attention_dropout",
    "initial_embedding_std",
    "initial_temperature",
    "logit_scale",
    "tie_word_embeddings",
    "use_cache",
    "schedule",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
WEIGHT_TOLERANCE = 2**-7  # relative: weights rounded to bfloat16 are still the same weights


# Fields whose name in a file is an earlier one. torch.export takes a field for another one whose
# name begins with its own, so no field may be called "long" beside "long_keys".
NAMES_IN_FILES = {"long_tokens": "long", "state_vectors": "state"}
FIELDS = {in_file: name for name, in_file in NAMES_IN_FILES.items()}


class SavedMemory(NamedTuple):
    """What a memory file holds."""

    config: dict[str, Any]  # the fields that a model must share
    layers: list[Any]  # per layer, a NamedTuple of tensors, rows first
    tokens_read: Tensor  # B, int64
    fill: int | None  # tokens of the open window if all rows hold as many, else None
    columns: int  # read so far, padding included
    extras: dict[str, Tensor]  # whatever else was saved
    weights: dict[str, float] | None  # a sample of the weights that wrote the memory


# Which model a memory belongs to


def memory_fields(config) -> dict[str, Any]:
    """The fields of a configuration that shape a memory or its meaning, as JSON has them."""
    held = vars(config)  # not getattr, which is slow on a configuration
    values = {name: held[name] for name in _names_that_count(type(config))}  # type: ignore[arg-type]
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
    return {"model_type": config.model_type, **plain}


@cache
def _names_that_count(config_class):
    free = PreTrainedConfig.__dataclass_fields__.keys() | FREE_FIELDS | {*config_class.free_fields}
    return sorted(config_class.__dataclass_fields__.keys() - free)


def refuse_memory_of(fields, config):
    """Refuse a memory that belongs to another configuration: `fields`, as `memory_fields` gives
    them, are those of the model that wrote it."""
    own = memory_fields(config)
    if fields == own:
        return
    differ = [name for name in {**own, **fields} if fields.get(name) != own.get(name)]
    if "model_type" in differ:
        differ = ["model_type"]  # the rest follows
    theirs, ours = (
        ", ".join(f"{name}={have.get(name)!r}" for name in differ) for have in (fields, own)
    )
    raise ValueError(
        f"the memory was written by a model with {theirs} and this one has {ours}: it is that of "
        f"another model; go on with that one, or read the document again with this one"
    )


def weights_sample(model) -> dict[str, float]:
    """Take one number of each matrix that writes memories, as it is with adapters merged.

    That is enough to tell checkpoints apart, not to trust them. The same weights have the same
    names, whether adapters of PEFT are merged into them or not, and with a head or without.
    """
    return _sample(merged_weights(unwrap_decoder(model), "model."))


def _sample(named_weights):
    return {
        name: float(weight.detach().flatten()[weight.numel() // 2])
        for name, weight in named_weights
        if weight.dim() > 1 and weight.is_floating_point()
    }


def refuse_other_weights(sample, model):
    """Refuse a model whose weights are not those of a sample, but for rounding."""
    own = _sample(model.named_parameters())
    if not own.keys() <= sample.keys():  # as they are in files of before adapters were merged
        own = weights_sample(model)
    differ = [n for n in own if n not in sample or not _is_near(own[n], sample[n])]
    if differ:
        raise ValueError(
            f"the memory was written by other weights than this model's: {len(differ)} of "
            f"{len(own)} matrices differ, {differ[0]} for one; load the checkpoint that wrote it, "
            f"or read the document again with this one"
        )


def _is_near(a, b):
    return abs(a - b) <= WEIGHT_TOLERANCE * max(abs(a), abs(b))


# Writing


def save_memory_file(memory_cache, path, dtype: torch.dtype | None = None, model=None, extras=None):
    """Write what a cache of memories holds into one file, whole or not at all.

    path: missing folders are made; an existing file is replaced once the new one is complete.
    dtype: of floating-point numbers in the file, such as torch.bfloat16, which halves it; loading
        gives them the type back that they have now, but not the bits.
    model: the one that wrote the memory; the file then tells its weights from others'.
    extras: further tensors, by name.

    Raises `ValueError` for a cache that has read nothing, `OSError` where nothing can be written.
    """
    layers = memory_cache.layers
    if not layers or layers[0].memory is None:
        raise ValueError(f"nothing to write into {path}: the cache has read no token yet")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: a memory is made of floating-point numbers")
    tensors = {"tokens_read": layers[0].progress.tokens_read}
    for i, layer in enumerate(layers):
        for name, tensor in layer.memory._asdict().items():
            tensors[f"layers.{i}.{NAMES_IN_FILES.get(name, name)}"] = tensor
    tensors |= {f"extras.{name}": tensor for name, tensor in (extras or {}).items()}
    content = {
        "config": memory_cache.config_fields,
        "fields": [
            [NAMES_IN_FILES.get(name, name) for name in layer.memory._fields] for layer in layers
        ],
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        "columns": int(layers[0].columns),
        "fill": layers[0].progress.fill,
        "weights": None if model is None else weights_sample(model),
    }
    tensors = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    metadata["sha256"] = _checksum(tensors, metadata)
    _write_whole(save(tensors, metadata), path)


def _stored(tensor, dtype):
    wanted = dtype if tensor.is_floating_point() else None
    return tensor.detach().to("cpu", wanted, copy=True).contiguous()


def _write_whole(data, path):
    # Beside the target, so that the last step is a change of name: there is never half a file.
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, such as {target / 'memory'}")
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


# Reading


def load_memory_file(path, device=None, dtype: torch.dtype | None = None, model=None):
    """Read a memory file -> `SavedMemory`.

    device: where the tensors go, the CPU unless told otherwise.
    dtype: of floating-point numbers; None gives each the type that it had when it was saved.
    model: the one that is to go on. Device and dtype default to its own, and it is refused at once
        if its configuration or, where the file has a sample of them, its weights are others. The
        configuration is checked in any case when a model reads; the weights only here.

    Raises `FileNotFoundError`, and `ValueError` for whatever is not a whole memory file.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: a memory is made of floating-point numbers")
    refuse_missing(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = refuse_foreign_file(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or a part of one ({error}): copy it again, or read "
            f"the document again"
        ) from error
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise ValueError(
            f"{path} was changed after it was written (its checksum does not hold): copy it again, "
            f"or read the document again"
        )
    content = json.loads(metadata["content"])
    if model is not None:
        refuse_memory_of(content["config"], model.config)
        if content["weights"] is not None:
            refuse_other_weights(content["weights"], model)
        device, dtype = device or model.device, dtype or model.dtype
    types = {name: dtype or getattr(torch, held) for name, held in content["dtypes"].items()}
    return _assembled(content, {n: _held(t, device, types[n]) for n, t in tensors.items()})


def refuse_missing(path):
    """Say which kind of nothing lies at a path."""
    place = Path(path)
    if place.is_symlink() and not os.path.exists(path):
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if place.is_dir():
        raise ValueError(f"{path} is a folder: name the file that save() wrote")
    if not place.is_file():
        raise FileNotFoundError(f"there is no memory file {path}: name one that save() wrote")


def refuse_foreign_file(path, metadata) -> dict[str, str]:
    """The metadata of a memory file of this version; those of other files are refused."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file without a memory (its format is "
            f"{metadata.get('format')!r}, not {FORMAT!r}): name a file that MelodiCache.save() "
            f"wrote; a model is loaded by from_pretrained"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {metadata.get('version')} of the format and this library reads "
            f"version {VERSION}: use the library that wrote it, or read the document again"
        )
    return dict(metadata)


def _held(tensor, device, dtype):
    # A copy: what was read may lie in the mapped file, which others may change.
    return tensor.to(device or "cpu", dtype if tensor.is_floating_point() else None, copy=True)


def _assembled(content, tensors):
    layers = []
    for i, names in enumerate(content["fields"]):
        fields = tuple(FIELDS.get(name, name) for name in names)
        memory_type: Any = namedtuple("Memory", fields)  # type: ignore[misc] # from the file
        layers.append(memory_type(*(tensors[f"layers.{i}.{name}"] for name in names)))
    extras = {n.removeprefix("extras."): t for n, t in tensors.items() if n.startswith("extras.")}
    return SavedMemory(
        config=content["config"],
        layers=layers,
        tokens_read=tensors["tokens_read"],
        fill=content["fill"],
        columns=content["columns"],
        extras=extras,
        weights=content["weights"],
    )


def _checksum(tensors, metadata) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
