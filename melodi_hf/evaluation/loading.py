"""A trained model and its tokenizer from a folder or the Hub, with errors that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import melodi_hf  # noqa: F401  the Auto classes know our models from now on
from melodi_hf.data.tokens import load_tokenizer
from melodi_hf.evaluation.command_line import choose_device


def load_model(name: str) -> PreTrainedModel:
    """The model in evaluation mode, on the GPU if there is one."""
    device = choose_device()
    model = load(AutoModelForCausalLM.from_pretrained, name, "model")
    if not hasattr(model.config, "window_length"):
        raise ValueError(f"{name} holds a {model.config.model_type} model, which has no windows")
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
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        remedy = (
            "its weights are pickled, which can run code: if you trust them, convert them once by "
            f"AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False)"
            ".save_pretrained(FOLDER)"
        )
    try:
        return loader(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name} gives no {kind} ({error}); {remedy}") from error
