"""Load models and tokenizers from folders or the Hub, with errors that name the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import melodi_hf  # noqa: F401  registers the models with the Auto classes
from melodi_hf.data.tokens import load_tokenizer
from melodi_hf.evaluation.command_line import choose_device


def load_model(name: str) -> PreTrainedModel:
    """Load a model in evaluation mode, on the GPU if there is one."""
    device = choose_device()
    model = load(AutoModelForCausalLM.from_pretrained, name, "model")
    if not hasattr(model.config, "window_length"):
        raise ValueError(
            f"{name} is a {model.config.model_type} model, which has no windows: pass one of "
            "melodi_hf"
        )
    return model.to(device).eval()


def load_matching_tokenizer(model: PreTrainedModel, name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check that its vocabulary fits the model."""
    tokenizer = load(load_tokenizer, name, "tokenizer")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, but the model's vocabulary has "
            f"{model.config.vocab_size}: use the tokenizer of the model"
        )
    return tokenizer


def load(loader: Callable[[str], Any], name: str, kind: str) -> Any:
    remedy = "pass an output folder of training/train.py, or a repository of the Hub"
    folder = Path(name)
    # The parent folder exists, so this is a missing folder and no repository of the Hub.
    if not folder.is_dir() and (name.count("/") != 1 or folder.parent.is_dir()):
        raise ValueError(f"there is no folder {name}; {remedy}")
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        remedy = (
            "the weights are in pickle format, which can run code; if you trust them, convert "
            f"them by AutoModelForCausalLM.from_pretrained({name!r}, "
            "use_safetensors=False).save_pretrained(FOLDER)"
        )
    try:
        return loader(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a {kind} from {name} ({error}); {remedy}") from error
