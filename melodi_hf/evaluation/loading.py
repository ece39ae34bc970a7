"""A trained model and its tokenizer from a folder or the Hub, with errors that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import melodi_hf  # noqa: F401  the Auto classes know our models from now on
from melodi_hf.data.tokens import load_tokenizer


def load_model(name: str) -> PreTrainedModel:
    """The model in evaluation mode, on the GPU if there is one."""
    model = load(AutoModelForCausalLM.from_pretrained, name, "model")
    if not hasattr(model.config, "window_length"):
        raise ValueError(f"{name} holds a {model.config.model_type} model, which has no windows")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def load_its_tokenizer(model: PreTrainedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that name, refused if it knows ids that the model does not."""
    tokenizer = load(load_tokenizer, name, "tokenizer")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, the model knows "
            f"{model.config.vocab_size}: it was trained with another one"
        )
    return tokenizer


def load(loader: Callable[[str], Any], name: str, kind: str) -> Any:
    remedy = "name a folder that training/train.py left, or a repository of the Hub"
    folder = Path(name)
    # Beside other folders it is one that is missing: the Hub need not be asked, which takes long.
    if not folder.is_dir() and (name.count("/") != 1 or folder.parent.is_dir()):
        raise ValueError(f"there is no folder {name}; {remedy}")
    try:
        return loader(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} gives no {kind} ({error}); {remedy}") from error
