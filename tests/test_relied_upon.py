"""What CONTRIBUTING lists as relied upon in transformers and torch is there, name by name."""

import inspect
import re
from pathlib import Path

import torch
import transformers
from torch.autograd import forward_ad
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer, cache_utils
from transformers.models.auto import modeling_auto
from transformers.utils import generic, output_capturing

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"

# Where each name is looked up; those set on instances are looked for in the source of their class.
OWNERS = {
    "_layer_type": cache_utils.CacheLayerMixin,
    "STATIC_LAYER_TYPE_MAPPING": cache_utils,
    "generate()": GenerationMixin,
    "prepare_inputs_for_generation": GenerationMixin,
    "_init_weights": PreTrainedModel,
    "_attn_implementation": PreTrainedConfig,
    "_is_stateful": PreTrainedModel,
    "_can_compile_fullgraph": PreTrainedModel,
    "_can_record_outputs": PreTrainedModel,
    "_no_split_modules": PreTrainedModel,
    "_skip_keys_device_placement": PreTrainedModel,
    "_tied_weights_keys": PreTrainedModel,
    "_supports_sdpa": PreTrainedModel,
    "_replicate_for_data_parallel": torch.nn.Module,
    "_validate_model_kwargs": GenerationMixin,
    "init_continuous_batching": GenerationMixin,
    "MODEL_MAPPING_NAMES": modeling_auto,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": modeling_auto,
    "merge_with_config_defaults": generic,
    "can_return_tuple": generic,
    "capture_outputs": output_capturing,
    "_get_num_items_in_batch": Trainer,
    "_clip_grad_norm": Trainer,
    "_save_rng_state": Trainer,
    "_load_rng_state": Trainer,
    "_track_num_input_tokens": Trainer,
    "_save_checkpoint": Trainer,
    "_get_output_dir": Trainer,
    "_tr_loss": Trainer,
    "_globalstep_last_logged": Trainer,
    "_wrap_model": Trainer,
    "torch._dynamo.mark_static_address": torch._dynamo,
    "torch.utils._pytree": torch.utils,
    "torch._C._are_functorch_transforms_active": torch._C,
    "torch._C._functorch.is_legacy_batchedtensor": torch._C._functorch,
    "torch.autograd.forward_ad._current_level": forward_ad,
}
# `transformers serve` of 5.17 has no such name; torch_xla is tried by tests/tpu alone.
ELSEWHERE = {'auto_map["AutoModelForDecision"]', "torch_xla.experimental.scan._scan_impl_flat"}


def test_every_name_of_the_list_is_looked_for():
    section = (
        CONTRIBUTING.read_text().split("## What we rely on in transformers")[1].split("\n## ")[0]
    )
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    listed = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    assert listed == OWNERS.keys() | ELSEWHERE


def is_there(name):
    owner, last = OWNERS[name], name.removesuffix("()").rsplit(".")[-1]
    in_source = inspect.isclass(owner) and f"self.{last}" in inspect.getsource(owner)
    return hasattr(owner, last) or in_source


def test_every_name_is_there():
    missing = [name for name in OWNERS if not is_there(name)]
    assert not missing, f"transformers {transformers.__version__}, torch {torch.__version__}"
