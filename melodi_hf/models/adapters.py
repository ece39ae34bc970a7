"""Models inside PEFT and other wrappers: the decoder, and its weights with the adapters merged."""

import copy

import torch
from transformers import PreTrainedModel


def unwrap_decoder(model):
    """Return the decoder, such as `MelodiModel`, inside a language model and its wrappers.

    Wrappers are PEFT's models, `DistributedDataParallel`, FSDP's, and compiled modules.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.base_model
    raise ValueError(
        f"model is a {type(model).__name__} without a transformers model inside: pass a model of "
        f"this library, or one that wraps it"
    )


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
        module = copy.deepcopy(module)
        return module.unload_and_optionally_merge_module(True, False, None)
    if not (hasattr(module, "base_layer") and hasattr(module, "merge")):
        return module
    if not (module.merged or module.disable_adapters):
        module = copy.deepcopy(module)
        module.merge()
    return _merge(module.base_layer)
